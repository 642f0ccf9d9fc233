"""An Aligner's learner that begins with the weights of a bundle: of the same network, or of one of half the size that grows."""

from __future__ import annotations

from typing import cast

import torch

from models import bundle
from models.aligner.learner import AlignerLearner, AlignerLearnerConfig, Wrap
from models.aligner.network import Aligner, grow


def start(
    config: AlignerLearnerConfig, init: str, *, wrap: Wrap, device: torch.device
) -> AlignerLearner:
    """Build a learner.

    Args:
        config: of the learner.
        init: folder or URI of a bundle; empty: fresh weights.
        wrap: goes around each trained network.
        device: where they are.

    Raises:
        BundleError: it cannot be read.
        ValueError: its network is another and does not grow into this one.
    """
    learner = AlignerLearner(config, wrap=wrap, device=device)
    if init:
        weights = fitting(init, config).state_dict()
        cast(Aligner, learner.networks["aligner"]).load_state_dict(weights)
        learner.ema.network.load_state_dict(weights)
    return learner


def fitting(init: str, config: AlignerLearnerConfig) -> Aligner:
    """The Aligner of a bundle, grown if it must be. Raises as :func:`start`."""
    aligner = bundle.load(init)
    grows = config.network.schedule == "append64"
    if grows and isinstance(aligner, Aligner) and aligner.config.schedule == "lpd":
        aligner = grow(aligner)
    if not isinstance(aligner, Aligner) or aligner.config != config.network:
        raise ValueError(
            f"--init {init}: its network is {getattr(aligner, 'config', type(aligner).__name__)}, "
            f"--learner.network is {config.network}"
        )
    return aligner
