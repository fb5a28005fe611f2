"""How large the entries of an integer tensor can be, where the graph says so."""

from __future__ import annotations

import operator

import torch
from torch import fx

from moe_rewrite.recognise.aten import example_value

_INDICES_ALONG = {"topk": 2, "sort": 1, "argsort": 1, "argmax": 1, "argmin": 1, "max": 1, "min": 1}
"""Operations whose (second) result are positions along a dimension, with the place of their ``dim`` argument."""

_SAME_ENTRIES = frozenset(
    "view reshape flatten squeeze unsqueeze permute transpose contiguous clone detach long to int t expand".split()
)


def upper_bound(ids: fx.Node) -> int | None:
    """A number that all entries of ``ids`` are below, while none is below 0; None where the graph does not say."""
    node = ids
    while True:
        name = _name(node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            return None
        if node.target is operator.getitem:
            if node.args[1] != 1 or _name(source) not in ("topk", "sort", "max", "min"):
                return None
            return _length_along(source)
        if name in ("argsort", "argmax", "argmin"):
            return _length_along(node)
        if name not in _SAME_ENTRIES or _is_mutated(node):
            return None
        node = source


def _is_mutated(node: fx.Node) -> bool:
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value._version > 0


def _length_along(node: fx.Node) -> int | None:
    """The length of the dimension that ``node`` returns positions along."""
    source = node.args[0]
    value = example_value(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    place = _INDICES_ALONG[_name(node)]
    default = -1 if _name(node) in ("topk", "sort", "argsort") else None
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else default)
    if not isinstance(dim, int):
        return None
    length = value.shape[dim]
    return length if isinstance(length, int) else None


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "")
    return name.partition(".")[0] if isinstance(node.target, torch._ops.OpOverload) else name
