"""Tremble goes, blinks stay, gaps are respected: on drawn faces with known paths, and on a real still picture with noise."""

from __future__ import annotations

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import lsq_linear

from models.frozen.detector import load_detector
from models.frozen.landmarks import load_landmarker
from pipelines.flow import FaceFlow
from pipelines.geometry import square_matrix
from pipelines.smoothing import (
    SMALL_BEND,
    STIFFNESS,
    bend,
    blink_middle,
    blinks_kept,
    eye_distance,
    eye_opening,
    find_blinks,
    fit_paths,
    follow_trend,
    fuse,
    jitter,
    jumps,
    measure,
    runs,
    smooth,
    smooth_pupils,
    steady_boxes,
    steady_windows,
    window_parameters,
    windows_from,
)
from tests.faces import FACE_68
from tests.material import SHARED, needs_shared
from tests.pipelines.test_geometry import box_of, face

Floats = NDArray[np.float64]
LIDS = {37: 41, 38: 40, 43: 47, 44: 46}
"""Upper and lower points that meet when an eye closes."""


def walking(count: int, closed: dict[int, float] | None = None) -> Floats:
    """A head on a smooth path (n, 68, 2); ``closed`` gives how far its eyes are closed in some frames, 0 to 1."""
    points = np.stack([face() + np.array([3.0 * i, 20 * np.sin(i / 9)]) for i in range(count)])
    for i, share in (closed or {}).items():
        for upper, lower in LIDS.items():
            middle = (points[i, upper] + points[i, lower]) / 2
            for point in (upper, lower):
                points[i, point] += share * (middle - points[i, point])
    return points


def shaken(points: Floats, pixels: float, seed: int = 0) -> Floats:
    return points + np.random.default_rng(seed).normal(0, pixels, points.shape)


def test_runs_are_neighbours() -> None:
    assert runs([]) == []
    assert runs([4]) == [slice(0, 1)]
    assert runs([3, 4, 5, 9, 11, 12]) == [slice(0, 3), slice(3, 4), slice(4, 6)]


def test_jitter_is_what_the_formula_says() -> None:
    points = shaken(walking(20), 1.0)
    indices = [*range(8), *range(10, 22)]
    total, count = 0.0, 0
    for i in range(1, 19):
        if indices[i + 1] - indices[i - 1] == 2:
            for k in range(68):
                bend = points[i + 1, k] - 2 * points[i, k] + points[i - 1, k]
                total += float(np.hypot(*bend))
                count += 1
    eyes = [np.hypot(*(p[42:48].mean(axis=0) - p[36:42].mean(axis=0))) for p in points]
    assert jitter(points, indices) == pytest.approx(total / count / np.median(eyes))
    # the same in a picture of another size, and nothing where no three frames are neighbours
    assert jitter(3 * points, indices) == pytest.approx(jitter(points, indices))
    assert np.isnan(jitter(points, list(range(0, 40, 2))))
    assert measure(points, None, list(range(0, 40, 2))) == {}


def test_parabolas_stay_as_they_are() -> None:
    time = np.arange(30.0)[:, None, None]
    points = face() + time * [2.0, -1.0] + time**2 * [0.05, 0.1]
    np.testing.assert_allclose(smooth(points, range(30)), points, atol=1e-9)
    assert jitter(points, range(30)) == pytest.approx(
        float(np.hypot(0.1, 0.2)) / np.linalg.norm(face()[42:48].mean(0) - face()[36:42].mean(0))
    )


def test_tremble_falls_to_a_third() -> None:
    still = shaken(np.repeat(face()[None], 60, axis=0), 1.0)
    assert jitter(smooth(still, range(60)), range(60)) < jitter(still, range(60)) / 3
    path = walking(60)
    moved = shaken(path, 1.0)
    before = np.linalg.norm(moved - path, axis=-1).mean()
    assert np.linalg.norm(smooth(moved, range(60)) - path, axis=-1).mean() < 0.8 * before


