"""MobileFaceNet (Chen et al. 2018, table 1) for chips of 96 x 112 pixels, as a frozen torch network.

Names of the submodules are those of the published checkpoint (Xiaoccer/MobileFaceNet_Pytorch), which loads strictly.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

BLOCKS = (
    # expansion, channels, repeats, stride of the first
    (2, 64, 5, 2),
    (4, 128, 1, 2),
    (2, 128, 6, 1),
    (4, 128, 1, 2),
    (2, 128, 2, 1),
)


class ConvNorm(nn.Module):
    """Convolution, batch norm and, unless linear, PReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        depthwise: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__()
        groups = inputs if depthwise else 1
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = nn.Identity() if linear else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h', w')."""
        y: Tensor = self.prelu(self.bn(self.conv(x)))
        return y


class Bottleneck(nn.Module):
    """Inverted residual: widen, depthwise 3x3, narrow; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.PReLU(wide),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.PReLU(wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h / stride, w / stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.is_residual else y


class MobileFaceNet(nn.Module):
    """Aligned face to identity vector; differentiable in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, 64, 3, stride=2, padding=1)
        self.dw_conv1 = ConvNorm(64, 64, 3, padding=1, depthwise=True)
        blocks: list[nn.Module] = []
        inputs = 64
        for expansion, channels, repeats, stride in BLOCKS:
            for i in range(repeats):
                blocks.append(Bottleneck(inputs, channels, stride if i == 0 else 1, expansion))
                inputs = channels
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = ConvNorm(128, 512, 1)
        self.linear7 = ConvNorm(512, 512, (7, 6), depthwise=True, linear=True)
        self.linear1 = ConvNorm(512, 128, 1, linear=True)

    def forward(self, faces: Tensor) -> Tensor:
        """RGB chips (b, 3, 112, 96), (value - 127.5) / 128, to vectors (b, 128), not normalised."""
        x = self.dw_conv1(self.conv1(faces))  # (b, 64, 56, 48)
        x = self.conv2(self.blocks(x))  # (b, 512, 7, 6)
        y: Tensor = self.linear1(self.linear7(x)).flatten(1)  # (b, 128)
        return y


def load_mobilefacenet(path: Path) -> MobileFaceNet:
    """The network with published weights, in evaluation mode, without gradients of its own."""
    network = MobileFaceNet()
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(checkpoint["net_state_dict"])
    return network.eval().requires_grad_(False)
