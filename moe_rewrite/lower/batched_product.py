"""The product of each row with the weights of its expert, taken one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_rewrite.lower.grouped_product import grouped_outer, grouped_sum
from moe_rewrite.lower.pairs import sort_by_expert
from moe_rewrite.lower.precision import accumulated_in, is_fractional

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
_LIBRARY.define("batched_mm(Tensor rows, Tensor weight, Tensor expert, Tensor? bias) -> Tensor")


def multiply_and_sum(rows: Tensor, weight: Tensor, expert: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product written so that inductor makes one kernel of it, which reads the weights where they are.

    ``bmm`` would get a copy of the weights for each pair. Products are added as `precision.py` says, and so are the
    gradients of weights and biases.

    Args:
        rows: ``[P, K]``.
        weight: ``[E, K, N]``, in the dtype of ``rows``.
        expert: the expert of each row, ``[P]`` int64.
        bias: what is added, ``[E, N]``, in the dtype of ``rows``.

    Returns:
        ``[P, N]``.
    """
    if not is_fractional(rows.dtype):
        return gather_and_multiply(rows, weight, expert, bias)
    wide = accumulated_in(rows.dtype)
    result = (rows.to(wide).unsqueeze(2) * weight.to(wide)[expert]).sum(1)
    return (result if bias is None else result + bias.to(wide)[expert]).to(rows.dtype)


def gather_and_multiply(rows: Tensor, weight: Tensor, expert: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for compilers that fuse nothing: a copy of the weights for each row, and ``bmm``."""
    if accumulated_in(rows.dtype) is not rows.dtype:
        # The gradient of an index adds row by row in the dtype of the weights, which is too low to add in.
        return torch.ops.moe_rewrite.batched_mm(rows, weight, expert, bias)
    return _multiply(rows, weight[expert], None if bias is None else bias[expert])


def _multiply(rows: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(rows.unsqueeze(1), weights).squeeze(1)
    if not is_fractional(rows.dtype):
        return _multiply(rows, weights, None) + bias
    return torch.baddbmm(bias.unsqueeze(1), rows.unsqueeze(1), weights).squeeze(1)


@torch.library.impl(_LIBRARY, "batched_mm", "CompositeExplicitAutograd")
def _batched_mm(rows: Tensor, weight: Tensor, expert: Tensor, bias: Tensor | None) -> Tensor:
    # Rounded once. With operands in bf16, results on an H200 (torch 2.11) had larger errors than eager's.
    wide = accumulated_in(rows.dtype)
    result = _multiply(rows.to(wide), weight[expert].to(wide), None if bias is None else bias[expert].to(wide))
    return result.to(rows.dtype)


@torch.library.register_fake("moe_rewrite::batched_mm", lib=_LIBRARY)
def _(rows: Tensor, weight: Tensor, expert: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, expert = ctx.saved_tensors
    needs_rows, needs_weight, _, needs_bias = ctx.needs_input_grad
    grad_rows = torch.ops.moe_rewrite.batched_mm(grad, weight.transpose(1, 2), expert, None) if needs_rows else None
    grad_weight = grad_bias = None
    if needs_weight or needs_bias:
        order, _, offsets = sort_by_expert(expert, weight.shape[0])
        grad = grad[order]
        along_inner = weight.stride(1) == 1
        grad_weight = grouped_outer(rows[order], grad, offsets, along_inner) if needs_weight else None
        grad_bias = grouped_sum(grad, offsets) if needs_bias else None
    return grad_rows, grad_weight, None, grad_bias


torch.library.register_autograd("moe_rewrite::batched_mm", _backward, setup_context=_save, lib=_LIBRARY)
