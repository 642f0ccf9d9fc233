"""`ray job submit` to a Ray cluster on this machine, followed to its end, as the README tells users to."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs import demo
from pipelines import checkpoints
from tests.clusters import Head, driver_exit_code, running_head, submit
from tests.pipelines.test_training import assert_same
from tests.runs import ledger, manifest, outcome

pytestmark = pytest.mark.slow

CLIPS = tuple(clip for clip in demo.CORPUS if clip.video in ("astronautA2", "coffee-cup1"))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head with token authentication that does all the work itself."""
    with running_head(num_cpus=6) as started:
        yield started


def test_submitted_job_publishes(head: Head, tmp_path: Path) -> None:
    demo.make_corpus(tmp_path, CLIPS)
    output = tmp_path / "out"
    with demo.serve(tmp_path / "videos") as url:
        done = submit(
            head,
            "good",
            f"--input={tmp_path / 'list'}",
            f"--output={output}",
            f"--download.url-template={url}/{{video}}.mp4",
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert driver_exit_code(head, "good") == 0
    assert "published" in {outcome(row) for row in ledger(output).values()}
    assert manifest(output)["counts"]["videos"]["published"] == 1
    assert str(output) in done.stdout
    assert (output / "mlflow" / "mlflow.db").is_file()  # the working directory was a temporary copy


def test_failing_job_keeps_its_own_exit_code(head: Head, tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    done = submit(head, "empty", f"--input={tmp_path / 'list'}", f"--output={tmp_path / 'out'}")
    assert done.returncode != 0
    assert driver_exit_code(head, "empty") == 2
    assert "error:" in done.stdout + done.stderr


def kill_worker_after(head: Head, output: Path, killed: threading.Event) -> None:
    """``kill -9`` of the process that trains into ``output`` once it has written a checkpoint."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if checkpoints.newest(str(output)):
            for process in psutil.Process(head.pid).children(recursive=True):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and "TrainWorker" in title:
                    process.kill()
                    killed.set()
            return
        time.sleep(0.05)


def test_training_whose_worker_is_killed_ends_as_one_that_was_left_alone(
    head: Head, people: Path, smoke_training: tuple[Path, str], tmp_path: Path
) -> None:
    """Submitted and killed, on a Ray worker, against undisturbed in the job's own process: bit for bit."""
    killed = threading.Event()
    killer = threading.Thread(target=kill_worker_after, args=(head, tmp_path / "out", killed))
    killer.start()
    done = submit(
        head, "training", "smoke", f"--dataset={people}", f"--output={tmp_path / 'out'}",
        "--training.checkpoint-every=10", "--cluster.cpus-per-worker=1", job="train_aligner",
    )  # fmt: skip
    killer.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert killed.is_set()
    assert_same(smoke_training[0] / "out", tmp_path / "out")
    assert (tmp_path / "out" / "mlflow" / "mlflow.db").is_file()


def test_without_the_token_nothing_is_accepted(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=10)
