#!/usr/bin/env python
"""Searching every n-th frame whole and following people between, against searching every frame whole.

    python benchmarks/following.py CLIP.mp4 ... [--every 5] [--config.frames-per-second 0]

Prints, for each clip, the detector's seconds of both and how well the boxes of the same frames agree (intersection over union).
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.frozen.detector import Detector, load_detector
from pipelines.geometry import iou
from pipelines.schema import Span, Video
from pipelines.tracks import DETECTOR_FACE_PX, TracksConfig, follow
from pipelines.video import Decoder, probe


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is compared."""

    clips: tyro.conf.Positional[tuple[Path, ...]]
    """Video files."""
    every: int = 5
    """Against 1."""
    config: TracksConfig = field(default_factory=TracksConfig)
    """Everything else."""


class Timed:
    """A detector with a clock."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.seconds = 0.0

    def detect(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Detector`."""
        start = time.process_time()
        found = self.detector.detect(image)
        self.seconds += time.process_time() - start
        return found


def boxes_of(video: Video) -> dict[int, list[tuple[float, ...]]]:
    """Boxes of all open tracks by frame."""
    found: dict[int, list[tuple[float, ...]]] = {}
    for track in video.tracks:
        if track.state == "open":
            for index, box in zip(track.indices, track.boxes, strict=True):
                found.setdefault(index, []).append(box)
    return found


def main() -> None:
    """Follow every clip twice and print a row for it."""
    config = tyro.cli(BenchmarkConfig, description=__doc__)
    cv2.setNumThreads(1)
    detector = load_detector(config.config.detector, DETECTOR_FACE_PX)
    table = Table()
    for column in ("clip", "frames", "of them", "s, each", f"s, {config.every}th", "gain", "median", "least"):  # fmt: skip
        table.add_column(column, justify="left" if column == "clip" else "right")
    with Decoder(config.config.decoder) as decoder:
        for clip in config.clips:
            video = Video(
                identity="one",
                video="clip",
                blob=str(clip),
                probe=asdict(probe(clip)),
                spans=(Span(name="0"),),
            )
            each, some = Timed(detector), Timed(detector)
            known, found = (
                boxes_of(
                    follow(video, decoder, timed, replace(config.config, search_every=every))[0]
                )
                for timed, every in ((each, 1), (some, config.every))
            )
            shared = [
                iou(found[i], known[i]).max(axis=1).min() for i in sorted(set(found) & set(known))
            ]
            agree = (f"{np.median(shared):.2f}", f"{min(shared):.2f}") if shared else ("-", "-")
            table.add_row(
                clip.stem,
                str(len(known)),
                str(len(shared)),
                f"{each.seconds:.2f}",
                f"{some.seconds:.2f}",
                f"{each.seconds / some.seconds:.1f}",
                *agree,
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
