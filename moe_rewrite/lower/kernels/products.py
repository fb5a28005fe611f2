"""Products of rows with the weights of their experts."""

from __future__ import annotations

from moe_rewrite.lower.kernels.language import jit, tl
from moe_rewrite.lower.kernels.steps import _finish


@jit
def _product(left, right, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies bf16 as if its bits were integers
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@jit
def _find_tile(start, end, tile, groups, pairs, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """The group of a tile, its first row, and where the group ends: 0 and 0 where there is no such tile.

    The rows past the last offset are a group of their own, number ``groups``.
    """
    group = tl.arange(0, GROUPS)
    end = tl.where(group == groups, pairs, end)
    tiles = tl.where(group <= groups, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    before = tl.cumsum(tiles, 0) - tiles
    own = (before <= tile) & (tile < before + tiles)
    first = tl.sum(tl.where(own, start + (tile - before) * BLOCK_M, 0), 0)
    return tl.sum(tl.where(own, group, 0), 0), first, tl.sum(tl.where(own, end, 0), 0)


@jit
def _load(at, k, n, inner, columns, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    """A block of a weight, with zeros for what is outside. No mask where nothing is."""
    if EVEN_K:
        if EVEN_N:
            block = tl.load(at)
        else:
            block = tl.load(at, mask=n < columns, other=0.0)
    elif EVEN_N:
        block = tl.load(at, mask=k < inner, other=0.0)
    else:
        block = tl.load(at, mask=(k < inner) & (n < columns), other=0.0)
    return block


@jit
def _vector(at, expert, n, stride_e, stride_n, columns):
    return tl.load(at + expert * stride_e + n.to(tl.int64) * stride_n, mask=n < columns, other=0.0).to(tl.float32)


@jit
def _described(weight, group, column, start, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of a weight that is given by a descriptor, with zeros for what is outside."""
    return weight.load([group, column, start]).reshape(WIDTH, BLOCK_K).T


@jit
def _multiply_tile(
    rows,
    order,
    weight,
    second_weight,
    vectors,
    result,
    tile,
    sizes,
    strides,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    DIVIDES_K: tl.constexpr,
    DIVIDES_N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    VECTORS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The columns from ``begin`` on of the rows from ``first`` to ``stop``, ``BLOCK_M`` of them at most."""
    group, first, stop, begin = tile
    groups, inner, columns, own, after = sizes
    rows_m, rows_k, weight_e, weight_k, weight_n, second_e, second_k, second_n = strides
    vector, second_vector, vector_e, vector_n, second_vector_e, second_vector_n = vectors
    EVEN_K: tl.constexpr = DIVIDES_K % BLOCK_K == 0
    EVEN_N: tl.constexpr = DIVIDES_N % BLOCK_N == 0
    m = first + tl.arange(0, BLOCK_M)
    n = begin + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < stop) & (n[None, :] < columns)
    # Rows outside are read as if they were the last one: no mask while multiplying.
    m = tl.minimum(m, stop - 1)
    pair = tl.load(order + m) if HAS_ORDER else m
    to = result + pair[:, None].to(tl.int64) * columns + n[None, :]
    if group == groups:
        tl.store(to, tl.zeros((BLOCK_M, BLOCK_N), dtype=result.dtype.element_ty), mask=inside)
    else:
        WIDTH: tl.constexpr = BLOCK_N * 2 if INTERLEAVED else BLOCK_N
        SCALE: tl.constexpr = 2 if INTERLEAVED else 1
        k = tl.arange(0, BLOCK_K)
        column = begin * SCALE + tl.arange(0, WIDTH)
        # 64 bits: a table of weights can hold more than 2**31 entries.
        expert = group.to(tl.int64)
        left_at = rows + (pair // after % own)[:, None].to(tl.int64) * rows_m + k[None, :].to(tl.int64) * rows_k
        total = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
        second = total
        if not DESCRIBED:
            at = weight + expert * weight_e + column[None, :].to(tl.int64) * weight_n
            at += k[:, None].to(tl.int64) * weight_k
            second_at = at
            if PRODUCTS == 2:
                if not INTERLEAVED:
                    second_at = second_weight + expert * second_e + column[None, :].to(tl.int64) * second_n
                    second_at += k[:, None].to(tl.int64) * second_k
        for start in range(0, inner, BLOCK_K):
            if EVEN_K:
                left = tl.load(left_at)
            else:
                left = tl.load(left_at, mask=k[None, :] < inner - start, other=0.0)
            if DESCRIBED:
                right = _described(weight, group, begin * SCALE, start, WIDTH, BLOCK_K)
            else:
                right = _load(at, k[:, None], column[None, :], inner - start, columns * SCALE, EVEN_K, EVEN_N)
                at += BLOCK_K * weight_k
            total = _product(left, right, total, PRECISION, WIDEN)
            if PRODUCTS == 2:
                if not INTERLEAVED:
                    if DESCRIBED:
                        right = _described(second_weight, group, begin, start, WIDTH, BLOCK_K)
                    else:
                        right = _load(second_at, k[:, None], column[None, :], inner - start, columns, EVEN_K, EVEN_N)
                        second_at += BLOCK_K * second_k
                    second = _product(left, right, second, PRECISION, WIDEN)
            left_at += BLOCK_K * rows_k
        if INTERLEAVED:
            total, second = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N, 2)))
        own_vector = total
        other_vector = total
        if VECTORS >= 1:
            own_vector = _vector(vector, expert, n, vector_e, vector_n, columns)[None, :]
        if VECTORS == 2:
            other_vector = _vector(second_vector, expert, n, second_vector_e, second_vector_n, columns)[None, :]
        value = _finish(total, second, own_vector, other_vector, PRODUCTS, VECTORS, EPILOGUE)
        tl.store(to, value.to(result.dtype.element_ty), mask=inside)


@jit
def multiply(
    rows,
    order,
    offsets,
    weight,
    second_weight,
    vector,
    second_vector,
    result,
    pairs,
    groups,
    inner,
    columns,
    own,
    after,
    rows_m,
    rows_k,
    weight_e,
    weight_k,
    weight_n,
    second_e,
    second_k,
    second_n,
    vector_e,
    vector_n,
    second_vector_e,
    second_vector_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    HALVES: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    DIVIDES_K: tl.constexpr,
    DIVIDES_N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    VECTORS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of ``result[pair] = epilogue(rows[pair // after % own] @ weight[group], ...)``, zero for no group.

    Two weights of which one has the even and one the odd columns of a matrix (``INTERLEAVED``) are read as that matrix,
    ``weight``, and what it gives is taken apart.

    Programs that run at the same time share weights and rows in the cache: ``TILES_TOGETHER`` tiles go through all
    columns before the next ones do. ``DIVIDES_K`` and ``DIVIDES_N`` are powers of two that divide ``inner`` and
    ``columns``: blocks that divide those need no masks. The rows that a group ends with are multiplied as half a tile
    where they fit (``HALVES``).

    Weights are pointers, or descriptors (``DESCRIBED``) of ``[group, column, inner]`` in blocks of one group: then a
    program loads a block by one instruction (TMA).
    """
    blocks_n = tl.cdiv(columns, BLOCK_N)
    # Every group may end with a tile that is not full, that of no expert too; no tile is empty.
    tiles = min(pairs, tl.cdiv(pairs, BLOCK_M) + groups + 1)
    together = tl.program_id(0) // (TILES_TOGETHER * blocks_n) * TILES_TOGETHER
    height = min(tiles - together, TILES_TOGETHER)
    within = tl.program_id(0) % (TILES_TOGETHER * blocks_n)
    each = tl.arange(0, GROUPS)
    starts = tl.load(offsets + each - 1, mask=(each > 0) & (each <= groups), other=0)
    ends = tl.load(offsets + each, mask=each < groups, other=0)
    group, first, stop = _find_tile(starts, ends, together + within % height, groups, pairs, BLOCK_M, GROUPS)
    if first < stop:
        HALF: tl.constexpr = BLOCK_M // 2 if HALVES and BLOCK_M >= 128 else BLOCK_M
        tile = (group, first, stop, within // height * BLOCK_N)
        sizes = (groups, inner, columns, own, after)
        strides = (rows_m, rows_k, weight_e, weight_k, weight_n, second_e, second_k, second_n)
        vectors = (vector, second_vector, vector_e, vector_n, second_vector_e, second_vector_n)
        given = (rows, order, weight, second_weight, vectors, result, tile, sizes, strides)
        if HALF == BLOCK_M:
            _multiply_tile(
                *given, BLOCK_M, BLOCK_N, BLOCK_K, HAS_ORDER, DIVIDES_K, DIVIDES_N, PRODUCTS, INTERLEAVED, DESCRIBED,
                VECTORS, EPILOGUE, PRECISION, WIDEN,
            )  # fmt: skip
        elif stop - first <= HALF:
            _multiply_tile(
                *given, HALF, BLOCK_N, BLOCK_K, HAS_ORDER, DIVIDES_K, DIVIDES_N, PRODUCTS, INTERLEAVED, DESCRIBED,
                VECTORS, EPILOGUE, PRECISION, WIDEN,
            )  # fmt: skip
        else:
            _multiply_tile(
                *given, BLOCK_M, BLOCK_N, BLOCK_K, HAS_ORDER, DIVIDES_K, DIVIDES_N, PRODUCTS, INTERLEAVED, DESCRIBED,
                VECTORS, EPILOGUE, PRECISION, WIDEN,
            )  # fmt: skip


@jit
def multiply_each(
    rows,
    experts,
    weight,
    second_weight,
    vector,
    second_vector,
    result,
    groups,
    inner,
    columns,
    own,
    after,
    rows_m,
    rows_k,
    weight_e,
    weight_k,
    weight_n,
    second_e,
    second_k,
    second_n,
    vector_e,
    vector_n,
    second_vector_e,
    second_vector_n,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIVIDES_K: tl.constexpr,
    DIVIDES_N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VECTORS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """The same for one pair a program: no sorting, for so few pairs that hardly two share an expert."""
    EVEN_K: tl.constexpr = DIVIDES_K % BLOCK_K == 0
    EVEN_N: tl.constexpr = DIVIDES_N % BLOCK_N == 0
    pair = tl.program_id(1)
    expert = tl.load(experts + pair).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_N
    n = begin + tl.arange(0, BLOCK_N)
    to = result + pair.to(tl.int64) * columns + n
    if (expert < 0) | (expert >= groups):
        tl.store(to, tl.zeros((BLOCK_N,), dtype=result.dtype.element_ty), mask=n < columns)
    else:
        WIDTH: tl.constexpr = BLOCK_N * 2 if INTERLEAVED else BLOCK_N
        SCALE: tl.constexpr = 2 if INTERLEAVED else 1
        k = tl.arange(0, BLOCK_K)
        column = begin * SCALE + tl.arange(0, WIDTH)
        left_at = rows + (pair // after % own).to(tl.int64) * rows_m + k.to(tl.int64) * rows_k
        at = weight + expert * weight_e + column[:, None].to(tl.int64) * weight_n
        at += k[None, :].to(tl.int64) * weight_k
        totals = tl.zeros((WIDTH, BLOCK_K), dtype=tl.float32)
        second_at = at
        seconds = totals
        if PRODUCTS == 2:
            if not INTERLEAVED:
                second_at = second_weight + expert * second_e + column[:, None].to(tl.int64) * second_n
                second_at += k[None, :].to(tl.int64) * second_k
        for start in range(0, inner, BLOCK_K):
            if EVEN_K:
                left = tl.load(left_at).to(tl.float32)
            else:
                left = tl.load(left_at, mask=k < inner - start, other=0.0).to(tl.float32)
            right = _load(at, k[None, :], column[:, None], inner - start, columns * SCALE, EVEN_K, EVEN_N)
            totals += left[None, :] * right.to(tl.float32)
            if PRODUCTS == 2:
                if not INTERLEAVED:
                    right = _load(second_at, k[None, :], column[:, None], inner - start, columns, EVEN_K, EVEN_N)
                    seconds += left[None, :] * right.to(tl.float32)
                    second_at += BLOCK_K * second_k
            left_at += BLOCK_K * rows_k
            at += BLOCK_K * weight_k
        total = tl.sum(totals, 1)
        second = total
        if INTERLEAVED:
            total, second = tl.split(tl.reshape(total, (BLOCK_N, 2)))
        elif PRODUCTS == 2:
            second = tl.sum(seconds, 1)
        own_vector = total
        other_vector = total
        if VECTORS >= 1:
            own_vector = _vector(vector, expert, n, vector_e, vector_n, columns)
        if VECTORS == 2:
            other_vector = _vector(second_vector, expert, n, second_vector_e, second_vector_n, columns)
        value = _finish(total, second, own_vector, other_vector, PRODUCTS, VECTORS, EPILOGUE)
        tl.store(to, value.to(result.dtype.element_ty), mask=n < columns)
