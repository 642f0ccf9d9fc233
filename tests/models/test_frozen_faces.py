"""Detectors, landmarks and identity vectors: real networks on real faces, against each other and their symmetries."""

from functools import cache

import av
import cv2
import numpy as np
import pytest
import skimage.data
import torch

from models.frozen import weights
from models.frozen.chips import fit_similarity, invert, square_matrix, transform, warp
from models.frozen.detector import BoxFit, load_detector
from models.frozen.identity import five_points, load_embedder
from models.frozen.landmarks import (
    FanConfig,
    FanLandmarker,
    decode_heat,
    fan_crop,
    fan_matrix,
    load_landmarker,
)
from pipelines.geometry import FLIP_68, heser_window, iou, wider_boxes
from tests.material import SHARED, needs_shared

FACE = np.array([179.0, 83, 267, 171])
"""The astronaut's face in her portrait, a tight box."""


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def dlib_landmarker():
    return load_landmarker("dlib")


@pytest.fixture(scope="module")
def points(portrait, dlib_landmarker) -> np.ndarray:
    return dlib_landmarker.locate(portrait, FACE[None])[0]


def eye_distance(points: np.ndarray) -> float:
    return float(np.linalg.norm(points[36:42].mean(axis=0) - points[42:48].mean(axis=0)))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean distance of 68 points in eye distances (NME)."""
    return float(np.linalg.norm(found - expected, axis=-1).mean()) / eye_distance(expected)


# -------------------------------------------------------------------------------------------------- detection


def test_a_box_fit_moves_and_scales_in_units_of_the_box():
    rows = np.array([[10.0, 20, 30, 100, 0.7]])  # 20 x 80: unit 40, centre (20, 60)
    np.testing.assert_allclose(
        BoxFit(side=0.5, down=0.1).tight(rows), [[10, 54, 30, 74, 0.7]], rtol=1e-6
    )
    assert BoxFit(side=1, down=0).tight(np.zeros((0, 5))).shape == (0, 5)


def test_dlib_finds_the_face_of_a_portrait(portrait):
    faces = load_detector("dlib", min_face=60).detect(portrait)
    assert faces.dtype == np.float32
    assert faces.shape == (1, 5)
    assert iou(faces[:, :4], FACE)[0, 0] > 0.8


def test_min_face_decides_how_small_a_face_is_found(portrait):
    small = cv2.resize(portrait, (256, 256), interpolation=cv2.INTER_AREA)  # the face is 44 px now
    assert iou(load_detector("dlib", min_face=30).detect(small)[:, :4], FACE / 2).max() > 0.6
    assert len(load_detector("dlib", min_face=120).detect_hog(small)) == 0


def test_the_cnn_finds_what_hog_cannot(portrait):
    """A head tilted by 50 degrees."""
    turn = square_matrix((223, 127), 320, np.radians(50), 320)
    tilted = warp(portrait, turn, (320, 320))
    found = load_detector("dlib", min_face=60)
    assert len(found.detect_hog(tilted)) == 0
    faces = found.detect(tilted)
    assert len(faces) == 1
    assert iou(faces[:, :4], [116, 116, 204, 204]).max() > 0.5


def test_nothing_is_found_where_nothing_is():
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    assert load_detector("dlib", min_face=60).detect(noise).shape == (0, 5)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="min_face must be positive, got 0"):
        load_detector("dlib", 0)
    with pytest.raises(ValueError, match="no detector called 'blaze'"):
        load_detector("blaze", 40)
    with pytest.raises(ValueError, match="no landmarker called 'mesh'"):
        load_landmarker("mesh")
    with pytest.raises(ValueError, match="no embedder called 'facenet'; known: dlib, mobilef"):
        load_embedder("facenet")
    with pytest.raises(ValueError, match="random_init is for arcface"):
        load_embedder("dlib", random_init=True)
    with pytest.raises(ValueError, match="random_init is for sfd"):
        load_detector("dlib", 40, random_init=True)
    with pytest.raises(ValueError, match="random_init is for fan"):
        load_landmarker("dlib", random_init=True)


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other make torch crawl on a machine that is busy with other tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_s3fd_runs_with_its_real_network_and_random_weights(portrait):
    faces = load_detector("sfd", min_face=40, random_init=True).detect(portrait[60:200, 150:300])
    assert faces.dtype == np.float32
    assert faces.shape[1] == 5
    assert (np.diff(faces[:, 4]) <= 0).all()


# -------------------------------------------------------------------------------------------------- landmarks


def test_dlib_landmarks_lie_on_the_face(points):
    # pupils, tip of the nose and chin, read off the enlarged picture
    np.testing.assert_allclose(points[36:42].mean(axis=0), (203, 101), atol=2)
    np.testing.assert_allclose(points[42:48].mean(axis=0), (247, 103.5), atol=2)
    np.testing.assert_allclose(points[30], (224, 128), atol=3)
    np.testing.assert_allclose(points[8], (222, 178), atol=3)


def test_no_boxes_no_points(portrait, dlib_landmarker):
    assert dlib_landmarker.locate(portrait, np.zeros((0, 4))).shape == (0, 68, 2)
    found = dlib_landmarker.locate_many([portrait, portrait], [np.zeros((0, 4)), FACE[None]])
    assert [a.shape for a in found] == [(0, 68, 2), (1, 68, 2)]


def test_dlib_landmarks_move_turn_and_grow_with_the_picture(portrait, dlib_landmarker, points):
    for matrix in (
        np.array([[1.0, 0, -57], [0, 1, -23]]),
        np.array([[3.4, 0, -400], [0, 3.4, -200]]),  # above the size from which nothing is enlarged
        square_matrix((223, 127), 330, np.radians(15), 400),
    ):
        centre = transform(matrix, (FACE[:2] + FACE[2:]) / 2)
        half = 44 * np.sqrt(np.linalg.det(matrix[:, :2]))
        seen = warp(portrait, matrix, (500, 500))
        found = dlib_landmarker.locate(seen, np.array([[*(centre - half), *(centre + half)]]))[0]
        assert error(found, transform(matrix, points)) < 0.035


def test_dlib_landmarks_of_the_mirror_image_are_mirrored(portrait, dlib_landmarker, points):
    """Also a check of the half pixels: an offset of one pixel would show as a shift of the mean."""
    width = portrait.shape[1]
    box = np.array([[width - FACE[2], FACE[1], width - FACE[0], FACE[3]]])
    found = dlib_landmarker.locate(np.ascontiguousarray(portrait[:, ::-1]), box)[0]
    mirrored = ([width, 0] + found * [-1, 1])[FLIP_68]
    assert error(mirrored, points) < 0.05
    assert np.abs((mirrored - points).mean(axis=0)).max() < 0.02 * eye_distance(points)


@pytest.mark.parametrize("sigma", [0.8, 1.5, 3.0])
def test_heat_maps_are_decoded_to_the_exact_peak_of_a_gaussian(sigma):
    peaks = np.random.default_rng(0).uniform(5, 59, (2, 68, 2))
    cells = np.arange(64) + 0.5
    x = np.exp(-((cells - peaks[..., :1]) ** 2) / (2 * sigma**2))
    y = np.exp(-((cells - peaks[..., 1:]) ** 2) / (2 * sigma**2))
    heat = torch.from_numpy((y[..., :, None] * x[..., None, :]).astype(np.float32))
    np.testing.assert_allclose(decode_heat(heat), peaks, atol=1e-3)
    if sigma < 2:  # what FanConfig.precision says about bf16
        noise = torch.from_numpy(np.random.default_rng(1).normal(0, 0.0075, heat.shape))
        rough = (heat * (1 + noise)).to(torch.bfloat16)
        apart = np.linalg.norm(decode_heat(rough).numpy() - peaks, axis=-1)
        assert np.quantile(apart, 0.9) < 0.05


def test_a_peak_at_the_rim_or_on_a_plateau_stays_in_its_cell():
    heat = torch.zeros(1, 2, 64, 64)
    heat[0, 0, 10, 0] = 1
    np.testing.assert_allclose(decode_heat(heat)[0], [[0.5, 10.5], [0.5, 0.5]])


def test_the_square_for_fan_is_the_one_face_alignment_takes():
    wider = wider_boxes(FACE)
    width, height = wider[2:] - wider[:2]
    centre = (wider[:2] + wider[2:]) / 2 - [0, 0.12 * height]
    side = 200 / 195 * (width + height)
    corners = transform(invert(fan_matrix(FACE)), [[0, 0], [256, 256]])
    np.testing.assert_allclose(corners, [centre - side / 2, centre + side / 2], atol=0.03 * side)


def test_the_crop_for_fan_is_the_usual_one_made_faster(portrait):
    """Against ``chips.warp``, on faces that are shrunk by up to 6 and that leave the picture, to the pixel's centre."""
    large = cv2.resize(portrait, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    for image, box in [
        (portrait, FACE),
        (portrait, FACE - np.array([170, 70, 170, 70])),
        (large, 4 * FACE),
        (large, [700, 0, 1340, 640]),
        (large, [1400, 1500, 1800, 1900]),
    ]:
        matrix = fan_matrix(np.array(box, float))
        ours, usual = fan_crop(image, matrix), warp(image, matrix, (256, 256))
        apart = np.abs(ours.astype(float) - usual)
        assert np.mean(apart) < 0.01 * 255
        shifted = [
            np.abs(ours[8:-8, 8:-8].astype(float) - usual[8 + dy : 248 + dy, 8 + dx : 248 + dx])
            for dy, dx in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
        ]
        assert np.argmin([np.mean(apart) for apart in shifted]) == 0
    assert fan_crop(portrait, fan_matrix(np.array([900.0, 0, 950, 50]))).max() == 0


def test_decoding_refines_what_face_alignment_decodes():
    """Its points lie a quarter cell from the middle of the largest cell, towards the larger neighbour; ours further or less
    far in the same direction."""
    from face_alignment.utils import get_preds_fromhm

    heat = np.random.default_rng(0).uniform(0.1, 1, (2, 68, 64, 64)).astype(np.float32)
    theirs = get_preds_fromhm(heat)[0]
    ours = decode_heat(torch.from_numpy(heat)).numpy()
    inside = ((theirs > 1) & (theirs < 63)).all(axis=-1)
    middle = np.floor(theirs[inside]) + 0.5
    assert np.abs(ours[inside] - middle).max() <= 0.5
    np.testing.assert_array_equal(np.sign(ours[inside] - middle), np.sign(theirs[inside] - middle))


@pytest.fixture(scope="module")
def fan(one_thread):  # noqa: ARG001
    return load_landmarker("fan", random_init=True)


def faces_of_two_videos(portrait) -> tuple[list[np.ndarray], list[np.ndarray]]:
    other = np.ascontiguousarray(portrait[::-1])
    return [portrait, portrait, other], [FACE[None], np.zeros((0, 4)), FACE[None] - 30]


@pytest.mark.slow
def test_fan_answers_for_every_face_whatever_stands_beside_it(portrait, fan):
    """Bit for bit: a face alone, among others, and after others."""
    images, boxes = faces_of_two_videos(portrait)
    found = fan.locate_many(images, boxes)
    assert [points.shape for points in found] == [(1, 68, 2), (0, 68, 2), (1, 68, 2)]
    np.testing.assert_array_equal(found[2], fan.locate(images[2], boxes[2]))
    np.testing.assert_array_equal(found[0], fan.locate_many(images[::-1], boxes[::-1])[2])
    corners = transform(invert(fan_matrix(FACE)), [[0, 0], [256, 256]])
    assert (found[0][0] >= corners[0] - 1e-3).all()
    assert (found[0][0] <= corners[1] + 1e-3).all()


@pytest.mark.gpu
def test_on_a_gpu_neighbours_move_no_point_by_a_hundredth_of_a_pixel(portrait):
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        landmarker = FanLandmarker(FanConfig(precision=precision), random_init=True)
        images, boxes = faces_of_two_videos(portrait)
        found = landmarker.locate_many(images * 20, boxes * 20)
        alone = landmarker.locate(images[2], boxes[2])
        np.testing.assert_allclose(found[2], alone, atol=0.01)
        np.testing.assert_allclose(found[-1], alone, atol=0.01)


def heat_of(config: FanConfig, crops: np.ndarray) -> torch.Tensor:
    torch.manual_seed(0)
    landmarker = FanLandmarker(config, random_init=True)
    with torch.inference_mode():
        return landmarker.heat(crops).float().cpu()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_heat_maps_are_face_alignments_and_in_bf16_within_one_percent(portrait):
    """Random weights, the real network: last-channel-first memory changes nothing, half precision what the config says."""
    from face_alignment.models import FAN

    crops = np.stack([fan_crop(portrait, fan_matrix(FACE))])
    torch.manual_seed(0)
    plain = FAN(4).eval()
    with torch.inference_mode():
        expected = plain(torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous() / 255)[-1]
    once = heat_of(FanConfig(flip=False), crops)
    tolerance = 2e-3 if torch.cuda.is_available() else 1e-5  # TF32
    torch.testing.assert_close(once, expected, atol=tolerance, rtol=0)
    half = heat_of(FanConfig(flip=False, precision="bf16"), crops)
    assert 1e-4 < torch.linalg.norm(half - once) / torch.linalg.norm(once) < 0.01


@pytest.mark.slow
def test_fan_sees_the_mirror_image_mirrored(portrait, fan):
    """Averaged over both, even a random network must: this checks crop, flip, point order and decoding at once."""
    width = portrait.shape[1]
    box = np.array([[width - FACE[2], FACE[1], width - FACE[0], FACE[3]]])
    found = fan.locate(np.ascontiguousarray(portrait[:, ::-1]), box)[0]
    mirrored = ([width, 0] + found * [-1, 1])[FLIP_68]
    distance = np.linalg.norm(mirrored - fan.locate(portrait, FACE[None])[0], axis=1)
    assert np.median(distance) < 0.01


# -------------------------------------------------------------------------------------------------- identity


def test_dlib_vectors_are_unit_and_ignore_the_crop(portrait, points):
    embedder = load_embedder("dlib")
    windows = [heser_window(points, 512), square_matrix((223, 140), 230, 0.3, 400)]
    crops = [warp(portrait, windows[0], (512, 512)), warp(portrait, windows[1], (400, 400))]
    seen = np.stack([transform(window, points) for window in windows])
    found = embedder.embed(crops, seen)
    assert found.shape == (2, embedder.dimension)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found[0] @ found[1] > 0.97
    np.testing.assert_array_equal(embedder.embed(crops[1:], seen[1:])[0], found[1])
    assert embedder.embed([], np.zeros((0, 68, 2))).shape == (0, embedder.dimension)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_arcface_vectors_are_unit_and_ignore_crop_and_neighbours(portrait, points):
    """Random weights: the alignment undoes the crop, and the chip is what the network itself is shown by hand."""
    torch.manual_seed(0)
    embedder = load_embedder("arcface", random_init=True)
    windows = [heser_window(points, 512), square_matrix((223, 140), 230, 0.3, 400)]
    crops = [warp(portrait, windows[0], (512, 512)), warp(portrait, windows[1], (400, 400))]
    seen = np.stack([transform(window, points) for window in windows])
    crops, seen = [*crops, crops[0][:, ::-1]], np.stack([*seen, seen[0]])
    found = embedder.embed(crops, seen)
    assert found.shape == (3, 512)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    # a random network hardly tells faces apart, so: nearer by far than to the same face cut wrongly
    assert 1 - found[0] @ found[1] < 0.2 * (1 - found[0] @ found[2])
    np.testing.assert_array_equal(embedder.embed(crops[1:2], seen[1:2])[0], found[1])
    template = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]  # fmt: skip
    matrix = fit_similarity(five_points(seen[0]), np.array(template) + 0.5)
    chip = torch.from_numpy(warp(crops[0], matrix, (112, 112))).permute(2, 0, 1)[None] / 127.5 - 1
    vector = embedder.network.embedding(chip)[0].double().numpy()
    np.testing.assert_allclose(found[0], vector / np.linalg.norm(vector), atol=1e-4)


