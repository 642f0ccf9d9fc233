"""Streams of samples: the same whoever asks and wherever they start, fair to identities, and cut where the faces are."""

from __future__ import annotations

import io
import json
import os
import uuid
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
from torch import Tensor

from models.aligner import augment
from models.aligner.augment import AugmentConfig
from models.aligner.batch import AlignerBatch
from models.frozen.arcface import ArcFace, crop_faces
from models.frozen.identity import five_points, mobilefacenet_chip
from pipelines import shards
from pipelines.geometry import fit_similarity, transform
from pipelines.reader import JSON, MATRIX, Piece, Reader
from pipelines.samples import Share, decode, generator, inside_frame, pictures
from pipelines.samples_aligner import (
    AlignerHeldOutConfig,
    AlignerSamples,
    AlignerSamplesConfig,
    Shot,
    aligner_batches,
    check,
    draw,
    face_matrix,
    held_out_batches,
    num_sources,
)
from pipelines.schema import npy_bytes
from pipelines.shards import DatasetError
from tests.datasets import face_labels, face_points, make_dataset
from tests.streams import (
    assert_all_same,
    assert_same,
    check_later,
    check_shares,
    join,
    people,
    take,
)
from tests.streams import dataset as dataset  # the fixture

NO_AUGMENT = AugmentConfig(max_photometric=0, scale=0.0, shift=0.0)
TINY = AlignerSamplesConfig(batch_size=6, output_size=64, encoder_size=32, max_sources=3, loaders=0)
PLAIN = replace(TINY, flip=0.0, augment=NO_AUGMENT)


def train(
    config: AlignerSamplesConfig, dataset: str, seen: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[AlignerBatch]:
    return aligner_batches(config, dataset, samples_seen=seen, rank=rank, world_size=world_size)


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_of_the_ranks_are_the_batch_of_one(dataset: str, world_size: int) -> None:
    check_shares(partial(train, TINY, dataset), world_size)


def test_starting_later_is_skipping(dataset: str) -> None:
    assert check_later(partial(train, TINY, dataset), TINY.batch_size) > 10


def test_another_seed_is_another_stream(dataset: str) -> None:
    one, other = (next(train(replace(TINY, seed=seed), dataset)) for seed in (0, 1))
    assert one.keys != other.keys


@pytest.mark.slow
@pytest.mark.parametrize("loaders", [1, 3])
def test_loaders_make_what_the_worker_makes(dataset: str, loaders: int) -> None:
    """In this process cv2 and torch have run before, with all their threads: what a fork must survive."""
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 0)
    state = torch.get_rng_state()
    ahead = take(train(replace(TINY, loaders=loaders), dataset), 6)
    assert torch.equal(torch.get_rng_state(), state), "the loader took a number of the training's"
    assert_all_same(iter(ahead), train(TINY, dataset), 6)


@pytest.mark.slow
@pytest.mark.parametrize("loaders", [0, 2])
def test_a_dataset_in_s3_gives_the_same_batches(dataset: str, bucket: str, loaders: int) -> None:
    target = f"{bucket}/{uuid.uuid4().hex}"
    make_dataset(target, people(), target_mb=0.05)
    config = replace(TINY, loaders=loaders)
    assert_all_same(train(config, target), train(TINY, dataset), 3)


def test_held_out_samples_are_always_the_same(dataset: str) -> None:
    held_out = AlignerHeldOutConfig(batches=2, sources=2)
    whole = list(held_out_batches(TINY, held_out, dataset, rank=0, world_size=1))
    assert [len(batch) for batch in whole] == [6, 6]
    people = Counter(key.split("-")[0] for batch in whole for key in batch.keys)
    assert people == {"dora": 6, "emil": 6}
    ranks = [list(held_out_batches(TINY, held_out, dataset, rank=r, world_size=3)) for r in range(3)]  # fmt: skip
    for step, batch in enumerate(whole):
        assert_same(join([batches[step] for batches in ranks]), batch)
        assert batch.sources.shape[1] == 2
        driving = torch.nn.functional.avg_pool2d(batch.target, 2)
        assert torch.equal(batch.driving, driving), "held-out samples are not augmented"


