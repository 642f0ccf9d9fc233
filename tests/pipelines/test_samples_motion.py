"""Pairs for the motion model: the same whoever asks and wherever they start, every person as often as the paper says."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.motion.batch import MotionBatch
from models.motion.layout import FLIP_68, with_pupils
from pipelines.reader import Reader
from pipelines.samples import HeldOutConfig, generator
from pipelines.samples_motion import (
    MotionSamples,
    MotionSamplesConfig,
    Unit,
    change_colours,
    check,
    draw,
    draw_held_out,
    epoch_samples,
    held_out_batches,
    motion_batches,
    num_trained,
    open_held_out,
    successive,
    unit_bounds,
)
from pipelines.schema import npy_bytes
from pipelines.shards import DatasetError
from tests import datasets
from tests.datasets import Made, face_points, made_video, make_dataset
from tests.streams import assert_all_same, assert_same, check_later, check_shares, join, people
from tests.streams import dataset as dataset  # the fixture

TINY = MotionSamplesConfig(batch_size=6, size=64, loaders=0, repeats=5)
PLAIN = replace(TINY, flip=0.0, jitter=0.0)
HELD_OUT = HeldOutConfig(batches=2)


@pytest.fixture(scope="module")
def reader(dataset: str) -> Reader:
    return Reader(dataset, "train")


def train(
    config: MotionSamplesConfig, dataset: str, seen: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[MotionBatch]:
    return motion_batches(config, dataset, samples_seen=seen, rank=rank, world_size=world_size)


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_the_ranks_are_the_batch_of_one(dataset: str, world_size: int) -> None:
    check_shares(partial(train, TINY, dataset), world_size)


def test_starting_later_is_skipping(dataset: str) -> None:
    assert check_later(partial(train, TINY, dataset), TINY.batch_size) > 15


def test_another_seed_is_another_stream(dataset: str) -> None:
    one, other = (next(train(replace(TINY, seed=seed), dataset)) for seed in (0, 1))
    assert one.keys != other.keys


@pytest.mark.slow
@pytest.mark.parametrize("loaders", [1, 3])
def test_loaders_make_what_the_worker_makes(dataset: str, loaders: int) -> None:
    assert_all_same(train(replace(TINY, loaders=loaders), dataset), train(TINY, dataset), 6)


def test_held_out_pairs_are_always_the_same(dataset: str) -> None:
    whole = list(held_out_batches(TINY, HELD_OUT, dataset, rank=0, world_size=1))
    assert [len(batch) for batch in whole] == [6, 6]
    people = Counter(key.split("-")[0] for batch in whole for key in batch.keys)
    assert people == {"dora": 6, "emil": 6}
    assert {key.split(".")[1] for batch in whole for key in batch.keys} == {"000010"}, "first frame"
    ranks = [list(held_out_batches(TINY, HELD_OUT, dataset, rank=r, world_size=3)) for r in range(3)]  # fmt: skip
    for step, batch in enumerate(whole):
        assert_same(join([batches[step] for batches in ranks]), batch)
    samples = open_held_out(TINY, HELD_OUT, dataset)
    reference = samples.make([pair_of(samples.reader, key) for key in whole[0].keys])
    assert_same(reference, whole[0])  # nothing mirrored, no colour changed


def pair_of(reader: Reader, key: str) -> Any:
    """The pair that a key names, unflipped."""
    from pipelines.samples_motion import Pair

    name, source, driving = key.split(".")
    track = reader.keys.index(name)
    names = [reader.frame_key(track, frame) for frame in range(int(reader.frames[track]))]
    return Pair(track, names.index(f"{name}.{source}"), names.index(f"{name}.{driving}"))


# --- draws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "count"), [("identity", 3), ("video", 7), ("clip", 8)])
def test_an_epoch_has_every_unit_as_often(reader: Reader, unit: Unit, count: int) -> None:
    config = replace(PLAIN, unit=unit)
    bounds = unit_bounds(reader, unit)
    assert len(bounds) - 1 == count
    pairs = epoch_samples(config, count)
    assert pairs == count * 5
    for first in (0, pairs):  # two epochs
        drawn = [
            draw(reader, bounds, config, number, generator(0, number)).track
            for number in range(first, first + pairs)
        ]
        names = {
            "identity": [reader.keys[track].split("-")[0] for track in drawn],
            "video": [reader.keys[track].rpartition("-")[0] for track in drawn],
            "clip": [reader.keys[track] for track in drawn],
        }[unit]
        assert set(Counter(names).values()) == {5}
        assert len(Counter(names)) == count


def test_rounds_have_orders_of_their_own(reader: Reader) -> None:
    bounds = unit_bounds(reader, "clip")
    config = replace(PLAIN, unit="clip")
    orders = {
        tuple(
            draw(reader, bounds, config, number, generator(0, number)).track
            for number in range(8 * turn, 8 * turn + 8)
        )
        for turn in range(20)
    }
    assert len(orders) == 20


def test_frames_of_a_pair_differ_and_all_are_drawn(reader: Reader) -> None:
    bounds = unit_bounds(reader, "identity")
    pairs = [draw(reader, bounds, TINY, n, generator(3, n)) for n in range(3000)]
    assert all(pair.source != pair.driving for pair in pairs)
    places = Counter(
        (pair.track, frame, role)
        for pair in pairs
        for role, frame in enumerate((pair.source, pair.driving))
    )
    assert len(places) == 2 * int(reader.frames.sum())
    anna = [count for (track, *_), count in places.items() if reader.keys[track][:4] == "anna"]
    assert min(anna) > 120
    assert max(anna) < 215  # 1000 pairs over 2 clips of 3 frames: 167
    assert 1400 < sum(pair.flip for pair in pairs) < 1600


def test_what_is_reserved_is_evaluated_and_not_trained_on(reader: Reader) -> None:
    config = replace(TINY, reserve=0.34)
    bounds = unit_bounds(reader, "identity")
    for number in range(500):
        rng = generator(0, number)
        pair = draw(reader, bounds, config, number, rng)
        last = num_trained(int(reader.frames[pair.track]), config.reserve)
        assert max(pair.source, pair.driving) < last < reader.frames[pair.track]
        shown = draw_held_out(reader, bounds, config, number, rng)
        last = num_trained(int(reader.frames[shown.track]), config.reserve)
        assert shown.source == 0
        assert last <= shown.driving < reader.frames[shown.track]
        whole = draw_held_out(reader, bounds, TINY, number, rng)
        assert 0 < whole.driving < reader.frames[whole.track]


# --- pictures and points ----------------------------------------------------------------------------------------


def test_pictures_and_points_are_those_of_their_frames(dataset: str, reader: Reader) -> None:
    """Against the members of the shard, read whole, with PIL."""
    from PIL import Image

    config = replace(PLAIN, size=128)
    batch = next(train(config, dataset))
    for number, key in enumerate(batch.keys):
        pair = pair_of(reader, key)
        for name, frame in (("source", pair.source), ("driving", pair.driving)):
            ((jpeg,),) = reader.read([reader.picture(pair.track, frame)])
            reference = np.asarray(Image.open(io.BytesIO(jpeg)), np.float64)
            shown = (getattr(batch, name)[number].permute(1, 2, 0) + 1) * 127.5
            assert np.abs(shown.numpy() - reference).max() < 1.01
            turn = round(0.02 * (frame - int(reader.frames[pair.track]) // 2), 4)
            points = face_points(128, turn) * 2 / 128 - 1
            assert np.allclose(getattr(batch, f"{name}_landmarks")[number], points, atol=1e-5)


def test_a_mirrored_pair_is_a_pair_of_mirrored_faces(dataset: str) -> None:
    whole, mirrored = (next(train(replace(PLAIN, flip=p), dataset)) for p in (0.0, 1.0))
    assert whole.keys == mirrored.keys
    assert torch.equal(mirrored.driving, whole.driving.flip(-1))
    expected = whole.driving_landmarks[:, torch.from_numpy(FLIP_68)] * torch.tensor([-1.0, 1.0])
    assert torch.equal(mirrored.driving_landmarks, expected)
    assert (mirrored.driving_landmarks[:, 36, 0] < mirrored.driving_landmarks[:, 45, 0]).all()


def test_colours_change_alike_in_both_frames() -> None:
    same = torch.rand(1, 3, 16, 16).expand(2, -1, -1, -1) * 2 - 1
    changed = change_colours(same, generator(0, 1), 0.1)
    assert torch.equal(changed[0], changed[1])
    assert 0.005 < (changed - same).abs().mean() < 0.3
    assert changed.abs().max() <= 1
    assert torch.equal(change_colours(same, generator(0, 1), 0.0), same)
    means = [change_colours(same, generator(0, n), 0.1).mean().item() for n in range(20)]
    assert np.std(means) > 0.02


def test_successive_frames_of_one_clip(dataset: str) -> None:
    samples = open_held_out(TINY, HELD_OUT, dataset)
    batches = list(successive(samples, 4, at_once=3))
    assert [len(batch) for batch in batches] == [3, 1]
    keys = join(batches).keys
    assert [key.split(".")[1:] for key in keys] == [["000010", f"{10 + 5 * n:06d}"] for n in range(1, 5)]  # fmt: skip
    assert len(join(list(successive(samples, 99)))) == 5


# --- what cannot be used ----------------------------------------------------------------------------------------


def with_gaze(made: Made) -> Made:
    """The same video with a member of pupils in every sample, in its place."""
    video, members = made
    content = []
    for name, blob in members:
        content.append((name, blob))
        if name.endswith(".embedding.npy"):
            key = name.removesuffix(".embedding.npy")
            points = dict(members)[f"{key}.landmarks.npy"]
            faces = np.load(io.BytesIO(points))
            gaze = with_pupils(faces)[:, 68:] + 1.0
            content.append((f"{key}.pupils.npy", npy_bytes(gaze.astype(np.float32))))
    return video, content


def test_seventy_points_need_pupils(dataset: str, tmp_path: Path) -> None:
    config = replace(PLAIN, num_landmarks=70, size=128)
    with pytest.raises(DatasetError, match=r"no pupils.npy.*num-landmarks 68"):
        MotionSamples(config, dataset, "train")
    make_dataset(str(tmp_path), [with_gaze(made) for made in people()])
    batch = next(train(config, str(tmp_path)))
    assert batch.source_landmarks.shape == (6, 70, 2)
    faces = ((batch.driving_landmarks + 1) * 64).numpy()
    assert np.allclose(faces[:, 68:], with_pupils(faces[:, :68])[:, 68:] + 1.0, atol=1e-3)
    assert_same(
        next(train(replace(config, num_landmarks=68), str(tmp_path))),
        next(train(replace(config, num_landmarks=68), dataset)),
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": 256}, "windows are 128 px, too small for samples.size 256"),
        ({"reserve": 0.1}, r"anna-v0-00[01] has 3 frames, 3 of them"),
        ({"reserve": 0.8}, r"anna-v0-00[01] has 3 frames, 1 of them"),
    ],
)
def test_datasets_that_do_not_do(dataset: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(DatasetError, match=told):
        check(replace(TINY, **change), HELD_OUT, dataset, 1)


def test_check_opens_what_training_opens(dataset: str) -> None:
    assert check(TINY, HELD_OUT, dataset, 3) == 3
    assert check(replace(TINY, unit="video"), HELD_OUT, dataset, 1) == 7
    with pytest.raises(ValueError, match="cannot be divided among 4"):
        check(TINY, HELD_OUT, dataset, 4)
    with pytest.raises(DatasetError, match=r"no split 'val'.*--held-out.split names another"):
        check(TINY, HeldOutConfig(split="val"), dataset, 1)


def test_a_person_on_both_sides_is_refused_unless_the_split_is_a_legacy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [*people(), made_video("anna", "v9", split="test")]
    make_dataset(str(tmp_path / "mixed"), both)
    with pytest.raises(DatasetError, match=r"anna of split test are in split train, too"):
        check(TINY, HELD_OUT, str(tmp_path / "mixed"), 1)
    monkeypatch.setitem(datasets.CONFIG, "identities.split", "legacy")
    make_dataset(str(tmp_path / "legacy"), both)
    assert check(TINY, HELD_OUT, str(tmp_path / "legacy"), 1) == 3


@pytest.mark.parametrize(
    "change",
    [{"flip": 1.5}, {"jitter": -0.1}, {"reserve": 1.0}, {"repeats": 0}, {"size": 0}],
)
def test_settings_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"samples.*{next(iter(change))}"):
        replace(TINY, **change)
