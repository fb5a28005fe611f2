"""Tiles of the kernels: how large a piece each program computes.

Each function gives the tile that is taken, then those that ``max-autotune`` modes try besides. The first ones for
operands of 16 bits are the best of some 20 on an H200 (docs/performance.md); the others have been compiled, not timed.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel is cut into programs.

    Attributes:
        blocks: the kernel's block sizes, by name.
        warps: warps of a program.
        stages: how many blocks of each operand are loaded ahead.
    """

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    @classmethod
    def of(cls, warps: int, stages: int, **blocks: int) -> Tile:
        return cls(tuple(blocks.items()), warps, stages)

    def arguments(self) -> dict[str, int]:
        """What the kernel is called with."""
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": self.stages}


@functools.lru_cache(1024)  # asked at each launch in an operator, by sizes that may be new each time
def of_products(
    pairs: int, groups: int, inner: int, columns: int, products: int, dtype: torch.dtype, wide: bool
) -> tuple[Tile, ...]:
    """For ``kernels.multiply``: about as many rows as an expert has if all have the same. Two products share a tile.

    Args:
        pairs: rows of the result.
        groups: the number of experts.
        inner: the dimension that is summed.
        columns: columns of the result.
        products: how many products are computed at once.
        dtype: of the operands.
        wide: whether operands are multiplied where they are in shared memory, see `launch._multiplies_wide`.
    """
    rows = -(-pairs // groups)
    if dtype.itemsize == 4:
        sizes = [(16 if rows <= 12 else 64, 64, 32, 4, 3)]
    elif rows <= 16 and wide:
        sizes = [(16, 128, 128, 4, 4), (16, 64, 256, 4, 3), (16, 64, 128, 4, 4), (32, 128, 64, 4, 4)]
    elif rows <= 16:
        sizes = [(16, 128, 64, 4, 4), (16, 64, 128, 4, 3), (32, 128, 64, 4, 3)]
    elif rows <= 48:
        sizes = [(64, 128, 64, 4, 4 if wide else 3), (32, 128, 64, 4, 4 if wide else 3)]
        sizes += [(64, 256, 64, 8, 4), (64, 256, 64, 4, 4), (128, 256, 64, 8, 3)] if wide else [(128, 128, 64, 8, 3)]
    elif wide:
        sizes = [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (64, 256, 64, 4, 4), (128, 128, 64, 8, 3)]
    else:
        sizes = [(128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3)]
    found = []
    for block_m, most_n, most_k, warps, stages in sizes:
        if inner % most_k and inner % (most_k // 2) == 0:
            most_k //= 2  # loads without masks are worth more than deep ones
        block_n, block_k = block(columns, most_n // products), block(inner, most_k)
        found.append(Tile.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k))
    return tuple(dict.fromkeys(found))


@functools.lru_cache(1024)
def of_single_rows(inner: int, columns: int, products: int, is_along_inner: bool) -> tuple[Tile, ...]:
    """For ``kernels.multiply_each``: each thread reads 16 bytes at a time along the dimension that is contiguous.

    ``is_along_inner`` says whether that is the dimension that is summed.
    """
    if not is_along_inner:
        sizes = [(32, 128, 4)] if products == 2 else [(64, 256, 8)]
    elif products == 2:
        sizes = [(2, 1024, 4), (8, 256, 1), (4, 1024, 2), (4, 512, 1)]
    else:
        sizes = [(4, 512, 1), (4, 1024, 2), (4, 512, 2), (16, 256, 2)]
    found = [
        Tile.of(warps, 3, BLOCK_N=min(most_n, power(columns)), BLOCK_K=min(most_k, power(inner)))
        for most_n, most_k, warps in sizes
    ]
    return tuple(dict.fromkeys(found))


@functools.lru_cache(1024)
def of_gradients(
    inner: int, columns: int, dtype: torch.dtype, wide: bool, described: bool = False, stored: bool = False
) -> tuple[Tile, ...]:
    """For ``kernels.outer``, which adds up ``BLOCK_M`` rows at a time. With descriptors there is one tile.

    Args:
        inner: rows of a gradient.
        columns: its columns.
        dtype: of the operands.
        wide: see :func:`of_products`.
        described: whether operands are read by descriptors.
        stored: whether the result is written by one.
    """
    if described or stored:
        sizes = [(32, 128, 128, 4, 4 if described else 3)]
    elif dtype.itemsize == 4:
        sizes = [(32, 64, 64, 4, 3)]
    elif wide:
        sizes = [(64, 128, 128, 4, 3), (32, 128, 128, 4, 4), (64, 64, 256, 4, 3), (64, 128, 256, 8, 3)]
    else:
        sizes = [(32, 128, 64, 4, 3), (32, 128, 128, 8, 3)]
    found = [
        Tile.of(warps, stages, BLOCK_M=rows, BLOCK_N=block(columns, most_n), BLOCK_K=block(inner, most_k))
        for rows, most_k, most_n, warps, stages in sizes
    ]
    return tuple(dict.fromkeys(found))


def of_sort(pairs: int, bins: int, has_counts: bool) -> dict[str, int]:
    """Block sizes of ``kernels.sort``.

    With counts there is about a program for each multiprocessor, and not more: each of them goes through the counts of
    all, then through its own pairs, a part at a time.
    """
    part = block(pairs, 128)
    if not has_counts:
        return {"BLOCK": part, "PART": part, "COUNTED": block(pairs, 1024)}
    return {"BLOCK": max(part, power(-(-pairs // 128))), "PART": part, "COUNTED": max(16, 8192 // bins)}


def of_lending(columns: int) -> dict[str, int]:
    """Block sizes of ``kernels.lend``, most of whose programs do nothing: large, so that they are few."""
    return {"BLOCK_M": 64, "BLOCK_N": min(1024, power(columns))}


def power(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def block(size: int, largest: int) -> int:
    """A power of two that holds ``size``, at least what a product of tiles needs and ``largest`` at most."""
    return max(16, min(largest, power(size)))


def divisor(size: int) -> int:
    """The largest power of two that divides ``size``, up to the largest block."""
    return min(size & -size, 4096)
