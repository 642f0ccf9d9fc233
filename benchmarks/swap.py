"""What a swapped frame costs, step by step, and which step decides.

    python benchmarks/swap.py --target clip.mp4 --source me.jpg --frames 48
    python benchmarks/swap.py --target clip.mp4 --source me.jpg --aligner bundles/aligner --blender bundles/blender
    CUDA_VISIBLE_DEVICES= python benchmarks/swap.py ...         # the CPU of a machine that has a GPU

Without bundles, networks of the preset ``base`` with random weights, which cost the same; the Blender then has nothing to copy from
where no label fits, which costs the same, too. Prints a table in Markdown. A step's time is what one process waits for it, so
all steps add up to the whole.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from models import bundle
from models.aligner.network import Aligner, AlignerConfig
from models.blender.network import Blender, BlenderConfig
from pipelines.repaint import Clock
from pipelines.swap import SwapConfig, load, make_plan, render_part

MEANING = {
    "follow": "first pass: decode, detect, landmarks",
    "decode": "second pass: decode",
    "crop": "cut the window",
    "align": "the Aligner",
    "parse": "labels of target and head",
    "blend": "the Blender",
    "paste": "paste back into the frame",
    "encode": "H.264",
}


def random_bundles(folder: Path, size: int) -> tuple[str, str]:
    """Bundles of the shape of the preset ``base`` for windows of a size."""
    torch.manual_seed(0)
    preview = np.zeros((4, 4, 3), np.uint8)
    networks = {
        "aligner": Aligner(AlignerConfig(size=size, identity="dlib", encoder_size=size // 2)),
        "blender": Blender(BlenderConfig(size=size)),
    }
    for name, network in networks.items():
        bundle.save(network.eval(), str(folder / name), {}, preview)
    return str(folder / "aligner"), str(folder / "blender")


def main() -> None:
    """Parse, describe the machine, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="video")
    parser.add_argument("--source", required=True, help="picture of a person")
    parser.add_argument("--aligner", default="", help="bundle; without it random weights")
    parser.add_argument("--blender", default="", help="bundle; without it random weights")
    parser.add_argument("--size", type=int, default=512, help="of random networks' windows, pixels")
    parser.add_argument("--frames", type=int, default=48, help="repainted, from the first on")
    parser.add_argument("--batch", type=int, default=4, help="frames at once")
    parser.add_argument("--parser", default="geometric", help="of labels")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"commit {commit}, torch {torch.__version__}, {device}, {arguments.threads} threads, load {load_average:.1f}"
    )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory(prefix="headray-") as folder:
        aligner, blender = arguments.aligner, arguments.blender
        if not aligner or not blender:
            aligner, blender = random_bundles(Path(folder), arguments.size)
        config = SwapConfig(
            aligner=aligner,
            blender=blender,
            source=(arguments.source,),
            target=(arguments.target,),
            output=str(Path(folder, "swapped.mp4")),
            parser=arguments.parser,
            batch=arguments.batch,
            precision=arguments.precision,
        )
        measure(config, arguments.frames, Path(folder))


def measure(config: SwapConfig, frames: int, folder: Path) -> None:
    """Print the table of one target."""
    loaded = load(config)
    path = Path(config.target[0])
    clock = Clock()
    with clock.step("decode"):
        plan = make_plan(config, path, loaded.swapper.size, str(path))
    followed, count = len(plan.times), min(frames, len(plan.times))
    some = replace(
        plan,
        times=plan.times[:count],
        causes=plan.causes[:count],
        matrices=plan.matrices[:count],
        landmarks=plan.landmarks[:count],
    )
    warm = range(
        min(config.batch, count)
    )  # kernels are chosen and memory is fetched in the first batch
    render_part(config, loaded, some, path, warm, folder / "warm.mp4")
    part = render_part(config, loaded, some, path, range(count), folder / "part.mp4")
    each = {"follow": clock.seconds["decode"] / followed}
    each |= {name: seconds / count for name, seconds in part.seconds.items()}
    whole = sum(each.values())
    slowest = max(each, key=lambda name: each[name])
    size, info = loaded.swapper.size, plan.info
    print(
        f"{info.width} x {info.height}, windows of {size} px, {count} frames, batch {config.batch}\n"
    )
    print("| step | ms a frame | share |\n|---|---:|---:|")
    for name, seconds in each.items():
        note = " **(bottleneck)**" if name == slowest else ""
        print(f"| {name}: {MEANING[name]}{note} | {1e3 * seconds:.1f} | {seconds / whole:.0%} |")
    print(f"| all: {1 / whole:.2f} frames/s | {1e3 * whole:.1f} | |")


if __name__ == "__main__":
    main()
