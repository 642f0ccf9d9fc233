"""Pictures of one person → an Aligner of that person's own: 600 steps ("ft600"; HeSer, supplement §4).

Every picture is its own driver, augmented as in training, and is to be made again; with several, a step takes up to eight of
them, drawn anew. One process on one device: this takes minutes on a GPU. Killed, the same command goes on from the last
of ``checkpoints``, to the same numbers.

Too many steps on one picture cost expression and pose, too few leave a gap of identity (latent pose reenactment's author names 125
for one picture, 230 for more than 30): so a bundle is kept at each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import bundle
from models.aligner.augment import AugmentConfig
from models.aligner.batch import AlignerBatch
from models.aligner.learner import AlignerLearner, AlignerLearnerConfig
from models.aligner.network import Aligner
from models.aligner.subject import of_person, subject_learner
from models.frozen.arcface import load_identity_network
from models.frozen.detector import DetectorName
from models.frozen.landmarks import LandmarkerName
from models.frozen.parsing import ParserName, load_parser
from models.metrics import csim
from pipelines import checkpoints, journal, provenance, sources, storage
from pipelines.follower import FollowConfig
from pipelines.output import ConfigError
from pipelines.samples import generator
from pipelines.samples_aligner import AlignerSamplesConfig, Shot, tensors_of
from pipelines.sources import Source
from pipelines.swap import load_network

MOST_AT_ONCE = 8
"""Pictures of a step (latent pose reenactment)."""
SAY_SECONDS, SAVE_SECONDS = 30.0, 300.0
"""Between two lines of progress, and between two checkpoints: on a CPU a step may take seconds."""
LEARNER = AlignerLearnerConfig(lr=5e-4, discriminator_lr=8e-4, betas=(0.0, 0.999), ema_decay=0.972)
"""RAdam's rates and the decay of latent pose reenactment's fine-tuning; losses as in training."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Whose Aligner, from what."""

    aligner: str
    """Bundle of the Aligner to begin with: folder, URI, or models:/NAME@alias of the MLflow registry."""
    source: tuple[str, ...]
    """Pictures of one person, or videos."""
    output: str
    """Folder or fsspec URI for the bundles: bundle/, and one for each number of ``checkpoints``. Running again goes on."""
    run: str = ""
    """Output of the training that made the Aligner: its discriminator goes on. Without it, one begins from nothing."""
    iterations: int = 600
    """Steps (supplement §4: ft600)."""
    checkpoints: tuple[int, ...] = (0, 125, 230, 600)
    """Steps after which a bundle is kept (latent pose reenactment: 125 for one picture, 230 for more than 30)."""
    learner: AlignerLearnerConfig = field(default_factory=lambda: LEARNER)
    """Losses and rates. The network's shape is the bundle's, whatever stands here."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What hides the person from the motion encoders."""
    source_face: int = sources.LARGEST
    """Which face of a picture that has several, counted from the left from 0; -1: the largest."""
    source_frames: int = 32
    """Frames taken of a source that is a video."""
    detector: DetectorName = "dlib"
    """Finds faces."""
    landmarker: LandmarkerName = "dlib"
    """Finds their points."""
    parser: ParserName = "geometric"
    """Says where the person is, for the mask."""
    seed: int = 0
    """Of every draw."""

    def __post_init__(self) -> None:
        if self.iterations < 0 or any(step < 0 for step in self.checkpoints):
            raise ValueError(
                f"iterations {self.iterations} and checkpoints {self.checkpoints} must not be negative"
            )
        if not self.source:
            raise ValueError("source: name at least one picture of the person")
        if self.source_frames < 1 or self.source_face < sources.LARGEST:
            raise ValueError(
                f"source_frames {self.source_frames} must be >= 1, source_face {self.source_face} >= -1"
            )

    @property
    def kept(self) -> list[int]:
        """Steps after which a bundle is kept, the last among them."""
        return sorted({*(s for s in self.checkpoints if s <= self.iterations), self.iterations})


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was made."""

    bundles: dict[int, str]
    """Steps → URI."""
    scores: dict[int, dict[str, float]]
    """Steps → identity similarity and losses of the person's own pictures, made again."""
    hashes: dict[int, str]
    """Steps → sha256 of the bundle's tensors."""

    @property
    def sha256(self) -> str:
        """Of the last bundle."""
        return self.hashes[max(self.hashes)]