@pytest.mark.parametrize("at", range(10, 14))
def test_a_blink_of_two_frames_keeps_four_fifths_and_its_place(at: int) -> None:
    blinking = walking(40, {at: 1.0, at + 1: 1.0})
    share, lag = blinks_kept(blinking, smooth(blinking, range(40)), range(40))
    assert 0.8 <= share <= 1.1
    assert lag <= 1
    # the wide window would not: this is what the test can see
    wide = fit_paths(blinking, range(40), 7)
    assert blinks_kept(blinking, wide, range(40))[0] < 0.7
    late = np.concatenate([blinking[:1], blinking[:1], blinking[:-2]])
    assert blinks_kept(blinking, late, range(40)) == pytest.approx((1.0, 2.0), abs=0.05)


@pytest.mark.parametrize("second", [15, 16, 17, 18])
def test_a_blink_is_not_taken_for_its_neighbour(second: int) -> None:
    shut = {12: 0.9, 13: 0.85} | dict(
        zip(range(second, second + 4), (0.6, 0.8, 0.8, 0.6), strict=True)
    )
    blinking = walking(40, shut)
    share, lag = blinks_kept(blinking, smooth(blinking, range(40)), range(40))
    assert share > 0.6
    assert lag <= 1


def test_a_blink_lies_where_its_edges_are_not_where_noise_is_lowest() -> None:
    """Frames 41 to 50 of phone_a, as detected and as smoothed: shut for five frames, the deepest of them now the fourth, now the second."""
    detected = np.array([0.293, 0.164, 0.127, 0.142, 0.124, 0.137, 0.181, 0.243, 0.238, 0.260])
    smoothed = np.array([0.269, 0.193, 0.140, 0.156, 0.158, 0.164, 0.184, 0.209, 0.230, 0.243])
    assert (np.argmin(detected), np.argmin(smoothed)) == (4, 2)
    assert blink_middle(detected) == pytest.approx(3.5, abs=0.1)
    assert abs(blink_middle(smoothed) - blink_middle(detected)) < 0.5
    late = np.concatenate([detected[:1], detected[:1], detected[:-2]])
    assert blink_middle(late) - blink_middle(detected) == pytest.approx(2, abs=0.1)
    # an edge that is out of sight, and no dip at all
    assert blink_middle(np.array([0.3, 0.1, 0.1])) == pytest.approx((0.75 + 2) / 2)
    assert blink_middle(np.full(5, 0.3)) == 2


def kalman(points: Floats, moves: Floats, limit: float) -> Floats:
    """What ``fuse`` says it is: a Kalman filter and Rauch, Tung and Striebel's smoother, point by point, axis by axis."""
    n, count, _ = points.shape
    smoothed = points.copy()
    for k in range(count):
        means, variances, ahead, wide = [points[0, k]], [1.0], [points[0, k]], [0.0]
        for t in range(1, n):
            step = moves[t, k]
            believed = np.linalg.norm(points[t, k] - points[t - 1, k] - step) <= limit
            ahead.append(means[-1] + np.nan_to_num(step))
            wide.append(variances[-1] + (1.0 if believed else 1e12))
            gain = wide[-1] / (wide[-1] + 1)
            means.append(ahead[-1] + gain * (points[t, k] - ahead[-1]))
            variances.append(wide[-1] / (wide[-1] + 1))
        later = means[-1]
        smoothed[n - 1, k] = later
        for t in range(n - 2, -1, -1):
            later = means[t] + variances[t] / wide[t + 1] * (later - ahead[t + 1])
            smoothed[t, k] = later
    return smoothed


