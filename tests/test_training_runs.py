"""Trainings on real Ray workers: two are one, and a worker that is killed leaves no trace in the numbers."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
import ray.train
import ray.train.v2.api.data_parallel_trainer as trainer_module
import torch

from jobs import train_motion
from pipelines import checkpoints, training
from pipelines.output import CONFIG, NothingUsableError
from pipelines.samples import HeldOutConfig
from pipelines.samples_motion import held_out_batches, motion_batches
from pipelines.training import ClusterConfig
from tests.clusters import RAY, end_group, kill_raylet
from tests.material import REPOSITORY
from tests.models.motion.pairs import double_pairs, still_motion
from tests.pipelines.test_training import SHORT, assert_same, losses, tensors, toy_training
from tests.toy_learner import (
    ToyConfig,
    ToyLearner,
    ToyLearnerConfig,
    ToySamples,
)

pytestmark = pytest.mark.slow

PAIR = ClusterConfig(num_workers=2, cpus_per_worker=1, max_failures=0)


@pytest.fixture(scope="module", autouse=True)
def _cluster(bucket: str) -> Iterator[None]:  # noqa: ARG001
    """Two workers' worth of Ray; they inherit where the bucket is. The clean-up of placement groups waits 12 s for nothing in every run: shortened."""
    patch = pytest.MonkeyPatch()
    patch.setattr(
        trainer_module,
        "PlacementGroupCleanerCallback",
        functools.partial(trainer_module.PlacementGroupCleanerCallback, stop_timeout=0.5),
    )
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    patch.setenv("PYTHONPATH", str(REPOSITORY))
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", object_store_memory=120 * 2**20,
    )  # fmt: skip
    yield
    ray.shutdown()
    patch.undo()


def test_two_workers_are_one(tmp_path: Path) -> None:
    """Loss and gradients of the first update, in float64. Adam's first moment after one step is 0.1 x the gradient."""
    samples = ToySamples(double=True)
    fields = {
        "build": partial(ToyLearner, ToyLearnerConfig(network=ToyConfig(double=True))),
        "config": replace(SHORT, samples=4),
    }
    one = training.run(toy_training(tmp_path / "one", samples, **fields))
    two = training.run(toy_training(tmp_path / "two", samples, cluster=PAIR, **fields))
    assert losses(one).keys() == losses(two).keys() >= {"loss/l1", "loss/discriminator"}
    for name, value in losses(one).items():
        assert losses(two)[name] == pytest.approx(value, rel=1e-8), name
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    gradients = [name for name in first if name.endswith("exp_avg")]
    assert sum(bool(first[name].abs().max() > 0) for name in gradients) >= 5
    for name in gradients:
        torch.testing.assert_close(first[name], second[name], rtol=1e-8, atol=1e-12)


def test_two_workers_of_the_motion_model_are_one(people: Path, tmp_path: Path) -> None:
    """Stage 2's losses and gradients on pairs of a dataset, in float64 and with the batch statistics held still, without which
    two halves of a batch are not the batch (torch has SyncBatchNorm on CUDA only)."""
    samples = replace(train_motion.PRESETS["smoke"].samples, batch_size=4)
    config = replace(train_motion.PRESETS["smoke"].learner, stage=2)
    held_out = partial(held_out_batches, samples, HeldOutConfig(batches=1), str(people))
    outcomes = []
    for name, cluster in (("one", ClusterConfig(num_workers=0)), ("two", PAIR)):
        output = tmp_path / name
        output.mkdir()
        (output / CONFIG).write_text("{}")
        trained = training.Training(
            output=str(output),
            build=partial(still_motion, config),
            batches=partial(double_pairs, partial(motion_batches, samples, str(people))),
            held_out=partial(double_pairs, held_out),
            config=training.TrainingConfig(samples=4),
            cluster=cluster,
        )
        outcomes.append(losses(training.run(trained)))
    one, two = outcomes
    assert one.keys() == two.keys() >= {"loss/reconstruction", "loss/discriminator"}
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-8), name
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    gradients = [name for name in first if name.endswith("exp_avg")]
    assert sum(bool(first[name].abs().max() > 0) for name in gradients) > 60
    for name in gradients:
        torch.testing.assert_close(first[name], second[name], rtol=1e-8, atol=1e-12)


