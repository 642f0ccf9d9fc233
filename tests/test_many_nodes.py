"""Clusters of three and two nodes on this machine that lose nodes while submitted jobs run, recording over HTTP into MLflow as it
is shipped: the dataset and the training are those of runs that nobody disturbed."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from pipelines import checkpoints, storage
from tests.clusters import Head, driver_exit_code, kill_raylet, running_head, submit
from tests.pipelines.test_training import assert_same
from tests.runs import fingerprint
from tests.servers import BUCKET, TrackingServer, client, tracking_server
from tests.small_list import arguments

pytestmark = [pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(900)]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
ACCOUNT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@pytest.fixture(scope="module")
def server() -> Iterator[TrackingServer]:
    """MLflow with PostgreSQL, bucket and login."""
    with tracking_server() as started:
        yield started


def await_nodes(head: Head, count: int) -> None:
    """Until the head believes in so many nodes."""
    deadline = time.monotonic() + 60
    while len(head.alive()) != count:
        assert time.monotonic() < deadline, head.alive()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def head(server: TrackingServer) -> Iterator[Head]:
    """A head on which no task runs, and two nodes. The account of MLflow is in the nodes' environment, in no job's."""
    with running_head(0, extra=server.environment) as started:
        started.join(8)
        started.join(8)
        await_nodes(started, 3)
        yield started


@pytest.fixture(scope="module")
def tracked(server: TrackingServer) -> Iterator[MlflowClient]:
    """A client that may look."""
    patch = pytest.MonkeyPatch()
    for name in ACCOUNT:
        patch.setenv(name, server.environment[name])
    yield MlflowClient(server.uri)
    patch.undo()


class Saboteur:
    """Does harm once, from a thread, as soon as a condition holds."""

    def __init__(self, condition: Callable[[], object], harm: Callable[[], object]) -> None:
        self.done = False
        self.condition = condition
        self.harm = harm
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> Saboteur:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(90)

    def _wait(self) -> None:
        while not self._stop.wait(0.05):
            if self.condition():
                self.harm()
                self.done = True
                return


def processes(pid: int, title: str) -> list[psutil.Process]:
    """Descendants of a node whose title begins so."""
    found = []
    for each in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if each.cmdline()[0].startswith(title):
                found.append(each)
    return found


def lose_busiest(head: Head) -> None:
    """``kill -9`` the raylet of the node with most actors."""
    busiest = max(head.nodes, key=lambda node: len(processes(node.pid, "ray::MapWorker")))
    assert processes(busiest.pid, "ray::MapWorker")
    kill_raylet(busiest)
    busiest.wait(60)
    head.nodes.remove(busiest)


def test_preprocessing_that_loses_one_of_three_nodes_publishes_the_same_bytes(
    head: Head, corpus: Path, url: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    commits = storage.join(str(output), "work", "parts")
    with Saboteur(lambda: storage.names_below(commits), lambda: lose_busiest(head)) as saboteur:
        done = submit(head, "three-nodes", *arguments(corpus, url, output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert driver_exit_code(head, "three-nodes") == 0
    assert saboteur.done
    await_nodes(head, 2)
    assert "head 1, worker 1 (worker -1)" in done.stdout, "the node timeline tells of the loss"
    assert fingerprint(output) == undisturbed[0]


def kill_supervisor(head: Head) -> None:
    """``kill -9`` what looks after the driver on the head; the driver ends with it."""
    (supervisor,) = processes(head.pid, "ray::JobSupervisor")
    supervisor.kill()


def replace_node(head: Head) -> None:
    """``kill -9`` the only worker node's raylet, as a spot machine goes, and start another."""
    (node,) = head.nodes
    assert processes(node.pid, "ray::_RayTrainWorker") or processes(node.pid, "ray::RayTrainWorker")
    kill_raylet(node)
    node.wait(60)
    head.nodes.remove(node)
    head.join(8)


