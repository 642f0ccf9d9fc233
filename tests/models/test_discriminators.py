"""Shapes and counts of the discriminators (spec-head-swap §9.1), and that scores are sums of what the stages see."""

import pytest
import torch

from models.discriminators import ResidualDiscriminator


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


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="48"):
        ResidualDiscriminator(3, 48)
