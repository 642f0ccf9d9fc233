"""What one training step of the Blender is given (HeSer §2; spec: A, T and the truth from one frame, T' from another)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from models.blender.pairs import Pair


@dataclass(frozen=True, kw_only=True)
class BlenderBatch:
    """b samples. Pictures are (b, 3, S, S) RGB in [-1, 1], label maps (b, 1, S, S) uint8 0..18, masks (b, 1, S, S) 0 or 1."""

    keys: list[str]
    """(b) ``<sample key>.<frame>`` of each truth: what an error message names."""
    animated: Tensor
    """A: the head to be blended in. In training the truth in other colours."""
    animated_labels: Tensor
    target: Tensor
    """T: whose head is replaced and whose colours are taken. In training the truth mirrored, or another frame."""
    target_labels: Tensor
    target_valid: Tensor
    """1 inside the frame, 0 in the black border."""
    truth: Tensor
    """What should come out; the background that is given to the network comes from it, too."""
    truth_valid: Tensor
    noise: Tensor
    """1 where the painted region is enlarged at random."""
    other: Tensor
    """T' of the second cycle: another frame of the person, or another person."""
    other_labels: Tensor
    other_valid: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BlenderBatch:
        """The same batch on a device."""
        return replace(
            self,
            **{name: x.to(device, non_blocking=non_blocking) for name, x in self._tensors()},
        )

    def pin_memory(self) -> BlenderBatch:
        """The same batch in page-locked memory (what ``DataLoader(pin_memory=True)`` calls)."""
        return replace(self, **{name: x.pin_memory() for name, x in self._tensors()})

    def chunk(self, n: int) -> list[BlenderBatch]:
        """Split into ``n`` equal micro-batches in order. Raises ``ValueError`` when the batch cannot be divided so."""
        if n < 1 or len(self) % n:
            raise ValueError(f"a batch of {len(self)} cannot be split into {n} equal parts")
        size = len(self) // n
        return [
            BlenderBatch(
                keys=self.keys[start : start + size],
                **{name: x[start : start + size] for name, x in self._tensors()},
            )
            for start in range(0, len(self), size)
        ]

    def _tensors(self) -> list[tuple[str, Any]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "keys"]


def collate(keys: Sequence[str], pairs: Sequence[Pair]) -> BlenderBatch:
    """Samples of one size to a batch."""
    columns = {name: torch.stack([getattr(pair, name) for pair in pairs]) for name in Pair._fields}
    return BlenderBatch(keys=list(keys), **columns)
