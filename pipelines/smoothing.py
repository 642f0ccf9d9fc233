"""Landmarks through a whole track: how much they tremble, how far eyes close, and smoothing that takes only the first.

spec-sparse-motion §8.2: landmarks are located twice, the second time in boxes that move smoothly, because a face that jumps
about in its box moves its landmarks; frames whose points jump are left out; what is left is fused with the optical flow between
neighbouring frames (:mod:`pipelines.flow`); then each point's path is fitted by short parabolas (Savitzky and Golay 1964),
shorter ones for lids and lips. All of it looks forward and back alike, so nothing lags.

Windows that are cut around a face in every frame (swapping) have their own filter, the L1 trend filter (Kim et al. 2009) over
centre, side and angle: as little bend as can be had for what the window strays from the face. A Gaussian that bends as little
strays a third further where a head sways (docs/log.md).

Only frames that are neighbours in the video are smoothed together: points of frames 0.2 s apart have nothing to do with each
other's noise, and a blink between them is one frame. numpy and scipy only; the latter is imported where it is used, since it costs
every actor that imports this module 0.8 s, and most smooth nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.geometry import Floats, invert, square_matrix, transform, window_side

WINDOW = 7
"""Frames to which a parabola is fitted."""
LIVELY_WINDOW = 5
"""The same, for lids and lips: of a blink of two frames 83 % are left, with 7 frames it would be 62 %."""
LIVELY = np.array([37, 38, 40, 41, 43, 44, 46, 47, *range(48, 68)])
"""Lids and lips."""
PUPIL_WINDOW = 3
"""Frames to which a line is fitted for pupils, which jump from place to place: a mean of three. A parabola, as spec-sparse-motion has
it, goes through three points whatever they are."""
BOX_WINDOW = 15
"""The same, for the boxes of the second pass: a head has no reason to turn back within half a second of 30 frames."""
ORDER = 2
JUMP_WINDOW = 5
"""Frames whose median says where a point should be."""
FLOW_VARIANCE = 1.0
"""Of a step of the flow, in variances of a detection. Of 0.3, 1 and 3, held-out detections are nearest with 1 and 3, and 1 is the
calmer (docs/log.md)."""
MOST_SLIP = 0.02
"""Eye distances by which flow and detections may disagree about a step; beyond, the flow is not believed: it knows nothing of
lids that close over an eye. With 0.06 a blink loses six hundredths more of its depth."""
STIFFNESS = 0.09
"""What a bend of a window's path costs, in sides of the window: the least (rounded up) with which windows of every test clip
bend at least three times less."""
SMALL_BEND = 0.0005
"""Sides of the window a frame per frame: bends below it cost by their square, so that paths curve instead of having corners."""
TREND_ROUNDS = 50
"""Of reweighting; 400 change no ratio by more than 1 %."""
BLINK_DEPTH = 0.35
"""A blink is a dip of :func:`eye_opening` by this share of its median."""
BLINK_FRAMES = 12
"""Longest blink, in frames; what lasts longer are closed eyes, which nothing smears."""


def runs(indices: Sequence[int]) -> list[slice]:
    """Stretches of neighbouring frames in increasing frame indices."""
    if not len(indices):
        return []
    edges = np.flatnonzero(np.diff(indices) != 1) + 1
    bounds = [0, *edges.tolist(), len(indices)]
    return [slice(first, last) for first, last in pairwise(bounds)]


def eye_distance(points: Floats) -> float:
    """Median distance of the eye centres of (n, 68, 2)."""
    left, right = points[:, 36:42].mean(axis=1), points[:, 42:48].mean(axis=1)
    return float(np.median(np.linalg.norm(right - left, axis=1)))


def jitter(points: Floats, indices: Sequence[int], landmarks: Floats | None = None) -> float:
    """Mean of |p(t+1) - 2 p(t) + p(t-1)| over points and frames, in eye distances; NaN without three neighbours.

    Args:
        points: (n, k, 2) in pixels that do not move with the face.
        indices: (n,) increasing frame indices.
        landmarks: (n, 68, 2) that tell the eye distance; None: ``points`` do.
    """
    bends = [np.diff(points[run], n=2, axis=0) for run in runs(indices)]
    bends = [bend for bend in bends if len(bend)]
    if not bends:
        return float("nan")
    lengths = np.linalg.norm(np.concatenate(bends), axis=-1)
    return float(lengths.mean()) / eye_distance(points if landmarks is None else landmarks)


def eye_opening(points: Floats) -> Floats:
    """How far the eyes are open, (n,) of (n, 68, 2): height over width, mean of both (Soukupová and Čech 2016)."""

    def ratio(first: int) -> Floats:
        p = points[:, first : first + 6]
        high = np.linalg.norm(p[:, 1] - p[:, 5], axis=1) + np.linalg.norm(p[:, 2] - p[:, 4], axis=1)
        wide = np.linalg.norm(p[:, 0] - p[:, 3], axis=1)
        return np.asarray(high / (2 * wide))

    return (ratio(36) + ratio(42)) / 2


def find_blinks(opening: Floats, indices: Sequence[int]) -> list[tuple[int, int, int]]:
    """Blinks in (n,) openings: positions of the last open frame before, of the deepest, of the first open one after."""
    if not len(opening):
        return []
    usual = float(np.median(opening))
    deep, shallow = (1 - BLINK_DEPTH) * usual, (1 - BLINK_DEPTH / 4) * usual
    found = []
    for run in runs(indices):
        signal = opening[run]
        is_low = np.flatnonzero(signal < deep)
        for part in runs(is_low.tolist()):
            before, after = int(is_low[part][0]) - 1, int(is_low[part][-1]) + 1
            while before >= 0 and signal[before] < shallow:
                before -= 1
            while after < len(signal) and signal[after] < shallow:
                after += 1
            if before >= 0 and after < len(signal) and after - before - 1 <= BLINK_FRAMES:
                low = before + int(np.argmin(signal[before : after + 1]))
                found.append((run.start + before, run.start + low, run.start + after))
    return sorted(set(found))


def blink_middle(opening: Floats, before: int = 0, after: int = -1) -> float:
    """Where in (n,) openings a dip lies: midway between falling below half its depth and rising above it, frames from the first.

    Not its deepest frame: eyes stay shut for several, and noise says which of them is the deepest.

    Args:
        opening: with some frames to either side, into which a smoothed edge may reach, and a neighbouring blink, too.
        before, after: positions of the last open frame before the dip and of the first open one after it.
    """
    before, after = before % len(opening), after % len(opening)
    first = last = before + int(opening[before : after + 1].argmin())
    half = (opening[first] + (opening[before] + opening[after]) / 2) / 2
    while first > 0 and opening[first - 1] <= half:
        first -= 1
    while last + 1 < len(opening) and opening[last + 1] <= half:
        last += 1
    fall, rise = float(first), float(last)
    if first > 0:
        fall -= (half - opening[first]) / (opening[first - 1] - opening[first])
    if last + 1 < len(opening):
        rise += (half - opening[last]) / (opening[last + 1] - opening[last])
    return (fall + rise) / 2


def blinks_kept(raw: Floats, smooth: Floats, indices: Sequence[int]) -> tuple[float, float]:
    """What smoothing leaves of blinks: the least share of a blink's depth, and the most frames by which one is early or late.

    Args:
        raw, smooth: (n, 68, 2) before and after.
        indices: (n,) increasing frame indices.

    Returns:
        (NaN, 0) when nobody blinks.
    """
    before, after = eye_opening(raw), eye_opening(smooth)
    shares, lags = [], [0.0]
    for first, low, last in find_blinks(before, indices):
        opened = (before[first] + before[last]) / 2
        shares.append((opened - after[first : last + 1].min()) / (opened - before[low]))
        around = range(max(first - WINDOW // 2, 0), min(last + WINDOW // 2 + 1, len(before)))
        near = [i for i in around if indices[i] - indices[low] == i - low]
        edges = first - near[0], last - near[0]
        lags.append(
            float(abs(blink_middle(after[near], *edges) - blink_middle(before[near], *edges)))
        )
    return float(min(shares, default=np.nan)), max(lags)


def fit_paths(values: Floats, indices: Sequence[int], window: int) -> Floats:
    """Values (n, ...) with each path fitted by parabolas over ``window`` frames, within stretches of neighbours.

    In a stretch shorter than the window the window is as long as it can be; fewer than four frames stay as they are.
    """
    from scipy.signal import savgol_filter

    fitted = np.array(values, dtype=np.float64)
    for run in runs(indices):
        length = run.stop - run.start
        size = min(window, length - 1 + length % 2)
        if size > ORDER + 1:
            fitted[run] = savgol_filter(fitted[run], size, ORDER, axis=0, mode="interp")
    return fitted


def jumps(
    points: Floats, sides: ArrayLike, limit: float, indices: Sequence[int]
) -> NDArray[np.bool_]:
    """Frames (n,) in which a point lies off the median of itself and its neighbours in time.

    The step from a frame to the next would also tell of heads that move fast: of 250 frames of a head that is shaken it says
    36, this 2.

    Args:
        points: (n, k, 2).
        sides: (n,) of the faces' boxes, px.
        limit: how far, in medians of ``sides``.
        indices: (n,) increasing frame indices.
    """
    from scipy.ndimage import median_filter

    found = np.zeros(len(points), bool)
    for run in runs(indices):
        usual = median_filter(points[run], size=(JUMP_WINDOW, 1, 1), mode="nearest")
        off = np.linalg.norm(points[run] - usual, axis=2).max(axis=1)
        found[run] = off > limit * float(np.median(np.asarray(sides)))
    return found


def fuse(points: Floats, moves: Floats, indices: Sequence[int]) -> Floats:
    """The likeliest paths (n, k, 2) of points that were detected in every frame and whose steps the flow saw.

    Of a point that moves as the flow says, with Gaussian errors of both: what a Kalman filter and the smoother of Rauch, Tung and
    Striebel find, here as the least squares that they solve, a tridiagonal system for each point.

    Args:
        points: (n, k, 2) detections, px.
        moves: (n, k, 2) px from the frame before by the flow, NaN where it is not believed.
        indices: (n,) increasing frame indices; nothing is known of steps over a gap.
    """
    from scipy.linalg import solveh_banded

    fused = np.array(points, dtype=np.float64)
    count = fused.shape[1]
    for run in runs(indices):
        detected, steps = fused[run], np.asarray(moves)[run][1:]
        length = len(detected)
        slip = np.linalg.norm(np.diff(detected, axis=0) - steps, axis=2)
        trust = (slip <= MOST_SLIP * eye_distance(detected)) / FLOW_VARIANCE  # 0 for NaN
        pulled = trust[:, :, None] * np.nan_to_num(steps)
        right = detected.copy()
        right[1:] += pulled
        right[:-1] -= pulled
        bands = np.zeros((2, length, count))
        bands[0, 1:] = -trust
        bands[1] = 1
        bands[1, 1:] += trust
        bands[1, :-1] += trust
        # one point after the other; the first place of the upper band is 0, so none knows of the next
        columns = bands.transpose(0, 2, 1).reshape(2, count * length)
        solved = solveh_banded(columns, right.transpose(1, 0, 2).reshape(count * length, 2))
        fused[run] = solved.reshape(count, length, 2).transpose(1, 0, 2)
    return fused


def smooth(points: Floats, indices: Sequence[int]) -> Floats:
    """Landmarks (n, 68, 2) without their tremble.

    Args:
        points: in pixels that do not move with the face.
        indices: (n,) increasing frame indices.
    """
    steady = fit_paths(points, indices, WINDOW)
    steady[:, LIVELY] = fit_paths(points[:, LIVELY], indices, LIVELY_WINDOW)
    return steady


def smooth_pupils(points: Floats, indices: Sequence[int]) -> Floats:
    """Pupils (n, 2, 2) without most of their tremble; a jump of the gaze takes a frame longer on either side.

    Args:
        points: in pixels that do not move with the face; (n, 0, 2) is allowed.
        indices: (n,) increasing frame indices.
    """
    from scipy.signal import savgol_filter

    steady = np.array(points, dtype=np.float64)
    for run in runs(indices) if steady.size else []:
        if run.stop - run.start >= PUPIL_WINDOW:
            steady[run] = savgol_filter(steady[run], PUPIL_WINDOW, 1, axis=0, mode="interp")
    return steady


def steady_boxes(points: Floats, boxes: ArrayLike, indices: Sequence[int]) -> Floats:
    """Square boxes (n, 4) that follow the landmarks smoothly and lie about them as the detected boxes do, by the median.

    Args:
        points: (n, 68, 2) of the first pass.
        boxes: (n, 4) in which they were found.
        indices: (n,) increasing frame indices.
    """
    detected = np.asarray(boxes, dtype=np.float64)
    centres = points.mean(axis=1)
    radii = np.linalg.norm(points - centres[:, None], axis=-1).mean(axis=1)
    middles = (detected[:, :2] + detected[:, 2:]) / 2
    sides = np.sqrt(np.prod(detected[:, 2:] - detected[:, :2], axis=1))
    offset = np.median((middles - centres) / radii[:, None], axis=0)
    middle = fit_paths(centres + offset * radii[:, None], indices, BOX_WINDOW)
    half = fit_paths(radii, indices, BOX_WINDOW)[:, None] * float(np.median(sides / radii)) / 2
    return np.hstack([middle - half, middle + half])


def measure(raw: Floats, smoothed: Floats | None, indices: Sequence[int]) -> dict[str, float]:
    """Scores of a track's landmarks by name; those that cannot be measured are left out.

    Args:
        raw: (n, 68, 2) as located in detected boxes, frame pixels.
        smoothed: (n, 68, 2) as stored, where they were smoothed.
        indices: (n,) increasing frame indices.
    """
    measured = {"jitter": jitter(raw if smoothed is None else smoothed, indices)}
    if smoothed is not None:
        measured["jitter_raw"] = jitter(raw, indices)
        kept, lag = blinks_kept(raw, smoothed, indices)
        if np.isfinite(kept):
            measured |= {"blink_kept": kept, "blink_lag": lag}
    return {name: round(value, 5) for name, value in measured.items() if np.isfinite(value)}


def window_parameters(matrices: ArrayLike, size: int) -> Floats:
    """Windows (n, 2, 3), frame → ``size`` pixels, to (n, 4): x and y of the centre in the frame, log of the side, angle.

    The centre, not the matrix's own shift, which a turn of the head moves by a window's width.
    """
    matrices = np.asarray(matrices, np.float64).reshape(-1, 2, 3)
    centres = [transform(invert(matrix), [size / 2, size / 2]) for matrix in matrices]
    sides = [np.log(window_side(matrix, size)) for matrix in matrices]
    angles = np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0])
    return np.column_stack([np.reshape(centres, (-1, 2)), sides, angles])


def windows_from(parameters: Floats, size: int) -> Floats:
    """Inverse of :func:`window_parameters`: (n, 4) to (n, 2, 3)."""
    made = [square_matrix((x, y), np.exp(side), angle, size) for x, y, side, angle in parameters]
    return np.reshape(made, (-1, 2, 3))


def follow_trend(path: Floats, stiffness: float, small: float) -> Floats:
    """A path (n,) that bends little: the L1 trend filter, by iteratively reweighted least squares.

    It minimises half the squared distance to ``path`` plus ``stiffness`` times the sum of the bends |v(t+1) - 2 v(t) + v(t-1)|.
    No value strays further than four times the stiffness, however far a head sways; an even motion is kept exactly, up to the ends.

    Args:
        path: of neighbouring frames.
        stiffness: in the path's unit.
        small: bends below it cost by their square (Huber).
    """
    from scipy.linalg import solveh_banded

    trend = path.copy()
    if len(path) < 3:
        return trend
    for _ in range(TREND_ROUNDS):
        cost = stiffness / np.maximum(np.abs(np.diff(trend, n=2)), small)
        # diagonals of 1 + D' cost D, D being the second difference
        bands = np.zeros((3, len(path)))
        bands[0] = 1
        bands[0, :-2] += cost
        bands[0, 1:-1] += 4 * cost
        bands[0, 2:] += cost
        bands[1, :-2] -= 2 * cost
        bands[1, 1:-1] -= 2 * cost
        bands[2, :-2] = cost
        trend = solveh_banded(bands, path, lower=True)
    return np.asarray(trend)


def steady_windows(
    matrices: ArrayLike, indices: Sequence[int], size: int, stiffness: float = STIFFNESS
) -> Floats:
    """Windows (n, 2, 3) whose four parameters follow their trends, within stretches of neighbours.

    Args:
        matrices: frame → window.
        indices: (n,) increasing frame indices; a cut is a gap.
        size: side of the windows, pixels.
        stiffness: sides of the window; 0 leaves everything as it is.
    """
    parameters = window_parameters(matrices, size)
    if stiffness == 0 or not len(parameters):
        return windows_from(parameters, size)
    for run in runs(indices):
        path = parameters[run]
        path[:, 3] = np.unwrap(path[:, 3])
        side = float(np.exp(np.median(path[:, 2])))
        # a radian, or 1 of the log, moves the middle of an edge by half a side
        for column, unit in enumerate((side, side, 2.0, 2.0)):
            path[:, column] = follow_trend(path[:, column], stiffness * unit, SMALL_BEND * unit)
    return windows_from(parameters, size)


def bend(values: Floats, indices: Sequence[int]) -> Floats:
    """Mean of |v(t+1) - 2 v(t) + v(t-1)| of each column of (n, k), over neighbours; NaN without three."""
    bends = [np.diff(values[run], n=2, axis=0) for run in runs(indices)]
    found = np.concatenate([np.zeros((0, values.shape[1])), *bends])
    return np.abs(found).mean(axis=0) if len(found) else np.full(values.shape[1], np.nan)
