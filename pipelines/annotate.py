"""Stage 6. What is seen in each window: 19 labels a pixel, and which way the head looks. CPU, or a GPU for networks.

A video whose frames passed the identity check comes in, so that nothing is labelled that is thrown away. Out come, for each
open track, one ``KEY.NNNNNN.png`` per frame right after its ``.jpg`` (unless the parser is ``none``), and three more columns of
``KEY.scores.npy``, :data:`POSE_COLUMNS`, with their medians in the track. No frame is dropped here.
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
from pipelines.geometry import Floats, Image, invert, transform
from pipelines.headpose import head_pose
from pipelines.schema import (
    Member,
    StageResources,
    Track,
    Video,
    VideoRow,
    add_actors,
    batched,
    frame_member,
    npy_array,
    npy_bytes,
    run_stage,
)

if TYPE_CHECKING:
    from ray.data import Dataset

ParserChoice = Literal["none", "geometric", "bisenet", "unet19"]

POSE_COLUMNS = ("yaw", "pitch", "roll")
"""Last columns of ``KEY.scores.npy``, degrees; :func:`pipelines.headpose.head_pose` has the signs."""

WINDOWS_AT_ONCE = 64
"""Decoded windows held in memory, of all tracks of a video, and given to the parser together."""


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Face parsing and head pose."""

    parser: ParserChoice = "geometric"
    """``geometric`` (no weights, 40 ms a window on a CPU, coarse), ``bisenet`` (wants a GPU), ``unet19`` (for tests), or
    ``none``: no labels."""
    resources: StageResources = field(default_factory=lambda: StageResources(memory_gb=1.5))
    """One actor works on one video at a time; with ``bisenet`` give it a share of a GPU."""


def weight_names(config: AnnotateConfig) -> tuple[str, ...]:
    """Entries of ``models.frozen.weights`` that this stage loads."""
    return () if config.parser == "none" else parsing.WEIGHTS[config.parser]


def describe(crop: Mapping[str, Any], config: AnnotateConfig) -> dict[str, Any]:
    """``pipelines.crops.describe`` with what this stage adds: score columns, the parser, and what its labels mean."""
    labels = (
        {}
        if config.parser == "none"
        else {"labels": [label.name.lower() for label in ParsingLabel]}
    )
    return {**crop, "scores": [*crop["scores"], *POSE_COLUMNS], "parser": config.parser, **labels}


def encode_labels(labels: Labels) -> bytes:
    """Labels (h, w) to a PNG of one channel; equal labels give equal bytes."""
    done, data = cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    assert done, labels.shape
    return data.tobytes()


def decode_labels(png: bytes) -> Labels:
    """Inverse of :func:`encode_labels`. Raises ``ValueError`` for anything but a picture of one channel of labels."""
    labels = cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_UNCHANGED) if png else None
    if (
        labels is None
        or labels.ndim != 2
        or labels.dtype != np.uint8
        or labels.max() >= len(ParsingLabel)
    ):
        raise ValueError(f"{len(png)} bytes are not a PNG of labels 0..{len(ParsingLabel) - 1}")
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


def poses(landmarks: Floats, matrices: Floats) -> NDArray[np.float32]:
    """(n, 3) :data:`POSE_COLUMNS` of windows' landmarks (n, 68, 2) and matrices (n, 2, 3), seen in the frame."""
    found = [
        head_pose(transform(invert(matrix), points))
        for matrix, points in zip(matrices, landmarks, strict=True)
    ]
    return np.array(found, dtype=np.float32).reshape(-1, len(POSE_COLUMNS))


def add_poses(video: Video, track: Track, content: dict[str, bytes]) -> Track:
    """Append the pose columns to a track's scores in ``content``, by member name; returns the track with the medians."""
    key = video.track_key(track)
    arrays = [npy_array(content[f"{key}.{name}.npy"]) for name in ("landmarks", "matrix", "scores")]
    found = poses(arrays[0], arrays[1])
    content[f"{key}.scores.npy"] = npy_bytes(np.concatenate([arrays[2], found], axis=1))
    medians = np.median(found, axis=0)
    named = {name: round(float(v), 4) for name, v in zip(POSE_COLUMNS, medians, strict=True)}
    return replace(track, scores=track.scores | named)


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
        video: with embedded tracks.
        members: of its open tracks.
        parser: of ``config.parser``; None for ``none``.
        config: of the stage.

    Returns:
        the video, its open tracks with the medians of their poses, and its members with longer scores and with labels.
    """
    content = dict(members)
    tracks = tuple(
        add_poses(video, track, content) if track.state == "open" else track
        for track in video.tracks
    )
    video = replace(video, tracks=tracks)
    if parser is None:
        return video, list(content.items())
    labels = parse_tracks(video, content, parser)
    longer: list[Member] = []
    for name, data in content.items():
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
    return add_actors(videos, Annotator, config.resources, config=config)
