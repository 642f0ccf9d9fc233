#!/usr/bin/env python
"""How fast samples come from shards, against the JPEG decoder alone, whole mp4 clips, and a folder of PNG frames.

A pair is two frames of one track, 256 x 256 px, decoded to uint8 RGB and stacked into a batch of 32: what every loader does
before any model's own crops. All four loaders take turns in one process on one thread, on the same frames; what comes from shards is
compared with what the decoder alone gives. Files were just written: they come from memory.

    shards     draw a pair, two range reads, decode, stack: pipelines/reader.py and samples.py as training uses them
    ceiling    cv2.imdecode of the same JPEGs, already in memory, and nothing else
    mp4        decode a whole clip to floats and take two frames, as first-order-model does with files
    png        two files of a folder of PNG frames, as first-order-model does with folders

Then the Aligner's whole batches (512 px, crops and augmentation included), and the time to the first batch of a dataset of
1,000 shards. Pictures are a moving portrait (scikit-image's astronaut). JPEGs are coded as pipelines/crops.py does, PNGs with
imageio, as video-preprocessing does.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import skimage.data
import skimage.io
import skimage.util
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipelines import shards, storage
from pipelines.crops import CropsConfig
from pipelines.reader import Reader
from pipelines.samples import decode, generator
from pipelines.samples_aligner import (
    AlignerSamples,
    AlignerSamplesConfig,
    draw,
    num_sources,
)
from pipelines.schema import SCHEMA_VERSION, Member, frame_member, npy_bytes

Pairs = Iterator[NDArray[np.uint8]]
PAIRS_SIZE, ALIGNER_SIZE, BATCH = 256, 512, 32
TARGETS = {"ceiling": 0.8, "mp4": 100.0, "png": 5.0}
"""Pairs a second from shards must be at least this many times the other's."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the material and of the measurement."""

    tracks: int = 24
    """Tracks of the dataset at 256 px."""
    frames: int = 160
    """Frames of each, and of each mp4 clip."""
    seconds: float = 4.0
    """Of each round of each loader."""
    rounds: int = 3
    """Rounds; loaders take turns, the best round counts."""
    many_shards: int = 1000
    """Shards of the dataset whose first batch is timed."""
    markdown: Path | None = None
    """Write the tables there too."""


# --- material ---------------------------------------------------------------------------------------------------


def portrait(size: int, number: int, frame: int) -> NDArray[np.uint8]:
    """A frame of a track: the astronaut turned and moved a little."""
    angle, zoom = 8 * np.sin(0.1 * frame + number), size / (300 + 20 * np.cos(0.07 * frame))
    matrix = cv2.getRotationMatrix2D((223, 140), angle, zoom)
    matrix[:, 2] += np.array([size / 2 - 223, size / 2 - 140])
    image = skimage.data.astronaut()
    turned = cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REFLECT)
    return np.asarray(turned, dtype=np.uint8)


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """As pipelines/crops.py codes windows."""
    flags = [
        cv2.IMWRITE_JPEG_QUALITY,
        CropsConfig().jpeg_quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    return cv2.imencode(".jpg", image[..., ::-1], flags)[1].tobytes()


def landmarks(size: int) -> NDArray[np.float32]:
    """Points (68, 2) that span a face in the middle; only their places matter here."""
    rng = np.random.default_rng(0)
    points = 0.5 + 0.1 * rng.uniform(-1, 1, (68, 2))
    points[36:42] = [0.44, 0.42]
    points[42:48] = [0.56, 0.42]
    points[[30, 48, 54]] = [[0.5, 0.5], [0.45, 0.57], [0.55, 0.57]]
    return (points * size).astype(np.float32)


def sample(key: str, images: list[bytes], size: int, labels: bytes | None) -> list[Member]:
    """The members of one track, in the order of docs/formats.md."""
    n = len(images)
    indices = list(range(0, 5 * n, 5))
    identity, video, track = key.split("-")
    record = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "identity": identity,
        "video": video,
        "track": track,
        "url": "",
        "fps": 25.0,
        "width": 1920,
        "height": 1080,
        "indices": indices,
        "times": [i / 25 for i in indices],
        "boxes": [[400.0, 300.0, 800.0, 700.0]] * n,
        "scores": {"inside": 1.0},
    }
    matrix = np.array([[size / 1000, 0, -size * 0.4], [0, size / 1000, 0]], np.float32)
    arrays = {
        "landmarks": np.tile(landmarks(size), (n, 1, 1)),
        "matrix": np.tile(matrix, (n, 1, 1)),
        "scores": np.ones((n, 9), np.float32),
        "embedding": np.ones((n, 128), np.float32),
    }
    members = [(f"{key}.json", json.dumps(record).encode())]
    members += [(f"{key}.{name}.npy", npy_bytes(array)) for name, array in arrays.items()]
    for index, image in zip(indices, images, strict=True):
        members.append((frame_member(key, index), image))
        if labels:
            members.append((frame_member(key, index, "png"), labels))
    return members