def test_five_points_are_eyes_nose_and_mouth_corners(points):
    found = five_points(points)
    assert found.shape == (5, 2)
    assert found[0, 0] < found[2, 0] < found[1, 0]
    assert found[3, 0] < found[4, 0]
    assert found[:2, 1].max() < found[2, 1] < found[3:, 1].min()


# -------------------------------------------------------------------------------------------------- real people

CLIPS = {
    "m003_a": 150,
    "kitchen_a": 120,
    "phone_a": 100,
    "franck_a": 60,
    "shotcut": 60,
    "w036_a": 150,
}
"""Clips of one person, and the least face side."""
MORE = {"m003_b": 150, "aoc_a": 80, "aoc_b": 80, "franck_b": 60, "lowres_a": 60}
PHOTOS = [f"p0{i}_{letter}" for i in range(1, 6) for letter in "ab"]


@pytest.fixture
def shared_weights(monkeypatch):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(SHARED / "weights"))


@cache
def frames(clip: str, count: int = 3) -> list[np.ndarray]:
    """Spread over the clip's first two seconds."""
    wanted = np.linspace(5, 50, count).astype(int)
    with av.open(str(SHARED / "videos" / f"{clip}.mp4")) as container:
        pictures = [
            frame.to_ndarray(format="rgb24")
            for index, frame in zip(range(51), container.decode(video=0), strict=False)
            if index in wanted
        ]
    assert len(pictures) == count
    return pictures


