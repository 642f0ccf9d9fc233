"""Networks that tell real pictures from generated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2
from typing import Literal

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


class PatchDiscriminator(nn.Module):
    """The PatchGAN of sparse-to-dense motion (Zhao, Wu and Guo 2021, supplement section 1): one score for every patch.

    Four blocks of conv4x4, norm, ReLU and average pooling, then a 1x1 convolution; without padding a score sees 61 px and
    the next lies 16 px further. First order model's, ``norm="instance"`` with ``activation="leaky_relu"``, does not
    normalise its first block.
    """

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = (128, 256, 512, 1024),
        *,
        norm: Literal["batch", "instance"] = "batch",
        activation: Literal["relu", "leaky_relu"] = "relu",
        padding: int = 0,
    ) -> None:
        """Take pictures of ``in_channels`` and at least 61 px (without padding) and of any larger size."""
        super().__init__()
        self.blocks = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(
            zip([in_channels, *widths], widths, strict=False)
        ):
            layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 4, padding=padding)]
            if norm == "batch":
                layers.append(nn.BatchNorm2d(outputs))
            elif index:
                layers.append(nn.InstanceNorm2d(outputs, affine=True))
            layers.append(nn.ReLU() if activation == "relu" else nn.LeakyReLU(0.2))
            self.blocks.append(nn.Sequential(*layers, nn.AvgPool2d(2)))
        self.score = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (b, in_channels, h, w) to raw scores (b, 1, h', w') and one feature map (b, c, h, w) per block."""
        features = []
        x = images
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return self.score(x), features
