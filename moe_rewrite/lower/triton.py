"""``triton``: grouped products by kernels of our own, which gather rows and compute what follows while they are at it.

Rows stay in token order. The kernels find the pairs of an expert through one list of numbers, read the token's row for
each pair and write the pair's row: nothing is permuted, and the sum over the slots of a token is a plain one.

Where no gradient is needed, elementwise steps between products are computed in the kernel of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from moe_rewrite.loop import ExpertsLoop, Step, TopKDispatch, Value
from moe_rewrite.lower import epilogue, grouped_mm
from moe_rewrite.lower.gathers import Gather, gather_of
from moe_rewrite.lower.launch import available
from moe_rewrite.lower.lift import Lifted
from moe_rewrite.lower.pairs import Pairs
from moe_rewrite.lower.rows_mm import ADD_VECTOR, DTYPES, rows_mm, sort_by_expert

Multiply = Callable[..., Tensor]

SHARED = 0.1
"""Pairs are computed one by one up to where so much of their weights is read more than once, in expectation."""


def lower(loop: ExpertsLoop, lifted: Lifted) -> None:
    """Lower ``loop`` to products by kernels; where they do not run, to what ``grouped_mm`` makes of it."""
    if not runs(loop):
        grouped_mm.lower(loop, lifted)
        return
    pairs = lifted.pairs()
    multiply: Multiply = partial(rows_mm, max_autotune=lifted.max_autotune, **_dispatch(loop, pairs))

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        vectors, program = ([], "") if bias is None else ([bias], ADD_VECTOR)
        return lifted.lend(pairs, multiply(rows, [weight], vectors, epilogue=program))

    gathers = {step.result: gather for step in loop.steps if (gather := gather_of(loop, step, pairs)) is not None}
    instead: dict[Value, Callable[[], Tensor]] = {}
    for step in loop.matmuls():
        if step.args[0] in gathers:
            instead[step.result] = partial(_gathered, lifted, multiply, pairs, step, gathers[step.args[0]])
    for stage in [] if lifted.needs_grad else epilogue.stages(loop):
        instead[stage.result] = partial(_staged, lifted, multiply, pairs, stage, gathers.get(stage.rows))
    lifted.run(pairs, product, with_bias=product, instead=instead)


def runs(loop: ExpertsLoop) -> bool:
    """Whether the kernels run on the loop's device, and take its products."""
    return available(loop.device) and all(_is_taken(step) for step in loop.matmuls())


def _is_taken(step: Step) -> bool:
    return all(operand.example.dtype in DTYPES and operand.example.dim() == 2 for operand in step.args[:2])


def _dispatch(loop: ExpertsLoop, pairs: Pairs) -> dict[str, Any]:
    """How the kernels find the pairs of an expert: by a sort, or for few pairs by the expert of each."""
    if pairs.offsets is not None:
        return {"offsets": pairs.offsets}
    number = loop.num_pairs
    if isinstance(number, int) and _expected_sharing(loop, number) <= SHARED:
        return {"experts": pairs.key}
    order, _, offsets = sort_by_expert(pairs.key, loop.num_experts)
    return {"order": order, "offsets": offsets}


def _expected_sharing(loop: ExpertsLoop, pairs: int) -> float:
    """Which part of the pairs finds the weights of its expert read by another pair, if routing is even."""
    dispatch = loop.dispatch
    assert isinstance(dispatch, TopKDispatch)
    different = dispatch.distinct if dispatch.distinct > 1 else loop.top_k  # a token does not choose an expert twice
    return (pairs - (different if isinstance(different, int) else 1)) / (2 * loop.num_experts)


def _rows(lifted: Lifted, rows: Value, gather: Gather | None) -> tuple[Tensor, tuple[int, int, int] | None]:
    if gather is None:
        return lifted.value(rows), None
    return lifted.value(gather.table), (gather.pairs, gather.own, gather.after)


def _gathered(lifted: Lifted, multiply: Multiply, pairs: Pairs, step: Step, source: Gather) -> Tensor:
    """A product whose rows are gathered while they are read."""
    rows, gather = _rows(lifted, step.args[0], source)
    weight, *bias = map(lifted.value, step.args[1:])
    result = multiply(rows, [weight], bias, gather=gather, epilogue=ADD_VECTOR if bias else "")
    return lifted.lend(pairs, result)


def _staged(lifted: Lifted, multiply: Multiply, pairs: Pairs, stage: epilogue.Stage, source: Gather | None) -> Tensor:
    """Products and what follows them, in one kernel."""
    rows, gather = _rows(lifted, stage.rows, source)
    interleaved = epilogue.interleaved(stage.products)
    weights = [_view(lifted, one) for one in ([interleaved] if interleaved else stage.products)]
    vectors = [_view(lifted, one) for one in stage.vectors]
    how = {"interleaved": interleaved is not None, "epilogue": stage.epilogue, "dtype": stage.result.example.dtype}
    result = multiply(rows, weights, vectors, gather=gather, **how)
    return lifted.lend(pairs, result)


def _view(lifted: Lifted, columns: epilogue.Columns) -> Tensor:
    whole: Tensor = lifted.value(columns.value)
    stop = columns.start + (columns.width - 1) * columns.step + 1
    return whole[..., columns.start : stop : columns.step]