def test_fusion_is_kalmans_filter_and_its_smoother() -> None:
    draw = np.random.default_rng(0)
    path = walking(25)
    limit = 0.02 * eye_distance(path)
    points = shaken(path, 0.6 * limit)
    moves = np.diff(path, axis=0, prepend=path[:1]) + draw.normal(0, 0.3 * limit, path.shape)
    moves[draw.random(moves.shape[:2]) < 0.2] = np.nan
    moves[7:9] += 50  # nonsense of the flow
    fused = fuse(points, moves, range(25))
    np.testing.assert_allclose(fused, kalman(points, moves, 0.02 * eye_distance(points)), atol=1e-6)
    assert np.abs(fused - points).max() > 0.1
    parts = [*range(10), *range(12, 27)]
    np.testing.assert_array_equal(fuse(points, moves, parts)[:10], fuse(points[:10], moves[:10], range(10)))  # fmt: skip
    np.testing.assert_array_equal(fuse(points, np.full_like(moves, np.nan), range(25)), points)


def test_the_flow_halves_what_is_left_of_the_tremble() -> None:
    path = walking(60)
    points = shaken(path, 0.5)
    moves = shaken(np.diff(path, axis=0, prepend=path[:1]), 0.1, seed=1)

    def error(found: Floats) -> float:
        return float(np.linalg.norm(found - path, axis=-1).mean())

    fused = fuse(points, moves, range(60))
    assert error(smooth(fused, range(60))) < 0.85 * error(smooth(points, range(60)))
    still = np.repeat(path[:1], 60, axis=0)
    calm, plain = (
        smooth(found, range(60))
        for found in (fuse(shaken(still, 0.5), np.zeros_like(still), range(60)), shaken(still, 0.5))
    )
    assert jitter(calm, range(60)) < 0.7 * jitter(plain, range(60))


@pytest.mark.parametrize("at", range(10, 14))
def test_a_flow_that_sees_no_blink_leaves_it_where_it_is(at: int) -> None:
    """Lids that close over an eye: the flow says that nothing but the head moves."""
    blinking = walking(40, {at: 1.0, at + 1: 1.0})
    head = walking(40)
    moves = np.diff(head, axis=0, prepend=head[:1])
    share, lag = blinks_kept(blinking, smooth(fuse(blinking, moves, range(40)), range(40)), range(40))  # fmt: skip
    assert share >= 0.8
    assert lag <= 1


def test_a_jump_is_not_a_head_that_moves() -> None:
    fast = np.stack([face() + np.array([25.0 * i, 0]) for i in range(20)])
    side = np.full(20, 200.0)
    assert not jumps(fast, side, 0.08, range(20)).any()
    fast[9, 30] += [0, 17]  # one point by 8.5 % of the side
    fast[14] += [0, 40]
    assert np.flatnonzero(jumps(fast, side, 0.08, range(20))).tolist() == [9, 14]
    assert not jumps(fast, 3 * side, 0.08, range(20)).any()
    assert not jumps(fast[8:11], side[:3], 0.08, [1, 5, 9]).any()  # nobody is a neighbour


def test_blinks_are_found_where_eyes_close() -> None:
    closed = {10: 0.5, 11: 1.0, 12: 1.0, 13: 0.4, 30: 1.0, 31: 0.9} | dict.fromkeys(
        range(45, 70), 0.9
    )
    opening = eye_opening(shaken(walking(80, closed), 0.3))
    found = find_blinks(opening, range(80))
    assert len(found) == 2  # eyes that stay closed do not blink
    (one, low, end), (other, deep, last) = found
    assert (one, end) == (9, 14)
    assert low in (11, 12)
    assert (other, deep, last) == (29, 30, 32)
    assert find_blinks(eye_opening(walking(80)), range(80)) == []
    # a dip that a gap cuts in two is none
    assert find_blinks(opening[[*range(12), *range(20, 28)]], [*range(12), *range(20, 28)]) == []
    assert np.isnan(blinks_kept(walking(9), walking(9), range(9))[0])


