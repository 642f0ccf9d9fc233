"""The training loop: progress, resume, ranks, health of what it writes. With a toy learner; Ray is in tests/test_training_runs.py."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from models import bundle
from pipelines import checkpoints, journal, nodes, storage, training
from pipelines.output import CONFIG, ConfigError, NothingUsableError
from pipelines.training import ClusterConfig, Due, Meter, Outcome, Training, TrainingConfig
from tests.toy_learner import (
    ToyConfig,
    ToyLearner,
    ToyLearnerConfig,
    ToySamples,
    held_out,
    toy_batches,
)

LEARNER = ToyLearnerConfig()
SHORT = TrainingConfig(
    samples=40, log_every=8, evaluate_every=20, checkpoint_every=12, keep_checkpoints=2
)


def toy_training(output: Path | str, samples: ToySamples | None = None, **fields: Any) -> Training:
    """A training of the toy in this process; ``OUTPUT/config.json`` is there, as the job writes it."""
    storage.write_atomic(storage.join(str(output), CONFIG), b"{}")
    samples = samples or ToySamples()
    return Training(
        **{
            "output": str(output),
            "build": partial(ToyLearner, LEARNER),
            "batches": partial(toy_batches, samples),
            "held_out": partial(held_out, samples),
            "config": SHORT,
            "cluster": ClusterConfig(num_workers=0),
            **fields,
        }
    )


def tensors(output: Path | str) -> dict[str, torch.Tensor]:
    """Everything that is trained, by name, in the newest checkpoint, optimizers' moments included."""
    content = checkpoints.read(checkpoints.newest(str(output)))
    found = dict(content["networks"])
    for name, optimizer in content["optimizers"].items():
        for number, state in optimizer["state"].items():
            found |= {f"{name}.{number}.{key}": value for key, value in state.items()}
    return found


def assert_same(first: Path | str, second: Path | str) -> None:
    """The newest checkpoints hold the same bits."""
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    assert len(one) > 20
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(outcome: Outcome) -> dict[str, float]:
    """What does not depend on the clock."""
    return {n: v for n, v in outcome.values.items() if n.startswith(("loss/", "norm/", "eval/"))}


def test_a_stopped_and_continued_run_is_the_run(tmp_path: Path) -> None:
    """Bit for bit: weights, averages, optimizers, the last losses."""
    whole = training.run(toy_training(tmp_path / "whole"))
    assert whole.samples_seen == 40
    assert whole.values["loss/l1"] < 0.5
    for end in (12, 24, 40):
        part = toy_training(tmp_path / "parts", config=replace(SHORT, samples=end))
        outcome = training.run(part)
        assert outcome.samples_seen == end
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert losses(outcome) == losses(whole)


def test_continuing_starts_where_the_checkpoint_is(tmp_path: Path) -> None:
    training.run(toy_training(tmp_path / "whole"))
    crash = toy_training(tmp_path / "crash", ToySamples(nan_at=31))
    with pytest.raises(NothingUsableError):
        training.run(crash)
    assert checkpoints.samples_of(checkpoints.newest(str(tmp_path / "crash"))) == 24
    training.run(toy_training(tmp_path / "crash"))
    assert_same(tmp_path / "whole", tmp_path / "crash")


def test_seed_decides(tmp_path: Path) -> None:
    training.run(toy_training(tmp_path / "one"))
    training.run(toy_training(tmp_path / "same"))
    training.run(toy_training(tmp_path / "other", config=replace(SHORT, seed=1)))
    assert_same(tmp_path / "one", tmp_path / "same")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "one", tmp_path / "other")


def test_a_loss_that_is_no_number_stops_and_names_the_samples(tmp_path: Path) -> None:
    crash = toy_training(tmp_path, ToySamples(nan_at=29))
    with pytest.raises(NothingUsableError, match=r"loss/l1 = nan.*toy-28, toy-29, toy-30, toy-31"):
        training.run(crash)
    assert checkpoints.samples_of(checkpoints.newest(str(tmp_path))) == 24
    assert all(torch.isfinite(value).all() for value in tensors(tmp_path).values())


def test_newest_checkpoints_stay(tmp_path: Path) -> None:
    training.run(toy_training(tmp_path))
    assert checkpoints.listed(str(tmp_path)) == ["000000000000036.pt", "000000000000040.pt"]


def test_unfinished_checkpoint_is_not_seen(tmp_path: Path) -> None:
    training.run(toy_training(tmp_path))
    folder = tmp_path / checkpoints.FOLDER
    (folder / f"{storage.TEMPORARY}123").write_bytes(b"half")
    assert len(checkpoints.listed(str(tmp_path))) == 2
    whole = (folder / "000000000000040.pt").read_bytes()
    for content in (b"half", whole[: len(whole) // 2], b""):
        (folder / "000000000000099.pt").write_bytes(content)
        with pytest.raises(ConfigError, match="damaged"):
            checkpoints.read(checkpoints.newest(str(tmp_path)))


def test_checkpoint_from_elsewhere_cannot_run_code(tmp_path: Path) -> None:
    """``weights_only``: a pickle that calls a function is refused."""

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"samples_seen": Attack()}, tmp_path / "000000000000001.pt")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        checkpoints.read(str(tmp_path / "000000000000001.pt"))
    assert not (tmp_path / "owned").exists()


