"""Grids, warps, patches: the one convention for coordinates of the motion model.

Everything is ``align_corners=False``: on an axis of N pixels the centre of pixel i lies at x = (2i + 1) / N - 1, so -1 and 1
are the picture's edges, and landmarks in pixels (centres at integer + 0.5) become 2 p / N - 1. First order model builds its
grids for the other convention and samples in this one, which makes its identity warp blur (mean error 0.13 on noise).

A *deformation* (b, h, w, 2) holds for every place of the driving frame the place of the source, (x, y), that is shown there
(backward flow); a *displacement* is the deformation less the identity. All of it is cast to float32 at least and stays so under autocast, which lowers convolutions and
matrix products only: half a bfloat16 step is 1/256 of a coordinate, half a pixel of 256.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses import exact

Padding = Literal["border", "zeros"]
TAPER_START = 0.75
"""Of a patch's half side: inside, a local network counts fully; from here it fades to nothing at the patch's edge."""


def identity_grid(size: int, device: torch.device | None = None) -> Tensor:
    """(size, size, 2) coordinates (x, y) of the pixel centres."""
    axis = (torch.arange(size, device=device, dtype=torch.float32) * 2 + 1) / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1)


def normalise(points_px: Tensor, size: int) -> Tensor:
    """Pixels of a picture of ``size`` x ``size``, centres at integer + 0.5, to [-1, 1]. Points outside stay outside."""
    return points_px * (2 / size) - 1


def warp(image: Tensor, deformation: Tensor, padding: Padding = "border") -> Tensor:
    """Show at every place what the deformation says: (b, c, h, w) and (b, h', w', 2) to (b, c, h', w'), bilinear."""
    image = exact(image)
    return F.grid_sample(
        image,
        deformation.to(image.dtype),
        mode="bilinear",
        padding_mode=padding,
        align_corners=False,
    )


def shrink(field: Tensor, factor: int) -> Tensor:
    """Mean over blocks of ``factor`` pixels, (b, c, h, w): of the identity grid it gives the smaller identity grid."""
    return F.avg_pool2d(exact(field), factor)


def cut_patches(image: Tensor, centres: Tensor, half: float, side: int) -> Tensor:
    """Square patches by sampling, not slicing: a centre that moves by part of a pixel moves the patch by as much.

    Args:
        image: (b, c, h, w).
        centres: (b, 2) in [-1, 1].
        half: half the patch's side in the units of ``centres``.
        side: of the patch in pixels.

    Returns:
        (b, c, side, side); what lies outside the image repeats its border.
    """
    grid = identity_grid(side, image.device)
    return warp(image, exact(centres)[:, None, None] + half * grid)


def taper(coordinates: Tensor) -> Tensor:
    """Weight of a patch at places (..., 2) in its own coordinates: 1 inside, 0 from its edge on, cosine between."""
    beyond = ((coordinates.abs() - TAPER_START) / (1 - TAPER_START)).clamp(0, 1)
    return (0.5 * (1 + torch.cos(math.pi * beyond))).prod(dim=-1)


def paste_patches(
    patches: Tensor, centres: Tensor, half: float, size: int
) -> tuple[Tensor, Tensor]:
    """Patches back in their places, and how much each place is theirs.

    Args:
        patches: (b, c, p, p).
        centres: (b, 2) in [-1, 1].
        half: half the patch's side in the units of ``centres``.
        size: side of the result in pixels.

    Returns:
        (b, c, size, size), zero outside the patch, not yet weighted; (b, 1, size, size) :func:`taper`, in [0, 1].
    """
    grid = identity_grid(size, patches.device)
    inside = (grid - exact(centres)[:, None, None]) / half  # (b, size, size, 2)
    return warp(patches, inside, "zeros"), taper(inside)[:, None]
