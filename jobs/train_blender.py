#!/usr/bin/env python
"""Dataset → trained Blender. Killed or interrupted, the same command goes on.

    python jobs/train_blender.py smoke --dataset data/mine --output runs/smoke
    python jobs/calibrate.py blender-small --dataset data/mine --output weights.json
    python jobs/train_blender.py small --dataset data/mine --output runs/small --calibration weights.json --aligner runs/aligner/bundle
    ray job submit --working-dir . -- python jobs/train_blender.py paper --dataset s3://... --output s3://... --calibration ...

smoke shows in a minute on any machine that all parts work; small trains 256 px on one GPU in hours; paper is the letter of the
supplement. docs/training.md says where each number is from. The dataset must have labels (--annotate.parser of preprocess.py).

Exit codes: 0 done, 2 wrong arguments or dataset, 3 a loss was not finite, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

from dataclasses import dataclass, field, replace
from functools import partial

import tyro

from jobs import runtime
from models.aligner.network import AlignerConfig
from models.blender.learner import PERCEPTUAL_LAYERS, BlenderLearnerConfig
from models.blender.network import BlenderConfig
from models.blender.pairs import PairConfig
from models.frozen import arcface, vgg, weights
from models.reenactment import load_aligner, start
from pipelines import samples_blender, shards, tracking
from pipelines.health import HealthConfig
from pipelines.samples import HeldOutConfig
from pipelines.samples_blender import BlenderSamplesConfig, blender_batches, held_out_batches
from pipelines.training import ClusterConfig, TrainConfig, TrainingConfig

HEALTH = HealthConfig(progress="loss/l1", leakage="")


@dataclass(frozen=True, kw_only=True)
class TrainBlenderConfig(TrainConfig):
    """A dataset → a trained Blender."""

    dataset: str
    """Published dataset with labels: a folder or fsspec URI."""
    aligner: str = ""
    """Bundle of an Aligner of the same size, which makes the heads of a share of the samples (``samples.pairs.p_reenacted``):
    folder, URI, or models:/NAME@alias. Empty: every head is a real one in other colours."""
    calibration: str = ""
    """File of jobs/calibrate.py: weights of the layers whose features are compared. They become part of ``learner``."""
    learner: BlenderLearnerConfig = field(default_factory=BlenderLearnerConfig)
    """Network, losses, optimizers."""
    samples: BlenderSamplesConfig = field(default_factory=BlenderSamplesConfig)
    """What is drawn from the dataset."""
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What is evaluated on."""
    health: HealthConfig = HEALTH
    """When to warn."""


PRESETS = {
    # Every part, no weights to fetch: a trunk trained with the rest, no perceptual loss.
    "smoke": TrainBlenderConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        learner=BlenderLearnerConfig(
            network=BlenderConfig(size=64, trunk="small", feature_width=16, unet_base=8),
            perceptual="none",
            adversarial_after=20,
            discriminator_base=8,
            discriminator_limit=64,
        ),
        samples=BlenderSamplesConfig(batch_size=2, output_size=64, sources=2, loaders=0),
        held_out=HeldOutConfig(batches=2),
        training=TrainingConfig(samples=40, log_every=2, evaluate_every=20, checkpoint_every=20),
    ),
    # One GPU, hours, a few identities: 10,000 steps.
    "small": TrainBlenderConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        learner=BlenderLearnerConfig(network=BlenderConfig(size=256), precision="bf16"),
        samples=BlenderSamplesConfig(batch_size=8, output_size=256),
        training=TrainingConfig(samples=80_000),
    ),
    # The supplement line by line; docs/training.md. Batch and iterations are not given there: one sample a GPU, 200,000 steps.
    # What others add to a sample is off: noise at the outlines, other backgrounds, turned frames, other frames, Aligner's heads.
    "paper": TrainBlenderConfig(
        dataset=tyro.MISSING,
        output=tyro.MISSING,
        samples=BlenderSamplesConfig(
            batch_size=2,
            pairs=PairConfig(
                p_other_frame=0.0, p_noise=0.0, p_reenacted=0.0, p_background=0.0, p_affine=0.0
            ),
        ),
        training=TrainingConfig(samples=400_000),
        cluster=ClusterConfig(num_workers=2, gpu="yes"),
    ),
}


