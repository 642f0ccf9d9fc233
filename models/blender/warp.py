"""The correspondence of the Blender: every pixel of A gets a softmax-weighted mean of the pixels of T that carry its label.

Equation (8) of the HeSer supplement and its §5 fix the form: ``softmax_v(Γ^k(u, v) / τ)`` over the pixels ``v`` of T with
the label ``k`` of ``u``. Pixels of different labels share no row, so the matrix falls apart into one block a label.

One function, :func:`warp`, and four ways to compute it, exact all of them:

* ``dense`` makes the whole masked matrix. The reference of the tests; 1 GiB a matrix at 128 x 128.
* ``blocks`` makes one small matrix a label and leaves the backward pass to autograd, which keeps them.
* ``chunked`` walks through each block by rows, keeps no part of it but the log-sum-exp of each row, and computes the rows
  again in the backward pass (the scheme of memory-efficient attention, Rabe and Staats 2021, and FlashAttention). Memory grows
  linearly with the number of pixels. The default.
* ``fused`` is ``chunked`` as three Triton kernels over all labels at once. Needs CUDA (see ``models/blender/fused.py``).

Everything is computed in float32 or better whatever autocast says: rounded to bfloat16, a cosine is off by up to 2.6e-3,
which at τ = 0.01 is a quarter of a logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Backend = Literal["dense", "blocks", "chunked", "fused"]
Span = tuple[int, int, int, int]
"""First and last + 1 of the rows of a label among the sorted queries, and the same among the sorted keys."""


@dataclass(frozen=True, kw_only=True)
class WarpConfig:
    """How pixels are matched and how that is computed."""

    tau: float = 0.01
    """Temperature τ of the softmax over cosines. Not in the supplement; CoCosNet's value."""
    backend: Backend = "chunked"
    """``dense``, ``blocks``, ``chunked`` or ``fused``; the result is the same."""
    chunk: int = 1024
    """Rows of a block that ``chunked`` holds at once."""

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 row, got {self.chunk}")
        if self.backend not in ("dense", "blocks", "chunked", "fused"):
            raise ValueError(
                f"no backend called {self.backend!r}; known: dense, blocks, chunked, fused"
            )


class Warped(NamedTuple):
    """What :func:`warp` returns."""

    values: Tensor
    """(b, v, n) in the layout of the queries; 0 where no key carries the query's label."""
    log_sum_exp: Tensor
    """(b, n) of each row's scores, without gradient; -inf where no key carries the query's label."""


def unit_features(features: Tensor) -> Tensor:
    """Features centred over their channels and scaled to length 1, so that their inner products are the cosines Γ.

    Args:
        features: (b, c, ...) of any float type.

    Returns:
        Same shape, float32 or float64. A location whose channels are all equal becomes 0, not NaN.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit: Tensor = _Unit.apply(_widened(features))
        return unit


class _Unit(torch.autograd.Function):
    """Centred and scaled; saves the result and a number a location, where autograd would keep the centred features, too."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        """(b, c, ...) to the same."""
        centred = features - features.mean(dim=1, keepdim=True)
        scale = (
            torch.linalg.vector_norm(centred, dim=1, keepdim=True).clamp_min_(1e-8).reciprocal_()
        )
        unit = centred.mul_(scale)
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Of the gradient what is neither along the features nor along their mean, scaled as they were."""
        unit, scale = ctx.saved_tensors
        along = (unit * grad).sum(dim=1, keepdim=True)
        change = torch.addcmul(grad - grad.mean(dim=1, keepdim=True), unit, along, value=-1)
        return change.mul_(scale)


