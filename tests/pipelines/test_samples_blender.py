"""Streams of the Blender's samples: the same whoever asks and wherever they start; what is no label map is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from models.blender.batch import BlenderBatch, join
from models.blender.pairs import PairConfig
from pipelines import report
from pipelines.reader import JSON, MATRIX, Piece, Reader
from pipelines.samples import HeldOutConfig, Share, decode, pictures
from pipelines.samples_aligner import AlignerSamples, Draw, aligner_batches
from pipelines.samples_blender import (
    BlenderSamples,
    BlenderSamplesConfig,
    aligner_samples,
    blender_batches,
    check,
    draw,
    held_out_batches,
)
from pipelines.schema import npy_bytes
from pipelines.shards import DatasetError
from tests.aligners import NETWORK
from tests.datasets import made_video, make_dataset
from tests.streams import assert_all_same, assert_same, check_later, check_shares
from tests.streams import dataset as dataset  # the fixture

SIZE = 64
TINY = BlenderSamplesConfig(batch_size=6, output_size=SIZE, sources=2, loaders=0)
UNCHANGED = {f"p_{name}": 0.0 for name in ("mirror", "other_frame", "noise", "background", "affine")}  # fmt: skip
PLAIN = replace(TINY, pairs=PairConfig(**UNCHANGED, p_reenacted=0.5))
ALIGNER = replace(NETWORK, size=SIZE, encoder_size=32, identity="mobilefacenet")


def train(
    config: BlenderSamplesConfig,
    dataset: str,
    aligner: Any = None,
    seen: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[BlenderBatch]:
    return blender_batches(
        config, dataset, aligner, samples_seen=seen, rank=rank, world_size=world_size
    )


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligner", [None, ALIGNER], ids=["alone", "aligner"])
def test_shares_of_the_ranks_are_the_batch_of_one(dataset: str, aligner: Any) -> None:
    check_shares(partial(train, TINY, dataset, aligner), 3, steps=2)


def test_starting_later_is_skipping(dataset: str) -> None:
    assert check_later(partial(train, TINY, dataset, None), TINY.batch_size, skipped=2) > 10
    assert next(train(replace(TINY, seed=1), dataset)).keys != next(train(TINY, dataset)).keys, (
        "another seed is another stream"
    )


@pytest.mark.slow
def test_loaders_make_what_the_worker_makes(dataset: str) -> None:
    """torch has run here before, with its threads: what a fork must survive."""
    torch.rand(500, 500) @ torch.rand(500, 500)
    ahead = train(replace(TINY, loaders=3), dataset, ALIGNER)
    assert_all_same(ahead, train(TINY, dataset, ALIGNER), 4)


def test_held_out_samples_are_always_the_same(dataset: str) -> None:
    held_out = HeldOutConfig(batches=2)
    whole = list(held_out_batches(TINY, held_out, dataset, rank=0, world_size=1))
    assert [len(batch) for batch in whole] == [6, 6]
    people = Counter(key.split("-")[0] for batch in whole for key in batch.keys)
    assert people == {"dora": 6, "emil": 6}
    ranks = [list(held_out_batches(TINY, held_out, dataset, rank=r, world_size=3)) for r in range(3)]  # fmt: skip
    for step, batch in enumerate(whole):
        assert_same(join([batches[step] for batches in ranks]), batch)
        assert torch.equal(batch.target, batch.truth.flip(-1))
        assert not batch.noise.any()
        assert (batch.animated - batch.truth).abs().flatten(1).mean(1).min() > 0.005


# --- draws ------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_one_clip_and_of_a_stranger(dataset: str) -> None:
    reader = Reader(dataset, "train")
    draws = [draw(reader, TINY, number, has_aligner=True) for number in range(3000)]
    identities = Counter(reader.keys[each.frame[0]].split("-")[0] for each in draws)
    assert set(identities) == {"anna", "bert", "cleo"}
    assert all(900 < count < 1100 for count in identities.values())
    strangers = Counter(reader.keys[each.stranger[0]].split("-")[0] for each in draws)
    assert all(900 < count < 1100 for count in strangers.values())
    for each in draws:
        assert each.same[0] == each.frame[0]
        assert each.same != each.frame
        assert reader.keys[each.stranger[0]][:4] != reader.keys[each.frame[0]][:4]
        assert len(each.sources) == (2 if each.chances.reenacted else 0)
        assert len({*each.sources, each.frame}) == len(each.sources) + 1
        own = reader.keys[each.frame[0]].rsplit("-", 1)[0]
        assert all(reader.keys[track].startswith(own) for track, _ in each.sources)
    share = sum(bool(each.sources) for each in draws) / len(draws)
    assert abs(share - 0.25) < 0.03
    seen = {source for each in draws for source in each.sources}
    assert len(seen) == sum(reader.frames), "some frame is never a source"


def test_one_person_with_one_frame_is_enough(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [made_video("anna", "v0", tracks=1, frames=1)])
    batch = next(train(TINY, str(tmp_path)))
    assert len(set(batch.keys)) == 1


# --- pictures ---------------------------------------------------------------------------------------------------


def test_tensors_are_those_of_the_members(dataset: str) -> None:
    config = replace(PLAIN, output_size=128)
    batch = next(train(config, dataset))
    reader = Reader(dataset, "train")
    for number, key in enumerate(batch.keys):
        each = draw(reader, config, number, has_aligner=False)
        assert reader.frame_key(*each.frame) == key
        jpeg, png = (reader.read([piece])[0][0] for piece in (reader.picture(*each.frame), reader.labels(*each.frame)))  # fmt: skip
        assert torch.equal(batch.truth[number], pictures([decode(jpeg, 128, 128, key)])[0])
        labels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(batch.animated_labels[number, 0].numpy(), labels)
        assert {0, 1, 17} == set(np.unique(labels))
        assert torch.equal(batch.target[number], batch.truth[number])
    assert batch.truth_valid.min() == 1, "the drawn windows lie inside their frames"
    smaller = next(train(PLAIN, dataset))
    assert smaller.truth.shape == (6, 3, SIZE, SIZE)
    assert torch.equal(smaller.animated_labels[..., :, :], batch.animated_labels[..., 1::2, 1::2])


def test_the_border_is_that_of_each_frame(dataset: str) -> None:
    """Every frame's window reaches farther beyond the left edge than the last one's."""
    samples = BlenderSamples(PLAIN, dataset, "train")
    each = draw(samples.reader, PLAIN, 1, has_aligner=False)
    members = dict(
        zip(samples.pieces(each), samples.reader.read(samples.pieces(each)), strict=True)
    )
    for track, _ in (each.frame, each.same, each.stranger):
        first = Piece(track, JSON, MATRIX)
        count = int(samples.reader.frames[track])
        matrices = np.tile(np.array([[0.2, 0, 0], [0, 0.2, 0]], np.float32), (count, 1, 1))
        matrices[:, 0, 2] = 10 + 10 * np.arange(count)
        members[first] = [*members[first][:2], npy_bytes(matrices)]
    borders = set()
    for frame in (each.frame, each.same, each.stranger):
        valid = samples.shot(frame, members).valid[0]
        border = (10 + 10 * frame[1]) // 2
        assert not valid[:, :border].any()
        assert valid[:, border:].all()
        borders.add(border)
    assert len(borders) > 1


def test_every_video_of_a_person_is_as_likely(dataset: str) -> None:
    reader = Reader(dataset, "train")
    draws = [draw(reader, TINY, number, has_aligner=False) for number in range(1500)]
    for name in ("frame", "stranger"):
        keys = [reader.keys[getattr(each, name)[0]].split("-") for each in draws]
        videos = Counter(video for identity, video, _ in keys if identity == "cleo")
        assert len(videos) == 4
        assert all(85 < count < 165 for count in videos.values()), name
    coins = [each.chances.colours[0].item() for each in draws]
    assert len(set(coins)) > 1400, "every sample has chances of its own"


def test_the_aligner_is_given_what_it_was_trained_on(dataset: str) -> None:
    """Sources, faces and driving pictures are those of the Aligner's own samples with the truth as target."""
    alone, beside = (next(train(PLAIN, dataset, aligner)) for aligner in (None, ALIGNER))
    assert alone.sources is None
    for name, value in alone.tensors().items():
        assert torch.equal(value, beside.tensors()[name]), name
    theirs = AlignerSamples(aligner_samples(PLAIN, ALIGNER), dataset, "train")
    views = ("sources", "source_faces", "driving", "driving_face")
    assert beside.sources.shape == (6, 2, 3, 32, 32)
    assert beside.source_faces.shape == (6, 2, 3, 112, 96), "as its identity network wants them"
    assert 0 < beside.wants_aligner.sum() < 6
    for number, wanted in enumerate(beside.wants_aligner.tolist()):
        found = {name: beside.tensors()[name][number] for name in views}
        if not wanted:
            assert not any(value.any() for value in found.values())
            continue
        each = draw(theirs.reader, PLAIN, number, has_aligner=True)
        drawn = Draw(each.sources, each.frame, flip=False)
        needed = theirs.pieces(drawn)
        members = dict(zip(needed, theirs.reader.read(needed), strict=True))
        tensors = theirs.sample(drawn, members, np.random.default_rng(5))
        assert torch.equal(tensors["target"], beside.truth[number])
        for name, value in found.items():
            assert torch.equal(value, tensors[name]), name
    shapes = next(aligner_batches(aligner_samples(PLAIN, ALIGNER), dataset, samples_seen=0, rank=0, world_size=1))  # fmt: skip
    for name in views:
        assert beside.tensors()[name].shape == getattr(shapes, name).shape