def test_training_that_loses_its_supervisor_and_then_its_node_ends_with_the_same_numbers(
    head: Head, people: Path, smoke_training: tuple[Path, str], tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    flags = ["smoke", f"--dataset={people}", f"--output={output}", "--training.checkpoint-every=10",
             "--cluster.cpus-per-worker=1"]  # fmt: skip

    def seen() -> int:
        return checkpoints.samples_of(checkpoints.newest(output))

    with Saboteur(seen, lambda: kill_supervisor(head)) as saboteur:
        first = submit(head, "first", *flags, job="train_aligner")
    assert saboteur.done
    assert first.returncode == 1
    before = seen()
    assert 0 < before < 40
    with Saboteur(lambda: seen() > before, lambda: replace_node(head)) as saboteur:
        second = submit(head, "second", *flags, job="train_aligner")
    assert second.returncode == 0, second.stdout + second.stderr
    assert saboteur.done
    assert f"going on from {before} samples" in second.stdout
    assert_same(smoke_training[0] / "out", tmp_path / "out")


def test_mlflow_has_both_runs_with_their_pictures_in_the_bucket(
    server: TrackingServer, tracked: MlflowClient
) -> None:
    experiments = {each.name: each for each in tracked.search_experiments()}
    assert {"headray-preprocess", "headray-aligner"} <= set(experiments)
    for experiment in experiments.values():
        assert experiment.artifact_location.startswith("mlflow-artifacts:/")
    (made,) = tracked.search_runs([experiments["headray-preprocess"].experiment_id])
    (trained,) = tracked.search_runs([experiments["headray-aligner"].experiment_id])
    assert (made.info.status, trained.info.status) == ("FINISHED", "FINISHED")
    history = tracked.get_metric_history(trained.info.run_id, "loss/l1")
    steps = [point.step for point in history]
    assert steps == sorted(set(steps)), "no step is recorded twice, whoever was killed"
    assert steps[-1] == 40
    (version,) = tracked.search_model_versions("name = 'headray-aligner'")
    candidate = tracked.get_model_version_by_alias("headray-aligner", "candidate")
    assert candidate.version == version.version
    listed = client(server.store).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")["Contents"]
    names = [entry["Key"] for entry in listed]
    assert any("/images/preview" in name and name.endswith(".png") for name in names)
    assert any(name.endswith("/report/index.html") for name in names)
    assert any(name.endswith("/bundle/model.safetensors") for name in names)


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_ui_shows_curves_and_pictures_to_who_has_logged_in(
    server: TrackingServer, tracked: MlflowClient
) -> None:
    """A headless Chromium that answers the login as a person does."""
    from playwright.sync_api import Error, sync_playwright

    experiment = tracked.get_experiment_by_name("headray-aligner")
    (run,) = tracked.search_runs([experiment.experiment_id])
    runs = f"{server.uri}/#/experiments/{experiment.experiment_id}/runs"
    account: Any = {"username": server.username, "password": server.password}
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_context(http_credentials=account).new_page()
        view.set_default_timeout(90_000)
        view.goto(runs)
        view.get_by_text(str(run.info.run_name)).first.wait_for()
        view.goto(f"{runs}/{run.info.run_id}/model-metrics")
        view.get_by_text("eval/health").first.wait_for()
        view.goto(f"{runs}/{run.info.run_id}/artifacts/images")
        view.get_by_text("preview+step+40").last.click()
        picture = view.locator("img[src^='blob:'], img[src*='preview']").first
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") >= 5 * 64
        stranger = browser.new_context().new_page()
        with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
            stranger.goto(f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1")
        browser.close()


def test_mlflow_answers_nobody_without_credentials(server: TrackingServer) -> None:
    paths = [
        "/",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "/graphql",
        "/api/2.0/mlflow-artifacts/artifacts",
    ]
    for path in paths:
        assert server.get(path, login=False)[0] == 401, path
    assert server.get("/")[0] == 200
    stranger = TrackingServer(server.uri, server.username, "wrong-password", "", {})
    assert stranger.get(paths[1])[0] == 401
