"""A published dataset afterwards: bring back what is damaged, take out who must not be in it. Holds the output's lock.

Both end with a dataset that ``verify`` finds whole. Killed half-way, the same command completes them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import gallery, replay, report, shards, storage
from pipelines.output import OutputLock
from pipelines.preprocess import Tally
from pipelines.schema import Video, from_row
from pipelines.shards import DatasetError

Takedowns = dict[str, dict[str, dict[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What was brought back, and what could not be; a line each."""

    done: list[str]
    left: list[str]


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a takedown removed."""

    videos: list[str]
    """Keys of the videos that the request covers, published or not."""
    samples: int
    frames: int
    shards: dict[str, str]
    """Name of the shard that replaces each old one; empty where nothing was left in it."""
    sha256: list[str]
    """Of the downloaded files, for finding copies elsewhere."""
    dataset_version: int
    left: list[str]
    """What went wrong with the new report; the takedown itself is complete."""


# --- repair ---------------------------------------------------------------------------------------------------


def repair(output: str) -> Repair:
    """Make the files of a dataset again what ``dataset.json`` says they are.

    A damaged shard is packed again from the parts in the work folder, a damaged index is read off the shards, files
    that nothing names are deleted, and a missing report is made.

    Raises:
        DatasetError: not a dataset.
        output.ConfigError: another job is writing there.
    """
    shards.read_manifest(output)
    result = Repair(done=[], left=[])
    with OutputLock(output):
        version = shards.manifest_version(output)
        manifest = shards.read_manifest(output)
        named = {shard["name"] for shard in manifest["shards"]}
        for name in storage.names_below(storage.join(output, "shards")):
            if name not in named:
                storage.remove(storage.join(output, "shards", name))
                result.done.append(f"shards/{name}: deleted, nothing names it")
        damaged = [
            (shard, problems[0])
            for shard in manifest["shards"]
            if (problems := shards.verify_shard(output, shard, None))
        ]
        try:
            index = shards.read_index(output)
        except DatasetError as error:
            _restore_index(output, manifest, version, str(error), result, is_possible=not damaged)
        else:
            for shard, problem in damaged:
                _restore_shard(output, manifest, shard, problem, index, result)
        if not result.left and not storage.exists(storage.join(output, report.PAGE)):
            report.rebuild(output)
            result.done.append(f"{report.PAGE}: made again")
        for line in shards.verify(output):
            if not any(told.startswith(line) for told in result.left):
                result.left.append(line)
    _tidy(output)
    return result


def _restore_index(
    output: str,
    manifest: Mapping[str, Any],
    version: str,
    problem: str,
    result: Repair,
    is_possible: bool,
) -> None:
    if not is_possible:
        result.left.append(f"{problem}; it can be read off the shards, but they are damaged too")
        return
    written = shards.write_index_tables(_read_off(output, manifest), output)
    if written != manifest["index"]:  # the same rows, but another version of pyarrow wrote them
        shards.write_manifest({**manifest, "index": written}, output, version)
    result.done.append(f"{shards.INDEX}: read off the shards")


def _restore_shard(
    output: str,
    manifest: Mapping[str, Any],
    shard: Mapping[str, Any],
    problem: str,
    index: pa.Table,
    result: Repair,
) -> None:
    rows = index.filter(pc.equal(index["shard"], shard["name"]))
    rows = rows.select(["key", "identity", "video"]).to_pylist()
    videos = sorted({_key(row) for row in rows})
    try:
        commits = {commit.video.key: commit for commit in shards.load_commits(output, videos)}
        slices = []
        for row in rows:
            commit = commits[_key(row)]
            offset, length = commit.slices[row["key"]]
            slices.append(
                shards.Slice(
                    key=row["key"],
                    part=commit.video.key,
                    sha256=commit.tar_sha256,
                    offset=offset,
                    length=length,
                )
            )
    except (FileNotFoundError, KeyError):
        result.left.append(
            f"{problem}; its parts are not in the work folder: put a copy of the shard back, "
            "or make the dataset again"
        )
        return
    bucket = shards.bucket_of(rows[0]["identity"], manifest["buckets"][shard["split"]])
    plan = shards.ShardPlan(split=shard["split"], bucket=bucket, slices=tuple(slices))
    storage.remove(storage.join(output, shards.WORK, "packed", f"{plan.digest}.json"))
    try:
        record = shards.pack(plan, output)
    except DatasetError as error:
        result.left.append(f"{problem}; {error}")
        return
    if record["sha256"] == shard["sha256"]:
        result.done.append(f"shards/{shard['name']}: packed again from its parts")
    else:
        storage.remove(storage.join(output, "shards", record["name"]))
        result.left.append(f"{problem}; the parts in the work folder are of another version")


def _read_off(output: str, manifest: Mapping[str, Any]) -> Iterator[pa.Table]:
    """Rows of the index of each shard, from the shards themselves. Raises :class:`DatasetError` for a damaged one."""
    for shard in sorted(manifest["shards"], key=lambda shard: shard["name"]):
        with _checked(output, shard) as local:
            record = {**shard, "samples": shards.read_samples(local)}
        yield shards.index_table(record)


# --- takedown -------------------------------------------------------------------------------------------------


def take_down(
    output: str, identities: Sequence[str], videos: Sequence[str], reason: str
) -> Receipt:
    """Take people or videos out of a published dataset, for good.

    Their samples leave the shards (only those that hold one are written again), the index and the report; the work
    folder loses their parts and saved rows, of videos that were never published too, and all downloads; the ledger
    keeps one line a video, which says that it was taken down.
    ``takedowns.json`` remembers the names, so that no later run of ``preprocess`` on this output brings them back.
    The dataset version rises when a shard changed.

    Args:
        output: dataset URI.
        identities: names of people; all their videos go.
        videos: keys ``<identity>-<video>``.
        reason: one line for the ledger, such as the number of the request.

    Raises:
        DatasetError: not a dataset, a name it has never heard of (nothing is changed then), or a damaged shard that
            would have to be written again.
        output.ConfigError: another job is writing there.
    """
    shards.read_manifest(output)
    left: list[str] = []
    with OutputLock(output):
        version = shards.manifest_version(output)
        manifest = shards.read_manifest(output)
        takedowns = _recorded(output, identities, videos, reason)
        ledger = shards.read_ledger(
            output, ["kind", "identity", "video", "split", "url", "video_sha256"]
        )
        marked = ledger.filter(
            pc.and_(_covered(ledger, takedowns), pc.equal(ledger["kind"], "video"))
        ).to_pylist()
        index = _any_index(output, manifest)
        gone = _covered(index, takedowns)
        # New shards first: if an old one turns out to be damaged, its parts must still be there to repair it.
        thinned = _thin(output, manifest, index, gone)
        _clean_work(output, marked, takedowns)
        content = json.dumps(takedowns, sort_keys=True, indent=1).encode()
        storage.write_atomic(storage.join(output, shards.TAKEDOWNS), content)
        # From here on nothing brings them back, whatever happens to this process.
        storage.remove(storage.join(output, report.PAGE))
        album = gallery.read_album(output)
        gallery.write_album(output, album.filter(pc.invert(_covered(album, takedowns))))
        tally = Tally()
        shards.write_ledger((tally.see(row) for row in _marked_rows(output, takedowns)), output)
        tables = [thinned.tables[entry["name"]] for entry in thinned.listing]
        people = {name for table in tables for name in table["identity"].unique().to_pylist()}
        manifest |= {
            "dataset_version": manifest["dataset_version"] + bool(thinned.replaced),
            "counts": tally.counts(),
            "splits": tally.splits(),
            "twins": [pair for pair in manifest["twins"] if people.issuperset(pair[:2])],
            "shards": thinned.listing,
            "index": shards.write_index_tables(tables, output),
        }
        shards.write_manifest(manifest, output, version)
        for name in storage.names_below(storage.join(output, "shards")):
            if name not in thinned.tables:
                storage.remove(storage.join(output, "shards", name))
        try:
            report.rebuild(output)
        except DatasetError as error:  # a shard that had nothing to do with this
            left.append(str(error))
    _tidy(output)
    asked = {"identities": identities, "videos": videos}
    return Receipt(
        videos=[_key(row) for row in marked if _covers(row, asked)],
        samples=index.filter(gone).num_rows,
        frames=pc.sum(index.filter(gone)["frames"]).as_py() or 0,
        shards=thinned.replaced,
        sha256=sorted({row["video_sha256"] for row in marked if row["video_sha256"]}),
        dataset_version=manifest["dataset_version"],
        left=left,
    )


@dataclass(frozen=True, kw_only=True)
class _Thinned:
    """Shards without those who go."""

    listing: list[dict[str, Any]]
    """As the manifest lists them, by name."""
    tables: dict[str, pa.Table]
    """Their rows in the index, by name."""
    replaced: dict[str, str]
    """See :class:`Receipt`."""


def _thin(
    output: str, manifest: Mapping[str, Any], index: pa.Table, gone: pa.ChunkedArray
) -> _Thinned:
    """Write the shards that take the place of those with a row in ``gone``; the old ones stay where they are."""
    affected = set(index.filter(gone)["shard"].unique().to_pylist())
    kept = index.filter(pc.invert(gone))
    listing, tables, replaced = [], {}, {}
    for shard in manifest["shards"]:
        rows = kept.filter(pc.equal(kept["shard"], shard["name"]))
        entry = dict(shard)
        if shard["name"] in affected:
            if not rows.num_rows:
                replaced[shard["name"]] = ""
                continue
            record = _without(output, shard, rows)
            rows = shards.index_table(record)
            entry = {**record, "samples": len(record["samples"])}
            replaced[shard["name"]] = entry["name"]
        listing.append(entry)
        tables[entry["name"]] = rows
    listing.sort(key=lambda entry: entry["name"])
    return _Thinned(listing=listing, tables=tables, replaced=replaced)


def _recorded(
    output: str, identities: Sequence[str], videos: Sequence[str], reason: str
) -> Takedowns:
    """All takedowns, these included; nothing is written yet."""
    takedowns = shards.read_takedowns(output)
    ledger = shards.read_ledger(output, ["kind", "key", "identity"])
    known = {
        "identities": set(ledger["identity"].unique().to_pylist()),
        "videos": set(ledger.filter(pc.equal(ledger["kind"], "video"))["key"].to_pylist()),
    }
    entry = {"reason": reason, "date": datetime.now(UTC).date().isoformat()}
    for kind, names in (("identities", identities), ("videos", videos)):
        strange = sorted(set(names) - known[kind])
        if strange and (strange := sorted(set(strange) - _unpublished(output, kind, strange))):
            raise DatasetError(
                f"{storage.join(output, shards.LEDGER)}: has no {kind} {', '.join(strange)}; "
                "nothing was taken down"
            )
        for name in names:
            takedowns[kind].setdefault(name, entry)
    return takedowns


def _unpublished(output: str, kind: str, names: Sequence[str]) -> set[str]:
    """Those of the names that only a killed run knows, by its commits."""
    asked: Takedowns = {"identities": {}, "videos": {}, kind: {name: {} for name in names}}
    rows = (_part_row(output, key) for key in _part_keys(output) if _may_cover(key, asked))
    return {row["identity"] if kind == "identities" else _key(row) for row in rows if row}


def _covered(table: pa.Table, takedowns: Takedowns) -> pa.ChunkedArray:
    """Which rows of the index or the ledger belong to what was taken down."""
    identities, videos = (
        pa.array(sorted(takedowns[kind]), pa.string()) for kind in ("identities", "videos")
    )
    keys = pc.binary_join_element_wise(table["identity"], table["video"], "-")
    return pc.or_(pc.is_in(table["identity"], identities), pc.is_in(keys, videos))


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['identity']}-{row['video']}"


def _covers(row: Mapping[str, Any], takedowns: Mapping[str, Any]) -> bool:
    return shards.is_taken_down(row["identity"], _key(row), takedowns)


def _may_cover(key: str, takedowns: Takedowns) -> bool:
    """Whether a video of this key can be one that was taken down. ``a-b-c`` is of ``a`` or of ``a-b``: its record tells."""
    ends = (place for place, letter in enumerate(key) if letter == "-")
    return key in takedowns["videos"] or any(key[:end] in takedowns["identities"] for end in ends)


def _row_of(video: Video) -> dict[str, Any]:
    """What :func:`_rejected` wants to know, as the ledger would tell it."""
    return {
        "identity": video.identity,
        "video": video.video,
        "split": video.split,
        "url": video.url or video.path,
    }


def _rejected(row: Mapping[str, Any], takedowns: Takedowns) -> Video:
    """All that is left of a video."""
    video = Video(identity=row["identity"], video=row["video"], split=row["split"], url=row["url"])
    return shards.honour(video, takedowns)


def _marked_rows(output: str, takedowns: Takedowns) -> Iterator[dict[str, Any]]:
    for batch in shards.ledger_batches(output):
        for row in batch.to_pylist():
            if not _covers(row, takedowns):
                yield row
            elif row["kind"] == "video":
                video = _rejected(row, takedowns)
                yield from shards.ledger_rows(
                    shards.Commit(video=video, tar_sha256="", slices={}, frames={}), {}
                )


def _clean_work(output: str, marked: Sequence[Mapping[str, Any]], takedowns: Takedowns) -> None:
    """Take them out of the work folder, where there is one, and out of reports that were given to MLflow.

    Also what the ledger does not know yet: a run that was killed may have committed or saved videos of a longer list, or
    have been killed while it wrote one.
    """
    known = {_key(row): row for row in marked}
    storage.remove_temporary(output)
    done = {key for key, _ in shards.committed(output)}
    for key in _part_keys(output):
        if not _may_cover(key, takedowns):
            continue
        row = known.get(key) or _part_row(output, key)
        if row and not _covers(row, takedowns):
            continue
        if row and key in done:
            shards.commit(_rejected(row, takedowns), [], output, {})
        for extension in ("tar", "failed.json") if row else ("tar", "failed.json", "json"):
            storage.remove(shards.part_uri(output, key, extension))
    _clean_rows(storage.join(output, shards.WORK, "rows"), takedowns)
    packed = storage.join(output, shards.WORK, "packed")
    for name in storage.names_below(packed):
        record = json.loads(storage.read_bytes(storage.join(packed, name)))
        if any(_covers(sample, takedowns) for sample in record["samples"]):
            storage.remove(storage.join(packed, name))
    storage.remove(storage.join(output, shards.WORK, "downloads"))
    logged = storage.join(output, "mlflow")
    for name in storage.names_below(logged):
        if name.endswith(report.PAGE):
            storage.remove(storage.join(logged, name))


def _part_keys(output: str) -> set[str]:
    """Of all videos with a file in the work folder, with a commit or killed on the way to one."""
    names = storage.names_by_folder(storage.join(output, shards.WORK, "parts"))
    return {
        name.rsplit("/", 1)[-1].removesuffix(".json").removesuffix(".failed").removesuffix(".tar")
        for name in names
    }


def _part_row(output: str, key: str) -> dict[str, Any] | None:
    """What a commit says of its video; None: there is none that can be read, and the next run makes it again."""
    try:
        (commit,) = shards.load_commits(output, [key])
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return _row_of(commit.video)


def _clean_rows(saved: str, takedowns: Takedowns) -> None:
    """Take them out of the rows that ``--stop-after`` saved, and what nobody can read and may be theirs."""
    for name in storage.names_below(saved):
        stage, _, key = name.removesuffix(".parquet").rpartition("/")
        if _may_cover(key, takedowns):
            try:
                video, _ = from_row(replay.load_row(storage.join(saved, stage), key))
            except (ValueError, KeyError, TypeError):
                video = None
            if video is None or _covers(_row_of(video), takedowns):
                storage.remove(storage.join(saved, name))


@contextmanager
def _checked(output: str, shard: Mapping[str, Any]) -> Iterator[Path]:
    """A shard as a local file, once its bytes are found to be those of the manifest."""
    uri = storage.join(output, "shards", shard["name"])
    try:
        with storage.local_file(uri) as local:
            with local.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != shard["sha256"]:
                raise DatasetError(f"{uri}: damaged; run jobs/dataset.py repair first")
            yield local
    except FileNotFoundError:
        raise DatasetError(f"{uri}: missing; run jobs/dataset.py repair first") from None


def _tidy(output: str) -> None:
    """Remove the work folder if the lock was all there was in it."""
    work = storage.join(output, shards.WORK)
    if not storage.names_below(work):
        storage.remove(work)


def _any_index(output: str, manifest: Mapping[str, Any]) -> pa.Table:
    """The index; read off the shards when a takedown was killed between the index and the manifest."""
    try:
        return shards.read_index(output)
    except DatasetError:
        tables = list(_read_off(output, manifest))
        return pa.concat_tables([shards.INDEX_SCHEMA.empty_table(), *tables])


def _without(output: str, shard: Mapping[str, Any], rows: pa.Table) -> dict[str, Any]:
    """A shard with the samples ``rows`` of its index only, byte for byte as they were; its record."""
    with tempfile.TemporaryDirectory(prefix="headray-takedown-") as folder:
        local = Path(folder) / "shard.tar"
        keys = []
        with _checked(output, shard) as source, source.open("rb") as old, local.open("wb") as new:
            for row in rows.select(["key", "offsets", "sizes"]).to_pylist():
                start = row["offsets"][0] - shards.TAR_BLOCK
                end = row["offsets"][-1] + row["sizes"][-1]
                old.seek(start)
                new.write(old.read(end + -end % shards.TAR_BLOCK - start))
                keys.append(row["key"])
            new.write(shards.TAR_END)
        _, bucket, _ = shard["name"].rsplit("-", 2)
        return shards.put_shard(local, shard["split"], int(bucket), keys, output)
