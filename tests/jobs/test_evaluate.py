"""``jobs/evaluate.py`` from its flags to its files and exit codes."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from jobs import evaluate, runtime
from models import bundle
from models.aligner.subject import of_person
from models.frozen.weights import REGISTRY
from pipelines import scores, tracking
from pipelines.evaluation import Row
from tests import likeness
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


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: str) -> object:
    """Runs the job in this process, which has no networks for LPIPS and FID; returns its exit code."""
    likeness.hide(tmp_path / "home", monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)

    def job(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *arguments])
        try:
            runtime.main(evaluate.job)
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    return job


def metrics_of(output: Path) -> dict[str, float]:
    """What MLflow has of the one run with this output."""
    client = mlflow.MlflowClient(tracking.find_store(str(output), submitted=False).uri)
    experiment = client.get_experiment_by_name("headray-evaluate")
    (logged,) = client.search_runs([experiment.experiment_id], f"params.output = '{output}'")
    assert logged.info.run_name == "/".join(output.parts[-2:])
    return dict(logged.data.metrics)


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
    for score, file in (("LPIPS", "alexnet-owt-7be5be79.pth"), ("FID", "weights-inception-2015-12-05-6726825d.pth")):  # fmt: skip
        (line,) = [
            line for line in told.out.splitlines() if line.startswith(f"{score} is left out: ")
        ][1:]  # and at the start
        assert file in line
        assert "put the file" in line
        assert "HEADRAY_WEIGHTS" in line
    found = json.loads((output / scores.SCORES).read_text())
    assert set(found["scores"]["aligner"]) == {"self, K = 1", "cross, K = 1", "self, K = 2", "cross, K = 2"}  # fmt: skip
    assert found["scores"]["aligner"]["self, K = 1"]["psnr"]["count"] == 2
    assert set(found["scores"]["blender"]) == {"own colours", "other colours"}
    assert found["about"]["aligner"]["sha256"]
    assert [line.split(" is ")[0] for line in found["about"]["left_out"]] == ["LPIPS", "FID"]
    assert not {"lpips", "fid"} & {name for lines in found["scores"].values() for line in lines.values() for name in line}  # fmt: skip
    assert {path.name for path in output.glob("*.png")} == {"aligner-0.png", "blender-0.png", "blender-1.png"}  # fmt: skip
    page = (output / scores.PAGE).read_text()
    assert page.count("data:image/jpeg") == 3
    assert page.count("HEADRAY_WEIGHTS") == 2
    logged = metrics_of(output)
    value = found["scores"]["blender"]["own colours"]["psnr"]["value"]
    assert logged["blender/own_colours/psnr"] == pytest.approx(value)
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


@pytest.mark.slow
def test_with_their_networks_lpips_and_fid_are_everywhere(
    run, dataset, bundles, tmp_path, capsys, monkeypatch
) -> None:
    aligner, _ = bundles
    output = tmp_path / "scores"
    flags = (f"--dataset={dataset}", f"--output={output}", f"--aligner={aligner}", "--samples=2", "--shots", "1")  # fmt: skip
    folder = likeness.write_inception(likeness.write_alexnet(tmp_path))
    likeness.accept(folder, monkeypatch)
    assert run(*flags) == 3  # no faces, as above
    told = capsys.readouterr().out
    assert "left out" not in told
    assert "LPIPS" in told
    assert "FID" in told
    found = json.loads((output / scores.SCORES).read_text())
    assert found["about"]["left_out"] == []
    lines = found["scores"]["aligner"]
    distance, apart = lines["self, K = 1"]["lpips"], lines["cross, K = 1"]["fid"]
    assert distance["value"] > 0 < apart["value"]
    assert (distance["count"], apart["count"], apart["deviation"]) == (2, 2, None)
    assert "fid" not in lines["self, K = 1"]
    assert "lpips" not in lines["cross, K = 1"]
    page = (output / scores.PAGE).read_text()
    assert f'{apart["value"]:.2f} <span class="faint">n = 2</span>' in page
    assert f"{distance['value']:.3f} <span" in page
    rows = list(csv.DictReader(io.StringIO((output / scores.ROWS).read_text())))
    values = [float(row["lpips"]) for row in rows if row["setting"] == "self, K = 1"]
    assert np.mean(values) == pytest.approx(distance["value"], rel=1e-4)
    assert all(row["lpips"] == "" for row in rows if row["setting"] == "cross, K = 1")
    logged = metrics_of(output)
    assert logged["aligner/self_K1/lpips"] == pytest.approx(distance["value"])
    assert logged["aligner/cross_K1/fid"] == pytest.approx(apart["value"])
    # another file of the same name is no reason to go on without it
    (folder / REGISTRY["alexnet"].file).write_bytes(b"something else")
    assert run(*flags) == 2
    assert "weights alexnet: " in capsys.readouterr().err


def test_a_driver_without_a_face_is_not_the_networks_fault() -> None:
    def rows(*shares: float) -> list[Row]:
        values = [{"found": share} for share in shares]
        return [Row(study="aligner", setting="", key="", driver="", values=each) for each in values]

    assert "real frame" in evaluate.useless(rows(math.nan, math.nan))
    assert "generated" in evaluate.useless(rows(math.nan, 0.0))
    assert evaluate.useless(rows(0.0, 1.0)) == evaluate.useless([]) == ""


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
        ([f"--dataset={dataset}", f"--blender={blender}", "--split=val"], "--split val: "),
        ([f"--dataset={dataset}", f"--blender={blender}", "--samples=0"], "at least 1"),
    ):
        assert run(*flags, output) == 2, flags
        told = capsys.readouterr().err
        assert wanted in told
        assert "Traceback" not in told
