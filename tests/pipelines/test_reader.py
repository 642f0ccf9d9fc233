"""Any member by a range read: the right bytes, no others, and one clear line for a dataset that is not whole."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines import reader as reader_module
from pipelines import shards, storage
from pipelines.reader import JSON, LANDMARKS, MATRIX, Piece, Reader
from pipelines.shards import DatasetError
from tests.datasets import made_video, make_dataset, some_videos


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Several shards in three splits."""
    output = str(tmp_path_factory.mktemp("dataset"))
    made = [*some_videos(), *(made_video(f"id{n}", "w0", frames=n - 5) for n in range(8, 12))]
    make_dataset(output, made, target_mb=0.03)
    return output


def archive(dataset: str) -> dict[str, bytes]:
    """All members of all shards, read with the standard library."""
    content = {}
    for shard in sorted(Path(dataset, "shards").glob("*.tar")):
        with tarfile.open(shard) as file:
            for info in file:
                member = file.extractfile(info)
                assert member is not None
                content[info.name] = member.read()
    return content


def test_every_member_is_read_as_tar_reads_it(dataset: str) -> None:
    members = archive(dataset)
    read: dict[str, bytes] = {}
    tracks = 0
    for split in ("train", "val", "test"):
        reader = Reader(dataset, split)
        tracks += len(reader.keys)
        for track, key in enumerate(reader.keys):
            names = ("json", "landmarks.npy", "matrix.npy")
            contents = reader.read([Piece(track, JSON, MATRIX)])[0]
            read |= {f"{key}.{name}": data for name, data in zip(names, contents, strict=True)}
            for frame in range(int(reader.frames[track])):
                name = reader.frame_key(track, frame)
                pieces = [reader.picture(track, frame), reader.labels(track, frame)]
                (read[f"{name}.jpg"],), (read[f"{name}.png"],) = reader.read(pieces)
    assert tracks == shards.read_index(dataset).num_rows > 8
    assert len(Reader(dataset, "train")._shards) > 2
    left = {name for name in members if not name.endswith(("scores.npy", "embedding.npy"))}
    assert {name: members[name] for name in left} == read


def test_identities_hold_videos_hold_tracks_hold_frames(dataset: str) -> None:
    rows = [row for row in shards.read_index(dataset).to_pylist() if row["split"] == "train"]
    reader = Reader(dataset, "train")
    assert reader.keys == sorted(row["key"] for row in rows)
    seen = []
    for person, identity in enumerate(reader.identities):
        for video in range(*reader.videos_of[person : person + 2]):
            frames = [reader.locate(video, frame) for frame in range(reader.frames_of(video))]
            assert len(set(frames)) == len(frames)
            seen += [(identity, reader.frame_key(*frame)) for frame in frames]
    wanted = [
        (row["identity"], f"{row['key']}.{name.removesuffix('.jpg')}")
        for row in rows
        for name in row["members"]
        if name.endswith(".jpg")
    ]
    assert sorted(seen) == sorted(wanted)
    assert reader.num_videos == len({(row["identity"], row["video"]) for row in rows})


class CountedFileSystem(MemoryFileSystem):
    """fsspec's memory, with every read written down."""

    protocol = "counted"
    reads: list[tuple[str, int | None, int | None]] = []  # noqa: RUF012

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        self.reads.append((path, start, end))
        content: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        return content


def copy(dataset: str, target: str) -> None:
    """All files of a dataset to another URI."""
    for name in storage.names_below(dataset):
        storage.write_atomic(
            storage.join(target, name), storage.read_bytes(storage.join(dataset, name))
        )


def test_only_the_wanted_bytes_are_read_from_an_object_store(dataset: str) -> None:
    import fsspec

    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    copy(dataset, "counted://set")
    here, there = Reader(dataset, "train"), Reader("counted://set", "train")
    pieces = [here.picture(1, 2), Piece(0, LANDMARKS, MATRIX), here.picture(4, 0)]
    CountedFileSystem.reads.clear()
    assert there.read(pieces) == here.read(pieces)
    spans = [here.where(piece) for piece in pieces]
    assert [(start, end) for _, start, end in CountedFileSystem.reads] == [
        (offsets[0], offsets[-1] + sizes[-1]) for _, offsets, sizes in spans
    ]


