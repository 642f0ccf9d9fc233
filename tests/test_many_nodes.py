"""Clusters of two and three nodes on this machine that lose a node while a submitted job runs, recording over HTTP into MLflow as
it is shipped: dataset and trainings are those of runs that nobody disturbed.

The head runs no task, as in ray_cluster.yaml: of three nodes two work, of two one. All cases share one head, whose nodes come and
go; CI has preprocessing on three nodes and a training on the two that are left, the others are ``soak``.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines import checkpoints, journal, storage
from tests.buckets import BUCKET, client
from tests.clusters import Head, driver_exit_code, kill_raylet, running_head, submit
from tests.pipelines.test_training import assert_same
from tests.runs import ONE_THREAD, fingerprint, run_job
from tests.servers import TrackingServer, tracking_server
from tests.small_list import arguments

pytestmark = [pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(1500)]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
ACCOUNT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
NODE_CPUS = 6
"""The plan wants five; the node that is left must hold it."""
SAMPLES = 40
"""Of the presets ``smoke``."""
NOTICED_SOON = {"RAY_health_check_period_ms": "1000"}
"""A node that does not answer is given up after five of these; Ray's own are three seconds."""
SPARING = (
    "--download.resources.min-actors=1", "--crops.resources.min-actors=1", "--annotate.resources.min-actors=1",
    "--tracks.resources.max-actors=2", "--identities.resources.max-actors=2",
)  # fmt: skip
"""No more processes than a small machine bears: of the pools that begin with their share of a cluster, two."""
soak = pytest.mark.soak


@pytest.fixture(scope="module")
def server() -> Iterator[TrackingServer]:
    """MLflow with PostgreSQL, bucket and login."""
    with tracking_server() as started:
        yield started


@pytest.fixture(scope="module")
def head(server: TrackingServer) -> Iterator[Head]:
    """A head on which no task runs. The account of MLflow is in the nodes' environment, in no job's."""
    with running_head(0, extra=server.environment | NOTICED_SOON) as started:
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


def lose(head: Head, node: Any) -> None:
    """``kill -9`` of a node's raylet, as a machine goes."""
    kill_raylet(node)
    node.wait(60)
    head.nodes.remove(node)


def lose_busiest(head: Head, num_nodes: int) -> None:
    """Lose the node with most actors; where no other can work, one takes its place."""
    busiest = max(head.nodes, key=lambda node: len(processes(node.pid, "ray::MapWorker")))
    assert processes(busiest.pid, "ray::MapWorker")
    lose(head, busiest)
    if num_nodes == 2:
        head.join(NODE_CPUS)