class Pictures:
    """One person's pictures as batches: a function of (seed, step) and nothing else."""

    def __init__(self, config: FinetuneConfig, network: Aligner, found: Sequence[Source]) -> None:
        """Label the pictures once."""
        shape = network.config
        self.samples = AlignerSamplesConfig(
            output_size=shape.size,
            encoder_size=shape.encoder_size,
            identity=shape.identity,
            augment=config.augment,
        )
        self.seed, self.found = config.seed, found
        landmarks = np.stack([source.landmarks for source in found])
        labels = load_parser(config.parser).parse(
            [s.window for s in found], landmarks, [s.inside for s in found]
        )
        self.foregrounds = [each != 0 for each in labels]

    def batch(self, step: int) -> AlignerBatch:
        """Of a training step: all pictures, or ``MOST_AT_ONCE`` drawn of them."""
        rng = generator(self.seed, step)
        chosen = rng.permutation(len(self.found))[:MOST_AT_ONCE]
        return self._batch(chosen, rng, self.samples)

    def plain(self) -> AlignerBatch:
        """The first pictures without augmentation, for scores and the preview."""
        still = replace(
            self.samples, augment=AugmentConfig(max_photometric=0, scale=0.0, shift=0.0)
        )
        return self._batch(
            np.arange(min(len(self.found), MOST_AT_ONCE)), generator(self.seed, 0), still
        )

    def _batch(
        self, chosen: NDArray[np.integer], rng: np.random.Generator, config: AlignerSamplesConfig
    ) -> AlignerBatch:
        made: list[dict[str, Tensor]] = []
        for i in chosen:
            source = self.found[i]
            shot = Shot(source.window, source.landmarks)
            masks = source.inside, self.foregrounds[i]
            made.append(tensors_of(config, shot, [shot], masks, rng))
        names = [each.name for each in fields(AlignerBatch) if each.name != "keys"]
        return AlignerBatch(
            keys=[self.found[i].name for i in chosen],
            **{name: torch.stack([tensors[name] for tensors in made]) for name in names},
        )


def load_person(
    config: FinetuneConfig, say: Callable[[str], None] = lambda _: None
) -> tuple[Aligner, Pictures, str]:
    """The Aligner with the person's code, the pictures, and where the bundle is.

    Raises:
        ConfigError: bundle or pictures cannot be used.
        WeightsError: of a frozen network.
    """
    meta, place = load_network("aligner", config.aligner, Aligner)
    faces = FollowConfig(detector=config.detector, landmarker=config.landmarker)
    found = sources.read_sources(
        config.source,
        faces,
        meta.config.size,
        face=config.source_face,
        frames=config.source_frames,
        say=say,
    )
    random = config.learner.random_init and meta.config.identity != "dlib"
    identity = load_identity_network(meta.config.identity, random_init=random)
    try:
        personal = of_person(meta, sources.encode(meta, identity, found))
    except ValueError as error:
        raise ConfigError(f"--aligner {config.aligner}: {error}") from error
    return personal, Pictures(config, personal, found), place


def load_discriminator(learner: AlignerLearner, run: str) -> None:
    """Let a training's discriminator go on. Raises :class:`ConfigError` when it is none, or of another shape."""
    uri = checkpoints.newest(run)
    if not uri:
        raise ConfigError(f"--run {run}: no checkpoint there")
    state = checkpoints.read(uri)["networks"]
    prefix = "discriminator."
    own = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    try:
        learner.networks["discriminator"].load_state_dict(own)
    except RuntimeError as error:
        raise ConfigError(
            f"--run {run}: its discriminator is of another shape than --learner.discriminator-* say "
            f"({str(error).splitlines()[-1].strip()})"
        ) from error


@torch.no_grad()
def score(learner: AlignerLearner, batch: AlignerBatch) -> dict[str, float]:
    """How alike the person's pictures are to themselves, made again by the averaged weights."""
    identities = learner.identities(batch.source_faces)
    portrait = learner.average(batch, identities, shift=0)
    vectors, _ = learner.look_at_faces(
        learner.compared(portrait.image, batch, is_generated=True), batch
    )
    whole = identities.flatten(0, 1).mean(dim=0, keepdim=True).expand(len(batch), -1)
    metrics = {"csim": csim(vectors, whole).mean(), **learner.eval_step(batch)}
    return {
        name: float(value)
        for name, value in metrics.items()
        if "cross" not in name and "leak" not in name
    }


