"""Brings selected rows to dimension 0, where the row program has them.

``x[None, token].reshape(-1, H)`` selects rows in dimension 1, behind one of size 1, and drops that one. It becomes
``x[token]``.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from moe_rewrite.nodes import example_value

aten = torch.ops.aten


def rows_first(gm: fx.GraphModule) -> None:
    """Rewrite a retraced body in place: selections behind leading dimensions of size 1 are made without them."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        _select_in_front(gm.graph, node)
    for target in (aten.view.default, aten._unsafe_view.default, aten.squeeze.dim, aten.select.int):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            _skip_leading_ones(node)
    for node in reversed(list(gm.graph.nodes)):
        if node.target is aten.unsqueeze.default and not node.users and node.meta.get(_OURS):
            gm.graph.erase_node(node)


_OURS = "moe_rewrite_rows_first"


def _select_in_front(graph: fx.Graph, node: fx.Node) -> None:
    """``index(x [1, T, H], [None, token])`` as ``unsqueeze(index(squeeze(x), [token]), 0)``."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, fx.Node)
    leading = next((i for i, index in enumerate(indices) if index is not None), 0)
    value = example_value(source)
    if not leading or any(not (isinstance(size, int) and size == 1) for size in value.shape[:leading]):
        return
    with graph.inserting_before(node):
        new, example = source, value
        for _ in range(leading):
            new, example = graph.call_function(aten.select.int, (new, 0, 0)), example.select(0, 0)
            new.meta["val"] = example
        selected = node.meta["val"]
        for _ in range(leading):
            selected = selected.select(0, 0)
        new = graph.call_function(aten.index.Tensor, (new, indices[leading:]))
        new.meta["val"] = selected
        for _ in range(leading):
            selected = selected.unsqueeze(0)
            new = graph.call_function(aten.unsqueeze.default, (new, 0))
            new.meta.update({"val": selected, _OURS: True})
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _skip_leading_ones(node: fx.Node) -> None:
    """``view(unsqueeze(rows, 0), shape)`` as ``view(rows, shape)``; ``squeeze`` and ``select`` of it as ``rows``."""
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target is aten.unsqueeze.default and source.meta.get(_OURS):
        rows = source.args[0]
        assert isinstance(rows, fx.Node)
        if node.target in (aten.squeeze.dim, aten.select.int):
            if operator.index(node.args[1]) == 0:  # type: ignore[arg-type]
                node.replace_all_uses_with(rows)
                node.graph.erase_node(node)
            return
        node.replace_input_with(source, rows)
        source = rows
