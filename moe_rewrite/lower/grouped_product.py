"""The grouped product ``rows of expert e @ weight[e]``: torch's kernel where it can be compiled, else one of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
_TAGS = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None)
# A tag keeps inductor from putting them into a CUDA graph: they read the offsets on the host.
_LIBRARY.define("grouped_mm(Tensor rows, Tensor weight, Tensor offsets) -> Tensor", tags=_TAGS)
_LIBRARY.define("grouped_outer(Tensor rows, Tensor grad, Tensor offsets) -> Tensor", tags=_TAGS)


def grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Each row times the weight of its group.

    Args:
        rows: ``[P, K]``, sorted by group.
        weight: ``[E, K, N]``, in the dtype of ``rows``.
        offsets: where each group ends, ``[E]`` int32.

    Returns:
        ``[P, N]``. Rows past the last offset hold anything.
    """
    if _has_kernel(rows, weight):
        return torch.nn.functional.grouped_mm(rows, weight, offs=offsets)
    result: Tensor = torch.ops.moe_rewrite.grouped_mm(rows, weight, offsets)
    return result


def _has_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``torch.nn.functional.grouped_mm`` takes these operands, under compile and without a host sync.

    Its kernel needs bf16, SM90 (below, it is a loop that reads the offsets on the host), and each row 16 bytes aligned.
    """
    if not hasattr(torch.nn.functional, "grouped_mm") or rows.device.type != "cuda":
        return False
    if rows.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(rows.device) < (9, 0):
        return False
    contiguous = [stride for stride in weight.stride()[1:] if stride == 1]
    others = [stride for stride in weight.stride() if stride != 1]
    sizes = [rows.shape[1], weight.shape[2], *others]
    return bool(contiguous) and all(isinstance(size, int) and size % 8 == 0 for size in sizes)


def _bounds(offsets: Tensor) -> list[tuple[int, int]]:
    ends: list[int] = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@torch.library.impl(_LIBRARY, "grouped_mm", "CompositeExplicitAutograd")
def _grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    result = rows.new_zeros(rows.shape[0], weight.shape[2])
    for expert, (start, end) in enumerate(_bounds(offsets)):
        if end > start:
            torch.mm(rows[start:end], weight[expert], out=result[start:end])
    return result


@torch.library.impl(_LIBRARY, "grouped_outer", "CompositeExplicitAutograd")
def _grouped_outer(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """``[E, K, N]``: for each group, its rows transposed times their gradient; zero for a group without rows."""
    result = rows.new_zeros(offsets.shape[0], rows.shape[1], grad.shape[1])
    for expert, (start, end) in enumerate(_bounds(offsets)):
        if end > start:
            torch.mm(rows[start:end].t(), grad[start:end], out=result[expert])
    return result


@torch.library.register_fake("moe_rewrite::grouped_mm", lib=_LIBRARY)
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.register_fake("moe_rewrite::grouped_outer", lib=_LIBRARY)
def _(rows: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0], rows.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, offsets = ctx.saved_tensors
    needs_rows, needs_weight, _ = ctx.needs_input_grad
    grad_rows = torch.ops.moe_rewrite.grouped_mm(grad, weight.transpose(1, 2), offsets) if needs_rows else None
    grad_weight = torch.ops.moe_rewrite.grouped_outer(rows, grad, offsets) if needs_weight else None
    return grad_rows, grad_weight, None


torch.library.register_autograd("moe_rewrite::grouped_mm", _backward, setup_context=_save, lib=_LIBRARY)
