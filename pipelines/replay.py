"""One stage alone: save the rows that enter it, run it on them as often as wanted, and see what it changed.

``stop_after`` runs the chain up to a stage and saves what comes out, a parquet file a video, below
``OUTPUT/work/rows/<the next stage>/``; ``replay`` runs that next stage on the saved rows, with any configuration and any
version of the code, says what it did to each video, and what became different since the last replay. Nothing of it is
committed or published.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import shards, storage
from pipelines.output import ConfigError
from pipelines.preprocess import (
    ROW_SCHEMA,
    PreprocessConfig,
    configure_ray_data,
    prepare,
    stage_adders,
)
from pipelines.progress import Progress
from pipelines.schema import Track, Video, VideoRow, batched, from_row, to_row

if TYPE_CHECKING:
    from ray.data import Dataset

# ---------------------------------------------------------------------------------------------- rows on disk


def rows_uri(output: str, stage: str, *, replayed: bool = False) -> str:
    """Folder of the rows that enter a stage, or of what its last replay made of them."""
    return storage.join(output, shards.WORK, "rows", f"{stage}-replayed" if replayed else stage)


def save_row(row: VideoRow, folder: str) -> None:
    """Write one row as ``FOLDER/<key>.parquet``."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row)], schema=ROW_SCHEMA), buffer, compression="zstd")
    storage.write_atomic(storage.join(folder, f"{row['key']}.parquet"), buffer.getvalue())


def load_row(folder: str, key: str) -> VideoRow:
    """Inverse of :func:`save_row`. Raises ``FileNotFoundError``."""
    data = storage.read_bytes(storage.join(folder, f"{key}.parquet"))
    (row,) = pq.read_table(io.BytesIO(data)).to_pylist()
    return VideoRow(key=row["key"], record=row["record"], names=row["names"], blobs=row["blobs"])


# ---------------------------------------------------------------------------------------------- what changed


def changes(before: VideoRow, after: VideoRow) -> list[str]:
    """What is different between two rows of one video, a line each; wall-clock seconds do not count."""
    old, old_members = from_row(before)
    new, new_members = from_row(after)
    lines = _outcome("video", old, new)
    if old.live != new.live or old.live:
        was, now = ({track.name: track for track in video.tracks} for video in (old, new))
        for name in sorted(was | now):
            lines += _track_changes(name, was.get(name), now.get(name))
    told = [
        name
        for name in ("blob", "sha256", "size", "source", "probe", "shift", "versions", "spans")
        if getattr(old, name) != getattr(new, name)
    ]
    if told:
        lines.append(f"{', '.join(told)} changed")
    was_bytes, is_bytes = dict(old_members), dict(new_members)
    added, removed = len(is_bytes.keys() - was_bytes), len(was_bytes.keys() - is_bytes)
    differ = sum(was_bytes[name] != is_bytes[name] for name in was_bytes.keys() & is_bytes)
    if added or removed or differ:
        lines.append(f"members: {added} added, {removed} removed, {differ} with other content")
    return lines


def _outcome(what: str, old: Video | Track, new: Video | Track) -> list[str]:
    if (old.state, old.cause, old.detail) == (new.state, new.cause, new.detail):
        return []
    told = f" ({new.cause}: {new.detail})" if new.cause else ""
    return [f"{what}: {old.state} → {new.state}{told}"]


def _track_changes(name: str, old: Track | None, new: Track | None) -> list[str]:
    what = f"track {name}"
    if new is None:
        return [f"{what}: gone"]
    if old is None:
        cause = f", {new.cause}: {new.detail}" if new.cause else ""
        return [f"{what}: new, {new.state}, {len(new.times)} frames{cause}"]
    lines = _outcome(what, old, new)
    if len(old.times) != len(new.times):
        lines.append(f"{what}: {len(old.times)} → {len(new.times)} frames")
    elif (old.indices, old.boxes) != (new.indices, new.boxes):
        lines.append(f"{what}: other frames or boxes")
    for cause in sorted(old.dropped.keys() | new.dropped):
        was, now = old.dropped.get(cause, 0), new.dropped.get(cause, 0)
        if was != now:
            lines.append(f"{what}: {was} → {now} dropped, {cause}")
    moved = [
        f"{score} {old.scores.get(score, 'none')} → {new.scores.get(score, 'none')}"
        for score in sorted(old.scores.keys() | new.scores)
        if old.scores.get(score) != new.scores.get(score)
    ]
    if moved:
        lines.append(f"{what}: {', '.join(moved)}")
    if (old.embedding, old.hashes) != (new.embedding, new.hashes):
        lines.append(f"{what}: other embedding or hashes")
    return lines


