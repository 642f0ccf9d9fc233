"""What pixels are matched by: a trunk, a feature pyramid on it, and one projection each for A (φ) and T (θ).

The supplement says "VGG-19 for feature extraction" (§3.2); GHOST 2.0's account of the same module adds the pyramid (Lin et al.
2017), HeSer.Pytorch the projections. The trunk is frozen where it comes trained, everything behind it is spectrally normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.frozen.vgg import Vgg19Features, VggName
from models.layers import spectral

TrunkName = Literal["vgg19", "vgg_normalised_conv3_1", "small"]
LAYERS: dict[VggName, dict[int, str]] = {
    "vgg19": {4: "relu3_4", 8: "relu4_4", 16: "relu5_4"},
    "vgg_normalised_conv3_1": {1: "relu1_2", 2: "relu2_2", 4: "relu3_1"},
}
"""Stride → the layer of a trained trunk that the pyramid takes there."""
SMALL_WIDTHS = {1: 16, 2: 32, 4: 64, 8: 128}
"""Stride → channels of the trunk that is trained from scratch."""


def strides_of(trunk: TrunkName) -> tuple[int, ...]:
    """Strides that a trunk has features at, ascending."""
    return tuple(SMALL_WIDTHS if trunk == "small" else LAYERS[trunk])


class SmallTrunk(nn.Module):
    """Two 3x3 convolutions a level, trained with the rest: for where no VGG weights can be had."""

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        self.levels = nn.ModuleList()
        for width in SMALL_WIDTHS.values():
            self.levels.append(
                nn.Sequential(
                    spectral(nn.Conv2d(inputs, width, 3, padding=1)),
                    nn.ReLU(),
                    spectral(nn.Conv2d(width, width, 3, padding=1)),
                    nn.ReLU(),
                )
            )
            inputs = width

    def forward(self, images: Tensor) -> list[Tensor]:
        """(b, 3, h, w) in [-1, 1] to maps at the strides of ``SMALL_WIDTHS``."""
        found, x = [], images
        for number, level in enumerate(self.levels):
            x = level(functional.avg_pool2d(x, 2) if number else x)
            found.append(x)
        return found


class Pyramid(nn.Module):
    """The finest level of a feature pyramid: 1x1 laterals, nearest top-down addition, one 3x3 at the end."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        """``channels`` of the levels, finest first; ``width`` of all that follows."""
        super().__init__()
        self.laterals = nn.ModuleList([spectral(nn.Conv2d(c, width, 1)) for c in channels])
        self.output = spectral(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps (b, c_i, h / 2^i, w / 2^i) to (b, width, h, w)."""
        x = self.laterals[-1](levels[-1])
        for lateral, level in zip(self.laterals[-2::-1], levels[-2::-1], strict=True):
            x = functional.interpolate(x, size=level.shape[-2:], mode="nearest") + lateral(level)
        merged: Tensor = self.output(x)
        return merged


class FeatureExtractor(nn.Module):
    """Pictures to the features of A and of T."""

    def __init__(self, trunk: TrunkName, stride: int, width: int) -> None:
        """Build without reading any file: a trained trunk's weights come with :meth:`load_trunk` or a state dict.

        Args:
            trunk: where the features begin.
            stride: pixels a cell of the result; one of :func:`strides_of`.
            width: channels of pyramid and result.
        """
        super().__init__()
        if stride not in strides_of(trunk):
            raise ValueError(
                f"trunk {trunk} has features at strides {strides_of(trunk)}, not {stride}"
            )
        self.trunk_name = trunk
        self.first = strides_of(trunk).index(stride)
        self.trunk: SmallTrunk | Vgg19Features
        if trunk == "small":
            self.trunk = SmallTrunk()
            channels = list(SMALL_WIDTHS.values())[self.first :]
        else:
            layers = list(LAYERS[trunk].values())[self.first :]
            self.trunk = _bare_vgg(layers, trunk)
            channels = self.trunk.channels
        self.pyramid = Pyramid(channels, width)
        self.phi = spectral(nn.Conv2d(width, width, 1))
        self.theta = spectral(nn.Conv2d(width, width, 1))
        if trunk == "small":
            # Spectral norm leaves little of a picture's variation in it; beside that the usual biases are large, and all
            # locations look alike: at 256 px the cycle loss stayed at 0.23 for 10 steps, without biases it fell to 0.07
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
        # A and T are compared from the first step on: with projections of their own the landmarks carried between two
        # frames were 6.4 px of 128 off after 75 steps, with equal ones 1.4 px
        self.theta.load_state_dict(self.phi.state_dict())

    def load_trunk(self) -> None:
        """Read the trained weights of the trunk, if it is one that has any.

        Raises:
            WeightsError: they are missing or wrong.
        """
        if self.trunk_name != "small":
            assert isinstance(self.trunk, Vgg19Features)
            trained = _saved_whole(Vgg19Features(self.trunk.layers, self.trunk_name))
            self.trunk.load_state_dict(trained.state_dict())

    def forward(self, animated: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A (a, 3, S, S) and pictures T (t, 3, S, S) in [-1, 1] to φ of A and θ of T, (·, width, S / stride, S / stride).

        All pass the trunk together: one forward pass of each layer in a step, as spectral norm and gradient reduction want.
        """
        levels = self.trunk(torch.cat([animated, targets]))
        merged = self.pyramid(levels[self.first :] if self.trunk_name == "small" else levels)
        a, t = merged.split([len(animated), len(targets)])
        return self.phi(a), self.theta(t)


def _bare_vgg(layers: Sequence[str], weights: VggName) -> Vgg19Features:
    return _saved_whole(Vgg19Features(layers, weights, random_init=True))


def _saved_whole(vgg: Vgg19Features) -> Vgg19Features:
    """The same network with its normalisation in the state dict: it differs between the two files of weights."""
    vgg.register_buffer("matrix", vgg.matrix)
    vgg.register_buffer("shift", vgg.shift)
    return vgg
