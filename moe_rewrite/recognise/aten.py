"""Retraces pieces of Dynamo's graph to ATen operators.

The torch API has many spellings of one operation, ATen has few, and its schemas and tags say what an operator does.
So the pieces whose meaning has to be proved are judged on ATen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from moe_rewrite import fingerprint
from moe_rewrite.memory import is_input_itself
from moe_rewrite.nodes import changes_something, example_value, is_size_assertion, short_name

# Norms with a weight for each expert have no kernel over all pairs; in parts they are rowwise as they stand. So is what
# gives something for the backward besides its result.
_DECOMPOSED = [torch.ops.aten.native_layer_norm, torch.ops.aten.log_sigmoid_forward]


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return dict(get_decompositions(_DECOMPOSED))


# Functions that change how operators run: transforms of torch.func, hooks on saved tensors.
_STATEFUL = ("torch._C._functorch", "torch._functorch", "torch._C._autograd")


def trace(fn: Callable[..., Any], inputs: Sequence[fx.Node]) -> fx.GraphModule:
    """``fn`` of the values of ``inputs`` as a graph of ATen operators, in their fake mode and with their symbols.

    Its placeholders are named after ``inputs``.
    """
    values = [example_value(node) for node in inputs]
    fake_mode = detect_fake_mode(values)
    shape_env = fake_mode.shape_env if fake_mode is not None else None
    fresh = shape_env.ignore_fresh_unbacked_symbols() if shape_env is not None else contextlib.nullcontext()
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in values]
    with fresh, torch.no_grad(), fake_mode or contextlib.nullcontext():
        gm = make_fx(
            fn,
            decomposition_table=_decompositions(),
            tracing_mode="symbolic",
            _error_on_data_dependent_ops=False,
        )(*detached)
    for placeholder, node in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        placeholder._rename(short_name(node))
    return gm


class Traces:
    """Graphs that were retraced before, by what they were retraced from: layers of one structure share one.

    They are valid for one graph of Dynamo's: symbols mean the same in all of it.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, fx.GraphModule] = {}

    def retrace(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node], at: fx.Node
    ) -> fx.GraphModule:
        """As :func:`retrace`."""
        try:
            with autocast_of(at):
                key = (fingerprint.of_nodes(nodes, inputs, results), fingerprint.of_autocast())
        except fingerprint.NoFingerprint:
            return retrace(nodes, inputs, results, at)
        if key not in self._known:
            self._known[key] = retrace(nodes, inputs, results, at)
            return self._known[key]
        return _named_after(self._known[key], inputs)


def _named_after(gm: fx.GraphModule, inputs: Sequence[fx.Node]) -> fx.GraphModule:
    """A copy of a graph whose placeholders are named after ``inputs``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for placeholder, node in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        copies[placeholder] = graph.placeholder(short_name(node))
        copies[placeholder].meta = dict(placeholder.meta)
    graph.output(graph.graph_copy(gm.graph, copies))
    return fx.GraphModule(gm, graph)


def retrace(
    nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node], at: fx.Node
) -> fx.GraphModule:
    """The ATen graph of ``nodes``: a placeholder for each of ``inputs``, and ``results`` as its outputs.

    Casts that autocast makes at node ``at`` are operators of the graph. Values computed where ``nodes`` switch
    gradients off are detached, so that the retraced graph says so itself.

    Raises:
        NotImplementedError: ``nodes`` switch gradients on where they are off, or change something where they are off.
    """
    for node in nodes:
        if (getattr(node.target, "__module__", None) or "").startswith(_STATEFUL):
            raise NotImplementedError(f"`{node.target}` inside the body")
    switches = [node.args[0] for node in nodes if node.target is torch._C._set_grad_enabled]
    if switches and switches[0] and not switches[-1]:
        raise NotImplementedError("gradients are switched on inside, where they are off outside")

    def run(*values: Any) -> list[Any]:
        env: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
        detached = False
        for node in nodes:
            if node.target is torch._C._set_grad_enabled:
                detached = not node.args[0]
                continue
            if detached and changes_something(node) and not is_size_assertion(node):
                # What it changes keeps its history: as an operator of its own result it would lose it.
                raise NotImplementedError(
                    f"`{node.target}` changes something in place, where gradients are switched off"
                )
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])  # type: ignore[arg-type]
            result = args[0] if is_input_itself(node) and args else _run_node(node, args, kwargs)
            env[node] = _detach(result) if detached else result
        return [env[node] for node in results]

    with autocast_of(at):
        return trace(run, inputs)


def _run_node(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function" and callable(node.target):
        return node.target(*args, **kwargs)
    raise NotImplementedError(f"a {node.op} node ({node.target})")


def _detach(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_detach, value))
    has_gradient = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return torch.ops.aten.detach.default(value) if has_gradient else value


@contextlib.contextmanager
def autocast_of(node: fx.Node) -> Iterator[None]:
    """The autocast state that the graph has set up before ``node``."""
    open_contexts: dict[fx.Node, tuple[Any, ...]] = {}
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.target is torch.amp.autocast_mode._enter_autocast:
            open_contexts[earlier] = earlier.args
        elif earlier.target is torch.amp.autocast_mode._exit_autocast:
            open_contexts.pop(earlier.args[0])
    with contextlib.ExitStack() as stack:
        for device_type, dtype, enabled, cache_enabled in open_contexts.values():
            stack.enter_context(torch.amp.autocast(device_type, dtype, enabled, cache_enabled))
        yield
