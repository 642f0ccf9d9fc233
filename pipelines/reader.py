"""Random access to a published dataset: any member of any sample by a range read, without touching its neighbours.

``index.parquet`` knows where every member begins and how long it is (docs/formats.md), so two frames of a track of 200
cost the bytes of two pictures, on a disk as in an object store. Pixels are not decoded here, and Ray is not needed.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import shards, storage
from pipelines.shards import MANIFEST, DatasetError

COLUMNS = ["key", "identity", "video", "split", "shard", "frames", "members", "offsets", "sizes"]
JSON, LANDMARKS, MATRIX = 0, 1, 2
"""Places of a sample's first members, which every sample has."""
PUPILS = 5
"""Place of a member that only some datasets have."""
OPEN_FILES = 128
"""Shards kept open by one process; more would meet the usual limit of 1,024 with a few loaders."""


@dataclass(frozen=True)
class Piece:
    """A run of adjacent members of one track."""

    track: int
    first: int
    """Place of the first member in the sample."""
    last: int
    """Place of the last one, included."""


Span = tuple[str, list[int], list[int]]
"""URI of a shard, and the offset and size in it of each of some adjacent members."""


class Reader:
    """One split of a dataset, opened for reading. Small enough to be inherited by many loader processes.

    Tracks are numbered by key, so the numbers depend on the dataset alone. Videos are numbered within their identities,
    tracks within their videos: ``videos_of``, ``tracks_of`` and ``frames_before`` are offsets into the next level.
    """

    def __init__(self, dataset: str, split: str, *, check_hashes: bool = False) -> None:
        """Read manifest and index, and compare the size of every shard of the split.

        Args:
            dataset: folder or fsspec URI.
            split: train, val or test.
            check_hashes: read all shards of the split and compare their sha256 too.

        Raises:
            DatasetError: not a dataset, no such split, or a shard that is missing or not as the manifest says.
        """
        self.dataset = dataset
        self.manifest = shards.read_manifest(dataset)
        listed = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        if not listed:
            there = ", ".join(sorted({shard["split"] for shard in self.manifest["shards"]}))
            raise DatasetError(f"{dataset}: no split {split!r}; it has {there or 'no shards'}")
        check_sizes(dataset, listed)
        if check_hashes:
            for shard in listed:
                for problem in shards.verify_shard(dataset, shard, None):
                    raise DatasetError(f"{dataset}: {problem}")
        self.window: int = self.manifest["members"]["size"]
        """Side of the pictures, px."""
        self._shards: list[str] = [
            storage.join(dataset, "shards", shard["name"]) for shard in listed
        ]
        self._read_index([shard["name"] for shard in listed], split)
        self._local = storage.is_local(dataset)
        self._open: OrderedDict[str, int] = OrderedDict()

    def _read_index(self, names: Sequence[str], split: str) -> None:
        index = shards.read_index(self.dataset, COLUMNS).combine_chunks()
        order = pc.sort_indices(index, [(name, "ascending") for name in ("identity", "video", "key")])  # fmt: skip
        order = order.filter(pc.equal(pc.take(index["split"], order), split))
        if not len(order):
            raise DatasetError(f"{self.dataset}: {shards.INDEX} has no sample of split {split!r}")
        # the lists of members are many times larger than the rest: they stay in the file's order
        rows = index.select(["key", "identity", "video", "shard", "frames"]).take(order)
        shard = pc.index_in(rows["shard"], pa.array(names, pa.string()))
        if shard.null_count:
            raise DatasetError(
                f"{self.dataset}: {shards.INDEX} names shards that {MANIFEST} does not"
            )
        self.keys: list[str] = rows["key"].to_pylist()
        self.frames: NDArray[np.int64] = rows["frames"].to_numpy().astype(np.int64)
        """Of each track."""
        self._shard: NDArray[np.int32] = shard.to_numpy()
        members, offsets, sizes = (index[name].chunk(0) for name in ("members", "offsets", "sizes"))
        bounds, place = members.offsets.to_numpy().astype(np.int64), order.to_numpy()
        self._first, self._end = bounds[place], bounds[place + 1]
        self._names = members.values
        self._offsets: NDArray[np.int64] = offsets.values.to_numpy()
        self._sizes: NDArray[np.int64] = sizes.values.to_numpy()
        self._find_pictures()
        identity = _starts(rows["identity"])
        video = np.union1d(identity, _starts(rows["video"]))
        self.identities: list[str] = rows["identity"].take(pa.array(identity)).to_pylist()
        # plain lists: one number of a list takes a tenth of the time that one of an array takes
        self.tracks_of: list[int] = np.append(video, len(rows)).tolist()
        """(videos + 1): tracks of video v are ``tracks_of[v]`` to ``tracks_of[v + 1]``."""
        self.videos_of: list[int] = np.searchsorted(video, np.append(identity, len(rows))).tolist()
        """(identities + 1): videos of identity i are ``videos_of[i]`` to ``videos_of[i + 1]``."""
        self.frames_before: list[int] = np.append(0, np.cumsum(self.frames)).tolist()
        """(tracks + 1): frames of all tracks before this one."""

    def _find_pictures(self) -> None:
        """Where each sample's first picture is, whether labels follow the pictures, whether pupils are known; checked on names."""
        last = pc.take(self._names, pa.array(self._end - 1))
        labelled = pc.ends_with(last, ".png").to_numpy(zero_copy_only=False)
        self.has_labels = bool(labelled.all())
        self._stride = np.where(labelled, 2, 1)
        self._picture = self._end - self._first - self._stride * self.frames
        sixth = pc.take(self._names, pa.array(np.minimum(self._first + PUPILS, self._end - 1)))
        self.has_pupils = bool(pc.all(pc.ends_with(sixth, "pupils.npy")).as_py())
        for place, ending in [(LANDMARKS, "landmarks.npy"), (MATRIX, "matrix.npy"), (self._picture, ".jpg")]:  # fmt: skip
            names = pc.take(self._names, pa.array(np.minimum(self._first + place, self._end - 1)))
            if (self._picture <= MATRIX).any() or not pc.all(pc.ends_with(names, ending)).as_py():
                raise DatasetError(
                    f"{self.dataset}: {shards.INDEX} lists members in an order this program does not know"
                )

    @property
    def num_videos(self) -> int:
        """Of all identities."""
        return len(self.tracks_of) - 1

    def frames_of(self, video: int) -> int:
        """Frames of all tracks of a video."""
        first, end = self.tracks_of[video : video + 2]
        return self.frames_before[end] - self.frames_before[first]

    def locate(self, video: int, frame: int) -> tuple[int, int]:
        """Number of the track and of the frame in it, of a video's frame counted over its tracks."""
        absolute = self.frames_before[self.tracks_of[video]] + frame
        track = bisect_right(self.frames_before, absolute) - 1
        return track, absolute - self.frames_before[track]

    def picture(self, track: int, frame: int) -> Piece:
        """The JPEG of a frame."""
        place = int(self._picture[track] + self._stride[track] * frame)
        return Piece(track, place, place)

    def labels(self, track: int, frame: int) -> Piece:
        """The PNG of a frame; only where :attr:`has_labels`."""
        place = int(self._picture[track] + self._stride[track] * frame) + 1
        return Piece(track, place, place)

    def frame_key(self, track: int, frame: int) -> str:
        """``KEY.NNNNNN``: what the frame's members are called, without extension."""
        name = self._names[int(self._first[track]) + self.picture(track, frame).first].as_py()
        return f"{self.keys[track]}.{name.removesuffix('.jpg')}"

    def where(self, piece: Piece) -> Span:
        """The shard of a piece, and offset and size in it of each of its members."""
        first = int(self._first[piece.track])
        places = slice(first + piece.first, first + piece.last + 1)
        shard = self._shards[self._shard[piece.track]]
        return shard, self._offsets[places].tolist(), self._sizes[places].tolist()

    def read(self, pieces: Sequence[Piece]) -> list[list[bytes]]:
        """Contents of the members of each piece; one range read a piece, all at the same time from an object store.

        Raises:
            DatasetError: a shard is gone or shorter than it was.
        """
        spans = [self.where(piece) for piece in pieces]
        blocks = self._read_local(spans) if self._local else self._read_remote(spans)
        contents = []
        for (shard, offsets, sizes), block in zip(spans, blocks, strict=True):
            start = offsets[0]
            wanted = offsets[-1] + sizes[-1] - start
            if len(block) != wanted:
                raise DatasetError(f"{shard}: {len(block)} bytes at {start}, {wanted} expected")
            if len(sizes) == 1:
                contents.append([block])
                continue
            contents.append(
                [
                    block[offset - start : offset - start + size]
                    for offset, size in zip(offsets, sizes, strict=True)
                ]
            )
        return contents

    def _read_local(self, spans: Sequence[Span]) -> list[bytes]:
        return [
            os.pread(self._descriptor(shard), offsets[-1] + sizes[-1] - offsets[0], offsets[0])
            for shard, offsets, sizes in spans
        ]

    def _descriptor(self, shard: str) -> int:
        """Of an open shard; the one that was not used for longest is closed when there are too many."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(storage.filesystem(shard)[1], os.O_RDONLY)
        except FileNotFoundError:
            raise DatasetError(f"{shard}: missing") from None
        return self._open[shard]

    def _read_remote(self, spans: Sequence[Span]) -> list[bytes]:
        # asked for in each process: a connection does not survive a fork
        fs, _ = storage.filesystem(self.dataset)
        paths = [storage.filesystem(shard)[1] for shard, _, _ in spans]
        starts = [offsets[0] for _, offsets, _ in spans]
        ends = [offsets[-1] + sizes[-1] for _, offsets, sizes in spans]
        try:
            blocks: list[bytes] = fs.cat_ranges(paths, starts, ends, on_error="raise")
        except FileNotFoundError as error:
            raise DatasetError(f"{self.dataset}: a shard is missing ({error})") from None
        return blocks

    def close(self) -> None:
        """Close the shards. Reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if "_open" in self.__dict__:  # not when opening failed
            self.close()


