"""Convolutions that are products of rows with a matrix: the kernel covers all there is of a row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_rewrite.loop import Kind, Value
from moe_rewrite.recognise.products import product
from moe_rewrite.recognise.refused import Refused

if TYPE_CHECKING:
    from moe_rewrite.recognise.rows import RowProgram

aten = torch.ops.aten


def product_of_rows(program: RowProgram, node: fx.Node, given: dict[str, Any]) -> Value:
    """The steps of ``convolution(rows [R, C, *k], weight [N, C, *k], bias [N])``: ``rows @ weight.T + bias``.

    Raises:
        Refused: the kernel moves over the row, or the convolution is transposed or in groups.
    """
    rows, weight, bias = given["input"], given["weight"], given["bias"]
    if not isinstance(rows, Value) or rows.kind is not Kind.PER_ROW or weight.kind is Kind.PER_ROW:
        raise Refused(f"`{node.target}` of something that is not rows, with rows", node)
    kernel, inside = list(weight.example.shape[2:]), list(rows.example.shape[2:])
    plain = not given["transposed"] and given["groups"] == 1 and not any(given["padding"])
    if not plain or kernel != inside or not all(isinstance(size, int) for size in (*kernel, *weight.example.shape)):
        raise Refused(f"`{node.target}` moves a kernel over the rows", node)
    if any(step != 1 and size != 1 for step, size in zip(given["dilation"], kernel, strict=True)):
        raise Refused(f"`{node.target}` moves a kernel over the rows", node)
    columns, channels = weight.example.shape[:2]
    inner = channels * math.prod(kernel)
    flat_rows = program.extra_step(
        "rows",
        Kind.PER_ROW,
        rows.example.reshape(rows.example.shape[0], inner),
        aten.reshape.default,
        rows,
        [-1, inner],
    )
    flat_weight = weight.example.reshape(columns, inner)
    matrix = program.extra_step("matrix", weight.kind, flat_weight, aten.reshape.default, weight, [columns, inner])
    matrix = program.extra_step("matrix", weight.kind, flat_weight.t(), aten.t.default, matrix)
    result = node.meta["val"].reshape(rows.example.shape[0], columns)
    total = product(program, node.name, result, flat_rows, matrix)
    if bias is not None:
        if bias.kind is Kind.PER_EXPERT:
            bias = program.gathered(bias, 2, node)
        total = program.extra_step("sum", Kind.PER_ROW, result, aten.add.Tensor, total, bias)
    return program.step(node, Kind.PER_ROW, aten.reshape.default, total, [-1, columns, *([1] * len(kernel))])
