"""`ray job submit` to a Ray cluster on this machine, followed to its end, as the README tells users to."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from jobs import demo
from pipelines import checkpoints
from tests.material import REPOSITORY
from tests.pipelines.test_training import assert_same
from tests.runs import ledger, manifest, outcome

pytestmark = pytest.mark.slow

CLIPS = tuple(clip for clip in demo.CORPUS if clip.video in ("astronautA2", "coffee-cup1"))
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    """A running Ray head."""

    address: str
    """Of its Jobs API, ``http://127.0.0.1:PORT``."""
    environment: dict[str, str]
    """What a client needs: address and token."""
    pid: int
    """Of the process whose descendants are the cluster."""


def free_ports(count: int) -> list[int]:
    """Free TCP ports of 127.0.0.1."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head with token authentication, ended by its process group."""
    folder = tempfile.mkdtemp(prefix="hr-")
    gcs, dashboard, agent, client = free_ports(4)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": folder,
    }
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", "--num-cpus=6", f"--temp-dir={folder}",
        f"--object-store-memory={400 * 2**20}",
    ]  # fmt: skip
    log = Path(folder) / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_jobs_api(address, environment["RAY_AUTH_TOKEN"], log)
        yield Head(address, environment | {"RAY_API_SERVER_ADDRESS": address}, process.pid)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_jobs_api(address: str, token: str, log: Path) -> None:
    """Until the head answers; fails with its log after a minute."""
    request = urllib.request.Request(
        f"{address}/api/version", headers={"Authorization": f"Bearer {token}"}
    )
    for _ in range(120):
        try:
            urllib.request.urlopen(request, timeout=2).read()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def submit(
    head: Head, name: str, *arguments: str, job: str = "preprocess"
) -> subprocess.CompletedProcess[str]:
    """The README's command, followed to its end."""
    command = [
        RAY, "job", "submit", "--working-dir", ".", "--submission-id", name, "--",
        "python", f"jobs/{job}.py", *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=REPOSITORY, env=head.environment, capture_output=True, text=True, timeout=280
    )


def driver_exit_code(head: Head, name: str) -> int | None:
    """The job's own exit code: the CLI ends with 1 for every failure."""
    code = (
        "import sys; from ray.job_submission import JobSubmissionClient; "
        f"print(JobSubmissionClient({head.address!r}).get_job_info({name!r}).driver_exit_code)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env=head.environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.replace("None", "null"))


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