def publish(output: str, tracks: list[list[Member]], num_shards: int, size: int) -> None:
    """Tracks as a dataset, through the real writers of shards, index and manifest."""
    records = []
    for number in range(num_shards):
        chosen = tracks[number::num_shards]
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "shard.tar"
            local.write_bytes(b"".join(map(shards.tar_sample, chosen)) + shards.TAR_END)
            keys = [members[0][0].removesuffix(".json") for members in chosen]
            records.append(shards.put_shard(local, "train", number, keys, output))
    listing = [
        {name: record[name] for name in ("name", "split", "bytes", "sha256")} for record in records
    ]
    manifest = {
        "format": "headray",
        "schema_version": SCHEMA_VERSION,
        "members": {"size": size},
        "shards": listing,
        "index": shards.write_index(records, output),
    }
    shards.write_manifest(manifest, output, shards.manifest_version(output))


def write_clip(path: Path, images: list[NDArray[np.uint8]]) -> None:
    """H.264 as video-preprocessing writes its clips."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


# --- loaders ----------------------------------------------------------------------------------------------------


def from_shards(dataset: str) -> Pairs:
    """The reader of this repository."""
    reader, config = Reader(dataset, "train"), AlignerSamplesConfig()
    for first in itertools.count(0, BATCH):
        draws = [
            draw(reader, config, generator(config.seed, number), 1)
            for number in range(first, first + BATCH)
        ]
        frames = [frame for drawn in draws for frame in (drawn.sources[0], drawn.target)]
        contents = reader.read([reader.picture(*frame) for frame in frames])
        images = np.empty((len(frames), PAIRS_SIZE, PAIRS_SIZE, 3), np.uint8)
        for place, (content, (track, _)) in enumerate(zip(contents, frames, strict=True)):
            images[place] = decode(content[0], reader.window, PAIRS_SIZE, reader.keys[track])
        yield images


def decode_only(dataset: str) -> Pairs:
    """The decoder, on JPEGs in memory that come in the same order."""
    reader, config = Reader(dataset, "train"), AlignerSamplesConfig()
    draws = [
        draw(reader, config, generator(config.seed, number), 1) for number in range(20 * BATCH)
    ]
    frames = [frame for drawn in draws for frame in (drawn.sources[0], drawn.target)]
    contents = reader.read([reader.picture(*frame) for frame in frames])
    buffers = [np.frombuffer(content[0], np.uint8) for content in contents]
    for first in itertools.cycle(range(0, len(buffers), 2 * BATCH)):
        chosen = buffers[first : first + 2 * BATCH]
        yield [cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB) for buffer in chosen]  # type: ignore[misc]


def from_clips(folder: Path) -> Pairs:
    """``read_video`` of first-order-model: all frames of a file to floats, then two of them."""
    paths, rng = sorted(folder.glob("*.mp4")), np.random.default_rng(0)
    while True:
        images = []
        with av.open(str(paths[rng.integers(len(paths))])) as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        video = skimage.util.img_as_float32(np.stack(frames))
        images = [video[i] for i in rng.choice(len(video), 2, replace=False)]
        yield np.stack(images)


def from_folders(folder: Path) -> Pairs:
    """``FramesDataset`` of first-order-model on folders: list the folder, read two files, to floats."""
    folders, rng = sorted(path for path in folder.iterdir() if path.is_dir()), np.random.default_rng(0)  # fmt: skip
    while True:
        chosen = folders[rng.integers(len(folders))]
        names = sorted(os.listdir(chosen))  # noqa: PTH208
        images = [
            skimage.util.img_as_float32(skimage.io.imread(chosen / names[i]))
            for i in rng.choice(len(names), 2, replace=False)
        ]
        yield np.stack(images)


def pairs_per_second(pairs: Pairs, seconds: float) -> float:
    """Over at least ``seconds``."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        count += len(next(pairs)) // 2
    return count / passed


# --- measurements -----------------------------------------------------------------------------------------------


