"""Repair brings the same bytes back; a takedown leaves what would have been published without those people."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import gallery, replay, report, shards, storage, upkeep
from pipelines.output import ConfigError, OutputLock
from pipelines.schema import Cause, reject, to_row
from tests import datasets
from tests.datasets import Made, made_video, make_dataset

REASON = "request 17"
SMALL_MB = 0.08


def people() -> list[Made]:
    """Twelve people in three splits, and the odd ones of :func:`tests.datasets.some_videos`."""
    made = [
        made_video(
            f"id1{number}", f"v{video}", frames=2, split=("train", "train", "val")[number % 3]
        )
        for number in range(9)
        for video in range(2)
    ]
    return [*made, *datasets.some_videos()]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of several shards, work folder kept; tests change a :func:`copy`."""
    output = str(tmp_path_factory.mktemp("upkeep") / "out")
    make_dataset(output, people(), target_mb=SMALL_MB)
    assert len(shards.read_manifest(output)["shards"]) > 4
    return output


@pytest.fixture
def copy(original: str, tmp_path: Path) -> str:
    return str(shutil.copytree(original, tmp_path / "out"))


def hashes(output: str, folders: tuple[str, ...] = ("",)) -> dict[str, str]:
    root = Path(output)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and str(path.relative_to(root)).startswith(folders)
    }


def shard_of(output: str, key: str) -> Path:
    (row,) = [row for row in shards.read_index(output).to_pylist() if row["key"] == key]
    return Path(output, "shards", row["shard"])


# --- repair -------------------------------------------------------------------------------------------------------


def test_nothing_is_done_to_a_whole_dataset(copy: str) -> None:
    before = hashes(copy)
    assert upkeep.repair(copy) == upkeep.Repair(done=[], left=[])
    assert hashes(copy) == before


def test_shards_index_and_page_come_back_byte_for_byte(copy: str) -> None:
    before = hashes(copy)
    first, second, third, *_ = sorted(Path(copy, "shards").iterdir())
    first.unlink()
    content = bytearray(second.read_bytes())
    content[1000] ^= 1  # of the same size
    second.write_bytes(content)
    third.write_bytes(third.read_bytes()[:700])
    Path(copy, "shards", "train-00000-0123456789ab.tar").write_bytes(b"stray")
    Path(copy, report.PAGE).unlink()
    assert len(shards.verify(copy)) == 4
    result = upkeep.repair(copy)
    assert result.left == []
    assert [line.split(": ")[0] for line in result.done] == [
        "shards/train-00000-0123456789ab.tar",
        *(f"shards/{path.name}" for path in (first, second, third)),
        report.PAGE,
    ]
    assert hashes(copy) == before
    Path(copy, shards.INDEX).write_bytes(b"PAR1")
    assert upkeep.repair(copy).done == ["index.parquet: read off the shards"]
    assert hashes(copy) == before


