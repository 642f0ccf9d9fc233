"""Which part of a head is each pixel: the 19 labels of CelebAMask-HQ, in the order of zllrunning/face-parsing.PyTorch.

``geometric`` needs no weights: regions drawn from the 68 landmarks, and hair, neck and cloth by GrabCut; coarse. ``bisenet``
is BiSeNet with that repository's weights. ``unet19`` is a small, noisy network for tests. All take square windows with
their landmarks and answer with whole labels; what lies outside the frame is background for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen.chips import fit_similarity, invert, warp
from models.frozen.together import Together
from models.frozen.weights import find

if TYPE_CHECKING:
    import torch

Image = NDArray[np.uint8]
Labels = NDArray[np.uint8]
ParserName = Literal["geometric", "bisenet", "unet19"]
WEIGHTS: dict[ParserName, tuple[str, ...]] = {
    "geometric": (),
    "bisenet": ("bisenet",),
    "unet19": ("unet19",),
}
"""Entries of ``models.frozen.weights`` that each parser loads."""


class ParsingLabel(IntEnum):
    """One pixel's part. ``L_`` and ``R_`` are the person's own: ``L_EYE`` is on the picture's right."""

    BACKGROUND = 0
    SKIN = 1
    L_BROW = 2
    R_BROW = 3
    L_EYE = 4
    R_EYE = 5
    GLASSES = 6
    L_EAR = 7
    R_EAR = 8
    EARRING = 9
    NOSE = 10
    MOUTH = 11
    UPPER_LIP = 12
    LOWER_LIP = 13
    NECK = 14
    NECKLACE = 15
    CLOTH = 16
    HAIR = 17
    HAT = 18


SIDED = (
    (ParsingLabel.L_BROW, ParsingLabel.R_BROW),
    (ParsingLabel.L_EYE, ParsingLabel.R_EYE),
    (ParsingLabel.L_EAR, ParsingLabel.R_EAR),
)
"""Labels that exist on the person's left and right."""

BATCH = {"cpu": 4, "cuda": 32}
"""Windows in one forward pass. The batch is filled up, so that a window's labels never depend on its neighbours'."""

BISENET_SIZE = 512
UNET19_SIZE = 256
UNET19_FACE = np.array([[0.377, 0.47], [0.623, 0.47], [0.5, 0.74]])
"""Eye centres and mouth of a CelebA-HQ picture, in its sides: what ``unet19`` was trained on."""
# fmt: off
_L = ParsingLabel
UNET19_LABELS = np.array(
    [_L.BACKGROUND, _L.UPPER_LIP, _L.L_BROW, _L.SKIN, _L.R_EAR, _L.R_EYE, _L.NOSE, _L.NECKLACE, _L.L_EAR, _L.GLASSES,
     _L.LOWER_LIP, _L.R_BROW, _L.HAT, _L.HAIR, _L.MOUTH, _L.NECK, _L.CLOTH, _L.L_EYE, _L.EARRING],
    dtype=np.uint8,
)
# fmt: on
"""Label of each of its 19 outputs, which are numbered by the colours of its training masks."""


class Parser(Protocol):
    """Labels the pixels of windows."""

    def parse(
        self,
        crops: Sequence[Image],
        landmarks: NDArray[np.floating],
        inside: Sequence[NDArray[np.bool_]],
    ) -> list[Labels]:
        """One label a pixel.

        Args:
            crops: n RGB windows (size, size, 3).
            landmarks: (n, 68, 2) window pixels.
            inside: n masks (size, size), False where the window shows nothing of the frame.

        Returns:
            n maps (size, size) of :class:`ParsingLabel`, 0 where ``inside`` is False.
        """
        ...


def load_parser(name: ParserName, *, random_init: bool = False) -> Parser:
    """Build a parser with its weights.

    Args:
        name: ``geometric``, ``bisenet`` or ``unet19``.
        random_init: ``bisenet`` only, for tests of speed and shape where its weights cannot be had.

    Raises:
        WeightsError: a weights file is missing or wrong.
    """
    if random_init and name != "bisenet":
        raise ValueError(
            f"parser {name!r} needs no random weights, random_init is for bisenet only"
        )
    match name:
        case "geometric":
            from models.frozen.geometric_parser import GeometricParser

            return GeometricParser()
        case "bisenet":
            return BisenetParser(random_init=random_init)
        case "unet19":
            return Unet19Parser()
    raise ValueError(f"no parser called {name!r}; known: geometric, bisenet, unet19")


