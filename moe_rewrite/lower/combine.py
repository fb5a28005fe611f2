"""How the results of all pairs, or of all experts, come into an accumulator."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_rewrite.loop import Combine, EveryToken, ExpertsLoop, Kind, MaskDispatch, Primitive, TopKDispatch, Value, Write
from moe_rewrite.lower.pairs import Pairs, last_of_slots
from moe_rewrite.lower.sums import additive_zero, sum_dtype, total_of


def combine(
    loop: ExpertsLoop, how: Combine, accumulator: Tensor, index: list[Tensor], values: Tensor, pairs: Pairs | None
) -> None:
    """Change ``accumulator`` in place as the iterations of ``loop`` do, one after the other.

    Args:
        loop: the loop.
        how: one of its combines.
        accumulator: the value of its accumulator, in the dtype of :func:`sums.sum_dtype` where that is asked for.
        index: the values of its index, ``[P]`` each; per expert ``[num_experts, n]``.
        values: the rows of all pairs ``[P, ...]``, or the values of all experts ``[num_experts, ...]``.
        pairs: the pairs, in the order of the rows.
    """
    if how.alpha != 1:
        values = values.to(sum_dtype(accumulator.dtype, values.dtype)) * how.alpha
    if how.values.kind is not Kind.PER_ROW:
        _of_each_expert(loop, how, accumulator, index, values)
        return
    assert pairs is not None
    if how.write is Write.SET:
        _set_rows(loop, how, accumulator, index, values, pairs)
        return
    zero = additive_zero(accumulator, how.from_zero)
    rows = pairs.only_valid(values, zero)
    if how.place is None:
        rows = rows.to(accumulator.dtype)
        index = [_checked(loop, *one, pairs) for one in zip(how.index, index, accumulator.shape, strict=False)]
        if len(index) == 1:
            accumulator.index_add_(0, index[0], rows)
        else:
            accumulator.index_put_(tuple(index), rows, accumulate=True)
        return
    rows = pairs.to_token_order(rows)
    if how.write is Write.ADD_LAST:
        rows = _last(loop, how, rows, pairs, zero)
    by_slot, slots = _by_slot(how, rows, pairs)
    total = total_of(by_slot, slots, accumulator.dtype, how.from_zero)
    accumulator.add_(total if len(how.index) == 1 else total.reshape(accumulator.shape))


def _of_each_expert(loop: ExpertsLoop, how: Combine, accumulator: Tensor, index: list[Tensor], values: Tensor) -> None:
    if index:
        positions = _checked(loop, how.index[0], index[0].reshape(-1), accumulator.shape[0])
        accumulator.index_add_(0, positions, values.flatten(0, 1).to(accumulator.dtype))
    elif how.expert_dim is None:
        accumulator.add_(total_of(values, [0], accumulator.dtype, how.from_zero))
    else:
        parts = accumulator.movedim(how.expert_dim, 0).narrow(0, 0, values.shape[0])
        if how.write is Write.SET:
            parts.copy_(values)
        else:
            parts.add_(values)


def _checked(loop: ExpertsLoop, column: Value, index: Tensor, size: int, pairs: Pairs | None = None) -> Tensor:
    """Positions in a dimension of ``size``, 0 where no pair counts. On a CPU those out of range raise, as in eager.

    Some compilers count negative ones from the end where an operator of torch's raises.
    """
    coordinates = [step.args[0] for step in loop.steps if step.result is column and step.op is Primitive.COORDINATE]
    if coordinates and statically_known_true(_length(loop, coordinates[0]) <= size):
        return index
    index = index if pairs is None else pairs.harmless_index(index)
    if index.device.type == "cpu":
        fine = ((index >= 0) & (index < size)).all()
        torch.ops.aten._assert_async.msg(fine, f"a position is out of range for a dimension of size {size}")
    return index


def _length(loop: ExpertsLoop, axis: int | None) -> int:
    """How many coordinates there are along an axis."""
    assert not isinstance(loop.dispatch, EveryToken)
    return 1 if axis is None else loop.dispatch.shape[axis]


def _by_slot(how: Combine, rows: Tensor, pairs: Pairs) -> tuple[Tensor, list[int]]:
    """Rows in token order as ``[before, own, after, ...]`` without sizes of 1, and which of those are not the place."""
    assert how.place is not None
    before, own, after = how.place.extents(pairs.shape)
    sizes = [size for size in (before, own, after) if size is own or not (isinstance(size, int) and size == 1)]
    place = 0 if isinstance(before, int) and before == 1 else 1
    slots = [dim for dim in range(len(sizes)) if dim != place]
    return rows.reshape(*sizes, *rows.shape[1:]), slots


def _last(loop: ExpertsLoop, how: Combine, rows: Tensor, pairs: Pairs, zero: float) -> Tensor:
    """Rows in token order, with ``zero`` for those that a later row of the same expert and place takes the place of."""
    assert how.place is not None and isinstance(loop.dispatch, TopKDispatch)
    expert = pairs.to_token_order(pairs.expert if pairs.valid is None else _expert_or_none(pairs))
    last = last_of_slots(expert, pairs.shape, how.place, loop.dispatch)
    return rows if last is None else torch.where(last.view(-1, *[1] * (rows.dim() - 1)), rows, zero)


def _expert_or_none(pairs: Pairs) -> Tensor:
    assert pairs.valid is not None
    return torch.where(pairs.valid, pairs.expert, -1)


def _set_rows(
    loop: ExpertsLoop, how: Combine, accumulator: Tensor, index: list[Tensor], rows: Tensor, pairs: Pairs
) -> None:
    """Rows take the place of what was there; the largest expert writes last, and of its rows the last."""
    if isinstance(loop.dispatch, MaskDispatch):
        _set_rows_of_mask(loop, accumulator, index, rows, pairs)
        return
    assert how.place is not None
    before, own, after = how.place.extents(pairs.shape)
    slots = before * after
    rows = pairs.to_token_order(pairs.only_valid(rows))
    expert = pairs.to_token_order(pairs.expert if pairs.valid is None else _expert_or_none(pairs))
    rows = rows.reshape(before, own, after, *rows.shape[1:]).transpose(0, 1).reshape(own, slots, *rows.shape[1:])
    expert = expert.reshape(before, own, after).transpose(0, 1).reshape(own, slots)
    if slots == 1:
        chosen, best = rows.squeeze(1), expert.squeeze(1)
    else:
        place_in_time = expert * slots + torch.arange(slots, device=expert.device)
        winner = place_in_time.argmax(1)
        chosen = rows[torch.arange(own, device=expert.device), winner]
        best = expert.amax(1)
    target_shape = accumulator.shape
    if pairs.valid is not None:
        written = (best >= 0).reshape(*target_shape[: len(index)], *[1] * (len(target_shape) - len(index)))
        accumulator.copy_(torch.where(written, chosen.reshape(target_shape), accumulator))
    else:
        accumulator.copy_(chosen.reshape(target_shape))


def _set_rows_of_mask(loop: ExpertsLoop, accumulator: Tensor, index: list[Tensor], rows: Tensor, pairs: Pairs) -> None:
    """An entry of the mask that several experts have set is written by the largest of them."""
    last = torch.full((math.prod(pairs.shape),), -1, dtype=torch.int64, device=rows.device)
    last = last.scatter_reduce(0, pairs.position, pairs.expert, "amax")
    (kept,) = (last[pairs.position] == pairs.expert).nonzero().unbind(1)
    accumulator.index_put_(tuple(column[kept] for column in index), rows[kept].to(accumulator.dtype))