def test_an_index_that_another_version_of_parquet_wrote_is_named_anew(copy: str) -> None:
    """What is read off the shards has the same rows and other bytes: the manifest must say which."""
    manifest, version = shards.read_manifest(copy), shards.manifest_version(copy)
    index = Path(copy, shards.INDEX)
    pq.write_table(pq.read_table(index), index, compression="none")
    entry = {"file": shards.INDEX, "bytes": index.stat().st_size}
    entry["sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    shards.write_manifest({**manifest, "index": entry}, copy, version)
    rows = shards.read_index(copy)
    index.unlink()
    result = upkeep.repair(copy)
    assert (result.done, result.left) == (["index.parquet: read off the shards"], [])
    assert shards.read_index(copy) == rows
    assert shards.verify(copy) == []


def test_without_its_parts_a_shard_is_lost_and_named(copy: str) -> None:
    shutil.rmtree(Path(copy, shards.WORK))
    path = shard_of(copy, "id01-v0-000")
    path.unlink()
    result = upkeep.repair(copy)
    assert result.done == []
    (line,) = result.left
    assert line.startswith(f"shards/{path.name}: missing; its parts are not in the work folder")
    assert not Path(copy, shards.WORK).exists()


def test_what_cannot_be_repaired_is_said(copy: str) -> None:
    path = shard_of(copy, "id01-v0-000")
    path.write_bytes(b"")
    index = Path(copy, shards.INDEX)
    whole = index.read_bytes()
    index.unlink()
    left = upkeep.repair(copy).left
    assert any("they are damaged too" in line for line in left)
    assert any(path.name in line for line in left)
    index.write_bytes(whole)
    Path(shards.part_uri(copy, "id01-v0", "tar")).write_bytes(b"other")
    (line,) = upkeep.repair(copy).left
    assert "bytes differ from its commit" in line
    Path(copy, shards.LEDGER).unlink()
    assert any("no ledger" in line for line in upkeep.repair(copy).left)


def test_parts_of_another_version_repair_nothing(copy: str) -> None:
    """They would make a sound shard, but not the one that the dataset names."""
    path = shard_of(copy, "id01-v0-000")
    path.unlink()
    datasets.commit_all(copy, [made_video("id01", "v0", frames=4)])
    (line,) = [line for line in upkeep.repair(copy).left if path.name in line]
    assert "of another version" in line
    assert not path.exists()
    assert {each.name for each in path.parent.iterdir()} < {
        shard["name"] for shard in shards.read_manifest(copy)["shards"]
    }


# --- takedown -----------------------------------------------------------------------------------------------------


def without(made: list[Made], identities: set[str], videos: set[str]) -> list[Made]:
    """The list as it is read once these were taken down."""
    return [
        (
            reject(
                type(video)(
                    identity=video.identity, video=video.video, split=video.split, url=video.url
                ),
                Cause.TAKEDOWN,
                REASON,
            ),
            [],
        )
        if video.identity in identities or video.key in videos
        else (video, members)
        for video, members in made
    ]


@pytest.mark.parametrize(
    ("identities", "videos"),
    [({"id02"}, {"id01-v1"}), ({"id03", "id05"}, set()), (set(), {"id04-v1"})],
)
def test_what_is_left_is_what_would_have_been_published_without_them(
    copy: str, tmp_path: Path, identities: set[str], videos: set[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(copy, "shards").iterdir()}
    old = shards.read_manifest(copy)
    receipt = upkeep.take_down(copy, sorted(identities), sorted(videos), REASON)
    assert shards.verify(copy) == []
    fresh = str(tmp_path / "fresh")
    remade(fresh, without(people(), identities, videos), old["buckets"])
    folders = ("shards", "index.parquet")
    assert hashes(copy, folders) == hashes(fresh, folders)
    assert shards.read_ledger(copy).equals(shards.read_ledger(fresh))
    new, other = shards.read_manifest(copy), shards.read_manifest(fresh)
    for name in ("counts", "splits", "shards", "index", "config"):
        assert new[name] == other[name]
    assert new["buckets"] == old["buckets"]
    assert new["dataset_version"] == 1 + bool(receipt.shards) == receipt.dataset_version
    untouched = {path for path in before if path.exists()}
    assert {path.name for path in before if path not in untouched} == set(receipt.shards)
    assert all(path.stat().st_mtime_ns == before[path] for path in untouched)


def remade(output: str, made: list[Made], buckets: dict[str, int]) -> None:
    """Publish with the shard numbers of an earlier publication."""
    plan = datasets.plan

    def fixed(commits: Any, target_mb: float) -> Any:
        kept = [
            (one.split, item.key.split("-")[0], item)
            for one in plan(commits, target_mb)[0]
            for item in one.slices
        ]
        return shards.plan_shards(kept, target_mb, buckets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "plan", fixed)
        make_dataset(output, made, target_mb=SMALL_MB)


def test_the_receipt_counts_what_went(copy: str) -> None:
    receipt = upkeep.take_down(copy, ["id02"], ["id01-v1"], REASON)
    assert receipt.videos == ["id01-v1", "id02-v0", "id02-v1"]
    assert receipt.samples == 2 + 3
    assert receipt.frames == 5 * 5
    assert receipt.sha256 == ["ab" * 32]
    assert receipt.dataset_version == 2
    other = upkeep.take_down(copy, ["id03"], [], "another")
    assert other.videos == ["id03-v0"]  # of this request only
    assert other.dataset_version == 3
    again = upkeep.take_down(copy, ["id02"], ["id01-v1"], "another")
    assert again.videos == receipt.videos
    assert (again.samples, again.shards, again.dataset_version) == (0, {}, 3)
    takedowns = json.loads(Path(copy, shards.TAKEDOWNS).read_text())
    assert takedowns["identities"]["id02"]["reason"] == REASON


def test_likenesses_with_those_who_go_are_forgotten(copy: str) -> None:
    manifest = shards.read_manifest(copy)
    stay, go = ["id10", "id11", 0.98], ["id02", "id10", 0.97]
    shards.write_manifest({**manifest, "twins": [go, stay]}, copy, shards.manifest_version(copy))
    upkeep.take_down(copy, ["id02"], [], REASON)
    assert shards.read_manifest(copy)["twins"] == [stay]


def test_no_trace_is_left_but_the_names(copy: str) -> None:
    logged = Path(copy, "mlflow", "mlartifacts", "1", "ab", "artifacts", report.PAGE)
    logged.parent.mkdir(parents=True)
    shutil.copy(Path(copy, report.PAGE), logged)
    blob = Path(copy, shards.WORK, "downloads", "ab", "abab.mp4")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"video")
    album = gallery.read_album(copy)
    shown = [
        {"identity": name, "video": "v0", "name": f"{name}.jpg", "jpeg": b"x"}
        for name in ("id01", "id02")
    ]
    gallery.write_album(copy, pa.Table.from_pylist(shown, schema=album.schema))
    upkeep.take_down(copy, ["id02"], [], REASON)
    assert not logged.exists()
    assert not blob.exists()
    for path in Path(copy).rglob("*"):
        if path.is_file():
            assert b"id02-v0-000" not in path.read_bytes(), path
    assert "id02" not in shards.read_index(copy)["identity"].to_pylist()
    album = gallery.read_album(copy)
    assert set(album["identity"].to_pylist()) >= {"id01"}
    assert "id02" not in album["identity"].to_pylist()
    rows = [row for row in shards.read_ledger(copy).to_pylist() if row["identity"] == "id02"]
    assert [(row["kind"], row["key"], row["state"]) for row in rows] == [
        ("video", "id02-v0", "rejected"),
        ("video", "id02-v1", "rejected"),
    ]
    for row in rows:
        assert (row["stage"], row["cause"], row["detail"]) == ("takedown", "requested", REASON)
        assert not any(row[name] for name in ("video_sha256", "scores", "shift", "source", "bytes"))
    page = Path(copy, report.PAGE).read_text()
    assert "takedown: requested" in page


def test_nothing_of_them_is_left_in_the_records_of_shards_they_shared(tmp_path: Path) -> None:
    output = str(tmp_path)
    make_dataset(output, datasets.some_videos())  # three videos of id01 in one shard
    upkeep.take_down(output, [], ["id01-v1"], REASON)
    for path in Path(output, shards.WORK).rglob("*"):
        assert not path.is_file() or b"id01-v1-000" not in path.read_bytes(), path


def test_what_was_never_published_of_them_goes_too(copy: str) -> None:
    """A list that grew: videos that a killed run has committed or saved are in no ledger yet, and would be published next."""
    new = made_video("id02", "brand-new", frames=2)
    other = made_video("id02-x", "v0", frames=2)  # a key that begins as one of id02
    datasets.commit_all(copy, [new, other])
    saved = [Path(copy, shards.WORK, "rows", stage) for stage in ("identities", "crops-replayed")]
    for video, members in (new, other):
        for folder in saved:
            replay.save_row(to_row(video, members), str(folder))
    upkeep.take_down(copy, ["id02"], [], REASON)
    gone, stays = shards.load_commits(copy, ["id02-brand-new", "id02-x-v0"])
    assert gone.video.cause == Cause.TAKEDOWN
    assert gone.slices == {}
    assert stays.slices
    assert not Path(shards.part_uri(copy, "id02-brand-new", "tar")).exists()
    assert Path(shards.part_uri(copy, "id02-x-v0", "tar")).exists()
    for folder in saved:
        assert [path.name for path in folder.iterdir()] == ["id02-x-v0.parquet"]


def test_what_a_killed_run_left_half_written_of_them_goes_too(copy: str) -> None:
    """A part without its commit, a file on its way, records of another version; and a person whom only that run knows."""
    datasets.commit_all(copy, [made_video("newbie", "v0"), made_video("id02", "unreadable")])
    half, broken = (
        Path(shards.part_uri(copy, key, "tar")) for key in ("id02-half", "id02-unreadable")
    )
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"pictures")
    on_its_way = half.with_name(f"{storage.TEMPORARY}1")
    on_its_way.write_bytes(b"pictures")
    for key in ("id02-unreadable", "id02-v0"):
        commit = Path(shards.part_uri(copy, key, "json"))
        commit.write_text(json.dumps(json.loads(commit.read_text()) | {"schema_version": 0}))
    rows = Path(copy, shards.WORK, "rows", "crops")
    rows.mkdir(parents=True)
    (rows / "id02-row.parquet").write_bytes(b"of no reader")
    upkeep.take_down(copy, ["id02", "newbie"], [], REASON)
    assert not any(path.exists() for path in (half, broken, on_its_way))
    assert not list(rows.iterdir())
    states = dict(shards.committed(copy))
    assert {"newbie-v0", "id02-v0"} <= states.keys()
    assert "id02-unreadable" not in states
    for commit in shards.load_commits(copy, ["newbie-v0", "id02-v0"]):
        assert (commit.video.cause, commit.slices) == (Cause.TAKEDOWN, {})
    with pytest.raises(shards.DatasetError, match="has no videos newbie-v9"):
        upkeep.take_down(copy, [], ["newbie-v9"], REASON)


