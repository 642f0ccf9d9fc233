from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipelines.geometry import iou
from pipelines.schema import Span
from pipelines.timemap import (
    SHIFTS,
    Relation,
    boxes_at,
    boxes_in_pixels,
    estimate_shift,
    inside_ends,
    overlaps,
    prior_shift,
    relate,
    stretch,
)
from pipelines.video import frame_times
from tests.clips import as_annotators_saw_it, encode, indexed, read_index


def test_boxes_in_pixels_by_hand() -> None:
    box = (0.25, 0.5, 0.75, 1.0)
    assert boxes_in_pixels(Span(name="a", boxes=(box,)), (0, 0, 1920, 1080)).tolist() == [
        [480, 540, 1440, 1080]
    ]
    span = Span(name="a", boxes=((100, 36, 200, 136),), units="height360")
    assert boxes_in_pixels(span, (0, 0, 1920, 1080)).tolist() == [[300, 108, 600, 408]]
    span = Span(name="a", boxes=((64, 36, 128, 72),), units="pixels", reference=(640, 360))
    assert boxes_in_pixels(span, (0, 0, 1280, 1080)).tolist() == [[128, 108, 256, 216]]
    assert boxes_in_pixels(Span(name="a"), (0, 0, 1920, 1080)).shape == (0, 4)


def test_boxes_and_stretch_inside_black_bars() -> None:
    """A 4:3 picture in the middle of a 16:9 frame: fractions are of the picture."""
    inside = (240, 0, 1680, 1080)
    span = Span(name="a", boxes=((0.25, 0.5, 0.75, 1.0),))
    assert boxes_in_pixels(span, inside).tolist() == [[600, 540, 1320, 1080]]
    span = Span(name="a", boxes=((100, 36, 200, 136),), units="height360")
    assert boxes_in_pixels(span, inside).tolist() == [[540, 108, 840, 408]]
    square = Span(name="a", boxes=((0.3, 0.4, 0.45, 0.6), (0.31, 0.4, 0.46, 0.6)))
    assert stretch([square], inside) == pytest.approx(1)
    assert stretch([square], (0, 0, 1920, 1080)) == pytest.approx(4 / 3)


def test_stretch_of_the_public_row() -> None:
    """0.424 x 0.753 of the frame is square at 16:9 and a quarter too narrow at 4:3 (anchors-pipeline §2.1)."""
    boxes = tuple((0.319 + i / 1000, 0.067, 0.743 + i / 1000, 0.820) for i in range(5))
    span = Span(name="a", boxes=boxes)
    assert stretch([span], (0, 0, 1920, 1080)) == pytest.approx(1.0, abs=0.002)
    assert stretch([span], (0, 0, 1440, 1080)) == pytest.approx(0.75, abs=0.002)
    odd = Span(
        name="b", boxes=((0.1, 0.1, 0.9, 0.2), (0.1, 0.1, 0.9, 0.21))
    )  # two wrong rows of seven
    assert stretch([odd, span], (0, 0, 1920, 1080)) == pytest.approx(1.0, abs=0.002)


def test_stretch_of_tables() -> None:
    """A constant box may have any shape; the frame its pixels refer to tells."""
    tall = ((10.0, 10.0, 50.0, 90.0),) * 3
    assert stretch([Span(name="a", boxes=((0.1, 0.1, 0.2, 0.9),) * 3)], (0, 0, 1920, 1080)) == 1
    span = Span(name="a", boxes=tall, units="pixels", reference=(1280, 720))
    assert stretch([span], (0, 0, 1920, 1080)) == pytest.approx(1)
    assert stretch([span], (0, 0, 1440, 1080)) == pytest.approx(0.75)
    assert stretch([], (0, 0, 1920, 1080)) == 1


