"""Triton kernels for products of rows with the weights of their experts.

Rows stay in the order of the expert ids. What sorts them by expert is one list of numbers, and the kernels read and
write rows through it: nothing is permuted in memory.

The pairs of an expert are cut into tiles of rows. How many tiles there are is known only on the device; there are at
most as many as whole tiles in all pairs, and one more for each expert. So many programs are started, and each finds its
own tile in the offsets. Nothing is read back, so the kernels can be captured in a CUDA graph, and nothing is added by
atomics, so two runs give the same bits.

An *epilogue* is a program of elementwise steps on the products, given as text: ``"silu v0;mul v2 v1"`` is
``silu(first product) * second product``. Words that start with ``v`` are values: products, then the vectors of the
expert, then the results of the steps before. Others are numbers. ``epilogue.py`` writes such programs.

Functions called by kernels take no pointers that they load from where their results say what is written: torch's search
for what a kernel writes takes all arguments of such a call for that, and copies of them would be made.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import constexpr_function, jit
except ImportError:  # torch for the CPU comes without it
    triton = tl = None

    def jit(function: Any) -> Any:
        return function

    constexpr_function = jit


@constexpr_function
def _length(epilogue):
    return len(epilogue.split(";")) if epilogue else 0


@constexpr_function
def _operator(epilogue, step):
    return epilogue.split(";")[step].split(" ")[0]


@constexpr_function
def _is_value(epilogue, step, number):
    return epilogue.split(";")[step].split(" ")[number][0] == "v"


@constexpr_function
def _index(epilogue, step, number):
    return int(epilogue.split(";")[step].split(" ")[number][1:])


@constexpr_function
def _constant(epilogue, step, number):
    return float(epilogue.split(";")[step].split(" ")[number])


@jit
def _operand(values, epilogue: tl.constexpr, step: tl.constexpr, number: tl.constexpr):
    if _is_value(epilogue, step, number):
        found = values[_index(epilogue, step, number)]
    else:
        found = tl.full((), _constant(epilogue, step, number), tl.float32)
    return found


@jit
def _binary(operator: tl.constexpr, a, b):
    if operator == "add":
        result = a + b
    elif operator == "sub":
        result = a - b
    elif operator == "mul":
        result = a * b
    elif operator == "div":
        result = a / b
    # Comparisons with NaN are false, so the next four keep it, as torch does.
    elif operator == "clamp_min":
        result = tl.where(a < b, b, a)
    elif operator == "clamp_max":
        result = tl.where(a > b, b, a)
    elif operator == "maximum":
        result = tl.where((a > b) | (a != a), a, b)
    else:
        tl.static_assert(operator == "minimum")
        result = tl.where((a < b) | (a != a), a, b)
    return result


@jit
def _unary(operator: tl.constexpr, a):
    if operator == "silu":
        result = a / (1.0 + tl.exp(-a))
    elif operator == "sigmoid":
        result = 1.0 / (1.0 + tl.exp(-a))
    elif operator == "relu":
        result = tl.where(a < 0.0, 0.0, a)
    elif operator == "gelu":
        result = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif operator == "gelu_tanh":  # 0.5 * (1 + tanh(y)) is sigmoid(2 y)
        result = a / (1.0 + tl.exp(-1.5957691216057308 * (a + 0.044715 * a * a * a)))
    elif operator == "exp":
        result = tl.exp(a)
    elif operator == "abs":
        result = tl.abs(a)
    elif operator == "neg":
        result = a * -1.0  # Triton's `-a` is `0 - a`, which loses the sign of a zero
    elif operator == "square":
        result = a * a
    elif operator == "bfloat16":
        result = a.to(tl.bfloat16).to(tl.float32)
    else:
        tl.static_assert(operator == "float16")
        result = a.to(tl.float16).to(tl.float32)
    return result


@constexpr_function
def _is_binary(epilogue, step):
    return len(epilogue.split(";")[step].split(" ")) == 3


@jit
def _run(values, epilogue: tl.constexpr):
    """What the last step of an epilogue gives; the first value where it has no steps."""
    for step in tl.static_range(_length(epilogue)):
        first = _operand(values, epilogue, step, 1)
        if _is_binary(epilogue, step):
            result = _binary(_operator(epilogue, step), first, _operand(values, epilogue, step, 2))
        else:
            result = _unary(_operator(epilogue, step), first)
        values = values + (result,)
    if _length(epilogue) == 0:
        last = values[0]
    else:
        last = values[len(values) - 1]
    return last


@jit
def _finish(first, second, vectors, others, PRODUCTS: tl.constexpr, VECTORS: tl.constexpr, EPILOGUE: tl.constexpr):
    """The epilogue over the products and vectors that there are."""
    values = (first,)
    if PRODUCTS == 2:
        values = values + (second,)
    if VECTORS >= 1:
        values = values + (vectors,)
    if VECTORS == 2:
        values = values + (others,)
    return _run(values, EPILOGUE)


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
    GROUPS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    DIVIDES_K: tl.constexpr,
    DIVIDES_N: tl.constexpr,
    PRODUCTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
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
    ``columns``: blocks that divide those need no masks.
    """
    EVEN_K: tl.constexpr = DIVIDES_K % BLOCK_K == 0
    EVEN_N: tl.constexpr = DIVIDES_N % BLOCK_N == 0
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
        m = first + tl.arange(0, BLOCK_M)
        begin = within // height * BLOCK_N
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
            at = weight + expert * weight_e + column[None, :].to(tl.int64) * weight_n
            at += k[:, None].to(tl.int64) * weight_k
            total = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
            second_at = at
            second = total
            if PRODUCTS == 2:
                if not INTERLEAVED:
                    second_at = second_weight + expert * second_e + column[None, :].to(tl.int64) * second_n
                    second_at += k[:, None].to(tl.int64) * second_k
            for start in range(0, inner, BLOCK_K):
                if EVEN_K:
                    left = tl.load(left_at)
                else:
                    left = tl.load(left_at, mask=k[None, :] < inner - start, other=0.0)
                right = _load(at, k[:, None], column[None, :], inner - start, columns * SCALE, EVEN_K, EVEN_N)
                total = _product(left, right, total, PRECISION, WIDEN)
                if PRODUCTS == 2:
                    if not INTERLEAVED:
                        right = _load(second_at, k[:, None], column[None, :], inner - start, columns, EVEN_K, EVEN_N)
                        second = _product(left, right, second, PRECISION, WIDEN)
                        second_at += BLOCK_K * second_k
                left_at += BLOCK_K * rows_k
                at += BLOCK_K * weight_k
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


