"""Finds captured loops in a graph and proves what they mean.

``find_loops`` answers for each captured body with an :class:`ExpertsLoop`, with a :class:`Refusal`, or with
:class:`NoEffect` where the body does nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import fx

from moe_rewrite import markers
from moe_rewrite.loop import (
    Combine,
    Condition,
    Error,
    EveryToken,
    ExpertsLoop,
    Kind,
    MaskDispatch,
    Place,
    Primitive,
    Refusal,
    Step,
    TopKDispatch,
    Value,
    Write,
    root_of,
)
from moe_rewrite.memory import MemoryRegion, is_written_to, may_share_memory, may_touch
from moe_rewrite.nodes import example_value, has_unknown_size, operation
from moe_rewrite.recognise import provenance, rules
from moe_rewrite.recognise.aten import Traces
from moe_rewrite.recognise.hits import hit_mask, length_of_range
from moe_rewrite.recognise.membership import EXPERT, Form
from moe_rewrite.recognise.origins import origin_of
from moe_rewrite.recognise.pieces import REASON
from moe_rewrite.recognise.rebase import rebased
from moe_rewrite.recognise.refused import Refused
from moe_rewrite.recognise.regions import Region, find_regions
from moe_rewrite.recognise.rows import RowProgram
from moe_rewrite.recognise.selection import Selection
from moe_rewrite.recognise.starts import is_zero_before, told_from_start

aten = torch.ops.aten

__all__ = ["Finding", "NoEffect", "find_loops"]


@dataclasses.dataclass(frozen=True)
class NoEffect:
    """The body does nothing: ``if expert == num_experts: continue``."""

    path: str
    location: str


Source: TypeAlias = int | fx.Node
"""Where a result of the loop comes from: the loop's outputs, by position, or a node that holds it already."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A captured body and what became of it.

    Attributes:
        region: the body.
        outcome: what became of it.
        results: for each of the region's results, in order, where it comes from once the loop is replaced.
    """

    region: Region
    outcome: ExpertsLoop | Refusal | NoEffect
    results: tuple[Source, ...] = ()


def find_loops(gm: fx.GraphModule) -> list[Finding]:
    """What the captured loop bodies of ``gm`` mean, in order."""
    regions = find_regions(gm.graph)
    traces = Traces()
    findings = [_understand(region, regions, traces) for region in regions]
    return [_apart_from_start(_apart_from_other_paths(finding, findings), findings) for finding in findings]


def _apart_from_start(finding: Finding, findings: list[Finding]) -> Finding:
    """Refuse a path whose carried value may be what the loop started from, where that can be seen."""
    loop = finding.outcome
    paths = [other for other in findings if other.region.loop is finding.region.loop]
    if not isinstance(loop, ExpertsLoop) or any(isinstance(other.outcome, Refusal) for other in paths):
        return finding
    for number, end in enumerate(finding.region.ends):
        if not isinstance(finding.results[finding.region.results.index(end)], int):
            continue
        changed = [_changed_inputs(other.outcome) for other in paths if isinstance(other.outcome, ExpertsLoop)]
        starts = [other.region.ends[number].args[1] for other in paths]
        in_place = any(start.args[1] in inputs for start in starts for inputs in changed)
        replaces = any(_always_replaces(other, number) for other in paths)
        reason = None
        if in_place or not replaces:
            reason = told_from_start(starts[0], paths[-1].region.ends[number], in_place)
        if not replaces and not rules.same_layout(example_value(starts[0].args[1]), example_value(end)):
            reason = "what the loop leaves behind may be what it started from, and is strided in another way"
        if reason is not None:
            return Finding(finding.region, Refusal(loop.path, loop.location, reason))
    return finding


def _always_replaces(path: Finding, number: int) -> bool:
    """Whether there is an iteration of the path in any case, and it makes a new tensor of a carried value."""
    region, loop = path.region, path.outcome
    if not isinstance(loop, ExpertsLoop) or region.rows != markers.ANY_ROWS or loop.conditions:
        return False
    if length_of_range(region.hits) is None and not _hits_some_expert(loop):
        return False
    return isinstance(path.results[region.results.index(region.ends[number])], int)


def _hits_some_expert(loop: ExpertsLoop) -> bool:
    """Whether there is a pair in any case, and every pair has an expert that the loop visits."""
    dispatch = loop.dispatch
    if not isinstance(dispatch, TopKDispatch) or not dispatch.in_range or dispatch.merged is not None:
        return False
    visits_all = loop.visited is None and loop.experts == (range(loop.num_experts),)
    return visits_all and all(rules.at_least(size, 1) for size in dispatch.shape)


def _apart_from_other_paths(finding: Finding, findings: list[Finding]) -> Finding:
    """Refuse a path that reads what another path of the same loop adds to: in eager they take turns."""
    loop = finding.outcome
    if not isinstance(loop, ExpertsLoop):
        return finding
    mine = _changed_inputs(loop)
    read = [node for node in loop.inputs if node not in mine]
    for other in findings:
        if (
            other is finding
            or other.region.loop is not finding.region.loop
            or not isinstance(other.outcome, ExpertsLoop)
        ):
            continue
        theirs = _changed_inputs(other.outcome)
        reason = ""
        if any(may_touch(a, b) for a in theirs for b in read) or any(
            a is not b and _both_written(a, b, finding.region) for a in theirs for b in mine
        ):
            reason = "one way through the body reads what another one adds to"
        elif not _write_apart(loop, other.outcome):
            reason = "one way through the body writes where another one does"
        elif loop.collected or other.outcome.collected:
            reason = "different ways through the body put values into one list"
        if reason:
            return Finding(finding.region, Refusal(loop.path, loop.location, reason))
    return finding


def _write_apart(loop: ExpertsLoop, other: ExpertsLoop) -> bool:
    """Whether two paths leave the same behind in whichever order they come: they only add, or write apart."""
    for mine, theirs in itertools.product(loop.combines, other.combines):
        if Write.SET not in (mine.write, theirs.write):
            continue
        if mine.carry is not None and theirs.carry is not None:
            return False
        if mine.carry is not None or theirs.carry is not None:
            continue  # what is carried is a tensor of its own
        if _changed_input(loop, mine) is not _changed_input(other, theirs):
            continue  # which share no memory
        ours, its = _region(loop, mine), _region(other, theirs)
        if not ours.is_apart(its) and not (ours.is_same(its) and _take_turns(loop, mine, other, theirs)):
            return False
    return True


def _region(loop: ExpertsLoop, combine: Combine) -> MemoryRegion:
    """Where an accumulator lies, counted from the input that it is or is a view of."""
    return MemoryRegion.of(combine.accumulator.example, within=loop.root(combine.accumulator).example)


def _take_turns(loop: ExpertsLoop, mine: Combine, other: ExpertsLoop, theirs: Combine) -> bool:
    """Whether two paths write rows to places of their own: each entry of the same ids has one, and one expert."""
    dispatches = loop.dispatch, other.dispatch
    if not all(isinstance(dispatch, TopKDispatch) and dispatch.merged is None for dispatch in dispatches):
        return False
    ids = [_expression(path, path.dispatch.expert_ids) for path in (loop, other)]  # type: ignore[union-attr]
    every_axis = Place(range(len(loop.dispatch.shape)))  # type: ignore[union-attr]
    apart = mine.place == theirs.place == every_axis
    return ids[0] == ids[1] and apart and not any(set(a) & set(b) for a in loop.experts for b in other.experts)


def _expression(loop: ExpertsLoop, value: object) -> object:
    """How a value is computed, down to the loop's inputs; equal for two values that are computed in the same way."""
    if isinstance(value, (tuple, list)):
        return tuple(_expression(loop, entry) for entry in value)
    if not isinstance(value, Value):
        return value
    step = next(step for step in loop.steps if step.result is value)
    if step.op is Primitive.INPUT:
        return loop.inputs[step.args[0]]
    named = tuple((name, _expression(loop, argument)) for name, argument in step.kwargs.items())
    return step.op, _expression(loop, step.args), named


