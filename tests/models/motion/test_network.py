"""The motion model: the supplement's shapes and counts, what is zero at the start, what runs once."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.motion.dense import AddMotion, MotionBlock
from models.motion.flow import identity_grid, warp
from models.motion.generator import Generator, ResidualBlock
from models.motion.network import Motion, MotionConfig
from tests.models.motion.tiny import TINY, awake, landmarks, pictures, tiny


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def full(points: int = 68) -> Motion:
    """The supplement's model without memory: shapes and counts only."""
    with torch.device("meta"):
        return Motion(MotionConfig(num_landmarks=68 if points == 68 else 70))


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_parameter_counts_of_the_supplement() -> None:
    model = full(68)
    whole = model.dense.global_motion
    assert count(whole.trunk.encoder) == 17_314_560
    assert count(whole.trunk.add_motion) == 557_056
    assert count(whole.trunk.decoder) == 26_750_880
    assert count(whole) - count(whole.trunk) == 1_156
    assert count(whole) == 44_623_652
    adaptive = [block.adaptive for block in whole.modules() if isinstance(block, MotionBlock)]
    assert sum(count(norm) for norm in adaptive if norm is not None) == 3_175_424
    local = model.dense.local_motions
    assert count(local["eye_left"]) == count(local["eye_right"]) == 1_893_490
    assert count(local["eye_left"].trunk.add_motion) == 22_528
    assert count(local["mouth"]) == 1_939_570
    assert count(local["mouth"].trunk.add_motion) == 40_960
    decoder = [model.generator.residuals, model.generator.up, model.generator.final]
    assert sum(map(count, decoder)) == 7_465_731
    assert count(model.generator) == 7_845_123
    assert count(model) == 58_195_325
    with_gaze = full(70)
    assert count(with_gaze.dense.global_motion) == 44_648_228
    assert count(with_gaze.dense.local_motions["eye_left"]) == 1_898_610
    assert count(with_gaze.dense.local_motions["eye_left"].trunk.add_motion) == 24_576
    assert count(with_gaze) == 58_230_141


