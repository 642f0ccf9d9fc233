"""The Aligner's step: what it changes, what it must never change, and that it learns."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import skimage.data
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from models import losses
from models.aligner.batch import AlignerBatch
from models.aligner.learner import (
    VGG_LAYERS,
    AlignerLearner,
    AlignerLearnerConfig,
    Frozen,
    calibrated,
    even,
    load_frozen,
)
from models.frozen import weights
from models.frozen.arcface import crop_faces
from models.layers import bare
from models.updates import NonFiniteLossError
from tests.aligners import LEARNER, NETWORK, SIZE, doubled, drawn_batch, in_double, tiny_learner
from tests.assets.make_aligner_losses import FILE, STEPS
from tests.assets.make_aligner_losses import losses as golden_losses
from tests.material import SHARED, needs_shared
from tests.steps import assert_stepped


def state(learner: AlignerLearner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.networks.state_dict().items()}


def without_effect(name: str) -> bool:
    """A constant added to a channel: the last instance norm takes away what skips carry of it."""
    return ".skip." in name and name.endswith("bias")


def test_a_step_gives_every_trained_parameter_a_gradient_and_no_frozen_one(monkeypatch):
    learner = tiny_learner()
    gradients: dict[str, float] = {}

    def spy(optimizer, parameters, clip):
        for name, network in learner.networks.items():
            for key, p in network.named_parameters():
                if p.grad is not None:
                    gradients[f"{name}.{key}"] = p.grad.abs().max().item()
        found = step(optimizer, parameters, clip)
        assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        return found

    from models.aligner import learner as module

    step = module.step
    monkeypatch.setattr(module, "step", spy)
    # While no hinge is satisfied, real and generated pull the bias of the score equally hard
    learner.networks["discriminator"].score.bias.data.fill_(1)
    before = state(learner)
    learner.train_step(drawn_batch(), 0)
    after = state(learner)
    trained = {
        f"{n}.{k}"
        for n in ("aligner", "discriminator")
        for k, _ in learner.networks[n].named_parameters()
    }
    assert set(gradients) == trained
    assert len(trained) > 300
    idle = [name for name in trained if not gradients[name] > 0]
    assert [name for name in idle if not without_effect(name)] == []
    assert all(not torch.equal(before[name], after[name]) for name in trained - set(idle))
    for network in learner.frozen:
        assert network is not None
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
        assert not network.training


def test_all_terms_are_there_and_add_up_to_what_is_minimised():
    learner = tiny_learner()
    metrics = learner.train_step(drawn_batch(), 0)
    assert learner.terms_off == {}
    terms = set(learner.loss_weights)
    assert {f"loss/{name}" for name in terms} | {"loss/discriminator"} == {
        n for n in metrics if n.startswith("loss/")
    }
    assert {"norm/aligner", "norm/discriminator"} <= set(metrics)
    assert all(
        value.dim() == 0 and not value.requires_grad and value.isfinite()
        for value in metrics.values()
    )
    assert metrics["loss/l1"] > 0.1


def test_a_step_descends_the_papers_equations():
    """Equations (1) to (5) and LPD's mask term written out; with a rate of 1, SGD moves each weight by its gradient."""
    weights = {
        "l1": 3.0,
        "vgg_features": 0.5,
        "identity_features": 0.7,
        "discriminator_features": 2.0,
    }
    weights |= {"identity": 1.5, "adversarial": 0.9, "dice": 0.4}  # fmt: skip
    layers = {"vgg_weights": (0.3, 0.6), "identity_weights": (0.1, 0.2, 0.3, 0.4)}
    learner = in_double(tiny_learner(replace(LEARNER, **weights, **layers, clip=1e9)))
    batch = doubled(drawn_batch(moves=1))
    batch.target[:, :, -2:] = 0.3  # outside the frame, where it must not count
    names = ("aligner", "discriminator")
    aligner, discriminator = (copy.deepcopy(learner.networks[name]) for name in names)
    for name in names:
        learner.optimizers[name] = torch.optim.SGD(learner.networks[name].parameters(), lr=1.0)
    metrics = learner.train_step(batch, 0)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b.detach()).abs().mean()

    def faces(images: Tensor) -> Tensor:
        return crop_faces(images, batch.target_face_matrix, learner.frozen.identity.size)

    who, vgg = learner.frozen
    assert vgg is not None
    vectors = torch.stack([who(batch.source_faces[:, k])[0] for k in range(2)], dim=1)
    image, mask = aligner(batch.sources, vectors, batch.driving, batch.driving_face)
    inside, person = batch.target_valid, batch.target_foreground
    black = torch.full_like(image, -1)
    made = torch.where(inside > 0, image, black)
    real = torch.where((inside > 0) & (person > 0), batch.target, black)
    pairs = zip(layers["vgg_weights"], vgg(made), vgg(real), strict=True)
    scores, of_made = discriminator(made)
    _, of_real = discriminator.eval()(real)
    (made_vector, made_maps), (real_vector, real_maps) = who(faces(made)), who(faces(real))
    faces_pairs = zip(layers["identity_weights"], made_maps, real_maps, strict=True)
    cosine = (made_vector * real_vector).sum(1) / made_vector.norm(dim=1) / real_vector.norm(dim=1)
    seen, wanted = (mask * inside).flatten(1), (person * inside).flatten(1)
    overlap = 2 * (seen * wanted).sum(1) / ((seen**2).sum(1) + (wanted**2).sum(1))
    terms = {
        "l1": (made - real).abs()[(inside > 0).expand_as(made)].mean(),
        "vgg_features": sum(w * distance(a, b) for w, a, b in pairs),
        "identity_features": sum(w * distance(a, b) for w, a, b in faces_pairs),
        "discriminator_features": torch.stack(
            [distance(a, b) for a, b in zip(of_made, of_real, strict=True)]
        ).mean(),
        "identity": (1 - cosine).mean(),
        "adversarial": -scores.mean(),
        "dice": -overlap.log().mean(),
    }
    sum(weights[name] * term for name, term in terms.items()).backward()
    discriminator.train().zero_grad()
    of_both, _ = discriminator(torch.cat([real, made.detach()]))
    torch.testing.assert_close(metrics["score/real"], of_both[:2].mean().detach())
    torch.testing.assert_close(metrics["score/generated"], of_both[2:].mean().detach())
    terms["discriminator"] = (1 - of_both[:2]).relu().mean() + (1 + of_both[2:]).relu().mean()
    terms["discriminator"].backward()
    for name, term in terms.items():
        torch.testing.assert_close(metrics[f"loss/{name}"], term.detach(), msg=name)
    before = {"aligner": aligner, "discriminator": discriminator}
    assert_stepped(learner.networks, before, {"aligner": learner.ema.network})


