"""Face parsers: geometry against landmarks and symmetry, the networks' shapes, and all of them against other networks."""

from __future__ import annotations

import time
from functools import cache

import av
import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from models.frozen import weights
from models.frozen.chips import invert, transform, warp
from models.frozen.detector import load_detector
from models.frozen.geometric_parser import draw_features, face_of
from models.frozen.landmarks import load_landmarker
from models.frozen.parsing import (
    SIDED,
    UNET19_LABELS,
    ParsingLabel,
    by_side,
    load_parser,
    unet19_matrix,
)
from pipelines.annotate import frame_mask
from pipelines.geometry import FLIP_68, heser_window
from pipelines.headpose import head_pose
from tests.datasets import face_points
from tests.material import SHARED, needs_shared

SIZE = 256
FACE = np.array([179.0, 83, 267, 171])
"""The astronaut's face in her portrait, a tight box."""
EVERYWHERE = np.ones((512, 512), dtype=bool)

SWAP = np.arange(19, dtype=np.uint8)
for left, right in SIDED:
    SWAP[left], SWAP[right] = right, left


def share(labels: np.ndarray, others: np.ndarray) -> float:
    return float((labels == others).mean())


# -------------------------------------------------------------------------------------------------- geometry


def drawn(points: np.ndarray) -> np.ndarray:
    return draw_features(face_of(points, SIZE), np.zeros((SIZE, SIZE), np.uint8))


def turned(points: np.ndarray, angle: float, scale: float) -> np.ndarray:
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    middle = np.array([SIZE / 2, SIZE / 2])
    return (points - middle) @ np.array([[cos, sin], [-sin, cos]]) + middle


def test_known_points_carry_their_labels():
    points = face_points(SIZE)
    labels = drawn(points)

    def at(*numbers: int) -> int:
        x, y = points[list(numbers)].mean(axis=0)
        return int(labels[int(y), int(x)])

    assert at(*range(36, 42)) == ParsingLabel.R_EYE
    assert at(*range(42, 48)) == ParsingLabel.L_EYE
    assert at(19) == ParsingLabel.R_BROW
    assert at(24) == ParsingLabel.L_BROW
    assert at(30) == ParsingLabel.NOSE
    assert at(*range(60, 68)) == ParsingLabel.MOUTH
    assert at(51, 62) == ParsingLabel.UPPER_LIP
    assert at(57, 66) == ParsingLabel.LOWER_LIP
    assert set(np.unique(labels)) == {0, 2, 3, 4, 5, 10, 11, 12, 13}


@settings(deadline=None, max_examples=30)
@given(st.floats(-0.5, 0.5), st.floats(0.5, 1.3), st.floats(-0.05, 0.05))
def test_mirrored_landmarks_give_mirrored_labels(angle, scale, turn):
    points = turned(face_points(SIZE, turn), angle, scale)
    mirrored = ([SIZE, 0] + points * [-1, 1])[FLIP_68]
    assert share(SWAP[drawn(mirrored)][:, ::-1], drawn(points)) > 0.99


def test_every_sided_label_is_named_after_its_half():
    labels = np.zeros((4, 4), np.uint8)
    labels[:] = [4, 5, 4, 5]
    np.testing.assert_array_equal(by_side(labels)[0], [5, 5, 4, 4])
    assert sorted(UNET19_LABELS) == list(range(19))