def traced(model: Motion) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Output shapes (of the convolution, of the block) of every block in one forward pass, without the batch."""
    shapes: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, MotionBlock | nn.Conv2d | nn.Sequential) or "generator." in name:
            module.register_forward_hook(note(name))
    size, points = model.config.size, model.config.num_landmarks
    face, driving = torch.zeros(2, points, 2), torch.zeros(2, points, 2)
    device = next(model.parameters()).device
    model(torch.empty(2, 3, size, size, device=device), face.to(device), driving.to(device))
    return shapes


def test_shapes_of_every_block_are_the_supplements() -> None:
    shapes = traced(full(68))
    rows = {
        "global_motion": (
            256,
            [32, 64, 128, 256, 512, 1024, 1024],
            [1024, 1024, 512, 256, 128, 64, 32],
        ),
        **{
            f"local_motions.{part}": (64, [16, 32, 64, 128, 256], [256, 128, 64, 32, 16])
            for part in ("eye_left", "eye_right", "mouth")
        },
    }
    for network, (side, encoder, decoder) in rows.items():
        size = side
        for index, width in enumerate(encoder):
            name = f"dense.{network}.trunk.encoder.blocks.{index}"
            assert shapes[f"{name}.conv"] == (width, size, size)
            size //= 2
            assert shapes[name] == (width, size, size)
        assert size == 2
        for index, width in enumerate(decoder):
            size *= 2
            name = f"dense.{network}.trunk.decoder.blocks.{index}"
            assert shapes[f"{name}.conv"] == shapes[name] == (width, size, size)
    assert shapes["dense.global_motion.displacement"] == (2, 256, 256)
    assert shapes["dense.local_motions.mouth.head"] == (2, 64, 64)
    assert shapes["generator.first"] == (64, 256, 256)
    assert shapes["generator.down.0"] == (128, 128 * 2, 128 * 2)  # before the pooling
    assert shapes["generator.down.1"] == (256, 128, 128)
    assert [shapes[f"generator.residuals.{i}"] for i in range(6)] == [(256, 64, 64)] * 6
    assert shapes["generator.up.0"] == (128, 128, 128)
    assert shapes["generator.up.1"] == (64, 256, 256)
    assert shapes["generator.final"] == (3, 256, 256)


def test_landmarks_modulate_the_blocks_that_the_supplement_says() -> None:
    model = full(68)

    def adaptive(blocks: nn.ModuleList) -> list[bool]:
        return [block.adaptive is not None for block in blocks]

    whole, mouth = model.dense.global_motion.trunk, model.dense.local_motions["mouth"].trunk
    assert adaptive(whole.encoder.blocks) == [False] * 3 + [True] * 4
    assert adaptive(whole.decoder.blocks) == [True] * 4 + [False] * 3
    assert adaptive(mouth.encoder.blocks) == [False] * 2 + [True] * 3
    assert adaptive(mouth.decoder.blocks) == [True] * 3 + [False] * 2


def test_a_frame_costs_what_the_floor_says() -> None:
    model = full(68)
    face = meta(1, 68, 2)
    with FlopCounterMode(display=False) as once:
        cache = model.prepare(meta(1, 3, 256, 256), face)
    with FlopCounterMode(display=False) as each:
        model.drive(cache, face)
    assert once.get_total_flops() / 2e9 == pytest.approx(12.1, abs=0.05)  # multiply-accumulates
    assert each.get_total_flops() / 2e9 == pytest.approx(46.4, abs=0.05)


@pytest.mark.parametrize("size", [64, 256])
def test_a_new_model_moves_nothing_whatever_the_landmarks(size: int) -> None:
    model = tiny(size=size, patch=size // 4).eval()
    picture, source = pictures(1, size), landmarks(seed=1)
    for seed in range(3):
        fields = model.dense.decode(model.dense.encode(picture, source), landmarks(seed=seed))
        assert torch.allclose(fields.deformation[0], identity_grid(size), atol=1e-6)
        assert torch.allclose(warp(picture, fields.deformation), picture, atol=1e-6)
        assert fields.mask is not None
        assert torch.allclose(fields.mask, torch.full_like(fields.mask, 0.5))
        assert 0.8 < fields.occlusion.mean() < 0.95  # a logit of 2: nearly everything passes


@pytest.mark.parametrize("kind", ["spatial", "broadcast"])
def test_no_motion_adds_exactly_nothing(kind: Any) -> None:
    layer, hidden = AddMotion(8, 2, 20, kind), torch.randn(3, 8, 2, 2)
    still = torch.randn(3, 20)
    assert torch.equal(layer(hidden, still - still), hidden)
    assert not torch.allclose(layer(hidden, still), hidden)


def test_a_driving_frame_like_the_source_adds_nothing_anywhere() -> None:
    """In the network, too: Add Motion is told d - s, of the whole face and of each part."""
    model = awake(tiny()).eval()
    added: list[bool] = []

    def note(_module: nn.Module, inputs: Any, output: Tensor) -> None:
        added.append(not torch.equal(inputs[0], output))

    for module in model.modules():
        if isinstance(module, AddMotion):
            module.register_forward_hook(note)
    source, face = pictures(1), landmarks(1)
    model(source, face, face)
    assert added == [False] * 4
    model(source, face, landmarks(1, seed=5))
    assert added[4:] == [True] * 4


def moved_by_add_motion(kind: Any) -> float:
    """Relative change of the displacement when only Add Motion sees that the landmarks moved."""
    model = tiny(add_motion=kind, local_add_motion=False)
    model.train(False)
    with torch.no_grad():  # AdaIN stays at zero: it lets nothing of the landmarks through
        model.dense.global_motion.displacement.weight.normal_(0, 0.1)
        source, driving = landmarks(seed=1), landmarks(seed=2)
        encoded = model.dense.encode(pictures(), source)
        still = model.dense.decode(encoded, source).global_displacement
        moved = model.dense.decode(encoded, driving).global_displacement
    return float((moved - still).norm() / still.norm())


def test_motion_gets_through_add_motion_alone() -> None:
    assert moved_by_add_motion("spatial") > 1e-2
    assert moved_by_add_motion("none") == 0


def test_content_moves_where_the_displacement_says() -> None:
    model = tiny(size=64, patch=16).eval()
    with torch.no_grad():
        model.dense.global_motion.displacement.bias.copy_(torch.tensor([-2 * 8 / 64, 0]))
    picture = pictures(1, 64)
    fields = model.dense.decode(model.dense.encode(picture, landmarks()), landmarks())
    moved = warp(picture, fields.deformation)
    assert torch.allclose(moved[..., 8:], picture[..., :-8], atol=1e-5)


def test_driving_a_prepared_source_is_the_whole_forward_pass() -> None:
    model = awake(tiny()).eval()
    source, face, driving = pictures(1), landmarks(1), landmarks(6, seed=3)
    with torch.no_grad():
        cache = model.prepare(source, face)
        one_by_one = torch.cat([model.drive(cache, driving[i : i + 1])[0] for i in range(6)])
        batched, _ = model.drive(cache, driving)
        whole, _ = model(source.expand(6, -1, -1, -1), face.expand(6, -1, -1), driving)
    assert torch.allclose(one_by_one, whole, atol=1e-5)
    assert torch.allclose(batched, whole, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-3  # the landmarks do something


def test_source_encoders_run_once_for_all_frames() -> None:
    model = tiny().eval()
    calls = {"once": 0, "each": 0}

    def counter(key: str) -> Any:
        def hook(*_: Any) -> None:
            calls[key] += 1

        return hook

    trunks = [model.dense.global_motion.trunk]
    trunks += [local.trunk for local in model.dense.local_motions.values()]
    for trunk in trunks:
        trunk.encoder.register_forward_hook(counter("once"))
        trunk.decoder.register_forward_hook(counter("each"))
    model.generator.first.register_forward_hook(counter("once"))
    model.generator.final.register_forward_hook(counter("each"))
    cache = model.prepare(pictures(), landmarks())
    for seed in range(7):
        model.drive(cache, landmarks(seed=seed))
    assert calls == {"once": 5, "each": 7 * 5}


def test_what_is_cached_does_not_depend_on_the_driving_frame() -> None:
    model = awake(tiny())
    driving = landmarks(seed=2).requires_grad_()
    cache = model.prepare(pictures(), landmarks())
    generated, _ = model.drive(cache, driving)
    (through,) = torch.autograd.grad(generated.sum(), driving, retain_graph=True)
    assert through.any()
    cached = [cache.features, *cache.motion.encoded]
    cached += [tensor for part in cache.motion.parts.values() for tensor in part.encoded]
    assert len(cached) == 5
    for tensor in cached:
        assert tensor.requires_grad
        assert torch.autograd.grad(tensor.sum(), driving, retain_graph=True, allow_unused=True) == (
            None,
        )


@pytest.mark.parametrize(
    "switch",
    [
        {"adain_norm": "batch"},
        {"adain_pos": "after_block"},
        {"add_motion": "broadcast"},
        {"add_motion": "concat"},
        {"add_motion": "none"},
        {"skip": "unet"},
        {"compose": "flow_product"},
        {"compose": "fomm"},
        {"local_compose": "replace"},
        {"local_add_motion": False},
        {"local_occlusion": True},
        {"warp_padding": "zeros"},
        {"num_landmarks": 68},
    ],
    ids=lambda switch: "-".join(map(str, *switch.items())),
)
def test_every_switch_changes_the_result_and_trains_every_weight(switch: dict[str, Any]) -> None:
    model = awake(tiny(**switch))
    points = model.config.num_landmarks
    source, face = pictures(2), landmarks(2, points=points)
    driving = landmarks(2, points=points, seed=2) + 0.3
    generated, fields = model(source, face, driving)
    loss = generated.square().mean() + (0 if fields.mask is None else fields.mask.mean())
    loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []
    plain = tiny()
    if shapes(plain) == shapes(model):  # the same weights, read in another way
        plain.load_state_dict(model.state_dict())
        assert not torch.allclose(plain(source, face, driving)[0], generated, atol=1e-4)


def shapes(model: Motion) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("logit", "moves"), [(-40.0, False), (40.0, True)])
def test_where_the_mask_is_shut_the_source_stays(logit: float, moves: bool) -> None:
    model = awake(tiny()).eval()
    whole = model.dense.global_motion
    with torch.no_grad():
        whole.mask.weight.zero_()
        whole.mask.bias.fill_(logit)
        before, _ = model(pictures(1), landmarks(1), landmarks(1, seed=2))
        whole.displacement.bias.add_(0.4)
        after, _ = model(pictures(1), landmarks(1), landmarks(1, seed=2))
    assert torch.allclose(before, after, atol=1e-6) is not moves


def test_a_mask_that_multiplies_the_flow() -> None:
    model = awake(tiny(compose="flow_product")).eval()
    cache = model.prepare(pictures(), landmarks())
    whole = model.dense.decode(cache.motion, landmarks(seed=2))
    _, fields = model.drive(cache, landmarks(seed=2))
    assert fields.mask is not None
    grid = identity_grid(32)
    expected = grid + fields.mask[:, 0, :, :, None] * (whole.deformation - grid)
    assert torch.allclose(fields.deformation, expected, atol=1e-6)


def test_a_local_network_moves_its_patch_only_and_at_the_driving_place() -> None:
    model = tiny(size=64, patch=16).eval()
    with torch.no_grad():
        model.dense.local_motions["mouth"].head.bias[0] = 0.5
    face = landmarks()
    driving = face + torch.tensor([0.25, -0.125])
    fields = model.dense.decode(model.dense.encode(pictures(1, 64), face), driving)
    moved = (fields.deformation[0] - identity_grid(64))[..., 0]
    y, x = torch.where(moved.abs() > 1e-6)
    centre = (driving[0, 48:68].mean(dim=0) + 1) * 32
    assert float(moved.detach().max()) == pytest.approx(0.5 * 0.25, abs=1e-6)
    assert abs(float(x.float().mean()) + 0.5 - float(centre[0])) < 0.6
    assert abs(float(y.float().mean()) + 0.5 - float(centre[1])) < 0.6
    assert len(x) <= 16 * 16


def test_replacing_carries_the_patch_from_the_sources_place() -> None:
    model = tiny(size=64, patch=16, local_compose="replace").eval()
    face = landmarks()
    shift = torch.tensor([0.25, -0.125])
    fields = model.dense.decode(model.dense.encode(pictures(1, 64), face), face + shift)
    moved = fields.deformation[0] - identity_grid(64)
    centre = (((face + shift)[0, 48:68].mean(dim=0) + 1) * 32).long()
    assert torch.allclose(moved[centre[1], centre[0]], -shift, atol=1e-5)
    assert torch.allclose(moved[0, 0], torch.zeros(2), atol=1e-6)


def test_bfloat16_comes_close() -> None:
    model = awake(tiny()).eval()
    source, face, driving = pictures(1), landmarks(1), landmarks(1, seed=3)
    with torch.no_grad():
        exact, fields = model(source, face, driving)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough, rough_fields = model(source, face, driving)
    assert rough_fields.deformation.dtype == rough.dtype == torch.float32
    assert (exact - rough).abs().mean() < 0.02
    assert (fields.deformation - rough_fields.deformation).abs().max() < 0.1


def test_the_configuration_survives_json() -> None:
    stored = json.loads(json.dumps(asdict(TINY)))
    lists = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
    assert MotionConfig(**(stored | lists)) == TINY


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": 24}, "24 px halved 4 times is 1.5"),
        ({"patch": 6}, "6 px halved 2 times"),
        ({"global_decoder": (8, 8)}, "4 encoder blocks, 2 decoder blocks"),
        ({"local_adaptive": 3}, "3 of them adaptive"),
        ({"num_landmarks": 98}, "98 landmarks"),
        ({"patch": 64}, "patch 64 is larger than size 32"),
        ({"size": 16, "adain_pos": "after_block"}, "not a whole number >= 2"),
    ],
)
def test_a_configuration_that_cannot_be(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(TINY, **change)


def test_inputs_that_do_not_fit() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"\(1, 68, 2\), not \(b, 70, 2\)"):
        model.prepare(pictures(), landmarks(points=68))
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\), not \(b, 3, 32, 32\)"):
        model.prepare(pictures(1, 64), landmarks())
    cache = model.prepare(pictures(2), landmarks(2))
    with pytest.raises(ValueError, match="2 sources cannot serve 3"):
        model.drive(cache, landmarks(3))
    with pytest.raises(ValueError, match="driving landmarks"):
        model.drive(cache, landmarks(2, points=68))


def test_the_generator_is_split_where_the_source_ends() -> None:
    torch.manual_seed(0)
    generator = Generator(4, 8, 2, 2).eval()
    features = generator.encode(pictures(2))
    assert features.shape == (2, 8, 8, 8)  # the limit holds
    image = generator.decode(features)
    assert image.shape == (2, 3, 32, 32)
    assert image.abs().max() < 1


def test_a_residual_block_normalises_and_cuts_off_before_each_convolution() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(4).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def before(y: Tensor) -> Tensor:
        spread = y.var(dim=(0, 2, 3), unbiased=False, keepdim=True)
        return ((y - y.mean(dim=(0, 2, 3), keepdim=True)) / (spread + 1e-5).sqrt()).clamp(min=0)

    expected = x + block.conv2(before(block.conv1(before(x))))
    assert torch.allclose(block(x), expected)