# --- draws ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(dataset: str) -> Reader:
    return Reader(dataset, "train")


def drawn(reader: Reader, config: AlignerSamplesConfig, count: int, sources: int = 3) -> list[Any]:
    return [draw(reader, config, generator(7, number), sources) for number in range(count)]


def test_every_identity_then_every_video_is_as_likely(reader: Reader) -> None:
    keys = [reader.keys[each.target[0]].split("-") for each in drawn(reader, TINY, 3000)]
    identities = Counter(identity for identity, _, _ in keys)
    assert set(identities) == {"anna", "bert", "cleo"}
    assert all(900 < count < 1100 for count in identities.values())
    videos = Counter(video for identity, video, _ in keys if identity == "cleo")
    assert len(videos) == 4
    assert all(200 < count < 300 for count in videos.values())


def test_every_frame_of_a_video_is_as_likely_in_every_place(reader: Reader) -> None:
    places = Counter(
        (place, reader.frame_key(*frame))
        for each in drawn(reader, TINY, 4000)
        for place, frame in enumerate([*each.sources, each.target])
        if reader.keys[frame[0]].startswith("anna")
    )
    assert len(places) == 4 * 6, "frames of both tracks of the video"
    assert min(places.values()) > 160
    assert max(places.values()) < 285


@pytest.mark.parametrize("pairing", ["video", "identity"])
def test_frames_are_distinct_and_of_one_person(reader: Reader, pairing: Any) -> None:
    config, mixed = replace(TINY, pairing=pairing), 0
    for each in drawn(reader, config, 500):
        frames = [*each.sources, each.target]
        assert len(set(frames)) == 4
        assert all(0 <= frame < reader.frames[track] for track, frame in frames)
        names = {tuple(reader.keys[track].split("-")[:2]) for track, _ in frames}
        assert len({identity for identity, _ in names}) == 1
        mixed += len(names) > 1
    assert (mixed > 150) == (pairing == "identity")
    assert mixed == 0 or pairing == "identity"


def test_every_number_of_sources_is_as_likely(dataset: str) -> None:
    config = replace(TINY, min_sources=2, max_sources=5)
    counts = Counter(num_sources(config, first) for first in range(0, 24_000, 6))
    assert set(counts) == {2, 3, 4, 5}
    assert all(900 < count < 1100 for count in counts.values())
    for first, batch in zip(range(0, 24, 6), train(TINY, dataset), strict=False):
        assert batch.sources.shape[1] == num_sources(TINY, first)


def test_coins_are_fair(reader: Reader) -> None:
    assert 450 < sum(each.flip for each in drawn(reader, TINY, 1000)) < 550
    assert not any(each.flip for each in drawn(reader, PLAIN, 100))


def test_generators_of_neighbours_have_nothing_in_common() -> None:
    numbers = np.array([[generator(s, n, t).random() for t in (0, 1)] for s in (0, 1) for n in range(500)])  # fmt: skip
    assert len(np.unique(numbers)) == numbers.size
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.1
    assert 0.45 < numbers.mean() < 0.55


# --- pictures ---------------------------------------------------------------------------------------------------


def image_of(tensor: Tensor) -> np.ndarray:
    """(3, h, w) in [-1, 1] → (h, w, 3) in grey levels."""
    return ((tensor.permute(1, 2, 0) + 1) * 127.5).numpy()