def test_the_recipe_is_the_supplements_and_latent_pose_reenactments():
    """Supplement §3.2; weights of losses: spec-head-swap §2.7."""
    config = AlignerLearnerConfig()
    assert (config.lr, config.discriminator_lr, config.betas) == (1e-4, 4e-4, (0.9, 0.999))
    weights = (config.l1, config.vgg_features, config.identity_features)
    assert (*weights, config.discriminator_features) == (30, 1, 1, 10)
    assert (config.identity, config.adversarial, config.dice) == (2, 1, 1)
    assert (config.clip, config.ema_decay) == (10, 0.999)
    stages = (config.discriminator_base, config.discriminator_limit, config.discriminator_stages)
    assert stages == (64, 512, 7)
    assert config.vgg_layers == (
        "relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_2", "relu3_3", "relu3_4",
        "relu4_1", "relu4_2", "relu4_3", "relu4_4", "relu5_1",
    )  # fmt: skip
    learner = tiny_learner()
    for name, rate in (("aligner", 1e-4), ("discriminator", 4e-4)):
        (group,) = learner.optimizers[name].param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (rate, (0.9, 0.999), 1e-8)


def test_terms_that_cannot_be_had_are_left_out_and_told():
    network = replace(NETWORK, identity="dlib", predict_mask=False)
    learner = AlignerLearner(
        replace(LEARNER, vgg="none", network=network, random_init=False),
        wrap=lambda network: network,
        device=torch.device("cpu"),
    )
    metrics = learner.train_step(drawn_batch(moves=1, k=1, face_size=(150, 150)), 0)
    names = {n.removeprefix("loss/") for n in metrics if n.startswith("loss/")}
    assert names == {"l1", "discriminator_features", "adversarial", "discriminator"}
    told = " ".join(f"{term}: {reason}" for term, reason in learner.terms_off.items())
    assert "vgg is none" in told
    assert "dlib has no gradient" in told
    assert "mask" in told
    assert learner.preview_columns == ("source", "target", "generated", "averaged")


