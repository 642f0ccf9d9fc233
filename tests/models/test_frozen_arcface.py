"""Identity networks for training: counts and shapes, differentiable crops, and that both ways to a vector agree."""

from functools import cache

import cv2
import numpy as np
import pytest
import torch

from models.frozen import weights
from models.frozen.arcface import IdentityName, crop_faces, load_identity_network
from models.frozen.chips import fit_similarity, warp
from models.frozen.detector import load_detector
from models.frozen.identity import five_points, load_embedder
from models.frozen.landmarks import load_landmarker
from tests.material import SHARED, needs_shared


def test_ir_se_50_has_the_published_size_and_stages():
    with torch.device("meta"):
        network = load_identity_network("arcface", random_init=True)
        vectors, features = network(torch.zeros(2, 3, *network.size))
    assert sum(p.numel() for p in network.parameters()) == 43_797_696
    assert not any(p.requires_grad for p in network.parameters())
    assert vectors.shape == (2, network.dimension) == (2, 512)
    sides = [(64, 56), (128, 28), (256, 14), (512, 7)]
    assert [tuple(f.shape) for f in features] == [(2, c, side, side) for c, side in sides]
    published = weights.REGISTRY["ir_se50"].size
    numbers = sum(4 * value.numel() for value in network.state_dict().values())
    assert 0 < published - numbers < 150_000  # the rest is names and zip headers


def test_mobilefacenet_has_the_same_interface():
    network = load_identity_network("mobilefacenet", random_init=True)
    faces = torch.rand(2, 3, *network.size, requires_grad=True)
    vectors, features = network(faces)
    sides = [(64, 56, 48), (64, 28, 24), (128, 14, 12), (128, 7, 6)]
    assert [tuple(f.shape[1:]) for f in features] == sides
    vectors.sum().backward()
    assert faces.grad is not None
    assert faces.grad.abs().sum() > 0
    assert torch.equal(network.embedding(faces), vectors)
    assert all(torch.equal(*pair) for pair in zip(network.features(faces), features, strict=True))


def test_crops_of_tensors_are_those_of_cv2():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = cv2.resize(noise, (96, 96), interpolation=cv2.INTER_CUBIC)
    matrix = np.array([[0.9, 0.3, -8.0], [-0.3, 0.9, 25.0]])  # partly outside the image
    fine = matrix.copy()
    fine[:, 2] += fine[:, :2] @ [0.5, 0.5] - 0.5
    expected = cv2.warpAffine(image.astype(np.float32), fine, (60, 50), flags=cv2.INTER_LINEAR)
    picture = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 127.5 - 1
    found = crop_faces(picture, torch.from_numpy(matrix)[None], (50, 60))
    assert found.shape == (1, 3, 50, 60)
    difference = (found[0].permute(1, 2, 0).numpy() + 1) * 127.5 - expected
    assert np.abs(difference).max() < 3  # cv2 rounds positions to 1/32 pixel


def test_crops_are_differentiable():
    picture = torch.rand(1, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor([[[0.7, 0.1, 0.3], [-0.1, 0.7, 0.2]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: crop_faces(x, matrix, (6, 5)), (picture,))


def test_random_weights_are_not_for_dlib():
    with pytest.raises(ValueError, match="real weights"):
        load_identity_network("dlib", random_init=True)


@cache
def people() -> list[tuple[np.ndarray, np.ndarray]]:
    """Two photos each of three people: RGB and 68 landmarks."""
    detector, landmarker = load_detector("yunet", 40), load_landmarker("dlib")
    found = []
    for name in ("p01_a", "p01_b", "p02_a", "p02_b", "p03_a", "p03_b"):
        image = cv2.cvtColor(cv2.imread(f"{SHARED}/photos/{name}.jpg"), cv2.COLOR_BGR2RGB)
        boxes = detector.detect(image)
        largest = boxes[np.argmax(np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1))]
        found.append((image, landmarker.locate(image, largest[None, :4])[0]))
    return found


@needs_shared
@pytest.mark.real
@pytest.mark.parametrize(("name", "agreement"), [("mobilefacenet", 0.999), ("dlib", 0.99)])
def test_vectors_of_tensors_are_those_the_data_set_is_scored_with(
    monkeypatch, name: IdentityName, agreement: float
):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(SHARED / "weights"))
    network = load_identity_network(name)
    assert name in ("mobilefacenet", "dlib")
    embedder = load_embedder(name)
    height, width = network.size
    faces, expected = [], []
    for image, points in people():
        matrix = fit_similarity(five_points(points), network.points)
        faces.append(warp(image, matrix, (width, height)))
        expected.append(embedder.embed([image], points[None])[0])
    tensors = torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2) / 127.5 - 1
    vectors = torch.nn.functional.normalize(network.embedding(tensors), dim=1).numpy()
    assert (vectors * np.stack(expected)).sum(axis=1).min() > agreement
    similar = vectors @ vectors.T
    same = [similar[i, i + 1] for i in (0, 2, 4)]
    others = [similar[i, j] for i in range(6) for j in range(i) if i // 2 != j // 2]
    assert min(same) > max(others)