@torch.no_grad()
def show(learner: AlignerLearner, batch: AlignerBatch) -> NDArray[np.uint8]:
    """Each picture and what the averaged weights make of it. (``learner.preview`` would put the encoders into training mode.)"""
    identities = learner.identities(batch.source_faces)
    portrait = learner.average(batch, identities, shift=0)
    columns = torch.cat([learner.compared(batch.target, batch), portrait.image], dim=3)
    return journal.picture(columns.cpu(), ("picture", "made again"))


def finetune(
    config: FinetuneConfig,
    card: dict[str, Any],
    *,
    say: Callable[[str], None] = lambda _: None,
    record: Callable[[dict[str, float], int], None] = lambda _, __: None,
) -> Tuned:
    """Make the bundles.

    Args:
        config: whose, from what; places absolute.
        card: what bundles say of their making: commit and such.
        say: told of progress and choices.
        record: told losses and scores by step.

    Raises:
        ConfigError, WeightsError: as :func:`load_person` and :func:`load_discriminator`.
        NonFiniteLossError: a loss is not a number.
    """
    personal, pictures, place = load_person(config, say)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    learner = subject_learner(config.learner, personal, device)
    if config.run:
        load_discriminator(learner, config.run)
    for term, reason in learner.terms_off.items():
        say(f"without {term}: {reason}")
    plain = pictures.plain().to(device)
    card = card | {
        "finetuned_from": provenance.describe_bundle(place),
        "dataset": bundle.read_card(place).get("dataset", {}),
        "pictures": len(pictures.found),
    }
    tuned = Tuned(bundles={}, scores={}, hashes={})
    done = _go_on(config, learner, tuned, say)
    started = said = saved = time.monotonic()
    for step in range(done, config.iterations + 1):
        if step in config.kept and step not in tuned.bundles:
            _keep(config, learner, plain, card, step, tuned)
            told = ", ".join(f"{name} {value:.3f}" for name, value in tuned.scores[step].items())
            say(f"{step} of {config.iterations} steps: {told}")
            record({f"eval/{name}": v for name, v in tuned.scores[step].items()}, step)
            _save(config, learner, step, tuned)
            said = saved = time.monotonic()
        elif time.monotonic() - saved > SAVE_SECONDS:
            _save(config, learner, step, tuned)
            saved = time.monotonic()
        if step < config.iterations:
            batch = pictures.batch(step).to(device)
            metrics = learner.train_step(batch, (step + 1) * len(batch))
            if step % 10 == 0:
                record({name: float(value) for name, value in metrics.items()}, step)
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                left = (said - started) / (step + 1 - done) * (config.iterations - step - 1)
                say(
                    f"{step + 1} of {config.iterations} steps: loss/l1 {float(metrics['loss/l1']):.3f}, {left:,.0f} s left"
                )
    return tuned


def _save(config: FinetuneConfig, learner: AlignerLearner, step: int, tuned: Tuned) -> None:
    """Write what continues after ``step`` steps, in place of what did before."""
    notes = {"bundles": tuned.bundles, "scores": tuned.scores, "hashes": tuned.hashes}
    checkpoints.write(config.output, cast(Any, learner), step, notes, keep=1)


def _go_on(
    config: FinetuneConfig, learner: AlignerLearner, tuned: Tuned, say: Callable[[str], None]
) -> int:
    """Continue from what is there; returns the steps done."""
    newest = checkpoints.newest(config.output)
    if not newest:
        return 0
    content = checkpoints.read(newest)
    checkpoints.restore(content, cast(Any, learner))
    tuned.bundles.update(content["notes"]["bundles"])
    tuned.scores.update(content["notes"]["scores"])
    tuned.hashes.update(content["notes"]["hashes"])
    done = checkpoints.samples_of(newest)
    say(f"going on from {done} steps")
    return done


def _keep(
    config: FinetuneConfig,
    learner: AlignerLearner,
    plain: AlignerBatch,
    card: dict[str, Any],
    step: int,
    tuned: Tuned,
) -> None:
    """Write the bundle of a step; the last also as ``bundle``."""
    tuned.scores[step] = score(learner, plain)
    preview = show(learner, plain)
    told = card | {"iterations": step, "scores": tuned.scores[step]}
    names = [f"{step:03d}"] + (["bundle"] if step == config.iterations else [])
    for name in names:
        uri = storage.join(config.output, name)
        tuned.hashes[step] = bundle.save(learner.export(), uri, told, preview)
        tuned.bundles[step] = uri


def recipe(config: FinetuneConfig) -> dict[str, Any]:
    """The part of a configuration that decides what is made."""
    return {name: value for name, value in asdict(config).items() if name != "output"}
