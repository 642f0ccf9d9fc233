"""Scores of generated pictures: pure functions, one number per picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

OUTER_EYE_CORNERS = (36, 45)
"""Of the 68 iBUG landmarks: the unit in which landmark distances are told."""


def csim(generated: Tensor, sources: Tensor) -> Tensor:
    """Cosine of identity vectors: 1 is the same person (protocol of latent pose reenactment).

    Args:
        generated: (b, d) vectors of generated pictures.
        sources: (b, d), or (b, k, d) of K pictures of each person, which are averaged.

    Returns:
        (b,) in [-1, 1].
    """
    if sources.dim() == 3:
        sources = sources.mean(dim=1)
    return F.cosine_similarity(generated, sources, dim=1)


def landmark_distance(generated: Tensor, real: Tensor, *, fitted: bool = False) -> Tensor:
    """Mean distance of 68 landmarks in distances of the real outer eye corners (protocol of latent pose reenactment).

    Args:
        generated: (b, 68, 2), any unit.
        real: (b, 68, 2), the same unit.
        fitted: after the scale and shift of ``generated`` that fit best by least squares: pose and expression without
            where the head is and how large.

    Returns:
        (b,), from 0.

    Raises:
        ValueError: shapes that are not 68 points, or eye corners that coincide.
    """
    if generated.shape != real.shape or real.shape[1:] != (68, 2):
        raise ValueError(
            f"need (b, 68, 2) twice, got {tuple(generated.shape)}, {tuple(real.shape)}"
        )
    left, right = OUTER_EYE_CORNERS
    unit = (real[:, left] - real[:, right]).norm(dim=1)  # (b,)
    if (unit <= 0).any():
        raise ValueError("outer eye corners coincide")
    if fitted:
        generated = fit_scale_and_shift(generated, real)
    return (generated - real).norm(dim=2).mean(dim=1) / unit


def fit_scale_and_shift(points: Tensor, targets: Tensor) -> Tensor:
    """Points (b, n, 2) scaled and shifted, each set by itself, to lie as near to ``targets`` as possible (least squares)."""
    centre, goal = points.mean(dim=1, keepdim=True), targets.mean(dim=1, keepdim=True)
    p, q = points - centre, targets - goal
    spread = p.square().sum(dim=(1, 2), keepdim=True)
    tiny = torch.finfo(points.dtype).tiny
    return p * ((p * q).sum(dim=(1, 2), keepdim=True) / spread.clamp(min=tiny)) + goal
