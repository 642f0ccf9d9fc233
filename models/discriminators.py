"""Networks that tell real pictures from generated ones."""

from __future__ import annotations

from collections.abc import Callable
from math import log2

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import spectral


class ResidualDiscriminator(nn.Module):
    """The discriminator of latent pose reenactment (Burkov et al. 2020) without its projection, unconditional.

    Residual stages without normalisation halve the picture down to 4 x 4; smaller pictures end in flat stages, so that
    there are always as many features. Every operator is spectrally normalised. A feature is the output of a stage,
    before the next stage's ReLU; unlike the original, whose ReLU works in place, skips see the same raw values.
    """

    def __init__(
        self, in_channels: int, size: int, base: int = 64, limit: int = 512, stages: int = 7
    ) -> None:
        """Take pictures of ``in_channels`` and ``size`` x ``size``, a power of two from 8; widths double from ``base`` to ``limit``."""
        super().__init__()
        if size < 8 or not log2(size).is_integer():
            raise ValueError(f"a discriminator takes powers of two from 8 on, not {size} pixels")
        halvings = min(int(log2(size)) - 2, stages)
        widths = [min(base * 2**i, limit) for i in range(halvings)]
        widths += [widths[-1]] * (stages - halvings)
        self.stages = nn.ModuleList([FirstStage(in_channels, base)])
        for i in range(1, stages):
            self.stages.append(ResidualStage(widths[i - 1], widths[i], is_halved=i < halvings))
        self.score = spectral(nn.Linear(widths[-1], 1))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (b, in_channels, size, size) to scores (b,), high for real, and one feature map (b, c, h, w) per stage."""
        features = []
        x = images
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        pooled = torch.relu(x).sum(dim=(2, 3))  # (b, c)
        return self.score(pooled).squeeze(1), features


class FirstStage(nn.Module):
    """From pixels to features: no ReLU before the first convolution, which would clip the picture."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = spectral(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.second = spectral(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = spectral(nn.Conv2d(inputs, outputs, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h/2, w/2)."""
        y = self.second(torch.relu(self.first(images)))
        return F.avg_pool2d(y, 2) + F.avg_pool2d(self.skip(images), 2)


class ResidualStage(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, beside a 1x1; halved by averaging, or flat, and then the skip is the input itself."""

    def __init__(self, inputs: int, outputs: int, *, is_halved: bool) -> None:
        super().__init__()
        self.first = spectral(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.second = spectral(nn.Conv2d(outputs, outputs, 3, padding=1))
        is_identity = not is_halved and inputs == outputs
        self.skip = nn.Identity() if is_identity else spectral(nn.Conv2d(inputs, outputs, 1))
        self.pool: Callable[[Tensor], Tensor] = nn.AvgPool2d(2) if is_halved else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h/2, w/2), or the same size when flat."""
        y = self.second(torch.relu(self.first(torch.relu(x))))
        return self.pool(y) + self.pool(self.skip(x))
