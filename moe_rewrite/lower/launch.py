"""Launches of the kernels: grids, tiles, and what else they have to be told."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from moe_rewrite.lower import kernels

try:
    import triton
except ImportError:  # torch for the CPU comes without it
    triton = None

HAS_TRITON = triton is not None
FEW = 2048
"""Up to how many pairs one launch sorts them."""


def available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: a GPU of NVIDIA's; any device where Triton interprets them."""
    if triton is None:
        return False
    return interpreted() or (device.type == "cuda" and torch.version.hip is None)


def interpreted() -> bool:
    """Whether the kernels are interpreted: what Triton's setting was when they were made."""
    return triton is not None and not isinstance(kernels.multiply, triton.JITFunction)


def sort(experts: Tensor, groups: int, *, seen: bool) -> tuple[Tensor, Tensor]:
    """See :func:`rows_mm.sort_by_expert`.

    Args:
        experts: the expert of each pair, ``[P]``.
        groups: the number of experts.
        seen: whether compilers are to see the kernels, by ``torch.library.wrap_triton``.
    """
    pairs = experts.shape[0]
    order = experts.new_empty(pairs, dtype=torch.int32)
    if pairs == 0:
        return order, experts.new_zeros(groups, dtype=torch.int32)
    offsets = experts.new_empty(groups, dtype=torch.int32)
    experts = experts.contiguous()
    bins, counts, counted = _power(groups + 2), offsets, _block(pairs, 1024)
    block = part = _block(pairs, 128)
    has_counts = pairs > FEW
    with _on(experts, seen):
        if has_counts:
            block, counted = 1024, 16
            blocks = triton.cdiv(pairs, block)
            counts = experts.new_empty(blocks, bins, dtype=torch.int32)
            _kernel(kernels.count, seen)[(blocks,)](experts, counts, pairs, groups, BLOCK=block, GROUPS=bins)
        blocks = triton.cdiv(pairs, block)
        _kernel(kernels.sort, seen)[(blocks,)](
            *(experts, counts, order, offsets, pairs, groups, blocks),
            BLOCK=block,
            PART=part,
            COUNTED=counted,
            GROUPS=bins,
            HAS_COUNTS=has_counts,
        )
    return order, offsets


def multiply(
    rows: Tensor,
    weights: list[Tensor],
    vectors: list[Tensor],
    order: Tensor | None,
    offsets: Tensor | None,
    experts: Tensor | None,
    pairs: int,
    own: int,
    after: int,
    interleaved: bool,
    epilogue: str,
    dtype: torch.dtype,
    *,
    seen: bool,
) -> Tensor:
    """See :func:`rows_mm.rows_mm`: pair ``p`` has row ``p // after % own``; where ``own`` is 0 it has row ``p``."""
    groups, inner, columns = weights[0].shape
    if interleaved:
        columns //= 2
    result = rows.new_empty(pairs, columns, dtype=dtype)
    if result.numel() == 0:
        return result
    told = experts if experts is not None else offsets
    assert told is not None
    told = told.contiguous()
    # In the place of what is not there stands something that is not read, and that nothing has to be computed for.
    both, added = [*weights, told][:2], [*vectors, told, told][:2]
    strides = [*rows.stride()]
    for tensors, rank in ((weights, 3), (vectors, 2)):
        strides += [stride for tensor in tensors for stride in tensor.stride()] + [0] * rank * (2 - len(tensors))
    products = 2 if interleaved else len(weights)
    program = {
        "PRODUCTS": products,
        "INTERLEAVED": interleaved,
        "VECTORS": len(vectors),
        "EPILOGUE": epilogue,
    }
    launch: dict[str, Any]
    own = own or pairs
    with _on(rows, seen):
        if experts is not None:
            launch = _columns_of_a_program(inner, columns, weights[0])
            sizes = (groups, inner, columns, own, after)
            _kernel(kernels.multiply_each, seen)[(triton.cdiv(columns, launch["BLOCK_N"]), pairs)](
                rows, told, *both, *added, result, *sizes, *strides, **program, **launch
            )
            return result
        wide = _multiplies_wide(rows.device)
        launch = _tile(pairs, groups, inner, columns, products, rows.dtype, wide)
        # Every group may end with a tile that is not full, that of no expert too; no tile is empty.
        tiles = min(pairs, triton.cdiv(pairs, launch["BLOCK_M"]) + groups + 1)
        _kernel(kernels.multiply, seen)[(tiles * triton.cdiv(columns, launch["BLOCK_N"]),)](
            *(rows, told if order is None else order.contiguous(), told, *both, *added, result),
            *(pairs, groups, inner, columns, own, after, *strides, tiles),
            GROUPS=_power(groups + 1),
            HAS_ORDER=order is not None,
            PRECISION=_precision(),
            WIDEN=interpreted() and rows.dtype is torch.bfloat16,
            **program,
            **launch,
        )
    return result