def test_only_the_wanted_bytes_are_read_from_a_disk(
    dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(dataset, "train")
    real, reads = os.pread, []

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    contents = reader.read([reader.picture(0, 1), reader.picture(3, 2)])
    assert reads == [len(content[0]) for content in contents]


def test_few_shards_stay_open(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_FILES", 2)
    reader = Reader(dataset, "train")
    pieces = [reader.picture(track, 0) for track in range(len(reader.keys))]
    once = reader.read(pieces)
    assert reader.read(pieces[::-1])[::-1] == once
    assert len(reader._open) == 2 < len({reader.where(piece)[0] for piece in pieces})
    reader.close()
    assert reader.read(pieces) == once


# --- what is wrong is said in one line --------------------------------------------------------------------------


def fails(dataset: str, *words: str, **flags: Any) -> None:
    """Opening the split train ends with one line that has these words."""
    with pytest.raises(DatasetError) as caught:
        Reader(dataset, "train", **flags)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.fixture
def damaged(dataset: str, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    copy(dataset, str(tmp_path / "copy"))
    return tmp_path / "copy"


def a_shard(damaged: Path) -> Path:
    return sorted(damaged.glob("shards/train-*.tar"))[1]


def test_no_dataset(tmp_path: Path) -> None:
    fails(str(tmp_path), "dataset.json: not found", "jobs/preprocess.py")


def test_labels_of_some_tracks_only_are_no_labels(tmp_path: Path) -> None:
    bare, members = made_video("id03", "v0")
    fewer = [member for member in members if not member[0].endswith(".png")]
    make_dataset(str(tmp_path), [made_video("id02", "v0"), (bare, fewer)])
    reader = Reader(str(tmp_path), "train")
    assert not reader.has_labels
    for track, key in enumerate(reader.keys):
        (picture,) = reader.read([reader.picture(track, 2)])[0]
        assert picture == archive(str(tmp_path))[f"{reader.frame_key(track, 2)}.jpg"], key


def test_no_such_split(dataset: str) -> None:
    with pytest.raises(DatasetError, match="no split 'dev'; it has test, train, val"):
        Reader(dataset, "dev")


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_shard_that_is_missing(damaged: Path, scheme: str) -> None:
    name = a_shard(damaged).name
    a_shard(damaged).unlink()
    target = f"{scheme}{damaged}"
    if scheme:
        copy(str(damaged), target)
    fails(target, name, "missing")


@pytest.mark.parametrize("scheme", ["", "memory://"])
@pytest.mark.parametrize("more", [-512, 512])
def test_a_shard_of_another_size(damaged: Path, scheme: str, more: int) -> None:
    shard = a_shard(damaged)
    size = shard.stat().st_size
    os.truncate(shard, size + more)
    target = f"{scheme}{damaged}"
    if scheme:
        copy(str(damaged), target)
    fails(target, shard.name, f"{size + more} bytes", f"says {size}")


def test_a_shard_of_another_content_is_found_when_hashes_are_asked_for(damaged: Path) -> None:
    shard = a_shard(damaged)
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    Reader(str(damaged), "train")
    fails(str(damaged), shard.name, "sha256", check_hashes=True)
    Reader(str(damaged), "val", check_hashes=True)


def test_an_index_of_another_content(damaged: Path) -> None:
    index = damaged / shards.INDEX
    index.write_bytes(index.read_bytes() + b"x")
    fails(str(damaged), "index.parquet: sha256 differs")


def rewrite_index(damaged: Path, members: Sequence[str]) -> None:
    """Give the first sample other members, and the manifest the new index."""
    table = shards.read_index(str(damaged))
    rows = table.to_pylist()
    row = next(row for row in rows if row["split"] == "train")
    row["members"] = list(members)
    row["offsets"] = row["sizes"] = [1] * len(members)
    entry = shards.write_index_tables(
        [type(table).from_pylist(rows, schema=shards.INDEX_SCHEMA)], str(damaged)
    )
    manifest = json.loads((damaged / shards.MANIFEST).read_text())
    (damaged / shards.MANIFEST).write_text(json.dumps(manifest | {"index": entry}))


@pytest.mark.parametrize(
    "members",
    [
        ["json"],
        ["json", "matrix.npy", "landmarks.npy", "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"],
        [],
    ],
)
def test_members_in_an_unknown_order(damaged: Path, members: list[str]) -> None:
    rewrite_index(damaged, members)
    fails(str(damaged), "in an order this program does not know")


def test_a_shard_that_disappears_while_it_is_read(damaged: Path) -> None:
    reader = Reader(str(damaged), "train")
    for shard in damaged.glob("shards/train-*.tar"):
        shard.unlink()
    with pytest.raises(DatasetError, match=r"\.tar: missing"):
        reader.read([reader.picture(0, 0)])


def test_of_too_many_open_shards_the_one_not_used_for_longest_is_closed(
    dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "OPEN_FILES", 2)
    reader = Reader(dataset, "train")
    of = {reader.where(reader.picture(track, 0))[0]: track for track in range(len(reader.keys))}
    first, second, third = list(of)[:3]
    for shard in (first, second, first, third):
        reader.read([reader.picture(of[shard], 0)])
    assert set(reader._open) == {first, third}


def test_half_a_picture_is_not_given_out(damaged: Path) -> None:
    reader = Reader(str(damaged), "train")
    piece = reader.picture(0, 0)
    shard, (offset,), (size,) = reader.where(piece)
    os.truncate(shard, offset + size // 2)
    with pytest.raises(DatasetError, match=f"{size // 2} bytes at {offset}, {size} expected"):
        reader.read([piece])


def test_a_shard_that_is_cut_while_it_is_read(damaged: Path) -> None:
    reader = Reader(str(damaged), "train")
    for shard in damaged.glob("shards/train-*.tar"):
        os.truncate(shard, 600)
    track = int(np.argmax(reader.frames))
    with pytest.raises(DatasetError, match=r"0 bytes at [0-9]+, [0-9]+ expected"):
        reader.read([reader.picture(track, 2)])
