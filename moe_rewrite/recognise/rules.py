"""Which ATen operators act on each row alone, and what they take.

Each rule takes the operator's arguments and answers with a reason when the operator could mix rows. Dimension 0 of a
per-row value is the row: an operator is rowwise when it neither reduces, moves nor merges that dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_rewrite.loop import Kind, Value

aten = torch.ops.aten

Rule = Callable[[torch._ops.OpOverload, dict[str, Any], Any], str | None]
"""``rule(op, arguments by name, example result) -> reason | None``."""


def arguments(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by the names of the operator's schema, defaults filled in."""
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in op._schema.arguments}


def is_random(op: torch._ops.OpOverload, given: dict[str, Any]) -> bool:
    """Whether two calls with the same arguments may differ. Attention draws nothing where it drops nothing."""
    return torch.Tag.nondeterministic_seeded in op.tags and given.get("dropout_p") != 0


def is_pointwise(op: torch._ops.OpOverload) -> bool:
    """Whether each element of the result depends on the elements at its own position alone."""
    return torch.Tag.pointwise in op.tags or op in _POINTWISE_TOO


def _overloads(names: str) -> set[torch._ops.OpOverload]:
    """The overloads of these names that this version of torch has."""
    found = (name.split(".") for name in names.split())
    packets = ((getattr(aten, packet, None), overload) for packet, overload in found)
    return {getattr(p, overload) for p, overload in packets if p is not None and overload in p.overloads()}


# Elementwise, but without the tag in some version from 2.11 to 2.13.
_POINTWISE_TOO = _overloads(
    "_to_copy.default clone.default detach.default alias.default lift_fresh_copy.default floor_divide.default "
    "floor_divide.Scalar hardswish.default leaky_relu.default rsub.Tensor rsub.Scalar _prelu_kernel.default "
    "masked_fill.Tensor masked_fill.Scalar hypot.default"
)


def leaves(given: Any) -> list[Any]:
    """All arguments of an operator, those in lists one by one."""
    if isinstance(given, dict):
        given = list(given.values())
    return [leaf for item in given for leaf in leaves(item)] if isinstance(given, (list, tuple)) else [given]


def tensors(given: Any) -> list[Value]:
    """All values among an operator's arguments, those in lists included."""
    return [leaf for leaf in leaves(given) if isinstance(leaf, Value)]


def is_number(value: Value) -> bool:
    """Whether a value is a Python number, not a tensor."""
    return not isinstance(value.example, (torch.Tensor, tuple, list))


def is_one(size: Any) -> bool:
    """Whether a size is known to be 1."""
    return isinstance(size, int) and size == 1


def is_view(node: fx.Node) -> bool:
    """Whether the result of a node may lie in the memory of its input, unless it is the in-place result itself."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def taking_tensors(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload of ``op`` that takes a tensor where it takes a number; None where there is none."""
    if op._overloadname == "Scalar" and "Tensor" in op.overloadpacket.overloads():
        other: torch._ops.OpOverload = op.overloadpacket.Tensor
        return other
    return op if op._overloadname in ("Tensor", "Tensor_mode") and is_pointwise(op) else None


_DATA_DEPENDENT = ("dynamic_output_shape", "data_dependent_output")


def has_form_over_experts(op: torch._ops.OpOverload) -> bool:
    """Whether ``torch.vmap`` has a kernel for ``op``, and it is a function of its arguments alone."""
    depends = op is not aten.index.Tensor and any(getattr(torch.Tag, name) in op.tags for name in _DATA_DEPENDENT)
    if depends or op.namespace != "aten":
        return False
    keys = ("FuncTorchBatched", "CompositeImplicitAutograd", "FuncTorchBatchedDecomposition")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)


def _rank(value: Value) -> int:
    return int(value.example.dim())


