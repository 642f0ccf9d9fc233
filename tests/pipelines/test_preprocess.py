"""The chain without Ray: what is refused before it starts, what a killed run leaves, what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.frozen.landmarks import FanConfig
from pipelines import identities, preprocess, quality, shards, storage
from pipelines.annotate import AnnotateConfig
from pipelines.crops import CropsConfig
from pipelines.download import DownloadConfig
from pipelines.identities import IdentitiesConfig
from pipelines.output import ConfigError
from pipelines.preprocess import PreprocessConfig
from pipelines.progress import Progress
from pipelines.schema import Cause, StageResources, Track, Video, reject
from pipelines.tracks import TracksConfig
from tests.datasets import make_dataset, some_videos


def quiet() -> Progress:
    return Progress(lambda _: None)


def listed(output: str) -> list[Video]:
    """The videos of a made dataset as its list would give them."""
    rows = [row for row in shards.read_ledger(output).to_pylist() if row["kind"] == "video"]
    return [Video(identity=row["identity"], video=row["video"]) for row in rows]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    output = str(tmp_path / "out")
    make_dataset(output, some_videos())
    return output


def config_of(output: str, **fields: Any) -> PreprocessConfig:
    return PreprocessConfig(input="list.csv", output=output, **fields)


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="smooth needs every frame"):
        config_of("out", crops=CropsConfig(smooth=True))
    config_of("out", crops=CropsConfig(smooth=True), tracks=TracksConfig(frames_per_second=0))
    with pytest.raises(ValueError, match="fan is set, but the landmarker is dlib"):
        CropsConfig(fan=FanConfig(flip=False))


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_output_that_is_no_folder_is_the_users(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match="cannot be used"):
        preprocess.check(config_of(str(tmp_path / name)))


def begun_with(output: Path, change: Callable[[dict[str, Any]], None]) -> PreprocessConfig:
    """An output that another version began; its stored configuration is this one's after ``change``."""
    config = config_of(str(output))
    stored = json.loads(json.dumps(asdict(config)))
    change(stored)
    output.mkdir()
    (output / "config.json").write_text(json.dumps({"job": "preprocess", "config": stored}))
    return config


def test_output_begun_before_there_were_pupils_goes_on(tmp_path: Path) -> None:
    config = begun_with(tmp_path / "out", lambda stored: stored["annotate"].pop("pupils"))
    preprocess.check(config)
    with pytest.raises(ConfigError, match=r"annotate.pupils was 'none', now 'iris'"):
        preprocess.check(replace(config, annotate=AnnotateConfig(pupils="iris")))


def test_fields_younger_than_an_output_and_fields_that_went_are_named(tmp_path: Path) -> None:
    config = begun_with(tmp_path / "one", lambda stored: stored["quality"].pop("max_yaw"))
    with pytest.raises(ConfigError, match=r"quality.max_yaw is younger than that and is 80.0 now"):
        preprocess.check(config)
    config = begun_with(tmp_path / "two", lambda stored: stored["crops"].update(squash=True))
    with pytest.raises(ConfigError, match=r"crops.squash was True, now there is no such field"):
        preprocess.check(config)


def test_output_of_another_job_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"job": "train_aligner", "config": {"dataset": "x"}}')
    with pytest.raises(ConfigError, match=r"holds what jobs/train_aligner.py made, this is"):
        preprocess.check(config_of(str(tmp_path)))


def test_line_that_refuses_a_configuration_stays_short(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"job": "preprocess", "config": {}}')
    with pytest.raises(ConfigError, match=r"and \d+ more\)") as told:
        preprocess.check(config_of(str(tmp_path)))
    assert len(str(told.value)) < 700


def test_bucket_that_does_not_answer_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str) -> bytes:
        raise RuntimeError(f"no credentials for {uri}")  # botocore's errors are no OSErrors

    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(ConfigError, match="no credentials"):
        preprocess.check(config_of("memory://bucket/out"))


def test_recipe_holds_no_secret() -> None:
    template = "https://me:word@mirror.example/{video}.mp4?token=abc"
    recipe = config_of("out", download=DownloadConfig(url_template=template)).recipe
    assert recipe["download.url_template"] == "https://mirror.example/{video}.mp4"


def test_list_that_lost_a_video_is_refused_once_the_work_is_gone(dataset: str) -> None:
    videos = listed(dataset)
    storage.remove(storage.join(dataset, shards.WORK))
    with pytest.raises(ConfigError, match=videos[0].key):
        preprocess.process(config_of(dataset), videos[1:], quiet())
    found, _, count = preprocess.process(config_of(dataset), videos, quiet())
    assert (len(found), count) == (len(videos), 0)