def test_pictures_and_landmarks_are_those_of_their_frames(dataset: str, reader: Reader) -> None:
    """Against the members of the shard, read whole, with PIL."""
    from PIL import Image

    config = replace(PLAIN, output_size=128, encoder_size=64)
    batch = next(train(config, dataset))
    for number, key in enumerate(batch.keys):
        name, frame = key.split(".")
        track = reader.keys.index(name)
        position = [reader.frame_key(track, i) for i in range(int(reader.frames[track]))].index(key)
        ((jpeg,),) = reader.read([reader.picture(track, position)])
        reference = np.asarray(Image.open(io.BytesIO(jpeg)), np.float64)
        assert np.abs(image_of(batch.target[number]) - reference).max() < 1.01, frame
        turn = round(0.02 * (position - int(reader.frames[track]) // 2), 4)
        assert np.allclose(batch.landmarks[number], face_points(128, turn), atol=1e-3)
        mean = reference.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(image_of(batch.driving[number]) - mean).max() < 1.01
    smaller = next(train(PLAIN, dataset))
    assert torch.allclose(2 * smaller.landmarks, batch.landmarks, atol=1e-3)


def test_the_range_ends_at_one() -> None:
    """x / 127.5 - 1: black is -1 and white 1, exactly."""
    assert pictures([np.array([[[0, 255, 255]]], np.uint8)]).flatten().tolist()[:2] == [-1, 1]


def test_smaller_pictures_are_the_means_of_larger_ones() -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 255, (128, 128, 3), np.uint8), (0, 0), 3)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    flags = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    jpeg = cv2.imencode(".jpg", image[..., ::-1], flags)[1].tobytes()
    whole = decode(jpeg, 128, 128, "key").astype(float)
    for size in (64, 32, 96):
        smaller = decode(jpeg, 128, size, "key").astype(float)
        reference = cv2.resize(whole, (size, size), interpolation=cv2.INTER_AREA)
        assert np.abs(smaller - reference).max() < 3.5
        assert np.abs(smaller - reference).mean() < 0.6
        assert abs((smaller - reference).mean()) < 0.1
    for broken in (b"", b"no", jpeg[:100]):
        with pytest.raises(DatasetError, match="anna-v0-000: not a JPEG of 128 x 128"):
            decode(broken, 128, 64, "anna-v0-000")
    with pytest.raises(DatasetError, match="not a JPEG of 256 x 256"):
        decode(jpeg, 256, 128, "key")


