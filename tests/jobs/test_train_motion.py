"""Training the motion model as a user does: both stages of the smoke preset, killed, resumed, exported, its losses pinned."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import av
import cv2
import pytest
import torch

from jobs import export, runtime, train_motion
from models import bundle
from models.motion.learner import samples_in_epoch
from models.motion.network import Motion
from pipelines import checkpoints
from pipelines.animate import load_model
from tests.material import REPOSITORY
from tests.pipelines.test_training import assert_same
from tests.runs import ONE_THREAD, run_job, start_job
from tests.trainings import fails, history, make_people

GOLDEN = REPOSITORY / "tests" / "assets" / "train_motion_smoke.json"
MODEL = "motion"
LOSSES = ("loss/reconstruction", "loss/mask_prior", "norm/motion")


def train(folder: Path, dataset: Path, *flags: str) -> str:
    """``train_motion smoke`` into ``folder/out`` in this process, on one thread; what it printed."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as text:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.chdir(folder)
        arguments = ["smoke", f"--dataset={dataset}", f"--output={folder / 'out'}", *flags]
        patch.setattr(sys, "argv", ["train_motion", *arguments])
        torch.set_num_threads(1)
        try:
            train_motion.job()
        finally:
            torch.set_num_threads(threads)
    return text.getvalue()