@pytest.mark.parametrize("count", range(3, 19))
def test_backwards_in_time_is_the_same(count: int) -> None:
    """Nothing lags, whatever the length of a track."""
    points = shaken(walking(count), 2.0)
    forth, back = smooth(points, range(count)), smooth(points[::-1], range(count))
    np.testing.assert_allclose(back[::-1], forth, atol=1e-9)


def test_a_dip_by_a_fifth_is_no_blink() -> None:
    points = walking(30, {12: 0.2, 13: 0.2})
    opening = eye_opening(points)
    assert 0.15 < 1 - opening.min() / np.median(opening) < 0.3
    assert find_blinks(opening, range(30)) == []


def test_one_wrong_box_hides_no_jump() -> None:
    """How far is too far is told by the median of the boxes."""
    points = walking(30)
    points[12, 30] += 20
    sides = np.full(30, 200.0)
    assert np.flatnonzero(jumps(points, sides, 0.08, range(30))).tolist() == [12]
    sides[3] = 5000
    assert np.flatnonzero(jumps(points, sides, 0.08, range(30))).tolist() == [12]


def test_windows_are_steadied_alike_whichever_way_up_the_video_is() -> None:
    """About half a turn the angle jumps from 180 to -180 degrees."""
    draw = np.random.default_rng(2)
    path = [(300 + draw.normal(0, 2), 200.0, 100.0, draw.normal(0, 0.05)) for _ in range(40)]

    def steadied(turn: float) -> Floats:
        made = [square_matrix((x, y), side, angle + turn, 64) for x, y, side, angle in path]
        return window_parameters(steady_windows(made, range(40), 64), 64)

    level, over = steadied(0.0), steadied(np.pi)
    np.testing.assert_allclose(over[:, :3], level[:, :3], atol=1e-6)
    apart = np.exp(1j * (over[:, 3] - level[:, 3]))
    np.testing.assert_allclose(apart, -1, atol=1e-6)


def test_nothing_reaches_over_a_gap() -> None:
    """Each stretch is smoothed as if it were alone, and too short ones are left as they are."""
    points = shaken(walking(30), 1.0)
    indices = [*range(12), *range(13, 28), 40, 41, 42]
    whole = smooth(points, indices)
    for part in (slice(0, 12), slice(12, 27)):
        np.testing.assert_array_equal(whole[part], smooth(points[part], indices[part]))
    np.testing.assert_array_equal(whole[27:], points[27:])
    thinned = list(range(0, 180, 6))  # five frames a second of thirty
    np.testing.assert_array_equal(smooth(points, thinned), points)


def test_boxes_of_the_second_pass_follow_the_head() -> None:
    """Detected boxes step about; the steady ones stay within what their median offset and size say."""
    path = walking(60)
    true = np.stack([box_of(points) for points in path])
    draw = np.random.default_rng(0)
    side = (true[:, 2] - true[:, 0])[:, None]
    steps = draw.normal(0, 0.05, (60, 2)).repeat(2, axis=0).reshape(60, 4)
    noisy = true + side * np.hstack([steps[:, :2], steps[:, :2]])
    found = steady_boxes(shaken(path, 0.5), noisy, range(60))
    assert np.abs(found - true).max() < 0.04 * side.max()
    assert jitter_of_boxes(found) < jitter_of_boxes(noisy) / 10
    # nor do they tremble with the landmarks: without a fit over half a second ten times as much as the head
    trembling = steady_boxes(shaken(path, 2.0), true, range(60))
    assert jitter_of_boxes(trembling) < 2 * jitter_of_boxes(true)


def jitter_of_boxes(boxes: Floats) -> float:
    return float(np.abs(np.diff(boxes, n=2, axis=0)).mean())


