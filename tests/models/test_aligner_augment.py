"""The pose augmentation: where pixels go, that nothing but the generator decides, and that colours stay colours."""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from models.aligner import augment
from models.aligner.augment import OPERATIONS, AugmentConfig, photometric, resample, shift


def picture(size: int = 32, count: int = 1) -> Tensor:
    """Smooth and coloured, (count, 3, size, size) in [-1, 1]."""
    rng = np.random.default_rng(5)
    images = [cv2.GaussianBlur(rng.random((size, size, 3), np.float32), (0, 0), 2) for _ in range(count)]  # fmt: skip
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return ((x - x.min()) / (x.max() - x.min()) * 2 - 1).contiguous()


@pytest.mark.parametrize("by", [(0, 0), (3, 0), (-3, 2), (1, -5)])
def test_a_shift_is_what_cv2_does_with_a_mirrored_border(by: tuple[int, int]) -> None:
    x = picture(count=2)
    moved = shift(x, by)
    matrix = np.array([[1, 0, by[0]], [0, 1, by[1]]], np.float32)
    for before, after in zip(x, moved, strict=True):
        reference = cv2.warpAffine(
            before.permute(1, 2, 0).numpy(),
            matrix,
            (32, 32),
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        assert np.array_equal(after.permute(1, 2, 0).numpy(), reference)


@pytest.mark.parametrize(
    "matrix",
    [
        [[1, 0, 0], [0, 1, 0]],
        [[1.6, 0, -9.3], [0, 1.6, -11.1]],
        [[0.9, 0.2, 2], [-0.2, 0.9, 5]],
        [[1.2, 0, -3.2], [0, 0.8, 3.2]],
    ],
)
def test_resampling_is_what_cv2_does(matrix: list[list[float]]) -> None:
    x, size = picture(), 24
    ours = resample(x, torch.tensor(matrix, dtype=torch.float64), size)[0].permute(1, 2, 0).numpy()
    theirs = np.array(matrix, np.float64)
    theirs[:, 2] += theirs[:, :2] @ [0.5, 0.5] - 0.5  # cv2 counts centres from 0
    reference = cv2.warpAffine(
        x[0].permute(1, 2, 0).numpy(),
        theirs,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    assert np.abs(ours - reference).max() < 0.02, "more than cv2's rounding of places to 1/32 px"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_an_operation_repeats_itself_and_keeps_colours_near(operation: object) -> None:
    x = (picture(count=2) + 1) / 2
    before = x.clone()
    changed = 0
    for seed in range(6):
        first, again = (operation(x, np.random.default_rng(seed)) for _ in range(2))  # type: ignore[operator]
        assert torch.equal(first, again)
        assert first.shape == x.shape
        assert first.dtype == torch.float32
        assert torch.isfinite(first).all()
        changed += not torch.equal(first, x)
    assert changed >= 1
    assert torch.equal(x, before), "the picture that came in was changed"


def test_strengths_are_those_of_the_paper() -> None:
    """Bounds that hold for every draw, from flat pictures whose right answers are known."""
    grey = torch.full((1, 3, 16, 16), 0.5)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        assert 0.25 <= augment.multiply(grey, rng).mean() <= 0.75
        assert torch.allclose(augment.contrast(grey, rng), grey), "mid grey is the fixed point"
        assert (augment.add(grey, rng) - grey).abs().max() <= 10 / 255 + 1e-6
        assert augment.noise(grey, rng).std() <= 0.06
        for operation in (augment.blur, augment.emboss, augment.saturate, augment.elastic):
            assert torch.allclose(operation(grey, rng), grey, atol=1e-5), operation.__name__
        assert 0.5 - 1e-6 <= augment.sharpen(grey, rng).min() <= 0.75 + 1e-6


def drawn_range(measure: Callable[[np.random.Generator], float], draws: int = 60) -> list[float]:
    """Least and greatest of what an operation does with so many draws."""
    found = [measure(np.random.default_rng(seed)) for seed in range(draws)]
    return [min(found), max(found)]


def within(found: list[float], low: float, high: float, share: float = 0.15) -> bool:
    """Whether draws fill an interval: none lies outside, and its ends are reached but for a share of its length."""
    slack = share * (high - low)
    return low - 1e-5 <= found[0] <= low + slack and high - slack <= found[1] <= high + 1e-5


def test_strengths_reach_as_far_as_latent_pose_reenactments() -> None:
    """The published ranges, each measured on a picture where it can be read off."""
    grey = torch.full((1, 3, 16, 16), 0.5)
    rng = np.random.default_rng
    assert within(drawn_range(lambda r: float(augment.multiply(grey, r).mean())), 0.25, 0.75)
    added = [(augment.add(grey, rng(seed)) - grey)[0, :, 0, 0] * 255 for seed in range(60)]
    for kind in (True, False):  # all channels alike, or each by itself
        some = torch.cat([x for x in added if bool((x - x[0]).abs().max() < 1e-4) == kind])
        assert within([float(some.min()), float(some.max())], -10, 10, 0.3), kind
    assert 0.04 < drawn_range(lambda r: float(augment.noise(grey, r).std()))[1] < 0.055
    steps = torch.tensor([0.49, 0.51]).expand(1, 3, 8, 2)
    slopes = drawn_range(lambda r: float(augment.contrast(steps, r).diff().mean() / 0.02))
    assert 0.75 - 1e-3 <= slopes[0] < 0.8, "linear from 0.75 on"
    assert 2.4 < slopes[1] <= 11 / 4, "a sigmoid of gain g is g / 4 steep in the middle"
    colour = torch.tensor([0.6, 0.4, 0.4]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    chroma = drawn_range(lambda r: float((augment.saturate(colour, r)[0, 0] - 0.4).mean() / 0.2))
    grey_level = 0.299 * 0.6 + 0.701 * 0.4
    low, high = ((grey_level + f * (0.6 - grey_level) - 0.4) / 0.2 for f in (0.8, 1.2))
    assert within(chroma, low, high)
    darker = drawn_range(lambda r: float(augment.edges(grey, r).min()))
    assert 0.425 - 1e-5 <= darker[0] < 0.45, (
        "flat pictures have no edges: up to 0.15 of them is black"
    )
    columns = torch.arange(16.0).expand(1, 3, 16, 16) / 16
    one = rng(0)
    relief = [16 * float((augment.emboss(columns, one) - columns)[0, 0, 8, 8]) for _ in range(400)]
    # a slope is added 2 + 4 s times, on average with half of alpha
    assert np.mean(relief) == pytest.approx(0.5 * (2 + 4 * 0.25), abs=0.2)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    moves = drawn_range(lambda r: float((augment.elastic(columns, r) - columns)[inner].abs().max() * 16))  # fmt: skip
    assert 2.8 < moves[1] <= 3.5 + 1e-4


def test_blurs_spread_a_point_little_and_leave_a_step_where_it_is() -> None:
    point, step = torch.zeros(1, 3, 11, 11), torch.zeros(1, 3, 11, 12)
    point[..., 5, 5] = 1
    step[..., 6:] = 1
    place = (torch.arange(11.0) - 5) ** 2
    spreads = []
    for seed in range(60):
        spread = augment.blur(point, np.random.default_rng(seed))[0, 0].sum(dim=0)
        if spread.sum() > 0.5:  # a median takes a point away
            spreads.append(float((spread * place).sum() / spread.sum()))
        assert augment.blur(step, np.random.default_rng(seed)).mean() == pytest.approx(
            0.5, abs=1e-4
        )
    assert 0.7 < max(spreads) < 1.01, "variances: at most the square of a σ of 1 px"
    assert any(0.01 < spread < 0.4 for spread in spreads)
    still = sum(
        torch.equal(augment.blur(point, np.random.default_rng(s)), point) for s in range(60)
    )
    assert 10 < still < 30, "a third: means and medians of one pixel"


def test_random_fields_differ_from_place_to_place_and_from_view_to_view() -> None:
    grey = torch.full((2, 3, 16, 16), 0.5)
    for operation in (augment.noise, augment.edges):
        made = operation(grey, np.random.default_rng(3))
        assert made.std(dim=(2, 3)).min() > 1e-4, operation.__name__
        assert not torch.equal(made[0], made[1]), operation.__name__


def test_a_jpeg_is_coarse_and_keeps_its_colours() -> None:
    """Quality 1 to 30; against Pillow's encoder, of the same tables."""
    from PIL import Image

    x = (picture(64) + 1) / 2
    pixels = (x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    errors = []
    for seed in range(12):
        made = augment.compress(x, np.random.default_rng(seed))
        errors.append(float((made - x).abs().mean()))
    reference = []
    for quality in (1, 30):
        coded = io.BytesIO()
        Image.fromarray(pixels).save(coded, "JPEG", quality=quality)
        reference.append(np.abs(np.asarray(Image.open(coded)) / 255.0 - pixels / 255.0).mean())
    worst, best = reference
    orange = torch.tensor([0.9, 0.5, 0.1]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    coded = [augment.compress(orange, np.random.default_rng(seed))[0, :, 4, 4] for seed in range(5)]
    assert (torch.stack(coded).mean(dim=0) - orange[0, :, 0, 0]).abs().max() < 0.15
    assert 0.8 * best < min(errors) < max(errors) < 1.2 * worst
    assert max(errors) > (best + worst) / 2


def test_pictures_stay_in_their_range() -> None:
    bright = picture(16).sign()
    for seed in range(60):
        x = photometric(bright, np.random.default_rng(seed), AugmentConfig())
        assert -1 <= x.min() <= x.max() <= 1


def test_the_number_of_operations_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    marks = [lambda x, rng, i=i: (calls.append(i), x)[1] for i in range(11)]  # noqa: ARG005
    monkeypatch.setattr(augment, "OPERATIONS", tuple(marks))
    counts = np.zeros(6, int)
    used = np.zeros(11, int)
    for seed in range(600):
        calls.clear()
        photometric(picture(8), np.random.default_rng(seed), AugmentConfig())
        assert len(set(calls)) == len(calls), "one operation twice"
        counts[len(calls)] += 1
        used[calls] += 1
    assert counts.min() > 65
    assert used.min() > 100
    assert used.max() < 175


def test_nothing_is_drawn_beyond_the_limits() -> None:
    config = AugmentConfig()
    shifts, scales = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        shifts.append(augment.draw_shift(rng, config, 512))
        scales.append(augment.draw_scales(rng, config))
    moved = [by for by in shifts if by != (0, 0)]
    assert 150 < len(moved) < 250
    assert 20 <= max(map(abs, sum(moved, ()))) <= 26
    scaled = np.array([pair for pair in scales if pair != (1, 1)])
    assert 150 < len(scaled) < 250
    assert 0.8 <= scaled.min() < 0.83
    assert 1.17 < scaled.max() <= 1.2
    assert np.abs(scaled[:, 0] - scaled[:, 1]).mean() > 0.08, "width and height change apart"
    none = AugmentConfig(max_photometric=0, scale=0.0, shift=0.0)
    x = picture()
    rng = np.random.default_rng(0)
    assert augment.draw_shift(rng, none, 512) == (0, 0)
    assert augment.draw_scales(rng, none) == (1.0, 1.0)
    assert torch.equal(photometric(x, rng, none), x)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_photometric", 12), ("scale", 0.5), ("shift", -0.1), ("probability", 2)],
)
def test_bad_strengths_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        AugmentConfig(**{field: value})  # type: ignore[arg-type]
