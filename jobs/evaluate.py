#!/usr/bin/env python
"""Published dataset + trained bundles → scores of people the networks were not trained on, and a page to look at.

    python jobs/evaluate.py --dataset data/vox2 --aligner bundles/aligner --output scores/aligner
    python jobs/evaluate.py --dataset data/vox2 --aligner bundles/aligner --blender bundles/blender --output scores/both
    python jobs/evaluate.py --dataset data/vox1 --motion bundles/motion --output scores/motion

The Aligner is scored on everybody's own motion and on other people's, from 1, 4, 8 and 32 pictures (--shots); the Blender on heads that
go back where they were, in their own colours and in others; the motion model on clips that are made of their first frame.
OUTPUT gets index.html, scores.json, rows.csv (every picture) and the sheets as PNG.

LPIPS wants torchvision's AlexNet (244 MB), FID torch-fidelity's Inception (96 MB). They are looked for in HEADRAY_WEIGHTS and
~/.cache/headray, then downloaded; where that fails the score is left out, and the summary says what to put where. FID of less
than some thousand pictures is far too high: --samples 5000 for one to publish.

Exit codes: 0 done, 2 wrong arguments or inputs, 3 no face in any picture, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import tyro
from rich.table import Table

from jobs import runtime
from pipelines import scores, storage, tracking
from pipelines.evaluation import EvaluateConfig, Row, evaluate, prepare
from pipelines.output import (
    CONFIG,
    NothingUsableError,
    OutputLock,
    flatten,
    require_same_recipe,
)
from pipelines.scores import MEANINGS, Scores

PRESETS = {
    "base": EvaluateConfig(dataset=tyro.MISSING, output=tyro.MISSING),
}


def job() -> None:
    """Parse, score, write, summarise."""
    config = runtime.parse(PRESETS, __doc__ or "")
    config = replace(
        config,
        dataset=runtime.location("dataset", config.dataset),
        output=runtime.location("output", config.output),
        aligner=place_of("aligner", config.aligner),
        blender=place_of("blender", config.blender),
        motion=place_of("motion", config.motion),
    )
    recipe = {name: value for name, value in asdict(config).items() if name != "output"}
    known = flatten(asdict(config))
    require_same_recipe(config.output, flatten(recipe), job="evaluate", known=known)
    ready = prepare(config)
    with OutputLock(config.output):
        flat = runtime.record(config, config.output, "evaluate")
        version = runtime.code_version()
        store = tracking.find_store(config.output, runtime.submitted())
        tags = runtime.tags_of("evaluate", config.output, version["commit"])
        found = Scores()
        with tracking.open_run(store, "headray-evaluate", flat, tags) as run:
            about = evaluate(config, ready, found.add, runtime.console.print)
            about |= {"commit": version["commit"]}
            scores.write(config.output, found, about)
            run.metrics(found.flat())
            run.record(about, "about.json")
            with tempfile.TemporaryDirectory(prefix="headray-") as folder:
                for name in (scores.PAGE, scores.SCORES, scores.ROWS):
                    path = Path(folder, name)
                    path.write_bytes(storage.read_bytes(storage.join(config.output, name)))
                    run.file(path)
    summarise(config, found, about["left_out"])
    runtime.console.print(f"mlflow   {store.show}")
    if why := useless(found.rows):
        raise NothingUsableError(why)


def useless(rows: Sequence[Row]) -> str:
    """Why nothing can be said of faces where they were looked for; empty: something can."""
    faces = [row.values["found"] for row in rows if "found" in row.values]
    known = [share for share in faces if not math.isnan(share)]
    if faces and not known:
        return "no face is found in any real frame that drives: another --detector may find them"
    if known and not any(known):
        return "no face is found in any generated picture: the page shows them"
    return ""


def place_of(flag: str, uri: str) -> str:
    """Of a bundle, absolute; empty: there is none."""
    return runtime.location(flag, uri) if uri else ""


def summarise(config: EvaluateConfig, found: Scores, left_out: Sequence[str]) -> None:
    """The tables, what is not in them, and where all of it is."""
    say = runtime.console.print
    for study, lines in found.tables().items():
        table = Table(title=f"{study}, means")
        table.add_column("", no_wrap=True)
        for line in lines:
            table.add_column(line.setting, justify="right")
        table.add_row("pictures", *(str(line.pictures) for line in lines))
        for name in dict.fromkeys(name for line in lines for name in line.means):
            means = [line.means.get(name) for line in lines]
            digits = MEANINGS[name].digits
            cells = [f"{m.value:.{digits}f}" if m and m.count else "–" for m in means]
            table.add_row(MEANINGS[name].title, *cells)
        say(table)
    for reason in left_out:
        say(reason)
    say(f"page     {storage.join(config.output, scores.PAGE)}")
    say(f"scores   {storage.join(config.output, scores.SCORES)}, {scores.ROWS}")
    say(f"config   {storage.join(config.output, CONFIG)}")


if __name__ == "__main__":
    runtime.main(job)
