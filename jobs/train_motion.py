#!/usr/bin/env python
"""Dataset → trained motion model, one command for each of its two stages. Killed, the same command goes on.

    python jobs/train_motion.py smoke --dataset data/clips --output runs/smoke
    python jobs/train_motion.py voxceleb1 --dataset data/vox1 --output runs/stage1
    python jobs/train_motion.py voxceleb1 --learner.stage 2 --init-from runs/stage1/bundle --dataset data/vox1 --output runs/stage2

Stage 1 learns to reconstruct, stage 2 adds the discriminator and starts from what --init-from names. smoke shows in a minute on
any machine that all parts work; small is for one GPU; voxceleb1 and faceforensics are the supplement, line by line
(docs/training.md). A stage is as many epochs as --learner.schedule.epochs says; how long an epoch is, the dataset decides.

Exit codes: 0 done, 2 wrong arguments or dataset, 3 a loss was not finite, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import sys
from dataclasses import dataclass, field, replace
from functools import partial

import tyro

from jobs import runtime
from models.frozen import vgg, weights
from models.motion.learner import MotionLearnerConfig, Schedule, samples_in_epoch
from models.motion.network import MotionConfig
from models.motion.start import fitting, start
from pipelines import samples_motion, shards, tracking
from pipelines.film import film
from pipelines.health import HealthConfig
from pipelines.samples import HeldOutConfig
from pipelines.samples_motion import MotionSamplesConfig, held_out_batches, motion_batches
from pipelines.training import ClusterConfig, TrainConfig, TrainingConfig

HEALTH = HealthConfig(progress="loss/reconstruction", leakage="")
WHOLE_STAGE = sys.maxsize
"""Samples that no stage has."""
RECIPE_BATCH = 40
"""Of the supplement: who trains with it means the recipe, and is told if the epochs are of another size."""


@dataclass(frozen=True, kw_only=True)
class TrainMotionConfig(TrainConfig):
    """A dataset → a trained motion model."""

    dataset: str
    """Published dataset, best of a motion preset of jobs/preprocess.py: a folder or fsspec URI."""
    init_from: str = ""
    """Bundle of the same network whose weights the training begins with (folder, URI, or models:/NAME@alias). Stage 2 needs
    one: that of stage 1."""
    learner: MotionLearnerConfig = field(default_factory=MotionLearnerConfig)
    """Network, stage, losses, optimizers. ``schedule.epoch_samples`` is set by the dataset: units x ``samples.repeats``."""
    samples: MotionSamplesConfig = field(default_factory=MotionSamplesConfig)
    """What is drawn from the dataset."""
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What is evaluated on."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How often what. ``samples`` beyond the end of the stage are the whole stage."""
    health: HealthConfig = HEALTH
    """When to warn."""


# The supplement line by line; docs/training.md. 68 points: a dataset has pupils only if it was made with them.
VOXCELEB1 = TrainMotionConfig(
    dataset=tyro.MISSING,
    output=tyro.MISSING,
    learner=MotionLearnerConfig(network=MotionConfig(num_landmarks=68)),
    training=TrainingConfig(samples=WHOLE_STAGE, evaluate_every=31_800, checkpoint_every=31_800),
    cluster=ClusterConfig(num_workers=4, gpu="yes"),
)

PRESETS = {
    # Every part, no weights to fetch: a pyramid of pixels instead of VGG's features.
    "smoke": TrainMotionConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        learner=MotionLearnerConfig(
            network=MotionConfig(
                size=64,
                num_landmarks=68,
                global_encoder=(8, 16, 32, 32, 32),
                global_decoder=(32, 32, 32, 16, 8),
                global_adaptive=3,
                local_encoder=(8, 16, 16),
                local_decoder=(16, 16, 8),
                local_adaptive=2,
                patch=16,
                adain_hidden=32,
                generator_base=8,
                generator_residuals=2,
            ),
            features="none",
            mask_prior=0.02,
            discriminator_widths=(8, 8, 16, 16),
        ),
        samples=MotionSamplesConfig(batch_size=2, size=64, loaders=0),
        held_out=HeldOutConfig(batches=2),
        training=TrainingConfig(samples=40, log_every=2, evaluate_every=20, checkpoint_every=20),
    ),
    # One GPU: the paper's network in the share of one of its four GPUs.
    "small": replace(
        VOXCELEB1,
        learner=replace(VOXCELEB1.learner, precision="bf16"),
        samples=MotionSamplesConfig(batch_size=10),
        training=TrainingConfig(samples=WHOLE_STAGE),
        cluster=ClusterConfig(),
    ),
    "voxceleb1": VOXCELEB1,
    # Its "video" is a file, 900 of them for training; after epoch 80 there is nothing left to drop.
    "faceforensics": replace(
        VOXCELEB1,
        learner=replace(
            VOXCELEB1.learner,
            schedule=Schedule(epoch_samples=samples_in_epoch(900), epochs=80, drop_epochs=(60,)),
        ),
        samples=MotionSamplesConfig(unit="video"),
    ),
}


