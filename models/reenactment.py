"""A trained Aligner in the Blender's training: it makes the heads of a share of the samples, as it will make all of them in use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models import bundle
from models.aligner.learner import Wrap
from models.aligner.network import Aligner
from models.blender.learner import BlenderLearner, BlenderLearnerConfig
from models.frozen.arcface import load_identity_network


class Reenactor(nn.Module):
    """An Aligner and the identity network it was trained with, both frozen."""

    def __init__(self, aligner: Aligner) -> None:
        """Read the identity network's weights. Raises ``WeightsError`` when they are missing or wrong."""
        super().__init__()
        self.aligner = aligner
        self.identity = load_identity_network(aligner.config.identity)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, sources: Tensor, source_faces: Tensor, driving: Tensor, driving_face: Tensor
    ) -> Tensor:
        """Pictures (b, 3, S, S) in [-1, 1]; arguments as in ``AlignerBatch``."""
        vectors = self.identity.embedding(source_faces.flatten(0, 1))
        identities = vectors.unflatten(0, source_faces.shape[:2])  # (b, k, d2)
        image: Tensor = self.aligner(sources, identities, driving, driving_face).image
        return image


def load_aligner(uri: str) -> Aligner:
    """The network of a bundle (folder or URI).

    Raises:
        BundleError: it cannot be read.
        ValueError: it is not an Aligner's.
    """
    network = bundle.load(uri)
    if not isinstance(network, Aligner):
        raise ValueError(f"{uri}: the bundle of a {type(network).__name__}, not of an Aligner")
    return network


def start(
    config: BlenderLearnerConfig, aligner: str, *, wrap: Wrap, device: torch.device
) -> BlenderLearner:
    """Build a learner.

    Args:
        config: of the learner.
        aligner: folder or URI of a bundle; empty: every head is a recoloured frame.
        wrap: goes around each trained network.
        device: where they are.

    Raises:
        WeightsError: a file of weights, or of the bundle, is missing or wrong.
    """
    reenact = Reenactor(load_aligner(aligner)).to(device) if aligner else None
    return BlenderLearner(config, wrap=wrap, device=device, reenact=reenact)