def _changed_inputs(loop: ExpertsLoop) -> set[fx.Node]:
    """The inputs that a loop changes in place."""
    return {_changed_input(loop, combine) for combine in loop.combines if combine.carry is None}


def _changed_input(loop: ExpertsLoop, combine: Combine) -> fx.Node:
    """The input that a combine changes in place, itself or a view of it."""
    root = loop.root(combine.accumulator)
    return next(loop.inputs[step.args[0]] for step in loop.steps if step.result is root)


def _understand(region: Region, regions: list[Region], traces: Traces) -> Finding:
    path, location = provenance.module_path(region.begin), provenance.user_location(region.begin)
    try:
        return _prove(region, [other for other in regions if other.loop is region.loop], path, location, traces)
    except Refused as refused:
        where = refused.node
        return Finding(region, Refusal(path, location, refused.reason, "" if where is None else where.name))


def _prove(region: Region, paths: list[Region], path: str, location: str, traces: Traces) -> Finding:
    if region.end is None:
        raise Refused("the loop is left before it is exhausted, by `break`, `return` or an exception")
    for node in region.body:
        if node.target in (markers.piece, markers.collect_rows):
            raise Refused(node.meta.get(REASON, "a piece of a tensor is not understood"), node)
        if (
            node.target is markers.collect
            and is_written_to(node)
            and not rules.is_without_gaps(example_value(node.args[1]))
        ):
            raise Refused("what the body puts into a list is a part of something larger, and is written to", node)
    inside, results = {region.begin, region.end, *region.body}, region.results
    for node in region.dependents():
        for user in node.users:
            if user not in inside and node not in results:
                raise Refused("a value of the last iteration is used after the loop", node)
    is_static = length_of_range(region.hits) is not None
    mask = None if is_static else hit_mask(region.hits)
    if mask is None and not is_static:
        raise Refused("what the loop iterates is not proved to be the positions set in a mask", region.hits)

    masks = [] if mask is None else [mask]
    integers = _integer_slice([*region.inputs, *masks])
    nodes = [*integers, region.begin, *region.body]
    computed = set(nodes)
    wanted = dict.fromkeys([region.hits, *(n for node in nodes for n in node.all_input_nodes), *masks])
    inputs = [node for node in wanted if node not in computed]
    gm = _retraced(traces, nodes, inputs, masks, region.begin)
    hits = next(iter(gm.graph.output_node().args[0]), None)  # type: ignore[arg-type]
    program = RowProgram(gm.graph, inputs, _is_differentiated(region))
    sources = _sources(program, region, inputs)
    if not program.effects.combines and not program.effects.collected:
        return Finding(region, NoEffect(path, location), sources)
    if region.rows == markers.NO_ROWS:
        raise Refused("the body does something for experts without rows that it does not do for those with rows")
    loop = _loop(region, paths, path, location, inputs, program, hits)
    return Finding(region, loop, sources)


