"""Which landmarks are believed, what a window and its scores are, and which tracks are kept."""

from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

from models.frozen.detector import load_detector
from models.frozen.landmarks import load_landmarker
from pipelines import crops, snapshots
from pipelines.crops import SCORE_COLUMNS, CropsConfig, LandmarkGate
from pipelines.geometry import box_sizes, invert, transform, warp, wider_boxes, window_side
from pipelines.schema import Cause, Track, Video, from_row, npy_array, to_row
from pipelines.video import Decoder, probe
from tests.clips import encode, moving
from tests.material import SHARED, needs_shared
from tests.pipelines.test_geometry import box_of, face, similarity

FACE = np.array([179.0, 83, 267, 171])
"""The astronaut's face in her portrait, a tight box."""
SIZE = (640, 480)
FRAMES = 12


@pytest.fixture(scope="module")
def landmarker():
    return load_landmarker("dlib")


@pytest.fixture(scope="module")
def astronaut(tmp_path_factory) -> tuple[Video, list[np.ndarray]]:
    """A clip of the portrait drifting and tilting, with its true boxes; and the frames before encoding."""
    turns = np.linspace(-0.15, 0.15, FRAMES)
    middle = similarity(1.8, 0.0, (300 - 1.8 * 223, 200 - 1.8 * 127))
    matrices = [
        similarity(1 + i / 200, turn, (3 * i, 2 * i)) @ np.vstack([middle, [0, 0, 1]])
        for i, turn in enumerate(turns)
    ]
    frames = list(moving(skimage.data.astronaut(), matrices, SIZE))
    path = encode(
        tmp_path_factory.mktemp("clip") / "astronaut.mp4", frames, fps=25, options={"crf": "8"}
    )
    boxes = tuple(tuple(_moved(matrix, FACE)) for matrix in matrices)
    info = probe(path)
    track = Track(
        name="000",
        span="00001",
        times=tuple(i / 25 for i in range(FRAMES)),
        indices=tuple(range(FRAMES)),
        boxes=boxes,
        box_scores=tuple(0.5 + i / 100 for i in range(FRAMES)),
    )
    video = Video(
        identity="eileen", video="portrait", blob=str(path), probe=asdict(info), tracks=(track,)
    )
    return video, frames


def _moved(matrix: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The upright square of the same area around a moved box's centre."""
    centre = transform(matrix, (box[:2] + box[2:]) / 2)
    half = (box[2] - box[0]) / 2 * np.sqrt(np.linalg.det(matrix[:, :2]))
    return np.array([*(centre - half), *(centre + half)])


@pytest.fixture(scope="module")
def cut(landmarker):
    """The stage with one decoder for all tests, and gates that the portrait passes."""
    with Decoder() as decoder:

        def run(video, landmarker=landmarker, **options):
            return crops.cut(video, decoder, landmarker, CropsConfig(min_inside=0.2, **options))

        yield run


def picture(data: bytes) -> np.ndarray:
    return cv2.cvtColor(
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
    )


# ------------------------------------------------------------------------------------------ landmarks believed


def test_a_face_is_plausible_at_any_size_and_place():
    for matrix in (
        similarity(1, 0),
        similarity(0.2, 0.5, (300, 80)),
        similarity(4, -0.9, (9, 900)),
    ):
        points = transform(matrix, face())
        assert crops.implausible(points, box_of(points), LandmarkGate()) == ""


def test_a_head_that_is_turned_away_is_narrow_and_still_a_face():
    points = face()
    assert crops.implausible(points * [0.6, 1], box_of(points), LandmarkGate()) == ""


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: np.where(np.arange(68)[:, None] == 8, np.nan, p), "not finite"),
        (
            lambda p: p * np.where(np.isin(np.arange(68), range(36, 48))[:, None], [0.1, 1], 1),
            "apart",
        ),
        (lambda p: p[::1] * [-1, -1], "turned by"),
        (lambda p: transform(similarity(1, 1.2), p), "turned by 69"),
        (lambda p: transform(similarity(1, -1.2), p), "turned by -69"),
        (lambda p: p * [-1, 1], "turned by"),  # left and right exchanged
        (lambda p: p * np.where(np.arange(68)[:, None] == 8, [1, -1], 1), "out of order"),
        (lambda p: p * np.where(np.arange(68)[:, None] >= 48, [1, 0.4], 1), "out of order"),
        (
            lambda p: p + np.where(np.isin(np.arange(68), range(27, 31))[:, None], [140, 0], 0),
            "jaw",
        ),
        (lambda p: (p - p.mean(axis=0)) * 0.5 + p.mean(axis=0), "span"),
        (lambda p: (p - p.mean(axis=0)) * 1.6 + p.mean(axis=0), "span"),
        (lambda p: p + np.array([160, 0]), "off the centre"),
        (
            lambda p: np.where(
                np.isin(np.arange(68), range(36, 42))[:, None],
                (p + np.array([50, 0])) * [0.2, 1] - [50, 0],
                p,
            ),
            "wide",
        ),
    ],
)
def test_points_that_are_no_face_are_not_believed(spoil, reason):
    points = face()
    assert reason in crops.implausible(spoil(points), box_of(points), LandmarkGate())


