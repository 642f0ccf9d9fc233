"""Drawn eyes whose pupils are known, and a way to find an iris that shares nothing with the network's."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen.chips import Floats, square_matrix, transform, warp
from models.frozen.chips import invert as inverse
from models.frozen.pupils import EYES
from tests.faces import FACE_68

FINE = 4
"""Pictures are drawn so many times larger."""
SKIN, IRIS, WHITE, LASHES, FOLD = (205, 160, 135), (70, 95, 120), (228, 222, 218), (45, 30, 28), (165, 120, 100)  # fmt: skip
SEARCHED = 64


def drawn(gaze: tuple[float, float], size: int = 256) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Two eyes with brows on bare skin that look somewhere.

    Args:
        gaze: how far the pupils are from straight ahead, right and down, in eye widths.
        size: side of the picture.

    Returns:
        RGB picture; (68, 2) points and (2, 2) pupils in its pixels.
    """
    points = (FACE_68 * 0.42 + 0.5) * size
    image = np.full((FINE * size, FINE * size, 3), SKIN, np.float32)
    pupils = [_draw_eye(image, points, eye, gaze) for eye in EYES]
    image = cv2.GaussianBlur(image, (0, 0), FINE / 2)
    small = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return np.clip(small, 0, 255).astype(np.uint8), points, np.stack(pupils)


def _draw_eye(
    image: NDArray[np.float32], points: Floats, eye: Floats, gaze: tuple[float, float]
) -> Floats:
    """Draw one eye, put the lids' points on its lids, return its pupil."""
    left, right = points[eye[0]], points[eye[3]]
    width = float(np.hypot(*(right - left)))
    along = (right - left) / width
    down = np.array([-along[1], along[0]])
    middle = (left + right) / 2
    places = np.linspace(-1, 1, 61)

    def arc(height: float) -> Floats:
        bow = height * width * (1 - places**2) * (1 - 0.15 * places**2)
        return middle + np.outer(places * width / 2, along) + np.outer(bow, down)

    def line(path: Floats, colour: tuple[int, ...], thickness: float) -> None:
        fine = np.round(path * FINE).astype(np.int32)
        cv2.polylines(image, [fine], False, colour, max(round(thickness * width * FINE), 1), cv2.LINE_AA)  # fmt: skip

    upper, lower = arc(-0.22), arc(0.14)
    points[eye[[1, 2, 4, 5]]] = upper[20], upper[40], lower[40], lower[20]
    pupil = middle + width * (gaze[0] * along + (gaze[1] - 0.04) * down)
    ball = np.full(image.shape, WHITE, np.float32)
    x, y = np.round(pupil * FINE).astype(int).tolist()
    for radius, colour in ((0.215, np.array(IRIS) / 2), (0.185, IRIS), (0.08, (12, 10, 10))):
        cv2.circle(ball, (x, y), round(radius * width * FINE), [float(c) for c in colour], -1, cv2.LINE_AA)  # fmt: skip
    shine = round(0.05 * width * FINE)
    cv2.circle(ball, (x + shine, y - shine), shine // 2, (250, 250, 250), -1, cv2.LINE_AA)
    mask = np.zeros(image.shape[:2], np.float32)
    cv2.fillPoly(mask, [np.round(np.vstack([upper, lower[::-1]]) * FINE).astype(np.int32)], 1)
    ball *= 0.55 + 0.45 * cv2.GaussianBlur(mask, (0, 0), 0.05 * width * FINE)[:, :, None]
    np.copyto(image, ball, where=mask[:, :, None] > 0)
    line(upper, LASHES, 0.05)
    line(lower, (150, 105, 90), 0.02)
    line(arc(-0.23) - 0.07 * width * down, FOLD, 0.025)
    line(arc(-0.16) - 0.42 * width * down, (70, 50, 40), 0.12)
    return np.asarray(pupil)


def iris_by_gradients(image: NDArray[np.uint8], eye: Floats) -> Floats:
    """Where most normals of dark edges meet between the lids (Timm and Barth 2011, "Accurate eye centre localisation by means of
    gradients"): (2,) of an eye (6, 2)."""
    across = eye[3] - eye[0]
    matrix = square_matrix(
        (eye[0] + eye[3]) / 2,
        1.3 * float(np.hypot(*across)),
        np.arctan2(across[1], across[0]),
        SEARCHED,
    )
    window = warp(image, matrix, (SEARCHED, SEARCHED))
    grey = cv2.GaussianBlur(
        cv2.cvtColor(window, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1.5
    )
    slopes = np.stack([cv2.Sobel(grey, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1))], axis=-1)
    steep = np.linalg.norm(slopes, axis=-1)
    lids = np.zeros((SEARCHED, SEARCHED), np.uint8)
    cv2.fillConvexPoly(
        lids, np.round(cv2.convexHull(transform(matrix, eye).astype(np.float32))).astype(int), 1
    )
    edges = (steep > np.median(steep[lids > 0])) & (lids > 0)
    normals = slopes[edges] / steep[edges][:, None]
    edge_places = np.argwhere(edges)[:, ::-1]
    centres = np.argwhere(cv2.erode(lids, np.ones((3, 3), np.uint8)) > 0)[:, ::-1]
    towards = edge_places[None] - centres[:, None]
    far = np.linalg.norm(towards, axis=2)
    agree = np.where((far > 3) & (far < SEARCHED / 4), (towards * normals).sum(axis=2), 0)
    votes = (np.maximum(agree / np.maximum(far, 1), 0) ** 2).sum(axis=1)
    best = centres[(votes * (255 - grey[centres[:, 1], centres[:, 0]])).argmax()]
    return transform(inverse(matrix), best + 0.5)
