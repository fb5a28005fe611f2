"""In which dtype, and from which zero, values are summed into an accumulator.

Eager adds the values of the experts one after the other, and rounds each time to the dtype of the accumulator. Here
they are summed first. Three things are kept:

* No order of float16 or bfloat16 numbers is rounded or cut off on the way: they are added in float32 together with what
  the accumulator holds, and rounded once. Where the accumulator is wider than the values it is the accumulator's dtype
  that counts, and integers are added as integers, which are exact in any order, also where they wrap around.
* A row that nothing is added to stays what it is, -0.0 too, for what is added for it is -0.0: x + 0.0 would make 0.0
  of it.
* Gradients are those of a sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_rewrite.loop import Combine, ExpertsLoop, Value, Write
from moe_rewrite.lower.adjoints import slot_sum
from moe_rewrite.lower.precision import accumulated_in

MOST_ADDED_ONE_BY_ONE = 16
"""Up to how many numbers the code that is made adds by an operator for each."""


def sum_dtype(accumulator: torch.dtype, values: torch.dtype) -> torch.dtype:
    """The dtype in which values are multiplied by a number, summed and added to an accumulator."""
    return accumulated_in(torch.promote_types(accumulator, values))


def accumulations(loop: ExpertsLoop) -> Iterator[tuple[Value, Value, list[Combine]]]:
    """The combines of a loop by the memory that they change: ``(root, base, combines)``, in order.

    ``root`` is an input or a start of a carried value; ``base`` what all of the combines change, ``root`` or a view.
    """
    groups: dict[tuple[Value, int | None], list[Combine]] = {}
    for one in loop.combines:
        groups.setdefault((loop.root(one.accumulator), one.carry), []).append(one)
    for (root, _), combines in groups.items():
        accumulators = {one.accumulator for one in combines}
        yield root, accumulators.pop() if len(accumulators) == 1 else root, combines


def wanted_dtype(accumulator: torch.dtype, combines: list[Combine]) -> torch.dtype:
    """The dtype in which an accumulator is to be held while all of ``combines`` change it.

    It is its own where one sum is added to zeros: that is rounded once as it stands. So is what each expert adds to a
    part of its own.
    """
    sums = [one for one in combines if one.write is not Write.SET and one.expert_dim is None]
    if not sums or (len(combines) == 1 and sums[0].from_zero and (sums[0].place is not None or not sums[0].index)):
        return accumulator
    found = accumulator
    for one in sums:
        found = torch.promote_types(found, sum_dtype(accumulator, one.values.example.dtype))
    return found


def additive_zero(accumulator: Tensor, from_zero: bool) -> float:
    """What is added where nothing is: it leaves every number as it is."""
    return 0 if from_zero or not accumulator.is_floating_point() else -0.0


def total_of(values: Tensor, dims: list[int], accumulator: torch.dtype, from_zero: bool) -> Tensor:
    """``values.sum(dims)``, to be added to an accumulator of a dtype.

    Args:
        values: what is added, with ``dims`` besides the dimensions of the accumulator.
        dims: which dimensions are summed over; none where there is one value for each entry.
        accumulator: the dtype of the accumulator.
        from_zero: whether it holds zeros, and no -0.0.
    """
    if not dims:
        return values
    dtype = sum_dtype(accumulator, values.dtype)
    if from_zero or not accumulator.is_floating_point:
        if len(dims) > 1:
            return values.sum(dims, dtype=dtype)
        return slot_sum(values, dims[0], None if values.dtype is accumulator else dtype)
    if all(isinstance(values.shape[dim], int) and values.shape[dim] <= MOST_ADDED_ONE_BY_ONE for dim in dims):
        for dim in sorted(dims, reverse=True):
            values = slot_sum(values, dim, dtype, keeps_sign=True)
        return values
    total = values.sum(dims, dtype=dtype)
    nothing = ((values == 0) & values.signbit()).all(tuple(dims))
    return torch.where(nothing, -(0.0 - total), total)  # -0.0 for 0.0, with the gradient of the sum
