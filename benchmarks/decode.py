#!/usr/bin/env python
"""decord, PyAV, and the choice between them that ``pipelines/video.py`` makes: the same frames of the same files.

Each file is read as the pipeline reads it, one thread each, in turns: *grid* is five frames a second in full size (what
crops asks for), *thumbs* is the same with a thumb of every frame (what tracks asks for, to see cuts). The three columns
of our reader go through its child process; *bare* columns call the library in this process for the frames of *grid*, with
nothing checked. Bare decord reads more files than ours lets it: some of its pictures are wrong (see pipelines/video.py).

    python benchmarks/decode.py --clips CLIPS
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import tyro
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

import av  # noqa: E402
import cv2  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from jobs import demo, runtime  # noqa: E402
from pipelines.tracks import grid_frames  # noqa: E402
from pipelines.video import (  # noqa: E402
    Decoder,
    DecoderConfig,
    VideoError,
    VideoInfo,
    for_every_frame,
    frame_times,
    probe,
)

ONE = {"decord": DecoderConfig(decoders=("decord",)), "PyAV": DecoderConfig(decoders=("pyav",))}
OURS = {"grid": DecoderConfig(), "thumbs": for_every_frame(DecoderConfig())}
"""As crops and tracks decode."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What is read."""

    clips: str = ""
    """Folder of videos. Empty: the good videos of the corpus that jobs/demo.py draws."""
    repeats: int = 5
    """Times that each file is read by each; the median counts."""
    frames_per_second: float = 5.0
    """Of the frames wanted in full size."""


@contextmanager
def material(config: DecodeConfig) -> Iterator[list[Path]]:
    """The files."""
    if config.clips:
        yield sorted(Path(config.clips).glob("*.mp4"))
        return
    with tempfile.TemporaryDirectory(prefix="headray-bench-") as folder:
        demo.make_corpus(Path(folder) / "made", [c for c in demo.CORPUS if not c.wanted])
        yield sorted((Path(folder) / "made" / "videos").glob("*.mp4"))


def cpu_now() -> float:
    """CPU seconds of this process and of its decoders."""
    own = psutil.Process()
    return sum(sum(one.cpu_times()[:4]) for one in [own, *own.children(recursive=True)])


def read(decoder: Decoder, path: Path, info: VideoInfo, wanted: list[int], thumbs: bool) -> int:
    """Frames that came."""
    frames = decoder.read(path, info, ranges=[(0, info.frames)], images=wanted, thumbs=thumbs)
    return sum(frame.image is not None for frame in frames)


def bare_decord(path: Path, wanted: list[int]) -> int:
    """Frames by decord's own way to pick frames."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    pictures: list[NDArray[Any]] = []
    for index in wanted:
        reader.seek_accurate(index)
        pictures[:] = [reader.next().asnumpy()]
    return len(wanted)


def bare_pyav(path: Path, wanted: list[int]) -> int:
    """Frames of a loop over all of the file."""
    chosen = set(wanted)
    count = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for index, frame in enumerate(container.decode(stream)):
            if index in chosen:
                count += frame.to_ndarray(format="rgb24").shape[2] == 3
    return count


def measure(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median wall clock and mean CPU seconds (they come in 10 ms) of each way, in turns; what fails is left out."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first one starts children and fills the page cache
        for name, way in ways.items():
            cpu, clock = cpu_now(), time.perf_counter()
            try:
                way()
            except (VideoError, RuntimeError):
                continue
            if turn:
                spent[name].append((time.perf_counter() - clock, cpu_now() - cpu))
    return {
        name: (median(clock for clock, _ in told), mean(cpu for _, cpu in told))
        for name, told in spent.items()
        if told
    }


def ways_of(
    path: Path, decoders: dict[str, Decoder], frames_per_second: float
) -> tuple[int, dict[str, dict[str, Callable[[], int]]]]:
    """How many frames are wanted of a file, and by kind of request everything that reads them."""
    info = probe(path)
    times = frame_times(path)
    chosen = grid_frames(times, float(times[0]), float(times[-1]), frames_per_second)
    wanted = [int(index) for index in chosen]

    def reads(kind: str, decoder: Decoder) -> Callable[[], int]:
        return lambda: read(decoder, path, info, wanted, kind == "thumbs")

    requests = {
        kind: {name: reads(kind, decoders[name]) for name in ONE}
        | {"ours": reads(kind, decoders[f"ours {kind}"])}
        for kind in OURS
    }
    requests["grid"] |= {
        "bare decord": lambda: bare_decord(path, wanted),
        "bare PyAV": lambda: bare_pyav(path, wanted),
    }
    return len(wanted), requests


def main() -> None:
    """Read everything, print a table for each kind of request."""
    config = tyro.cli(DecodeConfig, description=__doc__)
    cv2.setNumThreads(1)
    logging.getLogger("pipelines.video").setLevel(logging.ERROR)  # what decord is not asked for
    decoders = {name: Decoder(one) for name, one in ONE.items()}
    decoders |= {f"ours {kind}": Decoder(one) for kind, one in OURS.items()}
    columns = [*ONE, "ours", "bare decord", "bare PyAV"]
    tables = {}
    for kind in ("grid", "thumbs"):
        tables[kind] = Table(title=f"{kind}: CPU ms a file (wall clock ms)", title_justify="left")
        for column in ("file", "wanted", *columns, "ours took", "ours / faster"):
            tables[kind].add_column(column, justify="left" if column == "file" else "right")
    sums: dict[str, dict[str, float]] = {"grid": {}, "thumbs": {}}
    with material(config) as paths:
        for path in paths:
            try:
                count, requests = ways_of(path, decoders, config.frames_per_second)
            except VideoError as error:
                runtime.console.print(f"{path.name}: left out, {error}")
                continue
            for kind, ways in requests.items():
                told = measure(ways, config.repeats)
                fastest = min(told[name][1] for name in ONE if name in told)
                cells = [
                    f"{1000 * told[name][1]:.0f} ({1000 * told[name][0]:.0f})"
                    if name in told
                    else "-"
                    for name in columns
                ]
                tables[kind].add_row(
                    path.name,
                    str(count),
                    *cells,
                    decoders[f"ours {kind}"].used,
                    f"{fastest / told['ours'][1]:.2f}",
                )
                both = {"ours": told["ours"][1], "the faster of the two": fastest}
                both |= {name: told[name][1] for name in columns if name in told}
                for name, seconds in both.items():
                    sums[kind][name] = sums[kind].get(name, 0.0) + seconds
    for kind, table in tables.items():
        runtime.console.print(table)
        totals = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sums[kind].items())
        ratio = sums[kind]["the faster of the two"] / sums[kind]["ours"]
        runtime.console.print(
            f"{kind}: CPU seconds of all files: {totals}; ours is {ratio:.2f} of the faster"
        )
    for decoder in decoders.values():
        decoder.close()


if __name__ == "__main__":
    main()