def test_checkpoint_of_another_network_names_the_tensor(tmp_path: Path) -> None:
    training.run(toy_training(tmp_path))
    wider = ToyLearnerConfig(network=ToyConfig(width=5))
    with pytest.raises(RuntimeError, match=r"toy\.encode\.weight"):
        training.run(
            toy_training(
                tmp_path,
                build=partial(ToyLearner, wider),
                config=replace(SHORT, samples=44),
            )
        )


def test_a_checkpoint_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint there"):
        checkpoints.read(checkpoints.uri_of(str(tmp_path), 8))


def test_checkpoint_without_a_tensor_names_it(tmp_path: Path) -> None:
    """Or a part of the network would silently start anew."""
    training.run(toy_training(tmp_path))
    content = checkpoints.read(checkpoints.newest(str(tmp_path)))
    lost = sorted(content["networks"])[0]
    del content["networks"][lost]
    learner = ToyLearner(LEARNER, wrap=lambda network: network, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=lost):
        checkpoints.restore(content, learner)


def test_output_in_a_bucket_like_place(tmp_path: Path) -> None:
    """No rename there: the same checkpoints through fsspec's memory filesystem."""
    uri = f"memory://{tmp_path.name}/out"
    training.run(toy_training(uri))
    training.run(toy_training(tmp_path / "local"))
    assert_same(uri, tmp_path / "local")
    assert bundle.load(f"{uri}/bundle").config == LEARNER.network


def test_bundle_is_the_average_of_the_last_checkpoint(tmp_path: Path) -> None:
    outcome = training.run(toy_training(tmp_path, card={"dataset": {"version": 3}}))
    network = bundle.load(str(tmp_path / "bundle"))
    averages = checkpoints.read(checkpoints.newest(str(tmp_path)))["networks"]
    for name, value in network.state_dict().items():
        assert torch.equal(value, averages[f"toy_ema.{name}"])
    card = bundle.read_card(str(tmp_path / "bundle"))
    assert card["dataset"] == {"version": 3}
    assert card["samples_seen"] == 40
    assert card["scores"]["eval/l1"] == outcome.values["eval/l1"]


def test_one_batch_at_a_time_has_the_numbers_of_the_formula(tmp_path: Path) -> None:
    """The first record is the mean of the first two steps, computed here without the loop."""
    config = replace(SHORT, samples=8)
    outcome = training.run(toy_training(tmp_path, config=config))
    training.reseed(0, 0, 0)
    learner = ToyLearner(LEARNER, wrap=lambda network: network, device=torch.device("cpu"))
    batches = toy_batches(ToySamples(), samples_seen=0, rank=0, world_size=1)
    steps = [learner.train_step(next(batches), samples_seen)["loss/l1"] for samples_seen in (0, 4)]
    assert outcome.values["loss/l1"] == torch.stack(steps).double().mean().item()


def test_every_random_number_is_a_function_of_the_progress() -> None:
    def draw(seed: int, samples_seen: int, rank: int) -> tuple[float, float, float]:
        import random

        import numpy as np

        training.reseed(seed, samples_seen, rank)
        return float(torch.rand(1)), float(np.random.rand()), random.random()  # noqa: NPY002

    assert draw(1, 2, 3) == draw(1, 2, 3)
    drawn = [draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)]
    assert all(len({each[i] for each in drawn}) == 4 for i in range(3))


@pytest.mark.parametrize("size", [1, 4, 6, 7])
def test_what_is_due_comes_once_in_every_stretch(size: int) -> None:
    """Against the definition, sample by sample: an event falls on the step that holds a multiple of its interval."""
    config = replace(SHORT, samples=100)
    before = 0
    while before < 100:
        now = before + size
        reached = range(before + 1, now + 1)
        due = Due(config, before, now)
        last = now >= 100
        assert due.checkpoint == (last or any(sample % 12 == 0 for sample in reached))
        assert due.evaluate == (last or any(sample % 20 == 0 for sample in reached))
        logged = any(sample % 8 == 0 for sample in reached)
        assert due.log == (logged or due.checkpoint or due.evaluate)
        before = now


def test_meter_counts_what_was_there() -> None:
    """A metric of every other step is the mean of those steps."""
    meter = Meter(torch.device("cpu"), 1, samples_seen=100)
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    meter.add({"a": torch.tensor(2.0)})
    values = meter.read(110)
    assert (values["a"], values["b"]) == (1.5, 5.0)
    assert 0 <= values["speed/data_wait"] <= 1
    meter.add({"a": torch.tensor(7.0)})
    assert meter.read(120)["a"] == 7.0


def test_waiting_for_samples_is_measured_and_warned_of(tmp_path: Path) -> None:
    outcome = training.run(toy_training(tmp_path, ToySamples(pause=0.05)))
    assert outcome.values["speed/data_wait"] > 0.3
    warnings = journal.read_progress(str(tmp_path))["warnings"]
    assert "cpus-per-worker" in warnings["starvation"]


