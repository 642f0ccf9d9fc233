"""The Blender's parts have the published sizes, its pictures their limits, and a target without a head stays as it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import cv2
import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from models.blender.exemplars import View
from models.blender.features import LAYERS as TRUNK_LAYERS
from models.blender.features import FeatureExtractor, Pyramid
from models.blender.learner import PERCEPTUAL_LAYERS, BlenderLearnerConfig
from models.blender.masks import dilate, make_masks
from models.blender.network import Blender, BlenderConfig, BlendingUNet, compose, gray
from models.blender.pairs import PairConfig
from models.blender.studies import attention, own_share
from models.blender.warp import WarpConfig, unit_features
from models.discriminators import ResidualDiscriminator
from models.frozen.vgg import LAYERS
from tests.models.blender.scenes import SIZE, TINY, drawn, drawn_batch


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_the_specification():
    assert parameters(BlendingUNet("resunet7", 64)) == 8_220_483
    assert parameters(BlendingUNet("deep7", 64)) == 33_589_443
    assert parameters(ResidualDiscriminator(5, 512)) == 19_807_169
    extractor = FeatureExtractor("vgg19", 4, 256)
    assert parameters(extractor.phi) == parameters(extractor.theta) == 65_792
    assert not any(p.requires_grad for p in extractor.trunk.parameters())


@pytest.mark.parametrize(
    ("trunk", "stride"),
    [("vgg19", 4), ("vgg19", 8), ("vgg_normalised_conv3_1", 1), ("vgg_normalised_conv3_1", 4), ("small", 2), ("small", 8)],
)  # fmt: skip
def test_features_have_the_stride_that_was_asked_for(trunk, stride):
    extractor = FeatureExtractor(trunk, stride, 8)
    of_a, of_t = extractor(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    assert of_a.shape == (1, 8, 32 // stride, 32 // stride)
    assert of_t.shape == (2, 8, 32 // stride, 32 // stride)
    (of_a.square().sum() + of_t.square().sum()).backward()
    # every trained parameter is used, as gradient reduction over workers demands
    trained = [p for p in extractor.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def test_both_projections_start_alike():
    extractor = FeatureExtractor("small", 4, 8).eval()
    image = torch.rand(1, 3, 32, 32)
    of_a, of_t = extractor(image, image)
    assert torch.equal(of_a, of_t)


def test_a_trunk_gives_the_last_map_of_each_of_its_blocks():
    """As a feature pyramid takes them (Lin et al. 2017, §3)."""
    for name, last in (("vgg19", LAYERS[-1]), ("vgg_normalised_conv3_1", "relu3_1")):
        ends = [one for one, other in pairwise(LAYERS) if one[4] != other[4]] + [last]
        for stride, layer in TRUNK_LAYERS[name].items():
            assert layer in ends
            assert stride == 2 ** (int(layer[4]) - 1)


def test_the_pyramid_is_torchvisions():
    torch.manual_seed(0)
    ours = Pyramid([3, 5, 7], 8).eval()
    theirs = FeaturePyramidNetwork([3, 5, 7], 8).eval()
    pairs = zip(ours.laterals, (block[0] for block in theirs.inner_blocks), strict=True)
    with torch.no_grad():
        for one, other in [*pairs, (ours.output, theirs.layer_blocks[0][0])]:
            other.weight.copy_(one.weight)
            other.bias.copy_(one.bias)
    levels = [torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate((3, 5, 7))]
    finest = theirs({str(i): level for i, level in enumerate(levels)})["0"]
    torch.testing.assert_close(ours(levels), finest)


def test_a_goes_through_phi_and_t_through_theta():
    extractor = FeatureExtractor("small", 4, 8).eval()
    a, t = torch.rand(1, 3, 32, 32), torch.rand(2, 3, 32, 32)
    before = extractor(a, t)
    with torch.no_grad():
        extractor.theta.bias += 1
    torch.testing.assert_close(extractor(a, t), (before[0], before[1] + 1))
    assert not any(p.any() for n, p in FeatureExtractor("small", 2, 8).named_parameters() if n.endswith("bias"))  # fmt: skip


def test_all_that_is_trained_is_spectrally_normalised():
    """Supplement §3.2: "applied to all operators in the system"; the frozen trunk stays as it was trained."""
    for trunk in ("small", "vgg_normalised_conv3_1"):
        network = Blender(replace(TINY, trunk=trunk))
        layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
        for name, layer in layers.items():
            is_frozen = name.startswith("features.trunk.") and trunk != "small"
            assert hasattr(layer, "parametrizations") == (not is_frozen), name
    network = ResidualDiscriminator(5, 32, base=4)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert all(hasattr(layer, "parametrizations") for layer in layers.values())


def test_a_trained_trunks_normalisation_travels_with_its_weights():
    one, other = (FeatureExtractor("vgg_normalised_conv3_1", 4, 8).eval() for _ in range(2))
    with torch.no_grad():
        one.trunk.matrix.copy_(torch.randn_like(one.trunk.matrix))
        one.trunk.shift.add_(1)
    other.load_state_dict(one.state_dict())
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(other(image, image)[0], one(image, image)[0])


def test_the_unet_is_the_specifications():
    """Spec-head-swap §3.6 written out: three encoding units, a bridge, three decoding units, each beside its 1x1."""
    torch.manual_seed(0)
    unet = BlendingUNet("resunet7", 4).eval()
    conv = torch.nn.functional.conv2d

    def unit(part: nn.Module, x: torch.Tensor, stride: int = 1, *, relu: bool = True) -> torch.Tensor:  # fmt: skip
        first, second, skip = part.first, part.second, part.skip
        y = conv(x.relu() if relu else x, first.weight, first.bias, stride=stride, padding=1)
        y = conv(y.relu(), second.weight, second.bias, padding=1)
        return y + conv(x, skip.weight, skip.bias, stride=stride)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        sides = tuple(2 * side for side in x.shape[-2:])
        return torch.stack(
            [torch.from_numpy(cv2.resize(c.numpy(), sides)) for c in x.flatten(0, 1)]
        ).unflatten(0, x.shape[:2])

    x = torch.randn(2, 12, 16, 16)
    with torch.no_grad():
        level1 = unit(unet.encoders[0], x, relu=False)
        level2 = unit(unet.encoders[1], level1, 2)
        level3 = unit(unet.encoders[2], level2, 2)
        y = unit(unet.encoders[3], level3, 2)
        for part, level in zip(unet.decoders, (level3, level2, level1), strict=True):
            y = unit(part, torch.cat([doubled(y), level], dim=1))
        expected = conv(y, unet.output.weight, unet.output.bias).tanh()
        torch.testing.assert_close(unet(x), expected, atol=1e-5, rtol=1e-4)
    assert len(unet.encoders) + len(unet.decoders) == 7


def test_the_recipe_is_the_supplements():
    """Supplement §3.2 and spec-head-swap §3: numbers that no other test knows."""
    config = BlenderConfig()
    assert (config.size, config.labels, config.trunk) == (512, "fine", "vgg19")
    assert (config.feature_stride, config.feature_width, config.min_cells) == (4, 256, 4)
    assert (config.unet, config.unet_base) == ("resunet7", 64)
    assert (config.warp.tau, config.warp.backend, config.warp.chunk) == (0.01, "chunked", 1024)
    pairs = PairConfig()
    assert (pairs.brightness, pairs.contrast, pairs.saturation, pairs.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (pairs.p_mirror, pairs.p_other_frame, pairs.p_same_identity) == (0.7, 0.3, 0.5)
    assert (pairs.p_noise, pairs.p_reenacted, pairs.p_background) == (0.5, 0.25, 0.5)
    learner = BlenderLearnerConfig()
    assert (learner.l1, learner.cycle, learner.cycle_other, learner.lightness) == (10, 1, 1, 0)
    early = (learner.adversarial_early, learner.adversarial_after, learner.adversarial)
    assert early == (0.2, 20_000, 1)
    assert (learner.lr, learner.discriminator_lr) == (1e-4, 4e-4)
    assert (learner.clip, learner.ema, learner.perceptual) == (10, 0.999, "vgg19")
    firsts = tuple(f"relu{block}_1" for block in range(1, 6))
    assert PERCEPTUAL_LAYERS["vgg19"] == firsts


def bordered_batch():
    """T and T' are different pictures of one form, each with a black border of its own; nothing is enlarged by noise."""
    batch = drawn_batch(config=PairConfig(p_noise=0, p_affine=0))
    left, right = torch.ones_like(batch.target_valid), torch.ones_like(batch.target_valid)
    left[..., :8], right[..., -8:] = 0, 0
    other = {"other": -batch.target, "other_labels": batch.target_labels}
    return replace(batch, **other, target_valid=left, other_valid=right)


