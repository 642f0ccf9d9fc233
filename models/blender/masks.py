"""From label maps to what the Blender works on: head and ring masks, groups of labels, and both on the grid of the features.

HeSer §2 names the masks (M_A^H, M_A^I of equations 10 and 11); union first, dilation second is GHOST 2.0's description of the
same module (§3.2.1). Figure 5 of the supplement shows separate maps for skin, nose, each eye, brow, lip and hair: ``fine``.

========  ==========================================================================
ours      paper
========  ==========================================================================
head_a    M_A^H, the head of the animated portrait A
ring_a    M_A^I, everything else that is to be painted
painted   M̂_A = M_A^H + M_A^I
head_t    M_T^H, the head of the target T
ring_t    M_T^I, the ring around it: where the colours to fill in are taken from
========  ==========================================================================
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.frozen.parsing import ParsingLabel

LabelSet = Literal["fine", "merged8"]
PAINT_RADIUS = 8.0
"""How far the painted region reaches beyond the two heads, pixels of a 512 px window (HeSer.Pytorch: kernel 17)."""
NO_GROUP = -1
"""Group of a pixel that is neither head nor ring."""

_L = ParsingLabel
HEAD_LABELS = (*range(_L.SKIN, _L.LOWER_LIP + 1), _L.HAIR, _L.HAT)
"""Neck, necklace and cloth are not head: the Blender paints the neck again, to fit the new head."""


class LabelGroup(NamedTuple):
    """Labels that exchange colours with each other and no others."""

    name: str
    labels: tuple[ParsingLabel, ...]
    fallback: tuple[str, ...]
    """Groups whose colours serve when T lacks this one, in order; after the last, the colour of A itself."""


# fmt: off
GROUPS: dict[LabelSet, tuple[LabelGroup, ...]] = {
    "fine": (
        LabelGroup("skin", (_L.SKIN,), ("nose",)),
        LabelGroup("l_brow", (_L.L_BROW,), ("hair", "skin")),
        LabelGroup("r_brow", (_L.R_BROW,), ("hair", "skin")),
        LabelGroup("l_eye", (_L.L_EYE,), ()),
        LabelGroup("r_eye", (_L.R_EYE,), ()),
        LabelGroup("glasses", (_L.GLASSES,), ()),
        LabelGroup("ears", (_L.L_EAR, _L.R_EAR), ("skin",)),
        LabelGroup("earring", (_L.EARRING,), ()),
        LabelGroup("nose", (_L.NOSE,), ("skin",)),
        LabelGroup("mouth", (_L.MOUTH,), ()),
        LabelGroup("upper_lip", (_L.UPPER_LIP,), ("lower_lip", "skin")),
        LabelGroup("lower_lip", (_L.LOWER_LIP,), ("upper_lip", "skin")),
        LabelGroup("hair", (_L.HAIR,), ("l_brow", "r_brow")),
        LabelGroup("hat", (_L.HAT,), ()),
    ),
    "merged8": (
        LabelGroup("skin", (_L.SKIN,), ("nose",)),
        LabelGroup("hair", (_L.HAIR, _L.HAT), ("brows",)),
        LabelGroup("eyes", (_L.L_EYE, _L.R_EYE, _L.GLASSES), ()),
        LabelGroup("brows", (_L.L_BROW, _L.R_BROW), ("hair", "skin")),
        LabelGroup("ears", (_L.L_EAR, _L.R_EAR, _L.EARRING), ("skin",)),
        LabelGroup("nose", (_L.NOSE,), ("skin",)),
        LabelGroup("lips", (_L.UPPER_LIP, _L.LOWER_LIP), ("skin",)),
        LabelGroup("mouth", (_L.MOUTH,), ()),
    ),
}
# fmt: on
"""Brow, ear, nose, lip, eye, mouth, glasses, hat, earring after GHOST 2.0's fallbacks; skin and hair, which it lets be
absent, borrow from what is most alike. The ring is one more group, numbered after the last of these."""


def check_labels(labels: Tensor, size: int) -> None:
    """Refuse what is not a batch of label maps: (b, 1, size, size) uint8, values 0..18.

    Raises:
        ValueError: with the shape, type or value that is wrong.
    """
    if labels.dtype != torch.uint8:
        raise ValueError(f"label maps are uint8 with values 0..18, got {labels.dtype}")
    if labels.ndim == 4 and labels.shape[1] == 3:
        raise ValueError(
            f"label maps have one channel, got {tuple(labels.shape)}: is this a coloured picture of labels? "
            "Single-channel PNGs whose values are the labels 0..18 are needed"
        )
    if labels.ndim != 4 or labels.shape[1:] != (1, size, size):
        raise ValueError(f"label maps must be (b, 1, {size}, {size}), got {tuple(labels.shape)}")
    most = int(labels.max()) if labels.numel() else 0
    if most > max(ParsingLabel):
        raise ValueError(f"label maps have values 0..{int(max(ParsingLabel))}, found {most}")


def dilate(mask: Tensor, radius: int) -> Tensor:
    """(b, 1, h, w) grown by a square of ``radius`` pixels to each side."""
    return functional.max_pool2d(mask, 2 * radius + 1, stride=1, padding=radius)


class Masks(NamedTuple):
    """(b, 1, S, S) float, 0 or 1; see the module for the paper's names."""

    head_a: Tensor
    ring_a: Tensor
    painted: Tensor
    head_t: Tensor
    ring_t: Tensor


