"""What is too bad to learn from: still pictures, repeated, blurred and turned frames, and clips that are there twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray

from pipelines import crops, quality
from pipelines.geometry import square_matrix, transform, warp
from pipelines.headpose import head_pose
from pipelines.identities import Candidate
from pipelines.quality import QualityConfig, Window
from pipelines.schema import (
    Cause,
    Member,
    Track,
    Video,
    frame_member,
    from_json,
    npy_array,
    npy_bytes,
    to_json,
)
from tests.datasets import face_points

SIZE = 128
WINDOW = Window(size=SIZE, columns=crops.SCORE_COLUMNS)
FRAMES = 12
Picture = NDArray[np.uint8]


def face() -> Picture:
    """A real face in a window, (SIZE, SIZE, 3)."""
    part = skimage.data.astronaut()[40:210, 139:309]
    return np.asarray(cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.uint8)


def speaking(opening: float) -> Picture:
    """The face with its lower half drawn down by ``opening``, a share of it."""
    picture, half = face(), SIZE // 2
    height = round(half * (1 + opening))
    lower = cv2.resize(picture[half:], (SIZE, height), interpolation=cv2.INTER_LINEAR)
    return np.concatenate([picture[:half], lower[:half]])


def noisy(picture: Picture, seed: int, deviation: float = 3.0) -> Picture:
    noise = np.random.default_rng(seed).normal(0, deviation, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def clip(
    pictures: Sequence[Picture], places: Sequence[float] | None = None, **columns: Sequence[float]
) -> tuple[Video, list[Member]]:
    """A video of one track as the identities stage leaves it.

    Args:
        pictures: its windows.
        places: pixels by which each window lies to the right in the frame.
        columns: of the scores, where they are not those of a good frame.
    """
    n = len(pictures)
    places = places if places is not None else [0.0] * n
    track = Track(
        name="000",
        span="00001",
        times=tuple(i / 5 for i in range(n)),
        indices=tuple(range(0, 5 * n, 5)),
        boxes=tuple((200.0 + x, 100.0, 400.0 + x, 300.0) for x in places),
        box_scores=(1.0,) * n,
        embedding=(1.0, 0.0),
    )
    video = Video(identity="id1", video="v", tracks=(track,), probe={"width": 1280, "height": 720})
    good = {"window_side": 400.0, "inside": 1.0, "box_score": 1.0, "sharpness": 50.0}
    table = np.array([columns.get(name, [value] * n) for name, value in good.items()]).T
    matrices = [np.array([[0.32, 0, -32 - 0.32 * x], [0, 0.32, -16]]) for x in places]
    key = video.track_key(track)
    members = [
        (f"{key}.landmarks.npy", npy_bytes(np.tile(face_points(SIZE), (n, 1, 1)))),
        (f"{key}.matrix.npy", npy_bytes(np.array(matrices, np.float32))),
        (f"{key}.scores.npy", npy_bytes(table.astype(np.float32))),
    ]
    members += [
        (frame_member(key, index), crops.encode(picture, 95))
        for index, picture in zip(track.indices, pictures, strict=True)
    ]
    return video, members


def talk() -> list[Picture]:
    return [noisy(speaking(0.1 * (1 + np.sin(2.1 * i))), i) for i in range(FRAMES)]


def judged(made: tuple[Video, list[Member]], **options: Any) -> tuple[Video, list[Member]]:
    return quality.judge(*made, WINDOW, QualityConfig(**options))


def test_someone_who_speaks_is_kept_and_measured() -> None:
    video, members = judged(clip(talk()))
    (track,) = video.tracks
    assert (video.state, track.state, track.dropped) == ("open", "open", {})
    table = npy_array(dict(members)["id1-v-000.scores.npy"])
    names = (*crops.SCORE_COLUMNS, *quality.SCORE_COLUMNS)
    assert table.shape == (FRAMES, len(names))
    for i, name in enumerate(names):
        assert track.scores[name] == pytest.approx(np.median(table[:, i]), abs=1e-3)
    assert track.scores["face_px"] == 200
    assert track.scores["clip_change"] > 12
    assert len(track.hashes) == FRAMES
    assert from_json(to_json(video)) == video


def test_where_a_face_is_and_how_large() -> None:
    """A box of 200 x 100 has a mean side of 150. Hashes hold the middle of the points as shares of width and of height."""
    video, members = clip(talk())
    flat = tuple((left, top, right, top + 100) for left, top, right, _ in video.tracks[0].boxes)
    flat_track = replace(video.tracks[0], boxes=flat)
    (track,) = judged((replace(video, tracks=(flat_track,)), members))[0].tracks
    assert track.scores["face_px"] == 150
    middle = face_points(SIZE).mean(axis=0) / 0.32 + [100, 50]
    assert track.hashes[0][1:3] == pytest.approx((middle / [1280, 720]).tolist(), abs=1e-3)


@pytest.mark.parametrize("moved", [0.0, 6.0])
def test_a_still_picture_is_static_even_when_it_is_panned(moved: float) -> None:
    stills = [noisy(face(), i) for i in range(FRAMES)]
    video, members = judged(clip(stills, [moved * i for i in range(FRAMES)]))
    assert video.cause == Cause.CLIP_STATIC.value
    assert members == []
    assert video.tracks[0].scores["clip_change"] < 8
    kept, _ = judged(clip(stills), min_clip_change=0.0, min_frame_change=0.0)
    assert kept.live


def test_repeated_frames_are_dropped_and_counted() -> None:
    pictures = [picture for picture in talk() for _ in range(2)]
    video, members = judged(clip(pictures))
    (track,) = video.tracks
    assert track.dropped == {Cause.QUALITY_REPEATED.value: FRAMES}
    assert track.indices == tuple(range(0, 10 * FRAMES, 10))  # the first of each pair
    assert sum(name.endswith(".jpg") for name, _ in members) == FRAMES
    everything, _ = judged(clip(pictures), min_frame_change=0.0)
    assert everything.tracks[0].dropped == {}


def test_a_face_that_moves_repeats_nothing() -> None:
    """The same window at other places of the frame is another picture."""
    places = [8.0 * i for i in range(FRAMES)]
    video, _ = judged(clip([face()] * FRAMES, places), min_clip_change=0.0)
    assert video.tracks[0].dropped == {}


@pytest.mark.parametrize(
    ("column", "option", "cause"),
    [
        ("sharpness", "min_sharpness", Cause.QUALITY_BLURRED),
        ("box_score", "min_box_score", Cause.QUALITY_UNSURE),
    ],
)
def test_bad_frames_go(column: str, option: str, cause: Cause) -> None:
    values = [2.0, 30.0, 2.0] + [30.0] * (FRAMES - 3)
    video, _ = judged(clip(talk(), **{column: values}), **{option: 10.0})
    assert video.tracks[0].dropped == {cause.value: 2}
    few = [2.0] * 8 + [30.0] * 4
    video, members = judged(clip(talk(), **{column: few}), **{option: 10.0})
    assert (video.state, video.cause, members) == ("rejected", cause.value, [])
    assert "4 of 12 frames left" in video.detail
    some = [2.0] * 4 + [30.0] * 8
    video, _ = judged(clip(talk(), **{column: some}), **{option: 10.0})
    assert video.cause == Cause.QUALITY_FEW_FRAMES.value


def test_a_track_that_lost_nothing_here_may_be_short() -> None:
    video, _ = judged(clip(talk()[:6]))
    assert (video.state, video.tracks[0].dropped) == ("open", {})


def test_changes_are_seen_at_the_place_in_the_frame_whatever_the_windows() -> None:
    """One still frame, cut with windows that move, grow and turn: nothing changes. Independent of what the windows show."""
    frame = cv2.GaussianBlur(
        np.random.default_rng(5).integers(0, 256, (360, 480), np.uint8), (0, 0), 6
    )
    frame = cv2.normalize(frame, frame, 0, 255, cv2.NORM_MINMAX)
    points = 0.9 * face_points(SIZE).astype(np.float64) + [180, 120]
    windows = [
        square_matrix((240 + 7 * i, 180 - 4 * i), 200 + 12 * i, 0.1 * i, SIZE) for i in range(5)
    ]
    greys = [np.asarray(warp(frame, window, (SIZE, SIZE)), np.uint8) for window in windows]
    landmarks = np.stack([transform(window, points) for window in windows])
    changes = quality.frame_changes(greys, SIZE, landmarks, np.stack(windows))
    assert changes.max() < 6
    shifted = np.stack(windows) + np.array([[0, 0, 9], [0, 0, 0]])
    moved = quality.frame_changes(
        greys, SIZE, landmarks, np.where(np.arange(5)[:, None, None] % 2, shifted, windows)
    )
    assert moved[1:].min() > 2 * changes.max()


def test_objections_come_in_order_and_an_unknown_pose_fails() -> None:
    scores = np.array([[200.0, 0, 0, 0, 9]] * 5)
    scores[1, 0] = 10  # small
    scores[2, 1] = -85  # turned
    scores[3, 2] = np.nan
    scores[4, 4] = 0  # repeated
    config = QualityConfig(min_face_px=50.0)
    found = quality.objections(np.ones(5), np.full(5, 30.0), scores, config)
    pose = Cause.QUALITY_POSE
    assert found == [None, Cause.QUALITY_SMALL, pose, pose, Cause.QUALITY_REPEATED]
    scores[0, 4] = 0
    assert quality.objections(np.ones(5), np.full(5, 30.0), scores, config)[0] is None


def test_poses_are_the_heads_whatever_the_window() -> None:
    points = 7 * face_points(SIZE).astype(np.float64)
    windows = [square_matrix((450, 450), 900, angle, SIZE) for angle in (0.0, 0.4)]
    landmarks = np.stack([transform(window, points) for window in windows])
    found = quality.poses(landmarks, np.stack(windows))
    np.testing.assert_allclose(found[0], head_pose(points), atol=1e-3)
    np.testing.assert_allclose(found[1], found[0], atol=1e-2)


def candidate(
    video: str, marks: NDArray[np.float32], hashes: NDArray[np.uint8], **fields: Any
) -> Candidate:
    made = {"identity": "id1", "window_side": 500.0, "frames": 20, "embedding": (1.0, 0.0)} | fields
    return Candidate(
        key=f"{made['identity']}-{video}-000",
        video=video,
        sources=(),
        split="",
        hash_marks=marks,
        hashes=hashes,
        **made,
    )


def some_hashes(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    marks = np.column_stack([np.arange(24) / 5, random.uniform(0.4, 0.6, (24, 2))])
    return marks.astype(np.float32), random.integers(0, 256, (24, 32)).astype(np.uint8)


def test_a_copy_is_found_and_the_better_one_stays() -> None:
    marks, hashes = some_hashes()
    random = np.random.default_rng(9)
    flips = np.packbits(random.random((24, 256)) < 0.04, axis=1)
    later = marks + np.array([3.33, 0.004, -0.003], np.float32)  # begins elsewhere, a little off
    better = candidate("b", marks, hashes, window_side=800.0)
    copy = candidate("a", later[4:], (hashes ^ flips)[4:])
    other = candidate("c", *some_hashes(1))
    stranger = candidate("d", later, hashes, identity="id2")
    unlike = candidate("e", later, hashes, embedding=(0.9, np.sqrt(1 - 0.81)))
    everyone = [better, copy, other, stranger, unlike]
    config = QualityConfig()
    gone = quality.find_duplicates(everyone, config)
    assert list(gone) == ["id1-a-000"]
    cause, detail = gone["id1-a-000"]
    assert cause == Cause.QUALITY_DUPLICATE
    assert "id1-b-000" in detail
    assert quality.find_duplicates(everyone[::-1], config) == gone
    assert quality.find_duplicates(everyone, QualityConfig(max_hash_distance=0.0)) == {}


def test_a_copy_that_is_gone_displaces_nobody() -> None:
    """a is a copy of b, and c of a but not of b: with a gone, c is the only one that shows its part."""
    marks, hashes = some_hashes()
    few = np.packbits(np.random.default_rng(3).random((2, 24, 256)) < 0.045, axis=2)
    config = QualityConfig()
    best = candidate("b", marks, hashes, window_side=900.0)
    middle = candidate("a", marks, hashes ^ few[0], window_side=800.0)
    last = candidate("c", marks, hashes ^ few[0] ^ few[1], window_side=700.0)
    assert quality.copy_distance(best, last) > config.max_hash_distance
    assert list(quality.find_duplicates([last, middle], config)) == ["id1-c-000"]
    assert list(quality.find_duplicates([last, middle, best], config)) == ["id1-a-000"]


def test_like_windows_in_another_order_or_place_are_no_copy() -> None:
    marks, hashes = some_hashes()
    one = candidate("a", marks, hashes)
    assert quality.copy_distance(one, candidate("b", marks, hashes)) == 0
    shuffled = np.random.default_rng(2).permutation(24)
    assert quality.copy_distance(one, candidate("b", marks, hashes[shuffled])) > 0.2
    aside = marks + np.array([0, 0.05, 0], np.float32)
    assert quality.copy_distance(one, candidate("b", aside, hashes)) == 1
    assert quality.copy_distance(one, candidate("b", marks[:5], hashes[:5])) == 1


def test_two_clips_that_share_less_than_half_of_the_shorter_are_both_kept() -> None:
    """The second begins 19 windows into the first: of 32 they share 13. With 16 they would be copies."""
    random = np.random.default_rng(6)
    marks = np.column_stack([np.arange(32) / 5, np.full((32, 2), 0.5)]).astype(np.float32)
    hashes = random.integers(0, 256, (64, 32)).astype(np.uint8)
    one = candidate("a", marks, hashes[:32])
    assert quality.copy_distance(one, candidate("b", marks, hashes[19:51])) > 0.2
    assert quality.copy_distance(one, candidate("b", marks, hashes[16:48])) == 0


def test_hashes_survive_noise_and_size_and_tell_faces_apart() -> None:
    def bits(picture: Picture) -> NDArray[np.uint8]:
        grey = quality.read_grey(crops.encode(picture, 90), len(picture))
        marked = (0.0, 0.5, 0.5, quality.window_hash(grey))
        return np.unpackbits(quality.hash_bytes([marked]))

    large = np.asarray(cv2.resize(face(), (512, 512), interpolation=cv2.INTER_CUBIC), np.uint8)
    assert (bits(face()) != bits(noisy(face(), 1))).mean() < 0.06
    assert (bits(face()) != bits(large)).mean() < 0.06
    assert (bits(face()) != bits(face()[:, ::-1].copy())).mean() > 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"min_sharpness": -1.0},
        {"max_yaw": 0.0},
        {"max_hash_distance": 0.6},
        {"min_copy_cosine": 0.0},
        {"min_frames": 0},
    ],
)
def test_config_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        QualityConfig(**changes)


def test_finished_tracks_pass_untouched() -> None:
    video, members = clip(talk())
    lost = replace(video.tracks[0], name="001", state="rejected", cause=Cause.CROP_SMALL.value)
    both, kept = judged((replace(video, tracks=(*video.tracks, lost)), members))
    assert both.tracks[1] == lost
    assert {name.split(".")[0] for name, _ in kept} == {"id1-v-000"}