def _sources(program: RowProgram, region: Region, inputs: list[fx.Node]) -> tuple[Source, ...]:
    """Where each result of the region comes from. Outputs: the carried values that are replaced, then the collected."""
    effects = program.effects
    sources: list[Source] = []
    replaced = [number for number, carry in enumerate(effects.carries) if carry.replaced]
    starts = [node.args[1] for node in region.body if node.target is markers.carry_in]
    for kind, number in effects.results:
        if kind == "collect":
            sources.append(len(replaced) + number)
        else:
            sources.append(replaced.index(number) if number in replaced else starts[number])
    return tuple(sources)


def _retraced(
    traces: Traces, nodes: list[fx.Node], inputs: list[fx.Node], masks: list[fx.Node], begin: fx.Node
) -> fx.GraphModule:
    try:
        return traces.retrace(nodes, inputs, masks, begin)
    except Exception as error:
        raise Refused(f"the body cannot be traced to ATen operators: {type(error).__name__}: {error}") from error


def _loop(
    region: Region,
    paths: list[Region],
    path: str,
    location: str,
    inputs: list[fx.Node],
    program: RowProgram,
    hits: fx.Node | None,
) -> ExpertsLoop:
    effects, selection = program.effects, program.selection
    in_place = [MemoryRegion.of(c.accumulator.example) for c in effects.combines if c.carry is None]
    if not all(region.has_places_of_their_own() for region in in_place):
        raise Refused("entries of the accumulator may lie in the same memory")
    _check_aliases(inputs, _changed_positions(program), region)
    visits_all = _visits_every_expert_with_rows(program, hits)
    has_sibling = any(other.rows == markers.NO_ROWS for other in paths)
    if region.rows == markers.SOME_ROWS and not visits_all and not has_sibling:
        raise Refused("the body asks whether the expert has rows, and the loop may visit experts without")
    conditions = _conditions(program)
    visited = None if visits_all or hits is None else program.value(hits)
    replaced = [carry for carry in effects.carries if carry.replaced]
    rows_from = _rows_from(program, selection)
    experts, num_experts, missing = _experts(region, program.steps)
    errors = _errors(program, hits, missing, conditional=bool(conditions))
    extra = [
        *rows_from,
        *(error.truth for error in errors),
        *([] if visited is None else [visited]),
        *(condition.truth for condition in conditions),
        *(carry.start for carry in replaced),
        *(value for value, _ in effects.collected),
    ]
    steps = _live_steps(program, extra)
    whole = experts == (range(num_experts),)
    numbers = {number: k for k, number in enumerate(n for n, c in enumerate(effects.carries) if c.replaced)}
    loop = ExpertsLoop(
        path,
        location,
        experts,
        num_experts,
        _dispatch(program, num_experts, every_id=visited is None and whole and not conditions),
        steps,
        _with_starts(program, region, inputs, numbers),
        tuple(inputs),
        visited,
        conditions,
        tuple(carry.start for carry in replaced),
        tuple(value for value, _ in effects.collected),
        errors,
    )
    whole_results = [c for c in loop.combines if c.values.kind is not Kind.PER_ROW] or loop.collected
    every_one = hits is None and whole and not conditions and region.rows == markers.ANY_ROWS
    if whole_results and not every_one:
        raise Refused("something besides rows comes of each expert, and not every expert is visited in the same way")
    if any(count != num_experts for _, count in effects.collected):
        raise Refused("the list does not get one entry of each expert")
    return rebased(loop)


