"""Questions about a node of Dynamo's graph, where one operation has many spellings."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_AUGMENTED = {
    f"i{op}" for op in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
_OF_A_PARAMETER = re.compile(r"^l_.*_(?:parameters|buffers)_(?P<name>.+?)_?$")


def example_value(node: fx.Node) -> Any:
    """The fake value of a node: Dynamo's ``example_value``, or ``val`` in a graph that ``make_fx`` made."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def operation(node: fx.Node) -> str:
    """The plain name of the torch operation of a node: ``topk`` for ``torch.topk``, ``x.topk`` and ``aten.topk``.

    ``""`` for anything that is no operation of torch's, whatever it is called.
    """
    if node.op == "call_method":  # `x == y` is `x.__eq__(y)` in the graphs of some versions
        return str(node.target).removeprefix("__").removesuffix("__")
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__) if node.target.namespace == "aten" else ""
    module = getattr(node.target, "__module__", None) or ""
    known = module.partition(".")[0] in ("torch", "_operator", "operator")
    return getattr(node.target, "__name__", "") if known else ""


def first_input(node: fx.Node) -> fx.Node | None:
    """The node that is the first argument; None where that is something else."""
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def has_unknown_size(node: fx.Node) -> bool:
    """Whether a node has, or is, a size that is known only at run time. Nodes that a rewrite put in do not count."""
    if "moe_rewrite" in node.meta:
        return False
    value = example_value(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(map(is_unknown, (s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else [v]))))


def is_unknown(size: Any) -> bool:
    """Whether a size is known only at run time, whatever was supposed of it since it was made.

    Where it stands beside a known one, torch supposes that the two are equal, for it might be 1 as well, and then eager
    broadcasts it. ``_expr`` is what it was made as. torch 2.11, 2.13, 2.14.
    """
    if not isinstance(size, (torch.SymInt, torch.SymBool)):
        return False
    shape_env = size.node.shape_env
    return any(map(shape_env.is_unbacked_symint, size.node._expr.free_symbols))


def is_supposed(size: Any) -> bool:
    """Whether a size that only run time knows is taken for another one."""
    return is_unknown(size) and bool(size.node._expr != size.node.expr)


def changes_something(node: fx.Node) -> bool:
    """Whether a node may do more than give a value. Dynamo's graph has in-place operators among its nodes."""
    if node.is_impure() or "out" in node.kwargs or "inplace" in node.kwargs or node.op == "call_module":
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _AUGMENTED or node.target is operator.setitem or any(arg is True for arg in node.args)


def is_size_assertion(node: fx.Node) -> bool:
    """Whether all that comes of a node are assertions, by way of sizes and comparisons of sizes."""
    if node.target is torch.ops.aten._assert_scalar.default:
        return True
    is_number = not isinstance(example_value(node), torch.Tensor) or node.target is operator.getitem
    return is_number and bool(node.users) and all(map(is_size_assertion, node.users))


def short_name(node: fx.Node) -> str:
    """The name of a node; for a parameter without the long path that Dynamo puts before it."""
    match = _OF_A_PARAMETER.match(node.name) if node.op == "placeholder" else None
    return match["name"] if match else node.name


def standalone_code(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> str:
    """``nodes`` as the code of a function of those of ``inputs`` that they use. Assertions on sizes are left out."""
    shown = [node for node in nodes if not is_size_assertion(node)]
    used = {source for node in shown for source in node.all_input_nodes}
    graph = fx.Graph()
    env = {node: graph.placeholder(short_name(node)) for node in inputs if node in used}
    for node in shown:
        env[node] = graph.node_copy(node, lambda n: env[n])
    code: str = graph.python_code("self").src
    return re.sub(r";  (\w+ = )+None", "", code).strip() + "\n"
