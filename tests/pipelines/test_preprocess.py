"""The chain without Ray: what is refused before it starts, what a killed run leaves, what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import preprocess, shards, storage
from pipelines.download import DownloadConfig
from pipelines.output import ConfigError
from pipelines.preprocess import PreprocessConfig, Progress
from pipelines.schema import Cause, Video, reject
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


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_output_that_is_no_folder_is_the_users(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match="cannot be used"):
        preprocess.check(config_of(str(tmp_path / name)))


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
    keys, _, count = preprocess.process(config_of(dataset), videos, quiet())
    assert (len(keys), count) == (len(videos), 0)


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
            row = {"state": "failed", "cause": "", "frames": 0, "seconds": json.dumps({})}
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
