"""What the tests look at: the graphs before and after the pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

import moe_rewrite.backend


class Graphs(list[fx.GraphModule]):
    """An inner compiler that keeps the graphs it is given.

    Args:
        inner: name of the compiler backend that compiles them.
    """

    def __init__(self, inner: str = "eager") -> None:
        super().__init__()
        self._compile = lookup_backend(inner)

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.append(gm)
        return self._compile(gm, example_inputs)

    def rewritten(self) -> set[tuple[str, str]]:
        """Path and experts backend of each loop that was rewritten in them, by the provenance of their nodes."""
        marks = [node.meta.get("moe_rewrite") for gm in self for node in gm.graph.nodes]
        return {(mark["path"], mark["experts_backend"]) for mark in marks if mark is not None}


class _Captured(Exception):
    pass


def capture(module: nn.Module, *args: Any) -> fx.GraphModule:
    """The graph of ``module(*args)`` as the pass gets it: with its loops captured, not rewritten."""
    captured: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, *_: Any) -> NoReturn:
        captured.append(copy_of(gm))
        raise _Captured

    with mock.patch.object(moe_rewrite.backend, "make_plans", keep), pytest.raises(Exception, match="_Captured"):
        torch.compile(module, backend="moe_rewrite", fullgraph=True)(*args)
    return captured[0]


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own. The nodes share their fake values with the original."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def targets(gm: fx.GraphModule) -> list[str]:
    """The names of what the graph calls, in order: ``"topk"``, ``"aten.bmm.default"``."""
    return [_target(node) for node in gm.graph.nodes if node.op.startswith("call_")]


def _target(node: fx.Node) -> str:
    is_named = isinstance(node.target, str | torch._ops.OpOverload)
    return str(node.target) if is_named else getattr(node.target, "__name__", str(node.target))


def readable(gm: fx.GraphModule) -> str:
    """The graph, one call a line: ``name = operator(arguments)``."""
    lines = []
    for node in gm.graph.nodes:
        arguments = [*map(repr, node.args), *(f"{key}={value!r}" for key, value in node.kwargs.items())]
        if node.op == "output":
            lines.append(f"return {', '.join(map(repr, node.args[0]))}")
        elif node.op != "placeholder":
            lines.append(f"{node.name} = {_target(node)}({', '.join(arguments)})")
    return "\n".join(lines)


def unbacked(gm: fx.GraphModule) -> list[str]:
    """The nodes that have, or are, a size that is known only at run time."""
    found = []
    for node in gm.graph.nodes:
        values = pytree.tree_leaves(node.meta.get("example_value"))
        sizes = [size for value in values for size in (value.shape if isinstance(value, torch.Tensor) else [value])]
        if any(isinstance(size, torch.SymInt | torch.SymBool) and free_unbacked_symbols(size) for size in sizes):
            found.append(node.name)
    return found