def warp(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    config: WarpConfig,
) -> Warped:
    """Softmax-weighted means of ``values`` over the keys that carry each query's label. Exact gradients to all three.

    The inverse warp is the same function with the roles swapped; nothing is kept between the two.

    Args:
        queries: (b, c, n) features of A; the warp itself makes them :func:`unit_features`, those of pixels that take part.
        keys: (b, c, m) features of T, likewise.
        values: (b, v, m) what T's pixels carry: colours, or anything else.
        query_labels: (b, n) integers; a negative one takes no part.
        key_labels: (b, m) likewise.
        config: temperature and back-end.

    Raises:
        ValueError: shapes do not fit together, or ``fused`` cannot be used here.
    """
    _check(queries, keys, values, query_labels, key_labels)
    with torch.autocast(queries.device.type, enabled=False), _full_precision():
        v = _widened(values)
        if config.backend == "dense":
            units = unit_features(queries), unit_features(keys)
            return _dense(*units, v, query_labels, key_labels, config.tau)
        groups = group_by_label(query_labels, key_labels)
        q, k = _Rows.apply(queries, groups.queries), _Rows.apply(keys, groups.keys)
        rows = unit_features(q), unit_features(k), _Rows.apply(v, groups.keys)
        match config.backend:
            case "blocks":
                found, lse = _blocks(*rows, groups.spans, config.tau)
            case "chunked":
                found, lse = _Chunked.apply(*rows, groups.spans, config.tau, config.chunk)
            case "fused":
                from models.blender.fused import fused_attention

                found, lse = fused_attention(*rows, groups.spans, config.tau)
        batch, _, n = queries.shape
        out = found.new_zeros(batch * n, v.shape[1]).index_copy(0, groups.queries, found)
        log_sum_exp = lse.new_full((batch * n,), -torch.inf).index_copy(0, groups.queries, lse)
        return Warped(
            out.unflatten(0, (batch, n)).transpose(1, 2), log_sum_exp.unflatten(0, (batch, n))
        )


class LabelGroups(NamedTuple):
    """The pixels of a batch sorted by sample and label; only those whose label both sides have."""

    queries: Tensor
    """(r,) rows of the flattened (b n) queries."""
    keys: Tensor
    """(s,) rows of the flattened (b m) keys."""
    spans: list[Span]
    """One a sample and label."""


def group_by_label(query_labels: Tensor, key_labels: Tensor) -> LabelGroups:
    """Labels (b, n) and (b, m) to the pixels that take part, sorted, and where each label begins and ends."""
    batch = query_labels.shape[0]
    labels = 1 + max(
        (int(side.max()) for side in (query_labels, key_labels) if side.numel()), default=-1
    )
    numbers = [_numbered(side, labels) for side in (query_labels, key_labels)]
    counts = [torch.bincount(side, minlength=batch * labels + 1) for side in numbers]
    shared = (counts[0] > 0) & (counts[1] > 0)
    shared[-1] = False  # the pixels that take no part
    orders = []
    for side in numbers:
        kept = shared[side].nonzero().flatten()
        orders.append(kept[side[kept].argsort(stable=True)])
    sizes = torch.stack([side[shared] for side in counts], dim=1).tolist()
    spans, q, k = [], 0, 0
    for n, m in sizes:
        spans.append((q, q + n, k, k + m))
        q, k = q + n, k + m
    return LabelGroups(orders[0], orders[1], spans)


def _numbered(labels: Tensor, most: int) -> Tensor:
    """(b, n) labels to (b n) numbers that differ between samples; ``b * most`` for what takes no part."""
    batch = labels.shape[0]
    offset = torch.arange(batch, device=labels.device)[:, None] * most
    wide = labels.long()
    return torch.where(wide < 0, batch * most, wide + offset).flatten()


