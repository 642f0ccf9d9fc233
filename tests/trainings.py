"""The smoke training that several test files compare with: one run a session."""

from __future__ import annotations

from pathlib import Path

from tests.datasets import made_video, make_dataset
from tests.runs import ONE_THREAD, run_job


def make_people(output: Path) -> Path:
    """Four drawn people of one video each, two of them for training; returns the dataset."""
    videos = [
        made_video(f"id{n:02d}", "v0", frames=6, split="train" if n < 2 else "test")
        for n in range(4)
    ]
    make_dataset(str(output), videos)
    return output


def train_smoke(folder: Path, dataset: Path, *flags: str) -> tuple[int, str]:
    """``train_aligner smoke`` into ``folder/out``, on one thread so that all runs add up numbers in one order."""
    return run_job(
        "train_aligner", "smoke", f"--dataset={dataset}", f"--output={folder / 'out'}", *flags,
        folder=folder, extra=ONE_THREAD,
    )  # fmt: skip