def test_both_cycles_are_one_measure_of_two_pictures():
    blender = Blender(TINY).eval()
    batch = bordered_batch()
    swapped = replace(
        batch,
        target=batch.other,
        target_valid=batch.other_valid,
        other=batch.target,
        other_valid=batch.target_valid,
    )
    one, other = blender(batch), blender(swapped)
    torch.testing.assert_close(one.cycle, other.cycle_other)
    torch.testing.assert_close(one.cycle_other, other.cycle)
    assert (one.cycle - one.cycle_other).abs() > 1e-4
    unbordered = blender(replace(batch, target_valid=torch.ones_like(batch.target_valid)))
    assert unbordered.cycle != one.cycle


def test_what_is_painted_in_use_is_what_was_painted_in_training():
    """With T as the scene, and neither noise nor T'."""
    blender = Blender(TINY).eval()
    batch = bordered_batch()
    batch = replace(batch, truth=batch.target, noise=torch.zeros_like(batch.noise))
    heads = (batch.animated, batch.animated_labels)
    image, painted = blender.repaint(*heads, batch.target, batch.target_labels, batch.target_valid)
    blended = blender(batch)
    torch.testing.assert_close(image, blended.image)
    assert torch.equal(painted, blended.masks.painted)
    assert not torch.equal(blender.repaint(*heads, batch.target, batch.target_labels)[0], image)


