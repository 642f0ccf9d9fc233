"""Spectral normalisation as all three models use it, and what comes of wrapping networks for several workers.

Spectral normalisation (Miyato et al. 2018) divides a weight by its largest singular value, which is followed by one step of
power iteration per training forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import register_parametrization

Module = TypeVar("Module", bound=nn.Module)

LPD_EPS = 1e-4
"""Of the power iteration, in latent pose reenactment's blocks."""


class Spectral(_SpectralNorm):
    """torch's spectral norm, in the weight's own precision under autocast: a singular value in bf16 is off by up to 0.4 %."""

    def forward(self, weight: Tensor) -> Tensor:
        """A weight of any shape to the same weight with largest singular value 1, rows being output channels."""
        if weight.is_meta:  # counts and shapes; autocast does not know this device
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            normalised: Tensor = super().forward(weight)
        return normalised

    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        if not weight_mat.is_meta:
            super()._power_method(weight_mat, n_power_iterations)


def spectral(module: Module, eps: float = LPD_EPS) -> Module:
    """The same convolution or linear layer with its weight normalised; adds buffers, no parameters."""
    weight = module.get_parameter("weight")
    register_parametrization(module, "weight", Spectral(weight, eps=eps))
    return module


@contextmanager
def held_power_iteration(*networks: nn.Module) -> Iterator[None]:
    """Inside, training forward passes leave the singular vectors alone.

    So that a step takes one power iteration, into however many micro-batches or passes it is divided.
    """
    active = [
        module
        for network in networks
        for module in network.modules()
        if isinstance(module, Spectral) and module.training
    ]
    for module in active:
        module.train(False)
    try:
        yield
    finally:
        for module in active:
            module.train(True)


def bare(network: nn.Module) -> nn.Module:
    """The network inside a ``DistributedDataParallel`` wrapper; any other network as it is."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        inner: nn.Module = network.module
        return inner
    return network