def client_of(folder: Path) -> Any:
    """Of the store in a folder, with the id of its only run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("headray-motion")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run.info.run_id


@pytest.fixture(scope="module")
def stage1(people: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a training that nobody disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("stage1")
    return folder, train(folder, people)


@pytest.mark.slow
def test_twenty_losses_of_the_smoke_preset(stage1: tuple[Path, str]) -> None:
    """Against tests/assets/train_motion_smoke.json; ``python -m tests.jobs.test_train_motion`` wrote it.

    In float32, where 20 steps differ by 0.7 % between kernels (docs/log.md): exact are the learner's own, in float64.
    """
    golden = json.loads(GOLDEN.read_text())
    for name in LOSSES:
        logged = history(stage1[0], name, MODEL)
        assert [step for step, _ in logged] == list(range(2, 41, 2))
        assert [value for _, value in logged] == pytest.approx(golden[name], rel=0.02), name


@pytest.mark.slow
def test_everything_is_where_the_summary_says(stage1: tuple[Path, str], people: Path) -> None:
    folder, text = stage1
    output = folder / "out"
    assert "an epoch is 2 x 75 (identity) = 150 pairs, 75 steps of 2" in text
    assert "stage 1 has 140 epochs, 10,500 steps" in text
    assert f"bundle   {output / 'bundle'}" in text
    assert "the gaze is not driven" in text
    network = load_model(str(output / "bundle"))
    assert isinstance(network, Motion)
    assert network.config == train_motion.PRESETS["smoke"].learner.network
    card = bundle.read_card(str(output / "bundle"))
    manifest = (people / "dataset.json").read_bytes()
    assert card["dataset"]["digest"] == hashlib.sha256(manifest).hexdigest()[:12]
    assert (card["samples_seen"], card["stage"]) == (40, 1)
    assert card["scores"]["eval/metric/l1_source"] > 0
    preview = cv2.imread(str(output / "bundle" / "preview.png"))
    assert preview.shape == (20 + 2 * 64, 6 * 64, 3)  # two people; six columns
    config = json.loads((output / "config.json").read_text())["config"]
    assert config["learner"]["schedule"]["epoch_samples"] == 150


@pytest.mark.slow
def test_mlflow_has_films_previews_and_the_registered_model(
    stage1: tuple[Path, str], tmp_path: Path
) -> None:
    client, run_id = client_of(stage1[0])
    films = [item.path for item in client.list_artifacts(run_id, "films")]
    assert films == [f"films/{step:012d}.mp4" for step in (0, 20, 40)]
    path = client.download_artifacts(run_id, films[-1], str(tmp_path))
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5  # a test person's clip has 6 frames, its first is the source
    assert frames[0].shape == (20 + 64, 6 * 64, 3)
    sources, driving = ([frame[20:, 64 * n : 64 * n + 64] for frame in frames] for n in (0, 1))
    assert abs(sources[0].astype(int) - sources[-1]).mean() < 3
    assert abs(driving[0].astype(int) - driving[-1]).mean() > 1
    previews = [item.path for item in client.list_artifacts(run_id, "images")]
    assert len([name for name in previews if name.endswith(".png")]) == 3
    (version,) = client.search_model_versions("name = 'headray-motion'")
    assert (
        client.get_model_version_by_alias("headray-motion", "candidate").version == version.version
    )


@pytest.mark.slow
def test_stage_two_goes_on_from_the_bundle_of_stage_one(
    stage1: tuple[Path, str], people: Path, tmp_path: Path
) -> None:
    first = stage1[0] / "out" / "bundle"
    text = train(tmp_path, people, "--learner.stage=2", f"--init-from={first}", "--training.samples=8")  # fmt: skip
    assert "stage 2 has 140 epochs" in text
    before = dict(history(stage1[0], "eval/loss/reconstruction", MODEL))[40]
    assert dict(history(tmp_path, "eval/loss/reconstruction", MODEL))[0] == before
    for name in ("loss/adversarial", "loss/feature_matching", "loss/discriminator"):
        assert [step for step, _ in history(tmp_path, name, MODEL)] == [2, 4, 6, 8], name
    card = bundle.read_card(str(tmp_path / "out" / "bundle"))
    assert (card["stage"], card["samples_seen"]) == (2, 8)
    saved = checkpoints.read(checkpoints.newest(str(tmp_path / "out")))
    rates = {name: each["param_groups"][0]["lr"] for name, each in saved["optimizers"].items()}
    assert rates == {"motion": 2e-4, "discriminator": 2e-6}


@pytest.mark.slow
def test_the_same_command_again_and_another(stage1: tuple[Path, str], people: Path) -> None:
    folder, _ = stage1
    before = (folder / "out" / "bundle" / "model.safetensors").read_bytes()
    assert "nothing to do" in train(folder, people)
    assert "nothing to do" in train(folder, people, "--learner.schedule.epochs=200")
    assert (folder / "out" / "bundle" / "model.safetensors").read_bytes() == before
    with pytest.raises(runtime.ConfigError, match=r"learner.lr was 0.0002, now 0.001"):
        train(folder, people, "--learner.lr=0.001")


@pytest.mark.slow
def test_export_of_the_newest_checkpoint_is_the_bundle(
    stage1: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = stage1[0] / "out"
    flags = [f"--run={output}", f"--output={tmp_path / 'bundle'}"]
    monkeypatch.setattr(sys, "argv", ["export", *flags])
    export.job()
    for name in ("model.safetensors", "config.json", "preview.png", "card.json"):
        made, own = ((folder / name).read_bytes() for folder in (tmp_path / "bundle", output / "bundle"))  # fmt: skip
        assert made == own, name


@pytest.mark.slow
def test_killed_and_rerun_ends_with_the_same_numbers(
    stage1: tuple[Path, str], people: Path, tmp_path: Path
) -> None:
    """``kill -9`` of everything after the first checkpoint; MLflow has one run with every step once."""
    flags = [f"--dataset={people}", f"--output={tmp_path / 'out'}", "--training.checkpoint-every=10"]  # fmt: skip
    job = start_job("train_motion", "smoke", *flags, folder=tmp_path, extra=ONE_THREAD)
    deadline = time.monotonic() + 600
    while not checkpoints.newest(str(tmp_path / "out")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert checkpoints.samples_of(checkpoints.newest(str(tmp_path / "out"))) in (10, 20, 30)
    code, text = run_job("train_motion", "smoke", *flags, folder=tmp_path, extra=ONE_THREAD)
    assert code == 0, text
    assert "going on from" in text
    assert_same(stage1[0] / "out", tmp_path / "out")
    for name in LOSSES:
        assert history(tmp_path, name, MODEL) == history(stage1[0], name, MODEL)


# --- what is wrong is said before anything starts -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--samples.size=128"], "--learner.network.size 64 and --samples.size 128"),
        (["--samples.num-landmarks=70"], "num-landmarks 68 and --samples.num-landmarks 70"),
        (["--learner.network.num-landmarks=70", "--samples.num-landmarks=70"], "no pupils.npy"),
        (["--learner.stage=2"], "--learner.stage 2 goes on from stage 1"),
        (["--held-out.split=val"], "--held-out.split names another"),
        (["--samples.reserve=0.9"], "of them to train on"),
        (["--cluster.num-workers=3"], "cannot be divided among 3 workers"),
        (["--learner.accumulate=3"], "--learner.accumulate 3 must divide a worker's 2 samples"),
        (["--init-from={tmp}/nothing"], "no bundle there"),
        (["--dataset={tmp}"], "not a (finished) dataset"),
    ],
)
def test_wrong_arguments_are_one_line(
    flags: list[str],
    told: str,
    people: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    own = ["smoke", f"--dataset={people}", f"--output={tmp_path}/out"]
    line = fails(monkeypatch, capsys, train_motion.job, *own, *given)
    assert told in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out" / "config.json").exists()


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_voxceleb1_is_the_supplement(capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of the seed that a configuration can hold; docs/training.md has them in words."""
    preset = train_motion.PRESETS["voxceleb1"]
    shape, learner, schedule = preset.learner.network, preset.learner, preset.learner.schedule
    assert shape.global_encoder == (32, 64, 128, 256, 512, 1024, 1024)
    assert shape.global_decoder == (1024, 1024, 512, 256, 128, 64, 32)
    assert shape.local_encoder == shape.local_decoder[::-1] == (16, 32, 64, 128, 256)
    assert (shape.global_adaptive, shape.local_adaptive, shape.size, shape.patch) == (4, 3, 256, 64)
    assert learner.discriminator_widths == (128, 256, 512, 1024)
    assert (learner.lr, learner.lr_discriminator) == (2e-4, 2e-6)
    assert (schedule.epochs, schedule.drop_epochs) == (140, (60, 80))
    assert (preset.samples.batch_size, preset.cluster.num_workers) == (40, 4)
    assert (preset.samples.repeats, preset.samples.unit) == (75, "identity")
    resolved = train_motion.with_epochs(preset, 424)
    assert resolved.learner.schedule == schedule
    assert resolved.training.samples == 140 * 424 * 75
    assert "795 steps of 40" in capsys.readouterr().out
    train_motion.with_epochs(preset, 100)
    assert "warning: the supplement's epoch has 795 steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["voxceleb1", "faceforensics"])
