"""Where the attention of a label goes when nothing keeps it inside the label (HeSer's supplement, §5 and Figure 5).

The paper's argument for the per-label blocks: in a softmax over *all* pixels of T, those of another label get next to nothing.
Both measures come from ``warp`` itself with one label for everything, so they need no more memory than a training step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.blender.exemplars import View
from models.blender.warp import WarpConfig, warp


class Attention(NamedTuple):
    """Of one or more pairs of pictures, G groups of labels."""

    heat: Tensor
    """(b, G, h, w) for each group of A the attention that each cell of T receives from it; sums to the group's cells."""
    mass: Tensor
    """(b, G, G + 1) the share of a group's attention that falls on each group of T, the last column for no group;
    NaN in the rows of groups that A does not have."""


def attention(a: View, t: View, num_groups: int, config: WarpConfig) -> Attention:
    """Distribution of an unrestricted softmax over all cells of T, per group of A.

    Args:
        a: the picture whose cells ask.
        t: the picture whose cells answer.
        num_groups: groups of ``a.groups`` and ``t.groups``, the ring among them.
        config: temperature, and how it is computed.
    """
    kinds_a, kinds_t = (
        functional.one_hot(view.groups.flatten(1) + 1, num_groups + 1).roll(-1, dims=-1).float()
        for view in (a, t)
    )  # (b, n, G + 1), the last for no group
    all_a, all_t = (torch.zeros_like(view.groups.flatten(1)) for view in (a, t))
    with torch.enable_grad():
        answers = kinds_t.transpose(1, 2).requires_grad_()
        of_a, of_t = a.features.detach().flatten(2), t.features.detach().flatten(2)
        received, _ = warp(of_a, of_t, answers, all_a, all_t, config)
        # what T's cells receive is the transposed product, which is the gradient with respect to the answers
        asked = kinds_a.transpose(1, 2)
        (heat,) = torch.autograd.grad(received, answers, asked)
    per_cell = received.detach() @ kinds_a  # (b, groups of T, groups of A)
    cells = kinds_a.sum(dim=1)[:, :, None]
    mass = per_cell.transpose(1, 2) / cells
    return Attention(heat[:, :num_groups].unflatten(2, t.groups.shape[1:]), mass[:, :num_groups])


def own_share(found: Attention) -> Tensor:
    """(b, G) the share of each group's attention that stays inside the group; NaN where A has none of it."""
    return found.mass.diagonal(dim1=1, dim2=2)
