"""Fine-tuning to one person: nothing new without a step, the same again after a kill, and more like the person with steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
import safetensors.numpy
import torch
from skimage import data

from models import bundle
from models.aligner.learner import AlignerLearner, AlignerLearnerConfig
from models.aligner.network import Aligner
from models.frozen.arcface import load_identity_network
from models.metrics import csim
from pipelines import checkpoints, sources
from pipelines.finetune import (
    LEARNER,
    FinetuneConfig,
    Pictures,
    finetune,
    load_discriminator,
    load_person,
)
from pipelines.follower import FollowConfig
from pipelines.output import ConfigError
from tests.material import SHARED, needs_shared
from tests.swaps import ALIGNER, SIZE, toy_bundles

SMALL = replace(LEARNER, vgg="none", discriminator_base=4, discriminator_limit=16)


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy_bundles(tmp_path_factory.mktemp("bundles"))[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The astronaut twice, the second time turned."""
    folder = tmp_path_factory.mktemp("photos")
    picture = np.ascontiguousarray(data.astronaut()[:320, :, ::-1])
    turned = cv2.warpAffine(picture, np.float32([[0.97, 0.1, -10], [-0.1, 0.97, 30]]), (512, 320))
    for name, image in (("a.png", picture), ("b.png", turned)):
        cv2.imwrite(str(folder / name), image)
    return [str(folder / "a.png"), str(folder / "b.png")]


def settings(meta: str, photos: list[str], output: Path, **rest: Any) -> FinetuneConfig:
    rest = {"learner": SMALL, "iterations": 4, "checkpoints": (0, 2, 4)} | rest
    return FinetuneConfig(aligner=meta, source=tuple(photos), output=str(output), **rest)


