"""An Aligner begun from another's weights: the whole of a bundle, or one person's, of whom only code and generator learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import bundle
from models.aligner.network import Aligner
from models.aligner.start import start
from models.aligner.subject import of_person, subject_learner
from tests.aligners import LEARNER, NETWORK, SmallIdentity, drawn_batch, tiny_learner

CPU = torch.device("cpu")
CONFIG = replace(LEARNER, vgg="none", lr=3e-4, discriminator_lr=7e-4, betas=(0.0, 0.99))


def test_a_training_and_its_average_begin_with_the_bundles_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    aligner = Aligner(NETWORK)
    bundle.save(aligner, str(tmp_path / "b"), {}, np.zeros((8, 8, 3), np.uint8))
    learner = start(CONFIG, str(tmp_path / "b"), wrap=lambda network: network, device=CPU)
    for network in (learner.networks["aligner"], learner.ema.network):
        found = network.state_dict()
        assert all(torch.equal(found[n], value) for n, value in aligner.state_dict().items())


def test_a_person_is_in_the_code_and_only_code_and_generator_learn() -> None:
    torch.manual_seed(5)
    aligner = Aligner(NETWORK).eval()
    identity = SmallIdentity().eval()
    batch = drawn_batch(people=1)
    vectors = identity.embedding(batch.source_faces.flatten(0, 1)).unflatten(0, (2, 2)).detach()
    with torch.no_grad():
        code = aligner.encode_sources(batch.sources, vectors)[:1]
        picture = aligner(batch.sources, vectors, batch.driving, batch.driving_face).image
    personal = of_person(aligner, code)
    learner = subject_learner(CONFIG, personal, CPU)
    learner.frozen = tiny_learner(CONFIG).frozen
    begun = (learner.networks["aligner"], learner.ema.network)
    encoders = (begun[0].portrait, begun[0].pose, begun[0].expression)
    assert not any(module.training for encoder in encoders for module in encoder.modules())
    noise = (
        torch.randn_like(batch.sources),
        torch.randn_like(vectors),
    )  # nobody looks at sources now
    for network in (personal, learner.ema.network, begun[0].eval()):
        assert torch.equal(network(*noise, batch.driving, batch.driving_face).image, picture)
    for name, rate in (("aligner", 3e-4), ("discriminator", 7e-4)):
        (group,) = learner.optimizers[name].param_groups
        assert (group["lr"], group["betas"]) == (rate, (0.0, 0.99))
        assert type(learner.optimizers[name]).__name__ == "RAdam"
    before = {name: value.clone() for name, value in begun[0].state_dict().items()}
    learner.train_step(batch, 0)
    moved = {n.split(".")[0] for n, v in begun[0].state_dict().items() if not torch.equal(v, before[n])}  # fmt: skip
    assert moved == {"source_code", "generator"}
    with pytest.raises(ValueError, match="fine-tuned to somebody already"):
        of_person(personal, code)