# ------------------------------------------------------------------------------------------------ one frame


def sheet_of(count: int, **options) -> tuple[crops.Sheet, Video]:
    """A sheet of a drawn face in ``count`` frames, none added yet; small windows."""
    points = transform(similarity(1, 0, (320, 200)), face())
    box = tuple(box_of(points).tolist())
    track = Track(
        name="000",
        span="a",
        times=tuple(i / 25 for i in range(count)),
        indices=tuple(range(count)),
        boxes=(box,) * count,
        box_scores=(1.0,) * count,
    )
    video = Video(identity="a", video="b", tracks=(track,))
    config = CropsConfig(**({"size": 32, "min_window": 1.0, "min_inside": 0.0} | options))
    return crops.Sheet(video, track, config), video


BLACK = np.zeros((480, 640, 3), np.uint8)
DRAWN = transform(similarity(1, 0, (320, 200)), face())


@pytest.mark.parametrize("place", [(560, 200), (320, 420)])
def test_the_share_inside_is_of_a_picture_that_is_wider_than_high(place):
    """A window of 328 px that reaches over the right or the lower edge."""
    sheet, _ = sheet_of(1)
    points = transform(similarity(0.4, 0, place), face())
    sheet.searched[0] = box_of(points)
    sheet.add(0, BLACK, points)
    low, high = transform(invert(sheet.matrices[0]), [[0, 0], [32, 32]])
    width, height = np.clip(high, 0, [640, 480]) - np.clip(low, 0, [640, 480])
    assert sheet.scores[0][1] == pytest.approx(width * height / np.prod(high - low))
    assert sheet.scores[0][1] < 0.9


@pytest.mark.parametrize("gate", ["min_window", "min_inside", "min_frames"])
def test_a_track_at_a_gate_passes_and_just_below_fails(gate):
    def close(**options):
        sheet, video = sheet_of(9, **options)
        for i in range(9):
            sheet.add(i, BLACK, DRAWN)
        return sheet.close(video)[0]

    found = close(min_frames=1)
    exact = {"min_frames": 9} | {
        name: found.scores[name.removeprefix("min_").replace("window", "window_side")]
        for name in ("min_window", "min_inside")
    }
    more = {
        "min_frames": 10,
        "min_window": exact["min_window"] + 0.01,
        "min_inside": exact["min_inside"] + 0.001,
    }
    assert close(**{gate: exact[gate]}).state == "open"
    assert close(**{gate: more[gate]}).state == "rejected"


def test_scores_of_a_track_are_medians():
    sheet, video = sheet_of(9)
    for i in range(9):
        sheet.add(
            i,
            BLACK,
            transform(similarity(1.3 if i < 3 else 1, 0, (0, 0)), DRAWN - 320) + 320
            if i < 3
            else DRAWN,
        )
    track, members = sheet.close(video)
    sides = npy_array(dict(members)["a-b-000.scores.npy"])[:, 0]
    assert track.scores["window_side"] == pytest.approx(sorted(sides)[4], abs=1e-3)
    assert sides.max() > 1.2 * sides.min()