def _rows_in_front(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    """Reductions and scans along ``dim``; slices, selections and splits of ``dim``."""
    rows = given["self"]
    dims = given.get("dim", given.get("dims"))
    if dims is None or dims == []:
        return f"`{op}` acts on all dimensions at once, the rows included"
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if any(dim % _rank(rows) == 0 for dim in dims):
        return f"`{op}` acts along the rows of an expert"
    return None


def _keeps_leading(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    """Reshapes: dimension 0 must be the rows before and after."""
    before, after = given["self"].example.shape, result.shape
    if any(isinstance(size, Value) and size.kind is not Kind.INVARIANT for size in (given.get("size") or [])[1:]):
        return f"`{op}` pairs the rows of an expert with each other"
    if len(after) == 0 or not same_size(before[0], after[0]):
        return f"`{op}` merges or splits the rows of an expert"
    return None


def _permute(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    rank = _rank(given["self"])
    if op is aten.permute.default:
        moved = given["dims"][0] % rank != 0
    elif op is aten.transpose.int:
        moved = 0 in (given["dim0"] % rank, given["dim1"] % rank)
    else:
        moved = rank > 1
    return f"`{op}` moves the rows away from dimension 0" if moved else None


def _unsqueeze(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    if given["dim"] % (_rank(given["self"]) + 1) == 0:
        return f"`{op}` moves the rows away from dimension 0"
    return None


def _concatenate(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    tensors = given["tensors"]
    if any(tensor.kind is not Kind.PER_ROW for tensor in tensors):
        return f"`{op}` of rows with something that is not one value for each row"
    if given["dim"] % result.dim() == 0:
        return f"`{op}` joins rows to rows"
    return None


def _pad(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    if len(given["pad"]) // 2 >= _rank(given["self"]):
        return f"`{op}` adds rows"
    return None


def _repeat(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    repeats = given["repeats"]
    alike = len(repeats) == _rank(given["self"]) and isinstance(repeats[0], int) and repeats[0] == 1
    return None if alike else f"`{op}` repeats the rows of an expert"


def _batched(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    if any(value.kind is not Kind.PER_ROW for value in (given["self"], given["mat2"])):
        return f"`{op}` of rows with something that is not one matrix for each row"
    return None


def _constant_rows(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    """The same constant in every row."""
    fill = given.get("fill_value")
    if isinstance(fill, Value):
        return f"`{op}` fills rows with a value that is computed"
    rows = given.get("self")
    if rows is None or rows.kind is not Kind.PER_ROW or not same_size(rows.example.shape[0], result.shape[0]):
        return f"`{op}` makes rows out of their number"
    return None


def squeezes(node: fx.Node, dim: int) -> bool:
    """Whether a node drops dimension ``dim`` of its input where that has one entry: a single row is no row any more."""
    if node.target is aten.squeeze.default:
        return True
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dims: Any = node.args[1] if node.target in (aten.squeeze.dim, aten.squeeze.dims) else ()
    return any(one % rank == dim for one in (dims if isinstance(dims, (list, tuple)) else [dims]))


SQUEEZED = "`squeeze()` makes a single number of an expert's only position: name the dimension, as in `squeeze(-1)`"


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be the same."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def at_least(size: Any, least: int) -> bool:
    """Whether a size is known to be ``least`` or more."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(size >= least))


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are known to be strided alike."""
    dims = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(same_size(size, 1) or same_size(one, other) for size, one, other in dims)


def is_without_gaps(tensor: torch.Tensor) -> bool:
    """Whether the entries of a tensor are known to be all that lies between its first and its last in memory."""
    return same_layout(tensor, torch.empty_like(tensor))


def _table() -> dict[torch._ops.OpOverloadPacket, Rule]:
    along_dim = (
        "sum mean amax amin var std var_mean std_mean logsumexp _softmax _log_softmax cumsum cumprod "
        "linalg_vector_norm norm argmax argmin max min topk sort any all prod median "
        "glu flip roll slice select split split_with_sizes chunk unbind narrow squeeze unfold"
    )
    rules: dict[str, Rule] = dict.fromkeys(along_dim.split(), _rows_in_front)
    rules |= dict.fromkeys(("view", "_unsafe_view", "reshape", "expand", "flatten", "unflatten"), _keeps_leading)
    rules |= dict.fromkeys(("t", "transpose", "permute"), _permute)
    constants = "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full"
    rules |= dict.fromkeys(constants.split(), _constant_rows)
    rules |= {"unsqueeze": _unsqueeze, "cat": _concatenate, "constant_pad_nd": _pad, "bmm": _batched}
    rules |= {"stack": _concatenate, "repeat": _repeat}
    return {getattr(aten, name): rule for name, rule in rules.items() if hasattr(aten, name)}


RESHAPES = {getattr(aten, name) for name in ("view", "_unsafe_view", "reshape", "expand") if hasattr(aten, name)}
"""The operators that may be told the number of rows, as the size of dimension 0."""

ROWWISE: dict[torch._ops.OpOverloadPacket, Rule] = _table()
"""The operators that can be rowwise, with the rule that says whether one call is."""


def rowwise_refusal(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> str | None:
    """Why a call of ``op`` with a per-row first argument is not proved rowwise; None where it is."""
    rule = ROWWISE.get(op.overloadpacket)
    if rule is None:
        return f"`{op}` is not known to act on each row alone"
    example = result[0] if isinstance(result, (tuple, list)) else result
    return rule(op, given, example)
