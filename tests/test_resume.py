"""Kill the job anywhere and run it again: the bytes are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import fingerprint, run_job, start_job
from tests.small_list import CLIPS, arguments

pytestmark = pytest.mark.slow


def test_mlflow_has_the_lineage_and_the_series_of_the_run(
    undisturbed: tuple[dict[str, str], float], calm: Path
) -> None:
    """Read back with MLflow's client: no series falls, and each ends with what the summary says."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{calm}/mlflow.db")
    experiment = client.get_experiment_by_name("headray-preprocess")
    (run,) = client.search_runs([experiment.experiment_id])
    manifest = json.loads((calm / "out" / "dataset.json").read_text())
    counts = manifest["counts"]
    datasets = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
    assert datasets["list"].digest == manifest["list_sha256"][:36]
    assert datasets["published"].digest == f"v1-{undisturbed[0]['dataset.json'][:12]}"
    told = run.data.metrics
    histories = {
        name: [point.value for point in client.get_metric_history(run.info.run_id, name)]
        for name in told
        if name.startswith(("progress/", "stage/"))
    }
    for name, values in histories.items():
        assert values == sorted(values), name
    assert told["progress/videos"] == counts["videos"]["listed"] == len(CLIPS)
    assert told["progress/frames"] == counts["frames"]["published"]
    assert told["progress/failed"] == counts["videos"]["failed"] == told["result/videos/failed"]
    assert told["stage/download/rejected"] == 1
    assert told["stage/annotate/videos"] == counts["videos"]["published"]
    assert told["stage/annotate/frames"] == counts["frames"]["published"]
    assert told["stage/tracks/frames"] >= told["stage/quality/frames"]
    for name in ("download", "tracks", "crops", "identities", "quality", "annotate"):
        seconds = told[f"result/stage_seconds/{name}"]
        assert told[f"stage/{name}/seconds"] == pytest.approx(seconds, abs=0.01)
    assert (run.info.run_name, run.info.status) == (f"{calm.name}/out", "FINISHED")
    assert "report/index.html" in run.data.tags["mlflow.note.content"]
    (page,) = client.list_artifacts(run.info.run_id, "report")
    assert page.file_size == (calm / "out" / "report" / "index.html").stat().st_size


def victims(driver: psutil.Process, who: str) -> list[psutil.Process]:
    """Processes of a run that can be killed: the ``driver``, busy ``actor`` processes, or any Ray ``worker``."""
    if who == "driver":
        return [driver]
    found = []
    for process in driver.children(recursive=True):
        try:
            title = process.cmdline()[0]
        except (psutil.Error, IndexError):
            continue
        if title.startswith("ray::MapWorker" if who == "actor" else "ray::"):
            found.append(process)
    return found


def kill_at(job: subprocess.Popen[str], who: str, seconds: float, draw: random.Random) -> bool:
    """``kill -9`` one of the victims that many seconds after the start; False when the job was done before."""
    try:
        job.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        pass
    driver = psutil.Process(job.pid)
    while job.poll() is None:
        targets = victims(driver, who)
        if targets:
            os.kill(draw.choice(targets).pid, signal.SIGKILL)
            return True
        time.sleep(0.1)
    return False


def disturb(
    corpus: Path, url: str, folder: Path, who: str, seconds: float, seed: int
) -> tuple[bool, int]:
    """One disturbed run, then runs until it is done.

    Returns:
        whether the kill came before the job was done, and how many runs it took.
    """
    draw = random.Random(seed)
    job = start_job("preprocess", *arguments(corpus, url, folder / "out"), folder=folder)
    killed = kill_at(job, who, seconds, draw)
    code, runs = job.wait(900), 1
    while code != 0:
        assert runs < 4, (folder / "preprocess.log").read_text()
        code, _ = run_job("preprocess", *arguments(corpus, url, folder / "out"), folder=folder)
        runs += 1
    return killed, runs


@pytest.mark.parametrize("who", ["driver", "actor", pytest.param("worker", marks=pytest.mark.soak)])
def test_killed_and_rerun_gives_the_same_bytes(
    who: str, corpus: Path, url: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    wanted, duration = undisturbed
    seconds = random.Random(who).uniform(0.3, 0.7) * duration
    # the undisturbed run came first and may have been slower: then the kill comes too late
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        killed, _ = disturb(corpus, url, folder, who, seconds / 2**attempt, seed=attempt)
        assert fingerprint(folder / "out") == wanted
        if killed:
            return
    pytest.fail(f"no kill of a {who} came in time")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_twenty_times(
    corpus: Path, url: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    wanted, duration = undisturbed
    draw = random.Random(20)
    kills = number = 0
    while kills < 20:
        number += 1
        who = draw.choice(["driver", "actor", "worker"])
        seconds = draw.uniform(0.05, 1.0) * duration
        folder = tmp_path / f"{number:02d}"
        folder.mkdir()
        killed, runs = disturb(corpus, url, folder, who, seconds, seed=number)
        kills += killed
        said = f"kill {kills}" if killed else "too late"
        print(f"{said}: {who} at {seconds:.1f} of {duration:.0f} s, {runs} runs", flush=True)  # noqa: T201
        assert fingerprint(folder / "out") == wanted
        shutil.rmtree(folder)


def test_rerun_of_a_finished_dataset_does_nothing(
    corpus: Path, url: str, undisturbed: tuple[dict[str, str], float], calm: Path, tmp_path: Path
) -> None:
    """The same command on a published dataset ends with 0 and downloads nothing; another configuration ends with 2."""
    flags = arguments(corpus, url, calm / "out")
    code, text = run_job("preprocess", *flags, folder=tmp_path)
    assert code == 0, text
    assert fingerprint(calm / "out") == undisturbed[0]
    code, text = run_job("preprocess", *flags, "--crops.min-window=300", folder=tmp_path)
    assert code == 2
    assert "crops.min_window was 384" in " ".join(text.split())
    assert fingerprint(calm / "out") == undisturbed[0]


def test_object_store_gets_the_same_bytes(
    corpus: Path,
    url: str,
    undisturbed: tuple[dict[str, str], float],
    bucket: str,
    tmp_path: Path,
) -> None:
    """Published to s3://, killed on the way once: the same manifest, index and shards as on a local disk."""
    output = f"{bucket}/data/out"
    flags = [
        flag.replace(str(Path("OUTPUT")), output) for flag in arguments(corpus, url, Path("OUTPUT"))
    ]
    wanted, duration = undisturbed
    job = start_job("preprocess", *flags, folder=tmp_path)
    kill_at(job, "driver", 0.7 * duration, random.Random(0))
    job.wait(900)
    code, text = run_job("preprocess", *flags, folder=tmp_path)
    assert code == 0, text
    assert fingerprint(output) == wanted
    code, text = run_job("dataset", "verify", f"--dataset={output}", folder=tmp_path)
    assert code == 0, text
