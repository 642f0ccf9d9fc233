"""The moving average against its recursion written out."""

import pytest
import torch
from torch import nn

from models.ema import Ema
from models.layers import spectral


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(spectral(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))


def test_it_follows_the_weights_by_its_recursion_and_takes_the_buffers():
    net = network()
    ema = Ema(net, decay=0.9)
    expected = net[1].bias.detach().clone()
    for i in range(5):
        with torch.no_grad():
            net[1].bias += i
        net(torch.randn(2, 3, 8, 8))
        ema.update(net)
        expected = 0.9 * expected + 0.1 * net[1].bias.detach()
    torch.testing.assert_close(ema.network[1].bias, expected)
    for a, b in zip(ema.network.buffers(), net.buffers(), strict=True):
        assert torch.equal(a, b)


def test_it_is_a_copy_that_never_trains():
    net = network()
    ema = Ema(net, decay=0.5).train()
    assert not any(module.training for module in ema.network.modules())
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in net.parameters())
    net.eval()
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(ema.network(x), net(x))


def test_a_decay_of_one_would_never_move():
    with pytest.raises(ValueError, match=r"1\.0"):
        Ema(network(), decay=1.0)
