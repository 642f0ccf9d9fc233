"""68 facial landmarks (iBUG order) inside given face boxes.

``dlib`` is the regression-tree predictor whose weights come in a wheel; ``fan`` is 2DFAN-4 of face-alignment (Bulat and
Tzimiropoulos 2017) with its own weights, decoded with sub-pixel precision. Both take the tight boxes of
``models.frozen.detector`` and answer in image pixels, pixel centres at integer + 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen.chips import compose, invert, square_matrix, transform, warp
from models.frozen.together import Together
from models.frozen.weights import find

if TYPE_CHECKING:
    import torch

Image = NDArray[np.uint8]
Points = NDArray[np.float32]
LandmarkerName = Literal["dlib", "fan"]
WEIGHTS: dict[LandmarkerName, tuple[str, ...]] = {"dlib": ("dlib_landmarks",), "fan": ("fan",)}
"""Entries of ``models.frozen.weights`` that each landmarker loads."""

DLIB_FACE = 300
"""dlib answers in whole pixels: faces whose box is smaller are enlarged to this first. On a clip of 115 px boxes the
jitter falls by a quarter; larger faces gain nothing."""
DLIB_MARGIN = 0.5
"""Of the enlarged region around the box, in box sides: the predictor reads pixels outside the box, too."""

FAN_SIZE, FAN_CELLS = 256, 64
FAN_SIDE, FAN_UP = 2.32, 0.226
"""The square shown to 2DFAN-4, in sides of the tight box: its side, and how far its centre lies above the box's.
face-alignment shows it 200/195 (w + h) of an S3FD box, 0.12 h above its centre; such a box is 0.96 x 1.30 tight boxes and
lies 0.07 higher (``WIDER_FIT``, and 1.31 hulls by latent pose reenactment)."""
FAN_BATCH = {"cpu": 1, "cuda": 32}
"""Faces in one forward pass. The batch is filled up, so that a face's points never depend on its neighbours'. On a CPU larger
batches gain nothing (benchmarks/README.md)."""
IMAGES_AT_ONCE = 8
"""Full frames worth having in memory for one call, where faces are looked at one by one."""


@dataclass(frozen=True, kw_only=True)
class FanConfig:
    """How 2DFAN-4 is run."""

    flip: bool = True
    """Average over the picture and its mirror image, which takes twice as long."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster on a GPU, and twice as fast on a CPU that has avx512_bf16 or amx_bf16; on others it is slower. Heat maps
    change by 1 % (measured with random weights), which moves nine of ten peaks by less than 0.05 cells, or 0.2 px of the 256 px
    square, if they are Gaussians of 1.5 cells or narrower."""


class Landmarker(Protocol):
    """Finds the 68 points of every given face."""

    @property
    def images_at_once(self) -> int:
        """How many images to give to :meth:`locate_many` at once, if there are so many."""
        ...

    def locate(self, image: Image, boxes: NDArray[np.floating]) -> Points:
        """Points of the faces in one RGB image (h, w, 3): tight boxes (m, 4) to (m, 68, 2) image pixels."""
        ...

    def locate_many(
        self, images: Sequence[Image], boxes: Sequence[NDArray[np.floating]]
    ) -> list[Points]:
        """:meth:`locate` for several images at once, which keeps a GPU busy."""
        ...


def load_landmarker(
    name: LandmarkerName, *, fan: FanConfig | None = None, random_init: bool = False
) -> Landmarker:
    """Build a landmarker with its weights.

    Args:
        name: ``dlib`` or ``fan``.
        fan: how ``fan`` is run.
        random_init: ``fan`` only, for tests of speed and shape where its weights cannot be had.

    Raises:
        WeightsError: a weights file is missing or wrong.
    """
    if random_init and name != "fan":
        raise ValueError(f"landmarker {name!r} has real weights, random_init is for fan only")
    match name:
        case "dlib":
            return DlibLandmarker()
        case "fan":
            return FanLandmarker(fan, random_init=random_init)
    raise ValueError(f"no landmarker called {name!r}; known: dlib, fan")


class DlibLandmarker:
    """dlib's 68-point shape predictor, about 2.5 ms a face."""

    images_at_once = IMAGES_AT_ONCE

    def __init__(self) -> None:
        import dlib

        self.rectangle = dlib.rectangle
        self.predict = dlib.shape_predictor(str(find("dlib_landmarks")))

    def locate(self, image: Image, boxes: NDArray[np.floating]) -> Points:
        """See :class:`Landmarker`."""
        image = np.ascontiguousarray(image)
        return np.array([self._face(image, box) for box in boxes], np.float32).reshape(-1, 68, 2)

    def locate_many(
        self, images: Sequence[Image], boxes: Sequence[NDArray[np.floating]]
    ) -> list[Points]:
        """See :class:`Landmarker`."""
        return [self.locate(*pair) for pair in zip(images, boxes, strict=True)]

    def _face(self, image: Image, box: NDArray[np.floating]) -> NDArray[np.floating]:
        left, top, right, bottom = np.asarray(box[:4], dtype=np.float64)
        side = np.sqrt((right - left) * (bottom - top))
        if side >= DLIB_FACE:
            return self._predict(image, [left, top, right, bottom])
        size = round(DLIB_FACE * (1 + 2 * DLIB_MARGIN))
        centre = (left + right) / 2, (top + bottom) / 2
        matrix = square_matrix(centre, side * size / DLIB_FACE, 0.0, size)
        first, last = (size - DLIB_FACE) / 2, (size + DLIB_FACE) / 2
        region = warp(image, matrix, (size, size))
        return transform(invert(matrix), self._predict(region, [first, first, last, last]))

    def _predict(self, image: Image, box: Sequence[float]) -> NDArray[np.float64]:
        left, top, right, bottom = (round(float(edge)) for edge in box)
        shape = self.predict(image, self.rectangle(left, top, right - 1, bottom - 1))
        return np.array([[point.x + 0.5, point.y + 0.5] for point in shape.parts()])