def test_killed_while_the_work_folder_goes_nothing_is_done_again(
    dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a work folder must not look like half a dataset: its videos may be gone from their site."""
    work = storage.join(dataset, shards.WORK)
    remove: Callable[[str], None] = storage.remove

    def die(uri: str) -> None:
        if uri.endswith("/parts"):
            done = sorted(Path(uri).rglob("*.json"))
            done[0].unlink()
            raise KeyboardInterrupt
        remove(uri)

    monkeypatch.setattr(storage, "remove", die)
    with pytest.raises(KeyboardInterrupt):
        preprocess.drop_work(dataset)
    monkeypatch.undo()

    def publish(*_: object) -> tuple[dict[str, Any], int]:
        return shards.read_manifest(dataset), 0

    monkeypatch.setattr(preprocess, "publish", publish)
    monkeypatch.setattr(preprocess, "configure_ray_data", lambda _: None)
    outcome = preprocess.run(config_of(dataset), listed(dataset), quiet())
    assert outcome.new_videos == 0
    assert not Path(work).exists()


def test_videos_are_gathered_by_identity_in_whatever_order_the_list_has_them(
    tmp_path: Path,
) -> None:
    """``a-b`` with ``c`` comes between two videos of ``a`` when keys are sorted, and a table has any order."""
    output = str(tmp_path)
    names = [("b", "x"), ("a", "z"), ("a-b", "c"), ("a", "a")]
    videos = [Video(identity=identity, video=video) for identity, video in names]
    for video in videos:
        shards.commit(reject(video, Cause.DOWNLOAD_NOT_FOUND, ""), [], output, {})
    found, _, _ = preprocess.process(config_of(output), videos, quiet())
    assert list(found) == ["a-a", "a-z", "a-b-c", "b-x"]
    assert list(found.by_key()) == ["a-a", "a-b-c", "a-z", "b-x"]
    samples, _, _ = preprocess.gather(shards.load_commits(output, found), config_of(output))
    assert list(samples) == []


def test_failed_video_is_tried_until_its_attempts_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path)
    video = Video(identity="a", video="v", attempts=1)
    failed = reject(replace(video), Cause.DOWNLOAD_NETWORK, "reset")
    shards.commit(failed, [], output, {})
    tried: list[int] = []

    class Plan:
        def iter_rows(self) -> list[dict[str, Any]]:
            row = {"state": "failed", "cause": "", "frames": 0} | dict.fromkeys(
                ("seconds", "stage_frames"), json.dumps({})
            )
            return [row for _ in tried]

    def build(videos: list[Video], _: PreprocessConfig) -> Plan:
        tried.extend(video.attempts for video in videos)
        return Plan()

    monkeypatch.setattr(preprocess, "build_plan", build)
    fresh = [Video(identity="a", video="v")]
    preprocess.process(config_of(output, max_attempts=1), fresh, quiet())
    assert tried == []
    preprocess.process(config_of(output, max_attempts=2), fresh, quiet())
    assert tried == [2]


def made_commit(random: np.random.Generator, identity: str, number: int) -> shards.Commit:
    """A commit whose tracks may show somebody else, be copies, or come from a video that others list, too."""
    tracks = []
    for name in ("000", "001")[: random.integers(1, 3)]:
        person = np.random.default_rng(list(identity.encode())).normal(size=8)
        if random.random() < 0.15:
            person = -person
        vector = person + 0.02 * random.normal(size=8)
        clip = np.random.default_rng(int(random.integers(3)))
        tracks.append(
            Track(
                name=name,
                span="0",
                times=(0.0, 0.2),
                scores={"window_side": float(random.integers(400, 500))},
                embedding=tuple((vector / np.linalg.norm(vector)).tolist()),
                hashes=tuple((0.2 * i, 0.5, 0.4, clip.bytes(32).hex()) for i in range(14)),
            )
        )
    video = Video(
        identity=identity,
        video=f"v{number}",
        url=f"http://host/{random.integers(40)}",
        sha256=f"{random.integers(40)}",
        split=str(random.choice(["", "", "train", "test"])),
        tracks=tuple(tracks),
    )
    keys = [video.track_key(track) for track in tracks if random.random() < 0.9]
    frames = dict.fromkeys(keys, int(random.integers(3, 30)))
    return shards.Commit(
        video=video, tar_sha256="ab", slices=dict.fromkeys(keys, (0, 1)), frames=frames
    )


@pytest.mark.parametrize("seed", range(20))
def test_decided_in_a_stream_is_what_is_decided_of_all_at_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    people = sorted({f"id{random.integers(30)}" for _ in range(12)})
    commits = [
        made_commit(random, one, number)
        for one in people
        for number in range(random.integers(1, 5))
    ]
    config = config_of("out", identities=IdentitiesConfig(test_share=0.4))
    everyone = [track for one in commits for track in preprocess.candidates_of(one)]
    copies = quality.find_duplicates(everyone, config.quality)
    rest = [track for track in everyone if track.key not in copies]
    expected = {
        key: (decision.split, decision.cause, decision.detail)
        for key, decision in identities.decide(rest, config.identities).items()
    }
    listed = {track.key: track.split for track in everyone}
    expected |= {key: (listed[key], cause.value, detail) for key, (cause, detail) in copies.items()}
    samples, gone, means = preprocess.gather(commits, config)
    twins = identities.find_twins(means, config.identities.twin_threshold)
    splits, gone = identities.settle(samples, gone, twins, config.identities)
    found = {}
    for commit in commits:
        found |= preprocess.decisions(commit, splits, gone)
    assert found == expected
    assert len({cause for _, cause, _ in found.values()}) >= 3
    kept = {item.key for _, _, item in samples.kept(splits, gone)}
    assert kept == {key for key, (_, cause, _) in expected.items() if not cause}


@pytest.mark.parametrize(("cores", "actors"), [(1, 7), (2, 7), (4, 11), (32, 52)])
def test_pools_of_one_machine_have_their_share_of_its_cores(cores: int, actors: int) -> None:
    config = preprocess.on_one_machine(config_of("out"), cores)
    pools = [stage.resources for stage in config.stages]
    assert sum(pool.min_actors for pool in pools) == actors
    assert all(1 <= pool.min_actors <= pool.max_actors for pool in pools)
    assert config.identities.resources.min_actors == max(pool.min_actors for pool in pools)
    assert config.quality.resources.max_actors == config.shards.resources.max_actors == 1
    assert config.recipe == config_of("out").recipe


def test_a_pool_that_the_user_sized_stays() -> None:
    wanted = replace(DownloadConfig().resources, min_actors=3, max_actors=3)
    config = config_of("out", download=replace(DownloadConfig(), resources=wanted))
    assert preprocess.on_one_machine(config, 64).download.resources == wanted
    assert preprocess.on_fixed_cluster(config, [32, 32]).download.resources == wanted
    begun = replace(DownloadConfig().resources, first_actors=1)
    config = config_of("out", download=replace(DownloadConfig(), resources=begun))
    assert preprocess.on_one_machine(config, 64).download.resources == begun
    assert preprocess.on_fixed_cluster(config, [32, 32]).download.resources == begun


@pytest.mark.parametrize("rooms", [[], [5.0], [6.0], [6.0, 6.0], [8.0, 8.0, 4.0], [16.0] * 6])
def test_pools_of_a_fixed_cluster_fit_it_and_what_a_lost_node_leaves(rooms: list[float]) -> None:
    """No CPU is left over in the beginning, and none would help another stage more; what stays fits without the largest node."""
    least = config_of("out")
    config = preprocess.on_fixed_cluster(least, rooms)
    pools = {name: getattr(config, name).resources for name in preprocess.SHARES}
    needed = least.minimum_cpus - 1
    taken = sum(pool.first_actors * pool.num_cpus for pool in pools.values())
    assert sum(rooms) - 1 < taken <= max(sum(rooms), needed)
    kept = sum(pool.min_actors * pool.num_cpus for pool in pools.values())
    assert kept <= max(sum(rooms) - max(rooms, default=0), needed) or len(rooms) == 1
    assert all(1 <= pool.min_actors <= pool.first_actors for pool in pools.values())
    assert pools["quality"].first_actors == pools["shards"].first_actors == 1
    growing = {name: pool for name, pool in pools.items() if pool.first_actors < pool.max_actors}
    worst = max(preprocess.SHARES[name] / pool.first_actors for name, pool in growing.items())
    for name, pool in growing.items():
        if pool.first_actors > 1:
            assert preprocess.SHARES[name] / (pool.first_actors - 1) >= worst
    assert config.recipe == least.recipe


def test_pools_on_gpus_are_not_sized_by_cpus() -> None:
    pool = StageResources(num_gpus=0.5, num_cpus=0.5)
    config = config_of("out", annotate=AnnotateConfig(resources=pool))
    assert preprocess.on_fixed_cluster(config, [64, 64]).annotate.resources.first_actors == 1


def test_more_gpus_than_will_ever_be_there_are_refused() -> None:
    pool = StageResources(num_gpus=0.5)
    config = config_of("out", annotate=AnnotateConfig(resources=pool))
    preprocess.require_gpus(config, 0.5)
    preprocess.require_gpus(config_of("out"), 0)
    with pytest.raises(
        ConfigError, match=r"--annotate.resources.num-gpus 0.5: an actor .* 0.5 GPUs"
    ):
        preprocess.require_gpus(config, 0)
    preprocess.require_gpus(replace(config, stop_after="crops"), 0)
    preprocess.require_gpus(replace(config, replay="tracks"), 0)
    with pytest.raises(ConfigError, match="annotate"):
        preprocess.require_gpus(replace(config, replay="annotate"), 0)
    # as many actors as its cores would have are wanted, but one is enough
    preprocess.require_gpus(preprocess.on_one_machine(config, 64), 0.5)
    assert preprocess.on_one_machine(config, 64).annotate.resources == pool


def test_nothing_usable_names_an_example_of_each_cause() -> None:
    tally = preprocess.Tally()
    row = {
        "kind": "video", "identity": "anna", "split": "", "frames": 0, "dropped": [],
        "state": "rejected", "stage": "list", "cause": "unsafe",
    }  # fmt: skip
    tally.see(row | {"key": "anna-one", "detail": "'/x.mp4' is a path: --download.allow-local"})
    tally.see(row | {"key": "anna-two", "detail": "another"})
    told = tally.example("list: unsafe")
    assert told == ", as anna-one: '/x.mp4' is a path: --download.allow-local"
