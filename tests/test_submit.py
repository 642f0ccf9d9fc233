"""`ray job submit` to a Ray cluster on this machine, followed to its end, as the README tells users to."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from jobs import demo
from pipelines import checkpoints
from tests.clusters import RAY, Head, driver_exit_code, running_head, submit
from tests.material import REPOSITORY
from tests.pipelines.test_training import assert_same
from tests.runs import ledger, manifest, outcome

pytestmark = pytest.mark.slow

CLIPS = tuple(clip for clip in demo.CORPUS if clip.video in ("astronautA2", "coffee-cup1"))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head with token authentication that does all the work itself; its dashboard as ray_cluster.yaml starts it."""
    shipped = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    words = shipped["head_start_ray_commands"][-1].split()
    flags = [word for word in words if word.startswith("--dashboard")]
    assert flags
    with running_head(6, *flags) as started:
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
    deadline = time.monotonic() + 600
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


TOLD = (
    "/api/jobs/", "/api/jobs/training/logs", "/nodes?view=summary", "/logical/actors", "/api/cluster_status", "/api/v0/nodes",
    "/api/v0/tasks", "/api/v0/logs?node_id=x", "/events", "/api/serve/applications/", "/api/packages/gcs/x.zip",
    "/api/component_activities", "/worker/traceback?pid=1", "/api/train/v2/runs/v1", "/timezone",
)  # fmt: skip
"""Of the dashboard and the Jobs API: whatever says something about the cluster or does something with it."""


def status_of(head: Head, path: str, token: str | None, content: bytes | None = None) -> int:
    """What the dashboard answers to a request; with content, a POST."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if content:
        headers["Content-Type"] = "application/json"
    try:
        request = urllib.request.Request(f"{head.address}{path}", content, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_without_the_token_the_dashboard_tells_nothing(head: Head) -> None:
    for path in TOLD:
        assert status_of(head, path, None) == 401, path
        assert status_of(head, path, 64 * "0") == 403, path
    assert status_of(head, "/api/jobs/", head.environment["RAY_AUTH_TOKEN"]) == 200


def test_without_the_token_nothing_is_accepted(head: Head) -> None:
    job = json.dumps({"entrypoint": "touch /tmp/headray-was-here"}).encode()
    assert status_of(head, "/api/jobs/", None, job) == 401
    assert status_of(head, "/api/jobs/", 64 * "0", job) == 403
    stranger = {name: value for name, value in head.environment.items() if "RAY_AUTH" not in name}
    asked = subprocess.run(
        [RAY, "status", f"--address={head.gcs}"],
        env=stranger | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert asked.returncode != 0
    assert "InvalidAuthToken" in asked.stdout + asked.stderr


def test_the_dashboard_listens_on_the_head_alone(head: Head) -> None:
    """The way there is through SSH (`ray dashboard`)."""
    port = int(head.address.rpartition(":")[2])
    listening = set()
    for process in psutil.Process(head.pid).children(recursive=True):
        with suppress(psutil.Error):
            listening |= {
                each.laddr.ip
                for each in process.net_connections("tcp")
                if each.status == psutil.CONN_LISTEN and each.laddr.port == port
            }
    assert listening == {"127.0.0.1"}
