"""Stage 8. Video rows ↔ dataset on disk: commits, WebDataset shards, index, ledger, manifest. CPU.

Exactly once, in two steps. *Commit*: each video's result becomes one tar under ``work/parts`` and then one JSON that
names its sha256; the JSON is the commit, and a retry writes the same names with the same bytes. *Publish*: commits are
gathered, shards are cut from them by a plan that depends on nothing but their content, and ``dataset.json`` comes last.
A dataset without ``dataset.json`` is not a dataset, and readers follow its names only. docs/formats.md is the contract.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import snapshots, storage
from pipelines.schema import (
    OFF_GPU_NODES,
    SCHEMA_VERSION,
    Cause,
    Member,
    StageResources,
    Track,
    Video,
    VideoRow,
    add_actors,
    batched,
    from_json,
    from_row,
    one_line,
    reject,
    to_json,
)
from pipelines.shelf import Shelf, places, quoted

if TYPE_CHECKING:
    from ray.data import Dataset

MANIFEST = "dataset.json"
INDEX = "index.parquet"
INDEX_BEFORE = "index-before.parquet"
"""While a dataset is published again: the index that the old ``dataset.json`` names, until the new one is there."""
LEDGER = "ledger/ledger.parquet"
TAKEDOWNS = "takedowns.json"
WORK = "work"
ARRAYS = ("landmarks.npy", "matrix.npy", "scores.npy", "embedding.npy", "pupils.npy")
"""Members of a sample between its JSON and its frames, in the order they are written."""
MAX_SPANS = 100
"""Of a video, in the ledger."""
TAR_BLOCK = tarfile.BLOCKSIZE
TAR_END = b"\0" * (2 * TAR_BLOCK)
PLANS_AT_ONCE = 64
"""Shards of one Ray Data plan: bounds what the driver and the object store hold of them."""


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How samples are gathered into tar files."""

    target_mb: float = 512.0
    """Wanted size of a shard, MiB. Fixes the number of shards at the first publication; 200 to 1000 in production."""
    resources: StageResources = StageResources(num_cpus=0.5, memory_gb=1.0)
    """Of the actors that commit videos and of the tasks that pack shards."""

    def __post_init__(self) -> None:
        if not 0 < self.target_mb < float("inf"):
            raise ValueError(f"shards.target_mb must be positive, got {self.target_mb}")


class DatasetError(ValueError):
    """A dataset that is missing, unfinished, damaged or of another version: one line for the user."""


# --- commits ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One video's finished result, as ``work/parts/<hh>/<key>.json`` holds it."""

    video: Video
    """Without boxes, frame times and the like: those live in the sample's own ``KEY.json``."""
    tar_sha256: str
    """Of ``work/parts/<hh>/<key>.tar``; empty when the video has no sample and no snapshot."""
    slices: dict[str, tuple[int, int]]
    """(offset, length) of each sample inside that tar, by sample key."""
    frames: dict[str, int]
    """Kept frames of each track, by sample key, whether or not it is a sample."""
    snapshots: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(offset, length) of each snapshot's JPEG inside that tar, by name."""

    def to_bytes(self) -> bytes:
        """JSON, keys sorted."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "video": json.loads(to_json(self.video)),
            "tar_sha256": self.tar_sha256,
            "slices": self.slices,
            "frames": self.frames,
            "snapshots": self.snapshots,
        }
        return json.dumps(record, sort_keys=True, indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Commit:
        """Inverse of :meth:`to_bytes`. Raises ``ValueError`` on another schema version."""
        record = json.loads(data)
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"commit of schema {record['schema_version']}, not {SCHEMA_VERSION}")
        slices, pictures = (
            {name: (offset, length) for name, (offset, length) in record.get(part, {}).items()}
            for part in ("slices", "snapshots")
        )
        return Commit(
            video=from_json(json.dumps(record["video"])),
            tar_sha256=record["tar_sha256"],
            slices=slices,
            frames=record["frames"],
            snapshots=pictures,
        )


def part_uri(output: str, key: str, extension: str) -> str:
    """``OUTPUT/work/parts/<hh>/<key>.<extension>``; ``hh`` keeps folders small."""
    folder = hashlib.sha256(key.encode()).hexdigest()[:2]
    return storage.join(output, WORK, "parts", folder, f"{key}.{extension}")


def sample_json(video: Video, track: Track, crop: Mapping[str, Any]) -> bytes:
    """``KEY.json``: where the sample comes from and how it was made; one entry a kept frame where lists are.

    Args:
        video: the source.
        track: kept, after every filter inside the video.
        crop: rule, size and score columns, equal for the whole dataset.
    """
    span = next((span for span in video.spans if span.name == track.span), None)
    record = {
        "schema_version": SCHEMA_VERSION,
        "key": video.track_key(track),
        "identity": video.identity,
        "video": video.video,
        "track": track.name,
        "span": track.span,
        "url": video.url,
        "video_sha256": video.sha256,
        "source": video.source,
        "fps": video.probe.get("fps"),
        "width": video.probe.get("width"),
        "height": video.probe.get("height"),
        "indices": track.indices,
        "times": [round(time, 6) for time in track.times],
        "boxes": [[round(edge, 3) for edge in box] for box in track.boxes],
        "box_scores": [round(score, 4) for score in track.box_scores],
        "scores": track.scores,
        "shift": {name: video.shift[name] for name in sorted(video.shift) if name != "strip"},
        "audio_offset": span.audio_offset if span else 0,
        "fv_conf": span.fv_conf if span else 0.0,
        "asd_conf": span.asd_conf if span else 0.0,
        "crop": dict(crop),
        "versions": video.versions,
    }
    return json.dumps(record, sort_keys=True).encode()


def tar_header(name: str, size: int) -> bytes:
    """A USTAR header that depends on name and size only. Raises ``ValueError`` for a name over 100 bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii")