def test_what_the_supplement_leaves_open_is_the_reference_configuration(name: str) -> None:
    """First order model's numbers and our choices: a run is only comparable with another that has them."""
    preset = train_motion.PRESETS[name]
    learner, samples, shape = preset.learner, preset.samples, preset.learner.network
    assert (learner.betas, learner.schedule.drop_factor, learner.clip) == ((0.5, 0.999), 0.1, 10)
    assert (learner.features, learner.reconstruction) == ("vgg19", 10)
    assert (learner.adversarial, learner.feature_matching) == (1, 10)
    regularisers = (learner.mask_prior, learner.total_variation, learner.local_magnitude)
    assert regularisers == (2, 0, 0)
    assert (learner.discriminator_norm, learner.discriminator_activation) == ("batch", "relu")
    assert (learner.discriminator_padding, learner.discriminator_condition) == (0, "none")
    assert (samples.flip, samples.jitter, samples.reserve) == (0.5, 0.1, 0)
    assert (shape.adain_norm, shape.adain_pos, shape.adain_hidden) == ("instance", "norm", 256)
    assert (shape.add_motion, shape.local_add_motion, shape.skip) == ("spatial", True, "none")
    assert (shape.compose, shape.local_compose) == ("feature_blend", "residual")
    assert (shape.warp_padding, shape.local_occlusion) == ("border", False)
    assert (shape.generator_base, shape.generator_down, shape.generator_residuals) == (64, 2, 6)


def test_faceforensics_is_eighty_epochs_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    preset = train_motion.PRESETS["faceforensics"]
    resolved = train_motion.with_epochs(preset, 900)
    schedule = resolved.learner.schedule
    assert (schedule.epochs, schedule.drop_epochs, preset.samples.unit) == (80, (60,), "video")
    assert schedule.epoch_samples == samples_in_epoch(900)
    told = capsys.readouterr().out
    assert "1,687 steps of 40" in told
    assert "warning" not in told


def write_golden(folder: Path) -> dict[str, Any]:
    """The numbers of a run of the smoke preset on this machine."""
    train(folder, make_people(folder / "data"))
    return {name: [value for _, value in history(folder, name, MODEL)] for name in LOSSES}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        GOLDEN.write_text(json.dumps(write_golden(Path(made)), indent=1) + "\n")
