"""What hides from the pose and expression encoders who the target is, after Latent Pose Descriptors (Burkov et al. 2020).

The published recipe is a list of imgaug calls; that library is no longer kept, so these are the same operations with the
same strengths on tensors. Colours and noise change what the pictures look like; different scales across and along change
the proportions of the face, which identify a person, and not its pose. The shift belongs to the target too: it must be
made where the driving picture says.

Everything is drawn from the generator that is passed in, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as T


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Strengths of LPD's pose augmentation; zeros switch a part off."""

    max_photometric: int = 5
    """Most operations on colours and pixels; their number is uniform in 0 to this (LPD: 5)."""
    scale: float = 0.2
    """Greatest change of the driving picture's width and of its height, each by itself (LPD: 0.2)."""
    shift: float = 0.05
    """Greatest move of target and driving picture together, in sides of the window (LPD: 0.05)."""
    probability: float = 0.5
    """Of the scales, and of the shift (LPD: 0.5)."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_photometric <= len(OPERATIONS):
            raise ValueError(
                f"max_photometric must be 0 to {len(OPERATIONS)}, got {self.max_photometric}"
            )
        for name in ("scale", "shift"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(
                    f"{name} must be at least 0 and below 0.5, got {getattr(self, name)}"
                )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be 0 to 1, got {self.probability}")


def draw_shift(rng: np.random.Generator, config: AugmentConfig, size: int) -> tuple[int, int]:
    """How far a sample moves right and down: whole pixels of a window of ``size``, so that the target stays as sharp."""
    moves, (x, y) = rng.random() < config.probability, rng.uniform(-config.shift, config.shift, 2)
    return (round(x * size), round(y * size)) if moves else (0, 0)


def draw_scales(rng: np.random.Generator, config: AugmentConfig) -> tuple[float, float]:
    """Factors of width and height."""
    scales = rng.random() < config.probability
    x, y = rng.uniform(1 - config.scale, 1 + config.scale, 2).tolist()
    return (x, y) if scales else (1.0, 1.0)


def shift(images: Tensor, by: tuple[int, int]) -> Tensor:
    """Move pictures (b, c, h, w) by whole pixels (right, down); what comes in is the mirrored border."""
    x, y = by
    if not (x or y):
        return images
    h, w = images.shape[-2:]
    padded = F.pad(images, (max(x, 0), max(-x, 0), max(y, 0), max(-y, 0)), mode="reflect")
    return padded[..., max(-y, 0) : max(-y, 0) + h, max(-x, 0) : max(-x, 0) + w]


def resample(images: Tensor, matrix: Tensor, size: int) -> Tensor:
    """The square of ``size`` pixels that a matrix maps a part of each picture onto; the border is mirrored.

    Args:
        images: (b, c, h, w).
        matrix: (2, 3), pixels of the picture → pixels of the result, centres at integer + 0.5.
        size: side of the result.

    Returns:
        (b, c, size, size), bilinear.
    """
    h, w = images.shape[-2:]
    whole = torch.cat([matrix.double(), matrix.new_tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    # both sides in grid_sample's units, -1 and 1 at the borders of the picture
    from_grid = torch.tensor([[size / 2, 0, size / 2], [0, size / 2, size / 2], [0, 0, 1]]).double()
    to_grid = torch.tensor([[2 / w, 0, -1], [0, 2 / h, -1], [0, 0, 1]]).double()
    theta = (to_grid @ torch.linalg.inv(whole) @ from_grid)[:2].to(images)
    b, c = images.shape[:2]
    grid = F.affine_grid(theta.expand(b, 2, 3), [b, c, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def photometric(images: Tensor, rng: np.random.Generator, config: AugmentConfig) -> Tensor:
    """0 to ``max_photometric`` different operations in random order, the same ones with the same strengths for all images.

    Args:
        images: (b, 3, h, w) in [-1, 1]: views of one target. Random fields (noise) differ between them.
        rng: of this sample.
        config: of the strengths.

    Returns:
        (b, 3, h, w) in [-1, 1].
    """
    count = int(rng.integers(config.max_photometric + 1))
    x = (images + 1) / 2
    for number in rng.permutation(len(OPERATIONS))[:count].tolist():
        x = OPERATIONS[number](x, rng).clamp(0, 1)
    return x * 2 - 1 if count else images


# --- the operations: (b, 3, h, w) in [0, 1] to the same ---------------------------------------------------------


def blur(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Gaussian with σ 0 to 1 px, or the mean or the median of 3 x 3 (or 1 x 1) pixels."""
    kind, sigma, wide = rng.integers(3), float(rng.uniform(0, 1)), rng.random() < 0.5
    if kind == 0:
        return T.gaussian_blur(x, [5, 5], [max(sigma, 0.01)] * 2)
    if not wide:
        return x
    if kind == 1:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2).median(dim=-1).values


