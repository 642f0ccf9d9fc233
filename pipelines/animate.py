"""One picture of a face and somebody's motion → a video of the face moving so.

Of the driving video only its landmarks, its clock and its sound are used: a kilobyte a frame. They are located twice and
smoothed, as those of the training clips are (:mod:`pipelines.smoothing`), or the picture trembles with the detector. Pictures
stream through generator and encoder, so memory hardly grows with the video. What depends on the source alone is computed
once (``Motion.prepare``), each frame costs the decoders (``Motion.drive``).

A frame whose face is lost shows the last one that was found, and the log says why; motion never stops the clock.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.frozen import weights
from models.frozen.detector import DetectorName
from models.frozen.landmarks import LandmarkerName
from models.motion.layout import with_pupils
from pipelines import storage, tracking
from pipelines.adaptation import Mode, Points, Pose, adapt
from pipelines.follower import (
    FOUND,
    SMALLEST_FACE,
    FollowConfig,
    Followed,
    Follower,
    counts,
    follow_video,
    read_picture,
)
from pipelines.geometry import (
    Floats,
    Image,
    fomm_window,
    landmark_boxes,
    transform,
    warp,
    window_side,
)
from pipelines.output import ConfigError, NothingUsableError
from pipelines.video import encode

if TYPE_CHECKING:
    from models.motion.network import Motion

SOURCE_ROOM = 1.18
"""Side of the source's window over that of a clip of one frame. A clip's window holds all places its head goes to, and a model
has seen no others: 1.18 is their median over 11 real clips, 1.10 to 1.40."""


@dataclass(frozen=True, kw_only=True)
class AnimateConfig:
    """What to animate, with what, and how."""

    motion: str
    """Bundle of a motion model: folder, URI, or models:/NAME@alias of the MLflow registry."""
    source: str
    """Picture with the face to animate. The largest face is taken; the picture need not be square."""
    driving: str
    """Video of the motion; or .npy with (n, 68 or 70, 2) landmarks in pixels, NaN where they are unknown."""
    output: str
    """mp4 to make. OUTPUT.json beside it tells of every frame."""
    fps: float = 25.0
    """Frames per second of a .npy; a video brings its own times."""
    mode: Mode = "canonical"
    """How the driver's landmarks become the source's: canonical keeps the source's shape; relative does, too, if both start
    in one pose; absolute takes the driver's shape, right if source and driver are one person."""
    pose: Pose = "relative"
    """Of canonical: the source's pose moved as the driver's moves, or the driver's pose."""
    detector: DetectorName = "dlib"
    """Finds faces."""
    landmarker: LandmarkerName = "dlib"
    """Finds their points."""
    pupils: Literal["auto", "iris", "none"] = "auto"
    """Of source and driver, for a model of 70 points: ``iris`` finds them, with ``none`` the gaze looks straight ahead, auto is iris
    where its weights are."""
    smooth: bool = True
    """Take the tremble out of a driving video's landmarks, leave blinks; the video is decoded twice."""
    batch: int = 8
    """Frames generated at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of convolutions."""
    crf: int = 18
    """Quality of x264; 18 is visually lossless, larger is smaller."""

    def __post_init__(self) -> None:
        if self.fps <= 0 or self.batch < 1 or not 0 <= self.crf <= 51:
            raise ValueError(
                f"fps {self.fps} must be > 0, batch {self.batch} >= 1, crf {self.crf} in 0..51"
            )


@dataclass(frozen=True, kw_only=True)
class Animated:
    """What was made."""

    frames: int
    held: int
    """Frames that show an earlier one."""
    seconds: float
    """Of the video."""
    took_seconds: float
    """Generating and encoding, landmarks not counted."""
    causes: dict[str, int]
    """Of held frames, with their numbers."""


# --------------------------------------------------------------------------------------------- faces in pictures


def faces(config: AnimateConfig) -> FollowConfig:
    """How this configuration finds faces."""
    return FollowConfig(
        detector=config.detector,
        landmarker=config.landmarker,
        pupils="iris" if config.pupils == "iris" else "none",
        smooth=config.smooth,
    )


def with_gaze(
    config: AnimateConfig, count: int, say: Callable[[str], None] = lambda _: None
) -> AnimateConfig:
    """The configuration with ``auto`` decided: iris or none, for a model of ``count`` points; says where no gaze is driven.

    Raises:
        ConfigError: iris for a model that takes no pupils.
        WeightsError: iris was asked for, and its weights are missing.
    """
    if count == 68:
        if config.pupils == "iris":
            raise ConfigError("--pupils iris: the model takes 68 points, none of them a pupil")
        return replace(config, pupils="none")
    if config.pupils == "none":
        say("--pupils none: eyes look straight ahead, unless --driving is a .npy with pupils")
        return config
    try:
        weights.find("iris")
    except weights.WeightsError as error:
        if config.pupils == "iris":
            raise
        say(f"eyes look straight ahead, unless --driving is a .npy with pupils: {error}")
        return replace(config, pupils="none")
    return replace(config, pupils="iris")