def measure_pairs(folder: Path, config: Config) -> dict[str, float]:
    """Pairs a second of each loader: the best of some rounds in which they take turns."""
    clips = folder / "clips"
    clips.mkdir()
    tracks = []
    for number in range(config.tracks):
        images = [portrait(PAIRS_SIZE, number, frame) for frame in range(config.frames)]
        coded = [jpeg(image) for image in images]
        tracks.append(sample(f"id{number:02d}-v0-000", coded, PAIRS_SIZE, None))
        if number < 4:
            write_clip(clips / f"{number}.mp4", images)
            (clips / str(number)).mkdir()
            for frame, image in enumerate(images):
                skimage.io.imsave(clips / str(number) / f"{frame:07d}.png", image)
    dataset = str(folder / "pairs")
    publish(dataset, tracks, 4, PAIRS_SIZE)
    one, other = next(from_shards(dataset)), next(decode_only(dataset))
    assert np.array_equal(one, np.stack(list(other)))
    loaders: dict[str, Callable[[], Pairs]] = {
        "shards": lambda: from_shards(dataset),
        "ceiling": lambda: decode_only(dataset),
        "mp4": lambda: from_clips(clips),
        "png": lambda: from_folders(clips),
    }
    best = dict.fromkeys(loaders, 0.0)
    for _ in range(config.rounds):
        for name, loader in loaders.items():
            pairs = loader()
            next(pairs)
            best[name] = max(best[name], pairs_per_second(pairs, config.seconds))
    return best


def measure_aligner(folder: Path, config: Config) -> dict[str, float]:
    """Samples a second of the Aligner's batches at 512 px in this process, and of its parts."""
    labels = np.zeros((ALIGNER_SIZE, ALIGNER_SIZE), np.uint8)
    cv2.circle(labels, (256, 256), 180, 17, -1)
    png = cv2.imencode(".png", labels)[1].tobytes()
    tracks = []
    for number in range(8):
        coded = [jpeg(portrait(ALIGNER_SIZE, number, frame)) for frame in range(24)]
        tracks.append(sample(f"id{number:02d}-v0-000", coded, ALIGNER_SIZE, png))
    dataset = str(folder / "aligner")
    publish(dataset, tracks, 2, ALIGNER_SIZE)
    rates = {}
    plain = AlignerSamplesConfig(loaders=0)
    none = replace(plain.augment, max_photometric=0, scale=0.0, shift=0.0)
    for name, chosen in [
        ("K 1 to 8", plain),
        ("K = 4", replace(plain, min_sources=4, max_sources=4)),
        ("K = 4, no augmentation", replace(plain, min_sources=4, max_sources=4, augment=none)),
        ("K = 4, 256 px", replace(plain, min_sources=4, max_sources=4, output_size=256)),
    ]:
        samples = AlignerSamples(chosen, dataset, "train")
        numbers = itertools.count()
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < 2 * config.seconds:
            first = next(numbers) * 8
            wanted = [(first + i, num_sources(chosen, first)) for i in range(8)]
            count += len(samples.batch(wanted))
        rates[name] = count / passed
    return rates


def measure_start(folder: Path, config: Config) -> dict[str, float]:
    """Seconds to the first batch of a dataset with many shards, in a process of its own.

    The index is as large as in production: 25 tracks of 200 frames with labels a shard, 0.6 GB each. The shards are sparse
    files; only what the first batches will read is written into them.
    """
    dataset = str(folder / "many")
    rng = np.random.default_rng(0)
    n, tracks = 200, 25
    frames = [f"{5 * i:06d}.{kind}" for i in range(n) for kind in ("jpg", "png")]
    names = ["json", "landmarks.npy", "matrix.npy", "scores.npy", "embedding.npy", *frames]
    fixed = [20_000, 128 + n * 544, 128 + n * 24, 128 + n * 36, 128 + n * 512]
    tables, listing = [], []
    (folder / "many" / "shards").mkdir(parents=True)
    for number in range(config.many_shards):
        sizes = np.empty((tracks, len(names)), np.int64)
        sizes[:, :5] = fixed
        sizes[:, 5::2] = rng.integers(140_000, 160_000, (tracks, n))
        sizes[:, 6::2] = rng.integers(4_000, 8_000, (tracks, n))
        blocks = 512 + (sizes + 511) // 512 * 512
        offsets = 512 + np.append(0, np.cumsum(blocks)[:-1])
        name = f"train-{number:05d}-{number:012x}.tar"
        total = int(blocks.sum()) + len(shards.TAR_END)
        with (folder / "many" / "shards" / name).open("wb") as file:
            file.truncate(total)
        listing.append({"name": name, "split": "train", "bytes": total, "sha256": "0" * 64})
        bounds = pa.array(np.arange(tracks + 1) * len(names), pa.int32())
        own = [f"id{number:05d}", f"id{number + config.many_shards:05d}"]
        columns = {
            "key": [f"{own[t % 2]}-v{t:02d}-000" for t in range(tracks)],
            "identity": [own[t % 2] for t in range(tracks)],
            "video": [f"v{t:02d}" for t in range(tracks)],
            "track": ["000"] * tracks,
            "split": ["train"] * tracks,
            "shard": [name] * tracks,
            "frames": [n] * tracks,
            "url": ["https://video.example/watch?v=x"] * tracks,
            "start": [0.0] * tracks,
            "end": [40.0] * tracks,
            "fps": [25.0] * tracks,
            "scores": [[("inside", 1.0)]] * tracks,
            "members": pa.ListArray.from_arrays(bounds, pa.array(names * tracks)),
            "offsets": pa.ListArray.from_arrays(bounds, pa.array(offsets)),
            "sizes": pa.ListArray.from_arrays(bounds, pa.array(sizes.ravel())),
        }
        tables.append(pa.table(columns, schema=shards.INDEX_SCHEMA))
    manifest = {
        "format": "headray",
        "schema_version": SCHEMA_VERSION,
        "members": {"size": ALIGNER_SIZE},
        "shards": listing,
        "index": shards.write_index_tables(tables, dataset),
    }
    shards.write_manifest(manifest, dataset, shards.manifest_version(dataset))
    fill_first_batches(dataset, AlignerSamplesConfig(), n)
    code = (
        "import sys, time\n"
        "from pipelines.samples_aligner import AlignerSamplesConfig, aligner_batches\n"
        "called = time.time()\n"
        "next(aligner_batches(AlignerSamplesConfig(), sys.argv[1], samples_seen=0, rank=0, world_size=1))\n"
        "print(called, time.time())"
    )
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code, dataset],
        capture_output=True,
        check=True,
        text=True,
    )
    called, first = map(float, done.stdout.split())
    return {
        "members in the index, millions": config.many_shards * tracks * len(names) / 1e6,
        "index.parquet, MB": storage.size(storage.join(dataset, shards.INDEX)) / 1e6,
        "imports, s": called - begun,
        "from aligner_batches to the first batch, s": first - called,
        "from the start of the process to the first batch, s": first - begun,
    }


