"""Loops over some of the experts, whose tables hold those alone: ``for e in range(lo, hi): self.experts[e - lo]``.

An :class:`ExpertsLoop` has one value for each expert from 0. Where a table has no rows for the first ones, the experts
are numbered anew, from the first that the loop runs for.
"""

from __future__ import annotations

import dataclasses

import torch

from moe_rewrite.loop import ExpertsLoop, Kind, Primitive, Step, TopKDispatch, Value
from moe_rewrite.recognise.refused import Refused

aten = torch.ops.aten


def rebased(loop: ExpertsLoop) -> ExpertsLoop:
    """The same loop with its first expert as number 0, where a table begins later than with expert 0.

    Raises:
        Refused: a table begins later than with the first expert of the loop, or has to be written to.
    """
    first = loop.experts[0].start
    offsets = [step.args[2] for step in loop.steps if step.op is Primitive.SELECT_EXPERT and len(step.args) > 2]
    if all(offset >= 0 for offset in offsets):
        return loop
    if first + min(offsets) < 0:
        raise Refused("the expert's index, less a number, may be negative")
    if any(combine.expert_dim is not None for combine in loop.combines) or loop.collected:
        raise Refused("each of some experts leaves something, and their tables begin later")
    steps = [_renumbered(step, first) for step in loop.steps]
    dispatch, visited = loop.dispatch, loop.visited
    if isinstance(dispatch, TopKDispatch):
        ids = Value(f"{dispatch.expert_ids.name}_from_{first}", Kind.INVARIANT, dispatch.expert_ids.example)
        steps.append(Step(ids, aten.sub.Tensor, (dispatch.expert_ids, first)))
        dispatch = dataclasses.replace(dispatch, expert_ids=ids)
    if visited is not None:
        if visited.kind is not Kind.INVARIANT:
            raise Refused("which experts are visited depends on the expert")
        own = Value(f"{visited.name}_from_{first}", Kind.INVARIANT, visited.example[first:])
        steps.append(Step(own, aten.slice.Tensor, (visited, 0, first)))
        visited = own
    return dataclasses.replace(
        loop,
        experts=tuple(range(experts.start - first, experts.stop - first) for experts in loop.experts),
        num_experts=loop.num_experts - first,
        dispatch=dispatch,
        visited=visited,
        steps=_in_order(steps),
    )


def _renumbered(step: Step, first: int) -> Step:
    if step.op is Primitive.SELECT_EXPERT:
        source, dim, *offset = step.args
        return dataclasses.replace(step, args=(source, dim, sum(offset) + first))
    if step.op is Primitive.EXPERT_INDEX:
        return dataclasses.replace(step, args=(first,))
    return step


def _in_order(steps: list[Step]) -> tuple[Step, ...]:
    """The steps, those that do not depend on rows or experts first: what selects rows is needed before these."""
    return tuple(sorted(steps, key=lambda step: step.result.kind is not Kind.INVARIANT))
