"""68 facial landmarks (iBUG order) inside given face boxes.

``dlib`` is the regression-tree predictor whose weights come in a wheel; ``fan`` is 2DFAN-4 of face-alignment (Bulat and
Tzimiropoulos 2017) with its own weights, decoded with sub-pixel precision. Both take the tight boxes of
``models.frozen.detector`` and answer in image pixels, pixel centres at integer + 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.frozen.chips import invert, square_matrix, transform, warp
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
"""Faces in one forward pass. The batch is filled up, so that a face's points never depend on its neighbours'."""


class Landmarker(Protocol):
    """Finds the 68 points of every given face."""

    def locate(self, image: Image, boxes: NDArray[np.floating]) -> Points:
        """Points of the faces in one RGB image (h, w, 3): tight boxes (m, 4) to (m, 68, 2) image pixels."""
        ...

    def locate_many(
        self, images: Sequence[Image], boxes: Sequence[NDArray[np.floating]]
    ) -> list[Points]:
        """:meth:`locate` for several images at once, which keeps a GPU busy."""
        ...


def load_landmarker(name: LandmarkerName, *, random_init: bool = False) -> Landmarker:
    """Build a landmarker with its weights.

    Args:
        name: ``dlib`` or ``fan``.
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
            return FanLandmarker(random_init=random_init)
    raise ValueError(f"no landmarker called {name!r}; known: dlib, fan")


class DlibLandmarker:
    """dlib's 68-point shape predictor, about 2.5 ms a face."""

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
    """2DFAN-4, averaged over the picture and its mirror image. Wants a GPU: about a second a face on one core."""

    def __init__(self, *, random_init: bool = False) -> None:
        import torch
        from face_alignment.models import FAN

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch = FAN_BATCH[self.device]
        self.network = FAN(4)
        if not random_init:
            state = torch.load(find("fan"), map_location="cpu", weights_only=True)
            self.network.load_state_dict(state)
        self.network.eval().to(self.device)

    def locate(self, image: Image, boxes: NDArray[np.floating]) -> Points:
        """See :class:`Landmarker`."""
        return self.locate_many([image], [boxes])[0]

    def locate_many(
        self, images: Sequence[Image], boxes: Sequence[NDArray[np.floating]]
    ) -> list[Points]:
        """See :class:`Landmarker`."""
        matrices, crops = [], []
        for image, faces in zip(images, boxes, strict=True):
            for box in faces:
                matrices.append(fan_matrix(box))
                crops.append(warp(image, matrices[-1], (FAN_SIZE, FAN_SIZE)))
        points = [
            transform(invert(matrix), cells * (FAN_SIZE / FAN_CELLS))
            for matrix, cells in zip(matrices, self._cells(crops), strict=True)
        ]
        flat = np.array(points, dtype=np.float32).reshape(-1, 68, 2)
        return np.split(flat, np.cumsum([len(faces) for faces in boxes])[:-1])

    def _cells(self, crops: Sequence[Image]) -> list[NDArray[np.float64]]:
        """Crops (256, 256, 3) to points (68, 2) in heat-map cells."""
        import torch

        decoded: list[NDArray[np.float64]] = []
        for start in range(0, len(crops), self.batch):
            chunk = np.stack(crops[start : start + self.batch])
            padded = np.zeros((self.batch, *chunk.shape[1:]), dtype=np.uint8)
            padded[: len(chunk)] = chunk
            pictures = torch.from_numpy(padded).to(self.device).permute(0, 3, 1, 2) / 255
            with torch.inference_mode():
                heat = self._heat(pictures)[: len(chunk)]
            decoded.extend(decode_heat(heat.float().cpu().numpy()))
        return decoded

    def _heat(self, pictures: torch.Tensor) -> torch.Tensor:
        """(b, 3, 256, 256) in [0, 1] to (b, 68, 64, 64), the mean over picture and mirror image."""
        from face_alignment.utils import flip

        mirrored = flip(self.network(flip(pictures))[-1], is_label=True)
        return (self.network(pictures)[-1] + mirrored) / 2


def fan_matrix(box: NDArray[np.floating]) -> NDArray[np.floating]:
    """Tight box (4,) to the 2x3 matrix, image → the 256 px square that 2DFAN-4 is shown."""
    box = np.asarray(box[:4], dtype=np.float64)
    tight = float(np.sqrt(np.prod(box[2:] - box[:2])))
    centre = (box[:2] + box[2:]) / 2 - [0.0, FAN_UP * tight]
    return square_matrix(centre, FAN_SIDE * tight, 0.0, FAN_SIZE)


def decode_heat(heat: NDArray[np.floating]) -> NDArray[np.float64]:
    """Heat maps (b, k, h, w) to the peaks' positions (b, k, 2) in cells, cell centres at integer + 0.5.

    Around the largest cell the logarithm is taken for a parabola along each axis, which is exact for a Gaussian of any
    width (the idea of DARK, Zhang et al. 2020). A peak at the rim stays in its cell.
    """
    batch, points, height, width = heat.shape
    logs = np.log(np.maximum(heat.astype(np.float64), 1e-6))
    y, x = np.divmod(logs.reshape(batch, points, -1).argmax(axis=-1), width)
    b, k = np.ogrid[:batch, :points]
    peak = logs[b, k, y, x]

    def offset(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
        curve = 2 * peak - before - after
        return np.divide(after - before, 2 * curve, out=np.zeros_like(peak), where=curve > 1e-9)

    dx = offset(logs[b, k, y, np.maximum(x - 1, 0)], logs[b, k, y, np.minimum(x + 1, width - 1)])
    dy = offset(logs[b, k, np.maximum(y - 1, 0), x], logs[b, k, np.minimum(y + 1, height - 1), x])
    dx[(x == 0) | (x == width - 1)] = 0
    dy[(y == 0) | (y == height - 1)] = 0
    return np.stack([x + 0.5 + dx, y + 0.5 + dy], axis=-1)