def read_source(config: AnimateConfig, size: int) -> tuple[Image, Floats]:
    """The window around the face of the source picture, and its points.

    The window is a square, as large about the face as the training clips' are; a picture of any shape is never squashed.

    Returns:
        (size, size, 3) RGB, black outside the picture; (68 or 70, 2) pixels of that window.

    Raises:
        ConfigError: no picture there, or no face in it.
    """
    picture = read_picture(config.source)
    height, width = picture.shape[:2]
    follower = Follower(faces(config), (width, height))
    points, cause = follower.find(picture)
    if points is None:
        raise ConfigError(
            f"--source {config.source} ({width} x {height}): {cause}; wanted is a picture of a face from the front,"
            f" at least {SMALLEST_FACE:.0%} of the picture's shorter side"
        )
    matrix = fomm_window(landmark_boxes(points)[None], size, SOURCE_ROOM)
    known = np.concatenate([points, follower.pupils(picture, points)])
    return warp(picture, matrix, (size, size)), transform(matrix, known)


# ------------------------------------------------------------------------------------------------- the driver


def read_landmarks(uri: str, fps: float) -> Followed:
    """A .npy of landmarks. Raises :class:`ConfigError` for another shape or content."""
    try:
        with storage.local_file(uri) as path:
            landmarks = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--driving {uri}: not a .npy of numbers ({error})") from error
    if (
        landmarks.ndim != 3
        or landmarks.shape[1:] not in ((68, 2), (70, 2))
        or landmarks.dtype.kind not in "fiu"
    ):
        raise ConfigError(
            f"--driving {uri}: {landmarks.dtype} of shape {landmarks.shape}, "
            "not numbers of shape (n, 68, 2) or (n, 70, 2)"
        )
    points = landmarks.astype(np.float64)
    known = np.isfinite(points).all(axis=(1, 2))
    rate = Fraction(fps).limit_denominator(1001)
    times = [float(index / rate) for index in range(len(points))]
    causes = [FOUND if good else "no landmarks given" for good in known]
    points[~known] = np.nan
    return Followed(points, times, causes, rate, sound=False, decoded=len(points))


def fit(drive: Followed, source: Floats, config: AnimateConfig, size: int, count: int) -> Points:
    """What drives the source: a set of points for every frame in which the driver's face was found.

    Args:
        drive: in pixels of the driving frames; at least one frame found.
        source: (68 or 70, 2) pixels of the source's window.
        config: mode and pose.
        size: side of the windows, pixels.
        count: points the model takes, 68 or 70. Unknown pupils look straight ahead.

    Returns:
        (m, count, 2) pixels of the source's window, m frames found.
    """
    known = drive.landmarks[[cause == FOUND for cause in drive.causes]]
    boxes = landmark_boxes(known[:, :68])
    room = clip_room(boxes, size)
    window = fomm_window(
        boxes, size, max(1.0, SOURCE_ROOM / room)
    )  # of a still head as of the source
    return adapt(
        with_points(source, count),
        with_points(transform(window, known), count),
        config.mode,
        config.pose,
    )


