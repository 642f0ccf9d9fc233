"""The image generator: Johnson's network cut in two, as in first order model (Siarohin et al. 2019).

``encode`` sees the source alone and runs once; what lies between the halves (warp, blend, occlude) is in ``network.py``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import exact


class ConvNormReLU(nn.Sequential):
    """Convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ResidualBlock(nn.Module):
    """Norm and ReLU before each of two convolutions, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w), same out."""
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return x + y


class Generator(nn.Module):
    """One filtering block, ``down`` halvings | residual blocks, as many doublings, one filtering block."""

    def __init__(self, base: int, limit: int, down: int, residuals: int) -> None:
        super().__init__()
        widths = [min(base << level, limit) for level in range(down + 1)]
        self.first = ConvNormReLU(3, widths[0], 7)
        self.down = nn.ModuleList(
            ConvNormReLU(inputs, outputs, 3) for inputs, outputs in pairwise(widths)
        )
        self.residuals = nn.Sequential(*(ResidualBlock(widths[-1]) for _ in range(residuals)))
        self.up = nn.ModuleList(
            ConvNormReLU(inputs, outputs, 3) for inputs, outputs in pairwise(widths[::-1])
        )
        self.final = nn.Conv2d(widths[0], 3, 7, padding=3)

    def encode(self, image: Tensor) -> Tensor:
        """(b, 3, s, s) in [-1, 1] to (b, c, s / 2^down, s / 2^down)."""
        x = self.first(image)
        for block in self.down:
            x = F.avg_pool2d(block(x), 2)
        return x

    def decode(self, features: Tensor) -> Tensor:
        """(b, c, s / 2^down, s / 2^down) to (b, 3, s, s) in (-1, 1)."""
        x = self.residuals(features)
        for block in self.up:
            x = block(F.interpolate(x, scale_factor=2, mode="nearest"))
        return 2 * torch.sigmoid(exact(self.final(x))) - 1
