#!/usr/bin/env python
"""Everything that wants a GPU, in one command: a table in Markdown for each question, and all numbers as JSON.

    python benchmarks/gpu.py --json gpu.json                     # some 20 minutes on a data-centre card
    python benchmarks/gpu.py --parts exemplar animate
    python benchmarks/gpu.py --device cpu --size toy             # does it run at all?

Needs torch, torchvision, numpy and OpenCV, and nothing that is read from a disk or a network: networks have random weights, pictures are
noise, label maps are drawn. Each part is a process of its own with a limit of time, so one that fails or hangs loses
its own table only; what a part has measured is written down row by row. Parts:

    check      gradients of the fused kernel, and of chunked, against dense on the card (what ``pytest -m gpu`` asserts, without pytest)
    exemplar   the Blender's warp by back-end and stride, and a training step's correspondence
    launches   the fused kernel cut in other ways, and on tensor cores: which is fastest, and is it as exact
    animate    milliseconds and frames a second of the motion model at 256 px
    fan        2DFAN-4 batched against one by one and against face-alignment's own call (wants that package)
    aligner, blender, motion   pictures a second of a training step, speed-ups one by one
    swap       the networks of a swapped frame
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)  # run as a script, its own folder would come first

import torch  # noqa: E402

from benchmarks import animate, exemplar, steps  # noqa: E402
from models.aligner.learner import AlignerLearner, AlignerLearnerConfig  # noqa: E402
from models.aligner.network import Aligner, AlignerConfig  # noqa: E402
from models.blender.learner import (  # noqa: E402
    BlenderLearner,
    BlenderLearnerConfig,
)
from models.blender.network import Blender, BlenderConfig  # noqa: E402
from models.blender.warp import WarpConfig, group_by_label  # noqa: E402
from models.motion.learner import MotionLearner, MotionLearnerConfig  # noqa: E402
from models.motion.network import MotionConfig  # noqa: E402
from models.updates import autocast  # noqa: E402

Row = dict[str, Any]
Part = Callable[[torch.device, bool], Iterator[Row]]
"""From the device and whether sizes are those of a toy to the rows of a table."""

TOY_ALIGNER = AlignerConfig(
    size=64, schedule="lpd", base=8, limit=64, portrait_dim=64, pose_dim=32, expression_dim=32, hidden=96, encoder_size=64,
    norm="group", identity="mobilefacenet", portrait_blocks=(1, 1, 1, 1), portrait_groups=4, motion_width=0.25,
)  # fmt: skip
TOY_BLENDER = BlenderConfig(size=64, trunk="small", feature_width=16, unet_base=8)
TOY_MOTION = MotionConfig(
    size=64, num_landmarks=68, global_encoder=(8, 16, 32, 32, 32), global_decoder=(32, 32, 32, 16, 8), global_adaptive=3,
    local_encoder=(8, 16, 16), local_decoder=(16, 16, 8), local_adaptive=2, patch=16, adain_hidden=32, generator_base=8,
    generator_residuals=2,
)  # fmt: skip


def on_gpu(device: torch.device) -> bool:
    """Whether the card's own ways are measured, too."""
    return device.type == "cuda"


def check(device: torch.device, toy: bool) -> Iterator[Row]:
    """Every back-end against ``dense``, on random features and drawn heads, at temperatures down to the usual one."""
    (stride,) = (32,) if toy else (8,)
    a, t, _ = exemplar.cells_of(exemplar.drawn_maps(), stride, device.type)
    fa, ft = exemplar.features(a.shape[-1], device.type, 2)
    leaves = [fa, ft, torch.rand(1, 3, a[0].numel(), device=device, requires_grad=True)]
    for tau in (1.0, 0.1, 0.01):
        expected = exemplar.outcome(leaves, [a, t], WarpConfig(backend="dense", tau=tau))
        for backend in ("chunked", "fused") if on_gpu(device) else ("chunked",):
            config = WarpConfig(backend=backend, tau=tau)
            off = exemplar.difference(exemplar.outcome(leaves, [a, t], config), expected)
            yield {"back-end": backend, "tau": tau, "off by": off, "within 1e-4": off < 1e-4}


