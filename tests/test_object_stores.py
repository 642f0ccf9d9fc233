"""Checkpoints, bundles and shards on ``s3://``, against an S3-speaking server that can be told to fail: what is there is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import torch
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from models import bundle
from pipelines import checkpoints, storage, training
from tests.buckets import BUCKET, client, object_store, reached
from tests.material import REPOSITORY
from tests.pipelines.test_training import SHORT, assert_same, losses, toy_training

pytestmark = pytest.mark.slow

LARGE = 101 * 2**20
"""Bytes: from 100 MiB on s3fs sends a file in parts of 50, as it does with shards of production."""

Fault = Callable[[str, dict[str, list[str]]], int]


class Faulty:
    """An S3 server; before each answer ``fault`` is asked with method and query, and gives the status to fail with, or 0."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.fault: Fault = lambda _method, _query: 0
        self.failed = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
        status = self.fault(environ["REQUEST_METHOD"], query)
        if not status:
            return self.app(environ, start_response)
        self.failed += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = "AccessDenied" if status == 403 else "ServiceUnavailable"
        start_response(f"{status} {code}", [("Content-Type", "application/xml")])
        return [
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a test</Message></Error>".encode()
        ]


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[Faulty, dict[str, str]]]:
    """The server with an empty bucket; this process reaches it."""
    app = Faulty()
    with object_store(app) as environment, reached(environment):
        yield app, environment


@pytest.fixture
def faulty(store: tuple[Faulty, dict[str, str]]) -> Iterator[Faulty]:
    """The server, well again after each test."""
    app, _ = store
    app.failed = 0
    yield app
    app.fault = lambda _method, _query: 0


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the size that is sent in parts."""
    path = tmp_path_factory.mktemp("large") / "train-00000.tar"
    with path.open("wb") as file:
        file.write(os.urandom(2**20))
        file.truncate(LARGE)
    return path


def unfinished(environment: dict[str, str]) -> list[str]:
    """Keys of uploads that were begun and neither completed nor given up."""
    answer = client(environment).list_multipart_uploads(Bucket=BUCKET)
    return [upload["Key"] for upload in answer.get("Uploads", [])]


def refuse(*parts: str, status: int, times: int) -> Fault:
    """Fails the first ``times`` requests that send one of these parts, or that complete (``complete``)."""
    left = [times]

    def fault(method: str, query: dict[str, list[str]]) -> int:
        is_part = method == "PUT" and query.get("partNumber", [""])[0] in parts
        is_end = method == "POST" and "uploadId" in query and "complete" in parts
        if (is_part or is_end) and left[0] > 0:
            left[0] -= 1
            return status
        return 0

    return fault


@pytest.mark.parametrize("what", ["2", "complete"])
def test_an_upload_in_parts_that_fails_leaves_nothing(
    what: str, faulty: Faulty, store: tuple[Faulty, dict[str, str]], shard: Path
) -> None:
    uri = f"s3://{BUCKET}/fails-{what}/shards/{shard.name}"
    faulty.fault = refuse(what, status=403, times=99)
    with pytest.raises(PermissionError):
        storage.put_file(shard, uri)
    assert faulty.failed >= 1
    assert not storage.exists(uri)
    assert storage.names_below(f"s3://{BUCKET}/fails-{what}") == []
    assert unfinished(store[1]) == []
    faulty.fault = lambda _method, _query: 0
    storage.put_file(shard, uri)
    assert storage.size(uri) == LARGE
    assert storage.read_bytes(uri, 0, 2**20) == shard.open("rb").read(2**20)


def test_a_part_that_is_refused_for_a_moment_is_sent_again(
    faulty: Faulty, store: tuple[Faulty, dict[str, str]], shard: Path
) -> None:
    uri = f"s3://{BUCKET}/busy/{shard.name}"
    faulty.fault = refuse("1", "3", status=503, times=2)
    storage.put_file(shard, uri)
    assert faulty.failed == 2
    assert storage.size(uri) == LARGE
    assert storage.read_bytes(uri, 0, 2**20) == shard.open("rb").read(2**20)
    assert unfinished(store[1]) == []


def test_killed_in_the_middle_of_an_upload_nothing_is_there(
    faulty: Faulty, store: tuple[Faulty, dict[str, str]], shard: Path
) -> None:
    """``kill -9`` after the first part. What was sent stays invisible; the bucket's rule (infra/README.md) removes it."""
    uri = f"s3://{BUCKET}/killed/{shard.name}"
    arrived, go_on = threading.Event(), threading.Event()

    def hold(method: str, query: dict[str, list[str]]) -> int:
        if method == "PUT" and "2" in query.get("partNumber", []):
            arrived.set()
            go_on.wait(30)
            return 503
        return 0

    faulty.fault = hold
    code = f"from pathlib import Path; from pipelines import storage; storage.put_file(Path({str(shard)!r}), {uri!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    assert arrived.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    go_on.set()
    time.sleep(0.2)
    faulty.fault = lambda _method, _query: 0
    assert not storage.exists(uri)
    assert storage.names_below(f"s3://{BUCKET}/killed") == []
    assert unfinished(store[1]) == [f"killed/{shard.name}"]
    storage.put_file(shard, uri)
    assert storage.size(uri) == LARGE


@pytest.mark.usefixtures("store")
def test_a_training_on_a_bucket_is_the_one_on_a_disk(tmp_path: Path) -> None:
    """Stopped half-way and continued: checkpoints and the bundle are read back from the bucket."""
    output = f"s3://{BUCKET}/runs/toy"
    whole = training.run(toy_training(tmp_path / "whole"))
    half = training.TrainingConfig(**{**vars(SHORT), "samples": 24})
    training.run(toy_training(output, config=half))
    assert checkpoints.samples_of(checkpoints.newest(output)) == 24
    continued = training.run(toy_training(output))
    assert losses(continued) == losses(whole)
    assert_same(tmp_path / "whole", output)
    network = bundle.load(f"{output}/bundle").state_dict()
    wanted = bundle.load(str(tmp_path / "whole" / "bundle")).state_dict()
    assert network.keys() == wanted.keys()
    assert all(torch.equal(network[name], wanted[name]) for name in wanted)
    assert bundle.read_card(f"{output}/bundle")["samples_seen"] == SHORT.samples