def test_a_later_run_does_not_bring_them_back(copy: str) -> None:
    upkeep.take_down(copy, ["id02"], ["id04-v1"], REASON)
    states = dict(shards.committed(copy))
    assert {"id02-v0", "id02-v1", "id04-v1"} <= states.keys()
    assert set(states.values()) == {"done"}
    for commit in shards.load_commits(copy, ["id02-v0", "id02-v1", "id04-v1"]):
        assert commit.video.cause == Cause.TAKEDOWN
        assert commit.slices == {}
        assert not Path(shards.part_uri(copy, commit.video.key, "tar")).exists()
    takedowns = shards.read_takedowns(copy)
    new = made_video("id02", "brand-new")[0]
    assert shards.honour(new, takedowns).cause == Cause.TAKEDOWN
    other = made_video("id01", "brand-new")[0]
    assert shards.honour(other, takedowns) == other


def test_a_dataset_without_its_work_folder_can_be_thinned(copy: str) -> None:
    shutil.rmtree(Path(copy, shards.WORK))
    upkeep.take_down(copy, ["id02"], [], REASON)
    assert shards.verify(copy) == []
    assert not Path(copy, shards.WORK).exists()


def test_the_last_person_can_leave(tmp_path: Path) -> None:
    output = str(tmp_path)
    make_dataset(output, [made_video("id01", "v0")])
    upkeep.take_down(output, ["id01"], [], REASON)
    assert shards.verify(output) == []
    assert shards.read_index(output).num_rows == 0
    assert list(Path(output, "shards").iterdir()) == []
    assert "Nothing was published" in Path(output, report.PAGE).read_text()


