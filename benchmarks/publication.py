#!/usr/bin/env python
"""What the driver of jobs/preprocess.py itself holds in mind at a million rows: its list, its keys, and publication.

benchmarks/memory.py runs whole lists through Ray and takes hours for a million. Here the stages and the disk are dummies: every
video of a real list of that length is already committed, commits come out of a generator with the fields of real ones, and
shards are planned but not packed. What remains is the driver's own code, unchanged: reading the list, finding what is left to do, the
identity filter, copies, twins and split, the plan of all shards, index, ledger and manifest. The report, which shows pictures of
real shards, is left out.

    python benchmarks/publication.py --rows 10000 100000 1000000
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

from benchmarks.memory import EMBEDDING, FRAMES, Watch, finished  # noqa: E402
from jobs import preprocess as job  # noqa: E402
from pipelines import memory, preprocess, report, shards  # noqa: E402
from pipelines.preprocess import PreprocessConfig  # noqa: E402
from pipelines.progress import Progress  # noqa: E402
from pipelines.schema import Cause, Video, reject  # noqa: E402
from pipelines.shards import Commit, ShardPlan, ShardsConfig  # noqa: E402

BYTES_PER_FRAME = 59_600
"""Of pipelines/forecast.py, so that the number of shards is that of a real dataset."""


@dataclass(frozen=True, kw_only=True)
class PublicationConfig:
    """Lists to publish."""

    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Videos of each list."""
    videos_per_identity: int = 25
    """As in VoxCeleb2: 150,000 videos of 6,112 people."""
    gone: float = 0.3
    """Share of the videos that were rejected."""
    child: bool = False
    """One list in this process, the answer on the last line."""


class Dummies:
    """Commits of a list of so many rows, made when they are asked for."""

    def __init__(self, config: PublicationConfig) -> None:
        self.config = config
        (self.rows,) = config.rows
        video, _ = finished(Video(identity="id", video="v0"), b"")
        (self.track,) = video.tracks
        self.video = video
        self.plans: Sequence[ShardPlan] = ()
        self.numbers: dict[str, int] = {}
        """Of each plan, by its digest."""

    def identity(self, number: int) -> str:
        """Who is in a video."""
        return f"id{number // self.config.videos_per_identity:06d}"

    def key(self, number: int) -> str:
        """Of a video."""
        return f"{self.identity(number)}-v{number:07d}"

    def commit(self, key: str) -> Commit:
        """One track that nobody else has, or a rejected video."""
        identity, _, name = key.partition("-")
        number = int(name[1:])
        url = f"https://www.youtube.com/watch?v={name}"
        if number % 10 < 10 * self.config.gone:
            gone = reject(
                replace(self.video, identity=identity, video=name, url=url, tracks=()),
                Cause.TAKEDOWN,
            )
            return Commit(video=gone, tar_sha256="", slices={}, frames={})
        random = np.random.default_rng(number)
        person = np.random.default_rng(int(identity[2:])).normal(size=EMBEDDING)
        vector = person + 0.2 * random.normal(size=EMBEDDING)
        hashes = tuple((time, 0.5, 0.4, random.bytes(32).hex()) for time in self.track.times)
        embedding = tuple((vector / np.linalg.norm(vector)).tolist())
        track = replace(self.track, embedding=embedding, hashes=hashes)
        sha256 = hashlib.sha256(key.encode()).hexdigest()
        video = replace(
            self.video, identity=identity, video=name, url=url, tracks=(track,), sha256=sha256
        )
        sample = video.track_key(track)
        length = FRAMES * BYTES_PER_FRAME
        return Commit(
            video=video, tar_sha256=sha256, slices={sample: (0, length)}, frames={sample: FRAMES}
        )

    def committed(self, output: str) -> Iterator[tuple[str, str]]:  # noqa: ARG002
        """In the place of :func:`shards.committed`: every video is done."""
        return ((self.key(number), "done") for number in range(self.rows))

    def load(self, _: str, keys: Iterable[str], __: int = 16) -> Iterator[Commit]:
        """In the place of :func:`shards.load_commits`."""
        return map(self.commit, keys)

    def pack(
        self, plans: Sequence[ShardPlan], _: str, __: ShardsConfig
    ) -> Iterator[dict[str, Any]]:
        """In the place of :func:`shards.pack_all`: nothing is packed."""
        self.plans = plans
        for number in range(len(plans)):
            plan = plans[number]
            self.numbers[plan.digest] = number
            yield {
                "name": f"{plan.split}-{plan.bucket:05d}-{plan.digest[:8]}.tar",
                "split": plan.split,
                "bytes": sum(item.length for item in plan.slices),
                "sha256": plan.digest,
                "samples": len(plan.slices),
                "digest": plan.digest,
            }

    def record(self, digest: str, _: str) -> Mapping[str, Any]:
        """In the place of :func:`shards.packed_record`: the rows of a shard's index."""
        plan = self.plans[self.numbers[digest]]
        members = [f"{index:06d}.jpg" for index in range(FRAMES)]
        samples = [
            {
                "key": item.key, "identity": item.part.split("-")[0], "video": item.part, "track": "000", "frames": FRAMES,
                "url": "https://www.youtube.com/watch?v=", "start": 0.0, "end": 2.4, "fps": 25.0, "scores": {"score": 1.0},
                "members": members, "offsets": [place * BYTES_PER_FRAME for place in range(FRAMES)],
                "sizes": [BYTES_PER_FRAME] * FRAMES,
            }
            for item in plan.slices
        ]  # fmt: skip
        return {"name": plan.split, "split": plan.split, "samples": samples}


