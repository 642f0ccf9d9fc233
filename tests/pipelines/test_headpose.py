"""Which way a head looks: known turns are found, with the signs that one sees."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pipelines.geometry import FLIP_68
from pipelines.headpose import DISTANCE, HEAD, RIGID, head_pose


def seen(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """68 points, those of the rigid head turned by known angles (nose to the picture's left, nose up, clockwise) and
    seen from its distance, 30 pixels a cm there."""
    about_x, about_y, about_z = (
        cv2.Rodrigues(np.radians(np.array(axis, dtype=float)))[0]
        for axis in ([-pitch, 0, 0], [0, yaw, 0], [0, 0, roll])
    )
    placed = (HEAD - HEAD.mean(axis=0)) @ (about_x @ about_y @ about_z).T + [0, 0, DISTANCE]
    points = np.zeros((68, 2))
    points[RIGID] = placed[:, :2] / placed[:, 2:] * DISTANCE * 30 + [700, 400]
    return points


@pytest.mark.parametrize(
    "turn", [(0, 0, 0), (25, 0, 0), (0, 15, 0), (0, 0, -20), (-30, 10, 8), (30, 35, 0)]
)
def test_known_turns_are_found(turn):
    np.testing.assert_allclose(head_pose(seen(*turn)), turn, atol=2)


def test_the_signs_are_what_one_sees():
    level = seen(0, 0, 0)
    nose = level[[31, 35]].mean(axis=0)
    assert seen(20, 0, 0)[[31, 35], 0].mean() < nose[0]
    assert seen(0, 20, 0)[[31, 35], 1].mean() < nose[1]
    assert seen(0, 0, 20)[[17, 26], 0].mean() > level[[17, 26], 0].mean()


def test_a_mirrored_head_looks_the_other_way():
    mirrored = (seen(30, 10, 5) * [-1, 1] + [1400, 0])[FLIP_68]
    np.testing.assert_allclose(head_pose(mirrored), (-30, 10, -5), atol=2)
