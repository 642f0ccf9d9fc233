"""What one training step of the Blender is given (HeSer §2; spec: A, T and the truth from one frame, T' from another)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


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
    colours: Tensor
    """(b, 4) how A was recoloured: factors of brightness, contrast and saturation, shift of hue in turns."""
    turn: Tensor
    """(b, 2) how truth and A were turned and sheared against T, degrees."""
    wants_aligner: Tensor
    """(b) bool: an Aligner's picture of the truth is to take the place of A's head (``pairs.put_heads``), where there is one."""
    sources: Tensor | None = None
    """(b, k, 3, E, E) what the Aligner makes it from, as in ``AlignerBatch``; 0 where none is wanted, None without Aligner."""
    source_faces: Tensor | None = None
    """(b, k, 3, fh, fw)."""
    driving: Tensor | None = None
    """(b, 3, E, E)."""
    driving_face: Tensor | None = None
    """(b, 3, E, E)."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BlenderBatch:
        """The same batch on a device."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> BlenderBatch:
        """The same batch in page-locked memory (what ``DataLoader(pin_memory=True)`` calls)."""
        return self._each(Tensor.pin_memory)

    def chunk(self, n: int) -> list[BlenderBatch]:
        """Split into ``n`` equal micro-batches in order. Raises ``ValueError`` when the batch cannot be divided so."""
        if n < 1 or len(self) % n:
            raise ValueError(f"a batch of {len(self)} cannot be split into {n} equal parts")
        size = len(self) // n
        columns = {name: x.split(size) for name, x in self.tensors().items()}
        return [
            BlenderBatch(
                keys=self.keys[i * size : (i + 1) * size],
                **{name: parts[i] for name, parts in columns.items()},
            )
            for i in range(n)
        ]

    def tensors(self) -> dict[str, Any]:
        """Those there are, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _each(self, change: Callable[[Tensor], Tensor]) -> BlenderBatch:
        changed: dict[str, Any] = {name: change(x) for name, x in self.tensors().items()}
        return replace(self, **changed)


def join(batches: Sequence[BlenderBatch]) -> BlenderBatch:
    """Batches with the same tensors, one after the other."""
    columns = [batch.tensors() for batch in batches]
    return BlenderBatch(
        keys=[key for batch in batches for key in batch.keys],
        **{name: torch.cat([column[name] for column in columns]) for name in columns[0]},
    )
