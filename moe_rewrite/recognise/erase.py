"""Erases what a rewrite has made useless, but for what could have raised an error.

On a CPU an operator may look at the numbers that it is given, and raise. An assertion takes the place of its check. On
other devices it would stop the whole process, or wait for the device: docs/differences.md lists what is not checked.
"""

from __future__ import annotations

import torch
from torch import fx

from moe_rewrite.nodes import changes_something, example_value, has_unknown_size, is_size_assertion, operation
from moe_rewrite.recognise.bounds import upper_bound

aten = torch.ops.aten


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
        _keep_check(node)
        waiting += node.all_input_nodes
        node.graph.erase_node(node)


def _erase_users_first(node: fx.Node) -> None:
    for user in list(node.users):
        _erase_users_first(user)
    node.graph.erase_node(node)


def _keep_check(node: fx.Node) -> None:
    """Put an assertion before a node that raises for some numbers, unless they are known to be others.

    A ``bincount`` raises for negative numbers, a ``one_hot`` also for those past its classes.
    """
    name = operation(node)
    numbers = node.args[0] if name in ("one_hot", "bincount") and node.args else None
    example = example_value(numbers) if isinstance(numbers, fx.Node) else None
    if not isinstance(example, torch.Tensor) or example.device.type != "cpu":
        return
    classes = (*node.args[1:], *node.kwargs.values())[0] if name == "one_hot" else None
    bound = upper_bound(numbers)
    if bound is not None and (not isinstance(classes, int) or bound <= classes):
        return
    with node.graph.inserting_before(node):
        fine = _call(node, aten.ge.Scalar, numbers, 0)
        message = f"{name}: numbers must not be negative"
        if isinstance(classes, int):
            fine = _call(node, aten.logical_and.default, fine, _call(node, aten.lt.Scalar, numbers, classes))
            message = f"{name}: class values must be from 0 to {classes - 1}"
        _call(node, aten._assert_async.msg, _call(node, aten.all.default, fine), message)


def _call(node: fx.Node, op: torch._ops.OpOverload, *args: object) -> fx.Node:
    """A call on behalf of ``node``, which has the value that it computes."""
    made = node.graph.call_function(op, args)  # type: ignore[arg-type]
    made.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    examples = fx.map_arg(args, example_value)
    if op is not aten._assert_async.msg:
        made.meta["example_value"] = op(*examples)
    return made
