#!/usr/bin/env python
"""What the Blender's correspondence costs, and where its attention goes: the two studies of HeSer's supplement, §5.

    python benchmarks/exemplar.py warp                     one direction, forward and backward, every back-end
    python benchmarks/exemplar.py memory                   the training step's four warps (T and T', forth and back) against
                                                           the full correlation, as in the supplement's "9G saved"
    python benchmarks/exemplar.py attention --blender B    per-label heat maps and the share that stays in the label (Figure 5)

Label maps are drawn heads of 512 x 512 with the areas of real ones (head 18 % of the window), or your own with --labels A.png T.png.
Time on a CPU is processor time of all threads, which other work on the machine disturbs little; on a GPU what a clock shows.
Peak is that of live tensors above the inputs, counted at every operation (benchmarks/peak.py); on a GPU, of its allocator.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak import PeakBytes
from models import bundle
from models.blender.exemplars import cycle_loss, fallback_table, make_view, transfer
from models.blender.masks import GROUPS, check_labels, group_map, make_masks, to_cells
from models.blender.network import Blender, BlenderConfig
from models.blender.studies import attention, own_share
from models.blender.warp import WarpConfig, warp
from models.frozen.parsing import ParsingLabel

SIZE = 512
CHANNELS = 256
MIB = 2**20
DENSE_LIMIT = 4 * 2**30
"""Bytes of one matrix above which ``dense`` and ``blocks`` are not tried."""


def drawn_head(dx: int, dy: int, turn: float) -> np.ndarray:
    """(512, 512) label map of a head: sizes as in windows of the heser crop rule."""
    labels = np.zeros((SIZE, SIZE), np.uint8)
    centre = (256 + dx, 215 + dy)

    def ellipse(label: ParsingLabel, x: float, y: float, rx: int, ry: int) -> None:
        cos, sin = np.cos(turn), np.sin(turn)
        at = (round(centre[0] + x * cos - y * sin), round(centre[1] + x * sin + y * cos))
        cv2.ellipse(labels, at, (rx, ry), np.degrees(turn), 0, 360, int(label), -1)

    ellipse(ParsingLabel.CLOTH, 0, 290, 200, 120)
    ellipse(ParsingLabel.NECK, 0, 130, 48, 70)
    ellipse(ParsingLabel.HAIR, 0, -45, 98, 100)
    for side, ear in ((-1, ParsingLabel.R_EAR), (1, ParsingLabel.L_EAR)):
        ellipse(ear, side * 86, 10, 12, 24)
    ellipse(ParsingLabel.SKIN, 0, 10, 80, 105)
    for side, brow, eye in (
        (-1, ParsingLabel.R_BROW, ParsingLabel.R_EYE),
        (1, ParsingLabel.L_BROW, ParsingLabel.L_EYE),
    ):
        ellipse(brow, side * 34, -30, 22, 5)
        ellipse(eye, side * 32, -12, 14, 6)
    ellipse(ParsingLabel.NOSE, 0, 25, 16, 26)
    ellipse(ParsingLabel.UPPER_LIP, 0, 62, 28, 7)
    ellipse(ParsingLabel.LOWER_LIP, 0, 74, 26, 8)
    ellipse(ParsingLabel.MOUTH, 0, 68, 20, 3)
    return labels


def drawn_maps() -> list[np.ndarray]:
    """Label maps of A, T and T'."""
    return [drawn_head(0, 0, 0.0), drawn_head(14, -6, 0.12), drawn_head(-20, 8, -0.15)]


def read_labels(path: str) -> np.ndarray:
    """(512, 512) from a PNG; a colour picture or a wrong size is refused."""
    labels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    if labels is None:
        raise ValueError(f"{path}: cannot be read as a picture")
    channels = labels if labels.ndim == 2 else labels.transpose(2, 0, 1)
    try:
        check_labels(torch.from_numpy(channels).reshape(1, -1, *labels.shape[:2]), SIZE)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return labels


def cells_of(maps: list[np.ndarray], stride: int, device: str, radius: int = 8) -> list[Tensor]:
    """Label maps of A, T and T' to groups (1, h, w); ``radius`` is that of the ring, px."""
    tensors = [torch.from_numpy(x)[None, None].to(device) for x in maps]
    a, *targets = tensors
    rings = [make_masks(a, targets[0], radius).ring_a]
    rings += [make_masks(t, t, radius).ring_t for t in targets]
    num_groups = len(GROUPS["fine"]) + 1
    groups = [group_map(x, ring, "fine") for x, ring in zip(tensors, rings, strict=True)]
    return [to_cells(x, num_groups, stride) for x in groups]


