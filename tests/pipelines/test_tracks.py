"""Tracks: pure functions by hand, ``follow`` on drawn faces whose place is known in every frame, and on real ones.

A drawn face is a green square, and its detector finds green squares: no network, but the whole path from the file to
the tracks with the truth at hand.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from models.frozen.detector import Detector, load_detector
from pipelines import report, snapshots, tracks
from pipelines.geometry import iou
from pipelines.schema import Cause, Span, Track, Video, from_json, from_row, to_json, to_row
from pipelines.timemap import SHIFTS, TRIM_SECONDS
from pipelines.tracks import (
    DETECTOR_FACE_PX,
    Chain,
    Found,
    Sighting,
    Tracker,
    TracksConfig,
    fill_gaps,
    finish,
    grid_frames,
    judge,
    link,
    make_tracks,
    over_budget,
    plan_spans,
    plan_utterances,
    search_region,
    split_sightings,
    spread,
    watch,
    within_budget,
)
from pipelines.video import Decoder, frame_times, probe
from pipelines.voxceleb import read_list
from tests.clips import as_annotators_saw_it, encode, moving
from tests.material import SHARED, needs_shared
from tests.pipelines.test_bars import padded

Box = tuple[float, float, float, float]


def follow(video: Video, decoder: Decoder, detector: Detector, config: TracksConfig) -> Video:
    """The stage without its snapshots."""
    return tracks.follow(video, decoder, detector, config)[0]


# ------------------------------------------------------------------------------------------ pure functions


def test_grid_is_absolute() -> None:
    """The frames of any part are the frames of the whole that lie in it; each is the nearest to a tick."""
    draw = np.random.default_rng(3)
    times = np.sort(draw.uniform(0, 20, 600))
    whole = grid_frames(times, 0, 20, 5)
    ticks = [tick / 5 for tick in range(101) if times[0] <= tick / 5 <= times[-1]]
    nearest = {int(np.argmin(np.abs(times - tick))) for tick in ticks}
    assert set(whole.tolist()) == nearest
    for start, end in draw.uniform(0, 20, (50, 2)):
        part = grid_frames(times, start, end, 5)
        assert part.tolist() == [i for i in whole if start <= times[i] <= end]
    assert (
        grid_frames(times, 3, 4, 0).tolist() == np.flatnonzero((times >= 3) & (times <= 4)).tolist()
    )


def test_grid_of_a_slow_video_repeats_no_frame() -> None:
    times = np.arange(20) / 2
    assert grid_frames(times, 0, 10, 5).tolist() == list(range(20))


def test_grid_has_no_tick_before_the_first_and_after_the_last_frame() -> None:
    """Or the two last frames would be neighbours."""
    times = np.arange(4, 116) / 30
    assert grid_frames(times, 0, 10, 5).tolist() == list(range(2, 112, 6))


def test_a_part_holds_the_frames_at_both_of_its_ends() -> None:
    times = np.arange(11) / 8
    for rate in (0, 8):
        assert grid_frames(times, 0.25, 0.625, rate).tolist() == [2, 3, 4, 5]


def test_whatever_the_shift_its_frames_are_searched_where_the_face_then_is() -> None:
    """The shift is measured after the search, so that nothing searched may depend on it. Two rows go at each end."""
    rows = np.arange(10, 70)
    boxes = [(0.02 * k - 0.1, 0.2, 0.02 * k + 0.1, 0.5) for k in rows.tolist()]  # 500 px a second
    span = Span(name="a", times=tuple((rows / 25).tolist()), boxes=tuple(boxes))
    times = np.arange(120) / 30
    everything = config(frames_per_second=0.0)
    ((utterance,), _) = plan_utterances([span], np.array([0.0, 0, 1000, 500]), times, everything)
    searched = set(utterance.frames.tolist())
    for shift in SHIFTS.tolist():
        expected = [i for i, t in enumerate(times) if 12 / 25 - 1e-6 <= t - shift <= 67 / 25 + 1e-6]
        assert np.flatnonzero(utterance.used(times, shift)).tolist() == expected
        assert searched >= set(expected)
        for i in expected:
            k = (times[i] - shift) * 25
            region, _ = utterance.region(times[i])
            assert region[0] <= 20 * k - 100
            assert region[2] >= 20 * k + 100


def test_free_spans_that_overlap_share_no_frame() -> None:
    times = np.arange(100) / 10
    spans = [Span(name="b", start=1.0, end=5.0), Span(name="a", start=0.0, end=3.0)]
    spans.append(Span(name="c", start=2.0, end=4.0))
    plans, lost = plan_spans(spans, times, [35, 36], config(frames_per_second=0.0))
    assert [span.name for span, _ in plans] == ["a", "b", "c"]
    assert plans[0][1].tolist() == list(range(31))
    assert plans[1][1].tolist() == [i for i in range(31, 51) if i not in (35, 36)]
    assert plans[2][1].tolist() == []
    assert [(each.track.span, each.track.cause) for each in lost] == [
        ("c", Cause.TRACK_OVERLAP.value)
    ]


def test_budget_goes_first_come_first_served() -> None:
    plans = [np.arange(5), np.arange(10, 14), np.arange(20, 23)]
    split = [(kept.tolist(), left.tolist()) for kept, left in within_budget(plans, 7)]
    assert split == [([0, 1, 2, 3, 4], []), ([10, 11], [12, 13]), ([], [20, 21, 22])]


def test_spread_is_even() -> None:
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    chosen = spread(1000, 200)
    assert len(set(chosen.tolist())) == 200
    assert (chosen[0], chosen[-1]) == (0, 999)
    assert set(np.diff(chosen)) <= {5, 6}


def sightings(*boxes: Box | None, start: int = 0, step: int = 6, fps: float = 30) -> list[Sighting]:
    return [
        Sighting(start + step * i, (start + step * i) / fps, box, 0.9)
        if box
        else Sighting(start + step * i, (start + step * i) / fps, None, cause="track: no face")
        for i, box in enumerate(boxes)
    ]


HERE: Box = (0.0, 0.0, 10.0, 10.0)
THERE: Box = (50.0, 0.0, 60.0, 10.0)


def lengths(pieces: list[list[Sighting]]) -> list[int]:
    return [len(piece) for piece in pieces]


def test_pieces_end_at_cuts_and_jumps() -> None:
    found = sightings(*[HERE] * 5)
    assert lengths(split_sightings(found, [], contiguous=False)) == [5]
    # the first frame of a new shot is the first of a piece; a cut between two kept frames parts them
    assert lengths(split_sightings(found, [12], contiguous=False)) == [2, 3]
    assert lengths(split_sightings(found, [7], contiguous=False)) == [2, 3]
    assert lengths(split_sightings(found, [0, 100], contiguous=False)) == [5]
    assert lengths(split_sightings(found, [7, 8], contiguous=False)) == [2, 3]
    jump = sightings(HERE, HERE, THERE, THERE)
    assert lengths(split_sightings(jump, [], contiguous=False)) == [2, 2]
    # a missing frame between does not hide a jump; after a second of absence a head may be elsewhere
    assert lengths(split_sightings(sightings(HERE, None, THERE), [], contiguous=False)) == [2, 1]
    away = sightings(HERE, *[None] * 5, THERE)
    assert lengths(split_sightings(away, [], contiguous=False)) == [7]
    assert split_sightings([], [], contiguous=False) == []


def test_contiguous_pieces_have_no_holes() -> None:
    found = sightings(HERE, HERE, None, HERE, HERE, HERE, step=1)
    pieces = split_sightings(found, [], contiguous=True)
    assert [[s.index for s in piece if s.box] for piece in pieces] == [[0, 1], [3, 4, 5]]


def config(**changes: Any) -> TracksConfig:
    return replace(TracksConfig(min_frames=3), **changes)


def test_tracks_count_what_they_drop() -> None:
    found = sightings(HERE, None, HERE, HERE, None)
    ((start, track),) = make_tracks(Span(name="a"), found, [], config())
    assert (start, track.state, track.span) == (0.0, "open", "a")
    assert track.indices == (0, 12, 18)
    assert track.times == (0.0, 0.4, 0.6)
    assert track.boxes == (HERE,) * 3
    assert track.dropped == {"track: no face": 2}
    assert track.scores == {"face_px": 10.0}


def test_short_tracks_are_rejected_by_what_made_them_short() -> None:
    (short,) = make_tracks(Span(name="a"), sightings(HERE, HERE, None), [], config())
    assert (short.track.state, short.track.cause) == ("rejected", Cause.TRACK_SHORT.value)
    assert "2 frames < 3" in short.track.detail
    (faceless,) = make_tracks(Span(name="a"), sightings(HERE, None, None), [], config())
    assert faceless.track.cause == Cause.TRACK_NO_FACE.value
    (empty,) = make_tracks(Span(name="a"), sightings(None, None), [], config())
    assert empty.track.cause == Cause.TRACK_NO_FACE.value


def test_long_tracks_are_thinned_or_parted() -> None:
    found = sightings(*[HERE] * 25, step=1)
    (thin,) = make_tracks(Span(name="a"), found, [], config(max_frames_per_track=10))
    assert len(thin.track.times) == 10
    assert thin.track.indices[0] == 0
    assert thin.track.indices[-1] == 24
    assert thin.track.dropped == {"track: budget": 15}
    contiguous = config(max_frames_per_track=10, frames_per_second=0.0)
    parts = [found.track for found in make_tracks(Span(name="a"), found, [], contiguous)]
    assert [len(track.indices) for track in parts] == [8, 8, 9]
    assert [i for track in parts for i in track.indices] == list(range(25))
    ended = found + sightings(None, None, start=25, step=1)
    parts = [found.track for found in make_tracks(Span(name="a"), ended, [], contiguous)]
    assert sum(sum(track.dropped.values()) for track in parts) == 2


def made_track(count: int, **changes: Any) -> Track:
    times = tuple(float(i) for i in range(count))
    return replace(Track(name="", span="a", times=times), **changes)


def test_finish_names_in_time_order_and_holds_the_budget() -> None:
    rejected = made_track(0, state="rejected", cause=Cause.TRACK_SHORT.value)
    listed = Track(name="span-9", span="9", state="rejected", cause=Cause.LIST_BOXES.value)
    found = [Found(9.0, made_track(4)), Found(1.0, made_track(5)), Found(5.0, rejected)]
    video = finish(Video(identity="a", video="b", tracks=(listed,)), found, 8)
    assert [track.name for track in video.tracks] == ["span-9", "000", "001", "002"]
    assert [len(track.times) for track in video.tracks] == [0, 5, 0, 4]
    assert video.tracks[3].cause == Cause.TRACK_BUDGET.value
    assert video.state == "open"


def test_what_was_not_searched_is_counted() -> None:
    track = over_budget(Span(name="a"), np.arange(50, 53), np.arange(99) / 10, 50)
    assert track.dropped == {Cause.TRACK_BUDGET.value: 3}
    assert track.detail == "3 frames from 5.00 s on: the video's 50 are used up"


def test_finish_rejects_a_video_without_tracks() -> None:
    short = made_track(2, state="rejected", cause=Cause.TRACK_SHORT.value)
    faceless = made_track(0, state="rejected", cause=Cause.TRACK_NO_FACE.value)
    video = Video(identity="a", video="b")
    alike = finish(video, [Found(0, short), Found(1, short)], 9)
    assert (alike.state, alike.cause) == ("rejected", Cause.TRACK_SHORT.value)
    mixed = finish(video, [Found(0, short), Found(1, short), Found(2, faceless)], 9)
    assert mixed.cause == Cause.TRACK_SHORT.value
    assert "002 track: no face" in mixed.detail
    assert len(mixed.tracks) == 3


def test_judge() -> None:
    good, bad, nobody = np.full(10, 0.7), np.full(10, 0.1), np.full(10, np.nan)
    thresholds = TracksConfig()
    assert judge([good, good], thresholds) is None
    assert judge([np.r_[np.full(8, 0.7), nobody[:2]]], thresholds) is None

    def cause(*parts: NDArray[np.float64]) -> Cause:
        objection = judge(parts, thresholds)
        assert objection
        return objection[0]

    assert cause(np.r_[np.full(7, 0.7), nobody[:3]]) == Cause.TRACK_NO_FACE
    assert cause(nobody, nobody) == Cause.TRACK_NO_FACE
    assert cause(bad, bad) == Cause.TRACK_MISMATCH
    assert cause(good, bad, bad) == Cause.TIMELINE_EDITED
    assert cause(good, nobody) == Cause.TRACK_NO_FACE
    assert cause(np.empty(0)) == Cause.TRACK_SHORT
    assert cause() == Cause.TRACK_SHORT


def face_rows(*boxes: Box) -> NDArray[np.float32]:
    return np.array([(*box, 0.9) for box in boxes], np.float32).reshape(-1, 5)


def test_link_follows_people_who_pass_each_other() -> None:
    """Two faces cross at different heights; one is missing twice; neither takes the other's box."""
    frames, times = [], np.arange(20) / 5
    for i in range(20):
        one, two = (5.0 * i, 0.0, 5.0 * i + 50, 50), (95.0 - 5 * i, 40.0, 145.0 - 5 * i, 90)
        frames.append(face_rows(two, one) if i not in (5, 6) else face_rows(one))
    chains = link(frames, times, np.zeros(20, int), 0.7)
    assert len(chains) == 2
    for chain in chains:
        tops = {float(face[1]) for face in chain.faces.values()}
        assert len(tops) == 1
        assert chain.gaps == ([5, 6] if tops == {40.0} else [])
    gone = next(chain for chain in chains if chain.gaps)
    assert gone.expected(5) == pytest.approx([70, 40, 120, 90])