def correspondence(device: torch.device, toy: bool) -> Iterator[Row]:
    """Issue 5: at stride 4 at most a fiftieth of dense's memory and at least twice as fast."""
    strides = [32, 16] if toy else [8, 4, 2]
    backends = ["dense", "blocks", "chunked", *(["fused"] if on_gpu(device) else [])]
    maps = exemplar.drawn_maps()
    repeats = 1 if toy else 5
    studies = {
        "warp": exemplar.warp_rows(strides, backends, device.type, repeats, maps),
        "step": exemplar.memory_rows(strides, backends, device.type, repeats, maps, 60.0),
    }
    for study, rows in studies.items():
        dense: dict[int, exemplar.Row] = {}
        for row in rows:
            if row.backend == "dense":
                dense[row.stride] = row
            first = dense.get(row.stride, row)
            yield {
                "what": study, "stride": row.stride, "cells": row.cells, "back-end": row.backend, "ms": row.ms,
                "peak MiB": row.peak_mib, "dense / ms": first.ms / row.ms, "dense / MiB": first.peak_mib / row.peak_mib,
                "off by": row.off,
            }  # fmt: skip


def launches(device: torch.device, toy: bool) -> Iterator[Row]:
    """The fused kernel cut in other ways, forward and backward on the rows of drawn heads."""
    if not on_gpu(device):
        return
    from models.blender.fused import LAUNCH, Launch, fused_attention

    tried = [
        LAUNCH,
        Launch(32, 16, 32, 8), Launch(32, 32, 32, 8), Launch(64, 16, 16, 8), Launch(64, 16, 16, 4), Launch(64, 32, 32, 8),
        Launch(64, 32, 32, 4, "tf32x3"), Launch(64, 32, 32, 8, "tf32x3"), Launch(64, 16, 32, 8, "tf32x3"),
        Launch(32, 32, 32, 4, "tf32x3"), Launch(128, 32, 32, 8, "tf32x3"),
    ]  # fmt: skip
    for stride in [16] if toy else [4, 2]:
        a, t, _ = exemplar.cells_of(exemplar.drawn_maps(), stride, device.type)
        groups = group_by_label(a.flatten(1), t.flatten(1))
        sides = zip(
            exemplar.features(a.shape[-1], device.type, 2),
            (groups.queries, groups.keys),
            strict=True,
        )
        q, k = (
            torch.nn.functional.normalize(x.detach().flatten(2)[0].T[rows], dim=1).requires_grad_()
            for x, rows in sides
        )
        v = torch.rand(len(k), 3, device=device, requires_grad=True)
        first: list[torch.Tensor] = []
        for launch in tried:

            def work(launch: Launch = launch) -> list[torch.Tensor]:
                out, _ = fused_attention(q, k, v, groups.spans, 0.01, launch)  # noqa: B023
                return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]  # noqa: B023

            row: Row = {"stride": stride} | launch._asdict()
            try:
                found = work()
                ms, _ = exemplar.measured(work, device.type, 5)
                row |= {"ms": ms, "off by": exemplar.difference(found, first)}
                first = first or found
            except RuntimeError as error:  # too much shared memory, or a compiler's refusal
                row["failed"] = str(error).splitlines()[0][:80]
            yield row


def frames(device: torch.device, toy: bool) -> Iterator[Row]:
    """Issue 6: at least 100 frames a second, and a cached frame within 1.3 times its decoders."""
    config = TOY_MOTION if toy else MotionConfig()
    settings = [("fp32", False, False), ("bf16", False, False), ("bf16", True, False)]
    if on_gpu(device):
        settings += [("fp32", True, False), ("fp32", False, True), ("bf16", True, True)]
    for precision, is_last, is_compiled in settings:
        for row in animate.measure(
            device,
            config,
            3 if toy else 40,
            2 if toy else 16,
            precision=precision,  # type: ignore[arg-type]
            is_channels_last=is_last,
            is_compiled=is_compiled,
        ):
            yield {
                "setting": row.setting + (", compiled beside" if is_compiled else ""), "what": row.name, "ms a frame": row.ms,
                "frames/s": 1000 / row.ms, "/ decoders": row.of_decoders, "/ matrix product": row.of_product,
            }  # fmt: skip


