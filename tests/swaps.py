"""Bundles small enough to swap with in a test, and networks that give the target back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import bundle
from models.aligner.network import Aligner, AlignerConfig, Portrait
from models.blender.masks import make_masks
from models.blender.network import Blender, BlenderConfig
from models.frozen.parsing import ParsingLabel

SIZE = 64
ALIGNER = AlignerConfig(
    size=SIZE,
    schedule="lpd",
    base=8,
    limit=32,
    portrait_dim=16,
    identity="dlib",
    pose_dim=8,
    expression_dim=8,
    hidden=32,
    encoder_size=SIZE,
    norm="group",
    portrait_blocks=(1, 1, 1, 1),
    portrait_groups=1,
    motion_width=0.1,
)
BLENDER = BlenderConfig(size=SIZE, trunk="small", feature_width=16, unet_base=8)


def toy_bundles(folder: Path, size: int = SIZE, blender_size: int = 0) -> tuple[str, str]:
    """Untrained bundles of an Aligner and a Blender; returns their folders."""
    torch.manual_seed(0)
    preview = np.zeros((4, 4, 3), np.uint8)
    card = {"dataset": {"version": 1}, "code": {"commit": "0000000"}}
    aligner = Aligner(replace(ALIGNER, size=size, encoder_size=min(size, SIZE)))
    blender = Blender(replace(BLENDER, size=blender_size or size))
    bundle.save(aligner.eval(), str(folder / "aligner"), card, preview)
    bundle.save(blender.eval(), str(folder / "blender"), card, preview)
    return str(folder / "aligner"), str(folder / "blender")


class OracleAligner:
    """Gives back the target's own crop: the encoders see whole windows, and their code is the window."""

    def __init__(self, size: int) -> None:
        self.config = SimpleNamespace(size=size, encoder_size=size)

    def encode_motion(self, driving: Tensor, _: Tensor) -> Tensor:
        return driving.flatten(1)

    def generate(self, _: Tensor, motion: Tensor) -> Portrait:
        return Portrait(motion.unflatten(1, (3, self.config.size, self.config.size)), None)


class OracleBlender:
    """Paints what it was given, where a Blender would paint."""

    def __init__(self, size: int) -> None:
        self.config = BlenderConfig(size=size, trunk="small")

    def repaint(
        self, animated: Tensor, labels_a: Tensor, _: Tensor, labels_t: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        masks = make_masks(labels_a, labels_t, self.config.paint_radius, valid_t=valid)
        return animated, masks.painted


class FlatParser:
    """Skin in the middle of every window: for tests of what becomes of labels."""

    def parse(
        self, crops: Sequence[Any], landmarks: Any, inside: Sequence[Any]
    ) -> list[NDArray[np.uint8]]:
        assert len(crops) == len(landmarks) == len(inside)
        labels = np.zeros(crops[0].shape[:2], np.uint8)
        quarter = len(labels) // 4
        labels[quarter:-quarter, quarter:-quarter] = ParsingLabel.SKIN
        return [labels * shown for shown in inside]