def _starts(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Where a new value begins in a sorted column."""
    runs = pc.run_end_encode(column.combine_chunks())
    return np.append(0, runs.run_ends.to_numpy()[:-1]).astype(np.int64)


def check_sizes(dataset: str, listed: Sequence[dict[str, Any]]) -> None:
    """Compare the size of every shard with the manifest. Raises :class:`DatasetError` for the first that differs."""
    root = storage.join(dataset, "shards")
    fs, path = storage.filesystem(root)
    if storage.is_local(dataset):
        found = {entry.name: entry.stat().st_size for entry in os.scandir(path)} if Path(path).is_dir() else {}  # fmt: skip
    else:  # one listing, not one question a shard
        fs.invalidate_cache()
        entries = fs.find(path, detail=True)
        found = {name.rsplit("/", 1)[-1]: int(entry["size"]) for name, entry in entries.items()}
    for shard in listed:
        name = shard["name"]
        if name not in found:
            raise DatasetError(
                f"{storage.join(root, name)}: missing; jobs/dataset.py verify looks for all damage"
            )
        if found[name] != shard["bytes"]:
            raise DatasetError(
                f"{storage.join(root, name)}: {found[name]} bytes, {MANIFEST} says {shard['bytes']}; jobs/dataset.py verify"
                " looks for all damage"
            )
