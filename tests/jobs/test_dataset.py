"""The verbs of ``jobs/dataset.py``: what they print, what they leave, and how they end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from jobs import dataset, runtime
from pipelines import report, shards
from pipelines.schema import Cause, reject
from tests import datasets
from tests.datasets import made_video, make_dataset
from tests.material import REPOSITORY

ESCAPE = "\x1b[31mred\x1b[0m [bold]bold[/bold]"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published dataset with a detail that would colour a terminal; tests that change it take a :func:`copy`."""
    output = str(tmp_path_factory.mktemp("job") / "out")
    video, _ = made_video("id06", "v0", tracks=0)
    make_dataset(
        output, [*datasets.some_videos(), (reject(video, Cause.DOWNLOAD_OTHER, ESCAPE), [])]
    )
    return output


@pytest.fixture
def copy(original: str, tmp_path: Path) -> str:
    return str(shutil.copytree(original, tmp_path / "out"))


class Job:
    """Runs the job in this process; holds what it printed."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.patch = patch
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        """The exit code."""
        self.patch.setattr(runtime.console, "width", 200)
        self.patch.setattr(sys, "argv", ["jobs/dataset.py", *arguments])
        code = 0
        try:
            runtime.main(dataset.job)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        self.out, self.err = self.capsys.readouterr()
        return code


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(monkeypatch, capsys)


def test_inspect_prints_what_is_there(original: str, job: Job) -> None:
    assert job("inspect", "--dataset", original) == 0
    manifest = shards.read_manifest(original)
    for told in ("version 1", "10 samples in 3 shards", "id01-v0-000", Cause.CROP_SMALL.value):
        assert told in job.out
    for shard in manifest["shards"]:
        assert shard["name"] in job.out
    for split in manifest["splits"]:
        assert split in job.out
    for causes in manifest["counts"]["causes"].values():
        for cause in causes:
            assert cause in job.out


def test_inspect_of_a_key_says_what_index_and_ledger_know(original: str, job: Job) -> None:
    assert job("inspect", "--dataset", original, "--key", "id01-v0-000") == 0
    assert (
        "landmarks.npy, matrix.npy, scores.npy, embedding.npy, 000010.jpg, ..., 000030.png"
        in job.out
    )
    assert job("inspect", "--dataset", original, "--key", "id05-v0-000") == 0
    assert "window side 210 px < 384 px" in job.out
    assert job("inspect", "--dataset", original, "--key", "id99-v0") == 2
    assert "never heard of it" in job.err


def test_texts_from_lists_do_not_reach_the_terminal_as_commands(original: str, job: Job) -> None:
    assert job("inspect", "--dataset", original, "--key", "id06-v0") == 0
    assert "\x1b" not in job.out
    assert "[bold]bold[/bold]" in job.out


def test_inspect_saves_a_picture_of_a_sample(original: str, job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "looks"
    code = job("inspect", "--dataset", original, "--key", "id01-v0-000", "--save", str(folder))
    assert code == 0
    (path,) = folder.iterdir()
    assert path.name == "id01-v0-000.jpg"
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    assert image.shape == (dataset.SHEET_PX, 5 * dataset.SHEET_PX, 3)
    jaw = datasets.face_points(dataset.SHEET_PX, -0.04)[8].astype(
        int
    )  # the chin of the first frame
    near = image[jaw[1] - 2 : jaw[1] + 3, jaw[0] - 2 : jaw[0] + 3].reshape(-1, 3)
    assert (near[:, 1].astype(int) - near[:, 0]).max() > 60  # green


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "x"], "--save needs --key"),
        (["--key", "id04-v0", "--save", "x"], "not a sample, so there are no frames"),
    ],
)
def test_inspect_refuses_what_it_cannot_save(
    original: str, job: Job, arguments: list[str], message: str
) -> None:
    assert job("inspect", "--dataset", original, *arguments) == 2
    assert message in job.err


@pytest.mark.parametrize("verb", ["inspect", "verify", "repair", "report"])
def test_what_is_no_dataset_is_one_line_and_two(job: Job, verb: str, tmp_path: Path) -> None:
    assert job(verb, "--dataset", str(tmp_path)) == 2
    assert job.err.count("\n") == 1
    assert "not a (finished) dataset; run jobs/preprocess.py to its end" in job.err
    assert job(verb, "--dataset", "nonsense://x") == 2
    assert "nonsense" in job.err
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_two(job: Job) -> None:
    assert job("verify") == 2
    assert job("nonsense", "--dataset", "x") == 2
    assert job() == 2


def test_verify_and_repair(copy: str, job: Job) -> None:
    assert job("verify", "--dataset", copy) == 0
    assert "all is well: 3 shards" in job.out
    assert job("repair", "--dataset", copy) == 0
    assert job.out == "nothing to repair\n"
    first, second, _ = sorted(Path(copy, "shards").iterdir())
    first.unlink()
    second.write_bytes(bytes(second.stat().st_size))
    assert job("verify", "--dataset", copy) == 3
    lines = job.out.splitlines()
    assert lines[0] == f"shards/{first.name}: missing"
    assert lines[1].startswith(f"shards/{second.name}: sha256 ")
    assert lines[2] == f"next     python jobs/dataset.py repair --dataset {copy}"
    assert job("repair", "--dataset", copy) == 0
    assert job.out.splitlines() == [
        f"repaired shards/{first.name}: packed again from its parts",
        f"repaired shards/{second.name}: packed again from its parts",
        "all is well",
    ]
    shutil.rmtree(Path(copy, shards.WORK))
    first.unlink()
    assert job("repair", "--dataset", copy) == 3
    assert job.out.startswith(f"left     shards/{first.name}: missing; its parts are not")


def test_report_is_made_again(copy: str, job: Job) -> None:
    page = Path(copy, report.PAGE)
    content = page.read_bytes()
    page.unlink()
    assert job("report", "--dataset", copy) == 0
    assert str(page) in job.out
    assert page.read_bytes() == content


def test_takedown_prints_a_receipt(copy: str, job: Job) -> None:
    reason = ("--reason", "request 17")
    assert job("takedown", "--dataset", copy, *reason) == 2
    assert "needs --identities or --videos" in job.err
    assert job("takedown", "--dataset", copy, *reason, "--identities", "id99") == 2
    assert "has no identities id99; nothing was taken down" in job.err
    old = {shard["name"] for shard in shards.read_manifest(copy)["shards"]}
    code = job(
        "takedown", "--dataset", copy, *reason, "--identities", "id02", "--videos", "id01-v1"
    )
    assert code == 0
    new = {shard["name"] for shard in shards.read_manifest(copy)["shards"]}
    assert "3 videos, 5 samples, 25 frames" in job.out
    assert "dataset version 2" in job.out
    (gone,) = [name for name in old - new if name.startswith("test-")]
    assert f"shards/{gone} → nothing was left in it" in job.out
    (before,) = [name for name in old - new if name.startswith("train-")]
    (after,) = new - old
    assert f"shards/{before} → {after}" in job.out
    assert "ab" * 32 in job.out
    assert job("verify", "--dataset", copy) == 0


@pytest.mark.slow
def test_it_runs_as_a_script_from_anywhere(copy: str, tmp_path: Path) -> None:
    path = REPOSITORY / "jobs" / "dataset.py"
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env python\n")
    shard = next(Path(copy, "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    done = subprocess.run(
        [sys.executable, path, "verify", "--dataset", os.path.relpath(copy, tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert shard.name in done.stdout


def test_looking_needs_no_network_library(original: str) -> None:
    """torch, dlib and Ray take seconds to import; none is needed to look at a dataset."""
    code = (
        "import sys; from jobs import dataset; dataset.inspect_dataset(sys.argv[1]); "
        "heavy = {'torch', 'dlib', 'ray', 'mlflow', 'matplotlib'} & set(sys.modules); sys.exit(','.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, original], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_dataset_is_one_line(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for address in (tmp_path / "file", tmp_path / "nothing", "nonsense://bucket/x"):
        assert job("verify", "--dataset", str(address)) == 2
        assert job.err.startswith("error: ")
        assert str(address) in job.err
