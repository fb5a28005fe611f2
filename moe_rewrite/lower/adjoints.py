"""Operators of torch's whose gradients are computed in another way than torch would.

Once gradients are known, compilers see what they are made of, as they see what is in a ``torch.library.triton_op``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode  # seen to work in 2.11, 2.13 and 2.15

from moe_rewrite.lower.grouped_product import grouped_sum
from moe_rewrite.lower.joined import joined
from moe_rewrite.lower.precision import accumulated_in

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
_LIBRARY.define("permuted(Tensor rows, Tensor order, Tensor inverse) -> Tensor")
_LIBRARY.define("repeated(Tensor rows, SymInt before, SymInt after) -> Tensor")
_LIBRARY.define("slot_sum(Tensor rows, int dim, ScalarType dtype) -> Tensor")
_LIBRARY.define("columns(Tensor rows, int[] sizes, bool in_turn) -> Tensor[]")
_LIBRARY.define("of_expert(Tensor table, Tensor expert, Tensor offsets) -> Tensor")

UNROLLED = range(8, 17)
"""How many slots are added one by one. Fewer are by inductor, which makes a slow reduction of these (2.11, H200)."""


def is_unrolled(slots: Any) -> bool:
    """Whether so many slots are added one by one. The number may be a symbol."""
    return isinstance(slots, int) and slots in UNROLLED


def permuted(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``rows[order]``, with a gradient that is a gather.

    Torch does not know that an index is a permutation: it adds the gradient's rows to zeros, by atomics on a GPU.

    Args:
        rows: ``[P, ...]``.
        order: a permutation of the numbers below P, ``[P]`` int64.
        inverse: its inverse, ``[P]`` int64: ``inverse[order[i]] == i``.
    """
    result: Tensor = torch.ops.moe_rewrite.permuted(rows, order, inverse)
    return result


def repeated(rows: Tensor, before: int, after: int) -> Tensor:
    """``[R, ...]`` to ``[before * R * after, ...]``: each row ``after`` times, all of that ``before`` times.

    The gradient is a sum over slots, where an index would have one that is added by atomics. It is :func:`slot_sum`.
    """
    if isinstance(before, int) and isinstance(after, int) and before == after == 1:
        return rows
    if not (rows.device.type == "cuda" and isinstance(before, int) and before == 1 and is_unrolled(after)):
        return _repeat(rows, before, after)  # whose gradient is that sum
    result: Tensor = torch.ops.moe_rewrite.repeated(rows, before, after)
    return result


def slot_sum(rows: Tensor, dim: int, dtype: torch.dtype | None = None, keeps_sign: bool = False) -> Tensor:
    """``rows.sum(dim, dtype=dtype)``, added in float32 at least; on a GPU so that inductor makes fast code of it.

    Args:
        rows: floating-point numbers, for anything but a plain sum.
        dim: the dimension that is summed over. Not empty.
        dtype: of the result; None for that of ``rows``, or what torch makes of integers.
        keeps_sign: whether the sum of nothing but -0.0 is -0.0, as it is where they are added one by one. A reduction
            starts from 0.0. This needs a number of slots that is known when compiling.
    """
    fast = rows.device.type == "cuda" and rows.is_floating_point() and is_unrolled(rows.shape[dim])
    if not fast and not keeps_sign:
        return rows.sum(dim, dtype=dtype)
    result: Tensor = torch.ops.moe_rewrite.slot_sum(rows, dim, rows.dtype if dtype is None else dtype)
    return result


def of_expert(table: Tensor, expert: Tensor, offsets: Tensor) -> Tensor:
    """``table[expert]``, whose gradient is a sum over the rows of each expert, in float32 where the dtype is lower.

    The gradient of an index is added by atomics on a GPU: slow, and in another order each time.

    Args:
        table: ``[E, N]``.
        expert: the expert of each row, ``[P]`` int64, sorted but for the rows past the last offset.
        offsets: where the rows of each expert end, ``[E]`` int32. Gradients past the last are not looked at.
    """
    result: Tensor = torch.ops.moe_rewrite.of_expert(table, expert, offsets)
    return result


