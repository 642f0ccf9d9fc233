"""2DFAN-4 against face-alignment's own call on the same faces in the same run; benchmarks/README.md has what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.landmarks import THEIRS, BenchmarkConfig, measure, their_box
from models.frozen.landmarks import fan_matrix


def times_as_fast(config: BenchmarkConfig, *, processor: bool = False) -> dict[str, float]:
    medians = {
        name: float(np.median(turns, axis=0)[int(processor)])
        for name, turns in measure(config).items()
    }
    return {name: medians[THEIRS] / seconds for name, seconds in medians.items()}


def test_both_are_shown_the_same_square() -> None:
    """What face-alignment computes from the box it is given is the square of ``fan_matrix``."""
    box = np.array([412.0, 230, 700, 518])
    left, top, right, bottom = their_box(box)
    centre = np.array([(left + right) / 2, (top + bottom) / 2 - 0.12 * (bottom - top)])
    side = 200 * (right - left + bottom - top) / 195
    corner = np.linalg.solve(fan_matrix(box)[:, :2], -fan_matrix(box)[:, 2])
    np.testing.assert_allclose(centre - side / 2, corner)
    assert side == pytest.approx(256 / fan_matrix(box)[0, 0])


@pytest.mark.gpu
def test_on_a_gpu_it_is_four_times_as_fast() -> None:
    config = BenchmarkConfig(faces=96, flip=True, random_weights=True)
    assert times_as_fast(config)["fan fp32"] >= 4


@pytest.mark.soak
def test_on_a_cpu_it_is_never_slower() -> None:
    """By the processor's time on one thread, which other work on the machine hardly changes."""
    gains = times_as_fast(BenchmarkConfig(faces=2, random_weights=True), processor=True)
    assert gains["fan fp32"] >= 1