@pytest.fixture(scope="module")
def astronaut() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A window of the portrait, its landmarks, and what of it is inside the portrait."""
    image = skimage.data.astronaut()
    points = load_landmarker("dlib").locate(image, FACE[None])[0]
    matrix = heser_window(points, 512)
    inside = frame_mask(matrix, (image.shape[1], image.shape[0]), 512)
    return warp(image, matrix, (512, 512)), transform(matrix, points), inside


@pytest.fixture(scope="module")
def geometric():
    return load_parser("geometric")


def test_geometric_on_a_portrait(astronaut, geometric):
    crop, points, inside = astronaut
    (labels,) = geometric.parse([crop], points[None], [inside])
    assert labels.dtype == np.uint8
    assert labels.shape == (512, 512)
    assert not labels[~inside].any()
    share_of = {label: float((labels == label).mean()) for label in ParsingLabel}
    assert 0.05 < share_of[ParsingLabel.SKIN] < 0.2
    assert 0.02 < share_of[ParsingLabel.HAIR] < 0.3
    assert share_of[ParsingLabel.CLOTH] > 0.02
    top, chin = points[19:25, 1].min(), points[8, 1]
    assert np.nonzero(labels == ParsingLabel.HAIR)[0].min() < top
    assert np.nonzero(labels == ParsingLabel.CLOTH)[0].mean() > chin


def test_geometric_does_not_depend_on_what_came_before(astronaut, geometric):
    crop, points, inside = astronaut
    (alone,) = geometric.parse([crop], points[None], [inside])
    other = np.ascontiguousarray(crop[:, ::-1])
    mirrored = ([512, 0] + points * [-1, 1])[FLIP_68]
    both = geometric.parse(
        [other, crop], np.stack([mirrored, points]), [inside[:, ::-1].copy(), inside]
    )
    np.testing.assert_array_equal(both[1], alone)
    assert share(SWAP[both[0]][:, ::-1], alone) > 0.95
    small = cv2.resize(crop, (128, 128), interpolation=cv2.INTER_AREA)
    (coarse,) = geometric.parse([small], points[None] / 4, [inside[::4, ::4]])
    assert share(coarse, alone[2::4, 2::4]) > 0.9


def test_geometric_answers_for_a_window_of_one_colour(geometric):
    grey = np.full((512, 512, 3), 120, np.uint8)
    for inside in (EVERYWHERE, np.zeros_like(EVERYWHERE)):
        (labels,) = geometric.parse([grey], face_points(512)[None].astype(float), [inside])
        assert not labels[~inside].any()
    assert geometric.parse([], np.zeros((0, 68, 2)), []) == []


# -------------------------------------------------------------------------------------------------- networks


@pytest.mark.slow
def test_bisenet_is_the_published_network():
    import torch

    from models.frozen.bisenet import BiSeNet

    network = BiSeNet().eval()
    names = set(network.state_dict())
    for name in (
        "cp.resnet.layer2.0.downsample.1.running_var",
        "cp.arm16.conv_atten.weight",
        "cp.conv_avg.bn.num_batches_tracked",
        "ffm.convblk.conv.weight",
        "ffm.conv2.weight",
        "conv_out.conv_out.weight",
        "conv_out32.conv.bn.bias",
    ):
        assert name in names
    assert not [name for name in names if ".fc." in name]
    # the published file has 53,289,463 bytes: its numbers and some kilobytes of names
    numbers = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    assert 0 < weights.REGISTRY["bisenet"].size - numbers < 150_000
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 96, 64)).shape == (1, 19, 96, 64)


@pytest.mark.slow
def test_bisenet_answers_for_every_window_whatever_stands_beside_it(astronaut):
    import torch

    torch.set_num_threads(1)
    crop, points, inside = astronaut
    parser = load_parser("bisenet", random_init=True)
    half = cv2.resize(crop, (256, 256))
    found = parser.parse([half, crop], np.stack([points / 2, points]), [inside[::2, ::2], inside])
    assert [labels.shape for labels in found] == [(256, 256), (512, 512)]
    assert found[1].max() < 19
    assert not found[1][~inside].any()
    np.testing.assert_array_equal(parser.parse([crop], points[None], [inside])[0], found[1])


def test_random_weights_are_asked_for_by_name():
    with pytest.raises(ValueError, match="random_init"):
        load_parser("unet19", random_init=True)


# -------------------------------------------------------------------------------------------------- real people

CLIPS = {
    "m003_a": 150,
    "w036_a": 150,
    "aoc_b": 80,
    "phone_a": 100,
    "kitchen_a": 120,
    "franck_a": 60,
}
"""Close-up clips of one person, and the least face side."""
FRAMES = 4
INNER_FACE = [*range(1, 7), *range(10, 14)]
"""Labels inside the outline of the face: what the other network calls skin."""


@pytest.fixture
def shared_weights(monkeypatch):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(SHARED / "weights"))


TURNED = (100, 154, 170)
"""Frames of twofaces in which the man looks to a side, one and the other."""


@cache
def windows(
    clip: str, indices: tuple[int, ...] = (), side: int = 0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Window, landmarks, inside, matrix: of the leftmost face of some frames, else of the largest in frames spread over a clip."""
    detector, landmarker = load_detector("dlib", side or CLIPS[clip]), load_landmarker("dlib")
    found = []
    with av.open(str(SHARED / "videos" / f"{clip}.mp4")) as container:
        count = container.streams.video[0].frames
        wanted = set(indices or np.linspace(3, count - 4, FRAMES).astype(int))
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                image = frame.to_ndarray(format="rgb24")
                faces = detector.detect_hog(image)
                rank = -faces[:, 0] if indices else faces[:, 2] - faces[:, 0]
                box = faces[np.argmax(rank)][:4]
                points = landmarker.locate(image, box[None])[0]
                matrix = heser_window(points, 512)
                inside = frame_mask(matrix, image.shape[1::-1], 512)
                crop = warp(image, matrix, (512, 512))
                found.append((crop, transform(matrix, points), inside, matrix))
    assert len(found) == len(wanted)
    return found


