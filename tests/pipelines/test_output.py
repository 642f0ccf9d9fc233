"""An output belongs to one configuration and one run at a time; what is dead holds nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.output import ConfigError, OutputLock, flatten, require_same_recipe


@pytest.fixture
def other() -> Iterator[psutil.Process]:
    """A process that is alive."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    yield psutil.Process(child.pid)
    assert child.stdin
    child.stdin.close()
    child.wait()


def held_by(output: Path, host: str, pid: int, at: float) -> OutputLock:
    """The lock of an output in which somebody has written a name."""
    lock = output / "work" / "lock.json"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(json.dumps({"host": host, "pid": pid, "time": at}))
    return OutputLock(str(output))


def enter(lock: OutputLock) -> bool:
    try:
        with lock:
            owner = json.loads(Path(lock.uri).read_text())
            assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    except ConfigError:
        return False
    assert not Path(lock.uri).exists()
    return True


def test_who_lives_holds_the_lock_and_who_is_dead_does_not(
    tmp_path: Path, other: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, begun = socket.gethostname(), other.create_time()
    assert not enter(held_by(tmp_path, here, other.pid, begun + 1))
    assert enter(held_by(tmp_path, here, other.pid, begun - 1)), "another process had its number"
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert enter(held_by(tmp_path, here, gone.pid, time.time()))
    assert enter(held_by(tmp_path, here, os.getpid(), time.time())), "this run was here before"
    monkeypatch.setattr(
        time, "sleep", lambda _: None
    )  # it waits for whoever may be writing just now
    (tmp_path / "work" / "lock.json").write_text('{"host": "a')
    assert enter(OutputLock(str(tmp_path))), "killed while it wrote its name"


def test_a_machine_that_is_silent_holds_nothing(tmp_path: Path) -> None:
    """Others are known by their beat, of which some may get lost."""
    assert not enter(held_by(tmp_path, "elsewhere", 1, time.time() - 60))
    assert enter(held_by(tmp_path, "elsewhere", 1, time.time() - 1000))
    waited = []

    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout)
            return True

    lock = OutputLock(str(tmp_path))
    lock._stop = Impatient()
    with lock:
        pass
    assert 0 < waited[0] <= lock.stale_seconds / 3


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    recipe = flatten({"a": {"b": 1, "c": (1, 2)}, "d": "x"})
    assert recipe == {"a.b": 1, "a.c": [1, 2], "d": "x"}
    require_same_recipe(str(tmp_path), recipe)
    config = {"a": {"b": 1, "c": [1, 2]}, "d": "x", "resources": 9}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    require_same_recipe(str(tmp_path), recipe)
    for changed, told in (
        (recipe | {"a.b": 2}, "a.b was 1, now 2"),
        (recipe | {"new": 3}, "new is younger than that and is 3 now"),
        (recipe | {"a.c": [2, 1]}, "a.c was"),
    ):
        with pytest.raises(ConfigError, match=told):
            require_same_recipe(str(tmp_path), changed)


def test_a_folder_with_other_things_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "lock.json").touch()
    require_same_recipe(str(tmp_path), {})
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["lock.json"]
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds files but no HeadRay config"):
        require_same_recipe(str(tmp_path), {})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a configuration of HeadRay"):
        require_same_recipe(str(tmp_path), {})