def largest(faces: np.ndarray) -> np.ndarray:
    return faces[np.argmax(faces[:, 2] - faces[:, 0])]


@needs_shared
@pytest.mark.real
@pytest.mark.usefixtures("shared_weights")
def test_all_detectors_mean_the_same_box():
    overlaps: dict[str, list[float]] = {"yunet": [], "retinaface": [], "mmod": []}
    for clip, least in CLIPS.items():
        dlib = load_detector("dlib", least)
        others = {name: load_detector(name, least) for name in ("yunet", "retinaface")}
        for image in frames(clip)[:1]:
            expected = largest(dlib.detect_hog(image))[:4]
            found = {name: other.detect(image) for name, other in others.items()}
            centre, half = (expected[:2] + expected[2:]) / 2, expected[2:] - expected[:2]
            left, top = np.maximum(centre - half, 0).astype(int)
            right, bottom = (centre + half).astype(int)
            near = load_detector("dlib", half[0] / 2).detect_mmod(image[top:bottom, left:right])
            found["mmod"] = near + np.array([left, top, left, top, 0], np.float32)
            for name, faces in found.items():
                assert len(faces) == 1, (name, clip)
                overlaps[name].append(iou(faces[:, :4], expected).max())
    for name, values in overlaps.items():
        assert np.median(values) > 0.65, name
        assert min(values) > 0.45, name


