"""Runs a job as a user does: a process of its own, from the repository root, with its own Ray."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines import shards, storage, tracking
from tests.material import REPOSITORY

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For runs whose numbers must be equal to the last digit."""


def environment(folder: Path) -> dict[str, str]:
    """Of a job in a test: MLflow's files and Ray's sessions stay in ``folder`` and a short folder of their own."""
    return os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_ADDRESS": "local",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "COLUMNS": "200",
    }


@cache
def empty_store() -> bytes:
    """An MLflow database in which nothing is recorded yet. To make one costs 2 s of CPU, more than most jobs of the tests compute;
    that a job makes its own is shown by tests/pipelines/test_tracking.py and tests/test_submit.py."""
    with TemporaryDirectory() as folder:
        database = Path(folder) / "mlflow.db"
        tracking.make_database(f"sqlite:///{database}")
        return database.read_bytes()


def start_job(
    name: str, *arguments: str, folder: Path, extra: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """``python jobs/NAME.py ARGUMENTS`` in a process group of its own; its output goes to ``folder/NAME.log``.

    ``extra`` is added to its environment.
    """
    command = [sys.executable, str(REPOSITORY / "jobs" / f"{name}.py"), *arguments]
    store = folder / "mlflow.db"
    if not store.exists():
        store.write_bytes(empty_store())
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder) | (extra or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def run_job(
    name: str,
    *arguments: str,
    folder: Path,
    timeout: float = 900,
    extra: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a job to its end; returns its exit code and all it printed in this run."""
    log = folder / f"{name}.log"
    before = log.stat().st_size if log.exists() else 0
    code = start_job(name, *arguments, folder=folder, extra=extra).wait(timeout)
    return code, log.read_bytes()[before:].decode()


def ledger(output: Path | str) -> dict[str, dict[str, Any]]:
    """Rows of the ledger by key."""
    return {row["key"]: row for row in shards.read_ledger(str(output)).to_pylist()}


def outcome(row: dict[str, Any]) -> str:
    """``published``, or ``stage: cause`` of a ledger row."""
    return row["state"] if row["state"] == "published" else f"{row['stage']}: {row['cause']}"


def fingerprint(output: Path | str) -> dict[str, str]:
    """sha256 of everything a dataset publishes that two runs must agree on: manifest, index and shards."""
    uri = str(output)
    names = [f"shards/{name}" for name in storage.names_below(storage.join(uri, "shards"))]
    return {
        name: hashlib.sha256(storage.read_bytes(storage.join(uri, name))).hexdigest()
        for name in [shards.MANIFEST, shards.INDEX, *names]
    }


def manifest(output: Path) -> dict[str, Any]:
    """``dataset.json``."""
    content: dict[str, Any] = json.loads((output / shards.MANIFEST).read_text())
    return content