@pytest.mark.real
@needs_shared
@pytest.mark.parametrize("clip", ["kitchen_a", "franck_a"])
def test_a_real_still_face_trembles_a_third_as_much(clip: str) -> None:
    """One frame of a clip, filmed again and again with a sensor's noise: detected, located and located again."""
    with av.open(str(SHARED / "videos" / f"{clip}.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    detector, landmarker = load_detector("dlib", 100), load_landmarker("dlib")
    left, top, right, bottom = detector.detect(frame)[0, :4].astype(int)
    margin = right - left
    frame = frame[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]
    draw = np.random.default_rng(0)
    boxes, raw, pictures = [], [], []
    for _ in range(20):
        noisy = np.clip(frame + draw.normal(0, 4, frame.shape), 0, 255).astype(np.uint8)
        boxes.append(detector.detect(noisy)[0, :4])
        raw.append(landmarker.locate(noisy, boxes[-1][None])[0].astype(float))
        pictures.append(noisy)
    steady = steady_boxes(np.stack(raw), np.stack(boxes), range(20))
    again = [landmarker.locate(*pair)[0] for pair in zip(pictures, steady[:, None], strict=True)]
    located = np.stack(again).astype(float)
    smoothed = smooth(located, range(20))
    assert jitter(np.stack(raw), range(20)) > 3 * jitter(smoothed, range(20)) > 0
    flow = FaceFlow()
    for index in range(20):
        flow.add(index, pictures[index], steady[index], located[index])
    fused = smooth(fuse(located, flow.along(range(20)), range(20)), range(20))
    assert jitter(fused, range(20)) < 0.8 * jitter(smoothed, range(20))


# ------------------------------------------------------------------------------------------------ windows


def swaying(count: int = 200) -> Floats:
    """Windows (count, 4) of a head that walks, sways by 7 % of the window's side twice a second, stops and nods."""
    t = np.arange(count)
    sway = 12 * np.sin(2 * np.pi * t / 14) * (t > 120) + 6 * np.sin(t / 17)
    x, y = 230 + 0.3 * np.minimum(t, 90) + sway, 80 + 8 * np.sin(t / 9) * (t > 60)
    return np.column_stack([x, y, 5.1 + 0.1 * np.sin(t / 40), 0.2 * np.sin(t / 23)])


def strayed(found: Floats, true: Floats) -> Floats:
    """(n,) how far the windows' centres are from where they should be, in sides of the window."""
    return np.asarray(np.hypot(*(found - true)[:, :2].T) / np.exp(true[:, 2]))


def test_a_trend_is_the_minimum_that_another_solver_finds() -> None:
    rng = np.random.default_rng(0)
    for count, stiffness, small in ((3, 1.0, 0.1), (40, 5.0, 0.05), (80, 0.5, 0.01)):
        path = np.cumsum(rng.normal(0, 1, count)) + rng.normal(0, 0.3, count)
        bends = np.diff(np.eye(count), n=2, axis=0)
        # the dual problem: forces in +-stiffness that pull the path straight
        dual = np.vstack([bends.T, np.sqrt(small / stiffness) * np.eye(count - 2)])
        wanted = np.concatenate([path, np.zeros(count - 2)])
        force = lsq_linear(dual, wanted, (-stiffness, stiffness), method="bvls", tol=1e-14).x
        found = follow_trend(path, stiffness, small)
        assert np.abs(found - (path - bends.T @ force)).max() < 0.02 * stiffness
        assert np.abs(found - path).max() <= 4.1 * stiffness


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_an_even_motion_has_itself_as_trend(count: int) -> None:
    path = 3.0 + 2.5 * np.arange(count)
    assert np.allclose(follow_trend(path, 10.0, 0.01), path, atol=1e-9)


def test_steady_windows_follow_a_head_that_sways() -> None:
    """Against a known truth, with the noise measured on rendered clips (docs/log.md): 0.05 % of the side, 0.2 % of its length."""
    true = swaying()
    noise = np.random.default_rng(0).normal(0, 1, true.shape)
    raw = true + noise * np.array([0.08, 0.12, 0.002, 0.0012])
    indices = range(len(raw))
    found = window_parameters(steady_windows(windows_from(raw, 256), indices, 256), 256)
    fall, error = bend(raw, indices) / bend(found, indices), strayed(found, true)
    assert (fall > 2).all()  # what is left is motion
    assert error.max() < 0.03
    # a Gaussian that bends x as little strays further
    for sigma in np.arange(1, 6, 0.1):
        blurred = gaussian_filter1d(raw, sigma, axis=0, mode="nearest")
        if bend(raw, indices)[0] / bend(blurred, indices)[0] > fall[0]:
            break
    wider = strayed(blurred, true)[20:-20]
    assert np.square(error).mean() < 0.7 * np.square(wider).mean()
    assert error.max() < 0.9 * wider.max()


def test_still_windows_lose_their_tremble() -> None:
    rng = np.random.default_rng(1)
    true = np.tile([300.0, 200.0, 6.0, 0.0], (120, 1))
    side = np.exp(6.0)
    raw = true + rng.normal(0, 1, true.shape) * np.array([0.001 * side, 0.001 * side, 0.002, 0.002])
    found = window_parameters(steady_windows(windows_from(raw, 256), range(120), 256), 256)
    assert (bend(raw, range(120)) / bend(found, range(120)) > 20).all()
    assert strayed(found, true).max() < strayed(raw, true).max() / 2
    assert STIFFNESS > SMALL_BEND
    assert np.allclose(
        steady_windows(windows_from(raw, 256), range(120), 256, 0), windows_from(raw, 256)
    )


# -------------------------------------------------------------------------------------------------- pupils


def test_pupils_tremble_less_and_jump_as_far() -> None:
    """A gaze that moves evenly stays what it is, noise bends 3.7 times less, a jump of the gaze keeps its place and its size."""
    indices = [*range(20), *range(40, 90), 200, 201]
    even = np.add.outer(np.array(indices, float), np.zeros((2, 2))) * [0.3, -0.1]
    np.testing.assert_allclose(smooth_pupils(even, indices), even, atol=1e-9)
    noise = np.random.default_rng(0).normal(size=(4000, 2, 2))
    long = range(4000)
    before, after = (np.abs(np.diff(path, n=2, axis=0)).mean() for path in (noise, smooth_pupils(noise, long)))  # fmt: skip
    assert before / after == pytest.approx(np.sqrt(6 / (4 / 9)), rel=0.05)
    jump = np.zeros((30, 2, 2))
    jump[15:] = 8.0
    slower = smooth_pupils(jump, range(30))
    np.testing.assert_allclose(slower[:14], jump[:14], atol=1e-9)
    np.testing.assert_allclose(slower[16:], jump[16:])
    np.testing.assert_allclose(slower[14:16], 8 / 3 * np.array([1, 2])[:, None, None] * np.ones((2, 2)))  # fmt: skip


def test_pupils_of_frames_apart_do_not_know_of_each_other() -> None:
    rng = np.random.default_rng(1)
    points, indices = rng.normal(size=(9, 2, 2)), [0, 1, 2, 3, 9, 10, 11, 20, 21]
    whole = smooth_pupils(points, indices)
    for run in (slice(0, 4), slice(4, 7), slice(7, 9)):
        np.testing.assert_array_equal(smooth_pupils(points[run], indices[run]), whole[run])  # fmt: skip
    np.testing.assert_array_equal(whole[7:], points[7:])
    assert smooth_pupils(np.zeros((5, 0, 2)), range(5)).shape == (5, 0, 2)


def test_jitter_of_pupils_is_in_eye_distances_of_the_face() -> None:
    face = np.repeat(FACE_68[None] * 100, 3, axis=0)
    pupils = np.zeros((3, 2, 2))
    pupils[1, :, 0] = 5.0
    assert jitter(pupils, range(3), face) == pytest.approx(10 / eye_distance(face))  # fmt: skip
