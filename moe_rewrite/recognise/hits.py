"""What a loop iterates: the positions that are set in a mask over the experts."""

from __future__ import annotations

import operator

import torch
from torch import fx

_NONZERO = {"nonzero", "argwhere"}
_KEEPS_ROWS = {"squeeze", "flatten", "view", "reshape", "ravel", "contiguous", "clone", "detach", "long", "cpu", "to"}


def hit_mask(hits: fx.Node) -> fx.Node | None:
    """The 1-D mask ``[E]`` whose set positions are the rows of ``hits``, each once and in order; None if not proved.

    Args:
        hits: a node of Dynamo's graph with one integer per row, ``[u]`` or ``[u, 1]``.
    """
    node = hits
    while True:
        value = node.meta.get("example_value")
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return None
        if value.dim() > 2 or (value.dim() == 2 and not _is_one(value.shape[1])):
            return None
        name, source = _operation(node)
        if source is None:
            return None
        if name in _NONZERO and len(node.args) == 1 and not node.kwargs.get("as_tuple"):
            return source if _is_mask_of_known_length(source) else None
        if name in _KEEPS_ROWS or (name == "getitem" and _is_first_column(node.args[1])):
            node = source
        elif name == "getitem" and node.args[1] == 0 and _operation(source)[0] in {"where", "nonzero"}:
            inner = source.args[0]  # torch.where(mask)[0], mask.nonzero(as_tuple=True)[0]
            single = len(source.args) == 1
            return inner if single and isinstance(inner, fx.Node) and _is_mask_of_known_length(inner) else None
        else:
            return None


def _operation(node: fx.Node) -> tuple[str, fx.Node | None]:
    """The name of the tensor operation and its first argument."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return "", None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return ("getitem" if node.target is operator.getitem else name), node.args[0]


def _is_mask_of_known_length(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dim() == 1 and isinstance(value.shape[0], int)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _is_first_column(key: object) -> bool:
    return isinstance(key, tuple) and len(key) == 2 and key[0] == slice(None) and key[1] == 0
