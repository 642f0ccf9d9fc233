"""A swap end to end with toy bundles: clock, size and sound stay, every other pixel too, and what cannot be used is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import data

from pipelines import smoothing, swap_cluster
from pipelines.follower import FOUND, FollowConfig, Followed, Follower, follow_video
from pipelines.geometry import heser_window
from pipelines.output import ConfigError, NothingUsableError
from pipelines.sources import read_sources
from pipelines.swap import (
    Loaded,
    Plan,
    SwapConfig,
    check_outputs,
    load,
    load_pair,
    make_plan,
    preview_frames,
    shot_indices,
    steady,
    swap,
    swap_frames,
)
from pipelines.video import Codec, Decoder, VideoInfo, encode_part, frame_times, join, probe
from tests import clips
from tests.faces import FACE_68
from tests.material import SHARED, needs_shared
from tests.pipelines.test_repaint import CLIPS, beyond_reach
from tests.runs import run_job
from tests.swaps import SIZE, toy_bundles

BLANK = range(6, 8)
FRAMES = 16


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return toy_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def portrait(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "portrait.png"
    cv2.imwrite(str(path), np.ascontiguousarray(data.astronaut()[:300, :, ::-1]))
    return str(path)


def moving_face(count: int) -> Iterator[NDArray[np.uint8]]:
    """The astronaut walking and nodding; no face in the frames of ``BLANK``."""
    matrices = [[[0.9, -0.01 * i, 20 + 2 * i], [0.01 * i, 0.9, 10 + i]] for i in range(count)]
    for index, picture in enumerate(clips.moving(data.astronaut(), matrices, (480, 360))):
        yield np.full_like(picture, 96) if index in BLANK else picture


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames at 23.976 a second, with sound."""
    path = tmp_path_factory.mktemp("target") / "clip.mp4"
    return clips.encode(path, moving_face(FRAMES), fps=clips.FILM, audio_seconds=1.0)


def settings(bundles: tuple[str, str], source: str, *target: object, output: object, **rest: Any):  # type: ignore[no-untyped-def]
    return SwapConfig(
        aligner=bundles[0],
        blender=bundles[1],
        source=(source,),
        target=tuple(str(each) for each in target),
        output=str(output),
        **rest,
    )


