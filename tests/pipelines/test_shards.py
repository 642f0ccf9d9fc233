"""Commits, shards, index, ledger and manifest: equal bytes, plain webdataset, and every damage found."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import shards, snapshots, storage
from pipelines.schema import Cause, frame_member, npy_array, reject
from tests import datasets
from tests.datasets import Made, commit_all, made_video, make_dataset, plan

QUICK = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published dataset; tests that change it take a :func:`copy`."""
    output = str(tmp_path_factory.mktemp("dataset") / "out")
    make_dataset(output, datasets.some_videos())
    return output


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> str:
    return str(shutil.copytree(dataset, tmp_path / "out"))


def shard_paths(output: str) -> list[Path]:
    return sorted(Path(output, "shards").iterdir())


def hashes(output: str) -> dict[str, str]:
    """sha256 of everything in a folder, by name."""
    root = Path(output)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def packed(output: str, made: Iterable[Made], target_mb: float = 512.0) -> list[dict[str, Any]]:
    """Commit and pack; the records."""
    plans, _ = plan(commit_all(output, made), target_mb)
    return [shards.pack(item, output) for item in plans]


# --- round trip ---------------------------------------------------------------------------------------------------


def test_plain_webdataset_reads_what_was_committed(dataset: str) -> None:
    given_members = {
        name: content
        for video, members in datasets.some_videos()
        for name, content in members
        if video.state == "open"
    }
    found: dict[str, bytes] = {}
    urls = [str(path) for path in shard_paths(dataset)]
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        key = sample["__key__"]
        record = json.loads(sample["json"])
        assert record["key"] == key
        assert key not in found
        found[key] = b""
        landmarks = npy_array(sample["landmarks.npy"])
        assert landmarks.shape == (len(record["indices"]), 68, 2)
        for index in record["indices"]:
            assert sample[f"{index:06d}.jpg"] == given_members[frame_member(key, index)]
        for name in shards.ARRAYS[:-1]:
            assert sample[name] == given_members[f"{key}.{name}"]
    index = shards.read_index(dataset)
    assert sorted(found) == sorted(index["key"].to_pylist())
    assert len(found) == 10


def test_members_of_a_sample_are_adjacent_and_in_order(dataset: str) -> None:
    for path in shard_paths(dataset):
        with tarfile.open(path) as archive:
            names = archive.getnames()
        keys = [name.split(".", 1)[0] for name in names]
        runs = [key for place, key in enumerate(keys) if place == 0 or keys[place - 1] != key]
        assert runs == sorted(set(keys))
        for key in runs:
            suffixes = [name.split(".", 1)[1] for name in names if name.startswith(f"{key}.")]
            assert suffixes[:5] == ["json", *shards.ARRAYS[:4]]
            assert all(re.fullmatch(r"\d{6}\.jpg", suffix) for suffix in suffixes[5::2])
            labels = [suffix.replace(".jpg", ".png") for suffix in suffixes[5::2]]
            assert suffixes[6::2] == labels
            assert suffixes[5:] == sorted(suffixes[5:])


def test_offsets_of_the_index_lead_to_the_same_bytes(dataset: str) -> None:
    for row in shards.read_index(dataset).to_pylist():
        uri = storage.join(dataset, "shards", row["shard"])
        with tarfile.open(uri) as archive:
            for suffix, offset, size in zip(
                row["members"], row["offsets"], row["sizes"], strict=True
            ):
                member = archive.extractfile(f"{row['key']}.{suffix}")
                assert member is not None
                assert storage.read_bytes(uri, offset, offset + size) == member.read()


def test_the_index_says_when_a_sample_begins_and_ends(dataset: str) -> None:
    tracks = {
        video.track_key(track): track
        for video, _ in datasets.some_videos()
        for track in video.tracks
    }
    rows = shards.read_index(dataset).to_pylist()
    assert rows
    for row in rows:
        track = tracks[row["key"]]
        assert (row["start"], row["end"]) == (track.times[0], track.times[-1])
        assert row["frames"] == len(track.times)
        assert row["scores"] == sorted(track.scores.items())


def test_headers_say_nothing_of_when_and_who(dataset: str) -> None:
    with tarfile.open(shard_paths(dataset)[0]) as archive:
        assert {(info.mtime, info.uid, info.uname, info.mode) for info in archive} == {
            (0, 0, "", 0o644)
        }