def fan(device: torch.device, toy: bool) -> Iterator[Row]:
    """Issue 3: batched at least four times as fast as face-alignment's own call. Random weights."""
    from benchmarks.landmarks import BenchmarkConfig, measure

    del device
    is_whole = has_whole_face_alignment()
    config = BenchmarkConfig(
        faces=1 if toy else 96, face_px=200 if toy else 300, repeats=1 if toy else 3, random_weights=True,
        flip=is_whole and not toy, others=is_whole and not toy,
    )  # fmt: skip
    found = {
        name: sum(turn[0] for turn in turns) / len(turns) for name, turns in measure(config).items()
    }
    first = next(iter(found.values()))
    for name, seconds in found.items():
        yield {"landmarker": name, "ms a face": 1e3 * seconds, "times as fast": first / seconds}


def has_whole_face_alignment() -> bool:
    """Whether all that the package imports is there. If not, its network, which wants torch alone, is made importable without the rest."""
    try:
        import face_alignment
    except ImportError:
        spec = importlib.util.find_spec("face_alignment")
        if spec is None:
            raise
        bare = types.ModuleType("face_alignment")
        bare.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["face_alignment"] = bare
        return False
    return hasattr(face_alignment, "FaceAlignment")


def training(
    learner: Callable[..., Any], config: Any, batch: Any, device: torch.device, toy: bool
) -> Iterator[Row]:
    """Speed-ups one by one."""
    variants = list(steps.VARIANTS if on_gpu(device) else steps.VARIANTS[:-1])
    first = 0.0
    for number in range(len(variants)):
        chosen = variants[: number + 1]
        built = steps.build(learner, config, chosen, device)
        found = steps.measure(built, repeat(batch), 1 if toy else 10, device)
        first = first or found.seconds
        yield {
            "variant": ("+ " if number else "") + chosen[-1], "batch": len(batch), "s a step": found.seconds,
            "pictures/s": len(batch) / found.seconds, "times fp32": first / found.seconds, "peak MiB": found.peak_mib,
        }  # fmt: skip
        del built
        if on_gpu(device):
            torch.cuda.empty_cache()


def train_aligner(device: torch.device, toy: bool) -> Iterator[Row]:
    """Issue 4: a step at 512 px, K = 4."""
    config = AlignerLearnerConfig(random_init=True)
    if toy:
        config = AlignerLearnerConfig(
            random_init=True, network=TOY_ALIGNER, discriminator_base=8, discriminator_limit=64, vgg="none"
        )  # fmt: skip
    faces = (112, 96) if toy else (112, 112)
    batch = steps.aligner_noise(config.network, 2 if toy else 8, 2 if toy else 4, faces)
    return training(AlignerLearner, config, batch, device, toy)


def train_blender(device: torch.device, toy: bool) -> Iterator[Row]:
    """A step at 512 px; the correspondence by the fused kernel where it can."""
    config = steps.paper_blender("fused" if on_gpu(device) else "chunked")
    if toy:
        config = BlenderLearnerConfig(
            random_init=True, perceptual="none", network=TOY_BLENDER, discriminator_base=8, discriminator_limit=64
        )  # fmt: skip
    batch = steps.blender_noise(config.network.size, 2)
    return training(BlenderLearner, config, batch, device, toy)


def train_motion(device: torch.device, toy: bool) -> Iterator[Row]:
    """A step of stage 2 at 256 px, 10 pairs: the share of one of the paper's four GPUs."""
    config = MotionLearnerConfig(random_init=True, stage=2)
    if toy:
        config = MotionLearnerConfig(
            random_init=True, stage=2, network=TOY_MOTION, features="none", discriminator_widths=(8, 8, 16, 16)
        )  # fmt: skip
    batch = steps.motion_noise(config.network, 2 if toy else 10)
    return training(MotionLearner, config, batch, device, toy)


