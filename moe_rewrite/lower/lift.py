"""Runs the row program of a loop for all pairs at once.

Per-row values get one row for each pair, per-expert values a leading dimension of experts. Every step was proved to act
on each row alone, so it is run as it stands; only the product of rows with their experts' weights is the experts
backend's own.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from moe_rewrite.errors import NotLiftedError
from moe_rewrite.loop import Combine, EveryToken, ExpertsLoop, Kind, MaskDispatch, Primitive, Step, TopKDispatch, Value
from moe_rewrite.lower import combine
from moe_rewrite.lower.adjoints import of_expert
from moe_rewrite.lower.columns import taken_apart
from moe_rewrite.lower.gathers import gather_of
from moe_rewrite.lower.grouped_product import has_kernel_of_ours
from moe_rewrite.lower.pairs import Pairs
from moe_rewrite.lower.precision import accumulated_in
from moe_rewrite.lower.sums import accumulations, wanted_dtype

Product = Callable[[Tensor, Tensor], Tensor]
"""``product(rows [P, K], weight [num_experts, K, N]) -> [P, N]``: each row times the weight of its expert."""

ProductWithBias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``product(rows, weight, bias [num_experts, N]) -> [P, N]``: the same plus the bias of the expert."""


BY_PARTS = ("cuda",)
"""On which devices gradients of columns are written part by part, see ``joined.py``."""

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default, torch.ops.aten.embedding.default)


@dataclasses.dataclass(frozen=True)
class InnerCompiler:
    """What an experts backend may know of the compiler that the rewritten graph goes to.

    Attributes:
        fuses: whether it fuses elementwise operators into reductions, as inductor does. Without it a large intermediate
            value is a large piece of memory.
        max_autotune: whether the user asked it to search for the fastest kernels.
    """

    fuses: bool = True
    max_autotune: bool = False