@pytest.mark.parametrize("norm", [pytest.param("frozen", marks=pytest.mark.slow), "group"])
def test_micro_batches_take_the_step_of_the_whole_batch(norm):
    config = replace(LEARNER, network=replace(NETWORK, norm=norm))
    batch = doubled(drawn_batch())
    whole = in_double(tiny_learner(config))
    parts = in_double(tiny_learner(replace(config, accumulate=4)))
    expected, found = whole.train_step(batch, 0), parts.train_step(batch, 0)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)
    after = state(parts)
    for name, value in state(whole).items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-10, msg=name)


def test_a_checkpoint_continues_to_the_last_bit():
    batches = [drawn_batch(seed=seed) for seed in range(2)]
    one = tiny_learner()
    one.train_step(batches[0], 0)
    networks = copy.deepcopy(one.networks.state_dict())
    optimizers = {name: copy.deepcopy(o.state_dict()) for name, o in one.optimizers.items()}
    other = tiny_learner(seed=5)
    other.frozen = one.frozen
    other.networks.load_state_dict(networks)
    for name, optimizer in other.optimizers.items():
        optimizer.load_state_dict(optimizers[name])
    for batch in batches[1:]:
        expected, found = one.train_step(batch, 4), other.train_step(batch, 4)
        assert {n: v.item() for n, v in found.items()} == {n: v.item() for n, v in expected.items()}
    missing = {
        name: value for name, value in networks.items() if not name.startswith("aligner.pose.")
    }
    with pytest.raises(RuntimeError, match=r"aligner\.pose"):
        other.networks.load_state_dict(missing)


def test_a_poisoned_batch_changes_no_weight_and_is_named():
    learner = tiny_learner()
    batch = drawn_batch()
    batch.target[2, 0, 5, 5] = float("nan")
    before = {n: p.clone() for n, p in learner.networks.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"l1 = nan.*person1-video-0\.000000"):
        learner.train_step(batch, 0)
    assert all(torch.equal(before[name], p) for name, p in learner.networks.named_parameters())


def test_what_lies_outside_the_frame_does_not_count():
    learner = tiny_learner()
    batch = drawn_batch()
    noise = torch.randn_like(batch.target)
    outside = batch.target_valid == 0
    changed = replace(batch, target=torch.where(outside, noise, batch.target))
    for images, seen in ((batch.target, batch), (changed.target, changed)):
        assert torch.equal(learner.compared(images, seen), learner.compared(batch.target, batch))
    real = learner.compared(batch.target, batch)
    assert (real[outside.expand_as(real)] == -1).all()
    assert (real[..., :4] == -1).all()  # background: black, since there is a mask head
    plain = tiny_learner(replace(LEARNER, network=replace(NETWORK, predict_mask=False)))
    assert torch.equal(plain.compared(batch.target, batch), batch.target)


@pytest.mark.slow
def test_the_discriminator_is_not_trained_to_please():
    """One step raises the scores of real pictures above those of generated ones, which the generator's losses would not."""
    learner = tiny_learner()
    batch = drawn_batch()
    gaps = []
    for _ in range(4):
        metrics = learner.train_step(batch, 0)
        gaps.append((metrics["score/real"] - metrics["score/generated"]).item())
    assert gaps[-1] > gaps[0]


@pytest.mark.slow
def test_the_last_block_fades_in_with_the_samples():
    config = replace(LEARNER, fade_samples=100)
    batch = drawn_batch()
    seen = {}
    for samples in (0, 50, 150):
        seen[samples] = tiny_learner(config).train_step(batch, samples)["loss/l1"].item()
    assert seen[150] == tiny_learner().train_step(batch, 0)["loss/l1"].item()
    assert len({seen[0], seen[50], seen[150]}) == 3
    with pytest.raises(ValueError, match="append64"):
        replace(config, network=replace(NETWORK, schedule="lpd"))