def test_a_commit_survives_json(tmp_path: Path) -> None:
    video, members = made_video("id01", "v0")
    done = shards.commit(video, members, str(tmp_path), datasets.CROP)
    assert shards.Commit.from_bytes(done.to_bytes()) == done
    assert list(shards.load_commits(str(tmp_path), [video.key])) == [done]
    other = json.loads(done.to_bytes()) | {"schema_version": 999}
    with pytest.raises(ValueError, match="schema 999"):
        shards.Commit.from_bytes(json.dumps(other).encode())


# --- equal bytes --------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(dataset: str, tmp_path: Path) -> None:
    again = str(tmp_path / "again")
    make_dataset(again, datasets.some_videos())
    assert hashes(again) == hashes(dataset)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(order=st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter(
    dataset: str, tmp_path_factory: pytest.TempPathFactory, order: random.Random
) -> None:
    made = datasets.some_videos()
    order.shuffle(made)
    made = [(video, order.sample(members, len(members))) for video, members in made]
    output = str(tmp_path_factory.mktemp("order"))
    names = {record["name"] for record in packed(output, made)}
    assert names == {path.name for path in shard_paths(dataset)}  # names end in the content's hash
    shutil.rmtree(output)


def test_committing_and_packing_again_changes_nothing(tmp_path: Path) -> None:
    output = str(tmp_path)
    first = packed(output, datasets.some_videos())
    before = hashes(output)
    written = {path: path.stat().st_mtime_ns for path in shard_paths(output)}
    assert packed(output, datasets.some_videos()) == first
    assert hashes(output) == before
    assert written == {path: path.stat().st_mtime_ns for path in shard_paths(output)}


def test_a_lost_shard_is_packed_again(tmp_path: Path) -> None:
    output = str(tmp_path)
    packed(output, datasets.some_videos())
    before = hashes(output)
    shard_paths(output)[0].unlink()
    packed(output, datasets.some_videos())
    assert hashes(output) == before


def test_a_shard_that_was_cut_is_packed_again(tmp_path: Path) -> None:
    output = str(tmp_path)
    packed(output, datasets.some_videos())
    before = hashes(output)
    with shard_paths(output)[0].open("rb+") as file:
        file.truncate(5000)
    packed(output, datasets.some_videos())
    assert hashes(output) == before


def test_killed_between_its_files_a_commit_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its JSON a video is done, so that is written when all that it names is on disk."""
    output = str(tmp_path)
    video, members = made_video("id01", "v0")
    write, written = storage.write_atomic, []

    def write_one(uri: str, data: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        write(uri, data)
        written.append(uri)

    monkeypatch.setattr(storage, "write_atomic", write_one)
    with pytest.raises(KeyboardInterrupt):
        shards.commit(video, members, output, datasets.CROP)
    monkeypatch.undo()
    assert written
    assert list(shards.committed(output)) == []
    commit_all(output, [(video, members)])
    whole = str(tmp_path / "whole")
    commit_all(whole, [(video, members)])
    for extension in ("tar", "json"):
        name = shards.part_uri("", "id01-v0", extension)
        assert Path(output + name).read_bytes() == Path(whole + name).read_bytes()


def test_slices_and_snapshots_of_a_part_are_where_tar_has_them(tmp_path: Path) -> None:
    video, members = made_video("id01", "v0", tracks=4, frames=2)
    (done,) = commit_all(str(tmp_path), [(video, members)])
    part = Path(shards.part_uri(str(tmp_path), "id01-v0", "tar"))
    with tarfile.open(part) as archive:
        found = {member.name: member for member in archive}
    assert len(done.slices) == 4
    starts = [found[f"{key}.json"].offset for key in done.slices]
    assert [offset for offset, _ in done.slices.values()] == starts
    ends = [offset + length for offset, length in done.slices.values()]
    assert ends[:-1] == starts[1:]
    assert done.snapshots
    for name, place in done.snapshots.items():
        assert place == (found[name].offset_data, found[name].size)


# --- plan ---------------------------------------------------------------------------------------------------------

samples = st.lists(
    st.tuples(
        st.sampled_from(["train", "val", "test"]),
        st.integers(0, 30),
        st.integers(0, 5),
        st.integers(1, 4).map(lambda blocks: blocks * 2**19),
    ),
    unique_by=lambda sample: sample[1:3],
    max_size=60,
)


def kept_of(drawn: Iterable[tuple[str, int, int, int]]) -> list[tuple[str, str, shards.Slice]]:
    kept = []
    for split, person, number, length in drawn:
        identity = f"id{person:02d}"
        item = shards.Slice(
            key=f"{identity}-v{number}-000",
            part=f"{identity}-v{number}",
            sha256="00",
            offset=0,
            length=length,
        )
        kept.append((split, identity, item))
    return kept


@QUICK
@given(drawn=samples, order=st.randoms(use_true_random=False), target=st.sampled_from([1.0, 4.0]))
def test_a_plan_holds_every_sample_once_in_a_place_of_its_own(
    drawn: list[tuple[str, int, int, int]], order: random.Random, target: float
) -> None:
    kept = kept_of(drawn)
    plans, buckets = shards.plan_shards(kept, target, {})
    assert sorted(item.key for one in plans for item in one.slices) == sorted(
        item.key for _, _, item in kept
    )
    for one in plans:
        keys = [item.key for item in one.slices]
        assert keys == sorted(keys)
        assert 0 <= one.bucket < buckets[one.split]
        assert shards.ShardPlan.from_json(one.to_json()) == one
    places = {(one.split, item.key[:4]): set[int]() for one in plans for item in one.slices}
    for one in plans:
        for item in one.slices:
            places[one.split, item.key[:4]].add(one.bucket)
    assert all(len(numbers) == 1 for numbers in places.values())
    order.shuffle(kept)
    again, same = shards.plan_shards(kept, target, {})
    assert (list(again), same) == (list(plans), buckets)


@QUICK
@given(drawn=samples.filter(bool))
def test_taking_one_person_out_touches_one_shard(drawn: list[tuple[str, int, int, int]]) -> None:
    kept = [("train", identity, item) for _, identity, item in kept_of(drawn)]
    plans, buckets = shards.plan_shards(kept, 1.0, {})
    gone = kept[0][1]
    rest = [sample for sample in kept if sample[1] != gone]
    after, same = shards.plan_shards(rest, 1.0, buckets)
    assert same == buckets
    digests = {one.bucket: one.digest for one in plans}
    left = {one.bucket: one.digest for one in after}
    changed = {bucket for bucket in digests if left.get(bucket) != digests[bucket]}
    assert changed == {shards.bucket_of(gone, buckets["train"])}


def test_a_plan_is_named_by_all_that_makes_its_shard() -> None:
    """The same samples in another split or bucket are another shard: its name says both."""
    ((_, _, item),) = kept_of([("train", 1, 0, 2**19)])
    plans = [
        shards.ShardPlan(split=split, bucket=bucket, slices=slices)
        for split in ("train", "test")
        for bucket in (0, 1)
        for slices in ((item,), (replace(item, sha256="01"),), (replace(item, offset=512),))
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


@pytest.mark.parametrize(("halves", "wanted"), [(1, 1), (3, 2), (7, 4), (9, 4)])
def test_number_of_shards_is_rounded(halves: int, wanted: int) -> None:
    """Of half MiB samples and shards of 1 MiB."""
    kept = kept_of([("train", number, 0, 2**19) for number in range(halves)])
    assert shards.plan_shards(kept, 1.0, {})[1] == {"train": wanted}


def test_number_of_shards_follows_the_wanted_size(tmp_path: Path) -> None:
    made = [made_video(f"id{number:02d}", "v0", tracks=1) for number in range(30)]
    records = packed(str(tmp_path), made, target_mb=0.1)
    total = sum(record["bytes"] for record in records)
    assert round(total / 2**20 / 0.1) - 2 <= len(records) <= round(total / 2**20 / 0.1) + 2
    assert len({record["name"] for record in records}) == len(records)


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, bytes]:
    """A dataset with a single small shard, and that shard's bytes."""
    output = str(tmp_path_factory.mktemp("single") / "out")
    make_dataset(output, [made_video("id01", "v0", tracks=2, frames=2)])
    (path,) = shard_paths(output)
    return output, path, path.read_bytes()


@QUICK
@given(where=st.floats(0, 1, exclude_max=True))
def test_a_cut_shard_is_found(one_shard: tuple[str, Path, bytes], where: float) -> None:
    output, path, whole = one_shard
    path.write_bytes(whole[: int(where * len(whole))])
    try:
        with pytest.raises(shards.DatasetError, match=re.escape(path.name)):
            shards.read_samples(path)
        (problem,) = shards.verify(output)
        assert path.name in problem
    finally:
        path.write_bytes(whole)


def test_a_shard_cut_at_any_block_is_found(one_shard: tuple[str, Path, bytes]) -> None:
    _, path, whole = one_shard
    try:
        for end in range(0, len(whole), shards.TAR_BLOCK):
            path.write_bytes(whole[:end])
            with pytest.raises(shards.DatasetError):
                shards.read_samples(path)
        path.write_bytes(whole + b"\0")
        with pytest.raises(shards.DatasetError, match="end of the archive"):
            shards.read_samples(path)
    finally:
        path.write_bytes(whole)
    assert len(shards.read_samples(path)) == 2


@QUICK
@given(
    where=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
    header=st.booleans(),
)
def test_a_flipped_byte_is_found(
    one_shard: tuple[str, Path, bytes], where: float, mask: int, header: bool
) -> None:
    output, path, whole = one_shard
    place = int(where * (2000 if header else len(whole)))  # names and JSON, or anywhere
    path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
    try:
        (problem,) = shards.verify(output)
        assert path.name in problem
        assert "sha256" in problem
        # pictures have no checksum inside the tar, so reading may go through; it may not end in another error
        with contextlib.suppress(shards.DatasetError):
            shards.read_samples(path)
    finally:
        path.write_bytes(whole)


def test_an_undamaged_dataset_has_no_problems(dataset: str) -> None:
    told: list[tuple[int, int]] = []
    assert shards.verify(dataset, lambda done, total: told.append((done, total))) == []
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_verify_names_what_is_missing_or_strange(copy: str) -> None:
    first, second, _ = shard_paths(copy)
    first.unlink()
    shutil.copy(second, second.with_name("train-00000-000000000000.tar"))
    assert shards.verify(copy) == [
        "shards/train-00000-000000000000.tar: not named by dataset.json",
        f"shards/{first.name}: missing",
    ]


def test_verify_finds_a_damaged_index_and_a_lost_ledger(copy: str) -> None:
    index = Path(copy, shards.INDEX)
    index.write_bytes(index.read_bytes()[:-1])
    Path(copy, shards.LEDGER).unlink()
    problems = shards.verify(copy)
    assert len(problems) == 2
    assert "index.parquet: sha256 differs" in problems[0]
    assert "no ledger" in problems[1]
    index.unlink()
    assert "index.parquet: missing" in shards.verify(copy)[0]
    Path(copy, shards.LEDGER).write_bytes(b"PAR1")
    assert "ledger.parquet: damaged" in shards.verify(copy)[1]


def test_the_index_that_is_published_can_be_read_until_the_next_is_named(copy: str) -> None:
    """However often a run that publishes again is killed between the two."""
    table = shards.read_index(copy)
    manifest = shards.read_manifest(copy)
    before = Path(copy, shards.INDEX_BEFORE)
    names = [shard["name"] for shard in manifest["shards"]]
    same = [table.filter(pc.equal(table["shard"], name)) for name in sorted(names)]
    assert shards.write_index_tables(same, copy) == manifest["index"]
    assert not before.exists(), "the same content"
    for kept in (2, 1):
        written = shards.write_index_tables([table.slice(0, kept)], copy)
        assert shards.read_index(copy).equals(table)
        assert shards.verify(copy) == []
    shards.write_manifest(manifest | {"index": written}, copy, shards.manifest_version(copy))
    assert shards.read_index(copy).equals(table.slice(0, 1))
    assert not before.exists()


def test_an_index_that_changes_while_it_is_read_is_read_again(
    copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = shards.read_manifest(copy)
    new = shards.write_index_tables([shards.read_index(copy).slice(0, 1)], copy)
    shards.write_manifest(old | {"index": new}, copy, shards.manifest_version(copy))
    read, told = shards.read_manifest, [old]
    monkeypatch.setattr(shards, "read_manifest", lambda uri: told.pop() if told else read(uri))
    assert len(shards.read_index(copy)) == 1


def test_verify_compares_index_ledger_and_shards(copy: str) -> None:
    table = shards.read_index(copy)
    rows = [row for row in table.to_pylist() if row["key"] != "id03-v0-000"]
    rows[0]["offsets"][1] += 1
    records: dict[str, dict[str, Any]] = {}
    for row in rows:
        record = records.setdefault(
            row["shard"], {"name": row["shard"], "split": row["split"], "samples": []}
        )
        record["samples"].append(row | {"scores": dict(row["scores"])})
    manifest = shards.read_manifest(copy)
    manifest["index"] = shards.write_index(list(records.values()), copy)
    shards.write_manifest(manifest, copy, shards.manifest_version(copy))
    problems = shards.verify(copy)
    assert "index.parquet: id03-v0-000 is missing, the ledger says published" in problems
    assert "dataset.json: counts 50 published frames, index.parquet has 45" in problems
    names = [path.name for path in shard_paths(copy)]
    assert f"shards/{names[0]}: samples differ from index.parquet" in problems
    assert f"shards/{names[2]}: samples differ from index.parquet" in problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a .finished. dataset; run jobs/preprocess.py"),
        (b"{", "not JSON"),
        (b'{"schema_version": 7}', "schema version 7, this program reads 1"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        Path(tmp_path, shards.MANIFEST).write_bytes(content)
    for read in (shards.read_manifest, shards.read_index, shards.verify):
        with pytest.raises(shards.DatasetError, match=message):
            read(str(tmp_path))


def test_a_damaged_part_is_not_packed(tmp_path: Path) -> None:
    output = str(tmp_path)
    plans, _ = plan(commit_all(output, [made_video("id01", "v0")]))
    part = Path(shards.part_uri(output, "id01-v0", "tar"))
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(shards.DatasetError, match=r"differ from its commit; delete its \.json"):
        shards.pack(plans[0], output)
    part.unlink()
    with pytest.raises(shards.DatasetError, match=r"missing; delete its \.json"):
        shards.pack(plans[0], output)
    assert not Path(output, "shards").exists()


def test_a_sample_without_one_of_its_pictures_is_refused(tmp_path: Path) -> None:
    video, members = made_video("id01", "v0")
    members = [member for member in members if not snapshots.is_snapshot(member[0])]
    for extension, told in (("jpg", "4 pictures"), ("png", "4 label maps")):
        last = max(name for name, _ in members if name.endswith(extension))
        fewer = [member for member in members if member[0] != last]
        output = str(tmp_path / extension)
        plans, _ = plan(commit_all(output, [(video, fewer)]))
        with pytest.raises(shards.DatasetError, match=f"id01-v0-001 has {told}, its JSON says 5"):
            shards.pack(plans[0], output)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.write_bytes(shards.tar_sample(members) + shards.TAR_END)
    return path


def test_samples_that_are_torn_apart_are_refused(tmp_path: Path) -> None:
    video, members = made_video("id01", "v0", tracks=1, frames=1)
    members = [member for member in members if not snapshots.is_snapshot(member[0])]
    record = shards.sample_json(video, video.tracks[0], datasets.CROP)
    one = [("id01-v0-000.json", record), *members]
    two = [(name.replace("v0", "v1"), data.replace(b"-v0-", b"-v1-")) for name, data in one]
    tar = tmp_path / "shard.tar"
    assert len(shards.read_samples(write_tar(tar, [*one, *two]))) == 2
    for torn in (
        [*one[:3], *two, *one[3:]],
        [*one[1:], *two],
        [*one, *one],
        [*one, *two, *one],
        [*one, ("no dot", b"")],
        [(one[0][0], b"[1, 2]"), *one[1:]],
        [(one[0][0], record.replace(b'"times"', b'"tiems"')), *one[1:]],
    ):
        with pytest.raises(shards.DatasetError, match=r"shard\.tar"):
            shards.read_samples(write_tar(tar, torn))


def test_the_json_of_a_sample_keeps_times_to_a_millionth_and_no_strip() -> None:
    """Times are those of the file's clock (1/90000 s); the strip of the time map is of the video and for the report."""
    shift = {"delta_seconds": -0.0612, "strip": [{"index": 1}]}
    video, _ = made_video("id01", "v0", tracks=1, shift=shift)
    times = tuple((7 + 3003 * i) / 90_000 for i in range(len(video.tracks[0].times)))
    record = json.loads(
        shards.sample_json(video, replace(video.tracks[0], times=times), datasets.CROP)
    )
    assert record["times"] == pytest.approx(times, abs=1e-6)
    assert record["shift"] == {"delta_seconds": -0.0612}
    assert record["fps"] == video.probe["fps"]


def test_verify_counts_the_samples_of_a_shard(copy: str) -> None:
    manifest, before = shards.read_manifest(copy), shards.manifest_version(copy)
    manifest["shards"][0]["samples"] += 1
    shards.write_manifest(manifest, copy, before)
    (problem,) = shards.verify(copy)
    assert manifest["shards"][0]["name"] in problem
    assert "samples, dataset.json says" in problem


# --- names --------------------------------------------------------------------------------------------------------


def test_the_longest_names_fit_a_plain_header() -> None:
    longest = f"{'i' * 40}-{'v' * 40}-000.landmarks.npy"
    for name in (longest, "n" * 100):
        header = shards.tar_header(name, 5)
        assert len(header) == shards.TAR_BLOCK
        with tarfile.open(fileobj=io.BytesIO(header + bytes(512) + shards.TAR_END)) as archive:
            assert archive.getnames() == [name]
    with pytest.raises(ValueError, match="too long"):
        shards.tar_header("n" * 101, 5)


def test_parts_have_stable_places() -> None:
    uri = shards.part_uri("s3://bucket/out", "id01-v0", "tar")
    assert re.fullmatch(r"s3://bucket/out/work/parts/[0-9a-f]{2}/id01-v0\.tar", uri)
    assert uri == shards.part_uri("s3://bucket/out/", "id01-v0", "tar")


@pytest.mark.parametrize("identity", ["id00017", "anna", "x" * 40])
def test_an_identity_has_the_shard_that_the_format_says(identity: str) -> None:
    """docs/formats.md: sha256 of "shard " and the name, its first 8 bytes as a big-endian number, modulo the buckets."""
    number = int(hashlib.sha256(f"shard {identity}".encode()).hexdigest()[:16], 16)
    assert [shards.bucket_of(identity, n) for n in (1, 7, 300)] == [number % n for n in (1, 7, 300)]


# --- failures and ledger ------------------------------------------------------------------------------------------


def test_a_failed_video_is_open_to_another_try(tmp_path: Path) -> None:
    output = str(tmp_path)
    video, members = made_video("id01", "v0")
    failed = reject(replace(video, tracks=(), attempts=1), Cause.DOWNLOAD_NETWORK, "reset")
    private = reject(replace(video, video="v1", tracks=()), Cause.DOWNLOAD_PRIVATE)
    commit_all(output, [(failed, []), (private, [])])
    assert dict(shards.committed(output)) == {"id01-v1": "done", "id01-v0": "failed"}
    (loaded,) = shards.load_commits(output, ["id01-v0"])
    assert loaded.video.attempts == 1
    assert loaded.slices == {}
    shards.commit(replace(video, attempts=2), members, output, datasets.CROP)
    assert dict(shards.committed(output)) == {"id01-v0": "done", "id01-v1": "done"}
    (loaded,) = shards.load_commits(output, ["id01-v0"])
    assert loaded.video.attempts == 2
    assert {row["attempts"] for row in shards.ledger_rows(loaded, {})} == {2}
    assert len(loaded.slices) == 2


def test_nothing_is_committed_in_an_empty_place(tmp_path: Path) -> None:
    assert list(shards.committed(str(tmp_path / "none"))) == []


def test_everything_that_went_in_is_in_the_ledger(tmp_path: Path) -> None:
    output = str(tmp_path)
    made = datasets.some_videos()
    manifest = make_dataset(
        output, made, refused={"id03-v0-000": (Cause.IDENTITY_FEW_VIDEOS, "1 < 2")}
    )
    rows = shards.read_ledger(output).to_pylist()
    expected = [video.key for video, _ in made]
    expected += [video.track_key(track) for video, _ in made for track in video.tracks]
    assert sorted(row["key"] for row in rows) == sorted(expected)
    by_key = {row["key"]: row for row in rows}
    outcome = {
        key: row["state"] if row["state"] == "published" else f"{row['stage']}: {row['cause']}"
        for key, row in by_key.items()
    }
    assert outcome["id02-v1"] == outcome["id02-v1-000"] == "published"
    assert outcome["id02-v1-001"] == Cause.TRACK_SHORT
    assert outcome["id03-v0"] == outcome["id03-v0-000"] == Cause.IDENTITY_FEW_VIDEOS
    assert by_key["id03-v0"]["detail"] == "none of 1 tracks published"
    assert outcome["id04-v0"] == Cause.DOWNLOAD_PRIVATE
    assert by_key["id04-v1"]["state"] == "failed"
    assert outcome["id05-v0-000"] == Cause.CROP_SMALL
    assert dict(by_key["id05-v0-000"]["dropped"]) == {Cause.CROP_LANDMARKS: 3}
    assert sum(row["frames"] for row in rows if row["kind"] == "video") == 45
    assert manifest["counts"]["frames"]["published"] == 45
    published = {key for key, told in outcome.items() if told == "published"}
    assert set(shards.read_index(output)["key"].to_pylist()) == {
        key for key in published if by_key[key]["kind"] == "track"
    }


def test_tracks_of_a_video_that_ended_end_with_it_and_a_commit_is_small(tmp_path: Path) -> None:
    """Times, boxes and indices of frames are in the sample's own JSON; of a track the commit keeps its first and last time."""
    video, members = made_video("id01", "v0", frames=7)
    mean = tuple(np.random.default_rng(1).normal(size=8).tolist())
    video = replace(video, tracks=tuple(replace(track, embedding=mean) for track in video.tracks))
    ended = reject(replace(video, video="v1"), Cause.VIDEO_UNREADABLE, "half-way")
    whole, broken = commit_all(str(tmp_path), [(video, members), (ended, [])])
    for track, slim in zip(video.tracks, whole.video.tracks, strict=True):
        assert slim.times == (track.times[0], track.times[-1])
        assert slim.boxes == slim.indices == ()
        assert slim.embedding == pytest.approx(mean, abs=1e-6)
    assert whole.frames == {"id01-v0-000": 7, "id01-v0-001": 7}
    for row in shards.ledger_rows(broken, {}):
        assert (row["state"], f"{row['stage']}: {row['cause']}") == (
            "rejected",
            Cause.VIDEO_UNREADABLE,
        )
        assert row["detail"] == "half-way"


def test_a_live_video_without_tracks_has_a_cause(tmp_path: Path) -> None:
    (commit,) = commit_all(str(tmp_path), [made_video("id01", "v0", tracks=0)])
    (row,) = shards.ledger_rows(commit, {})
    assert (row["state"], f"{row['stage']}: {row['cause']}") == ("rejected", Cause.NO_TRACKS)


def test_a_video_without_a_sample_has_the_cause_of_most_of_its_tracks(tmp_path: Path) -> None:
    (commit,) = commit_all(str(tmp_path), [made_video("id01", "v0", tracks=3)])
    told = [Cause.IDENTITY_DISAGREES, Cause.QUALITY_DUPLICATE, Cause.QUALITY_DUPLICATE]
    decisions = {f"id01-v0-00{i}": ("train", cause.value, "why") for i, cause in enumerate(told)}
    somewhere = decisions | {"id01-v0-001": ("test", "", "")}
    assert shards.ledger_rows(commit, somewhere)[0]["split"] == "test"
    own, *tracks = shards.ledger_rows(commit, decisions)
    assert f"{own['stage']}: {own['cause']}" == Cause.QUALITY_DUPLICATE
    assert [f"{row['stage']}: {row['cause']}" for row in tracks] == told


def test_an_empty_ledger_can_be_read(tmp_path: Path) -> None:
    shards.write_ledger([], str(tmp_path))
    assert shards.read_ledger(str(tmp_path)).schema == shards.LEDGER_SCHEMA


def test_the_index_has_a_row_group_for_each_shard(dataset: str) -> None:
    file = pq.ParquetFile(Path(dataset, shards.INDEX))
    groups = [
        set(file.read_row_group(number, ["shard"])["shard"].to_pylist())
        for number in range(file.num_row_groups)
    ]
    assert groups == [{path.name} for path in shard_paths(dataset)]


@pytest.mark.parametrize("target", [0, -1.0])
def test_a_shard_has_a_size(target: float) -> None:
    with pytest.raises(ValueError, match="target_mb must be positive"):
        shards.ShardsConfig(target_mb=target)
