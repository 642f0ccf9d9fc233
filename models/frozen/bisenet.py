"""BiSeNet (Yu et al. 2018) for face parsing, as a frozen torch network.

The spatial path is replaced by the trunk's features at stride 8. Names of the submodules are those of the published weights
(``79999_iter.pth`` of zllrunning/face-parsing.PyTorch, trained on CelebAMask-HQ), which load strictly; the trunk is
torchvision's ResNet-18 without its classifier.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

NUM_CLASSES = 19
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h, w)."""
        return F.relu(self.bn(self.conv(x)))


class Trunk(ResNet):
    """ResNet-18 that answers with its features at strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        del self.fc, self.avgpool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, 3, h, w) to (b, 128, h/8, w/8), (b, 256, h/16, w/16), (b, 512, h/32, w/32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        eighth = self.layer2(self.layer1(x))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class AttentionRefinement(nn.Module):
    """Channels weighted by what the whole picture shows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ConvNorm(inputs, outputs)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h, w)."""
        x = self.conv(x)
        weight = torch.sigmoid(self.bn_atten(self.conv_atten(F.adaptive_avg_pool2d(x, 1))))
        return x * weight


class ContextPath(nn.Module):
    """What is where, coarsely: the trunk's deep features brought up to stride 8."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = Trunk()
        self.arm16 = AttentionRefinement(256, 128)
        self.arm32 = AttentionRefinement(512, 128)
        self.conv_head32 = ConvNorm(128, 128)
        self.conv_head16 = ConvNorm(128, 128)
        self.conv_avg = ConvNorm(512, 128, kernel=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, h, w) to the trunk's and the context's features, (b, 128, h/8, w/8) each."""
        eighth, sixteenth, last = self.resnet(x)
        whole = self.conv_avg(F.adaptive_avg_pool2d(last, 1))  # (b, 128, 1, 1)
        context = F.interpolate(self.arm32(last) + whole, sixteenth.shape[2:])
        context = self.arm16(sixteenth) + self.conv_head32(context)  # (b, 128, h/16, w/16)
        context = self.conv_head16(F.interpolate(context, eighth.shape[2:]))  # (b, 128, h/8, w/8)
        return eighth, context


class FeatureFusion(nn.Module):
    """Detail and context joined, then weighted like :class:`AttentionRefinement`."""

    def __init__(self) -> None:
        super().__init__()
        self.convblk = ConvNorm(256, 256, kernel=1)
        self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        """Twice (b, 128, h, w) to (b, 256, h, w)."""
        x: Tensor = self.convblk(torch.cat([detail, context], dim=1))
        weight = torch.sigmoid(self.conv2(F.relu(self.conv1(F.adaptive_avg_pool2d(x, 1)))))
        return x * weight + x


class Head(nn.Module):
    """Features to logits."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.conv = ConvNorm(inputs, hidden)
        self.conv_out = nn.Conv2d(hidden, NUM_CLASSES, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, 19, h, w)."""
        logits: Tensor = self.conv_out(self.conv(x))
        return logits


class BiSeNet(nn.Module):
    """Face to one of 19 labels a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion()
        self.conv_out = Head(256, 256)
        # heads of the training's auxiliary losses: in the weights, not used here
        self.conv_out16 = Head(128, 64)
        self.conv_out32 = Head(128, 64)

    def forward(self, pictures: Tensor) -> Tensor:
        """RGB (b, 3, h, w), ImageNet's mean and deviation taken out, sides multiples of 32, to logits (b, 19, h, w)."""
        logits = self.conv_out(self.ffm(*self.cp(pictures)))  # (b, 19, h/8, w/8)
        return F.interpolate(logits, pictures.shape[2:], mode="bilinear", align_corners=True)


def load_bisenet(path: Path) -> BiSeNet:
    """The network with published weights, in evaluation mode, without gradients of its own."""
    network = BiSeNet()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