def job() -> None:
    """Parse, check, connect, train, summarise."""
    config = runtime.parse(PRESETS, __doc__ or "")
    config = replace(
        config,
        dataset=runtime.location("dataset", config.dataset),
        output=runtime.location("output", config.output),
        init_from=runtime.location("init-from", config.init_from) if config.init_from else "",
    )
    config = with_epochs(config, check(config))
    init = runtime.fetch_bundle(config.init_from, config.output, "init")
    runtime.train(
        "motion",
        config,
        build=partial(start, config.learner, init),
        batches=partial(motion_batches, config.samples, config.dataset),
        held_out=partial(held_out_batches, config.samples, config.held_out, config.dataset),
        film=partial(film, config.samples, config.held_out, config.dataset),
        remarks=remarks(config),
    )


def with_epochs(config: TrainMotionConfig, units: int) -> TrainMotionConfig:
    """The configuration with the epochs of a dataset of so many units, and no more samples than its stage has; says so."""
    schedule, batch = config.learner.schedule, config.samples.batch_size
    pairs = samples_motion.epoch_samples(config.samples, units)
    found = replace(schedule, epoch_samples=pairs)
    samples = min(config.training.samples, found.samples)
    runtime.console.print(
        f"an epoch is {units:,} x {config.samples.repeats} ({config.samples.unit}) = {pairs:,} pairs, "
        f"{found.steps_in_epoch(batch):,} steps of {batch}; stage {config.learner.stage} has {found.epochs} epochs, "
        f"{found.epochs * pairs // batch:,} steps"
    )
    ratio = pairs / schedule.epoch_samples
    if batch == RECIPE_BATCH and not 0.5 <= ratio <= 2:
        runtime.console.print(
            f"warning: the supplement's epoch has {schedule.steps_in_epoch(batch):,} steps: rates drop after {ratio:.2g} times as "
            "many; --samples.unit, --samples.repeats and --learner.schedule say otherwise"
        )
    return replace(
        config,
        learner=replace(config.learner, schedule=found),
        training=replace(config.training, samples=samples),
    )


def check(config: TrainMotionConfig) -> int:
    """Everything that can be known to be wrong before workers start. Raises what :func:`runtime.main` turns into a line.

    Returns:
        units of the training split.
    """
    rule = shards.read_manifest(config.dataset)["members"].get("rule", "fomm")
    if rule != "fomm":
        runtime.console.print(
            f"warning: {config.dataset} has windows that follow the head (crop rule {rule}), so that its motion is gone from them; "
            "the motion model wants clips of python jobs/preprocess.py motion"
        )
    shape, drawn = config.learner.network, config.samples
    for ours, theirs, name, other in (
        (shape.size, drawn.size, "size", "size"),
        (shape.num_landmarks, drawn.num_landmarks, "num-landmarks", "num-landmarks"),
    ):
        if ours != theirs:
            runtime.usage(
                f"--learner.network.{name} {ours} and --samples.{other} {theirs} must be the same"
            )
    if config.learner.stage == 2 and not config.init_from:
        runtime.usage("--learner.stage 2 goes on from stage 1: give its bundle with --init-from")
    if config.learner.features != "none":
        for weight in vgg.WEIGHTS[config.learner.features]:
            weights.find(weight)
    num_workers = max(config.cluster.num_workers, 1)
    try:
        units = samples_motion.check(drawn, config.held_out, config.dataset, num_workers)
        if config.init_from:
            fitting(tracking.find_bundle(config.init_from), config.learner)
    except ValueError as error:
        if isinstance(error, runtime.USER_ERRORS):
            raise
        runtime.usage(str(error))
    return units


def remarks(config: TrainMotionConfig) -> list[str]:
    """What this training leaves out, for the summary."""
    told = []
    if config.learner.features == "none":
        told.append("no VGG: pictures are compared by their pixels (--learner.features)")
    if config.learner.network.num_landmarks == 68:
        told.append(
            "68 points, no pupils: the gaze is not driven (70: --learner.network.num-landmarks and --samples.num-landmarks, on a "
            "dataset of --annotate.pupils iris)"
        )
    if config.learner.stage == 1:
        told.append("stage 1: no adversarial loss; stage 2 begins with this bundle (--init-from)")
    if config.training.samples == config.learner.schedule.samples:
        told.append("the whole stage: for more, --learner.schedule.epochs")
    return told


if __name__ == "__main__":
    runtime.main(job)
