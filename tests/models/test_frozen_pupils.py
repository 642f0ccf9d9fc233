"""Pupils: drawn eyes whose gaze is known, mirrors and turns, real faces against another way to find an iris, eyes that shut."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from models.frozen.chips import Floats, square_matrix, transform, warp
from models.frozen.detector import load_detector
from models.frozen.landmarks import load_landmarker
from models.frozen.pupils import (
    EYES,
    LOWER_LID,
    UPPER_LID,
    PupilFinder,
    eye_window,
    opening,
    outside,
    share,
)
from models.motion.layout import FLIP_68, with_pupils
from pipelines.follower import read_picture
from pipelines.video import Decoder, probe
from tests.eyes import drawn, iris_by_gradients
from tests.faces import FACE_68
from tests.material import SHARED, needs_shared

GAZES = [(0.0, 0.0), (-0.2, 0.0), (0.2, 0.0), (-0.12, -0.05), (0.12, 0.06), (0.0, 0.07), (0.0, -0.07)]  # fmt: skip


@pytest.fixture(scope="module")
def finder(iris_weights: Path) -> PupilFinder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRAY_WEIGHTS", str(iris_weights))
        return PupilFinder()


def eye_width(points: Floats) -> float:
    return float(np.hypot(*(points[39] - points[36])))


# --------------------------------------------------------------------------------------------- drawn eyes


def test_drawn_eyes_look_where_they_were_made_to_look(finder: PupilFinder) -> None:
    errors, ahead = [], []
    for gaze in GAZES:
        image, points, pupils = drawn(gaze)
        found = finder.locate([image], points[None])
        assert found.seen.tolist() == [[1.0, 1.0]]
        lids = with_pupils(points)[68:]
        errors.append(np.linalg.norm(found.points[0] - pupils, axis=1) / eye_width(points))
        ahead.append(np.linalg.norm(lids - pupils, axis=1) / eye_width(points))
    assert np.max(errors) < 0.1, errors
    assert np.mean(errors) < 0.04, errors
    assert np.mean(errors) < np.mean(ahead) / 3


def test_a_gaze_that_moves_is_followed(finder: PupilFinder) -> None:
    across = 0.15 * np.sin(np.arange(12) / 12 * 2 * np.pi)
    found = []
    for gaze in across:
        image, points, _ = drawn((gaze, 0.0), 192)
        pupils = finder.locate([image], points[None]).points[0]
        found.append((pupils - with_pupils(points)[68:])[:, 0] / eye_width(points))
    for eye in np.transpose(found):
        assert np.corrcoef(eye, across)[0, 1] > 0.99
        assert 0.6 < np.polyfit(across, eye, 1)[0] < 1.2


def test_a_mirrored_face_has_mirrored_pupils(finder: PupilFinder) -> None:
    image, points, _ = drawn((0.12, 0.03))
    mirrored = np.column_stack([256 - points[FLIP_68, 0], points[FLIP_68, 1]])
    one = finder.locate([image], points[None]).points[0]
    other = finder.locate([np.ascontiguousarray(image[:, ::-1])], mirrored[None]).points[0]
    back = np.column_stack([256 - other[::-1, 0], other[::-1, 1]])
    np.testing.assert_allclose(back, one, atol=1e-3)


def test_a_turned_and_enlarged_face_has_its_pupils_turned_and_enlarged(
    finder: PupilFinder,
) -> None:
    image, points, _ = drawn((-0.1, 0.02))
    matrix = square_matrix((128, 100), 180, 0.4, 400)
    turned = warp(image, matrix, (400, 400))
    one = finder.locate([image], points[None]).points[0]
    other = finder.locate([turned], transform(matrix, points)[None]).points[0]
    off = np.linalg.norm(other - transform(matrix, one), axis=1)
    assert off.max() < 0.02 * eye_width(points) * 400 / 180


def test_a_face_is_alone_whoever_is_looked_at_beside_it(finder: PupilFinder) -> None:
    made = [drawn(gaze, 160) for gaze in GAZES]
    images, faces = [image for image, _, _ in made], np.stack([points for _, points, _ in made])
    together = finder.locate(images, faces)
    assert together.points.shape == (len(GAZES), 2, 2)
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda pair: finder.locate(*pair), [([i], f[None]) for i, f in zip(images, faces, strict=True)]))  # fmt: skip
    np.testing.assert_array_equal(np.concatenate([one.points for one in alone]), together.points)
    nobody = finder.locate([], np.zeros((0, 68, 2)))
    assert nobody.points.shape == (0, 2, 2)
    assert nobody.seen.shape == (0, 2)


@pytest.mark.parametrize(
    "points",
    [np.full((68, 2), 20.0), FACE_68 * 4 + 20, FACE_68 * 100 - 500],
    ids=["one point", "tiny", "outside"],
)
def test_hopeless_eyes_still_have_pupils_between_their_lids(
    finder: PupilFinder, points: Floats
) -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    found = finder.locate([image], points[None])
    assert np.isfinite(found.points).all()
    lids = with_pupils(points)[68:]
    assert np.abs(found.points[0] - lids).max() <= max(eye_width(points), 1.0)


# --------------------------------------------------------------------------------------------- its parts


def test_the_square_that_is_shown_is_mediapipes() -> None:
    """2.3 eye widths around the middle of the corners, which lie level."""
    eye = transform(square_matrix((3, 4), 0.1, 0.3, 70), FACE_68[EYES[0]])
    shown = transform(eye_window(eye), eye)
    np.testing.assert_allclose((shown[0] + shown[3]) / 2, [32, 32], atol=1e-9)
    np.testing.assert_allclose(shown[3] - shown[0], [64 / 2.3, 0], atol=1e-9)


def test_an_opening_is_the_widest_gap_in_eye_widths() -> None:
    lids = np.zeros((71, 2))
    lids[LOWER_LID] = np.column_stack([np.linspace(15, 45, 7), np.full(7, 32.0)])
    lids[UPPER_LID] = lids[LOWER_LID] - [0, 4]
    lids[12, 1] -= 4
    assert opening(lids) == pytest.approx(8 * 2.3 / 64)


def test_outside_is_measured_from_the_lids() -> None:
    width = 64 / 2.3
    eye = np.array([[0, 0], [8, -5], [20, -5], [width, 0], [20, 5], [8, 5]]) + 20
    assert outside(eye, np.array([34.0, 20.0])) < 0
    assert outside(eye, eye[3] + [0.25 * width, 0]) == pytest.approx(0.25)


def test_trust_fades() -> None:
    assert [share(value, 1, 3) for value in (0, 1, 2, 3, 4)] == [0, 0, 0.5, 1, 1]


# --------------------------------------------------------------------------------------------- real faces


def faces() -> Iterator[tuple[NDArray[np.uint8], Floats]]:
    """The photographs, not above 1,000 px, and the points of their largest faces."""
    detector, landmarker = load_detector("dlib", 150), load_landmarker("dlib")
    for path in sorted((SHARED / "photos").glob("*.jpg")):
        image = read_picture(str(path))
        scale = min(1.0, 1000 / max(image.shape))
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        boxes = detector.detect(image)[:, :4]
        box = boxes[np.argmax(boxes[:, 2] - boxes[:, 0])]
        yield image, landmarker.locate(image, box[None])[0].astype(np.float64)


@needs_shared
@pytest.mark.real
def test_real_pupils_are_where_gradients_say(finder: PupilFinder) -> None:
    """18 photographs: in each eye the pupil lies between the lids, and nearer to the iris by gradients than the lids' middle."""
    off, ahead = [], []
    for image, points in faces():
        found = finder.locate([image], points[None])
        assert found.seen.min() == 1
        for pupil, eye in zip(found.points[0], points[EYES], strict=True):
            assert cv2.pointPolygonTest(eye.astype(np.float32), pupil.tolist(), False) > 0
            width, iris = np.hypot(*(eye[3] - eye[0])), iris_by_gradients(image, eye)
            off.append(np.hypot(*(pupil - iris)) / width)
            ahead.append(np.hypot(*(eye.mean(axis=0) - iris)) / width)
    assert len(off) == 36
    assert np.mean(np.less(off, ahead)) > 0.9
    assert np.median(off) < 0.06 < 0.1 < np.median(ahead)


@needs_shared
@pytest.mark.real
def test_a_shut_eye_has_no_pupil(finder: PupilFinder) -> None:
    """A clip that begins with shut eyes, which open at its 19th frame."""
    clip = SHARED / "videos" / "franck_a.mp4"
    detector, landmarker = load_detector("dlib", 80), load_landmarker("dlib")
    seen = {}
    with Decoder() as decoder:
        for frame in decoder.read(clip, probe(clip), ranges=[(0, 26)], images={0, 5, 15, 25}):
            if frame.image is not None:
                boxes = detector.detect(frame.image)[:1, :4]
                points = landmarker.locate(frame.image, boxes)
                found = finder.locate([frame.image], points)
                seen[frame.index] = found.seen[0]
                middles = with_pupils(points[0])[68:]
                off = np.linalg.norm(found.points[0] - middles, axis=1) / eye_width(points[0])
                assert (off > 0.02).all() == (frame.index == 25), (frame.index, off)
    assert np.max([seen[index] for index in (0, 5, 15)]) < 0.1
    assert (seen[25] == 1).all()
