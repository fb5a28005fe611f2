"""What a loop iterates: the positions that are set in a mask over the experts."""

from __future__ import annotations

import torch
from torch import fx

from moe_rewrite.memory import is_written_to
from moe_rewrite.nodes import example_value, first_input, operation

_KEEPS_ROWS = {"squeeze", "flatten", "view", "reshape", "ravel", "contiguous", "clone", "detach", "long", "cpu", "to"}


def hit_mask(hits: fx.Node) -> fx.Node | None:
    """The 1-D mask ``[E]`` whose set positions are the rows of ``hits``, each once and in order; None if not proved.

    Args:
        hits: a node of Dynamo's graph with one integer per row, ``[u]`` or ``[u, 1]``.
    """
    node = hits
    while True:
        value, name, source = example_value(node), operation(node), first_input(node)
        if source is None or not isinstance(value, torch.Tensor) or not _is_one_integer_per_row(value):
            return None
        if is_written_to(node) or is_written_to(source):
            return None
        if name in ("nonzero", "argwhere"):
            plain = len(node.args) == 1 and node.kwargs in ({}, {"as_tuple": False})
            return source if plain and _is_mask_of_known_length(source) else None
        if name in _KEEPS_ROWS or (name == "getitem" and _keeps_rows(node.args[1])):
            node = source
        elif name == "getitem" and node.args[1] == 0 and _gives_a_tuple_of_positions(source):
            mask = first_input(source)
            known = mask is not None and _is_mask_of_known_length(mask) and not is_written_to(mask)
            return mask if known else None
        else:
            return None


def length_of_range(hits: fx.Node) -> int | None:
    """``E`` where ``hits`` is ``torch.arange(E)``: each expert is visited, whether it has rows or not."""
    value, given = example_value(hits), hits.args
    if operation(hits) != "arange" or not isinstance(value, torch.Tensor) or is_written_to(hits):
        return None
    if value.dtype not in (torch.int64, torch.int32) or not set(hits.kwargs) <= {"dtype", "device"}:
        return None
    start, stop, step = (0, *given, 1) if len(given) == 1 else (*given, 1) if len(given) == 2 else given
    return stop if start == 0 and step == 1 and isinstance(stop, int) and not isinstance(stop, bool) else None


def _gives_a_tuple_of_positions(node: fx.Node) -> bool:
    """``torch.where(mask)`` or ``mask.nonzero(as_tuple=True)``."""
    if len(node.args) != 1:
        return False
    name = operation(node)
    return (name == "where" and not node.kwargs) or (name == "nonzero" and node.kwargs == {"as_tuple": True})


def _is_one_integer_per_row(value: torch.Tensor) -> bool:
    column = value.dim() == 1 or (value.dim() == 2 and isinstance(value.shape[1], int) and value.shape[1] == 1)
    return column and value.dtype in (torch.int64, torch.int32)


def _is_mask_of_known_length(node: fx.Node) -> bool:
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.dim() == 1 and isinstance(value.shape[0], int)


def _keeps_rows(key: object) -> bool:
    """All rows, or the first column of them."""
    return key in (slice(None), (slice(None),), (slice(None), 0))
