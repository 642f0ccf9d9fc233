"""How a long run is going, for a person who watches and for MLflow. The driver's threads; nothing here can stop a run."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any

from pipelines.limiter import Pause

POLL_SECONDS = 2.0
"""How often the egress addresses are looked at."""
GIVE_UP_SECONDS = 15.0
"""How long the end of a run waits for the last point of its series."""

Recorder = Callable[[Mapping[str, float], int], bool]
"""Takes the values of some series at a second of the run; False when they were lost."""


class Progress:
    """Counts committed videos and tells: a line every 30 seconds, one when an address is paused, points of series.

    On a terminal Ray Data draws its own bars, and only pauses are said.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        record: Recorder | None = None,
        watch: Callable[[], list[Pause]] = list,
        every_seconds: float = 30.0,
        record_seconds: float = 10.0,
    ) -> None:
        """Args:
        say: prints a line.
        record: receives the series while the run goes on, from a thread of its own; it may take as long as it wants.
        watch: tells which egress addresses must wait now.
        every_seconds: between two lines.
        record_seconds: least time between two points of the series.
        """
        self.say = say
        self.record = record
        self.watch = watch
        self.every_seconds = every_seconds
        self.record_seconds = record_seconds
        self.states: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        """By ``STAGE/videos``, ``STAGE/frames``, ``STAGE/seconds`` and ``STAGE/rejected``."""
        self.frames = 0
        self.known = 0
        self.before = 0
        self.step = "reading the list"
        self.pauses: list[Pause] = []
        self._started = time.perf_counter()
        self._counting = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._tell, daemon=True)]
        if record:
            self._threads.append(threading.Thread(target=self._record_series, daemon=True))

    def __enter__(self) -> Progress:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(GIVE_UP_SECONDS)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._started

    def listed(self, count: int) -> None:
        """``count`` videos of the list are known by now."""
        self.known = count
        self.step = "processing"

    def skipped(self, count: int) -> None:
        """``count`` videos were committed by an earlier run."""
        self.before += count

    def video(self, row: Mapping[str, Any]) -> None:
        """One video was committed: a row of :class:`pipelines.shards.Committer`."""
        seconds = json.loads(row["seconds"])
        with self._counting:
            self.states[row["state"]] += 1
            self.frames += row["frames"]
            if row["cause"]:
                self.causes[row["cause"]] += 1
                self.stages[f"{list(seconds)[-1] if seconds else 'list'}/rejected"] += 1
            for stage, value in seconds.items():
                self.stages[f"{stage}/videos"] += 1
                self.stages[f"{stage}/seconds"] += value
            for stage, frames in json.loads(row["stage_frames"]).items():
                self.stages[f"{stage}/frames"] += frames

    def packed(self, count: int, total: int) -> None:
        """``count`` of ``total`` shards are packed."""
        self.step = f"packing shards ({count} of {total})"

    def line(self) -> str:
        """The state in one line."""
        elapsed = self.seconds
        with self._counting:
            done = self.states.total()
            causes = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common(3))
        rate = f", {done / elapsed * 3600:.0f} videos/h" if done else ""
        earlier = f", {self.before} from an earlier run" if self.before else ""
        return (
            f"[{elapsed:6.0f} s] {self.step}: {done + self.before} of {self.known} videos{earlier}, "
            f"{self.states['open']} with faces, {self.states['rejected']} rejected, "
            f"{self.states['failed']} failed, {self.frames} frames{rate}"
            + (f" ({causes})" if causes else "")
            + "".join(f"; {pause_line(pause)}" for pause in self.pauses)
        )

    def series(self) -> dict[str, float]:
        """Everything counted so far, as MLflow names it: ``progress/...``, and ``stage/STAGE/...`` for each stage."""
        with self._counting:
            values = {
                "progress/videos": self.states.total(),
                "progress/rejected": self.states["rejected"],
                "progress/failed": self.states["failed"],
                "progress/frames": self.frames,
            }
            values |= {f"stage/{name}": round(value, 3) for name, value in self.stages.items()}
        return {name: float(value) for name, value in values.items()}

    def look(self) -> None:
        """Ask which addresses must wait; say what has changed."""
        before = {(pause.address, pause.site): pause for pause in self.pauses}
        self.pauses = self.watch()
        now = {(pause.address, pause.site): pause for pause in self.pauses}
        for name, pause in now.items():
            if name not in before or before[name].blocks != pause.blocks:
                self.say(f"[{self.seconds:6.0f} s] {pause_line(pause)}")
        for address, site in before.keys() - now.keys():
            self.say(f"[{self.seconds:6.0f} s] address {address} goes on with {site}")

    def _tell(self) -> None:
        last = self.seconds
        while not self._stop.wait(min(POLL_SECONDS, self.every_seconds)):
            self.look()
            if self.seconds - last >= self.every_seconds and not os.isatty(1):
                last = self.seconds
                self.say(self.line())

    def _record_series(self) -> None:
        assert self.record
        last: dict[str, float] = {}
        ended = False
        while not ended:
            ended = self._stop.wait(self.record_seconds)
            now = self.series()
            if now != last and self.record(now, round(self.seconds)):
                last = now


def pause_line(pause: Pause) -> str:
    """What a person needs to know of an address that waits: whose fault, how long, what is still on its way."""
    if pause.seconds:
        until = datetime.now() + timedelta(seconds=pause.seconds)
        wait = f"{pause.seconds:.0f} s left, until {until:%H:%M:%S}"
    else:
        wait = "over, one video is tried"
    reason = pause.cause.partition(": ")[2] or pause.cause
    return (
        f"address {pause.address} is paused at {pause.site} ({reason}, {pause.blocks} in a row): {wait}; "
        f"{pause.under_way} of its fetches under way"
    )