def test_boxes_at_a_shift() -> None:
    """At δ = -0.06 the frame shown at t has the box of t + 0.06; nothing beyond the ends."""
    times = np.arange(10, 21) / 25
    boxes = np.array([[k, 2 * k, k + 10, 2 * k + 10] for k in range(10, 21)], dtype=float)
    at = np.array([0.34, 0.36, 0.5, 0.74, 0.75])
    k = (at + 0.06) * 25
    expected = np.stack([k, 2 * k, k + 10, 2 * k + 10], axis=1)
    assert boxes_at(times, boxes, at, -0.06)[:4] == pytest.approx(expected[:4])
    assert np.isnan(boxes_at(times, boxes, at, -0.06)[4]).all()
    assert np.isnan(boxes_at(times, boxes, at, 0.0)[:2]).all()


def test_trimmed_ends() -> None:
    """Two annotated frames at each end go: rows 0, 1, 9, 10 of 0..10 do."""
    times = np.arange(11) / 25
    assert inside_ends(times, times, 2 / 25).tolist() == [False] * 2 + [True] * 7 + [False] * 2


def test_relation_is_found_and_a_neighbour_is_not() -> None:
    """Detected boxes of another size and place are recognised; the person in the next seat is no relation."""
    draw = np.random.default_rng(1)
    corners = draw.uniform(100, 500, (40, 2))
    annotated = np.hstack([corners, corners + 200])
    true = Relation(right=0.02, down=0.08, width=0.6, height=0.65)
    shaken = true.expect(annotated) + draw.normal(0, 2, (40, 4))
    neighbour = shaken + np.array([180, 0, 180, 0])
    tiny = np.tile([0.0, 0, 5, 5], (40, 1))
    cheek = shaken + np.array([55, 0, 55, 0])  # near enough, but not the nearest
    faces = [np.stack(four) for four in zip(neighbour, tiny, cheek, shaken, strict=True)]
    found = relate(annotated, faces)
    assert [found.right, found.down, found.width, found.height] == pytest.approx(
        [0.02, 0.08, 0.6, 0.65], abs=0.01
    )
    assert relate(annotated, list(neighbour[:, None])) == Relation()
    # where a face should be, but no face's shape
    sliver = np.hstack([corners, corners]) + np.array([95, 50, 105, 170])
    assert relate(annotated, list(sliver[:, None])) == Relation()
    assert relate(annotated, [np.zeros((0, 5))] * 40) == Relation()


def test_overlaps_takes_the_best_face() -> None:
    expected = np.array([[[0, 0, 10, 10], [5, 0, 15, 10]]])
    faces = [np.array([[100, 100, 110, 110, 0.9], [5, 0, 15, 10, 0.5]])]
    assert overlaps(expected, faces) == pytest.approx(np.array([[1 / 3, 1]]))
    assert overlaps(np.zeros((0, 37, 4)), []).shape == (0, 37)


def moving_head(times: np.ndarray, reach: float) -> np.ndarray:
    """Boxes (n, 4) of a head of 100 px that swings ``reach`` px to either side."""
    x = 300 + reach * np.sin(2 * np.pi * 0.5 * times)
    y = 200 + reach / 3 * np.sin(2 * np.pi * 0.3 * times + 1)
    return np.stack([x - 50, y - 50, x + 50, y + 50], axis=-1)


def scores_of_head(reach: float, shift: float, grid: float = 0.0, seed: int = 0) -> np.ndarray:
    """Overlaps (n, 37) of an annotation that is ``shift`` off with detections, rounded to ``grid`` px and noisy."""
    at = np.arange(2, 48) / 5
    rows = np.arange(0, 260) / 25
    annotated = moving_head(rows + shift, reach)
    noise = np.random.default_rng(seed).normal(0, 2, (len(at), 4))
    detected = moving_head(at, reach) + noise
    if grid:
        detected, annotated = np.round(detected / grid) * grid, np.round(annotated / 4) * 4
    expected = np.stack([boxes_at(rows, annotated, at, s) for s in SHIFTS], axis=1)
    return overlaps(expected, list(detected[:, None]))


