#!/usr/bin/env python
"""Before money is spent: is everything there that a run will need, on every node?

    python jobs/doctor.py preprocess --output s3://bucket/vox2
    python jobs/doctor.py train --output s3://bucket/runs/base
    ray job submit --working-dir . -- python jobs/doctor.py train --output s3://bucket/runs/base --gpus 8

One line for each thing tried: the weights, the cookies, one video fetched (the canary), writing to the output, MLflow, disk,
clock and versions of every node, and an all-reduce between all GPUs. What is wrong comes with its cure. On a cluster that
starts its nodes when they are asked for, they are asked for here; they stay for some minutes.

Exit codes: 0 all is well, 2 something is missing or wrong, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import tyro

from jobs import runtime
from pipelines import nodes, preflight, storage, tracking
from pipelines.download import DownloadConfig
from pipelines.preflight import Finding, Needs


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What the run will need."""

    output: str
    """Where the run will write: a folder or fsspec URI. Nothing stays there."""
    weights: tuple[str, ...] = ()
    """Names of the weights files that the run will load (models/frozen/weights.py). What is missing is downloaded to each
    node, as the run would do."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """Cookies, proxy and canary of the downloads; an empty canary fetches nothing."""
    gpus: int = 0
    """GPUs that the training will use: asked for, and tried together over NCCL."""
    ranks: int = 0
    """Without GPUs: processes that the training will use, tried together over gloo."""
    min_disk_gb: float = 50.0
    """Free disk that every node should have, GB."""
    max_clock_seconds: float = 5.0
    """That the clock of a node may differ from the driver's."""
    patience_seconds: float = 900.0
    """How long nodes may take to come, and to answer."""

    def __post_init__(self) -> None:
        if self.gpus < 0 or self.ranks < 0 or self.patience_seconds <= 0:
            raise ValueError(
                f"gpus and ranks cannot be negative and patience_seconds must be positive, got {self.gpus}, {self.ranks}, "
                f"{self.patience_seconds:g}"
            )
        if self.gpus and self.ranks:
            raise ValueError(f"gpus {self.gpus} and ranks {self.ranks}: give one")


PRESETS = {
    # The networks of jobs/preprocess.py, and the first video that was ever on YouTube.
    "preprocess": DoctorConfig(
        output=tyro.MISSING,
        weights=("dlib_landmarks", "dlib_mmod", "dlib_descriptor"),
        download=DownloadConfig(canary="jNQXAC9IVRw"),
    ),
    # The networks of jobs/train_aligner.py base.
    "train": DoctorConfig(
        output=tyro.MISSING,
        weights=("vgg19", "ir_se50"),
        gpus=8,
    ),
}


def job() -> None:
    """Try everything, tell, and end with 2 if anything is wrong."""
    config = runtime.parse(PRESETS, __doc__ or "")
    config = replace(config, output=runtime.location("output", config.output))
    runtime.connect(max(1, config.ranks, config.download.resources.num_cpus))
    findings = []
    for finding in examine(config):
        findings.append(finding)
        state = "ok  " if finding.good else "FAIL"
        runtime.console.print(f"{state}  {finding.place:<24} {finding.what:<9} {finding.told}")
    bad = [finding for finding in findings if not finding.good]
    if bad:
        runtime.usage(
            f"{len(bad)} of {len(findings)} checks failed; the lines with FAIL say what to do"
        )
    runtime.console.print(f"all {len(findings)} checks are well")


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Everything, one after the other: what one process can tell first, then nodes, then what they do together."""
    yield examine_tracking(config.output)
    ready = preflight.await_workers(config.gpus, config.patience_seconds)
    yield ready
    if config.download.canary and (ready.good or config.gpus):
        yield preflight.examine_canary(config.download, config.patience_seconds)
    token = uuid.uuid4().hex
    place = preflight.token_uri(config.output, "driver")
    # what the driver cannot write, no node can read: they tell
    with suppress(Exception):
        storage.write_atomic(place, token.encode())
    needs = Needs(
        output=config.output,
        weights=config.weights,
        download=config.download,
        min_disk_gb=config.min_disk_gb,
        token=token,
        versions=preflight.versions(),
    )
    yield from preflight.examine_nodes(needs, config.max_clock_seconds, config.patience_seconds)
    with suppress(Exception):
        storage.remove(place)
    if config.gpus + config.ranks and ready.good:
        yield preflight.examine_links(
            config.gpus or config.ranks, bool(config.gpus), config.patience_seconds
        )


def examine_tracking(output: str) -> Finding:
    """A run that is begun, given a number and ended, as every job will do."""
    told = {"place": "driver", "what": "mlflow"}
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri and len(nodes.alive()) > 1:
        cure = "MLFLOW_TRACKING_URI is not set, and a training on several nodes needs a server (infra/mlflow)"
        return Finding(**told, good=False, told=cure)
    if not uri:
        return Finding(**told, good=True, told="no server; jobs will record into files")
    if trouble := tracking.find_trouble(uri):
        return Finding(**told, good=False, told=trouble)
    store = tracking.find_store(output, runtime.submitted())
    tags = tracking.run_tags("doctor", "jobs/doctor.py", runtime.code_version()["commit"])
    with tracking.open_run(store, "headray-doctor", {}, tags) as run:
        run.metrics({"well": 1.0})
        run.record({"versions": preflight.versions()}, "versions.json")
    if run.trouble:
        return Finding(**told, good=False, told=f"answers, but does not take a run: {run.trouble}")
    return Finding(**told, good=True, told=f"took a run with an artifact; {store.show}")


if __name__ == "__main__":
    runtime.main(job)
