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
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch
import tyro
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

from benchmarks.peak import PeakBytes  # noqa: E402
from jobs.train_aligner import PRESETS  # noqa: E402
from models.aligner.batch import AlignerBatch  # noqa: E402
from models.aligner.learner import AlignerLearner, AlignerLearnerConfig  # noqa: E402
from models.updates import Precision  # noqa: E402
from pipelines.samples_aligner import AlignerSamplesConfig, aligner_batches  # noqa: E402

Variant = Literal["fp32", "bf16", "channels_last", "fused", "compile"]


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
    variants: tuple[Variant, ...] = ("fp32", "bf16", "channels_last", "fused", "compile")
    """Each one keeps what the ones before it changed."""
    dataset: str = ""
    """Published dataset to draw from; empty: noise, and no wait."""
    threads: int = 0
    """Of torch on a CPU; 0: as it likes."""


def noise(learner: AlignerLearnerConfig, config: Config, size: tuple[int, int]) -> AlignerBatch:
    """A batch of the learner's shapes; ``size`` is (height, width) of the identity network's faces."""
    b, k, s, e = (
        config.batch_size,
        config.sources,
        learner.network.size,
        learner.network.encoder_size,
    )
    torch.manual_seed(0)

    def pictures(*shape: int) -> torch.Tensor:
        return torch.rand(*shape) * 2 - 1

    face = torch.tensor([[size[1] / s, 0.0, 0.0], [0.0, size[0] / s, 0.0]])
    return AlignerBatch(
        keys=[f"noise.{i}" for i in range(b)],
        sources=pictures(b, k, 3, e, e),
        source_faces=pictures(b, k, 3, *size),
        target=pictures(b, 3, s, s),
        target_valid=torch.ones(b, 1, s, s),
        target_foreground=torch.ones(b, 1, s, s),
        target_face_matrix=face.expand(b, 2, 3).contiguous(),
        driving=pictures(b, 3, e, e),
        driving_face=pictures(b, 3, e, e),
        landmarks=torch.rand(b, 68, 2) * s,
    )


def batches(
    learner: AlignerLearner, samples: AlignerSamplesConfig, config: Config
) -> Iterator[AlignerBatch]:
    """Without end: of the dataset, or the same noise."""
    if not config.dataset:
        return itertools.repeat(noise(learner.config, config, learner.frozen.identity.size))
    drawn = replace(
        samples,
        batch_size=config.batch_size,
        min_sources=config.sources,
        max_sources=config.sources,
    )
    return iter(aligner_batches(drawn, config.dataset, samples_seen=0, rank=0, world_size=1))


def build(
    config: AlignerLearnerConfig, variants: list[Variant], device: torch.device
) -> AlignerLearner:
    """A learner with the speed-ups of ``variants``."""
    precision: Precision = "bf16" if "bf16" in variants else "fp32"
    learner = AlignerLearner(
        replace(config, random_init=config.network.identity != "dlib", precision=precision),
        wrap=lambda network: network,
        device=device,
    )
    networks = (learner.aligner, learner.discriminator)
    if "channels_last" in variants:
        for network in networks:
            network.to(memory_format=torch.channels_last)
    if "fused" in variants:
        for optimizer in learner.optimizers.values():
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
    if "compile" in variants:
        for network in networks:
            network.compile()
    return learner


@dataclass(frozen=True)
class Measured:
    """Of one variant."""

    seconds: float
    """A step."""
    waited: float
    """Share of the time spent waiting for batches."""
    peak_mib: float
    """Memory that tensors took, the networks' included."""


def measure(
    learner: AlignerLearner, stream: Iterator[AlignerBatch], config: Config, device: torch.device
) -> Measured:
    """Time ``config.steps`` steps after a warm-up."""
    cuda = device.type == "cuda"

    def one() -> float:
        began = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - began
        learner.train_step(batch.to(device, non_blocking=True), 0)
        return waited

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            one()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.synchronize()
    else:
        held = sum(t.nbytes for n in learner.networks.values() for t in n.state_dict().values())
        with PeakBytes() as counter:  # the warm-up: counting costs time
            one()
        peak = counter.peak + held
    began = time.perf_counter()
    waits = [one() for _ in range(config.steps)]
    if cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - began
    return Measured(elapsed / config.steps, sum(waits) / elapsed, peak / 2**20)


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
        learner = build(preset.learner, variants, device)
        found = measure(learner, batches(learner, preset.samples, config), config, device)
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
