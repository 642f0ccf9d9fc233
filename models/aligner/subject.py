"""An Aligner that becomes one person's (HeSer §4, "ft600"; latent pose reenactment, Burkov et al. 2020).

The code that says who becomes a weight, begun with the mean over the person's pictures; encoders rest; generator, perceptron and
code are trained with the losses of the training, and the discriminator goes on. Nothing else is new: without a step, its pictures
are those of the network it came from, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.optim import RAdam

from models.aligner.learner import AlignerLearner, AlignerLearnerConfig
from models.aligner.network import Aligner


def of_person(aligner: Aligner, code: Tensor) -> Aligner:
    """The same network with a person's code (1, d1 + d2) among its weights, in eval mode.

    Raises:
        ValueError: it is somebody's already.
    """
    if aligner.source_code is not None:
        raise ValueError(
            "the Aligner was fine-tuned to somebody already; begin with the one it was made from"
        )
    personal = Aligner(replace(aligner.config, is_subject=True))
    personal.load_state_dict(aligner.state_dict() | {"source_code": code})
    return personal.eval()


def subject_learner(
    config: AlignerLearnerConfig, personal: Aligner, device: torch.device
) -> AlignerLearner:
    """A learner that trains a person's code and the generator, and nothing of the encoders.

    Args:
        config: losses and rates; its network is that of ``personal``.
        personal: of :func:`of_person`; not changed.
        device: where it is trained.

    Raises:
        WeightsError: a network of the losses is missing.
    """
    config = replace(config, network=personal.config)
    learner = AlignerLearner(config, wrap=lambda network: network, device=device)
    network = cast(Aligner, learner.networks["aligner"])
    network.load_state_dict(personal.state_dict())
    learner.ema.network.load_state_dict(personal.state_dict())
    for encoder in (network.portrait, network.pose, network.expression):
        if encoder is not None:
            encoder.eval().requires_grad_(False)
    assert network.source_code is not None
    trained = [network.source_code, *network.generator.parameters()]
    learner.optimizers["aligner"] = RAdam(trained, lr=config.lr, betas=config.betas)
    learner.optimizers["discriminator"] = RAdam(
        learner.discriminator.parameters(), lr=config.discriminator_lr, betas=config.betas
    )
    return learner
