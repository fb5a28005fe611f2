"""Rows that are gathered from a table by a coordinate of the pair, such as its token: which row each pair has."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing  # seen to work in 2.11, 2.13 and 2.15
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_rewrite.loop import ExpertsLoop, Kind, Primitive, Step, TopKDispatch, Value
from moe_rewrite.lower.adjoints import repeated
from moe_rewrite.lower.pairs import Pairs


@dataclasses.dataclass(frozen=True)
class Gather:
    """Pair ``p``, in token order, has row ``p // after % own`` of ``table``.

    Attributes:
        table: the table, ``[own, ...]``.
        before: how often its rows come one after the other. It and the next two may be symbols.
        own: how many rows the table has.
        after: how many pairs in a row have the same row.
    """

    table: Value
    before: Any
    own: Any
    after: Any

    @property
    def pairs(self) -> Any:
        """The number of pairs."""
        return self.before * self.own * self.after

    def rows(self, table: Tensor) -> Tensor:
        """The row of each pair, ``[P, ...]``."""
        return repeated(table, self.before, self.after)


def gather_of(loop: ExpertsLoop, step: Step, pairs: Pairs) -> Gather | None:
    """What a step gathers; None for a step that gathers no rows by a coordinate of the pair."""
    dispatch = loop.dispatch
    if step.op is not torch.ops.aten.index.Tensor or not isinstance(dispatch, TopKDispatch):
        return None
    table, indices = step.args
    coordinate = next((one for one in loop.steps if len(indices) == 1 and one.result is indices[0]), None)
    if table.kind is not Kind.INVARIANT or coordinate is None or coordinate.op is not Primitive.COORDINATE:
        return None
    axis, shape = coordinate.args[0], pairs.shape
    if axis is None or table.example.dim() != 2:
        return None
    with disable_proxy_modes_tracing():  # sizes of another trace than the one that this may be called in
        if not statically_known_true(table.example.shape[0] == dispatch.shape[axis]):
            return None  # nothing would check whether a row is there
    return Gather(table, math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