@torch.inference_mode()
def swapping(device: torch.device, toy: bool) -> Iterator[Row]:
    """Issue 7: Aligner, parser and Blender on batches of 512 px windows."""
    from models.frozen.bisenet import BiSeNet

    torch.manual_seed(0)
    count = 2 if toy else 8
    aligner = Aligner(TOY_ALIGNER if toy else AlignerConfig()).to(device).eval()
    backend = "fused" if on_gpu(device) else "chunked"
    large = BlenderConfig(warp=WarpConfig(backend=backend))  # type: ignore[arg-type]
    blender = Blender(TOY_BLENDER if toy else large).to(device).eval()
    size, encoder = blender.config.size, aligner.config.encoder_size
    parser = BiSeNet().to(device).eval()
    driving = steps.pictures(count, 3, encoder, encoder).to(device)
    code = torch.randn(count, aligner.config.source_dim, device=device)
    head, scene = (steps.pictures(count, 3, size, size).to(device) for _ in range(2))
    labels = [x.expand(count, 1, size, size).to(device) for x in steps.head_maps(size)]
    works: dict[str, Callable[[], object]] = {
        "Aligner": lambda: aligner.generate(code, aligner.encode_motion(driving, driving)),
        "parser, once": lambda: parser(scene),
        "Blender": lambda: blender.repaint(head, labels[0], scene, labels[1], None),
    }
    for precision in ("fp32", "bf16"):
        with autocast(device, precision):
            taken = animate.medians(works, device, 1 if toy else 20)
        taken["a frame, parsed twice"] = sum(taken.values()) + taken["parser, once"]
        for name, ms in taken.items():
            yield {
                "precision": precision, "network": name, "batch": count, "ms a frame": ms / count, "frames/s": 1000 * count / ms,
            }  # fmt: skip


PARTS: dict[str, tuple[str, Part, int]] = {
    "check": ("The warp's back-ends agree", check, 120),
    "exemplar": ("Issue 5: the warp, and a training step's correspondence", correspondence, 240),
    "launches": ("Issue 5: the fused kernel cut in other ways", launches, 240),
    "animate": ("Issue 6: a frame of animation at 256 px", frames, 300),
    "fan": ("Issue 3: landmarks", fan, 120),
    "aligner": ("Issue 4: a training step of the Aligner", train_aligner, 300),
    "blender": ("A training step of the Blender", train_blender, 300),
    "motion": ("A training step of the motion model", train_motion, 300),
    "swap": ("Issue 7: the networks of a swapped frame", swapping, 120),
}
"""Title, work, seconds it may take."""


def shown(value: object) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return (
            "" if value != value else f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:,.2f}"
        )
    return str(value)


def table(rows: list[Row]) -> str:
    """In Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([shown(r.get(c, "")) for c in columns] for r in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_part(name: str, device: str, toy: bool, path: Path) -> None:
    """In the process of its own: rows to ``path``, one a line."""
    _, part, _ = PARTS[name]
    with path.open("w") as file:
        for row in part(torch.device(device), toy):
            file.write(json.dumps(row) + "\n")
            file.flush()


def measure_part(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the process, wait, read what it wrote."""
    _, _, limit = PARTS[name]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        command = [sys.executable, __file__, "--inside", name, "--device", arguments.device, "--size", arguments.size, "--json", str(path)]  # fmt: skip
        failed = ""
        try:
            done = subprocess.run(
                command, stderr=subprocess.PIPE, text=True, timeout=limit * arguments.patience
            )
            if done.returncode:
                failed = done.stderr.strip()[-2000:] or f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            failed = f"stopped after {limit * arguments.patience:.0f} s"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {"rows": rows, "failed": failed, "seconds": round(time.perf_counter() - began, 1)}


def machine(device: str) -> dict[str, str]:
    """What was measured on."""
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )  # fmt: skip
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = "none"
    is_cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "torch": torch.__version__, "triton": compiler, "cuda": str(torch.version.cuda), "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip


def main() -> None:
    """Run the parts, print their tables, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "toy"], default="full")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="multiplies every limit of time"
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--inside", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --size toy shows that all parts run")
    if arguments.inside:
        run_part(arguments.inside, arguments.device, arguments.size == "toy", arguments.json)
        return
    found: dict[str, Any] = {"machine": machine(arguments.device), "size": arguments.size}
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()), flush=True)
    for name in arguments.parts:
        found[name] = measure_part(name, arguments)
        print(f"\n## {PARTS[name][0]} (`{name}`, {found[name]['seconds']} s)\n")
        print(table(found[name]["rows"]))
        if found[name]["failed"]:
            print(f"\nFAILED: {found[name]['failed']}")
        sys.stdout.flush()
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    sys.exit(any(found[name]["failed"] for name in arguments.parts))


if __name__ == "__main__":
    main()
