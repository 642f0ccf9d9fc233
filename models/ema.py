"""The exponential moving average of a network's weights, which is what gets evaluated and exported."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema(nn.Module):
    """A shadow of a network that follows it slowly. In evaluation mode always, without gradients."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Start as a copy of ``network``, unwrapped; ``decay`` in [0, 1) is what is kept of the shadow in one update."""
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay of a moving average must be in [0, 1), got {decay}")
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Ema:  # noqa: ARG002 - stays in evaluation mode
        """Do nothing: a shadow never trains."""
        return self

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the unwrapped ``network``; its buffers (batch statistics, singular vectors) are taken over as they are."""
        shadow = dict(self.network.named_parameters())
        current = dict(network.named_parameters())
        torch._foreach_lerp_(
            list(shadow.values()), [current[name] for name in shadow], 1 - self.decay
        )
        for kept, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            kept.copy_(buffer)
