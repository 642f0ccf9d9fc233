"""Pictures of a person + a video → the video with that person's head (HeSer, Shu et al. 2022; its inference, end to end).

Two passes over the target. The first follows one face and keeps half a kilobyte a frame; from it windows are smoothed over
time. The second decodes again, repaints (:mod:`pipelines.repaint`) and encodes, in parts of some seconds. A part depends on
the plan and on one frame to each side of it, and parts are joined without encoding again: so it is all the same whether one
process makes them one after the other or a cluster makes them side by side, and memory does not grow with the video.

A frame without a usable face is the target's own, and the log says why.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from models import bundle
from models.aligner.network import Aligner
from models.blender.network import Blender
from models.bundle import BundleError
from models.frozen.arcface import load_identity_network
from models.frozen.detector import DetectorName
from models.frozen.identity import EmbedderName
from models.frozen.landmarks import LandmarkerName
from models.frozen.parsing import ParserName, load_parser
from models.updates import Precision
from pipelines import provenance, smoothing, sources, storage, tracking
from pipelines.follower import FOUND, FollowConfig, Followed, counts, follow_video
from pipelines.geometry import Floats, Image, heser_window, iou, landmark_boxes
from pipelines.output import ConfigError, NothingUsableError
from pipelines.repaint import Clock, Shot, Swapped, Swapper, strip
from pipelines.video import (
    FORMATS,
    Codec,
    Decoder,
    VideoError,
    VideoInfo,
    encode,
    encode_part,
    join,
    probe,
)

if TYPE_CHECKING:
    from models.bundle import nn

JUMP = 0.5
"""Neighbouring frames whose faces overlap less are two shots: nothing is smoothed across."""
GRID_ROWS, STRIP_SECONDS, STRIP_HEIGHT = 6, 3.0, 256
"""Of the preview: rows of the grid, length of the video, height of both, pixels."""
WHAT = "the head in this video was replaced"

Network = TypeVar("Network", bound="nn.Module")


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """Whose head goes where, and how."""

    aligner: str
    """Bundle of an Aligner, trained or fine-tuned: folder, URI, or models:/NAME@alias of the MLflow registry."""
    blender: str
    """Bundle of a Blender for windows of the same size."""
    target: tuple[str, ...]
    """Video whose head is replaced; or several."""
    output: str
    """File to make, .mp4 or .mkv; of several targets a folder. OUTPUT.json beside it tells of every frame."""
    source: tuple[str, ...] = ()
    """Pictures of one person, or videos. Not needed if the Aligner was fine-tuned to somebody."""
    source_face: int = sources.LARGEST
    """Which face of a picture that has several, counted from the left from 0; -1: the largest."""
    source_frames: int = 8
    """Frames taken of a source that is a video."""
    detector: DetectorName = "dlib"
    """Finds faces."""
    landmarker: LandmarkerName = "dlib"
    """Finds their points."""
    embedder: EmbedderName = "dlib"
    """Tells whether the target's face is still the same person after a cut."""
    parser: ParserName = "geometric"
    """Labels the parts of heads: geometric needs no weights and is coarse, bisenet wants a GPU."""
    stiffness: float = smoothing.STIFFNESS
    """Of the window's path, sides of the window: more of it trembles less and follows a head that sways less; 0: as detected."""
    batch: int = 4
    """Frames worked on at once."""
    precision: Precision = "fp32"
    """Of convolutions."""
    codec: Codec = "h264"
    """h264, or ffv1: lossless RGB, in .mkv."""
    crf: int = 18
    """Quality of x264; 18 is visually lossless, larger is smaller."""
    mark: bool = True
    """Say in the file that it is synthetic and which bundles made it. OUTPUT.json says so always."""
    preview: bool = False
    """Also make OUTPUT.preview.png and OUTPUT.preview.mp4: source, target, aligned and swapped side by side."""
    part_frames: int = 250
    """Frames of a part, the least that a worker takes; the default is x264's own distance of key frames."""
    workers: int = 0
    """Ray workers that share parts and videos; 0: this process makes all. A worker takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.stiffness < 0 or self.batch < 1 or not 0 <= self.crf <= 51 or self.workers < 0:
            raise ValueError(
                f"stiffness {self.stiffness} must be >= 0, batch {self.batch} >= 1, crf {self.crf} in 0..51, "
                f"workers {self.workers} >= 0"
            )
        if self.source_frames < 1 or self.source_face < sources.LARGEST or self.part_frames < 1:
            raise ValueError(
                f"source_frames {self.source_frames} must be >= 1, source_face {self.source_face} >= -1, "
                f"part_frames {self.part_frames} >= 1"
            )
        if not self.target:
            raise ValueError("target: name at least one video")

    @property
    def faces(self) -> FollowConfig:
        """How faces are found."""
        return FollowConfig(
            detector=self.detector, landmarker=self.landmarker, embedder=self.embedder
        )

    @property
    def outputs(self) -> list[str]:
        """File of each target."""
        if len(self.target) == 1:
            return [self.output]
        suffix = ".mkv" if self.codec == "ffv1" else ".mp4"
        return [storage.join(self.output, Path(uri).stem + suffix) for uri in self.target]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done with each frame of a target: all that the second pass must know of the first."""

    info: VideoInfo
    times: list[float]
    """(n) seconds; n frames can be decoded."""
    causes: list[str]
    """(n) why a frame is copied, or ``FOUND``."""
    matrices: Floats
    """(n, 2, 3) frame → window, steady; NaN where the face is lost."""
    landmarks: Floats
    """(n, 68, 2) pixels of the frame, steady; NaN where the face is lost."""
    damage: str = ""
    """Why the video ends early, or empty."""

    def parts(self, length: int) -> list[range]:
        """The frames of each part of ``length`` frames; the last may be shorter."""
        n = len(self.times)
        return [range(first, min(first + length, n)) for first in range(0, n, length)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What became of the frames of a part."""

    seconds: dict[str, float]
    """By step."""
    strips: dict[int, bytes]
    """Frame → JPEG of its strip, where the preview wants one."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """One output."""

    target: str
    output: str
    frames: int
    copied: int
    """Frames that are the target's own."""
    causes: dict[str, int]
    """Of those, with their numbers."""
    seconds: float
    """Of the video."""
    took_seconds: float
    """For all of it."""
    step_seconds: dict[str, float] = field(default_factory=dict)
    """By step, added up over workers; ``follow`` is the first pass."""
    damage: str = ""
    """Why the target ends early, or empty."""


# ------------------------------------------------------------------------------------------------- networks


def load_network(flag: str, uri: str, kind: type[Network]) -> tuple[Network, str]:
    """The network of a bundle, and the folder or URI where it is.

    Raises:
        ConfigError: there is none, or of another class.
    """
    try:
        place = tracking.find_bundle(uri)
        network = bundle.load(place)
    except BundleError as error:
        raise ConfigError(f"--{flag} {error}") from error
    if not isinstance(network, kind):
        raise ConfigError(
            f"--{flag} {uri}: a bundle of {type(network).__name__}, not of {kind.__name__}"
        )
    return network, place


def load_pair(config: SwapConfig) -> tuple[Aligner, Blender, dict[str, dict[str, Any]]]:
    """Both networks, and what is said of their bundles. Raises :class:`ConfigError` when they do not fit each other."""
    aligner, own = load_network("aligner", config.aligner, Aligner)
    blender, other = load_network("blender", config.blender, Blender)
    if aligner.config.size != blender.config.size:
        raise ConfigError(
            f"--aligner {config.aligner} makes windows of {aligner.config.size} px, --blender {config.blender} paints "
            f"windows of {blender.config.size} px: take two of one size"
        )
    if aligner.config.size % aligner.config.encoder_size:
        raise ConfigError(
            f"--aligner {config.aligner}: windows of {aligner.config.size} px are no multiple of its encoders' "
            f"{aligner.config.encoder_size} px"
        )
    told = {
        "aligner": provenance.describe_bundle(own),
        "blender": provenance.describe_bundle(other),
    }
    return aligner, blender, told


def encode_person(
    config: SwapConfig, aligner: Aligner, say: Callable[[str], None]
) -> tuple[torch.Tensor, Image | None]:
    """The source's code (1, d1 + d2) on the Aligner's device, and its first window for the preview.

    Raises:
        ConfigError: a picture cannot be used, or there is none.
        WeightsError: of the identity network, the detector or the landmarker.
    """
    if not config.source and aligner.source_code is None:
        raise ConfigError(
            "--source: name at least one picture of the person (only an Aligner that was fine-tuned needs none)"
        )
    found = sources.read_sources(
        config.source,
        config.faces,
        aligner.config.size,
        face=config.source_face,
        frames=config.source_frames,
        say=say,
    )
    window = found[0].window if found else None
    if aligner.source_code is not None:
        if found:
            say("--source is only shown: the Aligner was fine-tuned, its bundle says who it is")
        return aligner.source_code.detach(), window
    identity = load_identity_network(aligner.config.identity).to(next(aligner.parameters()).device)
    return sources.encode(aligner, identity, found), window


@dataclass(frozen=True)
class Loaded:
    """All that a process needs for any target."""

    swapper: Swapper
    source: Image | None
    """Window of the person, for the preview."""
    bundles: Mapping[str, Mapping[str, Any]]
    """What is said of them, by role."""


def load(config: SwapConfig, say: Callable[[str], None] = lambda _: None) -> Loaded:
    """Networks on the device, and the person's code. Raises as :func:`swap`."""
    aligner, blender, bundles = load_pair(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    aligner, blender = aligner.to(device), blender.to(device)
    code, window = encode_person(config, aligner, say)
    parser = load_parser(config.parser)
    swapper = Swapper(
        aligner, blender, parser, code, batch=config.batch, precision=config.precision
    )
    return Loaded(swapper, window, bundles)


# ----------------------------------------------------------------------------------------------- first pass


def make_plan(
    config: SwapConfig,
    path: Path,
    size: int,
    target: str,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Follow one face through a video, and steady what is cut around it.

    Args:
        config: how faces are found and windows smoothed.
        path: of the video.
        size: side of the windows, pixels.
        target: what an error calls it.
        say: told of progress.

    Raises:
        ConfigError: nothing of the video can be read.
        NothingUsableError: no frame of it has a face.
    """
    followed = follow_video(config.faces, path, f"--target {target}", say)
    if FOUND not in followed.causes:
        reasons = ", ".join(f"{cause}: {n}" for cause, n in counts(followed.causes).items())
        raise NothingUsableError(
            f"{target}: no usable face in any of {len(followed.causes)} frames ({reasons or 'empty'})"
        )
    n = followed.decoded
    damage = followed.causes[n] if n < len(followed.causes) else ""
    matrices, landmarks = steady(followed, size, config.stiffness)
    return Plan(
        info=probe(path),
        times=followed.times[:n],
        causes=followed.causes[:n],
        matrices=matrices[:n],
        landmarks=landmarks[:n],
        damage=damage,
    )


def steady(followed: Followed, size: int, stiffness: float) -> tuple[Floats, Floats]:
    """Windows (n, 2, 3) and landmarks (n, 68, 2) of all frames, smoothed over time within shots; NaN where the face is lost."""
    found = np.flatnonzero([cause == FOUND for cause in followed.causes])
    points = followed.landmarks[found].astype(np.float64)
    indices = shot_indices(points, found)
    raw = np.stack([heser_window(each, size) for each in points])
    matrices = np.full((len(followed.causes), 2, 3), np.nan)
    landmarks = np.full((len(followed.causes), 68, 2), np.nan)
    matrices[found] = smoothing.steady_windows(raw, indices, size, stiffness)
    landmarks[found] = smoothing.smooth(points, indices) if stiffness else points
    return matrices, landmarks


def shot_indices(points: Floats, found: NDArray[np.integer]) -> list[int]:
    """Frame indices (m) of faces (m, 68, 2) with a gap wherever a face jumps, so that smoothing stops there."""
    boxes = landmark_boxes(points)
    jumps = [0]
    for before, now in pairwise(boxes):
        jumps.append(jumps[-1] + int(iou(before, now)[0, 0] < JUMP))
    return [int(index) + jump for index, jump in zip(found, jumps, strict=True)]


# ---------------------------------------------------------------------------------------------- second pass


def read_shots(plan: Plan, path: Path, frames: range, clock: Clock) -> Iterator[Shot]:
    """Frames of the target with what the plan says of each."""
    with Decoder() as decoder:
        read = decoder.read(path, plan.info, ranges=[(frames.start, frames.stop)], images=frames)
        for frame in clock.taking("decode", read):
            assert frame.image is not None
            is_found = plan.causes[frame.index] == FOUND
            yield Shot(
                frame.index,
                frame.image,
                plan.matrices[frame.index] if is_found else None,
                plan.landmarks[frame.index] if is_found else None,
            )


def swap_frames(swapper: Swapper, plan: Plan, path: Path, frames: range) -> Iterator[Swapped]:
    """The output's frames of a part; one more to each side is looked at, for the vote of labels."""
    wider = range(max(frames.start - 1, 0), min(frames.stop + 1, len(plan.times)))
    for swapped in swapper.swap(read_shots(plan, path, wider, swapper.clock)):
        if swapped.shot.index in frames:
            yield swapped


def render_part(
    config: SwapConfig,
    loaded: Loaded,
    plan: Plan,
    path: Path,
    frames: range,
    made: Path,
    say: Callable[[str], None] = lambda _: None,
) -> Part:
    """Write a part of the output.

    Args:
        config: codec, quality, preview.
        loaded: whose swapper's clock is started anew.
        plan: of the target.
        path: of the target.
        frames: of the part.
        made: file to write.
        say: told of progress.
    """
    swapper = loaded.swapper
    swapper.clock = clock = Clock()
    wanted = wanted_strips(config, plan)
    strips: dict[int, bytes] = {}

    def images() -> Iterator[Image]:
        last_told = time.monotonic()
        for swapped in swap_frames(swapper, plan, path, frames):
            index = swapped.shot.index
            if index in wanted:
                strips[index] = jpeg(strip(swapped, loaded.source, STRIP_HEIGHT))
            if time.monotonic() - last_told > 30:
                say(f"{index} of {len(plan.times)} frames")
                last_told = time.monotonic()
            yield swapped.image

    began = time.perf_counter()
    count = encode_part(made, images(), rate_of(plan), config.codec, config.crf)
    assert count == len(frames), (count, frames)
    clock.seconds["encode"] += time.perf_counter() - began - sum(clock.seconds.values())
    return Part(seconds=clock.seconds, strips=strips)


def jpeg(image: Image) -> bytes:
    """A picture, almost without loss."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
    return cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]), quality)[1].tobytes()


def rate_of(plan: Plan) -> Fraction:
    """Frames a second of the target, on average."""
    return Fraction(plan.info.fps or 25).limit_denominator(1001)


def preview_frames(plan: Plan) -> tuple[list[int], list[int]]:
    """Frames of the preview's grid, and of its video: some seconds in the middle of where the face is seen."""
    found = [index for index, cause in enumerate(plan.causes) if cause == FOUND]
    rows = min(GRID_ROWS, len(found))
    grid = [found[int((i + 0.5) * len(found) / rows)] for i in range(rows)]
    count = min(len(found), max(1, round(STRIP_SECONDS * float(rate_of(plan)))))
    first = (len(found) - count) // 2
    return grid, found[first : first + count]


# ------------------------------------------------------------------------------------------------- outputs


def check_outputs(config: SwapConfig) -> None:
    """Raise :class:`ConfigError` for names that cannot be, ``PlaceError`` for places that cannot be written."""
    for output in config.outputs:
        suffix = Path(output).suffix
        if suffix not in FORMATS:
            raise ConfigError(f"--output {output}: must end in {' or '.join(FORMATS)}")
        if config.codec == "ffv1" and suffix != ".mkv":
            raise ConfigError(f"--output {output}: codec ffv1 goes into .mkv")
    if len(set(config.outputs)) < len(config.outputs):
        raise ConfigError(
            f"--output {config.output}: two targets of one name would both become {config.outputs[0]}"
        )
    if set(config.outputs) & {*config.target, *config.source}:
        raise ConfigError(f"--output {config.output}: is also an input")
    for output in config.outputs:
        storage.require_place(output)


def finish(
    config: SwapConfig,
    plan: Plan,
    path: Path,
    parts: Sequence[Path],
    made: Made,
    told: Mapping[str, Mapping[str, Any]],
) -> None:
    """Join parts with the target's sound, mark, and put file and log where they belong."""
    with tempfile.TemporaryDirectory(prefix="headray-") as folder:
        joined = Path(folder, f"swapped{Path(made.output).suffix}")
        join(
            joined,
            parts,
            plan.times,
            sound=path if plan.info.audio else None,
            metadata=provenance.container_metadata(WHAT, told) if config.mark else {},
        )
        manifest = "off" if not config.mark else provenance.can_sign()
        if not manifest and joined.suffix != ".mp4":
            manifest = "only .mp4 can hold one"
        if not manifest:
            provenance.sign(joined, provenance.statement(WHAT, told), told)
        storage.put_file(joined, made.output)
    log = frame_log(config, plan, made, told, manifest or "signed")
    storage.write_atomic(f"{made.output}.json", log)


def frame_log(
    config: SwapConfig,
    plan: Plan,
    made: Made,
    told: Mapping[str, Mapping[str, Any]],
    manifest: str,
) -> bytes:
    """``OUTPUT.json``: that it is synthetic, the configuration, the sums, and what became of every frame."""
    synthetic = {
        "synthetic": True,
        "statement": provenance.statement(WHAT, told),
        "digital_source_type": provenance.COMPOSITE,
        "bundles": told,
        "c2pa_manifest": manifest,
    }
    frames = [
        {"index": index, "time": round(at, 6)}
        | ({"state": "swapped"} if cause == FOUND else {"state": "copied", "cause": cause})
        for index, (at, cause) in enumerate(zip(plan.times, plan.causes, strict=True))
    ]
    content = {
        "provenance": synthetic,
        "config": asdict(config),
        **asdict(made),
        "per_frame": frames,
    }
    return json.dumps(content, indent=1).encode()


def write_preview(output: str, plan: Plan, strips: Mapping[int, bytes], has_source: bool) -> None:
    """The grid and the short video of strips."""
    grid, run = preview_frames(plan)

    def picture(index: int) -> Image:
        decoded = cv2.imdecode(np.frombuffer(strips[index], np.uint8), cv2.IMREAD_COLOR_RGB)
        return np.asarray(decoded, np.uint8)

    names = [*(["source"] if has_source else []), "target", "aligned", "swapped"]
    head = np.zeros((24, STRIP_HEIGHT * len(names), 3), np.uint8)
    for i, name in enumerate(names):
        place = (STRIP_HEIGHT * i + 8, 17)
        cv2.putText(
            head, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA
        )
    sheet = np.vstack([head, *(picture(index) for index in grid)])
    png = cv2.imencode(".png", sheet[:, :, ::-1])[1].tobytes()
    storage.write_atomic(f"{output}.preview.png", png)
    with tempfile.TemporaryDirectory(prefix="headray-") as folder:
        made = Path(folder, "preview.mp4")
        encode(made, (np.vstack([head, picture(index)]) for index in run), rate_of(plan))
        storage.put_file(made, f"{output}.preview.mp4")


def wanted_strips(config: SwapConfig, plan: Plan) -> frozenset[int]:
    """Frames whose strips the preview needs."""
    if not config.preview:
        return frozenset()
    grid, run = preview_frames(plan)
    return frozenset([*grid, *run])


def summarise(
    target: str, output: str, plan: Plan, seconds: Mapping[str, float], took: float
) -> Made:
    """What is told of an output."""
    last = len(plan.times) - 1
    length = plan.times[last] + float(1 / rate_of(plan))
    return Made(
        target=target,
        output=output,
        frames=len(plan.times),
        copied=sum(cause != FOUND for cause in plan.causes),
        causes=counts(plan.causes),
        seconds=round(length, 6),
        took_seconds=round(took, 3),
        step_seconds={name: round(value, 3) for name, value in seconds.items()},
        damage=plan.damage,
    )


def swap(config: SwapConfig, say: Callable[[str], None] = lambda _: None) -> list[Made]:
    """Make all outputs, in this process.

    Args:
        config: what and how; places absolute.
        say: told of progress, choices, and of targets among several that cannot be used.

    Raises:
        ConfigError: bundles, sources, or the only target cannot be used.
        NothingUsableError: no target has a face.
        WeightsError: of a frozen network.
    """
    check_outputs(config)
    loaded = load(config, say)
    made: list[Made] = []
    errors: list[Exception] = []
    for target, output in zip(config.target, config.outputs, strict=True):
        try:
            made.append(swap_video(config, loaded, target, output, say))
        except (ConfigError, NothingUsableError) as error:
            if len(config.target) > 1:
                say(f"not made: {error}")
            errors.append(error)
    if not made:
        raise errors[0]
    return made


def swap_video(
    config: SwapConfig,
    loaded: Loaded,
    target: str,
    output: str,
    say: Callable[[str], None] = lambda _: None,
) -> Made:
    """Make one output. Raises as :func:`swap`."""
    began = time.perf_counter()
    with storage.local_file(target) as path, tempfile.TemporaryDirectory() as folder:
        require_file(target, path)
        plan = make_plan(config, path, loaded.swapper.size, target, say)
        seconds = {"follow": time.perf_counter() - began}
        strips: dict[int, bytes] = {}
        files = []
        for number, frames in enumerate(plan.parts(config.part_frames)):
            files.append(Path(folder, f"{number:06d}{Path(output).suffix}"))
            part = render_part(config, loaded, plan, path, frames, files[-1], say)
            strips |= part.strips
            add_seconds(seconds, part.seconds)
        made = summarise(target, output, plan, seconds, time.perf_counter() - began)
        finish(config, plan, path, files, made, loaded.bundles)
    if config.preview:
        write_preview(output, plan, strips, has_source=loaded.source is not None)
    return made


def add_seconds(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Add what a part took, step by step."""
    for name, value in part.items():
        total[name] = total.get(name, 0.0) + value


def require_file(target: str, path: Path) -> None:
    """Raise :class:`ConfigError` unless the target is there and opens as a video."""
    if not path.is_file():
        raise ConfigError(f"--target {target}: no such file")
    try:
        probe(path)
    except VideoError as error:
        raise ConfigError(f"--target {target}: {error}") from error