def test_faces_are_cut_where_the_identity_network_wants_them(dataset: str, reader: Reader) -> None:
    """112 x 112 against a plain cv2.warpAffine of the stored picture; 112 x 96 against the embedder's own chip."""
    each = draw(reader, PLAIN, generator(0, 0), 1)
    config = replace(PLAIN, output_size=128, encoder_size=64, min_sources=1, max_sources=1)
    samples = AlignerSamples(config, dataset, "train")
    batch = samples.batch([(0, 1)])
    ((jpeg,),) = reader.read([reader.picture(*each.sources[0])])
    image = decode(jpeg, 128, 128, "key")
    track, frame = each.sources[0]
    turn = round(0.02 * (frame - int(reader.frames[track]) // 2), 4)
    points = face_points(128, turn).astype(np.float64)
    matrix = fit_similarity(five_points(points), ArcFace.points)
    matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    wide = cv2.warpAffine(image, matrix, (112, 112), flags=cv2.INTER_LINEAR)
    ours = image_of(batch.source_faces[0, 0])
    assert ours.shape == (112, 112, 3)
    assert np.abs(ours - wide).mean() < 2
    eyes = transform(face_matrix(points, "arcface"), five_points(points))
    assert np.abs(eyes - ArcFace.points).max() < 6, (
        "the drawn face has not quite ArcFace's proportions"
    )
    narrow = AlignerSamples(replace(config, identity="mobilefacenet"), dataset, "train")
    ours = image_of(narrow.batch([(0, 1)]).source_faces[0, 0])
    assert np.abs(ours - mobilefacenet_chip(image, points)).max() < 1.01


def test_the_targets_matrix_cuts_the_same_face(dataset: str) -> None:
    """What the learner will do with generated pictures, done with the real one."""
    config = replace(PLAIN, output_size=128, encoder_size=64)
    batch = next(train(config, dataset))
    faces = crop_faces(batch.target, batch.target_face_matrix, (112, 112))
    for number in range(len(batch)):
        matrix = face_matrix(batch.landmarks[number].double().numpy(), "arcface")
        assert np.allclose(batch.target_face_matrix[number], matrix, atol=1e-3)
        matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
        image = batch.target[number].permute(1, 2, 0).numpy()
        reference = cv2.warpAffine(image, matrix, (112, 112), borderValue=(-1, -1, -1))
        assert np.abs(faces[number].permute(1, 2, 0).numpy() - reference).mean() < 0.01


def test_the_expression_crop_is_a_square_around_the_face(dataset: str) -> None:
    config = replace(PLAIN, output_size=128, encoder_size=64)
    batch = next(train(config, dataset))
    for number in range(len(batch)):
        points = batch.landmarks[number].numpy().astype(np.float64)
        x, y, w, h = *points.min(axis=0), *np.ptp(points, axis=0)
        side = 1.25 * max(w, h)
        corner = np.array([x + w / 2, y + h / 2]) - side / 2
        matrix = np.array([[64 / side, 0, 0], [0, 64 / side, 0]])
        matrix[:, 2] = -corner * 64 / side + (64 / side) * 0.5 - 0.5
        reference = cv2.warpAffine(
            batch.target[number].permute(1, 2, 0).numpy(),
            matrix,
            (64, 64),
            borderMode=cv2.BORDER_REFLECT,
        )
        ours = batch.driving_face[number].permute(1, 2, 0).numpy()
        assert np.abs(ours - reference).mean() < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_the_expression_crop_follows_the_scale(dataset: str, seed: int) -> None:
    """Cut from the augmented picture itself, with nothing but the scale on: only the resolution differs."""
    scale_only = AugmentConfig(max_photometric=0, scale=0.2, shift=0.0, probability=1.0)
    config = replace(PLAIN, output_size=128, encoder_size=128, augment=scale_only, seed=seed)
    samples = AlignerSamples(config, dataset, "train")
    batch = samples.batch([(0, 1)])
    rng = generator(seed, 0)
    draw(samples.reader, config, rng, 1)
    augment.draw_shift(rng, scale_only, 128)
    x, y = augment.draw_scales(rng, scale_only)
    points = (batch.landmarks[0].numpy().astype(np.float64) - 64) * [x, y] + 64
    low, high = points.min(axis=0), points.max(axis=0)
    factor = 128 / (1.25 * (high - low).max())
    matrix = np.array([[factor, 0, 0], [0, factor, 0]])
    matrix[:, 2] = 64 - factor * (low + high) / 2 + factor * 0.5 - 0.5
    augmented = batch.driving[0].permute(1, 2, 0).numpy()
    reference = cv2.warpAffine(augmented, matrix, (128, 128), borderMode=cv2.BORDER_REFLECT)
    assert np.abs(batch.driving_face[0].permute(1, 2, 0).numpy() - reference).mean() < 0.02
    assert not torch.equal(batch.driving, batch.target)


def test_the_shift_moves_everything_that_belongs_to_the_target(dataset: str) -> None:
    moving = AugmentConfig(max_photometric=0, scale=0.0, shift=0.1, probability=1.0)
    still, moved = (
        next(train(replace(PLAIN, augment=chosen), dataset)) for chosen in (NO_AUGMENT, moving)
    )
    assert torch.equal(still.sources, moved.sources)
    distances = set()
    for number in range(len(still)):
        by = (moved.landmarks[number] - still.landmarks[number]).mean(dim=0)
        x, y = (round(float(value)) for value in by)
        assert torch.allclose(by, torch.tensor([x, y]).float(), atol=1e-4), "whole pixels"
        distances.add((x, y))
        for name in ("target", "target_valid", "target_foreground"):
            before, after = getattr(still, name)[number], getattr(moved, name)[number]
            inner = slice(8, -8)
            there = torch.roll(before, (y, x), dims=(1, 2))
            assert torch.equal(there[:, inner, inner], after[:, inner, inner]), name
        driving = torch.nn.functional.avg_pool2d(moved.target[number][None], 2)
        assert torch.equal(driving[0], moved.driving[number])
        linear = still.target_face_matrix[number][:, :2]
        shifted = still.target_face_matrix[number][:, 2] - linear @ by
        assert torch.allclose(moved.target_face_matrix[number][:, 2], shifted, atol=1e-2)
    assert len(distances) > 3


def test_a_mirrored_sample_is_mirrored_in_all_its_parts(dataset: str) -> None:
    plain, mirrored = (
        next(train(replace(PLAIN, flip=flip, output_size=128), dataset)) for flip in (0.0, 1.0)
    )
    assert plain.keys == mirrored.keys
    for name in ("sources", "target", "target_valid", "target_foreground"):
        assert torch.allclose(getattr(plain, name).flip(-1), getattr(mirrored, name), atol=1e-6), (
            name
        )
    for number in range(len(plain)):
        before, after = (batch.landmarks[number].numpy() for batch in (plain, mirrored))
        assert np.allclose(before.mean(axis=0)[0] + after.mean(axis=0)[0], 128, atol=1e-3)
        assert after[36:42].mean(axis=0)[0] < after[42:48].mean(axis=0)[0], "eyes in order"
        assert after[48][0] < after[54][0], "mouth in order"
    for name in ("source_faces", "driving_face"):
        before, after = getattr(plain, name), getattr(mirrored, name)
        assert (before.flip(-1) - after).abs().mean() < (before - after).abs().mean() + 0.02
        assert (before.flip(-1) - after).abs().mean() < 0.06, name


def test_mirroring_twice_is_nothing() -> None:
    rng = np.random.default_rng(0)
    shot = Shot(rng.integers(0, 255, (32, 32, 3), np.uint8), rng.uniform(0, 32, (68, 2)))
    twice = shot.flipped().flipped()
    assert np.array_equal(twice.image, shot.image)
    assert np.allclose(twice.landmarks, shot.landmarks)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.1, 0, -150], [0, 0.1, -20]],
        [[0.08, 0.01, -20], [-0.01, 0.08, 30]],
        [[0.03, 0, 4], [0, 0.03, 10]],
    ],
)
def test_the_border_is_where_a_warped_frame_has_nothing(matrix: list[list[float]]) -> None:
    mask = inside_frame(np.array(matrix), (1920, 1080), 64)
    theirs = np.array(matrix)
    theirs[:, 2] += theirs[:, :2] @ [0.5, 0.5] - 0.5
    white = np.full((1080, 1920), 255, np.uint8)
    reference = cv2.warpAffine(white, theirs, (64, 64), flags=cv2.INTER_NEAREST) > 0
    assert 0 < mask.sum() < mask.size
    assert (mask != reference).sum() <= 64, "more than a line of pixels on the border"


