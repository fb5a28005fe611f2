"""The grouped product ``rows of expert e @ weight[e]``: torch's kernel or one of ours.

Torch's where it can be compiled, but where ours was seen to be the faster one; else ours where there is a GPU for it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_rewrite.lower.launch import MAX_HALVED_ROWS, available
from moe_rewrite.lower.rows_mm import ADD_VECTOR, DTYPES, rows_mm, rows_outer

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
# The tag keeps inductor from putting an operator into a CUDA graph.
_READS_ON_HOST = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None)
_LIBRARY.define("grouped_mm(Tensor rows, Tensor weight, Tensor offsets, Tensor? bias) -> Tensor", tags=_READS_ON_HOST)
_LIBRARY.define("grouped_outer(Tensor rows, Tensor grad, Tensor offsets) -> Tensor", tags=_READS_ON_HOST)


MAX_TRAINED_ROWS = 1152
"""Up to how many rows an expert our kernels are the faster ones where gradients are computed: by 1 to 6 % from 512 to
1092 rows, those of Mixtral-8x7B's experts as fast; at 2048 and 4096 rows torch's are, by 2 and 6 % (H200)."""


def grouped_product(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    max_autotune: bool = False,
    needs_grad: bool = False,
) -> Tensor:
    """Each row times the weight of its group, plus its bias.

    Args:
        rows: ``[P, K]``, sorted by group.
        weight: ``[E, K, N]``, in the dtype of ``rows``.
        offsets: where each group ends, ``[E]`` int32.
        bias: what is added to each row of a group before it is rounded, ``[E, N]``, in the dtype of ``rows``.
        max_autotune: see :func:`rows_mm.rows_mm`, for where its kernels are used.
        needs_grad: whether there may be a gradient to compute: it says which kernel is the faster one.

    Returns:
        ``[P, N]``. Rows past the last offset hold anything.
    """
    if bias is None and _has_kernel(rows, weight) and not _is_faster_with_ours(rows, weight, needs_grad):
        # It takes no bias.
        result = torch.nn.functional.grouped_mm(rows.contiguous(), weight, offs=offsets)
        # A slice of everything: its gradient is a copy. The kernel takes no gradient that is expanded or strided.
        return torch.ops.aten.slice.Tensor(result, 1, 0, sys.maxsize)
    if has_kernel_of_ours(rows):
        vectors, epilogue = ([], "") if bias is None else ([bias], ADD_VECTOR)
        return rows_mm(rows, [weight], vectors, offsets=offsets, epilogue=epilogue, max_autotune=max_autotune)
    return torch.ops.moe_rewrite.grouped_mm(rows, weight, offsets, bias)


def grouped_outer(rows: Tensor, grad: Tensor, offsets: Tensor, along_inner: bool = False) -> Tensor:
    """For each group, its rows transposed times their gradient, added in float32 where the dtype is lower.

    Args:
        rows: ``[P, K]``, sorted by group.
        grad: ``[P, N]``, in the dtype of ``rows``.
        offsets: where each group ends, ``[E]`` int32.
        along_inner: see :func:`rows_mm.rows_outer`.

    Returns:
        ``[E, K, N]``, zero for a group without rows. Rows past the last offset count for nothing.
    """
    if has_kernel_of_ours(rows):
        return rows_outer(rows, grad, offsets, along_inner=along_inner)
    if along_inner:
        return torch.ops.moe_rewrite.grouped_outer(grad, rows, offsets).transpose(1, 2)
    return torch.ops.moe_rewrite.grouped_outer(rows, grad, offsets)


def grouped_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """The sum of the rows of each group: ``[P, N]`` to ``[E, N]``, added in float32 where the dtype is lower."""
    return grouped_outer(rows.new_ones(rows.shape[0], 1), rows, offsets).squeeze(1)


def _has_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these operands under compile: bf16 with rows 16 bytes aligned.

    Here and in the backward, where the weight is transposed and the result's rows are what is multiplied. Where it
    is known that there are no rows, inductor (2.11 and 2.13) gives the backward's operands strides that it refuses.
    """
    if statically_known_true(rows.shape[0] == 0):
        return False
    if rows.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16 or not _device_has_kernel(rows.device):
        return False
    _, inner, columns = weight.shape
    _, stride_k, stride_n = weight.stride()
    sizes = [inner, columns, weight.storage_offset(), *(stride for stride in weight.stride() if stride != 1)]
    if not all(isinstance(size, int) and size % 8 == 0 for size in sizes):
        return False
    return bool((stride_n == 1 and stride_k >= columns) or (stride_k == 1 and stride_n >= inner))


