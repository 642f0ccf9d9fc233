"""What every job does the same way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import runtime
from pipelines.download import DownloadConfig
from pipelines.preprocess import PreprocessConfig
from tests.material import REPOSITORY


def test_nothing_secret_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PreprocessConfig(
        input="https://me:hush8@bucket.example/list.csv?part=1&X-Amz-Signature=hush7",
        output=str(tmp_path),
        download=DownloadConfig(url_template="https://mirror.example/{video}?token=hush7"),
    )
    flat = runtime.record(config, str(tmp_path))
    text = (tmp_path / "config.json").read_text()
    for told in (text, capsys.readouterr().out, json.dumps(flat)):
        assert "hush7" not in told
        assert "hush8" not in told
    assert flat["input"] == "https://bucket.example/list.csv?part=1"


def test_brackets_in_a_path_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    runtime.console.print("dataset  data/[/old]/[red]x")
    assert capsys.readouterr().out == "dataset  data/[/old]/[red]x\n"


@pytest.mark.parametrize("uri", ["nonsense://bucket/x", "foo://x"])
def test_scheme_that_nothing_opens_is_usage(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runtime.location("input", uri)
    assert ended.value.code == runtime.USAGE
    assert capsys.readouterr().err.startswith(f"error: --input {uri}: ")


def test_cluster_that_does_not_answer_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runtime.require_answer("127.0.0.1:1")
    assert ended.value.code == runtime.USAGE
    assert "RAY_ADDRESS=127.0.0.1:1" in capsys.readouterr().err
    runtime.require_answer("auto")


def test_command_to_type_again(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["jobs/x.py", "small", "--output", "my runs", "--stop_after=crops", "--training.samples", "8"]  # fmt: skip
    secret = "s3://me:hush7@bucket/x"
    monkeypatch.setattr("sys.argv", [*line, "--dataset", secret, f"--input={secret}", "--url=s3://b/x=1"])  # fmt: skip
    told = runtime.again("training.samples", 16, without="stop-after")
    assert told == (
        "python jobs/x.py small --output 'my runs' --dataset ... --input=... --url=s3://b/x=1 --training.samples 16"
    )


def test_places_that_do_not_do_are_one_line_and_our_bugs_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        runtime.main((tmp_path / "file" / "below").mkdir)
    assert ended.value.code == runtime.USAGE
    told = capsys.readouterr().err
    assert told == f"error: {tmp_path}/file/below: Not a directory\n"
    with pytest.raises(SystemExit) as ended:
        runtime.main((tmp_path / "not" / "there").mkdir)
    assert ended.value.code == runtime.FAULT
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_a_private_ray_is_shown_its_token_by_jobs_that_import_ray_first() -> None:
    """Trainings import Ray at their top; what they connect to asks for the token of jobs/__init__.py."""
    code = (
        "from jobs import train_motion, runtime; import ray; runtime.connect(1);"
        "print(ray.get(ray.remote(lambda: 'answered').remote()))"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
    }
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip().endswith("answered")


def test_ctrl_c_during_imports_is_one_line() -> None:
    """The job's imports are replaced by a wait, in which the signal comes."""
    code = (
        "import sys; sys.path.insert(0, 'jobs'); import script_path, os, signal, time;"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert (told.returncode, told.stderr) == (130, "interrupted; nothing was begun\n")