@pytest.mark.parametrize(
    "names", [(["id99"], []), ([], ["id01-v9"]), (["id01-v0"], []), ([], ["id01"])]
)
def test_an_unknown_name_changes_nothing(copy: str, names: tuple[list[str], list[str]]) -> None:
    before = hashes(copy)
    with pytest.raises(shards.DatasetError, match="nothing was taken down"):
        upkeep.take_down(copy, *names, REASON)
    assert hashes(copy) == before


def test_a_damaged_shard_is_not_copied_from(copy: str) -> None:
    before = hashes(copy)
    index = shards.read_index(copy).to_pylist()
    mates = {(row["shard"], row["identity"]) for row in index}
    shared = Counter(shard for shard, _ in mates).most_common(1)[0][0]
    identity = min(identity for shard, identity in mates if shard == shared)
    path = Path(copy, "shards", shared)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(shards.DatasetError, match=r"damaged; run jobs/dataset\.py repair first"):
        upkeep.take_down(copy, [identity], [], REASON)
    assert upkeep.repair(copy).left == []  # nothing it needs was deleted
    assert hashes(copy) == before
    upkeep.take_down(copy, [identity], [], REASON)
    assert shards.verify(copy) == []


def test_a_damaged_shard_of_others_does_not_stop_it(copy: str) -> None:
    others = [path for path in Path(copy, "shards").iterdir() if path.name.startswith("val-")]
    for path in others:
        path.write_bytes(bytes(path.stat().st_size))
    receipt = upkeep.take_down(copy, ["id02"], [], REASON)
    assert receipt.samples == 3
    (line,) = receipt.left
    assert any(path.name in line for path in others)
    assert "id02" not in shards.read_index(copy)["identity"].to_pylist()


