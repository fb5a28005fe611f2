"""Rows that are not in dimension 0 for a moment: ``x[None, token]``, ``bmm``, what ``einsum`` is made of.

In front of the rows there are dimensions of size 1. The row program computes without them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_rewrite.loop import Kind, Value
from moe_rewrite.recognise import rules
from moe_rewrite.recognise.products import product
from moe_rewrite.recognise.refused import Refused

if TYPE_CHECKING:
    from moe_rewrite.recognise.rows import RowProgram

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Behind:
    """Rows behind dimensions of size 1.

    Attributes:
        rows: the rows without those dimensions.
        leading: how many there are.
    """

    rows: Value
    leading: int


RESHAPES = (
    *(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.squeeze.default, aten.expand.default),
)
PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default)


def operator_behind(program: RowProgram, node: fx.Node, op: Any, given: dict[str, Any]) -> Any:
    """The step of an operator with such rows among its arguments."""
    source = given.get("self")
    if op in (*RESHAPES, *PERMUTES) and isinstance(source, Behind):
        return _or_refused(rearranged(program, node, op, source), node)
    if op is aten.select.int and isinstance(source, Behind) and given["dim"] == 0 and given["index"] in (0, -1):
        return _or_refused(_reshaped(program, node, source.rows), node)
    if op is aten.bmm.default and isinstance(source, Behind):
        return _product(program, node, source, given["mat2"])
    if rules.is_pointwise(op):
        return _pointwise(program, node, op, given)
    if isinstance(source, Behind) and op.overloadpacket in rules.ROWWISE and isinstance(given.get("dim"), int):
        return _along_a_dimension(program, node, op, given, source)
    return _or_refused(None, node)


def rearranged(program: RowProgram, node: fx.Node, op: Any, source: Value | Behind) -> Value | Behind | None:
    """Rows moved behind dimensions of size 1, or back to the front; None where that is not what ``node`` does."""
    rows = source.rows if isinstance(source, Behind) else source
    leading = source.leading if isinstance(source, Behind) else 0
    if rules.squeezes(node, leading):
        raise Refused(rules.SQUEEZED, node)
    if op in RESHAPES:
        return _reshaped(program, node, rows)
    rank = leading + rows.example.dim()
    order = list(range(rank))
    if op is aten.permute.default:
        order = [dim % rank for dim in node.args[1]]  # type: ignore[union-attr]
    elif rank > 1:
        a, b = (node.args[1] % rank, node.args[2] % rank) if op is aten.transpose.int else (0, 1)  # type: ignore[operator]
        order[a], order[b] = order[b], order[a]
    place = order.index(leading)
    kept = [dim - leading for dim in order[place + 1 :] if dim > leading]
    dropped = [dim - leading for dim in order[:place] if dim > leading]
    if any(not rules.is_one(rows.example.shape[dim]) for dim in dropped):
        return None
    moved = [0, *kept, *dropped]
    if moved != sorted(moved):
        example = rows.example.permute(moved)
        rows = program.extra_step("permuted", Kind.PER_ROW, example, aten.permute.default, rows, moved)
    return _reshaped(program, node, rows)


def _reshaped(program: RowProgram, node: fx.Node, rows: Value) -> Value | Behind | None:
    shape = list(node.meta["val"].shape)
    leading = next((i for i, size in enumerate(shape) if not rules.is_one(size)), len(shape))
    if leading == len(shape) or not rules.same_size(shape[leading], rows.example.shape[0]):
        return None
    trailing = shape[leading + 1 :]
    entries = rows.example.shape[1:]
    if not all(isinstance(size, int) for size in (*trailing, *entries)) or math.prod(trailing) != math.prod(entries):
        return None
    if list(rows.example.shape[1:]) != trailing:
        example = rows.example.new_empty(rows.example.shape[0], *trailing)
        rows = program.extra_step("reshaped", Kind.PER_ROW, example, aten.reshape.default, rows, [-1, *trailing])
    return Behind(rows, leading) if leading else rows


def _product(program: RowProgram, node: fx.Node, source: Behind, weight: Any) -> Behind:
    plain = isinstance(weight, Value) and weight.kind is not Kind.PER_ROW and rules.is_one(weight.example.shape[0])
    if not plain or source.leading != 1 or source.rows.example.dim() != 2:
        _or_refused(None, node)
    matrix = program.extra_step("matrix", weight.kind, weight.example.select(0, 0), aten.select.int, weight, 0, 0)
    example = node.meta["val"].new_empty(source.rows.example.shape[0], node.meta["val"].shape[2])
    return Behind(product(program, f"{node.name}_product", example, source.rows, matrix), 1)


def _pointwise(program: RowProgram, node: fx.Node, op: Any, given: dict[str, Any]) -> Any:
    """Elementwise, with what has no rows broadcast to them."""
    behind = [leaf for leaf in rules.leaves(given) if isinstance(leaf, Behind)]
    leading, rank = behind[0].leading, behind[0].rows.example.dim()
    shape = node.meta["val"].shape
    if any(one.leading != leading or one.rows.example.dim() != rank for one in behind) or len(shape) != leading + rank:
        _or_refused(None, node)
    others = [value.example for value in rules.tensors(given)]
    if any(isinstance(other, torch.Tensor) and other.dim() > rank for other in others):
        _or_refused(None, node)
    plain = {name: value.rows if isinstance(value, Behind) else value for name, value in given.items()}
    args, kwargs = _call(op, plain)
    example = node.meta["val"].new_empty(*shape[leading:])
    return Behind(program.pointwise(node, op, plain, args, kwargs, example), leading)


def _along_a_dimension(program: RowProgram, node: fx.Node, op: Any, given: dict[str, Any], source: Behind) -> Any:
    """A reduction, a softmax, a split or a slice, along a dimension behind the rows."""
    dim = given["dim"] % (source.leading + source.rows.example.dim())
    if dim <= source.leading or any(isinstance(leaf, Behind) for leaf in rules.leaves({**given, "self": None})):
        _or_refused(None, node)
    plain = {**given, "self": source.rows, "dim": dim - source.leading}
    reason = rules.rowwise_refusal(op, plain, node.meta["val"])
    if reason is not None:
        raise Refused(reason, node)
    args, kwargs = _call(op, plain)
    result = node.meta["val"]
    if isinstance(result, torch.Tensor):
        example = _without(result, source.leading)
        return Behind(program.extra_step(node.name, Kind.PER_ROW, example, op, *args, **kwargs), source.leading)
    examples = tuple(_without(one, source.leading) for one in result)
    together = program.extra_step(node.name, Kind.PER_ROW, examples, op, *args, **kwargs)
    return program.taken_apart(together, lambda value: Behind(value, source.leading))


def _without(example: torch.Tensor, leading: int) -> torch.Tensor:
    return example.new_empty(*example.shape[leading:])


def _call(op: Any, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    schema = op._schema.arguments
    args = [given[argument.name] for argument in schema if not argument.kwarg_only]
    return args, {argument.name: given[argument.name] for argument in schema if argument.kwarg_only}


def _or_refused(result: Any, node: fx.Node) -> Any:
    if result is None:
        raise Refused(f"`{node.target}` puts the rows in another dimension than the first", node)
    return result
