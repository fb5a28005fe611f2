"""Rows of pairs that are of no expert."""

from __future__ import annotations

from moe_rewrite.lower.kernels.language import jit, tl


@jit
def lend(rows, offsets, pairs, groups, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Make ``rows`` past the last offset the first row, zeros where that is past it too.

    Few programs have anything to do, as a rule none: the others are not read.
    """
    end = tl.load(offsets + groups - 1)
    begin = tl.program_id(0) * BLOCK_M
    if begin + BLOCK_M > end:
        m = begin + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.load(rows + n, mask=(n < columns) & (end > 0), other=0.0)
        to = rows + m[:, None].to(tl.int64) * columns + n[None, :]
        inside = (m[:, None] >= end) & (m[:, None] < pairs) & (n[None, :] < columns)
        tl.store(to, tl.broadcast_to(row[None, :], (BLOCK_M, BLOCK_N)), mask=inside)