def _check(queries: Tensor, keys: Tensor, values: Tensor, *labels: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (queries, keys, values, *labels)]
    fits = (
        [len(shape) for shape in shapes] == [3, 3, 3, 2, 2]
        and len({shape[0] for shape in shapes}) == 1
        and shapes[0][1] == shapes[1][1]
        and shapes[0][2] == shapes[3][1]
        and shapes[1][2] == shapes[2][2] == shapes[4][1]
    )
    if not fits:
        raise ValueError(
            "warp wants queries (b, c, n), keys (b, c, m), values (b, v, m), labels (b, n) and (b, m), got "
            + ", ".join(map(str, shapes))
        )


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Rows(torch.autograd.Function):
    """(b, c, n) to the rows (r, c) of some of its pixels, no pixel twice. No copy of the whole is made, nor of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        """``order``: (r,) indices into the flattened (b n) pixels."""
        ctx.save_for_backward(order)
        ctx.shape = x.shape
        pixels = x.shape[2]
        return x[order // pixels, :, order % pixels]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Each row back to where it came from."""
        (order,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.shape)
        whole[order // ctx.shape[2], :, order % ctx.shape[2]] = grad
        return whole, None


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 products: they would cost up to a tenth of a logit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, query_labels: Tensor, key_labels: Tensor, tau: float
) -> Warped:
    scores = (q / tau).transpose(1, 2) @ k  # (b, n, m)
    different = query_labels[:, :, None] != key_labels[:, None, :]
    different |= (query_labels < 0)[:, :, None]
    alone = different.all(dim=-1)
    # in place, and not -inf: rows without any key stay finite, forward and backward
    scores.masked_fill_(different, torch.finfo(scores.dtype).min / 2)
    log_sum_exp = scores.detach().logsumexp(dim=-1).masked_fill(alone, -torch.inf)
    out = scores.softmax(dim=-1) @ v.transpose(1, 2)
    return Warped(out.masked_fill(alone[..., None], 0).transpose(1, 2), log_sum_exp)


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, spans: list[Span], tau: float
) -> tuple[Tensor, Tensor]:
    # the first, empty piece ties the result to the arguments when no label is shared
    found, lse = [(q[:0] @ k[:0].T) @ v[:0]], [q.new_zeros(0)]
    for q0, q1, k0, k1 in spans:
        scores = (q[q0:q1] / tau) @ k[k0:k1].T
        lse.append(scores.detach().logsumexp(dim=-1))
        found.append(scores.softmax(dim=-1) @ v[k0:k1])
    return torch.cat(found), torch.cat(lse)


class _Chunked(torch.autograd.Function):
    """Rows of all labels, a chunk at a time. Saved for backward: the arguments, the result and the log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: list[Span], tau: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        """(r, c), (s, c), (s, w) to (r, w) and (r,)."""
        out, lse = q.new_empty(len(q), v.shape[1]), q.new_empty(len(q))
        for rows, columns in _pieces(spans, chunk):
            scores = (q[rows] / tau) @ k[columns].T
            lse[rows] = scores.logsumexp(dim=-1)
            out[rows] = scores.sub_(lse[rows, None]).exp_() @ v[columns]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.spans, ctx.tau, ctx.chunk = spans, tau, chunk
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """``P = exp(S - l); dV = Pᵀ dO; dS = P (dO Vᵀ - δ) / τ; dQ = dS K; dK = dSᵀ Q`` with ``δ = Σ dO O``."""
        q, k, v, out, lse = ctx.saved_tensors
        wants_features = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with torch.autocast(q.device.type, enabled=False), _full_precision():
            delta = (grad * out).sum(dim=-1, keepdim=True)
            for rows, columns in _pieces(ctx.spans, ctx.chunk):
                scaled = q[rows] / ctx.tau
                weights = torch.addmm(-lse[rows, None], scaled, k[columns].T).exp_()
                dv[columns] += weights.T @ grad[rows]
                if wants_features:
                    weights *= torch.addmm(-delta[rows], grad[rows], v[columns].T)
                    dq[rows] = (weights @ k[columns]).div_(ctx.tau)
                    dk[columns] += weights.T @ scaled
        return dq, dk, dv, None, None, None


def _pieces(spans: list[Span], chunk: int) -> Iterator[tuple[slice, slice]]:
    for q0, q1, k0, k1 in spans:
        for start in range(q0, q1, chunk):
            yield slice(start, min(start + chunk, q1)), slice(k0, k1)
