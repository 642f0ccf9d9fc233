"""The Aligner: counts and shapes of spec-head-swap §9.1, what it must not depend on, growing, and LPD's weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torchvision.models import ResNeXt50_32X4D_Weights
from torchvision.transforms.functional import normalize

from models.aligner.network import (
    Aligner,
    AlignerConfig,
    Encoder,
    Generator,
    enlarged,
    grow,
    import_lpd,
    load_imagenet,
    motion_encoder,
    portrait_encoder,
)
from models.layers import Spectral
from tests.aligners import NETWORK, SIZE


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def inputs(b: int = 2, k: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    pictures = [
        torch.rand(b, k, 3, SIZE, SIZE),
        torch.rand(b, 3, SIZE, SIZE),
        torch.rand(b, 3, SIZE, SIZE),
    ]
    sources, driving, face = (2 * x - 1 for x in pictures)
    return [sources, torch.randn(b, k, 128), driving, face]


def built(config: AlignerConfig = NETWORK, seed: int = 0) -> Aligner:
    torch.manual_seed(seed)
    aligner = Aligner(config)
    with torch.no_grad():  # away from the symmetric start
        aligner.generator.constant.normal_()
        aligner.generator.affine.bias.add_(0.3 * torch.randn_like(aligner.generator.affine.bias))
    return aligner.eval()


# ------------------------------------------------------------------------------------------ shapes, counts


def test_the_papers_aligner_has_the_papers_dimensions():
    with torch.device("meta"):
        aligner = Aligner(AlignerConfig())
        portrait = aligner(
            torch.zeros(2, 3, 3, 256, 256),
            torch.zeros(2, 3, 512),
            torch.zeros(2, 3, 256, 256),
            torch.zeros(2, 3, 256, 256),
        )
        vectors = [
            aligner.portrait(torch.zeros(6, 3, 256, 256)),
            aligner.pose(torch.zeros(2, 3, 256, 256)),
        ]
    assert portrait.image.shape == (2, 3, 512, 512)
    assert portrait.mask is not None
    assert portrait.mask.shape == (2, 1, 512, 512)
    assert [tuple(v.shape) for v in vectors] == [(6, 512), (2, 256)]
    assert count(aligner.portrait) == 24_028_992
    assert aligner.expression is not None
    assert count(aligner.pose) == count(aligner.expression) == 2_551_808
    assert count(aligner) == 67_514_180
    generator = aligner.generator
    assert generator.hidden.in_features == 1536 == 512 + 512 + 256 + 256
    assert (generator.hidden.out_features, generator.affine.out_features) == (768, 13_312)
    assert count(generator.hidden) + count(generator.affine) == 11_417_344
    assert len(generator.norm_widths) == 19
    assert sum(generator.norm_widths) == 6_656


LPD_JOINT = {"portrait_dim": 512 - 128, "identity": "mobilefacenet", "pose_dim": 256}
"""A joint code of LPD's length, 768, for its count."""


@pytest.mark.parametrize(
    ("options", "parameters", "norms"),
    [
        ({}, 38_381_572, 13_312),
        ({"predict_mask": False}, 38_380_995, 13_312),
        ({"paper_strict": True}, 38_380_995, 13_312),
        ({"schedule": "lpd"}, 44_662_980, 15_104),
        ({"schedule": "lpd", "predict_mask": False}, 44_662_403, 15_104),
        ({"schedule": "lpd", "predict_mask": False, "hidden": 1536}, 57_442_691, 15_104),
        (
            {"schedule": "lpd", "size": 256, "motion_encoder": "single", **LPD_JOINT},
            37_516_996,
            13_056,
        ),
    ],
)
def test_parameters_of_the_generators(options, parameters, norms):
    with torch.device("meta"):
        generator = Generator(AlignerConfig(**options))
    assert count(generator) == parameters
    assert generator.affine.out_features == 2 * sum(generator.norm_widths) == norms


def test_lpd_at_256_has_17_norms_and_half_the_size():
    config = AlignerConfig(schedule="lpd", size=256)
    with torch.device("meta"):
        generator = Generator(config)
        portrait = generator(torch.zeros(1, 1536))
    assert len(generator.norm_widths) == 17
    assert portrait.image.shape == (1, 3, 256, 256)
    assert config.widths == (512, 512, 512, 512, 256, 128, 64)
    assert AlignerConfig().widths == (512, 512, 512, 512, 256, 128, 64, 64)
    assert AlignerConfig(schedule="lpd").widths == (512, 512, 512, 512, 512, 256, 128, 64)


