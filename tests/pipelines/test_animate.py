"""A picture animated by a video: what is lost is held, what cannot be used is said, rate and sound stay."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import data

from models import bundle
from models.frozen import weights
from models.frozen.chips import fit_similarity
from pipelines.adaptation import adapt
from pipelines.animate import (
    SOURCE_ROOM,
    AnimateConfig,
    animate,
    clip_room,
    faces,
    fit,
    generate,
    held,
    load_model,
    read_landmarks,
    read_source,
    remarks,
    with_gaze,
    with_points,
)
from pipelines.follower import FOUND, Followed, Follower, follow_video, read_picture
from pipelines.geometry import fomm_window, landmark_boxes, transform
from pipelines.output import ConfigError, NothingUsableError
from pipelines.smoothing import jitter
from pipelines.storage import PlaceError
from pipelines.video import frame_times, probe
from tests import clips
from tests.faces import FACE_68
from tests.material import SHARED, needs_shared
from tests.models.motion.tiny import awake, tiny
from tests.runs import run_job

SIZE = 32
BLANK = range(8, 12)
FRAMES = 24
COUNT = 30


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of a tiny model whose every part does something."""
    folder = tmp_path_factory.mktemp("bundle") / "motion"
    bundle.save(awake(tiny()).eval(), str(folder), {}, np.zeros((4, 4, 3), np.uint8))
    return str(folder)