def test_progress_is_told_in_a_line(tmp_path: Path) -> None:
    cluster = ClusterConfig(num_workers=0, price_per_worker_hour=3600.0)
    said: list[str] = []
    with journal.Watch(str(tmp_path), priced=True, say=said.append, every_seconds=0.02) as watch:
        training.run(toy_training(tmp_path, ToySamples(pause=0.03), cluster=cluster))
        line = watch.line(journal.read_progress(str(tmp_path)))
    assert "waiting for workers" in watch.line({})
    assert any("of 40 samples" in text and "samples/s" in text for text in said)
    assert "40 of 40 samples" in line
    assert "0 s left" in line
    progress = json.loads((tmp_path / journal.PROGRESS).read_text())
    assert progress["cost"] == pytest.approx(progress["seconds"])
    assert len([text for text in said if text.startswith("warning: ")]) == 1  # once


def test_preview_is_rows_of_named_columns() -> None:
    picture = journal.picture(torch.ones(2, 3, 64, 128), ("real", "generated"))
    assert picture.shape == (20 + 128, 128, 3)
    assert (picture[20:] == 255).all()
    assert (picture[:20, :64] < 128).any()
    assert (picture[:20, 64:] < 128).any()
    levels = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert journal.picture(levels, ())[0, 0].tolist() == [0, 128, 255]


def test_workers_that_cannot_see_the_output_say_so(tmp_path: Path) -> None:
    lost = toy_training(tmp_path / "here")
    with pytest.raises(ConfigError, match="not to be seen"):
        training.run(replace(lost, output=str(tmp_path / "elsewhere")))


@pytest.mark.parametrize(
    ("machines", "num_workers", "use_gpu", "cpus"),
    [
        ([(8, 0)], 2, False, 4),
        ([(8, 0), (8, 0)], 3, False, 4),  # 16 // 3 would be 5, and 5 fit once on each
        ([(16, 1), (16, 1)], 2, True, 16),
        ([(16, 0), (96, 0), (16, 1)], 1, True, 16),  # machines without a GPU do not count
        ([(32, 4)], 4, True, 8),
        ([(0, 0)], 8, True, 1),  # nothing there yet: any machine will do
    ],
)
def test_workers_share_the_cpus_of_their_machines(
    machines: list[tuple[int, int]], num_workers: int, use_gpu: bool, cpus: int
) -> None:
    assert training.share_of_cpus(machines, num_workers, use_gpu) == cpus


def test_a_changing_number_of_workers_must_divide_the_batch() -> None:
    ClusterConfig(num_workers=4, min_workers=2).require_divides(12, 1)
    ClusterConfig(num_workers=0).require_divides(5, 1)
    with pytest.raises(ValueError, match="16 cannot be divided among 3 workers"):
        ClusterConfig(num_workers=4, min_workers=2).require_divides(16, 1)
    with pytest.raises(ValueError, match="min_workers <= num_workers, got 3 and 2"):
        ClusterConfig(num_workers=2, min_workers=3)
    with pytest.raises(ValueError, match="accumulate 4 must divide a worker's 6 samples"):
        ClusterConfig(num_workers=2).require_divides(12, 4)
    ClusterConfig(num_workers=2).require_divides(12, 3)


def test_workers_that_will_never_find_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits without end for what no node has and nobody starts."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = [{"Resources": {"CPU": 4.0, "GPU": 1.0}, "Labels": {}}, {"Resources": {"CPU": 2.0}, "Labels": {}}]  # fmt: skip
    monkeypatch.setattr(nodes, "alive", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fits in (
        ClusterConfig(),
        ClusterConfig(num_workers=6, gpu="no"),
        ClusterConfig(num_workers=3, cpus_per_worker=2, gpu="no"),
        ClusterConfig(num_workers=9, min_workers=1, gpu="yes"),
    ):
        training.require_room(fits)
    for does_not, words in (
        (ClusterConfig(gpu="yes"), "torch finds no GPU"),
        (ClusterConfig(num_workers=7, gpu="no"), "room for 6"),
        (
            ClusterConfig(num_workers=2, cpus_per_worker=3, gpu="no"),
            "room for 1 .*4 CPUs and 1 GPUs",
        ),
        (ClusterConfig(num_workers=2, gpu="yes"), "a GPU .*room for 1"),
        (ClusterConfig(num_workers=2), "a GPU .*--cluster.gpu auto.*room for 1"),
        (ClusterConfig(num_workers=9, min_workers=8), "min-workers 8,"),
    ):
        with pytest.raises(ConfigError, match=words):
            training.require_room(does_not)
    joining = iter(["one", "another"])

    def join(_: float) -> None:
        next(joining)
        here.append({"Resources": {"CPU": 1.0}, "Labels": {}})

    monkeypatch.setattr("time.sleep", join)
    training.require_room(ClusterConfig(num_workers=8, gpu="no"), patience=600)
    assert not list(joining)
    here.append({"Resources": {}, "Labels": {nodes.GROUP: "gpu"}})  # may grow
    training.require_room(ClusterConfig(num_workers=7, gpu="yes"))
