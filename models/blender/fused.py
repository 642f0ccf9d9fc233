"""Attention inside labels as three Triton kernels over all labels of a batch at once: ``warp``'s back-end for CUDA.

Queries and keys come sorted by label. A table names, for each tile of rows, the span of rows on the other side that it meets;
one program of a kernel works on one tile, so the labels need no loop on the host and no padding. Scores live in registers only:
forward keeps a running maximum and sum (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), backward computes them
again from the saved log-sum-exp. The library's own kernels do not fit: they want equal widths of keys and values (256 and 3
here), and their float32 is TF32 or absent.

Products are IEEE float32. Triton makes them of ordinary multiply-adds whose operands all pass through registers, so they are cut short
along the channels (``Launch.channels``) and along the other side (``Launch.others``): with a whole row of 256 channels at once a
thread would hold a thousand numbers. ``tf32x3`` makes them of three products on tensor cores, with nearly the same precision;
``benchmarks/gpu.py exemplar`` tries both against ``dense``, in several sizes, on the card that it finds.

Checked on the CPU by Triton's interpreter against ``dense``. Its speed, and that it compiles for a GPU, are unproven until the
``gpu`` tests have run on one.
"""

# ruff: noqa: N803, PLR0913  (Triton writes sizes known at compile time in capitals; kernels have no objects to pass)
from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime.interpreter import InterpretedFunction

Span = tuple[int, int, int, int]


class Launch(NamedTuple):
    """How the work of a kernel is cut. Powers of two, 16 at least."""

    rows: int = 64
    """Rows of a program."""
    others: int = 32
    """Rows of the other side that it meets at once."""
    channels: int = 16
    """Channels that are multiplied at once."""
    warps: int = 8
    """Of a program."""
    precision: Literal["ieee", "tf32x3"] = "ieee"
    """Of the products."""


LAUNCH = Launch()
"""Unproven; see above."""
MOST_CHANNELS = 256
MOST_NUMBERS = 2**31
LEAST_WIDTH = 16
"""tl.dot takes no narrower matrix; values are filled up to it with zeros."""


