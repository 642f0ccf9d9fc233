"""What workers count while a run goes on, for Prometheus: Ray exports it at ``/metrics`` of every node.

    headray_stage_videos_total         videos that a stage has finished, by stage and what became of them
    headray_stage_frames_total         frames that were still kept then
    headray_stage_busy_seconds_total   seconds that workers spent in it
    headray_stage_seconds              how long one video took (Ray guesses the sum of a histogram from its buckets)
    headray_egress_pause_seconds       what is left of the pause of an egress address towards a site
    headray_egress_under_way           fetches of that address that have not come back

Outside Ray (tests call stages as functions) nothing is counted.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Upper bounds of the histogram's buckets."""


def _connected() -> bool:
    """Whether this is a process of a Ray cluster; Ray is not imported to find out."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@cache
def _stage_meters() -> tuple[Any, Any, Any, Any]:
    from ray.util.metrics import Counter, Histogram

    by = ("stage", "outcome")
    return (
        Counter("headray_stage_videos_total", "Videos that a stage has finished", tag_keys=by),
        Counter("headray_stage_frames_total", "Frames kept after a stage", tag_keys=("stage",)),
        Counter(
            "headray_stage_busy_seconds_total", "Seconds spent in a stage", tag_keys=("stage",)
        ),
        Histogram(
            "headray_stage_seconds", "Seconds of one video in a stage", SECONDS, tag_keys=("stage",)
        ),
    )


@cache
def _egress_meters() -> tuple[Any, Any]:
    from ray.util.metrics import Gauge

    by = ("address", "site")
    return (
        Gauge("headray_egress_pause_seconds", "Seconds left of an address's pause", tag_keys=by),
        Gauge("headray_egress_under_way", "Fetches that have not come back", tag_keys=by),
    )


def observe_stage(stage: str, outcome: str, frames: int, seconds: float) -> None:
    """A stage has finished a video.

    Args:
        stage: its name.
        outcome: state of the video: open, rejected or failed.
        frames: of its open tracks.
        seconds: wall clock.
    """
    if not _connected():
        return
    videos, kept, busy, clock = _stage_meters()
    videos.inc(1, tags={"stage": stage, "outcome": outcome})
    if frames:
        kept.inc(frames, tags={"stage": stage})
    busy.inc(max(seconds, 1e-6), tags={"stage": stage})
    clock.observe(seconds, tags={"stage": stage})


def observe_egress(address: str, site: str, pause_seconds: float, under_way: int) -> None:
    """How an egress address stands towards a site; a pause of 0 seconds is none."""
    if not _connected():
        return
    pause, flights = _egress_meters()
    pause.set(pause_seconds, tags={"address": address, "site": site})
    flights.set(under_way, tags={"address": address, "site": site})