def test_two_jobs_do_not_write_one_dataset(copy: str) -> None:
    other = {"host": "elsewhere", "pid": 1, "time": 4e9}
    Path(copy, shards.WORK, "lock.json").write_text(json.dumps(other))
    for act in (upkeep.repair, lambda output: upkeep.take_down(output, ["id02"], [], REASON)):
        with pytest.raises(ConfigError, match="another run"):
            act(copy)


def test_in_an_object_store_too() -> None:
    output = f"memory://{uuid.uuid4().hex}"
    make_dataset(output, datasets.some_videos())
    (shard,) = [
        name for name in storage.names_below(storage.join(output, "shards")) if "train" in name
    ]
    storage.remove(storage.join(output, "shards", shard))
    assert upkeep.repair(output).left == []
    assert shards.verify(output) == []
    receipt = upkeep.take_down(output, ["id02"], [], REASON)
    assert receipt.samples == 3
    assert shards.verify(output) == []
    with OutputLock(output):
        pass


class StopError(BaseException):
    """Ends a process where it stands."""


@pytest.mark.slow
def test_killed_anywhere_the_same_command_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = str(tmp_path / "begun")
    make_dataset(begun, [made_video(f"id0{number}", "v0", frames=1) for number in (1, 2, 3)])
    whole = str(shutil.copytree(begun, tmp_path / "whole"))
    steps = [0]
    limit = [10**6]

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(uri: Any, *rest: Any) -> Any:
            if "lock.json" not in str(uri):
                if steps[0] == limit[0]:
                    raise StopError
                steps[0] += 1
            return write(uri, *rest)

        return call

    for name in ("write_atomic", "put_file", "remove"):
        monkeypatch.setattr(storage, name, counted(getattr(storage, name)))

    def act(output: str) -> None:
        upkeep.take_down(output, ["id02"], [], REASON)

    act(whole)
    expected = hashes(whole)
    assert steps[0] >= 10
    for stop in range(steps[0]):
        output = str(shutil.copytree(begun, tmp_path / "broken"))
        steps[0], limit[0] = 0, stop
        with pytest.raises(StopError):
            act(output)
        limit[0] = 10**6
        act(output)
        assert hashes(output) == expected, f"stopped before write {stop}"
        assert shards.verify(output) == []
        shutil.rmtree(output)
