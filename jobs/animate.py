#!/usr/bin/env python
"""A picture of a face, moved as a driving video's face moves → a video with that video's rate and sound.

    python jobs/animate.py --motion bundles/motion --source me.jpg --driving clip.mp4 --output animated.mp4
    python jobs/animate.py --motion models:/headray-motion@candidate --source me.jpg --driving points.npy --fps 30 --output out.mp4

Runs on a GPU if there is one. Frames whose face is lost show the one before; OUTPUT.json tells of every frame.

Exit codes: 0 done, 2 wrong arguments or inputs, 3 no face in the driving video, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

from dataclasses import asdict, replace

import tyro

from jobs import runtime
from pipelines import tracking
from pipelines.animate import AnimateConfig, animate

PRESETS = {
    "base": AnimateConfig(
        motion=tyro.MISSING, source=tyro.MISSING, driving=tyro.MISSING, output=tyro.MISSING
    ),
}


def job() -> None:
    """Parse, animate, summarise."""
    config = runtime.parse(PRESETS, __doc__ or "")
    motion = config.motion
    if not motion.startswith("models:/"):
        motion = runtime.location("motion", motion)
    config = replace(
        config,
        motion=motion,
        source=runtime.location("source", config.source),
        driving=runtime.location("driving", config.driving),
        output=runtime.location("output", config.output),
    )
    say = runtime.console.print
    say("configuration")
    say("  " + " ".join(f"{name}={value!r}" for name, value in asdict(config).items()))
    store = tracking.find_store(config.output.rpartition("/")[0], runtime.submitted())
    code = runtime.code_version()
    tracking.require(store)
    made = animate(config, say)
    numbers = {
        "frames": float(made.frames),
        "held": float(made.held),
        "took_seconds": made.took_seconds,
    }
    recorded = runtime.log_made(store, "animate", config, code, numbers)
    rate = made.frames / made.took_seconds
    say(
        f"{made.frames} frames ({made.seconds:.1f} s) made in {made.took_seconds:.1f} s, {rate:.1f} a second, once the driver's "
        "face was found"
    )
    for cause, count in made.causes.items():
        say(f"  held: {count} frames, {cause}")
    say(f"video    {config.output}")
    say(f"frames   {config.output}.json")
    say(f"mlflow   {recorded}")


if __name__ == "__main__":
    runtime.main(job)
