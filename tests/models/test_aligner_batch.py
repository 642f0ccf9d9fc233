"""A batch of the Aligner can be moved and split without losing or mixing anything."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from models.aligner.batch import AlignerBatch


def made_batch(b: int = 4, k: int = 2, size: int = 8) -> AlignerBatch:
    shapes = {
        "sources": (b, k, 3, size, size),
        "source_faces": (b, k, 3, 7, 6),
        "target": (b, 3, size, size),
        "target_valid": (b, 1, size, size),
        "target_foreground": (b, 1, size, size),
        "target_face_matrix": (b, 2, 3),
        "driving": (b, 3, size, size),
        "driving_face": (b, 3, size, size),
        "landmarks": (b, 68, 2),
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return AlignerBatch(keys=[f"key.{i:06d}" for i in range(b)], **tensors)


def test_parts_put_together_are_the_batch() -> None:
    batch = made_batch()
    parts = batch.chunk(2)
    assert [len(part) for part in parts] == [2, 2]
    assert [key for part in parts for key in part.keys] == batch.keys
    for field in fields(AlignerBatch)[1:]:
        whole = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(whole, getattr(batch, field.name)), field.name


@pytest.mark.parametrize("n", [0, 3, 8])
def test_a_batch_is_not_split_unevenly(n: int) -> None:
    with pytest.raises(ValueError, match=f"batch of 4 .* {n} "):
        made_batch().chunk(n)


def test_every_tensor_moves() -> None:
    moved = made_batch().to("meta")
    assert len(moved) == 4
    assert {getattr(moved, field.name).device.type for field in fields(moved)[1:]} == {"meta"}