@needs_shared
@pytest.mark.real
@pytest.mark.usefixtures("shared_weights")
@pytest.mark.parametrize("name", ["dlib", "yunet", "retinaface"])
def test_no_detector_sees_faces_in_reeds(name):
    found = load_detector(name, 80)
    assert all(len(found.detect(image)) == 0 for image in frames("noface", 2))


def onnx(name: str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(SHARED / "weights" / f"{name}.onnx"), options)
    feed = session.get_inputs()[0].name
    return lambda picture: session.run(None, {feed: picture.transpose(2, 0, 1)[None]})


@needs_shared
@pytest.mark.real
def test_dlib_landmarks_agree_with_two_other_networks(dlib_landmarker):
    pfld, mobile = onnx("landmark68_pfld"), onnx("landmark68_mobilefacenet")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    errors: dict[str, list[float]] = {"pfld": [], "mobile": []}
    for clip, least in CLIPS.items():
        found = load_detector("dlib", least)
        for image in frames(clip):
            box = largest(found.detect_hog(image))[:4]
            points = dlib_landmarker.locate(image, box[None])[0]
            wider = wider_boxes(box)
            centre, longer = (wider[:2] + wider[2:]) / 2, wider[3] - wider[1]
            for name, grow in (("pfld", 1.1), ("mobile", 1.0)):
                matrix = square_matrix(centre, longer * grow, 0.0, 112)
                chip = warp(image, matrix, (112, 112)).astype(np.float32) / 255
                if name == "pfld":
                    out = next(a for a in pfld(chip) if a.size == 136)
                else:
                    out = mobile(((chip - mean) / std).astype(np.float32))[0]
                errors[name].append(
                    error(points, transform(invert(matrix), out.reshape(68, 2) * 112))
                )
    assert np.median(errors["pfld"]) < 0.05
    assert np.median(errors["mobile"]) < 0.09
    assert max(errors["pfld"]) < 0.12