class BisenetParser:
    """BiSeNet on whole windows of 512 pixels."""

    def __init__(self, *, random_init: bool = False) -> None:
        import torch

        from models.frozen.bisenet import IMAGENET_MEAN, IMAGENET_STD, BiSeNet, load_bisenet

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        network = BiSeNet().eval() if random_init else load_bisenet(find("bisenet"))
        self.network = network.to(self.device)
        self.mean = torch.tensor(IMAGENET_MEAN, device=self.device)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD, device=self.device)[:, None, None]
        self.classify = Together(partial(classify, self._logits, device=self.device))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network((x / 255 - self.mean) / self.std)
        return logits

    def parse(
        self,
        crops: Sequence[Image],
        landmarks: NDArray[np.floating],  # noqa: ARG002  other parsers need them
        inside: Sequence[NDArray[np.bool_]],
    ) -> list[Labels]:
        """See :class:`Parser`."""
        pictures = [_resize(crop, BISENET_SIZE, cv2.INTER_AREA) for crop in crops]
        found = self.classify(pictures)
        return [
            _resize(labels, crop.shape[0], cv2.INTER_NEAREST) * shown
            for labels, crop, shown in zip(found, crops, inside, strict=True)
        ]


class Unet19Parser:
    """A U-Net of half a million parameters on chips aligned as in CelebA-HQ: noisy, and blind outside the chip.

    It was trained on pictures that were flipped at random while their masks were not, so the side of a brow, eye or ear is
    taken from where it is, not from the network.
    """

    def __init__(self) -> None:
        import torch

        from models.frozen.unet19 import load_unet19

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = load_unet19(find("unet19")).to(self.device)
        self.classify = Together(partial(classify, self._logits, device=self.device))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x / 127.5 - 1)
        return logits

    def parse(
        self,
        crops: Sequence[Image],
        landmarks: NDArray[np.floating],
        inside: Sequence[NDArray[np.bool_]],
    ) -> list[Labels]:
        """See :class:`Parser`."""
        size = (UNET19_SIZE, UNET19_SIZE)
        matrices = [unet19_matrix(points) for points in landmarks]
        chips = [warp(crop, matrix, size) for crop, matrix in zip(crops, matrices, strict=True)]
        found = self.classify(chips)
        parsed = []
        for outputs, matrix, shown in zip(found, matrices, inside, strict=True):
            labels = by_side(UNET19_LABELS[outputs])
            back = invert(matrix)
            back[:, 2] += back[:, :2] @ [0.5, 0.5] - 0.5  # cv2 counts pixel centres from 0
            window = cv2.warpAffine(labels, back, shown.shape[::-1], flags=cv2.INTER_NEAREST)
            parsed.append(np.asarray(window * shown, dtype=np.uint8))
        return parsed


def unet19_matrix(landmarks: NDArray[np.floating]) -> NDArray[np.floating]:
    """68 points (68, 2) to the 2x3 matrix, window → the chip that ``unet19`` is shown."""
    parts = (
        landmarks[36:42].mean(axis=0),
        landmarks[42:48].mean(axis=0),
        landmarks[[48, 54]].mean(axis=0),
    )
    return fit_similarity(np.stack(parts), UNET19_FACE * UNET19_SIZE)


def by_side(labels: Labels) -> Labels:
    """Labels (h, w) of an aligned face with every sided label named after the half it lies in."""
    middle = labels.shape[1] // 2
    right, left = np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)
    for left_label, right_label in SIDED:
        right[left_label], left[right_label] = right_label, left_label
    return np.hstack([right[labels[:, :middle]], left[labels[:, middle:]]])


def classify(
    logits: Callable[[torch.Tensor], torch.Tensor], pictures: Sequence[Image], device: str
) -> list[Labels]:
    """The strongest output at each pixel.

    Args:
        logits: float RGB in 0..255, (b, 3, h, w), to (b, k, h, w).
        pictures: n of (h, w, 3).
        device: ``cpu`` or ``cuda``.

    Returns:
        n maps (h, w) of outputs 0..k-1.
    """
    import torch

    batch = BATCH[device]
    found: list[Labels] = []
    for start in range(0, len(pictures), batch):
        chunk = np.stack(pictures[start : start + batch])
        padded = np.zeros((batch, *chunk.shape[1:]), dtype=np.uint8)
        padded[: len(chunk)] = chunk
        with torch.inference_mode():
            x = torch.from_numpy(padded).to(device).permute(0, 3, 1, 2).float()
            best = logits(x)[: len(chunk)].argmax(dim=1).to(torch.uint8)
        found.extend(best.cpu().numpy())
    return found


def _resize(picture: NDArray[np.uint8], size: int, interpolation: int) -> NDArray[np.uint8]:
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(
        cv2.resize(picture, (size, size), interpolation=interpolation), dtype=np.uint8
    )
