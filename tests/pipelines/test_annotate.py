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
from models.frozen.weights import REGISTRY
from pipelines import report, shards
from pipelines.annotate import (
    AnnotateConfig,
    Annotator,
    add_pupils,
    annotate,
    decode_labels,
    describe,
    encode_labels,
    frame_mask,
    weight_names,
)
from pipelines.crops import encode
from pipelines.geometry import Floats, invert, square_matrix, transform, warp
from pipelines.reader import PUPILS, Piece, Reader
from pipelines.schema import (
    Cause,
    Member,
    Video,
    VideoRow,
    frame_member,
    from_row,
    npy_array,
    npy_bytes,
    reject_track,
    to_row,
)
from tests.datasets import CROP, made_video, make_dataset
from tests.eyes import drawn
from tests.faces import FACE_68
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


def test_the_frames_mask_leans_to_no_side():
    """Its rim may be a pixel too thick, but on all sides: its middle is that of the pixels whose centres show the frame."""
    draw = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), axis=-1)
    leans = []
    for side, angle in zip(draw.uniform(280, 400, 30), draw.uniform(-0.6, 0.6, 30), strict=True):
        matrix = square_matrix((100, 75), side, angle, 64)
        seen = transform(invert(matrix), grid)
        inside = ((seen >= 0) & (seen <= [200, 150])).all(axis=-1)
        leans.append(
            grid[frame_mask(matrix, (200, 150), 64)].mean(axis=0) - grid[inside].mean(axis=0)
        )
    assert np.abs(np.mean(leans, axis=0)).max() < 0.1


# -------------------------------------------------------------------------------------------------- the stage


def test_the_parser_is_told_which_part_of_a_window_is_no_picture():
    """Of a video wider than high, from a window that leaves it to the right."""
    video, members = cropped()
    video = replace(video, probe=video.probe | {"width": 300, "height": 100})
    size = CROP["size"]
    matrix = square_matrix((250, 50), 200, 0.0, size).astype(np.float32)
    members = [
        (name, npy_bytes(np.tile(matrix, (3, 1, 1))) if name.endswith("matrix.npy") else data)
        for name, data in members
    ]
    told = []

    class Listening:
        def parse(self, crops, _, inside):
            told.extend(inside)
            return [np.zeros(crop.shape[:2], np.uint8) for crop in crops]

    named, _ = annotate(video, members, Listening(), AnnotateConfig(parser="unet19"))
    (network,) = weight_names(AnnotateConfig(parser="unet19"))
    assert named.versions["parsing"] == f"unet19 {REGISTRY[network].sha256[:12]}"
    assert len(told) == 6
    for (
        mask
    ) in told:  # a half to the left of the picture's right edge, the middle half of the height
        assert mask.any(axis=0).mean() == pytest.approx(0.75, abs=0.05)
        assert mask.any(axis=1).mean() == pytest.approx(0.5, abs=0.05)


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


# -------------------------------------------------------------------------------------------------- pupils


def looking(gazes: list[float], indices: list[int]) -> tuple[Video, list[Member], Floats]:
    """A video of one track whose drawn eyes look from side to side, as the quality stage leaves it, and their pupils in the windows.

    The frame is four times as large as the window, which moves, and the eyes stand still in the frame but for their gaze.
    """
    video, _ = made_video("id01", "v0", tracks=1, frames=len(gazes))
    track = replace(video.tracks[0], indices=tuple(indices))
    key = video.track_key(track)
    members, landmarks, matrices, known = [], [], [], []
    for place, (gaze, index) in enumerate(zip(gazes, indices, strict=True)):
        image, points, pupils = drawn((gaze, 0.0), 160)
        matrix = np.array([[0.25, 0, -float(place)], [0, 0.25, 2.0 * place]])
        to_window = np.array([[1.0, 0, -float(place)], [0, 1.0, 2.0 * place]])
        window = warp(image, to_window, (160, 160))
        members.append((frame_member(key, index), encode(window, 95)))
        landmarks.append(transform(to_window, points))
        known.append(transform(to_window, pupils))
        matrices.append(matrix)
    arrays = {"landmarks": landmarks, "matrix": matrices}
    stored = [(f"{key}.{name}.npy", npy_bytes(np.float32(values))) for name, values in arrays.items()]  # fmt: skip
    return replace(video, tracks=(track,)), [*stored, *members], np.stack(known)


