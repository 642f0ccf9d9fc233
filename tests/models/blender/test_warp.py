"""Four ways to compute one warp: equal values, equal gradients, bounded memory, nothing across labels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.peak import PeakBytes
from models.blender import warp as warp_module
from models.blender.masks import group_map, make_masks, to_cells
from models.blender.warp import WarpConfig, group_by_label, unit_features, warp
from tests.material import REPOSITORY, SHARED, needs_shared

BATCH, CHANNELS = 2, 12


def inputs(query_labels: Tensor, key_labels: Tensor, dtype: torch.dtype, seed: int = 0):
    """Raw features of both sides and values, leaves that want gradients; the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((CHANNELS, query_labels), (CHANNELS, key_labels), (3, key_labels))
    return [
        torch.randn(len(side), c, side.shape[1], generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for c, side in sizes
    ]


def outcome(
    query_labels: Tensor, key_labels: Tensor, dtype: torch.dtype, config: WarpConfig
) -> list[Tensor]:
    """Values, log-sum-exps, and gradients with respect to features and values."""
    leaves = inputs(query_labels, key_labels, dtype)
    a, t, values = leaves
    out, lse = warp(unit_features(a), unit_features(t), values, query_labels, key_labels, config)
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    (out * weights.to(dtype)).sum().backward()
    return [out.detach(), lse, *(leaf.grad for leaf in leaves)]


def reference(query_labels: Tensor, key_labels: Tensor, tau: float) -> np.ndarray:
    """Ten lines of numpy, a loop over pixels: what the formula says."""
    a, t, values = (x.detach().numpy() for x in inputs(query_labels, key_labels, torch.float64))
    a, t = (x - x.mean(axis=1, keepdims=True) for x in (a, t))
    a, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, t))
    out = np.zeros((len(a), 3, a.shape[2]))
    for b in range(len(a)):
        for u in range(a.shape[2]):
            same = np.flatnonzero(key_labels[b].numpy() == query_labels[b, u].item())
            if len(same) and query_labels[b, u] >= 0:
                weights = np.exp((t[b, :, same] @ a[b, :, u] - 1) / tau)
                out[b, :, u] = values[b][:, same] @ weights / weights.sum()
    return out


LABELS = {
    "many": ([0, 0, 1, 1, 1, 2, -1, 3], [0, 1, 1, 2, 2, 3, 3, -1]),
    "absent in T": ([0, 1, 2, 3], [0, 0, 3, 3]),
    "absent in A": ([0, 0], [0, 1, 2, 3]),
    "one pixel each": ([5, 6, 7], [7, 6, 5]),
    "nothing shared": ([0, 0, 1], [2, 2, -1]),
    "nothing at all": ([-1, -1], [-1, -1, -1]),
}


def label_pair(name: str, copies: int = 5) -> tuple[Tensor, Tensor]:
    """(2, n) and (2, m) labels, shuffled; the second sample has other counts than the first."""
    generator = torch.Generator().manual_seed(3)
    sides = []
    for labels in LABELS[name]:
        side = torch.tensor(labels).repeat(copies)
        other = side.roll(2)
        other[: len(labels) // 2] = -1
        sides.append(torch.stack([x[torch.randperm(len(x), generator=generator)] for x in (side, other)]))  # fmt: skip
    return sides[0], sides[1]


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("backend", ["dense", "blocks", "chunked"])
def test_every_backend_is_the_formula(name, backend):
    labels = label_pair(name)
    found = outcome(*labels, torch.float64, WarpConfig(backend=backend, tau=0.05, chunk=3))
    np.testing.assert_allclose(found[0], reference(*labels, 0.05), atol=1e-12)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_backends_agree_in_values_and_gradients(name, dtype, limit):
    labels = label_pair(name)
    dense = outcome(*labels, dtype, WarpConfig(backend="dense", tau=0.1))
    for backend in ("blocks", "chunked"):
        found = outcome(*labels, dtype, WarpConfig(backend=backend, tau=0.1, chunk=4))
        for one, other in zip(found, dense, strict=True):
            torch.testing.assert_close(one, other, atol=limit, rtol=limit)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=30),
    st.lists(st.integers(-1, 4), min_size=1, max_size=30),
    st.integers(1, 9),
)
def test_chunked_agrees_with_dense_whatever_the_labels(query_labels, key_labels, chunk):
    labels = torch.tensor([query_labels]), torch.tensor([key_labels])
    dense = outcome(*labels, torch.float64, WarpConfig(backend="dense", tau=0.2))
    found = outcome(*labels, torch.float64, WarpConfig(chunk=chunk, tau=0.2))
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_finite_differences():
    labels = torch.tensor([[0, 0, 1, -1]]), torch.tensor([[0, 1, 1]])
    leaves = inputs(*labels, torch.float64)
    config = WarpConfig(tau=0.7, chunk=2)
    assert torch.autograd.gradcheck(lambda a, t, v: warp(a, t, v, *labels, config).values, leaves)