def test_pictures_are_compared_in_full_precision(monkeypatch):
    """What bfloat16 networks made is widened before anything is added to it."""
    learner = tiny_learner(replace(LEARNER, vgg="none", precision="bf16"))
    seen = []
    compared = learner.compared

    def spy(images: Tensor, batch: AlignerBatch, *, is_generated: bool = False) -> Tensor:
        seen.append(images.dtype)
        return compared(images, batch, is_generated=is_generated)

    monkeypatch.setattr(learner, "compared", spy)
    learner.train_step(drawn_batch(people=1, moves=1), 0)
    assert seen == [torch.float32] * 2


@pytest.mark.slow
def test_bf16_changes_the_losses_little():
    batch = drawn_batch()
    exact = tiny_learner().train_step(batch, 0)
    coarse = tiny_learner(replace(LEARNER, precision="bf16")).train_step(batch, 0)
    for name in ("loss/l1", "loss/dice", "loss/vgg_features", "loss/discriminator"):
        assert coarse[name].dtype == torch.float32
        torch.testing.assert_close(coarse[name], exact[name], rtol=0.05, atol=0.01)
    assert coarse["loss/l1"] != exact["loss/l1"]


def test_evaluation_changes_nothing_and_tells_leakage_on_crossed_pairs():
    learner = tiny_learner()
    batch = drawn_batch()
    learner.train_step(batch, 0)
    batch.target_face_matrix[:, :, 2] += torch.randn(len(batch), 2)  # faces lie elsewhere in each
    before = state(learner)
    metrics = learner.eval_step(batch)
    assert {
        "loss/l1",
        "loss/dice",
        "health/csim_self",
        "health/csim_cross",
        "health/leakage",
    } == set(metrics)
    crossed = learner.ema.network(
        batch.sources,
        learner.identities(batch.source_faces),
        batch.driving.roll(-1, 0),
        batch.driving_face.roll(-1, 0),
    ).image
    driver = replace(batch, target_face_matrix=batch.target_face_matrix.roll(-1, 0))
    vectors = learner.look_at_faces(crossed, driver)[0]
    own = learner.identities(batch.source_faces).mean(dim=1)
    targets = learner.look_at_faces(learner.compared(batch.target, batch), batch)[0].roll(-1, 0)
    cosine = torch.nn.functional.cosine_similarity
    expected = cosine(vectors, targets).mean() - cosine(vectors, own).mean()
    torch.testing.assert_close(metrics["health/leakage"], expected)
    torch.testing.assert_close(metrics["health/csim_cross"], cosine(vectors, own).mean())
    straight = learner.ema.network(
        batch.sources, learner.identities(batch.source_faces), batch.driving, batch.driving_face
    ).image
    inside = (batch.target_valid > 0).expand_as(straight)
    gaps = (straight - learner.compared(batch.target, batch)).abs()
    torch.testing.assert_close(metrics["loss/l1"], gaps[inside].mean())
    made = learner.compared(straight, batch, is_generated=True)
    likeness = cosine(learner.look_at_faces(made, batch)[0], targets.roll(1, 0)).mean()
    torch.testing.assert_close(metrics["health/csim_self"], likeness)
    everywhere = replace(batch, target_valid=torch.ones_like(batch.target_valid))
    assert learner.eval_step(everywhere)["loss/dice"] != metrics["loss/dice"]
    assert set(learner.eval_step(drawn_batch(people=1, moves=1))) == {
        "loss/l1",
        "loss/dice",
        "health/csim_self",
    }
    preview = learner.preview(batch)
    assert preview.shape == (4, 3, SIZE, SIZE * len(learner.preview_columns))
    assert learner.preview_columns == (
        "source",
        "target",
        "generated",
        "mask",
        "averaged",
    )
    assert preview.abs().max() <= 1
    columns = preview.split(SIZE, dim=3)
    torch.testing.assert_close(columns[0], batch.sources[:, 0])
    assert torch.equal(columns[1], learner.compared(batch.target, batch))
    assert not torch.equal(columns[2], columns[4])
    assert bare(learner.aligner).training
    assert all(torch.equal(before[name], value) for name, value in state(learner).items())


