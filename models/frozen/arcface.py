"""Identity networks for training: who is it, as a vector with a gradient, and the features on the way to it.

``arcface`` is IR-SE-50, a ResNet with squeeze and excitation trained with ArcFace's loss (Deng et al. 2019), names of submodules
as in its published weights; ``mobilefacenet`` is the small network of ``models.frozen.mobilefacenet``; ``dlib`` is dlib's
descriptor, which has no gradient and no features but comes in a wheel. ``models.frozen.identity`` scores data sets; this file is
for tensors.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.frozen.identity import (
    DLIB_CHIP,
    FIVE_POINTS,
    MOBILEFACENET_CHIP,
    DlibEmbedder,
)
from models.frozen.mobilefacenet import MobileFaceNet
from models.frozen.weights import find

IdentityName = Literal["arcface", "mobilefacenet", "dlib"]
WEIGHTS: dict[IdentityName, tuple[str, ...]] = {
    "arcface": ("ir_se50",),
    "mobilefacenet": ("mobilefacenet",),
    "dlib": ("dlib_descriptor",),
}
"""Entries of ``models.frozen.weights`` that each network loads."""

DIMENSIONS: dict[IdentityName, int] = {"arcface": 512, "mobilefacenet": 128, "dlib": 128}
"""Length of each network's vector."""

STAGES = ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3))
"""Inputs, outputs and units of IR-SE-50's four stages; the first unit of each halves the picture."""
SHRINK = 16
"""Of the channels, inside squeeze and excitation."""
MOBILEFACENET_ENDS = (0, 5, 12, 15)
"""Blocks of MobileFaceNet before which its four features end: 64 x 56 x 48, 64 x 28 x 24, 128 x 14 x 12, 128 x 7 x 6."""
DLIB_POINTS = np.array([[47.5, 47.7], [101.3, 47.7], [74.0, 75.1], [51.6, 104.7], [98.6, 104.1]])
"""Means over 18 photos in dlib's own chips. A face cut by these points gives a vector whose cosine with that of dlib's own
chip is 0.997 or more on each of the photos."""