def test_one_motion_encoder_is_half_the_code():
    with torch.device("meta"):
        aligner = Aligner(AlignerConfig(motion_encoder="single"))
    assert aligner.expression is None
    assert aligner.generator.hidden.in_features == 1280
    single = built(replace(NETWORK, motion_encoder="single"))
    *others, face = inputs()
    assert torch.equal(single(*others, face).image, single(*others, -face).image)


def test_spectral_norm_is_on_the_generator_only_unless_the_letter_is_wanted():
    def normalised(aligner: Aligner) -> dict[str, bool]:
        layers = {n: m for n, m in aligner.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        return {n: hasattr(m, "parametrizations") for n, m in layers.items()}

    found = normalised(Aligner(NETWORK))
    assert all(is_on == name.startswith("generator.") for name, is_on in found.items())
    strict = normalised(Aligner(replace(NETWORK, paper_strict=True)))
    assert all(strict.values())
    assert len(strict) == len(found) > 60
    assert not any(isinstance(m, Spectral) for m in Aligner(NETWORK).pose.modules())


# ---------------------------------------------------------------------------------------------- behaviours


def test_pictures_and_masks_keep_their_ranges_and_black_is_where_nobody_is():
    portrait = built()(*inputs())
    assert portrait.mask is not None
    assert portrait.image.shape == (2, 3, SIZE, SIZE)
    assert portrait.image.abs().max() <= 1
    assert 0 < portrait.mask.min() < portrait.mask.max() < 1
    assert (portrait.image <= 2 * portrait.mask - 1 + 1e-6).all()  # mask 0 would be black
    assert built(replace(NETWORK, predict_mask=False))(*inputs()).mask is None


def test_order_and_repetition_of_the_sources_do_not_matter():
    aligner = built().double()
    sources, identities, driving, face = (x.double() for x in inputs(k=3))
    expected = aligner(sources, identities, driving, face).image
    order = [2, 0, 1]
    shuffled = aligner(sources[:, order], identities[:, order], driving, face).image
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-12)
    repeated = aligner(
        sources.repeat(1, 2, 1, 1, 1), identities.repeat(1, 2, 1), driving, face
    ).image
    torch.testing.assert_close(repeated, expected, rtol=0, atol=1e-12)
    one = aligner(sources[:, :1], identities[:, :1], driving, face).image
    four = aligner(sources[:, [0] * 4], identities[:, [0] * 4], driving, face).image
    torch.testing.assert_close(four, one, rtol=0, atol=1e-12)
    assert (one - expected).abs().max() > 1e-6


def test_the_identity_code_has_unit_variance_whatever_the_vectors_length():
    aligner = built()
    sources, identities, *_ = inputs()
    code = aligner.encode_sources(sources, identities)
    longer = aligner.encode_sources(sources, 9 * identities)
    torch.testing.assert_close(code, longer)
    torch.testing.assert_close(code[:, -128:].square().mean(dim=1), torch.ones(2))


def test_the_identity_code_points_along_the_mean_of_the_raw_vectors():
    """A surer picture has a longer vector, and weighs more; unit vectors would weigh alike."""
    sources, *_ = inputs()
    identities = torch.zeros(2, 2, 128)
    identities[:, 0, 0], identities[:, 1, 1] = 3.0, 4.0
    code = built().encode_sources(sources, identities)[:, -128:]
    expected = torch.tensor([0.6, 0.8]) * 128**0.5
    torch.testing.assert_close(code[:, :2], expected.expand(2, 2))
    assert not code[:, 2:].any()


def test_every_encoder_sees_its_own_picture_and_has_its_own_place_in_the_code():
    aligner = built()
    sources, identities, driving, face = inputs()
    motion = aligner.encode_motion(driving, face)
    torch.testing.assert_close(motion[:, :8], aligner.pose(driving))
    torch.testing.assert_close(motion[:, 8:], aligner.expression(face))
    portraits = torch.stack([aligner.portrait(sources[:, k]) for k in range(2)])
    code = aligner.encode_sources(sources, identities)
    torch.testing.assert_close(code[:, :16], portraits.mean(dim=0))


