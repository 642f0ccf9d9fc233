"""Training the Blender as a user does: the smoke preset on drawn people, killed, resumed, exported, its losses pinned."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from jobs import calibrate, runtime, train_blender
from models import bundle
from models.aligner.network import Aligner
from models.blender.learner import PERCEPTUAL_LAYERS, PREVIEW_COLUMNS, BlenderLearner
from models.blender.network import Blender
from models.frozen.vgg import Vgg19Features
from pipelines import checkpoints
from pipelines.samples_blender import blender_batches
from tests.aligners import NETWORK
from tests.material import REPOSITORY, SHARED, needs_shared
from tests.models.blender.scenes import doubled
from tests.pipelines.test_samples_blender import WRONG, relabelled
from tests.pipelines.test_training import assert_same
from tests.runs import ONE_THREAD, run_job, start_job
from tests.trainings import fails, history, make_people

GOLDEN = REPOSITORY / "tests" / "assets" / "train_blender_smoke.json"
LOSSES = ("loss/l1", "loss/cycle", "loss/cycle_other", "loss/adversarial", "loss/discriminator", "norm/blender")  # fmt: skip


def train_smoke(folder: Path, dataset: Path, aligner: Path, *flags: str) -> tuple[int, str]:
    """``train_blender smoke`` with an Aligner, into ``folder/out``, on one thread."""
    return run_job("train_blender", *arguments(folder, dataset, aligner), *flags, folder=folder, extra=ONE_THREAD)  # fmt: skip


def arguments(folder: Path, dataset: Path, aligner: Path) -> list[str]:
    return [
        "smoke", f"--dataset={dataset}", f"--output={folder / 'out'}", f"--aligner={aligner}",
        "--samples.pairs.p-reenacted=0.5",
    ]  # fmt: skip


def make_aligner(uri: Path) -> Path:
    """A bundle of an untrained Aligner of 64 px, the same on every machine, whose identity network needs no file."""
    torch.manual_seed(3)
    network = Aligner(replace(NETWORK, size=64, encoder_size=32, identity="dlib"))
    bundle.save(network.eval(), str(uri), {"model": "aligner"}, np.zeros((8, 8, 3), np.uint8))
    return uri


@pytest.fixture(scope="module")
def aligner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_aligner(tmp_path_factory.mktemp("aligner") / "bundle")


@pytest.fixture(scope="module")
def undisturbed(
    people: Path, aligner: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("blender")
    code, text = train_smoke(folder, people, aligner)
    assert code == 0, text
    return folder, text


def smoke_losses(dataset: Path) -> list[dict[str, float]]:
    """Of the smoke preset's 20 steps, in float64: in float32 they differ by a hundredth from the third step on between AVX2 and
    AVX-512, in float64 by nothing that JSON shows."""
    preset = train_blender.PRESETS["smoke"]
    torch.manual_seed(0)
    learner = BlenderLearner(preset.learner, wrap=lambda network: network, device=torch.device("cpu"))  # fmt: skip
    learner.networks.double()
    batches = blender_batches(preset.samples, str(dataset), samples_seen=0, rank=0, world_size=1)
    steps = [learner.train_step(doubled(batch), 2 * i) for i, batch in enumerate(islice(batches, 20))]  # fmt: skip
    return [{name: value.item() for name, value in metrics.items()} for metrics in steps]


@pytest.mark.slow
def test_twenty_losses_of_the_smoke_preset(people: Path) -> None:
    """Against tests/assets/train_blender_smoke.json; ``python -m tests.jobs.test_train_blender`` wrote it."""
    golden = json.loads(GOLDEN.read_text())
    found = smoke_losses(people)
    assert len(golden) == len(found) == 20
    for step, (expected, metrics) in enumerate(zip(golden, found, strict=True)):
        assert metrics == pytest.approx(expected, rel=1e-4), f"step {step}"


@pytest.mark.slow
def test_every_step_is_recorded(undisturbed: tuple[Path, str]) -> None:
    for name in LOSSES:
        logged = history(undisturbed[0], name, "blender")
        assert [step for step, _ in logged] == list(range(2, 41, 2))
        assert np.isfinite([value for _, value in logged]).all()


@pytest.mark.slow
def test_everything_is_where_the_summary_says(undisturbed: tuple[Path, str]) -> None:
    folder, text = undisturbed
    output = folder / "out"
    assert f"bundle   {output / 'bundle'}" in text
    assert "its perceptual loss is off" in text
    assert "no Aligner" not in text
    network = bundle.load(str(output / "bundle"))
    assert isinstance(network, Blender)
    assert network.config == train_blender.PRESETS["smoke"].learner.network
    card = bundle.read_card(str(output / "bundle"))
    assert (card["model"], card["samples_seen"]) == ("blender", 40)
    assert card["scores"]["eval/score/psnr_painted"] > 3
    preview = cv2.imread(str(output / "bundle" / "preview.png"))
    assert preview.shape == (20 + 2 * 64, len(PREVIEW_COLUMNS) * 64, 3)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert str(client.get_model_version_by_alias("headray-blender", "candidate").version) == "1"


@pytest.mark.slow
def test_export_of_the_newest_checkpoint_is_the_bundle(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """Without the files of any network."""
    output = undisturbed[0] / "out"
    flags = [f"--run={output}", f"--output={tmp_path / 'bundle'}"]
    code, text = run_job("export", *flags, folder=tmp_path, extra={"HEADRAY_WEIGHTS": "/nowhere"})
    assert code == 0, text
    for name in ("model.safetensors", "config.json", "preview.png", "card.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (
            output / "bundle" / name
        ).read_bytes(), name


@pytest.mark.slow
def test_killed_and_rerun_ends_with_the_same_numbers(
    undisturbed: tuple[Path, str], people: Path, aligner: Path, tmp_path: Path
) -> None:
    """``kill -9`` of everything after the first checkpoint."""
    job = start_job(
        "train_blender", *arguments(tmp_path, people, aligner), "--training.checkpoint-every=10",
        folder=tmp_path, extra=ONE_THREAD,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not checkpoints.newest(str(tmp_path / "out")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert checkpoints.samples_of(checkpoints.newest(str(tmp_path / "out"))) in (10, 20)
    code, text = train_smoke(tmp_path, people, aligner, "--training.checkpoint-every=10")
    assert code == 0, text
    assert "going on from" in text
    assert_same(undisturbed[0] / "out", tmp_path / "out")
    for name in LOSSES:
        assert history(tmp_path, name, "blender") == history(undisturbed[0], name, "blender")


# --- what is wrong is said before anything starts -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--samples.output-size=128"], "--learner.network.size 64 and --samples.output-size 128"),
        (["--held-out.split=val"], "--held-out.split names another"),
        (["--cluster.num-workers=3"], "cannot be divided among 3 workers"),
        (["--learner.accumulate=3"], "--learner.accumulate 3 must divide a worker's 2 samples"),
        (["--learner.perceptual=vgg19"], "python jobs/calibrate.py blender-..."),
        (["--calibration={tmp}/nothing"], "not a file of jobs/calibrate.py"),
        (["--aligner={tmp}/nothing"], "no bundle there"),
        (["--aligner={aligner}", "--samples.pairs.p-reenacted=0"], "--aligner has no effect while"),
        (["--aligner={aligner}", "--samples.sources=30"], "at most"),
        (
            ["--aligner={aligner}", "--samples.output-size=32", "--learner.network.size=32"],
            "makes pictures of 64 px, --samples.output-size is 32",
        ),
        (["--aligner={blender}"], "the bundle of a Blender, not of an Aligner"),
        (["--dataset={tmp}"], "not a (finished) dataset"),
    ],
)
def test_wrong_arguments_are_one_line(
    flags: list[str],
    told: str,
    people: Path,
    aligner: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"tmp": tmp_path, "aligner": aligner, "blender": tmp_path / "blender"}
    if "{blender}" in flags[0]:
        network = Blender(train_blender.PRESETS["smoke"].learner.network)
        bundle.save(network, str(places["blender"]), {}, np.zeros((8, 8, 3), np.uint8))
    given = [flag.format(**places) for flag in flags]
    line = fails(
        monkeypatch, capsys, train_blender.job, "smoke", f"--dataset={people}", f"--output={tmp_path}/out", *given,
    )  # fmt: skip
    assert told in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_label_map_ends_with_2_and_one_line(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    png, reason = WRONG[kind]
    dataset = relabelled(tmp_path / "data", png)
    line = fails(
        monkeypatch, capsys, train_blender.job, "smoke", f"--dataset={dataset}", f"--output={tmp_path}/out",
    )  # fmt: skip
    assert reason in line
    assert len(line.splitlines()) == 1


@pytest.mark.real
@needs_shared
def test_calibration_is_measured_once_and_becomes_part_of_the_configuration(
    people: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HEADRAY_WEIGHTS", str(SHARED / "weights"))
    file = tmp_path / "w.json"
    name = "vgg_normalised_conv3_1"
    monkeypatch.setattr(
        sys, "argv",
        ["calibrate", "blender-smoke", f"--dataset={people}", f"--output={file}", "--targets=8", f"--learner.perceptual={name}"],
    )  # fmt: skip
    calibrate.job()
    assert "python jobs/train_blender.py" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["vgg_layers"] == list(PERCEPTUAL_LAYERS[name])
    samples = train_blender.PRESETS["smoke"].samples
    batches = blender_batches(samples, str(people), samples_seen=0, rank=0, world_size=1)
    truths = torch.cat([batch.truth for batch in islice(batches, 4)])
    network = Vgg19Features(PERCEPTUAL_LAYERS[name], name)
    magnitudes = [feature.abs().mean().item() for feature in network(truths)]
    assert found["vgg_weights"] == pytest.approx([1 / 3 / size for size in magnitudes], rel=1e-4)
    learner = replace(train_blender.PRESETS["smoke"].learner, perceptual=name)
    weighted = train_blender.weighted(learner, str(file))
    assert weighted.perceptual_weights == tuple(found["vgg_weights"])
    with pytest.raises(SystemExit):  # of another network
        train_blender.weighted(replace(learner, perceptual="vgg19"), str(file))
    assert "relu5_1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["calibrate", "blender-smoke", f"--dataset={people}", f"--output={file}"])  # fmt: skip
    with pytest.raises(SystemExit):
        calibrate.job()
    assert "nothing to calibrate" in capsys.readouterr().err


def test_an_aligner_of_the_registry_is_fetched_once(
    aligner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``@alias`` means may change; a run goes on with what it began with."""
    asked = []
    monkeypatch.setattr(runtime.tracking, "find_bundle", lambda uri: asked.append(uri) or str(aligner))  # fmt: skip
    places = [runtime.fetch_bundle("models:/headray-aligner@best", str(tmp_path), "aligner") for _ in range(2)]  # fmt: skip
    assert asked == ["models:/headray-aligner@best"]
    assert places[0] == places[1] != str(aligner)
    assert isinstance(bundle.load(places[0]), Aligner)


def test_paper_is_the_supplement() -> None:
    """The lines of the seed that a configuration can hold; docs/training.md has them in words."""
    paper = train_blender.PRESETS["paper"]
    shape, learner = paper.learner.network, paper.learner
    assert (shape.size, shape.trunk, shape.unet, shape.labels) == (512, "vgg19", "resunet7", "fine")
    assert (learner.lr, learner.discriminator_lr, learner.perceptual) == (1e-4, 4e-4, "vgg19")
    assert (paper.samples.output_size, paper.cluster.num_workers) == (512, 2)
    assert min(learner.l1, learner.cycle, learner.cycle_other, learner.adversarial) > 0
    assert learner.lightness == 0, "GHOST 2.0's alone"
    assert paper.samples.pairs.p_reenacted == 0, "real frames"


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        GOLDEN.write_text(json.dumps(smoke_losses(make_people(Path(made))), indent=1) + "\n")
