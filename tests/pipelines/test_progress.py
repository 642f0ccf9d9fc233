"""What a person and MLflow are told of a run that goes on; nothing that is told may hold the run up."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from pipelines import progress
from pipelines.limiter import Pause
from pipelines.progress import Progress, pause_line


def row(stages: tuple[str, ...], state: str = "open", cause: str = "") -> dict[str, Any]:
    """A committed video that went through these stages, two seconds in each, losing a frame in each."""
    return {
        "state": state,
        "cause": cause,
        "frames": 10 if state == "open" else 0,
        "seconds": json.dumps(dict.fromkeys(stages, 2.0)),
        "stage_frames": json.dumps({name: 20 - i for i, name in enumerate(stages)}),
    }


ALL = ("download", "tracks", "crops")


def test_series_count_every_stage_and_never_fall() -> None:
    points: list[tuple[int, dict[str, float]]] = []

    def record(values: Mapping[str, float], step: int) -> bool:
        points.append((step, dict(values)))
        return True

    with Progress(lambda _: None, record=record, record_seconds=0.02) as told:
        for _ in range(3):
            told.video(row(ALL))
            time.sleep(0.05)
        told.video(row(("download", "tracks"), "rejected", "track: no face"))
        told.video(row(("download",), "failed", "download: network"))
        told.video(row((), "rejected", "list: boxes"))
    steps, values = zip(*points, strict=True)
    assert len(points) >= 2
    assert list(steps) == sorted(steps)
    for before, after in itertools.pairwise(values):
        assert before != after
        assert all(after[name] >= value for name, value in before.items())
    assert values[-1] == told.series()
    assert values[-1] == {
        "progress/videos": 6,
        "progress/rejected": 2,
        "progress/failed": 1,
        "progress/frames": 30,
        "stage/download/videos": 5,
        "stage/download/seconds": 10,
        "stage/download/frames": 100,
        "stage/download/rejected": 1,
        "stage/tracks/videos": 4,
        "stage/tracks/seconds": 8,
        "stage/tracks/frames": 76,
        "stage/tracks/rejected": 1,
        "stage/crops/videos": 3,
        "stage/crops/seconds": 6,
        "stage/crops/frames": 54,
        "stage/list/rejected": 1,
    }


def test_points_come_no_faster_than_asked() -> None:
    times: list[float] = []

    def record(_values: Mapping[str, float], _step: int) -> bool:
        times.append(time.perf_counter())
        return True

    with Progress(lambda _: None, record=record, record_seconds=0.2) as told:
        for _ in range(50):
            told.video(row(ALL))
            time.sleep(0.01)
    assert len(times) < 50, "one point for many videos; the last, at the end, need not wait"
    assert all(later - sooner >= 0.19 for sooner, later in itertools.pairwise(times[:-1]))


def test_a_point_that_was_lost_is_made_up_for_by_the_next() -> None:
    points: list[dict[str, float]] = []

    def record(values: Mapping[str, float], _step: int) -> bool:
        points.append(dict(values))
        return len(points) > 2

    with Progress(lambda _: None, record=record, record_seconds=0.02) as told:
        told.video(row(ALL))
        time.sleep(0.3)
    assert len(points) == 3, "told again until it was taken, then not again"


def test_a_store_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "GIVE_UP_SECONDS", 0.2)
    forever = threading.Event()

    def hang(_values: Mapping[str, float], _step: int) -> bool:
        return forever.wait(60)

    started = time.perf_counter()
    with Progress(lambda _: None, record=hang, record_seconds=0.01) as told:
        time.sleep(0.05)
        for _ in range(1000):
            told.video(row(ALL))
        assert "1000 of" in told.line()
    assert time.perf_counter() - started < 30, "less than the store takes"
    forever.set()


# ---------------------------------------------------------------------------------------------- pauses

PAUSE = Pause(
    address="proxy 10.0.0.1:3128",
    site="youtube",
    cause="download: rate limited",
    blocks=1,
    seconds=90.0,
    under_way=3,
)


def test_a_pause_names_the_address_the_wait_and_what_is_under_way() -> None:
    told = pause_line(PAUSE)
    until = time.strftime("%H:%M", time.localtime(time.time() + 90))
    assert told.startswith(
        "address proxy 10.0.0.1:3128 is paused at youtube (rate limited, 1 in a row)"
    )
    assert "90 s left, until " in told
    assert until in told or time.strftime("%H:%M", time.localtime(time.time() + 88)) in told
    assert told.endswith("3 of its fetches under way")
    probe = Pause(**(vars(PAUSE) | {"seconds": 0.0, "under_way": 1}))
    assert "over, one video is tried" in pause_line(probe)


def test_a_pause_is_said_when_it_begins_grows_and_ends_and_in_every_line() -> None:
    said: list[str] = []
    now = [PAUSE]
    told = Progress(said.append, watch=lambda: now)
    told.look()
    told.look()
    assert len(said) == 1
    assert "is paused at youtube" in told.line()
    now = [Pause(**(vars(PAUSE) | {"blocks": 2, "seconds": 120.0}))]
    told.look()
    assert "2 in a row" in said[-1]
    now = []
    told.look()
    assert said[-1].endswith("address proxy 10.0.0.1:3128 goes on with youtube")
    assert len(said) == 3
    assert "paused" not in told.line()
