"""Spectral normalisation against a singular value decomposition, and when its power iteration moves."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm

from models.layers import bare, held_power_iteration, spectral


def test_the_largest_singular_value_becomes_one():
    torch.manual_seed(0)
    layer = spectral(nn.Conv2d(3, 8, 3).double())
    for _ in range(200):  # one power iteration each
        weight = layer.weight
    assert abs(torch.linalg.svdvals(weight.flatten(1))[0].item() - 1) < 1e-6


def test_it_adds_no_parameters_and_keeps_full_precision_under_autocast():
    torch.manual_seed(0)
    layer = spectral(nn.Linear(64, 32))
    assert sum(p.numel() for p in layer.parameters()) == 64 * 32 + 32
    layer.eval()
    plain = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, plain)


def test_the_singular_value_is_measured_outside_autocast(monkeypatch):
    """On CUDA a matrix times a vector would be made in bfloat16 there; the CPU's autocast leaves it alone."""
    seen = []
    inherited = _SpectralNorm.forward

    def spy(self, weight):
        seen.append(torch.is_autocast_enabled("cpu"))
        return inherited(self, weight)

    monkeypatch.setattr(_SpectralNorm, "forward", spy)
    layer = spectral(nn.Linear(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(1, 4))
    assert seen
    assert not any(seen)


def test_held_power_iteration_leaves_the_vectors_and_the_mode_alone():
    torch.manual_seed(0)
    network = nn.Sequential(spectral(nn.Linear(6, 6)), nn.ReLU(), spectral(nn.Linear(6, 6)))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with held_power_iteration(network):
        network(torch.randn(2, 6))
        assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    network(torch.randn(2, 6))
    assert not any(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    network.eval()
    with held_power_iteration(network):
        pass
    assert not any(module.training for module in network.modules())


def test_bare_is_the_network_itself_when_nothing_wraps_it():
    network = nn.Linear(2, 2)
    assert bare(network) is network