def tar_sample(members: Sequence[Member]) -> bytes:
    """The members of one sample as a run of tar blocks, without the archive's end."""
    blocks = []
    for name, data in members:
        blocks += [tar_header(name, len(data)), data, b"\0" * (-len(data) % TAR_BLOCK)]
    return b"".join(blocks)


def commit(video: Video, members: list[Member], output: str, crop: Mapping[str, Any]) -> Commit:
    """Write one video's part and its commit; the same input writes the same bytes under the same names.

    Args:
        video: after the last stage, rejected or not.
        members: of its open tracks, in any order, and snapshots.
        output: dataset URI.
        crop: see :func:`sample_json`.
    """
    by_key: dict[str, list[Member]] = {}
    pictures = [member for member in members if snapshots.is_snapshot(member[0])]
    # The frames of the video, then the windows of its tracks.
    pictures.sort(key=lambda member: (not member[0].startswith(f"{video.key}."), member[0]))
    for name, data in members:
        if snapshots.is_snapshot(name):
            continue
        by_key.setdefault(name.split(".", 1)[0], []).append((name, data))
    blocks: list[bytes] = []
    slices: dict[str, tuple[int, int]] = {}
    frames: dict[str, int] = {}
    offset = 0
    for track in video.tracks:
        key = video.track_key(track)
        frames[key] = len(track.times)
        if not video.live or track.state != "open":
            continue
        ordered = sorted(by_key[key], key=_member_place)
        sample = tar_sample([(f"{key}.json", sample_json(video, track, crop)), *ordered])
        slices[key] = (offset, len(sample))
        blocks.append(sample)
        offset += len(sample)
    places: dict[str, tuple[int, int]] = {}
    for name, data in pictures[: snapshots.MOST]:
        block = tar_sample([(name, data)])
        places[name] = (offset + TAR_BLOCK, len(data))
        blocks.append(block)
        offset += len(block)
    sha256 = ""
    if blocks:
        tar = b"".join([*blocks, TAR_END])
        sha256 = hashlib.sha256(tar).hexdigest()
        storage.write_atomic(part_uri(output, video.key, "tar"), tar)
    done = Commit(
        video=_slim(video), tar_sha256=sha256, slices=slices, frames=frames, snapshots=places
    )
    extension = "failed.json" if video.state == "failed" else "json"
    storage.write_atomic(part_uri(output, video.key, extension), done.to_bytes())
    return done


def _member_place(member: Member) -> tuple[int, str]:
    """Arrays in the order of :data:`ARRAYS`, then frames by index and extension."""
    name = member[0]
    suffix = name.split(".", 1)[1]
    return (ARRAYS.index(suffix) if suffix in ARRAYS else len(ARRAYS), name)


def _slim(video: Video) -> Video:
    spans = tuple(
        replace(span, start=span.times[0], end=span.times[-1], times=(), boxes=())
        if span.times
        else span
        for span in video.spans
    )
    tracks = tuple(
        replace(
            track,
            times=(track.times[0], track.times[-1]) if track.times else (),
            indices=(),
            boxes=(),
            box_scores=(),
            embedding=tuple(round(value, 6) for value in track.embedding),
        )
        for track in video.tracks
    )
    kept = [time for track in video.tracks if track.state == "open" for time in track.times]
    line = snapshots.with_kept(video.timeline, kept if video.live else [])
    return replace(video, spans=spans, tracks=tracks, timeline=line)


