"""Launches of the kernels: grids, tiles, and what else they have to be told."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_rewrite.lower import kernels, visible
from moe_rewrite.lower.descriptors import HAS_DESCRIPTORS, can_be_described, describe, is_aligned
from moe_rewrite.lower.tiles import Tile, divisor, of_gradients, of_lending, of_products, of_single_rows, of_sort, power

try:
    import triton
except ImportError:  # torch for the CPU comes without it
    triton = None

HAS_TRITON = triton is not None
FEW = 2048
"""Up to how many pairs one launch sorts them."""
MANY_ROWS = 49
"""From how many rows an expert on operands are read by descriptors, where they can be: tiles have 128 rows there."""
MUCH_WORK = 4 * 10**10
"""From how many multiplications on: some 130 us on an H200. For less nothing was seen to be gained."""
MAX_HALVED_ROWS = 511
"""Up to how many rows an expert its last ones are multiplied as half a tile: it costs the other tiles some 4 %."""


def available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: NVIDIA's GPUs from SM80 on; any device where Triton interprets them."""
    if triton is None:
        return False
    return interpreted() or (device.type == "cuda" and torch.version.hip is None and _capability(device) >= 8)


def interpreted() -> bool:
    """Whether the kernels are interpreted: what Triton's setting was when they were made."""
    return triton is not None and not isinstance(kernels.multiply, triton.JITFunction)


def describes(weights: list[Tensor], rows: Any) -> bool:
    """Whether products of ``rows`` rows with weights ``[E, K, N]`` read these by descriptors.

    That is 4 to 10 % faster on an H200 for weights that are contiguous along K, and no faster for others
    (docs/performance.md). The numbers may be symbols: then it is false.
    """
    groups, inner, _ = weights[0].shape
    columns = sum(weight.shape[2] for weight in weights)
    if not _is_much_work(groups, rows, inner, columns, weights[0].dtype, weights[0].device):
        return False
    return all(weight.stride(1) == 1 and can_be_described(weight) for weight in weights)