def outer(
    rows: Tensor, grad: Tensor, order: Tensor | None, offsets: Tensor, own: int, after: int, *, seen: bool
) -> Tensor:
    """See :func:`rows_mm.rows_outer`; ``own`` is 0 where each pair has its own row."""
    inner, columns, groups = rows.shape[1], grad.shape[1], offsets.shape[0]
    result = rows.new_empty(groups, inner, columns)
    if result.numel() == 0:
        return result
    launch = _outer_tile(inner, columns, rows.dtype, _multiplies_wide(rows.device))
    blocks_k = triton.cdiv(inner, launch["BLOCK_K"])
    grid = (groups * blocks_k, triton.cdiv(columns, launch["BLOCK_N"]))
    offsets = offsets.contiguous()
    with _on(rows, seen):
        _kernel(kernels.outer, seen)[grid](
            *(rows, grad, offsets if order is None else order.contiguous(), offsets, result),
            *(blocks_k, inner, columns, own or max(1, grad.shape[0]), after, *rows.stride(), *grad.stride()),
            **launch,
            HAS_ORDER=order is not None,
            PRECISION=_precision(),
            WIDEN=interpreted() and rows.dtype is torch.bfloat16,
        )
    return result


def _kernel(kernel: Any, seen: bool) -> Any:
    return torch.library.wrap_triton(kernel) if seen else kernel


def _on(tensor: Tensor, seen: bool) -> Any:
    return torch.cuda.device_of(tensor) if tensor.is_cuda and not seen else contextlib.nullcontext()


@functools.cache
def _multiplies_wide(device: torch.device) -> bool:
    """Whether a device multiplies tiles that are not in registers: SM90 and SM100. The others need narrower ones."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tile(
    pairs: int, groups: int, inner: int, columns: int, products: int, dtype: torch.dtype, wide: bool
) -> dict[str, Any]:
    """Tiles of about as many rows as an expert has if all have the same. Two products share a tile.

    Those of 16 bits are the best of some 20 on an H200, see docs/performance.md.
    """
    rows = triton.cdiv(pairs, groups)
    if dtype.itemsize == 4:
        most_m, most_n, most_k, warps, stages = (16 if rows <= 12 else 64), 64, 32, 4, 3
    elif rows <= 16:
        most_m, most_n, most_k, warps, stages = 16, 128, (128 if wide else 64), 4, 4
    elif rows <= 64:
        most_m, most_n, most_k, warps, stages = 64, 128, 64, 4, 4
    elif wide:
        most_m, most_n, most_k, warps, stages = 128, 256, 64, 8, (4 if inner <= 2048 else 3)
    else:
        most_m, most_n, most_k, warps, stages = 128, 128, 64, 8, 3
    if inner % most_k and inner % (most_k // 2) == 0:
        most_k //= 2  # loads without masks are worth more than deep ones
    block_n, block_k = _block(columns, most_n // products), _block(inner, most_k)
    return {
        "BLOCK_M": most_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "TILES_TOGETHER": 8,
        "EVEN_K": inner % block_k == 0,
        "EVEN_N": columns % block_n == 0,
        "num_warps": warps,
        "num_stages": stages,
    }


def _outer_tile(inner: int, columns: int, dtype: torch.dtype, wide: bool) -> dict[str, Any]:
    """Tiles of a gradient, and how many rows are read at a time."""
    if dtype.itemsize == 4:
        most_k, most_n, rows, warps = 64, 64, 32, 4
    elif wide:
        most_k, most_n, rows, warps = 128, 256, 64, 8
    else:
        most_k, most_n, rows, warps = 64, 128, 32, 4
    blocks = {"BLOCK_M": rows, "BLOCK_N": _block(columns, most_n), "BLOCK_K": _block(inner, most_k)}
    return {**blocks, "num_warps": warps, "num_stages": 3}


def _columns_of_a_program(inner: int, columns: int, weight: Tensor) -> dict[str, Any]:
    """As many weights a program that each thread reads 16 bytes at a time along the dimension that is contiguous."""
    block_n, block_k = (8, 512) if weight.stride(1) == 1 else (64, 64)
    block_n, block_k = min(block_n, _power(columns)), min(block_k, _power(inner))
    even = {"EVEN_K": inner % block_k == 0, "EVEN_N": columns % block_n == 0}
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, **even, "num_warps": 4, "num_stages": 3}


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _block(size: int, largest: int) -> int:
    """A power of two that holds ``size``, at least what a product of tiles needs and ``largest`` at most."""
    return max(16, min(largest, _power(size)))


def _precision() -> str:
    """How float32 is multiplied: as by torch's own matmul."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