@pytest.fixture(scope="module")
def portrait(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The astronaut, in a picture that is not square."""
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
    path = tmp_path_factory.mktemp("driving") / "clip.mp4"
    return clips.encode(path, moving_face(FRAMES), fps=clips.FILM, audio_seconds=1.0)


def settings(
    tmp_path: Path, motion: str, source: str, driving: object, **rest: Any
) -> AnimateConfig:
    """Without pupils unless ``rest`` says so: nothing is looked for on the network."""
    output, rest = str(tmp_path / "animated.mp4"), {"pupils": "none"} | rest
    return AnimateConfig(motion=motion, source=source, driving=str(driving), output=output, **rest)


def walking(count: int = COUNT, points: int = 68) -> NDArray[np.float64]:
    """Landmarks (count, points, 2) of a face that walks, pixels of some large frame."""
    face = with_points(FACE_68 * 200 + 500, points)
    return np.stack([np.add(face, [3.0 * t, t]) for t in range(count)])


def streams(path: str) -> dict[str, tuple[str, float]]:
    """Kind → (codec, seconds)."""
    with av.open(path) as container:
        return {
            stream.type: (stream.codec_context.name, float(stream.duration * stream.time_base))
            for stream in container.streams
        }


def pictures(path: str) -> list[NDArray[np.uint8]]:
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.slow
def test_a_video_with_lost_frames_and_sound(
    tmp_path: Path, motion: str, portrait: str, clip: Path
) -> None:
    config = settings(tmp_path, motion, portrait, clip, batch=5, crf=1)
    made = animate(config)
    assert (made.frames, made.held) == (FRAMES, len(BLANK))
    assert made.causes == {"no face": len(BLANK)}
    assert np.allclose(frame_times(config.output), frame_times(clip), atol=2e-5)
    info = probe(config.output)
    assert (info.width, info.height, info.frames) == (SIZE, SIZE, FRAMES)
    assert info.fps == pytest.approx(float(clips.FILM), rel=1e-3)
    assert streams(config.output)["audio"] == (
        "aac",
        pytest.approx(streams(str(clip))["audio"][1], abs=0.03),
    )
    log = json.loads(Path(f"{config.output}.json").read_text())
    states = [frame["state"] for frame in log["per_frame"]]
    assert [i for i, state in enumerate(states) if state == "held"] == list(BLANK)
    assert {frame["cause"] for frame in log["per_frame"] if "cause" in frame} == {"no face"}
    assert [frame["time"] for frame in log["per_frame"]] == pytest.approx(frame_times(clip))
    shown = pictures(config.output)
    stills = [np.abs(shown[i].astype(int) - shown[BLANK[0] - 1]).mean() for i in BLANK]
    moves = np.abs(shown[BLANK[-1] + 3].astype(int) - shown[BLANK[0] - 1]).mean()
    assert max(stills) < 1
    assert moves > max(stills)


@pytest.mark.slow
def test_a_variable_rate_is_kept_and_other_sound_becomes_aac(
    tmp_path: Path, motion: str, portrait: str
) -> None:
    times = [0.0, 0.04, 0.1, 0.3, 0.34, 0.5]
    path = tmp_path / "clip.webm"
    clips.encode(path, moving_face(6), times=times, codec="libvpx", audio_seconds=0.5)
    config = settings(tmp_path, motion, portrait, path)
    animate(config)
    assert np.allclose(frame_times(config.output), times, atol=2e-3)
    codec, seconds = streams(config.output)["audio"]
    assert codec == "aac"
    assert seconds == pytest.approx(0.5, abs=0.06)


@pytest.mark.slow
def test_a_video_that_breaks_off_is_used_up_to_there(
    tmp_path: Path, motion: str, portrait: str
) -> None:
    whole = clips.encode(
        tmp_path / "whole.mp4",
        moving_face(8),
        options={"g": "1"},
        container_options={"movflags": "faststart"},
    )
    content = whole.read_bytes()
    broken = tmp_path / "broken.mp4"
    half = len(content) // 2
    broken.write_bytes(content[:half] + bytes(255 for _ in content[half:]))
    config = settings(tmp_path, motion, portrait, broken)
    made = animate(config)
    assert made.frames == 8
    assert 0 < made.held < 8
    assert made.causes == {"video breaks off": made.held}
    per_frame = json.loads(Path(f"{config.output}.json").read_text())["per_frame"]
    states = [frame["state"] for frame in per_frame]
    assert states == ["driven"] * (8 - made.held) + ["held"] * made.held


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video(tmp_path: Path, portrait: str) -> None:
    larger = str(tmp_path / "larger")
    bundle.save(tiny(size=256, patch=64).eval(), larger, {}, np.zeros((4, 4, 3), np.uint8))

    def peak(count: int) -> int:
        driving = tmp_path / "long.npy"
        np.save(driving, walking(count).astype(np.float32))
        animate(settings(tmp_path, larger, portrait, driving, batch=2))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB

    short = peak(60)
    assert peak(460) - short < 30_000  # 400 more pictures are 79 MB


def test_landmarks_alone_drive_with_the_rate_that_is_given(
    tmp_path: Path, motion: str, portrait: str
) -> None:
    points = walking()
    points[:2] = np.nan
    points[7, 30] = np.inf
    driving = tmp_path / "points.npy"
    np.save(driving, points)
    config = settings(tmp_path, motion, portrait, driving, fps=30.0, batch=4)
    said: list[str] = []
    made = animate(config, said.append)
    assert said == [
        "--pupils none: eyes look straight ahead, unless --driving is a .npy with pupils"
    ]
    assert (made.frames, made.held) == (COUNT, 3)
    assert made.seconds == pytest.approx(1.0)
    assert probe(config.output).fps == pytest.approx(30)
    assert set(streams(config.output)) == {"video"}
    log = json.loads(Path(f"{config.output}.json").read_text())
    held_frames = [frame["index"] for frame in log["per_frame"] if frame["state"] == "held"]
    assert held_frames == [0, 1, 7]
    used = log[
        "config"
    ]  # what nobody asked for otherwise keeps the source's shape and takes no tremble
    assert (used["mode"], used["pose"], used["smooth"]) == ("canonical", "relative", True)


def test_generated_frames_are_the_models(motion: str, portrait: str, tmp_path: Path) -> None:
    import torch

    config = settings(tmp_path, motion, portrait, "none", batch=3)
    model = load_model(motion)
    window, source = read_source(config, SIZE)
    driving = with_points(np.stack([np.add(source, [t, 0.5 * t]) for t in range(4)]), 70)
    found = np.stack(list(generate(model, window, source, driving, config)))
    assert found.shape == (4, SIZE, SIZE, 3)
    picture = torch.from_numpy(window).permute(2, 0, 1)[None] / 127.5 - 1
    points = torch.from_numpy(driving).float() * 2 / SIZE - 1
    own = torch.from_numpy(with_points(source, 70)).float()[None] * 2 / SIZE - 1
    with torch.no_grad():
        whole, _ = model(picture.expand(4, -1, -1, -1), own.expand(4, -1, -1), points)
    expected = ((whole + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.slow
def test_the_source_window_is_square_and_not_squashed(portrait: str, tmp_path: Path) -> None:
    picture = read_picture(portrait)
    assert picture.shape == (300, 512, 3)
    assert np.array_equal(picture, data.astronaut()[:300])
    config = settings(tmp_path, "none", portrait, "none")
    window, points = read_source(config, 128)
    assert window.shape == (128, 128, 3)
    found, cause = Follower(faces(config), (512, 300)).find(picture)
    assert cause == FOUND
    assert found is not None
    scale = np.ptp(points, axis=0) / np.ptp(found, axis=0)
    assert scale[0] == pytest.approx(scale[1])
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    assert (np.abs(centre - 64) < 20).all()
    # the points' extent in the windows of 14 real clips: 0.43 to 0.58, and 0.6 in a window of one frame
    assert 0.45 < np.sqrt(np.prod(np.ptp(points, axis=0))) / 128 < 0.56


@pytest.mark.slow
def test_a_follower_stays_with_its_face(tmp_path: Path) -> None:
    config = settings(tmp_path, "none", "none", "none")
    face = data.astronaut()[:256, 96:352]
    small = cv2.resize(face, (160, 160), interpolation=cv2.INTER_AREA)
    both = np.full((256, 620, 3), 96, np.uint8)
    both[:, :256] = face
    both[:160, 400:560] = small
    alone = both.copy()
    alone[:, :256] = 96
    follower = Follower(faces(config), (620, 256))
    first, cause = follower.find(both, 0.0)
    assert cause == FOUND
    assert first is not None
    assert first[:, 0].max() < 256
    assert follower.find(alone, 0.5) == (None, "another face")
    later, cause = follower.find(alone, 2.0)
    assert cause == FOUND
    assert later is not None
    assert later[:, 0].min() > 400
    assert follower.find(np.full_like(both, 96), 2.1) == (None, "no face")


@pytest.mark.slow
def test_a_still_face_drives_without_a_tremble(tmp_path: Path) -> None:
    """One picture with new noise in every frame: the detector's points jump about, those that drive move a third at most."""
    rng = np.random.default_rng(0)
    face = data.astronaut()[:300, 60:420].astype(float)
    noisy = [(face + rng.normal(0, 6, face.shape)).clip(0, 255).astype(np.uint8) for _ in range(16)]
    path = clips.encode(tmp_path / "still.mp4", noisy, options={"crf": "12"})
    config = settings(tmp_path, "none", "none", path)
    steady, raw = (
        follow_video(faces(replace(config, smooth=smooth)), path, "--driving")
        for smooth in (True, False)
    )
    assert steady.causes == raw.causes == [FOUND] * 16
    before, after = (jitter(drive.landmarks, range(16)) for drive in (raw, steady))
    assert 0 < after < before / 3
    assert np.abs(steady.landmarks.mean(axis=0) - raw.landmarks.mean(axis=0)).max() < 2


@pytest.mark.parametrize("sway", [0.0, 60.0])
def test_a_driver_is_as_large_in_its_window_as_the_source_in_its_own(sway: float) -> None:
    """A head that is still, and one that sways further than a source's window has room for."""
    still = FACE_68 * 60 + 200
    points = np.stack([np.add(still, [sway * np.sin(t), 0]) for t in np.linspace(0, 6, 40)])
    drive = Followed(points, list(np.arange(40) / 25), [FOUND] * 40, Fraction(25), False, 40)
    window = fomm_window(landmark_boxes(still)[None], 256, SOURCE_ROOM)
    source = transform(window, still)
    config = AnimateConfig(motion="", source="", driving="", output="", mode="absolute")
    driving = fit(drive, source, config, 256, 68)
    room = clip_room(landmark_boxes(points), 256)
    wide = np.ptp(driving[0, :, 0]) / np.ptp(source[:, 0])
    assert wide == pytest.approx(min(1.0, SOURCE_ROOM / room), rel=1e-6)
    assert (room > SOURCE_ROOM) == (sway > 0)


def test_lost_frames_hold_the_last_picture_and_pull_no_other() -> None:
    pulled = []

    def source() -> Iterator[Any]:
        for index in range(3):
            pulled.append(index)
            yield index

    shown = held(["lost", FOUND, "lost", "lost", FOUND, FOUND], source())
    assert next(shown) == 0
    assert pulled == [0]
    assert [*shown] == [0, 0, 0, 1, 2]


def test_the_driver_is_seen_in_a_window_of_the_whole_clip(tmp_path: Path) -> None:
    points = walking(5)
    drive = Followed(
        points, [0.0] * 5, [FOUND, "no face", FOUND, FOUND, FOUND], Fraction(25), False, 5
    )
    source = FACE_68 * 60 + 128
    config = settings(tmp_path, "none", "none", "none", mode="absolute")
    driven = fit(drive, source, config, 256, 68)
    boxes = landmark_boxes(points[[0, 2, 3, 4]])
    assert 1 < clip_room(boxes, 256) < SOURCE_ROOM
    window = fomm_window(boxes, 256, SOURCE_ROOM / clip_room(boxes, 256))
    assert np.allclose(driven, transform(window, points[[0, 2, 3, 4]]))
    assert driven.min() > 0
    assert driven.max() < 256
    gaze = fit(drive, source, replace(config, mode="canonical"), 256, 70)
    expected = adapt(
        with_points(source, 70), with_points(transform(window, points[[0, 2, 3, 4]]), 70)
    )
    assert np.allclose(gaze, expected)


def test_with_more_or_fewer_points() -> None:
    ahead = with_points(FACE_68, 70)
    assert ahead.shape == (70, 2)
    assert np.array_equal(with_points(ahead, 68), FACE_68)
    assert np.array_equal(with_points(ahead, 70), ahead)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (np.zeros((3, 98, 2)), r"float64 of shape \(3, 98, 2\), not numbers of shape"),
        (np.zeros((68, 2)), r"shape \(68, 2\)"),
        (np.zeros((3, 68, 2), bool), "bool"),
        (np.array([{}]), "not a .npy of numbers"),
    ],
)
def test_landmarks_that_do_not_fit(tmp_path: Path, content: Any, told: str) -> None:
    path = tmp_path / "points.npy"
    np.save(path, content)
    with pytest.raises(ConfigError, match=told):
        read_landmarks(str(path), 25)


