"""Landmarks of one person, made to fit the face of another: what the motion model is driven with across identities.

Pure functions on arrays; coordinates are pixels of the source's and of the driver's window, or any others, as long as one
set uses one kind. Within one identity the driver's landmarks are used as they are.

Symbols of the rules below: s are the source's points, d_t the driver's in frame t, P_x the pose (a similarity) of points x,
measured on the points that expression hardly moves, and e_t = P_t⁻¹(d_t) the driver's expression in a frame of its own.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.frozen.chips import compose, fit_similarity, invert, transform
from models.motion.layout import EYES, layout_of

Mode = Literal["canonical", "relative", "absolute"]
Pose = Literal["relative", "absolute"]
Points = NDArray[np.floating]

OPEN = 0.05
"""Gap between the lids in eye widths below which an eye cannot tell how far its owner opens it."""
# fmt: off
CANONICAL = np.array([
    [0.0, -0.12], [0.0, 0.13], [0.0, 0.39], [0.0, 0.67],
    [-1.0, 0.0], [-0.44, 0.0], [0.44, 0.0], [1.0, 0.0],
])
# fmt: on
"""The rigid points of an average face, in units of half the distance of the outer eye corners: the frame of
expressions. Medians of 82 pictures."""


def adapt(
    source: ArrayLike, driving: ArrayLike, mode: Mode = "canonical", pose: Pose = "relative"
) -> Points:
    """The driver's motion on the source's face.

    Args:
        source: (K, 2) of the source image.
        driving: (n, K, 2) of the driver, in the order of time; at least one frame, all of them found.
        mode: ``absolute`` takes the driver's points, and with them the shape of the driver's face. ``relative`` adds the
            driver's motion since the first frame, turned and scaled to the source: the two must start in the same pose.
            ``canonical`` separates pose from expression.
        pose: of ``canonical``: the source's own pose moved as the driver's moves, or the driver's.

    Returns:
        (n, K, 2) in the source's coordinates.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a number of points no layout has.
    """
    s, d = np.asarray(source, np.float64), np.asarray(driving, np.float64)
    if s.ndim != 2 or d.ndim != 3 or d.shape[1:] != s.shape or s.shape[1] != 2 or not len(d):
        raise ValueError(f"source {s.shape} and driving {d.shape} are not (K, 2) and (n, K, 2)")
    if not np.isfinite(s).all() or not np.isfinite(d).all():
        raise ValueError("landmarks that are not finite cannot be adapted")
    layout_of(len(s))
    match mode:
        case "absolute":
            return d.copy()
        case "relative":
            return adapt_relative(s, d)
        case "canonical":
            return adapt_canonical(s, d, pose)
    raise ValueError(f"no mode called {mode!r}; known: canonical, relative, absolute")


def adapt_relative(source: Points, driving: Points) -> Points:
    """d'_t = s + σR (d_t - d_0), where (σ, R) carries the driver's first frame onto the source."""
    rigid = list(layout_of(len(source)).rigid)
    fitted = fit_similarity(driving[0, rigid], source[rigid])
    return np.asarray(source + (driving - driving[0]) @ fitted[:, :2].T)


def adapt_canonical(source: Points, driving: Points, pose: Pose) -> Points:
    """d'_t = P'_t (P_s⁻¹(s) + ρ (e_t - e_ref)), and lids that close as far as the driver's.

    e_ref is the driver's most neutral frame, ρ the ratio of the two faces' sizes along each axis, and P'_t is P_t P_0⁻¹ P_s
    (``relative``) or P_t (``absolute``).
    """
    pose_s = pose_of(source)
    poses = [pose_of(points) for points in driving]
    own = transform(invert(pose_s), source)
    expressions = np.empty_like(
        driving
    )  # one array as long as the video, which then becomes the result
    for t, points in enumerate(driving):
        expressions[t] = transform(invert(poses[t]), points)
    reference = expressions[neutral_frame(expressions)].copy()
    ratio = np.ptp(own[:68], axis=0) / np.ptp(reference[:68], axis=0)
    for t, expression in enumerate(expressions):
        shape = own + ratio * (expression - reference)
        shape = _set_lids(shape, own, expression, reference)
        moved = poses[t]
        if pose == "relative":
            moved = compose(compose(poses[t], invert(poses[0])), pose_s)
        expressions[t] = transform(moved, shape)
    return expressions


def pose_of(points: Points) -> NDArray[np.floating]:
    """2x3 similarity from the frame of expressions to points (K, 2), by their rigid part."""
    return fit_similarity(CANONICAL, points[list(layout_of(len(points)).rigid)])


def neutral_frame(expressions: Points) -> int:
    """The frame of (n, K, 2) that is closest to the median one: what the face does most of the time."""
    usual = np.empty(expressions.shape[1:])
    for point in range(len(usual)):  # a point at a time: a median sorts a copy
        usual[point] = np.median(expressions[:, point], axis=0)
    return int(np.argmin([np.abs(expression - usual).mean() for expression in expressions]))


def lid_gaps(points: Points, eye: int) -> Points:
    """(2,) distances of the two pairs of lid points of eye 0 (the picture's left) or 1, in widths of that eye."""
    corner, upper1, upper2, other, lower2, lower1 = points[EYES[eye]]
    gaps = np.linalg.norm([upper1 - lower1, upper2 - lower2], axis=1)
    return np.asarray(gaps / np.linalg.norm(other - corner))


def _set_lids(shape: Points, own: Points, expression: Points, reference: Points) -> Points:
    """``shape`` with each eye as far open as the driver's now, in shares of how far each of them is open at rest.

    Added up, the driver's motion would leave a wider eye open, and pull a narrower one's lids past each other.
    """
    shape = shape.copy()
    for eye in range(2):
        corner, upper1, upper2, other, lower2, lower1 = EYES[eye]
        now, rest, mine = (lid_gaps(points, eye) for points in (expression, reference, own))
        widths = [np.linalg.norm(points[other] - points[corner]) for points in (shape, expression)]
        for i, (upper, lower) in enumerate([(upper1, lower1), (upper2, lower2)]):
            if min(rest[i], mine[i]) >= OPEN:
                opening = (own[upper] - own[lower]) * now[i] / rest[i]
            else:
                opening = (expression[upper] - expression[lower]) * widths[0] / widths[1]
            middle = (shape[upper] + shape[lower]) / 2
            shape[upper], shape[lower] = middle + opening / 2, middle - opening / 2
    return shape
