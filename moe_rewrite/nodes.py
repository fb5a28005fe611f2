"""Questions about a node of Dynamo's graph, where one operation has many spellings."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

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


def is_written_to(node: fx.Node) -> bool:
    """Whether something in the graph writes into the tensor of a node, or into one that shares its memory.

    ``x.data`` has a count of writes of its own: where it is taken, the tensor is taken as written to.
    """
    value = example_value(node)
    if not isinstance(value, torch.Tensor):
        return False
    apart = node.graph.find_nodes(op="call_function", target=torch._C._autograd._get_data_attr)
    return times_written(node) > 0 or any(shares_memory(node, other) for other in apart)


def times_written(node: fx.Node) -> int:
    """How often something in the graph has written into the memory of a tensor until now.

    Dynamo runs in-place operators on the fake tensors of its graph, which count them, but for a few.
    """
    counted: int = example_value(node)._version
    return counted + sum(shares_memory(node, other) for other in _written_uncounted(node.graph))


def _written_uncounted(graph: fx.Graph) -> Iterator[fx.Node]:
    """What is written by operators whose writes fake tensors do not count. Seen in torch 2.11 and 2.13.

    Those on lists of tensors, those that a user has registered by a schema alone, running statistics, and kernels.
    """
    # What `Graph.find_nodes` looks into: to go through all nodes at each question takes long. torch 2.11 and 2.13.
    for (_, target), nodes in list(graph._find_nodes_lookup_table.table.items()):
        written = _uncounted(target)
        if written is not None:
            for node in nodes:
                yield from written(node)


@functools.cache
def _uncounted(target: Any) -> Callable[[fx.Node], Iterable[fx.Node]] | None:
    """What tells what a node with that target writes, if fake tensors do not count it."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return written_by if any(overload._schema.is_mutable for overload in _overloads(target)) else None
    if isinstance(target, torch._ops.HigherOrderOperator):
        is_kernel = target.name().startswith("triton_kernel")
        return (lambda node: _tensors(node.kwargs["kwargs"])) if is_kernel else None
    name = getattr(target, "__name__", "")
    if name.endswith("_") and name.startswith(("_foreach_", "_amp_foreach_")):
        return lambda node: _tensors(node.args)
    return (lambda node: _tensors(node.args[1:3])) if name.endswith(("batch_norm", "instance_norm")) else None


def written_by(node: fx.Node) -> list[fx.Node]:
    """What an operator of the dispatcher writes into, as its schema says; of several overloads, all that any writes."""
    found: dict[fx.Node, None] = {}
    for schema in (overload._schema for overload in _overloads(node.target)):
        for position, argument in enumerate(schema.arguments if schema.is_mutable else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                positional = node.args[position] if position < len(node.args) and not argument.kwarg_only else None
                found |= dict.fromkeys(_tensors(node.kwargs.get(argument.name, positional)))
    return list(found)


def _overloads(target: Any) -> list[torch._ops.OpOverload]:
    is_one = isinstance(target, torch._ops.OpOverload)
    return [target] if is_one else [getattr(target, name) for name in target.overloads()]


def _tensors(given: Any) -> Iterator[fx.Node]:
    return (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, fx.Node))


def shares_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether the tensors of two nodes lie in one storage."""
    values = example_value(a), example_value(b)
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    first, second = (_inside(value).untyped_storage()._cdata for value in values)
    return bool(first == second)


def may_share_memory(a: fx.Node, b: fx.Node) -> bool:
    """The same, or whether they do so in eager alone: see :func:`is_input_itself`."""
    return any(shares_memory(one, b) for one in same_in_eager(a))


def same_in_eager(node: fx.Node) -> list[fx.Node]:
    """A tensor, and what eager has in its memory and fake tensors have not."""
    found = [node]
    targets = (torch.nn.functional.dropout, torch.dropout, torch.ops.aten.dropout.default)
    idle = [n for target in targets for n in node.graph.find_nodes(op="call_function", target=target)]
    idle = [n for n in idle if is_input_itself(n)]
    for one in found:  # grows meanwhile
        for dropout in idle:
            for this, other in itertools.permutations((dropout, *dropout.all_input_nodes[:1])):
                if shares_memory(this, one) and other not in found:
                    found.append(other)
    return found


def is_input_itself(node: fx.Node) -> bool:
    """Whether a node is a dropout that drops nothing: eager returns its input, where a fake tensor is a copy.

    No other operator was seen to do so (torch 2.13).
    """
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    idle = given.get("p", 0.5) == 0 or not given.get("training", given.get("train", True))
    return operation(node) == "dropout" and idle


def _inside(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor of ``vmap`` or another transform is made of, which has the memory. torch 2.11, 2.13, 2.15."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def first_input(node: fx.Node) -> fx.Node | None:
    """The node that is the first argument; None where that is something else."""
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def has_unknown_size(node: fx.Node) -> bool:
    """Whether a node has, or is, a size that is known only at run time. Nodes that a rewrite put in do not count."""
    if "moe_rewrite" in node.meta:
        return False
    value = example_value(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    sizes = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else [v])]
    return any(isinstance(size, (torch.SymInt, torch.SymBool)) and free_unbacked_symbols(size) for size in sizes)


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


def erase_unused(nodes: list[fx.Node]) -> None:
    """Erase those of ``nodes`` that nothing uses but assertions on sizes, and what led to nothing but them."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node._erased or node.op in ("placeholder", "output") or not all(map(is_size_assertion, node.users)):
            continue
        if (node.users and not has_unknown_size(node)) or changes_something(node):
            continue
        for assertion in list(node.users):
            _erase_users_first(assertion)
        waiting += node.all_input_nodes
        node.graph.erase_node(node)


def _erase_users_first(node: fx.Node) -> None:
    for user in list(node.users):
        _erase_users_first(user)
    node.graph.erase_node(node)


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


def rows_of(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """The tensor of which ``nodes`` are the rows, each once and in order; None where they are something else.

    They may come from indexing, ``unbind``, or ``chunk`` and ``squeeze``.
    """
    found = [_row_of(node) for node in nodes]
    whole = found[0][0] if found and found[0] is not None else None
    if whole is None or any(entry != (whole, i) for i, entry in enumerate(found)):
        return None
    return whole if example_value(whole).shape[0] == len(nodes) else None


def _row_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``(tensor, i)`` where a node is ``tensor[i]``."""
    chunked = operation(node) == "squeeze" and (*node.args[1:], *node.kwargs.values()) == (0,)
    node = first_input(node) or node if chunked else node
    source = first_input(node)
    if operation(node) != "getitem" or source is None or type(node.args[1]) is not int:
        return None
    if isinstance(example_value(source), torch.Tensor):
        return None if chunked or is_written_to(source) else (source, node.args[1])
    whole = first_input(source)
    value = example_value(whole) if whole is not None else None
    if whole is None or not isinstance(value, torch.Tensor) or is_written_to(whole):
        return None
    given = (*source.args[1:], *source.kwargs.values())
    name, count = operation(source), len(example_value(source))
    apart = (name == "unbind" and given in ((), (0,)) and not chunked) or (
        name in ("chunk", "split") and given[1:] in ((), (0,)) and chunked and value.shape[0] == count
    )
    return (whole, node.args[1]) if apart else None
