#!/usr/bin/env python
"""Dataset → how much each layer counts when features are compared (the λ_l of HeSer's equations (2) and (6)).

    python jobs/calibrate.py base --dataset data/mine --output weights.json
    python jobs/train_aligner.py base --dataset data/mine --output runs/base --calibration weights.json
    python jobs/calibrate.py blender-paper --dataset data/mine --output blender.json

A preset is one of train_aligner.py, or one of train_blender.py with "blender-" before its name.

The supplement says that λ_l "balances the terms" and gives no numbers. Measured on real pictures of the dataset, once: a layer's
weight is one over its mean magnitude, so that every layer of a network counts the same. The numbers become part of the
training's configuration, and so of its checkpoints and bundles.

Exit codes: 0 done, 2 wrong arguments or dataset, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import dataclasses
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from typing import TypeVar

import torch
import tyro
from rich.progress import track

from jobs import runtime, train_aligner, train_blender
from models.aligner.learner import AlignerLearnerConfig, calibrated
from models.blender.learner import PERCEPTUAL_LAYERS, BlenderLearnerConfig, calibrate
from pipelines import shards, storage
from pipelines.samples_aligner import AlignerSamplesConfig, aligner_batches
from pipelines.samples_blender import BlenderSamplesConfig, blender_batches

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured on, and where the result goes."""

    dataset: str
    """Published dataset: a folder or fsspec URI."""
    output: str
    """JSON file to write: a path or fsspec URI."""
    targets: int = 256
    """Pictures to measure on."""

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise ValueError(f"targets must be at least 1, got {self.targets}")


@dataclass(frozen=True, kw_only=True)
class CalibrateAlignerConfig(MeasureConfig):
    """A dataset → weights of the layers that an Aligner compares."""

    learner: AlignerLearnerConfig = field(default_factory=AlignerLearnerConfig)
    """Names the networks and their layers."""
    samples: AlignerSamplesConfig = field(default_factory=AlignerSamplesConfig)
    """What is drawn from the dataset."""


@dataclass(frozen=True, kw_only=True)
class CalibrateBlenderConfig(MeasureConfig):
    """A dataset → weights of the layers that a Blender compares."""

    learner: BlenderLearnerConfig = field(default_factory=BlenderLearnerConfig)
    """Names the network."""
    samples: BlenderSamplesConfig = field(default_factory=BlenderSamplesConfig)
    """What is drawn from the dataset."""


PRESETS: dict[str, CalibrateAlignerConfig | CalibrateBlenderConfig] = {
    name: CalibrateAlignerConfig(
        dataset=tyro.MISSING, output=tyro.MISSING, learner=preset.learner, samples=preset.samples
    )
    for name, preset in train_aligner.PRESETS.items()
}
PRESETS |= {
    f"blender-{name}": CalibrateBlenderConfig(
        dataset=tyro.MISSING, output=tyro.MISSING, learner=preset.learner, samples=preset.samples
    )
    for name, preset in train_blender.PRESETS.items()
}


def of_aligner(
    config: CalibrateAlignerConfig, dataset: str, device: torch.device
) -> runtime.Calibration:
    """Equation (2): VGG-19 and the identity network."""
    batches = aligner_batches(config.samples, dataset, samples_seen=0, rank=0, world_size=1)
    found = calibrated(config.learner, some(batches, config), device)
    if not found.vgg_weights and not found.identity_weights:
        runtime.usage(
            f"nothing to calibrate: --learner.vgg is {found.vgg} and {found.network.identity} has no gradient"
        )
    return runtime.Calibration(
        vgg=found.vgg,
        vgg_layers=found.vgg_layers,
        vgg_weights=found.vgg_weights,
        identity=found.network.identity,
        identity_weights=found.identity_weights,
    )


def of_blender(
    config: CalibrateBlenderConfig, dataset: str, device: torch.device
) -> runtime.Calibration:
    """Equation (6): VGG-19."""
    if config.learner.perceptual == "none":
        runtime.usage("nothing to calibrate: --learner.perceptual is none")
    batches = blender_batches(config.samples, dataset, samples_seen=0, rank=0, world_size=1)
    truths = (batch.truth for batch in some(batches, config))
    found = calibrate(config.learner, truths, device)
    return runtime.Calibration(
        vgg=found.perceptual,
        vgg_layers=PERCEPTUAL_LAYERS[found.perceptual],
        vgg_weights=found.perceptual_weights,
    )


def some(
    batches: Iterable[Batch], config: CalibrateAlignerConfig | CalibrateBlenderConfig
) -> Iterable[Batch]:
    """As many as hold the pictures that are wanted."""
    count = ceil(config.targets / config.samples.batch_size)
    return track(islice(batches, count), "measuring", total=count, console=runtime.console)


def job() -> None:
    """Parse, measure, write, say what to do with it."""
    config = runtime.parse(PRESETS, __doc__ or "")
    dataset = runtime.location("dataset", config.dataset)
    output = runtime.location("output", config.output)
    manifest = shards.read_manifest(dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(config, CalibrateBlenderConfig):
        name, found = "train_blender", of_blender(config, dataset, device)
    else:
        name, found = "train_aligner", of_aligner(config, dataset, device)
    size = config.samples.batch_size
    content = dataclasses.asdict(found) | {
        "targets": ceil(config.targets / size) * size,
        "dataset": {"uri": dataset, "version": manifest["dataset_version"]},
    }
    storage.write_atomic(output, json.dumps(content, indent=1).encode())
    runtime.console.print(f"weights  {output}, of {content['targets']} pictures")
    runtime.console.print(
        f"use it   python jobs/{name}.py PRESET --dataset {shlex.quote(dataset)} --calibration {shlex.quote(output)} --output RUN"
    )


if __name__ == "__main__":
    runtime.main(job)
