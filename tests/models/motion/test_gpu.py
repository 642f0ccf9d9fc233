"""The motion model on a GPU: what the CPU computes, in bf16 close to it, and two steps of either precision."""

from __future__ import annotations

import pytest
import torch

from models.motion.learner import MotionLearner
from models.updates import autocast
from tests.models.motion.pairs import CONFIG, bare, pairs
from tests.models.motion.tiny import awake, landmarks, pictures, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1)])
def test_a_gpu_drives_as_the_cpu_does(precision: str, tolerance: float) -> None:
    model = awake(tiny()).eval()
    source, face, driving = pictures(1), landmarks(1), landmarks(6, seed=3)
    with torch.no_grad():
        expected, _ = model.drive(model.prepare(source, face), driving)
        model.cuda()
        device = torch.device("cuda")
        with autocast(device, precision):  # type: ignore[arg-type]
            cache = model.prepare(source.to(device), face.to(device))
            found, fields = model.drive(cache, driving.to(device))
    assert fields.deformation.dtype == torch.float32
    assert (found.cpu().float() - expected).abs().max() < tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_learns(precision: str) -> None:
    from dataclasses import replace

    torch.manual_seed(0)
    device = torch.device("cuda")
    config = replace(CONFIG, precision=precision, lr=2e-3)
    trained, batch = MotionLearner(config, wrap=bare, device=device), pairs(4).to(device)
    steps = [trained.train_step(batch, 0) for _ in range(12)]
    assert steps[-1]["loss/reconstruction"] < 0.9 * steps[0]["loss/reconstruction"]
    assert all(value.isfinite() for step in steps for value in step.values())
