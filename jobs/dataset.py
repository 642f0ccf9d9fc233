#!/usr/bin/env python
"""Everything one does to a published dataset: look at it, check it, repair it, take people out of it.

    python jobs/dataset.py inspect --dataset data/vox2
    python jobs/dataset.py inspect --dataset data/vox2 --key id00012-21Uxsk56VDQ-003 --save looks/
    python jobs/dataset.py verify --dataset s3://bucket/vox2
    python jobs/dataset.py takedown --dataset data/vox2 --identities id00012 --reason "request 17"

Exit codes: 0 all is well, 2 wrong arguments or not a dataset, 3 the dataset is damaged.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from rich.table import Table
from rich.text import Text

from jobs import runtime
from pipelines import gallery, report, shards, storage, upkeep
from pipelines.schema import one_line
from pipelines.shards import DatasetError

SHEET_COLUMNS, SHEET_FRAMES, SHEET_PX = 6, 24, 256
SHOWN_SHARDS, SHOWN_KEYS = 10, 3


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what is in a dataset: splits, counts, shards, causes, a few samples."""

    dataset: str
    """Folder or fsspec URI of the dataset."""
    key: str = ""
    """Print this sample, video or track only: <identity>-<video>[-<track>]."""
    save: str = ""
    """With --key of a sample: folder that receives a picture of its frames with their landmarks."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte again and compare; a line for each thing that is wrong, and exit code 3."""

    dataset: str
    """Folder or fsspec URI of the dataset."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Bring back what verify finds wrong: shards from the kept work folder, the index from the shards."""

    dataset: str
    """Folder or fsspec URI of the dataset."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make report/index.html again, from index and ledger."""

    dataset: str
    """Folder or fsspec URI of the dataset."""


@dataclass(frozen=True, kw_only=True)
class Takedown:
    """Take people or videos out for good and print a receipt. Cannot be undone."""

    dataset: str
    """Folder or fsspec URI of the dataset."""
    reason: str
    """One line for the ledger, such as the number of the request."""
    identities: tuple[str, ...] = ()
    """Names of people; all their videos go."""
    videos: tuple[str, ...] = ()
    """Keys of videos: <identity>-<video>."""


def job() -> None:
    """Parse the verb and do it."""
    config = tyro.cli(Inspect | Verify | Repair | Report | Takedown, description=__doc__)
    output = runtime.location("dataset", config.dataset)
    try:
        storage.exists(output)
    except (
        Exception
    ) as error:  # every kind of storage has its own kinds; to the user they all say this
        reason = f"{type(error).__name__}: {one_line(str(error), 200)}"
        raise DatasetError(f"--dataset {config.dataset}: cannot be opened: {reason}") from error
    match config:
        case Inspect():
            inspect(output, config)
        case Verify():
            verify(output)
        case Repair():
            repair(output)
        case Report():
            report.rebuild(output)
            runtime.console.print(f"report   {storage.join(output, report.PAGE)}")
        case Takedown():
            take_down(output, config)


# --- inspect --------------------------------------------------------------------------------------------------


