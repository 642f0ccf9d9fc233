"""Losses that only the motion model uses, against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchvision.models.vgg import cfgs, make_layers

from models.frozen.vgg import Vgg19Features
from models.motion.learner import PERCEPTUAL_LAYERS
from models.motion.losses import (
    SCALES,
    least_squares_discriminator,
    least_squares_generator,
    perceptual,
    pyramid,
    pyramid_l1,
    total_variation,
)
from tests.material import needs_shared


def test_the_pyramid_is_scipys_blur_and_a_stride() -> None:
    images = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    levels = pyramid(images)
    assert torch.equal(levels[0], images)
    assert [tuple(level.shape[2:]) for level in levels] == [(64, 48), (32, 24), (16, 12), (8, 6)]
    for scale, level in zip(SCALES[1:], levels[1:], strict=True):
        stride = round(1 / scale)
        sigma = (stride - 1) / 2
        blurred = gaussian_filter(
            images.numpy(), (0, 0, sigma, sigma), mode="constant", truncate=4.0
        )
        assert np.allclose(level.numpy(), blurred[..., ::stride, ::stride], atol=1e-12)


def test_a_picture_is_not_unlike_itself() -> None:
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    assert pyramid_l1(picture, picture) == 0
    assert pyramid_l1(picture + 0.1, picture) > 0.1


@needs_shared
@pytest.mark.real
def test_the_perceptual_loss_with_a_real_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.material import SHARED

    monkeypatch.setenv("HEADRAY_WEIGHTS", str(SHARED / "weights"))
    name = "vgg_normalised_conv3_1"
    network = Vgg19Features(PERCEPTUAL_LAYERS[name], name)
    real = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), 64, mode="bicubic") * 2 - 1
    generated = (real + 0.2).requires_grad_()
    assert perceptual(real, real, network) == 0
    assert perceptual(real, generated, network) > 0
    loss = perceptual(generated, real, network)
    by_hand = sum(
        (found - wanted).abs().mean()
        for ours, theirs in zip(pyramid(generated), pyramid(real), strict=True)
        for found, wanted in zip(network(ours), network(theirs), strict=True)
    )
    assert torch.allclose(loss, by_hand)
    loss.backward()
    assert generated.grad is not None
    assert generated.grad.any()


def test_the_default_layers_are_the_five_of_first_order_model() -> None:
    """Its slices of torchvision's network end at 1, 6, 11, 20 and 29."""
    layers = PERCEPTUAL_LAYERS["vgg19"]
    with torch.device("meta"):
        stack = make_layers(cfgs["E"])
    names, block, place = {}, 1, 0
    for index, layer in enumerate(stack):
        if isinstance(layer, torch.nn.MaxPool2d):
            block, place = block + 1, 0
        elif isinstance(layer, torch.nn.Conv2d):
            place += 1
        else:
            names[index] = f"relu{block}_{place}"
    assert layers == tuple(names[index] for index in (1, 6, 11, 20, 29))
    network = Vgg19Features(layers, random_init=True)  # its weights cannot be had in tests
    assert network.channels == [64, 128, 256, 512, 512]
    assert network.strides == [1, 2, 4, 8, 16]


def test_least_squares() -> None:
    real, fake = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0])
    assert least_squares_generator(fake).item() == pytest.approx(((1 - 0) ** 2 + (1 - 2) ** 2) / 2)
    assert least_squares_discriminator(real, fake).item() == pytest.approx(0.125 + 2.0)
    perfect = least_squares_discriminator(torch.ones(3), torch.zeros(3))
    assert perfect == 0


def test_total_variation_counts_steps_between_neighbours() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert total_variation(ramp) == 1
    assert total_variation(torch.ones(1, 2, 8, 8)) == 0