def test_the_border_is_between_pixel_centres() -> None:
    """A window of 4 pixels that begins 0.3 px left of the frame and 0.7 px above it, and ends beyond both."""
    mask = inside_frame(np.array([[1.0, 0, 0.3], [0, 1.0, 0.7]]), (3, 3), 4)
    assert mask.tolist() == [[False] * 4, *[[True, True, True, False]] * 3]


@pytest.mark.parametrize("flip", [False, True])
def test_the_border_is_that_of_the_targets_own_frame(dataset: str, flip: bool) -> None:
    """Every window reaches farther beyond the left edge than the last one's, and all beyond the lower edge of 1080 pixels."""
    samples = AlignerSamples(replace(PLAIN, flip=float(flip)), dataset, "train")
    each = draw(samples.reader, samples.config, generator(0, 3), 2)
    needed = samples.pieces(each)
    members = dict(zip(needed, samples.reader.read(needed), strict=True))
    track, frame = each.target
    first = Piece(track, JSON, MATRIX)
    record, landmarks, _ = members[first]
    count = int(samples.reader.frames[track])
    matrices = np.tile(np.array([[0.2, 0, 0], [0, 0.2, 0]], np.float32), (count, 1, 1))
    matrices[:, 0, 2] = 10 + 10 * np.arange(count)
    matrices[:, 1, 2] = 100 - 0.2 * 1080
    members[first] = [record, landmarks, npy_bytes(matrices)]
    valid = samples.sample(each, members, generator(0, 0))["target_valid"][0]
    border = (10 + 10 * frame) // 2  # of 64 pixels, where the dataset has 128
    expected = torch.ones(64, 64)
    expected[:, :border] = expected[50:] = 0
    assert torch.equal(valid, expected.flip(1) if flip else expected)