@pytest.mark.slow
def test_inputs_that_cannot_be_used(tmp_path: Path, motion: str, portrait: str) -> None:
    blank, text = tmp_path / "blank.png", tmp_path / "text.mp4"
    cv2.imwrite(str(blank), np.full((200, 300, 3), 128, np.uint8))
    text.write_text("no video\n" * 100)
    good = settings(tmp_path, motion, portrait, text)
    cases = [
        (good, r"--driving .*text.mp4: video: unreadable"),
        (replace(good, driving=str(tmp_path / "none.mp4")), "no such file"),
        (replace(good, source=str(blank)), r"--source .*blank.png \(300 x 200\): no face"),
        (replace(good, source=str(text)), "not a picture"),
        (replace(good, source=str(tmp_path / "none.png")), "FileNotFoundError"),
        (replace(good, driving=str(tmp_path)), "a folder, not a file"),
        (replace(good, motion=str(tmp_path)), "no bundle there"),
    ]
    for config, told in cases:
        with pytest.raises(ConfigError, match=told):
            animate(config)
        assert not Path(config.output).exists()


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    """Before anything is loaded: no bundle is there, and nobody asks."""
    own = tmp_path / "own.mp4"
    own.write_bytes(b"mine")
    (tmp_path / "folder.mp4").mkdir()
    good = settings(tmp_path, "none", "face.png", own)
    cases: list[tuple[str, type[Exception], str]] = [
        (str(own), ConfigError, "own.mp4: is also an input"),
        (str(tmp_path / "out.avi"), ConfigError, "out.avi: must end in .mp4"),
        (str(tmp_path / "folder.mp4"), PlaceError, "a folder; give the name of a file"),
        (str(own / "out.mp4"), PlaceError, "out.mp4: cannot be written"),
    ]
    for output, kind, told in cases:
        with pytest.raises(kind, match=told):
            animate(replace(good, output=output))
    assert own.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.mp4", "own.mp4"]


