"""Where runs are recorded, and what is said when they cannot be."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np
import pytest

from jobs import preprocess, runtime
from pipelines import shards, tracking
from pipelines.preprocess import PreprocessConfig
from tests.buckets import BUCKET, client
from tests.datasets import make_dataset, some_videos
from tests.material import REPOSITORY


@pytest.fixture(autouse=True)
def _own_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow writes the store it was given into the environment; other tests must not find it there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> tracking.Store:
    """A database of files; making its tables costs seconds."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    return tracking.Store(uri=f"sqlite:///{database}", artifacts="", show="")


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
    for uri in (store.uri, "foo://x"):
        with pytest.raises(tracking.TrackingError, match="unset it to record"):
            tracking.require(tracking.Store(uri=uri, artifacts="", show=""))


@pytest.mark.slow
def test_what_was_made_is_told_though_the_store_went_away(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Config:
        output: str = "videos/me.mp4"

    gone = tracking.Store(uri="http://127.0.0.1:1", artifacts="", show="open it")
    told = runtime.log_made(gone, "swap", Config(), {"commit": "0"}, {"frames": 1.0})
    assert told.startswith("not recorded: MLFLOW_TRACKING_URI=http://127.0.0.1:1")
    there = tracking.Store(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path), show="x")
    tracking.require(there)
    assert runtime.log_made(there, "swap", Config(), {"commit": "0"}, {"frames": 1.0}) == "x"
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (run.info.run_name, run.data.metrics) == ("videos/me.mp4", {"frames": 1.0})


def test_a_user_without_a_name_is_told_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user the image does not know."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_123)
    assert tracking.run_tags("run", "jobs/swap.py", "0")["mlflow.user"] == "4000123"


@pytest.mark.slow
def test_a_database_is_whole_or_not_there(tmp_path: Path) -> None:
    """Killed while MLflow makes its tables, the next run starts afresh instead of finding half of them."""
    code = (
        "import sys, threading, os, time, pathlib\n"
        "from pipelines import tracking\n"
        "def end():\n"
        "    while not list(pathlib.Path(sys.argv[1]).iterdir()): time.sleep(0.005)\n"
        "    time.sleep(0.1); os._exit(9)\n"
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
def test_lineage_is_read_back(shared_store: tracking.Store, tmp_path: Path) -> None:
    """The list and the published dataset, with digests that the files confirm and without secrets."""
    from mlflow import MlflowClient

    output = str(tmp_path / "mine")
    manifest = make_dataset(output, some_videos())
    manifest["list_sha256"] = "ab" * 32
    config = PreprocessConfig(input="https://me:word@lists.example/vox2.zip?token=1", output=output)
    with tracking.open_run(shared_store, "experiment", {}, {}) as run:
        preprocess.log_lineage(run, config, manifest)
    assert run.trouble == ""
    client = MlflowClient(shared_store.uri)
    inputs = client.get_run(run.run_id).inputs.dataset_inputs
    found = {item.tags[0].value: item.dataset for item in inputs}
    assert set(found) == {"list", "published"}
    listed, published = found["list"], found["published"]
    assert (listed.name, listed.digest) == ("vox2.zip", ("ab" * 32)[:36])
    assert json.loads(listed.source) == {"url": "https://lists.example/vox2.zip"}
    assert json.loads(listed.profile) == {"identities": 5, "videos": 10}
    sha256 = hashlib.sha256(Path(output, "dataset.json").read_bytes()).hexdigest()
    assert (published.name, published.digest) == ("mine", f"v1-{sha256[:12]}")
    assert json.loads(published.source) == {"uri": output}
    profile = json.loads(published.profile)
    assert profile["sha256"] == sha256
    assert profile["frames"] == manifest["counts"]["frames"]["published"]
    columns = [column["name"] for column in json.loads(published.schema)["mlflow_colspec"]]
    assert columns == shards.INDEX_SCHEMA.names
    tags = client.get_run(run.run_id).data.tags
    assert (tags["dataset_version"], tags["dataset_sha256"]) == ("1", sha256)


def test_series_and_note_are_read_back(shared_store: tracking.Store) -> None:
    from mlflow import MlflowClient

    tags = tracking.run_tags("mine", "jobs/preprocess.py", "c0ffee", dataset="data/mine")
    with tracking.open_run(shared_store, "experiment", {"a": 1}, tags) as run:
        for step in (1, 12, 25):
            assert run.series({"stage/tracks/videos": step * 2.0}, step)
        run.note("**5** frames\n\n| a | b |")
    found = MlflowClient(shared_store.uri).get_run(run.run_id)
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.tags["mlflow.note.content"].startswith("**5** frames")
    assert found.data.tags["dataset"] == "data/mine"
    address = tracking.run_address(shared_store, run)
    assert (
        address
        == f"http://127.0.0.1:5000/#/experiments/{found.info.experiment_id}/runs/{run.run_id}"
    )
    server = tracking.Store(uri="https://me:word@mlflow.example/", artifacts="", show="")
    assert tracking.run_address(server, run) == f"https://mlflow.example/{run.page}"
    history = MlflowClient(shared_store.uri).get_metric_history(run.run_id, "stage/tracks/videos")
    assert [(point.step, point.value) for point in history] == [(1, 2), (12, 24), (25, 50)]


def test_a_server_that_went_away_costs_one_wait_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "page.html").write_text("hello")
    run = tracking.Run("0" * 32, MlflowClient("http://me:word@127.0.0.1:1"))
    assert run.series({"a": 1.0}, 1) is False
    assert run.trouble == "", "a point may be lost and the next one taken"
    started = time.perf_counter()
    run.metrics({"a": 1.0})
    run.note("text")
    run.tags({"a": "b"})
    run.record({}, "dataset.json")
    run.file(tmp_path / "page.html", "report")
    assert time.perf_counter() - started < 30
    assert "Connection" in run.trouble
    assert "word" not in run.trouble
    assert len([record for record in caplog.records if "not recorded" in record.message]) == 1


