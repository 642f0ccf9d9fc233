"""What holds for the samples of every model: the same whoever asks, wherever they start and however they are loaded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.datasets import Made, made_video, make_dataset

Batch = Any
"""A dataclass of ``keys`` and tensors, whose first dimension is the samples: of models/aligner, blender or motion."""
Stream = Callable[[int, int, int], Iterator[Batch]]
"""(samples seen, rank, world size) → the batches of a training."""


def people() -> list[Made]:
    """Three people with 1, 2 and 4 videos of unequal length to train on; two others to test."""
    made = [made_video("anna", "v0", tracks=2, frames=3)]
    made += [made_video("bert", f"v{n}", tracks=1, frames=5 + n) for n in range(2)]
    made += [made_video("cleo", f"v{n}", tracks=1, frames=4 + 2 * n) for n in range(4)]
    made += [made_video(name, "v0", split="test", tracks=1, frames=6) for name in ("dora", "emil")]
    return made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where :func:`people` are published."""
    output = str(tmp_path_factory.mktemp("dataset"))
    make_dataset(output, people(), target_mb=0.05)
    return output


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The first of them."""
    return list(itertools.islice(batches, count))


def tensors(batch: Batch) -> dict[str, Tensor]:
    """Those that a batch has, by name."""
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def join(parts: list[Batch]) -> Batch:
    """Shares of ranks, one after the other."""
    columns = {
        name: torch.cat([tensors(part)[name] for part in parts]) for name in tensors(parts[0])
    }
    return replace(parts[0], keys=[key for part in parts for key in part.keys], **columns)


def assert_same(one: Batch, other: Batch) -> None:
    """To the last bit."""
    assert one.keys == other.keys
    assert tensors(one).keys() == tensors(other).keys()
    for name, value in tensors(one).items():
        assert torch.equal(value, tensors(other)[name]), name


def assert_all_same(some: Iterator[Batch], others: Iterator[Batch], count: int) -> None:
    """``count`` batches of two streams."""
    for one, other in zip(take(some, count), take(others, count), strict=True):
        assert_same(one, other)


def check_shares(stream: Stream, world_size: int, steps: int = 3) -> None:
    """The shares of the ranks are the batch of one."""
    ranks = [take(stream(0, rank, world_size), steps) for rank in range(world_size)]
    for step, whole in enumerate(take(stream(0, 0, 1), steps)):
        assert_same(join([batches[step] for batches in ranks]), whole)


def check_later(stream: Stream, batch_size: int, skipped: int = 3) -> int:
    """Starting later is skipping; returns how many different samples there were."""
    whole = take(stream(0, 0, 1), skipped + 2)
    for batch, wanted in zip(
        take(stream(skipped * batch_size, 0, 1), 2), whole[skipped:], strict=True
    ):
        assert_same(batch, wanted)
    return len({key for batch in whole for key in batch.keys})
