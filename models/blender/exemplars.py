"""Colour and inpainting exemplars, forth and back: what the warp is asked for and what becomes of its answer.

HeSer §2 and §5. One warp gives both exemplars: the ring is one more group of pixels beside the head's labels, and a pixel is in
head or ring, never in both. Cells are the grid of the features, ``stride`` pixels a side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.blender.masks import GROUPS, NO_GROUP, LabelSet, Masks, cell_colours
from models.blender.warp import WarpConfig, warp


class View(NamedTuple):
    """One picture as the correspondence sees it; h = S / stride."""

    features: Tensor
    """(b, c, h, h) of any length."""
    groups: Tensor
    """(b, h, h) group of each cell, the ring last, -1 for none."""
    colours: Tensor
    """(b, 3, h, h) mean colour of each cell's own group, in [-1, 1]."""


class Exemplar(NamedTuple):
    """T's colours in the layout of A."""

    colours: Tensor
    """(b, 3, h, h), 0 where A has no group."""
    matched: Tensor
    """(b, h, h) group whose colours each cell of A got, after fallbacks; -1 where it kept its own or has none."""


def make_view(features: Tensor, image: Tensor, groups: Tensor, cells: Tensor) -> View:
    """Bundle what belongs to one picture; the stride follows from the shapes.

    Args:
        features: (b, c, h, h).
        image: (b, 3, S, S).
        groups: (b, S, S) group of each pixel.
        cells: (b, h, h) group of each cell.
    """
    stride = image.shape[-1] // features.shape[-1]
    return View(features, cells, cell_colours(image, groups, cells, stride))


def fallback_table(label_set: LabelSet) -> Tensor:
    """(groups + 1, depth) for each group itself and the groups that serve in its place, in order; -1 fills up.

    The last row is the ring's, for which nothing else serves.
    """
    groups = GROUPS[label_set]
    number = {group.name: place for place, group in enumerate(groups)}
    chains = [[place, *(number[name] for name in g.fallback)] for place, g in enumerate(groups)]
    chains.append([len(groups)])
    depth = max(map(len, chains))
    return torch.tensor([chain + [NO_GROUP] * (depth - len(chain)) for chain in chains])


def present_groups(cells: Tensor, num_groups: int, least: int) -> Tensor:
    """(b, h, w) to (b, num_groups): which groups have at least ``least`` cells."""
    counts = functional.one_hot(cells.flatten(1) + 1, num_groups + 1).sum(dim=1)
    return counts[:, 1:] >= least


def fall_back(cells_a: Tensor, cells_t: Tensor, table: Tensor, least: int) -> Tensor:
    """Groups of A's cells (b, h, w) with those that T lacks replaced by what serves in their place, or -1."""
    present = present_groups(cells_t, len(table), least)
    chosen = torch.full_like(present, NO_GROUP, dtype=torch.long)  # (b, groups)
    for candidates in table.to(cells_a.device).flip(1).T:
        usable = present[:, candidates.clamp(min=0)] & (candidates >= 0)
        chosen = torch.where(usable, candidates, chosen)
    flat = cells_a.flatten(1)
    replaced = torch.where(flat < 0, NO_GROUP, chosen.gather(1, flat.clamp(min=0)))
    return replaced.view_as(cells_a)


