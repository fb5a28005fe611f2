"""Type promotion of values of the expert that have no dimensions.

In eager such a value, and the expert's index as a number, gives way to the dtype of a tensor that has dimensions. Once
it has one entry for each row, or for each expert, it does no longer: ``rows > threshold[expert]`` would be compared in
the threshold's dtype. Where that makes a difference the values are cast first, to the dtype of eager's operands.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_rewrite.loop import Kind, Value
from moe_rewrite.recognise import rules

_ATEN = torch.ops.aten
_UNROUNDED = (_ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.div.Tensor_mode, _ATEN.floor_divide.default)


def casts(op: Any, given: dict[str, Any], result: torch.Tensor) -> dict[Value, torch.dtype]:
    """What has to be cast, and to which dtype, before values of the expert get more entries.

    Args:
        op: an elementwise operator.
        given: its arguments by name.
        result: an example of what it gives.

    Returns:
        Nothing where it computes in the same dtype without. Truths stay what they are: ``where`` takes no others. So
        do numbers that are the same for all experts.
    """
    values = rules.tensors(given)
    eager: list[list[torch.dtype]] = [[], [], []]  # of tensors with dimensions, of others, of numbers
    lifted: list[list[torch.dtype]] = [[], [], []]
    for value in values:
        rank = _rank(value)
        eager[rank].append(_dtype(value))
        lifted[0 if value.kind is Kind.PER_EXPERT else rank].append(_dtype(value))
    wanted = _computed_in(eager)
    if wanted is None or wanted is _computed_in(lifted):
        return {}
    at_once = _cast_at_once(op, given, wanted, result)
    to = wanted if at_once is None else at_once

    def is_cast(value: Value) -> bool:
        rank = _rank(value)
        if rank == 2:
            return value.kind is Kind.PER_EXPERT
        return (rank == 1 or at_once is not None) and _dtype(value) not in (torch.bool, to)

    return {value: to for value in values if is_cast(value)}


def _cast_at_once(op: Any, given: dict[str, Any], dtype: torch.dtype, result: torch.Tensor) -> torch.dtype | None:
    """The dtype that eager computes in and casts every operand to at once, where that is not theirs, ``dtype``.

    True division and others of integers compute in floating point. On a CPU, products and quotients in low precision
    take a second operand without dimensions unrounded (``BinaryOpsKernel.cpp``).
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return result.dtype if result.dtype.is_floating_point or result.dtype.is_complex else None
    first = given.get("self")
    is_low = dtype in (torch.float16, torch.bfloat16) and result.device.type == "cpu"
    unrounded = is_low and op in _UNROUNDED and isinstance(first, Value) and _rank(first) == 0
    return torch.float32 if unrounded else None


def _rank(value: Value) -> int:
    if not isinstance(value.example, torch.Tensor):
        return 2
    return 0 if value.example.dim() else 1


def _dtype(value: Value) -> torch.dtype:
    example = value.example
    if isinstance(example, torch.Tensor):
        return example.dtype
    if isinstance(example, bool | torch.SymBool):
        return torch.bool
    return torch.get_default_dtype() if isinstance(example, float | torch.SymFloat) else torch.int64


def _computed_in(ranks: list[list[torch.dtype]]) -> torch.dtype | None:
    """The dtype that operands of these dtypes are computed in, by rank."""
    found: torch.dtype | None = None
    for dtypes in ranks:
        own: torch.dtype | None = None
        for dtype in dtypes:
            own = dtype if own is None else torch.promote_types(own, dtype)
        found = _combined(found, own)
    return found


def _combined(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    """As ``combine_categories`` in ``ATen/native/TypeProperties.cpp``: of another category than the higher one's."""
    if higher is None or lower is None:
        return higher or lower
    if higher.is_complex:
        return higher
    if higher.is_floating_point:
        return higher.to_complex() if lower.is_complex else higher
    if higher is torch.bool or lower.is_floating_point or lower.is_complex:
        return torch.promote_types(higher, lower)
    return higher