def test_what_is_exported_is_the_average_in_evaluation_mode():
    learner = tiny_learner(replace(LEARNER, ema_decay=0.5))
    first = copy.deepcopy(learner.ema.network.state_dict())
    learner.train_step(drawn_batch(), 0)
    exported = learner.export()
    assert not exported.training
    name = "generator.constant"
    middle = (first[name] + bare(learner.aligner).state_dict()[name]) / 2
    torch.testing.assert_close(exported.state_dict()[name], middle)


def test_a_wrapper_reaches_every_trained_network_and_no_checkpoint():
    wrapped = []

    def wrap(network: torch.nn.Module) -> torch.nn.Module:
        wrapped.append(network)
        return network

    learner = AlignerLearner(LEARNER, wrap=wrap, device=torch.device("cpu"))
    assert wrapped == [learner.networks["aligner"], learner.networks["discriminator"]]
    assert set(learner.networks) == {"aligner", "discriminator", "ema"}
    assert set(learner.optimizers) == {"aligner", "discriminator"}
    rates = {name: o.param_groups[0]["lr"] for name, o in learner.optimizers.items()}
    assert rates == {"aligner": 1e-4, "discriminator": 4e-4}


def test_calibration_makes_layers_equal_and_is_part_of_the_config():
    batches = [drawn_batch(seed=seed, face_size=(112, 96)) for seed in range(2)]
    torch.manual_seed(0)
    config = calibrated(LEARNER, batches, torch.device("cpu"))
    assert len(config.vgg_weights) == 2
    assert len(config.identity_weights) == 4
    torch.manual_seed(0)
    frozen = load_frozen(LEARNER, torch.device("cpu"))
    targets = torch.cat([batch.target for batch in batches])
    faces = crop_faces(targets, batches[0].target_face_matrix.repeat(2, 1, 1), (112, 96))
    assert frozen.vgg is not None
    for measured, maps in (
        (config.vgg_weights, frozen.vgg(targets)),
        (config.identity_weights, frozen.identity.features(faces)),
    ):
        shares = [weight * m.abs().mean().item() for weight, m in zip(measured, maps, strict=True)]
        assert shares == pytest.approx([1 / len(measured)] * len(measured), rel=1e-4)
    torch.manual_seed(0)
    learner = AlignerLearner(config, wrap=lambda n: n, device=torch.device("cpu"))
    torch.manual_seed(0)
    again = calibrated(config, batches, torch.device("cpu"))
    assert again == config
    assert learner.frozen.vgg is not None
    without = replace(
        LEARNER, vgg="none", network=replace(NETWORK, identity="dlib"), random_init=False
    )
    assert calibrated(without, batches, torch.device("cpu")) == without
    with pytest.raises(ValueError, match="3 numbers for 2 layers"):
        replace(LEARNER, vgg_weights=(1.0, 1.0, 1.0))
    assert sum(even(7)) == pytest.approx(1)
    assert len(VGG_LAYERS) == 13
    assert AlignerLearnerConfig().vgg_layers[-1] == "relu5_1"


