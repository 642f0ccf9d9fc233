#!/usr/bin/env python
"""Dataset → trained Aligner. Killed or interrupted, the same command goes on.

    python jobs/train_aligner.py smoke --dataset data/mine --output runs/smoke
    python jobs/train_aligner.py small --dataset data/mine --output runs/small
    python jobs/train_aligner.py grow --dataset data/mine --output runs/grown --init runs/small/bundle
    ray job submit --working-dir . -- python jobs/train_aligner.py paper --dataset s3://... --output s3://...

smoke shows in a minute on any machine that all parts work; small trains 256 px on one GPU in hours, grow takes its bundle
to 512; base is our choice for a cluster, paper the letter of the supplement. docs/training.md says where each number is from.

Exit codes: 0 done, 2 wrong arguments or dataset, 3 a loss was not finite, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

from dataclasses import dataclass, field, replace
from functools import partial

import tyro

from jobs import runtime
from models.aligner import network
from models.aligner.learner import AlignerLearnerConfig
from models.aligner.network import AlignerConfig
from models.aligner.start import fitting, start
from models.frozen import arcface, vgg, weights
from pipelines import samples_aligner, shards, tracking
from pipelines.health import HealthConfig
from pipelines.samples_aligner import (
    AlignerHeldOutConfig,
    AlignerSamplesConfig,
    aligner_batches,
    held_out_batches,
)
from pipelines.training import ClusterConfig, TrainConfig, TrainingConfig

HEALTH = HealthConfig(progress="loss/l1", leakage="eval/health/leakage")


@dataclass(frozen=True, kw_only=True)
class TrainAlignerConfig(TrainConfig):
    """A dataset → a trained Aligner."""

    init: str = ""
    """Bundle whose weights the training begins with: of the same network, or of one of schedule lpd and half the size, which
    grows (folder, URI, or models:/NAME@alias)."""
    calibration: str = ""
    """File of jobs/calibrate.py: weights of the layers whose features are compared. They become part of ``learner``."""
    learner: AlignerLearnerConfig = field(default_factory=AlignerLearnerConfig)
    """Network, losses, optimizers."""
    samples: AlignerSamplesConfig = field(default_factory=AlignerSamplesConfig)
    """What is drawn from the dataset."""
    held_out: AlignerHeldOutConfig = field(default_factory=AlignerHeldOutConfig)
    """What is evaluated on."""
    health: HealthConfig = HEALTH
    """When to warn."""


PRESETS = {
    # Every part, no weights to fetch: dlib's descriptor has no gradient, so identity is not trained for.
    "smoke": TrainAlignerConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        learner=AlignerLearnerConfig(
            network=AlignerConfig(
                size=64,
                schedule="lpd",
                base=8,
                limit=64,
                portrait_dim=64,
                identity="dlib",
                pose_dim=32,
                expression_dim=32,
                hidden=96,
                encoder_size=64,
                norm="group",
                portrait_blocks=(1, 1, 1, 1),
                portrait_groups=4,
                motion_width=0.25,
            ),
            discriminator_base=8,
            discriminator_limit=64,
            vgg="none",
        ),
        samples=AlignerSamplesConfig(
            batch_size=2,
            max_sources=2,
            output_size=64,
            encoder_size=64,
            identity="dlib",
            loaders=0,
        ),
        held_out=AlignerHeldOutConfig(batches=2, sources=2),
        training=TrainingConfig(samples=40, log_every=2, evaluate_every=20, checkpoint_every=20),
    ),
    # One GPU, hours, a few identities: LPD's own 256 px network, which the preset grow takes to 512.
    "small": TrainAlignerConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        learner=AlignerLearnerConfig(
            network=AlignerConfig(size=256, schedule="lpd"), precision="bf16"
        ),
        samples=AlignerSamplesConfig(batch_size=8, output_size=256),
        training=TrainingConfig(samples=160_000),
    ),
    # Our choice for a cluster: a mask head, bfloat16, batches large enough for batch statistics.
    "base": TrainAlignerConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        learner=AlignerLearnerConfig(precision="bf16"),
        samples=AlignerSamplesConfig(batch_size=16),
        training=TrainingConfig(samples=8_000_000, evaluate_every=100_000, checkpoint_every=50_000),
        cluster=ClusterConfig(num_workers=8, gpu="yes"),
    ),
    # The supplement line by line; docs/training.md. Iterations are not given there: 1 M of GHOST 2.0's Aligner, times 6.
    "paper": TrainAlignerConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        learner=AlignerLearnerConfig(network=AlignerConfig(paper_strict=True), dice=0.0),
        samples=AlignerSamplesConfig(batch_size=6, pairing="identity"),
        training=TrainingConfig(samples=6_000_000, evaluate_every=60_000, checkpoint_every=30_000),
        cluster=ClusterConfig(num_workers=6, gpu="yes"),
    ),
    # From a bundle of small: the block to 512 is faded in over a tenth of the way.
    "grow": TrainAlignerConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        init=tyro.MISSING,
        learner=AlignerLearnerConfig(precision="bf16", fade_samples=16_000),
        samples=AlignerSamplesConfig(batch_size=8),
        training=TrainingConfig(samples=160_000),
    ),
}


def job() -> None:
    """Parse, check, connect, train, summarise."""
    config = runtime.parse(PRESETS, __doc__ or "")
    config = replace(
        config,
        dataset=runtime.location("dataset", config.dataset),
        output=runtime.location("output", config.output),
        init=runtime.location("init", config.init) if config.init else "",
    )
    if config.calibration:
        config = replace(config, learner=weighted(config.learner, config.calibration))
    if config.learner.network.is_subject:
        runtime.usage("--learner.network.is-subject is for one person: jobs/finetune.py")
    check(config)
    num_workers = max(config.cluster.num_workers, 1)
    # Leakage is measured between the persons of one batch, so every worker's share must hold two.
    batch_size = max(config.samples.batch_size, 2 * num_workers)
    looked_at = replace(config.samples, batch_size=batch_size)
    runtime.train(
        "aligner",
        config,
        build=partial(
            start, config.learner, runtime.fetch_bundle(config.init, config.output, "init")
        ),
        batches=partial(aligner_batches, config.samples, config.dataset),
        held_out=partial(held_out_batches, looked_at, config.held_out, config.dataset),
        remarks=remarks(config),
    )


def weighted(learner: AlignerLearnerConfig, calibration: str) -> AlignerLearnerConfig:
    """The configuration with the weights of a file of jobs/calibrate.py, which must be of the same networks and layers."""
    found = runtime.read_calibration(calibration)
    measured = found.vgg, found.vgg_layers, found.identity
    wanted = learner.vgg, learner.vgg_layers, learner.network.identity
    if measured != wanted:
        runtime.usage(
            f"--calibration {calibration}: measured with {measured}, but the training has {wanted}"
        )
    return replace(learner, vgg_weights=found.vgg_weights, identity_weights=found.identity_weights)


def check(config: TrainAlignerConfig) -> None:
    """Everything that can be known to be wrong before workers start. Raises what :func:`runtime.main` turns into a line."""
    shards.read_manifest(config.dataset)
    shape, drawn = config.learner.network, config.samples
    for ours, theirs, name, other in (
        (shape.size, drawn.output_size, "size", "output-size"),
        (shape.encoder_size, drawn.encoder_size, "encoder-size", "encoder-size"),
        (shape.identity, drawn.identity, "identity", "identity"),
    ):
        if ours != theirs:
            runtime.usage(
                f"--learner.network.{name} {ours} and --samples.{other} {theirs} must be the same"
            )
    if not config.learner.random_init:
        names = [*arcface.WEIGHTS[shape.identity], *network.WEIGHTS[shape.encoder_init]]
        if config.learner.vgg != "none":
            names += vgg.WEIGHTS[config.learner.vgg]
        for name in names:
            weights.find(name)
    num_workers = max(config.cluster.num_workers, 1)
    try:
        samples_aligner.check(config.samples, config.held_out, config.dataset, num_workers)
        if config.init:
            fitting(tracking.find_bundle(config.init), config.learner)
    except ValueError as error:
        if isinstance(error, runtime.USER_ERRORS):
            raise
        runtime.usage(str(error))


def remarks(config: TrainAlignerConfig) -> list[str]:
    """What this training leaves out, for the summary."""
    told = []
    if config.learner.vgg == "none":
        told.append("no VGG: its feature matching is off (--learner.vgg)")
    if config.learner.network.identity == "dlib":
        told.append(
            "dlib's descriptor has no gradient: identity losses are off (--learner.network.identity)"
        )
    if not config.learner.network.has_mask:
        told.append("no mask head: the background is generated, too")
    return told


if __name__ == "__main__":
    runtime.main(job)
