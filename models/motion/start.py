"""A motion learner that begins with the weights of a bundle: stage 2 with those of stage 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from models import bundle
from models.motion.learner import MotionLearner, MotionLearnerConfig
from models.motion.network import Motion


def start(
    config: MotionLearnerConfig,
    init: str,
    *,
    wrap: Callable[[nn.Module], nn.Module],
    device: torch.device,
) -> MotionLearner:
    """Build a learner; its optimizers and its discriminator are always fresh.

    Args:
        config: of the learner.
        init: folder or URI of a bundle; empty: fresh weights.
        wrap: goes around each trained network.
        device: where they are.

    Raises:
        BundleError: it cannot be read.
        ValueError: its network is another.
    """
    learner = MotionLearner(config, wrap=wrap, device=device)
    if init:
        weights = fitting(init, config).state_dict()
        learner.motion.load_state_dict(weights)
        if learner.ema is not None:
            learner.ema.network.load_state_dict(weights)
    return learner


def fitting(init: str, config: MotionLearnerConfig) -> Motion:
    """The network of a bundle. Raises as :func:`start`."""
    network = bundle.load(init)
    if not isinstance(network, Motion) or network.config != config.network:
        raise ValueError(
            f"--init-from {init}: its network is {getattr(network, 'config', type(network).__name__)}, "
            f"--learner.network is {config.network}"
        )
    return network
