"""Boxes, windows and warps against brute force, analytic pictures and the symmetries they must have."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.transform import SimilarityTransform

from pipelines import geometry
from pipelines.geometry import FLIP_68, compose, invert, square_matrix, transform, warp


def face(eyes: float = 100.0, mouth: float = 116.0) -> np.ndarray:
    """A frontal 68-point face: eye centres ``eyes`` apart about the origin, mouth ``mouth`` below."""
    points = np.zeros((68, 2))
    angles = np.linspace(np.pi, 0, 17)
    points[:17] = np.stack([np.cos(angles) * 105, np.sin(angles) * 175 + 10], axis=1)
    points[17:27] = np.stack([np.linspace(-85, 85, 10), np.full(10, -35.0)], axis=1)
    points[27:31] = np.stack([np.zeros(4), np.linspace(0, 70, 4)], axis=1)
    points[31:36] = np.stack([np.linspace(-20, 20, 5), np.full(5, 80.0)], axis=1)
    eye = np.array([[-18, 0], [-7, -7], [7, -7], [18, 0], [7, 7], [-7, 7]], dtype=float)
    points[36:42], points[42:48] = eye - (eyes / 2, 0), eye + (eyes / 2, 0)  # noqa: RUF005
    turn = np.linspace(0, 2 * np.pi, 13)[:-1]
    points[48:60] = np.stack([-np.cos(turn) * 40, mouth - np.sin(turn) * 14], axis=1)
    turn = np.linspace(0, 2 * np.pi, 9)[:-1]
    points[60:68] = np.stack([-np.cos(turn) * 30, mouth - np.sin(turn) * 6], axis=1)
    return points


def similarity(scale: float, angle: float, shift: tuple[float, float] = (0, 0)) -> np.ndarray:
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([linear, shift])


def box_of(points: np.ndarray) -> np.ndarray:
    """A tight box as a detector would draw it around these points."""
    centre, side = (points.min(axis=0) + points.max(axis=0)) / 2, np.ptp(points, axis=0).max()
    return np.array([*(centre - side / 2), *(centre + side / 2)])


def render(picture, matrix, size, samples=12) -> np.ndarray:
    """What a window of an analytic picture must show: its mean over every window pixel, by supersampling."""
    width, height = size
    x, y = (np.arange(n * samples) / samples + 0.5 / samples for n in (width, height))
    points = transform(invert(matrix), np.stack(np.meshgrid(x, y), axis=-1))
    values = picture(points[..., 0], points[..., 1])
    return values.reshape(height, samples, width, samples).mean(axis=(1, 3))


IDENTITY = np.eye(2, 3)


def test_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 20, (2, 12, 2, 2))
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    grid = np.zeros((2, 12, 20, 20), dtype=bool)
    for side in range(2):
        for i, (left, top, right, bottom) in enumerate(boxes[side]):
            grid[side, i, top:bottom, left:right] = True
    both = (grid[0][:, None] & grid[1][None]).sum(axis=(2, 3))
    either = (grid[0][:, None] | grid[1][None]).sum(axis=(2, 3))
    expected = np.where(either > 0, both / np.maximum(either, 1), 0)
    np.testing.assert_allclose(geometry.iou(*boxes), expected)
    assert geometry.iou(np.zeros((0, 4)), boxes[0]).shape == (0, 12)


def test_scaled_boxes_keep_their_centre_and_shape():
    box = np.array([10.0, 20, 50, 100])
    np.testing.assert_allclose(geometry.scale_boxes(box, 1.5), [0, 0, 60, 120])
    np.testing.assert_allclose(geometry.scale_boxes(geometry.scale_boxes(box, 1.7), 1 / 1.7), box)


def test_boxes_are_interpolated_linearly_and_held_at_the_ends():
    boxes = [[0, 0, 10, 10], [10, 20, 30, 40]]
    found = geometry.interpolate_boxes([1.0, 2.0], boxes, [0.0, 1.25, 2.0, 9.0])
    np.testing.assert_allclose(found, [boxes[0], [2.5, 5, 15, 17.5], boxes[1], boxes[1]])


def test_fit_similarity_equals_skimage_and_recovers_the_transform():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(5, 2)) * 50
    exact = similarity(1.7, 0.6, (30, -4))
    np.testing.assert_allclose(
        geometry.fit_similarity(points, transform(exact, points)), exact, atol=1e-9
    )
    noisy = transform(exact, points) + rng.normal(size=(5, 2))
    reference = SimilarityTransform.from_estimate(points, noisy).params[:2]
    np.testing.assert_allclose(geometry.fit_similarity(points, noisy), reference, atol=1e-9)
    with pytest.raises(ValueError, match="coincide"):
        geometry.fit_similarity(np.ones((3, 2)), np.ones((3, 2)))


def test_transforms_compose_and_invert():
    first, second = similarity(2.0, 0.3, (5, 6)), similarity(0.7, -1.1, (-8, 1))
    points = np.random.default_rng(2).normal(size=(4, 3, 2))
    np.testing.assert_allclose(
        transform(compose(second, first), points), transform(second, transform(first, points))
    )
    np.testing.assert_allclose(compose(invert(first), first), IDENTITY, atol=1e-12)


def test_square_matrix_maps_the_corners_of_a_turned_square():
    matrix = square_matrix((100, 50), 40, np.pi / 2, 512)
    np.testing.assert_allclose(transform(matrix, (100, 50)), (256, 256))
    # the square's x axis points down in the frame, so what is 20 px below the centre is at the right edge
    np.testing.assert_allclose(transform(matrix, (100, 70)), (512, 256), atol=1e-9)
    assert geometry.window_side(matrix, 512) == pytest.approx(40)


def test_heser_window_of_a_frontal_face():
    points = face(eyes=100, mouth=116)
    matrix = geometry.heser_window(points, 512)
    assert geometry.window_side(matrix, 512) == pytest.approx(820)
    left, right, _ = geometry.face_parts(transform(matrix, points))
    np.testing.assert_allclose((left + right) / 1024, (0.5, 0.378), atol=0.003)
    # a profile's eyes are close together: the distance to the mouth decides
    narrow = geometry.heser_window(face(eyes=40, mouth=116), 512)
    assert geometry.window_side(narrow, 512) == pytest.approx(6.9 * 116)
    assert geometry.window_side(geometry.heser_window(points, 512, 1.25), 512) == pytest.approx(
        1025
    )


def test_impl_and_lpd_windows_have_the_published_size():
    points = face()
    hull = np.ptp(points, axis=0).max()
    assert geometry.window_side(geometry.impl_window(points, 512), 512) == pytest.approx(1.8 * hull)
    # 2.36 hulls (spec): a tight box is 1.01 hulls wide on dlib's landmarks
    lpd = geometry.lpd_window([0, 0, 101, 101], 256)
    assert geometry.window_side(lpd, 256) / 100 == pytest.approx(2.36, abs=0.05)


@settings(max_examples=40, deadline=None)
@given(
    angle=st.floats(-1.2, 1.2),
    scale=st.floats(0.2, 5),
    x=st.floats(-500, 500),
    y=st.floats(-500, 500),
)
def test_moving_the_frame_moves_the_window_with_the_face(angle, scale, x, y):
    moved_frame = similarity(scale, angle, (x, y))
    points, moved = face(), transform(moved_frame, face())
    for rule in (geometry.heser_window, geometry.impl_window):
        if rule is geometry.impl_window:  # its anchor is an upright hull, so the frame may not turn
            moved = transform(similarity(scale, 0.0, (x, y)), face())
        np.testing.assert_allclose(
            transform(rule(moved, 512), moved), transform(rule(points, 512), points), atol=1e-6
        )
    left, right, _ = geometry.face_parts(transform(geometry.heser_window(moved, 512), moved))
    assert left[1] == pytest.approx(right[1], abs=1e-6)
    assert left[0] < right[0]


def test_the_window_of_a_mirrored_face_is_the_mirrored_window():
    width = 640
    points = transform(similarity(1.3, 0.2, (300, 200)), face())
    points[:, 0] += np.random.default_rng(3).normal(size=68) * 3
    mirrored = ([width, 0] + points * [-1, 1])[FLIP_68]
    box, mirrored_box = box_of(points), box_of(mirrored)
    windows = [
        (geometry.heser_window(points, 512), geometry.heser_window(mirrored, 512)),
        (geometry.impl_window(points, 512), geometry.impl_window(mirrored, 512)),
        (geometry.lpd_window(box, 512), geometry.lpd_window(mirrored_box, 512)),
        (geometry.fomm_window([box], 512), geometry.fomm_window([mirrored_box], 512)),
    ]
    for straight, flipped in windows:
        seen = ([512, 0] + transform(straight, points) * [-1, 1])[FLIP_68]
        np.testing.assert_allclose(transform(flipped, mirrored), seen, atol=1e-6)


def test_flip_swaps_the_eyes_and_undoes_itself():
    np.testing.assert_array_equal(FLIP_68[FLIP_68], np.arange(68))
    assert set(FLIP_68[36:42]) == set(range(42, 48))
    flipped = (face() * [-1, 1])[FLIP_68]
    np.testing.assert_allclose(flipped[36:48], face()[36:48])


def test_fomm_window_is_one_upright_square_around_all_boxes():
    boxes = np.array([[100.0, 100, 200, 200], [160, 120, 270, 230], [90, 140, 180, 230]])
    matrix = geometry.fomm_window(boxes, 256)
    assert matrix[0, 1] == matrix[1, 0] == 0
    assert matrix[0, 0] == matrix[1, 1]
    seen = transform(matrix, geometry.wider_boxes(boxes).reshape(-1, 2))
    reach = np.ptp(seen, axis=0).max()
    assert seen.min() > 0
    assert seen.max() < 256
    assert reach == pytest.approx(256 / 1.2)  # 10 % to spare on either side, along the longer axis


@pytest.mark.parametrize(
    ("centre", "angle"), [((50, 40), 0.0), ((0, 0), 0.0), ((95, 10), 0.7), ((50, -30), 1.3)]
)
def test_inside_share_equals_counting_points(centre, angle):
    matrix = square_matrix(centre, 60, angle, 300)
    grid = np.stack(np.meshgrid(np.arange(300) + 0.5, np.arange(300) + 0.5), axis=-1)
    seen = transform(invert(matrix), grid)
    inside = ((seen >= 0) & (seen <= (100, 80))).all(axis=-1).mean()
    assert geometry.inside_share(matrix, (300, 300), (100, 80)) == pytest.approx(inside, abs=4e-3)


def test_inside_share_is_exact():
    assert geometry.inside_share(square_matrix((50, 50), 60, 0.4, 512), (512, 512), (100, 100)) == 1
    corner = square_matrix((0, 100), 40, 0.0, 512)
    assert geometry.inside_share(corner, (512, 512), (100, 100)) == pytest.approx(0.25, abs=1e-12)
    around = square_matrix((50, 50), 200, 0.0, 512)  # the frame lies inside the window
    assert geometry.inside_share(around, (512, 512), (100, 100)) == pytest.approx(0.25, abs=1e-12)
    diamond = square_matrix((0, 50), 20 * 2**0.5, np.pi / 4, 512)
    assert geometry.inside_share(diamond, (512, 512), (100, 100)) == pytest.approx(0.5, abs=1e-12)
    away = square_matrix((-300, 50), 60, 0.1, 512)
    assert geometry.inside_share(away, (512, 512), (100, 100)) == 0


PICTURES = {
    "smooth": lambda x, y: 127 + 60 * np.sin(x / 20) + 60 * np.cos(y / 17),
    # stripes 5 px apart: shrinking must grey them, not fold them into new stripes
    "fine": lambda x, y: 127 + 100 * np.sin(2 * np.pi * (x + y) / 5),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("side", "angle"), [(60, 0.0), (128, 0.2), (190, 0.3), (330, -0.4)])
def test_warp_shows_the_mean_of_an_analytic_picture(picture, side, angle):
    frame = render(PICTURES[picture], IDENTITY, (480, 480), 4).round().astype(np.uint8)
    matrix = square_matrix((240, 240), side, angle, 128)
    found = warp(np.repeat(frame[..., None], 3, axis=2), matrix, (128, 128))
    assert found.shape == (128, 128, 3)
    expected = render(PICTURES[picture], matrix, (128, 128))
    error = np.abs(found[..., 0] - expected)
    if picture == "fine":
        # of a contrast of 100 bicubic weights lose up to 5; plain bilinear sampling errs by 20 to 60 when shrinking
        assert error.mean() < 5
    else:
        assert error.mean() < 0.6
        assert error.max() < 3


@pytest.mark.parametrize("side", [31.7, 64.0, 101.3, 250.9])
def test_warp_keeps_positions_to_a_fiftieth_of_a_pixel(side):
    centre = np.array([130.3, 121.8])

    def blob(x, y):
        return 250 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * (side / 12) ** 2))

    frame = render(blob, IDENTITY, (256, 256), 3).round().astype(np.uint8)
    matrix = square_matrix((128, 124), side, 0.35, 64)
    window = warp(frame, matrix, (64, 64)).astype(np.float64)
    grid = np.arange(64) + 0.5
    found = np.array([window.sum(axis=0) @ grid, window.sum(axis=1) @ grid]) / window.sum()
    np.testing.assert_allclose(found, transform(matrix, centre), atol=0.02)


def test_warp_without_motion_copies_and_outside_is_black():
    image = np.random.default_rng(4).integers(1, 256, (40, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(warp(image, IDENTITY, (50, 40)), image)
    moved = warp(image, np.array([[1.0, 0, -10], [0, 1, 5]]), (60, 60))
    np.testing.assert_array_equal(moved[5:45, :40], image[:, 10:])
    assert not moved[:5].any()
    assert not moved[45:].any()
    assert not moved[:, 40:].any()


def test_shrinking_by_a_whole_number_is_the_mean_of_blocks():
    image = np.random.default_rng(5).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    found = warp(image, np.array([[1 / 3, 0, 0], [0, 1 / 3, 0]]), (30, 20))
    blocks = image.reshape(20, 3, 30, 3, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(found, blocks, atol=0.51)


@pytest.mark.parametrize("side", [90.0, 128.0])
def test_crop_then_paste_back_is_the_identity(side):
    photo = cv2.GaussianBlur(
        np.random.default_rng(6).integers(0, 256, (160, 200, 3), dtype=np.uint8), (0, 0), 3
    )
    matrix = square_matrix((105, 82), side, 0.25, 128)
    window = warp(photo, matrix, (128, 128))
    alpha = np.zeros((128, 128), dtype=np.float32)
    alpha[8:-8, 8:-8] = 1
    pasted = geometry.paste_back(photo, window, matrix, alpha)
    error = np.abs(pasted.astype(int) - photo)
    assert error.max() <= 2
    y, x = np.mgrid[:160, :200] + 0.5
    seen = transform(matrix, np.stack([x, y], axis=-1))
    outside = ((seen < 4) | (seen > 124)).any(axis=-1)
    assert not error[outside].any()


@pytest.mark.parametrize(("side", "angle"), [(24.0, 0.0), (90.0, 0.4), (150.0, -0.8)])
def test_paste_back_is_what_mixing_whole_frames_gives(side, angle):
    """It works on the part that alpha can reach; the whole frame warped says what must come out, wherever alpha ends."""
    draw = np.random.default_rng(8)
    frame, window = (draw.integers(0, 256, (n, n, 3), dtype=np.uint8) for n in (160, 64))
    matrix = square_matrix((83.3, 71.7), side, angle, 64)
    alpha = np.zeros((64, 64), dtype=np.float32)
    alpha[20:45, 11:50] = draw.uniform(0.2, 1, (25, 39))
    cover = alpha[..., None]
    both = warp(np.dstack([window * cover, cover]), invert(matrix), (160, 160))
    mixed = frame * (1 - both[..., 3:]) + both[..., :3]
    expected = np.clip(mixed.round(), 0, 255)
    pasted = geometry.paste_back(frame, window, matrix, alpha)
    assert np.abs(pasted - expected).max() <= 1


def test_a_tight_box_of_points_and_the_wider_box_reach_higher_than_the_points():
    """Both are of the forehead, too: dlib's box and WIDER FACE's are centred above the 68 points, and not beside them."""
    points = face()
    low, high = points.min(axis=0), points.max(axis=0)
    tight = geometry.landmark_boxes(points)
    centre = (tight[:2] + tight[2:]) / 2
    assert centre[0] == pytest.approx((low[0] + high[0]) / 2)
    side = tight[2] - tight[0]
    assert centre[1] == pytest.approx((low[1] + high[1]) / 2 - 0.077 * side)
    assert geometry.wider_boxes([0, 0, 100, 100]) == pytest.approx([3.5, -21.3, 96.5, 106.7])


def test_paste_back_replaces_exactly_what_alpha_says():
    frame = np.full((80, 80, 3), 200, dtype=np.uint8)
    matrix = square_matrix((40, 40), 32, 0.0, 64)
    alpha = np.zeros((64, 64), dtype=np.float32)
    alpha[16:48, 16:48] = 1
    pasted = geometry.paste_back(frame, np.full((64, 64, 3), 40, np.uint8), matrix, alpha)
    assert (pasted[34:46, 34:46] == 40).all()
    assert (
        pasted[32:48, 32:48].max() < 130
    )  # no bright or dark rim: colours and alpha fade together
    untouched = np.ones((80, 80), dtype=bool)
    untouched[31:49, 31:49] = False
    assert (pasted[untouched] == 200).all()
    assert pasted.min() >= 40
