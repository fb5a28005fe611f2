"""Products of rows with a matrix, which is the expert's or the same for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_rewrite.loop import Kind, Primitive, Step, Value
from moe_rewrite.recognise.refused import Refused
from moe_rewrite.recognise.rules import is_one

if TYPE_CHECKING:
    from moe_rewrite.recognise.rows import RowProgram

aten = torch.ops.aten
MATMULS = (aten.mm.default, aten.addmm.default, aten.mv.default)


def matmul(program: RowProgram, node: fx.Node, op: Any, given: dict[str, Any]) -> Value:
    """The step of one of ``MATMULS``, whose first operand has to be the rows.

    Raises:
        Refused: the rows are contracted, or something is added to them by their order.
    """
    if op is aten.mv.default:
        return _matrix_times_vector(program, node, given["self"], given["vec"])
    left, right = given.get("mat1", given["self"]), given["mat2"]
    if left.kind is not Kind.PER_ROW or right.kind is Kind.PER_ROW:
        raise Refused(f"`{op}` contracts or moves the rows of an expert", node)
    if op is aten.mm.default:
        return _product(program, node, left, right)
    bias = given["self"]
    if bias.kind is Kind.INVARIANT and bias.example.dim() == 2 and not is_one(bias.example.shape[0]):
        raise Refused(f"`{op}` adds something to the rows by their order", node)
    if given["alpha"] == 1 and given["beta"] == 1:  # rounded once, as in eager
        if right.kind is not Kind.PER_EXPERT:
            bias = program.gathered(bias, 2, node) if bias.kind is Kind.PER_EXPERT else bias
            return program.step(node, Kind.PER_ROW, op, bias, left, right)
        if bias.kind is Kind.PER_EXPERT and bias.example.shape == node.meta["val"].shape[1:]:
            return _product(program, node, left, right, bias=bias)
    product = _times(program, _product(program, node, left, right, f"{node.name}_product"), given["alpha"])
    bias = _times(program, bias, given["beta"])
    if bias.kind is Kind.PER_EXPERT:
        bias = program.gathered(bias, 2, node)
    return program.step(node, Kind.PER_ROW, aten.add.Tensor, product, bias)


def _times(program: RowProgram, value: Value, factor: Any) -> Value:
    if isinstance(factor, Value) or factor == 1:
        return value
    return program.extra_step("times", value.kind, value.example, aten.mul.Tensor, value, factor)


def _matrix_times_vector(program: RowProgram, node: fx.Node, rows: Value, vector: Value) -> Value:
    if rows.kind is not Kind.PER_ROW or vector.kind is Kind.PER_ROW:
        raise Refused(f"`{node.target}` contracts or moves the rows of an expert", node)
    column = vector.example.unsqueeze(1)
    weight = program.extra_step("column", vector.kind, column, aten.unsqueeze.default, vector, 1)
    result = node.meta["val"].unsqueeze(1)
    op = Primitive.MATMUL if weight.kind is Kind.PER_EXPERT else aten.mm.default
    product = program.extra_step("product", Kind.PER_ROW, result, op, rows, weight)
    return program.step(node, Kind.PER_ROW, aten.squeeze.dim, product, 1)


def _product(
    program: RowProgram, node: fx.Node, rows: Value, weight: Value, name: str | None = None, bias: Value | None = None
) -> Value:
    return product(program, name or node.name, node.meta["val"], rows, weight, bias)


def product(
    program: RowProgram, name: str, example: Any, rows: Value, weight: Value, bias: Value | None = None
) -> Value:
    """The step of rows ``[rows, K]`` times a matrix ``[K, N]``, plus a bias ``[N]`` if both are per expert."""
    op = Primitive.MATMUL if weight.kind is Kind.PER_EXPERT else aten.mm.default
    value = Value(name, Kind.PER_ROW, example)
    program.steps.append(Step(value, op, (rows, weight) if bias is None else (rows, weight, bias)))
    return value