def sharpen(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Blend with a high-pass of lightness 1 to 1.5."""
    alpha, lightness = rng.uniform(0, 1), rng.uniform(1, 1.5)
    kernel = -np.ones((3, 3))
    kernel[1, 1] = 8 + lightness
    return _blend(x, kernel, alpha)


def emboss(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Blend with a relief of strength 0 to 0.5."""
    alpha, s = rng.uniform(0, 1), rng.uniform(0, 0.5)
    return _blend(x, np.array([[-1 - s, -s, 0], [-s, 1, s], [0, s, 1 + s]]), alpha)


def edges(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Blend with edges, by up to 0.15 and more in some places than in others (smooth noise in place of simplex noise)."""
    alpha = rng.uniform(0, 0.15)
    coarse = torch.from_numpy(rng.random((len(x), 1, 4, 4), dtype=np.float32)).to(x)
    where = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
    found = _blend(x, np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float64), 1.0)
    return x + alpha * where * (found - x)


def noise(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Gaussian noise of up to 0.05, grey or coloured."""
    scale, channels = float(rng.uniform(0, 0.05)), 3 if rng.random() < 0.5 else 1
    field = rng.standard_normal((len(x), channels, *x.shape[-2:]), dtype=np.float32)
    return x + scale * torch.from_numpy(field).to(x)


def add(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Lighter or darker by up to 10 of 255, for each channel by itself every other time."""
    values = rng.uniform(-10 / 255, 10 / 255, 3) if rng.random() < 0.5 else [rng.uniform(-10 / 255, 10 / 255)] * 3  # fmt: skip
    return x + x.new_tensor(np.array(values)).reshape(1, 3, 1, 1)


def saturate(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Colours stronger or weaker. LPD adds up to 20 of 255 to the saturation; here they grow or shrink by up to a fifth."""
    return T.adjust_saturation(x, float(rng.uniform(0.8, 1.2)))


def compress(x: Tensor, rng: np.random.Generator) -> Tensor:
    """A JPEG of quality 1 to 30: what imgaug calls a compression of 70 to 99."""
    quality = int(rng.integers(1, 31))
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    decoded: list[Any] = []
    for picture in pixels:  # cv2: torchvision gives its codecs up
        coded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        decoded.append(cv2.imdecode(coded, cv2.IMREAD_COLOR_RGB))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(x) / 255


def multiply(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness times 0.5 to 1.5."""
    return x * float(rng.uniform(0.5, 1.5))


def contrast(x: Tensor, rng: np.random.Generator) -> Tensor:
    """About mid grey, linear by 0.75 to 1.25 or along a sigmoid of gain 3 to 11."""
    linear, factor, gain = rng.random() < 0.5, rng.uniform(0.75, 1.25), rng.uniform(3, 11)
    return (x - 0.5) * float(factor) + 0.5 if linear else torch.sigmoid((x - 0.5) * float(gain))


def elastic(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Every other time each pixel is taken from up to 0.5 to 3.5 px away (LPD's σ of 0.15 px smooths nothing)."""
    moves, alpha = rng.random() < 0.5, float(rng.uniform(0.5, 3.5))
    if not moves:
        return x
    b, h, w = len(x), *x.shape[-2:]
    grid = F.affine_grid(torch.eye(2, 3).expand(b, 2, 3), [b, 3, h, w], align_corners=False)
    field = torch.from_numpy(rng.uniform(-1, 1, (b, h, w, 2)).astype(np.float32))
    grid = grid + field * alpha * torch.tensor([2 / w, 2 / h])
    return F.grid_sample(x, grid.to(x), padding_mode="reflection", align_corners=False)


def _blend(x: Tensor, kernel: np.ndarray, alpha: float) -> Tensor:
    """(1 - alpha) of the picture and alpha of what a 3 x 3 kernel makes of it."""
    identity = np.zeros((3, 3))
    identity[1, 1] = 1
    weight = x.new_tensor((1 - alpha) * identity + alpha * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, groups=3)


OPERATIONS: tuple[Callable[[Tensor, np.random.Generator], Tensor], ...] = (
    blur,
    sharpen,
    emboss,
    edges,
    noise,
    add,
    saturate,
    compress,
    multiply,
    contrast,
    elastic,
)
"""LPD's list, in its order."""
