"""Boxes, crop windows and paste-back; the similarity transforms and the warp come from ``models.frozen.chips``.

Coordinates are pixels, x right, y down, pixel centres at integer + 0.5; boxes are (left, top, right, bottom) with
right and bottom exclusive; sizes are (width, height). A 2x3 matrix ``m`` maps a frame point to a window point:
``window = m[:, :2] @ frame + m[:, 2]``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.frozen.chips import Floats as Floats
from models.frozen.chips import Image as Image
from models.frozen.chips import Size as Size
from models.frozen.chips import compose as compose
from models.frozen.chips import fit_similarity as fit_similarity
from models.frozen.chips import invert as invert
from models.frozen.chips import square_matrix as square_matrix
from models.frozen.chips import transform as transform
from models.frozen.chips import warp as warp
from models.motion.layout import FLIP_68 as FLIP_68

CropRule = Literal["heser", "lpd", "fomm", "impl"]
"""Which square of the frame becomes the window; the table of the four is in docs/formats.md."""

EYE_E2E, EYE_E2M, EYE_CENTRE = 8.2, 6.9, 0.86
"""HeSer's window, read off its published picture: side = max(8.2 eye distance, 6.9 eyes to mouth), centre 0.86 of
the way from the eyes to the mouth."""
WIDER_WIDTH, WIDER_HEIGHT, WIDER_UP = 0.93, 1.28, 0.073
"""A WIDER FACE box (forehead to chin, as S3FD and RetinaFace draw it) in sides of the tight box: its width and height,
and how far its centre lies higher. Medians of RetinaFace against dlib's HOG on 117 faces."""
LPD_SIDE = 1.8
"""Latent pose reenactment: 1.8 times the longer side of a WIDER FACE box, around its centre."""
FOMM_MARGIN = 0.1
"""First order model: the union of a clip's WIDER FACE boxes, grown by this share of the longer side, per side."""
HULL_SIDE, HULL_UP = 1.08, 0.077
"""The tight box of 68 points: a square of 1.08 times the geometric mean of their extents, centred 0.077 of its side above
theirs. Medians of dlib's boxes on 82 pictures; 80 % of the sides lie within 0.98 and 1.15."""
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


def wider_boxes(boxes: ArrayLike) -> Floats:
    """Tight boxes (..., 4) to the WIDER FACE boxes of the same faces."""
    centres, tight = box_centres(boxes), np.sqrt(np.prod(box_sizes(boxes), axis=-1))[..., None]
    halves = tight * [WIDER_WIDTH / 2, WIDER_HEIGHT / 2]
    centres = centres - tight * [0.0, WIDER_UP]
    return np.concatenate([centres - halves, centres + halves], axis=-1)


def lpd_window(box: ArrayLike, size: int, crop_scale: float = 1.0) -> Floats:
    """The upright window of latent pose reenactment around one tight box (4,): as steady as the detector's boxes."""
    wider = wider_boxes(box)
    side = LPD_SIDE * float(box_sizes(wider).max())
    return square_matrix(box_centres(wider), side * crop_scale, 0.0, size)


def landmark_boxes(landmarks: ArrayLike) -> Floats:
    """Faces as points (..., 68, 2) to tight boxes (..., 4), steadier than a detector's."""
    points = np.asarray(landmarks, dtype=np.float64)
    low, high = points.min(axis=-2), points.max(axis=-2)
    side = HULL_SIDE * np.sqrt(np.prod(high - low, axis=-1, keepdims=True))
    centres = (low + high) / 2 - side * [0.0, HULL_UP]
    return np.concatenate([centres - side / 2, centres + side / 2], axis=-1)


def fomm_window(boxes: ArrayLike, size: int, crop_scale: float = 1.0) -> Floats:
    """One fixed, upright square for a whole clip, grown from its tight boxes (n, 4). Never squashed."""
    wider = wider_boxes(boxes)
    tube = np.concatenate([wider[:, :2].min(axis=0), wider[:, 2:].max(axis=0)])
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


def paste_back(frame: Image, window: Image, matrix: ArrayLike, alpha: NDArray[np.float32]) -> Image:
    """Put an edited window back over its frame. Pixels that no part of the window reaches keep their exact value.

    Args:
        frame: (h, w, 3), not changed.
        window: (wh, ww, 3), what :func:`warp` made with ``matrix`` and somebody edited.
        matrix: 2x3 similarity, frame → window.
        alpha: (wh, ww) in [0, 1]: 1 takes the window, 0 keeps the frame. A feather belongs in here.
    """
    left, top, right, bottom = _reach(alpha, matrix, (frame.shape[1], frame.shape[0]))
    pasted = frame.copy()
    if right <= left or bottom <= top:
        return pasted
    cover = alpha[..., None].astype(np.float32)
    # Colours are warped together with the alpha that weighs them, unclipped: at a hard edge bicubic weights
    # overshoot, and only then does the same overshoot of both leave a picture that nobody edited unchanged.
    both = warp(
        np.dstack([window * cover, cover]),
        compose([[1, 0, -left], [0, 1, -top]], invert(matrix)),
        (right - left, bottom - top),
    )
    mixed = frame[top:bottom, left:right] * (1 - both[..., 3:]) + both[..., :3]
    pasted[top:bottom, left:right] = np.clip(mixed.round(), 0, 255)
    return pasted


def _reach(alpha: NDArray[np.float32], matrix: ArrayLike, size: Size) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the frame's part that a window's alpha can reach; empty where there is none."""
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    margin = 3  # of the bicubic kernel
    x = [columns[0] - margin, columns[-1] + 1 + margin]
    y = [rows[0] - margin, rows[-1] + 1 + margin]
    corners = transform(invert(matrix), [[a, b] for a in x for b in y])
    low = np.clip(np.floor(corners.min(axis=0)) - margin, 0, size).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)) + margin, 0, size).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])
