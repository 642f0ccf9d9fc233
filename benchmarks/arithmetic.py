#!/usr/bin/env python
"""What a training step of each model costs in arithmetic, and what share of this machine's it reaches: for docs/scaling.md.

The operations of a whole step (forward, backward, both sides) are counted as torch runs them; matrix products of this machine are
timed in the same run. A step's share of them, taken to another device's matrix products, says what that device would do if its other
work (memory traffic, launches) weighed as much as here.

    python benchmarks/arithmetic.py --threads 2
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

from benchmarks import steps  # noqa: E402
from models.aligner.learner import AlignerLearner, AlignerLearnerConfig  # noqa: E402
from models.blender.learner import (  # noqa: E402
    BlenderLearner,
)
from models.motion.learner import MotionLearner, MotionLearnerConfig  # noqa: E402

CPU = torch.device("cpu")
SOURCES = 4
"""Of a sample of the Aligner."""
FACES = (112, 112)
"""ArcFace's pictures."""


@dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """What to measure."""

    threads: int = 2
    """Of torch."""
    steps: int = 2
    """That are timed, after one that is counted."""
    side: int = 4096
    """Of the matrices."""


def paper_steps() -> Iterator[tuple[str, Callable[..., Any], Any, Any]]:
    """(name, learner, configuration, batch of one sample) of each model at the size its paper trains."""
    aligner = AlignerLearnerConfig(random_init=True)
    yield (
        "Aligner, 512 px, K 4",
        AlignerLearner,
        aligner,
        steps.aligner_noise(aligner.network, 1, SOURCES, FACES),
    )
    blender = steps.paper_blender()
    yield "Blender, 512 px", BlenderLearner, blender, steps.blender_noise(blender.network.size, 1)
    for stage in (1, 2):
        motion = MotionLearnerConfig(random_init=True, stage=stage)
        yield (
            f"motion, 256 px, stage {stage}",
            MotionLearner,
            motion,
            steps.motion_noise(motion.network, 2),
        )


def matrix_product(side: int, dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices, the best of five."""
    one, other = (torch.rand(side, side).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        one @ other
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def copy(mib: int = 1024) -> float:
    """Bytes a second that a copy in memory reads and writes, the best of five."""
    source = torch.rand(mib << 18)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def count(learner: steps.Steps, batch: Any) -> int:
    """Operations of one step: a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        learner.train_step(batch, 0)
    return int(counter.get_total_flops())


def main() -> None:
    """Measure and print."""
    config = tyro.cli(ArithmeticConfig, description=__doc__, prog="benchmarks/arithmetic.py")
    torch.set_num_threads(config.threads)
    table = Table(title=f"one sample a step, {config.threads} threads, torch {torch.__version__}")
    for column in (
        "model",
        "precision",
        "TFLOP a sample",
        "s a sample",
        "samples/s",
        "GFLOP/s",
        "of matrix products",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    best = {
        name: matrix_product(config.side, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    for name, learner, wanted, batch in paper_steps():
        for precision in ("fp32", "bf16"):
            built = steps.build(learner, wanted, [precision], CPU)
            operations = count(built, batch) / len(batch)
            found = steps.measure(built, itertools.repeat(batch), config.steps, CPU)
            seconds = found.seconds / len(batch)
            table.add_row(
                name, precision, f"{operations / 1e12:.3f}", f"{seconds:.2f}", f"{1 / seconds:.3f}",
                f"{operations / seconds / 1e9:.0f}", f"{operations / seconds / best[precision]:.2f}",
            )  # fmt: skip
    Console(width=120).print(table)
    for precision, speed in best.items():
        print(f"matrix products, {precision}: {speed / 1e9:.0f} GFLOP/s")
    print(f"copies in memory: {copy() / 1e9:.0f} GB/s")


if __name__ == "__main__":
    main()
