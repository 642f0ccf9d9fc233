#!/usr/bin/env python
"""Dataset → how much each layer counts when features are compared (the λ_l of HeSer's equation (2)).

    python jobs/calibrate.py base --dataset data/mine --output weights.json
    python jobs/train_aligner.py base --dataset data/mine --output runs/base --calibration weights.json

The supplement says that λ_l "balances the terms" and gives no numbers. Measured on real pictures of the dataset, once: a layer's
weight is one over its mean magnitude, so that every layer of a network counts the same. The numbers become part of the
training's configuration, and so of its checkpoints and bundles.

Exit codes: 0 done, 2 wrong arguments or dataset, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import json
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

import torch
import tyro
from rich.progress import track

from jobs import runtime, train_aligner
from models.aligner.learner import AlignerLearnerConfig, calibrated
from pipelines import shards, storage
from pipelines.samples_aligner import AlignerSamplesConfig, aligner_batches


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """A dataset → weights of layers."""

    dataset: str
    """Published dataset: a folder or fsspec URI."""
    output: str
    """JSON file to write: a path or fsspec URI."""
    targets: int = 256
    """Pictures to measure on."""
    learner: AlignerLearnerConfig = field(default_factory=AlignerLearnerConfig)
    """Names the networks and their layers."""
    samples: AlignerSamplesConfig = field(default_factory=AlignerSamplesConfig)
    """What is drawn from the dataset."""

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise ValueError(f"targets must be at least 1, got {self.targets}")


PRESETS = {
    name: CalibrateConfig(
        dataset=tyro.MISSING, output=tyro.MISSING, learner=preset.learner, samples=preset.samples
    )
    for name, preset in train_aligner.PRESETS.items()
}


def job() -> None:
    """Parse, measure, write, say what to do with it."""
    config = runtime.parse(PRESETS, __doc__ or "")
    dataset = runtime.location("dataset", config.dataset)
    output = runtime.location("output", config.output)
    manifest = shards.read_manifest(dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = ceil(config.targets / config.samples.batch_size)
    batches = aligner_batches(config.samples, dataset, samples_seen=0, rank=0, world_size=1)
    some = track(islice(batches, count), "measuring", total=count, console=runtime.console)
    found = calibrated(config.learner, some, device)
    content = {
        "vgg": found.vgg,
        "vgg_layers": list(found.vgg_layers),
        "vgg_weights": list(found.vgg_weights),
        "identity": found.network.identity,
        "identity_weights": list(found.identity_weights),
        "targets": count * config.samples.batch_size,
        "dataset": {"uri": dataset, "version": manifest["dataset_version"]},
    }
    if not found.vgg_weights and not found.identity_weights:
        runtime.usage(
            f"nothing to calibrate: --learner.vgg is {found.vgg} and {found.network.identity} has no gradient"
        )
    storage.write_atomic(output, json.dumps(content, indent=1).encode())
    runtime.console.print(f"weights  {output}, of {content['targets']} pictures")
    runtime.console.print(
        f"next     python jobs/train_aligner.py ... --dataset {dataset} --calibration {output}"
    )


if __name__ == "__main__":
    runtime.main(job)
