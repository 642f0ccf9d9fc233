"""The Blender's parts have the published sizes, its pictures their limits, and a target without a head stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.blender.exemplars import View
from models.blender.features import FeatureExtractor
from models.blender.network import Blender, BlenderConfig, BlendingUNet, compose, gray
from models.blender.studies import attention, own_share
from models.blender.warp import WarpConfig, unit_features
from models.discriminators import ResidualDiscriminator
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
    from models.blender.masks import dilate, make_masks

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
    import cv2

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
