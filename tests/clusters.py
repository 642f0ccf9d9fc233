"""Ray clusters of several nodes on this machine, each node a `ray start` of its own, ended by its process group."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.material import REPOSITORY

RAY = str(Path(sys.executable).parent / "ray")


@dataclass
class Head:
    """A running Ray head, and the nodes that joined it."""

    address: str
    """Of its Jobs API, ``http://127.0.0.1:PORT``."""
    gcs: str
    """What other nodes and drivers join, ``HOST:PORT``."""
    environment: dict[str, str]
    """What a client needs: address and token."""
    pid: int
    """Of the process whose descendants are the head."""
    folder: Path
    """Of its sessions and logs."""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """The others; their descendants are the node."""
    joined: int = 0
    """Nodes so far, those that are gone included."""

    def join(self, num_cpus: int, *flags: str) -> subprocess.Popen[bytes]:
        """Start another node and wait until it is one. Its folder is its own, as on a machine of its own: a node that ends
        takes the code of running jobs with it."""
        command = [
            RAY, "start", "--block", f"--address={self.gcs}", f"--num-cpus={num_cpus}", f"--temp-dir={self.folder}/n{self.joined}",
            f"--object-store-memory={200 * 2**20}", "--dashboard-agent-listen-port=0", "--disable-usage-stats", *flags,
        ]  # fmt: skip
        with (self.folder / f"node{self.joined}.log").open("wb") as log:
            node = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.nodes.append(node)
        self.joined += 1
        deadline = time.monotonic() + 300
        while "Ray runtime started" not in Path(log.name).read_text():
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.3)
        return node

    def come_to(self, num_nodes: int, num_cpus: int) -> None:
        """Join nodes, or end some, until there are so many, itself among them, and it knows."""
        while 1 + len(self.nodes) > num_nodes:
            end_group(self.nodes.pop())
        while 1 + len(self.nodes) < num_nodes:
            self.join(num_cpus)
        deadline = time.monotonic() + 300
        while len(self.alive()) != num_nodes:
            assert time.monotonic() < deadline, self.alive()
            time.sleep(0.5)

    def alive(self) -> list[str]:
        """Ids of the nodes that the head believes to be there."""
        told = self.ask("/nodes?view=summary")["data"]["summary"]
        return [node["raylet"]["nodeId"] for node in told if node["raylet"]["state"] == "ALIVE"]

    def ask(self, path: str) -> dict[str, object] | list[object]:  # type: ignore[type-arg]
        """JSON of the dashboard."""
        token = self.environment.get("RAY_AUTH_TOKEN", "")
        request = urllib.request.Request(
            f"{self.address}{path}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())


def free_ports(count: int) -> list[int]:
    """Free TCP ports of 127.0.0.1."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def cluster_environment(folder: Path) -> dict[str, str]:
    """Of every process of a cluster: nothing of the machine's own Ray, and a token."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
    }


@contextmanager
def running_head(
    num_cpus: int,
    *flags: str,
    host: str = "127.0.0.1",
    port: int = 0,
    extra: Mapping[str, str] | None = None,
) -> Iterator[Head]:
    """A Ray head with token authentication; ended with all nodes that joined it.

    Args:
        num_cpus: logical CPUs of the head itself.
        flags: further ones of ``ray start``.
        host: address of the node.
        port: of its GCS; 0: any.
        extra: environment of its processes.
    """
    folder = Path(tempfile.mkdtemp(prefix="hr-"))
    environment = cluster_environment(folder) | dict(extra or {})
    gcs, dashboard, agent, client = free_ports(4)
    gcs = port or gcs
    command = [
        RAY, "start", "--head", "--block", f"--node-ip-address={host}", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}",
        f"--object-store-memory={400 * 2**20}", *flags,
    ]  # fmt: skip
    log = folder / "head.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    reach = {"RAY_API_SERVER_ADDRESS": address}
    head = Head(address, f"{host}:{gcs}", environment | reach, process.pid, folder)
    try:
        wait_for_jobs_api(head, log)
        yield head
    finally:
        for node in [*head.nodes, process]:
            end_group(node)
        shutil.rmtree(folder, ignore_errors=True)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a node and everything that it started, at once: asked politely, it drains for half a minute."""
    below = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for each in below:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def wait_for_jobs_api(head: Head, log: Path) -> None:
    """Until the head answers; fails with its log after a minute."""
    for _ in range(120):
        try:
            head.ask("/api/version")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def kill_raylet(node: subprocess.Popen[bytes]) -> None:
    """``kill -9`` of a node's raylet: the node is gone, and what ran there with it."""
    raylets = [
        each
        for each in psutil.Process(node.pid).children(recursive=True)
        if each.name() == "raylet"
    ]
    assert len(raylets) == 1
    raylets[0].kill()


def submit(
    head: Head,
    name: str,
    *arguments: str,
    job: str = "preprocess",
    env_vars: Mapping[str, str] | None = None,
    timeout: float = 900,
) -> subprocess.CompletedProcess[str]:
    """The README's command, followed to its end."""
    command = [RAY, "job", "submit", "--working-dir", ".", "--submission-id", name]
    if env_vars:
        command += ["--runtime-env-json", json.dumps({"env_vars": dict(env_vars)})]
    command += ["--", "python", f"jobs/{job}.py", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=head.environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def driver_exit_code(head: Head, name: str) -> int | None:
    """The job's own exit code: the CLI ends with 1 for every failure."""
    code: int | None = head.ask(f"/api/jobs/{name}")["driver_exit_code"]  # type: ignore[call-overload]
    return code
