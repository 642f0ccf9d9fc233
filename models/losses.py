"""Losses: pure functions from tensors to one scalar, unweighted, computed in float32 or better.

Numbers of equations are those of HeSer's supplement (Shu et al. 2022): (1) to (5) the Aligner, (6) to (11) the Blender.
References (``real``) are never differentiated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def exact(x: Tensor) -> Tensor:
    """At least float32: what autocast made bf16 is compared in full precision."""
    return x if x.dtype == torch.float64 else x.float()


def l1(generated: Tensor, real: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute difference of pictures (b, c, h, w), equations (1) and (7).

    Args:
        generated: what is trained.
        real: the reference.
        mask: (b, 1, h, w) in [0, 1]; pixels where it is 0 do not count. The mean is taken picture by picture, so that
            micro-batches add up to the batch; a picture whose mask is 0 everywhere counts as 0.
    """
    difference = (exact(generated) - exact(real).detach()).abs()
    if mask is None:
        return difference.mean()
    weight = exact(mask).expand_as(difference).flatten(1)
    return ((difference.flatten(1) * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()


def feature_matching(
    generated_features: Sequence[Tensor], real_features: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Weighted sum over layers of mean absolute differences, equations (2) and (6) for one network.

    Args:
        generated_features: one tensor per layer.
        real_features: the same layers of the reference.
        weights: λ_l, one per layer.
    """
    lengths = len(generated_features), len(real_features), len(weights)
    if len(set(lengths)) != 1:
        raise ValueError("feature matching of {} and {} layers with {} weights".format(*lengths))
    terms = [
        weight * l1(generated, real)
        for generated, real, weight in zip(generated_features, real_features, weights, strict=True)
    ]
    return torch.stack(terms).sum()


def calibrated_weights(
    batches: Iterable[Sequence[Tensor]], total: float = 1.0
) -> tuple[float, ...]:
    """λ_l of :func:`feature_matching` for which every layer of a network counts the same: ``total`` / L / mean|φ_l|.

    Two unlike pictures then differ by about ``total``, whatever the network and its layers' scales.

    Args:
        batches: the features of real pictures, one list of layers (b, ...) per batch; 256 pictures are plenty.
        total: the sum over the layers of weight times mean magnitude.
    """
    sums: list[float] = []
    pictures = 0
    for features in batches:
        sums = sums or [0.0] * len(features)
        for layer, feature in enumerate(features):
            sums[layer] += float(exact(feature.detach()).abs().mean()) * len(feature)
        pictures += len(features[0])
    if not pictures or min(sums) <= 0:
        raise ValueError(f"cannot calibrate on {pictures} pictures with magnitudes {sums}")
    return tuple(total / len(sums) * pictures / value for value in sums)


def identity(generated_embedding: Tensor, real_embedding: Tensor) -> Tensor:
    """1 - cosine of identity vectors (b, d), mean over the batch, equation (3)."""
    real = exact(real_embedding).detach()
    return (1 - F.cosine_similarity(exact(generated_embedding), real, dim=1)).mean()


def hinge_discriminator(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Mean of relu(1 - real) plus mean of relu(1 + fake), scores of any shape, equations (4) and (10)."""
    return F.relu(1 - exact(real_scores)).mean() + F.relu(1 + exact(fake_scores)).mean()


def hinge_generator(fake_scores: Tensor) -> Tensor:
    """Minus the mean score of what was generated, equations (5) and (11)."""
    return -exact(fake_scores).mean()


def dice(predicted: Tensor, real: Tensor) -> Tensor:
    """-log of the soft Dice coefficient of masks (b, 1, h, w) in [0, 1], mean over the batch (latent pose reenactment)."""
    m, reference = exact(predicted).flatten(1), exact(real).detach().flatten(1)
    overlap = 2 * (m * reference).sum(1)
    return -torch.log(
        (overlap + 1e-6) / (m.square().sum(1) + reference.square().sum(1) + 1e-6)
    ).mean()