def columns(rows: Tensor, sizes: list[int], in_turn: bool) -> list[Tensor]:
    """Rows ``[P, N]`` taken apart, each column once. The gradient is :func:`joined`.

    Args:
        rows: the rows.
        sizes: how many columns each part has.
        in_turn: whether the parts take one column each in turn, not one part after the other. They have one size then.
    """
    result: list[Tensor] = torch.ops.moe_rewrite.columns(rows, sizes, in_turn)
    return result


def _take(rows: Tensor, sizes: list[int], in_turn: bool) -> list[Tensor]:
    return [rows[:, start :: len(sizes)] for start in range(len(sizes))] if in_turn else [*rows.split(sizes, 1)]


def _take_copies(rows: Tensor, sizes: list[int], in_turn: bool) -> list[Tensor]:
    return [part.clone(memory_format=torch.contiguous_format) for part in _take(rows, sizes, in_turn)]


def _repeat(rows: Tensor, before: int, after: int) -> Tensor:
    every = rows.unsqueeze(1).unsqueeze(0).expand(before, rows.shape[0], after, *rows.shape[1:])
    return every.clone(memory_format=torch.contiguous_format).flatten(0, 2)  # never the memory of `rows`


def _add_slots(rows: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    total, *others = (one.to(accumulated_in(dtype)) for one in rows.unbind(dim))
    for one in others:
        total = total + one
    return total.to(dtype) if others else total.to(dtype, copy=True)  # never the memory of `rows`


def _register(name: str, function: Callable[..., Any], eager: Callable[..., Any], save: Any, backward: Any) -> None:
    """``function``: what compilers see; ``eager``: the same where nothing is compiled."""

    def decomposed(mode: Any, op: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        with mode:
            return function(*args)

    qualified = f"moe_rewrite::{name}"
    torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")(eager)
    torch.library.register_fake(qualified, eager, lib=_LIBRARY)
    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, decomposed, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=save, lib=_LIBRARY)


def _save_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permuted_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, inverse = ctx.saved_tensors
    return permuted(grad, inverse, order), None, None


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, *ctx.sizes = inputs
    ctx.shape = rows.shape


def _added_up(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    before, after = ctx.sizes
    by_slot = grad.reshape(before, ctx.shape[0], after, *ctx.shape[1:])
    once = isinstance(before, int) and before == 1
    return slot_sum(by_slot.squeeze(0), 1) if once else by_slot.sum((0, 2)), None, None


def _save_offsets(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _summed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    return grouped_sum(grad, offsets), None, None


def _save_slots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, ctx.dim, _ = inputs
    ctx.shape, ctx.dtype = rows.shape, rows.dtype


def _spread(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad.to(ctx.dtype).unsqueeze(ctx.dim).expand(ctx.shape), None, None


def _save_how(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, ctx.sizes, ctx.in_turn = inputs


def _put_together(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    return joined(list(grads), ctx.in_turn), None, None


def _save_part_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parts, ctx.in_turn = inputs
    ctx.sizes = [part.shape[1] for part in parts]


def _take_apart(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    return columns(grad, ctx.sizes, ctx.in_turn), None


_register(
    "permuted", lambda rows, order, _: rows[order], lambda rows, order, _: rows[order], _save_order, _permuted_back
)
_register("repeated", _repeat, _repeat, _save_sizes, _added_up)
_register("slot_sum", _add_slots, _add_slots, _save_slots, _spread)
_register(
    "of_expert", lambda table, expert, _: table[expert], lambda table, expert, _: table[expert], _save_offsets, _summed
)
_register("columns", _take, _take_copies, _save_how, _put_together)
torch.library.register_autograd("moe_rewrite::joined", _take_apart, setup_context=_save_part_sizes, lib=_LIBRARY)