def committed(output: str) -> Iterator[tuple[str, str]]:
    """(key, ``done`` or ``failed``) of every video with a commit; a failed one may be tried again.

    One that was done at a later try comes twice, the second time as done.
    """
    for name in storage.names_by_folder(storage.join(output, WORK, "parts")):
        stem = name.rsplit("/", 1)[-1]
        if stem.endswith(".failed.json"):  # sorts before .json
            yield stem.removesuffix(".failed.json"), "failed"
        elif stem.endswith(".json"):
            yield stem.removesuffix(".json"), "done"


def load_commits(output: str, keys: Iterable[str], threads: int = 16) -> Iterator[Commit]:
    """Commits of the given keys in that order; a failed one where there is no better."""

    def load(key: str) -> Commit:
        try:
            data = storage.read_bytes(part_uri(output, key, "json"))
        except FileNotFoundError:
            data = storage.read_bytes(part_uri(output, key, "failed.json"))
        return Commit.from_bytes(data)

    with ThreadPoolExecutor(threads) as pool:
        for batch in batched(keys, 8 * threads):  # a commit takes some 30 KB while it is one
            yield from pool.map(load, batch)


class Committer:
    """Actor of the last stage: writes what arrives and answers with a small row of counts."""

    def __init__(self, output: str, crop: dict[str, Any]) -> None:
        self.output = output
        self.crop = crop

    def __call__(self, row: VideoRow) -> dict[str, Any]:
        """Commit one row. A storage error is not the video's fault: it is raised and ends the job."""
        video, members = from_row(row)
        done = commit(video, members, self.output, self.crop)
        return {
            "key": video.key,
            "state": video.state,
            "cause": video.cause,
            "tracks": len(done.slices),
            "frames": sum(done.frames[key] for key in done.slices),
            "bytes": sum(length for _, length in done.slices.values()),
            "seconds": json.dumps(video.seconds),
            "stage_frames": json.dumps(video.stage_frames),
        }


def add_commits(
    videos: Dataset, output: str, crop: dict[str, Any], config: ShardsConfig
) -> Dataset:
    """Rows of videos → a row of counts for each, once its commit is on disk."""
    return add_actors(videos, Committer, config.resources, output=output, crop=crop)


# --- shards -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One sample to be packed: where its run of tar blocks lies."""

    key: str
    part: str
    """Key of the video whose part holds it."""
    sha256: str
    """Of that part."""
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What one shard will hold. Depends on the samples and on nothing else."""

    split: str
    bucket: int
    slices: tuple[Slice, ...]

    @property
    def digest(self) -> str:
        """Names the plan: equal plans give equal shards."""
        parts = [
            f"{SCHEMA_VERSION} {self.split} {self.bucket}",
            *(f"{item.key} {item.sha256} {item.offset} {item.length}" for item in self.slices),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> str:
        """For a Ray Data row."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> ShardPlan:
        """Inverse of :meth:`to_json`."""
        record = json.loads(text)
        slices = tuple(Slice(**item) for item in record["slices"])
        return ShardPlan(split=record["split"], bucket=record["bucket"], slices=slices)


def bucket_of(identity: str, buckets: int) -> int:
    """Shard number of an identity: a stable hash modulo the number of shards of its split."""
    digest = hashlib.sha256(f"shard {identity}".encode()).digest()
    return int.from_bytes(digest[:8]) % buckets


SLICE_COLUMNS = tuple(field.name for field in dataclasses.fields(Slice))


class ShardPlans(Sequence[ShardPlan]):
    """The plans of all shards, on disk; each is made when it is asked for. As objects a sample would take 500 bytes."""

    def __init__(
        self, kept: Iterable[tuple[str, str, Slice]], target_mb: float, buckets: Mapping[str, int]
    ) -> None:
        """Args: see :func:`plan_shards`."""
        columns = ("split", "identity", *SLICE_COLUMNS)
        self._shelf = Shelf(
            f"CREATE TABLE kept ({quoted(columns)})",
            f"CREATE TABLE planned (split, bucket, {quoted(SLICE_COLUMNS)})",
        )
        self._shelf.add(
            f"INSERT INTO kept VALUES ({places(columns)})",
            ((split, identity, *dataclasses.astuple(item)) for split, identity, item in kept),
        )
        self.buckets = dict(buckets)
        """Number of shards by split."""
        for split, total in self._shelf.rows("SELECT split, SUM(length) FROM kept GROUP BY split"):
            count = max(1, round(total / (target_mb * 2**20)))
            self.buckets.setdefault(split, count)
        find = lru_cache(4096)(bucket_of)
        self._shelf.define("bucket", lambda split, identity: find(identity, self.buckets[split]))
        self._shelf.do(
            f"INSERT INTO planned SELECT split, bucket(split, identity) AS number, {quoted(SLICE_COLUMNS)} "
            "FROM kept ORDER BY split, number, key"
        )
        groups = self._shelf.rows(
            "SELECT split, bucket, MIN(rowid), MAX(rowid) FROM planned GROUP BY split, bucket ORDER BY MIN(rowid)"
        )
        self._plans = tuple(groups)
        """(split, bucket, first and last row) of each."""

    def __len__(self) -> int:
        return len(self._plans)

    @overload
    def __getitem__(self, place: int) -> ShardPlan: ...
    @overload
    def __getitem__(self, place: slice) -> list[ShardPlan]: ...
    def __getitem__(self, place: int | slice) -> ShardPlan | list[ShardPlan]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        split, bucket, first, last = self._plans[place]
        query = f"SELECT {quoted(SLICE_COLUMNS)} FROM planned WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
        slices = tuple(
            Slice(**dict(zip(SLICE_COLUMNS, row, strict=True)))
            for row in self._shelf.rows(query, (first, last))
        )
        return ShardPlan(split=split, bucket=bucket, slices=slices)