def test_noise_enlarges_what_is_painted_and_masks_are_of_both_heads():
    blender = Blender(TINY).eval()
    batch = replace(drawn_batch(), noise=torch.zeros(2, 1, SIZE, SIZE))
    plain = blender(batch).masks
    noise = batch.noise.clone()
    noise[..., :4, :4] = 1
    noisy = blender(replace(batch, noise=noise)).masks
    assert not plain.painted[..., :5, :5].any()
    assert noisy.painted[..., :5, :5].all()
    expected = make_masks(
        batch.animated_labels, batch.target_labels, TINY.paint_radius, valid_t=batch.target_valid
    )
    assert all(torch.equal(*both) for both in zip(plain, expected, strict=True))


def test_a_ring_without_counterpart_shows_the_target_at_its_place():
    blender = Blender(TINY).eval()
    batch = drawn_batch()
    batch = replace(batch, target_labels=torch.zeros_like(batch.target_labels))
    blended = blender(batch)
    cells = torch.nn.functional.avg_pool2d(batch.target, TINY.feature_stride)
    still = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)
    ring = (blended.masks.ring_a > 0).expand_as(still)
    gaps = (blended.ring_exemplar - still).abs()[ring].mean()
    assert gaps < 0.2 * (blended.ring_exemplar - batch.animated).abs()[ring].mean()


@pytest.mark.parametrize("unet", ["resunet7", "deep7"])
def test_pictures_stay_within_their_range(unet):
    blender = Blender(replace(TINY, size=64 if unet == "deep7" else SIZE, unet=unet))
    size = blender.config.size
    x = 50 * torch.randn(1, 12, size, size)
    image = blender.unet(x)
    assert image.shape == (1, 3, size, size)
    assert image.abs().max() <= 1


def test_what_the_unet_is_given():
    blender = Blender(TINY).eval()
    batch = drawn_batch()
    seen = []
    blender.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    blended = blender(batch)
    x, masks = seen[0], blended.masks
    assert torch.equal(x[:, :3], blended.head_exemplar)
    assert torch.equal(x[:, 3:6], blended.ring_exemplar)
    assert torch.equal(x[:, 6:7], masks.head_a)
    assert torch.equal(x[:, 7:10], batch.truth * (1 - masks.painted))
    assert torch.equal(x[:, 10:11], masks.ring_a)
    red, green, blue = batch.animated.unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None] * masks.head_a
    torch.testing.assert_close(x[:, 11:], luma)
    outside = (masks.head_a == 0).expand_as(blended.head_exemplar)
    assert not blended.head_exemplar[outside].any()
    assert not blended.ring_exemplar[(masks.ring_a == 0).expand_as(blended.ring_exemplar)].any()
    assert blended.head_exemplar.abs().max() <= 1
    # the truth's colours under the painted region cannot leak into the input
    hidden = replace(batch, truth=torch.where(masks.painted > 0, -batch.truth, batch.truth))
    assert torch.equal(blender(hidden).image, blended.image)


