#!/usr/bin/env python
"""Pictures of one person + a trained Aligner → that person's own Aligner, for jobs/swap.py (the paper's ft600).

    python jobs/finetune.py --aligner bundles/aligner --source me1.jpg me2.jpg --output runs/me
    python jobs/finetune.py --aligner models:/headray-aligner@candidate --source me.mp4 --output runs/me --run runs/aligner
    python jobs/swap.py --aligner runs/me/bundle --blender bundles/blender --target clip.mp4 --output swapped.mp4

Six hundred steps, minutes on a GPU. Bundles of 0, 125 and 230 steps are kept, too: the fewer the pictures, the earlier the
expression suffers. The preset embedded needs no VGG weights. Killed or interrupted, the same command goes on.

Exit codes: 0 done, 2 wrong arguments or inputs, 3 a loss was not finite, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import tyro

from jobs import runtime
from models import bundle
from models.bundle import BundleError
from models.updates import NonFiniteLossError
from pipelines import storage, tracking
from pipelines.finetune import LEARNER, FinetuneConfig, Tuned, finetune, recipe
from pipelines.output import (
    CONFIG,
    ConfigError,
    NothingUsableError,
    OutputLock,
    flatten,
    require_same_recipe,
)
from pipelines.tracking import Lineage

PRESETS = {
    "base": FinetuneConfig(aligner=tyro.MISSING, source=tyro.MISSING, output=tyro.MISSING),
    # No weights to fetch; with an Aligner whose identity network is dlib there are no identity losses, either.
    "embedded": FinetuneConfig(
        aligner=tyro.MISSING,
        source=tyro.MISSING,
        output=tyro.MISSING,
        learner=replace(LEARNER, vgg="none"),
    ),
}


def job() -> None:
    """Parse, tune, summarise."""
    config = runtime.parse(PRESETS, __doc__ or "")
    config = replace(
        config,
        aligner=runtime.location("aligner", config.aligner),
        source=tuple(runtime.location("source", uri) for uri in config.source),
        output=runtime.location("output", config.output),
        run=runtime.location("run", config.run) if config.run else "",
    )
    lineage = dataset_of(config.aligner)
    require_same_recipe(
        config.output, flatten(recipe(config)), job="finetune", known=flatten(asdict(config))
    )
    with OutputLock(config.output):
        flat = runtime.record(config, config.output, "finetune")
        code = runtime.code_version()
        store = tracking.find_store(config.output, runtime.submitted())
        tags = {"git_commit": code["commit"], "job": "finetune"}
        tracking.begin(
            config.output, "headray-finetune", flat, tags, lineage,
            {"config": asdict(config), "code": code},
        )  # fmt: skip
        tracker = tracking.Tracker(config.output, store)
        status = "FAILED"
        try:
            tuned = finetune(
                config,
                {"model": "aligner", "code": code},
                say=runtime.console.print,
                record=tracker.metrics,
            )
            tracker.bundle(
                tuned.bundles[config.iterations],
                "headray-aligner-personal",
                tuned.sha256,
                config.iterations,
            )
            status = "FINISHED"
        except NonFiniteLossError as error:
            raise NothingUsableError(str(error)) from error
        finally:
            tracker.end(status, config.iterations)
            waiting = tracker.close()
    summarise(config, tuned)
    runtime.console.print(f"mlflow   {store.show}")
    if waiting:
        runtime.console.print(f"{waiting} records wait for MLflow; the same command sends them")


def dataset_of(aligner: str) -> Lineage:
    """What the Aligner was trained on, as its card says. Raises :class:`ConfigError` for what is no bundle."""
    try:
        told: Mapping[str, Any] = bundle.read_card(tracking.find_bundle(aligner)).get("dataset", {})
    except BundleError as error:
        raise ConfigError(f"--aligner {error}") from error
    return Lineage(
        uri=str(told.get("uri", "unknown")),
        version=int(told.get("version", 0)),
        digest=str(told.get("digest", "")),
    )


def summarise(config: FinetuneConfig, tuned: Tuned) -> None:
    """What was made, where it is."""
    say = runtime.console.print
    for step, uri in sorted(tuned.bundles.items()):
        scores = tuned.scores[step]
        say(f"{step:>6} steps: identity similarity {scores['csim']:.3f}  {uri}")
    say(f"bundle   {storage.join(config.output, 'bundle')}")
    say(f"config   {storage.join(config.output, CONFIG)}")
    place = shlex.quote(storage.join(config.output, "bundle"))
    say(
        f"use it   python jobs/swap.py --aligner {place} --blender BUNDLE --target VIDEO --output VIDEO (without --source)"
    )


if __name__ == "__main__":
    runtime.main(job)
