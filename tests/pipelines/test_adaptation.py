"""A driver's landmarks on another face."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from models.motion.layout import LAYOUTS, with_pupils
from pipelines.adaptation import adapt, lid_gaps, neutral_frame, pose_of
from pipelines.geometry import fit_similarity, transform
from tests.faces import FACE_68

Points = NDArray[np.float64]
MODES = ("canonical", "relative", "absolute")


def similarity(scale: float, degrees: float, shift: tuple[float, float]) -> Points:
    angle = np.radians(degrees)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]])


def person(width: float = 1.0, *, scale: float = 60.0, degrees: float = 0.0) -> Points:
    """A face of its own width at rest, 68 points in a window of 256."""
    return transform(similarity(scale, degrees, (128, 132)), FACE_68 * [width, 1.0])


def with_mouth(points: Points, opened: float) -> Points:
    """The lower lip and the chin lower by ``opened`` pixels."""
    moved = points.copy()
    moved[[*range(55, 60), *range(65, 68), 7, 8, 9], 1] += opened
    return moved


def with_lids(points: Points, share: float) -> Points:
    """The lids as far open as ``share`` of what they are."""
    moved = points.copy()
    for upper, lower in [(37, 41), (38, 40), (43, 47), (44, 46)]:
        middle, half = (points[upper] + points[lower]) / 2, (points[upper] - points[lower]) / 2
        moved[upper], moved[lower] = middle + share * half, middle - share * half
    return moved


def moving(points: Points, count: int = 5) -> Points:
    """The face turning and walking about, without expression."""
    centre = points.mean(axis=0)
    frames = []
    for t in range(count):
        turn = similarity(1 + 0.02 * t, 4.0 * t, (0, 0))
        frames.append(transform(turn, points - centre) + centre + [3.0 * t, -t])
    return np.stack(frames)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_face_is_driven_by_its_own_points(mode: str) -> None:
    source = person()
    driving = np.stack([source, with_mouth(source, 8), with_lids(source, 0.3), *moving(source)])
    assert np.allclose(adapt(source, driving, mode), driving, atol=1e-6)


@pytest.mark.parametrize("mode", ["canonical", "relative"])
def test_a_driver_who_holds_still_leaves_the_source_alone(mode: str) -> None:
    source, driver = person(), person(0.8, scale=45, degrees=10)
    adapted = adapt(source, np.stack([driver] * 4), mode)
    assert np.allclose(adapted, source, atol=1e-6)


def test_absolute_brings_the_drivers_shape() -> None:
    source, driver = person(), person(0.7)
    assert np.array_equal(adapt(source, driver[None], "absolute")[0], driver)


@pytest.mark.parametrize("mode", ["canonical", "relative"])
def test_a_wide_face_stays_wide_when_a_narrow_one_drives(mode: str) -> None:
    source, driver = person(1.0), person(0.75)
    driving = np.stack([driver, with_mouth(driver, 10), driver, driver])
    adapted = adapt(source, driving, mode)
    assert np.allclose(np.ptp(adapted[:, :17, 0], axis=1), np.ptp(source[:17, 0]), atol=1e-6)
    lip = adapted[1, 57, 1] - adapted[0, 57, 1]
    assert lip == pytest.approx(10 if mode == "canonical" else 10 / 0.75, rel=0.12)


def test_canonical_follows_turns_walks_and_approaches() -> None:
    source, driver = person(1.0), person(0.75)
    adapted = adapt(source, moving(driver))
    for t in range(5):
        found = fit_similarity(source, adapted[t])
        scale, angle = np.hypot(*found[:, 0]), np.degrees(np.arctan2(found[1, 0], found[0, 0]))
        assert scale == pytest.approx(1 + 0.02 * t, abs=1e-6)
        assert angle == pytest.approx(4.0 * t, abs=1e-5)
        assert np.allclose(transform(found, source), adapted[t], atol=1e-6)  # nothing but pose
    walked = adapted.mean(axis=1) - adapted[0].mean(axis=0)
    assert np.allclose(walked[4], [12, -4], atol=4)


def test_the_drivers_own_pose_on_request() -> None:
    source, driver = person(degrees=-15), person(0.75, scale=50, degrees=20)
    adapted = adapt(source, driver[None], pose="absolute")
    rigid = list(LAYOUTS[68].rigid)
    assert np.allclose(pose_of(adapted[0]), pose_of(driver), atol=6)
    assert np.allclose(adapted[0, rigid].mean(axis=0), driver[rigid].mean(axis=0), atol=4)
    # still the source's shape
    shape = fit_similarity(source, adapted[0])
    assert np.allclose(transform(shape, source), adapted[0], atol=1e-6)


@pytest.mark.parametrize("openness", [0.6, 1.0, 1.6])
def test_full_closure_maps_to_full_closure(openness: float) -> None:
    source = with_lids(person(), openness)
    driver = person(0.8, scale=50)
    shares = [1.0, 1.0, 0.5, 0.0, 1.0]
    adapted = adapt(source, np.stack([with_lids(driver, share) for share in shares]))
    for eye in range(2):
        rest = lid_gaps(source, eye)
        for t, share in enumerate(shares):
            assert np.allclose(lid_gaps(adapted[t], eye), rest * share, atol=1e-6)


def test_a_source_with_closed_eyes_can_open_them() -> None:
    source, driver = with_lids(person(), 0.0), person(0.8)
    shut = with_lids(driver, 0.0)
    adapted = adapt(source, np.stack([shut, shut, shut, driver]))
    for eye in range(2):
        assert np.allclose(lid_gaps(adapted[0], eye), 0, atol=1e-6)
        assert np.allclose(lid_gaps(adapted[3], eye), lid_gaps(driver, eye), atol=1e-6)


def test_pupils_look_where_the_driver_looks() -> None:
    source, driver = with_pupils(person()), with_pupils(person(0.8))
    looking = driver.copy()
    looking[68:, 0] += 3.0
    adapted = adapt(source, np.stack([driver, driver, looking]))
    moved = adapted[2] - adapted[0]
    assert (moved[68:, 0] > 2).all()
    assert np.allclose(moved[:68], 0, atol=1e-6)


def test_the_neutral_frame_is_what_the_face_does_most() -> None:
    face = person()
    frames = np.stack([with_mouth(face, y) for y in (14, 9, 0.1, 0, 0, 0.2, 12)])
    assert neutral_frame(frames) in (2, 3, 4, 5)


def test_a_driver_who_starts_with_an_open_mouth() -> None:
    source, driver = person(), person(0.8)
    driving = np.stack([with_mouth(driver, y) for y in (10, 0, 0, 0, 0)])
    canonical, relative = adapt(source, driving), adapt(source, driving, "relative")
    assert np.allclose(canonical[2], source, atol=1e-6)  # at rest the source is at rest
    assert canonical[0, 57, 1] - source[57, 1] > 8
    assert relative[2, 57, 1] < source[57, 1] - 8  # the known weakness of ``relative``


@pytest.mark.parametrize(
    ("source", "driving", "told"),
    [
        (np.zeros((68, 2)), np.zeros((2, 70, 2)), r"\(68, 2\) and driving \(2, 70, 2\)"),
        (np.zeros((68, 2)), np.zeros((68, 2)), "are not"),
        (np.zeros((68, 2)), np.zeros((0, 68, 2)), "are not"),
        (np.zeros((5, 2)), np.zeros((1, 5, 2)), "5 landmarks"),
        (np.zeros((68, 2)), np.full((1, 68, 2), np.nan), "not finite"),
    ],
)
def test_landmarks_that_do_not_fit(source: Points, driving: Points, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        adapt(source, driving)


def test_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="no mode called 'free'"):
        adapt(person(), person()[None], "free")
