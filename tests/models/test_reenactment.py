"""An Aligner beside the Blender: it makes the heads that are wanted, as it made them in its own training, and never learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models import bundle, reenactment
from models.aligner.network import Aligner
from models.blender.batch import BlenderBatch
from models.blender.masks import head_mask
from models.blender.network import Blender
from models.blender.pairs import PairConfig
from models.reenactment import Reenactor, load_aligner, start
from tests import aligners
from tests.models.blender.scenes import SIZE, TINY, drawn_batch
from tests.models.blender.test_learner import CONFIG, CPU

NETWORK = replace(aligners.NETWORK, identity="dlib")
STILL = PairConfig(p_reenacted=0.5, p_affine=0, brightness=0, contrast=0, saturation=0, hue=0)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    place = str(tmp_path_factory.mktemp("aligner") / "bundle")
    bundle.save(Aligner(NETWORK).eval(), place, {}, np.zeros((8, 8, 3), np.uint8))
    return place


@pytest.fixture
def _small_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random identity network, a hundred times as fast as dlib's."""
    torch.manual_seed(2)
    network = aligners.SmallIdentity().eval()
    monkeypatch.setattr(reenactment, "load_identity_network", lambda _: network)


def with_views(count: int = 4) -> BlenderBatch:
    """Drawn heads, and drawn people for the Aligner."""
    views = aligners.drawn_batch(people=count, moves=1)
    return replace(
        drawn_batch(count, STILL),
        sources=views.sources,
        source_faces=views.source_faces,
        driving=views.driving,
        driving_face=views.driving_face,
    )


def test_pictures_are_those_of_the_aligners_own_training(uri: str) -> None:
    config = replace(aligners.LEARNER, network=NETWORK, vgg="none", random_init=False)
    learner = aligners.tiny_learner(config)
    aligner = load_aligner(uri)
    learner.ema.network.load_state_dict(aligner.state_dict())
    batch = aligners.drawn_batch(people=2, moves=1, k=1, face_size=(150, 150))
    reference = learner.average(batch, learner.identities(batch.source_faces), shift=0).image
    reenact = Reenactor(aligner.train())
    assert not any(module.training for module in reenact.modules())
    picture = reenact(batch.sources, batch.source_faces, batch.driving, batch.driving_face)
    assert torch.equal(picture, reference)


@pytest.mark.usefixtures("_small_identity")
def test_heads_that_are_wanted_are_the_aligners(uri: str) -> None:
    batch = with_views()
    wanted = batch.wants_aligner
    assert 0 < wanted.sum() < 4
    learner = start(CONFIG, uri, wrap=lambda network: network, device=CPU)
    made = learner.with_heads(batch)
    reenact = Reenactor(load_aligner(uri))
    pictures = reenact(batch.sources, batch.source_faces, batch.driving, batch.driving_face)
    head = head_mask(batch.animated_labels)
    expected = torch.where(
        wanted[:, None, None, None],
        torch.lerp(batch.animated, pictures, head),
        batch.animated,
    )
    torch.testing.assert_close(made.animated, expected, atol=1e-4, rtol=0)
    assert (made.animated - batch.animated).abs().flatten(1).amax(1)[wanted].min() > 0.1
    shown = learner.preview(batch)[:, :, :, SIZE : 2 * SIZE]  # the column "aligned head"
    torch.testing.assert_close(shown, made.animated * head, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("_small_identity")
def test_a_step_trains_on_them_and_leaves_the_aligner_as_it_is(uri: str) -> None:
    batch = with_views()
    losses = {}
    for place in (uri, ""):
        torch.manual_seed(0)
        learner = start(CONFIG, place, wrap=lambda network: network, device=CPU)
        torch.manual_seed(1)
        learner.networks["blender"].load_state_dict(Blender(TINY).state_dict())
        losses[place] = learner.train_step(batch, 0)
        assert set(learner.networks) == {"blender", "discriminator", "ema"}
        if place:
            reenact = learner._reenact
            assert isinstance(reenact, Reenactor)
            kept = load_aligner(uri).state_dict()
            for name, value in reenact.aligner.state_dict().items():
                assert torch.equal(value, kept[name]), name
            assert all(p.grad is None and not p.requires_grad for p in reenact.parameters())
    assert losses[uri]["loss/l1"] != losses[""]["loss/l1"]


@pytest.mark.usefixtures("_small_identity")
def test_a_batch_that_wants_no_head_does_not_run_the_aligner(uri: str) -> None:
    learner = start(CONFIG, uri, wrap=lambda network: network, device=CPU)
    plain = drawn_batch(2, replace(STILL, p_reenacted=0))
    assert learner.with_heads(plain) is plain


def test_the_bundle_of_another_model_is_refused(tmp_path) -> None:
    bundle.save(Blender(TINY), str(tmp_path / "b"), {}, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="the bundle of a Blender, not of an Aligner"):
        load_aligner(str(tmp_path / "b"))
