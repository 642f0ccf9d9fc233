"""Updates: micro-batches add up to the batch, and nothing non-finite ever reaches a weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from models.layers import spectral
from models.updates import (
    NonFiniteLossError,
    accumulate,
    add,
    autocast,
    descend,
    micro_batches,
    step,
)


@dataclass(frozen=True)
class Rows:
    """The least a batch can be."""

    keys: list[str]
    x: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def chunk(self, n: int) -> list[Rows]:
        size = len(self) // n
        return [
            Rows(self.keys[i : i + size], self.x[i : i + size]) for i in range(0, len(self), size)
        ]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(spectral(nn.Linear(5, 7)), nn.Tanh(), spectral(nn.Linear(7, 1))).double()


def update(net: nn.Module, batch: Rows, parts: int, steps: int = 3) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    totals: dict[str, Tensor] = {}
    for _ in range(steps):
        totals = {}
        for part, share in micro_batches(batch, parts, [net]):
            losses = {"square": net(part.x).square().mean()}
            accumulate(losses, part.keys, share)
            add(totals, losses, share)
        totals["norm"] = step(optimizer, net.parameters(), 1.0)
    return totals


def test_micro_batches_take_the_step_of_the_whole_batch():
    batch = Rows([str(i) for i in range(8)], torch.randn(8, 5, dtype=torch.float64))
    whole, parts = network(), network()
    expected, found = update(whole, batch, 1), update(parts, batch, 4)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_is_named_and_changes_nothing(bad):
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    before = copy.deepcopy(net.state_dict())
    losses = {"good": net[0].bias.sum(), "poor": net[0].bias.sum() * bad}
    with pytest.raises(
        NonFiniteLossError, match=r"poor = .* at anna-x-1\.000004, ben-y-2\.000009"
    ) as caught:
        descend(
            losses,
            optimizer,
            net.parameters(),
            clip=1.0,
            keys=["anna-x-1.000004", "ben-y-2.000009"],
        )
    assert "good" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_non_finite_gradient_changes_nothing():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(
        NonFiniteLossError, match="gradients"
    ):  # sqrt is finite at 0, its slope is not
        descend({"root": weight.sqrt().sum()}, optimizer, [weight], clip=1.0, keys=["a"])
    assert weight.item() == 0


def test_gradients_are_clipped_to_the_norm_and_forgotten():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    norm = descend(
        {"half square": weight.square().sum() / 2}, optimizer, [weight], clip=1.0, keys=[]
    )
    assert norm == 5
    torch.testing.assert_close(
        weight.detach(), torch.tensor([3.0 - 0.6, 4.0 - 0.8]), rtol=1e-5, atol=0
    )
    assert weight.grad is None


def test_autocast_computes_in_bf16_only_when_asked():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with autocast(torch.device("cpu"), "bf16"):
        assert layer(x).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "fp32"):
        assert layer(x).dtype == torch.float32


def test_ranks_talk_once_a_step(tmp_path):
    """Gradients are reduced with the last micro-batch, when all are there."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(nn.Linear(5, 1).double())
        batch = Rows([str(i) for i in range(6)], torch.randn(6, 5, dtype=torch.float64))
        talks = [wrapped.require_backward_grad_sync for _ in micro_batches(batch, 3, [wrapped])]
    finally:
        distributed.destroy_process_group()
    assert talks == [False, False, True]


def refusing_rank(rank: int, store: str, found: multiprocessing.Queue) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = weight.sum() * (float("nan") if rank == 1 else 1.0)
    try:
        descend({"l1": loss}, optimizer, [weight], clip=1.0, keys=["key-of-1"])
    except NonFiniteLossError as error:
        found.put((rank, str(error), weight.item()))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_every_rank_refuses_what_one_rank_finds(tmp_path):
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    torch.multiprocessing.spawn(refusing_rank, (str(tmp_path / "store"), found), nprocs=2)
    told = {rank: (text, weight) for rank, text, weight in (found.get(), found.get())}
    assert told == {0: ("not finite on another rank", 1.0), 1: ("l1 = nan at key-of-1", 1.0)}