class IdentityNetwork(nn.Module):
    """One interface for all: faces (b, 3, height, width), RGB in [-1, 1], to a vector and features. Frozen."""

    dimension: int
    """Length of the vector."""
    size: tuple[int, int]
    """(height, width) of the faces."""
    points: NDArray[np.float64]
    """(5, 2) where eye centres, nose tip and mouth corners lie in a face, pixel centres at integer + 0.5."""
    has_gradient = True
    """Whether the vector can be differentiated by the face, and features exist."""

    def forward(self, faces: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Faces (b, 3, height, width) to vectors (b, dimension), not normalised, and the features of four stages."""
        raise NotImplementedError

    def embedding(self, faces: Tensor) -> Tensor:
        """Vectors alone, (b, dimension)."""
        vectors: Tensor = self(faces)[0]
        return vectors

    def features(self, faces: Tensor) -> list[Tensor]:
        """Features alone, one map (b, c, h, w) per stage."""
        maps: list[Tensor] = self(faces)[1]
        return maps


def load_identity_network(name: IdentityName, *, random_init: bool = False) -> IdentityNetwork:
    """Build an identity network, frozen and in evaluation mode.

    Args:
        name: ``arcface``, ``mobilefacenet`` or ``dlib``.
        random_init: without weights, for tests of shape and speed; not for ``dlib``, whose weights are installed.

    Raises:
        WeightsError: the weights are missing or wrong.
    """
    network: IdentityNetwork
    match name:
        case "arcface":
            network = ArcFace()
            if not random_init:
                state = torch.load(find("ir_se50"), map_location="cpu", weights_only=True)
                network.load_state_dict(state)
        case "mobilefacenet":
            network = MobileFaceNetFeatures()
            if not random_init:
                path = find("mobilefacenet")
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                network.network.load_state_dict(checkpoint["net_state_dict"])
        case "dlib":
            if random_init:
                raise ValueError("dlib's descriptor has real weights everywhere")
            network = DlibDescriptor()
        case _:
            raise ValueError(f"no identity network called {name!r}; known: {', '.join(WEIGHTS)}")
    return network.eval().requires_grad_(False)


def crop_faces(images: Tensor, matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the identity network's faces out of pictures, differentiably.

    Args:
        images: (b, 3, h, w) in [-1, 1].
        matrix: (b, 2, 3) pixels of the image → pixels of the face.
        size: (height, width) of a face.

    Returns:
        (b, 3, height, width), bilinear, black (-1) outside the image.
    """
    height, width = size
    h, w = images.shape[-2:]
    rows = torch.arange(height, device=images.device, dtype=matrix.dtype) + 0.5
    columns = torch.arange(width, device=images.device, dtype=matrix.dtype) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    target = (
        torch.stack([x, y], dim=-1).flatten(0, 1) - matrix[:, None, :, 2]
    )  # (b, height*width, 2)
    pixels = target @ torch.linalg.inv(matrix[:, :, :2]).mT
    extent = torch.tensor([w, h], device=images.device, dtype=matrix.dtype)
    grid = (2 * pixels / extent - 1).unflatten(1, (height, width)).to(images.dtype)
    return F.grid_sample(images + 1, grid, padding_mode="zeros", align_corners=False) - 1


class ArcFace(IdentityNetwork):
    """IR-SE-50 for faces of 112 x 112 pixels."""

    dimension = DIMENSIONS["arcface"]
    size = (112, 112)
    points = FIVE_POINTS + np.array([8.5, 0.5])

    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        units: list[nn.Module] = []
        for inputs, outputs, count in STAGES:
            units.append(ImprovedUnit(inputs, outputs, stride=2))
            units += [ImprovedUnit(outputs, outputs, stride=1) for _ in range(count - 1)]
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512),
        )

    def forward(self, faces: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :class:`IdentityNetwork`; features (b, 64, 56, 56), (b, 128, 28, 28), (b, 256, 14, 14), (b, 512, 7, 7)."""
        features = []
        x = self.input_layer(faces)
        first = 0
        for _, _, count in STAGES:
            x = self.body[first : first + count](x)
            features.append(x)
            first += count
        return self.output_layer(x), features


class ImprovedUnit(nn.Module):
    """Batch norm before and after two 3x3 convolutions, then squeeze and excitation; added to its input."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if inputs != outputs:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            SqueezeExcitation(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h / stride, w / stride)."""
        y: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return y


class SqueezeExcitation(nn.Module):
    """Scales every channel by what its mean over the picture says."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // SHRINK, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // SHRINK, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) to the same shape."""
        scale = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))))
        return x * scale


class MobileFaceNetFeatures(IdentityNetwork):
    """MobileFaceNet for faces of 112 x 96 pixels."""

    dimension = DIMENSIONS["mobilefacenet"]
    size = MOBILEFACENET_CHIP[::-1]
    points = FIVE_POINTS + 0.5

    def __init__(self) -> None:
        super().__init__()
        self.network = MobileFaceNet()

    def forward(self, faces: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :class:`IdentityNetwork`; the features' sizes are at ``MOBILEFACENET_ENDS``."""
        network = self.network
        features = []
        x = network.dw_conv1(network.conv1(faces * (127.5 / 128)))  # (b, 64, 56, 48)
        for i, block in enumerate(network.blocks):
            if i in MOBILEFACENET_ENDS:
                features.append(x)
            x = block(x)
        features.append(x)
        vectors = network.linear1(network.linear7(network.conv2(x))).flatten(1)  # (b, 128)
        return vectors, features


class DlibDescriptor(IdentityNetwork):
    """dlib's descriptor behind the same interface, on the CPU and without gradient; about 75 ms a face on one core."""

    dimension = DIMENSIONS["dlib"]
    size = (DLIB_CHIP, DLIB_CHIP)
    points = DLIB_POINTS
    has_gradient = False

    def __init__(self) -> None:
        super().__init__()
        self.describe = DlibEmbedder().network.compute_face_descriptor

    @torch.no_grad()
    def forward(self, faces: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :class:`IdentityNetwork`; no features."""
        pixels = ((faces.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        vectors = [np.array(self.describe(face)) for face in pixels.cpu().contiguous().numpy()]
        rows = np.array(vectors, dtype=np.float32).reshape(-1, self.dimension)
        return torch.from_numpy(rows).to(faces.device), []