@pytest.mark.parametrize("init", ["scratch", "imagenet"])
def test_encoders_are_given_pictures_as_their_weights_expect(init):
    """From scratch they come as they are, in [-1, 1]; else as torchvision's own transform makes them."""
    encoder = Encoder(nn.Identity(), is_imagenet=init == "imagenet", is_spectral=False)
    image = torch.rand(2, 3, 4, 4) * 2 - 1
    expected = image
    if init == "imagenet":
        preset = ResNeXt50_32X4D_Weights.IMAGENET1K_V2.transforms()
        expected = normalize((image + 1) / 2, preset.mean, preset.std)
    torch.testing.assert_close(encoder(image), expected)


def test_motion_codes_do_not_tremble_in_training():
    aligner = built(replace(NETWORK, norm="frozen")).train()
    *_, driving, face = inputs()
    motion = aligner.encode_motion(driving, face)
    assert torch.equal(aligner.encode_motion(driving, face), motion)


def test_the_generator_starts_from_ones():
    """LPD, spec-head-swap §2.5: learned, and the same for everybody."""
    constant = Generator(NETWORK).constant
    assert constant.shape == (1, 32, 4, 4)
    assert (constant == 1).all()
    assert constant.requires_grad


def test_enlarging_is_opencvs():
    image = torch.rand(1, 3, 5, 5)
    expected = cv2.resize(image[0].permute(1, 2, 0).numpy(), (10, 10))
    ours = enlarged(image)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_codes_can_be_made_once_and_used_again():
    aligner = built()
    sources, identities, driving, face = inputs()
    source_code = aligner.encode_sources(sources, identities)
    motion_code = aligner.encode_motion(driving, face)
    whole = aligner(sources, identities, driving, face).image
    assert torch.equal(aligner.generate(source_code, motion_code).image, whole)


def test_first_pictures_are_not_washed_out():
    """γ starts near 1: the perceptron's matrix has norm 1 and 13k rows, so by itself it would make γ of about 0.1."""
    torch.manual_seed(0)
    generator = Generator(NETWORK)
    scales = [scale for _, scale in generator._affines(torch.randn(4, 160))]
    assert torch.cat(scales, dim=1).median().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("norm", ["sync", "frozen", "group"])
def test_encoder_norms_do_what_they_are_chosen_for(norm):
    torch.manual_seed(0)
    aligner = Aligner(replace(NETWORK, norm=norm)).train()
    _, _, driving, face = inputs(b=3)
    together = aligner.encode_motion(driving, face)
    alone = [aligner.eval().encode_motion(driving[i : i + 1], face[i : i + 1]) for i in range(3)]
    if norm == "sync":  # batch statistics: a sample depends on its neighbours
        assert (torch.cat(alone) - together).abs().max() > 1e-3
    else:
        torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)
    statistics = [b for n, b in aligner.pose.named_buffers() if n.endswith("running_mean")]
    assert (len(statistics) == 0) == (norm == "group")
    assert all((s.abs().sum() > 0) == (norm == "sync") for s in statistics)


def test_a_checkpoint_round_trip_is_strict():
    one, other = built(seed=0), built(seed=1)
    state = one.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other(*inputs()).image, one(*inputs()).image)
    without = {name: value for name, value in state.items() if not name.startswith("pose.")}
    with pytest.raises(RuntimeError, match="pose"):
        other.load_state_dict(without)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"size": 48}, "48"), ({"encoder_init": "imagenet"}, r"portrait_blocks \(1, 1, 1, 1\)")],
)
def test_impossible_configs_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        replace(NETWORK, **options)


def test_every_encoder_begins_with_the_weights_of_its_file(monkeypatch, tmp_path):
    """Narrow files, whose heads have other classes."""
    config = replace(NETWORK, norm="frozen")
    torch.manual_seed(0)
    files = {
        "resnext50": portrait_encoder(replace(config, portrait_dim=7)).network,
        "mobilenet_v2": motion_encoder(config, 9).network,
    }
    for name, network in files.items():
        torch.save(network.state_dict(), tmp_path / name)
    monkeypatch.setattr("models.aligner.network.find", tmp_path.__truediv__)
    aligner = Aligner(config)
    encoders = {"portrait": "resnext50", "pose": "mobilenet_v2", "expression": "mobilenet_v2"}
    before = {key: value.clone() for key, value in aligner.state_dict().items()}
    load_imagenet(aligner)
    for name, file in encoders.items():
        theirs = files[file].state_dict()
        for key, value in getattr(aligner, name).network.state_dict().items():
            is_head = key.startswith(("fc.", "classifier."))
            expected = before[f"{name}.network.{key}"] if is_head else theirs[key]
            assert torch.equal(value, expected), (name, key)


