"""Labels and poses of a video's windows: bytes, places, medians, and what is left alone."""

from __future__ import annotations

import io
import tarfile
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
    POSE_COLUMNS,
    AnnotateConfig,
    Annotator,
    add_poses,
    annotate,
    decode_labels,
    describe,
    encode_labels,
    frame_mask,
    poses,
)
from pipelines.crops import SCORE_COLUMNS
from pipelines.geometry import square_matrix, transform
from pipelines.headpose import DISTANCE, HEAD, RIGID, head_pose
from pipelines.schema import (
    Cause,
    Member,
    Video,
    from_row,
    npy_array,
    npy_bytes,
    reject_track,
    to_row,
)
from tests.datasets import CROP, made_video, make_dataset

CONFIG = AnnotateConfig()


def cropped() -> tuple[Video, list[Member]]:
    """A video as the identities stage leaves it: two tracks, no labels, four score columns."""
    video, members = made_video("id01", "v0", tracks=2, frames=3)
    before = [
        (name, npy_bytes(npy_array(data)[:, : len(SCORE_COLUMNS)]) if ".scores." in name else data)
        for name, data in members
        if not name.endswith(".png")
    ]
    return video, before


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


# -------------------------------------------------------------------------------------------------- pose


def seen(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """68 points, those of the rigid head turned by known angles (nose to the picture's left, nose up, clockwise) and
    seen from its distance, 30 pixels a cm there."""
    about_x, about_y, about_z = (
        cv2.Rodrigues(np.radians(np.array(axis, dtype=float)))[0]
        for axis in ([-pitch, 0, 0], [0, yaw, 0], [0, 0, roll])
    )
    placed = (HEAD - HEAD.mean(axis=0)) @ (about_x @ about_y @ about_z).T + [0, 0, DISTANCE]
    points = np.zeros((68, 2))
    points[RIGID] = placed[:, :2] / placed[:, 2:] * DISTANCE * 30 + [700, 400]
    return points


@pytest.mark.parametrize("turn", [(0, 0, 0), (25, 0, 0), (0, 15, 0), (0, 0, -20), (-30, 10, 8)])
def test_known_turns_are_found(turn):
    np.testing.assert_allclose(head_pose(seen(*turn)), turn, atol=2)


def test_the_signs_are_what_one_sees():
    level = seen(0, 0, 0)
    nose = level[[31, 35]].mean(axis=0)
    assert seen(20, 0, 0)[[31, 35], 0].mean() < nose[0]
    assert seen(0, 20, 0)[[31, 35], 1].mean() < nose[1]
    assert seen(0, 0, 20)[[17, 26], 0].mean() > level[[17, 26], 0].mean()


def test_poses_are_the_heads_whatever_the_window():
    points = seen(20, 5, 10)
    windows = [square_matrix((700, 400), 900, angle, 512) for angle in (0.0, 0.4)]
    landmarks = np.stack([transform(window, points) for window in windows])
    found = poses(landmarks, np.stack(windows))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], head_pose(points), atol=1e-3)
    np.testing.assert_allclose(found[1], found[0], atol=1e-2)


# -------------------------------------------------------------------------------------------------- the stage


def test_labels_follow_their_frames_and_scores_grow(parser):
    video, members = cropped()
    after, longer = annotate(video, members, parser, CONFIG)
    assert [member for member in longer if not member[0].endswith((".png", ".scores.npy"))] == [
        member for member in members if not member[0].endswith(".scores.npy")
    ]
    names = [name for name, _ in longer]
    for name in (name for name in names if name.endswith(".jpg")):
        assert names[names.index(name) + 1] == name.replace(".jpg", ".png")
    content = dict(longer)
    size = CROP["size"]
    assert all(
        decode_labels(data).shape == (size, size) for name, data in longer if name.endswith("png")
    )
    for track in after.tracks:
        scores = npy_array(content[f"{after.track_key(track)}.scores.npy"])
        assert scores.shape == (3, len(SCORE_COLUMNS) + len(POSE_COLUMNS))
        for name, column in zip(POSE_COLUMNS, scores.T[len(SCORE_COLUMNS) :], strict=True):
            assert track.scores[name] == pytest.approx(np.median(column), abs=1e-3)
        assert track.scores["window_side"] == video.tracks[0].scores["window_side"]
    assert after.versions["parsing"] == "geometric"
    assert annotate(video, members, parser, CONFIG) == (after, longer)


def test_without_a_parser_there_are_poses_and_no_labels():
    video, members = cropped()
    config = AnnotateConfig(parser="none")
    row = Annotator(config)(to_row(video, members))
    after, longer = from_row(row)
    assert [name for name, _ in longer] == [name for name, _ in members]
    assert set(POSE_COLUMNS) < set(after.tracks[0].scores)
    assert "parsing" not in after.versions
    assert describe({"scores": ["a"]}, config) == {"scores": ["a", *POSE_COLUMNS], "parser": "none"}


def test_rejected_tracks_are_left_alone(parser):
    video, members = cropped()
    gone = reject_track(video.tracks[0], Cause.IDENTITY_DRIFT)
    left = [member for member in members if member[0].startswith("id01-v0-001.")]
    after, longer = annotate(
        Video(**{**vars(video), "tracks": (gone, video.tracks[1])}), left, parser, CONFIG
    )
    assert after.tracks[0] == gone
    assert {name.split(".")[0] for name, _ in longer} == {"id01-v0-001"}


def test_pose_columns_are_appended_to_what_is_there():
    video, members = cropped()
    content = dict(members)
    name = "id01-v0-000.scores.npy"
    before = npy_array(content[name])
    add_poses(video, video.tracks[0], content)
    np.testing.assert_array_equal(npy_array(content[name])[:, : len(SCORE_COLUMNS)], before)


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
