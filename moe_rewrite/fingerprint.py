"""What two pieces of a graph have in common if tracing them gives the same: layers of one structure are traced once."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_rewrite.loop import ExpertsLoop, Value
from moe_rewrite.nodes import example_value

_PLAIN = (str, bytes, int, bool, float, complex, type(None), type(Ellipsis))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload)


class NoFingerprint(Exception):
    """Something cannot be compared by what it consists of."""


def of_arguments(value: Any, number: Callable[[Any], Hashable]) -> Hashable:
    """``value`` as something that compares equal for equal values of equal types.

    Args:
        value: arguments of nodes or fields of a loop, nested.
        number: what stands for a node or a :class:`Value`.

    Raises:
        NoFingerprint: there is something in it whose value is not known to be all there is to it.
    """
    if isinstance(value, (fx.Node, Value)):
        return number(value)
    if isinstance(value, (*_TORCH, enum.Enum)):
        return value
    if type(value) in _PLAIN:  # 1, True and 1.0 are equal and so are 0.0 and -0.0
        return type(value), repr(value)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(of_arguments(entry, number) for entry in value)
    if isinstance(value, dict):
        entries = tuple((key, of_arguments(entry, number)) for key, entry in value.items())
        return dict, entries
    if isinstance(value, slice):
        return slice, of_arguments((value.start, value.stop, value.step), number)
    if isinstance(value, range):
        return range, value.start, value.stop, value.step
    if dataclasses.is_dataclass(value):
        fields = (getattr(value, field.name) for field in dataclasses.fields(value))
        return type(value), tuple(of_arguments(field, number) for field in fields)
    if isinstance(value, Hashable) and callable(value) and getattr(value, "__qualname__", None):
        return value  # a function: the same one
    raise NoFingerprint(f"{type(value)}")


def of_nodes(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> Hashable:
    """What ``nodes`` compute of ``inputs``: their operators and arguments, and what is known of the inputs.

    Raises:
        NoFingerprint: a node is no call of a function or method, or has arguments that cannot be compared.
    """
    numbers = {node: number for number, node in enumerate((*inputs, *nodes))}
    calls = []
    for node in nodes:
        if node.op not in ("call_function", "call_method"):
            raise NoFingerprint(node.op)
        args = node.args[:1] if node.target is torch.ops.aten._assert_scalar.default else node.args  # not what it says
        calls.append((node.op, node.target, of_arguments((args, dict(node.kwargs)), numbers.__getitem__)))
    return tuple(calls), of_inputs(inputs), tuple(numbers[node] for node in results)


def of_loop(loop: ExpertsLoop) -> Hashable:
    """What a loop does with its inputs, and what is known of them; not where it stands.

    Raises:
        NoFingerprint: there is something in its steps that cannot be compared.
    """
    numbers = {step.result: number for number, step in enumerate(loop.steps)}
    unknown: dict[Any, int] = {}
    known = tuple(_of_example(example_value(node), unknown) for node in loop.inputs)
    results = tuple((step.result.kind, _of_example(step.result.example, unknown)) for step in loop.steps)
    nowhere = dataclasses.replace(loop, path="", location="", inputs=())
    return of_arguments(nowhere, numbers.__getitem__), known, results


def of_inputs(inputs: Sequence[fx.Node]) -> Hashable:
    """What is known of the values of ``inputs`` when compiling.

    Raises:
        NoFingerprint: a value is neither a plain tensor nor a number.
    """
    unknown: dict[Any, int] = {}
    return tuple(_of_example(example_value(node), unknown) for node in inputs)


def _of_example(value: Any, unknown: dict[Any, int]) -> Hashable:
    if isinstance(value, torch.Tensor):
        if not isinstance(value, torch._subclasses.FakeTensor) or value.layout is not torch.strided:
            raise NoFingerprint(f"{type(value)}")
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        kind = (value.dtype, value.device, value.dim(), value.is_conj(), value.is_neg())
        return kind, tuple(_of_size(size, unknown) for size in sizes)
    if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _of_size(value, unknown)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_of_example(entry, unknown) for entry in value)
    raise NoFingerprint(f"{type(value)}")


def _of_size(size: Any, unknown: dict[Any, int]) -> Hashable:
    """A number; a symbolic one by its expression, which means the same in all of one graph.

    How many experts are hit has a symbol of its own in each layer: what is known only at run time is told by its bounds
    and by where the same one comes again.
    """
    node = getattr(size, "node", None)
    if node is None:
        return type(size), repr(size)
    if node.expr.is_Symbol and free_unbacked_symbols(size):
        bounds = node.shape_env.var_to_range[node.expr]
        return type(size), unknown.setdefault(node.expr, len(unknown)), bounds.lower, bounds.upper
    return type(size), node.expr


def of_autocast() -> Hashable:
    """The state of autocast."""
    devices = ("cpu", "cuda")
    state = tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices)
    return state, torch.is_autocast_cache_enabled()