def measured(work: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """Milliseconds of CPU or GPU (the best of ``repeats``) and peak MiB of a piece of work."""
    if device == "cuda":
        work()  # compiles and warms up
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with PeakBytes() as counter:
            work()
        peak = counter.peak
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = []
    for _ in range(repeats):
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return 1000 * min(seconds), peak / MIB


def features(cells: int, device: str, count: int) -> list[Tensor]:
    """``count`` smooth random feature maps (1, 256, h, h): neighbours are alike, as in real ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, CHANNELS, 16, 16, generator=generator).to(device)
    large = torch.nn.functional.interpolate(coarse, size=(cells, cells), mode="bilinear", align_corners=False)  # fmt: skip
    return [x[None].clone().requires_grad_() for x in large]


def one_warp(leaves: list[Tensor], labels: list[Tensor], config: WarpConfig) -> None:
    """Forward and backward of features and colours."""
    fa, ft, colours = leaves
    a, t = labels
    out = warp(fa.flatten(2), ft.flatten(2), colours, a.flatten(1), t.flatten(1), config)
    out.values.square().sum().backward()
    for leaf in leaves:
        leaf.grad = None


def training_step(
    leaves: list[Tensor],
    images: list[Tensor],
    groups: list[tuple[Tensor, Tensor]],
    config: WarpConfig,
) -> None:
    """What a training step does to A, T and T': both exemplars, both cycles, backward."""
    a, *targets = [
        make_view(leaf, image, *both)
        for leaf, image, both in zip(leaves, images, groups, strict=True)
    ]
    table = fallback_table("fine").to(leaves[0].device)
    loss = torch.zeros((), device=leaves[0].device)
    for t in targets:
        exemplar = transfer(a, t, table, config, least=4, still=t.colours)
        loss = loss + exemplar.colours.square().mean() + cycle_loss(a, t, exemplar, config)
    loss.backward()
    for leaf in leaves:
        leaf.grad = None


class Row(NamedTuple):
    """Of a table."""

    stride: int
    cells: int
    backend: str
    ms: float
    """NaN: not run."""
    peak_mib: float
    off: float
    """Largest difference of values or gradients to those of the first back-end that ran, as a share of that one's largest; NaN for
    itself."""


def outcome(leaves: list[Tensor], labels: list[Tensor], config: WarpConfig) -> list[Tensor]:
    """Values and the gradients of their weighted sum with respect to features and colours."""
    fa, ft, colours = leaves
    a, t = labels
    out = warp(fa.flatten(2), ft.flatten(2), colours, a.flatten(1), t.flatten(1), config).values
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def warp_rows(
    strides: Sequence[int],
    backends: Sequence[str],
    device: str,
    repeats: int,
    maps: list[np.ndarray],
) -> Iterator[Row]:
    """One warp of each back-end at each stride, forward and backward."""
    for stride in strides:
        a, t, _ = cells_of(maps, stride, device)
        n = a[0].numel()
        fa, ft = features(a.shape[-1], device, 2)
        leaves = [fa, ft, torch.rand(1, 3, n, device=device, requires_grad=True)]
        first: list[Tensor] = []
        for backend in backends:
            if backend == "dense" and 4 * n * n > DENSE_LIMIT:
                yield Row(stride, n, backend, np.nan, np.nan, np.nan)
                continue
            config = WarpConfig(backend=backend)  # type: ignore[arg-type]
            ms, peak = measured(partial(one_warp, leaves, [a, t], config), device, repeats)
            found = outcome(leaves, [a, t], config)
            yield Row(stride, n, backend, ms, peak, difference(found, first))
            first = first or found


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """See :attr:`Row.off`."""
    pairs = zip(found, expected, strict=False)
    return max((float((x - y).abs().max() / y.abs().max()) for x, y in pairs), default=np.nan)


def study_warp(arguments: argparse.Namespace, maps: list[np.ndarray]) -> None:
    """One warp of each back-end."""
    print("| stride | cells | back-end | ms | peak MiB | off by |\n|---|---|---|---|---|---|")
    asked = (arguments.strides, arguments.backends, arguments.device, arguments.repeats)
    for row in warp_rows(*asked, maps):
        head = f"| {row.stride} | {row.cells} | {row.backend} |"
        if np.isnan(row.ms):
            print(f"{head} not run: {4 * row.cells**2 / 2**30:.0f} GiB a matrix | | |")
        else:
            off = "" if np.isnan(row.off) else f"{row.off:.1e}"
            print(f"{head} {row.ms:.1f} | {row.peak_mib:.0f} | {off} |", flush=True)


def memory_rows(
    strides: Sequence[int], backends: Sequence[str], device: str, repeats: int, maps: list[np.ndarray], memory: float,
) -> Iterator[Row]:  # fmt: skip
    """The correspondence of one training sample: A with T and with T', forth and back, and both cycle losses."""
    for stride in strides:
        cells = cells_of(maps, stride, device)
        n = cells[0][0].numel()
        leaves = features(cells[0].shape[-1], device, 3)
        images = [torch.rand(1, 3, SIZE, SIZE, device=device) for _ in leaves]
        wide = [c.repeat_interleave(stride, 1).repeat_interleave(stride, 2) for c in cells]
        groups = list(zip(wide, cells, strict=True))
        for backend in backends:
            # the full correlation keeps eight matrices of this size at once
            if backend == "dense" and 8 * 4 * n * n > memory * 2**30:
                yield Row(stride, n, backend, np.nan, np.nan, np.nan)
                continue
            config = WarpConfig(backend=backend)  # type: ignore[arg-type]
            work = partial(training_step, leaves, images, groups, config)
            yield Row(stride, n, backend, *measured(work, device, repeats), np.nan)


def study_memory(arguments: argparse.Namespace, maps: list[np.ndarray]) -> None:
    """What a training step keeps."""
    print("| stride | back-end | ms | peak MiB |\n|---|---|---|---|")
    asked = (arguments.strides, arguments.backends, arguments.device, arguments.repeats)
    for row in memory_rows(*asked, maps, arguments.memory):
        if np.isnan(row.ms):
            gib = 4 * row.cells**2 / 2**30
            print(f"| {row.stride} | {row.backend} | not run: 8 matrices of {gib:.0f} GiB | |")
        else:
            print(
                f"| {row.stride} | {row.backend} | {row.ms:.1f} | {row.peak_mib:.0f} |", flush=True
            )


def study_attention(arguments: argparse.Namespace, maps: list[np.ndarray]) -> None:
    """Figure 5 of the supplement, from two windows and a Blender, at its size; by fine labels, whichever it was trained with."""
    if not arguments.windows or not arguments.labels:
        raise ValueError("attention needs --windows A.png T.png and --labels A.png T.png")
    windows = []
    for path in arguments.windows:
        picture = cv2.imread(path, cv2.IMREAD_COLOR_RGB)
        if picture is None or picture.shape != (SIZE, SIZE, 3):
            raise ValueError(f"{path}: not a picture of {SIZE} x {SIZE}")
        windows.append(picture)
    if arguments.blender:
        blender = bundle.load(arguments.blender)
        if not isinstance(blender, Blender):
            raise ValueError(f"{arguments.blender}: not the bundle of a Blender")
    else:
        blender = Blender(BlenderConfig(trunk=arguments.trunk, feature_stride=arguments.strides[0])).eval()  # fmt: skip
        blender.features.load_trunk()
        print("no --blender: features of the trunk behind an untrained pyramid")
    config = blender.config
    size = (config.size, config.size)
    shrunk = [cv2.resize(window, size, interpolation=cv2.INTER_AREA) for window in windows]
    pictures = [torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in shrunk]
    a, t = (cv2.resize(x, size, interpolation=cv2.INTER_NEAREST_EXACT) for x in maps[:2])
    names = [*(group.name for group in GROUPS["fine"]), "ring"]
    cells = cells_of([a, t], config.feature_stride, "cpu", config.paint_radius)
    with torch.no_grad():
        both = blender.features(*pictures)
    views = [
        make_view(
            f, picture, c.repeat_interleave(config.feature_stride, 1).repeat_interleave(config.feature_stride, 2), c,
        )
        for f, picture, c in zip(both, pictures, cells, strict=True)
    ]  # fmt: skip
    found = attention(views[0], views[1], len(names), config.warp)
    print("| label | share inside the label |\n|---|---|")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, share, heat in zip(names, own_share(found)[0].tolist(), found.heat[0], strict=True):
        if share == share:  # not NaN: A has the label
            print(f"| {name} | {share:.3f} |")
            shown = (255 * heat / heat.max().clamp(min=1e-9)).byte().numpy()
            cv2.imwrite(str(arguments.output / f"{name}.png"), cv2.resize(shown, (SIZE, SIZE)))
    print(f"heat maps: {arguments.output}")


def main() -> None:
    """Parse, run one study, print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=["warp", "memory", "attention"])
    parser.add_argument("--strides", type=int, nargs="+", default=[8, 4, 2], help="pixels a cell")
    parser.add_argument("--backends", nargs="+", default=["dense", "blocks", "chunked"], choices=["dense", "blocks", "chunked", "fused"])  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3, help="the fastest is reported")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB that dense may take")
    parser.add_argument("--labels", nargs=2, metavar="PNG", help="label maps of A and T")
    parser.add_argument("--windows", nargs=2, metavar="PNG", help="attention: windows of A and T")
    parser.add_argument("--blender", help="attention: a bundle")
    parser.add_argument("--trunk", default="vgg19", choices=["vgg19", "vgg_normalised_conv3_1", "small"])  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("attention"), help="attention: folder of the heat maps")  # fmt: skip
    arguments = parser.parse_args()
    try:
        if arguments.labels:
            a, t = map(read_labels, arguments.labels)
            maps = [a, t, t]
        else:
            maps = drawn_maps()
        head = np.mean(np.isin(maps[0], [*range(1, 14), 17, 18]))
        print(f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; head {100 * head:.0f} % of the window\n")  # fmt: skip
        studies = {"warp": study_warp, "memory": study_memory, "attention": study_attention}
        studies[arguments.study](arguments, maps)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