def test_max_bad_is_a_share_of_all_frames():
    """Of 20 frames 2 are a tenth."""
    for bad, state in ((2, "open"), (3, "rejected")):
        sheet, video = sheet_of(20, smooth=True, max_bad=0.1, min_frames=2)
        for i in range(bad, 20):
            sheet.look(i, DRAWN)
        sheet.steady()
        for i in range(20):
            sheet.add(i, BLACK, DRAWN)
        assert sheet.close(video)[0].state == state


def test_boxes_of_the_second_pass_are_those_of_their_own_frames():
    """The face moves 10 px a frame, and one frame of the first pass is not believed."""
    sheet, _ = sheet_of(14, smooth=True)
    steps = np.arange(14)[:, None] * [10.0, 0, 10, 0]
    sheet.boxes += steps
    sheet.searched += steps
    detected = sheet.boxes.copy()
    for i in range(14):
        sheet.look(i, DRAWN * [-1, 1] if i == 4 else DRAWN + np.array([10 * i, 0]))
    sheet.steady()
    np.testing.assert_allclose(sheet.searched, detected, atol=2)


def test_with_smoothing_windows_follow_the_smoothed_first_pass_and_the_second_pass_decides():
    sheet, video = sheet_of(12, smooth=True, max_bad=0.5)
    draw = np.random.default_rng(4)
    for i in range(12):
        sheet.look(i, DRAWN + draw.normal(0, 3, (68, 2)))
    sheet.steady()
    for i in range(12):
        sheet.add(i, BLACK, DRAWN * [-1, 1] if i == 5 else DRAWN + draw.normal(0, 3, (68, 2)))
    guides = [
        crops.frame_window(sheet.guides[i], sheet.searched[i], sheet.config)
        for i in range(12)
        if i != 5
    ]
    np.testing.assert_allclose(np.array(sheet.matrices), guides)
    track, members = sheet.close(video)
    assert 5 not in track.indices
    assert len(track.indices) == 11 == len(npy_array(dict(members)["a-b-000.matrix.npy"]))


def test_sharpness_falls_with_blur_and_looks_at_the_box_only():
    image = skimage.data.astronaut()
    blurred = cv2.GaussianBlur(image, (0, 0), 2)
    assert crops.sharpness(blurred, FACE) < crops.sharpness(image, FACE) / 3
    elsewhere = blurred.copy()
    left, top, right, bottom = FACE.astype(int)
    elsewhere[top:bottom, left:right] = image[top:bottom, left:right]
    assert crops.sharpness(elsewhere, FACE) == pytest.approx(crops.sharpness(image, FACE))
    assert crops.sharpness(image, np.array([-50.0, -50, -10, -10])) == 0


def test_jpegs_are_reproducible_and_keep_the_resolution_of_colour():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = (200, 60, 60)
    stripes[:, 1::2] = (60, 60, 200)  # equal in brightness, so 4:2:0 would lose them
    data = crops.encode(stripes, 95)
    assert data == crops.encode(stripes.copy(), 95)
    assert np.abs(picture(data).astype(int) - stripes).mean() < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size must be between 16 and 4096 pixels, got 8"),
        ({"jpeg_quality": 101}, "jpeg_quality"),
        ({"crop_scale": 0}, "crop_scale"),
        ({"min_inside": 1.5}, "min_inside"),
        ({"min_frames": 0}, "min_frames"),
    ],
)
def test_a_config_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CropsConfig(**options)


# ------------------------------------------------------------------------------------------------ one video


