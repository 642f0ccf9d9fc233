"""Batches for the motion model's learner, and the learner in a size that trains in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.motion.batch import MotionBatch
from models.motion.flow import warp
from models.motion.learner import MotionLearner, MotionLearnerConfig, Schedule
from tests.models.motion.tiny import TINY, landmarks, pictures

SIZE = 64
"""The least that four blocks of the patch discriminator can see is 61."""
CONFIG = MotionLearnerConfig(
    network=replace(TINY, size=SIZE, patch=16),
    schedule=Schedule(epoch_samples=10, epochs=4, drop_epochs=(1, 2)),
    stage=2,
    features="none",
    mask_prior=0.5,
    discriminator_widths=(4, 4, 4, 4),
)


def pairs(count: int = 4, seed: int = 0) -> MotionBatch:
    """``count`` pictures and the same moved by a tenth of their side at most, points and all."""
    source, face = pictures(count, SIZE, seed), landmarks(count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(count, 1, 2, generator=generator) * 0.4 - 0.2
    return MotionBatch(
        keys=[f"anna-v{seed}-000.{index}.{index + 1}" for index in range(count)],
        source=source,
        driving=moved(source, -shift),
        source_landmarks=face,
        driving_landmarks=face + shift,
    )


def moved(picture: Tensor, displacement: Tensor) -> Tensor:
    """Each picture shown through one displacement (b, 1, 2)."""
    axis = (torch.arange(SIZE) * 2 + 1) / SIZE - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    return warp(picture, grid + displacement[:, None])


def learner(seed: int = 0, **changes: Any) -> MotionLearner:
    """A learner on the CPU whose weights come from a seed."""
    torch.manual_seed(seed)
    return MotionLearner(replace(CONFIG, **changes), wrap=bare, device=torch.device("cpu"))


def doubled(batch: MotionBatch) -> MotionBatch:
    """In float64."""
    return replace(batch, **{name: t.double() for name, t in batch._tensors().items()})


class StillNorm(nn.BatchNorm2d):
    """Batch norm by its running statistics, also while the rest trains."""

    def train(self, mode: bool = True) -> StillNorm:  # noqa: ARG002
        super().train(False)
        return self


def still_motion(
    config: MotionLearnerConfig, *, wrap: Callable[[nn.Module], nn.Module], device: torch.device
) -> MotionLearner:
    """A learner in float64 whose result for one pair does not depend on the others of the batch."""

    def hold(network: nn.Module) -> nn.Module:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = StillNorm
                module.eval()
        return wrap(network.double())

    return MotionLearner(config, wrap=hold, device=device)


def double_pairs(
    batches: Callable[..., Iterable[MotionBatch]], **which: int
) -> Iterator[MotionBatch]:
    """A stream of batches in float64."""
    return (doubled(batch) for batch in batches(**which))


def bare(network: nn.Module) -> nn.Module:
    """Wraps nothing."""
    return network


def state(trained: MotionLearner) -> dict[str, Any]:
    """What a checkpoint holds, copied."""
    return {
        "networks": {k: v.clone() for k, v in trained.networks.state_dict().items()},
        "optimizers": {
            name: torch.utils._pytree.tree_map(
                lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, opt.state_dict()
            )
            for name, opt in trained.optimizers.items()
        },
    }


def restore(fresh: MotionLearner, kept: dict[str, Any]) -> MotionLearner:
    """The learner with what :func:`state` kept."""
    fresh.networks.load_state_dict(kept["networks"])
    for name, optimizer in fresh.optimizers.items():
        optimizer.load_state_dict(kept["optimizers"][name])
    return fresh