class FanLandmarker:
    """2DFAN-4. Wants a GPU: half a second a face on one core, the mirror image as much again."""

    def __init__(self, config: FanConfig | None = None, *, random_init: bool = False) -> None:
        import torch
        from face_alignment.models import FAN

        self.config = config or FanConfig()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch = FAN_BATCH[self.device]
        self.images_at_once = max(IMAGES_AT_ONCE, self.batch)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.config.precision]
        network = FAN(4)
        if not random_init:
            state = torch.load(find("fan"), map_location="cpu", weights_only=True)
            network.load_state_dict(state)
        self.network: torch.nn.Module = network.eval().to(self.device, self.dtype)
        # a tenth to a fifth faster on a CPU, and what tensor cores want
        self.network = self.network.to(memory_format=torch.channels_last)
        self.decoded = Together(self._decoded)

    def locate(self, image: Image, boxes: NDArray[np.floating]) -> Points:
        """See :class:`Landmarker`."""
        return self.locate_many([image], [boxes])[0]

    def locate_many(
        self, images: Sequence[Image], boxes: Sequence[NDArray[np.floating]]
    ) -> list[Points]:
        """See :class:`Landmarker`; the images may be of several videos."""
        shown = [
            (image, fan_matrix(box))
            for image, faces in zip(images, boxes, strict=True)
            for box in faces
        ]
        points = [
            transform(invert(matrix), cells * (FAN_SIZE / FAN_CELLS))
            for (_, matrix), cells in zip(shown, self._cells(shown), strict=True)
        ]
        flat = np.array(points, dtype=np.float32).reshape(-1, 68, 2)
        return np.split(flat, np.cumsum([len(faces) for faces in boxes])[:-1])

    def _cells(self, shown: Sequence[tuple[Image, NDArray[np.floating]]]) -> Points:
        """Images with the matrix of one face each to points (n, 68, 2) in heat-map cells."""
        import torch

        decoded: list[torch.Tensor] = []
        for start in range(0, len(shown), self.batch):
            # nothing waits for the GPU here: it works while the next crops are cut
            decoded += self.decoded([fan_crop(*pair) for pair in shown[start : start + self.batch]])
        if not decoded:
            return np.zeros((0, 68, 2), np.float32)
        cells: Points = torch.stack(decoded).cpu().numpy()
        return cells

    def _decoded(self, crops: Sequence[Image]) -> list[torch.Tensor]:
        """Pictures (256, 256, 3) to points (68, 2) in heat-map cells each, on the device, in full batches."""
        import torch

        decoded: list[torch.Tensor] = []
        for start in range(0, len(crops), self.batch):
            chunk = crops[start : start + self.batch]
            padded = np.zeros((self.batch, FAN_SIZE, FAN_SIZE, 3), dtype=np.uint8)
            padded[: len(chunk)] = chunk
            with torch.inference_mode():
                decoded += decode_heat(self.heat(padded))[: len(chunk)].unbind()
        return decoded

    def heat(self, crops: Image) -> torch.Tensor:
        """Heat maps (b, 68, 64, 64) of :func:`fan_crop` (b, 256, 256, 3), in the configured precision."""
        import torch
        from face_alignment.utils import flip

        # uint8 pictures that stand last-channel-first in memory are in channels_last already
        pictures = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 255
        heat: torch.Tensor = self.network(pictures)[-1]
        if not self.config.flip:
            return heat
        mirrored = flip(self.network(flip(pictures))[-1], is_label=True)
        return (heat.float() + mirrored.float()) / 2


