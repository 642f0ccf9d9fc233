#!/usr/bin/env python
"""How fast is preprocessing, where does the time go, and what does Ray cost? One table, in one run.

The same videos go through the real plan (``pipelines.preprocess.process``: seven pools of actors, commits) and through a
bare loop over the same functions in as many processes as the machine has cores, in turns. Rates are of the steady state:
the first and the last videos of each turn do not count, nor does anything that starts up.

    python benchmarks/preprocess.py                                            # the corpus that jobs/demo.py draws
    python benchmarks/preprocess.py --list LIST --clips CLIPS                  # clips, named by LIST/videos.csv
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import tyro
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

from jobs import demo, runtime  # noqa: E402
from jobs.preprocess import PRESETS  # noqa: E402
from pipelines import (  # noqa: E402
    annotate,
    crops,
    download,
    identities,
    preprocess,
    quality,
    shards,
    tracks,
)
from pipelines.preprocess import PreprocessConfig  # noqa: E402
from pipelines.progress import Progress  # noqa: E402
from pipelines.schema import Member, Video  # noqa: E402

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

UTTERANCE_FRAMES = 39
"""Kept of an utterance of VoxCeleb2: 7.8 s on average (Chung et al. 2018, table 1) at 5 frames a second."""
MEMORY_SECONDS = 8
"""Between two looks at the memory of all processes; a look costs a tenth of a second."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is run."""

    list: str = ""
    """VoxCeleb2-style tree (``txt/IDENTITY/VIDEO/*.txt``) with a ``videos.csv`` whose columns ``video`` and ``file`` name
    the clips. Empty: the drawn corpus of jobs/demo.py, its good videos."""
    clips: str = ""
    """Folder of the clips."""
    copies: int = 6
    """Times that each clip is listed, under other names."""
    turns: int = 2
    """Times that the bare loop and Ray run, one after the other."""
    processes: int = len(os.sched_getaffinity(0))
    """Of the bare loop."""
    skip: float = 0.2
    """Share of the videos of a turn that come before the steady state, and that come after it."""
    folder: str = ""
    """For everything that is written; removed afterwards. Empty: a temporary folder."""


# --- material -------------------------------------------------------------------------------------------------


def lay_out(config: BenchmarkConfig, folder: Path) -> None:
    """``folder/list/txt`` and ``folder/videos``: every clip as often as wanted, copies far from each other in the list."""
    if config.list:
        tree = Path(config.list)
        with (tree / "videos.csv").open() as file:
            files = {row["video"]: Path(config.clips) / row["file"] for row in csv.DictReader(file)}
    else:
        drawn = folder / "drawn"
        demo.make_corpus(drawn, [clip for clip in demo.CORPUS if not clip.wanted])
        tree = drawn / "list"
        files = {path.stem: path for path in (drawn / "videos").iterdir()}
    (folder / "videos").mkdir(parents=True)
    for text in sorted((tree / "txt").glob("*/*/*.txt")):
        identity, video = text.parts[-3:-1]
        for copy in range(config.copies):
            one, other = f"r{copy:03d}{identity}", f"{video}r{copy:03d}"
            place = folder / "list" / "txt" / one / other / text.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text.read_text().replace(identity, one).replace(video, other))
            target = folder / "videos" / f"{other}.mp4"
            if not target.exists():
                shutil.copyfile(files[video], target)


# --- what both sides tell -------------------------------------------------------------------------------------


@dataclass
class Turn:
    """What one side did, video by video."""

    ends: list[tuple[float, int, float]] = field(default_factory=list)
    """(time, kept frames, CPU seconds of all processes so far) as each video was committed."""
    began: float = 0.0
    """When it was begun; Ray starts its actors after that."""
    stages: list[dict[str, float]] = field(default_factory=list)
    """Of each video: seconds by stage; CPU seconds in the bare loop, wall clock under Ray."""
    peak_mib: float = 0.0
    """Most memory of all processes together (sum of PSS)."""
    tree: dict[str, float] = field(default_factory=dict)
    """PSS in MiB by process name at that moment."""

    def steady(self, skip: float) -> slice:
        """Videos that count."""
        edge = int(len(self.ends) * skip)
        return slice(edge, len(self.ends) - edge)

    def rates(self, skip: float) -> dict[str, float]:
        """In the steady state: kept frames and videos a second, CPU seconds a second, kept frames a CPU second."""
        counted = self.ends[self.steady(skip)]
        (began, _, cpu_began), (ended, _, cpu_ended) = counted[0], counted[-1]
        frames = sum(frames for _, frames, _ in counted[1:])
        all_frames = sum(frames for _, frames, _ in self.ends)
        return {
            "seconds": ended - began,
            "frames_per_second": frames / (ended - began),
            "videos_per_second": (len(counted) - 1) / (ended - began),
            "busy_cores": (cpu_ended - cpu_began) / (ended - began),
            "frames_per_cpu_second": frames / (cpu_ended - cpu_began),
            "whole_frames_per_second": all_frames / (self.ends[-1][0] - self.began),
            "whole_frames_per_cpu_second": all_frames / self.ends[-1][2],
        }


