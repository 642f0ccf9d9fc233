"""Points follow a picture that moves by known amounts, in small pictures whose place is known, and are doubted where they must be."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage import data

from pipelines.flow import REACH, SIDE, FaceFlow, follow, grey_face
from pipelines.geometry import transform

BOX = np.array([179.0, 83, 267, 171])
"""The astronaut's face."""


def points() -> np.ndarray:
    """68 places on the face, between pixel centres."""
    x, y = np.meshgrid(np.linspace(190, 255, 17), np.linspace(95, 165, 4))
    return np.stack([x.ravel() + 0.3, y.ravel() + 0.7], axis=1)


def moved(matrix: np.ndarray) -> np.ndarray:
    """The portrait, moved by a matrix of our pixel convention."""
    shifted = matrix.copy()
    shifted[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    picture = data.astronaut()
    return cv2.warpAffine(picture, shifted, (512, 512), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)  # fmt: skip


@pytest.mark.parametrize("times", [1, 3])
def test_points_move_as_the_picture_does(times: int) -> None:
    """A turn, a growth and a shift of several pixels, and the box goes with them; also where the face is larger than SIDE."""
    cos, sin = 1.02 * np.cos(0.03), 1.02 * np.sin(0.03)
    matrix = np.array([[cos, -sin, 9.3], [sin, cos, -11.6]])
    after = transform(matrix, BOX.reshape(2, 2)).reshape(4)
    large = [
        cv2.resize(picture, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
        for picture in (data.astronaut(), moved(matrix))
    ]
    flow = FaceFlow()
    flow.add(4, large[0], times * BOX, times * points())
    flow.add(5, large[1], times * after, np.zeros((68, 2)))
    (steps,) = flow.along([5])
    believed = np.isfinite(steps).all(axis=1)
    assert believed.mean() > 0.9
    expected = times * (transform(matrix, points()) - points())
    errors = np.linalg.norm(steps - expected, axis=1)[believed] / times
    assert np.median(errors) < 0.1
    assert np.quantile(errors, 0.9) < 0.4
    assert np.isnan(flow.along([4, 6])).all()


def test_a_gap_and_what_does_not_come_back_are_not_believed() -> None:
    flow = FaceFlow()
    picture = data.astronaut()
    flow.add(0, picture, BOX, points())
    flow.add(2, picture, BOX, points())
    assert flow.moves == {}
    noise = np.random.default_rng(0).integers(0, 255, picture.shape, np.uint8)
    flow.add(3, noise, BOX, points())
    assert np.isnan(flow.moves[3]).mean() > 0.8
    # between two pictures of noise every point is followed to somewhere, but few come back
    noises = [np.random.default_rng(i).integers(0, 255, (512, 512), np.uint8) for i in range(2)]
    assert np.isfinite(follow(*noises, points())).all(axis=1).mean() < 0.4


def test_the_small_picture_is_where_it_says() -> None:
    picture = data.astronaut()
    small, scale, corner = grey_face(picture, BOX)
    assert small.shape == (SIDE, SIDE)
    assert scale == pytest.approx(SIDE / (REACH * 88), rel=0.01)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(float)
    y, x = np.mgrid[100:160, 190:250]
    columns, rows = ((scale * (np.stack([x, y], -1) + 0.5 - corner)).astype(int)).transpose(2, 0, 1)
    errors = [np.abs(grey[y + dy, x] - small[rows, columns]).mean() for dy in (-1, 0, 1)]
    assert errors[1] < min(errors[0], errors[2]) / 2
    # also where one side of it lies outside the frame
    small, scale, corner = grey_face(picture, BOX - [170, 0, 170, 0])
    y, x = np.mgrid[100:160, 20:80]
    columns, rows = ((scale * (np.stack([x, y], -1) + 0.5 - corner)).astype(int)).transpose(2, 0, 1)
    assert corner[0] < 0
    errors = [np.abs(grey[y, x + dx] - small[rows, columns]).mean() for dx in (-2, 0, 2)]
    assert errors[1] < min(errors[0], errors[2])
    # at the rim the picture goes on as it ends, outside there is nothing
    assert grey_face(picture, np.array([-40.0, -40, 40, 40]))[0].std() > 5
    assert not grey_face(picture, np.array([900.0, 900, 990, 990]))[0].any()