def _with_starts(
    program: RowProgram, region: Region, inputs: list[fx.Node], numbers: dict[int, int]
) -> tuple[Combine, ...]:
    """The combines with what is known of the accumulators before the loop.

    ``numbers``: those of the carried values that the loop replaces, by their numbers in the body.
    """
    steps = {step.result: step for step in program.steps}
    starts = [node.args[1] for node in region.body if node.target is markers.carry_in]
    found = []
    for combine in program.effects.combines:
        if combine.carry is not None:
            start = starts[combine.carry]
        else:
            start = inputs[steps[root_of(combine.accumulator, steps)].args[0]]
        assert isinstance(start, fx.Node)
        carry = None if combine.carry is None else numbers[combine.carry]
        found.append(dataclasses.replace(combine, carry=carry, from_zero=is_zero_before(start, region.loop)))
    return tuple(found)


def _changed_positions(program: RowProgram) -> set[int]:
    """The positions of the inputs that the body changes in place."""
    steps = {step.result: step for step in program.steps}
    changed = {root_of(c.accumulator, steps) for c in program.effects.combines if c.carry is None}
    return {steps[root].args[0] for root in changed}


def _visits_every_expert_with_rows(program: RowProgram, hits: fx.Node | None) -> bool:
    """Whether the loop visits all experts (``hits`` is None), or all that have rows."""
    if hits is None:
        return True
    meaning, selection = program.meanings.get(hits), program.selection
    if meaning is None or selection is None or meaning.form not in (Form.COUNT, Form.MEMBER):
        return False
    return meaning.labels == (EXPERT,) and selection.ids is not None and meaning.ids is selection.ids


