"""docs/formats.md is the contract of what is on disk; here it is held against what is really written."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from pipelines import shards
from pipelines.schema import TRANSIENT, Cause
from tests.datasets import CROP, made_video, make_dataset, some_videos
from tests.material import REPOSITORY

DOCUMENT = (REPOSITORY / "docs" / "formats.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its header."""
    section = re.split(rf"^#+ {re.escape(heading)}$", DOCUMENT, flags=re.MULTILINE)[1]
    rows = re.search(r"((?:^\|.*\n)+)", section, re.MULTILINE)
    assert rows, heading
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows[1].splitlines()[2:]]


def names(rows: list[list[str]]) -> list[str]:
    """Everything in backticks in the first column, in order."""
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]


def test_index_and_ledger_columns() -> None:
    assert names(table("index.parquet")) == shards.INDEX_SCHEMA.names
    told = names(table("ledger/ledger.parquet"))
    assert sorted(told) == sorted(shards.LEDGER_SCHEMA.names)


def test_every_cause_is_listed_and_those_that_may_pass_are_marked() -> None:
    rows = DOCUMENT.split("| stage | causes |\n")[1].split("\n\n")[0]
    told = {}
    for stage, reasons in re.findall(r"^\| ([a-z]+) \| (.*) \|$", rows, re.MULTILINE):
        for reason in reasons.split(", "):
            told[f"{stage}: {reason.removesuffix('*')}"] = reason.endswith("*")
    assert told == {cause.value: cause in TRANSIENT for cause in Cause}


def test_fields_of_a_samples_json() -> None:
    video, _ = made_video("id01", "v0", tracks=1)
    record = json.loads(shards.sample_json(video, video.tracks[0], CROP))
    fields = re.search(r"`KEY.json`, where lists(.*?)\n\n\|(.*?)\n\n", DOCUMENT, re.DOTALL)
    assert fields
    told = [
        name
        for line in fields[2].splitlines()[2:]
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    assert sorted(told) == sorted(record)


def test_members_of_a_sample_and_fields_of_the_manifest(tmp_path: Path) -> None:
    manifest = make_dataset(str(tmp_path), some_videos())
    assert names(table("dataset.json")) == list(manifest)
    written = set()
    for row in shards.read_index(str(tmp_path)).to_pylist():
        assert row["members"][0] == "json"
        written |= {re.sub(r"\d{6}", "NNNNNN", f"KEY.{member}") for member in row["members"]}
    assert written == set(names(table("Sample")))
    shard_fields = re.search(r"\| `shards` \| a list: (.*) \|", DOCUMENT)
    assert shard_fields
    assert set(re.findall(r"`(\w+)`", shard_fields[1])) == set(manifest["shards"][0])


def test_where_an_identity_lies_can_be_computed_from_the_document() -> None:
    first = hashlib.sha256(b"shard id00017").digest()[:8]
    assert shards.bucket_of("id00017", 7) == int.from_bytes(first, "big") % 7
