"""Which way a head looks: yaw, pitch and roll from the 68 landmarks, by fitting a rigid head (PnP)."""

from __future__ import annotations

import cv2
import numpy as np

from pipelines.geometry import Floats

# fmt: off
RIGID = np.array([17, 21, 22, 26, 36, 39, 42, 45, 31, 35, 48, 54, 57, 8])
"""Points of iBUG 68: brows' ends, eye corners, nostrils, mouth corners, lower lip, chin. The last two move when a mouth opens,
but without them pitch hangs on the brows alone."""
HEAD = np.array([
    [-6.83, -6.76, -4.40], [-1.33, -7.12, -6.90], [1.33, -7.12, -6.90], [6.83, -6.76, -4.40],
    [-5.31, -5.49, -3.99], [-1.79, -5.39, -4.41], [1.79, -5.39, -4.41], [5.31, -5.49, -3.99],
    [-2.01, -1.41, -6.17], [2.01, -1.41, -6.17], [-2.77, 2.08, -5.05], [2.77, 2.08, -5.05],
    [0.0, 3.12, -6.10], [0.0, 7.42, -4.07],
])
# fmt: on
"""The same on an average head that looks into the camera, cm: x to the picture's right, y down, z away from it."""
DISTANCE = 60.0
"""Taken for the distance from the camera, cm, since nothing tells its angle of view."""


def head_pose(landmarks: Floats) -> Floats:
    """Yaw, pitch and roll of one head, in degrees, against the line of sight to it.

    Yaw is positive when the face turns to the picture's left, pitch when it looks up, roll when the top of the head tilts to
    the picture's right. Where zero pitch is depends on the average head: FSA-Net's lies about 7 degrees lower.

    Args:
        landmarks: (68, 2) in frame pixels, so that roll is the head's and not the window's.
    """
    points = np.asarray(landmarks, dtype=np.float64)[RIGID]
    centred = points - points.mean(axis=0)
    # pixels are scaled so that a head of average size is at DISTANCE from a camera of focal length DISTANCE
    unit = np.sqrt((HEAD[:, :2] ** 2).sum() / (centred**2).sum())
    camera = np.diag([DISTANCE, DISTANCE, 1.0])
    start = np.zeros(3), HEAD.mean(axis=0) * [-1, -1, 0] + [0, 0, DISTANCE]
    turn = cv2.solvePnP(HEAD, centred * unit, camera, None, *start, True)[1]
    r = cv2.Rodrigues(turn)[0]
    yaw = np.arctan2(r[0, 2], np.hypot(r[1, 2], r[2, 2]))
    pitch = np.arctan2(r[1, 2], r[2, 2])
    roll = np.arctan2(-r[0, 1], r[0, 0])
    return np.asarray(np.degrees([yaw, pitch, roll]))