def test_unit_features_have_the_gradient_of_finite_differences():
    features = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_features, [features])


def test_rows_are_means_and_sum_to_one():
    labels = label_pair("many")
    a, t, _ = inputs(*labels, torch.float64)
    ones = torch.ones(BATCH, 1, labels[1].shape[1], dtype=torch.float64)
    out, lse = warp(unit_features(a), unit_features(t), ones, *labels, WarpConfig())
    assert lse.isfinite().any()
    assert not lse.isfinite().all()
    torch.testing.assert_close(out[:, 0], lse.isfinite().double())


def test_equal_distinct_features_give_the_picture_back():
    generator = torch.Generator().manual_seed(0)
    features = unit_features(torch.randn(1, 32, 64, generator=generator))
    colours = torch.rand(1, 3, 64, generator=generator)
    labels = torch.arange(64)[None] % 4
    config = WarpConfig(tau=1e-3)
    there = warp(features, features, colours, labels, labels, config).values
    back = warp(features, features, there, labels, labels, config).values
    torch.testing.assert_close(there, colours)
    torch.testing.assert_close(back, colours)


@pytest.mark.parametrize("backend", ["dense", "blocks", "chunked"])
def test_labels_are_islands(backend):
    labels = label_pair("many")
    a, t, values = (x.detach() for x in inputs(*labels, torch.float64))
    config = WarpConfig(backend=backend, tau=0.1)

    def run(values: Tensor, t: Tensor, key_labels: Tensor) -> Tensor:
        return warp(
            unit_features(a), unit_features(t), values, labels[0], key_labels, config
        ).values

    before = run(values, t, labels[1])
    is_other = (labels[1] != 1)[:, None]
    changed = run(
        torch.where(is_other, values + 5, values), torch.where(is_other, -t, t), labels[1]
    )
    is_one = (labels[0] == 1)[:, None].expand_as(before)
    torch.testing.assert_close(changed[is_one], before[is_one])
    assert (changed - before)[~is_one].abs().max() > 1
    order = torch.randperm(labels[1].shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        run(values[:, :, order], t[:, :, order], labels[1][:, order]), before
    )


def test_autocast_changes_nothing():
    labels = label_pair("many")
    plain = outcome(*labels, torch.float32, WarpConfig())
    with torch.autocast("cpu", torch.bfloat16):
        inside = outcome(*labels, torch.float32, WarpConfig())  # the backward pass, too
    for one, other in zip(inside, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["dense", "blocks", "chunked"])
def test_coarse_features_are_matched_in_float32(backend):
    labels = label_pair("many")
    a, t, values = (x.detach().bfloat16() for x in inputs(*labels, torch.float32))
    config = WarpConfig(backend=backend)
    out, lse = warp(a, t, values, *labels, config)
    assert out.dtype == lse.dtype == torch.float32
    assert torch.equal(out, warp(a.float(), t.float(), values.float(), *labels, config).values)


