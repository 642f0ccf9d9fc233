#!/usr/bin/env python
"""Pictures of a person + a video → the video with that person's head, with its rate, size and sound.

    python jobs/swap.py --aligner bundles/aligner --blender bundles/blender --source me1.jpg me2.jpg --target clip.mp4 --output swapped.mp4
    python jobs/swap.py --aligner models:/headray-aligner@candidate --blender bundles/blender --source me.mp4 --target clip.mp4 --output swapped.mp4 --preview
    python jobs/swap.py --aligner runs/me/bundle --blender bundles/blender --target a.mp4 b.mp4 --output swapped/ --workers 4

Runs on a GPU if there is one. Frames without the face stay as they are; OUTPUT.json tells of every frame. The file says that it
is synthetic (--no-mark leaves that to OUTPUT.json). With --workers parts and videos are shared by Ray workers, of this machine or
of the cluster that RAY_ADDRESS names, which must reach all files; the result is the same.

Exit codes: 0 done, 2 wrong arguments or inputs, 3 no usable face in the target, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

from dataclasses import asdict, replace

import tyro

from jobs import runtime
from pipelines import swap_cluster, tracking
from pipelines.swap import Made, SwapConfig, swap

PRESETS = {
    "base": SwapConfig(
        aligner=tyro.MISSING, blender=tyro.MISSING, target=tyro.MISSING, output=tyro.MISSING
    ),
}


def job() -> None:
    """Parse, swap, summarise."""
    config = runtime.parse(PRESETS, __doc__ or "")
    config = replace(
        config,
        aligner=runtime.location("aligner", config.aligner),
        blender=runtime.location("blender", config.blender),
        source=tuple(runtime.location("source", uri) for uri in config.source),
        target=tuple(runtime.location("target", uri) for uri in config.target),
        output=runtime.location("output", config.output),
    )
    say = runtime.console.print
    say("configuration")
    say("  " + " ".join(f"{name}={value!r}" for name, value in asdict(config).items()))
    code = runtime.code_version()
    store = tracking.find_store(config.output.rstrip("/").rpartition("/")[0], runtime.submitted())
    tracking.require(store)
    if config.workers:
        runtime.connect(config.workers + 1)  # one for what splits rows
        made = swap_cluster.swap(config, say)
    else:
        made = swap(config, say)
    numbers = {
        "frames": float(sum(each.frames for each in made)),
        "copied": float(sum(each.copied for each in made)),
        "took_seconds": sum(each.took_seconds for each in made),
    }
    recorded = runtime.log_made(store, "swap", config, code, numbers)
    for each in made:
        summarise(each, has_preview=config.preview)
    say(f"mlflow   {recorded}")


def summarise(made: Made, *, has_preview: bool) -> None:
    """What was made, where it is."""
    say = runtime.console.print
    rate = made.frames / made.took_seconds
    say(
        f"{made.frames} frames ({made.seconds:.1f} s) in {made.took_seconds:.1f} s, {rate:.1f} a second"
    )
    steps = sorted(made.step_seconds.items(), key=lambda item: -item[1])
    say("  seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in steps))
    for cause, count in made.causes.items():
        say(f"  copied: {count} frames, {cause}")
    if made.damage:
        say(f"  ends early: {made.target}: {made.damage}")
    say(f"video    {made.output}")
    say(f"frames   {made.output}.json")
    if has_preview:
        say(f"preview  {made.output}.preview.png, {made.output}.preview.mp4")


if __name__ == "__main__":
    runtime.main(job)
