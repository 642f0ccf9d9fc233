"""What one training step of the Aligner is given (HeSer §3.1; spec: sources, a target of the same identity, its views)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AlignerBatch:
    """b samples: k pictures of a person, and one more of the same person that is to be made from them.

    S is the side of what is generated, E the side the encoders see; pictures are RGB in [-1, 1]. K is the same for all
    samples of a batch. Points and matrices are in pixels, pixel centres at integer + 0.5.
    """

    keys: list[str]
    """(b) ``<sample key>.<frame>`` of each target: what an error message names."""
    sources: Tensor
    """(b, k, 3, E, E) whole windows."""
    source_faces: Tensor
    """(b, k, 3, fh, fw) faces as the identity network wants them: 112 x 112, or 112 x 96."""
    target: Tensor
    """(b, 3, S, S) what is to be generated; black outside the frame."""
    target_valid: Tensor
    """(b, 1, S, S) 1 inside the frame, 0 in the black border."""
    target_foreground: Tensor
    """(b, 1, S, S) 1 on the person (labels that are not 0); all 1 where the dataset has no labels."""
    target_face_matrix: Tensor
    """(b, 2, 3) pixels of the target → pixels of the identity network's face."""
    driving: Tensor
    """(b, 3, E, E) the target after the augmentation that hides who it is."""
    driving_face: Tensor
    """(b, 3, E, E) expression crop of the augmented target."""
    landmarks: Tensor
    """(b, 68, 2) of the target, pixels of S, iBUG order."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AlignerBatch:
        """The same batch on a device."""
        return replace(
            self,
            **{
                name: tensor.to(device, non_blocking=non_blocking)
                for name, tensor in self._tensors().items()
            },
        )

    def pin_memory(self) -> AlignerBatch:
        """The same batch in page-locked memory (what ``DataLoader(pin_memory=True)`` calls)."""
        return replace(self, **{name: t.pin_memory() for name, t in self._tensors().items()})

    def chunk(self, n: int) -> list[AlignerBatch]:
        """Split into ``n`` equal micro-batches in order. Raises ``ValueError`` when the batch cannot be divided so."""
        if n < 1 or len(self) % n:
            raise ValueError(f"a batch of {len(self)} cannot be split into {n} equal parts")
        size = len(self) // n
        parts = {name: tensor.split(size) for name, tensor in self._tensors().items()}
        return [
            AlignerBatch(
                keys=self.keys[i * size : (i + 1) * size],
                **{name: pieces[i] for name, pieces in parts.items()},
            )
            for i in range(n)
        ]

    def _tensors(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "keys"}
