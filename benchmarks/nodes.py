#!/usr/bin/env python
"""Does the plan of jobs/preprocess.py use two and four nodes as well as one?

The nodes are Ray nodes on this machine, each with some logical CPUs. The real plan of seven pools runs on them, with stages that
wait instead of working: as long as each stage was measured to take for a video (benchmarks/README.md, run A), so that a machine
with few cores can stand for many. What is measured is everything that is not the stages' own work: Ray Data's scheduling, growing
of pools, rows that travel between nodes, commits. Videos a second in the steady state, between the first and the last fifth.

    python benchmarks/nodes.py --nodes 1 2 4
    python benchmarks/nodes.py --nodes 1 2 4 --pools growing      # as on a cluster that an autoscaler may enlarge
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

from benchmarks.memory import finished  # noqa: E402
from jobs import preprocess as job  # noqa: E402
from pipelines import nodes, preprocess  # noqa: E402
from pipelines.preprocess import PreprocessConfig  # noqa: E402
from pipelines.schema import (  # noqa: E402
    Member,
    StageResources,
    Video,
    VideoRow,
    add_actors,
    run_stage,
)

if TYPE_CHECKING:
    from ray.data import Dataset

SECONDS = {
    "download": 0.63,
    "tracks": 0.94,
    "crops": 0.79,
    "identities": 1.21,
    "quality": 0.02,
    "annotate": 0.53,
}
"""CPU seconds of a video in each stage: run A, 98 videos."""


@dataclass(frozen=True, kw_only=True)
class NodesConfig:
    """Clusters to try."""

    nodes: tuple[int, ...] = (1, 2, 4)
    """Worker nodes of each; a head without CPUs comes on top."""
    cpus: int = 6
    """Logical CPUs of a node."""
    videos_per_node: int = 60
    """Length of the list."""
    picture_kb: int = 300
    """Of what a row carries from stage to stage, at least."""
    start_seconds: float = 2.0
    """That an actor takes to begin: networks to load."""
    pools: Literal["sized", "growing"] = "sized"
    """As the job has them where a cluster cannot grow, or from one actor each."""


class Waiting:
    """Actor in a stage's place: waits as long as the stage works."""

    def __init__(self, name: str, payload: int, start_seconds: float) -> None:
        self.name = name
        self.payload = payload
        time.sleep(start_seconds)

    def __call__(self, row: VideoRow) -> VideoRow:
        """One video."""
        return run_stage(self.name, self.work, row)

    def work(self, video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        """What the stage does to an unpacked row."""
        time.sleep(SECONDS[self.name])
        if self.name == "download":
            return finished(video, os.urandom(self.payload))
        return video, members


def waiting_adders(
    payload: int, start_seconds: float, config: PreprocessConfig
) -> dict[str, Callable[[Dataset], Dataset]]:
    """As :func:`pipelines.preprocess.stage_adders`, with actors that wait."""
    return {
        name: partial(
            add_actors,
            actor=Waiting,
            resources=getattr(config, name).resources,
            name=name,
            payload=payload,
            start_seconds=start_seconds,
        )
        for name in SECONDS
    }


def config_for(config: NodesConfig, output: str, rooms: list[float]) -> PreprocessConfig:
    """Of a run: a CPU for each actor that waits, so that waiting is what a CPU does, and none for the two that cost nothing."""
    wanted = replace(job.PRESETS["laptop"], input="list", output=output)
    for name in preprocess.SHARES:
        stage = getattr(wanted, name)
        busy = SECONDS.get(name, 0) > 0.1
        most = 64 if busy else 4
        pool = StageResources(num_cpus=float(busy), memory_gb=0.01, max_actors=most)
        wanted = replace(wanted, **{name: replace(stage, resources=pool)})
    return preprocess.on_fixed_cluster(wanted, rooms) if config.pools == "sized" else wanted


def run_one(config: NodesConfig, num_nodes: int, folder: Path) -> dict[str, Any]:
    """One cluster, one list; videos a second."""
    import ray
    from ray.cluster_utils import Cluster

    size: dict[str, Any] = {"object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **size})
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=config.cpus, **size)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    count = config.videos_per_node * num_nodes
    videos = [
        Video(identity=f"id{n // 20:04d}", video=f"v{n:05d}", url="http://127.0.0.1:9/")
        for n in range(count)
    ]
    wanted = config_for(config, str(folder / f"out{num_nodes}"), nodes.rooms())
    preprocess.configure_ray_data(wanted)
    payload = config.picture_kb * 1024 // 12
    preprocess.stage_adders = partial(waiting_adders, payload, config.start_seconds)
    started = time.perf_counter()
    ends = [
        time.perf_counter() - started for _ in preprocess.build_plan(videos, wanted).iter_rows()
    ]
    ray.shutdown()
    cluster.shutdown()
    first, last = ends[count // 5], ends[-count // 5]
    rate = (count - 2 * (count // 5)) / (last - first)
    ideal = num_nodes * config.cpus / sum(SECONDS.values())
    return {
        "nodes": num_nodes,
        "pools": [getattr(wanted, name).resources.first_actors for name in SECONDS],
        "videos": count,
        "seconds": round(ends[-1], 1),
        "first_s": round(ends[0], 1),
        "videos_per_s": round(rate, 2),
        "of_ideal": round(rate / ideal, 2),
    }


def main() -> None:
    """A line of JSON for each cluster, with its efficiency against the first."""
    config = tyro.cli(NodesConfig, description=__doc__)
    base = 0.0
    with tempfile.TemporaryDirectory(prefix="headray-nodes-") as folder:
        for num_nodes in config.nodes:
            told = run_one(config, num_nodes, Path(folder))
            base = base or told["videos_per_s"] / told["nodes"]
            told["efficiency"] = round(told["videos_per_s"] / told["nodes"] / base, 2)
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