# --- what is wrong is said in one line --------------------------------------------------------------------------


def relabelled(folder: Path, png: bytes | None) -> str:
    """A dataset all of whose label maps are one PNG, or none."""
    made = []
    for name, split in (("anna", "train"), ("dora", "test")):
        video, members = made_video(name, "v0", split=split, tracks=1, frames=2)
        kept = [(file, content) for file, content in members if not file.endswith(".png")]
        if png is not None:
            kept = [(file, png if file.endswith(".png") else content) for file, content in members]
        made.append((video, kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *_: None)  # it would not show such labels either
        make_dataset(str(folder), made)
    return str(folder)


def coded(labels: Any) -> bytes:
    return bytes(cv2.imencode(".png", labels)[1].tobytes())


GOOD = np.tile(np.arange(16, dtype=np.uint8), (128, 8))
WRONG = {
    "none": (None, "not all samples of split 'train' have labels, which the Blender needs"),
    "size": (coded(GOOD[:64]), "its labels are 128 x 64 pixels, its picture 128 x 128"),
    "values": (coded(GOOD + 30), "the label 45 is unknown; labels are 0..18"),
    "colours": (
        coded(np.dstack([GOOD] * 3)),
        "a PNG with 3 channels is no label map: one channel of 8 bits",
    ),
    "wide": (coded(GOOD.astype(np.uint16)), "a PNG with uint16 values is no label map"),
    "broken": (b"no", "2 bytes are not a PNG of labels 0..18"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_label_map_is_refused(tmp_path: Path, kind: str) -> None:
    png, reason = WRONG[kind]
    spoilt = relabelled(tmp_path, png)
    with pytest.raises(DatasetError) as caught:
        check(TINY, HeldOutConfig(), spoilt, None, 1)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    if png:  # later ones are refused when training meets them
        with pytest.raises(DatasetError, match=reason):
            next(train(TINY, spoilt))


def test_good_labels_of_the_same_form_are_taken(tmp_path: Path) -> None:
    batch = next(train(TINY, relabelled(tmp_path, coded(GOOD))))
    assert batch.other_labels.max() == 15


def test_everything_is_checked_before_workers_start(dataset: str) -> None:
    check(TINY, HeldOutConfig(), dataset, ALIGNER, 2)
    with pytest.raises(DatasetError, match=r"no split 'val'; it has test, train .--held-out.split"):
        check(TINY, HeldOutConfig(split="val"), dataset, None, 2)
    with pytest.raises(ValueError, match="cannot be divided among 4"):
        check(TINY, HeldOutConfig(), dataset, None, 4)
    with pytest.raises(DatasetError, match=r"4 sources and a target are 5 frames, but 1 of 7"):
        check(replace(TINY, sources=4), HeldOutConfig(), dataset, ALIGNER, 1)
    check(replace(TINY, sources=4), HeldOutConfig(), dataset, None, 1)
    for aligner in (None, ALIGNER):
        with pytest.raises(DatasetError, match=r"windows are 128 px, too small .* 256"):
            check(replace(TINY, output_size=256), HeldOutConfig(), dataset, aligner, 1)
    assert [list(Share(6, rank, 3).of(12)) for rank in range(3)] == [[12, 13], [14, 15], [16, 17]]


@pytest.mark.parametrize("changes", [{"output_size": 0}, {"sources": 0}, {"batch_size": 0}])
def test_bad_settings_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}.*must be at least 1, got"):
        replace(TINY, **changes)


def test_a_share_of_samples_is_made_by_number(dataset: str) -> None:
    """Asking for samples one by one, in any order, gives the batch."""
    samples = BlenderSamples(TINY, dataset, "train", ALIGNER)
    singles = {number: samples.batch([number]) for number in (3, 0, 2)}
    assert_same(join([singles[n] for n in (0, 2, 3)]), samples.batch([0, 2, 3]))
