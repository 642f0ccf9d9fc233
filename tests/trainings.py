"""Trainings in tests: the smoke training that several files compare with, what a run recorded, what a wrong command says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import runtime
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


def history(folder: Path, name: str, model: str = "aligner") -> list[tuple[int, float]]:
    """Steps and values that the only run of a model in the store of ``folder`` has of a metric."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(f"headray-{model}")
    (run,) = client.search_runs([experiment.experiment_id])
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: Callable[[], None],
    *flags: str,
) -> str:
    """The line of a job's command that ends with 2."""
    monkeypatch.setattr(sys, "argv", ["job", *flags])
    with pytest.raises(SystemExit) as ended:
        runtime.main(job)
    assert ended.value.code == runtime.USAGE
    return capsys.readouterr().err
