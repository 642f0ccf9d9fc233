"""Ray's own autoscaler (version 2) with its fake nodes, which are real Ray processes on this machine: nodes come and go as the
stages of a real plan ask for them. The node timeline that every job prints is what the assertions read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from jobs import demo
from tests.clusters import free_ports, running_head
from tests.material import REPOSITORY

pytestmark = pytest.mark.slow

VIDEOS = {"first": 12, "second": 2}
SECONDS_A_VIDEO = 2.0
IDLE_SECONDS = 4.0
MAX_CPU_NODES = 3

DRIVER = """
import json, sys, time
from dataclasses import replace

import ray, ray.data
from pipelines import annotate, download, nodes
from pipelines.annotate import AnnotateConfig
from pipelines.download import DownloadConfig
from pipelines.preprocess import PreprocessConfig, configure_ray_data
from pipelines.schema import StageResources, Video, add_actors, from_row, to_row

# The fake nodes do not tell the autoscaler of their memory, so none is asked for.
url, cache, counts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ray.init(log_to_driver=False, logging_level="ERROR")
configure_ray_data(PreprocessConfig(input="list", output="out"))
say = lambda line: print(line, flush=True)


def pool():
    return ray.get_runtime_context().get_node_labels().get("pool", "?")


class Where:
    def __init__(self):
        self.pool = pool()

    def __call__(self, row):
        video, members = from_row(row)
        return to_row(replace(video, source=video.source | {"pool": self.pool}), members)


def videos(name):
    for number in range(counts[name]):
        yield to_row(Video(identity="a", video=f"{name}{number}", url=f"{url}/{name}{number}.mp4"))


def run(name, on_gpu):
    resources = StageResources(num_cpus=1, memory_gb=0, max_actors=8)
    plan = ray.data.from_items(list(videos(name)), override_num_blocks=counts[name])
    plan = download.add_downloads(plan, DownloadConfig(resources=resources), cache)
    plan = add_actors(plan, Where, StageResources(num_cpus=0.1, memory_gb=0, max_actors=1))
    if on_gpu:
        wanted = StageResources(num_cpus=0.5, num_gpus=0.5, memory_gb=0, max_actors=1)
        plan = annotate.add_annotations(plan, AnnotateConfig(parser="geometric", resources=wanted))
        plan = add_actors(plan, GpuWhere, wanted)
    rows = [from_row(row)[0] for row in plan.iter_rows()]
    say("rows " + json.dumps({
        "name": name,
        "causes": sorted({row.cause for row in rows}),
        "count": len(rows),
        "pools": sorted({row.source.get("pool", "") for row in rows}),
        "gpu_pools": sorted({row.source.get("gpu_pool", "") for row in rows}),
    }))


class GpuWhere(Where):
    def __call__(self, row):
        video, members = from_row(row)
        return to_row(replace(video, source=video.source | {"gpu_pool": self.pool}), members)


def await_head_alone(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(nodes.alive()) > 1:
        time.sleep(0.5)


say(f"may grow: {nodes.may_grow()}")
with nodes.Timeline(say, poll_seconds=0.5):
    run("first", on_gpu=False)
    say("first done")
    run("second", on_gpu=True)
    say("second done")
    await_head_alone(240)
"""


@contextmanager
def slow_server(folder: Path) -> Iterator[str]:
    """One small video under every name, after a while: what a queue of downloads waits for."""
    content = next(folder.glob("*.mp4")).read_bytes()

    class Slow(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(SECONDS_A_VIDEO if "Range" not in self.headers else 0)
            self.send_response(200)
            self.send_header("Content-Type", "video/mp4")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "video/mp4")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def autoscaling_config(gcs: str) -> dict[str, Any]:
    """As ``ray_cluster.yaml``, in small: a head on which nothing runs, CPU workers, GPU workers, both from 0."""
    empty = (
        "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "cluster_synced_files",
        "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter",
    )  # fmt: skip
    store = {"object_store_memory": 80 * 2**20}
    return {name: [] for name in empty} | {
        "cluster_name": "fake",
        "max_workers": 8,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": 2, **store}, "labels": {"pool": "cpu"}, "node_config": {},
                "min_workers": 0, "max_workers": MAX_CPU_NODES,
            },
            "gpu": {
                "resources": {"CPU": 4, "GPU": 1, **store}, "labels": {"pool": "gpu"}, "node_config": {},
                "min_workers": 0, "max_workers": 2,
            },
        },
    }  # fmt: skip


def counts(line: str) -> dict[str, int]:
    """``[ 12 s] nodes: cpu 2, head 1 (cpu +2)`` → how many of each kind."""
    told = line.partition("nodes: ")[2].partition(" (")[0]
    return {kind: int(count) for kind, count in re.findall(r"(\w+) (\d+)", told)}


def test_nodes_come_with_the_queue_and_go_after_it(tmp_path: Path) -> None:
    demo.make_corpus(tmp_path, [clip for clip in demo.CORPUS if clip.video == "coffee-cup1"])
    host = ray.util.get_node_ip_address()
    (port,) = free_ports(1)
    config = tmp_path / "autoscaling.json"
    config.write_text(json.dumps(autoscaling_config(f"{host}:{port}")))
    extra = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",  # as `ray up` and KubeRay start a head
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "2",  # seconds; 10 in production
        "PYTHONPATH": str(REPOSITORY),
    }
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    with (
        slow_server(tmp_path / "videos") as url,
        running_head(
            0, f"--autoscaling-config={config}", host=host, port=port, extra=extra
        ) as head,
    ):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(script), url, str(tmp_path / "cache"), json.dumps(VIDEOS)],
            env=head.environment | {"RAY_ADDRESS": head.gcs}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        print(done.stdout)  # noqa: T201  # the timeline, with pytest -s
        print(f"{time.monotonic() - started:.0f} s")  # noqa: T201
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    check(done.stdout.splitlines())


def check(lines: list[str]) -> None:
    """What the driver printed is what the cluster should have done."""
    assert "may grow: True" in lines, "so the job leaves its pools small"
    first, second = lines.index("first done"), lines.index("second done")
    timeline = [(number, counts(line)) for number, line in enumerate(lines) if "nodes: " in line]
    before = [now for number, now in timeline if number < first]
    after = [now for number, now in timeline if number > first]
    assert max(now.get("cpu", 0) for now in before) >= 2, (
        "the queue asked for more than one CPU node"
    )
    assert all("gpu" not in now for now in before), "no stage had asked for a GPU"
    assert any(now.get("gpu", 0) == 1 for _, now in timeline if _ < second)
    assert max(now.get("gpu", 0) for now in after) == 1
    assert timeline[-1][1] == {"head": 1}, "all workers went"
    assert lines[-1].startswith("node-hours cpu ")
    told = [json.loads(line.removeprefix("rows ")) for line in lines if line.startswith("rows ")]
    assert [each["count"] for each in told] == list(VIDEOS.values())
    assert all(each["causes"] == [""] for each in told)
    assert all(each["pools"] == ["cpu"] for each in told), "videos lay on a GPU node"
    assert told[1]["gpu_pools"] == ["gpu"]
