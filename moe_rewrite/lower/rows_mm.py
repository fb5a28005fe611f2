"""Products of rows with the weights of their experts, by Triton kernels (``kernels.py``).

They take any strides and sizes, bf16, fp16 and fp32, read nothing back from the device and write every row.
"""

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

FEW = 2048
"""Up to how many pairs one launch sorts them."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels multiply. They add in float32."""

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
# Pair `p` has row `p // after % own`; where `own` is 0 it has row `p`.
_LIBRARY.define(
    "rows_mm(Tensor rows, Tensor[] weights, Tensor[] vectors, Tensor? order, Tensor? offsets, Tensor? experts, "
    "SymInt pairs, SymInt own, SymInt after, str epilogue, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "rows_outer(Tensor rows, Tensor grad, Tensor? order, Tensor offsets, SymInt own, SymInt after) -> Tensor"
)
_LIBRARY.define("sort_by_expert(Tensor experts, SymInt groups) -> (Tensor, Tensor)")


def available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: a GPU of NVIDIA's; any device where Triton interprets them."""
    if triton is None:
        return False
    return _interpreted() or (device.type == "cuda" and torch.version.hip is None)


def sort_by_expert(experts: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """A stable sort of pairs by expert, in one launch for few pairs and two for many.

    Args:
        experts: the expert of each pair, ``[P]``, any integer dtype. Those outside ``[0, groups)`` are of no expert.
        groups: the number of experts.

    Returns:
        The number of each pair in sorted order, ``[P]`` int32, those of no expert last; and where each expert's pairs
        end, ``[groups]`` int32.
    """
    order, offsets = torch.ops.moe_rewrite.sort_by_expert(experts, groups)
    return order, offsets


def rows_mm(
    rows: Tensor,
    weights: list[Tensor],
    vectors: list[Tensor],
    *,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
    experts: Tensor | None = None,
    gather: tuple[int, int, int] | None = None,
    epilogue: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """For each pair ``epilogue(row @ weight of its expert, ...)``; zeros for a pair of no expert.

    The gradient is there for one weight without epilogue or with the one that adds a vector.

    Args:
        rows: ``[R, K]``.
        weights: one or two, ``[E, K, N]`` in the dtype of ``rows``.
        vectors: up to two that the epilogue uses, ``[E, N]``.
        order: the pairs sorted by expert, ``[P]`` int32; None where they are sorted.
        offsets: where the pairs of each expert end in that order, ``[E]`` int32.
        experts: the expert of each pair, ``[P]``: in the place of the two for few pairs.
        gather: ``(pairs, own, after)``: pair ``p`` has row ``p // after % own``; None where each has its own.
        epilogue: a program as in ``kernels.py``, over the products, then the vectors.
        dtype: of the result; that of the rows if None.

    Returns:
        ``[P, N]``, in the order of the pairs.
    """
    pairs, own, after = gather or (rows.shape[0], 0, 1)
    result: Tensor = torch.ops.moe_rewrite.rows_mm(
        rows, weights, vectors, order, offsets, experts, pairs, own, after, epilogue, dtype or rows.dtype
    )
    return result


def rows_outer(
    rows: Tensor, grad: Tensor, offsets: Tensor, order: Tensor | None = None, own: int | None = None, after: int = 1
) -> Tensor:
    """For each expert the sum of ``row x gradient`` over its pairs, ``[E, K, N]``: the gradient of its weight.

    Args:
        rows: ``[R, K]``; pair ``p`` has row ``p // after % own``.
        grad: ``[P, N]``, in the dtype of ``rows``.
        offsets: where the pairs of each expert end, ``[E]`` int32. What is past the last of them counts for nothing.
        order: the pairs sorted by expert, ``[P]`` int32; None where they are sorted.
        own: the number of rows; None where each pair has its own.
        after: how many pairs in a row have the same row.
    """
    result: Tensor = torch.ops.moe_rewrite.rows_outer(rows, grad, order, offsets, own or 0, after)
    return result


ADD_VECTOR = "add v0 v1"
"""The epilogue that adds the bias."""


def _interpreted() -> bool:
    """Whether the kernels are interpreted: what Triton's setting was when they were made."""
    return triton is not None and not isinstance(kernels.multiply, triton.JITFunction)


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


@torch.library.impl(_LIBRARY, "sort_by_expert", "CompositeExplicitAutograd")
def _sort_by_expert(experts: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    pairs = experts.shape[0]
    order = experts.new_empty(pairs, dtype=torch.int32)
    offsets = experts.new_zeros(groups, dtype=torch.int32)
    if pairs == 0:
        return order, offsets
    experts = experts.contiguous()
    bins, counts, counted = _power(groups + 2), offsets, _block(pairs, 1024)
    block = part = _block(pairs, 128)
    has_counts = pairs > FEW
    with _on(experts):
        if has_counts:
            block, counted = 1024, 16
            blocks = triton.cdiv(pairs, block)
            counts = experts.new_empty(blocks, bins, dtype=torch.int32)
            kernels.count[(blocks,)](experts, counts, pairs, groups, block, bins)
        blocks = triton.cdiv(pairs, block)
        sizes = (block, part, counted, bins, has_counts)
        kernels.sort[(blocks,)](experts, counts, order, offsets, pairs, groups, blocks, *sizes)
    return order, offsets


@torch.library.impl(_LIBRARY, "rows_mm", "CompositeExplicitAutograd")
def _rows_mm(
    rows: Tensor,
    weights: list[Tensor],
    vectors: list[Tensor],
    order: Tensor | None,
    offsets: Tensor | None,
    experts: Tensor | None,
    pairs: int,
    own: int,
    after: int,
    epilogue: str,
    dtype: torch.dtype,
) -> Tensor:
    groups, inner, columns = weights[0].shape
    result = rows.new_empty(pairs, columns, dtype=dtype)
    if result.numel() == 0:
        return result
    both = [*weights, weights[0]][:2]
    added = [*vectors, result, result][:2]  # what is not there is not read
    weight_strides = [*both[0].stride(), *both[1].stride()]
    interleaved = _are_interleaved(weights)
    if interleaved:
        weight_strides[2] //= 2
    strides = [*rows.stride(), *weight_strides, *added[0].stride(), *added[1].stride()]
    program = {
        "PRODUCTS": len(weights),
        "INTERLEAVED": interleaved,
        "VECTORS": len(vectors),
        "EPILOGUE": epilogue,
    }
    launch: dict[str, Any]
    own = own or pairs
    with _on(rows):
        if experts is not None:
            launch = _columns_of_a_program(inner, columns, weights[0])
            sizes = (groups, inner, columns, own, after)
            kernels.multiply_each[(triton.cdiv(columns, launch["BLOCK_N"]), pairs)](
                rows, experts.contiguous(), *both, *added, result, *sizes, *strides, **program, **launch
            )
            return result
        assert offsets is not None
        offsets = offsets.contiguous()
        launch = _tile(pairs, groups, inner, columns, len(weights), rows.dtype, _multiplies_wide(rows.device))
        # Every group may end with a tile that is not full, that of no expert too; no tile is empty.
        tiles = min(pairs, triton.cdiv(pairs, launch["BLOCK_M"]) + groups + 1)
        kernels.multiply[(tiles * triton.cdiv(columns, launch["BLOCK_N"]),)](
            *(rows, offsets if order is None else order.contiguous(), offsets, *both, *added, result),
            *(pairs, groups, inner, columns, own, after, *strides, tiles),
            GROUPS=_power(groups + 1),
            HAS_ORDER=order is not None,
            PRECISION=_precision(),
            WIDEN=_interpreted() and rows.dtype is torch.bfloat16,
            **program,
            **launch,
        )
    return result


@torch.library.impl(_LIBRARY, "rows_outer", "CompositeExplicitAutograd")
def _rows_outer(rows: Tensor, grad: Tensor, order: Tensor | None, offsets: Tensor, own: int, after: int) -> Tensor:
    inner, columns, groups = rows.shape[1], grad.shape[1], offsets.shape[0]
    result = rows.new_empty(groups, inner, columns)
    if result.numel() == 0:
        return result
    block_k, block_n = _block(inner, 64), _block(columns, 128 if rows.dtype.itemsize == 2 else 64)
    blocks_k = triton.cdiv(inner, block_k)
    grid = (groups * blocks_k, triton.cdiv(columns, block_n))
    offsets = offsets.contiguous()
    with _on(rows):
        kernels.outer[grid](
            *(rows, grad, offsets if order is None else order.contiguous(), offsets, result),
            *(blocks_k, inner, columns, own or max(1, grad.shape[0]), after, *rows.stride(), *grad.stride()),
            BLOCK_M=32,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            HAS_ORDER=order is not None,
            PRECISION=_precision(),
            WIDEN=_interpreted() and rows.dtype is torch.bfloat16,
        )
    return result


def _are_interleaved(weights: list[Tensor]) -> bool:
    """Whether two weights are the even and the odd columns of one matrix."""
    if len(weights) != 2 or weights[0].stride() != weights[1].stride() or weights[0].shape != weights[1].shape:
        return False
    step = weights[0].stride(2)
    apart = weights[1].data_ptr() - weights[0].data_ptr()
    return bool(step % 2 == 0 and apart == step // 2 * weights[0].itemsize)


@functools.cache
def _multiplies_wide(device: torch.device) -> bool:
    """Whether a device multiplies tiles that are not in registers: SM90 and SM100. The others need narrower ones."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tile(
    pairs: int, groups: int, inner: int, columns: int, products: int, dtype: torch.dtype, wide: bool
) -> dict[str, Any]:
    """Tiles of about as many rows as an expert has if all have the same. Two products share a tile."""
    rows = triton.cdiv(pairs, groups)
    narrow = dtype.itemsize == 4
    if narrow:
        most_m, most_n, most_k, warps, stages = (16 if rows <= 12 else 64), 64, 32, 4, 3
    elif rows <= 12:
        most_m, most_n, most_k, warps, stages = 16, 128, 64, 4, 4
    elif rows <= 64:
        most_m, most_n, most_k, warps, stages = 64, 128, 64, 4, 4
    else:
        most_m, most_n, most_k, warps, stages = 128, (256 if wide else 128), 64, 8, 3
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


def _columns_of_a_program(inner: int, columns: int, weight: Tensor) -> dict[str, Any]:
    """As many weights a program that each thread reads 16 bytes at a time along the dimension that is contiguous."""
    block_n, block_k = (8, 512) if weight.stride(1) == 1 else (64, 64)
    block_n, block_k = min(block_n, _power(columns)), min(block_k, _power(inner))
    even = {"EVEN_K": inner % block_k == 0, "EVEN_N": columns % block_n == 0}
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, **even, "num_warps": 4, "num_stages": 3}


def _power(size: int) -> int:
    return int(triton.next_power_of_2(max(1, size)))


def _block(size: int, largest: int) -> int:
    """A power of two that holds ``size``, at least what a product of tiles needs and ``largest`` at most."""
    return max(16, min(largest, _power(size)))


def _precision() -> str:
    """How float32 is multiplied: as by torch's own matmul."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@torch.library.register_fake("moe_rewrite::sort_by_expert", lib=_LIBRARY)
def _(experts: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return experts.new_empty(experts.shape, dtype=torch.int32), experts.new_empty(groups, dtype=torch.int32)


@torch.library.register_fake("moe_rewrite::rows_mm", lib=_LIBRARY)
def _(rows: Tensor, weights: list[Tensor], *rest: Any) -> Tensor:
    return rows.new_empty(rest[4], weights[0].shape[2], dtype=rest[8])


@torch.library.register_fake("moe_rewrite::rows_outer", lib=_LIBRARY)
def _(rows: Tensor, grad: Tensor, order: Tensor | None, offsets: Tensor, own: int, after: int) -> Tensor:
    return rows.new_empty(offsets.shape[0], rows.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, vectors, order, offsets, experts, pairs, own, after, epilogue, dtype = inputs
    adds = (len(vectors), epilogue) in ((0, ""), (1, ADD_VECTOR))
    ctx.plain = len(weights) == 1 and adds and dtype is rows.dtype
    ctx.sizes = pairs, own, after, bool(vectors)
    ctx.save_for_backward(rows, weights[0], order, offsets, experts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if not ctx.plain:
        raise NotImplementedError("rows_mm has no gradient with an epilogue other than the bias")
    rows, weight, order, offsets, experts = ctx.saved_tensors
    pairs, own, after, has_bias = ctx.sizes
    needs = ctx.needs_input_grad
    needs_weight = bool(needs[1] if isinstance(needs[1], bool) else any(needs[1]))
    needs_bias = has_bias and bool(needs[2] if isinstance(needs[2], bool) else any(needs[2]))
    grad_rows = grad_weight = grad_bias = None
    if needs[0]:
        grad_rows = rows_mm(grad, [weight.transpose(1, 2)], [], order=order, offsets=offsets, experts=experts)
        if isinstance(pairs, int) and pairs == 0:
            grad_rows = torch.zeros_like(rows)
        elif not (isinstance(own, int) and own == 0):
            grad_rows = grad_rows.reshape(-1, own, after, rows.shape[1]).sum((0, 2))
    if needs_weight or needs_bias:
        if offsets is None:
            order, offsets = sort_by_expert(experts, weight.shape[0])
        if needs_weight:
            grad_weight = rows_outer(rows, grad, offsets, order, own, after)
        if needs_bias:
            grad_bias = rows_outer(grad.new_ones(pairs, 1), grad, offsets, order).squeeze(1)
    vectors = [grad_bias] if has_bias else []
    return grad_rows, [grad_weight], vectors, *[None] * 8


torch.library.register_autograd("moe_rewrite::rows_mm", _backward, setup_context=_save, lib=_LIBRARY)
