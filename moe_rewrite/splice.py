"""Puts the replacement of a loop where the loop stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_rewrite.errors import NotLiftedError
from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower.integers import keep_products
from moe_rewrite.recognise.aten import autocast_of, trace
from moe_rewrite.recognise.erase import erase_unused
from moe_rewrite.recognise.regions import Region

MAX_CONSTANT = 4096
"""Of so many numbers a tensor constant may be: they become a part of the generated code."""


def trace_replacement(loop: ExpertsLoop, run: Callable[..., list[torch.Tensor]]) -> fx.GraphModule:
    """The graph of ``run(*inputs)``, which adds to the loop's accumulators in place."""
    with torch.amp.autocast(_device_type(loop), enabled=False):
        replacement = trace(run, loop.inputs)
    replacement.graph.eliminate_dead_code()
    keep_products(replacement.graph)
    return replacement


def replace_loop(
    graph: fx.Graph, region: Region, loop: ExpertsLoop, experts_backend: str, replacement: fx.GraphModule
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Put ``replacement`` before the end of ``region``.

    Returns the nodes that were put in, and those among them that hold what the replacement returns. Each carries
    ``meta["moe_rewrite"]``: the loop's path and the experts backend.
    """
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
                env[node] = _written_out(graph, getattr(replacement, str(node.target)))
                env[node].meta = {**meta, "example_value": node.meta.get("val")}
                continue
            copy = graph.node_copy(node, lambda n: env[n])
            copy.meta = {**meta, "example_value": node.meta.get("val"), "original_aten": node.target}
            env[node] = copy
        if entered is not None:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    outputs = [env[node] for node in replacement.graph.output_node().args[0]]  # type: ignore[union-attr]
    return [copy for node, copy in env.items() if node.op not in ("placeholder", "output")], outputs


def _written_out(graph: fx.Graph, constant: torch.Tensor) -> fx.Node:
    """A tensor constant as a call with its numbers: AOTAutograd takes no attributes that Dynamo knows nothing of."""
    if constant.numel() > MAX_CONSTANT:
        raise NotLiftedError(f"it holds a constant of {constant.numel()} numbers; {MAX_CONSTANT} may be written out")
    how = {"dtype": constant.dtype, "device": constant.device}
    return graph.call_function(torch.tensor, (constant.tolist(),), how)


def _device_type(loop: ExpertsLoop) -> str:
    name: str = loop.device.type
    return name


def _enter_autocast(loop: ExpertsLoop) -> tuple[Any, tuple[Any, ...]]:
    device_type = _device_type(loop)
    return torch.amp.autocast_mode._enter_autocast, (device_type, torch.get_autocast_dtype(device_type), False, True)


def remove_region(graph: fx.Graph, region: Region) -> None:
    """Erase a captured body, and what led to nothing but it: masks, hits, assertions on how many hits there are.

    ``Graph.eliminate_dead_code`` would not do: in Dynamo's graph it also erases in-place operators whose result has no
    user.
    """
    assert region.end is not None
    waiting: list[fx.Node] = []
    for node in [region.end, *reversed(region.dependents()), region.begin]:
        waiting += node.all_input_nodes
        graph.erase_node(node)
    erase_unused(waiting)


def erase_empty_modes(graph: fx.Graph, grad_enabled: bool) -> None:
    """Erase what switches gradients or autocast, and back again with nothing between.

    Masks are often computed under ``no_grad``. What is left of that, once they are gone, torch.export cannot load.

    Args:
        graph: the graph.
        grad_enabled: whether gradients are on where it begins.
    """
    for node in list(graph.nodes):
        if node._erased or node.op != "call_function":
            continue
        if node.target is torch._C._set_grad_enabled:
            after = node.next
            if after.target is torch._C._set_grad_enabled and after.args[0] == grad_enabled:
                graph.erase_node(after)
                graph.erase_node(node)
            else:
                grad_enabled = bool(node.args[0])
        elif node.target is torch.amp.autocast_mode._exit_autocast and node.args[0] is node.prev:
            entered = node.prev
            graph.erase_node(node)
            graph.erase_node(entered)


def finish(gm: fx.GraphModule) -> None:
    """Check the rewritten graph and regenerate its code."""
    gm.graph.lint()
    gm.recompile()