def _conditions(program: RowProgram) -> tuple[Condition, ...]:
    """The conditions of the path, less those that hold for each expert with rows."""
    found = []
    for truth, taken in program.conditions:
        value, meaning = program.values[truth], program.meanings.get(truth)
        if not isinstance(value, Value) or value.kind is Kind.PER_ROW or not isinstance(value.example, torch.Tensor):
            raise Refused("the way through the body depends on values of rows", truth)
        if any(not isinstance(size, int) or size != 1 for size in value.example.shape):
            raise Refused("the truth of more than one value is asked", truth)
        rows = program.selection.ids if program.selection is not None else None
        of_rows = meaning is not None and rows is not None and meaning.ids is rows and set(meaning.labels) <= {None}
        has_rows = {Form.SELECTED: True, Form.SELECTED_COUNT: True, Form.MISSED: False}
        if of_rows and meaning is not None and has_rows.get(meaning.form) is taken and not _acts_without_rows(program):
            continue
        found.append(Condition(value, taken))
    return tuple(found)


def _acts_without_rows(program: RowProgram) -> bool:
    effects = program.effects
    return bool(effects.collected) or any(combine.values.kind is not Kind.PER_ROW for combine in effects.combines)


def _rows_from(program: RowProgram, selection: Selection | None) -> list[Value]:
    """The value that says which rows there are: the expert ids, or the mask of each expert."""
    if selection is None:
        return []
    return [program.value(selection.mask if selection.ids is None else selection.ids)]


def _dispatch(program: RowProgram, num_experts: int, every_id: bool) -> TopKDispatch | MaskDispatch | EveryToken:
    """How the rows of all experts are found. ``every_id``: whether an id from 0 to ``num_experts - 1`` is a pair."""
    selection = program.selection
    if selection is None:
        return EveryToken()
    if selection.ids is None:
        return MaskDispatch(program.value(selection.mask))
    ids = program.value(selection.ids)
    dtype = ids.example.dtype
    if dtype is torch.bool or torch.iinfo(dtype).max < num_experts:
        raise Refused(f"the expert ids are {dtype}, which cannot hold the number of each expert", selection.ids)
    origin = origin_of(selection.ids, program.inputs)
    return TopKDispatch(
        expert_ids=ids,
        in_range=every_id and origin.bound is not None and origin.bound <= num_experts,
        distinct=origin.distinct,
        merged=selection.merged,
    )


def _is_differentiated(region: Region) -> bool:
    """Whether gradients may be taken of what the body computes. A view of a parameter says nothing of that."""
    values = [value for value in map(example_value, region.body) if isinstance(value, torch.Tensor)]
    return any(value.requires_grad and not value._is_view() for value in values)


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
        if (
            _is_marker(node)
            or not _is_unchanging_integer(node)
            or not (node.all_input_nodes or operation(node) == "arange")
        ):
            continue
        if all(_is_unchanging_integer(source) for source in node.all_input_nodes):
            found.add(node)
            waiting += node.all_input_nodes
    graph = next(iter(found)).graph if found else None
    return [node for node in graph.nodes if node in found] if graph is not None else []


def _is_unchanging_integer(node: fx.Node) -> bool:
    value = example_value(node)
    if isinstance(value, (int, torch.SymInt)):
        return not has_unknown_size(node)
    if not isinstance(value, torch.Tensor) or has_unknown_size(node):
        return False
    return not value.is_floating_point() and not value.is_complex() and not is_written_to(node)


