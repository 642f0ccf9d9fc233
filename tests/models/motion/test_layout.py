"""Which landmark is which."""

from __future__ import annotations

import numpy as np
import pytest

from models.motion.layout import FLIP_68, LAYOUTS, layout_of, with_pupils
from tests.faces import FACE_68

POINTS = {68: FACE_68, 70: with_pupils(FACE_68)}


@pytest.mark.parametrize("count", [68, 70])
def test_flipping_twice_is_nothing_and_a_symmetric_face_is_its_own_mirror(count: int) -> None:
    layout, points = LAYOUTS[count], POINTS[count]
    assert np.array_equal(layout.flip[layout.flip], np.arange(count))
    assert np.allclose((points * [-1, 1])[layout.flip], points, atol=0.002)


@pytest.mark.parametrize("count", [68, 70])
def test_flipping_swaps_the_eyes_and_keeps_the_mouth(count: int) -> None:
    layout = LAYOUTS[count]
    parts = {name: set(points) for name, points in layout.parts.items()}
    assert {int(layout.flip[i]) for i in parts["eye_left"]} == parts["eye_right"]
    assert {int(layout.flip[i]) for i in parts["mouth"]} == parts["mouth"]
    assert {int(layout.flip[i]) for i in layout.rigid} == set(layout.rigid)


def test_parts_are_named_by_the_side_of_the_picture() -> None:
    for layout in LAYOUTS.values():
        points = POINTS[layout.count]
        means = {name: points[list(indices)].mean(axis=0) for name, indices in layout.parts.items()}
        assert means["eye_left"][0] < -0.2
        assert means["eye_right"][0] > 0.2
        assert means["mouth"][1] > 0.2
    assert [len(part) for part in LAYOUTS[68].parts.values()] == [11, 11, 20]
    assert [len(part) for part in LAYOUTS[70].parts.values()] == [12, 12, 20]


def test_unknown_pupils_look_straight_ahead() -> None:
    both = with_pupils(np.stack([FACE_68, FACE_68 + 3]))
    assert both.shape == (2, 70, 2)
    assert np.allclose(both[0, 68], FACE_68[36:42].mean(axis=0))
    assert np.allclose(both[1, 69], FACE_68[42:48].mean(axis=0) + 3)
    with pytest.raises(ValueError, match=r"\(70, 2\)"):
        with_pupils(both[0])


def test_a_number_of_points_that_no_layout_has() -> None:
    with pytest.raises(ValueError, match="98 landmarks"):
        layout_of(98)


def test_the_data_half_flips_with_the_same_order() -> None:
    from pipelines import geometry

    assert geometry.FLIP_68 is FLIP_68
