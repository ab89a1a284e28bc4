"""Triton kernels behind `recsys_losses.blocked`; imported only where they run.

The item axis is divided among programs so that a batch of a thousand rows fills a GPU; their partial results are
summed by torch. No atomics: results are the same in every run. Products are in IEEE float32, not TF32, because the
gradients are promised to 1e-5.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

_PROGRAMS = 512  # about four for each multiprocessor of a large GPU


@triton.jit  # type: ignore[untyped-decorator]
def _scores(  # type: ignore[no-untyped-def]
    u, it, bias, exclude, row, row_ok, col, col_ok, HAS_BIAS: tl.constexpr, HAS_EXCLUDE: tl.constexpr
):
    s = tl.dot(u, tl.trans(it), input_precision="ieee")
    if HAS_BIAS:
        s += tl.load(bias + col, mask=col_ok, other=0.0)[None, :]
    keep = col_ok[None, :] & row_ok[:, None]
    if HAS_EXCLUDE:
        left_out = tl.load(exclude + row, mask=row_ok, other=-1)
        keep = keep & (col[None, :] != left_out[:, None])
    return tl.where(keep, s, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _load(table, index, ok, dim, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, DIM)
    at = table + index[:, None] * dim + d[None, :]
    return tl.load(at, mask=ok[:, None] & (d < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    user,
    item,
    bias,
    exclude,
    partial,
    rows,
    items,
    dim,
    per_split,
    HAS_BIAS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    u = _load(user, row, row_ok, dim, DIM)
    start = tl.program_id(1).to(tl.int64) * per_split
    stop = tl.minimum(start + per_split, items)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(start, stop, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        col_ok = col < stop
        it = _load(item, col, col_ok, dim, DIM)
        s = _scores(u, it, bias, exclude, row, row_ok, col, col_ok, HAS_BIAS, HAS_EXCLUDE)
        higher = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf would be NaN
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        peak = higher
    empty = total <= 0  # a NaN is not, and stays
    lse = tl.where(empty, float("-inf"), peak + tl.log(tl.where(empty, 1.0, total)))
    tl.store(partial + tl.program_id(1).to(tl.int64) * rows + row, lse, mask=row_ok)


@triton.jit  # type: ignore[untyped-decorator]
def _user_kernel(  # type: ignore[no-untyped-def]
    user,
    item,
    bias,
    exclude,
    lse,
    grad,
    partial,
    rows,
    items,
    dim,
    per_split,
    HAS_BIAS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    u = _load(user, row, row_ok, dim, DIM)
    norm = tl.load(lse + row, mask=row_ok, other=0.0)
    start = tl.program_id(1).to(tl.int64) * per_split
    stop = tl.minimum(start + per_split, items)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(start, stop, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        col_ok = col < stop
        it = _load(item, col, col_ok, dim, DIM)
        s = _scores(u, it, bias, exclude, row, row_ok, col, col_ok, HAS_BIAS, HAS_EXCLUDE)
        acc += tl.dot(tl.exp(s - norm[:, None]), it, input_precision="ieee")
    acc *= tl.load(grad + row, mask=row_ok, other=0.0)[:, None]
    d = tl.arange(0, DIM)
    at = partial + (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * dim + d[None, :]
    tl.store(at, acc, mask=row_ok[:, None] & (d < dim)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _item_kernel(  # type: ignore[no-untyped-def]
    user,
    item,
    bias,
    exclude,
    lse,
    grad,
    grad_item,
    grad_bias,
    rows,
    items,
    dim,
    HAS_BIAS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
):
    col = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    col_ok = col < items
    it = _load(item, col, col_ok, dim, DIM)
    acc = tl.zeros((COLUMNS, DIM), tl.float32)
    acc_bias = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        row_ok = row < rows
        u = _load(user, row, row_ok, dim, DIM)
        s = _scores(u, it, bias, exclude, row, row_ok, col, col_ok, HAS_BIAS, HAS_EXCLUDE)
        norm = tl.load(lse + row, mask=row_ok, other=0.0)
        weight = tl.load(grad + row, mask=row_ok, other=0.0)
        p = tl.exp(s - norm[:, None]) * weight[:, None]
        acc += tl.dot(tl.trans(p), u, input_precision="ieee")
        acc_bias += tl.sum(p, 0)
    d = tl.arange(0, DIM)
    tl.store(grad_item + col[:, None] * dim + d[None, :], acc, mask=col_ok[:, None] & (d < dim)[None, :])
    if HAS_BIAS:
        tl.store(grad_bias + col, acc_bias, mask=col_ok)


def _shape(user: Tensor, bias: Tensor | None, exclude: Tensor | None) -> dict[str, Any]:
    """Return the compile-time parameters shared by the kernels."""
    dim = max(16, triton.next_power_of_2(user.shape[1]))
    side = 64 if dim <= 64 else 32  # keeps a program under 70 KB of shared memory
    return {
        "HAS_BIAS": bias is not None,
        "HAS_EXCLUDE": exclude is not None,
        "ROWS": side,
        "COLUMNS": side,
        "DIM": dim,
        "enable_fp_fusion": True,
    }


def _splits(rows: int, items: int, side: int) -> tuple[int, int, int]:
    """Return (row blocks, parts of the item axis, items per part) for square blocks of scores."""
    row_blocks = triton.cdiv(rows, side)
    wanted = max(1, min(triton.cdiv(_PROGRAMS, row_blocks), triton.cdiv(items, side)))
    per_split = triton.cdiv(triton.cdiv(items, wanted), side) * side
    return row_blocks, triton.cdiv(items, per_split), per_split


def forward(user: Tensor, item: Tensor, bias: Tensor | None, exclude: Tensor | None) -> Tensor:
    """Return the log-sum-exp (B,) of float32 users against a float32 or half-precision item table."""
    user, item = user.contiguous(), item.contiguous()
    shape = _shape(user, bias, exclude)
    row_blocks, splits, per_split = _splits(len(user), len(item), shape["ROWS"])
    partial = user.new_empty(splits, len(user))
    _forward_kernel[(row_blocks, splits)](
        user,
        item,
        user if bias is None else bias.contiguous(),
        user if exclude is None else exclude.contiguous(),
        partial,
        len(user),
        len(item),
        user.shape[1],
        per_split,
        **shape,
    )
    return torch.logsumexp(partial, 0)


def backward(
    grad: Tensor, lse: Tensor, user: Tensor, item: Tensor, bias: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of user, item and bias in float32."""
    user, item = user.contiguous(), item.contiguous()
    empty = lse == -torch.inf  # every item of the row is excluded: no gradient, and -inf minus -inf must not appear
    inputs = (
        user,
        item,
        user if bias is None else bias.contiguous(),
        user if exclude is None else exclude.contiguous(),
        lse.masked_fill(empty, 0),
        grad.contiguous().masked_fill(empty, 0),
    )
    shape = _shape(user, bias, exclude)
    row_blocks, splits, per_split = _splits(len(user), len(item), shape["ROWS"])
    partial = user.new_empty(splits, *user.shape)
    _user_kernel[(row_blocks, splits)](*inputs, partial, len(user), len(item), user.shape[1], per_split, **shape)
    grad_item = torch.empty_like(item, dtype=user.dtype)
    grad_bias = None if bias is None else torch.empty_like(bias)
    _item_kernel[(triton.cdiv(len(item), shape["COLUMNS"]),)](
        *inputs,
        grad_item,
        user if grad_bias is None else grad_bias,
        len(user),
        len(item),
        user.shape[1],
        **shape,
    )
    return partial.sum(0), grad_item, grad_bias