def _is_marker(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "moe_rewrite"


def _both_written(a: fx.Node, b: fx.Node, region: Region) -> bool:
    """Whether two accumulators may touch. Torch takes no gradient of views that were made before their base changed."""
    return may_share_memory(a, b) if _is_differentiated(region) else may_touch(a, b)


def _check_aliases(inputs: list[fx.Node], accumulators: set[int], region: Region) -> None:
    """An accumulator that shares memory with something else that the body reads is read while it changes."""
    for position in accumulators:
        accumulator = inputs[position]
        if any(may_touch(accumulator, other) for i, other in enumerate(inputs) if i != position):
            raise Refused("the accumulator shares its memory with something that the body reads", accumulator)
        if any(_both_written(accumulator, inputs[other], region) for other in accumulators if other != position):
            raise Refused("two accumulators that are changed are views of one tensor", accumulator)
        if any(may_share_memory(accumulator, given) for given in accumulator.graph.find_nodes(op="placeholder")):
            # Two inputs of a graph may overlap in one call and not in the next; no guard would tell.
            raise Refused(
                "the accumulator is an input of the graph, and may share memory with another one", accumulator
            )


def _live_steps(program: RowProgram, extra: list[Value]) -> tuple[Step, ...]:
    """The steps that the combines (and ``extra`` values) need, in order."""
    combines = program.effects.combines
    needed = {value for c in combines for value in (c.accumulator, *c.index, c.values)} | set(extra)
    live = []
    for step in reversed(program.steps):
        if step.result in needed:
            live.append(step)
            needed.update(_values((step.args, step.kwargs)))
    return tuple(reversed(live))


def _values(item: object) -> list[Value]:
    if isinstance(item, Value):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    return [value for entry in item for value in _values(entry)] if isinstance(item, (tuple, list)) else []


def _experts(region: Region, steps: list[Step]) -> tuple[tuple[range, ...], int, tuple[range, ...]]:
    """The experts of the path, one more than the largest, and those past the end of what the body selects from.

    Indexing by those raises in eager, whatever becomes of what is selected.
    """
    limit = None
    for step in steps:
        if step.op is Primitive.SELECT_EXPERT:
            size, offset = step.args[0].example.shape[step.args[1]], sum(step.args[2:])
            if rules.at_least(size, max(r.stop for r in region.experts) + offset):
                continue
            if not isinstance(size, int):
                raise Refused(f"the number of experts in `{step.args[0]}` is not known when compiling")
            limit = size - offset if limit is None else min(limit, size - offset)
    if limit is None:
        return region.experts, max(r.stop for r in region.experts), ()
    experts = tuple(range(r.start, min(r.stop, limit)) for r in region.experts if r.start < min(r.stop, limit))
    missing = tuple(range(max(r.start, limit), r.stop) for r in region.experts if max(r.start, limit) < r.stop)
    if missing and length_of_range(region.hits) is not None:
        raise Refused(f"the loop goes on after the last of {limit} experts")
    if not experts:
        raise Refused("the loop has no expert")
    return experts, max(r.stop for r in experts), missing


def _errors(
    program: RowProgram, hits: fx.Node | None, missing: tuple[range, ...], conditional: bool
) -> tuple[Error, ...]:
    """When the loop raises in eager: it visits one of the ``missing`` experts."""
    if not missing:
        return ()
    visited = None if hits is None else program.value(hits)
    if visited is None or visited.kind is not Kind.INVARIANT or conditional:
        raise Refused("the loop may go on after the last of the experts")
    found: list[Error] = []
    for experts in missing:
        example = visited.example[experts.start : experts.stop]
        own = program.extra_step(
            "missing", Kind.INVARIANT, example, aten.slice.Tensor, visited, 0, experts.start, experts.stop
        )
        truth = program.extra_step("any_missing", Kind.INVARIANT, example.any(), aten.any.default, own)
        found.append(Error(truth, f"an expert from {experts.start} on is hit, and there are no weights for it"))
    return tuple(found)
