"""Stage 7. What is seen in each window: 19 labels a pixel, and the pupils. CPU, or a GPU for networks.

A video whose frames passed every check comes in, so that nothing is labelled that is thrown away. Out comes, for each open
track, one ``KEY.NNNNNN.png`` per frame right after its ``.jpg``, unless the parser is ``none``, and with ``pupils`` a
``KEY.pupils.npy`` (n, 2, 2) in window pixels. No frame is dropped here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen import parsing, pupils, weights
from models.frozen.parsing import Labels, Parser, ParsingLabel
from models.frozen.pupils import PupilFinder, PupilSource
from pipelines import smoothing
from pipelines.geometry import Floats, Image, invert, transform
from pipelines.schema import (
    Member,
    StageResources,
    Track,
    Video,
    VideoRow,
    add_actors,
    batched,
    check_at_once,
    frame_member,
    npy_array,
    npy_bytes,
    run_stage,
)

if TYPE_CHECKING:
    from ray.data import Dataset

ParserChoice = Literal["none", "geometric", "bisenet", "unet19"]

WINDOWS_AT_ONCE = 64
"""Decoded windows held in memory, of all tracks of a video, and given to the parser together."""


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Face parsing, and pupils."""

    parser: ParserChoice = "geometric"
    """``geometric`` (no weights, 40 ms a window on a CPU, coarse), ``bisenet`` (wants a GPU), ``unet19`` (for tests), or
    ``none``: no labels."""
    pupils: PupilSource = "none"
    """``iris``: MediaPipe's network (2.6 MB, a CPU is enough); the motion model needs them to move the gaze (70 landmarks).
    ``none``: no pupils. With ``--crops.smooth`` they are smoothed, too."""
    resources: StageResources = field(default_factory=lambda: StageResources(memory_gb=1.5))
    """Of an actor; with ``bisenet`` give it a share of a GPU."""
    videos_at_once: int = 1
    """Videos that one actor works on side by side, so that their windows fill the network's batches; for GPUs, 2 to 8. Not with
    ``geometric``. Memory is needed for all of them."""

    def __post_init__(self) -> None:
        check_at_once(self.videos_at_once, self.parser, ("bisenet", "unet19"))


def weight_names(config: AnnotateConfig) -> tuple[str, ...]:
    """Entries of ``models.frozen.weights`` that this stage loads."""
    return (*parser_weights(config), *pupils.WEIGHTS[config.pupils])


def parser_weights(config: AnnotateConfig) -> tuple[str, ...]:
    """The parser's share of :func:`weight_names`."""
    return () if config.parser == "none" else parsing.WEIGHTS[config.parser]


def describe(config: AnnotateConfig) -> dict[str, Any]:
    """What a reader must know about labels and pupils: who found them, and what labels mean."""
    used: dict[str, Any] = {"parser": config.parser, "pupils": config.pupils}
    if config.parser != "none":
        used["labels"] = [label.name.lower() for label in ParsingLabel]
    return used


def encode_labels(labels: Labels) -> bytes:
    """Labels (h, w) to a PNG of one channel; equal labels give equal bytes."""
    done, data = cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    assert done, labels.shape
    return data.tobytes()


def decode_labels(png: bytes) -> Labels:
    """Inverse of :func:`encode_labels`. Raises ``ValueError`` for anything but a picture of one channel of labels."""
    labels = cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_UNCHANGED) if png else None
    most = len(ParsingLabel) - 1
    if labels is None:
        raise ValueError(f"{len(png)} bytes are not a PNG of labels 0..{most}")
    if labels.ndim != 2 or labels.dtype != np.uint8:
        kind = f"{labels.shape[2]} channels" if labels.ndim == 3 else f"{labels.dtype} values"
        raise ValueError(
            f"a PNG with {kind} is no label map: one channel of 8 bits is needed whose values are the labels 0..{most}, not a"
            " coloured picture of them"
        )
    if labels.max() > most:
        raise ValueError(f"the label {labels.max()} is unknown; labels are 0..{most}")
    return np.asarray(labels, dtype=np.uint8)


