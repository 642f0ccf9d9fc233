"""How the points of a face move between neighbouring frames, by optical flow: for landmarks, see :mod:`pipelines.smoothing`.

Pyramidal Lucas-Kanade there and back (Bouguet 2001; OpenCV's), in small grey pictures that follow the face, so that a moving head
is nearly still in them. A point that does not come back to where it began is not believed (spec-sparse-motion §8.2). OpenCV and
numpy only; one frame's small picture is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.geometry import Floats, Image

SIDE = 256
"""Of the small pictures, px: the size of the motion model's, in which the spec's other lengths are meant."""
REACH = 1.6
"""Of what they show, in sides of the face box."""
WINDOW = 15
"""Of Lucas and Kanade, px."""
LEVELS = 3
"""Of the pyramid."""
MOST_RETURN = 1.0
"""Farthest a point may come back from where it began, px of the small picture."""


def grey_face(image: Image, box: Floats) -> tuple[NDArray[np.uint8], float, Floats]:
    """The face in grey, (SIDE, SIDE), with the scale and corner that take frame pixels p to its own: ``scale (p - corner)``.

    Args:
        image: RGB (h, w, 3).
        box: (4,) about square, frame pixels; what lies outside the frame repeats its rim.
    """
    side = max(round(REACH * float(np.sqrt(np.prod(box[2:] - box[:2])))), 1)
    left, top = np.round((box[:2] + box[2:]) / 2 - side / 2).astype(int)
    height, width = image.shape[:2]
    rows = np.clip([top, top + side], 0, height)
    columns = np.clip([left, left + side], 0, width)
    inside = image[rows[0] : rows[1], columns[0] : columns[1]]
    if not inside.size:
        return np.zeros((SIDE, SIDE), np.uint8), SIDE / side, np.array([left, top], float)
    grey = cv2.cvtColor(inside, cv2.COLOR_RGB2GRAY)
    margins = (rows[0] - top, top + side - rows[1], columns[0] - left, left + side - columns[1])
    if any(margins):
        grey = cv2.copyMakeBorder(grey, *margins, cv2.BORDER_REPLICATE)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR)  # fmt: skip
    return np.asarray(small, np.uint8), SIDE / side, np.array([left, top], float)


class FaceFlow:
    """Gathers how far each point of one face moved since the frame before."""

    def __init__(self) -> None:
        self.moves: dict[int, Floats] = {}
        """(k, 2) frame px by frame index, where the frame before was seen, too; NaN where a point is not believed."""
        self._last: tuple[int, NDArray[np.uint8], float, Floats, Floats] | None = None

    def add(self, index: int, image: Image, box: Floats, points: Floats) -> None:
        """The next frame.

        Args:
            index: of the frame, increasing.
            image: RGB (h, w, 3).
            box: (4,) of the face, steady (:func:`pipelines.smoothing.steady_boxes`).
            points: (k, 2) where the points were found.
        """
        grey, scale, corner = grey_face(image, box)
        if self._last is not None and self._last[0] == index - 1:
            _, before, old_scale, old_corner, old = self._last
            moved = follow(before, grey, old_scale * (old - old_corner))
            self.moves[index] = moved / scale + corner - old
        self._last = index, grey, scale, corner, np.asarray(points, float)

    def along(self, indices: Sequence[int], count: int = 68) -> Floats:
        """Moves (n, count, 2) of frames, NaN for those that have none."""
        unknown = np.full((count, 2), np.nan)
        return np.array([self.moves.get(index, unknown) for index in indices]).reshape(-1, count, 2)


def follow(before: NDArray[np.uint8], after: NDArray[np.uint8], points: Floats) -> Floats:
    """Where points (k, 2) of one small picture are in the next; NaN for those that do not come back."""
    start = (points - 0.5).astype(np.float32)[:, None]  # OpenCV counts pixel centres from 0
    there, is_found = _track(before, after, start)
    back, is_back = _track(after, before, there)
    astray = np.linalg.norm(back - start, axis=2)[:, 0]
    believed = is_found & is_back & (astray <= MOST_RETURN)
    return np.where(believed[:, None], there[:, 0].astype(float) + 0.5, np.nan)


def _track(
    before: NDArray[np.uint8], after: NDArray[np.uint8], start: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Where points (k, 1, 2), OpenCV's pixels, are in the next picture, and which of them (k,) were followed."""
    nowhere = np.zeros_like(start)
    found, is_found, _ = cv2.calcOpticalFlowPyrLK(
        before, after, start, nowhere, winSize=(WINDOW, WINDOW), maxLevel=LEVELS - 1
    )
    return np.asarray(found, np.float32), np.asarray(is_found)[:, 0] == 1
