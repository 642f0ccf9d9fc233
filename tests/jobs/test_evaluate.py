"""``jobs/evaluate.py`` from its flags to its files and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from jobs import evaluate, runtime
from models import bundle
from models.aligner.subject import of_person
from pipelines import scores, tracking
from tests.datasets import made_video, make_dataset
from tests.swaps import toy_bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return toy_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two drawn people to be tested on."""
    output = str(tmp_path_factory.mktemp("people") / "out")
    make_dataset(output, [made_video(f"id0{n}", "v0", split="test", tracks=1) for n in (1, 2)])
    return output


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Runs the job in this process; returns its exit code."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def job(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *arguments])
        try:
            runtime.main(evaluate.job)
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    return job


@pytest.mark.slow
def test_scores_are_written_logged_and_told(run, dataset, bundles, tmp_path, capsys) -> None:
    """Networks that learned nothing make no faces: their scores are there all the same, and the code says so."""
    aligner, blender = bundles
    output = tmp_path / "scores"
    flags = (f"--dataset={dataset}", f"--output={output}", "--samples=2", "--batch=2", "--shots", "1", "2")  # fmt: skip
    assert run(*flags, f"--aligner={aligner}", f"--blender={blender}") == 3
    told = capsys.readouterr()
    assert "no face is found in any generated picture" in told.err
    assert "index.html" in told.out
    found = json.loads((output / scores.SCORES).read_text())
    assert set(found["scores"]["aligner"]) == {"self, K = 1", "cross, K = 1", "self, K = 2", "cross, K = 2"}  # fmt: skip
    assert found["scores"]["aligner"]["self, K = 1"]["psnr"]["count"] == 2
    assert set(found["scores"]["blender"]) == {"own colours", "other colours"}
    assert found["about"]["aligner"]["sha256"]
    assert {path.name for path in output.glob("*.png")} == {"aligner-0.png", "blender-0.png", "blender-1.png"}  # fmt: skip
    page = (output / scores.PAGE).read_text()
    assert page.count("data:image/jpeg") == 3
    client = mlflow.MlflowClient(tracking.find_store(str(output), submitted=False).uri)
    experiment = client.get_experiment_by_name("headray-evaluate")
    (logged,) = client.search_runs([experiment.experiment_id])
    value = found["scores"]["blender"]["own colours"]["psnr"]["value"]
    assert logged.data.metrics["blender/own_colours/psnr"] == pytest.approx(value)
    # the Blender alone needs no face
    alone = tmp_path / "alone"
    own = (flags[0], f"--output={alone}", "--samples=1", f"--blender={blender}")
    assert run(*own) == run(*own) == 0  # an output may be written again
    assert set(json.loads((alone / scores.SCORES).read_text())["scores"]) == {"blender"}
    # with other settings, or over a dataset or a bundle, it may not
    before = (Path(aligner) / "config.json").read_bytes()
    for place, extra in (
        (alone, "--samples=2"),
        (dataset, "--samples=1"),
        (aligner, "--samples=1"),
    ):
        assert run(flags[0], f"--output={place}", extra, f"--blender={blender}") == 2
        assert "--output" in capsys.readouterr().err
    assert (Path(aligner) / "config.json").read_bytes() == before


def test_what_cannot_be_scored_is_said_in_one_line(run, dataset, bundles, tmp_path, capsys) -> None:
    aligner, blender = bundles
    personal = str(tmp_path / "personal")
    network = bundle.load(aligner)
    own = of_person(network, torch.zeros(1, network.config.source_dim))
    bundle.save(own, personal, {}, np.zeros((4, 4, 3), np.uint8))
    output = f"--output={tmp_path / 'scores'}"
    for flags, wanted in (
        ([f"--dataset={dataset}"], "nothing to evaluate"),
        ([f"--dataset={dataset}", f"--aligner={blender}"], "of Blender, not of Aligner"),
        ([f"--dataset={dataset}", f"--aligner={personal}"], "fine-tuned to one person"),
        ([f"--dataset={tmp_path}/none", f"--blender={blender}"], "none"),
        ([f"--dataset={dataset}", f"--blender={blender}", "--split=val"], "val"),
        ([f"--dataset={dataset}", f"--blender={blender}", "--samples=0"], "at least 1"),
    ):
        assert run(*flags, output) == 2, flags
        told = capsys.readouterr().err
        assert wanted in told
        assert "Traceback" not in told
