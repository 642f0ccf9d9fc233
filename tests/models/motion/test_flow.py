"""One convention for coordinates: grids, warps, patches."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from models.motion.flow import (
    cut_patches,
    identity_grid,
    normalise,
    paste_patches,
    shrink,
    taper,
    warp,
)
from tests.models.motion.tiny import pictures


@pytest.mark.parametrize("size", [256, 64])
def test_the_identity_warp_changes_nothing(size: int) -> None:
    noise = torch.rand(1, 3, size, size)
    assert torch.allclose(warp(noise, identity_grid(size)[None]), noise, atol=1e-6)


def test_shrinking_the_identity_grid_gives_the_small_identity_grid() -> None:
    small = shrink(identity_grid(256).permute(2, 0, 1)[None], 4)[0].permute(1, 2, 0)
    assert torch.equal(small, identity_grid(64))


def test_pixels_of_the_house_are_the_grids_coordinates() -> None:
    centres = torch.tensor([[0.5, 0.5], [7.5, 255.5]])
    grid = identity_grid(256)
    assert torch.allclose(
        normalise(centres, 256), torch.stack([grid[0, 0], grid[255, 7]]), atol=1e-7
    )


def test_flow_is_backward() -> None:
    picture = torch.rand(1, 3, 64, 64)
    deformation = identity_grid(64)[None] - torch.tensor([2 * 8 / 64, 0])
    moved = warp(picture, deformation)
    assert torch.allclose(moved[..., 8:], picture[..., :-8], atol=1e-6)
    assert torch.allclose(moved[..., :8], picture[..., :1].expand(1, 3, 64, 8), atol=1e-6)


def test_warp_agrees_with_opencv() -> None:
    picture = pictures(size=32)
    grid = identity_grid(32)
    angle = torch.tensor(0.3)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    deformation = grid @ turn.T * 0.9 + 0.05
    ours = warp(picture, deformation[None])[0].permute(1, 2, 0).numpy()
    pixels = ((deformation + 1) * 16 - 0.5).numpy()  # cv2 counts pixel centres from 0
    theirs = cv2.remap(
        np.ascontiguousarray(picture[0].permute(1, 2, 0).numpy()),
        pixels[..., 0],
        pixels[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    assert np.abs(ours - theirs).max() < 0.02  # cv2 rounds positions to 1/32 pixel


def test_zeros_or_border_outside() -> None:
    ones, far = torch.ones(1, 1, 4, 4), identity_grid(4)[None] + 3
    assert warp(ones, far).eq(1).all()
    assert warp(ones, far, "zeros").eq(0).all()


def test_warps_stay_in_float32_under_autocast() -> None:
    picture, deformation = pictures(size=32), identity_grid(32)[None] + 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warped = warp(picture.bfloat16(), deformation)
        small = shrink(deformation.permute(0, 3, 1, 2), 4)
    assert warped.dtype == small.dtype == torch.float32
    assert torch.equal(warped, warp(picture.bfloat16().float(), deformation))


def test_a_patch_at_an_aligned_centre_is_the_pixels_and_goes_back_exactly() -> None:
    picture = torch.rand(1, 3, 256, 256)
    centre = normalise(torch.tensor([[100.0, 120.0]]), 256)
    patch = cut_patches(picture, centre, 0.25, 64)
    assert torch.allclose(patch, picture[..., 88:152, 68:132], atol=2e-5)
    pasted, weight = paste_patches(patch, centre, 0.25, 256)
    inside = weight[0, 0] > 0
    assert inside.sum() == 64 * 64
    assert torch.allclose(pasted[..., inside], picture[..., inside], atol=5e-5)
    assert pasted[..., ~inside].eq(0).all()


def test_a_patch_between_pixels_goes_back_almost_exactly() -> None:
    axis = torch.linspace(-3, 3, 256)
    picture = (torch.sin(axis)[:, None] * torch.cos(2 * axis)[None])[None, None]
    centre = normalise(torch.tensor([[100.37, 120.81]]), 256)
    patch = cut_patches(picture, centre, 0.25, 64)
    pasted, weight = paste_patches(patch, centre, 0.25, 256)
    inside = weight == 1
    assert inside.sum() > 2000
    assert (pasted - picture)[inside].abs().max() < 0.01 * picture.abs().max()


def test_a_patch_beyond_the_picture_repeats_its_border() -> None:
    picture = torch.rand(1, 1, 64, 64)
    patch = cut_patches(picture, torch.tensor([[-1.0, 0.0]]), 0.25, 16)
    assert torch.allclose(patch[0, 0, :, :8], picture[0, 0, 24:40, :1].expand(16, 8), atol=1e-5)


def test_the_taper_is_continuous_and_ends_at_the_edge() -> None:
    line = torch.linspace(-1.2, 1.2, 2401)
    weight = taper(torch.stack([line, torch.zeros_like(line)], dim=-1))
    assert weight[line.abs() <= 0.7499].eq(1).all()
    assert weight[line.abs() >= 1.0001].abs().max() < 1e-6
    assert weight.diff().abs().max() < 0.001 * np.pi / 0.25 / 2 * 1.01
    corner = taper(torch.tensor([[0.875, 0.875]]))
    assert corner.item() == pytest.approx(0.25, abs=1e-6)
