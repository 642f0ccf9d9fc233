"""Placement: a head that is the target's own changes nothing but what resampling changes; labels vote; few frames are held."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage import data

from models.frozen.parsing import load_parser
from pipelines.follower import FollowConfig, Follower
from pipelines.geometry import (
    heser_window,
    invert,
    paste_back,
    transform,
    warp,
    window_side,
)
from pipelines.repaint import (
    Drawn,
    Shot,
    Swapped,
    Swapper,
    known,
    majority,
    strip,
    together,
    vote,
    window_border,
)
from pipelines.video import Decoder, probe
from tests.material import SHARED, needs_shared
from tests.swaps import SIZE, FlatParser, OracleAligner, OracleBlender

CLIPS = (
    "m003_a", "m003_b", "w036_a", "kitchen_a", "kitchen_b", "aoc_a", "aoc_b", "phone_a", "franck_a",
    "franck_b", "twofaces", "shotcut", "lowres_a",
)  # fmt: skip
SAMPLED = 2
"""Frames of each real clip; `soak` takes all of them."""


def oracle(size: int, parser: object = None, batch: int = 2) -> Swapper:
    """Everything real but the two networks."""
    code = torch.zeros(1, 1)
    parser = parser or load_parser("geometric")
    return Swapper(OracleAligner(size), OracleBlender(size), parser, code, batch=batch)  # type: ignore[arg-type]


def shots_of(clip: Path, indices: list[int], size: int) -> Iterator[Shot]:
    """Some frames of a clip, each with the window around its face."""
    info = probe(clip)
    follower = Follower(FollowConfig(), (info.width, info.height))
    with Decoder() as decoder:
        for frame in decoder.read(clip, info, ranges=[(0, info.frames)], images=indices):
            assert frame.image is not None
            points, _ = follower.find(frame.image, frame.time)
            matrix = None if points is None else heser_window(points, size)
            yield Shot(frame.index, frame.image, matrix, points)


def beyond_reach(swapped: Swapped) -> NDArray[np.bool_]:
    """(h, w) pixels of the frame with no painted or feathered pixel of the window anywhere near."""
    assert swapped.alpha is not None
    matrix, size = known(swapped.shot.matrix), swapped.alpha.shape[0]
    radius = 2 + int(np.ceil(3 * max(1, size / window_side(matrix, size))))
    kernel = np.ones((2 * radius + 1,) * 2, np.uint8)
    near = cv2.dilate((np.pad(swapped.alpha, radius) > 0).astype(np.uint8), kernel)
    height, width = swapped.image.shape[:2]
    y, x = np.mgrid[:height, :width]
    at = np.floor(transform(matrix, np.stack([x + 0.5, y + 0.5], axis=-1))).astype(int) + radius
    is_inside = ((at >= 0) & (at < near.shape[0])).all(axis=-1)
    at = np.clip(at, 0, near.shape[0] - 1)
    return ~(is_inside & (near[at[..., 1], at[..., 0]] > 0))


def moved_by(swapped: Swapped) -> float:
    """Pixels of the frame by which the pasted face lies beside the face that was there: the translation that fits best."""
    points = known(swapped.shot.landmarks)
    low = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
    high = np.minimum(np.ceil(points.max(axis=0)).astype(int), swapped.image.shape[1::-1])
    before, after = (
        cv2.cvtColor(each, cv2.COLOR_RGB2GRAY)[low[1] : high[1], low[0] : high[0]]
        for each in (swapped.shot.frame, swapped.image)
    )
    still = np.eye(2, 3, dtype=np.float32)
    # the same blur for both, or the sharper one's noise decides
    _, fitted = cv2.findTransformECC(
        before, after, still, cv2.MOTION_TRANSLATION, (3, 100, 1e-5), None, 7
    )
    return float(np.hypot(*fitted[:, 2]))


def check_placement(swapped: Swapped) -> None:
    """What the issue asks of every frame with an oracle for both networks."""
    frame, matrix = swapped.shot.frame, known(swapped.shot.matrix)
    assert swapped.alpha is not None
    assert swapped.painted is not None
    size = swapped.alpha.shape[0]
    assert swapped.alpha.max() == 1
    outside = beyond_reach(swapped)
    assert outside.any() or window_side(matrix, size) > max(frame.shape[:2])
    assert np.array_equal(swapped.image[outside], frame[outside])
    crop = warp(frame, matrix, (size, size))
    assert np.abs(swapped.painted.astype(int) - crop).max() <= 1
    expected = paste_back(frame, crop, matrix, swapped.alpha)
    assert np.abs(swapped.image.astype(int) - expected).max() <= 1
    assert moved_by(swapped) < 0.5


@pytest.fixture(scope="module")
def portrait() -> Shot:
    """The astronaut, who is turned a little."""
    turned = cv2.warpAffine(
        data.astronaut(), np.float32([[0.99, 0.1, 0], [-0.1, 0.99, 30]]), (512, 480)
    )
    points, _ = Follower(FollowConfig(), (512, 480)).find(turned)
    assert points is not None
    return Shot(0, turned, heser_window(points, 256), points)


def test_an_oracle_changes_nothing_but_what_resampling_changes(portrait: Shot) -> None:
    (swapped,) = oracle(256).swap([portrait])
    check_placement(swapped)
    assert np.abs(swapped.image.astype(int) - portrait.frame)[~beyond_reach(swapped)].mean() < 4


def test_a_head_that_is_misplaced_is_noticed(portrait: Shot) -> None:
    class Misplaced(OracleAligner):
        def generate(self, code: torch.Tensor, motion: torch.Tensor) -> object:
            portrait = super().generate(code, motion)
            return portrait._replace(image=portrait.image.roll(2, dims=3))

    swapper = oracle(256)
    swapper._aligner = Misplaced(256)  # type: ignore[assignment]
    (swapped,) = swapper.swap([portrait])
    expected = 2 * window_side(known(portrait.matrix), 256) / 256
    assert moved_by(swapped) == pytest.approx(expected, rel=0.3)
    with pytest.raises(AssertionError):
        check_placement(swapped)


@needs_shared
@pytest.mark.real
@pytest.mark.parametrize("name", CLIPS)
def test_an_oracle_on_frames_of_every_real_clip(name: str) -> None:
    path = SHARED / "videos" / f"{name}.mp4"
    count = probe(path).frames
    indices = [int((i + 0.5) * count / SAMPLED) for i in range(SAMPLED)]
    seen = 0
    for swapped in oracle(512).swap(shots_of(path, indices, 512)):
        if swapped.drawn is not None:
            check_placement(swapped)
            seen += 1
    assert seen >= 1


@needs_shared
@pytest.mark.soak
@pytest.mark.parametrize("name", CLIPS)
def test_an_oracle_on_all_frames_of_every_real_clip(name: str) -> None:
    path = SHARED / "videos" / f"{name}.mp4"
    count = probe(path).frames
    seen, worst = 0, 0.0
    for swapped in oracle(512).swap(shots_of(path, list(range(count)), 512)):
        if swapped.drawn is None:
            assert swapped.image is swapped.shot.frame
            continue
        check_placement(swapped)
        worst = max(worst, moved_by(swapped))
        seen += 1
    assert seen >= count / 4
    assert worst < 0.25, (seen, worst)


def test_points_of_the_frame_come_back_to_where_they_were(portrait: Shot) -> None:
    matrix = known(portrait.matrix)
    points = np.random.default_rng(0).uniform(0, 480, (100, 2))
    back = transform(invert(matrix), transform(matrix, points))
    assert np.abs(back - points).max() < 1e-9


def test_a_frame_without_a_face_goes_through_untouched(portrait: Shot) -> None:
    blank = Shot(1, np.full((480, 512, 3), 90, np.uint8), None, None)
    found = list(oracle(SIZE, FlatParser()).swap([blank, in_size(portrait, SIZE), blank, blank]))
    assert [each.drawn is None for each in found] == [True, False, True, True]
    assert found[0].image is blank.frame


def in_size(shot: Shot, size: int) -> Shot:
    return Shot(shot.index, shot.frame, heser_window(known(shot.landmarks), size), shot.landmarks)


def test_a_frame_does_not_depend_on_its_place_in_a_batch(portrait: Shot) -> None:
    shot = in_size(portrait, SIZE)
    other = Shot(1, np.ascontiguousarray(shot.frame[:, ::-1]), shot.matrix, shot.landmarks)
    alone = [each.image for each in oracle(SIZE, FlatParser(), batch=3).swap([shot])]
    amid = oracle(SIZE, FlatParser(), batch=3).swap([other, other, shot, other])
    assert np.array_equal(alone[0], [each.image for each in amid][2])


def test_few_frames_are_held_however_many_come(portrait: Shot) -> None:
    alive = most = 0

    class Picture(np.ndarray):  # a plain array cannot be watched
        pass

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def frames() -> Iterator[Shot]:
        nonlocal alive, most
        shot = in_size(portrait, SIZE)
        for index in range(60):
            frame = shot.frame.copy().view(Picture)
            weakref.finalize(frame, gone)
            alive += 1
            most = max(most, alive)
            yield Shot(index, frame, shot.matrix, shot.landmarks)
            del frame

    batch = 4
    swapper = oracle(SIZE, FlatParser(), batch=batch)
    count = sum(1 for _ in swapper.swap(frames()))
    assert count == 60
    assert most <= 3 * batch + 2


def test_labels_are_what_two_of_three_frames_say() -> None:
    before, now, after = np.random.default_rng(0).integers(0, 3, (3, 40, 40)).astype(np.uint8)
    found = majority(before, now, after)
    for y in range(40):
        for x in range(40):
            three = [int(each[y, x]) for each in (before, now, after)]
            expected = max(set(three), key=three.count) if len(set(three)) < 3 else three[1]
            assert found[y, x] == expected


def drawn(label: int) -> Drawn:
    maps = np.full((2, 2), label, np.uint8)
    picture = np.zeros((2, 2, 3), np.uint8)
    return Drawn(picture, np.ones((2, 2), bool), torch.zeros(3, 2, 2), maps, maps)


def test_the_vote_is_over_what_was_parsed_not_over_what_was_voted() -> None:
    shot = Shot(0, np.zeros((2, 2, 3), np.uint8), None, None)
    labels = [1, 2, 1, 2, 2, 1]
    pairs = [(shot, drawn(label)) for label in labels]
    pairs[4:4] = [(shot, None)]
    found = [pair[1] and int(pair[1].labels[0, 0]) for pair in vote(pairs)]
    # 2 amid 1s gives way, and so does 1 amid 2s; beside a frame without a face and at the ends nobody votes
    assert found == [1, 1, 2, 2, None, 2, 1]


def test_windows_fade_at_their_edges() -> None:
    border = window_border(512)
    assert border[:10].max() == 0
    assert border[16:-16, 16:-16].min() == 1
    assert 0 < border[12, 256] < 1
    assert np.array_equal(border, border.T)


def test_together_keeps_all_in_order() -> None:
    assert list(together(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(together([], 3)) == []


def test_a_strip_has_its_columns(portrait: Shot) -> None:
    (swapped,) = oracle(SIZE, FlatParser()).swap([in_size(portrait, SIZE)])
    source = np.full((SIZE, SIZE, 3), 255, np.uint8)
    assert strip(swapped, None, 32).shape == (32, 96, 3)
    shown = strip(swapped, source, 32)
    assert shown.shape == (32, 128, 3)
    assert shown[:, :32].min() == 255
