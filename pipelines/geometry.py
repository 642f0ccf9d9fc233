"""Boxes, similarity transforms, crop windows, warping and paste-back. numpy and cv2 only.

Coordinates are pixels, x right, y down, pixel centres at integer + 0.5; boxes are (left, top, right, bottom) with
right and bottom exclusive; sizes are (width, height). A 2x3 matrix ``m`` maps a frame point to a window point:
``window = m[:, :2] @ frame + m[:, 2]``. Every crop is made with one such matrix, and every later crop (identity
chip, expression crop) composes matrices instead of resampling pixels twice.
"""

from __future__ import annotations

from typing import Literal, cast

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]
Image = NDArray[np.uint8]
Size = tuple[int, int]
"""(width, height) in pixels."""

CropRule = Literal["heser", "lpd", "fomm", "impl"]
"""Which square of the frame becomes the window; the table of the four is in docs/formats.md."""

# fmt: off
FLIP_68 = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31,
     45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
     54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)
# fmt: on
"""iBUG 68: ``points[FLIP_68]`` puts the points of a mirrored face back in order."""

EYE_E2E, EYE_E2M, EYE_CENTRE = 8.2, 6.9, 0.86
"""HeSer's window, read off its published picture: side = max(8.2 eye distance, 6.9 eyes to mouth), centre 0.86 of
the way from the eyes to the mouth."""
LPD_SIDE = 1.8
"""Latent pose reenactment: 1.8 times the longer side of a WIDER FACE box, around its centre."""
FOMM_MARGIN = 0.1
"""First order model: the union of a clip's WIDER FACE boxes, grown by this share of the longer side, per side."""
IMPL_SIDE = 1.8
"""HeSer.Pytorch: 1.8 times the longer side of the 68 points' hull, eye line levelled."""


# ---------------------------------------------------------------------------------------------- boxes


def box_centres(boxes: ArrayLike) -> Floats:
    """(..., 4) boxes to (..., 2) centres."""
    boxes = np.asarray(boxes, dtype=np.float64)
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def box_sizes(boxes: ArrayLike) -> Floats:
    """(..., 4) boxes to (..., 2) widths and heights."""
    boxes = np.asarray(boxes, dtype=np.float64)
    return boxes[..., 2:] - boxes[..., :2]


