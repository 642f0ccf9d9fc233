"""What one training step of the motion model is given: two frames of one clip, and the landmarks of both."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from models.motion.layout import layout_of


@dataclass(frozen=True, kw_only=True)
class MotionBatch:
    """b pairs. S is the side of the pictures, RGB in [-1, 1].

    Landmarks are in [-1, 1]: 2 p / S - 1 for p in pixels with centres at integer + 0.5. Points outside the picture stay
    outside.
    """

    keys: list[str]
    """(b) ``<sample key>.<source frame>.<driving frame>``: what an error message names."""
    source: Tensor
    """(b, 3, S, S)."""
    driving: Tensor
    """(b, 3, S, S) what is to be generated; the network never sees it."""
    source_landmarks: Tensor
    """(b, K, 2), K as in the network's configuration."""
    driving_landmarks: Tensor
    """(b, K, 2)."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MotionBatch:
        """The same batch on a device."""
        return replace(
            self,
            **{
                name: tensor.to(device, non_blocking=non_blocking)
                for name, tensor in self._tensors().items()
            },
        )

    def pin_memory(self) -> MotionBatch:
        """The same batch in page-locked memory (what ``DataLoader(pin_memory=True)`` calls)."""
        return replace(self, **{name: t.pin_memory() for name, t in self._tensors().items()})

    def chunk(self, n: int) -> list[MotionBatch]:
        """Split into ``n`` equal micro-batches in order. Raises ``ValueError`` when the batch cannot be divided so."""
        if n < 1 or len(self) % n:
            raise ValueError(f"a batch of {len(self)} cannot be split into {n} equal parts")
        size = len(self) // n
        parts = {name: tensor.split(size) for name, tensor in self._tensors().items()}
        return [
            MotionBatch(
                keys=self.keys[i * size : (i + 1) * size],
                **{name: pieces[i] for name, pieces in parts.items()},
            )
            for i in range(n)
        ]

    def flipped(self, which: Tensor) -> MotionBatch:
        """Mirror the pairs for which ``which`` (b,) is True: pictures and points, and the points' order with them."""
        flip = torch.from_numpy(layout_of(self.source_landmarks.shape[1]).flip)
        chosen: dict[str, Any] = {}
        for name, tensor in self._tensors().items():
            if name.endswith("landmarks"):
                mirrored = tensor[:, flip.to(tensor.device)] * tensor.new_tensor([-1, 1])
            else:
                mirrored = tensor.flip(-1)
            shape = (-1,) + (1,) * (tensor.dim() - 1)
            chosen[name] = torch.where(which.to(tensor.device).view(shape), mirrored, tensor)
        return replace(self, **chosen)

    def _tensors(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "keys"}