@pytest.fixture(scope="module")
def lossless(
    bundles: tuple[str, str], portrait: str, clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> SwapConfig:
    """A swap that loses nothing, with its preview."""
    output = tmp_path_factory.mktemp("swapped") / "swapped.mkv"
    config = settings(bundles, portrait, clip, output=output, codec="ffv1", preview=True)
    (made,) = swap(config)
    assert (made.frames, made.copied, made.causes) == (FRAMES, len(BLANK), {"no face": len(BLANK)})
    return config


@pytest.fixture(scope="module")
def plan(lossless: SwapConfig, clip: Path) -> Plan:
    return make_plan(lossless, clip, SIZE, str(clip))


@pytest.fixture(scope="module")
def loaded(lossless: SwapConfig) -> Loaded:
    return load(lossless)


def pictures(path: object) -> list[NDArray[np.uint8]]:
    """Every frame as the house decodes it."""
    info = probe(str(path))
    every = range(info.frames)
    with Decoder() as decoder:
        read = decoder.read(str(path), info, ranges=[(0, info.frames)], images=every)
        return [frame.image for frame in read if frame.image is not None]


def samples(path: object) -> NDArray[np.floating]:
    """(n, channels) of the sound."""
    with av.open(str(path)) as container:
        parts = []
        for frame in container.decode(audio=0):
            values = frame.to_ndarray()
            count = len(frame.layout.channels)
            parts.append(values.reshape(-1, count) if frame.format.is_packed else values.T)
        return np.concatenate(parts)


@pytest.mark.slow
def test_clock_size_sound_and_every_other_pixel_stay(
    lossless: SwapConfig, clip: Path, plan: Plan, loaded: Loaded
) -> None:
    before, after = probe(clip), probe(lossless.output)
    assert (after.width, after.height, after.frames) == (before.width, before.height, FRAMES)
    assert after.fps == pytest.approx(before.fps, rel=1e-3)
    assert np.allclose(frame_times(lossless.output), frame_times(clip), atol=5.1e-4)  # Matroska: ms
    assert np.array_equal(samples(lossless.output), samples(clip))
    own, shown = pictures(clip), pictures(lossless.output)
    changed = 0
    for swapped in swap_frames(loaded.swapper, plan, clip, range(FRAMES)):
        index = swapped.shot.index
        assert np.array_equal(shown[index], swapped.image)
        if index in BLANK:
            assert np.array_equal(shown[index], own[index])
            continue
        outside = beyond_reach(swapped)
        assert 0.2 < outside.mean() < 1
        assert np.array_equal(shown[index][outside], own[index][outside])
        changed += int(not np.array_equal(shown[index], own[index]))
    assert changed == FRAMES - len(BLANK)


@pytest.mark.slow
def test_the_log_tells_of_every_frame_and_of_where_it_comes_from(
    lossless: SwapConfig, clip: Path
) -> None:
    log = json.loads(Path(f"{lossless.output}.json").read_text())
    states = [frame["state"] for frame in log["per_frame"]]
    assert [i for i, state in enumerate(states) if state == "copied"] == list(BLANK)
    assert {frame.get("cause") for frame in log["per_frame"]} == {None, "no face"}
    assert [frame["time"] for frame in log["per_frame"]] == pytest.approx(frame_times(clip))
    assert log["provenance"]["synthetic"] is True
    assert log["provenance"]["bundles"]["aligner"]["dataset"] == {"version": 1}
    with av.open(lossless.output) as container:
        told = {name.lower(): value for name, value in container.metadata.items()}
    shas = [log["provenance"]["bundles"][role]["sha256"] for role in ("aligner", "blender")]
    assert told["synthetic_media"] == "true"
    assert told["comment"].startswith("Synthetic media")
    assert [told["bundle_aligner_sha256"], told["bundle_blender_sha256"]] == shas
    assert set(log["step_seconds"]) >= {"follow", "align", "parse", "blend", "paste", "encode"}


@pytest.mark.slow
def test_the_preview_is_a_grid_and_a_short_video(lossless: SwapConfig) -> None:
    sheet = cv2.imread(f"{lossless.output}.preview.png")
    assert sheet.shape == (24 + 6 * 256, 4 * 256, 3)
    info = probe(f"{lossless.output}.preview.mp4")
    assert (info.width, info.height, info.frames) == (1024, 280, FRAMES - len(BLANK))


@pytest.mark.slow
def test_parts_do_not_show(lossless: SwapConfig, clip: Path, plan: Plan, loaded: Loaded) -> None:
    shown = pictures(lossless.output)
    for frames in (range(3, 9), range(9, 14)):
        found = list(swap_frames(loaded.swapper, plan, clip, frames))
        assert [each.shot.index for each in found] == list(frames)
        for each in found:
            assert np.array_equal(each.image, shown[each.shot.index])


@pytest.mark.slow
def test_a_variable_rate_is_kept_in_an_mp4_without_a_mark(
    bundles: tuple[str, str], portrait: str, tmp_path: Path
) -> None:
    times = [0.0, 0.04, 0.1, 0.3, 0.34, 0.5]
    path = tmp_path / "clip.webm"
    clips.encode(path, moving_face(6), times=times, codec="libvpx", audio_seconds=0.5)
    config = settings(bundles, portrait, path, output=tmp_path / "out.mp4", mark=False)
    swap(config)
    assert np.allclose(frame_times(config.output), times, atol=2e-3)
    with av.open(config.output) as container:
        assert "comment" not in container.metadata
        assert container.streams.audio[0].codec_context.name == "aac"
    assert json.loads(Path(f"{config.output}.json").read_text())["provenance"]["synthetic"] is True


@pytest.mark.slow
def test_odd_sides_stay_and_a_video_that_breaks_off_ends_there(
    bundles: tuple[str, str], portrait: str, tmp_path: Path
) -> None:
    frames = [picture[:359, :479] for picture in moving_face(8)]
    whole = clips.encode(tmp_path / "whole.ts", frames, options={"g": "2"}, pixel_format="yuv444p")
    content = whole.read_bytes()
    broken = tmp_path / "broken.ts"
    broken.write_bytes(content[: len(content) // 2])
    config = settings(bundles, portrait, broken, output=tmp_path / "out.mp4")
    (made,) = swap(config)
    info = probe(config.output)
    assert (info.width, info.height, info.frames) == (479, 359, made.frames)
    assert 0 < made.frames < 8


@pytest.mark.slow
def test_ray_workers_make_the_same_bytes(
    bundles: tuple[str, str], portrait: str, clip: Path, tmp_path: Path
) -> None:
    other = clips.encode(tmp_path / "other.mp4", moving_face(6), fps=25)
    blank = clips.encode(tmp_path / "blank.mp4", [np.full((120, 160, 3), 90, np.uint8)] * 3)
    config = settings(
        bundles, portrait, clip, other, blank,
        output=tmp_path / "alone", preview=True, part_frames=6,
    )  # fmt: skip
    told: list[str] = []
    alone = swap(config, told.append)
    assert [each.frames for each in alone] == [FRAMES, 6]
    assert any("blank.mp4: no usable face" in line for line in told)
    code, text = run_job(
        "swap", f"--aligner={bundles[0]}", f"--blender={bundles[1]}", "--source", portrait,
        "--target", str(clip), str(other), str(blank), f"--output={tmp_path / 'ray'}",
        "--preview", "--workers=2", "--part-frames=6", folder=tmp_path, timeout=900,
    )  # fmt: skip
    assert code == 0, text
    assert "3 of 3 parts" in text
    assert "blank.mp4: no usable face" in text
    for each in alone:
        name = Path(each.output).name
        assert (tmp_path / "ray" / name).read_bytes() == Path(each.output).read_bytes()
        preview = f"{name}.preview.png"
        assert (tmp_path / "ray" / preview).read_bytes() == (
            tmp_path / "alone" / preview
        ).read_bytes()
    assert not list((tmp_path / "ray").glob("*.work"))


# --------------------------------------------------------------------------------------------- real clips


@needs_shared
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_sound_and_clock_of_real_clips_stay(codec: Codec, tmp_path: Path) -> None:
    """Of every clip with sound; of the pictures only as many as it takes."""
    suffix = ".mkv" if codec == "ffv1" else ".mp4"
    compared = 0
    for path in sorted((SHARED / "videos").glob("*.mp4")):
        info = probe(path)
        if not info.audio:
            continue
        times = frame_times(path)[:4].tolist()
        with Decoder() as decoder:
            read = decoder.read(path, info, ranges=[(0, 4)], images=range(4))
            shown = [frame.image for frame in read if frame.image is not None]
        files = [tmp_path / f"{path.stem}-{i}{suffix}" for i in range(2)]
        rate = Fraction(info.fps).limit_denominator(1001)
        for file, some in zip(files, (shown[:2], shown[2:]), strict=True):
            assert encode_part(file, some, rate, codec) == 2
        made = tmp_path / f"{path.stem}{suffix}"
        join(made, files, times, sound=path)
        assert np.array_equal(samples(made), samples(path)), path.name
        assert np.allclose(frame_times(made), times, atol=5.1e-4 if codec == "ffv1" else 2e-5)
        if codec == "ffv1":
            assert all(map(np.array_equal, pictures(made), shown))
        compared += 1
    assert compared >= 8


@cache
def follow_clip(name: str) -> Followed:
    """The face of a real clip, as a swap follows it."""
    path = SHARED / "videos" / f"{name}.mp4"
    return follow_video(FollowConfig(embedder="dlib"), path, name)


@needs_shared
@pytest.mark.real
@pytest.mark.slow
def test_a_real_head_on_a_real_person(bundles: tuple[str, str], tmp_path: Path) -> None:
    photos, target = SHARED / "photos", SHARED / "videos" / "m003_b.mp4"
    config = replace(
        settings(bundles, str(photos / "p01_a.jpg"), target, output=tmp_path / "out.mkv"),
        source=(str(photos / "p01_a.jpg"), str(photos / "p01_b.jpg")),
        codec="ffv1",
    )
    (made,) = swap(config)
    before, after = probe(target), probe(config.output)
    assert (made.frames, made.copied) == (63, 0)
    assert (after.width, after.height, after.frames) == (before.width, before.height, 63)
    assert after.fps == pytest.approx(before.fps)
    assert np.allclose(frame_times(config.output), frame_times(target), atol=5.1e-4)
    assert np.array_equal(samples(config.output), samples(target))
    seen = follow_clip("m003_b")
    matrices, landmarks = steady(seen, SIZE, config.stiffness)
    plan = Plan(
        info=before,
        times=seen.times,
        causes=seen.causes,
        matrices=matrices,
        landmarks=landmarks,
    )
    own, shown = read_some(target, (0, 30, 62)), read_some(config.output, (0, 30, 62))
    for swapped in swap_frames(load(config).swapper, plan, target, range(30, 31)):
        outside = beyond_reach(swapped)
        assert np.array_equal(shown[1], swapped.image)
        assert np.array_equal(shown[1][outside], own[1][outside])
    for first, second in zip(own, shown, strict=True):
        same = (first == second).all(axis=-1)
        assert 0.6 < same.mean() < 0.98


def read_some(path: object, indices: tuple[int, ...]) -> list[NDArray[np.uint8]]:
    info = probe(str(path))
    with Decoder() as decoder:
        read = decoder.read(str(path), info, ranges=[(0, info.frames)], images=indices)
        return [frame.image for frame in read if frame.image is not None]


# ---------------------------------------------------------------------------------------- steady windows


def trembling(count: int = 40) -> NDArray[np.float64]:
    """A face that walks evenly, and points that tremble (count, 68, 2)."""
    rng = np.random.default_rng(0)
    face = FACE_68 * 200 + 500
    walk = np.stack([np.add(face * (1 + 0.001 * t), [3.0 * t, t]) for t in range(count)])
    return walk + rng.normal(0, 0.8, walk.shape)


def followed(points: NDArray[np.float64], lost: tuple[int, ...] = ()) -> Followed:
    causes = ["no face" if i in lost else FOUND for i in range(len(points))]
    points = points.copy()
    points[list(lost)] = np.nan
    times = [i / 25 for i in range(len(points))]
    return Followed(points, times, causes, Fraction(25), False, len(points))


def test_steady_windows_do_not_flicker_and_do_not_lag() -> None:
    points = trembling()
    raw = np.stack([heser_window(each, 256) for each in points])
    matrices, landmarks = steady(followed(points), 256, smoothing.STIFFNESS)
    before = smoothing.bend(smoothing.window_parameters(raw, 256), range(40))
    after = smoothing.bend(smoothing.window_parameters(matrices, 256), range(40))
    assert (before / after > 3).all()
    quiet = np.stack([heser_window(each, 256) for each in trembling_free()])
    centres = smoothing.window_parameters(matrices, 256)[:, :2]
    assert np.abs(centres - smoothing.window_parameters(quiet, 256)[:, :2]).max() < 2
    assert np.isfinite(landmarks).all()


def trembling_free(count: int = 40) -> NDArray[np.float64]:
    face = FACE_68 * 200 + 500
    return np.stack([np.add(face * (1 + 0.001 * t), [3.0 * t, t]) for t in range(count)])


def test_nothing_is_smoothed_across_a_cut_or_a_gap() -> None:
    points = trembling()
    points[20:] += 700
    lost = (30, 31)
    matrices, _ = steady(followed(points, lost), 256, smoothing.STIFFNESS)
    assert np.isnan(matrices[list(lost)]).all()
    for span in (slice(0, 20), slice(20, 30), slice(32, 40)):
        alone, _ = steady(followed(points[span]), 256, smoothing.STIFFNESS)
        assert np.allclose(matrices[span], alone)
    found = np.delete(np.arange(40), lost)
    indices = shot_indices(points[found], found)
    assert [run.stop - run.start for run in smoothing.runs(indices)] == [20, 10, 8]


def check_flicker(name: str) -> None:
    """At least three times less bend of all four parameters, and windows that are where the face is."""
    seen = follow_clip(name)
    found = np.flatnonzero([cause == FOUND for cause in seen.causes])
    points = seen.landmarks[found]
    indices = shot_indices(points, found)
    raw = smoothing.window_parameters([heser_window(each, 512) for each in points], 512)
    matrices, _ = steady(seen, 512, smoothing.STIFFNESS)
    smooth = smoothing.window_parameters(matrices[found], 512)
    for run in smoothing.runs(indices):
        raw[run, 3], smooth[run, 3] = np.unwrap(raw[run, 3]), np.unwrap(smooth[run, 3])
    fall = smoothing.bend(raw, indices) / smoothing.bend(smooth, indices)
    strayed = 100 * np.hypot(*(smooth - raw)[:, :2].T) / np.exp(raw[:, 2])
    told = f"{name}: {fall.round(1)}, strays {np.percentile(strayed, 95):.2f} {strayed.max():.2f} %"
    assert (fall > 3).all(), told
    assert np.percentile(strayed, 95) < 2.2, told
    assert strayed.max() < 3.5, told


@needs_shared
@pytest.mark.real
@pytest.mark.parametrize("name", ["m003_b", "twofaces"])
def test_the_window_of_a_real_clip_does_not_flicker(name: str) -> None:
    check_flicker(name)


@needs_shared
@pytest.mark.soak
@pytest.mark.parametrize("name", CLIPS)
def test_no_window_of_any_real_clip_flickers(name: str) -> None:
    check_flicker(name)


# ------------------------------------------------------------------------------------------------ plans


def plan_of(causes: list[str]) -> Plan:
    info = probe_like(len(causes))
    shape = (len(causes),)
    return Plan(
        info=info,
        times=[i / 25 for i in range(len(causes))],
        causes=causes,
        matrices=np.zeros((*shape, 2, 3)),
        landmarks=np.zeros((*shape, 68, 2)),
        damage="gone",
    )


def probe_like(frames: int) -> VideoInfo:
    return VideoInfo(
        codec="h264", width=10, height=10, coded_width=10, coded_height=10, rotation=0,
        sample_aspect=1.0, start_seconds=0.0, duration=frames / 25, fps=25.0, frames=frames,
        pix_fmt="yuv420p", color_range="limited", color_matrix="bt709", color_transfer="bt709",
        interlaced=False, hdr=False, audio=False,
    )  # fmt: skip


def test_parts_cover_all_frames_once() -> None:
    parts = plan_of([FOUND] * 507).parts(250)
    assert [len(part) for part in parts] == [250, 250, 7]
    assert [index for part in parts for index in part] == list(range(507))


def test_the_preview_shows_frames_with_a_face() -> None:
    causes = ["no face"] * 30 + [FOUND] * 200 + ["no face"] * 30
    grid, run = preview_frames(plan_of(causes))
    assert len(grid) == 6
    assert len(run) == 75
    assert {*grid, *run} <= set(range(30, 230))
    assert preview_frames(plan_of(["no face", FOUND]))[0] == [1]


def test_a_plan_travels_as_a_file(tmp_path: Path) -> None:
    plan = plan_of([FOUND, "no face"])
    swap_cluster.write_plan(plan, str(tmp_path / "plan.npz"))
    found = swap_cluster.read_plan(str(tmp_path / "plan.npz"))
    assert (found.info, found.times, found.causes, found.damage) == (
        plan.info, plan.times, plan.causes, "gone",
    )  # fmt: skip
    assert np.array_equal(found.matrices, plan.matrices)


# ---------------------------------------------------------------------------------------- who is followed


@pytest.mark.slow
def test_another_person_after_a_cut_is_not_taken() -> None:
    """The astronaut, then only somebody else, then both: with an embedder the person stays the person."""
    face = data.astronaut()[:256, 96:352]
    stranger = cv2.resize(face[:, ::-1], (256, 256))
    follower = Follower(FollowConfig(embedder="dlib"), (620, 256))

    def frame(left: object, right: object) -> NDArray[np.uint8]:
        made = np.full((256, 620, 3), 96, np.uint8)
        for picture, x in ((left, 0), (right, 360)):
            if picture is not None:
                made[:, x : x + 256] = picture
        return made

    first, cause = follower.find(frame(face, None), 0.0)
    assert cause == FOUND
    assert first is not None
    follower._embedder = Never(follower._embedder, 360)  # type: ignore[assignment]
    assert follower.find(frame(None, stranger), 2.0) == (None, "not recognised")
    both, cause = follower.find(frame(face, cv2.resize(stranger, (256, 256))), 2.1)
    assert cause == FOUND
    assert both is not None
    assert both[:, 0].max() < 256


class Never:
    """An embedder for whom nobody beyond a column is the person: one portrait cannot be two people."""

    def __init__(self, embedder: Any, column: int) -> None:
        self.embedder, self.column = embedder, column
        self.same_person = embedder.same_person

    def embed(self, crops: Any, landmarks: NDArray[np.float64]) -> NDArray[np.float32]:
        vectors = self.embedder.embed(crops, landmarks)
        return np.where(landmarks[:, :1, 0] > self.column, 0, vectors)


# ------------------------------------------------------------------------------------- what cannot be used


@pytest.mark.slow
def test_inputs_that_cannot_be_used(
    bundles: tuple[str, str], portrait: str, clip: Path, tmp_path: Path
) -> None:
    blank, text, two = tmp_path / "blank.png", tmp_path / "text.mp4", tmp_path / "two.png"
    cv2.imwrite(str(blank), np.full((200, 300, 3), 128, np.uint8))
    text.write_text("no video\n" * 100)
    face = data.astronaut()[:256, 96:352, ::-1]
    cv2.imwrite(str(two), np.hstack([cv2.resize(face, (200, 200)), face[:200]]))
    silent = clips.encode(tmp_path / "silent.mp4", [np.full((120, 160, 3), 90, np.uint8)] * 3)
    cut = clips.truncate(clip, tmp_path / "cut.mp4", 0.3)
    larger = toy_bundles(tmp_path / "larger", 2 * SIZE)
    good = settings(bundles, portrait, clip, output=tmp_path / "out.mp4")
    cases: list[tuple[SwapConfig, type[Exception], str]] = [
        (replace(good, source=(str(blank),)), ConfigError, r"blank.png \(300 x 200\): no face"),
        (replace(good, source=(str(text),)), ConfigError, "neither a picture .* nor a video"),
        (replace(good, source=(str(tmp_path / "no.png"),)), ConfigError, r"no\.png: no such file"),
        (replace(good, source=()), ConfigError, "--source: name at least one picture"),
        (replace(good, source=(str(two),), source_face=2), ConfigError, "no face 2: it has 2"),
        (replace(good, target=(str(text),)), ConfigError, "text.mp4: video: unreadable"),
        (replace(good, target=(str(cut),)), ConfigError, "cut.mp4: video: unreadable"),
        (replace(good, target=(str(tmp_path / "no.mp4"),)), ConfigError, "no such file"),
        (replace(good, target=(str(silent),)), NothingUsableError, "no usable face in any of 3"),
        (replace(good, blender=larger[1]), ConfigError, "windows of 64 px, .* of 128 px"),
        (replace(good, blender=bundles[0]), ConfigError, "a bundle of Aligner, not of Blender"),
        (replace(good, aligner=str(tmp_path)), ConfigError, "no bundle there"),
    ]
    for config, kind, told in cases:
        with pytest.raises(kind, match=told) as caught:
            swap(config)
        assert len(str(caught.value).splitlines()) == 1
        assert not Path(config.output).exists()


@pytest.mark.slow
def test_which_of_several_faces(tmp_path: Path) -> None:
    face = data.astronaut()[:256, 96:352, ::-1]
    both = np.full((256, 480, 3), 96, np.uint8)
    both[:180, :180] = cv2.resize(face, (180, 180))
    both[:, 210:466] = face
    path = tmp_path / "two.png"
    cv2.imwrite(str(path), both)
    told: list[str] = []

    def centre(**rest: Any) -> float:
        (found,) = read_sources([str(path)], FollowConfig(), 128, say=told.append, **rest)
        return float(found.inside.mean(axis=0).argmax()) + float(found.window.mean())

    largest, left, right = centre(), centre(face=0), centre(face=1)
    assert largest == right != left
    assert len(told) == 1
    assert "2 faces; taken is the largest, number 1 from the left (--source-face)" in told[0]


@pytest.mark.slow
def test_a_source_may_be_a_video(clip: Path) -> None:
    found = read_sources([str(clip)], FollowConfig(), SIZE, frames=6)
    assert [each.name.rpartition("#")[2] for each in found] == ["1", "4", "9", "12", "14"]
    assert all(each.window.shape == (SIZE, SIZE, 3) for each in found)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"output": "out.avi"}, "must end in .mp4 or .mkv"),
        ({"output": "out.mp4", "codec": "ffv1"}, "goes into .mkv"),
        ({"output": "clip.mp4"}, "is also an input"),
        ({"target": ("a/clip.mp4", "b/clip.mp4"), "output": "folder"}, "two targets of one name"),
    ],
)
def test_outputs_that_cannot_be(change: dict[str, Any], told: str) -> None:
    config = settings(("a", "b"), "s.png", "clip.mp4", output="o.mp4")
    with pytest.raises(ConfigError, match=told):
        check_outputs(replace(config, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"crf": 60},
        {"stiffness": -1},
        {"target": ()},
        {"source_frames": 0},
        {"part_frames": 0},
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least|must be"):
        replace(settings(("a", "b"), "s.png", "clip.mp4", output="o.mp4"), **change)


def test_bundles_are_told_apart(bundles: tuple[str, str]) -> None:
    config = settings(bundles, "s.png", "clip.mp4", output="o.mp4")
    aligner, blender, told = load_pair(config)
    assert (aligner.config.size, blender.config.size) == (SIZE, SIZE)
    assert told["aligner"]["class"] == "aligner"
    assert told["aligner"]["sha256"] != told["blender"]["sha256"]


@pytest.mark.slow
def test_the_job_says_in_one_line_that_there_is_no_face(
    bundles: tuple[str, str], portrait: str, tmp_path: Path
) -> None:
    flags = [f"--aligner={bundles[0]}", f"--blender={bundles[1]}", "--source", portrait]
    silent = clips.encode(tmp_path / "silent.mp4", [np.full((120, 160, 3), 90, np.uint8)])
    output = f"--output={tmp_path / 'o.mp4'}"
    code, told = run_job("swap", *flags, "--target", str(silent), output, folder=tmp_path)
    assert code == 3, told
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("nothing usable:")