@pytest.mark.parametrize("num_nodes", [3, pytest.param(2, marks=soak)])
def test_preprocessing_that_loses_a_node_publishes_the_same_bytes(
    num_nodes: int, head: Head, corpus: Path, url: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:  # fmt: skip
    head.come_to(num_nodes, NODE_CPUS)
    output, name = tmp_path / "out", f"preprocess-{num_nodes}"
    commits = storage.join(str(output), "work", "parts")
    harm = lambda: lose_busiest(head, num_nodes)  # noqa: E731
    with Saboteur(lambda: storage.names_below(commits), harm) as saboteur:
        done = submit(head, name, *arguments(corpus, url, output), *SPARING, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert driver_exit_code(head, name) == 0
    assert saboteur.done
    assert num_nodes == 2 or "(worker -1)" in done.stdout, "the node timeline tells of the loss"
    assert fingerprint(output) == undisturbed[0]
    report(name, done.stdout, f"{len(undisturbed[0])} files as undisturbed")


def report(name: str, printed: str, outcome: str) -> None:
    """What a soak's entry in docs/log.md is made of."""
    lines = [line for line in printed.splitlines() if "nodes: " in line or "node-hours" in line]
    print(f"\n{name}: {outcome}", *lines, sep="\n    ")  # noqa: T201


def flags(dataset: Path, output: Path | str, num_workers: int) -> list[str]:
    """Of a training on nodes that have room for one worker each."""
    return [
        "smoke", f"--dataset={dataset}", f"--output={output}", "--training.checkpoint-every=10",
        f"--cluster.num-workers={num_workers}", f"--cluster.cpus-per-worker={NODE_CPUS}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def calm_training(
    people: Path, smoke_training: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """Output of a training by so many workers that nobody disturbed."""
    made = {("train_aligner", 1): smoke_training[0] / "out"}

    def train(job: str, num_workers: int) -> Path:
        if (job, num_workers) not in made:
            folder = tmp_path_factory.mktemp("calm")
            wanted = [*flags(people, folder / "out", num_workers), "--cluster.cpus-per-worker=1"]
            code, text = run_job(job, *wanted, folder=folder, extra=ONE_THREAD)
            assert code == 0, text
            made[job, num_workers] = folder / "out"
        return made[job, num_workers]

    return train


def seen(output: Path) -> int:
    """Samples in the newest checkpoint of a training."""
    return checkpoints.samples_of(checkpoints.newest(str(output)))


def replace_node(head: Head) -> None:
    """Lose a node with a worker of a training, and start another."""
    titles = ("ray::_RayTrainWorker", "ray::RayTrainWorker")
    node = next(node for node in head.nodes if any(processes(node.pid, each) for each in titles))
    lose(head, node)
    head.join(NODE_CPUS)


def last_losses(output: Path) -> dict[str, float]:
    """Of the last step and evaluation."""
    values: dict[str, float] = journal.read_progress(str(output))["values"]
    return {name: value for name, value in values.items() if name.startswith(("loss/", "eval/"))}


@pytest.mark.parametrize(
    ("job", "num_nodes"),
    [
        ("train_aligner", 2),
        pytest.param("train_aligner", 3, marks=soak),
        pytest.param("train_blender", 2, marks=soak),
        pytest.param("train_blender", 3, marks=soak),
        pytest.param("train_motion", 2, marks=soak),
        pytest.param("train_motion", 3, marks=soak),
    ],
)
def test_training_that_loses_a_node_ends_with_the_same_numbers(
    job: str, num_nodes: int, head: Head, people: Path, calm_training: Callable[[str, int], Path], tmp_path: Path
) -> None:  # fmt: skip
    undisturbed = calm_training(job, num_nodes - 1)
    head.come_to(num_nodes, NODE_CPUS)
    output, name, lost = tmp_path / "out", f"{job}-{num_nodes}", []

    def harm() -> None:
        replace_node(head)
        lost.append(seen(output))

    with Saboteur(lambda: seen(output), harm) as saboteur:
        done = submit(head, name, *flags(people, output, num_nodes - 1), job=job, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert driver_exit_code(head, name) == 0
    assert saboteur.done
    assert 0 < lost[0] < SAMPLES
    assert_same(undisturbed, output)
    assert last_losses(output) == last_losses(undisturbed)
    losses = ", ".join(
        f"{name.removeprefix('loss/')} {value:.9g}"
        for name, value in last_losses(output).items()
        if name.startswith("loss/")
    )
    report(name, done.stdout, f"lost a node at {lost[0]} of {SAMPLES} samples; {losses}")


def kill_supervisor(head: Head) -> None:
    """``kill -9`` what looks after the driver on the head; the driver ends with it."""
    (supervisor,) = processes(head.pid, "ray::JobSupervisor")
    supervisor.kill()


@soak
def test_training_whose_supervisor_is_lost_goes_on_when_submitted_again(
    head: Head, people: Path, calm_training: Callable[[str, int], Path], tmp_path: Path
) -> None:
    undisturbed = calm_training("train_aligner", 1)
    head.come_to(2, NODE_CPUS)
    output = tmp_path / "out"
    with Saboteur(lambda: seen(output), lambda: kill_supervisor(head)) as saboteur:
        first = submit(head, "first", *flags(people, output, 1), job="train_aligner", timeout=600)
    assert saboteur.done
    assert first.returncode == 1
    before = seen(output)
    assert 0 < before < SAMPLES
    second = submit(head, "second", *flags(people, output, 1), job="train_aligner", timeout=600)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"going on from {before} samples" in second.stdout
    assert_same(undisturbed, output)
    report("supervisor", second.stdout, f"lost at {before} of {SAMPLES} samples")


def runs_of(tracked: MlflowClient, model: str) -> list[Run]:
    """All of an experiment, the newest first."""
    experiment = tracked.get_experiment_by_name(f"headray-{model}")
    assert experiment
    found: list[Run] = tracked.search_runs([experiment.experiment_id])
    return found


def test_mlflow_has_both_runs_with_their_pictures_in_the_bucket(
    server: TrackingServer, tracked: MlflowClient
) -> None:
    experiments = {each.name: each for each in tracked.search_experiments()}
    assert {"headray-preprocess", "headray-aligner"} <= set(experiments)
    for experiment in experiments.values():
        assert experiment.artifact_location.startswith("mlflow-artifacts:/")
    made = runs_of(tracked, "preprocess")
    trained = runs_of(tracked, "aligner")
    assert {run.info.status for run in [*made, *trained]} == {"FINISHED"}
    for run in trained:
        history = tracked.get_metric_history(run.info.run_id, "loss/l1")
        steps = [point.step for point in history]
        assert steps == sorted(set(steps)), "no step is recorded twice, whoever was killed"
        assert steps[-1] == SAMPLES
    versions = tracked.search_model_versions("name = 'headray-aligner'")
    assert len(versions) == len(trained)
    candidate = tracked.get_model_version_by_alias("headray-aligner", "candidate")
    assert candidate.version == versions[0].version, "the newest"
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

    run = runs_of(tracked, "aligner")[0]
    runs = f"{server.uri}/#/experiments/{run.info.experiment_id}/runs"
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