@pytest.mark.slow
def test_imagenet_weights_fill_everything_but_the_heads(monkeypatch, tmp_path):
    """Files with torchvision's own names and shapes, thousand classes included, as they are published."""
    import torchvision

    torch.manual_seed(0)
    theirs = {
        "resnext50": torchvision.models.resnext50_32x4d(),
        "mobilenet_v2": torchvision.models.mobilenet_v2(),
    }
    for name, network in theirs.items():
        torch.save(network.state_dict(), tmp_path / name)
    monkeypatch.setattr("models.aligner.network.find", tmp_path.__truediv__)
    config = AlignerConfig(size=32, base=4, limit=8, encoder_init="imagenet")
    aligner = Aligner(config)
    head = aligner.portrait.network.fc.weight.clone()
    load_imagenet(aligner)
    assert torch.equal(
        aligner.portrait.network.layer4[2].conv3.weight, theirs["resnext50"].layer4[2].conv3.weight
    )
    assert torch.equal(aligner.portrait.network.fc.weight, head)
    assert aligner.expression is not None
    for encoder in (aligner.pose, aligner.expression):
        assert torch.equal(
            encoder.network.features[0][0].weight, theirs["mobilenet_v2"].features[0][0].weight
        )
    assert aligner.portrait.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


# ------------------------------------------------------------------------------------------------- growing


