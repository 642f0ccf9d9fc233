"""Four short videos, and the flags that preprocess them: what several files kill and compare with one run that nobody touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs import demo

CLIPS = tuple(
    replace(clip, seconds=2.4)
    for clip in demo.CORPUS
    if clip.video in ("astronautA1", "astronautA2", "mirroredB_2", "truncated_1")
)


def arguments(corpus: Path, url: str, output: Path) -> list[str]:
    """Of the job: the same every time."""
    return [
        f"--input={corpus / 'list'}",
        f"--output={output}",
        f"--download.url-template={url}/{{video}}.mp4",
        "--max-attempts=1",
        "--download.tries=1",  # the broken one is broken for good
        "--identities.min-twin-cosine=1",  # all its people are one portrait
        "--crops.min-frames=5",
        "--tracks.min-frames=5",
    ]
