#!/usr/bin/env python
"""Checkpoint → bundle. A training writes its own bundle when it ends; this makes one of any checkpoint that is left.

    python jobs/export.py --run runs/small --output bundles/small
    python jobs/export.py --run runs/small --samples 120000 --output bundles/small-120k

Needs no dataset: the preview is that of the last evaluation before the checkpoint.

Exit codes: 0 done, 2 wrong arguments, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro

from jobs import runtime
from models import bundle
from models.aligner.learner import AlignerLearner, AlignerLearnerConfig
from models.blender.learner import BlenderLearner, BlenderLearnerConfig
from models.motion.learner import MotionLearner, MotionLearnerConfig
from pipelines import checkpoints, journal, storage, tracking
from pipelines.output import CONFIG
from pipelines.training import Learner


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint → a bundle."""

    run: str
    """The --output of a training: a folder or fsspec URI."""
    output: str
    """Bundle to write: a folder or fsspec URI."""
    samples: int = 0
    """Samples seen of the checkpoint that is wanted; 0: the newest."""


PRESETS = {"default": ExportConfig(run=tyro.MISSING, output=tyro.MISSING)}


def aligner(config: Mapping[str, Any]) -> Learner[Any]:
    """The learner of a train_aligner job; what measures its losses is not needed and not loaded."""
    learner = bundle.rebuild(AlignerLearnerConfig, config["learner"])
    has_file = learner.network.identity != "dlib"  # whose weights are in its wheel
    learner = replace(learner, random_init=has_file, vgg="none", vgg_weights=())
    return AlignerLearner(learner, wrap=lambda network: network, device=torch.device("cpu"))


def blender(config: Mapping[str, Any]) -> Learner[Any]:
    """The learner of a train_blender job, without the network that measures its loss; the trunk is in the checkpoint."""
    learner = bundle.rebuild(BlenderLearnerConfig, config["learner"])
    learner = replace(learner, random_init=True, perceptual="none", perceptual_weights=())
    return BlenderLearner(learner, wrap=lambda network: network, device=torch.device("cpu"))


def motion(config: Mapping[str, Any]) -> Learner[Any]:
    """The learner of a train_motion job, without the features that measure its losses."""
    learner = replace(bundle.rebuild(MotionLearnerConfig, config["learner"]), features="none")
    return MotionLearner(learner, wrap=lambda network: network, device=torch.device("cpu"))


LEARNERS: dict[str, Callable[[Mapping[str, Any]], Learner[Any]]] = {
    "train_aligner": aligner,
    "train_blender": blender,
    "train_motion": motion,
}
"""By the name of the job."""


def job() -> None:
    """Parse, find the checkpoint, write the bundle."""
    config = runtime.parse(PRESETS, __doc__ or "")
    run, output = runtime.location("run", config.run), runtime.location("output", config.output)
    if storage.names_below(output) and not storage.exists(storage.join(output, bundle.CARD)):
        runtime.usage(
            f"--output {output}: holds files that are no bundle, a run perhaps; give an empty folder"
        )
    try:
        told = json.loads(storage.read_bytes(storage.join(run, CONFIG)))
        build, written = LEARNERS[told["job"]], told["config"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        runtime.usage(f"--run {run}: not the output of a training ({', '.join(LEARNERS)})")
    try:
        learner = build(written)
    except (ValueError, KeyError, TypeError) as error:
        runtime.usage(f"{storage.join(run, CONFIG)}: of a training of another version ({error})")
    left = [checkpoints.samples_of(name) for name in checkpoints.listed(run)]
    samples = config.samples or max(left, default=0)
    if samples not in left:
        runtime.usage(f"--run {run}: no checkpoint of {samples:,} samples; there are {left}")
    content = checkpoints.read(checkpoints.uri_of(run, samples))
    checkpoints.restore(content, learner)
    lineage = tracking.read_lineage(run)
    card = {
        "model": told["job"].removeprefix("train_"),
        "dataset": vars(lineage) if lineage else {},
        "code": told["code"],
    } | runtime.stage_of(told["config"])
    notes = content["notes"]
    journal.save_bundle(learner, output, card, samples, notes["values"], notes["preview"])
    runtime.console.print(f"bundle   {output}, of {samples:,} samples")


if __name__ == "__main__":
    runtime.main(job)
