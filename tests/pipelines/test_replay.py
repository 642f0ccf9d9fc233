"""Rows that are saved come back equal, changes are told, and a stage replayed does what it did in the chain."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import demo
from pipelines import replay
from pipelines.output import ConfigError
from pipelines.preprocess import PreprocessConfig
from pipelines.schema import Cause, from_row, reject, reject_track, to_row
from tests.datasets import made_video
from tests.runs import run_job


def test_rows_on_disk_are_equal(tmp_path: Path) -> None:
    for made in (made_video("id1", "v0"), made_video("id1", "v1", tracks=0)):
        row = to_row(*made)
        replay.save_row(row, str(tmp_path))
        assert replay.load_row(str(tmp_path), row["key"]) == row
    assert len(list(tmp_path.iterdir())) == 2


def test_changes_are_told_and_the_clock_is_not() -> None:
    video, members = made_video("id1", "v0", tracks=2, frames=5)
    before = to_row(video, members)
    assert replay.changes(before, to_row(replace(video, seconds={"crops": 9.0}), members)) == []
    small = reject_track(video.tracks[1], Cause.CROP_SMALL, "210 px")
    thin = replace(
        video.tracks[0],
        times=video.tracks[0].times[1:],
        dropped={"quality: blurred": 1},
        scores=video.tracks[0].scores | {"inside": 0.25},
    )
    after = replace(video, tracks=(thin, small), versions={"landmarks": "fan"})
    fewer = [member for member in members if member[0].startswith("id1-v0-000.")]
    name, data = fewer[0]
    told = replay.changes(before, to_row(after, [(name, data + b"x"), *fewer[1:]]))
    assert "track 000: 5 → 4 frames" in told
    assert "track 000: 0 → 1 dropped, quality: blurred" in told
    assert "track 000: inside 0.9 → 0.25" in told
    assert "track 001: open → rejected (crop: small window: 210 px)" in told
    assert "versions changed" in told
    assert f"members: 0 added, {len(members) - len(fewer)} removed, 1 with other content" in told
    gone = replay.changes(before, to_row(reject(video, Cause.VIDEO_BLACK, "nothing")))
    assert gone[0] == "video: open → rejected (video: black: nothing)"


@pytest.mark.slow
def test_stop_after_and_replay(tmp_path: Path) -> None:
    """Crops replayed twice on saved rows is the same; with another configuration it says what became different."""
    videos = tmp_path / "videos" / "anna"
    videos.mkdir(parents=True)
    clip = demo.Clip(identity="anna", video="v", size=(960, 540), scale=1.25, seconds=2.4, seed=1)
    demo.make_corpus(tmp_path / "corpus", [clip])
    (tmp_path / "corpus" / "videos" / "v.mp4").rename(videos / "v.mp4")
    output = tmp_path / "out"
    same = (f"--input={tmp_path / 'videos'}", f"--output={output}", "--crops.min-window=100")
    code, text = run_job("preprocess", *same, "--stop-after=tracks", folder=tmp_path)
    assert code == 0, text
    (saved,) = (output / "work" / "rows" / "crops").iterdir()
    video, members = from_row(replay.load_row(str(saved.parent), saved.stem))
    assert video.seconds.keys() == {"download", "tracks"}
    assert video.state == "open"
    assert members
    assert all(name.endswith(".snapshot.jpg") for name, _ in members)
    assert not (output / "dataset.json").exists()
    assert not (output / "work" / "parts").exists()

    code, text = run_job("preprocess", *same, "--replay=crops", folder=tmp_path)
    assert code == 0, text
    assert re.search(r"members: \d+ added", text)
    code, text = run_job(
        "preprocess", *same[:2], "--crops.min-window=5000", "--replay=crops", folder=tmp_path
    )
    assert code == 0, text
    assert "since the last replay: video: open → rejected (crop: small window" in text
    assert "1 of 1 are not what the last replay made of them" in text
    made, _ = from_row(replay.load_row(f"{saved.parent}-replayed", saved.stem))
    assert made.cause == Cause.CROP_SMALL.value
    assert np.isfinite(made.tracks[0].scores["window_side"])


def test_nothing_to_replay_says_what_to_run(tmp_path: Path) -> None:
    config = PreprocessConfig(input="list", output=str(tmp_path), replay="quality")
    with pytest.raises(ConfigError, match="--stop-after identities"):
        replay.saved_keys(config)
