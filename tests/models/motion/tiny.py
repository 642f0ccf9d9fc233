"""The motion model in a size that runs in milliseconds, and faces to give it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.motion.layout import with_pupils
from models.motion.network import Motion, MotionConfig
from tests.faces import FACE_68

TINY = MotionConfig(
    size=32,
    global_encoder=(4, 6, 8, 8),
    global_decoder=(8, 8, 6, 4),
    global_adaptive=2,
    local_encoder=(4, 6),
    local_decoder=(6, 4),
    local_adaptive=1,
    patch=8,
    adain_hidden=8,
    generator_base=4,
    generator_residuals=2,
)


def tiny(seed: int = 0, **changes: Any) -> Motion:
    """A tiny model with the weights of a seed."""
    torch.manual_seed(seed)
    return Motion(replace(TINY, **changes))


def awake(model: Motion, seed: int = 1) -> Motion:
    """Gives weights to all that starts at zero and statistics to every norm, so that every path changes the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        points = model.config.num_landmarks
        model(pictures(8), landmarks(8, points=points), landmarks(8, points=points, seed=9))
        for norm in norms:
            norm.momentum = 0.1
    return model


def landmarks(count: int = 1, *, points: int = 70, seed: int = 0) -> Tensor:
    """(count, points, 2) in [-1, 1]: one face in many poses."""
    generator = torch.Generator().manual_seed(seed)
    face = torch.tensor(with_pupils(FACE_68)[:points], dtype=torch.float32)
    shift = torch.rand(count, 1, 2, generator=generator) * 0.4 - 0.2
    return face * 0.8 + shift + torch.randn(count, points, 2, generator=generator) * 0.02


def pictures(count: int = 1, size: int = 32, seed: int = 0) -> Tensor:
    """(count, 3, size, size) smooth noise in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
