"""Triton kernels for the grouped product, for what ``torch.nn.functional.grouped_mm`` does not take on a GPU.

Groups are cut into tiles of rows. How many tiles there are is known only on the device; there are at most as many as
whole tiles in all rows, and one more for each group. So many programs are started, and each finds its own tile in the
offsets. Nothing is read back, so the kernels can be captured in a CUDA graph, and nothing is added by atomics, so two
runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it
    triton = tl = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels multiply. They add in float32."""


def available() -> bool:
    """Whether there is a Triton to compile the kernels with."""
    return triton is not None


def multiply(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Each row times the weight of its group, plus its bias.

    Args:
        rows: ``[P, K]``, sorted by group, any strides.
        weight: ``[E, K, N]``, in the dtype of ``rows``, any strides.
        offsets: where each group ends, ``[E]`` int32.
        bias: what is added before rounding, ``[E, N]``, any strides.

    Returns:
        ``[P, N]``, contiguous. Rows past the last offset are not written.
    """
    (pairs, inner), columns, groups = rows.shape, weight.shape[2], weight.shape[0]
    result = rows.new_empty(pairs, columns)
    if result.numel() == 0:
        return result
    block_m = _rows_of_a_tile(pairs, groups, rows.dtype)
    block_n, block_k = _block(columns, 128 if rows.dtype.itemsize == 2 else 64), _block(inner, 32)
    grid = (triton.cdiv(pairs, block_m) + groups, triton.cdiv(columns, block_n))
    bias_strides = bias.stride() if bias is not None else (0, 0)
    sizes = (groups, inner, columns, *rows.stride(), *weight.stride(), *bias_strides)
    blocks = (block_m, block_n, block_k, _groups_of_a_load(groups), bias is not None, _precision())
    with torch.cuda.device_of(rows):
        _multiply[grid](rows, weight, offsets, bias if bias is not None else result, result, *sizes, *blocks)
    return result


def outer(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """For each group, its rows transposed times their gradient.

    Args:
        rows: ``[P, K]``, sorted by group, any strides.
        grad: ``[P, N]``, in the dtype of ``rows``, any strides.
        offsets: where each group ends, ``[E]`` int32.

    Returns:
        ``[E, K, N]``, contiguous. Zero for a group without rows; rows past the last offset count for nothing.
    """
    inner, columns, groups = rows.shape[1], grad.shape[1], offsets.shape[0]
    result = rows.new_empty(groups, inner, columns)
    if result.numel() == 0:
        return result
    block_k, block_n = _block(inner, 64), _block(columns, 128 if rows.dtype.itemsize == 2 else 64)
    blocks_k = triton.cdiv(inner, block_k)
    grid = (groups * blocks_k, triton.cdiv(columns, block_n))
    sizes = (blocks_k, inner, columns, *rows.stride(), *grad.stride())
    with torch.cuda.device_of(rows):
        _outer[grid](rows, grad, offsets, result, *sizes, 32, block_n, block_k, _precision())
    return result


def _rows_of_a_tile(pairs: int, groups: int, dtype: torch.dtype) -> int:
    """About as many as a group has if all have the same."""
    return _block(triton.cdiv(pairs, groups), 128 if dtype.itemsize == 2 else 64)


def _block(size: int, largest: int) -> int:
    """A power of two that holds ``size``, at least what a product of tiles needs and ``largest`` at most."""
    return max(16, min(largest, int(triton.next_power_of_2(size))))


def _groups_of_a_load(groups: int) -> int:
    return max(16, int(triton.next_power_of_2(groups)))


def _precision() -> str:
    """How float32 is multiplied: as by torch's own matmul."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _kernel(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_kernel
def _find_tile(offsets, tile, groups, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The group of a tile, its first row, and where the rows of the group end: 0 and 0 where there is no such tile."""
    group = tl.arange(0, GROUPS)
    inside = group < groups
    end = tl.load(offsets + group, mask=inside, other=0)
    start = tl.load(offsets + group - 1, mask=inside & (group > 0), other=0)
    tiles = tl.where(inside, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    before = tl.cumsum(tiles, 0) - tiles
    own = (before <= tile) & (tile < before + tiles)
    first = tl.sum(tl.where(own, start + (tile - before) * BLOCK_M, 0), 0)
    return tl.sum(tl.where(own, group, 0), 0), first, tl.sum(tl.where(own, end, 0), 0)


@_kernel
def _multiply(  # type: ignore[no-untyped-def]
    rows,
    weight,
    offsets,
    bias,
    result,
    groups,
    inner,
    columns,
    rows_stride_m,
    rows_stride_k,
    weight_stride_e,
    weight_stride_k,
    weight_stride_n,
    bias_stride_e,
    bias_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, first, stop = _find_tile(offsets, tl.program_id(0), groups, BLOCK_M, GROUPS)
    if first < stop:
        m = first + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        # 64 bits: a table of weights can hold more than 2**31 entries.
        row = rows + m[:, None].to(tl.int64) * rows_stride_m
        column = weight + group.to(tl.int64) * weight_stride_e + n[None, :].to(tl.int64) * weight_stride_n
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, inner, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            row_mask = (m[:, None] < stop) & (k[None, :] < inner)
            column_mask = (k[:, None] < inner) & (n[None, :] < columns)
            left = tl.load(row + k[None, :].to(tl.int64) * rows_stride_k, mask=row_mask, other=0.0)
            right = tl.load(column + k[:, None].to(tl.int64) * weight_stride_k, mask=column_mask, other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        if HAS_BIAS:
            added = tl.load(bias + group.to(tl.int64) * bias_stride_e + n * bias_stride_n, mask=n < columns, other=0.0)
            total += added[None, :].to(tl.float32)
        at = result + m[:, None].to(tl.int64) * columns + n[None, :]
        tl.store(at, total.to(result.dtype.element_ty), mask=(m[:, None] < stop) & (n[None, :] < columns))


@_kernel
def _outer(  # type: ignore[no-untyped-def]
    rows,
    grad,
    offsets,
    result,
    blocks_k,
    inner,
    columns,
    rows_stride_m,
    rows_stride_k,
    grad_stride_m,
    grad_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group = tl.program_id(0) // blocks_k
    first = tl.load(offsets + group - 1, mask=group > 0, other=0)
    stop = tl.load(offsets + group)
    k = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for start in range(first, stop, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row = rows + m[None, :].to(tl.int64) * rows_stride_m + k[:, None].to(tl.int64) * rows_stride_k
        own = grad + m[:, None].to(tl.int64) * grad_stride_m + n[None, :].to(tl.int64) * grad_stride_n
        left = tl.load(row, mask=(k[:, None] < inner) & (m[None, :] < stop), other=0.0)
        right = tl.load(own, mask=(m[:, None] < stop) & (n[None, :] < columns), other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    at = result + group.to(tl.int64) * inner * columns + k[:, None].to(tl.int64) * columns + n[None, :]
    tl.store(at, total.to(result.dtype.element_ty), mask=(k[:, None] < inner) & (n[None, :] < columns))