def clip_room(boxes: Floats, size: int) -> float:
    """How much larger the window of a clip with these tight boxes (n, 4) is than that of one of its frames, from 1."""
    some = boxes[:: max(1, len(boxes) // 200)]
    alone = np.median([window_side(fomm_window(box[None], size), size) for box in some])
    return float(window_side(fomm_window(boxes, size), size) / alone)


def with_points(landmarks: Floats, count: int) -> Points:
    """Landmarks (..., 68 or 70, 2) with ``count`` points."""
    if landmarks.shape[-2] == count or count == 68:
        return np.asarray(landmarks[..., :count, :], np.float64)
    return np.asarray(with_pupils(landmarks), np.float64)


# -------------------------------------------------------------------------------------------------- generating


def load_model(uri: str) -> Motion:
    """The motion model of a bundle. Raises :class:`ConfigError` when it is none."""
    from models.bundle import BundleError, load
    from models.motion.network import Motion

    try:
        network = load(tracking.find_bundle(uri))
    except BundleError as error:
        raise ConfigError(f"--motion {error}") from error
    if not isinstance(network, Motion):
        raise ConfigError(f"--motion {uri}: a bundle of {type(network).__name__}, not of Motion")
    return network


def generate(
    model: Motion, window: Image, source: Floats, driving: Points, config: AnimateConfig
) -> Iterator[Image]:
    """Frames of the source driven by points.

    Args:
        model: on the device where it is to run, in eval mode.
        window: (s, s, 3) RGB.
        source: (68 or 70, 2) pixels of the window.
        driving: (m, K, 2) pixels of the window.
        config: batch and precision.

    Yields:
        (s, s, 3) RGB, one for each set of points.
    """
    import torch

    from models.motion.flow import normalise
    from models.updates import autocast

    device = next(model.parameters()).device
    size = model.config.size

    def points(values: Points) -> torch.Tensor:
        return normalise(torch.from_numpy(values).float(), size).to(device)

    picture = torch.from_numpy(window).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode(), autocast(device, config.precision):
        cache = model.prepare(
            picture, points(with_points(source, model.config.num_landmarks))[None]
        )
        for first in range(0, len(driving), config.batch):
            made, _ = model.drive(cache, points(driving[first : first + config.batch]))
            pictures = ((made.float() + 1) * 127.5).round().clamp(0, 255).byte()
            yield from pictures.permute(0, 2, 3, 1).cpu().numpy()


def held(causes: Sequence[str], pictures: Iterator[Image]) -> Iterator[Image]:
    """A picture for every frame: those without one repeat the last, or before any was found the first."""
    shown = next(pictures)
    ahead: Iterator[Image] = itertools.chain([shown], pictures)
    for cause in causes:
        if cause == FOUND:
            shown = next(ahead)
        yield shown


def animate(config: AnimateConfig, say: Callable[[str], None] = lambda _: None) -> Animated:
    """Make the video and the log of its frames.

    Args:
        config: what and how; places absolute.
        say: told of progress now and then.

    Raises:
        ConfigError: bundle, source or driver cannot be used, or the output's name.
        PlaceError: the output cannot be written.
        NothingUsableError: no frame of the driver has a face.
        WeightsError: of the detector, the landmarker, or the pupils' network.
    """
    import torch

    check_output(config)
    model = load_model(config.motion)
    size, count = model.config.size, model.config.num_landmarks
    config = with_gaze(config, count, say)
    window, source = read_source(config, size)
    with storage.local_file(config.driving) as path:
        if not path.is_file():
            raise ConfigError(
                f"--driving {config.driving}: {'a folder, not a file' if path.is_dir() else 'no such file'}"
            )
        is_video = path.suffix != ".npy"
        drive = (
            follow_video(faces(config), path, f"--driving {config.driving}", say)
            if is_video
            else read_landmarks(config.driving, config.fps)
        )
        if FOUND not in drive.causes:
            reasons = ", ".join(f"{cause}: {n}" for cause, n in counts(drive.causes).items())
            raise NothingUsableError(
                f"no face in any of {len(drive.causes)} driving frames ({reasons or 'empty'})"
            )
        if drive.landmarks.shape[1] > count or config.pupils == "iris":  # else it has been said
            for remark in remarks(drive, count):
                say(remark)
        driving = fit(drive, source, config, size, count)
        began = time.monotonic()
        pictures = generate(
            model.to("cuda" if torch.cuda.is_available() else "cpu"),
            window,
            source,
            driving,
            config,
        )
        with tempfile.TemporaryDirectory(prefix="headray-") as folder:
            made = Path(folder, "animated.mp4")
            encode(
                made,
                _told(held(drive.causes, pictures), len(drive.causes), say),
                drive.rate,
                config.crf,
                times=drive.times,
                sound=path if drive.sound else None,
            )
            storage.put_file(made, config.output)
    lost = [cause for cause in drive.causes if cause != FOUND]
    result = Animated(
        frames=len(drive.causes),
        held=len(lost),
        seconds=drive.times[-1] + float(1 / drive.rate),
        took_seconds=time.monotonic() - began,
        causes=counts(lost),
    )
    storage.write_atomic(f"{config.output}.json", frame_log(config, drive, result))
    return result


def check_output(config: AnimateConfig) -> None:
    """Raise :class:`ConfigError` for a name that cannot be, :class:`storage.PlaceError` for a place that cannot be written to."""
    if Path(config.output).suffix != ".mp4":
        raise ConfigError(f"--output {config.output}: must end in .mp4")
    if config.output in (config.source, config.driving):
        raise ConfigError(f"--output {config.output}: is also an input")
    storage.require_place(config.output)


def remarks(drive: Followed, count: int) -> list[str]:
    """What the driver has and a model of ``count`` points does not take, or the reverse."""
    given = drive.landmarks.shape[1]
    if given > count:
        return [f"the model takes {count} points: the driver's pupils move nothing"]
    if given < count:
        return [
            f"the driver has {given} points: the pupils of the model's {count} look straight ahead"
        ]
    return []


def frame_log(config: AnimateConfig, drive: Followed, result: Animated) -> bytes:
    """``OUTPUT.json``: the configuration, the sums, and what every frame shows."""
    frames = [
        {"index": index, "time": round(at, 6)}
        | ({"state": "driven"} if cause == FOUND else {"state": "held", "cause": cause})
        for index, (at, cause) in enumerate(zip(drive.times, drive.causes, strict=True))
    ]
    content: dict[str, Any] = {"config": asdict(config), **asdict(result), "per_frame": frames}
    return json.dumps(content, indent=1).encode()


def _told(
    pictures: Iterator[Image], count: int, say: Callable[[str], None]
) -> Iterator[NDArray[np.uint8]]:
    """The pictures, with a line of progress every half minute."""
    last_told = time.monotonic()
    for index, picture in enumerate(pictures):
        if time.monotonic() - last_told > 30:
            say(f"{index} of {count} frames")
            last_told = time.monotonic()
        yield picture