@jit
def outer(
    rows,
    grad,
    order,
    offsets,
    result,
    inner,
    columns,
    own,
    after,
    rows_m,
    rows_k,
    grad_m,
    grad_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of ``result[group] = sum of rows[pair // after % own] x grad[pair]`` over the pairs of the group."""
    blocks_k = tl.cdiv(inner, BLOCK_K)
    group = tl.program_id(0) // blocks_k
    first = tl.load(offsets + group - 1, mask=group > 0, other=0)
    stop = tl.load(offsets + group)
    k = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for start in range(first, stop, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        pair = tl.load(order + m, mask=m < stop, other=0) if HAS_ORDER else m
        row = (pair // after % own).to(tl.int64)
        left_at = rows + row[None, :] * rows_m + k[:, None].to(tl.int64) * rows_k
        right_at = grad + pair[:, None].to(tl.int64) * grad_m + n[None, :].to(tl.int64) * grad_n
        left = tl.load(left_at, mask=(k[:, None] < inner) & (m[None, :] < stop), other=0.0)
        right = tl.load(right_at, mask=(m[:, None] < stop) & (n[None, :] < columns), other=0.0)
        total = _product(left, right, total, PRECISION, WIDEN)
    to = result + group.to(tl.int64) * inner * columns + k[:, None].to(tl.int64) * columns + n[None, :]
    tl.store(to, total.to(result.dtype.element_ty), mask=(k[:, None] < inner) & (n[None, :] < columns))


@jit
def _key(key, i, pairs, groups):
    """The expert of pairs ``i``; ``groups`` for those of no expert, ``groups + 1`` for what is no pair."""
    key = tl.where((key >= 0) & (key < groups), key, groups)  # before it is made smaller
    return tl.where(i < pairs, key.to(tl.int32), groups + 1)


@jit
def count(experts, counts, pairs, groups, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """How many pairs of each expert are in one block of pairs: ``counts[block]``, ``GROUPS`` entries."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _key(tl.load(experts + i, mask=i < pairs, other=0), i, pairs, groups)
    tl.store(counts + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), tl.histogram(key, GROUPS))


@jit
def sort(
    experts,
    counts,
    order,
    offsets,
    pairs,
    groups,
    blocks,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    COUNTED: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    """A stable sort by expert of one block of pairs. ``GROUPS`` holds the experts and two more, see ``_key``.

    Where what is before it comes from depends on ``HAS_COUNTS``: from the counts of all blocks, ``COUNTED`` blocks at a
    time, or, for few pairs, from counting all pairs anew, ``COUNTED`` pairs at a time: that saves a launch.
    """
    begin = tl.program_id(0) * BLOCK
    group = tl.arange(0, GROUPS)
    total = tl.zeros((GROUPS,), dtype=tl.int32)
    before = tl.zeros((GROUPS,), dtype=tl.int32)
    if HAS_COUNTS:
        for start in range(0, blocks, COUNTED):
            block = start + tl.arange(0, COUNTED)
            at = counts + block[:, None] * GROUPS + group[None, :]
            found = tl.load(at, mask=block[:, None] < blocks, other=0)
            total += tl.sum(found, 0)
            before += tl.sum(tl.where(block[:, None] < tl.program_id(0), found, 0), 0)
    else:
        for start in range(0, pairs, COUNTED):
            i = start + tl.arange(0, COUNTED)
            key = _key(tl.load(experts + i, mask=i < pairs, other=0), i, pairs, groups)
            total += tl.histogram(key, GROUPS)
            before += tl.histogram(tl.where(i < begin, key, groups + 1), GROUPS)
    ends = tl.cumsum(total, 0)
    if begin == 0:
        tl.store(offsets + group, ends, mask=group < groups)
    free = ends - total + before  # the next place of each expert
    for start in range(begin, begin + BLOCK, PART):
        i = start + tl.arange(0, PART)
        key = _key(tl.load(experts + i, mask=i < pairs, other=0), i, pairs, groups)
        earlier = (key[:, None] == key[None, :]) & (i[None, :] < i[:, None])
        place = tl.gather(free, key, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(order + place, i, mask=i < pairs)
        free += tl.histogram(key, GROUPS)