def run_one(config: PublicationConfig, folder: Path) -> dict[str, Any]:
    """Publish one list in this process; what it took."""
    dummies = Dummies(config)
    with (folder / "list.jsonl").open("w") as file:
        for number in range(dummies.rows):
            identity, _, video = dummies.key(number).partition("-")
            url = f"https://www.youtube.com/watch?v={video}"
            file.write(json.dumps({"identity": identity, "video": video, "url": url}) + "\n")
    wanted: PreprocessConfig = replace(
        job.PRESETS["voxceleb2"], input=str(folder / "list.jsonl"), output=str(folder / "dataset")
    )
    shards.committed = dummies.committed
    shards.load_commits = dummies.load  # type: ignore[assignment]
    shards.pack_all = dummies.pack  # type: ignore[assignment]
    shards.packed_record = dummies.record  # type: ignore[assignment]
    report.write = lambda *_: None
    memory.hold_little()  # as the job does
    started = time.perf_counter()
    with Watch() as watch, Progress(lambda _: None) as progress:
        videos = preprocess.open_list(wanted)
        listed, _, _ = preprocess.process(wanted, videos, progress)
        processed = time.perf_counter() - started
        peak_processing = watch.peak_mib
        manifest, _ = preprocess.publish(wanted, listed, progress)
    counts = manifest["counts"]
    return {
        "rows": dummies.rows,
        "seconds": round(time.perf_counter() - started, 1),
        "list_seconds": round(processed, 1),
        "list_mib": round(peak_processing),
        "driver_mib": round(watch.peak_mib),
        "identities": counts["identities"]["published"],
        "samples": counts["tracks"].get("published", 0),
        "shards": len(manifest["shards"]),
        "manifest_mib": round((folder / "dataset" / "dataset.json").stat().st_size / 2**20, 2),
        "index_mib": round((folder / "dataset" / "index.parquet").stat().st_size / 2**20, 1),
        "ledger_mib": round((folder / "dataset" / shards.LEDGER).stat().st_size / 2**20, 1),
    }


def main() -> None:
    """Every list in a process of its own, a line of JSON for each."""
    config = tyro.cli(PublicationConfig, description=__doc__)
    if config.child:
        with tempfile.TemporaryDirectory(prefix="headray-publication-") as folder:
            print("\n" + json.dumps(run_one(config, Path(folder))))
        return
    for rows in config.rows:
        command = [sys.executable, __file__, "--child", "--rows", str(rows)]
        command += [
            "--videos-per-identity",
            str(config.videos_per_identity),
            "--gone",
            str(config.gone),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{rows} rows: {done.stdout[-2000:]}")
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