def head_mask(labels: Tensor) -> Tensor:
    """Label maps to 1.0 on the head."""
    table = torch.zeros(256, device=labels.device)
    table[list(HEAD_LABELS)] = 1
    return table[labels.long()]


def make_masks(
    labels_a: Tensor,
    labels_t: Tensor,
    radius: int,
    *,
    noise: Tensor | None = None,
    valid_t: Tensor | None = None,
) -> Masks:
    """Heads, rings and the painted region.

    Args:
        labels_a: (b, 1, S, S) label maps of A.
        labels_t: (b, 1, S, S) of T.
        radius: of the dilation, pixels.
        noise: (b, 1, S, S) 1 where training pretends that there was more head (:func:`draw_noise`).
        valid_t: (b, 1, S, S) 0 in the black border of T, from which no colour may be taken.
    """
    head_a, head_t = head_mask(labels_a), head_mask(labels_t)
    either = torch.maximum(head_a, head_t)
    if noise is not None:
        either = torch.maximum(either, noise)
    painted = dilate(either, radius)
    ring_t = dilate(head_t, radius) - head_t
    return Masks(
        head_a=head_a,
        ring_a=painted - head_a,
        painted=painted,
        head_t=head_t,
        ring_t=ring_t if valid_t is None else ring_t * valid_t,
    )


def group_map(labels: Tensor, ring: Tensor, label_set: LabelSet) -> Tensor:
    """Label maps and ring masks (b, 1, S, S) to the group of each pixel (b, S, S), int64.

    Numbers are places in ``GROUPS[label_set]``; the ring comes after the last; :data:`NO_GROUP` elsewhere.
    """
    groups = GROUPS[label_set]
    table = torch.full((256,), NO_GROUP, device=labels.device)
    for number, group in enumerate(groups):
        table[list(group.labels)] = number
    return torch.where(ring[:, 0] > 0, len(groups), table[labels[:, 0].long()])


def to_cells(groups: Tensor, num_groups: int, stride: int) -> Tensor:
    """Groups of pixels (b, S, S) to groups of cells (b, S / stride, S / stride).

    A cell gets the group that covers most of it once each group is weighted by 1 / sqrt(its area in the picture), so
    that eyes, brows and lips survive. A group that no pixel of the cell has is never chosen.
    """
    if stride == 1:
        return groups
    shares = functional.one_hot(groups + 1, num_groups + 1).movedim(-1, 1).float()
    shares = functional.avg_pool2d(shares, stride)
    weights = shares.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6).rsqrt()
    return (shares * weights).argmax(dim=1) - 1


def cell_colours(images: Tensor, groups: Tensor, cells: Tensor, stride: int) -> Tensor:
    """Mean colour of each cell over those of its pixels that have the cell's own group.

    A plain area average would mix the colours of two labels wherever they meet.

    Args:
        images: (b, 3, S, S).
        groups: (b, S, S) of the pixels.
        cells: (b, h, w) of the cells, as :func:`to_cells` made them.
        stride: pixels a cell.

    Returns:
        (b, 3, h, w).
    """
    if stride == 1:
        return images
    wide = cells.repeat_interleave(stride, dim=1).repeat_interleave(stride, dim=2)
    own = (wide == groups)[:, None].to(images.dtype)
    return functional.avg_pool2d(images * own, stride) / functional.avg_pool2d(own, stride)


def draw_noise(head: Tensor, generator: torch.Generator) -> Tensor:
    """Random discs, squares and strokes that touch the outline of a head (GHOST 2.0's augmentation of the masks).

    Args:
        head: (1, S, S) 0 or 1.
        generator: all draws come from it, always the same number of them.

    Returns:
        (1, S, S) 0 or 1; all 0 where there is no outline.
    """
    size = head.shape[-1]
    outline = (dilate(head[None], 1)[0] - head)[0].nonzero()  # (k, 2) y, x
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    noise = torch.zeros_like(head)
    for _ in range(4):
        place, kind, use, extent, thickness, angle = torch.rand(6, generator=generator).tolist()
        if not len(outline) or use > 0.6:
            continue
        row, column = outline[int(place * len(outline))].tolist()
        dx, dy = x - column - 0.5, y - row - 0.5
        radius = size * (0.02 + 0.08 * extent)
        if kind < 1 / 3:
            shape = dx**2 + dy**2 < radius**2
        elif kind < 2 / 3:
            shape = torch.maximum(dx.abs(), dy.abs()) < radius
        else:
            ux, uy = math.cos(2 * math.pi * angle), math.sin(2 * math.pi * angle)
            along = (dx * ux + dy * uy).clamp(0, 3 * radius)
            width = size * (0.01 + 0.03 * thickness)
            shape = (dx - along * ux) ** 2 + (dy - along * uy) ** 2 < width**2
        noise = torch.maximum(noise, shape[None].to(noise.dtype))
    return noise