@pytest.mark.parametrize("shift", [-0.2, -0.1, -0.06, 0.0, 0.08])
@pytest.mark.parametrize("prior", [-0.06, 0.0])
def test_shift_of_a_moving_head_is_measured(shift: float, prior: float) -> None:
    """Whatever the prior, also with boxes on a grid of 8 px: right within 0.02 s, more exact than a 30 fps frame."""
    found = estimate_shift(scores_of_head(60, shift, grid=8), prior)
    assert found.seconds == pytest.approx(shift, abs=0.02)
    assert found.confidence > 0.8


def test_shift_of_a_still_head_is_the_prior() -> None:
    for seed in range(5):
        found = estimate_shift(scores_of_head(0.5, 0.1, seed=seed), -0.06)
        assert found.seconds == pytest.approx(-0.06, abs=0.001)
        assert found.confidence < 0.1
    assert estimate_shift(np.full((50, 37), 0.7), -0.06).confidence == 0


def test_of_equally_good_shifts_the_one_nearest_to_the_prior_counts() -> None:
    plateau = np.tile(np.where(np.abs(SHIFTS) < 0.105, 0.8, 0.3), (40, 1))
    for prior in (-0.06, 0.0):
        assert estimate_shift(plateau, prior).seconds == pytest.approx(prior, abs=0.005)
    assert estimate_shift(plateau, -0.2).seconds == pytest.approx(-0.1, abs=0.005)


def test_shift_needs_frames_and_a_peak() -> None:
    assert estimate_shift(scores_of_head(60, 0.0)[:7], -0.06).seconds == -0.06
    assert estimate_shift(scores_of_head(60, 0.0)[:8], -0.06).seconds > -0.06
    assert estimate_shift(np.zeros((0, 37)), 0.0).seconds == 0
    slope = np.tile(np.linspace(0.2, 0.8, 37), (40, 1))
    assert estimate_shift(slope, -0.06).confidence == 0


def test_confidence_falls_with_motion() -> None:
    """Less motion under the same noise: less confidence, and δ nearer to the prior."""
    confidences = [
        estimate_shift(scores_of_head(reach, 0.05), 0.0).confidence for reach in (60, 6, 1)
    ]
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] > 0.9 > 0.3 > confidences[2]


def test_prior_of_each_rate_is_what_was_measured() -> None:
    """Medians of ``ffmpeg -i in -r 25``; the slow test below measures them anew."""
    measured = {
        23.976: 0.0,
        24: 0.0,
        25: 0.0,
        29.97: -0.06,
        30: -0.06,
        48: -0.05,
        50: -0.06,
        60: -0.05,
    }
    for fps, seconds in measured.items():
        assert prior_shift(fps) == pytest.approx(seconds, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fps", [Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, 60], ids=str
)
def test_prior_is_what_ffmpeg_does(fps: Fraction | int, tmp_path: Path) -> None:
    """Resample a clip whose frames carry their index as the annotators did: the lag is the prior within 0.01 s."""
    import av

    count = round(6 * fps)
    source = encode(tmp_path / "source.mp4", indexed(count), fps=fps)
    times = frame_times(source)
    lags = []
    with av.open(str(as_annotators_saw_it(source, tmp_path / "annotated.mp4"))) as annotated:
        for k, frame in enumerate(annotated.decode(video=0)):
            lags.append(times[read_index(frame.to_ndarray(format="rgb24"))] - k / 25)
    assert np.median(lags) == pytest.approx(prior_shift(float(fps)), abs=0.01)


def test_expected_box_overlaps_the_detected_one() -> None:
    """Round trip: what ``relate`` learned from one pair carries the annotated box onto the detected one."""
    annotated, detected = np.array([[10.0, 20, 210, 220]]), np.array([[50.0, 60, 170, 190]])
    relation = relate(annotated, [detected])
    assert iou(relation.expect(annotated), detected)[0, 0] == pytest.approx(1)