def fan_matrix(box: NDArray[np.floating]) -> NDArray[np.floating]:
    """Tight box (4,) to the 2x3 matrix, image → the 256 px square that 2DFAN-4 is shown."""
    box = np.asarray(box[:4], dtype=np.float64)
    tight = float(np.sqrt(np.prod(box[2:] - box[:2])))
    centre = (box[:2] + box[2:]) / 2 - [0.0, FAN_UP * tight]
    return square_matrix(centre, FAN_SIDE * tight, 0.0, FAN_SIZE)


def fan_crop(image: Image, matrix: NDArray[np.floating]) -> Image:
    """The picture (256, 256, 3) that 2DFAN-4 is shown of an image.

    Large faces are first shrunk by a whole number, averaging blocks of pixels, and then resampled once: 1.5 ms a face of any
    size, where :func:`models.frozen.chips.warp` takes 11 ms for one of 300 px, longer than a GPU takes for the rest. The
    factor leaves a shrinking below 1.5, at which bicubic sampling hardly aliases.

    Args:
        image: (h, w, 3).
        matrix: of :func:`fan_matrix`: no rotation.
    """
    factor = max(1, round(1 / float(matrix[0, 0])))
    corners = transform(invert(matrix), [[0, 0], [FAN_SIZE, FAN_SIZE]])
    height, width = image.shape[:2]
    # two cells more on each side for the bicubic kernel
    left, top = np.clip(np.floor(corners[0]) - 2 * factor, 0, [width, height]).astype(int)
    right, bottom = np.clip(np.ceil(corners[1]) + 2 * factor, 0, [width, height]).astype(int)
    if right <= left or bottom <= top:
        return np.zeros((FAN_SIZE, FAN_SIZE, 3), dtype=np.uint8)
    part: NDArray[Any] = image[top:bottom, left:right]
    if factor > 1:
        down, across = -part.shape[0] % factor, -part.shape[1] % factor
        part = cv2.copyMakeBorder(part, 0, down, 0, across, cv2.BORDER_CONSTANT)
        small = part.shape[1] // factor, part.shape[0] // factor
        part = cv2.resize(part, small, interpolation=cv2.INTER_AREA)
    back = np.array([[factor, 0.0, left], [0.0, factor, top]])
    near = compose(matrix, back)
    near[:, 2] += near[:, :2] @ [0.5, 0.5] - 0.5  # cv2 counts pixel centres from 0
    size = (FAN_SIZE, FAN_SIZE)
    seen = cv2.warpAffine(part, near, size, flags=cv2.INTER_CUBIC, borderValue=0)
    return np.asarray(seen, dtype=np.uint8)


def decode_heat(heat: torch.Tensor) -> torch.Tensor:
    """Heat maps (b, k, h, w) to the peaks' positions (b, k, 2) in cells, cell centres at integer + 0.5.

    Around the largest cell the logarithm is taken for a parabola along each axis, which is exact for a Gaussian of any
    width (the idea of DARK, Zhang et al. 2020). A peak at the rim stays in its cell. On the heat maps' device, in float64.
    """
    import torch

    height, width = heat.shape[-2:]
    flat = heat.float().flatten(2)
    best = flat.argmax(dim=2)
    y, x = best // width, best % width
    inside_x, inside_y = (x > 0) & (x < width - 1), (y > 0) & (y < height - 1)
    step_x, step_y = inside_x.long(), width * inside_y.long()  # at the rim: the peak itself
    around = torch.stack([best, best - step_x, best + step_x, best - step_y, best + step_y], dim=2)
    values = flat.gather(2, around)
    peak, left, right, up, down = values.double().clamp_min(1e-6).log().unbind(dim=2)

    def offset(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        curve = 2 * peak - before - after
        return torch.where(curve > 1e-9, (after - before) / (2 * curve).clamp_min(1e-9), 0.0)

    return torch.stack([x + 0.5 + offset(left, right), y + 0.5 + offset(up, down)], dim=2)
