"""S3 on loopback: a server that really answers, and a process that finds it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "headray"


@contextmanager
def object_store(app: Callable[..., Any] | None = None) -> Iterator[dict[str, str]]:
    """A server with an empty bucket; the environment that reaches it. ``app`` stands before moto's if given."""
    server = make_server("127.0.0.1", 0, app or DomainDispatcherApplication(create_backend_app), threaded=True)  # fmt: skip
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        client(environment).create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def reached(environment: Mapping[str, str]) -> Iterator[None]:
    """This process and its children use that server. s3fs keeps its clients, with addresses: none is kept from or for others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


def client(environment: Mapping[str, str]) -> Any:
    """Of the S3 that an environment names."""
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )
