"""A sort of the pairs by their experts, by counting."""

from __future__ import annotations

from moe_rewrite.lower.kernels.language import jit, tl


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
    inverse,
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
        tl.store(inverse + i, place, mask=i < pairs)
        free += tl.histogram(key, GROUPS)