def plain(value: Any) -> Text:
    """A text from outside, without the power to colour the terminal or to move its cursor."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value)))


def table(title: str, columns: dict[str, str], rows: list[list[Any]]) -> None:
    """Print a table; ``columns`` are names and their alignment."""
    drawn = Table(title=title, title_justify="left")
    for name, justify in columns.items():
        drawn.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(plain(f"{cell:,}" if isinstance(cell, int) else cell) for cell in row))
    runtime.console.print(drawn)


def inspect(output: str, config: Inspect) -> None:
    """Print a dataset, or one sample of it."""
    if config.save and not config.key:
        runtime.usage("--save needs --key: the sample whose frames to draw")
    if config.key:
        inspect_key(output, config.key, config.save)
    else:
        inspect_dataset(output)


def inspect_dataset(output: str) -> None:
    """Splits, counts, causes, shards, and a few keys of each split."""
    manifest = shards.read_manifest(output)
    index = shards.read_index(output).select(["key", "split", "frames"])
    size = sum(shard["bytes"] for shard in manifest["shards"])
    runtime.console.print(
        plain(
            f"{output}: version {manifest['dataset_version']}, schema {manifest['schema_version']}, "
            f"{index.num_rows:,} samples in {len(manifest['shards']):,} shards, {size / 2**20:,.1f} MiB"
        )
    )
    runtime.console.print(plain(f"members: {json.dumps(manifest['members'], sort_keys=True)}"))
    right = "right"
    table(
        "splits",
        {"split": "", "identities": right, "videos": right, "tracks": right, "frames": right},
        [
            [split, row["identities"], row["videos"], row["tracks"], row["frames"]]
            for split, row in manifest["splits"].items()
        ],
    )
    counts = manifest["counts"]
    table(
        "counts",
        {"": "", "state": "", "number": right},
        [
            [kind, state, number]
            for kind in ("identities", "videos", "tracks", "frames")
            for state, number in counts[kind].items()
        ],
    )
    for kind, causes in counts["causes"].items():
        if causes:
            rows = [list(item) for item in report.most_frequent(causes)]
            table(f"{kind} not in the dataset, by cause", {"cause": "", kind: right}, rows)
    listed = manifest["shards"]
    table(
        f"shards ({min(SHOWN_SHARDS, len(listed))} of {len(listed):,})",
        {"name": "", "samples": right, "MiB": right},
        [
            [shard["name"], shard["samples"], f"{shard['bytes'] / 2**20:,.1f}"]
            for shard in listed[:SHOWN_SHARDS]
        ],
    )
    rows = []
    for split in manifest["splits"]:
        own = index.filter(pc.equal(index["split"], split))
        places = pa.array(gallery.spread(own.num_rows, SHOWN_KEYS), pa.int64())
        rows += [[row["split"], row["key"], row["frames"]] for row in own.take(places).to_pylist()]
    table("some samples", {"split": "", "key": "", "frames": right}, rows)
    runtime.console.print(plain(f"report   {storage.join(output, report.PAGE)}"))


def inspect_key(output: str, key: str, save: str) -> None:
    """What index and ledger say of a sample, a video or a track; for a sample, a picture."""
    index = shards.read_index(output)
    samples = index.filter(pc.equal(index["key"], key)).to_pylist()
    ledger = shards.read_ledger(output)
    told = ledger.filter(pc.equal(ledger["key"], key)).to_pylist()
    if not samples and not told:
        raise DatasetError(f"--key {key}: not in {output}, and its ledger never heard of it")
    for row in [*told, *samples]:
        rows = [[name, told_of(name, value)] for name, value in row.items()]
        shown = [row for row in rows if row[1]]
        table("index" if "shard" in row else "ledger", {"field": "", "value": ""}, shown)
    if not save:
        return
    if not samples:
        raise DatasetError(f"--key {key}: not a sample, so there are no frames to save")
    path = Path(save) / f"{key}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.local_aside(path) as aside:
        aside.write_bytes(
            sheet(report.read_thumbs(output, samples[0], limit=SHEET_FRAMES, size=SHEET_PX))
        )
    runtime.console.print(plain(f"saved    {path}"))


def told_of(name: str, value: Any) -> str:
    """A field of index or ledger in one line; empty when it says nothing."""
    if name in ("offsets", "sizes"):
        return ""
    if name == "members":
        frames = [member for member in value if member[0].isdigit()]
        others = [member for member in value if not member[0].isdigit()]
        return ", ".join([*others, *frames[:1], "...", *frames[-1:]])
    if name in ("shift", "source", "versions"):
        fields = json.loads(value or "{}")
        value = [(key, fields[key]) for key in sorted(fields) if key != "strip"]
    if isinstance(value, list):
        return ", ".join(f"{key} {number}" for key, number in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value or "")


def sheet(thumbs: list[report.Thumb]) -> bytes:
    """Thumbs in rows, each with its time in seconds; a JPEG."""
    columns = min(SHEET_COLUMNS, len(thumbs))
    rows = -(-len(thumbs) // columns)
    image = np.zeros((rows * SHEET_PX, columns * SHEET_PX, 3), np.uint8)
    for place, thumb in enumerate(thumbs):
        top, left = (SHEET_PX * part for part in divmod(place, columns))
        image[top : top + SHEET_PX, left : left + SHEET_PX] = thumb.image
        corner = (left + 6, top + SHEET_PX - 8)
        for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            text = f"{thumb.time:.2f} s"
            cv2.putText(
                image, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, width, cv2.LINE_AA
            )
    coded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    return bytes(coded.tobytes())


# --- verify, repair, takedown ---------------------------------------------------------------------------------


def verify(output: str) -> None:
    """Print what is wrong and end with 3, or say that nothing is."""
    started = said = time.perf_counter()

    def told(done: int, total: int) -> None:
        nonlocal said
        if time.perf_counter() - said > 30:
            said = time.perf_counter()
            runtime.console.print(f"[{said - started:6.0f} s] {done} of {total} shards")

    problems = shards.verify(output, told)
    for problem in problems:
        runtime.console.print(plain(problem))
    if problems:
        runtime.console.print(
            plain(f"next     python jobs/dataset.py repair --dataset {shlex.quote(output)}")
        )
        raise SystemExit(runtime.NOTHING)
    manifest = shards.read_manifest(output)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    runtime.console.print(
        f"all is well: {len(manifest['shards']):,} shards, {size / 2**20:,.1f} MiB, "
        f"{manifest['counts']['frames']['published']:,} frames"
    )


def repair(output: str) -> None:
    """Repair, print what was done and what was not, and end with 3 if anything is left."""
    result = upkeep.repair(output)
    for line in result.done:
        runtime.console.print(plain(f"repaired {line}"))
    for line in result.left:
        runtime.console.print(plain(f"left     {line}"))
    if result.left:
        raise SystemExit(runtime.NOTHING)
    runtime.console.print("all is well" if result.done else "nothing to repair")


def take_down(output: str, config: Takedown) -> None:
    """Take down and print the receipt."""
    if not config.identities and not config.videos:
        runtime.usage("takedown needs --identities or --videos")
    receipt = upkeep.take_down(output, config.identities, config.videos, config.reason)
    say = runtime.console.print
    say(plain(f"taken down from {output}, reason: {config.reason}"))
    say(f"  {len(receipt.videos):,} videos, {receipt.samples:,} samples, {receipt.frames:,} frames")
    for key in receipt.videos:
        say(plain(f"  {key}"))
    for old, new in receipt.shards.items():
        say(plain(f"  shards/{old} → {new or 'nothing was left in it'}"))
    say(f"  dataset version {receipt.dataset_version}; index, ledger and report follow it")
    say("not reached from here: copies of the dataset, its older versions in a bucket that keeps")
    say(
        "versions, reports logged to an MLflow server, models trained before, and a --download.cache"
    )
    say("outside the dataset. Downloaded files there are named by these sha256:")
    for sha256 in receipt.sha256:
        say(f"  {sha256}")
    for line in receipt.left:
        say(plain(f"left     {line}"))
    if receipt.left:
        raise SystemExit(runtime.NOTHING)


if __name__ == "__main__":
    runtime.main(job)
