"""Puts the replacement of a loop where the loop stood."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.recognise.aten import autocast_of, example_value, trace
from moe_rewrite.recognise.regions import Region


def replace_loop(
    graph: fx.Graph, region: Region, loop: ExpertsLoop, experts_backend: str, run: Callable[..., None]
) -> None:
    """Replace ``region`` by the graph of ``run(*inputs)``, which adds to the loop's accumulators in place.

    Every node that is put in carries ``meta["moe_rewrite"]``: the loop's path and the experts backend.
    """
    with torch.amp.autocast(_device_type(loop), enabled=False):
        replacement = trace(run, [example_value(node) for node in loop.inputs])
    replacement.graph.eliminate_dead_code()
    with autocast_of(region.begin):
        autocast = torch.is_autocast_enabled(_device_type(loop))
    assert region.end is not None
    meta = {key: region.begin.meta[key] for key in ("nn_module_stack", "stack_trace") if key in region.begin.meta}
    meta["moe_rewrite"] = {"path": loop.path, "experts_backend": experts_backend}
    with graph.inserting_before(region.end):
        # The row program already holds the casts that autocast made in the loop: it must not cast again.
        entered = graph.call_function(*_enter_autocast(loop)) if autocast else None
        env: dict[fx.Node, Any] = dict(zip(replacement.graph.find_nodes(op="placeholder"), loop.inputs, strict=True))
        for node in replacement.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                _move_constant(graph, replacement, node)
            copy = graph.node_copy(node, lambda n: env[n])
            copy.meta = {**meta, "example_value": node.meta.get("val"), "original_aten": node.target}
            env[node] = copy
        if entered is not None:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))


def _move_constant(graph: fx.Graph, replacement: fx.GraphModule, node: fx.Node) -> None:
    """A tensor constant of the replacement becomes one of the graph's module."""
    owner = graph.owning_module
    assert owner is not None
    value = getattr(replacement, str(node.target))
    name, count = f"_moe_rewrite_constant_{node.target}", 0
    while hasattr(owner, name):
        name, count = f"_moe_rewrite_constant_{node.target}_{count}", count + 1
    owner.register_buffer(name, value, persistent=False)
    node.target = name


def _device_type(loop: ExpertsLoop) -> str:
    device_type: str = loop.accumulator(loop.combines[0]).device.type
    return device_type


def _enter_autocast(loop: ExpertsLoop) -> tuple[Any, tuple[Any, ...]]:
    device_type = _device_type(loop)
    return torch.amp.autocast_mode._enter_autocast, (device_type, torch.get_autocast_dtype(device_type), False, True)


def remove_region(graph: fx.Graph, region: Region) -> None:
    """Erase a captured body: its markers and all that depends on them."""
    assert region.end is not None
    for node in [region.end, *reversed(region.dependents()), region.begin]:
        if node.graph is graph and not node._erased:
            graph.erase_node(node)


def clean(gm: fx.GraphModule) -> None:
    """Drop what the rewritten loops left behind: dead code, and assertions on sizes that are no more."""
    graph = gm.graph
    for node in reversed(graph.nodes):
        if _is_assertion(node) and _only_for_assertions(node):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()


def _is_assertion(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range_for_size.default)


def _only_for_assertions(node: fx.Node) -> bool:
    """Whether an assertion is about the length of a ``nonzero`` that nothing uses but such assertions."""
    for source in _ancestry(node):
        if _is_nonzero(source) and not all(_leads_to_assertions(user) for user in source.users):
            return False
    return any(_is_nonzero(source) for source in _ancestry(node))


def _ancestry(node: fx.Node) -> list[fx.Node]:
    """The sizes an assertion is computed from, and the tensors that have them."""
    found: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source in found:
            continue
        found[source] = None
        if not isinstance(example_value(source), torch.Tensor) or source.target is operator.getitem:
            waiting += source.all_input_nodes
    return list(found)


def _is_nonzero(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name) in ("nonzero", "where", "argwhere", "nonzero.default")


def _leads_to_assertions(node: fx.Node) -> bool:
    return _is_assertion(node) or (len(node.users) > 0 and all(map(_leads_to_assertions, node.users))) or _is_dead(node)


def _is_dead(node: fx.Node) -> bool:
    return not node.is_impure() and all(map(_is_dead, node.users))


