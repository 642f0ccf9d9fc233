"""Pupils of faces whose 68 landmarks are known, by MediaPipe's iris network. numpy and cv2 only.

``iris_landmark.tflite`` (Ablavatski et al. 2020, "Real-time pupil tracking from monocular video for digital puppetry", arXiv
2006.11341) looks at one eye in a square of 64 px and answers with 71 points of lids and brow and 5 of the iris, its centre first. The
square is that of MediaPipe's graph: 2.3 times as wide as the eye, around the middle of its corners, turned with them. The network
knows the eye on the picture's left; the other is shown to it mirrored.

A closed eye has no pupil, but the network names a place all the same. What is believed of it fades with the opening of the lids that
the network itself sees; the rest is the middle of the lids' landmarks, where :func:`models.motion.layout.with_pupils` puts unknown
pupils. So nothing jumps while an eye closes, and every eye has a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen.chips import Floats, Image, invert, square_matrix, transform, warp
from models.frozen.weights import find

PupilSource = Literal["none", "iris"]
WEIGHTS: dict[PupilSource, tuple[str, ...]] = {"none": (), "iris": ("iris",)}
"""Entries of ``models.frozen.weights`` that each source loads."""

SIZE = 64
EYE_SIDES = 2.3
"""Side of the square that is shown, in distances of the eye's corners."""
EYES = np.array([range(36, 42), range(42, 48)])
"""Landmarks of the eye on the picture's left and of that on its right: left corner, upper lid, right corner, lower lid."""
LOWER_LID, UPPER_LID = slice(1, 8), slice(9, 16)
"""Of the network's 71 points, from the outer corner (0) to the inner (8), without both."""
SHUT, OPEN = 0.15, 0.22
"""Opening of the lids in eye widths up to which nothing, and from which everything is believed. In clips shut eyes have 0.04 to 0.17,
half-shut ones 0.15 to 0.25; the eyes of 18 photographs have at least 0.22."""
NEAR, ASTRAY = 0.1, 0.2
"""Eye widths outside of the lids' landmarks up to which all, and from which nothing is believed."""


class Pupils(NamedTuple):
    """Pupils of n faces, of the eye on the picture's left first."""

    points: Floats
    """(n, 2, 2) pixels of the pictures; never NaN."""
    seen: Floats
    """(n, 2) how much of each place is the iris's, from 0 (the middle of the lids) to 1."""


class PupilFinder:
    """MediaPipe's iris network, 5 ms an eye on one core."""

    def __init__(self) -> None:
        """Raises ``WeightsError``."""
        path = str(find("iris"))
        # OpenCV 5's new engine gives one of the two outputs only
        engine = getattr(cv2.dnn, "ENGINE_CLASSIC", None)
        self._network = cv2.dnn.readNetFromTFLite(path, *([] if engine is None else [engine]))
        self._lock = Lock()

    def locate(self, images: Sequence[Image], landmarks: Floats) -> Pupils:
        """The pupils of one face in each picture. May be called by several threads.

        Args:
            images: n RGB pictures (h, w, 3) of any sizes.
            landmarks: (n, 68, 2) iBUG points, pixels of the pictures.
        """
        faces = [self._face(*pair) for pair in zip(images, landmarks, strict=True)]
        points = np.array([face.points for face in faces]).reshape(-1, 2, 2)
        return Pupils(points, np.array([face.seen for face in faces]).reshape(-1, 2))

    def _face(self, image: Image, landmarks: Floats) -> Pupils:
        """Of one face, without the first axis."""
        eyes = landmarks[EYES].astype(np.float64)
        matrices = [eye_window(eye) for eye in eyes]
        left, right = (warp(image, matrix, (SIZE, SIZE)) for matrix in matrices)
        lids, irises = self._look(np.stack([left, right[:, ::-1]]))
        openings = np.array([opening(points) for points in lids])
        points, seen = np.empty((2, 2)), np.empty(2)
        for i, (eye, matrix) in enumerate(zip(eyes, matrices, strict=True)):
            shown = transform(matrix, eye)
            # both eyes blink: of one that is hard to see the other knows
            least = min(openings[i], openings.mean())
            seen[i] = share(least, SHUT, OPEN) * share(-outside(shown, irises[i]), -ASTRAY, -NEAR)
            middle = shown.mean(axis=0)
            points[i] = transform(invert(matrix), middle + seen[i] * (irises[i] - middle))
        return Pupils(points, seen)

    def _look(self, crops: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """The network on the two eyes of a face, always both at once, so that nothing depends on other faces.

        Args:
            crops: (2, 64, 64, 3), the second mirrored.

        Returns:
            (2, 71, 2) lids and brows and (2, 2) irises in pixels of the crops, neither mirrored.
        """
        pixels = np.ascontiguousarray(crops.transpose(0, 3, 1, 2), np.float32) / 255
        with self._lock:
            self._network.setInput(pixels)
            answers = self._network.forward(["output_eyes_contours_and_brows", "output_iris"])
        lids, iris = (np.array(x, np.float64).reshape(2, -1, 3)[..., :2] for x in answers)
        for points in (lids, iris):
            points[1, :, 0] = SIZE - points[1, :, 0]
        return lids, iris[:, 0]


def eye_window(eye: Floats) -> Floats:
    """Picture → the square (2x3) that is shown of an eye (6, 2)."""
    across = eye[3] - eye[0]
    side = EYE_SIDES * max(float(np.hypot(*across)), 1.0)
    return square_matrix((eye[0] + eye[3]) / 2, side, np.arctan2(across[1], across[0]), SIZE)


def opening(lids: Floats) -> float:
    """Greatest distance of upper and lower lid, of the network's points (71, 2) in the shown square, in eye widths."""
    gaps = np.linalg.norm(lids[UPPER_LID] - lids[LOWER_LID], axis=1)
    return float(gaps.max()) * EYE_SIDES / SIZE


def outside(eye: Floats, point: Floats) -> float:
    """Eye widths by which a point (2,) of the shown square lies outside of the lids' landmarks (6, 2); negative inside."""
    around = cv2.convexHull(eye.astype(np.float32))
    inside = cv2.pointPolygonTest(around, (float(point[0]), float(point[1])), measureDist=True)
    return -float(inside) * EYE_SIDES / SIZE


def share(value: float, none: float, full: float) -> float:
    """0 up to ``none``, 1 from ``full``, in between what lies in between."""
    return float(np.clip((value - none) / (full - none), 0, 1))