def plan_shards(
    kept: Iterable[tuple[str, str, Slice]], target_mb: float, buckets: Mapping[str, int]
) -> tuple[ShardPlans, dict[str, int]]:
    """Assign samples to shards.

    Args:
        kept: (split, identity, slice) of every published sample, in any order.
        target_mb: wanted shard size, MiB; used only for splits that have no number of shards yet.
        buckets: number of shards by split of an earlier publication; kept for ever.

    Returns:
        plans sorted by (split, bucket), samples inside sorted by key; and the number of shards by split.
    """
    plans = ShardPlans(kept, target_mb, buckets)
    return plans, plans.buckets


def pack(plan: ShardPlan, output: str) -> dict[str, Any]:
    """Write one shard, read it back, and record it under ``work/packed``; a finished one is not written again.

    Returns:
        the record: ``name``, ``split``, ``bytes``, ``sha256``, ``samples`` (index rows, see :func:`index_row`).

    Raises:
        DatasetError: a part is missing, or its bytes are not those that were committed.
    """
    record_uri = storage.join(output, WORK, "packed", f"{plan.digest}.json")
    if storage.exists(record_uri):
        record: dict[str, Any] = json.loads(storage.read_bytes(record_uri))
        if shard_size(output, record["name"]) == record["bytes"]:
            return record
    with tempfile.TemporaryDirectory(prefix="headray-pack-") as folder:
        local = Path(folder) / "shard.tar"
        with local.open("wb") as file:
            for part, slices in itertools.groupby(plan.slices, key=lambda item: item.part):
                wanted = list(slices)
                tar = _read_part(output, part, wanted[0].sha256)
                for item in wanted:
                    file.write(tar[item.offset : item.offset + item.length])
            file.write(TAR_END)
        keys = [item.key for item in plan.slices]
        record = put_shard(local, plan.split, plan.bucket, keys, output)
    storage.write_atomic(record_uri, json.dumps(record, sort_keys=True).encode())
    return record


def put_shard(
    local: Path, split: str, bucket: int, keys: Sequence[str], output: str
) -> dict[str, Any]:
    """Read a finished local tar back and put it in its place; returns its record, see :func:`pack`.

    Args:
        local: the whole tar.
        split: of its samples.
        bucket: number of the shard.
        keys: the samples it must hold, in order.
        output: dataset URI.
    """
    samples = read_samples(local)
    if [sample["key"] for sample in samples] != list(keys):
        raise DatasetError(f"{split} shard {bucket}: samples read back differ from the plan")
    with local.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{split}-{bucket:05d}-{sha256[:12]}.tar"
    storage.put_file(local, storage.join(output, "shards", name))
    return {
        "name": name,
        "split": split,
        "bytes": local.stat().st_size,
        "sha256": sha256,
        "samples": samples,
    }


def _read_part(output: str, key: str, sha256: str) -> bytes:
    uri = part_uri(output, key, "tar")
    try:
        tar = storage.read_bytes(uri)
    except FileNotFoundError:
        raise DatasetError(
            f"{uri}: committed part is missing; delete its .json and run again"
        ) from None
    if hashlib.sha256(tar).hexdigest() != sha256:
        raise DatasetError(f"{uri}: bytes differ from its commit; delete its .json and run again")
    return tar


def shard_size(output: str, name: str) -> int:
    """Bytes of a shard, -1 when it is not there."""
    try:
        return storage.size(storage.join(output, "shards", name))
    except FileNotFoundError:
        return -1