def test_killed_workers_leave_no_trace_in_the_numbers(tmp_path: Path) -> None:
    """The first killed worker is replaced; the second ends the run, and the same command goes on."""
    undisturbed = training.run(toy_training(tmp_path / "whole", cluster=PAIR))
    killed = ToySamples(kill_at=(18, 31), markers=str(tmp_path))
    disturbed = toy_training(tmp_path / "disturbed", killed, cluster=replace(PAIR, max_failures=1))
    with pytest.raises(ray.train.TrainingFailedError):
        training.run(disturbed)
    assert (tmp_path / "18").read_text() == "1"
    assert (tmp_path / "31").read_text() == "1"
    assert checkpoints.samples_of(checkpoints.newest(disturbed.output)) == 24
    outcome = training.run(disturbed)
    assert_same(tmp_path / "whole", tmp_path / "disturbed")
    assert losses(outcome) == losses(undisturbed)


def test_a_number_that_is_none_on_one_worker_stops_both(bucket: str) -> None:
    """The second worker's sample; no retry, since it would end the same. The output is a bucket."""
    healing = replace(PAIR, max_failures=3)
    output = f"{bucket}/runs/crash"
    crash = toy_training(output, ToySamples(nan_at=31), cluster=healing)
    with pytest.raises(NothingUsableError, match=r"loss/l1 = nan.*toy-30, toy-31 after 28"):
        training.run(crash)
    assert checkpoints.listed(output) == ["000000000000012.pt", "000000000000024.pt"]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_training_begins_with_one_worker_and_goes_on_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second node comes while it trains: the group grows to two, and shrinks to one when that node is killed."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    monkeypatch.setattr(training, "RESIZE_SECONDS", 3.0)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, logging_level="ERROR")
    worlds = tmp_path / "worlds"
    worlds.touch()
    folder = tempfile.mkdtemp(prefix="hr-")  # sockets want a short path
    samples = ToySamples(pause=0.25, worlds=str(worlds))
    elastic = ClusterConfig(num_workers=2, min_workers=1, cpus_per_worker=1, max_failures=9)
    long = replace(SHORT, samples=2400)
    work = toy_training(tmp_path / "out", samples, cluster=elastic, config=long)

    def await_start(number: int, size: int) -> None:
        end = time.monotonic() + 400
        while len(worlds.read_text().splitlines()) < number:
            assert time.monotonic() < end, worlds.read_text()
            time.sleep(0.2)
        assert worlds.read_text().splitlines()[number - 1].startswith(f"{size} ")

    def change() -> None:
        await_start(1, size=1)
        node = subprocess.Popen(  # Cluster.add_node works in the main thread only
            [RAY, "start", "--block", f"--address={cluster.address}", "--num-cpus=1", f"--temp-dir={folder}",
             "--dashboard-agent-listen-port=0"],
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            await_start(2, size=2)
            time.sleep(10)  # some checkpoints
            kill_raylet(node)
            await_start(3, size=1)
        finally:
            end_group(node)

    with ThreadPoolExecutor(1) as pool:
        changed = pool.submit(change)
        outcome = training.run(work)
        changed.result()
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    print(worlds.read_text())  # noqa: T201
    starts = [int(line.split()[1]) for line in worlds.read_text().splitlines()]
    assert starts == sorted(starts), "each goes on from the checkpoint of the one before"
    assert 0 < starts[1] < starts[2] < outcome.samples_seen == long.samples


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(tmp_path: Path) -> None:
    """NCCL: the same global batch on one GPU and on two, float64."""
    samples = ToySamples(double=True)
    fields = {
        "build": partial(ToyLearner, ToyLearnerConfig(network=ToyConfig(double=True))),
        "config": replace(SHORT, samples=4),
    }
    ray.shutdown()
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False)
    pair = replace(PAIR, gpu="yes")
    one = training.run(toy_training(tmp_path / "one", samples, **fields))
    two = training.run(toy_training(tmp_path / "two", samples, cluster=pair, **fields))
    for name, value in losses(one).items():
        assert losses(two)[name] == pytest.approx(value, rel=1e-8), name
