"""Training the Aligner as a user does: the smoke preset on drawn people, killed, resumed, exported, its losses pinned."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from jobs import calibrate, export, train_aligner
from models import bundle
from models.aligner.network import Aligner
from models.frozen.vgg import Vgg19Features
from pipelines import checkpoints
from pipelines.samples_aligner import aligner_batches
from tests.material import REPOSITORY, SHARED, needs_shared
from tests.pipelines.test_training import assert_same
from tests.runs import ONE_THREAD, run_job, start_job
from tests.trainings import fails, history, make_people, train_smoke

GOLDEN = REPOSITORY / "tests" / "assets" / "train_aligner_smoke.json"


@pytest.fixture
def dataset(people: Path) -> Path:
    return people


@pytest.fixture
def undisturbed(smoke_training: tuple[Path, str]) -> tuple[Path, str]:
    return smoke_training


LOSSES = ("loss/l1", "loss/adversarial", "loss/discriminator", "norm/aligner")


@pytest.mark.slow
def test_twenty_losses_of_the_smoke_preset(undisturbed: tuple[Path, str]) -> None:
    """Against tests/assets/train_aligner_smoke.json; ``python -m tests.jobs.test_train_aligner`` wrote it."""
    golden = json.loads(GOLDEN.read_text())
    for name in LOSSES:
        logged = history(undisturbed[0], name)
        assert [step for step, _ in logged] == list(range(2, 41, 2))
        assert [value for _, value in logged] == pytest.approx(golden[name], rel=1e-4), name


@pytest.mark.slow
def test_everything_is_where_the_summary_says(undisturbed: tuple[Path, str]) -> None:
    folder, text = undisturbed
    output = folder / "out"
    assert f"bundle   {output / 'bundle'}" in text
    assert "identity losses are off" in text
    network = bundle.load(str(output / "bundle"))
    assert isinstance(network, Aligner)
    assert network.config == train_aligner.PRESETS["smoke"].learner.network
    card = bundle.read_card(str(output / "bundle"))
    manifest = (folder.parent / card["dataset"]["uri"] / "dataset.json").read_bytes()
    assert card["dataset"]["digest"] == hashlib.sha256(manifest).hexdigest()[:12]
    assert card["samples_seen"] == 40
    preview = cv2.imread(str(output / "bundle" / "preview.png"))
    assert preview.shape == (20 + 2 * 64, 5 * 64, 3)  # two people; five columns


@pytest.mark.slow
def test_the_same_command_again_and_another(
    undisturbed: tuple[Path, str],
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = undisturbed
    before = (folder / "out" / "bundle" / "model.safetensors").read_bytes()
    code, text = train_smoke(folder, dataset)
    assert code == 0, text
    assert "nothing to do" in text
    assert (folder / "out" / "bundle" / "model.safetensors").read_bytes() == before
    flags = ["smoke", f"--dataset={dataset}", f"--output={folder / 'out'}", "--learner.lr=0.001"]
    text = fails(monkeypatch, capsys, train_aligner.job, *flags)
    assert "learner.lr was 0.0001, now 0.001" in " ".join(text.split())


@pytest.mark.slow
def test_export_of_the_newest_checkpoint_is_the_bundle(
    undisturbed: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = undisturbed[0] / "out"
    flags = [f"--run={output}", f"--output={tmp_path / 'bundle'}"]
    code, text = run_job("export", *flags, folder=tmp_path)
    assert code == 0, text
    for name in ("model.safetensors", "config.json", "preview.png", "card.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (
            output / "bundle" / name
        ).read_bytes(), name
    assert "[20, 40]" in fails(monkeypatch, capsys, export.job, *flags, "--samples=7")
    over = [f"--run={output}", f"--output={output}"]
    assert "no bundle, a run perhaps" in fails(monkeypatch, capsys, export.job, *over)


@pytest.mark.slow
def test_killed_and_rerun_ends_with_the_same_numbers(
    undisturbed: tuple[Path, str], dataset: Path, tmp_path: Path
) -> None:
    """``kill -9`` of everything after the first checkpoint; MLflow has one run with every step once."""
    job = start_job(
        "train_aligner", "smoke", f"--dataset={dataset}", f"--output={tmp_path / 'out'}",
        "--training.checkpoint-every=10", folder=tmp_path, extra=ONE_THREAD,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not checkpoints.newest(str(tmp_path / "out")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert checkpoints.samples_of(checkpoints.newest(str(tmp_path / "out"))) in (10, 20)
    code, text = train_smoke(tmp_path, dataset, "--training.checkpoint-every=10")
    assert code == 0, text
    assert "going on from" in text
    assert_same(undisturbed[0] / "out", tmp_path / "out")
    for name in LOSSES:
        assert history(tmp_path, name) == history(undisturbed[0], name)


# --- what is wrong is said before anything starts -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--samples.output-size=128"], "--learner.network.size 64 and --samples.output-size 128"),
        (["--held-out.split=val"], "--held-out.split names another"),
        (["--samples.max-sources=30"], "at most"),
        (["--cluster.num-workers=3"], "cannot be divided among 3 workers"),
        (["--learner.accumulate=3"], "--learner.accumulate 3 must divide a worker's 2 samples"),
        (["--cluster.gpu=yes"], "--cluster.gpu yes: torch finds no GPU"),
        (["--init={tmp}/nothing"], "no bundle there"),
        (["--dataset={tmp}"], "not a (finished) dataset"),
    ],
)
def test_wrong_arguments_are_one_line(
    flags: list[str],
    told: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    line = fails(
        monkeypatch,
        capsys,
        train_aligner.job,
        "smoke",
        f"--dataset={dataset}",
        f"--output={tmp_path}/out",
        *given,
    )
    assert told in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_changed_shard_and_missing_weights_are_one_line(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(dataset, tmp_path / "copy")
    shard = min((tmp_path / "copy" / "shards").glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    flags = ["smoke", f"--dataset={tmp_path / 'copy'}", f"--output={tmp_path}/out"]
    line = fails(monkeypatch, capsys, train_aligner.job, *flags, "--samples.check-hashes")
    assert shard.name in line
    assert "sha256" in line
    assert len(line.splitlines()) == 1

    monkeypatch.setenv("HEADRAY_WEIGHTS", str(tmp_path / "nowhere"))
    line = fails(
        monkeypatch, capsys, train_aligner.job, *flags, "--learner.vgg=vgg_normalised_conv3_1"
    )
    assert "vgg" in line
    assert "nowhere" in line
    assert len(line.splitlines()) == 1


@pytest.mark.real
@needs_shared
def test_calibration_is_measured_once_and_becomes_part_of_the_configuration(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HEADRAY_WEIGHTS", str(SHARED / "weights"))
    layers = ["relu1_1", "relu2_1", "relu3_1"]
    networks = ["--learner.vgg=vgg_normalised_conv3_1", "--learner.vgg-layers", *layers]
    monkeypatch.setattr(
        sys, "argv",
        ["calibrate", "smoke", f"--dataset={dataset}", f"--output={tmp_path}/w.json", "--targets=8", *networks],
    )  # fmt: skip
    calibrate.job()
    found = json.loads((tmp_path / "w.json").read_text())
    assert found["vgg_layers"] == layers
    assert found["targets"] == 8

    learner = replace(
        train_aligner.PRESETS["smoke"].learner,
        vgg="vgg_normalised_conv3_1",
        vgg_layers=tuple(layers),
    )
    network = Vgg19Features(learner.vgg_layers, "vgg_normalised_conv3_1")
    samples = train_aligner.PRESETS["smoke"].samples
    batches = aligner_batches(samples, str(dataset), samples_seen=0, rank=0, world_size=1)
    targets = torch.cat([batch.target for batch in islice(batches, 4)])
    magnitudes = [feature.abs().mean().item() for feature in network(targets)]
    assert found["vgg_weights"] == pytest.approx([1 / 3 / size for size in magnitudes], rel=1e-4)

    config = train_aligner.weighted(learner, f"{tmp_path}/w.json")
    assert config.vgg_weights == tuple(found["vgg_weights"])
    with pytest.raises(SystemExit):  # of other layers
        train_aligner.weighted(train_aligner.PRESETS["base"].learner, f"{tmp_path}/w.json")
    assert "relu4_1" in capsys.readouterr().err


def test_paper_is_the_supplement() -> None:
    """The lines of the seed that a configuration can hold; docs/training.md has them in words."""
    paper = train_aligner.PRESETS["paper"]
    shape, learner = paper.learner.network, paper.learner
    assert (shape.portrait_dim, shape.pose_dim, shape.expression_dim) == (512, 256, 256)
    assert (shape.identity, shape.hidden, shape.size) == ("arcface", 768, 512)
    assert (shape.portrait_blocks, shape.portrait_groups, shape.motion_width) == (
        (3, 4, 6, 3),
        32,
        1,
    )
    assert (shape.paper_strict, shape.has_mask, shape.motion_encoder) == (True, False, "split")
    assert shape.schedule == "append64"
    assert (learner.lr, learner.discriminator_lr, learner.betas) == (1e-4, 4e-4, (0.9, 0.999))
    assert (paper.samples.batch_size, paper.cluster.num_workers) == (6, 6)
    assert paper.samples.pairing == "identity"


def write_golden(folder: Path) -> dict[str, Any]:
    """The numbers of a run of the smoke preset on this machine."""
    make_people(folder / "data")
    code, text = train_smoke(folder, folder / "data")
    assert code == 0, text
    return {name: [value for _, value in history(folder, name)] for name in LOSSES}


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        GOLDEN.write_text(json.dumps(write_golden(Path(made)), indent=1) + "\n")