@cache
def people() -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]:
    """Whole-head windows of the clips and photos: identities, files, crops, landmarks."""
    located = load_landmarker("dlib")
    rows = []
    material = [
        (clip.split("_")[0], clip, image, least)
        for clip, least in (CLIPS | MORE).items()
        for image in frames(clip)[:2]
    ]
    for photo in PHOTOS:
        image = cv2.cvtColor(cv2.imread(str(SHARED / "photos" / f"{photo}.jpg")), cv2.COLOR_BGR2RGB)
        material.append((photo[:3], photo, image, max(image.shape) / 16))
    for identity, file, image, least in material:
        box = largest(load_detector("dlib", least).detect_hog(image))[:4]
        points = located.locate(image, box[None])[0]
        window = heser_window(points, 512)
        rows.append((identity, file, warp(image, window, (512, 512)), transform(window, points)))
    identities, files, crops, points = zip(*rows, strict=True)
    return np.array(identities), np.array(files), list(crops), np.array(points)


def cosines(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of all pairs of one identity, and of all pairs of different ones."""
    identities = people()[0]
    first, second = np.triu_indices(len(identities), 1)
    same = identities[first] == identities[second]
    values = (vectors @ vectors.T)[first, second]
    return values[same], values[~same]


@needs_shared
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("shared_weights")
@pytest.mark.parametrize("name", ["dlib", "mobilefacenet"])
def test_vectors_tell_people_apart_as_an_independent_network_does(name):
    _, files, crops, points = people()
    embedder = load_embedder(name)
    vectors = embedder.embed(crops, points)
    same, different = cosines(vectors)
    assert same.min() > embedder.same_person > different.max()

    template = np.array(
        [38.2946, 51.6963, 73.5318, 51.5014, 56.0252, 71.7366, 41.5493, 92.3655, 70.7299, 92.2041]
    )
    reference = onnx("mobilefacenet_112")
    rows = []
    for crop, landmark in zip(crops, points, strict=True):
        matrix = fit_similarity(five_points(landmark), template.reshape(5, 2) + 0.5)
        chip = (warp(crop, matrix, (112, 112)).astype(np.float32) - 127.5) / 127.5
        rows.append(reference(chip)[0].ravel())
    judge = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    judge_same, judge_different = cosines(judge)
    assert judge_same.min() > judge_different.max()
    # not only the threshold: who resembles whom is ordered alike
    ours, theirs = (np.concatenate(cosines(v)).argsort().argsort() for v in (vectors, judge))
    assert np.corrcoef(ours, theirs)[0, 1] > 0.4
    assert len(set(files)) == len(CLIPS | MORE) + len(PHOTOS)


@needs_shared
@pytest.mark.real
@pytest.mark.slow
def test_mobilefacenet_has_a_gradient_and_never_changes():
    import torch

    from models.frozen.mobilefacenet import load_mobilefacenet

    network = load_mobilefacenet(SHARED / "weights" / "mobilefacenet_112x96.ckpt")
    faces = torch.rand(2, 3, 112, 96, requires_grad=True)
    vectors = network(faces)
    assert vectors.shape == (2, 128)
    vectors.square().sum().backward()
    assert faces.grad is not None
    assert faces.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    np.testing.assert_allclose(network(faces[:1]).detach(), vectors[:1].detach(), atol=1e-4)