def read_samples(tar: Path) -> list[dict[str, Any]]:
    """Read a whole shard and describe each sample, in file order.

    Returns:
        one dict a sample: fields of its ``KEY.json`` that the index wants, ``members`` (names without the key),
        ``offsets`` and ``sizes`` of their contents in the file.

    Raises:
        DatasetError: not a tar, cut off, members of a sample not adjacent, or a sample without its JSON or with
            another number of pictures than that says, or labels for some of them only.
    """
    samples: list[dict[str, Any]] = []
    seen: set[str] = set()
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                key, suffix = info.name.split(".", 1)
                data = archive.extractfile(info)
                content = data.read() if data else b""
                if len(content) != info.size:
                    raise DatasetError(f"{tar.name}: member {info.name} is cut off")
                if not samples or samples[-1]["key"] != key:
                    if key in seen or suffix != "json":
                        raise DatasetError(f"{tar.name}: sample {key} does not begin with its JSON")
                    seen.add(key)
                    samples.append(index_row(json.loads(content)))
                samples[-1]["members"].append(suffix)
                samples[-1]["offsets"].append(info.offset_data)
                samples[-1]["sizes"].append(info.size)
                end = info.offset_data + info.size + -info.size % TAR_BLOCK
    except DatasetError:
        raise
    except (tarfile.TarError, EOFError, ValueError, LookupError, TypeError) as error:
        # ValueError and after: a member's name without a dot, or a JSON that is damaged or of another shape
        raise DatasetError(f"{tar.name}: {type(error).__name__}: {error}") from error
    with tar.open("rb") as file:
        file.seek(end)
        if file.read(len(TAR_END) + 1) != TAR_END:
            raise DatasetError(f"{tar.name}: the end of the archive is missing")
    for sample in samples:
        _check_pictures(tar.name, sample)
    return samples


def _check_pictures(tar_name: str, sample: Mapping[str, Any]) -> None:
    pictures, labels = (
        sum(name.endswith(extension) for name in sample["members"])
        for extension in (".jpg", ".png")
    )
    told = f"its JSON says {sample['frames']}"
    if pictures != sample["frames"]:
        raise DatasetError(f"{tar_name}: sample {sample['key']} has {pictures} pictures, {told}")
    if labels not in (0, sample["frames"]):
        raise DatasetError(f"{tar_name}: sample {sample['key']} has {labels} label maps, {told}")


def index_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a sample's JSON that ``index.parquet`` repeats, with empty lists for its members."""
    return {
        "key": record["key"],
        "identity": record["identity"],
        "video": record["video"],
        "track": record["track"],
        "frames": len(record["indices"]),
        "url": record["url"],
        "start": record["times"][0],
        "end": record["times"][-1],
        "fps": float(record["fps"] or 0.0),
        "scores": record["scores"],
        "members": [],
        "offsets": [],
        "sizes": [],
    }


def pack_all(
    plans: Sequence[ShardPlan], output: str, config: ShardsConfig
) -> Iterator[dict[str, Any]]:
    """Pack every plan in Ray tasks, some hundred at a time.

    Yields:
        the records as they finish, in no particular order, with the *number* of ``samples`` and with ``digest``, the
        plan's: what stands in the index is read from ``work/packed`` when it is wanted (:func:`packed_record`).
    """
    import ray.data

    for rows in batched(({"plan": plan.to_json()} for plan in plans), PLANS_AT_ONCE):
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _pack_row,  # type: ignore[arg-type]
            fn_kwargs={"output": output},
            num_cpus=config.resources.num_cpus,
            memory=config.resources.memory_gb * 2**30,
            label_selector=OFF_GPU_NODES,
        )
        for row in dataset.iter_rows():
            yield json.loads(row["record"])


def _pack_row(row: dict[str, Any], output: str) -> dict[str, Any]:
    plan = ShardPlan.from_json(row["plan"])
    record = pack(plan, output)
    told = record | {"samples": len(record["samples"]), "digest": plan.digest}
    return {"record": json.dumps(told)}


def packed_record(digest: str, output: str) -> dict[str, Any]:
    """The record of a packed plan, see :func:`pack`."""
    uri = storage.join(output, WORK, "packed", f"{digest}.json")
    record: dict[str, Any] = json.loads(storage.read_bytes(uri))
    return record


# --- index, ledger, manifest ------------------------------------------------------------------------------------

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("identity", pa.string()),
        ("video", pa.string()),
        ("track", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("frames", pa.int32()),
        ("url", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("fps", pa.float64()),
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("members", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
    ]
)

LEDGER_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("key", pa.string()),
        ("identity", pa.string()),
        ("video", pa.string()),
        ("track", pa.string()),
        ("split", pa.string()),
        ("state", pa.string()),
        ("stage", pa.string()),
        ("cause", pa.string()),
        ("detail", pa.string()),
        ("frames", pa.int32()),
        ("dropped", pa.map_(pa.string(), pa.int64())),
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("url", pa.string()),
        ("video_sha256", pa.string()),
        ("bytes", pa.int64()),
        ("attempts", pa.int32()),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("shift", pa.string()),
        ("timeline", pa.string()),
        ("source", pa.string()),
        ("versions", pa.string()),
    ]
)


