"""Which loops compute on one device, and which tensors of the CPU eager takes in them besides.

Eager takes a CPU tensor without dimensions, such as ``torch.tensor(1.5)``, among tensors of a GPU in some operators and
raises in others (``clamp``, ``stack``). Fake tensors let it pass in all of them, so that what was traced would compute
where eager raises. And a value that each expert has gets dimensions once it is there for all experts: of the CPU, no
operator takes it then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moe_rewrite.loop import EveryToken, ExpertsLoop, Kind, Primitive, Step, TopKDispatch, Value

_ATEN = torch.ops.aten
_TWO_OPERANDS = {
    *(getattr(_ATEN, name).Tensor for name in ("add", "sub", "rsub", "mul", "div", "remainder", "fmod", "xlogy")),
    *(getattr(_ATEN, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge", "copysign")),
    *(getattr(_ATEN, f"bitwise_{name}").Tensor for name in ("and", "or", "xor", "left_shift", "right_shift")),
    *(getattr(_ATEN, f"logical_{name}").default for name in ("and", "or", "xor")),
    *(getattr(_ATEN, name).default for name in ("maximum", "minimum", "fmax", "fmin", "atan2", "hypot", "heaviside")),
    *(_ATEN.div.Tensor_mode, _ATEN.floor_divide.default, _ATEN.pow.Tensor_Tensor),
}
"""Whose kernels on a GPU take one operand of the CPU without dimensions: those of ``TensorIterator`` that allow it, and
that ``native_functions.yaml`` has no check of devices for. Of ternary operators it depends on the version of torch."""

_TAKEN = {_ATEN.where.self: (1, 2), _ATEN.masked_fill.Tensor: (2,)}
"""By position, which arguments of other operators may be on the CPU if they have no dimensions."""


def refusal(loop: ExpertsLoop) -> str | None:
    """Why the values of ``loop`` are on devices that do not go together, or None where they do."""
    dispatch = loop.dispatch
    if not isinstance(dispatch, EveryToken):
        selects = dispatch.expert_ids if isinstance(dispatch, TopKDispatch) else dispatch.mask
        if _device(selects) != loop.device:
            return f"what selects rows, `{selects}`, is on {_device(selects)}, and the result on {loop.device}"
    for one in loop.combines:
        for value in (one.values, *one.index):
            if _device(value) not in (None, _device(one.accumulator)):
                return f"`{value}` on {_device(value)} comes into a tensor on {_device(one.accumulator)}"
    reasons = (_refusal(step, loop.device) for step in loop.steps)
    return next((reason for reason in reasons if reason is not None), None)


def _refusal(step: Step, device: torch.device) -> str | None:
    values = [leaf for leaf in pytree.tree_leaves((step.args, step.kwargs)) if isinstance(leaf, Value)]
    elsewhere = [value for value in values if _device(value) not in (None, device)]
    if not elsewhere:
        return None
    if step.op in (Primitive.GATHER_EXPERT, Primitive.INDEX_EXPERT, Primitive.MATMUL):
        return f"`{elsewhere[0]}`, which each expert has, is on {_device(elsewhere[0])}, and the rows on {device}"
    devices = {_device(value) for value in values} - {None}
    if len(devices) == 1:
        return None
    said = f"`{step.op}` of `{elsewhere[0]}` on {_device(elsewhere[0])} with others on {device}"
    if any(value.kind is not Kind.INVARIANT for value in elsewhere):
        return f"{said}: it differs between experts, for all of which it has dimensions"
    return None if all(map(_is_of_cpu, elsewhere)) and _takes(step, elsewhere) else said


def _takes(step: Step, elsewhere: list[Value]) -> bool:
    """Whether eager takes values of the CPU where others are not."""
    if step.op is _ATEN.index.Tensor:
        return step.args[0] not in elsewhere  # an index is moved to what it is an index of
    if any(value.example.dim() for value in elsewhere):
        return False
    if step.op in _TWO_OPERANDS:
        return len(elsewhere) == 1
    places = _TAKEN.get(step.op, ())
    return all(value in [step.args[place] for place in places if place < len(step.args)] for value in elsewhere)


def _device(value: Value) -> Any:
    return value.example.device if isinstance(value.example, Tensor) else None


def _is_of_cpu(value: Value) -> bool:
    return bool(value.example.device.type == "cpu")