def test_a_run_ends_well_though_its_store_went_away(
    shared_store: tracking.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing answers when the run ends; an error of the run itself is still the one that is raised."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for error in (None, RuntimeError("ours")):
        with (
            pytest.raises(RuntimeError, match="ours") if error else contextlib.nullcontext(),
            tracking.open_run(shared_store, "experiment", {}, {}) as run,
        ):
            run._client = MlflowClient("http://127.0.0.1:1")
            run.metrics({"a": 1.0})
            if error:
                raise error
        assert "Connection" in run.trouble


@pytest.mark.slow
def test_a_submitted_job_records_beside_its_output_in_a_bucket(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the summary fetches the database; artifacts are in the bucket from the start."""
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "page.html").write_text("hello")
    store = tracking.find_store(f"{bucket}/out", submitted=True)
    with tracking.open_run(store, "experiment", {"a": 1}, {}) as run:
        run.file(tmp_path / "page.html", "report")
    listed = client(os.environ).list_objects_v2(Bucket=BUCKET)["Contents"]
    names = {item["Key"] for item in listed}
    assert "out/mlflow/mlflow.db" in names
    assert any(name.endswith("artifacts/report/page.html") for name in names)
    fetch = store.show.split(" && ")[0].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(fetch, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "mlflow.db").read_bytes()[:6] == b"SQLite"


# --- trainings ----------------------------------------------------------------------------------------------------


LINEAGE = tracking.Lineage(uri="s3://bucket/vox2", version=3, digest="0123456789ab")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables; every test gets a copy."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    tracking.make_database(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> tracking.Store:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    artifacts = str(tmp_path / "mlartifacts")
    return tracking.Store(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=artifacts, show="")


def begin(output: str) -> None:
    tags = {"git_commit": "abc"}
    config = {"config": {"learner": {"lr": 1e-4}}}
    tracking.begin(output, "headray-toy", {"learner.lr": 1e-4}, tags, LINEAGE, config)


def client_of(store: tracking.Store) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)


def only_run(store: tracking.Store) -> Any:
    client = client_of(store)
    experiment = client.get_experiment_by_name("headray-toy")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def logged(store: tracking.Store, name: str) -> list[tuple[int, float]]:
    run_id = only_run(store).info.run_id
    return [(m.step, m.value) for m in client_of(store).get_metric_history(run_id, name)]


def png(value: int) -> bytes:
    return bytes(cv2.imencode(".png", np.full((8, 8, 3), value, np.uint8))[1].tobytes())


def test_a_training_is_one_run_with_everything_in_it(tmp_path: Path, store: tracking.Store) -> None:
    output = str(tmp_path / "out")
    begin(output)
    tracker = tracking.Tracker(output, store)
    tracker.metrics({"loss/l1": 0.5, **tracking.system_metrics()}, 10)
    tracker.metrics({"loss/l1": 0.25}, 20)
    tracker.metrics({"eval/l1": 0.75}, 20, kind="eval")
    tracker.image(png(7), 20)
    tracker.end("FINISHED", 20)
    assert tracker.close() == 0
    assert tracker.problem == ""
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"learner.lr": "0.0001"}
    assert run.data.tags["git_commit"] == "abc"
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("vox2", "v3-0123456789ab")
    assert logged(store, "loss/l1") == [(10, 0.5), (20, 0.25)]
    assert logged(store, "eval/l1") == [(20, 0.75)]
    assert 0 < logged(store, "system/system_memory_usage_percentage")[0][1] <= 100
    client = client_of(store)
    names = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
    pictures = [
        name for name in names if name.endswith(".png") and name.startswith("images/preview")
    ]
    assert len(pictures) == 1
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == [
        "config.json",
        "images",
    ]


def test_a_resumed_run_goes_on_and_logs_no_step_twice(
    tmp_path: Path, store: tracking.Store
) -> None:
    """Steps after the last checkpoint are replayed with the numbers they had; each is there once."""
    output = str(tmp_path / "out")
    begin(output)
    first = tracking.Tracker(output, store)
    for step in (10, 20, 30):
        first.metrics({"loss/l1": step / 100}, step)
    first.image(png(1), 30)
    first.close()  # and the checkpoint was at 10
    begin(output)
    second = tracking.Tracker(output, store)
    for step in (20, 30, 40):
        second.metrics({"loss/l1": step / 100}, step)
    second.metrics({"eval/l1": 1.0}, 30, kind="eval")  # the crash came before it
    second.image(png(1), 30)
    second.end("FINISHED", 40)
    assert second.close() == 0
    assert logged(store, "loss/l1") == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
    assert logged(store, "eval/l1") == [(30, 1.0)]
    run = only_run(store)
    assert run.info.status == "FINISHED"
    names = [item.path for item in client_of(store).list_artifacts(run.info.run_id, "images")]
    assert len([name for name in names if name.endswith(".png")]) == 1


def test_killed_between_sending_and_noting_it_sends_nothing_twice(
    tmp_path: Path, store: tracking.Store
) -> None:
    """The pending files are put back as they were: what a kill at the worst moment leaves."""
    output = str(tmp_path / "out")
    begin(output)
    folder = tmp_path / "out" / tracking.FOLDER
    first = tracking.Tracker(
        output, tracking.Store(uri="http://127.0.0.1:9", artifacts="", show="")
    )
    first.metrics({"loss/l1": 0.5}, 10)
    first.image(png(1), 10)
    first.close()
    before = {path.name: path.read_bytes() for path in (folder / "pending").iterdir()}
    assert len(before) == 2
    tracking.Tracker(output, store).close()
    for name, content in before.items():
        (folder / "pending" / name).write_bytes(content)
    (folder / "run.json").unlink()  # its id is found again by the run's token
    tracking.Tracker(output, store).close()
    assert logged(store, "loss/l1") == [(10, 0.5)]
    names = [
        item.path for item in client_of(store).list_artifacts(only_run(store).info.run_id, "images")
    ]
    assert len([name for name in names if name.endswith(".png")]) == 1


def test_a_store_that_is_away_delays_nothing_and_loses_nothing(
    tmp_path: Path, store: tracking.Store, caplog: pytest.LogCaptureFixture
) -> None:
    output = str(tmp_path / "out")
    begin(output)
    away = tracking.Store(uri="http://me:word@127.0.0.1:9", artifacts="", show="")
    tracker = tracking.Tracker(output, away, retry_seconds=0.05)
    started = time.perf_counter()
    for step in range(1, 51):
        tracker.metrics({"loss/l1": float(step)}, step)
    assert time.perf_counter() - started < 20
    deadline = time.perf_counter() + 60
    while not tracker.problem and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert tracker.close() == 50
    assert "127.0.0.1:9 cannot be reached" in tracker.problem
    assert "word" not in tracker.problem
    assert caplog.text.count("cannot be reached") == 1
    back = tracking.Tracker(output, store)  # the next run of the command, the server being back
    assert back.close() == 0
    assert [step for step, _ in logged(store, "loss/l1")] == list(range(1, 51))


def test_a_store_that_comes_back_gets_it_during_the_run(
    tmp_path: Path, empty_database: Path
) -> None:
    output = str(tmp_path / "out")
    begin(output)
    blocked = tmp_path / "later"
    blocked.write_text("a file where the database's folder will be")
    store = tracking.Store(uri=f"sqlite:///{blocked}/mlflow.db", artifacts=str(tmp_path), show="")
    tracker = tracking.Tracker(output, store, retry_seconds=0.05)
    tracker.metrics({"loss/l1": 1.0}, 1)
    deadline = time.perf_counter() + 60
    while not tracker.problem and time.perf_counter() < deadline:
        time.sleep(0.02)
    assert tracker.problem
    blocked.unlink()
    blocked.mkdir()
    shutil.copyfile(empty_database, blocked / "mlflow.db")
    pending = tmp_path / "out" / tracking.FOLDER / "pending"
    while list(pending.iterdir()) and time.perf_counter() < deadline:
        time.sleep(0.02)
    tracker.metrics({"loss/l1": 2.0}, 2)
    assert tracker.close() == 0
    assert logged(store, "loss/l1") == [(1, 1.0), (2, 2.0)]


def test_a_bundle_is_found_by_its_alias(
    tmp_path: Path, store: tracking.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "out")
    begin(output)
    (tmp_path / "out" / "bundle").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "out" / "bundle" / name).write_text(name)
    for sha256, step in (("a" * 64, 10), ("a" * 64, 10), ("b" * 64, 20)):
        tracker = tracking.Tracker(output, store)
        tracker.bundle(f"{output}/bundle", "headray-toy", sha256, step)
        assert tracker.close() == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    for uri in ("models:/headray-toy@candidate", "models:/headray-toy/2", "models:/headray-toy/1"):
        found = Path(tracking.find_bundle(uri))
        assert {path.name for path in found.iterdir()} == {"model.safetensors", "config.json"}
    for uri in ("models:/headray-toy@other", "models:/headray-toy/3", "models:/nobody/1"):
        with pytest.raises(tracking.TrackingError, match="not found"):
            tracking.find_bundle(uri)
    assert tracking.find_bundle("s3://bucket/bundle") == "s3://bucket/bundle"
