"""Stage 7. What is seen in each window: 19 labels a pixel. CPU, or a GPU for networks.

A video whose frames passed every check comes in, so that nothing is labelled that is thrown away. Out comes, for each open
track, one ``KEY.NNNNNN.png`` per frame right after its ``.jpg``, unless the parser is ``none``. No frame is dropped here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen import parsing, weights
from models.frozen.parsing import Labels, Parser, ParsingLabel
from pipelines.geometry import Floats, Image, transform
from pipelines.schema import (
    Member,
    StageResources,
    Video,
    VideoRow,
    add_actors,
    batched,
    check_at_once,
    frame_member,
    npy_array,
    run_stage,
)

if TYPE_CHECKING:
    from ray.data import Dataset

ParserChoice = Literal["none", "geometric", "bisenet", "unet19"]

WINDOWS_AT_ONCE = 64
"""Decoded windows held in memory, of all tracks of a video, and given to the parser together."""


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Face parsing."""

    parser: ParserChoice = "geometric"
    """``geometric`` (no weights, 40 ms a window on a CPU, coarse), ``bisenet`` (wants a GPU), ``unet19`` (for tests), or
    ``none``: no labels."""
    resources: StageResources = field(default_factory=lambda: StageResources(memory_gb=1.5))
    """Of an actor; with ``bisenet`` give it a share of a GPU."""
    videos_at_once: int = 1
    """Videos that one actor works on side by side, so that their windows fill the network's batches; for GPUs, 2 to 8. Not with
    ``geometric``. Memory is needed for all of them."""

    def __post_init__(self) -> None:
        check_at_once(self.videos_at_once, self.parser, ("bisenet", "unet19"))


def weight_names(config: AnnotateConfig) -> tuple[str, ...]:
    """Entries of ``models.frozen.weights`` that this stage loads."""
    return () if config.parser == "none" else parsing.WEIGHTS[config.parser]


def describe(config: AnnotateConfig) -> dict[str, Any]:
    """What a reader must know about the labels: the parser, and what they mean."""
    if config.parser == "none":
        return {"parser": "none"}
    return {"parser": config.parser, "labels": [label.name.lower() for label in ParsingLabel]}


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
    used = " ".join(
        [config.parser, *(weights.REGISTRY[name].sha256[:12] for name in weight_names(config))]
    )
    return replace(video, versions=video.versions | {"parsing": used}), longer


class Annotator:
    """Holds a parser for the life of an actor, on a GPU if Ray gave it one."""

    def __init__(self, config: AnnotateConfig) -> None:
        cv2.setNumThreads(1)  # more speed comes from more actors
        self.config = config
        self.parser = None if config.parser == "none" else parsing.load_parser(config.parser)

    def __call__(self, row: VideoRow) -> VideoRow:
        """One video."""
        return run_stage("annotate", self.annotate, row)

    def annotate(self, video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        """The stage on an unpacked row."""
        return annotate(video, members, self.parser, self.config)


def add_annotations(videos: Dataset, config: AnnotateConfig) -> Dataset:
    """Append the stage to a plan over :class:`VideoRow`."""
    return add_actors(videos, Annotator, config.resources, config.videos_at_once, config=config)