def family(own: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started."""
    return [own, *own.children(recursive=True)]


def cpu_seconds(process: psutil.Process, with_children: bool = True) -> float:
    """CPU time of a process, and of its children that have ended and were waited for."""
    return sum(process.cpu_times()[: 4 if with_children else 2])


def family_cpu(own: psutil.Process) -> float:
    """CPU time of a process and of its children."""
    return sum(cpu_seconds(process) for process in family(own))


class Meter:
    """Watches CPU time and memory of this process and of all that it started."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.own = psutil.Process()
        self._seen: dict[psutil.Process, float] = {}
        self._began = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Meter:
        self._began = self._spent()
        self.turn.began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def committed(self, frames: int) -> None:
        """One more video is on disk."""
        self.turn.ends.append((time.perf_counter(), frames, self._spent() - self._began))

    def _spent(self) -> float:
        """CPU seconds of all processes so far. Actors end and leave children behind, so each counts as last seen."""
        with self._lock:
            for process in family(self.own):
                with suppress(psutil.Error):
                    # these two wait for workers, which count themselves
                    waits = process == self.own or process.name() == "raylet"
                    self._seen[process] = cpu_seconds(process, with_children=not waits)
            return sum(self._seen.values())

    def _repeat(self) -> None:
        ticks = 0
        while not self._stop.wait(1.0):
            self._spent()
            ticks += 1
            if ticks % MEMORY_SECONDS:
                continue
            tree: Counter[str] = Counter()
            for process in family(self.own):
                with suppress(psutil.Error):
                    tree[told_name(process)] += process.memory_full_info().pss / 2**20
            if tree.total() > self.turn.peak_mib:
                self.turn.peak_mib = tree.total()
                self.turn.tree = dict(tree)


def told_name(process: psutil.Process) -> str:
    """``ray::MapWorker(...)`` and the like as Ray titles them, else the program's name."""
    command = process.cmdline()
    title = command[0] if command else process.name()
    return title.split("(")[-1].split(")")[0] if title.startswith("ray::") else Path(title).name


# --- the bare loop --------------------------------------------------------------------------------------------


def bare_stages(config: PreprocessConfig) -> dict[str, Callable[..., tuple[Video, list[Member]]]]:
    """The functions of the stages between list and commit, with their networks loaded."""
    window = quality.Window(size=config.crops.size, columns=crops.SCORE_COLUMNS)
    cache = preprocess.cache_uri(config)

    def fetch(video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        return download.fetch(video, config.download, cache), members

    return {
        "download": fetch,
        "tracks": tracks.Tracker(config.tracks).follow,
        "crops": crops.Cropper(config.crops, config.tracks.decoder).crop,
        "identities": identities.IdentityEmbedder(config.identities).embed,
        "quality": quality.Judge(window, config.quality).judge,
        "annotate": annotate.Annotator(config.annotate).annotate,
    }


def work_bare(
    config: PreprocessConfig, videos: Queue[Video | None], done: Queue[dict[str, Any]]
) -> None:
    """One process of the bare loop: video by video through all stages, timed."""
    own = psutil.Process()
    stages = bare_stages(config)
    described = preprocess.describe_windows(config)
    done.put({"ready": True})
    while (video := videos.get()) is not None:
        members: list[Member] = []
        seconds = {}
        before = family_cpu(own)
        for name, stage in stages.items():
            if video.live:
                video, members = stage(video, members)
                now = family_cpu(own)
                seconds[name] = now - before
                before = now
        commit = shards.commit(video, members if video.live else [], config.output, described)
        seconds["commit"] = family_cpu(own) - before
        done.put({"frames": sum(commit.frames[key] for key in commit.slices), "seconds": seconds})


def run_bare(config: PreprocessConfig, processes: int) -> Turn:
    """All videos of the list through the bare loop."""
    context = multiprocessing.get_context("spawn")
    listed = list(preprocess.open_list(config))
    videos: Queue[Video | None] = context.Queue()
    done: Queue[dict[str, Any]] = context.Queue()
    workers = [
        context.Process(target=work_bare, args=(config, videos, done)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        done.get()
    turn = Turn()
    with Meter(turn) as meter:
        for video in [*listed, *[None] * processes]:
            videos.put(video)
        for _ in listed:
            told = done.get()
            meter.committed(told["frames"])
            turn.stages.append(told["seconds"])
        for worker in workers:
            worker.join()
    return turn


# --- Ray ------------------------------------------------------------------------------------------------------


class Witness(Progress):
    """Notes when each video was committed."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(lambda _: None)
        self.meter = meter

    def video(self, row: Mapping[str, Any]) -> None:
        """One video was committed."""
        self.meter.committed(row["frames"])
        self.meter.turn.stages.append(json.loads(row["seconds"]))


def run_ray(config: PreprocessConfig) -> Turn:
    """All videos of the list through the real plan."""
    import ray

    turn = Turn()
    config = preprocess.on_one_machine(config, runtime.own_cores())
    runtime.connect(config.minimum_cpus)
    preprocess.prepare(config)
    with Meter(turn) as meter:
        preprocess.process(config, preprocess.open_list(config), Witness(meter))
    ray.shutdown()
    return turn


# --- the table ------------------------------------------------------------------------------------------------


def stage_table(turns: list[Turn], skip: float) -> Table:
    """CPU seconds of each stage in the bare loop, its share, and how many frames a core gets through it."""
    sums: dict[str, float] = dict.fromkeys(turns[0].stages[0], 0.0)
    frames = 0
    for turn in turns:
        counted = turn.steady(skip)
        frames += sum(count for _, count, _ in turn.ends[counted])
        for told in turn.stages[counted]:
            for name, seconds in told.items():
                sums[name] = sums.get(name, 0.0) + seconds
    total = sum(sums.values())
    table = Table(
        title="bare loop, by stage (CPU seconds, children included)", title_justify="left"
    )
    for column in ("stage", "CPU s", "share", "ms a kept frame", "kept frames a CPU s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    slowest = max(sums, key=lambda name: sums[name])
    for name, seconds in sums.items():
        table.add_row(
            name + (" (bottleneck)" if name == slowest else ""),
            f"{seconds:.1f}",
            f"{seconds / total:.1%}",
            f"{1000 * seconds / frames:.1f}",
            f"{frames / seconds:.1f}",
        )
    table.add_row(
        "all",
        f"{total:.1f}",
        "",
        f"{1000 * total / frames:.1f}",
        f"{frames / total:.2f}",
    )
    return table


def side_table(sides: Mapping[str, list[Turn]], skip: float) -> tuple[Table, dict[str, float]]:
    """Rates of every turn, and by rate the median of Ray over that of the bare loop."""
    table = Table(title="steady state", title_justify="left")
    # fmt: off
    names = (
        "turn", "videos", "s", "kept frames/s", "busy cores", "kept frames/CPU s", "whole turn: frames/s",
        "frames/CPU s", "peak MiB",
    )
    # fmt: on
    for column in names:
        table.add_column(column, justify="left" if column == "turn" else "right")
    medians = {}
    for side, turns in sides.items():
        rates = [turn.rates(skip) for turn in turns]
        for rate, turn in zip(rates, turns, strict=True):
            table.add_row(
                side,
                f"{len(turn.ends[turn.steady(skip)])} of {len(turn.ends)}",
                f"{rate['seconds']:.0f}",
                f"{rate['frames_per_second']:.2f}",
                f"{rate['busy_cores']:.2f}",
                f"{rate['frames_per_cpu_second']:.2f}",
                f"{rate['whole_frames_per_second']:.2f}",
                f"{rate['whole_frames_per_cpu_second']:.2f}",
                f"{turn.peak_mib:,.0f}",
            )
        medians[side] = {name: median(rate[name] for rate in rates) for name in rates[0]}
    return table, {name: value / medians["bare"][name] for name, value in medians["Ray"].items()}


def take_turns(config: BenchmarkConfig, folder: Path) -> Iterator[tuple[str, Turn]]:
    """The bare loop and Ray, each with an output of its own, in turns."""
    preset = replace(PRESETS["laptop"], input=str(folder / "list"), output="")
    preset = replace(
        preset, download=replace(preset.download, from_downloads=str(folder / "videos"))
    )
    for turn in range(config.turns):
        yield (
            "bare",
            run_bare(replace(preset, output=str(folder / f"bare{turn}")), config.processes),
        )
        yield "Ray", run_ray(replace(preset, output=str(folder / f"ray{turn}")))


def main() -> None:
    """Lay out, run, print."""
    config = tyro.cli(BenchmarkConfig, description=__doc__)
    say = runtime.console.print
    sides: dict[str, list[Turn]] = {"bare": [], "Ray": []}
    with tempfile.TemporaryDirectory(
        prefix="headray-bench-", dir=config.folder or None, ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        lay_out(config, folder)
        for side, turn in take_turns(config, folder):
            sides[side].append(turn)
            rates = turn.rates(config.skip)
            told = ", ".join(f"{key} {value:.2f}" for key, value in rates.items())
            say(f"{side}: {len(turn.ends)} videos; {told}; load {os.getloadavg()[0]:.1f}")
    table, ratios = side_table(sides, config.skip)
    say(stage_table(sides["bare"], config.skip))
    say(table)
    say("Ray over the bare loop: " + ", ".join(f"{name} {it:.1%}" for name, it in ratios.items()))
    rate = median(turn.rates(config.skip)["frames_per_cpu_second"] for turn in sides["Ray"])
    say(
        f"{rate * 86400 / UTTERANCE_FRAMES:,.0f} utterances per core and day "
        f"({UTTERANCE_FRAMES} kept frames each); no GPU was used"
    )
    most = max(sides["Ray"], key=lambda turn: turn.peak_mib)
    shown = sorted(most.tree.items(), key=lambda item: -item[1])
    say("memory at its peak, MiB: " + ", ".join(f"{name} {mib:.0f}" for name, mib in shown[:14]))


if __name__ == "__main__":
    main()