@pytest.fixture(scope="module")
def seeing(iris_weights: Path) -> dict[bool, Annotator]:
    """The stage with pupils and no parser, by whether it smooths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRAY_WEIGHTS", str(iris_weights))
        config = AnnotateConfig(parser="none", pupils="iris")
        return {smooth: Annotator(config, smooth=smooth) for smooth in (False, True)}


def test_pupils_come_with_the_windows(seeing: dict[bool, Annotator]) -> None:
    gazes = [0.12 * np.sin(i / 3) for i in range(12)]
    video, members, known = looking(gazes, [*range(12)])
    row = to_row(video, members)
    after, longer = from_row(seeing[False](row))
    name, content = longer[-1]
    assert longer[:-1] == members
    assert name == "id01-v0-000.pupils.npy"
    found = npy_array(content)
    assert (found.dtype, found.shape) == (np.float32, (12, 2, 2))
    assert np.abs(found - known).max() < 0.12 * np.hypot(*(FACE_68[39] - FACE_68[36])) * 0.42 * 160
    (track,) = after.tracks
    assert track.scores["pupils_seen"] == 1
    assert "pupil_jitter" in track.scores
    assert after.versions["pupils"] == f"iris {REGISTRY['iris'].sha256[:12]}"
    assert from_row(seeing[False](row))[1] == longer
    assert describe(seeing[False].config) == {"parser": "none", "pupils": "iris"}
    assert weight_names(seeing[False].config) == ("iris",)


def test_pupils_are_smoothed_in_the_frame(seeing: dict[bool, Annotator]) -> None:
    """Where windows move, what they show is still; and frames apart are left alone."""
    rng = np.random.default_rng(0)
    indices = [*range(8), 20, 30]
    video, members, _ = looking((rng.normal(size=10) * 0.08).tolist(), indices)
    raw, _ = from_row(seeing[False](to_row(video, members)))
    smooth, longer = from_row(seeing[True](to_row(video, members)))
    scores = smooth.tracks[0].scores
    assert scores["pupil_jitter_raw"] == raw.tracks[0].scores["pupil_jitter"]
    assert scores["pupil_jitter"] < scores["pupil_jitter_raw"] / 2
    content = dict(longer)
    matrices = npy_array(content["id01-v0-000.matrix.npy"])
    before = npy_array(dict(from_row(seeing[False](to_row(video, members)))[1])["id01-v0-000.pupils.npy"])  # fmt: skip
    after = npy_array(content["id01-v0-000.pupils.npy"])
    np.testing.assert_allclose(after[8:], before[8:], atol=1e-4)
    frame = [[transform(invert(m), p) for m, p in zip(matrices, path, strict=True)] for path in (before, after)]  # fmt: skip
    np.testing.assert_allclose(frame[1][4], np.mean(frame[0][3:6], axis=0), atol=1e-2)


def test_pupils_are_stored_before_the_frames(seeing: dict[bool, Annotator], tmp_path: Path) -> None:
    video, members = made_video("id01", "v0", tracks=2, frames=3)
    gone = reject_track(video.tracks[0], Cause.IDENTITY_DRIFT)
    left = [member for member in members if member[0].startswith("id01-v0-001.")]
    after, longer = add_pupils(replace(video, tracks=(gone, video.tracks[1])), left, seeing[False].finder, False)  # fmt: skip
    assert after.tracks[0] == gone
    assert [name for name, _ in longer[len(left) :]] == ["id01-v0-001.pupils.npy"]
    make_dataset(str(tmp_path), [add_pupils(video, members, seeing[False].finder, False)])
    reader = Reader(str(tmp_path), "train")
    assert reader.has_pupils
    (points,) = reader.read([Piece(1, PUPILS, PUPILS)])[0]
    expected = dict(add_pupils(video, members, seeing[False].finder, False)[1])
    assert points == expected[f"{reader.keys[1]}.pupils.npy"]
    (sample, *_) = shards.read_index(str(tmp_path)).to_pylist()
    thumbs = report.read_thumbs(str(tmp_path), sample)
    plain = {**sample, "members": [name.replace("pupils", "unknown") for name in sample["members"]]}
    without = report.read_thumbs(str(tmp_path), plain)
    assert all((one.image != other.image).any() for one, other in zip(thumbs, without, strict=True))