def test_the_person_moves_with_the_target(dataset: str) -> None:
    moving = AugmentConfig(max_photometric=0, scale=0.0, shift=0.2, probability=1.0)
    still, moved = (
        next(train(replace(PLAIN, augment=chosen), dataset)) for chosen in (NO_AUGMENT, moving)
    )
    for number in range(len(still)):
        x, y = (moved.landmarks[number] - still.landmarks[number])[0].round().int().tolist()
        there = torch.roll(still.target_foreground[number], (y, x), dims=(1, 2))
        inner = slice(14, -14)
        assert torch.equal(there[:, inner, inner], moved.target_foreground[number][:, inner, inner])
    assert not torch.equal(still.target_foreground, moved.target_foreground)


def test_the_recipe_is_latent_pose_reenactments() -> None:
    config = AlignerSamplesConfig()
    assert (config.min_sources, config.max_sources, config.pairing) == (1, 8, "video")
    assert (config.output_size, config.encoder_size, config.flip) == (512, 256, 0.5)
    strengths = config.augment
    assert (strengths.max_photometric, strengths.scale, strengths.shift) == (5, 0.2, 0.05)
    assert strengths.probability == 0.5


def test_both_driving_views_are_changed_alike_and_the_target_is_not(
    dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operation, whose strength is drawn: window and face get the same one."""

    def darken(x: Tensor, rng: np.random.Generator) -> Tensor:
        return x * float(rng.uniform(0.2, 0.8))

    monkeypatch.setattr(augment, "OPERATIONS", (darken,))
    loud = AugmentConfig(max_photometric=1, scale=0.0, shift=0.0)
    plain, made = (next(train(replace(PLAIN, augment=a), dataset)) for a in (NO_AUGMENT, loud))
    assert torch.equal(plain.target, made.target)
    assert torch.equal(plain.sources, made.sources)
    factors = []
    for number in range(len(made)):
        views = ("driving", "driving_face")
        window, face = (
            float(((getattr(made, v)[number] + 1) / (getattr(plain, v)[number] + 1 + 1e-6)).median())
            for v in views
        )  # fmt: skip
        assert window == pytest.approx(face, abs=1e-3)
        factors.append(round(window, 4))
    changed = [factor for factor in factors if factor < 0.81]
    assert 0 < len(changed) < len(factors)
    assert len(set(changed)) == len(changed)


def test_masks_are_those_of_frame_and_labels(dataset: str, tmp_path: Path) -> None:
    batch = next(train(PLAIN, dataset))
    assert set(batch.target_foreground.unique().tolist()) == {0.0, 1.0}
    labels = cv2.imdecode(np.frombuffer(face_labels(128), np.uint8), cv2.IMREAD_UNCHANGED)
    assert set(np.unique(labels)) == {0, 1, 17}, "hair is a person's, too"
    expected = torch.from_numpy(labels[1::2, 1::2] != 0).float()
    assert all(torch.equal(found[0], expected) for found in batch.target_foreground)
    assert batch.target_valid.min() == 1, "the drawn windows lie inside their frames"
    made = [
        (video, [member for member in members if not member[0].endswith(".png")])
        for video, members in people()
    ]
    make_dataset(str(tmp_path), made)
    plain = next(train(PLAIN, str(tmp_path)))
    assert plain.target_foreground.min() == 1
    assert torch.equal(plain.target, batch.target)


def test_only_wanted_members_are_read(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sources and a target of one video: three pictures, one label map, and the small members of their tracks."""
    samples = AlignerSamples(PLAIN, dataset, "train")
    real, reads = os.pread, []

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    samples.batch([(3, 2)])
    each = draw(samples.reader, PLAIN, generator(0, 3), 2)
    tracks = {track for track, _ in (*each.sources, each.target)}
    assert len(reads) == 3 + 1 + len(tracks)
    rows = shards.read_index(dataset).to_pylist()
    whole = sum(
        sum(row["sizes"]) for row in rows if row["key"] in {samples.reader.keys[t] for t in tracks}
    )
    assert sum(reads) < 0.75 * whole


# --- what is wrong is said in one line --------------------------------------------------------------------------


def test_more_sources_than_a_video_has_frames(dataset: str) -> None:
    with pytest.raises(DatasetError) as caught:
        train(replace(TINY, max_sources=4), dataset)
    message = str(caught.value)
    assert "4 sources and a target are 5 frames, but 1 of 7 videos have fewer" in message
    assert "(cleo-v0 has 4); at most 3 sources are possible" in message
    train(replace(TINY, max_sources=5, pairing="identity"), dataset)
    with pytest.raises(
        DatasetError, match=r"1 of 3 identities have fewer \(anna has 6\); at most 5"
    ):
        train(replace(TINY, max_sources=6, pairing="identity"), dataset)


def test_windows_are_never_enlarged(dataset: str) -> None:
    with pytest.raises(DatasetError, match=r"windows are 128 px, too small .* 256"):
        train(replace(TINY, output_size=256), dataset)


def test_batches_are_shared_equally(dataset: str) -> None:
    with pytest.raises(ValueError, match="batch_size 6 cannot be divided among 4 workers"):
        train(TINY, dataset, 0, 0, 4)
    assert [list(Share(6, rank, 3).of(12)) for rank in range(3)] == [[12, 13], [14, 15], [16, 17]]


def test_everything_is_checked_before_workers_start(dataset: str, tmp_path: Path) -> None:
    check(TINY, AlignerHeldOutConfig(sources=3), dataset, 2)
    with pytest.raises(DatasetError, match=r"no split 'val'; it has test, train .--held-out.split"):
        check(TINY, AlignerHeldOutConfig(split="val"), dataset, 2)
    with pytest.raises(DatasetError, match=r"2 of 2 videos have fewer .*--held-out"):
        check(TINY, AlignerHeldOutConfig(sources=6), dataset, 2)
    with pytest.raises(ValueError, match="cannot be divided among 4"):
        check(TINY, AlignerHeldOutConfig(), dataset, 4)
    with pytest.raises(DatasetError, match="not a \\(finished\\) dataset"):
        check(TINY, AlignerHeldOutConfig(), str(tmp_path), 1)


def broken_copy(dataset: str, folder: Path) -> str:
    """A dataset whose pictures are all spoilt, with the sizes they had."""
    for path in Path(dataset).rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(dataset)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            target.write_bytes(content.replace(b"\xff\xd8\xff", b"\x00\x00\x00"))
    return str(folder)


@pytest.mark.parametrize("loaders", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_spoilt_picture_is_one_line(dataset: str, tmp_path: Path, loaders: int) -> None:
    spoilt = broken_copy(dataset, tmp_path / "spoilt")
    with pytest.raises(DatasetError) as caught:
        next(train(replace(TINY, loaders=loaders), spoilt))
    assert "\n" not in str(caught.value)
    assert "not a JPEG of 128 x 128 pixels" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"min_sources": 4}, "min_sources must be 1 to max_sources, got 4 and 3"),
        ({"output_size": 48}, "multiple of encoder_size, got 48 and 32"),
        ({"flip": 1.5}, "flip must be 0 to 1, got 1.5"),
        ({"loaders": -1}, "at least 0 and prefetch 1, got -1"),
        ({"seed": -1}, "seed must be 0 to 4294967295, got -1"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY, **changes)


def test_configurations_can_be_written_down() -> None:
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(AlignerSamplesConfig())))["augment"]["max_photometric"] == 5