@pytest.fixture(scope="module")
def tuned(meta: str, photos: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles after 0, 2 and 4 steps."""
    folder = tmp_path_factory.mktemp("tuned") / "out"
    made = finetune(settings(meta, photos, folder), {"code": {"commit": "0"}})
    assert list(made.bundles) == [0, 2, 4]
    return folder


def tensors(folder: Path) -> dict[str, Any]:
    return safetensors.numpy.load_file(folder / bundle.MODEL)


@pytest.mark.slow
def test_without_a_step_it_is_the_network_it_came_from(
    meta: str, photos: list[str], tuned: Path
) -> None:
    before, after = cast(Aligner, bundle.load(meta)), cast(Aligner, bundle.load(str(tuned / "000")))
    own, new = tensors(Path(meta)), tensors(tuned / "000")
    assert set(new) - set(own) == {"source_code"}
    assert all(np.array_equal(own[name], new[name]) for name in own)
    found = sources.read_sources(photos, FollowConfig(), SIZE)
    identity = load_identity_network("dlib")
    windows = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        motion = before.encode_motion(windows, windows)
        first = before.generate(sources.encode(before, identity, found).expand(3, -1), motion)
        nobody = torch.zeros(3, 1, 3, SIZE, SIZE)
        second = after(nobody, torch.zeros(3, 1, 128), windows, windows)
    assert torch.equal(first.image, second.image)


@pytest.mark.slow
def test_encoders_rest_and_everything_else_is_trained(tuned: Path) -> None:
    before, after = tensors(tuned / "000"), tensors(tuned / "004")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    resting = ("portrait.", "pose.", "expression.")
    assert not any(name.startswith(resting) for name in changed)
    expected = {name for name in before if not name.startswith(resting)}
    # what only shifts the input of a norm has no gradient
    assert changed >= {n for n in expected if not n.endswith(("._u", "._v", "skip.bias"))}
    assert bundle.read_card(str(tuned / "bundle"))["iterations"] == 4
    assert bundle.read_card(str(tuned / "002"))["finetuned_from"]["class"] == "aligner"


@pytest.mark.slow
def test_the_same_command_goes_on_to_the_same_bytes(
    meta: str, photos: list[str], tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between two bundles, after a checkpoint that only the clock asked for."""
    told: list[str] = []

    def interrupt(line: str) -> None:
        told.append(line)
        if line.startswith("2 of 4 steps: loss/l1"):
            raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.finetune.SAY_SECONDS", -1.0)
    monkeypatch.setattr("pipelines.finetune.SAVE_SECONDS", -1.0)
    whole = settings(meta, photos, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        finetune(whole, {"code": {"commit": "0"}}, say=interrupt)
    finetune(whole, {"code": {"commit": "0"}}, say=told.append)
    assert "going on from 1 steps" in told
    for name in ("000", "002", "004", "bundle"):
        assert (tmp_path / "out" / name / bundle.MODEL).read_bytes() == (
            tuned / (name if name != "bundle" else "004") / bundle.MODEL
        ).read_bytes()


@pytest.mark.slow
def test_batches_are_drawn_from_seed_and_step_alone(meta: str, photos: list[str]) -> None:
    config = settings(meta, photos, Path("none"))
    _, pictures, _ = load_person(config)
    again = Pictures(config, cast(Aligner, bundle.load(meta)), pictures.found)
    for step in (0, 7):
        first, second = pictures.batch(step), again.batch(step)
        assert torch.equal(first.driving, second.driving)
        assert first.keys == second.keys
    assert not torch.equal(pictures.batch(0).driving, pictures.batch(7).driving)
    plain = pictures.plain()
    assert plain.keys == [source.name for source in pictures.found]
    assert torch.equal(plain.driving, plain.target)  # nothing is augmented, both sides are 64


@pytest.mark.slow
def test_a_tuned_aligner_is_not_tuned_again(photos: list[str], tuned: Path) -> None:
    with pytest.raises(ConfigError, match="fine-tuned to somebody already"):
        finetune(settings(str(tuned / "bundle"), photos, tuned / "again"), {})


@pytest.mark.slow
def test_a_trainings_discriminator_goes_on(meta: str, photos: list[str], tmp_path: Path) -> None:
    personal, _, _ = load_person(settings(meta, photos, tmp_path))
    learner_config = replace(SMALL, network=replace(personal.config, is_subject=False))

    def learner(config: AlignerLearnerConfig) -> AlignerLearner:
        return AlignerLearner(config, wrap=lambda each: each, device=torch.device("cpu"))

    trained, fresh = learner(learner_config), learner(learner_config)
    checkpoints.write(str(tmp_path), cast(Any, trained), 10, {}, keep=1)
    load_discriminator(fresh, str(tmp_path))
    for own, other in zip(
        trained.discriminator.parameters(), fresh.discriminator.parameters(), strict=True
    ):
        assert torch.equal(own, other)
    with pytest.raises(ConfigError, match="no checkpoint there"):
        load_discriminator(fresh, str(tmp_path / "none"))
    wider = learner(replace(learner_config, discriminator_base=8))
    with pytest.raises(ConfigError, match="of another shape"):
        load_discriminator(wider, str(tmp_path))


@pytest.mark.parametrize(
    "change", [{"source": ()}, {"iterations": -1}, {"checkpoints": (-1,)}, {"source_frames": 0}]
)
def test_settings_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|at least"):
        replace(settings("m", ["p.png"], Path("o")), **change)


def test_a_bundle_is_kept_at_the_end_whatever_the_list_says() -> None:
    assert replace(settings("m", ["p"], Path("o")), checkpoints=(0, 125, 230, 600)).kept == [0, 4]
    assert FinetuneConfig(aligner="a", source=("p",), output="o").kept == [0, 125, 230, 600]


# ---------------------------------------------------------------------------------------------- with a person


MEETING = replace(
    ALIGNER, base=16, limit=64, portrait_dim=32, identity="mobilefacenet", hidden=64, pose_dim=16, expression_dim=16,
)  # fmt: skip
META_STEPS, STEPS = 30, 40


@pytest.fixture(scope="module")
def weights_there() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRAY_WEIGHTS", str(SHARED / "weights"))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, weights_there: None) -> str:  # noqa: ARG001
    """An Aligner that has seen photos of three people for a while, and none of the person."""
    torch.manual_seed(0)
    config = replace(
        SMALL, network=MEETING, lr=1e-3, discriminator_lr=1e-3, betas=(0.5, 0.999), ema_decay=0.9
    )
    learner = AlignerLearner(config, wrap=lambda each: each, device=torch.device("cpu"))
    wanted = FinetuneConfig(aligner="", source=("x",), output="", learner=config)
    people = []
    for name in ("p02", "p03", "p04"):
        files = sorted(str(path) for path in (SHARED / "photos").glob(f"{name}_*.jpg"))[:2]
        found = sources.read_sources(files, FollowConfig(), SIZE)
        network = cast(Aligner, learner.networks["aligner"])
        people.append(Pictures(wanted, network, found))
    for step in range(META_STEPS):
        learner.train_step(people[step % len(people)].batch(step), step)
    folder = tmp_path_factory.mktemp("trained") / "aligner"
    bundle.save(learner.export(), str(folder), {}, np.zeros((4, 4, 3), np.uint8))
    return str(folder)


def likeness(aligner: Aligner, person: list[sources.Source], drivers: Pictures) -> float:
    """Identity similarity to the person's pictures of what the Aligner makes of other people's motion."""
    identity = load_identity_network("mobilefacenet")
    batch = drivers.plain()
    config = replace(SMALL, network=aligner.config)
    learner = AlignerLearner(config, wrap=lambda each: each, device=torch.device("cpu"))
    with torch.no_grad():
        code = sources.encode(aligner, identity, person).expand(len(batch), -1)
        motion = aligner.encode_motion(batch.driving, batch.driving_face)
        image = aligner.generate(code, motion).image
        vectors, _ = learner.look_at_faces(image, batch)
        own = identity.embedding(sources.identity_faces(person, "mobilefacenet")).mean(0)
    return float(csim(vectors, own.expand(len(vectors), -1)).mean())


@needs_shared
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_it_becomes_more_like_the_person(trained: str, count: int, tmp_path: Path) -> None:
    files = sorted(str(path) for path in (SHARED / "photos").glob("p01_*.jpg"))[:count]
    config = settings(
        trained, files, tmp_path / "out", iterations=STEPS, checkpoints=(0,),
        learner=replace(SMALL, identity=10.0, lr=2e-3),
    )  # fmt: skip
    finetune(config, {})
    person = sources.read_sources(files, FollowConfig(), SIZE)
    other = sources.read_sources([str(SHARED / "photos" / "p02_a.jpg")], FollowConfig(), SIZE)
    before, after = (
        cast(Aligner, bundle.load(str(tmp_path / "out" / name))) for name in ("000", "bundle")
    )
    drivers = Pictures(config, before, other)
    meta, own = likeness(before, person, drivers), likeness(after, person, drivers)
    assert own > meta + 0.04, (meta, own)