def trained_rank(rank: int, folder: str) -> None:
    """Two steps on this rank's half of the batch, in two micro-batches, behind DistributedDataParallel."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    learner = AlignerLearner(
        replace(LEARNER, accumulate=2),
        wrap=lambda network: DistributedDataParallel(network.double()),
        device=torch.device("cpu"),
    )
    learner.frozen = tiny_learner().frozen
    half = doubled(drawn_batch()).chunk(2)[rank]
    for i in range(2):
        in_double(learner).train_step(half, 4 * i)
    torch.save(learner.networks.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path):
    torch.multiprocessing.spawn(trained_rank, (str(tmp_path),), nprocs=2)
    learner = in_double(tiny_learner())
    for i in range(2):
        learner.train_step(doubled(drawn_batch()), 4 * i)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = state(learner)
    assert set(ranks[0]) == set(ranks[1]) == set(expected)
    for name, value in expected.items():
        for found in ranks:
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.slow
def test_golden_losses():
    expected = json.loads(FILE.read_text())
    found = golden_losses()
    assert len(expected) == len(found) == STEPS
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert b == pytest.approx(a, rel=1e-4), f"step {step}"


@pytest.mark.slow
def test_two_people_are_learnt():
    """Spec-head-swap §9.2, 15: within 300 steps L1 halves; it does better, in half of them."""
    learner = tiny_learner(replace(LEARNER, vgg="none", lr=1e-3))
    batch = drawn_batch()
    first = learner.train_step(batch, 0)["loss/l1"]
    for i in range(150):
        last = learner.train_step(batch, 4 * i)["loss/l1"]
    assert last < 0.2 * first
    crossed = learner.preview(batch).split(SIZE, dim=3)[2]
    target = learner.compared(batch.target, batch)
    errors = torch.stack(
        [losses.l1(image[None], other[None]) for image in crossed for other in target]
    ).reshape(4, 4)
    assert errors.argmin(dim=1).tolist() == [
        0,
        1,
        2,
        3,
    ]  # each picture is nearest to its own person and move


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_agrees_with_the_cpu_and_its_batch_norms_are_synchronised(tmp_path, precision):
    distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        config = replace(LEARNER, precision=precision, network=replace(NETWORK, norm="sync"))
        device = torch.device("cuda")
        cpu = tiny_learner(config)
        gpu = AlignerLearner(config, wrap=lambda network: network, device=device)
        assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in gpu.networks["aligner"].modules())
        gpu.networks.load_state_dict(cpu.networks.state_dict())  # the names are the same
        gpu.frozen = Frozen(*(copy.deepcopy(network).to(device) for network in cpu.frozen))
        expected = cpu.train_step(drawn_batch(), 0)
        found = gpu.train_step(drawn_batch().to(device), 0)
        tolerance = 1e-3 if precision == "fp32" else 5e-2
        for name in ("loss/l1", "loss/dice", "loss/vgg_features"):
            torch.testing.assert_close(found[name].cpu(), expected[name], rtol=tolerance, atol=1e-2)
    finally:
        distributed.destroy_process_group()


@needs_shared
@pytest.mark.real
def test_real_frozen_networks_see_the_target_in_itself_and_nobody_in_noise(monkeypatch):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(SHARED / "weights"))
    layers = ("relu1_1", "relu2_1", "relu3_1")
    config = replace(
        LEARNER, random_init=False, vgg_layers=layers, network=replace(NETWORK, size=128)
    )
    learner = tiny_learner(config)
    picture = (
        torch.from_numpy(skimage.data.astronaut()[:256, 96:352].copy()).permute(2, 0, 1)[None]
        / 127.5
        - 1
    )
    target = torch.nn.functional.interpolate(picture, (128, 128), mode="bilinear", antialias=True)
    small = torch.nn.functional.interpolate(picture, (SIZE, SIZE), mode="bilinear", antialias=True)
    one = torch.ones(1, 1, 128, 128)
    matrix = torch.tensor([[[96 / 60, 0, -96 * 30 / 60], [0, 112 / 70, -112 * 36 / 70]]])
    base = drawn_batch(people=1, moves=1)
    batch = replace(
        base,
        sources=small[:, None],
        source_faces=torch.nn.functional.interpolate(target[:, :, 36:106, 30:90], (112, 96))[
            :, None
        ],
        target=target,
        target_valid=one,
        target_foreground=one,
        target_face_matrix=matrix,
    )

    def measured(image: Tensor) -> dict[str, float]:
        from models.aligner.network import Portrait

        raw = learner.generator_losses(
            Portrait(image, one), image, learner.compared(target, batch), batch
        )
        return {name: value.item() for name, value in raw.items()}

    itself, noise = measured(target), measured(torch.rand_like(target) * 2 - 1)
    for name in (
        "l1",
        "vgg_features",
        "identity_features",
        "identity",
        "discriminator_features",
        "dice",
    ):
        assert abs(itself[name]) < 1e-5, name
    for name in ("l1", "vgg_features", "identity_features", "identity"):
        assert noise[name] > 0.1, name
    metrics = learner.train_step(batch, 0)
    assert {f"loss/{name}" for name in itself} <= set(metrics)
