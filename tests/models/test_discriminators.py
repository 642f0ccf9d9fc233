"""Shapes and counts of the discriminators (spec-head-swap §9.1), and that scores are sums of what the stages see."""

import pytest
import torch

from models.discriminators import PatchDiscriminator, ResidualDiscriminator


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("channels", "size", "parameters"),
    [(3, 512, 19_805_889), (3, 256, 19_543_233), (5, 512, 19_807_169)],
)
def test_parameters_and_features_of_the_residual_discriminator(channels, size, parameters):
    with torch.device("meta"):
        network = ResidualDiscriminator(channels, size)
        scores, features = network(torch.zeros(2, channels, size, size))
    assert count(network) == parameters
    assert scores.shape == (2,)
    widths = [64, 128, 256, 512, 512, 512, 512]
    sides = [size >> i for i in range(1, 8)] if size == 512 else [128, 64, 32, 16, 8, 4, 4]
    expected = [(2, width, side, side) for width, side in zip(widths, sides, strict=True)]
    assert [tuple(feature.shape) for feature in features] == expected


def test_a_tiny_one_runs_and_scores_pictures_one_by_one():
    torch.manual_seed(0)
    network = ResidualDiscriminator(3, 32, base=4, limit=8).eval()
    images = torch.randn(3, 3, 32, 32)
    scores, features = network(images)
    assert [feature.shape[-1] for feature in features] == [16, 8, 4, 4, 4, 4, 4]
    alone = torch.cat([network(image[None])[0] for image in images])
    torch.testing.assert_close(scores, alone)


def test_features_are_taken_before_the_next_relu():
    torch.manual_seed(0)
    _, features = ResidualDiscriminator(3, 16, base=8, limit=8, stages=3)(torch.randn(2, 3, 16, 16))
    assert all(feature.min() < 0 for feature in features)


def test_scores_and_features_are_those_of_the_specification():
    """Spec-head-swap §2.6 written out for 16 pixels: a first stage, a halving one, and two flat ones."""
    torch.manual_seed(0)
    network = ResidualDiscriminator(3, 16, base=4, limit=8, stages=4).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def conv(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        matrix = layer.parametrizations.weight.original.flatten(1)
        power = layer.parametrizations.weight[0]
        weight = (matrix / (power._u @ matrix @ power._v)).view_as(layer.weight)
        return torch.nn.functional.conv2d(x, weight, layer.bias, padding=weight.shape[-1] // 2)

    def halved(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))

    first, second, *flat = network.stages
    x = halved(conv(first.second, conv(first.first, images).relu()) + conv(first.skip, images))
    expected = [x]
    x = halved(conv(second.second, conv(second.first, x.relu()).relu()) + conv(second.skip, x))
    expected.append(x)
    for stage in flat:
        x = conv(stage.second, conv(stage.first, x.relu()).relu()) + x
        expected.append(x)
    scores, features = network(images)
    for found, feature in zip(features, expected, strict=True):
        torch.testing.assert_close(found, feature)
    direction = network.score.parametrizations.weight.original[0]  # one row: its norm is its length
    total = x.relu().sum(dim=(2, 3)) @ direction / direction.norm() + network.score.bias
    torch.testing.assert_close(scores, total)


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="48"):
        ResidualDiscriminator(3, 48)


def test_the_patch_discriminator_is_the_supplements() -> None:
    with torch.device("meta"):
        scores, features = PatchDiscriminator()(torch.empty(1, 3, 256, 256))
        padded = PatchDiscriminator(padding=1)
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 11_022_977
    assert sum(p.numel() for p in padded.parameters()) == 11_022_977
    assert scores.shape == (1, 1, 13, 13)
    assert [tuple(f.shape[1:]) for f in features] == [
        (128, 126, 126),
        (256, 61, 61),
        (512, 29, 29),
        (1024, 13, 13),
    ]


def test_a_patch_score_sees_61_pixels_and_the_next_lies_16_further() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(widths=(4, 4, 4, 4)).double().eval()
    pictures = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    scores = network(pictures)[0]
    for x in (1, 2):
        (gradient,) = torch.autograd.grad(scores[0, 0, 1, x], pictures, retain_graph=True)
        columns = gradient.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
        assert columns.min() == 16 * x
        assert columns.max() == 16 * x + 60


def test_the_patch_discriminator_of_first_order_model() -> None:
    network = PatchDiscriminator(4, (4, 6, 8, 8), norm="instance", activation="leaky_relu")
    kinds = [[type(layer).__name__ for layer in block] for block in network.blocks]
    assert kinds[0] == ["Conv2d", "LeakyReLU", "AvgPool2d"]
    assert kinds[1:] == [["Conv2d", "InstanceNorm2d", "LeakyReLU", "AvgPool2d"]] * 3
    assert network(torch.randn(2, 4, 128, 128))[0].shape == (2, 1, 5, 5)
