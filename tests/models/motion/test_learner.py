"""The motion learner: its schedule, who gets gradients when, resume, and golden losses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from models.losses import l1
from models.motion.learner import (
    MotionLearner,
    MotionLearnerConfig,
    RealAndFake,
    Schedule,
    draw_points,
    samples_in_epoch,
)
from models.motion.network import Motion, MotionConfig
from models.updates import NonFiniteLossError
from tests.assets.make_motion_losses import losses
from tests.material import REPOSITORY
from tests.models.motion.pairs import CONFIG, learner, pairs, restore, state

GOLDEN = REPOSITORY / "tests" / "assets" / "motion_losses.json"


# ------------------------------------------------------------------------------------------------ schedule


def test_the_rates_of_both_stages_by_epoch() -> None:
    config = MotionLearnerConfig(stage=2)
    schedule = config.schedule
    expected = {0: 1, 59: 1, 60: 0.1, 79: 0.1, 80: 0.01, 139: 0.01}
    for epoch, factor in expected.items():
        first = epoch * schedule.epoch_samples
        assert schedule.factor(first) == pytest.approx(factor)
        assert schedule.factor(first + schedule.epoch_samples - 1) == pytest.approx(factor)
    assert (config.lr, config.lr_discriminator) == (2e-4, 2e-6)


def test_an_epoch_of_voxceleb_is_795_steps() -> None:
    schedule = MotionLearnerConfig().schedule
    assert schedule.epoch_samples == 424 * 75
    assert schedule.steps_in_epoch(40) == 424 * 75 // 40 == 795
    assert schedule.samples == 140 * 424 * 75


def test_faceforensics_has_one_effective_drop() -> None:
    schedule = Schedule(epoch_samples=samples_in_epoch(900), epochs=80)
    assert schedule.steps_in_epoch(40) == 1687
    factors = {schedule.factor(epoch * schedule.epoch_samples) for epoch in range(80)}
    assert sorted(factors) == pytest.approx([0.1, 1])


def test_the_optimizers_follow_the_schedule() -> None:
    trained = learner()
    for seen, factor in [(0, 1), (9, 1), (10, 0.1), (20, 0.01), (5, 1)]:
        trained.train_step(pairs(2), seen)
        for name, rate in [("motion", 2e-4), ("discriminator", 2e-6)]:
            (group,) = trained.optimizers[name].param_groups
            assert group["lr"] == pytest.approx(rate * factor)
            assert group["betas"] == (0.5, 0.999)


# ------------------------------------------------------------------------------------------- what is updated


def test_neither_network_gets_gradients_in_the_others_step() -> None:
    trained = learner()
    seen = []

    def nothing_in(network: nn.Module, name: str) -> Any:
        def hook(*_: Any) -> None:
            seen.append(name)
            assert all(p.grad is None for p in network.parameters())

        return hook

    motion, discriminator = trained.networks["motion"], trained.networks["discriminator"]
    trained.optimizers["motion"].register_step_pre_hook(nothing_in(discriminator, "motion"))
    trained.optimizers["discriminator"].register_step_pre_hook(nothing_in(motion, "discriminator"))
    trained.train_step(pairs(2), 0)
    assert seen == ["motion", "discriminator"]
    assert all(p.requires_grad for p in trained.networks.parameters())


def test_every_weight_of_both_networks_learns() -> None:
    trained = learner(network=replace(CONFIG.network, compose="feature_blend"))
    before = {name: p.clone() for name, p in trained.networks.named_parameters()}
    for seed in range(3):
        trained.train_step(pairs(4, seed), 0)
    still = [n for n, p in trained.networks.named_parameters() if torch.equal(p, before[n])]
    # convolutions before a norm have a bias that the norm removes: rounding alone decides whether it moves
    assert [name for name in still if not name.endswith("bias")] == []


def test_stage_one_has_no_discriminator() -> None:
    trained = learner(stage=1)
    metrics = trained.train_step(pairs(2), 0)
    assert set(trained.networks) == {"motion"}
    assert not {name for name in metrics if "adversarial" in name or "discriminator" in name}
    assert {"loss/reconstruction", "loss/mask_prior", "norm/motion", "mean/mask"} <= set(metrics)
    dead = [name for name in metrics if name.endswith("_displacement")]
    assert len(dead) == 4
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())


def test_the_losses_of_a_step_by_hand() -> None:
    trained, twin, batch = learner(), learner(), pairs(2)
    config = trained.config
    metrics = trained.train_step(batch, 0)
    generated, fields = twin.motion(batch.source, batch.source_landmarks, batch.driving_landmarks)
    assert twin.discriminator is not None
    scores, found = twin.discriminator(generated)
    _, wanted = twin.discriminator(batch.driving)
    assert len(found) == 4
    matched = sum((a - b.detach()).abs().mean() for a, b in zip(found, wanted, strict=True))
    adversarial = ((1 - scores) ** 2).mean()
    assert torch.allclose(metrics["loss/feature_matching"], matched)
    assert torch.allclose(metrics["loss/adversarial"], adversarial)
    total = (
        config.reconstruction * metrics["loss/reconstruction"]
        + config.adversarial * adversarial
        + config.feature_matching * matched
        + config.mask_prior * fields.mask.mean()
    )
    gradients = torch.autograd.grad(
        total
        - config.reconstruction * metrics["loss/reconstruction"]
        + config.reconstruction * twin._reconstruction(generated, batch.driving),
        list(twin.motion.parameters()),
    )
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert torch.allclose(metrics["norm/motion"], norm, rtol=1e-4)
    assert (
        MotionLearnerConfig().adversarial,
        MotionLearnerConfig().feature_matching,
        MotionLearnerConfig().reconstruction,
    ) == (1, 10, 10)


def test_real_and_generated_pictures_are_normalised_apart() -> None:
    trained, batch = learner(), pairs(2)
    assert trained.discriminator is not None
    real, fake = RealAndFake(trained.discriminator)(batch.driving, batch.source * 0.1)
    together, _ = trained.discriminator(torch.cat([batch.driving, batch.source * 0.1]))
    assert torch.allclose(real, trained.discriminator(batch.driving)[0])
    assert not torch.allclose(torch.cat([real, fake]), together, atol=1e-3)


def test_two_equal_micro_batches_are_one_batch() -> None:
    part = pairs(2)
    whole = replace(
        part,
        keys=part.keys * 2,
        **{name: torch.cat([tensor, tensor]) for name, tensor in part._tensors().items()},
    )
    once, twice = learner(), learner(accumulate=2)
    expected, metrics = once.train_step(whole, 0), twice.train_step(whole, 0)
    for name in ("loss/reconstruction", "loss/adversarial", "mean/mask", "loss/discriminator"):
        assert torch.allclose(metrics[name], expected[name], rtol=1e-4), name
    assert torch.allclose(metrics["norm/motion"], expected["norm/motion"], rtol=1e-3)


def test_a_batch_that_is_not_finite_changes_nothing_and_is_named() -> None:
    trained, batch = learner(), pairs(2)
    before = [p.clone() for p in trained.networks.parameters()]
    broken = replace(
        batch, driving=batch.driving * torch.tensor([1.0, float("nan")])[:, None, None, None]
    )
    with pytest.raises(NonFiniteLossError, match=r"reconstruction = nan.*anna-v0-000.1.2"):
        trained.train_step(broken, 0)
    assert all(map(torch.equal, trained.networks.parameters(), before))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"discriminator_condition": "landmarks"},
        {"total_variation": 0.1, "local_magnitude": 0.1},
        {"ema": 0.9},
        {"network": replace(CONFIG.network, compose="fomm"), "mask_prior": 0.0},
        {"network": replace(CONFIG.network, num_landmarks=70, local_occlusion=True)},
    ],
    ids=["bf16", "condition", "regularised", "ema", "fomm", "local occlusion"],
)
def test_variants_learn(change: dict[str, Any]) -> None:
    trained, batch = learner(**change, lr=2e-3), pairs(4)
    steps = [trained.train_step(batch, 0) for _ in range(12)]
    assert steps[-1]["loss/reconstruction"] < 0.9 * steps[0]["loss/reconstruction"]
    assert all(value.isfinite() for step in steps for value in step.values())


def test_the_average_is_what_is_evaluated_and_exported() -> None:
    trained = learner(ema=0.5)
    first = trained.export().state_dict()["generator.final.weight"].clone()
    trained.train_step(pairs(2), 0)
    second = trained.networks["motion"].state_dict()["generator.final.weight"]
    exported = trained.export()
    kept = exported.state_dict()["generator.final.weight"]
    assert torch.allclose(kept, (first + second) / 2, atol=1e-7)
    assert isinstance(exported, Motion)
    assert not exported.training
    batch = pairs(2, seed=5)
    with torch.no_grad():
        generated, _ = exported(batch.source, batch.source_landmarks, batch.driving_landmarks)
    expected = l1(generated, batch.driving) / 2
    assert torch.allclose(trained.eval_step(batch)["metric/l1"], expected)


def test_looking_changes_nothing() -> None:
    trained, batch = learner(), pairs(2)
    before = {name: tensor.clone() for name, tensor in trained.networks.state_dict().items()}
    metrics = trained.eval_step(batch)
    shown = trained.preview(batch)
    exported = trained.export()
    assert {"loss/reconstruction", "metric/l1", "mean/mask"} <= set(metrics)
    assert shown.shape == (2, 3, 64, 64 * len(trained.preview_columns))
    assert shown.abs().max() <= 1
    assert torch.equal(shown[..., :64], batch.source)
    assert torch.equal(shown[..., 64:128], batch.driving)
    assert torch.allclose(shown[..., 4 * 64 : 5 * 64], torch.zeros(1))  # a new mask is 0.5
    after = trained.networks.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trained.motion.training
    assert not any(p.requires_grad for p in exported.parameters())


# ------------------------------------------------------------------------------------- resume, golden losses


def test_resuming_is_bit_exact() -> None:
    straight = learner()
    for seed in range(6):
        straight.train_step(pairs(2, seed), seed * 2)
    half = learner()
    for seed in range(3):
        half.train_step(pairs(2, seed), seed * 2)
    resumed = restore(learner(seed=99), state(half))
    for seed in range(3, 6):
        resumed.train_step(pairs(2, seed), seed * 2)
    expected, found = straight.networks.state_dict(), resumed.networks.state_dict()
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_stage_two_starts_from_the_weights_of_stage_one() -> None:
    first, second = learner(stage=1), learner(seed=5)
    first.train_step(pairs(2), 0)
    second.networks["motion"].load_state_dict(first.networks["motion"].state_dict())
    batch = pairs(2, seed=3)
    assert torch.equal(
        first.eval_step(batch)["loss/reconstruction"],
        second.eval_step(batch)["loss/reconstruction"],
    )
    assert not second.optimizers["motion"].state


@pytest.mark.slow
def test_twenty_golden_losses() -> None:
    golden, found = json.loads(GOLDEN.read_text()), losses()
    assert len(golden) == len(found) == 20
    for step, (expected, values) in enumerate(zip(golden, found, strict=True)):
        assert values == pytest.approx(expected, rel=1e-4), f"step {step}"
    assert found[-1]["loss/reconstruction"] < found[0]["loss/reconstruction"]


# ---------------------------------------------------------------------------------------------------- config


def test_points_are_drawn_where_they_are() -> None:
    drawn = draw_points(torch.tensor([[[0.5, -0.25], [3.0, 3.0]]]), 64)
    assert drawn.shape == (1, 1, 64, 64)
    y, x = divmod(int(drawn.argmax()), 64)
    assert abs((2 * x + 1) / 64 - 1 - 0.5) <= 1 / 64
    assert abs((2 * y + 1) / 64 - 1 + 0.25) <= 1 / 64
    assert drawn.sum() < 10


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"network": MotionConfig(compose="fomm")}, "without a mask"),
        ({"discriminator_condition": "landmarks"}, "no effect in stage 1"),
        ({"accumulate": 0}, "accumulate 0"),
        ({"ema": 1.0}, "ema 1.0"),
    ],
)
def test_configurations_that_cannot_be(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MotionLearnerConfig(**change)


@pytest.mark.parametrize("change", [{"drop_epochs": (80, 60)}, {"epochs": 0}, {"drop_factor": 0.0}])
def test_schedules_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        Schedule(**change)


def test_a_learner_is_built_the_way_the_loop_builds_it() -> None:
    wrapped: list[nn.Module] = []

    def wrap(network: nn.Module) -> nn.Module:
        wrapped.append(network)
        return network

    trained = MotionLearner(CONFIG, wrap=wrap, device=torch.device("cpu"))
    assert [type(network) for network in wrapped] == [Motion, RealAndFake]
    assert set(trained.networks) == set(trained.optimizers) == {"motion", "discriminator"}


@pytest.mark.slow
def test_one_pair_is_learned_by_heart() -> None:
    wider = replace(CONFIG.network, generator_base=8)
    dropping = Schedule(epoch_samples=100, epochs=5, drop_epochs=(3, 4))
    trained = learner(network=wider, stage=1, lr=5e-3, mask_prior=0.0, schedule=dropping)
    batch = pairs(1)
    for index in range(dropping.samples):
        metrics = trained.train_step(batch, index)
    assert metrics["loss/reconstruction"] > 0
    with torch.no_grad():
        generated, _ = trained.motion(batch.source, batch.source_landmarks, batch.driving_landmarks)
    assert float(l1(generated, batch.driving)) / 2 < 0.02
