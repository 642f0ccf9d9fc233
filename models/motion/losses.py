"""Losses of the motion model that the other models do not use: pyramids and least squares (first order model).

Pure functions to one scalar, unweighted, in float32. Pictures are RGB in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.frozen.vgg import Vgg19Features
from models.losses import exact, feature_matching, l1

SCALES = (1.0, 0.5, 0.25, 0.125)
"""Of the pyramid (first order model)."""


def pyramid(images: Tensor, scales: Sequence[float] = SCALES) -> list[Tensor]:
    """Pictures (b, c, h, w) at several scales, each blurred against aliasing and then subsampled.

    The blur is a Gaussian of sigma (1 / scale - 1) / 2 in a kernel of 2 round(4 sigma) + 1, with zeros outside.
    """
    levels = []
    for scale in scales:
        stride = round(1 / scale)
        if stride == 1:
            levels.append(images)
            continue
        sigma = (stride - 1) / 2
        radius = round(4 * sigma)
        line = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
        weights = torch.exp(-(line**2) / (2 * sigma**2))
        weights = weights / weights.sum()
        channels = images.shape[1]
        across = weights.expand(channels, 1, 1, -1)
        blurred = F.conv2d(images, across, padding=(0, radius), groups=channels)
        blurred = F.conv2d(blurred, across.mT, padding=(radius, 0), groups=channels)
        levels.append(blurred[..., ::stride, ::stride])
    return levels


def pyramid_l1(generated: Tensor, real: Tensor) -> Tensor:
    """Sum over the scales of the mean absolute difference of pictures (b, 3, h, w)."""
    ones = [1.0] * len(SCALES)
    return feature_matching(pyramid(exact(generated)), pyramid(exact(real)), ones)


def perceptual(generated: Tensor, real: Tensor, network: Vgg19Features) -> Tensor:
    """Sum over scales and layers of the mean absolute difference of a network's features, pictures (b, 3, h, w)."""
    terms = []
    for ours, theirs in zip(pyramid(exact(generated)), pyramid(exact(real)), strict=True):
        with torch.no_grad():
            wanted = network(theirs)
        terms += [l1(found, target) for found, target in zip(network(ours), wanted, strict=True)]
    return torch.stack(terms).sum()


def least_squares_generator(fake_scores: Tensor) -> Tensor:
    """Mean of (1 - score)^2 of what was generated (Mao et al. 2017)."""
    return (1 - exact(fake_scores)).square().mean()


def least_squares_discriminator(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Mean of (1 - score)^2 of what is real plus mean of score^2 of what was generated (Mao et al. 2017)."""
    return (1 - exact(real_scores)).square().mean() + exact(fake_scores).square().mean()


def total_variation(field: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in a field (b, c, h, w), across plus down."""
    across = (field[..., :, 1:] - field[..., :, :-1]).abs().mean()
    return across + (field[..., 1:, :] - field[..., :-1, :]).abs().mean()
