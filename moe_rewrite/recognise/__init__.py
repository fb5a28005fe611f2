"""Finds captured loops in a graph and proves what they mean.

``find_loops`` answers for each captured body with an :class:`ExpertsLoop`, with a :class:`Refusal`, or with
:class:`NoEffect` where the body does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import fx

from moe_rewrite.loop import ExpertsLoop, Kind, Primitive, Refusal, Step, TopKDispatch, Value
from moe_rewrite.nodes import example_value, is_written_to, operation, shares_memory
from moe_rewrite.recognise import provenance
from moe_rewrite.recognise.aten import retrace
from moe_rewrite.recognise.bounds import upper_bound
from moe_rewrite.recognise.hits import hit_mask
from moe_rewrite.recognise.membership import Form
from moe_rewrite.recognise.regions import Region, find_regions
from moe_rewrite.recognise.rows import Refused, RowProgram

__all__ = ["Finding", "NoEffect", "find_loops"]


@dataclasses.dataclass(frozen=True)
class NoEffect:
    """The body does nothing: ``if expert == num_experts: continue``."""

    path: str
    location: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """A captured body and what became of it."""

    region: Region
    outcome: ExpertsLoop | Refusal | NoEffect


def find_loops(gm: fx.GraphModule) -> list[Finding]:
    """What the captured loop bodies of ``gm`` mean, in order."""
    findings = [Finding(region, _understand(region)) for region in find_regions(gm.graph)]
    return [_apart_from_other_paths(finding, findings) for finding in findings]


def _apart_from_other_paths(finding: Finding, findings: list[Finding]) -> Finding:
    """Refuse a path that reads what another path of the same loop adds to: in eager they take turns."""
    loop = finding.outcome
    if not isinstance(loop, ExpertsLoop):
        return finding
    mine = {loop.inputs[combine.accumulator] for combine in loop.combines}
    read = [node for node in loop.inputs if node not in mine]
    for other in findings:
        if (
            other is finding
            or other.region.loop is not finding.region.loop
            or not isinstance(other.outcome, ExpertsLoop)
        ):
            continue
        theirs = {other.outcome.inputs[combine.accumulator] for combine in other.outcome.combines}
        if any(shares_memory(a, b) for a in theirs for b in read) or any(
            a is not b and shares_memory(a, b) for a in theirs for b in mine
        ):
            reason = "one way through the body reads what another one adds to"
            return Finding(finding.region, Refusal(loop.path, loop.location, reason))
    return finding


def _understand(region: Region) -> ExpertsLoop | Refusal | NoEffect:
    path, location = provenance.module_path(region.begin), provenance.user_location(region.begin)
    try:
        return _prove(region, path, location)
    except Refused as refused:
        where = refused.node
        return Refusal(path, location, refused.reason, "" if where is None else where.name)


def _prove(region: Region, path: str, location: str) -> ExpertsLoop | NoEffect:
    if region.end is None:
        raise Refused("the loop is left before it is exhausted, by `break`, `return` or an exception")
    inside = {region.begin, region.end, *region.body}
    for node in region.dependents():
        for user in node.users:
            if user not in inside:
                raise Refused("a value of the last iteration is used after the loop", node)
    mask = hit_mask(region.hits)
    if mask is None:
        raise Refused("what the loop iterates is not proved to be the positions set in a mask", region.hits)

    integers = _integer_slice([*region.inputs, mask])
    nodes = [*integers, region.begin, *region.body]
    computed = set(nodes)
    wanted = dict.fromkeys([region.hits, *(n for node in nodes for n in node.all_input_nodes), mask])
    inputs = [node for node in wanted if node not in computed]
    gm = _retraced(nodes, inputs, mask, region.begin)
    hits = gm.graph.output_node().args[0][0]  # type: ignore[index]
    program = RowProgram(gm.graph)
    if not program.combines:
        return NoEffect(path, location)
    return _loop(region, path, location, inputs, program, hits)  # type: ignore[arg-type]


def _retraced(nodes: list[fx.Node], inputs: list[fx.Node], mask: fx.Node, begin: fx.Node) -> fx.GraphModule:
    try:
        return retrace(nodes, inputs, [mask], begin)
    except Exception as error:
        raise Refused(f"the body cannot be traced to ATen operators: {type(error).__name__}: {error}") from error


def _loop(
    region: Region, path: str, location: str, inputs: list[fx.Node], program: RowProgram, hits: fx.Node
) -> ExpertsLoop:
    rows = program.rows_of
    if rows is None or rows.ids is None:
        raise Refused("the body does not select rows by the expert's index")
    if program.value(rows.ids).kind is not Kind.INVARIANT:
        raise Refused("the expert ids depend on the iteration", rows.ids)
    _check_aliases(inputs, {combine.accumulator for combine in program.combines})
    ids, visits = program.value(rows.ids), program.meanings.get(hits)
    visits_all = visits is not None and visits.form in (Form.COUNT, Form.ANY) and visits.ids is rows.ids
    if region.assumes_rows and not visits_all:
        raise Refused("the body asks whether the expert has rows, and the loop may visit experts without")
    steps = _live_steps(program, [ids, *([] if visits_all else [program.value(hits)])])
    experts, num_experts = _experts(region, steps)
    bound = next((upper_bound(inputs[s.args[0]]) for s in steps if s.op is Primitive.INPUT and s.result is ids), None)
    whole = experts == (range(num_experts),)
    dispatch = TopKDispatch(
        expert_ids=ids,
        visited=None if visits_all else program.value(hits),
        in_range=visits_all and whole and bound is not None and bound <= num_experts,
    )
    return ExpertsLoop(path, location, experts, num_experts, dispatch, steps, tuple(program.combines), tuple(inputs))


def _integer_slice(roots: Iterable[fx.Node]) -> list[fx.Node]:
    """The integer and boolean computation that leads to ``roots``, in graph order.

    It says how masks come from expert ids. It ends where integers come from floating-point numbers (``topk``), and at
    tensors that something changes in place: those hold different values at different times.
    """
    found: set[fx.Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node in found or node.op not in ("call_function", "call_method"):
            continue
        if not _is_unchanging_integer(node) or not (node.all_input_nodes or operation(node) == "arange"):
            continue
        if all(_is_unchanging_integer(source) for source in node.all_input_nodes):
            found.add(node)
            waiting += node.all_input_nodes
    graph = next(iter(found)).graph if found else None
    return [node for node in graph.nodes if node in found] if graph is not None else []


def _is_unchanging_integer(node: fx.Node) -> bool:
    value = example_value(node)
    if isinstance(value, (int, torch.SymInt)):
        return True
    if not isinstance(value, torch.Tensor):
        return False
    return not value.is_floating_point() and not value.is_complex() and not is_written_to(node)


def _check_aliases(inputs: list[fx.Node], accumulators: set[int]) -> None:
    """An accumulator that shares memory with something else that the body reads is read while it changes."""
    for position in accumulators:
        accumulator = inputs[position]
        if any(shares_memory(accumulator, other) for i, other in enumerate(inputs) if i != position):
            raise Refused("the accumulator shares its memory with something that the body reads", accumulator)
        if any(shares_memory(accumulator, given) for given in accumulator.graph.find_nodes(op="placeholder")):
            # Two inputs of a graph may overlap in one call and not in the next; no guard would tell.
            raise Refused(
                "the accumulator is an input of the graph, and may share memory with another one", accumulator
            )


def _live_steps(program: RowProgram, extra: list[Value]) -> tuple[Step, ...]:
    """The steps that the combines (and ``extra`` values) need, in order."""
    needed = {id(value) for combine in program.combines for value in (combine.index, combine.rows)}
    needed |= {id(value) for value in extra}
    accumulators = {combine.accumulator for combine in program.combines}
    live = []
    for step in reversed(program.steps):
        if id(step.result) in needed or (step.op is Primitive.INPUT and step.args[0] in accumulators):
            live.append(step)
            needed.update(id(value) for value in _values((step.args, step.kwargs)))
    if needed - {id(step.result) for step in live}:
        raise Refused("the mask that selects an expert's rows is used for more than that")
    return tuple(reversed(live))


def _values(item: object) -> list[Value]:
    if isinstance(item, Value):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    return [value for entry in item for value in _values(entry)] if isinstance(item, (tuple, list)) else []


def _experts(region: Region, steps: tuple[Step, ...]) -> tuple[tuple[range, ...], int]:
    """The experts of the path, less those past the end of what they select from: indexing by those raises in eager."""
    limit = None
    for step in steps:
        if step.op is Primitive.SELECT_EXPERT:
            size = step.args[0].example.shape[step.args[1]]
            if not isinstance(size, int):
                raise Refused(f"the number of experts in `{step.args[0]}` is not known when compiling")
            limit = size if limit is None else min(limit, size)
    clipped = [range(r.start, r.stop if limit is None else min(r.stop, limit)) for r in region.experts]
    experts = tuple(r for r in clipped if len(r))
    if not experts:
        raise Refused("the loop has no expert")
    return experts, max(r.stop for r in experts)
