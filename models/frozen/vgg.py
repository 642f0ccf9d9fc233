"""Features of VGG-19 (Simonyan and Zisserman 2014), trained on ImageNet: what "looks alike" is measured with.

``vgg19`` is torchvision's, normalised as it was trained, RGB (latent pose reenactment and its heirs mix up the channels).
``vgg_normalised_conv3_1`` is the small, normalised network of style transfer that ends at relu3_1; its features have mean 0.8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.frozen.weights import find

VggName = Literal["vgg19", "vgg_normalised_conv3_1"]
WEIGHTS: dict[VggName, tuple[str, ...]] = {
    "vgg19": ("vgg19",),
    "vgg_normalised_conv3_1": ("vgg_normalised_conv3_1",),
}
"""Entries of ``models.frozen.weights`` that each network loads."""

BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""Channels and convolutions of the five blocks, each but the first after a 2x2 maximum, with which the weights were trained; latent
pose reenactment and its heirs take means there."""
LAYERS = [f"relu{i}_{j}" for i, (_, depth) in enumerate(BLOCKS, 1) for j in range(1, depth + 1)]
ENDS: dict[VggName, str] = {"vgg19": "relu5_4", "vgg_normalised_conv3_1": "relu3_1"}
"""The last layer that each network has."""
SMALL_CONVOLUTIONS = (2, 5, 9, 12, 16)
"""Indices of the convolutions in the file of ``vgg_normalised_conv3_1``; 0 turns RGB into BGR minus the mean."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Vgg19Features(nn.Module):
    """Activations at chosen layers; frozen, differentiable in its input. Nothing after the last chosen layer is built."""

    def __init__(
        self, layers: Sequence[str], weights: VggName = "vgg19", *, random_init: bool = False
    ) -> None:
        """Build the network up to the last of the ``layers`` (``relu1_1`` to ``relu5_4``).

        Raises:
            WeightsError: the weights are missing or wrong.
            ValueError: a layer does not exist in this network.
        """
        super().__init__()
        known = LAYERS[: LAYERS.index(ENDS[weights]) + 1]
        if not layers or not set(layers) <= set(known):
            raise ValueError(f"{weights} has the layers {known[0]} to {known[-1]}, not {layers}")
        self.matrix: Tensor
        self.shift: Tensor
        self.layers = tuple(layers)
        self.is_small = weights == "vgg_normalised_conv3_1"
        padding: Literal["reflect", "zeros"] = "reflect" if self.is_small else "zeros"
        count = 1 + max(LAYERS.index(layer) for layer in layers)
        self.convolutions = nn.ModuleList()
        inputs = 3
        for channels, depth in BLOCKS:
            for _ in range(depth):
                if len(self.convolutions) < count:
                    conv = nn.Conv2d(inputs, channels, 3, padding=1, padding_mode=padding)
                    self.convolutions.append(conv)
                    inputs = channels
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self._set_normalisation(torch.diag(1 / std), -mean / std)
        if not random_init:
            self._load(weights)
        self.eval().requires_grad_(False)

    @property
    def channels(self) -> list[int]:
        """Of each chosen layer's map."""
        return [BLOCKS[int(layer[4]) - 1][0] for layer in self.layers]

    @property
    def strides(self) -> list[int]:
        """Pixels per cell of each chosen layer's map."""
        return [2 ** (int(layer[4]) - 1) for layer in self.layers]

    def forward(self, images: Tensor) -> list[Tensor]:
        """RGB (b, 3, h, w) in [-1, 1] to maps (b, c, h / stride, w / stride), in the order of ``layers``."""
        x = F.conv2d(images, self.matrix, self.shift)
        found: dict[str, Tensor] = {}
        for layer, conv in zip(LAYERS, self.convolutions, strict=False):
            if layer.endswith("_1") and layer != "relu1_1":
                x = F.max_pool2d(x, 2)
            x = torch.relu(conv(x))
            found[layer] = x
        return [found[layer] for layer in self.layers]

    def _load(self, weights: VggName) -> None:
        state = torch.load(find(weights), map_location="cpu", weights_only=True)
        if self.is_small:
            names = [str(i) for i in SMALL_CONVOLUTIONS]
            self._set_normalisation(state["0.weight"][:, :, 0, 0], state["0.bias"])
        else:
            names = [name[:-7] for name in state if re.fullmatch(r"features\.\d+\.weight", name)]
        for name, conv in zip(names, self.convolutions, strict=False):
            conv.load_state_dict({part: state[f"{name}.{part}"] for part in ("weight", "bias")})

    def _set_normalisation(self, matrix: Tensor, shift: Tensor) -> None:
        """Have RGB in [-1, 1] turned into ``matrix @ rgb + shift`` with RGB in [0, 1], which the weights expect."""
        self.register_buffer("matrix", matrix[:, :, None, None] / 2, persistent=False)
        self.register_buffer("shift", shift + matrix.sum(dim=1) / 2, persistent=False)
