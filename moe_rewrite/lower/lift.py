"""Runs the row program of a loop for all pairs at once.

Per-row values get one row for each pair, per-expert values a leading dimension of experts. Every step was proved to act
on each row alone, so it is run as it stands; only the product of rows with their experts' weights is the experts
backend's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moe_rewrite.loop import ExpertsLoop, Kind, Primitive, Step, Value
from moe_rewrite.lower.pairs import Pairs

Product = Callable[[Tensor, Tensor], Tensor]
"""``product(rows [P, K], weight [num_experts, K, N]) -> [P, N]``: each row times the weight of its expert."""


_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default, torch.ops.aten.embedding.default)


class Lifted:
    """The values of a loop's row program, over all pairs.

    Args:
        loop: the loop.
        inputs: the values of its inputs.
        fuses: whether the inner compiler fuses elementwise operators into reductions, as inductor does. Without it a
            large intermediate value is a large piece of memory.
    """

    def __init__(self, loop: ExpertsLoop, inputs: Sequence[Any], fuses: bool) -> None:
        self.loop = loop
        self.fuses = fuses
        self.inputs = inputs
        self._values: dict[Value, Any] = {}
        self._pairs: Pairs | None = None
        for step in loop.steps:  # what the pairs themselves are made of
            if step.result.kind is Kind.INVARIANT:
                self._values[step.result] = self._invariant(step)

    def pairs(self) -> Pairs:
        """The loop's pairs, in token order."""
        dispatch = self.loop.dispatch
        visited = None if dispatch.visited is None else self._values[dispatch.visited]
        return Pairs.in_token_order(self.loop, self._values[dispatch.expert_ids], visited)

    def run(self, pairs: Pairs, product: Product) -> None:
        """Compute the rows of all pairs, in their order, and add them to the loop's accumulators in place."""
        for step in self.loop.steps:
            if step.result.kind is Kind.PER_EXPERT:
                self._values[step.result] = self._per_expert(step)
            elif step.result.kind is Kind.PER_ROW:
                self._values[step.result] = self._per_row(step, pairs, product)
        for combine in self.loop.combines:
            accumulator = self.inputs[combine.accumulator]
            rows = pairs.only_valid(self._values[combine.rows])
            if combine.token_axis is None:
                accumulator.index_add_(0, self._values[combine.index], rows)
                continue
            rows = pairs.to_token_order(rows).reshape(*pairs.shape, *rows.shape[1:])
            slots = [axis for axis in range(len(pairs.shape)) if axis != combine.token_axis]
            accumulator.add_(rows.sum(slots) if slots else rows)

    def _arguments(self, step: Step) -> tuple[Any, Any]:
        lookup = self._values.__getitem__
        args, kwargs = pytree.tree_map_only(Value, lookup, (step.args, step.kwargs))
        return args, kwargs

    def _invariant(self, step: Step) -> Any:
        if step.op is Primitive.INPUT:
            return self.inputs[step.args[0]]
        args, kwargs = self._arguments(step)
        return step.op(*args, **kwargs)  # type: ignore[operator]

    def _per_expert(self, step: Step) -> Any:
        num_experts = self.loop.num_experts
        if step.op is Primitive.EXPERT_INDEX:
            row = step.result.example
            return torch.arange(num_experts, device=row.device).reshape(num_experts, *row.shape)
        if step.op is Primitive.SELECT_EXPERT:
            table, dim = self._values[step.args[0]], step.args[1]
            table = table.movedim(dim, 0) if dim else table
            return table if table.shape[0] == num_experts else table.narrow(0, 0, num_experts)
        leaves, spec = pytree.tree_flatten((step.args, step.kwargs))
        each = [isinstance(leaf, Value) and leaf.kind is Kind.PER_EXPERT for leaf in leaves]
        values = [self._values[leaf] if isinstance(leaf, Value) else leaf for leaf in leaves]

        def for_one_expert(*mapped: Any) -> Any:
            own = iter(mapped)
            filled = [next(own) if is_each else value for value, is_each in zip(values, each, strict=True)]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return step.op(*args, **kwargs)  # type: ignore[operator]

        return torch.vmap(for_one_expert)(*(v for v, is_each in zip(values, each, strict=True) if is_each))

    def _per_row(self, step: Step, pairs: Pairs, product: Product) -> Any:
        if step.op is Primitive.COORDINATE:
            return pairs.coordinate(step.args[0])
        if step.op is Primitive.ROW_COUNT:
            return pairs.expert.shape[0]
        args, kwargs = self._arguments(step)
        if step.op is Primitive.MATMUL:
            return product(*args)
        if step.op in _INDEXING:
            args = pytree.tree_map_only(Tensor, pairs.harmless_index, args[1:])
            return step.op(self._values[step.args[0]], *args)  # type: ignore[operator]
        if step.op is Primitive.GATHER_EXPERT:
            value, rank = args
            gathered = value[pairs.expert]
            own = gathered.shape[1:] if gathered.dim() <= rank else gathered.shape[2:]
            return gathered.reshape(-1, *[1] * (rank - 1 - len(own)), *own) if gathered.dim() != rank else gathered
        result = step.op(*args, **kwargs)  # type: ignore[operator]
        # A 0-dim value of the expert does not take part in type promotion, one for each pair does.
        wanted = getattr(step.result.example, "dtype", None)
        return result.to(wanted) if isinstance(result, Tensor) and result.dtype is not wanted else result