def decode_window(jpeg: bytes) -> Image:
    """A window as RGB (size, size, 3)."""
    image = cv2.imdecode(np.frombuffer(jpeg, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None, "a crop this pipeline wrote does not decode"
    return np.asarray(image, dtype=np.uint8)


def frame_mask(matrix: Floats, frame: tuple[int, int], size: int) -> NDArray[np.bool_]:
    """(size, size) True where a window shows a part of the frame.

    Args:
        matrix: 2x3, frame → window.
        frame: (width, height) of the displayed frame, pixels.
        size: side of the window.
    """
    width, height = frame
    corners = transform(matrix, [[0, 0], [width, 0], [width, height], [0, height]])
    mask = np.zeros((size, size), dtype=np.uint8)
    fine = np.clip(np.round((corners - 0.5) * 16), -(2**20), 2**20).astype(np.int32)
    cv2.fillConvexPoly(mask, fine, 1, shift=4)
    return mask.astype(bool)


def parse_tracks(video: Video, content: Mapping[str, bytes], parser: Parser) -> dict[str, bytes]:
    """Label all windows of all open tracks of a video, many at a time.

    Args:
        video: with ``probe``.
        content: members of its open tracks by name.
        parser: of the configuration.

    Returns:
        the PNG of each window by the name of its JPEG.
    """
    windows = []
    for track in (track for track in video.tracks if track.state == "open"):
        key = video.track_key(track)
        arrays = (npy_array(content[f"{key}.{name}.npy"]) for name in ("landmarks", "matrix"))
        pictures = [frame_member(key, index) for index in track.indices]
        windows += list(zip(pictures, *arrays, strict=True))
    frame = (video.probe["width"], video.probe["height"])
    parsed: dict[str, bytes] = {}
    for some in batched(windows, WINDOWS_AT_ONCE):
        names, landmarks, matrices = zip(*some, strict=True)
        crops = [decode_window(content[name]) for name in names]
        inside = [
            frame_mask(matrix, frame, crop.shape[0])
            for matrix, crop in zip(matrices, crops, strict=True)
        ]
        found = parser.parse(crops, np.stack(landmarks).astype(np.float64), inside)
        parsed |= {name: encode_labels(labels) for name, labels in zip(names, found, strict=True)}
    return parsed


def annotate(
    video: Video, members: list[Member], parser: Parser | None, config: AnnotateConfig
) -> tuple[Video, list[Member]]:
    """Annotate all open tracks of a video.

    Args:
        video: with judged tracks.
        members: of its open tracks.
        parser: of ``config.parser``; None for ``none``.
        config: of the stage.

    Returns:
        the video, and its members with labels.
    """
    if parser is None:
        return video, members
    labels = parse_tracks(video, dict(members), parser)
    longer: list[Member] = []
    for name, data in members:
        longer.append((name, data))
        if name in labels:
            longer.append((name.removesuffix(".jpg") + ".png", labels[name]))
    used = version(config.parser, parser_weights(config))
    return replace(video, versions=video.versions | {"parsing": used}), longer


def version(name: str, files: tuple[str, ...]) -> str:
    """A network's name and the beginning of its files' hashes."""
    return " ".join([name, *(weights.REGISTRY[file].sha256[:12] for file in files)])


def find_pupils(
    video: Video, content: Mapping[str, bytes], track: Track, finder: PupilFinder, smooth: bool
) -> tuple[Track, Member]:
    """The pupils of one track.

    Args:
        video: of the track.
        content: members by name.
        track: open.
        finder: finds them in each window.
        smooth: their paths, in the frame.

    Returns:
        the track with scores ``pupils_seen``, and where frames are neighbours ``pupil_jitter``, both as
        docs/formats.md has them; and its member ``KEY.pupils.npy``.
    """
    key = video.track_key(track)
    landmarks, matrices = (
        npy_array(content[f"{key}.{name}.npy"]).astype(np.float64)
        for name in ("landmarks", "matrix")
    )
    points, seen = np.empty((len(track.indices), 2, 2)), np.empty((len(track.indices), 2))
    for i, index in enumerate(track.indices):
        window = decode_window(content[frame_member(key, index)])
        found = finder.locate([window], landmarks[i : i + 1])
        points[i], seen[i] = found.points[0], found.seen[0]
    inverses = [invert(matrix) for matrix in matrices]
    in_frame = np.stack([transform(*pair) for pair in zip(inverses, points, strict=True)])
    eyes = np.stack([transform(*pair) for pair in zip(inverses, landmarks, strict=True)])
    scores = {"pupils_seen": float(seen.mean())}
    if smooth:
        scores["pupil_jitter_raw"] = smoothing.jitter(in_frame, track.indices, eyes)
        in_frame = smoothing.smooth_pupils(in_frame, track.indices)
        points = np.stack([transform(*pair) for pair in zip(matrices, in_frame, strict=True)])
    scores["pupil_jitter"] = smoothing.jitter(in_frame, track.indices, eyes)
    told = {name: round(value, 5) for name, value in scores.items() if np.isfinite(value)}
    member = (f"{key}.pupils.npy", npy_bytes(points.astype(np.float32)))
    return replace(track, scores=track.scores | told), member


def add_pupils(
    video: Video, members: list[Member], finder: PupilFinder, smooth: bool
) -> tuple[Video, list[Member]]:
    """:func:`find_pupils` of all open tracks of a video."""
    content = dict(members)
    tracks, found = [], []
    for track in video.tracks:
        if track.state == "open":
            track, member = find_pupils(video, content, track, finder, smooth)
            found.append(member)
        tracks.append(track)
    versions = video.versions | {"pupils": version("iris", pupils.WEIGHTS["iris"])}
    return replace(video, tracks=tuple(tracks), versions=versions), [*members, *found]


class Annotator:
    """Holds networks for the life of an actor, on a GPU if Ray gave it one."""

    def __init__(self, config: AnnotateConfig, *, smooth: bool = False) -> None:
        cv2.setNumThreads(1)  # more speed comes from more actors
        self.config = config
        self.smooth = smooth
        self.parser = None if config.parser == "none" else parsing.load_parser(config.parser)
        self.finder = PupilFinder() if config.pupils == "iris" else None

    def __call__(self, row: VideoRow) -> VideoRow:
        """One video."""
        return run_stage("annotate", self.annotate, row)

    def annotate(self, video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        """The stage on an unpacked row."""
        video, members = annotate(video, members, self.parser, self.config)
        if self.finder is not None:
            video, members = add_pupils(video, members, self.finder, self.smooth)
        return video, members


def add_annotations(videos: Dataset, config: AnnotateConfig, *, smooth: bool = False) -> Dataset:
    """Append the stage to a plan over :class:`VideoRow`; ``smooth`` the pupils if the landmarks were."""
    return add_actors(
        videos, Annotator, config.resources, config.videos_at_once, config=config, smooth=smooth
    )
