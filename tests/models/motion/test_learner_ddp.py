"""Two workers train the motion model together: gloo, CPU, batch norm's buffers sent round as usual."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from models.motion.learner import MotionLearner
from tests.models.motion.pairs import CONFIG, pairs


def work(rank: int, folder: str) -> None:
    """One of two workers: three adversarial steps on its own half of the pairs; stores its weights."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.manual_seed(rank)  # the wrapper makes the weights equal

    def wrap(network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network)

    trained = MotionLearner(CONFIG, wrap=wrap, device=torch.device("cpu"))
    losses = []
    for step in range(3):
        batch = pairs(4, seed=step).chunk(2)[rank]
        losses.append(trained.train_step(batch, step * 4)["loss/reconstruction"])
    weights = dict(trained.networks.named_parameters())
    torch.save({"weights": weights, "losses": torch.stack(losses)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_keep_the_same_weights(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    kept = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    first, second = (results["weights"] for results in kept)
    assert set(first) == set(second)
    assert all(isinstance(w, Tensor) and torch.equal(w, second[name]) for name, w in first.items())
    assert not torch.equal(kept[0]["losses"], kept[1]["losses"])  # each saw its own half
