#!/usr/bin/env python
"""Does the driver, or the object store, grow with the list? Lists of 100 to 100,000 rows through the real job.

Each list is preprocessed by ``jobs.preprocess`` itself in a process of its own: reading the list, Ray Data's plan with its
seven pools of actors, commits, the identity filter, packing, index, ledger, report, MLflow. Only what the stages *do* is
replaced: the download answers at once with a finished track of a few tiny pictures, drawn from the row's key, and the
stages after it hand the row on. So every row is downloaded, committed, indexed and published, and none is looked at.

    python benchmarks/memory.py --rows 100 1000 10000 100000
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import psutil
import tyro
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

from jobs import preprocess as job  # noqa: E402
from jobs import runtime  # noqa: E402
from pipelines import crops, preprocess, quality  # noqa: E402
from pipelines.preprocess import PreprocessConfig  # noqa: E402
from pipelines.schema import (  # noqa: E402
    Member,
    Track,
    Video,
    VideoRow,
    add_actors,
    frame_member,
    npy_bytes,
    run_stage,
)
from pipelines.shards import ShardsConfig  # noqa: E402

if TYPE_CHECKING:
    from ray.data import Dataset

FRAMES = 12
"""Of each track."""
PICTURE_PX = 32
VIDEOS_PER_IDENTITY = 20
EMBEDDING = 128
"""Numbers, as many as dlib's."""
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Lists to run, and how."""

    rows: tuple[int, ...] = (100, 1000, 10_000, 100_000)
    """Videos of each list."""
    videos_per_block: int = 1
    """Videos that travel together through the plan."""
    window: int = 2000
    """Videos per plan."""
    shard_mb: float = 16.0
    """MiB; the dummies are small, so this holds as many samples as a shard in production, some hundred."""
    gone: float = 0.3
    """Share of the videos that the dummy download rejects as not found."""
    folder: str = ""
    """For lists and datasets, which are removed afterwards. Empty: a temporary folder."""
    child: bool = False
    """One list in this process, below ``folder``, the answer on the last line: what the command calls for each of
    ``rows``. Interrupted, the same command goes on, as the job does."""


# --- the dummies ----------------------------------------------------------------------------------------------


def finished(video: Video, picture: bytes) -> tuple[Video, list[Member]]:
    """The video as the stages leave it: one track with landmarks, windows, embedding, scores and hashes."""
    random = np.random.default_rng(list(video.key.encode()))
    person = np.random.default_rng(list(video.identity.encode())).normal(size=EMBEDDING)
    vector = person + 0.2 * random.normal(size=EMBEDDING)
    columns = [*crops.SCORE_COLUMNS, *quality.SCORE_COLUMNS]
    times = tuple(round(0.2 * index, 3) for index in range(FRAMES))
    track = Track(
        name="000",
        span="00001",
        times=times,
        indices=tuple(range(0, 5 * FRAMES, 5)),
        boxes=((100.0, 100.0, 300.0, 300.0),) * FRAMES,
        box_scores=(1.0,) * FRAMES,
        scores=dict.fromkeys(columns, 1.5) | {"window_side": 512.0, "same_person": 0.9},
        embedding=tuple((vector / np.linalg.norm(vector)).round(6).tolist()),
        hashes=tuple((time, 0.5, 0.4, random.bytes(32).hex()) for time in times),
    )
    key = video.track_key(track)
    arrays = {
        "landmarks.npy": np.zeros((FRAMES, 68, 2), np.float32),
        "matrix.npy": np.zeros((FRAMES, 2, 3), np.float32),
        "scores.npy": np.zeros((FRAMES, len(columns)), np.float32),
        "embedding.npy": np.zeros((FRAMES, EMBEDDING), np.float32),
    }
    members = [(f"{key}.{name}", npy_bytes(array)) for name, array in arrays.items()]
    members += [(frame_member(key, index), picture) for index in track.indices]
    probe = {"duration": 10.0, "fps": 25.0, "width": 1920, "height": 1080}
    sha256 = random.bytes(32).hex()
    video = replace(video, tracks=(track,), sha256=sha256, size=10**6, probe=probe)
    return video, members


class Dummy:
    """Actor in a stage's place."""

    def __init__(self, name: str, gone: float) -> None:
        self.name = name
        self.gone = gone
        grey = np.arange(PICTURE_PX**2, dtype=np.uint8).reshape(PICTURE_PX, PICTURE_PX)
        self.picture: bytes = cv2.imencode(".jpg", grey)[1].tobytes()

    def __call__(self, row: VideoRow) -> VideoRow:
        """One video."""
        return run_stage(self.name, self.work, row)

    def work(self, video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        """What the stage does to an unpacked row."""
        if self.name != "download":
            return video, members
        if int(video.video.removeprefix("v")) % 100 < 100 * self.gone:
            return preprocess.shards.reject(video, preprocess.shards.Cause.TAKEDOWN), []
        return finished(video, self.picture)


def dummy_adders(gone: float, config: PreprocessConfig) -> dict[str, Callable[[Dataset], Dataset]]:
    """As :func:`pipelines.preprocess.stage_adders`, with as many pools of the same resources."""
    names = ("download", "tracks", "crops", "identities", "quality", "annotate")
    return {
        name: partial(
            add_actors, actor=Dummy, resources=getattr(config, name).resources, name=name, gone=gone
        )
        for name in names
    }


# --- measuring ------------------------------------------------------------------------------------------------


class Watch:
    """Samples this process and Ray's object store until it is stopped."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        """Anonymous memory of the driver: its own, without the pages of libraries and files."""
        self.store_mib = 0.0
        """Shared memory that the raylet has touched: pages of the object store, which are kept once used."""
        self.marks: list[tuple[float, float]] = []
        """(seconds, MiB) of the driver every 10 s."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._started = time.perf_counter()

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _repeat(self) -> None:
        own = psutil.Process()
        raylet = 0
        while not self._stop.wait(SAMPLE_SECONDS):
            now = resident_mib(own.pid, "RssAnon")
            self.peak_mib = max(self.peak_mib, now)
            passed = time.perf_counter() - self._started
            if not self.marks or passed - self.marks[-1][0] >= 10:
                self.marks.append((round(passed), round(now)))
                told = (
                    f"{passed:.0f} s: driver {now:.0f} MiB, object store {self.store_mib:.0f} MiB"
                )
                print(told, file=sys.stderr, flush=True)
            with suppress(psutil.Error, FileNotFoundError, ValueError):
                raylet = raylet or find_raylet(own)
                if raylet:
                    self.store_mib = max(self.store_mib, resident_mib(raylet, "RssShmem"))


def find_raylet(own: psutil.Process) -> int:
    """Number of the process that holds the object store, 0 before it is there."""
    return next((child.pid for child in own.children() if child.name() == "raylet"), 0)


def resident_mib(pid: int, kind: str) -> float:
    """Memory of one kind that a process has in use, MiB: ``RssAnon``, ``RssFile`` or ``RssShmem``."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{pid}/status has no {kind}")


def run_one(config: MemoryConfig) -> dict[str, Any]:
    """Preprocess one list in this process; what it took."""
    (rows,) = config.rows
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # MLflow's default store is the working directory
    with (folder / "list.jsonl").open("w") as file:
        for number in range(rows):
            identity = f"id{number // VIDEOS_PER_IDENTITY:06d}"
            url = f"http://127.0.0.1:9/{number:07d}.mp4"
            row = {"identity": identity, "video": f"v{number:07d}", "url": url}
            file.write(json.dumps(row) + "\n")
    preset = job.PRESETS["laptop"]
    wanted = replace(
        preset,
        input=str(folder / "list.jsonl"),
        output=str(folder / "dataset"),
        window=config.window,
        videos_per_block=config.videos_per_block,
        shards=ShardsConfig(target_mb=config.shard_mb),
    )
    preprocess.stage_adders = partial(dummy_adders, config.gone)
    started = time.perf_counter()
    before = resident_mib(os.getpid(), "RssAnon")
    with Watch() as watch:
        job.make(wanted)
    told = json.loads((folder / "dataset" / "dataset.json").read_text())
    used = os.times()
    return {
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "driver_cpu_seconds": round(used.user + used.system, 1),
        "imported_mib": round(before),
        "driver_mib": round(watch.peak_mib),
        "store_mib": round(watch.store_mib),
        "published": told["counts"]["tracks"]["published"],
        "frames": told["counts"]["frames"]["published"],
        "marks": watch.marks,
    }


def main() -> None:
    """Run every list in a process of its own and print a line for each."""
    config = tyro.cli(MemoryConfig, description=__doc__)
    if config.child:
        print("\n" + json.dumps(run_one(config)))
        return
    table = Table(title="memory of the driver and of the object store", title_justify="left")
    for column in (
        "rows",
        "published",
        "s",
        "s per 1,000",
        "driver CPU s",
        "driver MiB",
        "store MiB",
    ):
        table.add_column(column, justify="right")
    for rows in config.rows:
        with tempfile.TemporaryDirectory(
            prefix="headray-memory-", dir=config.folder or None
        ) as folder:
            command = [sys.executable, __file__, "--child", "--rows", str(rows)]
            command += ["--videos-per-block", str(config.videos_per_block)]
            command += [
                "--window",
                str(config.window),
                "--gone",
                str(config.gone),
                "--folder",
                folder,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{rows} rows: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        told = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(told), flush=True)
        table.add_row(
            f"{told['rows']:,}",
            f"{told['published']:,}",
            f"{told['seconds']:.0f}",
            f"{told['seconds'] / told['rows'] * 1000:.0f}",
            f"{told['driver_cpu_seconds']:.0f}",
            f"{told['driver_mib']:,}",
            f"{told['store_mib']:,}",
        )
    runtime.console.print(table)


if __name__ == "__main__":
    main()
