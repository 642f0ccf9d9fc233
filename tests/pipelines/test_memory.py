"""What the driver holds: one arena for all threads, nothing taken that is in use, few videos of a long list."""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import memory, preprocess, shards
from pipelines.preprocess import VIDEOS_AT_ONCE, PreprocessConfig
from pipelines.progress import Progress
from pipelines.schema import Video

NUM_ARENAS = """
import ctypes, re, sys, tempfile, threading
from pipelines import memory

if sys.argv[1] == "held":
    memory.hold_little()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
alive = threading.Barrier(9)

def allocate():
    libc.malloc(1000)
    alive.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
alive.wait()
with tempfile.NamedTemporaryFile("r") as told:
    file = ctypes.c_void_p(libc.fopen(told.name.encode(), b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
    print(len(re.findall("<heap nr", told.read())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_threads_share_one_arena() -> None:
    def count(how: str) -> int:
        command = [sys.executable, "-c", NUM_ARENAS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert count("held") == 1
    assert count("free") > 1


def test_arrow_takes_memory_from_the_c_library() -> None:
    command = "import jobs, pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    told = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert told.stdout.strip() == "system"


def test_giving_back_takes_nothing_that_is_in_use() -> None:
    held = [bytes([number]) * 1000 for number in range(200)]
    memory.give_back()
    assert [text[0] for text in held] == list(range(200))


class Plan:
    """In the place of Ray Data's plan of a window; counts the videos that are objects while it runs."""

    held: list[int]

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        self.held.append(sum(type(item) is Video for item in gc.get_objects()))
        nothing = {
            "cause": "",
            "frames": 0,
            "seconds": json.dumps({}),
            "stage_frames": json.dumps({}),
        }
        return ({"key": key, "state": "open"} | nothing for key in self.keys)


@pytest.mark.slow
def test_windows_are_full_of_work_and_their_videos_are_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path)

    names = [f"{number:04d}" for number in range(2400)]
    done = [f"a-{name}" for name in names[:900] if int(name) % 30]
    monkeypatch.setattr(shards, "committed", lambda _: ((key, "done") for key in done))
    windows: list[list[str]] = []
    monkeypatch.setattr(Plan, "held", [], raising=False)

    def build(videos: Iterable[Video], _: PreprocessConfig) -> Plan:
        windows.append([video.key for video in videos])
        return Plan(windows[-1])

    monkeypatch.setattr(preprocess, "build_plan", build)
    config = PreprocessConfig(input="list", output=output, window=1000)
    progress = Progress(lambda _: None)
    videos = (Video(identity="a", video=name) for name in names)
    listed, _, count = preprocess.process(config, videos, progress)
    todo = sorted({f"a-{name}" for name in names} - set(done))
    assert [len(window) for window in windows] == [1000, len(todo) - 1000]
    assert [key for window in windows for key in window] == todo
    assert (len(listed), count, progress.before) == (2400, len(todo), len(done))
    assert max(Plan.held) <= 2 * VIDEOS_AT_ONCE + 2