def test_link_ends_at_cuts_and_long_gaps() -> None:
    times = np.arange(10) / 5
    still = [face_rows(HERE)] * 10
    assert len(link(still, times, np.arange(10) // 5, 0.6)) == 2
    empty = [face_rows()] * 3
    assert len(link(still[:3] + empty + still[:4], times, np.zeros(10, int), 0.6)) == 2
    assert len(link(still[:3] + empty[:2] + still[:5], times, np.zeros(10, int), 0.7)) == 1
    assert link([face_rows()] * 10, times, np.zeros(10, int), 0.6) == []
    beside: Box = (6.0, 0.0, 16.0, 10.0)  # overlaps by a quarter of the union
    assert len(link([face_rows(HERE), face_rows(beside)], times[:2], np.zeros(2, int), 0.6)) == 2


def test_chain_expects_boxes_between_its_neighbours() -> None:
    chain = Chain({0: face_rows(HERE)[0], 4: face_rows(THERE)[0]})
    assert chain.gaps == [1, 2, 3]
    assert chain.expected(1) == pytest.approx([12.5, 0, 22.5, 10])


@pytest.mark.parametrize(
    "changes",
    [
        {"frames_per_second": -1.0},
        {"min_frames": 0},
        {"min_frames": 300},
        {"min_overlap": 0.0},
        {"min_face_found": 1.5},
        {"min_face_px": 0.0},
        {"search_side_px": 10},
        {"search_every": 0},
    ],
)
def test_config_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TracksConfig(**changes)


# --------------------------------------------------------------------------------------------- drawn faces


class SquareDetector:
    """Finds bright green squares of at least :data:`DETECTOR_FACE_PX`."""

    least = DETECTOR_FACE_PX

    def detect(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        green = (image[..., 1] > 140) & (image[..., 0] < 110) & (image[..., 2] < 110)
        count, _, stats, _ = cv2.connectedComponentsWithStats(green.astype(np.uint8))
        rows = [
            (left, top, left + width, top + height, area / (width * height))
            for left, top, width, height, area in stats[1:count]
            if min(width, height) >= self.least
        ]
        return np.array(rows, np.float32).reshape(-1, 5)


SIZE = (320, 180)
Person = Callable[[float], tuple[float, float, float] | None]
"""Seconds → centre x, centre y and side of a face, or None."""


def box_of(where: tuple[float, float, float]) -> Box:
    x, y, side = where
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def walk(t: float) -> tuple[float, float, float]:
    """A head that swings by two thirds of its side to either side, once in two seconds."""
    return 160 + 25 * np.sin(2 * np.pi * 0.5 * t), 90 + 10 * np.sin(2 * np.pi * 0.35 * t), 40.0


def draw(
    path: Path, people: Sequence[Person], count: int, fps: float = 30, cut: int = 10**6
) -> Path:
    """Encode drawn faces at their places in every frame; from frame ``cut`` on the background is another."""
    walls = []
    for seed in (1, 2):
        noise = np.random.default_rng(seed).integers(0, 90, (9, 16, 3)).astype(np.uint8)
        walls.append(cv2.resize(noise + np.uint8(150 * (seed - 1)), SIZE))
        walls[-1][..., 1] //= 2

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for i in range(count):
            picture = walls[i >= cut].copy()
            for person in people:
                where = person(i / fps)
                if where:
                    # a fraction of a pixel is drawn as one
                    left, top, right, bottom = (round((e - 0.5) * 16) for e in box_of(where))
                    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
                    cv2.fillConvexPoly(picture, corners, (20, 230, 20), cv2.LINE_AA, shift=4)
            yield picture

    return encode(path, pictures(), fps=fps)


def annotate(person: Person, first: int, last: int, shift: float, name: str = "00001") -> Span:
    """VoxCeleb's kind of annotation: rows at k / 25 s, squares 1.4 times the face, in coarse steps, 3 decimals."""
    times, boxes = [], []
    for k in range(first, last):
        where = person(k / 25 + shift)
        assert where
        box = np.array(box_of((where[0], where[1] - 2, where[2] * 1.4)))
        steps = np.round(box / 2) * 2 / [*SIZE, *SIZE]
        times.append(k / 25)
        boxes.append(tuple(np.round(steps, 3).tolist()))
    return Span(name=name, times=tuple(times), boxes=tuple(boxes))


def row(path: Path, *spans: Span) -> Video:
    return Video(identity="id1", video="v1", spans=spans, blob=str(path), probe=asdict(probe(path)))


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


@pytest.fixture(scope="module")
def walking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds at 30 fps of one drawn face."""
    return draw(tmp_path_factory.mktemp("drawn") / "walking.mp4", [walk], 150)


def assert_true_boxes(track: Track, person: Person, video: Video) -> None:
    """Each kept box is where the face was drawn, each kept time is the frame's."""
    times = frame_times(video.blob)
    assert len(track.times) == len(track.indices) == len(track.boxes) == len(track.box_scores)
    assert list(track.times) == times[list(track.indices)].tolist()
    for time, box in zip(track.times, track.boxes, strict=True):
        where = person(time)
        assert where
        assert iou(box, box_of(where))[0, 0] > 0.85, (time, box, box_of(where))


@pytest.mark.parametrize("shift", [-0.06, 0.03])
def test_annotated_person_is_followed(shift: float, walking: Path, decoder: Decoder) -> None:
    """δ is measured within a frame, boxes are the drawn ones, frames lie on the grid and inside the trimmed ends."""
    span = annotate(walk, 5, 115, shift)
    video = follow(row(walking, span), decoder, SquareDetector(), TracksConfig())
    assert video.state == "open", video.detail
    assert video.shift["delta_seconds"] == pytest.approx(shift, abs=1 / 30)
    assert video.shift["delta_confidence"] > 0.8
    assert video.shift["face_found"] == 1
    assert video.shift["median_iou"] > 0.8
    assert video.shift["relation"]["width"] == pytest.approx(1 / 1.4, abs=0.05)
    (track,) = video.tracks
    assert (track.name, track.span, track.state) == ("000", "00001", "open")
    assert_true_boxes(track, walk, video)
    delta = video.shift["delta_seconds"]
    start, end = 5 / 25 + TRIM_SECONDS + delta, 114 / 25 - TRIM_SECONDS + delta
    expected = [i for i in range(0, 150, 6) if start <= i / 30 <= end]
    assert list(track.indices) == expected
    assert from_json(to_json(video)) == video


def test_strip_shows_annotated_and_detected_box(walking: Path, decoder: Decoder) -> None:
    video = follow(row(walking, annotate(walk, 5, 115, 0)), decoder, SquareDetector(), config())
    strip = video.shift["strip"]
    assert len(strip) == snapshots.FRAMES
    assert [moment["index"] for moment in strip] == [i for i, _ in video.timeline["shown"]]
    for moment in strip:
        where = walk(moment["time"])
        assert iou(moment["detected"], box_of(where))[0, 0] > 0.85
        assert iou(moment["annotated"], box_of((*where[:2], where[2] * 1.4)))[0, 0] > 0.6


def test_snapshots_and_timeline_show_where_the_face_was(walking: Path, decoder: Decoder) -> None:
    utterance = annotate(walk, 5, 115, 0)
    video, members = tracks.follow(row(walking, utterance), decoder, SquareDetector(), config())
    line = video.timeline
    assert [name for name, _ in members] == [
        snapshots.of_frame(video.key, index) for index, _ in line["shown"]
    ]
    assert len(line["faces"]) == snapshots.BINS
    assert set(line["faces"]) == {".", "o"}
    assert line["faces"].count("o") == len(video.tracks[0].indices)
    assert line["start"] < video.tracks[0].times[0] < video.tracks[0].times[-1] < line["end"]
    width, height = line["size"]
    for (_, jpeg), (_, time) in zip(members, line["shown"], strict=True):
        image = report.decode(jpeg)
        assert max(image.shape) == snapshots.FRAME_PX
        x, y = (np.array(walk(time)[:2]) * image.shape[1::-1] / [width, height]).astype(int)
        red, green, blue = image[y, x].astype(int)
        assert green > max(red, blue) + 60


def test_what_is_rejected_unseen_is_shown_all_the_same(walking: Path, decoder: Decoder) -> None:
    longer = row(walking, annotate(walk, 5, 900, 0))
    video, members = tracks.follow(longer, decoder, SquareDetector(), config())
    assert (video.cause, video.timeline) == ("timeline: short", {})
    assert [name for name, _ in members] == [snapshots.only(video.key)]


def test_overlapping_utterances_share_no_frame(walking: Path, decoder: Decoder) -> None:
    spans = [
        annotate(walk, 5, 65, 0, "00001"),
        annotate(walk, 40, 115, 0, "00002"),
        annotate(walk, 10, 50, 0, "00003"),
    ]
    video = follow(row(walking, *spans[::-1]), decoder, SquareDetector(), config())
    first, inner, second = video.tracks
    assert [track.span for track in video.tracks] == ["00001", "00003", "00002"]
    assert inner.cause == Cause.TRACK_OVERLAP.value
    assert not set(first.indices) & set(second.indices)
    assert second.dropped == {Cause.TRACK_OVERLAP.value: second.dropped["track: overlap"]}
    assert max(first.indices) < min(second.indices)


@pytest.mark.slow
def test_no_track_crosses_a_cut(tmp_path: Path, decoder: Decoder) -> None:
    """Frame 61 begins the new shot; all of them are kept here, and none is lost."""
    path = draw(tmp_path / "cut.mp4", [walk], 120, cut=61)
    every = config(frames_per_second=0.0)
    annotated = follow(row(path, annotate(walk, 2, 98, 0)), decoder, SquareDetector(), every)
    free = follow(
        row(path, Span(name="a")), decoder, SquareDetector(), replace(every, min_face_px=30)
    )
    for video in (annotated, free):
        before, after = video.tracks
        assert before.indices == tuple(range(before.indices[0], 61))
        assert after.indices == tuple(range(61, after.indices[-1] + 1))


def test_wrong_annotations_are_rejected(walking: Path, decoder: Decoder) -> None:
    def outcome(span: Span, **changes: Any) -> Video:
        return follow(
            row(walking, span), decoder, SquareDetector(), replace(TracksConfig(), **changes)
        )

    corner = annotate(lambda _: (22.0, 160.0, 24.0), 5, 115, 0)
    assert outcome(corner).cause == Cause.TRACK_NO_FACE.value
    beside = annotate(lambda t: (walk(t)[0], walk(t)[1] - 44, 40), 5, 115, 0)
    mismatch = outcome(beside)
    assert mismatch.cause == Cause.TRACK_MISMATCH.value
    assert "median overlap 0." in mismatch.detail
    assert mismatch.shift["strip"]
    late = annotate(walk, 20, 140, 0)
    assert outcome(late).cause == Cause.TIMELINE_SHORT.value
    assert outcome(annotate(walk, 20, 136, 0)).state == "open"
    wide = replace(late, boxes=tuple((a, b / 1.2, c, d / 1.2) for a, b, c, d in late.boxes[:60]))
    assert outcome(replace(wide, times=late.times[:60])).cause == Cause.ANNOTATION_ASPECT.value
    brief = annotate(walk, 20, 24, 0)
    assert outcome(brief).cause == Cause.TRACK_SHORT.value


def test_edited_upload_is_recognised(walking: Path, decoder: Decoder) -> None:
    """Where one utterance agrees and the next does not, that one goes; where most do not, the video goes."""

    def elsewhere(t: float) -> tuple[float, float, float]:
        return walk(t)[0] + 28, walk(t)[1], walk(t)[2]

    first, second = annotate(walk, 5, 60, 0, "00001"), annotate(elsewhere, 60, 90, 0, "00002")
    third = annotate(elsewhere, 85, 120, 0, "00003")
    video = follow(row(walking, first, second), decoder, SquareDetector(), config())
    assert [track.cause for track in video.tracks] == ["", Cause.TRACK_MISMATCH.value]
    video = follow(row(walking, first, second, third), decoder, SquareDetector(), config())
    assert video.cause == Cause.TIMELINE_EDITED.value, video.detail
    assert "1 of 3 spans" in video.detail


def test_budget_ends_the_search(walking: Path, decoder: Decoder) -> None:
    spans = [annotate(walk, 5, 60, 0, "00001"), annotate(walk, 60, 115, 0, "00002")]
    small = config(max_frames_per_video=12, max_frames_per_track=12)
    annotated = follow(row(walking, *spans), decoder, SquareDetector(), small)
    free = follow(
        row(walking, Span(name="a")), decoder, SquareDetector(), replace(small, min_face_px=30)
    )
    for video in (annotated, free):
        assert video.state == "open"
        assert sum(len(t.times) for t in video.tracks if t.state == "open") <= 12
        rest = [t for t in video.tracks if t.cause == Cause.TRACK_BUDGET.value]
        assert rest
        assert "are used up" in rest[-1].detail


def test_unreadable_video_is_rejected(walking: Path, decoder: Decoder, tmp_path: Path) -> None:
    """The file is not the one that was probed."""
    other = draw(tmp_path / "other.mp4", [walk], 140)
    for span in (annotate(walk, 5, 60, 0), Span(name="a")):
        video = replace(row(walking, span), blob=str(other))
        assert follow(video, decoder, SquareDetector(), config()).cause == "video: unreadable"


def test_actor_takes_and_gives_rows(walking: Path) -> None:
    """With the real detector, which takes no green square for a face."""
    video = row(walking, Span(name="a", end=0.5))
    result, members = from_row(Tracker(config())(to_row(video, [("a", b"b")])))
    assert result.cause == Cause.TRACK_NO_FACE.value
    assert result.seconds["tracks"] > 0
    assert result.versions["detector"].startswith("dlib ")
    assert members  # the member it came with is gone, what the report shows stays
    assert all(snapshots.is_snapshot(name) for name, _ in members)


def test_two_people_without_annotation(tmp_path: Path, decoder: Decoder) -> None:
    """A track each. One shrinks for two frames below what a whole-frame search sees and is found again closer up;
    the other is hidden for two frames, which are dropped and counted, never invented."""

    def shrinking(t: float) -> tuple[float, float, float]:
        return 70 + 8 * np.sin(2 * t), 90.0, 40.0 if not 1.3 < t < 1.7 else 26.0

    def hidden(t: float) -> tuple[float, float, float] | None:
        return None if 2.3 < t < 2.7 else (240 + 8 * np.sin(2 * t), 80 + 5 * t, 44.0)

    path = draw(tmp_path / "two.mp4", [shrinking, hidden], 120)
    video = follow(
        row(path, Span(name="a")), decoder, SquareDetector(), TracksConfig(min_face_px=30)
    )
    assert video.state == "open", video.detail
    assert len(video.tracks) == 2
    left, right = sorted(video.tracks, key=lambda track: track.boxes[0])
    assert left.indices == tuple(range(0, 120, 6))
    assert left.dropped == {}
    assert right.indices == tuple(i for i in range(0, 120, 6) if hidden(i / 30))
    assert right.dropped == {Cause.TRACK_NO_FACE.value: 2}
    assert_true_boxes(left, shrinking, video)
    assert_true_boxes(right, hidden, video)


class Counting(SquareDetector):
    """Remembers how many pixels it was shown in each search."""

    def __init__(self) -> None:
        self.pixels: list[int] = []

    def detect(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.pixels.append(image.shape[0] * image.shape[1])
        return super().detect(image)


def follow_free(
    path: Path, decoder: Decoder, detector: SquareDetector, every: int, **changes: Any
) -> Video:
    free = replace(TracksConfig(min_frames=3, min_face_px=30, search_every=every), **changes)
    return follow(row(path, Span(name="a")), decoder, detector, free)


def test_people_are_followed_between_whole_searches(tmp_path: Path, decoder: Decoder) -> None:
    """Two people, one of whom is hidden for a while and one of whom comes late: with fewer whole searches the same tracks,
    the late one at most a stride later, true boxes, and no frame of anybody lost."""

    def hidden(t: float) -> tuple[float, float, float] | None:
        return None if 2.3 < t < 2.7 else (60 + 8 * np.sin(2 * t), 80 + 5 * t, 44.0)

    def late(t: float) -> tuple[float, float, float] | None:
        return None if t < 1.5 else (250 - 4 * t, 90.0, 40.0)

    path = draw(tmp_path / "two.mp4", [hidden, late], 150)
    each, few = Counting(), Counting()
    known = follow_free(path, decoder, each, 1).tracks
    found = follow_free(path, decoder, few, 4).tracks
    assert len(found) == len(known) == 2
    for track, true, person in zip(found, known, (hidden, late), strict=True):
        assert set(track.indices) <= set(true.indices)
        assert true.indices[-1] == track.indices[-1]
        assert track.indices[0] - true.indices[0] <= (3 * 6 if person is late else 0)
        assert len(set(true.indices) - set(track.indices)) <= (3 if person is late else 0)
        assert track.dropped == true.dropped
        assert_true_boxes(track, person, row(path))
    whole = max(each.pixels)
    assert each.pixels.count(whole) == 25
    assert few.pixels.count(whole) < 12  # every fourth, and those in which somebody was gone
    assert sum(few.pixels) < 0.75 * sum(each.pixels)


@pytest.mark.slow
def test_nobody_is_followed_over_a_cut_or_into_an_empty_room(
    tmp_path: Path, decoder: Decoder
) -> None:
    def elsewhere(t: float) -> tuple[float, float, float]:
        return (230.0, 100.0, 42.0) if t > 2.02 else (70.0, 60.0, 40.0)

    path = draw(tmp_path / "cut.mp4", [elsewhere], 120, cut=61)
    for every in (1, 5):
        before, after = follow_free(path, decoder, SquareDetector(), every).tracks
        assert before.indices == tuple(range(0, 61, 6))
        assert after.indices == tuple(range(66, 120, 6))  # searched whole as soon as she is gone

    def leaving(t: float) -> tuple[float, float, float] | None:
        return walk(t) if t < 1.5 else None

    path = draw(tmp_path / "leaving.mp4", [leaving], 240)
    each, few = Counting(), Counting()
    for counting, every in ((each, 1), (few, 5)):
        (track,) = follow_free(path, decoder, counting, every).tracks
        assert track.indices == tuple(range(0, 45, 6))
    assert sum(few.pixels) < sum(each.pixels)


def test_who_is_gone_too_long_comes_back_as_another_track(tmp_path: Path, decoder: Decoder) -> None:
    def leaving(t: float) -> tuple[float, float, float] | None:
        return None if 1.7 < t < 3.1 else walk(t)

    path = draw(tmp_path / "leaving.mp4", [leaving], 150)
    video = follow(row(path, Span(name="a")), decoder, SquareDetector(), config(min_face_px=30.0))
    first, second = video.tracks
    assert first.times[-1] < 1.7
    assert 3.1 < second.times[0] <= 4.1  # after a second of nobody one frame a second is looked at


def test_part_of_a_video_and_nobody_in_it(walking: Path, decoder: Decoder) -> None:
    part = Span(name="a", start=1.0, end=2.5)
    video = follow(row(walking, part), decoder, SquareDetector(), config(min_face_px=30.0))
    assert video.tracks[0].indices == tuple(range(30, 76, 6))
    large = follow(row(walking, part), decoder, SquareDetector(), config(min_face_px=60.0))
    assert large.cause == Cause.TRACK_NO_FACE.value
    assert "no face of 60 px" in large.detail


def test_annotated_and_free_spans_in_one_video(walking: Path, decoder: Decoder) -> None:
    """Each by its own rules; one does not take the other down."""
    spans = [annotate(walk, 5, 50, 0, "00001"), Span(name="00002", start=3.0)]
    for min_face_px, state in [(30.0, "open"), (60.0, "rejected")]:
        free = config(min_face_px=min_face_px)
        video = follow(row(walking, *spans), decoder, SquareDetector(), free)
        assert video.state == "open"
        assert [(track.span, track.state) for track in video.tracks] == [
            ("00001", "open"),
            ("00002", state),
        ]


def test_a_free_span_leaves_out_the_frames_of_an_annotated_one(
    walking: Path, decoder: Decoder
) -> None:
    spans = [annotate(walk, 5, 50, 0, "00001"), Span(name="00002")]
    free = config(min_face_px=30.0)
    video = follow(row(walking, *spans), decoder, SquareDetector(), free)
    indices = [index for track in video.tracks for index in track.indices]
    assert {track.span for track in video.tracks} == {"00001", "00002"}
    assert len(indices) == len(set(indices))


def test_who_is_smaller_than_asked_for_is_no_track(tmp_path: Path, decoder: Decoder) -> None:
    """Also where the detector finds smaller faces than it promises to."""

    class Sharp(SquareDetector):
        least = 20

    path = draw(tmp_path / "two.mp4", [lambda _: (80, 90, 40), lambda _: (240, 90, 20)], 45)
    video = follow(row(path, Span(name="a")), decoder, Sharp(), config(min_face_px=30.0))
    (track,) = video.tracks
    assert track.boxes[0][0] < 100


def test_an_empty_room_is_given_up_before_its_end(tmp_path: Path, decoder: Decoder) -> None:
    """A fifth of the frames without a face are enough to know: what is no face takes the detector longest."""

    class Counting(SquareDetector):
        searched = 0

        def detect(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
            self.searched += 1
            return super().detect(image)

    detector = Counting()
    video = row(draw(tmp_path / "empty.mp4", [], 90), annotate(walk, 2, 70, 0.0))
    assert follow(video, decoder, detector, config()).cause == Cause.TRACK_NO_FACE.value
    assert 2 <= detector.searched <= 6


def test_boxes_that_are_square_inside_black_bars_are_of_what_is_inside(
    tmp_path: Path, decoder: Decoder
) -> None:
    path = encode(tmp_path / "padded.mp4", [padded(20, 0)] * 12)
    boxes = tuple((0.25 + i / 100, 0.25, 0.75 + i / 100, 0.75) for i in range(5))
    area, objection = tracks.annotated_area(
        [Span(name="a", boxes=boxes)], str(path), probe(path), decoder
    )
    assert objection == ""
    assert np.abs(area - [20, 0, 140, 120]).max() <= 2
    wide = tuple((left, top, right + 0.2, bottom) for left, top, right, bottom in boxes)
    _, objection = tracks.annotated_area(
        [Span(name="a", boxes=wide)], str(path), probe(path), decoder
    )
    assert "inside its black bars" in objection


def test_a_gap_is_not_filled_with_the_neighbours_face(tmp_path: Path, decoder: Decoder) -> None:
    """One face is drawn, and is somebody's already; whoever should be close by was not seen in that frame."""
    path = draw(tmp_path / "one.mp4", [lambda _: (100, 90, 40)], 12)
    box, beside = (80, 70, 120, 110), (95, 70, 135, 110)
    there = Chain({i: face_rows(box)[0] for i in range(3)})
    gone = Chain({i: face_rows(beside)[0] for i in (0, 2)})
    alone = Chain({i: face_rows(beside)[0] for i in (0, 2)})
    frames, info = np.array([2, 4, 6]), probe(path)
    fill_gaps(str(path), info, frames, [there, gone], decoder, SquareDetector())
    assert gone.gaps == [1]
    fill_gaps(str(path), info, frames, [alone], decoder, SquareDetector())
    assert iou(alone.faces[1][:4], box)[0, 0] > 0.8


def test_a_hole_between_two_searched_parts_is_no_cut(tmp_path: Path, decoder: Decoder) -> None:
    path = draw(tmp_path / "holed.mp4", [], 60, cut=30)
    ranges = [(0, 20), (40, 60)]
    watched = watch(str(path), probe(path), decoder, ranges, [], [])
    assert list(watched.frames) == []
    assert watched.cuts == []
    whole = watch(str(path), probe(path), decoder, [(0, 60)], [], [])
    assert list(whole.frames) == []
    assert whole.cuts == [30]


def test_a_quiet_free_span_names_no_size(walking: Path, decoder: Decoder) -> None:
    class Blind(SquareDetector):
        def detect(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
            return super().detect(image)[:0]

    video = follow(row(walking, Span(name="a")), decoder, Blind(), config(min_face_px=30.0))
    assert "no face of 30 px in " in video.detail
    assert "largest" not in video.detail


def test_region_boxes_come_back_in_frame_pixels() -> None:
    """Whatever part is searched, at whatever scale, also when it leaves the frame."""
    picture = np.zeros((180, 320, 3), np.uint8)
    picture[20:80, 10:70] = (0, 255, 0)
    for region, scale in [
        ((0, 0, 320, 180), 1.5),
        ((-40, -40, 90, 90), 2.0),
        ((5.5, 10.2, 120.7, 130.1), 3.3),
    ]:
        (face,) = search_region(picture, np.array(region, float), scale, SquareDetector())
        assert face[:4] == pytest.approx([10, 20, 70, 80], abs=1)
    assert search_region(picture, np.array([400.0, 0, 500, 90]), 1, SquareDetector()).shape == (
        0,
        5,
    )


# ---------------------------------------------------------------------------------------------- real faces


@dataclass(frozen=True)
class Portrait:
    """The astronaut in motion, and what her annotators saw."""

    path: Path
    span: Span
    shift: float
    """True δ: of each of the annotators' frames it is known which of ours it shows."""


def swing(t: float) -> NDArray[np.float64]:
    """Matrix of :func:`tests.clips.moving`: the portrait's face swings about the middle of 640 x 360."""
    x = 320 + 70 * np.sin(2 * np.pi * 0.45 * t)
    y = 170 + 25 * np.sin(2 * np.pi * 0.7 * t + 1)
    return np.array([[1.2, 0, x - 1.2 * 222], [0, 1.2, y - 1.2 * 115]])


def portrait(folder: Path, fps: int, seconds: float = 6.0) -> Portrait:
    """Film her at ``fps``, convert to 25 fps as the annotators did, and annotate that by detection."""
    import av
    from skimage.data import astronaut

    size = (640, 360)
    times = np.arange(round(seconds * fps)) / fps
    pictures = list(moving(astronaut(), [swing(t) for t in times], size))
    path = encode(folder / "portrait.mp4", pictures, fps=fps)
    small = np.stack([cv2.resize(p, (80, 45), interpolation=cv2.INTER_AREA) for p in pictures])
    detector = load_detector("dlib", DETECTOR_FACE_PX)
    rows: list[tuple[float, Any]] = []
    lags = []
    with av.open(str(as_annotators_saw_it(path, folder / "annotators.mp4"))) as container:
        for k, frame in enumerate(container.decode(video=0)):
            picture = frame.to_ndarray(format="rgb24")
            seen = cv2.resize(picture, (80, 45), interpolation=cv2.INTER_AREA).astype(float)
            shown = int(np.argmin(np.abs(small - seen).mean(axis=(1, 2, 3))))
            lags.append(times[shown] - k / 25)
            if k % 3 != 1:
                continue  # a box holds for three rows, the one it was found in and its neighbours
            left, top, right, bottom, _ = detector.detect(picture)[0].tolist()
            x, y, half = (left + right) / 2, (top + bottom) / 2 - 6, 0.7 * (right - left)
            steps = np.round(np.array([x - half, y - half, x + half, y + half]) / 4) * 4
            box = tuple(np.round(steps / [*size, *size], 3).tolist())
            rows += [((k + i) / 25, box) for i in (-1, 0, 1)]
    rows = rows[5:-5]
    span = Span(name="00001", times=tuple(t for t, _ in rows), boxes=tuple(b for _, b in rows))
    return Portrait(path, span, float(np.median(lags)))


@pytest.mark.slow
@pytest.mark.parametrize("fps", [25, 30, 60])
def test_shift_of_a_real_face(fps: int, tmp_path: Path, decoder: Decoder) -> None:
    """δ of the annotators' conversion comes out right within one source frame, at every rate."""
    made = portrait(tmp_path, fps)
    detector = load_detector("dlib", DETECTOR_FACE_PX)
    video = follow(row(made.path, made.span), decoder, detector, TracksConfig())
    assert video.state == "open", video.detail
    found = video.shift["delta_seconds"]
    assert found == pytest.approx(made.shift, abs=1 / fps), video.shift
    assert video.shift["delta_confidence"] > 0.5
    assert video.shift["median_iou"] > 0.7
    assert len(video.tracks[0].times) >= 25


@pytest.fixture(scope="module")
def real(decoder: Decoder) -> dict[str, Video]:
    """All clips of the shared list, by file name, through this stage with the laptop's detector."""
    with (SHARED / "lists" / "voxceleb2" / "videos.csv").open() as table:
        files = {line["video"]: line["file"] for line in csv.DictReader(table)}
    detector = load_detector("dlib", DETECTOR_FACE_PX)
    videos = {}
    for listed in read_list(str(SHARED / "lists" / "voxceleb2"), "voxceleb2"):
        path = SHARED / "videos" / files[listed.video]
        video = replace(listed, blob=str(path), probe=asdict(probe(path)))
        videos[path.stem] = follow(video, decoder, detector, TracksConfig())
    return videos


@pytest.mark.real
@needs_shared
def test_real_list(real: dict[str, Video]) -> None:
    """Everybody but nobody passes, with the annotated person in every kept frame."""
    assert len(real) == 14
    assert real["noface"].cause == Cause.TRACK_NO_FACE.value
    assert all(video.state == "open" for name, video in real.items() if name != "noface")
    for name, video in real.items():
        if name == "noface":
            continue
        assert video.shift["face_found"] >= 0.95, name
        assert video.shift["median_iou"] >= 0.7, name
        assert -0.13 <= video.shift["delta_seconds"] <= 0.07, name
        (span,) = video.spans
        for track in video.tracks:
            assert track.state == "open", name
            for time, box in zip(track.times, track.boxes, strict=True):
                # independent of the stage: the annotated row nearest in time, in pixels
                row = int(np.argmin(np.abs(np.array(span.times) - time)))
                size = [video.probe["width"], video.probe["height"]] * 2
                left, top, right, bottom = np.array(span.boxes[row]) * size
                centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                assert left < centre[0] < right, (name, time)
                assert top < centre[1] < bottom, (name, time)


@pytest.mark.real
@needs_shared
def test_real_cut(real: dict[str, Video]) -> None:
    """shotcut has one cut, before frame 68 (seen by eye); no other clip is parted."""
    counts = {name: len(video.tracks) for name, video in real.items()}
    assert counts == dict.fromkeys(real, 1) | {"noface": 0, "shotcut": 2}
    before, after = real["shotcut"].tracks
    assert before.indices[-1] < 68 <= after.indices[0]


@pytest.mark.real
@needs_shared
@pytest.mark.parametrize(
    ("clip", "every", "changes"),
    [
        ("m003_a", 5, {}),
        ("shotcut", 5, {}),
        ("twofaces", 5, {"min_face_px": 40}),
        ("w036_a", 10, {"frames_per_second": 0.0, "max_frames_per_video": 60}),
    ],
)
def test_real_people_are_followed_between_whole_searches(
    clip: str, every: int, changes: dict[str, Any], decoder: Decoder
) -> None:
    """Against a whole search of every frame: the same people in the same frames; boxes overlap it by 0.5 in each frame and
    0.75 in half of them. (dlib's boxes step by 10 % in place and 20 % in size: they cannot agree better.)"""
    path = SHARED / "videos" / f"{clip}.mp4"
    detector = load_detector("dlib", DETECTOR_FACE_PX)
    tracks = [
        [
            track
            for track in follow_free(
                path,
                decoder,
                detector,
                n,
                **{"min_face_px": 96, "max_frames_per_track": 60} | changes,
            ).tracks
            if track.state == "open"
        ]
        for n in (1, every)
    ]
    known, found = tracks
    assert len(found) == len(known) >= 1
    overlaps = []
    for track in found:
        boxes = dict(zip(track.indices, track.boxes, strict=True))
        # the one track that lies over this one, in nearly all of its frames
        scores = []
        for other in known:
            shared = [i for i in other.indices if i in boxes]
            pairs = [iou(other.boxes[other.indices.index(i)], boxes[i])[0, 0] for i in shared]
            scores.append(pairs if pairs and min(pairs) > 0.3 else [])
        assert sum(bool(pairs) for pairs in scores) == 1
        (same,) = (pairs for pairs in scores if pairs)
        assert len(same) >= 0.9 * len(boxes)
        overlaps += same
    assert min(overlaps) >= 0.5
    assert np.median(overlaps) >= 0.75
    counts = [sum(len(track.indices) for track in some) for some in tracks]
    assert counts[1] >= 0.9 * counts[0]


@pytest.mark.real
@needs_shared
def test_real_people_without_annotation(decoder: Decoder) -> None:
    """Both people of twofaces get a track; their boxes never overlap."""
    path = SHARED / "videos" / "twofaces.mp4"
    detector = load_detector("dlib", DETECTOR_FACE_PX)
    free = TracksConfig(min_face_px=40)
    video = follow(row(path, Span(name="a")), decoder, detector, free)
    tracks = [track for track in video.tracks if track.state == "open"]
    sides = [np.mean([(box[0] + box[2]) / 2 for box in track.boxes]) < 350 for track in tracks]
    assert {True, False} == set(sides)
    for one in tracks:
        for other in tracks:
            if one.name < other.name and (shared := set(one.indices) & set(other.indices)):
                for index in shared:
                    boxes = [t.boxes[t.indices.index(index)] for t in (one, other)]
                    assert iou(*boxes)[0, 0] < 0.3