def _device_has_kernel(device: torch.device) -> bool:
    """Whether the device has a kernel for it: SM90 and SM100.

    Elsewhere it is a loop that reads the offsets on the host (``ATen/native/cuda/GroupedBlas.cpp`` of torch 2.10).
    """
    if not hasattr(torch.nn.functional, "grouped_mm") or device.type != "cuda" or torch.version.hip is not None:
        return False
    major, _ = torch.cuda.get_device_capability(device)
    return major in (9, 10)


def _is_faster_with_ours(rows: Tensor, weight: Tensor, needs_grad: bool) -> bool:
    """Whether our kernel is the faster one of the two that there are: on an H200, and not for very many rows."""
    pairs = rows.shape[0]
    if not isinstance(pairs, int) or not has_kernel_of_ours(rows):
        return False
    most = MAX_TRAINED_ROWS if needs_grad else MAX_HALVED_ROWS
    return bool(torch.cuda.get_device_capability(rows.device)[0] == 9 and pairs <= most * weight.shape[0])


def has_kernel_of_ours(rows: Tensor) -> bool:
    """Whether kernels of ours multiply ``rows``, and sum them."""
    return rows.device.type == "cuda" and rows.dtype in DTYPES and available(rows.device)


def _bounds(offsets: Tensor) -> list[tuple[int, int]]:
    ends: list[int] = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@torch.library.impl(_LIBRARY, "grouped_mm", "CompositeExplicitAutograd")
def _grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    result = rows.new_zeros(rows.shape[0], weight.shape[2])
    for expert, (start, end) in enumerate(_bounds(offsets)):
        if end > start and bias is None:
            torch.mm(rows[start:end], weight[expert], out=result[start:end])
        elif end > start and bias is not None:
            torch.addmm(bias[expert], rows[start:end], weight[expert], out=result[start:end])
    return result


@torch.library.impl(_LIBRARY, "grouped_outer", "CompositeExplicitAutograd")
def _grouped_outer(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    result = rows.new_zeros(offsets.shape[0], rows.shape[1], grad.shape[1])
    for expert, (start, end) in enumerate(_bounds(offsets)):
        if end > start:
            torch.mm(rows[start:end].t(), grad[start:end], out=result[expert])
    return result


@torch.library.register_fake("moe_rewrite::grouped_mm", lib=_LIBRARY)
def _fake_mm(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.register_fake("moe_rewrite::grouped_outer", lib=_LIBRARY)
def _fake_outer(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0], rows.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A gradient may have any strides: ``torch.mm`` does not ask for some. That of complex numbers is conjugated."""
    rows, weight, offsets = ctx.saved_tensors
    needs_rows, needs_weight, _, needs_bias = ctx.needs_input_grad
    ops = torch.ops.moe_rewrite
    grad_rows = ops.grouped_mm(grad, weight.transpose(1, 2).conj(), offsets, None) if needs_rows else None
    # In the layout of the weight: else autograd copies it where it is kept.
    grad_weight = grouped_outer(rows.conj(), grad, offsets, weight.stride(1) == 1) if needs_weight else None
    grad_bias = grouped_sum(grad, offsets) if needs_bias else None
    return grad_rows, grad_weight, None, grad_bias


def _outer_backward(ctx: Any, of_weight: Tensor) -> tuple[Tensor | None, ...]:
    rows, grad, offsets = ctx.saved_tensors
    ops = torch.ops.moe_rewrite
    needs_rows, needs_grad, _ = ctx.needs_input_grad
    of_rows = ops.grouped_mm(grad.conj(), of_weight.transpose(1, 2), offsets, None) if needs_rows else None
    of_grad = ops.grouped_mm(rows.conj(), of_weight, offsets, None) if needs_grad else None
    return of_rows, of_grad, None


torch.library.register_autograd("moe_rewrite::grouped_outer", _outer_backward, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("moe_rewrite::grouped_mm", _backward, setup_context=_save, lib=_LIBRARY)