class Lifted:
    """The values of a loop's row program, over all pairs.

    Attributes:
        outputs: once the program has run, the carried values after the loop, then what it collected.

    Args:
        loop: the loop.
        inputs: the values of its inputs.
        compiler: what is known of the compiler that the graph goes to.
        needs_grad: whether there may be a gradient to compute.
    """

    def __init__(
        self,
        loop: ExpertsLoop,
        inputs: Sequence[Any],
        compiler: InnerCompiler,
        needs_grad: bool = True,
    ) -> None:
        self.loop = loop
        self.fuses = compiler.fuses
        self.max_autotune = compiler.max_autotune
        self.needs_grad = needs_grad
        # What is computed for pairs of no expert is dropped. It matters what it is where a gradient goes through it, or
        # where it is an index.
        self.lends = needs_grad or any(_may_be_an_index(step) for step in loop.steps) or not _are_in_range(loop)
        self.inputs = inputs
        self.outputs: list[Tensor] = []
        self._values: dict[Value, Any] = {}
        self._instead: Mapping[Value, Callable[[], Tensor]] = {}
        self._with_bias: ProductWithBias | None = None
        self._made_by = {step.result: step for step in loop.steps}
        for step in loop.steps:
            used = pytree.tree_leaves((step.args, step.kwargs))
            ready = all(value in self._values for value in used if isinstance(value, Value))
            if step.result.kind is Kind.INVARIANT and ready:  # the size of what each expert has comes later
                self._values[step.result] = self._invariant(step)

    def pairs(self) -> Pairs:
        """The loop's pairs: in token order, or sorted by expert where a mask says which there are.

        Raises:
            ValueError: the loop selects no rows, so it has no pairs.
        """
        dispatch = self.loop.dispatch
        if isinstance(dispatch, EveryToken):
            raise ValueError("a loop in which each expert takes every token has no pairs")
        if isinstance(dispatch, MaskDispatch):
            return Pairs.of_mask(self.loop, self._over_experts(dispatch.mask), self._visited())
        return Pairs.in_token_order(self.loop, self._values[dispatch.expert_ids], self._visited(), self.lends)

    def value(self, value: Value) -> Any:
        """The value over all pairs or experts, of what does not depend on rows or was computed before."""
        return self._over_experts(value)

    def lend(self, pairs: Pairs, rows: Tensor) -> Tensor:
        """``rows`` ``[P, N]``, where it matters with those of another pair for the pairs of no expert."""
        return pairs.lend(rows) if self.lends else rows

    def run(
        self,
        pairs: Pairs | None,
        product: Product | None,
        with_bias: ProductWithBias | None = None,
        instead: Mapping[Value, Callable[[], Tensor]] | None = None,
    ) -> None:
        """Compute the rows of all pairs, in their order, and add them to the loop's accumulators in place.

        Args:
            pairs: the pairs. Without them the program of each expert is computed as it stands.
            product: what multiplies the rows with the weights of their experts.
            with_bias: what adds a bias to the product before it is rounded, as ``F.linear`` does. Without it the bias
                is added afterwards: in low precision that is one rounding more than eager makes.
            instead: what computes a per-row value in another way than by its step, when its turn comes.
        """
        self._with_bias = with_bias
        self._raise_errors()
        apart = taken_apart(self.loop, self._values.__getitem__) if self._writes_by_parts() else {}
        self._instead = {**apart, **(instead or {})}
        for step in self.loop.steps:
            if step.result in self._values:
                continue
            if step.result.kind is not Kind.PER_ROW:
                self._values[step.result] = self._before_rows(step)
            elif pairs is not None and product is not None:
                self._values[step.result] = self._per_row(step, pairs, product)
        carried = [self._values[start].clone() for start in self.loop.carried]
        for root, base, combines in accumulations(self.loop):
            carry = combines[0].carry
            whole = self._values[root] if carry is None else carried[carry]
            self._accumulate(self._seen(base, root, whole), base, combines, pairs)
        self.outputs = [*carried, *map(self._collected, self.loop.collected)]

    def _raise_errors(self) -> None:
        """Check on a CPU what eager raises an error for. Elsewhere the check would end the process, or wait."""
        for error in self.loop.errors if self.loop.device.type == "cpu" else ():
            torch.ops.aten._assert_async.msg(~self._values[error.truth], error.message)

    def _accumulate(self, held: Tensor, base: Value, combines: list[Combine], pairs: Pairs | None) -> None:
        """Change ``held``, the value of ``base``, in place."""
        dtype = wanted_dtype(held.dtype, combines)
        wide = held if dtype is held.dtype else held.to(dtype)
        for one in combines:
            index = [self._values[column] for column in one.index]
            accumulator = self._seen(one.accumulator, base, wide)
            combine.combine(self.loop, one, accumulator, index, self._values[one.values], pairs)
        if wide is not held:
            held.copy_(wide)

    def _seen(self, view: Value, base: Value, now: Tensor) -> Any:
        """A view of ``base``, taken of what that is ``now``.

        Eager takes views when it comes to them. One that was taken before ``base`` was changed has no gradient of that
        change where the graph is run as it stands.
        """
        if view is base:
            return now
        step = self._made_by[view]
        args, kwargs = self._arguments(step)
        return _run(step.op, (self._seen(step.args[0], base, now), *args[1:]), kwargs)

    def _writes_by_parts(self) -> bool:
        """Whether gradients of columns are to be written part by part: where inductor would go through all for each."""
        return self.needs_grad and self.fuses and self.loop.device.type in BY_PARTS

    def _visited(self) -> Tensor | None:
        """For which experts the body holds, ``[n]``: those that are not 0; None for all that have pairs.

        Python may ask about a tensor of any device.
        """
        device = self.loop.device
        visited = None if self.loop.visited is None else self._values[self.loop.visited].to(device)
        for condition in self.loop.conditions:
            truth = (self._over_experts(condition.truth) != 0).to(device)
            if condition.truth.kind is Kind.PER_EXPERT:
                truth = truth.reshape(self.loop.num_experts)
            else:
                truth = truth.reshape(1).expand(self.loop.num_experts)
            holds = truth if condition.taken else ~truth
            visited = holds if visited is None else (visited[: self.loop.num_experts] != 0) & holds
        return visited

    def _over_experts(self, value: Value) -> Any:
        """The value of all experts, of something that does not depend on rows."""
        if value not in self._values:
            for step in self.loop.steps:
                if step.result.kind is not Kind.PER_ROW and step.result not in self._values:
                    self._values[step.result] = self._before_rows(step)
                if step.result is value:
                    break
        return self._values[value]

    def _collected(self, value: Value) -> Tensor:
        result: Tensor = self._values[value]
        if value.kind is not Kind.PER_EXPERT:
            result = result.unsqueeze(0).expand(self.loop.num_experts, *result.shape)
        return result

    def _arguments(self, step: Step) -> tuple[Any, Any]:
        lookup = self._values.__getitem__
        args, kwargs = pytree.tree_map_only(Value, lookup, (step.args, step.kwargs))
        return args, kwargs

    def _before_rows(self, step: Step) -> Any:
        """A value that does not depend on rows."""
        if step.result.kind is Kind.PER_EXPERT:
            return self._per_expert(step)
        if step.op is torch.ops.aten.sym_size.int and step.args[0].kind is Kind.PER_EXPERT:
            return self._values[step.args[0]].shape[step.args[1] % step.args[0].example.dim() + 1]
        return self._invariant(step)

    def _invariant(self, step: Step) -> Any:
        if step.op is Primitive.INPUT:
            return self.inputs[step.args[0]]
        if step.op is Primitive.CONSTANT:
            return step.args[0]
        args, kwargs = self._arguments(step)
        return _run(step.op, args, kwargs)

    def _per_expert(self, step: Step) -> Any:
        num_experts = self.loop.num_experts
        if step.op is Primitive.EXPERT_INDEX:
            shape = getattr(step.result.example, "shape", ())
            dtype = getattr(step.result.example, "dtype", torch.int64)
            numbers = torch.arange(num_experts, dtype=dtype, device=self.loop.device).reshape(num_experts, *shape)
            return numbers + step.args[0] if step.args else numbers
        if step.op is Primitive.SELECT_EXPERT:
            table, dim = self._values[step.args[0]], step.args[1]
            table = table.movedim(dim, 0) if dim else table
            size = table.shape[0]  # that of a `bincount` is not known when compiling
            whole = isinstance(size, int) and size == num_experts
            return table if whole else table.narrow(0, step.args[2] if len(step.args) > 2 else 0, num_experts)
        if not isinstance(step.op, torch._ops.OpOverload) and step.op is not operator.getitem:
            args, kwargs = self._arguments(step)  # arithmetic on the number of the expert
            return step.op(*args, **kwargs)  # type: ignore[operator]
        leaves, spec = pytree.tree_flatten((step.args, step.kwargs))
        each = [isinstance(leaf, Value) and leaf.kind is Kind.PER_EXPERT for leaf in leaves]
        values = [self._values[leaf] if isinstance(leaf, Value) else leaf for leaf in leaves]

        def for_one_expert(*mapped: Any) -> Any:
            own = iter(mapped)
            filled = [next(own) if is_each else value for value, is_each in zip(values, each, strict=True)]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return _run(step.op, args, kwargs)

        try:
            result = torch.vmap(for_one_expert)(*(v for v, is_each in zip(values, each, strict=True) if is_each))
        except RuntimeError as error:
            raise NotLiftedError(f"`{step.op}` cannot be executed for all experts at once: {error}") from error
        return _as_example(result, step.result.example)

    def _harmless(self, pairs: Pairs, index: Tensor) -> Tensor:
        return pairs.harmless_index(index) if self.lends else index

    def _multiply(
        self, pairs: Pairs, product: Product, rows: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        if bias is None:
            return product(rows, weight)
        if self._with_bias is not None:
            return self._with_bias(rows, weight, bias)
        return product(rows, weight) + self._of_expert(pairs, bias)

    def _of_expert(self, pairs: Pairs, table: Tensor) -> Tensor:
        """``table[pairs.expert]``, of a table for all experts."""
        if self.needs_grad and pairs.offsets is not None and table.dim() == 2 and has_kernel_of_ours(table):
            return of_expert(table, pairs.expert, pairs.offsets)
        return self._harmless_rows(pairs, _gather(table, (pairs.expert,)))

    def _harmless_rows(self, pairs: Pairs, rows: Tensor) -> Tensor:
        """Where no pair at all counts, the expert is one that eager does not touch: what it has may be NaN."""
        has_gradient = rows.is_floating_point() or rows.is_complex()
        return pairs.harmless_rows(rows) if self.needs_grad and has_gradient else rows

    def _per_row(self, step: Step, pairs: Pairs, product: Product) -> Any:
        if step.result in self._instead:
            return self._instead[step.result]()
        if step.op is Primitive.COORDINATE:
            return pairs.coordinate(step.args[0])
        if step.op is Primitive.ROW_COUNT:
            return pairs.expert.shape[0]
        args, kwargs = self._arguments(step)
        if step.op is Primitive.MATMUL:
            return self._multiply(pairs, product, *args)
        gather = gather_of(self.loop, step, pairs) if self.needs_grad else None
        if gather is not None and step.result.example.is_floating_point():
            # As many rows as pairs, whose gradients are added. The gradient of an index adds them by atomics.
            every = pairs.from_token_order(gather.rows(self._values[gather.table]))
            return pairs.harmless_rows(self.lend(pairs, every))
        if step.op in _INDEXING and step.args[0].kind is not Kind.PER_ROW:
            args = pytree.tree_map_only(Tensor, partial(self._harmless, pairs), args[1:])
            rows = _run(step.op, (self._values[step.args[0]], *args), {})
            return self._harmless_rows(pairs, rows)
        if step.op is Primitive.INDEX_EXPERT:
            value, indices = args
            gathered = _gather(value, (pairs.expert, *(self._harmless(pairs, index) for index in indices)))
            return self._harmless_rows(pairs, gathered)
        if step.op is Primitive.GATHER_EXPERT:
            value, rank = args
            gathered = self._of_expert(pairs, value)
            own = gathered.shape[1:] if gathered.dim() <= rank else gathered.shape[2:]
            return gathered.reshape(-1, *[1] * (rank - 1 - len(own)), *own) if gathered.dim() != rank else gathered
        result = _run(step.op, args, kwargs)
        # A 0-dim value of the expert does not take part in type promotion, one for each pair does.
        return _as_example(result, step.result.example)


def _run(op: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator. What is looked up has the strides of its index, of which fake tensors know nothing (torch 2.13):
    they would take a view of it that cannot be had.
    """
    if op is torch.ops.aten.index.Tensor:
        table, index = args
        args = table, [None if one is None else one.contiguous() for one in index]
    return op(*args, **kwargs)


def _may_be_an_index(step: Step) -> bool:
    example = step.result.example
    is_row = step.result.kind is Kind.PER_ROW and step.op is not Primitive.COORDINATE
    return is_row and isinstance(example, Tensor) and not example.is_floating_point()


def _are_in_range(loop: ExpertsLoop) -> bool:
    """Whether what the row's own coordinates look up is there for every pair, also for those of no expert.

    Eager looks up what it has rows for: a table may have no entry for a token whose ids are all of no expert.
    """
    dispatch = loop.dispatch
    if not isinstance(dispatch, TopKDispatch):
        return True
    axes = {step.result: step.args[0] for step in loop.steps if step.op is Primitive.COORDINATE}
    for sizes, indices in _lookups(loop):
        for size, index in zip(sizes, indices, strict=False):
            if isinstance(index, Value) and index in axes:
                axis = axes[index]
                if not statically_known_true(size >= (1 if axis is None else dispatch.shape[axis])):
                    return False
    return True


def _lookups(loop: ExpertsLoop) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """What is indexed: the sizes of the dimensions, and the index of each."""
    for step in loop.steps:
        if step.op is Primitive.INDEX_EXPERT or step.op is torch.ops.aten.index.Tensor:
            yield step.args[0].example.shape, step.args[1]
        elif step.op is torch.ops.aten.index_select.default:
            yield [step.args[0].example.shape[step.args[1]]], [step.args[2]]
        elif step.op is torch.ops.aten.embedding.default:
            yield step.args[0].example.shape, [step.args[1]]
    for one in loop.combines:
        yield one.accumulator.example.shape, one.index


def _gather(table: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """``table[index]``, with a gradient that is added as `precision.py` says.

    Eager adds the rows of an expert by a sum, which does so. The gradient of an index adds them one by one in the dtype
    of the table: a bias of many rows in bf16 would lose most of them.
    """
    wide = accumulated_in(table.dtype)
    return table[index] if wide is table.dtype else table.to(wide)[index].to(table.dtype)


def _as_example(result: Any, example: Any) -> Any:
    """``result`` in the dtype that it has for one expert."""
    wanted = getattr(example, "dtype", None)
    return result.to(wanted) if isinstance(result, Tensor) and result.dtype is not wanted else result
