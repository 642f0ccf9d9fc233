"""What is measured while a job runs: an MLflow server that dies on the way, and what Ray exports for Prometheus."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import demo
from tests.material import REPOSITORY
from tests.runs import manifest, start_job

pytestmark = pytest.mark.slow


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a server answers there by now."""
    try:
        with urllib.request.urlopen(url, timeout=30):
            return True
    except OSError:
        return False


def wait_for(condition: object, seconds: float, what: str) -> None:
    """Poll until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.2)


def test_a_server_that_dies_during_the_run_does_not_end_it(tmp_path: Path) -> None:
    clip = next(clip for clip in demo.CORPUS if clip.video == "astronautA2")
    demo.make_corpus(tmp_path, [replace(clip, seconds=2.4)])
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
         "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1",
         "--artifacts-destination", str(tmp_path / "artifacts")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: answers(f"{uri}/health"), 300, "mlflow server did not start")
        with demo.serve(tmp_path / "videos") as url:
            job = start_job(
                "preprocess",
                f"--input={tmp_path / 'list'}",
                f"--output={tmp_path / 'out'}",
                f"--download.url-template={url}/{{video}}.mp4",
                "--crops.min-frames=5",
                "--tracks.min-frames=5",
                "--identities.min-track-frames=5",
                "--identities.min-identity-frames=5",
                folder=tmp_path,
                extra={"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"},
            )
            parts = tmp_path / "out" / "work" / "downloads"
            wait_for(lambda: parts.exists() or job.poll() is not None, 300, "no download")
            os.killpg(server.pid, signal.SIGKILL)
            killed = time.monotonic()
            code = job.wait(600)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    text = (tmp_path / "preprocess.log").read_text()
    assert code == 0, text
    assert manifest(tmp_path / "out")["counts"]["videos"]["published"] == 1
    assert "mlflow   it did not take all of this run: " in text
    assert "Traceback" not in text
    took = float(text.split(" MiB, in ")[1].split(" s")[0].replace(",", ""))
    waited = time.monotonic() - killed - took
    assert waited < 90, f"{waited:.0f} s were spent on a server that is gone"


SCRIPT = """
import sys, time, urllib.request
import ray
from pipelines import metrics

port = int(sys.argv[1])
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _metrics_export_port=port)

@ray.remote
class Worker:
    def work(self):
        for seconds in (0.2, 2.0):
            metrics.observe_stage("crops", "open", 7, seconds)
        metrics.observe_stage("crops", "rejected", 0, 0.5)
        metrics.observe_egress("proxy 10.0.0.1:3128", "youtube", 42.0, 3)

worker = Worker.remote()
ray.get(worker.work.remote())
end, page = time.monotonic() + 200, ""
while time.monotonic() < end and not ("headray_stage_seconds" in page and "headray_egress" in page):
    time.sleep(1)
    try:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    except OSError:
        pass
print("\\n".join(line for line in page.splitlines() if "headray" in line and not line.startswith("#")))
"""


def test_prometheus_finds_the_stages_and_the_pauses(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    told = subprocess.run(
        [sys.executable, str(script), str(free_port())],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]

    def value(name: str, *labels: str) -> float:
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in told.stdout.splitlines()
            if line.startswith(f"ray_{name}{{") and all(label in line for label in labels)
        ]
        assert found, (name, labels, told.stdout)
        return sum(found)

    assert value("headray_stage_videos_total", 'stage="crops"', 'outcome="open"') == 2
    assert value("headray_stage_videos_total", 'stage="crops"', 'outcome="rejected"') == 1
    assert value("headray_stage_frames_total", 'stage="crops"') == 14
    assert value("headray_stage_seconds_count", 'stage="crops"') == 3
    assert value("headray_stage_busy_seconds_total", 'stage="crops"') == pytest.approx(2.7)
    assert value("headray_stage_seconds_bucket", 'le="1.0"') == 2
    address = 'address="proxy 10.0.0.1:3128"'
    assert value("headray_egress_pause_seconds", address, 'site="youtube"') == 42
    assert value("headray_egress_under_way", address) == 3
