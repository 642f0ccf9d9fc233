#!/usr/bin/env python
"""Time per face of the landmarkers: ours, batched, against face-alignment's own call on the same faces in the same run.

    python benchmarks/landmarks.py --random-weights
    python benchmarks/landmarks.py --faces 64 --flip          # with 2DFAN-4's weights, on a GPU if there is one

Contenders take turns in every repeat, so that what else the machine does hits them alike; the table shows medians, of the time
on the wall and of the processor's time, which is the better judge on one thread of a machine that others use, too. Speed does
not depend on the weights; what the points are worth with random ones, nothing.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.frozen import weights
from models.frozen.chips import invert, transform, warp
from models.frozen.landmarks import (
    FAN_SIZE,
    FanConfig,
    FanLandmarker,
    Landmarker,
    fan_matrix,
    load_landmarker,
)

FACE = np.array([179.0, 83, 267, 171])
"""Where a face would be in a picture of noise: time does not depend on what is seen."""
THEIRS = "face-alignment, its call"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is timed."""

    faces: int = 4
    """Faces given to each contender in one turn, one to a frame; on a GPU take at least 64."""
    face_px: int = 300
    """Side of the face box in frames of 1920 x 1080."""
    repeats: int = 5
    """Turns, after one that does not count."""
    threads: int = 1
    """Of torch and OpenCV."""
    flip: bool = False
    """Average over the mirror image."""
    compile: bool = False
    """Let face-alignment compile its network, as it does by default; wants a C++ compiler and some minutes."""
    random_weights: bool = False
    """Time 2DFAN-4 without its weights, where they cannot be had."""
    others: bool = True
    """Also face-alignment's own call, and dlib; without them only 2DFAN-4's network is needed of that package."""


def frames(config: BenchmarkConfig) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One picture at slightly different places of black frames, and the box (1, 4) in each."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    picture = np.asarray(cv2.resize(noise, (512, 512)), np.uint8)
    scale = config.face_px / (FACE[2] - FACE[0])
    pictures, boxes = [], []
    for i in range(config.faces):
        shift = np.array([700.0 + 3 * i, 350.0 + 2 * i]) - scale * FACE[:2]
        matrix = np.column_stack([scale * np.eye(2), shift])
        pictures.append(warp(picture, matrix, (1920, 1080)))
        boxes.append(transform(matrix, FACE.reshape(2, 2)).reshape(1, 4))
    return pictures, boxes


def their_box(box: np.ndarray) -> np.ndarray:
    """The box for which face-alignment cuts the square that :func:`fan_matrix` cuts."""
    corners = transform(invert(fan_matrix(box)), [[0, 0], [FAN_SIZE, FAN_SIZE]])
    side = 195 / 200 * (corners[1] - corners[0]) / 2
    middle = corners.mean(axis=0) + np.array([0, 0.12 * side[1]])
    return np.concatenate([middle - side / 2, middle + side / 2])


def theirs(config: BenchmarkConfig, state: Path, dtype: torch.dtype) -> Callable[..., object]:
    """face-alignment's own object with our weights file where it looks for its own."""
    import face_alignment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / weights.REGISTRY["fan"].file).symlink_to(state)
        torch.hub.set_dir(folder)
        try:
            network = face_alignment.FaceAlignment(
                face_alignment.LandmarksType.TWO_D,
                device=device,
                dtype=dtype,
                flip_input=config.flip,
                face_detector="folder",
                compile=config.compile,
            )
        finally:
            torch.hub.set_dir(before)

    def locate(images: list[np.ndarray], boxes: list[np.ndarray]) -> None:
        for image, (box,) in zip(images, boxes, strict=True):
            network.get_landmarks_from_image(image, detected_faces=[their_box(box)])

    return locate


def contenders(config: BenchmarkConfig, folder: Path) -> dict[str, Callable[..., object]]:
    """Name → a call with frames and their boxes."""
    state = folder / "fan.pth"
    if config.random_weights:
        if config.others:
            from face_alignment.models import FAN

            torch.manual_seed(0)
            torch.save(FAN(4).state_dict(), state)
    else:
        state = weights.find("fan")

    def ours(precision: str) -> Landmarker:
        settings = FanConfig(flip=config.flip, precision=precision)  # type: ignore[arg-type]
        return FanLandmarker(settings, random_init=config.random_weights)

    def one_by_one(images: list[np.ndarray], boxes: list[np.ndarray]) -> None:
        for pair in zip(images, boxes, strict=True):
            single.locate(*pair)

    single = FanLandmarker(FanConfig(flip=config.flip), random_init=config.random_weights)
    single.batch = 1
    calls: dict[str, Callable[..., object]] = {
        "fan fp32, one by one": one_by_one,
        "fan fp32": ours("fp32").locate_many,
        "fan bf16": ours("bf16").locate_many,
    }
    if not config.others:
        return calls
    return {
        THEIRS: theirs(config, state, torch.float32),
        f"{THEIRS} in bf16": theirs(config, state, torch.bfloat16),
        **calls,
        "dlib": load_landmarker("dlib").locate_many,
    }


def measure(config: BenchmarkConfig) -> dict[str, list[tuple[float, float]]]:
    """Seconds a face of every turn, on the wall and of processors, by landmarker."""
    torch.set_num_threads(config.threads)
    cv2.setNumThreads(config.threads)
    images, boxes = frames(config)
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        calls = contenders(config, Path(folder))
    for turn in range(config.repeats + 1):
        for name, call in calls.items():
            start, worked = time.perf_counter(), time.process_time()
            call(images, boxes)  # ends with points in numpy: nothing is left running on a GPU
            spent = time.perf_counter() - start, time.process_time() - worked
            if turn:
                seconds.setdefault(name, []).append(
                    (spent[0] / config.faces, spent[1] / config.faces)
                )
    return seconds


def main() -> None:
    """Time everybody and print the table."""
    import tyro
    from rich.console import Console
    from rich.table import Table

    config = tyro.cli(BenchmarkConfig, description=__doc__)
    medians = {name: np.median(turns, axis=0) for name, turns in measure(config).items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    table = Table(title=f"{device}, {config.threads} threads, {config}", title_justify="left")
    for column in ("landmarker", "ms a face", "times as fast", "CPU ms a face", "times as fast "):
        table.add_column(column, justify="left" if column == "landmarker" else "right")
    for name, middle in medians.items():
        wall, processor = middle
        gains = medians[THEIRS] / middle
        table.add_row(
            name,
            f"{1000 * wall:.1f}",
            f"{gains[0]:.2f}",
            f"{1000 * processor:.1f}",
            f"{gains[1]:.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    try:
        main()
    except weights.WeightsError as error:
        sys.exit(f"{error}; or time it with --random-weights")
