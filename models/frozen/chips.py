"""Similarity transforms and the one way pixels are resampled. numpy and cv2 only.

Coordinates are pixels, x right, y down, pixel centres at integer + 0.5; sizes are (width, height). A 2x3 matrix ``m``
maps a frame point to a window point: ``window = m[:, :2] @ frame + m[:, 2]``. Every crop is made with one such matrix,
and every later crop (identity chip, expression crop) composes matrices instead of resampling pixels twice.

It lives beside the frozen networks because they cut their own inputs; ``pipelines.geometry`` passes it on.
"""

from __future__ import annotations

from typing import TypeVar, cast

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]
Image = NDArray[np.uint8]
Pixel = TypeVar("Pixel", np.uint8, np.float32)
Size = tuple[int, int]
"""(width, height) in pixels."""


def transform(matrix: ArrayLike, points: ArrayLike) -> Floats:
    """Points (..., 2) through a 2x3 matrix."""
    matrix = np.asarray(matrix, dtype=np.float64)
    return np.asarray(points, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]


def invert(matrix: ArrayLike) -> Floats:
    """The 2x3 matrix that undoes ``matrix``."""
    matrix = np.asarray(matrix, dtype=np.float64)
    linear = np.linalg.inv(matrix[:, :2])
    return np.concatenate([linear, -linear @ matrix[:, 2:]], axis=1)


def compose(second: ArrayLike, first: ArrayLike) -> Floats:
    """The 2x3 matrix that applies ``first`` and then ``second``."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    linear = second[:, :2] @ first
    linear[:, 2] += second[:, 2]
    return linear


def fit_similarity(points: ArrayLike, targets: ArrayLike) -> Floats:
    """Least-squares similarity (2x3, no reflection) that carries points (n, 2) onto targets (n, 2).

    Umeyama's closed form in complex numbers: with both sets centred, scale and rotation are one complex factor.
    Raises ``ValueError`` when all points coincide.
    """
    p, q = np.asarray(points, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    p_mean, q_mean = p.mean(axis=0), q.mean(axis=0)
    zp, zq = (p - p_mean) @ [1, 1j], (q - q_mean) @ [1, 1j]
    spread = np.vdot(zp, zp).real
    if spread == 0:
        raise ValueError("fit_similarity: all points coincide")
    factor = np.vdot(zp, zq) / spread
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.concatenate([linear, (q_mean - linear @ p_mean)[:, None]], axis=1)


def square_matrix(centre: ArrayLike, side: float, angle: float, size: int) -> Floats:
    """Frame → window for a square of the frame.

    Args:
        centre: (2,) of the square, frame pixels.
        side: of the square, frame pixels.
        angle: radians by which the square's x axis is turned from the frame's, clockwise as seen (y down).
        size: side of the window in pixels.
    """
    if not side > 0:
        raise ValueError(f"window side must be positive, got {side}")
    scale = size / side
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[cos, sin], [-sin, cos]])
    shift = size / 2 - linear @ np.asarray(centre, dtype=np.float64)
    return np.concatenate([linear, shift[:, None]], axis=1)


def warp(image: NDArray[Pixel], matrix: ArrayLike, size: Size) -> NDArray[Pixel]:
    """Resample the part of an image that a matrix maps onto a window; what lies outside the image is black.

    Shrinking by ``s`` draws a window ``ceil(s)`` times larger with bicubic weights and averages it over whole
    blocks, so that every source pixel is used and nothing aliases; the blocks are square in the window, whatever
    the rotation. Enlarging is plain bicubic.

    Args:
        image: (h, w), or (h, w, c) with up to 4 channels; uint8, or float32, which is not clipped.
        matrix: 2x3 similarity, image → window.
        size: (width, height) of the window.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    width, height = size
    shrink = 1 / np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    factor = max(1, int(np.ceil(shrink - 1e-6)))
    fine = matrix * factor
    # cv2 counts pixel centres from 0, we from 0.5
    fine[:, 2] += fine[:, :2] @ [0.5, 0.5] - 0.5
    canvas = cv2.warpAffine(
        image, fine, (width * factor, height * factor), flags=cv2.INTER_CUBIC, borderValue=0
    )
    if factor > 1:
        canvas = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return cast(NDArray[Pixel], canvas)