def transfer(
    a: View, t: View, table: Tensor, config: WarpConfig, *, least: int, still: Tensor
) -> Exemplar:
    """The exemplars I^H and I^I (one map: their cells do not overlap) of T for A.

    A group that T lacks gets the colours of its fallback; a head's cell without any keeps the colour of A, one of the ring
    that of T at the same place. Nothing is left 0: the UNet would leave it grey (GHOST 2.0).

    Args:
        a: the picture that gives the layout.
        t: the picture that gives the colours.
        table: :func:`fallback_table`.
        config: of the warp.
        least: cells below which a group counts as absent in T.
        still: (b, 3, h, h) T's mean colours where T lies, for a ring without counterpart.
    """
    matched = fall_back(a.groups, t.groups, table, least)
    warped, _ = warp(
        a.features.flatten(2),
        t.features.flatten(2),
        t.colours.flatten(2),
        matched.flatten(1),
        t.groups.flatten(1),
        config,
    )
    kept = torch.where((a.groups == len(table) - 1)[:, None], still, a.colours).to(warped.dtype)
    alone = ((a.groups >= 0) & (matched < 0))[:, None]
    return Exemplar(torch.where(alone, kept, warped.view_as(a.colours)), matched)


def transfer_back(
    a: View, t: View, exemplar: Exemplar, config: WarpConfig
) -> tuple[Tensor, Tensor]:
    """I_{T→A→T}: the exemplar warped into the layout of T by the same features, softmax over A.

    Returns:
        (b, 3, h, h) colours and (b, h, h) bool, where they exist: cells whose group both pictures have. Cells of A that
        live on a fallback take no part.
    """
    groups_a = torch.where(exemplar.matched == a.groups, a.groups, NO_GROUP)
    back, log_sum_exp = warp(
        t.features.flatten(2),
        a.features.flatten(2),
        exemplar.colours.flatten(2),
        t.groups.flatten(1),
        groups_a.flatten(1),
        config,
    )
    return back.view_as(t.colours), log_sum_exp.isfinite().view_as(t.groups)


def cycle_loss(a: View, t: View, exemplar: Exemplar, config: WarpConfig) -> Tensor:
    """Equations (8) and (9): mean absolute difference of I_{T→A→T} and I_T over the cells that exist in both, picture by picture.

    The supplement prints I_T in (9) where T' must be meant. 0 where the pictures share no label.
    """
    back, covered = transfer_back(a, t, exemplar, config)
    difference = (back - t.colours).abs().mean(dim=1) * covered  # (b, h, h)
    cells = covered.sum(dim=(1, 2)).clamp(min=1)
    return (difference.sum(dim=(1, 2)) / cells).mean()


def enlarge(colours: Tensor, cells: Tensor, mask: Tensor) -> Tensor:
    """An exemplar at full size, exactly 0 outside its mask.

    Bilinear with weights, so that neither the zeros beside it nor another exemplar bleed in. Pixels of the mask farther
    than a cell from any cell of the exemplar get the mean of the cells around, at last of all cells.

    Args:
        colours: (b, 3, h, h) of the exemplar.
        cells: (b, h, h) bool: the cells that belong to it.
        mask: (b, 1, S, S) 0 or 1: the pixels that belong to it.
    """
    weight = cells[:, None].to(colours.dtype)
    known = colours * weight
    mean = known.sum(dim=(2, 3), keepdim=True) / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    near = functional.avg_pool2d(weight, 5, stride=1, padding=2)
    around = functional.avg_pool2d(known, 5, stride=1, padding=2) / near.clamp(min=1e-6)
    filled = torch.where(weight > 0, colours, torch.where(near > 0.01, around, mean))
    size = mask.shape[-2:]
    large = functional.interpolate(known, size=size, mode="bilinear", align_corners=False)
    share = functional.interpolate(weight, size=size, mode="bilinear", align_corners=False)
    rest = functional.interpolate(filled, size=size, mode="nearest")
    return torch.where(share > 1e-3, large / share.clamp(min=1e-3), rest) * mask


def exemplar_pair(exemplar: Exemplar, a: View, masks: Masks, ring: int) -> tuple[Tensor, Tensor]:
    """I^H and I^I at full size (b, 3, S, S). ``ring`` is the ring's group number."""
    is_ring = a.groups == ring
    head = enlarge(exemplar.colours, (a.groups >= 0) & ~is_ring, masks.head_a)
    return head, enlarge(exemplar.colours, is_ring, masks.ring_a)