def test_products_are_exact_and_the_precision_is_given_back(monkeypatch):
    """Forward and backward; on a GPU a process may have chosen TF32."""
    labels, inside = label_pair("many"), []
    pieces = warp_module._pieces

    def spy(*arguments):
        inside.append(torch.get_float32_matmul_precision())
        return pieces(*arguments)

    monkeypatch.setattr(warp_module, "_pieces", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        outcome(*labels, torch.float32, WarpConfig())
        assert torch.get_float32_matmul_precision() == "medium"
        assert inside == ["highest", "highest"]
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_place_without_features_is_no_trap():
    """All channels equal: no direction, and no NaN, neither forward nor backward."""
    features = torch.ones(1, 4, 3)
    features[..., 1] = torch.tensor([1.0, 2, 3, 4])
    features.requires_grad_()
    unit = unit_features(features)
    assert not unit[..., [0, 2]].any()
    (unit * torch.arange(12.0).reshape(1, 4, 3)).sum().backward()
    assert features.grad.isfinite().all()


def test_groups_are_sorted_and_only_shared():
    groups = group_by_label(torch.tensor([[3, -1, 0, 3], [1, 1, 0, 2]]), torch.tensor([[3, 3, 5], [0, 2, 7]]))  # fmt: skip
    assert groups.queries.tolist() == [0, 3, 6, 7]
    assert groups.keys.tolist() == [0, 1, 3, 4]
    assert groups.spans == [(0, 2, 0, 2), (2, 3, 2, 3), (3, 4, 3, 4)]


def test_what_does_not_fit_is_refused():
    good = [torch.zeros(s) for s in ((1, 4, 6), (1, 4, 5), (1, 3, 5))]
    labels = [torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)]
    warp(*good, *labels, WarpConfig())
    with pytest.raises(ValueError, match=r"\(1, 6\)"):
        warp(*good, labels[1], labels[0], WarpConfig())
    with pytest.raises(ValueError, match="CUDA"):
        warp(*good, *labels, WarpConfig(backend="fused"))
    for wrong in ({"tau": 0.0}, {"chunk": 0}, {"backend": "sparse"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WarpConfig(**wrong)


# -------------------------------------------------------------------------------------------------- memory


def peak_bytes(backend: str, pixels: int) -> int:
    """Of one forward and backward pass over ``pixels`` pixels of five labels, inputs not counted."""
    labels = (torch.arange(pixels)[None] * 5) // pixels
    a, t, values = inputs(labels, labels, torch.float32)
    with PeakBytes() as peak:
        warp(a, t, values, labels, labels, WarpConfig(backend=backend, chunk=16)).values.sum().backward()  # fmt: skip
    return peak.peak


def growth(backend: str, sizes: tuple[int, ...]) -> list[float]:
    """By how much the peak grows from each size to its double, 2 meaning linear."""
    peaks = [peak_bytes(backend, size) for size in sizes]
    return [larger / smaller for smaller, larger in pairwise(peaks)]


def test_peak_memory_of_chunked_is_linear_and_that_of_the_others_is_not():
    sizes = (250, 500, 1000, 2000)
    assert all(1.8 < factor < 2.1 for factor in growth("chunked", sizes))
    assert growth("dense", sizes[1:3])[0] > 3.5  # the measure can fail
    assert growth("blocks", sizes[2:])[0] > 2.5
    assert peak_bytes("chunked", 1000) < peak_bytes("dense", 1000) / 20


def test_peak_bytes_counts_what_lives_together():
    with PeakBytes() as peak:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
        view = third[10:]
        fourth = view.clone()
        assert peak.live == 4000 * 2 + 3960
        del fourth
    assert peak.peak == 4000 * 2 + 3960


# -------------------------------------------------------------------------------------------------- fused


@pytest.mark.slow
def test_fused_in_tritons_interpreter_agrees_with_dense():
    pytest.importorskip("triton")
    code = """
import torch
from models.blender.warp import WarpConfig
from tests.models.blender.test_warp import LABELS, label_pair, outcome, peak_bytes
for name in LABELS:
    labels = label_pair(name, copies=50)  # more of a label than a tile has rows, of either side
    dense = outcome(*labels, torch.float32, WarpConfig(backend="dense", tau=0.1))
    found = outcome(*labels, torch.float32, WarpConfig(backend="fused", tau=0.1))
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    print(name)
torch.testing.assert_close(*[peak_bytes(backend, 2000) for backend in ("fused", "chunked")], rtol=0.2, atol=0)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == list(LABELS), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["_forward", "_backward_queries", "_backward_keys"])
def test_fused_compiles_for_an_h100_without_one(kernel, tmp_path, monkeypatch):
    """Down to machine code by the compiler and the assembler that Triton brings: it fits into shared memory and registers."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.blender import fused

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    shapes = fused._shapes(256, 3, fused.LAUNCH)
    warps, stages = shapes.pop("num_warps"), shapes.pop("num_stages")
    function = getattr(fused, kernel)
    kinds = {"tiles": "*i32", "scale": "fp32", "channels": "i32", "width": "i32"}
    signature = {
        n: "constexpr" if n in shapes else kinds.get(n, "*fp32") for n in function.arg_names
    }
    constants = {(function.arg_names.index(name),): value for name, value in shapes.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n][0] == "*"
    }
    compiled = triton.compile(
        ASTSource(function, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < 99 * 1024  # of cards that have less than an H100, too
    assert "tf32" not in compiled.asm["ptx"]
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    told = subprocess.run(
        [assembler, "-v", "--gpu-name=sm_90a", tmp_path / "kernel.ptx", "-o", "/dev/null"],
        capture_output=True, text=True,
    ).stderr  # fmt: skip
    spilled = re.search(r"(\d+) bytes spill stores", told)
    assert spilled is not None, told
    assert int(spilled[1]) <= 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["chunked", "fused"])
def test_backends_agree_on_a_gpu(backend):
    query_labels, key_labels = (x.cuda() for x in label_pair("many", copies=200))
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, c, side.shape[1], generator=generator).cuda().requires_grad_()
        for c, side in ((256, query_labels), (256, key_labels), (3, key_labels))
    ]

    def run(backend: str) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        a, t, values = leaves
        out, lse = warp(
            unit_features(a), unit_features(t), values, query_labels, key_labels,
            WarpConfig(backend=backend),
        )  # fmt: skip
        out.square().sum().backward()
        return [out.detach(), lse, *(leaf.grad for leaf in leaves)]

    for one, other in zip(run(backend), run("dense"), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- real labels


@pytest.mark.real
@needs_shared
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_backends_agree_on_real_label_maps(dtype, limit):
    from tests.windows import window

    assert (SHARED / "videos" / "m003_a.mp4").is_file()
    a, t = (window("m003_a", 10, 128).frame, window("phone_a", 50, 128).frame)
    masks = make_masks(a.labels[None], t.labels[None], 2)
    cells = []
    for frame, ring in ((a, masks.ring_a), (t, masks.ring_t)):
        groups = group_map(frame.labels[None], ring, "fine")
        cells.append(to_cells(groups, 15, 4).flatten(1))
    assert len(set(cells[0].unique().tolist()) & set(cells[1].unique().tolist())) >= 10
    dense = outcome(*cells, dtype, WarpConfig(backend="dense", tau=0.1))
    for backend in ("blocks", "chunked"):
        found = outcome(*cells, dtype, WarpConfig(backend=backend, tau=0.1, chunk=50))
        for one, other in zip(found, dense, strict=True):
            torch.testing.assert_close(one, other, atol=limit, rtol=limit)
