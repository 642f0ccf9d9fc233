"""Synthetic faces over a still background: the global network finds the motion, the mask finds the face.

Faces are 32 px ellipses with a smooth texture, turned, scaled and moved over a background that stays; 68 points tell how.
The loss is photometric only: where each pixel comes from is known and never shown to the network. A reduced form of
spec-sparse-motion §1.3; in its longer trials multiplying the flow by the mask gave an inverted mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses import l1
from models.motion.dense import GlobalMotion, Modulation, MotionTrunk
from models.motion.flow import identity_grid, warp
from models.motion.network import blend
from tests.faces import FACE_68

SIZE, WIDTHS = 32, (16, 32, 48, 48)
MASK_PRIOR = 0.02
GRID = identity_grid(SIZE)


@dataclass
class Faces:
    """b pairs of pictures (b, 3, 32, 32), their points (b, 68, 2), and the truth about the driving one."""

    source: Tensor
    driving: Tensor
    source_landmarks: Tensor
    driving_landmarks: Tensor
    is_face: Tensor
    """(b, 1, 32, 32) of the driving picture."""
    deformation: Tensor
    """(b, 32, 32, 2) true on the face."""


def draw(count: int, seed: int) -> Faces:
    """Pairs from a seed. The face moves by 3.7 px on the average."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(cells: int) -> Tensor:
        coarse = torch.rand(count, 3, cells, cells, generator=generator) * 2 - 1
        return F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic")

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    texture, background = smooth(4), smooth(8) * 0.7
    points = torch.tensor(FACE_68, dtype=torch.float32)
    drawn = []
    for _ in range(2):
        angle, scale, shift = between(-0.35, 0.35), between(0.44, 0.56), between(-0.2, 0.2, 1, 2)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
        linear = turn.view(count, 2, 2) * scale[:, None, None]
        own = (GRID.flatten(0, 1) - shift) @ torch.linalg.inv(
            linear
        ).mT  # (b, 32 32, 2) of the face
        own = own.unflatten(1, (SIZE, SIZE))
        inside = ((own / torch.tensor([0.95, 1.1])).square().sum(dim=-1) < 1).float()[:, None]
        picture = blend(warp(texture, own / 1.2), background, inside)
        drawn.append((picture, points @ linear.mT + shift, inside, own, linear, shift))
    (source, source_points, *_, linear, shift), (driving, driving_points, inside, own, *_) = drawn
    truth = (own.flatten(1, 2) @ linear.mT + shift).unflatten(1, (SIZE, SIZE))
    return Faces(source, driving, source_points, driving_points, inside, truth)


def network() -> GlobalMotion:
    modulation = Modulation(vector=2 * 68, hidden=32, norm="instance", position="norm")
    trunk = MotionTrunk(
        SIZE, WIDTHS, WIDTHS[::-1], 2, modulation, add_motion="spatial", skip="none"
    )
    return GlobalMotion(trunk, WIDTHS[0], has_mask=True)


def predict(model: GlobalMotion, faces: Faces) -> tuple[Tensor, Tensor]:
    """Deformation (b, 32, 32, 2) and mask (b, 1, 32, 32)."""
    source, driving = faces.source_landmarks.flatten(1), faces.driving_landmarks.flatten(1)
    encoded = model.trunk.encode(faces.source, source)
    displacement, mask, _ = model.decode(encoded, source, driving)
    assert mask is not None
    return GRID + displacement.permute(0, 2, 3, 1), torch.sigmoid(mask)


def train(model: GlobalMotion, steps: int, lr: float, *, one_batch: bool = False) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr, (0.5, 0.999))
    for index in range(steps):
        faces = draw(12, seed=0 if one_batch else index)
        deformation, mask = predict(model, faces)
        made = blend(warp(faces.source, deformation), faces.source, mask)
        loss = l1(made, faces.driving) + MASK_PRIOR * mask.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def end_point_error(deformation: Tensor, faces: Faces) -> float:
    """Mean distance from the true flow on the face, pixels."""
    away = (deformation - faces.deformation).norm(dim=-1) * SIZE / 2
    return float(away[faces.is_face[:, 0] > 0].mean())


def test_the_truth_is_true() -> None:
    faces = draw(64, seed=10**6)
    shown = warp(faces.source, faces.deformation)
    # borders of the face mix with the background, and a turned face is resampled
    inside = F.avg_pool2d(faces.is_face, 5, 1, 2) == 1
    assert (shown - faces.driving).abs().mean(dim=1, keepdim=True)[inside].mean() < 0.03
    still = end_point_error(GRID.expand_as(faces.deformation), faces)
    assert 3 < still < 4.5
    assert (
        float((faces.source - faces.driving)[~(faces.is_face > 0).expand_as(shown)].abs().mean())
        > 0
    )


def test_a_few_steps_on_one_batch_fit_it_better() -> None:
    torch.manual_seed(0)
    model, faces = network(), draw(12, seed=0)

    @torch.no_grad()
    def error() -> float:
        deformation, mask = predict(model, faces)
        return float(l1(blend(warp(faces.source, deformation), faces.source, mask), faces.driving))

    before = error()
    train(model, 12, 2e-3, one_batch=True)
    assert error() < 0.95 * before


@pytest.mark.slow
def test_motion_and_mask_are_learned_from_pictures_alone() -> None:
    torch.manual_seed(0)
    model = network()
    train(model, 600, 1e-3)
    model.eval()
    faces = draw(64, seed=10**6)
    with torch.no_grad():
        deformation, mask = predict(model, faces)
    assert end_point_error(deformation, faces) < 1.0
    face, background = mask[faces.is_face > 0].mean(), mask[faces.is_face == 0].mean()
    assert face - background > 0.5, f"{face:.2f} on the face, {background:.2f} behind it"
