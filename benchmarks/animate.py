"""What one animated frame costs: the whole forward pass, with the source cached, batched, in bf16, compiled.

    python benchmarks/animate.py --threads 4 --compile

Prints a table in Markdown. Two floors: the decoders alone (the same convolutions on ready inputs, without Add Motion's
inputs, patches, composition and warps), and the multiply-accumulates at the rate of this machine's best matrix product.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.motion.dense import LocalMotion
from models.motion.layout import PARTS
from models.motion.network import Motion, MotionCache, MotionConfig
from models.updates import Precision, autocast

PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Decoders(nn.Module):
    """Every convolution that a frame cannot do without, and nothing between them."""

    def __init__(self, model: Motion) -> None:
        super().__init__()
        self.model = model

    def forward(self, cache: MotionCache, driving: Tensor) -> Tensor:
        """As ``Motion.drive``, but flows go nowhere and the generator decodes the source's own features."""
        dense, motion = self.model.dense, cache.motion
        trunk = dense.global_motion.trunk
        features = trunk.decoder(motion.encoded[-1], motion.encoded[:-1], driving.flatten(1))
        dense.global_motion.displacement(features)
        for name in PARTS:
            local, part = cast(LocalMotion, dense.local_motions[name]), motion.parts[name]
            local.head(local.trunk.decoder(part.encoded[-1], part.encoded[:-1], part.vector))
        return self.model.generator.decode(cache.features)


def medians(
    works: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Median milliseconds of each, run in turns so that a busy machine slows all alike; two rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for index in range(repeats + 2):
        for name, work in works.items():
            _finish(device)
            began = time.perf_counter()
            work()
            _finish(device)
            if index >= 2:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def best_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-accumulates per second of a 2048-cubed matrix product."""
    side = 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 1e3 * side**3 / medians({"": lambda: a @ a}, device, 10)[""]


def macs(work: Callable[[], object]) -> float:
    """Multiply-accumulates of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


class Counted(NamedTuple):
    """Multiply-accumulates."""

    prepare: float
    drive: float
    """A frame."""
    decoders: float
    """A frame."""


class Row(NamedTuple):
    """What one way of making frames takes."""

    setting: str
    """Precision, and what else was changed."""
    name: str
    ms: float
    """A frame."""
    of_decoders: float
    """Times what the decoders alone take."""
    of_product: float
    """Times what as many multiply-accumulates take in a matrix product."""


@torch.inference_mode()
def count(device: torch.device, config: MotionConfig) -> Counted:
    """Of a model with random weights."""
    model, source, face, _ = _material(device, config, 1)
    cache = model.prepare(source, face)
    decoders = Decoders(model)
    return Counted(
        macs(lambda: model.prepare(source, face)),
        macs(lambda: model.drive(cache, face)),
        macs(lambda: decoders(cache, face)),
    )


def _material(
    device: torch.device, config: MotionConfig, batch: int
) -> tuple[Motion, Tensor, Tensor, Tensor]:
    """Model, source, its landmarks, those of a batch of frames."""
    torch.manual_seed(0)
    model = Motion(config).to(device).eval()
    source = torch.rand(1, 3, config.size, config.size, device=device) * 2 - 1
    face = torch.rand(1, config.num_landmarks, 2, device=device) - 0.5
    many = torch.rand(batch, config.num_landmarks, 2, device=device) - 0.5
    return model, source, face, many


@torch.inference_mode()
def measure(
    device: torch.device,
    config: MotionConfig,
    repeats: int,
    batch: int,
    *,
    precision: Precision,
    is_channels_last: bool = False,
    is_compiled: bool = False,
) -> list[Row]:
    """The rows of one setting. With ``is_compiled`` also frames of a compiled ``drive``, one by one and in batches."""
    model, source, face, many = _material(device, config, batch)
    if is_channels_last:
        model = model.to(memory_format=torch.channels_last)
        source = source.contiguous(memory_format=torch.channels_last)
    setting = precision + (", channels_last" if is_channels_last else "")
    decoders = Decoders(model)
    plain = model.prepare(source, face)
    floor = 1e3 * macs(lambda: model.drive(plain, face)) / best_rate(device, PRECISIONS[precision])
    with autocast(device, precision):
        cache = model.prepare(source, face)
        spread = cache.expand(batch)
        drive = torch.compile(model.drive) if is_compiled else model.drive
        single: dict[str, Callable[[], object]] = {
            "decoders alone": partial(decoders, cache, face),
            "whole forward pass": partial(model, source, face, face),
            "cached drive": partial(model.drive, cache, face),
        }
        several: dict[str, Callable[[], object]] = {
            f"decoders alone, batch {batch}": partial(decoders, spread, many),
            f"cached drive, batch {batch}": partial(model.drive, spread, many),
        }
        if is_compiled:
            single["cached drive, compiled"] = partial(drive, cache, face)
            several[f"cached drive, batch {batch}, compiled"] = partial(drive, spread, many)
        rows = []
        for works, frames in ((single, 1), (several, batch)):
            taken = medians(works, device, repeats if frames == 1 else max(repeats // 4, 3))
            alone = next(iter(taken.values()))
            for name, ms in taken.items():
                rows.append(Row(setting, name, ms / frames, ms / alone, ms / frames / floor))
    return rows


def main() -> None:
    """Parse, describe the machine, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each row")
    parser.add_argument("--batch", type=int, default=8, help="frames of the batched rows")
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile (needs a C++ compiler)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"commit {commit}, torch {torch.__version__}, {arguments.threads} threads, load {load:.1f}"
    )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print("\n| what | a frame | / decoders alone | / best matrix product |")
    print("|---|---|---|---|")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        print(f"| {torch.cuda.get_device_name()} | | | |")
        devices.append(torch.device("cuda"))
    for device in devices:
        for what, number in count(device, MotionConfig())._asdict().items():
            print(f"| {device.type}: multiply-accumulates, {what} | {number / 1e9:.1f} G | | |")
        for precision in PRECISIONS:
            for row in measure(
                device,
                MotionConfig(),
                arguments.repeats,
                arguments.batch,
                precision=precision,
                is_compiled=arguments.compile,
            ):
                ratios = f"{row.of_decoders:.2f} | {row.of_product:.2f}"
                told = f"{device.type} {row.setting}: {row.name}"
                print(f"| {told} | {row.ms:.1f} ms | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