def test_pupils_that_move_nothing_are_told_of() -> None:
    with_gaze = Followed(walking(2, 70), [0.0, 0.1], [FOUND] * 2, Fraction(10), False, 2)
    assert remarks(with_gaze, 70) == []
    assert remarks(with_gaze, 68) == ["the model takes 68 points: the driver's pupils move nothing"]


@pytest.mark.slow
def test_a_driver_without_a_face(tmp_path: Path, motion: str, portrait: str) -> None:
    driving = tmp_path / "points.npy"
    np.save(driving, np.full((4, 68, 2), np.nan))
    with pytest.raises(
        NothingUsableError, match=r"any of 4 driving frames \(no landmarks given: 4"
    ):
        animate(settings(tmp_path, motion, portrait, driving))


def test_pupils_are_looked_for_where_the_model_takes_them(
    tmp_path: Path, iris_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    config = settings(tmp_path, "m", "s", "d", pupils="auto")
    monkeypatch.setenv("HEADRAY_WEIGHTS", str(iris_weights))
    assert with_gaze(config, 70, told.append).pupils == "iris"
    assert with_gaze(config, 68, told.append).pupils == "none"
    assert told == []
    with pytest.raises(ConfigError, match="the model takes 68 points"):
        with_gaze(replace(config, pupils="iris"), 68)
    assert with_gaze(replace(config, pupils="none"), 70, told.append).pupils == "none"
    monkeypatch.setenv("HEADRAY_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    nowhere = replace(weights.REGISTRY["iris"], url="http://127.0.0.1:9/iris_landmark.tflite")
    monkeypatch.setitem(weights.REGISTRY, "iris", nowhere)
    assert with_gaze(config, 70, told.append).pupils == "none"
    assert len(told) == 2
    assert all("eyes look straight ahead" in line for line in told)
    assert "iris_landmark.tflite is in none of" in told[1]
    with pytest.raises(weights.WeightsError, match="HEADRAY_WEIGHTS"):
        with_gaze(replace(config, pupils="iris"), 70)


@pytest.mark.slow
def test_the_gaze_of_source_and_driver_is_found(
    tmp_path: Path,
    motion: str,
    portrait: str,
    clip: Path,
    iris_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADRAY_WEIGHTS", str(iris_weights))
    config = settings(tmp_path, motion, portrait, clip, pupils="iris")
    _, source = read_source(config, 256)
    assert source.shape == (70, 2)
    short = clips.encode(tmp_path / "short.mp4", moving_face(2))
    for smooth, video, lost in ((False, short, 0), (True, clip, len(BLANK))):
        found = follow_video(faces(replace(config, smooth=smooth)), video, "clip")
        known = found.landmarks[[cause == FOUND for cause in found.causes]]
        assert known.shape[1:] == (70, 2)
        assert np.isfinite(known).all()
        assert len(found.causes) - len(known) == lost
        # one portrait: its pupils lie alike in source and driver
        for face in known:
            matrix = fit_similarity(source[:68], face[:68])
            off = transform(matrix, source[68:]) - face[68:]
            assert np.linalg.norm(off, axis=1).max() < 0.15 * np.hypot(*(face[39] - face[36]))
    told: list[str] = []
    made = animate(config, told.append)
    assert (made.frames, made.held) == (FRAMES, len(BLANK))
    assert told == []
    content = json.loads(Path(f"{config.output}.json").read_text())
    assert content["config"]["pupils"] == "iris"
    # a driver of 68 points has no gaze to follow, and it is said
    np.save(tmp_path / "points.npy", walking(3))
    animate(replace(config, driving=str(tmp_path / "points.npy")), told.append)
    assert told == ["the driver has 68 points: the pupils of the model's 70 look straight ahead"]


@pytest.mark.parametrize("change", [{"fps": 0.0}, {"batch": 0}, {"crf": 60}])
def test_settings_that_cannot_be(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        settings(tmp_path, "m", "s", "d", **change)


@pytest.mark.slow
def test_the_job_ends_with_the_codes_it_promises(
    tmp_path: Path, motion: str, portrait: str, clip: Path
) -> None:
    output = tmp_path / "out.mp4"
    flags = ["--motion", motion, "--source", portrait, "--output", str(output), "--pupils=none"]
    code, told = run_job("animate", *flags, "--driving", str(clip), folder=tmp_path)
    assert code == 0, told
    assert f"held: {len(BLANK)} frames, no face" in told
    assert probe(output).frames == FRAMES
    code, told = run_job("animate", *flags, "--driving", __file__, folder=tmp_path)
    assert code == 2, told
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("error: --driving")


@needs_shared
@pytest.mark.real
def test_a_real_person_drives_another(tmp_path: Path, motion: str) -> None:
    photo, driver = SHARED / "photos" / "p01_a.jpg", SHARED / "videos" / "m003_b.mp4"
    config = settings(tmp_path, motion, str(photo), driver)
    made = animate(config)
    assert (made.frames, made.held) == (63, 0)
    assert streams(config.output)["audio"][0] == "aac"
    assert np.allclose(frame_times(config.output), frame_times(driver), atol=2e-5)