def iou(boxes: ArrayLike, others: ArrayLike) -> Floats:
    """Intersection over union of every box with every other: (m, 4) and (k, 4) to (m, k). Empty boxes give 0."""
    a = np.asarray(boxes, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(others, dtype=np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.prod(np.maximum(sides, 0), axis=-1)
    areas = [np.prod(np.maximum(box_sizes(x), 0), axis=-1) for x in (a, b)]
    union = areas[0] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)


def scale_boxes(boxes: ArrayLike, factor: float) -> Floats:
    """Boxes (..., 4) grown (or shrunk) by ``factor`` about their centres."""
    centres, halves = box_centres(boxes), box_sizes(boxes) * factor / 2
    return np.concatenate([centres - halves, centres + halves], axis=-1)


def interpolate_boxes(times: ArrayLike, boxes: ArrayLike, at: ArrayLike) -> Floats:
    """Boxes (n, 4) known at increasing ``times`` (n,), linearly at the times ``at`` (k,): (k, 4).

    Before the first and after the last time the nearest box is held; the caller decides how far that may go.
    """
    known, wanted = np.asarray(times, dtype=np.float64), np.asarray(at, dtype=np.float64)
    columns = np.asarray(boxes, dtype=np.float64).T
    return np.stack([np.interp(wanted, known, column) for column in columns], axis=-1)


# ------------------------------------------------------------------------------- similarity transforms


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


def window_side(matrix: ArrayLike, size: int) -> float:
    """Side in frame pixels of the square that ``matrix`` maps onto a window of ``size`` pixels."""
    return float(size / np.sqrt(np.linalg.det(np.asarray(matrix, dtype=np.float64)[:, :2])))


# --------------------------------------------------------------------------------------- crop windows


def face_parts(landmarks: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """68 points (68, 2) to the eye centre on the picture's left, the one on its right, and the mouth's middle.

    Eye centres are the means of points 36-41 and 42-47, the mouth's middle that of its corners 48 and 54.
    """
    p = np.asarray(landmarks, dtype=np.float64)
    return p[36:42].mean(axis=0), p[42:48].mean(axis=0), (p[48] + p[54]) / 2


def heser_window(landmarks: ArrayLike, size: int, crop_scale: float = 1.0) -> Floats:
    """The whole-head window of HeSer: eye line levelled, anchored at eyes and mouth.

    Args:
        landmarks: (68, 2) frame pixels.
        size: window side in pixels.
        crop_scale: multiplies the side; above 1 shows more of long hair.
    """
    left, right, mouth = face_parts(landmarks)
    eyes = (left + right) / 2
    along, down = right - left, mouth - eyes
    side = max(EYE_E2E * np.linalg.norm(along), EYE_E2M * np.linalg.norm(down))
    angle = float(np.arctan2(along[1], along[0]))
    return square_matrix(eyes + EYE_CENTRE * down, float(side) * crop_scale, angle, size)


def impl_window(landmarks: ArrayLike, size: int, crop_scale: float = 1.0) -> Floats:
    """The tighter window of HeSer.Pytorch: 1.8 times the hull's longer side, eye line levelled about its centre."""
    points = np.asarray(landmarks, dtype=np.float64)
    left, right, _ = face_parts(points)
    angle = float(np.arctan2(*(right - left)[::-1]))
    low, high = points.min(axis=0), points.max(axis=0)
    side = IMPL_SIDE * float((high - low).max())
    return square_matrix((low + high) / 2, side * crop_scale, angle, size)


def lpd_window(wider_box: ArrayLike, size: int, crop_scale: float = 1.0) -> Floats:
    """The upright window of latent pose reenactment around one WIDER FACE box (4,) of the frame."""
    side = LPD_SIDE * float(box_sizes(wider_box).max())
    return square_matrix(box_centres(wider_box), side * crop_scale, 0.0, size)


def fomm_window(wider_boxes: ArrayLike, size: int, crop_scale: float = 1.0) -> Floats:
    """One fixed, upright square for a whole clip, grown from its WIDER FACE boxes (n, 4). Never squashed."""
    boxes = np.asarray(wider_boxes, dtype=np.float64)
    tube = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    side = (1 + 2 * FOMM_MARGIN) * float(box_sizes(tube).max())
    return square_matrix(box_centres(tube), side * crop_scale, 0.0, size)


def inside_share(matrix: ArrayLike, size: Size, frame_size: Size) -> float:
    """Share of the window that lies inside the frame (the rest is black), from exact polygon areas, 0 to 1."""
    width, height = size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float64)
    polygon = transform(invert(matrix), corners)
    whole = _polygon_area(polygon)
    for axis, limit in enumerate(frame_size):
        polygon = _clip(polygon, axis, 0.0, keep_above=True)
        polygon = _clip(polygon, axis, float(limit), keep_above=False)
    return min(1.0, _polygon_area(polygon) / whole)


def _polygon_area(polygon: Floats) -> float:
    if len(polygon) < 3:
        return 0.0
    x, y = (polygon - polygon[0]).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _clip(polygon: Floats, axis: int, limit: float, *, keep_above: bool) -> Floats:
    """Sutherland-Hodgman against one axis-parallel line: what is left of a convex polygon, (k, 2)."""
    kept: list[Floats] = []
    sign = 1.0 if keep_above else -1.0
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        before, after = sign * (start[axis] - limit), sign * (end[axis] - limit)
        if before >= 0:
            kept.append(start)
        if before * after < 0:
            kept.append(start + (end - start) * before / (before - after))
    return np.array(kept).reshape(-1, 2)


# ------------------------------------------------------------------------------------ warp, paste back


def warp(image: Image, matrix: ArrayLike, size: Size) -> Image:
    """Resample the part of an image that a matrix maps onto a window; what lies outside the image is black.

    Shrinking by ``s`` draws a window ``ceil(s)`` times larger with bicubic weights and averages it over whole
    blocks, so that every source pixel is used and nothing aliases; the blocks are square in the window, whatever
    the rotation. Enlarging is plain bicubic.

    Args:
        image: (h, w, 3) or (h, w).
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
    return cast(Image, canvas)


def paste_back(frame: Image, window: Image, matrix: ArrayLike, alpha: NDArray[np.float32]) -> Image:
    """Put an edited window back over its frame. Pixels that no part of the window reaches keep their exact value.

    Args:
        frame: (h, w, 3), not changed.
        window: (wh, ww, 3), what :func:`warp` made with ``matrix`` and somebody edited.
        matrix: 2x3 similarity, frame → window.
        alpha: (wh, ww) in [0, 1]: 1 takes the window, 0 keeps the frame. A feather belongs in here.
    """
    size = (frame.shape[1], frame.shape[0])
    back = invert(matrix)
    cover = (alpha * 255).round()
    # alpha is warped together with the colours it weighs, or the window's rim would darken
    weighted = (window * (cover[..., None] / 255)).round().astype(np.uint8)
    share = warp(cover.astype(np.uint8), back, size)[..., None].astype(np.float32) / 255
    mixed = frame * (1 - share) + warp(weighted, back, size)
    return np.clip(mixed.round(), 0, 255).astype(np.uint8)