def test_a_track_becomes_members_that_agree_with_its_frames(astronaut, cut):
    video, frames = astronaut
    done, members = cut(video)
    (track,) = done.tracks
    assert done.live
    assert track.state == "open"
    assert track.indices == tuple(range(FRAMES))
    key = "eileen-portrait-000"
    arrays = ["landmarks.npy", "matrix.npy", "scores.npy"]
    assert [name for name, _ in members] == [
        *(f"{key}.{name}" for name in arrays),
        *(f"{key}.{i:06d}.jpg" for i in range(FRAMES)),
        snapshots.only(key),
    ]
    shrunk = cv2.resize(
        picture(members[3 + FRAMES // 2][1]), (160, 160), interpolation=cv2.INTER_AREA
    )
    assert np.abs(picture(members[-1][1]).astype(int) - shrunk).mean() < 4
    landmarks, matrices, scores = (npy_array(data) for _, data in members[:3])
    assert [a.dtype for a in (landmarks, matrices, scores)] == [np.dtype(np.float32)] * 3
    assert [a.shape for a in (landmarks, matrices, scores)] == [
        (FRAMES, 68, 2),
        (FRAMES, 2, 3),
        (FRAMES, len(SCORE_COLUMNS)),
    ]
    for i in (0, 5, 11):
        # the picture is what the matrix says, up to compression
        expected = warp(frames[i], matrices[i], (512, 512))
        assert np.abs(picture(members[3 + i][1]).astype(int) - expected).mean() < 3
        # and the points are the face's: the true box, seen through the matrix, encloses about as much
        true_box = transform(matrices[i], np.array(video.tracks[0].boxes[i]).reshape(2, 2))
        assert np.ptp(landmarks[i], axis=0).max() == pytest.approx(
            np.ptp(true_box, axis=0).max(), rel=0.15
        )
        eyes = landmarks[i, 36:42].mean(axis=0), landmarks[i, 42:48].mean(axis=0)
        assert eyes[0][1] == pytest.approx(eyes[1][1], abs=1e-3)
        assert (eyes[0] + eyes[1])[0] / 2 == pytest.approx(256, abs=25)
        side, inside = scores[i, :2]
        assert side == pytest.approx(window_side(matrices[i], 512), rel=1e-5)
        corners = transform(invert(matrices[i]), [[x, y] for x in (0, 512) for y in (0, 512)])
        assert (inside < 1) == bool(
            (corners.min(axis=0) < 0).any() or (corners.max(axis=0) > SIZE).any()
        )
    np.testing.assert_allclose(scores[:, 2], video.tracks[0].box_scores, rtol=1e-6)
    for name, column in zip(SCORE_COLUMNS, scores.T, strict=True):
        assert track.scores[name] == pytest.approx(np.median(column), rel=1e-4)
    again, same = cut(video)
    assert same == members
    assert again == done


def test_landmarks_turn_with_the_frame(astronaut, cut):
    """The portrait turns by 17 degrees over the clip; seen in its windows, the face stays where it is."""
    landmarks = npy_array(cut(astronaut[0])[1][0][1])
    moved = np.linalg.norm(landmarks - np.median(landmarks, axis=0), axis=-1)
    assert np.median(moved) < 6  # of 512


def test_the_fomm_window_stands_still_and_holds_every_face(astronaut, cut):
    video, _ = astronaut
    done, members = cut(video, crop_rule="fomm", min_window=100)
    matrices = npy_array(members[1][1])
    assert (matrices == matrices[0]).all()
    assert matrices[0, 0, 1] == matrices[0, 1, 0] == 0
    seen = transform(matrices[0], wider_boxes(np.array(video.tracks[0].boxes)).reshape(-1, 2))
    assert seen.min() > 0
    assert seen.max() < 512
    assert done.tracks[0].scores["window_side"] == pytest.approx(
        window_side(matrices[0], 512), rel=1e-4
    )


@pytest.mark.parametrize("rule", ["lpd", "impl"])
def test_other_rules_cut_tighter_than_heser(astronaut, cut, rule):
    tighter = cut(astronaut[0], crop_rule=rule, min_window=50)[0].tracks[0]
    heser = cut(astronaut[0], min_window=50)[0].tracks[0]
    assert 0.4 < tighter.scores["window_side"] / heser.scores["window_side"] < 0.8


@pytest.mark.parametrize(
    ("options", "cause", "detail"),
    [
        ({"min_window": 2000}, Cause.CROP_SMALL, "min_window is 2000"),
        ({"min_frames": 13}, Cause.CROP_FEW_FRAMES, "12 of 12 frames left, 13 needed"),
        (
            {"gate": LandmarkGate(min_eyes=0.9)},
            Cause.CROP_FEW_FRAMES,
            "12 with implausible landmarks",
        ),
    ],
)
def test_a_track_that_fails_a_gate_says_which(astronaut, cut, options, cause, detail):
    done, members = cut(astronaut[0], **options)
    (track,) = done.tracks
    assert (track.state, track.cause) == ("rejected", cause.value)
    assert detail in track.detail
    shown = [] if "12 with implausible" in detail else [snapshots.only("eileen-portrait-000")]
    assert [name for name, _ in members] == shown
    assert (done.state, done.cause) == ("rejected", cause.value)
    assert track.detail in done.detail


def test_frames_without_believable_landmarks_are_dropped_and_counted(astronaut, cut, landmarker):
    video, _ = astronaut
    boxes = list(video.tracks[0].boxes)
    boxes[3] = (
        10.0,
        250.0,
        40.0,
        280.0,
    )  # far from her face: the points stay there, but are no face

    class Spoiled:
        """The real landmarker, mistaken about one frame."""

        images_at_once = landmarker.images_at_once

        def locate_many(self, images, given):
            found = landmarker.locate_many(images, given)
            return [
                np.where(b[:1, :1, None] == 10.0, p * [-1, 1], p)
                for b, p in zip(given, found, strict=True)
            ]

    done, members = cut(_with_boxes(video, boxes), Spoiled())
    (track,) = done.tracks
    assert track.dropped == {Cause.CROP_LANDMARKS.value: 1}
    assert track.indices == (0, 1, 2, *range(4, FRAMES))
    assert len(track.boxes) == len(track.box_scores) == FRAMES - 1
    assert npy_array(members[0][1]).shape[0] == FRAMES - 1
    assert "eileen-portrait-000.000003.jpg" not in dict(members)


@pytest.mark.slow
def test_smoothing_takes_the_tremble_out_of_landmarks_and_windows(astronaut, cut):
    """Boxes that step about shake a landmarker's points; the same frames come out, calmer."""
    video, _ = astronaut
    draw = np.random.default_rng(0)
    boxes = [
        tuple(np.array(box) + np.tile(draw.normal(0, 8, 2), 2)) for box in video.tracks[0].boxes
    ]
    shaken = _with_boxes(video, boxes)
    (plain, before), (calm, after) = cut(shaken), cut(shaken, smooth=True)
    assert [name for name, _ in after] == [name for name, _ in before]
    scores, calm_scores = plain.tracks[0].scores, calm.tracks[0].scores
    assert scores["jitter"] == calm_scores["jitter_raw"]
    assert calm_scores["jitter"] < scores["jitter"] / 3
    assert calm.tracks[0].boxes == plain.tracks[0].boxes  # the detected ones
    paths = {}
    for name, members in (("plain", before), ("calm", after)):
        content = dict(members)
        matrices = npy_array(content["eileen-portrait-000.matrix.npy"]).astype(float)
        points = npy_array(content["eileen-portrait-000.landmarks.npy"])
        paths[name] = matrices, points
        # stored in window pixels: the eye line is level there
        eyes = points[:, 36:42].mean(axis=1), points[:, 42:48].mean(axis=1)
        assert np.abs((eyes[0] - eyes[1])[:, 1]).max() < 5
    middles = {
        name: np.array([transform(invert(m), (256, 256)) for m in matrices])
        for name, (matrices, _) in paths.items()
    }
    bends = {name: np.abs(np.diff(middle, n=2, axis=0)).mean() for name, middle in middles.items()}
    assert bends["calm"] < 0.7 * bends["plain"]  # the head itself bends, too
    assert cut(shaken, smooth=True)[1] == after


def test_frames_whose_landmarks_jump_are_dropped_and_many_drop_the_track(
    astronaut, cut, landmarker
):
    """A landmarker that is off by a tenth of a face in some frames of its second pass."""
    video, _ = astronaut

    class Jumping:
        """The real landmarker, mistaken about some frames the second time."""

        images_at_once = landmarker.images_at_once

        def __init__(self, *frames: int) -> None:
            self.frames = [FRAMES + frame for frame in frames]
            self.seen = 0

        def locate_many(self, images, given):
            found = landmarker.locate_many(images, given)
            for points, ((left, _, right, _),) in zip(found, given, strict=True):
                points += 0.1 * (right - left) * (self.seen in self.frames)
                self.seen += 1
            return found

    once, members = cut(video, Jumping(5), smooth=True, max_bad=0.1)
    (track,) = once.tracks
    assert track.dropped == {Cause.CROP_JUMP.value: 1}
    assert track.indices == (*range(5), *range(6, FRAMES))
    assert npy_array(dict(members)["eileen-portrait-000.landmarks.npy"]).shape == (
        FRAMES - 1,
        68,
        2,
    )
    assert "eileen-portrait-000.000005.jpg" not in dict(members)
    often, members = cut(video, Jumping(3, 8), smooth=True, max_bad=0.1)
    assert often.tracks[0].cause == Cause.CROP_UNSTEADY
    assert "2 of 12 frames (2 landmarks jump)" in often.tracks[0].detail
    assert not [name for name, _ in members if name.endswith(".npy")]


def test_smoothing_leaves_alone_what_has_no_neighbours(astronaut, cut):
    """A gap is respected: the frames on its two sides are smoothed as if the others did not exist."""
    video, _ = astronaut
    (track,) = video.tracks
    chosen = [0, 1, 2, 3, 4, 6, 7, 8, 9, 11]
    thin = {
        name: tuple(getattr(track, name)[i] for i in chosen)
        for name in ("times", "indices", "boxes", "box_scores")
    }
    done, members = cut(
        replace(video, tracks=(replace(track, **thin),)), smooth=True, crop_rule="fomm"
    )
    assert done.tracks[0].indices == tuple(chosen)
    assert done.tracks[0].scores["jitter"] < done.tracks[0].scores["jitter_raw"]
    assert npy_array(dict(members)["eileen-portrait-000.landmarks.npy"]).shape == (10, 68, 2)


def test_tracks_are_judged_one_by_one_and_share_frames(astronaut, cut):
    video, _ = astronaut
    whole = video.tracks[0]
    early = replace(
        whole,
        name="001",
        times=whole.times[:4],
        indices=whole.indices[:4],
        boxes=whole.boxes[:4],
        box_scores=whole.box_scores[:4],
    )
    ended = replace(whole, name="002", state="rejected", cause="track: short")
    done, members = cut(replace(video, tracks=(early, whole, ended)))
    assert [track.cause for track in done.tracks] == [
        Cause.CROP_FEW_FRAMES.value,
        "",
        "track: short",
    ]
    assert done.live
    assert {name.split(".")[0] for name, _ in members if not snapshots.is_snapshot(name)} == {
        "eileen-portrait-000"
    }
    shown = [name for name, _ in members if snapshots.is_snapshot(name)]
    assert shown == [snapshots.only(f"eileen-portrait-{name}") for name in ("001", "000")]


def test_a_file_that_is_gone_or_broken_ends_the_video(astronaut, cut, tmp_path):
    video, _ = astronaut
    with pytest.raises(FileNotFoundError, match="gone"):
        cut(replace(video, blob=str(tmp_path / "gone.mp4")))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(video.blob).read_bytes()[:3000])
    done, members = cut(replace(video, blob=str(broken)))
    assert (done.state, done.cause) == ("rejected", Cause.VIDEO_UNREADABLE.value)
    assert members == []


@pytest.mark.slow
def test_the_actor_does_what_cut_does(astronaut, cut):
    video, _ = astronaut
    config = CropsConfig(min_inside=0.2)
    cropper = crops.Cropper(config)
    done, members = from_row(cropper(to_row(video)))
    cropper.decoders.get().close()
    expected, expected_members = cut(video)
    assert done.seconds["crops"] > 0
    assert done.stage_frames == {"crops": FRAMES}
    assert replace(done, seconds={}, stage_frames={}) == expected
    assert members == expected_members
    finished = to_row(replace(video, state="rejected", cause="track: none kept"))
    assert cropper(finished) == finished


def _with_boxes(video: Video, boxes: list[tuple[float, ...]]) -> Video:
    return replace(video, tracks=(replace(video.tracks[0], boxes=tuple(boxes)),))


# ------------------------------------------------------------------------------------------------ real people

EXPECTED = {
    # clip: (median window side in source pixels, median share inside the frame, cause of the laptop preset)
    "m003_a": (1524, 0.71, ""),
    "m003_b": (1556, 0.69, ""),
    "w036_a": (1491, 0.72, ""),
    "kitchen_a": (988, 1.0, ""),
    "kitchen_b": (995, 0.99, ""),
    "aoc_a": (1007, 0.26, Cause.CROP_OUTSIDE),
    "phone_a": (1456, 0.43, ""),
    "franck_a": (467, 0.48, ""),
    "franck_b": (464, 0.48, ""),
    "lowres_a": (533, 0.23, Cause.CROP_OUTSIDE),
    "twofaces": (165, 0.99, Cause.CROP_SMALL),
}
"""Medians of the designers' measurement; aoc_b is at the edge of the gate and left out."""


def tracked(name: str, first: int, last: int, count: int, identity: str = "real") -> Video:
    """The clip with one track: the largest face of ``count`` frames from ``first`` to ``last``."""
    path = SHARED / "videos" / f"{name}.mp4"
    info = probe(path)
    indices = sorted({int(i) for i in np.linspace(first, min(last, info.frames - 1), count)})
    detector = load_detector("dlib", min_face=max(40, min(info.width, info.height) / 8))
    faces = []
    with Decoder() as decoder:
        ranges = [(indices[0], indices[-1] + 1)]
        for frame in decoder.read(path, info, ranges=ranges, images=indices):
            found = detector.detect(frame.image)
            faces.append((frame, found[box_sizes(found[:, :4])[:, 0].argmax()]))
    track = Track(
        name="000",
        span="00001",
        times=tuple(frame.time for frame, _ in faces),
        indices=tuple(frame.index for frame, _ in faces),
        boxes=tuple(tuple(map(float, row[:4])) for _, row in faces),
        box_scores=tuple(float(row[4]) for _, row in faces),
    )
    return Video(
        identity=identity,
        video=name.replace("_", "-"),
        blob=str(path),
        probe=asdict(info),
        tracks=(track,),
    )


@needs_shared
@pytest.mark.real
@pytest.mark.parametrize("clip", EXPECTED)
def test_real_clips_have_the_windows_the_design_expects(clip, landmarker):
    side, inside, cause = EXPECTED[clip]
    config = CropsConfig(min_frames=3)
    with Decoder() as decoder:
        done, _ = crops.cut(tracked(clip, 5, 130, 5), decoder, landmarker, config)
    (track,) = done.tracks
    assert track.cause == (cause.value if cause else "")
    assert track.scores["window_side"] == pytest.approx(side, rel=0.05 if side > 400 else 0.2)
    assert track.scores["inside"] == pytest.approx(inside, abs=0.025)


@needs_shared
@pytest.mark.real
def test_the_first_shot_of_a_cut_clip_is_kept(landmarker):
    with Decoder() as decoder:
        done, members = crops.cut(tracked("shotcut", 3, 66, 10), decoder, landmarker, CropsConfig())
    assert done.live
    assert done.tracks[0].scores["inside"] > 0.7
    assert len(members) == 3 + 10 + 1  # the snapshot