def job() -> None:
    """Parse, check, connect, train, summarise."""
    config = runtime.parse(PRESETS, __doc__ or "")
    config = replace(
        config,
        dataset=runtime.location("dataset", config.dataset),
        output=runtime.location("output", config.output),
        aligner=runtime.location("aligner", config.aligner) if config.aligner else "",
    )
    if config.calibration:
        config = replace(config, learner=weighted(config.learner, config.calibration))
    aligner = check(config)
    place = runtime.fetch_bundle(config.aligner, config.output, "aligner")
    runtime.train(
        "blender",
        config,
        build=partial(start, config.learner, place),
        batches=partial(blender_batches, config.samples, config.dataset, aligner),
        held_out=partial(
            held_out_batches, config.samples, config.held_out, config.dataset, aligner
        ),
        remarks=remarks(config),
    )


def weighted(learner: BlenderLearnerConfig, calibration: str) -> BlenderLearnerConfig:
    """The configuration with the weights of a file of jobs/calibrate.py, which must be of the same network and layers."""
    found = runtime.read_calibration(calibration)
    wanted = (learner.perceptual, PERCEPTUAL_LAYERS[learner.perceptual])
    if (found.vgg, found.vgg_layers) != wanted:
        runtime.usage(
            f"--calibration {calibration}: measured with {found.vgg} {found.vgg_layers}, but the training has {wanted[0]} {wanted[1]}"
        )
    return replace(learner, perceptual_weights=found.vgg_weights)


def check(config: TrainBlenderConfig) -> AlignerConfig | None:
    """Everything that can be known to be wrong before workers start. Raises what :func:`runtime.main` turns into a line.

    Returns:
        the network of the Aligner, if there is one.
    """
    shards.read_manifest(config.dataset)
    learner, drawn = config.learner, config.samples
    if learner.network.size != drawn.output_size:
        runtime.usage(
            f"--learner.network.size {learner.network.size} and --samples.output-size {drawn.output_size} must be the same"
        )
    if len(learner.perceptual_weights) != len(PERCEPTUAL_LAYERS[learner.perceptual]):
        runtime.usage(
            f"--learner.perceptual {learner.perceptual} needs weights of its layers: python jobs/calibrate.py blender-... "
            f"--dataset {config.dataset} --output FILE, then --calibration FILE (or --learner.perceptual none)"
        )
    if not learner.random_init:
        names = [] if learner.network.trunk == "small" else vgg.WEIGHTS[learner.network.trunk]
        if learner.perceptual != "none":
            names = [*names, *vgg.WEIGHTS[learner.perceptual]]
        for name in names:
            weights.find(name)
    num_workers = max(config.cluster.num_workers, 1)
    try:
        aligner = aligner_network(config) if config.aligner else None
        samples_blender.check(drawn, config.held_out, config.dataset, aligner, num_workers)
    except ValueError as error:
        if isinstance(error, runtime.USER_ERRORS):
            raise
        runtime.usage(str(error))
    return aligner


def aligner_network(config: TrainBlenderConfig) -> AlignerConfig:
    """The network of ``--aligner``. Raises ``ValueError`` when it does not fit the training, or would have no effect."""
    if not config.samples.pairs.p_reenacted:
        raise ValueError(
            "--aligner has no effect while --samples.pairs.p-reenacted is 0; 0.25 is our choice"
        )
    network = load_aligner(tracking.find_bundle(config.aligner)).config
    if network.size != config.samples.output_size:
        raise ValueError(
            f"--aligner {config.aligner}: makes pictures of {network.size} px, --samples.output-size is "
            f"{config.samples.output_size}"
        )
    for name in arcface.WEIGHTS[network.identity]:
        weights.find(name)
    return network


def remarks(config: TrainBlenderConfig) -> list[str]:
    """What this training leaves out, for the summary."""
    told = []
    if config.learner.perceptual == "none":
        told.append("no VGG: its perceptual loss is off (--learner.perceptual)")
    if config.learner.network.trunk == "small":
        told.append("features begin with a trunk trained from scratch (--learner.network.trunk)")
    if not config.aligner:
        told.append("no Aligner: every head is a real one in other colours (--aligner)")
    return told


if __name__ == "__main__":
    runtime.main(job)