# ---------------------------------------------------------------------------------------------- on Ray


def stage_after(config: PreprocessConfig) -> str:
    """The stage that ``--stop-after`` saves rows for."""
    names = list(stage_adders(config))
    return names[names.index(config.stop_after) + 1]


def stop_after(config: PreprocessConfig, videos: Iterable[Video], progress: Progress) -> str:
    """Run all videos of the list up to ``config.stop_after`` and save what comes out; returns the folder.

    Ray must be connected, :func:`pipelines.preprocess.check` passed, the output locked. Rows of an earlier run are
    replaced; commits are neither read nor written.

    Raises:
        pipelines.output.NothingUsableError: the canary failed.
    """
    import ray.data

    prepare(config)
    stage = stage_after(config)
    folder = rows_uri(config.output, stage)
    takedowns = shards.read_takedowns(config.output)
    listed = 0
    storage.remove(folder)
    storage.remove(rows_uri(config.output, stage, replayed=True))
    for window in batched(videos, config.window):
        listed += len(window)
        progress.listed(listed)
        rows = [to_row(shards.honour(video, takedowns)) for video in window]
        dataset: Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        for name, add in stage_adders(config).items():
            if name != stage:
                dataset = add(dataset)
            else:
                break
        saved = dataset.map(
            _save,  # type: ignore[arg-type]
            fn_kwargs={"folder": folder},
            num_cpus=0.25,
        )
        for row in saved.iter_rows():
            progress.video(row)
    return folder


def _save(row: VideoRow, folder: str) -> dict[str, Any]:
    save_row(row, folder)
    video, _ = from_row(row)
    return {
        "key": video.key,
        "state": video.state,
        "cause": video.cause,
        "frames": video.frames,
        "seconds": json.dumps(video.seconds),
        "stage_frames": json.dumps(video.stage_frames),
    }


def saved_keys(config: PreprocessConfig) -> list[str]:
    """Keys of the videos whose rows were saved for the stage to replay. Raises :class:`ConfigError` for none."""
    folder = rows_uri(config.output, config.replay)
    names = [name.removesuffix(".parquet") for name in storage.names_below(folder)]
    if not names:
        stages = list(stage_adders(config))
        raise ConfigError(
            f"--replay {config.replay}: no rows below {folder}; run with --stop-after "
            f"{stages[stages.index(config.replay) - 1]} first"
        )
    return names


def replay(config: PreprocessConfig, keys: list[str]) -> Iterator[dict[str, Any]]:
    """Run the stage ``config.replay`` alone on the rows that were saved for it. Ray must be connected, the output locked.

    Args:
        config: of the run.
        keys: of :func:`saved_keys`.

    Yields:
        of each video ``key``, ``seconds`` of the stage, ``changes`` it made, and ``since``: what differs from the last
        replay (None when there was none), both as lists of lines.
    """
    import ray.data

    configure_ray_data(config)
    stage = config.replay
    folder = rows_uri(config.output, stage)
    last = rows_uri(config.output, stage, replayed=True)
    for window in batched(keys, config.window):
        rows = [{"key": key} for key in window]
        dataset: Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset = dataset.map(
            _load,  # type: ignore[arg-type]
            fn_kwargs={"folder": folder},
            num_cpus=0.25,
        )
        dataset = stage_adders(config)[stage](dataset)
        told = {"stage": stage, "folder": folder, "last": last}
        compared = dataset.map(
            _compare,  # type: ignore[arg-type]
            fn_kwargs=told,
            num_cpus=0.25,
        )
        for row in compared.iter_rows():
            yield json.loads(row["answer"])


def _load(row: Mapping[str, Any], folder: str) -> VideoRow:
    return load_row(folder, row["key"])


def _compare(row: VideoRow, stage: str, folder: str, last: str) -> dict[str, Any]:
    try:
        since = changes(load_row(last, row["key"]), row)
    except FileNotFoundError:
        since = None
    answer = {
        "key": row["key"],
        "seconds": from_row(row)[0].seconds.get(stage, 0.0),
        "changes": changes(load_row(folder, row["key"]), row),
        "since": since,
    }
    save_row(row, last)
    return {"answer": json.dumps(answer)}