@triton.jit
def _load(rows_ptr, rows, is_row, columns, width):  # type: ignore[no-untyped-def]
    """Rows (t,) of a matrix whose rows are ``width`` long, as (t, columns), zeros outside."""
    inside = is_row[:, None] & (columns < width)[None, :]
    return tl.load(rows_ptr + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(rows_ptr, rows, is_row, columns, width, tile):  # type: ignore[no-untyped-def]
    inside = is_row[:, None] & (columns < width)[None, :]
    tl.store(rows_ptr + rows[:, None] * width + columns[None, :], tile, mask=inside)


@triton.jit
def _span(tiles, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's rows, which of them exist, and the other side's first and last row + 1."""
    entry = tiles + 4 * tl.program_id(0)
    rows = tl.load(entry) + tl.arange(0, T)
    return rows, rows < tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    own_ptr, rows, is_row, other_ptr, others, is_other, channels,
    T: tl.constexpr, N: tl.constexpr, C: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Inner products (T, N) of rows of the two sides, some channels at a time."""
    products = tl.zeros([T, N], tl.float32)
    for first in range(0, C, B):
        c = first + tl.arange(0, B)
        own = _load(own_ptr, rows, is_row, c, channels)
        other = _load(other_ptr, others, is_other, c, channels)
        products = tl.dot(own, tl.trans(other), products, input_precision=P)
    return products


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, tiles, scale, channels, width,
    T: tl.constexpr, N: tl.constexpr, C: tl.constexpr, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    rows, is_row, first, last = _span(tiles, T)
    w = tl.arange(0, W)
    best = tl.full([T], float("-inf"), tl.float32)
    total = tl.zeros([T], tl.float32)
    mean = tl.zeros([T, W], tl.float32)
    for start in range(first, last, N):
        others = start + tl.arange(0, N)
        is_other = others < last
        scores = _products(q, rows, is_row, k, others, is_other, channels, T, N, C, B, P) * scale
        scores = tl.where(is_other[None, :], scores, float("-inf"))
        greater = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - greater[:, None])
        shrink = tl.exp(best - greater)
        values = _load(v, others, is_other, w, width)
        mean = tl.dot(weights, values, mean * shrink[:, None], input_precision=P)
        total = total * shrink + tl.sum(weights, 1)
        best = greater
    _store(out, rows, is_row, w, width, mean / total[:, None])
    tl.store(lse + rows, best + tl.log(total), mask=is_row)


@triton.jit
def _backward_queries(  # type: ignore[no-untyped-def]
    q, k, v, grad, lse, delta, dq, tiles, scale, channels, width,
    T: tl.constexpr, N: tl.constexpr, C: tl.constexpr, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    rows, is_row, first, last = _span(tiles, T)
    c, w = tl.arange(0, C), tl.arange(0, W)
    grads = _load(grad, rows, is_row, w, width)
    row_lse = tl.load(lse + rows, mask=is_row, other=0.0)
    row_delta = tl.load(delta + rows, mask=is_row, other=0.0)
    total = tl.zeros([T, C], tl.float32)
    for start in range(first, last, N):
        others = start + tl.arange(0, N)
        is_other = others < last
        scores = _products(q, rows, is_row, k, others, is_other, channels, T, N, C, B, P) * scale
        weights = tl.where(is_other[None, :], tl.exp(scores - row_lse[:, None]), 0.0)
        values = _load(v, others, is_other, w, width)
        change = tl.dot(grads, tl.trans(values), input_precision=P) - row_delta[:, None]
        keys = _load(k, others, is_other, c, channels)
        total = tl.dot(weights * change, keys, total, input_precision=P)
    _store(dq, rows, is_row, c, channels, total * scale)


@triton.jit
def _backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, grad, lse, delta, dk, dv, tiles, scale, channels, width,
    T: tl.constexpr, N: tl.constexpr, C: tl.constexpr, B: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    rows, is_row, first, last = _span(tiles, T)  # of keys; the other side are queries
    c, w = tl.arange(0, C), tl.arange(0, W)
    values = _load(v, rows, is_row, w, width)
    total_k = tl.zeros([T, C], tl.float32)
    total_v = tl.zeros([T, W], tl.float32)
    for start in range(first, last, N):
        others = start + tl.arange(0, N)
        is_other = others < last
        scores = _products(k, rows, is_row, q, others, is_other, channels, T, N, C, B, P) * scale
        row_lse = tl.load(lse + others, mask=is_other, other=0.0)
        row_delta = tl.load(delta + others, mask=is_other, other=0.0)
        weights = tl.where(is_other[None, :], tl.exp(scores - row_lse[None, :]), 0.0)
        grads = _load(grad, others, is_other, w, width)
        change = tl.dot(values, tl.trans(grads), input_precision=P) - row_delta[None, :]
        total_v = tl.dot(weights, grads, total_v, input_precision=P)
        queries = _load(q, others, is_other, c, channels)
        total_k = tl.dot(weights * change, queries, total_k, input_precision=P)
    _store(dk, rows, is_row, c, channels, total_k * scale)
    _store(dv, rows, is_row, w, width, total_v)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: list[Span], tau: float, launch: Launch = LAUNCH
) -> tuple[Tensor, Tensor]:
    """Softmax attention inside each span.

    Args:
        q: (r, c) float32 unit features, sorted by label; c at most 256.
        k: (s, c) likewise.
        v: (s, w) what the keys carry.
        spans: rows of ``q`` and of ``k`` of every label.
        tau: temperature.
        launch: how the work is cut.

    Returns:
        (r, w) weighted means and (r,) log-sum-exps of the scores; the latter without gradient.

    Raises:
        ValueError: not on a GPU, not float32, too many channels, or too many rows.
    """
    if not q.is_cuda and not isinstance(_forward, InterpretedFunction):
        raise ValueError(
            f"the fused back-end needs CUDA, the features are on {q.device}: use chunked"
        )
    if q.dtype != torch.float32 or q.shape[1] > MOST_CHANNELS:
        raise ValueError(
            f"the fused back-end takes float32 features of at most {MOST_CHANNELS} channels, got {q.dtype} of "
            f"{q.shape[1]}: use chunked"
        )
    if max(len(q), len(k)) * q.shape[1] >= MOST_NUMBERS:
        raise ValueError(
            f"the fused back-end counts in 32 bits, {max(len(q), len(k))} rows of {q.shape[1]} are too many: use chunked"
        )
    found: tuple[Tensor, Tensor] = _Fused.apply(q, k, v, spans, tau, launch)
    return found


def tile_table(spans: list[Span], rows: int, device: torch.device) -> Tensor:
    """One row a tile: its first row, its label's last row + 1, and the other side's span. int32 (tiles, 4).

    Tiles that meet most come first: none of them is left to run alone at the end.
    """
    longest = sorted(spans, key=lambda span: span[2] - span[3])
    table = [(start, q1, k0, k1) for q0, q1, k0, k1 in longest for start in range(q0, q1, rows)]
    return torch.tensor(table, dtype=torch.int32).reshape(-1, 4).to(device, non_blocking=True)


class _Fused(torch.autograd.Function):
    """The kernels; saved for backward: the arguments, the result and the log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: list[Span], tau: float, launch: Launch
    ) -> tuple[Tensor, Tensor]:
        """(r, c), (s, c), (s, w) to (r, w) and (r,)."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = q.new_empty(len(q), v.shape[1]), q.new_empty(len(q))
        tiles = tile_table(spans, launch.rows, q.device)
        sizes = q.shape[1], v.shape[1]
        if len(tiles):
            with torch.cuda.device_of(q):
                shapes = _shapes(*sizes, launch)
                _forward[(len(tiles),)](q, k, v, out, lse, tiles, 1 / tau, *sizes, **shapes)
        ctx.save_for_backward(q, k, v, out, lse, tiles)
        ctx.mark_non_differentiable(lse)
        ctx.spans, ctx.tau, ctx.launch = spans, tau, launch
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """See ``models.blender.warp``: the same five products."""
        q, k, v, out, lse, tiles = ctx.saved_tensors
        grad = grad.float().contiguous()
        delta = (grad * out).sum(dim=-1)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        common = (q, k, v, grad, lse, delta)
        sizes = q.shape[1], v.shape[1]
        shapes = _shapes(*sizes, ctx.launch)
        if len(tiles):
            turned = [(k0, k1, q0, q1) for q0, q1, k0, k1 in ctx.spans]
            of_keys = tile_table(turned, ctx.launch.rows, q.device)
            scale = 1 / ctx.tau
            with torch.cuda.device_of(q):
                _backward_queries[(len(tiles),)](*common, dq, tiles, scale, *sizes, **shapes)
                _backward_keys[(len(of_keys),)](*common, dk, dv, of_keys, scale, *sizes, **shapes)
        return dq, dk, dv, None, None, None


def _shapes(channels: int, width: int, launch: Launch) -> dict[str, int | str]:
    """What a kernel is compiled for."""
    padded = max(16, triton.next_power_of_2(channels))
    return {
        "T": launch.rows,
        "N": launch.others,
        "C": padded,
        "B": min(launch.channels, padded),
        "W": max(LEAST_WIDTH, triton.next_power_of_2(width)),
        "P": launch.precision,
        "num_warps": launch.warps,
        "num_stages": 2,
    }
