"""Labels of a video's windows: bytes, places, and what is left alone."""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.frozen.parsing import load_parser
from pipelines import shards
from pipelines.annotate import (
    AnnotateConfig,
    Annotator,
    annotate,
    decode_labels,
    describe,
    encode_labels,
    frame_mask,
)
from pipelines.geometry import square_matrix
from pipelines.schema import (
    Cause,
    Member,
    Video,
    VideoRow,
    from_row,
    reject_track,
    to_row,
)
from tests.datasets import CROP, made_video, make_dataset
from tests.material import SHARED, needs_shared

CONFIG = AnnotateConfig()


def cropped() -> tuple[Video, list[Member]]:
    """A video as the quality stage leaves it: two tracks, no labels."""
    video, members = made_video("id01", "v0", tracks=2, frames=3)
    return video, [member for member in members if not member[0].endswith(".png")]


@pytest.fixture(scope="module")
def parser():
    return load_parser("geometric")


# -------------------------------------------------------------------------------------------------- labels


@settings(deadline=None, max_examples=30)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 18))
)
def test_labels_survive_their_png(labels):
    png = encode_labels(labels)
    np.testing.assert_array_equal(decode_labels(png), labels)
    assert encode_labels(labels) == png
    assert png[25] == 0  # the header's colour type: grey, one channel


def test_what_is_not_labels_is_refused():
    for picture in (np.full((4, 4), 19, np.uint8), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="labels"):
            decode_labels(cv2.imencode(".png", picture)[1].tobytes())
    with pytest.raises(ValueError, match="0 bytes"):
        decode_labels(b"")


@settings(deadline=None, max_examples=20)
@given(st.floats(20, 200), st.floats(20, 200), st.floats(40, 400), st.floats(-0.6, 0.6))
def test_the_frames_mask_is_where_the_window_shows_it(x, y, side, angle):
    matrix = square_matrix((x, y), side, angle, 64)
    mask = frame_mask(matrix, (200, 150), 64)
    pixels = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), axis=-1)
    inverse = np.linalg.inv(matrix[:, :2])
    source = (pixels - matrix[:, 2]) @ inverse.T
    margin = 1.5 * side / 64
    clearly = ((source > margin) & (source < np.array([200, 150]) - margin)).all(axis=-1)
    outside = ((source < -margin) | (source > np.array([200, 150]) + margin)).any(axis=-1)
    assert mask[clearly].all()
    assert not mask[outside].any()


# -------------------------------------------------------------------------------------------------- the stage


def test_labels_follow_their_frames(parser):
    video, members = cropped()
    after, longer = annotate(video, members, parser, CONFIG)
    assert [member for member in longer if not member[0].endswith(".png")] == members
    names = [name for name, _ in longer]
    for name in (name for name in names if name.endswith(".jpg") and "snapshot" not in name):
        assert names[names.index(name) + 1] == name.replace(".jpg", ".png")
    size = CROP["size"]
    assert all(
        decode_labels(data).shape == (size, size) for name, data in longer if name.endswith("png")
    )
    assert after == replace(video, versions=video.versions | {"parsing": "geometric"})
    assert annotate(video, members, parser, CONFIG) == (after, longer)


def test_without_a_parser_there_are_no_labels():
    video, members = cropped()
    config = AnnotateConfig(parser="none")
    after, same = from_row(Annotator(config)(to_row(video, members)))
    assert same == members
    assert after == replace(video, seconds=after.seconds, stage_frames={"annotate": video.frames})
    assert describe(config) == {"parser": "none", "pupils": "none"}


def test_rejected_tracks_are_left_alone(parser):
    video, members = cropped()
    gone = reject_track(video.tracks[0], Cause.IDENTITY_DRIFT)
    left = [member for member in members if member[0].startswith("id01-v0-001.")]
    after, longer = annotate(replace(video, tracks=(gone, video.tracks[1])), left, parser, CONFIG)
    assert after.tracks[0] == gone
    assert {name.split(".")[0] for name, _ in longer} == {"id01-v0-001"}


def test_commits_and_shards_keep_labels_beside_their_frames(tmp_path: Path):
    video, members = made_video("id01", "v0", tracks=2, frames=3)
    shuffled = [members[i] for i in np.random.default_rng(0).permutation(len(members))]
    one = shards.commit(video, members, str(tmp_path / "a"), CROP)
    other = shards.commit(video, shuffled, str(tmp_path / "b"), CROP)
    assert one.tar_sha256 == other.tar_sha256
    make_dataset(str(tmp_path / "c"), [(video, shuffled)])
    for row in shards.read_index(str(tmp_path / "c")).to_pylist():
        frames = row["members"][5:]
        assert frames[::2] == sorted(frames[::2])
        assert [name.replace(".jpg", ".png") for name in frames[::2]] == frames[1::2]
        tar = (tmp_path / "c" / "shards" / row["shard"]).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            png = archive.extractfile(f"{row['key']}.{frames[1]}").read()
        offset, length = row["offsets"][6], row["sizes"][6]
        assert tar[offset : offset + length] == png
        assert decode_labels(png).any()


@pytest.mark.real
@needs_shared
def test_videos_side_by_side_are_labelled_as_alone_and_a_bad_one_fails_alone(monkeypatch):
    monkeypatch.setenv("HEADRAY_WEIGHTS", str(SHARED / "weights"))
    annotator = Annotator(AnnotateConfig(parser="unet19", videos_at_once=4))
    rows = []
    for number in range(5):
        video, members = made_video(f"id{number:02d}", "v0", tracks=1, frames=1 + number)
        if number == 2:
            members = [
                (name, b"no picture" if name.endswith(".jpg") else data) for name, data in members
            ]
        plain = [member for member in members if not member[0].endswith(".png")]
        rows.append(to_row(video, plain))

    def outcome(row: VideoRow) -> tuple[Video, list[Member]]:
        video, members = from_row(annotator(row))
        return replace(video, seconds={}), members

    expected = [outcome(row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(outcome, rows)) == expected
    assert [video.cause for video, _ in expected] == ["", "", Cause.CRASH.value, "", ""]
    assert all(sum(name.endswith(".png") for name, _ in members) for _, members in expected[3:])


def test_a_parser_that_runs_no_batches_has_nothing_to_share() -> None:
    with pytest.raises(ValueError, match="geometric shares nothing"):
        AnnotateConfig(videos_at_once=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        AnnotateConfig(videos_at_once=0)
