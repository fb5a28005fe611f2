"""Gradients of the experts' weights."""

from __future__ import annotations

from moe_rewrite.lower.kernels.language import jit, tl
from moe_rewrite.lower.kernels.products import _product


@jit
def _outer_of_rows(
    rows, grad, order, start, stop, k, n, total, sizes, strides, BLOCK_M: tl.constexpr, HAS_ORDER: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``total`` and the products of the rows from ``start`` on, ``BLOCK_M`` at most, and before ``stop``."""
    inner, columns, own, after = sizes
    rows_m, rows_k, grad_m, grad_n = strides
    m = start + tl.arange(0, BLOCK_M)
    pair = tl.load(order + m, mask=m < stop, other=0) if HAS_ORDER else m
    row = (pair // after % own).to(tl.int64)
    left_at = rows + row[None, :] * rows_m + k[:, None].to(tl.int64) * rows_k
    right_at = grad + pair[:, None].to(tl.int64) * grad_m + n[None, :].to(tl.int64) * grad_n
    left = tl.load(left_at, mask=(k[:, None] < inner) & (m[None, :] < stop), other=0.0)
    right = tl.load(right_at, mask=(m[:, None] < stop) & (n[None, :] < columns), other=0.0)
    return _product(left, right, total, PRECISION, WIDEN)


@jit
def outer(
    rows,
    grad,
    described_rows,
    described_grad,
    order,
    offsets,
    result,
    described_result,
    inner,
    columns,
    own,
    after,
    rows_m,
    rows_k,
    grad_m,
    grad_n,
    result_e,
    result_k,
    result_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    DESCRIBED: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of ``result[group] = sum of rows[pair // after % own] x grad[pair]`` over the pairs of the group.

    With descriptors (``DESCRIBED``) of blocks of ``rows`` and ``grad`` whole blocks are read through them. Each pair
    has its own row then, and pairs are sorted. What is left of a group is read with masks: the rows that follow are of
    another group, and may hold anything.

    ``STORED`` says that the result is written through a descriptor, and which of its dimensions comes last there:
    "inner" or "columns"; it is empty where there is none.
    """
    # All tiles of a group, then those of the next: they share its rows in the cache.
    blocks_k = tl.cdiv(inner, BLOCK_K)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (blocks_k * blocks_n)
    within = tl.program_id(0) % (blocks_k * blocks_n)
    first = tl.load(offsets + group - 1, mask=group > 0, other=0)
    stop = tl.load(offsets + group)
    begin_k = within // blocks_n * BLOCK_K
    begin_n = within % blocks_n * BLOCK_N
    k = begin_k + tl.arange(0, BLOCK_K)
    n = begin_n + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    given = (rows, grad, order)
    sizes = (inner, columns, own, after)
    strides = (rows_m, rows_k, grad_m, grad_n)
    if DESCRIBED:
        whole = first + (stop - first) // BLOCK_M * BLOCK_M
        for start in range(first, whole, BLOCK_M):
            left = described_rows.load([start, begin_k])
            right = described_grad.load([start, begin_n])
            total = _product(left.T, right, total, PRECISION, WIDEN)
        if whole < stop:
            total = _outer_of_rows(
                *given, whole, stop, k, n, total, sizes, strides, BLOCK_M, HAS_ORDER, PRECISION, WIDEN
            )
    else:
        for start in range(first, stop, BLOCK_M):
            total = _outer_of_rows(
                *given, start, stop, k, n, total, sizes, strides, BLOCK_M, HAS_ORDER, PRECISION, WIDEN
            )
    value = total.to(result.dtype.element_ty)
    if STORED == "inner":
        described_result.store([group, begin_n, begin_k], value.T.reshape(1, BLOCK_N, BLOCK_K))
    elif STORED == "columns":
        described_result.store([group, begin_k, begin_n], value.reshape(1, BLOCK_K, BLOCK_N))
    else:
        to = result + group.to(tl.int64) * result_e
        to += k[:, None].to(tl.int64) * result_k + n[None, :].to(tl.int64) * result_n
        tl.store(to, value, mask=(k[:, None] < inner) & (n[None, :] < columns))