@pytest.mark.parametrize("predict_mask", [True, False])
def test_a_grown_network_starts_as_the_small_one_enlarged(predict_mask):
    small = built(replace(NETWORK, schedule="lpd", size=SIZE // 2, predict_mask=predict_mask))
    grown = grow(small)
    assert grown.config == replace(NETWORK, predict_mask=predict_mask)
    assert not grown.training
    before, after = small(*inputs()), grown(*inputs(), fade=0.0)
    torch.testing.assert_close(after.image, enlarged(before.image), rtol=0, atol=1e-6)
    if before.mask is not None:
        assert after.mask is not None
        torch.testing.assert_close(after.mask, enlarged(before.mask), rtol=0, atol=1e-6)
    code = torch.randn(2, grown.generator.hidden.in_features)
    for shift, scale in grown.generator._affines(code)[-3:-1]:  # of the new block
        assert not shift.any()
        assert (scale == 1).all()
    full, half = grown(*inputs()).image, grown(*inputs(), fade=0.5).image
    torch.testing.assert_close(half, (after.image + full) / 2)
    assert (full - after.image).abs().max() > 0.01


def test_only_what_can_grow_grows():
    with pytest.raises(ValueError, match="append64"):
        grow(built())
    with pytest.raises(ValueError, match="16 to 8 channels"):
        built(replace(NETWORK, schedule="lpd"))(*inputs(), fade=0.5)


# ---------------------------------------------------------------------------------------------------- LPD


class LpdNorm(nn.Module):
    """LPD's adaptive norm, whose parameters are set from outside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.InstanceNorm2d(channels, eps=1e-4)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_layer(x) * self.scale[:, :, None, None] + self.shift[:, :, None, None]


def lpd_conv(inputs: int, outputs: int, kernel: int, *, bias: bool) -> nn.Module:
    return spectral_norm(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias), eps=1e-4
    )


class LpdBlock(nn.Module):
    """As LPD lays it out, which decides the names in its checkpoints."""

    def __init__(self, inputs: int, outputs: int, *, up: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(
            LpdNorm(inputs),
            nn.ReLU(),
            *([nn.Upsample(scale_factor=2)] if up else []),
            nn.Sequential(),
            lpd_conv(inputs, outputs, 3, bias=False),
            LpdNorm(outputs),
            nn.ReLU(),
            nn.Sequential(),
            lpd_conv(outputs, outputs, 3, bias=False),
        )
        layers = [nn.Upsample(scale_factor=2), lpd_conv(inputs, outputs, 1, bias=True)]
        self.skip = nn.Sequential(*layers) if up else None

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + (x if self.skip is None else self.skip(x))


class Lpd(nn.Module):
    """The generator of latent pose reenactment, written from its description with torch's older spectral norm."""

    def __init__(self, widths: tuple[int, ...], identity: int, pose: int, hidden: int) -> None:
        super().__init__()
        self.constant = nn.ParameterDict({"constant": torch.randn(1, widths[0], 4, 4)})
        blocks = [LpdBlock(widths[0], widths[0], up=False) for _ in range(2)]
        blocks += [LpdBlock(a, b, up=True) for a, b in pairwise(widths)]
        last = widths[-1]
        self.decoder_blocks = nn.Sequential(
            *blocks, LpdNorm(last), nn.ReLU(), lpd_conv(last, 4, 3, bias=True), nn.Tanh()
        )
        self.norms = [m for m in self.modules() if isinstance(m, LpdNorm)]
        self.affine_params_projector = nn.Sequential(
            spectral_norm(nn.Linear(identity + pose, hidden)),
            nn.ReLU(),
            spectral_norm(nn.Linear(hidden, sum(2 * norm.channels for norm in self.norms))),
        )

    def forward(self, identity: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
        parameters = self.affine_params_projector(torch.cat([identity, pose], dim=1))
        for norm in self.norms:
            norm.shift, norm.scale, parameters = parameters.split(
                [norm.channels, norm.channels, parameters.shape[1] - 2 * norm.channels], dim=1
            )
        y = self.decoder_blocks(self.constant["constant"].expand(len(identity), -1, -1, -1))
        return y[:, :3], y[:, 3:] * 0.5 + 0.5


@pytest.mark.parametrize("schedule", ["lpd", "append64"])
def test_every_tensor_of_lpds_generator_arrives(schedule):
    torch.manual_seed(3)
    config = replace(NETWORK, schedule=schedule, size=16 if schedule == "lpd" else 32)
    lpd = Lpd(config.widths[:3], identity=16, pose=8, hidden=32).eval()
    aligner = built(config)
    before = {name: value.clone() for name, value in aligner.state_dict().items()}
    import_lpd(aligner, lpd.state_dict(), identity_columns=16)
    changed = {n for n, v in aligner.state_dict().items() if not torch.equal(v, before[n])}
    block = "generator.blocks.4."
    trunk = {n for n in before if n.startswith("generator.") and not n.startswith(block)}
    assert changed == trunk
    assert len(lpd.state_dict()) == len(trunk)

    identity, pose = torch.randn(2, 16), torch.randn(2, 8)
    rgb, mask = lpd(identity, pose)
    source_code = torch.cat(
        [identity, torch.randn(2, 128)], dim=1
    )  # what LPD has not counts nothing
    motion_code = torch.cat([pose, torch.randn(2, 8)], dim=1)
    portrait = aligner.generate(source_code, motion_code, fade=1.0 if schedule == "lpd" else 0.0)
    image = mask * (rgb + 1) - 1
    if schedule == "append64":
        image, mask = enlarged(image), enlarged(mask)
    torch.testing.assert_close(portrait.mask, mask, rtol=0, atol=1e-5)
    torch.testing.assert_close(portrait.image, image, rtol=0, atol=1e-5)


def test_a_state_that_is_not_lpds_is_refused_and_changes_nothing():
    config = replace(NETWORK, schedule="lpd", size=16)
    state = Lpd(config.widths, identity=16, pose=8, hidden=32).state_dict()
    aligner = built(config)
    before = aligner.generator.constant.clone()
    tuned = {**state, "identity_embedding": torch.zeros(1, 16)}
    with pytest.raises(ValueError, match=r"unknown .*identity_embedding"):
        import_lpd(aligner, tuned, 16)
    partial = {name: value for name, value in state.items() if "skip" not in name}
    with pytest.raises(ValueError, match=r"missing .*blocks\.2\.skip"):
        import_lpd(aligner, partial, 16)
    wide = {**state, "decoder_blocks.6.weight_orig": torch.zeros(4, 9, 3, 3)}
    with pytest.raises(ValueError, match=r"decoder_blocks\.6\.weight_orig becomes \(4, 9, 3, 3\)"):
        import_lpd(aligner, wide, 16)
    assert torch.equal(aligner.generator.constant, before)
    with pytest.raises(ValueError, match="predict_mask"):
        import_lpd(built(replace(config, predict_mask=False)), state, 16)