LEDGER_ROWS = 1024
"""Rows of the ledger that are held at once, to write or to read: one takes some 3 KB as an object."""


def write_index(records: Iterable[Mapping[str, Any]], output: str) -> dict[str, Any]:
    """``index.parquet`` from the records of :func:`pack`; one row group a shard, shards by name.

    Returns:
        ``file``, ``bytes`` and ``sha256`` for the manifest.
    """
    ordered = sorted(records, key=lambda record: record["name"])
    return write_index_tables(map(index_table, ordered), output)


def index_table(record: Mapping[str, Any]) -> pa.Table:
    """The rows of one shard, from its record of :func:`pack`."""
    rows = [
        sample
        | {
            "split": record["split"],
            "shard": record["name"],
            "scores": sorted(sample["scores"].items()),
        }
        for sample in record["samples"]
    ]
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def write_index_tables(tables: Iterable[pa.Table], output: str) -> dict[str, Any]:
    """``index.parquet`` from the rows of each shard, shards by name; see :func:`write_index`."""
    with tempfile.TemporaryDirectory(prefix="headray-index-") as folder:
        local = Path(folder) / INDEX
        with pq.ParquetWriter(local, INDEX_SCHEMA, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        with local.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        _keep_index(output, sha256)
        storage.put_file(local, storage.join(output, INDEX))
        return {"file": INDEX, "bytes": local.stat().st_size, "sha256": sha256}


def _keep_index(output: str, sha256: str) -> None:
    """Copy the index of the published dataset aside, if one of another content is about to take its place."""
    try:
        wanted = read_manifest(output)["index"]["sha256"]
        with storage.local_file(storage.join(output, INDEX)) as local:
            with local.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == wanted != sha256:
                storage.put_file(local, storage.join(output, INDEX_BEFORE))
    except (DatasetError, FileNotFoundError):
        return  # published for the first time, or there is none to keep


def read_index(output: str, columns: list[str] | None = None) -> pa.Table:
    """The index of a published dataset, or some of its columns, checked against the manifest. Raises :class:`DatasetError`."""
    wanted = read_manifest(output)["index"]
    uri = storage.join(output, wanted["file"])
    problem = f"{uri}: missing"
    for place in (uri, storage.join(output, INDEX_BEFORE)):
        try:
            content = storage.read_bytes(place)
        except FileNotFoundError:
            continue
        if hashlib.sha256(content).hexdigest() == wanted["sha256"]:
            return pq.read_table(io.BytesIO(content), columns=columns)
        problem = f"{uri}: sha256 differs from {MANIFEST}"
    if read_manifest(output)["index"] != wanted:  # published again between the two reads
        return read_index(output, columns)
    raise DatasetError(problem)


def index_rows(output: str, keys: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of some samples, read a shard's at a time; none when no index is there."""
    wanted = pa.array(sorted(keys), pa.string())
    rows: list[dict[str, Any]] = []
    with storage.local_file(storage.join(output, INDEX)) as local, pq.ParquetFile(local) as file:
        for group in range(file.num_row_groups):
            found = pc.is_in(file.read_row_group(group, ["key"])["key"], wanted)
            if pc.any(found).as_py():
                rows += file.read_row_group(group).filter(found).to_pylist()
    return rows


def ledger_rows(
    commit: Commit, decisions: Mapping[str, tuple[str, str, str]]
) -> list[dict[str, Any]]:
    """What the ledger says of one video: a row for it, then one for each of its tracks.

    Args:
        commit: the finished video.
        decisions: by sample key (split, cause, detail) of the identity filter; an empty cause means published.
    """
    video = commit.video
    tracks = [_track_row(commit, track, decisions) for track in video.tracks]
    published = [row for row in tracks if row["state"] == "published"]
    state: str = video.state
    cause, detail = video.cause, video.detail
    if video.live and published:
        state = "published"
    elif video.live:
        state = "rejected"
        causes = Counter(row["_cause"] for row in tracks)
        cause = causes.most_common(1)[0][0] if causes else Cause.NO_TRACKS.value
        detail = f"none of {len(tracks)} tracks published"
    own = {
        "kind": "video",
        "key": video.key,
        "track": "",
        "split": published[0]["split"] if published else video.split,
        "state": state,
        "_cause": cause,
        "detail": detail,
        "frames": sum(row["frames"] for row in published),
        "dropped": [],
        "scores": [],
        "start": 0.0,
        "end": float(video.probe.get("duration") or 0.0),
        "seconds": sorted(video.seconds.items()),
        "shift": json.dumps(video.shift, sort_keys=True) if video.shift else "",
        "timeline": json.dumps(_timeline(video), sort_keys=True) if video.timeline else "",
        "source": json.dumps(video.source, sort_keys=True) if video.source else "",
        "versions": json.dumps(video.versions, sort_keys=True) if video.versions else "",
    }
    shared = {
        "identity": video.identity,
        "video": video.video,
        "url": video.url or video.path,
        "video_sha256": video.sha256,
        "bytes": video.size,
        "attempts": video.attempts,
    }
    rows = []
    for row in [own, *tracks]:
        stage, _, reason = row.pop("_cause").partition(": ")
        rows.append(row | shared | {"stage": stage, "cause": reason})
    return rows


def _timeline(video: Video) -> dict[str, Any]:
    """With the spans of the list, the first of many."""
    end = video.timeline["end"]
    spans = [[round(span.start, 3), round(span.end or end, 3)] for span in video.spans]
    return video.timeline | {"spans": spans[:MAX_SPANS]}


def _track_row(
    commit: Commit, track: Track, decisions: Mapping[str, tuple[str, str, str]]
) -> dict[str, Any]:
    video = commit.video
    key = video.track_key(track)
    state: str = track.state
    split, cause, detail = video.split, track.cause, track.detail
    if key in decisions:
        split, cause, detail = decisions[key]
        state = "rejected" if cause else "published"
    elif state == "open":  # the video itself ended
        state, cause, detail = video.state, video.cause, video.detail
    return {
        "kind": "track",
        "key": key,
        "track": track.name,
        "split": split,
        "state": state,
        "_cause": cause,
        "detail": detail,
        "frames": commit.frames.get(key, 0),
        "dropped": sorted(track.dropped.items()),
        "scores": sorted(track.scores.items()),
        "start": track.times[0] if track.times else 0.0,
        "end": track.times[-1] if track.times else 0.0,
        "seconds": [],
        "shift": "",
        "timeline": "",
        "source": "",
        "versions": "",
    }


def write_ledger(rows: Iterable[dict[str, Any]], output: str) -> None:
    """``ledger/ledger.parquet`` from a stream of rows; memory does not grow with their number."""
    with tempfile.TemporaryDirectory(prefix="headray-ledger-") as folder:
        local = Path(folder) / "ledger.parquet"
        with pq.ParquetWriter(local, LEDGER_SCHEMA, compression="zstd") as writer:
            for batch in batched(rows, LEDGER_ROWS):
                writer.write_table(pa.Table.from_pylist(batch, schema=LEDGER_SCHEMA))
        storage.put_file(local, storage.join(output, LEDGER))


def read_ledger(output: str, columns: list[str] | None = None) -> pa.Table:
    """The ledger as a table of :data:`LEDGER_SCHEMA`, or some of its columns. Raises :class:`DatasetError`."""
    return pa.Table.from_batches(
        ledger_batches(output, columns),
        schema=pa.schema([LEDGER_SCHEMA.field(name) for name in columns or LEDGER_SCHEMA.names]),
    )


def ledger_batches(output: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The ledger some thousand rows at a time. Raises :class:`DatasetError`."""
    uri = storage.join(output, LEDGER)
    try:
        with storage.local_file(uri) as local, pq.ParquetFile(local) as file:
            yield from file.iter_batches(LEDGER_ROWS, columns=columns)
    except FileNotFoundError:
        raise DatasetError(f"{uri}: no ledger; has jobs/preprocess.py finished there?") from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{uri}: damaged ({one_line(str(error))})") from None


def read_takedowns(output: str) -> dict[str, dict[str, dict[str, str]]]:
    """Who must not be in this dataset: ``identities`` by name and ``videos`` by key, each with reason and date."""
    try:
        content = storage.read_bytes(storage.join(output, TAKEDOWNS))
    except FileNotFoundError:
        return {"identities": {}, "videos": {}}
    takedowns: dict[str, dict[str, dict[str, str]]] = json.loads(content)
    return takedowns


def is_taken_down(identity: str, key: str, takedowns: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a video ``key`` of this identity is covered by :func:`read_takedowns`."""
    return identity in takedowns["identities"] or key in takedowns["videos"]


def honour(video: Video, takedowns: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Video:
    """The video, rejected when it or its identity was taken down."""
    if not is_taken_down(video.identity, video.key, takedowns):
        return video
    entry = takedowns["identities"].get(video.identity) or takedowns["videos"][video.key]
    return reject(video, Cause.TAKEDOWN, entry["reason"])


def manifest_version(output: str) -> str:
    """Of the ``dataset.json`` that is there now; to be asked before anything is read that the next one is made of."""
    return storage.version(storage.join(output, MANIFEST))


def write_manifest(manifest: Mapping[str, Any], output: str, before: str) -> None:
    """``dataset.json``, last of all: from here on the dataset exists.

    Args:
        manifest: what it says.
        output: dataset URI.
        before: :func:`manifest_version` when the work on this one began.

    Raises:
        DatasetError: another one was published since: by a run elsewhere, which took this one for dead.
    """
    content = json.dumps(manifest, sort_keys=True, indent=1).encode()
    uri = storage.join(output, MANIFEST)
    if not storage.replace(uri, content, before):
        raise DatasetError(
            f"{uri}: another run has published while this one was working, and that one stays; run the same command again"
        )
    storage.remove(storage.join(output, INDEX_BEFORE))


def read_manifest(output: str) -> dict[str, Any]:
    """``dataset.json`` of a published dataset. Raises :class:`DatasetError` with the cure."""
    uri = storage.join(output, MANIFEST)
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            f"{uri}: not found, so {output} is not a (finished) dataset; run jobs/preprocess.py to its end"
        ) from None
    except ValueError as error:
        raise DatasetError(f"{uri}: not JSON ({error})") from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DatasetError(
            f"{uri}: schema version {manifest.get('schema_version')}, this program reads {SCHEMA_VERSION}"
        )
    return manifest


def verify(output: str, told: Callable[[int, int], object] | None = None) -> list[str]:
    """Read all of a dataset again: index, ledger, and every shard's sha256, structure and rows in the index.

    Args:
        output: dataset URI.
        told: called with the number of shards read so far and of all shards.

    Returns:
        one line for each thing that is wrong; empty when all is well. Raises :class:`DatasetError` when there is
        nothing to verify.
    """
    manifest = read_manifest(output)
    listed = manifest["shards"]
    named = {shard["name"] for shard in listed}
    problems = [
        f"shards/{name}: not named by {MANIFEST}"
        for name in storage.names_below(storage.join(output, "shards"))
        if name not in named
    ]
    index = ledger = None
    try:
        index = read_index(output)
    except DatasetError as error:
        problems.append(str(error))
    try:
        ledger = read_ledger(output)
    except DatasetError as error:
        problems.append(str(error))
    if index is not None and ledger is not None:
        problems += _verify_tables(manifest, index, ledger)

    def check(shard: dict[str, Any]) -> list[str]:
        return verify_shard(output, shard, index)

    with ThreadPoolExecutor(4) as pool:
        for done, found in enumerate(pool.map(check, listed), start=1):
            problems += found
            if told:
                told(done, len(listed))
    return problems


def _verify_tables(manifest: Mapping[str, Any], index: pa.Table, ledger: pa.Table) -> list[str]:
    problems = []
    indexed = index["key"]
    track = pc.and_(pc.equal(ledger["kind"], "track"), pc.equal(ledger["state"], "published"))
    published = ledger.filter(track)["key"]
    if len(indexed) != pc.count_distinct(indexed).as_py():
        problems.append(f"{INDEX}: a sample is listed twice")
    for key in published.filter(pc.invert(pc.is_in(published, indexed))).slice(0, 10).to_pylist():
        problems.append(f"{INDEX}: {key} is missing, the ledger says published")
    for key in indexed.filter(pc.invert(pc.is_in(indexed, published))).slice(0, 10).to_pylist():
        problems.append(f"{LEDGER}: {key} is not published there, but {INDEX} has it")
    told = manifest["counts"]["frames"]["published"]
    found = pc.sum(index["frames"]).as_py() or 0
    if told != found:
        problems.append(f"{MANIFEST}: counts {told} published frames, {INDEX} has {found}")
    named = pa.array([shard["name"] for shard in manifest["shards"]], pa.string())
    strange = index["shard"].filter(pc.invert(pc.is_in(index["shard"], named)))
    problems += [
        f"{INDEX}: shard {name} is not named by {MANIFEST}" for name in strange.unique().to_pylist()
    ]
    return problems


def verify_shard(output: str, shard: Mapping[str, Any], index: pa.Table | None) -> list[str]:
    """Read one shard again; returns a line for what is wrong with it.

    Args:
        output: dataset URI.
        shard: its entry in the manifest.
        index: of the dataset; None: not compared.
    """
    name = shard["name"]
    try:
        with storage.local_file(storage.join(output, "shards", name)) as local:
            with local.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != shard["sha256"]:
                return [
                    f"shards/{name}: sha256 {sha256[:12]}…, {MANIFEST} says {shard['sha256'][:12]}…"
                ]
            samples = read_samples(local)
    except FileNotFoundError:
        return [f"shards/{name}: missing"]
    except DatasetError as error:
        return [f"shards/{error}"]
    if len(samples) != shard["samples"]:
        return [f"shards/{name}: {len(samples)} samples, {MANIFEST} says {shard['samples']}"]
    if index is None:
        return []
    fields = ["key", "members", "offsets", "sizes"]
    rows = index.filter(pc.equal(index["shard"], name)).select(fields).to_pylist()
    found = [{field: sample[field] for field in fields} for sample in samples]
    return [] if found == rows else [f"shards/{name}: samples differ from {INDEX}"]
