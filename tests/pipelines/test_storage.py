"""Files by URI: whole or not at all, on a disk, in fsspec's memory, and in S3 (moto's server)."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import report, shards, storage, upkeep
from tests.datasets import make_dataset, some_videos


@pytest.fixture(params=["disk", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of each kind that does not exist yet."""
    if request.param == "disk":
        return str(tmp_path / "out")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"


def test_what_is_written_is_read(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    assert storage.names_below(root) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    with pytest.raises(FileNotFoundError):
        storage.size(uri)
    content = bytes(range(256)) * 4
    storage.write_atomic(uri, b"old")
    storage.write_atomic(uri, content)
    source = tmp_path / "source.bin"
    source.write_bytes(content[::-1])
    storage.put_file(source, storage.join(root, "c.bin"))
    assert storage.names_below(root) == ["a/b.bin", "c.bin"]
    assert storage.size(uri) == len(content)
    assert storage.read_bytes(uri) == content
    assert storage.read_bytes(uri, 10, 20) == content[10:20]
    with storage.local_file(storage.join(root, "c.bin")) as local:
        assert local.read_bytes() == content[::-1]
    assert source.exists()
    storage.remove(storage.join(root, "a"))
    storage.remove(storage.join(root, "a"))
    assert storage.names_below(root) == ["c.bin"]


def test_create_has_one_winner(root: str) -> None:
    uri = storage.join(root, "lock.json")
    start = threading.Barrier(6)

    def race(number: int) -> bool:
        start.wait()
        return storage.create(uri, b"%d" % number)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(race, range(6)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)
    storage.remove(uri)
    assert storage.create(uri, b"again")


def test_replace_spares_what_somebody_else_wrote(root: str) -> None:
    uri = storage.join(root, "dataset.json")
    absent = storage.version(uri)
    assert absent == ""
    assert storage.replace(uri, b"first", absent)
    first = storage.version(uri)
    assert not storage.replace(uri, b"late", absent)
    assert storage.replace(uri, b"second", first)
    assert not storage.replace(uri, b"late", first)
    assert storage.read_bytes(uri) == b"second"
    second = storage.version(uri)
    storage.remove(uri)
    assert not storage.replace(uri, b"late", second)
    assert not storage.exists(uri)


@pytest.mark.slow
def test_replace_has_one_winner_in_s3(bucket: str) -> None:
    """The store compares and writes in one step."""
    uri = storage.join(bucket, uuid.uuid4().hex)
    storage.write_atomic(uri, b"before")
    before = storage.version(uri)
    start = threading.Barrier(6)

    def race(number: int) -> bool:
        start.wait()
        return storage.replace(uri, b"%d" % number, before)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(race, range(6)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)


def test_a_run_that_was_taken_for_dead_does_not_publish(root: str) -> None:
    """Two runs believe that the output is theirs; the slower one's manifest would name shards that are gone."""
    make_dataset(root, some_videos())
    manifest, before = shards.read_manifest(root), shards.manifest_version(root)
    shards.write_manifest(manifest | {"dataset_version": 2}, root, before)
    with pytest.raises(shards.DatasetError, match="another run has published"):
        shards.write_manifest(manifest | {"dataset_version": 3}, root, before)
    assert shards.read_manifest(root)["dataset_version"] == 2


@pytest.mark.slow
def test_a_dataset_in_s3_is_read_verified_repaired_and_thinned(bucket: str) -> None:
    output = storage.join(bucket, uuid.uuid4().hex)
    make_dataset(output, some_videos())
    assert shards.verify(output) == []
    sample = shards.read_index(output).to_pylist()[-1]
    assert len(report.read_thumbs(output, sample)) == 5
    storage.remove(storage.join(output, "shards", sample["shard"]))
    assert len(shards.verify(output)) == 1
    assert upkeep.repair(output).left == []
    assert upkeep.take_down(output, ["id02"], [], "request 17").samples == 3
    assert shards.verify(output) == []
    assert storage.exists(storage.join(output, report.PAGE))


@pytest.mark.parametrize(
    "put", [storage.put_file, lambda source, uri: storage.write_atomic(uri, source.read_bytes())]
)
def test_a_failed_write_leaves_nothing(tmp_path: Path, put: Callable[[Path, str], None]) -> None:
    target = tmp_path / "target"
    (target / "inside").mkdir(parents=True)  # a file cannot take a folder's place: the rename fails
    source = tmp_path / "source"
    source.write_bytes(b"new")
    with pytest.raises(OSError, match="directory"):
        put(source, str(target))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inside", "source", "target"]


def test_an_interrupted_write_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def stop_half_way() -> None:
        with storage.local_aside(target) as aside:
            aside.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "put", [storage.put_file, lambda source, uri: storage.write_atomic(uri, source.read_bytes())]
)
def test_a_file_gets_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path, str], None]
) -> None:
    """After a loss of power a name must not lead to a hole: what is synced is the whole content, and nobody sees it before."""
    source, target = tmp_path / "source", tmp_path / "out" / "target"
    source.write_bytes(bytes(range(256)) * 50)
    synced = []

    def sync(descriptor: int) -> None:
        synced.append((os.pread(descriptor, 10**6, 0), target.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    put(source, str(target))
    assert synced == [(source.read_bytes(), False)]
    assert target.read_bytes() == source.read_bytes()


def test_a_copy_that_breaks_off_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")

    def copy_half(_: Path, to: Path) -> None:
        to.write_bytes(b"half of the n")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(shutil, "copyfile", copy_half)
    with pytest.raises(storage.PlaceError, match="no space left"):
        storage.put_file(tmp_path / "any", str(target))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_names_come_sorted_whatever_order_the_disk_has(tmp_path: Path) -> None:
    names = [
        f"{folder}/{number}.{end}"
        for folder in "ba"
        for number in range(40)
        for end in ("json", "failed.json")
    ]
    for name in names[::-1]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(storage.names_by_folder(str(tmp_path))) == sorted(names)
    assert storage.names_below(str(tmp_path)) == sorted(names)


def test_readers_see_old_or_new_but_no_mixture(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    versions = [bytes([value]) * 300_000 for value in range(40)]
    storage.write_atomic(uri, versions[0])
    done = threading.Event()
    seen: list[bytes] = []

    def read() -> None:
        while not done.is_set():
            seen.append(storage.read_bytes(uri))

    reader = threading.Thread(target=read)
    reader.start()
    for content in versions:
        storage.write_atomic(uri, content)
    done.set()
    reader.join()
    assert seen
    assert all(content in versions for content in seen)
    assert storage.names_below(str(tmp_path)) == ["file"]


def test_remove_temporary_takes_only_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    left = tmp_path / "deep" / f"{storage.TEMPORARY}0123"
    left.write_bytes(b"half")
    kept = tmp_path / "deep" / "kept.tmp"
    kept.write_bytes(b"whole")
    assert storage.remove_temporary(str(tmp_path)) == 1
    assert not left.exists()
    assert kept.exists()


def test_join_puts_one_slash() -> None:
    assert storage.join("s3://bucket/x/", "/y/", "z") == "s3://bucket/x/y/z"
    assert storage.join("/data", "y") == "/data/y"


def test_absolute_changes_local_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("data/../out") == str(tmp_path / "out")
    assert storage.absolute("memory://bucket/x") == "memory://bucket/x"
    with pytest.raises(ValueError, match="nonsense"):
        storage.filesystem("nonsense://x")


def test_a_place_is_tried_before_it_is_needed(tmp_path: Path) -> None:
    storage.require_place(str(tmp_path / "new" / "out.mp4"))
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]
    storage.require_place("memory://anywhere/out.mp4")
    (tmp_path / "file").write_text("a file, no folder")
    for place, told in [
        (tmp_path / "new", "new: a folder"),
        (tmp_path / "file" / "out.mp4", "out.mp4: cannot be written"),
        (tmp_path / "file" / "deep" / "out.mp4", "out.mp4: cannot be written"),
    ]:
        with pytest.raises(storage.PlaceError, match=told):
            storage.require_place(str(place))
