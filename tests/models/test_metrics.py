"""Scores: known values, and what they must not depend on."""

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes

from models.metrics import csim, fit_scale_and_shift, landmark_distance


def points(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, 68, 2, generator=generator, dtype=torch.float64) * 100


def test_csim_compares_with_the_mean_of_the_sources():
    generated = torch.tensor([[2.0, 0], [0, 3], [1, 1]])
    assert csim(generated, torch.tensor([[5.0, 0], [0, -1], [1, 0]])).tolist() == pytest.approx(
        [1, -1, 0.5**0.5]
    )
    many = torch.tensor([[[1.0, 0], [0, 1]]])
    assert csim(torch.tensor([[7.0, 7]]), many).item() == pytest.approx(1)
    assert csim(generated, generated[:, None].expand(-1, 4, -1)).tolist() == pytest.approx(
        [1, 1, 1]
    )


def test_landmark_distance_is_in_distances_of_the_outer_eye_corners():
    real = points()
    real[:, 36], real[:, 45] = torch.tensor([10.0, 50]), torch.tensor([60.0, 50])
    assert landmark_distance(real, real).tolist() == [0, 0, 0]
    moved = real + torch.tensor([3.0, 4])
    assert landmark_distance(moved, real).tolist() == pytest.approx([0.1] * 3)
    other = points(1)
    found = landmark_distance(other, real)
    assert landmark_distance(7 * other + 2, 7 * real + 2).tolist() == pytest.approx(found.tolist())
    for i in range(3):
        expected = np.linalg.norm((other[i] - real[i]).numpy(), axis=1).mean() / 50
        assert found[i].item() == pytest.approx(expected)


def test_the_fit_takes_scale_and_shift_away_but_not_rotation():
    real = points()
    moved = 0.3 * real + torch.tensor([40.0, -7])
    assert landmark_distance(moved, real, fitted=True).max() < 1e-12
    turned = (real - 50) @ torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)
    assert landmark_distance(turned, real, fitted=True).min() > 0.05


def test_the_fit_is_the_best_one():
    moved, real = points(1), points()
    fitted = fit_scale_and_shift(moved, real)
    best = (fitted - real).square().sum(dim=(1, 2))
    for scale, x in ((1.01, 0), (0.99, 0), (1, 0.1), (1, -0.1)):
        middle = fitted.mean(dim=1, keepdim=True)
        other = (fitted - middle) * scale + middle + torch.tensor([x, 0.0])
        assert ((other - real).square().sum(dim=(1, 2)) > best).all()
    for i in range(3):  # scipy may rotate, too, so it can only do better
        _, _, disparity = procrustes(real[i].numpy(), moved[i].numpy())
        spread = (real[i] - real[i].mean(dim=0)).square().sum().item()
        assert best[i].item() / spread >= disparity


def test_points_that_are_no_face_are_refused():
    with pytest.raises(ValueError, match="68"):
        landmark_distance(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="coincide"):
        landmark_distance(torch.zeros(1, 68, 2), torch.zeros(1, 68, 2))
