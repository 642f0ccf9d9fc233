"""What every learner's step shares: precision, micro-batches, and the update that refuses non-finite numbers.

The losses and their order stay in the learners (docs: the loop is shared, the step never).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from models.layers import held_power_iteration

Precision = Literal["fp32", "bf16"]


class NonFiniteLossError(ValueError):
    """A loss or a gradient is infinite or not a number. Raised on every rank, before any weight is changed."""


class Batch(Protocol):
    """What can be divided into micro-batches."""

    @property
    def keys(self) -> list[str]:
        """Names of the samples, for error messages."""
        ...

    def __len__(self) -> int: ...

    def chunk(self, n: int) -> list[Self]:
        """Up to ``n`` parts, in order."""
        ...


B = TypeVar("B", bound=Batch)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Context in which networks run; losses are computed outside it or cast back (``models.losses.exact``)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def micro_batches(
    batch: B, count: int, networks: Sequence[nn.Module] = ()
) -> Iterator[tuple[B, float]]:
    """A batch in parts with their share of it, so that the sum of share x loss is the loss of the whole.

    All ranks must have batches of one size. While a part is worked on, wrapped ``networks`` leave their gradients
    unreduced unless it is the last, and spectral norms take their power iteration at the first part only.
    """
    parts = batch.chunk(count)
    for i, part in enumerate(parts):
        with ExitStack() as contexts:
            if i > 0:
                contexts.enter_context(held_power_iteration(*networks))
            if i < len(parts) - 1:
                for network in networks:
                    if isinstance(network, DistributedDataParallel):
                        contexts.enter_context(network.no_sync())
            yield part, len(part) / len(batch)


def add(totals: dict[str, Tensor], values: Mapping[str, Tensor], share: float = 1.0) -> None:
    """Add a micro-batch's share of detached metrics to the step's."""
    for name, value in values.items():
        part = value.detach() * share
        totals[name] = totals[name] + part if name in totals else part


def accumulate(losses: Mapping[str, Tensor], keys: Sequence[str], share: float = 1.0) -> None:
    """Add the gradients of the losses' sum, weighted already, times ``share``.

    Raises:
        NonFiniteLossError: on every rank if a loss is not finite on any. Names the losses and the samples' keys.
    """
    refuse_non_finite(losses, keys)
    (torch.stack(list(losses.values())).sum() * share).backward()


def step(optimizer: Optimizer, parameters: Iterable[nn.Parameter], clip: float) -> Tensor:
    """Clip the accumulated gradients to the norm ``clip``, update, forget them; returns the norm before clipping.

    Raises:
        NonFiniteLossError: the norm is not finite; nothing was updated.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    refuse_non_finite({"norm of the gradients": norm}, [])
    optimizer.step()
    optimizer.zero_grad()
    return norm.detach()


def descend(
    losses: Mapping[str, Tensor],
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    *,
    clip: float,
    keys: Sequence[str],
) -> Tensor:
    """One update from one batch: :func:`accumulate`, then :func:`step`."""
    accumulate(losses, keys)
    return step(optimizer, parameters, clip)


def refuse_non_finite(losses: Mapping[str, Tensor], keys: Sequence[str]) -> None:
    """Raise ``NonFiniteLossError`` on every rank if a scalar is infinite or not a number on any."""
    values = torch.stack([loss.detach().float() for loss in losses.values()])
    is_finite = values.isfinite()
    everywhere = is_finite.all().int()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(everywhere, op=distributed.ReduceOp.MIN)
    if everywhere.item():
        return
    wrong = [
        f"{name} = {value:g}"
        for name, value, good in zip(losses, values.tolist(), is_finite.tolist(), strict=True)
        if not good
    ]
    place = f" at {', '.join(keys)}" if keys else ""
    raise NonFiniteLossError(
        f"{'; '.join(wrong)}{place}" if wrong else "not finite on another rank"
    )