def tflite(name: str):
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(str(SHARED / "weights" / f"{name}.tflite"), num_threads=1)
    network.allocate_tensors()
    first, last = (
        network.get_input_details()[0]["index"],
        network.get_output_details()[0]["index"],
    )

    def run(picture: np.ndarray) -> np.ndarray:
        network.set_tensor(first, picture[None].astype(np.float32))
        network.invoke()
        return network.get_tensor(last)[0]

    return run


def overlap(mask: np.ndarray, other: np.ndarray) -> float:
    return float((mask & other).sum() / max(1, (mask | other).sum()))


@needs_shared
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("shared_weights")
def test_labels_agree_with_other_networks_on_every_close_up():
    """docs/log.md has the numbers."""
    import torch

    torch.set_num_threads(1)
    hair_network, skin_network = tflite("hair_segmentation"), tflite("face_skin_unet")
    parsers = {name: load_parser(name) for name in ("geometric", "unet19")}
    for clip in CLIPS:
        crops, points, inside, _ = zip(*windows(clip), strict=True)
        hair, skin = [], []
        for crop, landmarks, shown in zip(crops, points, inside, strict=True):
            logits = hair_network(np.dstack([crop / 255, np.zeros(crop.shape[:2])]))
            hair.append((logits[..., 1] > logits[..., 0]) & shown)
            chip = unet19_matrix(landmarks)
            mask = skin_network(warp(crop, chip, (256, 256)) / 255)[..., 0]
            skin.append((warp(np.float32(mask), invert(chip), (512, 512)) > 0.5) & shown)
        scores = {}
        for name, parser in parsers.items():
            labels = parser.parse(crops, np.stack(points), inside)
            pairs = [
                (overlap(found == ParsingLabel.HAIR, h), overlap(np.isin(found, INNER_FACE), s))
                for found, h, s in zip(labels, hair, skin, strict=True)
            ]
            scores[name] = np.mean(pairs, axis=0)
        best = np.max(list(scores.values()), axis=0)
        assert best[0] >= 0.5, (clip, scores)
        assert best[1] >= 0.7, (clip, scores)
        assert scores["geometric"][1] >= 0.7, clip


@needs_shared
@pytest.mark.real
@pytest.mark.slow
def test_geometric_sees_the_hair_of_turned_heads(geometric):
    """What it misses of the target's hair stays beside the head that a swap puts there."""
    network = tflite("hair_segmentation")
    agreed = []
    for crop, points, inside, _ in windows("twofaces", TURNED, 30):
        logits = network(np.dstack([crop / 255, np.zeros(crop.shape[:2])]))
        hair = (logits[..., 1] > logits[..., 0]) & inside
        for size in (512, 64):
            picture, shown, known = (
                cv2.resize(np.uint8(each), (size, size), interpolation=cv2.INTER_AREA)
                for each in (crop, inside * 255, hair * 255)
            )
            points_px = points[None] * size / 512
            (labels,) = geometric.parse([picture], points_px, [shown > 127])
            agreed.append(overlap(labels == ParsingLabel.HAIR, known > 127))
    assert min(agreed) > 0.3, agreed
    assert np.mean(agreed) > 0.5, agreed


@needs_shared
@pytest.mark.real
def test_geometric_takes_at_most_150_ms_a_window(geometric):
    cv2.setNumThreads(1)
    seconds = []
    for clip in ("m003_a", "franck_a"):
        for crop, points, inside, _ in windows(clip):
            started = time.thread_time()
            geometric.parse([crop], points[None], [inside])
            seconds.append(time.thread_time() - started)
    assert np.median(seconds) < 0.15


@needs_shared
@pytest.mark.real
def test_head_pose_agrees_with_a_network():
    import onnxruntime

    session = onnxruntime.InferenceSession(str(SHARED / "weights" / "fsanet_1x1.onnx"))
    feed = session.get_inputs()[0].name
    ours, theirs = [], []
    for clip in CLIPS:
        for crop, points, _, _ in windows(clip):
            low, high = points.min(axis=0), points.max(axis=0)
            side = (high - low).max()
            centre = (low + high) / 2 - [0, 0.08 * side]
            scale = 64 / (1.6 * side)
            matrix = np.array([[scale, 0, 32], [0, scale, 32]])
            matrix[:, 2] -= scale * centre
            chip = (warp(crop, matrix, (64, 64))[..., ::-1].astype(np.float32) - 127.5) / 127.5
            theirs.append(session.run(None, {feed: chip.transpose(2, 0, 1)[None].copy()})[0][0])
            ours.append(head_pose(points))
    a, b = np.array(ours), np.array(theirs)
    error = np.abs(a - b).mean(axis=0)
    assert np.corrcoef(a[:, 0], b[:, 0])[0, 1] > 0.85
    assert np.corrcoef(a[:, 1], b[:, 1])[0, 1] > 0.6
    assert error[0] < 5
    assert error[1] < 10
    assert error[2] < 2
