#!/usr/bin/env python
"""What a training step of the Aligner costs: pictures a second, peak memory, the wait for data, and what each speed-up gives.

    python benchmarks/train_step.py --preset base --batch-size 4                      # on a GPU
    python benchmarks/train_step.py --preset base --dataset data/mine --batch-size 4  # and the share of time spent waiting for samples
    python benchmarks/train_step.py --preset base --steps 1 --variants fp32           # on a CPU

Frozen networks have random weights (``random_init``; dlib its own): speed does not depend on them. Variants are added one to the other: fp32, bf16
autocast, channels_last, the fused Adam, torch.compile of both networks. Without ``--dataset`` one batch of noise is used again and again.
"""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import tyro
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

from benchmarks.steps import VARIANTS, Variant, aligner_noise, build, measure  # noqa: E402
from jobs.train_aligner import PRESETS  # noqa: E402
from models.aligner.batch import AlignerBatch  # noqa: E402
from models.aligner.learner import AlignerLearner  # noqa: E402
from pipelines.samples_aligner import AlignerSamplesConfig, aligner_batches  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    preset: str = "base"
    """Of jobs/train_aligner.py."""
    batch_size: int = 1
    """Samples of a step."""
    sources: int = 4
    """K; the presets draw 1 to 8."""
    steps: int = 20
    """Steps that count; two before them do not (one on a CPU)."""
    variants: tuple[Variant, ...] = VARIANTS
    """Each one keeps what the ones before it changed."""
    dataset: str = ""
    """Published dataset to draw from; empty: noise, and no wait."""
    threads: int = 0
    """Of torch on a CPU; 0: as it likes."""


def batches(
    learner: AlignerLearner, samples: AlignerSamplesConfig, config: Config
) -> Iterator[AlignerBatch]:
    """Without end: of the dataset, or the same noise."""
    if not config.dataset:
        faces = learner.frozen.identity.size
        return itertools.repeat(
            aligner_noise(learner.config.network, config.batch_size, config.sources, faces)
        )
    drawn = replace(
        samples,
        batch_size=config.batch_size,
        min_sources=config.sources,
        max_sources=config.sources,
    )
    return iter(aligner_batches(drawn, config.dataset, samples_seen=0, rank=0, world_size=1))


def main() -> None:
    """Measure every variant and print a table."""
    config = tyro.cli(Config, description=__doc__)
    if config.preset not in PRESETS:
        raise SystemExit(f"--preset {config.preset}: there are {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    table = Table(title=f"preset {config.preset}, batch {config.batch_size}, K = {config.sources}")
    for name in ("variant", "s a step", "pictures/s", "times fp32", "waiting", "peak MiB"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    first = 0.0
    for number in range(len(config.variants)):
        variants = list(config.variants[: number + 1])
        plain = replace(preset.learner, random_init=preset.learner.network.identity != "dlib")
        learner = build(AlignerLearner, plain, variants, device)
        stream = batches(learner, preset.samples, config)
        found = measure(learner, stream, config.steps, device)
        first = first or found.seconds
        table.add_row(
            ("+ " if number else "") + variants[-1],
            f"{found.seconds:.3f}",
            f"{config.batch_size / found.seconds:.2f}",
            f"{first / found.seconds:.2f}",
            f"{found.waited:.0%}" if config.dataset else "-",
            f"{found.peak_mib:,.0f}",
        )
        del learner
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    )
    what = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{what}, {torch.get_num_threads()} threads of {psutil.cpu_count()} cores, torch {torch.__version__}, "
        f"commit {commit.stdout.strip() or 'unknown'}"
    )


if __name__ == "__main__":
    main()
