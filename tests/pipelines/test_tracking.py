"""Where runs are recorded, and what is said when they cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import tracking
from tests.material import REPOSITORY


def test_address_of_the_store_is_shown_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:word@mlflow.example")
    assert tracking.find_store(str(tmp_path), False).show == "open https://mlflow.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:word@db/mlflow")
    assert "word" not in tracking.find_store(str(tmp_path), False).show


def test_store_that_does_not_answer_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = tracking.Store(uri="http://me:word@127.0.0.1:1", artifacts="", show="")
    with (
        pytest.raises(tracking.TrackingError, match="cannot be used") as raised,
        tracking.open_run(store, "experiment", {}, {}),
    ):
        pass
    assert "word" not in str(raised.value)


def test_a_database_is_whole_or_not_there(tmp_path: Path) -> None:
    """Killed while MLflow makes its tables, the next run starts afresh instead of finding half of them."""
    code = (
        "import sys, threading, os, time, pathlib\n"
        "from pipelines import tracking\n"
        "def end():\n"
        "    while not list(pathlib.Path(sys.argv[1]).iterdir()): time.sleep(0.005)\n"
        "    time.sleep(0.3); os._exit(9)\n"
        "threading.Thread(target=end, daemon=True).start()\n"
        "tracking.make_database(f'sqlite:///{sys.argv[1]}/mlflow.db')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    assert killed.returncode == 9
    assert not (tmp_path / "mlflow.db").exists()
    store = tracking.Store(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts="", show="")
    with tracking.open_run(store, "experiment", {"a": 1}, {}) as run:
        run.metrics({"b": 2.0})
    assert (tmp_path / "mlflow.db").is_file()


@pytest.mark.slow
def test_a_submitted_job_records_beside_its_output_in_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the summary fetches the database; artifacts are in the bucket from the start."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("MLFLOW_S3_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    boto3.client("s3").create_bucket(Bucket="headray")
    (tmp_path / "page.html").write_text("hello")
    store = tracking.find_store("s3://headray/out", submitted=True)
    with tracking.open_run(store, "experiment", {"a": 1}, {}) as run:
        run.file(tmp_path / "page.html", "report")
    listed = boto3.client("s3").list_objects_v2(Bucket="headray")["Contents"]
    names = {item["Key"] for item in listed}
    assert "out/mlflow/mlflow.db" in names
    assert any(name.endswith("artifacts/report/page.html") for name in names)
    fetch = store.show.split(" && ")[0].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(fetch, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "mlflow.db").read_bytes()[:6] == b"SQLite"
    server.stop()
