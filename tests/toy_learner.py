"""A learner small enough for tests of the loop: a generator and a discriminator of a few weights, on drawn numbers.

Ray's workers import it, so it is a module of its own and not part of a test file.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from models import bundle
from models.updates import descend


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Of the network."""

    width: int = 4
    double: bool = False


@dataclass(frozen=True, kw_only=True)
class ToyLearnerConfig:
    """Of the learner."""

    network: ToyConfig = ToyConfig()
    lr: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class ToyBatch:
    """b pictures (b, 3, 8, 8)."""

    keys: list[str]
    images: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ToyBatch:
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return len(self.keys)


class Toy(nn.Module):
    """Pictures → pictures."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.encode = nn.Conv2d(3, config.width, 3, padding=1)
        self.decode = nn.Conv2d(config.width, 3, 3, padding=1)
        if config.double:
            self.double()

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.decode(torch.tanh(self.encode(images))))


bundle.NETWORKS["toy"] = (Toy, ToyConfig)


class ToyLearner:
    """Makes a picture from a noisy copy of it, against a linear discriminator."""

    preview_columns = ("real", "generated")

    def __init__(
        self,
        config: ToyLearnerConfig,
        *,
        wrap: Callable[[nn.Module], nn.Module],
        device: torch.device,
    ) -> None:
        dtype = torch.float64 if config.network.double else torch.float32
        self._toy = Toy(config.network).to(device)
        self._ema = Toy(config.network).to(device).requires_grad_(False)
        self._ema.load_state_dict(self._toy.state_dict())
        self._judge = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).to(device, dtype)
        self._wrapped = wrap(self._toy)
        self._wrapped_judge = wrap(self._judge)
        self._optimizers = {
            "generator": Adam(self._toy.parameters(), config.lr),
            "discriminator": Adam(self._judge.parameters(), config.lr),
        }

    @property
    def networks(self) -> nn.ModuleDict:
        return nn.ModuleDict({"toy": self._toy, "toy_ema": self._ema, "judge": self._judge})

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        return self._optimizers

    def train_step(self, batch: ToyBatch, samples_seen: int) -> dict[str, Tensor]:
        real = batch.images
        noisy = real + 0.1 * (samples_seen % 7) / 7
        generated = self._wrapped(noisy)
        l1 = (generated - real).abs().mean()
        self._judge.requires_grad_(False)
        adversarial = -self._judge(generated).mean()
        self._judge.requires_grad_(True)
        losses = {"loss/l1": l1, "loss/adversarial": 0.1 * adversarial}
        norm = self._step("generator", losses, self._toy, batch.keys)
        scores, fakes = self._wrapped_judge(torch.cat([real, generated.detach()])).chunk(2)
        judged = (1 - scores).relu().mean() + (1 + fakes).relu().mean()
        self._step("discriminator", {"loss/discriminator": judged}, self._judge, batch.keys)
        for slow, fast in zip(self._ema.parameters(), self._toy.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)
        return {
            "loss/l1": l1.detach(),
            "loss/discriminator": judged.detach(),
            "norm/generator": norm,
        }

    def _step(
        self, name: str, losses: Mapping[str, Tensor], network: nn.Module, keys: list[str]
    ) -> Tensor:
        return descend(
            losses, self._optimizers[name], list(network.parameters()), clip=10.0, keys=keys
        )

    def eval_step(self, batch: ToyBatch) -> dict[str, Tensor]:
        return {"l1": (self._ema(batch.images) - batch.images).abs().mean()}

    def preview(self, batch: ToyBatch) -> Tensor:
        return torch.cat([batch.images, self._ema(batch.images)], dim=-1).float()

    def export(self) -> nn.Module:
        return self._ema.eval()


@dataclass(frozen=True, kw_only=True)
class ToySamples:
    """What is drawn, and what goes wrong on the way."""

    batch: int = 4
    """Samples of a step, over all workers."""
    seed: int = 0
    double: bool = False
    nan_at: int = -1
    """Sample whose picture is not a number."""
    kill_at: tuple[int, ...] = ()
    """Samples at which a worker kills itself, each once."""
    markers: str = ""
    """Folder with a file for each kill that has happened."""
    pause: float = 0.0
    """Seconds that a batch takes to come."""
    worlds: str = ""
    """File that gets a line for each start of rank 0: how many workers there are, and the samples seen."""


def toy_batches(
    config: ToySamples, *, samples_seen: int, rank: int, world_size: int
) -> Iterator[ToyBatch]:
    """This rank's share of every step from ``samples_seen`` on; a picture is a function of the seed and its index."""
    share = config.batch // world_size
    start = samples_seen
    if config.worlds and rank == 0:
        with Path(config.worlds).open("a") as file:
            file.write(f"{world_size} {samples_seen}\n")
    while True:
        indices = range(start + rank * share, start + (rank + 1) * share)
        time.sleep(config.pause)
        for sample in set(config.kill_at) & set(indices):
            marker = Path(config.markers, str(sample))
            if not marker.exists():
                marker.write_text(str(rank))
                os.kill(os.getpid(), signal.SIGKILL)
        images = torch.stack([_picture(config, index) for index in indices])
        yield ToyBatch(keys=[f"toy-{index}" for index in indices], images=images)
        start += config.batch


def _picture(config: ToySamples, index: int) -> Tensor:
    draw = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    picture = torch.rand(3, 8, 8, generator=draw, dtype=torch.float64) * 2 - 1
    if index == config.nan_at:
        picture = picture * float("nan")
    return picture if config.double else picture.float()


def held_out(config: ToySamples, *, rank: int, world_size: int) -> list[ToyBatch]:
    """Two batches that are not trained on; every rank its own share."""
    share = config.batch // world_size
    batches = []
    for number in range(2):
        first = 10_000_000 + number * config.batch + rank * share
        images = torch.stack([_picture(config, first + i) for i in range(share)])
        batches.append(ToyBatch(keys=[f"held-{first + i}" for i in range(share)], images=images))
    return batches
