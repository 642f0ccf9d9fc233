"""The same swap over Ray: videos are followed, and parts of videos repainted, by whoever is free.

    targets ──▶ plan ──▶ parts ──▶ repaint ──▶ join      Ray Data; a row is a video, then a part of one
                follow             a GPU each   the driver

Plans and parts travel as files in ``OUTPUT.work``, where every worker can write and read, not through the object store: a part of
a 1080-line video is a gigabyte of pictures before it is encoded. The driver joins what :mod:`pipelines.swap` would have made.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from pipelines import storage
from pipelines.output import ConfigError, NothingUsableError
from pipelines.swap import (
    Loaded,
    Made,
    Plan,
    SwapConfig,
    add_seconds,
    check_outputs,
    finish,
    load,
    make_plan,
    render_part,
    require_file,
    summarise,
    write_preview,
)
from pipelines.video import VideoInfo

PLAN = "plan.npz"

Row = dict[str, Any]


def work_of(output: str) -> str:
    """Folder of what waits to be joined."""
    return f"{output}.work"


def write_plan(plan: Plan, uri: str) -> None:
    """To a file that :func:`read_plan` reads."""
    told = {
        "info": asdict(plan.info),
        "times": plan.times,
        "causes": plan.causes,
        "damage": plan.damage,
    }
    with tempfile.TemporaryDirectory(prefix="headray-") as folder:
        made = Path(folder, PLAN)
        np.savez(made, told=json.dumps(told), matrices=plan.matrices, landmarks=plan.landmarks)
        storage.put_file(made, uri)


def read_plan(uri: str) -> Plan:
    """What :func:`write_plan` wrote."""
    with storage.local_file(uri) as path, np.load(path, allow_pickle=False) as content:
        told = json.loads(str(content["told"]))
        return Plan(
            info=VideoInfo(**told.pop("info")),
            matrices=content["matrices"],
            landmarks=content["landmarks"],
            **told,
        )


class Planner:
    """Follows the face of a video, and says which parts there are."""

    def __init__(self, config: SwapConfig, size: int) -> None:
        """For windows of ``size`` pixels."""
        cv2.setNumThreads(1)
        self.config, self.size = config, size

    def __call__(self, row: Row) -> Iterator[Row]:
        """A target → its parts; one row with an error where there are none."""
        began = time.perf_counter()
        target, output = row["target"], row["output"]
        blank = {"target": target, "output": output, "error": "", "is_usage": False}
        try:
            with storage.local_file(target) as path:
                require_file(target, path)
                plan = make_plan(self.config, path, self.size, target)
        except (ConfigError, NothingUsableError) as error:
            is_usage = isinstance(error, ConfigError)
            yield blank | {
                "error": str(error), "is_usage": is_usage, "first": 0, "stop": 0, "parts": 0, "follow": 0.0,
            }  # fmt: skip
            return
        write_plan(plan, storage.join(work_of(output), PLAN))
        parts = plan.parts(self.config.part_frames)
        follow = time.perf_counter() - began
        for frames in parts:
            share = follow / len(parts)
            yield blank | {
                "first": frames.start, "stop": frames.stop, "parts": len(parts), "follow": share,
            }  # fmt: skip


class Renderer:
    """Holds the networks for the life of an actor, and repaints parts."""

    def __init__(self, config: SwapConfig) -> None:
        cv2.setNumThreads(1)
        self.config = config
        self.worker = f"{platform.node()}:{os.getpid()}"
        self.loaded: Loaded = load(config)

    def __call__(self, row: Row) -> Row:
        """A part → the same row with where its file is, and what each step took."""
        if row["error"]:
            return row | {"part": "", "seconds": "{}", "worker": self.worker}
        output, first = row["output"], int(row["first"])
        work = work_of(output)
        plan = read_plan(storage.join(work, PLAN))
        name = f"{first:09d}{Path(output).suffix}"
        with (
            storage.local_file(row["target"]) as path,
            tempfile.TemporaryDirectory(prefix="headray-") as folder,
        ):
            frames = range(first, int(row["stop"]))
            made = Path(folder, name)
            part = render_part(self.config, self.loaded, plan, path, frames, made)
            storage.put_file(made, storage.join(work, name))
        for index, content in part.strips.items():
            storage.write_atomic(storage.join(work, f"{index:09d}.jpg"), content)
        seconds = part.seconds | {"follow": row["follow"]}
        return row | {"part": name, "seconds": json.dumps(seconds), "worker": self.worker}


def swap(config: SwapConfig, say: Callable[[str], None] = lambda _: None) -> list[Made]:
    """Make all outputs with ``config.workers`` Ray workers. Ray must be connected.

    Raises:
        ConfigError, NothingUsableError, WeightsError: as :func:`pipelines.swap.swap`.
    """
    import ray
    import ray.data

    check_outputs(config)
    loaded = load(
        config, say
    )  # whatever is wrong with bundles and sources is said before workers start
    targets = zip(config.target, config.outputs, strict=True)
    rows = [{"target": target, "output": output} for target, output in targets]
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    planners = min(config.workers, len(rows))
    parts = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .flat_map(
            Planner,
            fn_constructor_kwargs={"config": config, "size": loaded.swapper.size},
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=planners),
            num_cpus=0.5,
        )
        .repartition(target_num_rows_per_block=1)
        .map(
            cast(Any, Renderer),
            fn_constructor_kwargs={"config": config},
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=config.workers,
                max_size=config.workers,
                max_tasks_in_flight_per_actor=2,  # a part takes minutes: no worker hoards them
            ),
            num_cpus=0.5,
            num_gpus=1 if has_gpu else 0,
        )
    )
    began = time.perf_counter()
    waiting: dict[str, list[Row]] = {}
    made: list[Made] = []
    errors: list[Row] = []
    for row in parts.iter_rows():
        if row["error"]:
            if len(config.target) > 1:
                say(f"not made: {row['error']}")
            errors.append(row)
            continue
        rendered = waiting.setdefault(row["output"], [])
        rendered.append(row)
        say(f"{row['output']}: {len(rendered)} of {row['parts']} parts, by {row['worker']}")
        if len(rendered) == row["parts"]:
            made.append(gather(config, loaded, waiting.pop(row["output"]), began))
    if not made:
        kind = ConfigError if errors[0]["is_usage"] else NothingUsableError
        raise kind(errors[0]["error"])
    return sorted(made, key=lambda each: config.outputs.index(each.output))


def gather(config: SwapConfig, loaded: Loaded, rows: list[Row], began: float) -> Made:
    """Join the parts of one output, and remove them."""
    target, output = rows[0]["target"], rows[0]["output"]
    work = work_of(output)
    plan = read_plan(storage.join(work, PLAN))
    seconds: dict[str, float] = {}
    for row in rows:
        add_seconds(seconds, json.loads(row["seconds"]))
    made = summarise(target, output, plan, seconds, time.perf_counter() - began)
    with ExitStack() as opened:
        path = opened.enter_context(storage.local_file(target))
        names = sorted(row["part"] for row in rows)
        files = [
            opened.enter_context(storage.local_file(storage.join(work, name))) for name in names
        ]
        finish(config, plan, path, files, made, loaded.bundles)
    if config.preview:
        strips = {
            int(Path(name).stem): storage.read_bytes(storage.join(work, name))
            for name in storage.names_below(work)
            if name.endswith(".jpg")
        }
        write_preview(output, plan, strips, has_source=loaded.source is not None)
    storage.remove(work)
    return made