def describes_gradients(
    groups: int, rows: Any, inner: Any, columns: Any, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a gradient of weights ``[groups, inner, columns]`` is computed from sorted copies, by descriptors."""
    if not _is_much_work(groups, rows, inner, columns, dtype, device):
        return False
    return bool(inner % 8 == 0 and columns % 8 == 0)


def _stores_gradients(result: Tensor) -> bool:
    """Whether gradients of weights are written through a descriptor: a third faster where experts have few rows.

    The memory is ours, so it starts at an aligned address.
    """
    return result.dtype.itemsize == 2 and _multiplies_wide(result.device) and can_be_described(result)


def _is_much_work(groups: int, rows: Any, inner: Any, columns: Any, dtype: torch.dtype, device: torch.device) -> bool:
    if not HAS_DESCRIPTORS or not all(isinstance(size, int) for size in (rows, inner, columns)) or dtype.itemsize != 2:
        return False
    is_much = rows >= MANY_ROWS * groups and rows * inner * columns >= MUCH_WORK
    return bool(is_much) and _multiplies_wide(device)


def sort(experts: Tensor, groups: int, *, seen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`rows_mm.sort_by_expert`.

    Args:
        experts: the expert of each pair, ``[P]``.
        groups: the number of experts.
        seen: whether compilers are to see the kernels, by ``torch.library.wrap_triton``.
    """
    pairs = experts.shape[0]
    order, inverse = (experts.new_empty(pairs, dtype=torch.int32) for _ in range(2))
    if pairs == 0:
        return order, inverse, experts.new_zeros(groups, dtype=torch.int32)
    offsets = experts.new_empty(groups, dtype=torch.int32)
    experts = experts.contiguous()
    bins, counts, has_counts = power(groups + 2), offsets, pairs > FEW
    blocked = of_sort(pairs, bins, has_counts)
    size = blocked["BLOCK"]
    blocks = triton.cdiv(pairs, size)
    launch = visible.launch if seen else _launch

    def grid(meta: Any) -> tuple[int]:
        return (blocks,)

    with _on(experts):
        if has_counts:
            counts = experts.new_empty(blocks, bins, dtype=torch.int32)
            args: tuple[Any, ...] = experts, counts, pairs, groups
            (counts,) = launch(kernels.count, grid, args, {"BLOCK": size, "GROUPS": bins}, ("counts",))
        args = experts, counts, order, inverse, offsets, pairs, groups, blocks
        constants = {**blocked, "GROUPS": bins, "HAS_COUNTS": has_counts}
        order, inverse, offsets = launch(kernels.sort, grid, args, constants, ("order", "inverse", "offsets"))
    return order, inverse, offsets


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
    max_autotune: bool,
    behind: Tensor | None = None,
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
    rows = visible.computed_once(kernels.multiply, rows) if seen else rows
    told = experts if experts is not None else offsets
    assert told is not None
    told = told.contiguous()
    # In the place of what is not there stands something that is not read, and that nothing has to be computed for.
    blank = told if behind is None else behind
    both, added = [*weights, told][:2], [*vectors, blank, blank][:2]
    strides = [*rows.stride()]
    for tensors, rank in ((weights, 3), (vectors, 2)):
        strides += [stride for tensor in tensors for stride in tensor.stride()] + [0] * rank * (2 - len(tensors))
    args: tuple[Any, ...]
    products = 2 if interleaved else len(weights)
    constants: dict[str, Any] = {
        "DIVIDES_K": divisor(inner),
        "DIVIDES_N": divisor(columns),
        "PRODUCTS": products,
        "INTERLEAVED": interleaved,
        "VECTORS": len(vectors),
        "EPILOGUE": epilogue,
    }
    sizes = groups, inner, columns, own or pairs, after
    with _on(rows):
        if experts is not None:
            tiles = of_single_rows(inner, columns, products, weights[0].stride(1) == 1)
            args = rows, told, *both, *added, result, *sizes, *strides

            def grid_of_each(meta: Any) -> tuple[int, int]:
                return triton.cdiv(columns, meta["BLOCK_N"]), pairs

            return _tiled(kernels.multiply_each, tiles, grid_of_each, args, constants, max_autotune, seen)
        tiles = of_products(pairs, groups, inner, columns, products, rows.dtype, _multiplies_wide(rows.device))

        def grid(meta: Any) -> tuple[int]:
            # As many tiles as `kernels.multiply` counts.
            tiles_m = min(pairs, triton.cdiv(pairs, meta["BLOCK_M"]) + groups + 1)
            return (tiles_m * triton.cdiv(columns, meta["BLOCK_N"]),)

        halves = pairs <= MAX_HALVED_ROWS * groups
        constants |= {"TILES_TOGETHER": 8, "HALVES": halves, "GROUPS": power(groups + 1)}
        constants |= _how_to_multiply(rows, order)
        by = told if order is None else order.contiguous()
        constants["DESCRIBED"] = describes(weights, pairs) and _are_aligned(weights, kernels.multiply, seen)
        if constants["DESCRIBED"]:
            tiles = tiles[:1]
            blocks = dict(tiles[0].blocks)
            width = blocks["BLOCK_N"] * (2 if interleaved else 1)
            both = [describe(weight, 1, blocks["BLOCK_K"], width) for weight in [*weights, *weights][:2]]
        args = rows, by, told, *both, *added, result, pairs, *sizes, *strides
        return _tiled(kernels.multiply, tiles, grid, args, constants, max_autotune, seen)


def outer(
    rows: Tensor,
    grad: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    own: int,
    after: int,
    along_inner: bool,
    max_autotune: bool,
    *,
    seen: bool,
) -> Tensor:
    """See :func:`rows_mm.rows_outer`; ``own`` is 0 where each pair has its own row."""
    result = empty_gradient(rows, grad, offsets, along_inner)
    groups, inner, columns = result.shape
    if result.numel() == 0:
        return result
    if seen:
        rows, grad = (visible.computed_once(kernels.outer, one) for one in (rows, grad))
    described = describes_gradients(groups, grad.shape[0], inner, columns, rows.dtype, rows.device)
    stored = _stores_gradients(result)
    if described:
        pairs = grad.shape[0]
        rows, grad = _sorted(rows, pairs, order, own, after, seen), _sorted(grad, pairs, order, 0, 1, seen)
        order, own, after = None, 0, 1
    tiles = of_gradients(inner, columns, rows.dtype, _multiplies_wide(rows.device), described, stored)

    def grid(meta: Any) -> tuple[int]:
        return (groups * triton.cdiv(inner, meta["BLOCK_K"]) * triton.cdiv(columns, meta["BLOCK_N"]),)

    offsets = offsets.contiguous()
    with _on(rows):
        by = offsets if order is None else order.contiguous()
        sizes = inner, columns, own or max(1, grad.shape[0]), after
        both: tuple[Any, Any] = (rows, grad)
        given: tuple[Any, Any] = (result, offsets)  # in the place of what is not there stands something else
        if described or stored:
            tiles = tiles[:1]
            blocks = dict(tiles[0].blocks)
            m, k, n = (blocks[f"BLOCK_{name}"] for name in "MKN")
            both = (describe(rows, m, k), describe(grad, m, n)) if described else both
            given = (rows, describe(result, 1, k, n)) if stored else given
        strides = *rows.stride(), *grad.stride(), *result.stride()
        args = rows, grad, *both, by, offsets, *given, *sizes, *strides
        constants = {**_how_to_multiply(rows, order), "DESCRIBED": described}
        if inner == 1:  # a sum, which torch computes in full precision
            constants["PRECISION"] = "ieee"
        constants["STORED"] = ("inner" if along_inner else "columns") if stored else ""
        if not stored:
            return _tiled(kernels.outer, tiles, grid, args, constants, max_autotune, seen)
        memory = _tiled(kernels.outer, tiles, grid, args, constants, max_autotune, seen, "described_result")
        return memory.transpose(1, 2) if along_inner else memory


def lend(rows: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`rows_mm.lend_rows`. Compilers see it."""
    pairs, columns = rows.shape
    constants = of_lending(columns)
    if not visible.is_traced(kernels.lend):  # in a graph the compiler finds that `rows` need not be kept
        rows = rows.clone()

    def grid(meta: Any) -> tuple[int, int]:
        return triton.cdiv(pairs, constants["BLOCK_M"]), triton.cdiv(columns, constants["BLOCK_N"])

    with _on(rows):
        args = rows, offsets, pairs, offsets.shape[0], columns
        (result,) = visible.launch(kernels.lend, grid, args, constants, ("rows",))
    return result


def empty_gradient(rows: Tensor, grad: Tensor, offsets: Tensor, along_inner: bool) -> Tensor:
    """Memory for what :func:`outer` gives: ``[E, K, N]``, contiguous along K or along N."""
    inner, columns, groups = rows.shape[1], grad.shape[1], offsets.shape[0]
    if along_inner:
        return rows.new_empty(groups, columns, inner).transpose(1, 2)
    return rows.new_empty(groups, inner, columns)


def _sorted(rows: Tensor, pairs: int, order: Tensor | None, own: int, after: int, seen: bool) -> Tensor:
    """The row of each pair, in the order of the sort: aligned and contiguous."""
    if order is not None:
        return rows[order // after % own if own else order]
    if own:
        return rows[torch.arange(pairs, device=rows.device) // after % own]
    is_ready = can_be_described(rows) and rows.stride(1) == 1 and _are_aligned([rows], kernels.outer, seen)
    return rows if is_ready else rows.clone(memory_format=torch.contiguous_format)


def _tiled(
    kernel: Any,
    tiles: tuple[Tile, ...],
    grid: Callable[[Any], tuple[int, ...]],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    max_autotune: bool,
    seen: bool,
    written: str = "result",
) -> Tensor:
    """Launch with the first tile. What compilers see they can tune, on the arguments of the first call."""
    if seen:
        tuned = _autotuned(kernel, tiles if max_autotune else tiles[:1])
        (result,) = visible.launch(tuned, grid, args, constants, (written,))
    else:
        (result,) = _launch(kernel, grid, args, {**constants, **tiles[0].arguments()}, (written,))
    return result


def _are_aligned(tensors: list[Tensor], kernel: Any, seen: bool) -> bool:
    """Whether the tensors' memory starts at aligned addresses. In a graph it does, see ``descriptors.in_graph``."""
    return (seen and visible.is_traced(kernel)) or all(map(is_aligned, tensors))


def _launch(
    kernel: Any,
    grid: Callable[[Any], tuple[int, ...]],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    written: tuple[str, ...],
) -> list[Tensor]:
    """Launch a kernel that compilers do not see, see :func:`visible.launch`."""
    return visible.run(kernel, grid(constants), args, constants, written)


@functools.cache
def _autotuned(kernel: Any, tiles: tuple[Tile, ...]) -> Any:
    configs = [triton.Config(dict(tile.blocks), num_warps=tile.warps, num_stages=tile.stages) for tile in tiles]
    return triton.autotune(configs=configs, key=[])(kernel)


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def _multiplies_wide(device: torch.device) -> bool:
    """Whether a device multiplies tiles that are not in registers: SM90 and SM100. The others need narrower ones."""
    return device.type != "cuda" or _capability(device) in (9, 10)


def _capability(device: torch.device) -> int:
    """The first number of a GPU's compute capability."""
    return int(torch.cuda.get_device_capability(device)[0])


def _how_to_multiply(rows: Tensor, order: Tensor | None) -> dict[str, Any]:
    """What the kernels that multiply tiles are told besides."""
    widen = interpreted() and rows.dtype is torch.bfloat16
    precision = _precision() if rows.dtype is torch.float32 else "ieee"  # to ask takes long
    return {"HAS_ORDER": order is not None, "PRECISION": precision, "WIDEN": widen}


def _precision() -> str:
    """How float32 is multiplied: as by torch's own matmul."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
