"""Pairs: moved, divided, mirrored."""

from __future__ import annotations

import pytest
import torch

from models.motion.layout import LAYOUTS
from tests.models.motion.pairs import pairs


def test_flipping_twice_is_nothing() -> None:
    batch = pairs(4)
    which = torch.tensor([True, False, True, True])
    once, twice = batch.flipped(which), batch.flipped(which).flipped(which)
    for name, tensor in batch._tensors().items():
        assert torch.equal(getattr(twice, name), tensor), name
        assert torch.equal(getattr(once, name)[1], tensor[1]), name
        assert not torch.equal(getattr(once, name)[0], tensor[0]), name


def test_a_flipped_left_eye_is_a_right_eye() -> None:
    batch = pairs(2)
    flipped = batch.flipped(torch.tensor([True, True]))
    parts = LAYOUTS[70].parts
    before = batch.driving_landmarks[:, list(parts["eye_left"])].mean(dim=1)
    after = flipped.driving_landmarks[:, list(parts["eye_right"])].mean(dim=1)
    assert torch.allclose(after, before * torch.tensor([-1, 1]), atol=1e-6)
    assert torch.equal(flipped.source[0, :, :, 0], batch.source[0, :, :, -1])


def test_dividing_and_moving() -> None:
    batch = pairs(4)
    parts = batch.chunk(2)
    assert [len(part) for part in parts] == [2, 2]
    assert parts[0].keys + parts[1].keys == batch.keys
    assert torch.equal(torch.cat([part.driving for part in parts]), batch.driving)
    assert batch.to("meta").source.device.type == "meta"
    with pytest.raises(ValueError, match="a batch of 4 cannot be split into 3"):
        batch.chunk(3)
