"""How large the entries of an integer tensor can be, and which of them differ, where the graph says so."""

from __future__ import annotations

import torch
from torch import fx

from moe_rewrite.memory import is_written_to
from moe_rewrite.nodes import example_value, first_input, operation

_DIM_ARGUMENT = {"topk": (2, -1), "sort": (1, -1), "argsort": (1, -1), "argmax": (1, None), "max": (1, None)}
"""Operations that give positions along a dimension: the place of their ``dim`` argument, and its default."""

_SAME_ENTRIES = {
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand"),
    *("contiguous", "clone", "detach", "long"),
}


def upper_bound(ids: fx.Node) -> int | None:
    """A number that all entries of ``ids`` are below, while none is below 0; None where the graph does not say."""
    node = ids
    while (source := first_input(node)) is not None:
        if is_written_to(node):
            return None
        name = operation(node)
        if name == "getitem":
            positions = node.args[1] == 1 and operation(source) in ("topk", "sort", "max")
            return _length_along(source) if positions else None
        if name in ("argsort", "argmax"):
            return _length_along(node)
        if name not in _SAME_ENTRIES:
            return None
        node = source
    return None


_SAME_ORDER = {
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "clone", "detach", "long", "ravel")
}


def distinct_run(ids: fx.Node) -> int:
    """How many entries of ``ids``, one after the other when it is flattened, are known to differ. 1 if none are.

    The entries stand in runs of that length: ``k`` for the ids that a ``topk`` over the last dimension gives.
    """
    node = ids
    while (source := first_input(node)) is not None and not is_written_to(node):
        name = operation(node)
        is_positions = name == "getitem" and node.args[1] == 1 and operation(source) in ("topk", "sort")
        if is_positions or name == "argsort":
            positions = node if name == "argsort" else source
            value, place = example_value(node), _DIM_ARGUMENT[operation(positions)][0]
            dim = positions.kwargs.get("dim", positions.args[place] if len(positions.args) > place else -1)
            run = value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() > 0 else 1
            is_last = isinstance(dim, int) and dim in (-1, value.dim() - 1)
            return run if is_last and isinstance(run, int) else 1
        if name not in _SAME_ORDER:
            break
        node = source
    return 1


def _length_along(node: fx.Node) -> int | None:
    """The length of the dimension that ``node`` returns positions along."""
    source = first_input(node)
    value = example_value(source) if source is not None else None
    place, default = _DIM_ARGUMENT[operation(node)]
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else default)
    if not isinstance(value, torch.Tensor) or not isinstance(dim, int):
        return None
    length = value.shape[dim]
    return length if isinstance(length, int) else None