def fill_first_batches(dataset: str, config: AlignerSamplesConfig, frames: int) -> None:
    """Write what the batches that the loaders make at once will read."""
    labels = cv2.imencode(".png", np.ones((ALIGNER_SIZE, ALIGNER_SIZE), np.uint8))[1].tobytes()
    (_, record), (_, points), (_, matrix), *_ = sample(
        "id-v-000", [b""] * frames, ALIGNER_SIZE, None
    )
    image = jpeg(portrait(ALIGNER_SIZE, 0, 0))
    samples = AlignerSamples(config, dataset, "train")
    ahead = config.loaders * config.prefetch * config.batch_size
    for number in range(ahead):
        sources = num_sources(config, number - number % config.batch_size)
        drawn = draw(samples.reader, config, generator(config.seed, number), sources)
        for piece in samples.pieces(drawn):
            contents = [image]
            if piece.first == 0:
                contents = [record.ljust(20_000), points, matrix]
            elif piece == samples.reader.labels(*drawn.target):
                contents = [labels]
            elif piece.first == 1:
                contents = [points]
            shard, offsets, sizes = samples.reader.where(piece)
            with Path(shard).open("rb+") as file:
                for content, offset, size in zip(contents, offsets, sizes, strict=True):
                    assert len(content) <= size, (piece, len(content), size)
                    file.seek(offset)
                    file.write(content)


# --- tables -----------------------------------------------------------------------------------------------------


def machine() -> str:
    """Cores and kind of processor."""
    kinds = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(kinds)} cores, {kinds[0]}, Python {platform.python_version()}, torch {torch.__version__}"


def tables(
    pairs: dict[str, float], aligner: dict[str, float], start: dict[str, float]
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and rows of each table."""
    ratios = [
        [name, f"{rate:,.1f}", f"{pairs['shards'] / rate:.2f}", f"{TARGETS.get(name, 1):g}"]
        for name, rate in pairs.items()
    ]
    yield (
        "Pairs of 256 px, one thread",
        ["loader", "pairs/s", "shards / this", "wanted"],
        ratios,
    )
    yield (
        "Aligner samples at 512 px, one thread",
        ["sample", "samples/s"],
        [[name, f"{rate:.1f}"] for name, rate in aligner.items()],
    )
    yield (
        "Start, 4 loaders",
        ["what", "value"],
        [[name, f"{value:.2f}"] for name, value in start.items()],
    )


def main(config: Config) -> None:
    """Measure and print."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    console = Console()
    lines = []
    with tempfile.TemporaryDirectory(prefix="headray-benchmark-") as name:
        folder = Path(name)
        pairs = measure_pairs(folder, config)
        aligner = measure_aligner(folder, config)
        start = measure_start(folder, config)
    console.print(machine())
    lines.append(machine())
    for title, heads, rows in tables(pairs, aligner, start):
        table = Table(*heads, title=title)
        lines += ["", f"**{title}**", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in rows:
            table.add_row(*row)
            lines.append(f"| {' | '.join(row)} |")
        console.print(table)
    if config.markdown:
        config.markdown.write_text("\n".join(lines) + "\n")
    missed = [other for other, times in TARGETS.items() if pairs["shards"] < times * pairs[other]]
    if missed:
        console.print(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
