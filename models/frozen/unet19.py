"""A plain U-Net of 467,123 parameters for face parsing, as a frozen torch network.

Names of the submodules are those of the published weights (SimonEnkel/lightweight-unet-face-parsing), which load strictly.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES = 19


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


class UNet19(nn.Module):
    """Two steps down, two up, skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = double_conv(3, 32)
        self.enc2 = double_conv(32, 64)
        self.bottleneck = double_conv(64, 128)
        self.up1 = nn.ConvTranspose2d(128, 64, 2, stride=2)
        self.dec1 = double_conv(128, 64)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.dec2 = double_conv(64, 32)
        self.out = nn.Conv2d(32, NUM_CLASSES, 1)

    def forward(self, faces: Tensor) -> Tensor:
        """RGB (b, 3, h, w) in [-1, 1], h and w multiples of 4, to logits (b, 19, h, w) in the network's own order."""
        fine = self.enc1(faces)  # (b, 32, h, w)
        half = self.enc2(F.max_pool2d(fine, 2))  # (b, 64, h/2, w/2)
        coarse = self.bottleneck(F.max_pool2d(half, 2))  # (b, 128, h/4, w/4)
        half = self.dec1(torch.cat([self.up1(coarse), half], dim=1))  # (b, 64, h/2, w/2)
        logits: Tensor = self.out(self.dec2(torch.cat([self.up2(half), fine], dim=1)))
        return logits


def load_unet19(path: Path) -> UNet19:
    """The network with published weights, in evaluation mode, without gradients of its own."""
    network = UNet19()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
