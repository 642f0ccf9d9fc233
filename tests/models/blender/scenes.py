"""Drawn heads whose every label is known, as the Blender takes them."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.blender.batch import BlenderBatch, join
from models.blender.network import BlenderConfig
from models.blender.pairs import Frame, PairConfig, draw, make_pair
from models.frozen.parsing import ParsingLabel

SIZE = 32
TINY = BlenderConfig(size=SIZE, trunk="small", feature_stride=2, feature_width=8, unet_base=4)


def drawn(seed: int, *, dx: int = 0, without: tuple[ParsingLabel, ...] = ()) -> Frame:
    """A head of five labels before noise; every label has its own colour, the same in all frames of one seed."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    radius = (x - 16 - dx) ** 2 + (y - 15) ** 2
    labels = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    labels[y > 26] = ParsingLabel.CLOTH
    labels[radius < 130] = ParsingLabel.HAIR
    labels[(x - 16 - dx) ** 2 + (y - 17) ** 2 < 80] = ParsingLabel.SKIN
    labels[(y > 12) & (y < 15) & ((x - 16 - dx).abs() > 2) & ((x - 16 - dx).abs() < 6)] = (
        ParsingLabel.L_EYE
    )
    labels[(x - 16 - dx).abs() + (y - 18).abs() < 3] = ParsingLabel.NOSE
    for label in without:
        labels[labels == label] = ParsingLabel.SKIN
    generator = torch.Generator().manual_seed(seed)
    palette = torch.rand(19, 3, generator=generator) * 1.6 - 0.8
    image = palette[labels.long()].permute(2, 0, 1) + 0.1 * torch.randn(3, SIZE, SIZE, generator=generator)  # fmt: skip
    return Frame(image.clamp(-1, 1), labels[None], torch.ones(1, SIZE, SIZE))


def paired(
    key: str, frames: tuple[Frame, Frame, Frame], seed: int, config: PairConfig
) -> BlenderBatch:
    """One sample: frame, another one of the clip, a stranger."""
    generator = torch.Generator().manual_seed(seed)
    chances = draw(generator, config)
    return make_pair(key, *frames, chances, generator)


def drawn_batch(count: int = 2, config: PairConfig | None = None) -> BlenderBatch:
    """A training batch of drawn heads."""
    return join(
        [
            paired(f"head-{i}", (drawn(i), drawn(i, dx=2), drawn(i + 50, dx=-2)), i, config or PairConfig())
            for i in range(count)
        ]
    )  # fmt: skip


def doubled(batch: BlenderBatch) -> BlenderBatch:
    """The same batch in float64, label maps as they are."""
    wide = {name: x.double() for name, x in batch.tensors().items() if x.is_floating_point()}
    return replace(batch, **wide)