def test_blending_leaves_the_background_exactly_as_it_was():
    blender = Blender(TINY).eval()
    a, t = drawn(0, dx=-2), drawn(7, dx=3)
    out = blender.blend(a.image[None], a.labels[None], t.image[None], t.labels[None])
    changed = (out != t.image[None]).any(dim=1)
    assert changed.any()
    assert out.abs().max() <= 1
    masks = make_masks(a.labels[None], t.labels[None], TINY.paint_radius)
    allowed = dilate(masks.painted, TINY.feather)[:, 0] > 0
    assert not (changed & ~allowed).any()


def test_without_heads_the_target_is_returned():
    blender = Blender(TINY).eval()
    a, t = drawn(0), drawn(7)
    nobody = torch.zeros_like(t.labels)[None]
    assert torch.equal(blender.blend(a.image[None], nobody, t.image[None], nobody), t.image[None])


def test_composing_fades_outside_the_painted_region():
    painted = torch.zeros(1, 1, 1, 16)
    painted[..., :4] = 1
    out = compose(torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, 16), painted, 3)
    expected = [1, 1, 1, 1, 0.75, 0.5, 0.25] + [0] * 9
    torch.testing.assert_close(out[0, 0, 0], torch.tensor(expected, dtype=torch.float32))


def test_gray_is_opencvs():
    image = torch.rand(1, 3, 8, 8)
    expected = cv2.cvtColor(image[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
    torch.testing.assert_close(gray(image)[0, 0], torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_wrong_pictures_and_labels_are_refused():
    blender = Blender(TINY)
    image, labels = drawn(0).image[None], drawn(0).labels[None]
    for call, reason in (
        ((image[..., :16], labels, image, labels), r"\(1, 3, 32, 16\)"),
        ((image, labels, image[:, :1], labels), r"\(1, 1, 32, 32\)"),
        ((image, labels + 100, image, labels), "found 11"),
        ((image, labels, image, labels.expand(-1, 3, -1, -1)), "coloured picture"),
        ((image, labels[..., :8], image, labels), r"\(1, 1, 32, 8\)"),
    ):
        with pytest.raises(ValueError, match=reason):
            blender.blend(*call)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"feature_stride": 3}, "strides"), ({"size": 36}, "multiple of 8"), ({"size": 32, "unet": "deep7"}, "multiple of 64"), ({"min_cells": 0}, "min_cells")],
)  # fmt: skip
def test_impossible_shapes_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        replace(TINY, **change)


def test_a_strict_state_dict_gives_the_same_pictures():
    torch.manual_seed(0)
    first, second = Blender(TINY).eval(), Blender(BlenderConfig(**vars(TINY))).eval()
    batch = drawn_batch()
    assert not torch.equal(first(batch).image, second(batch).image)
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(batch).image, second(batch).image)


def test_attention_is_the_unrestricted_softmax():
    generator = torch.Generator().manual_seed(0)
    views = []
    for size in (4, 5):
        features = unit_features(torch.randn(1, 6, size, size, generator=generator))
        groups = torch.randint(-1, 3, (1, size, size), generator=generator)
        views.append(View(features, groups, torch.zeros(1, 3, size, size)))
    a, t = views
    found = attention(a, t, 3, WarpConfig(tau=0.3))
    scores = a.features.flatten(2)[0].T @ t.features.flatten(2)[0] / 0.3
    weights = scores.softmax(dim=1)
    for k in range(3):
        rows = weights[a.groups.flatten() == k]
        torch.testing.assert_close(found.heat[0, k].flatten(), rows.sum(dim=0))
        inside = rows[:, t.groups.flatten() == k].sum(dim=1).mean()
        torch.testing.assert_close(own_share(found)[0, k], inside)
    torch.testing.assert_close(found.mass.sum(dim=2), torch.ones(1, 3))
