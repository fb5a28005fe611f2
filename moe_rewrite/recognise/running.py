"""Running sums over experts: which entry of one a number of the body is.

The rows of something sorted by expert stand between two entries of a running sum of how many rows each expert has. Such
an entry has many spellings: ``cumsum(sizes)[e]``, ``offsets[e + 1]``, ``start + sizes[e]`` where ``start`` is what the
iterations before have added up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from moe_rewrite import markers
from moe_rewrite.memory import is_written_to
from moe_rewrite.nodes import example_value, first_input, operation
from moe_rewrite.recognise.bounds import distinct_run, upper_bound
from moe_rewrite.recognise.rules import at_least, same_size

PASSES_INTEGERS = ("to", "long", "int", "cpu", "cuda", "detach", "contiguous", "clone", "item", "tolist", "type")
"""Operations that leave integers as they are."""

TOTAL = "moe_rewrite_total"
"""``node.meta`` key of sizes, or of their running sum, that are counts and known to add up to so many."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """For expert e, the sum of the first ``e + shift`` of ``sizes``; None for sizes that are not known yet."""

    sizes: fx.Node | None
    shift: int


@dataclasses.dataclass(frozen=True)
class Size:
    """For expert e, entry ``e + shift`` of ``sizes``."""

    sizes: fx.Node
    shift: int = 0


Bound = Prefix | Size | int | None


def bound(node: object, known: Mapping[fx.Node, Bound], experts: range) -> Bound:
    """What a number of the body is; None where that is not known.

    Args:
        node: a number, or a node of Dynamo's graph with one, inside of a captured body.
        known: what is known of some nodes.
        experts: from the smallest to the largest expert that the body is for.
    """
    if isinstance(node, int):
        return node
    if not isinstance(node, fx.Node):
        return None
    if node in known:
        return known[node]
    value, name, source = example_value(node), operation(node), first_input(node)
    if isinstance(value, torch.Tensor) and (value.dim() != 0 or is_written_to(node) or not _is_wide(value)):
        return None
    if node.target is markers.select:
        return entries(source) if source is not None and node.args[1] == 0 else None
    shifted = node.target is markers.select_shifted
    if source is not None and (name == "getitem" or ((name == "select" or shifted) and node.args[1] == 0)):
        shift = node.args[3] if shifted else _shift_from_index(node.args[-1])
        length = example_value(source).shape[0]
        # An index below 0 counts from the end, and one past the end raises.
        if shift is None or experts.start + shift < 0 or not at_least(length, experts.stop + shift):
            return None
        return _shifted(entries(source), shift)
    if name == "full":
        return node.args[1] if isinstance(node.args[1], int) else None
    if name in PASSES_INTEGERS:
        return bound(source, known, experts)
    if name in ("add", "sub") and len(node.args) == 2 and not node.kwargs:
        left, right = (bound(arg, known, experts) for arg in node.args)
        return _sum(left, right) if name == "add" else _difference(left, right)
    return None


def entries(node: fx.Node) -> Prefix | Size | None:
    """What the entries of a 1-D tensor are, one for each expert; None where they change, or round and wrap."""
    value, name, source = example_value(node), operation(node), first_input(node)
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or is_written_to(node):
        return None
    if root(node) is not node:
        return entries(root(node))
    if not _is_wide(value):
        return Size(node) if are_counts(node) else None
    if name == "cumsum" and source is not None and (*node.args[1:], *node.kwargs.values()) in ((0,), (-1,)):
        sizes = entries(source)
        return Prefix(sizes.sizes, 1) if isinstance(sizes, Size) and sizes.shift == 0 else Size(node)
    if name == "sub" and len(node.args) == 2 and not node.kwargs:
        parts = [entries(arg) if isinstance(arg, fx.Node) else None for arg in node.args]
        found = _difference(*parts)
        return found if isinstance(found, Prefix) else Size(node)
    if name in ("cat", "concat", "concatenate") and isinstance(node.args[0], (tuple, list)):
        return _after_a_zero(node, list(node.args[0]))
    if name == "pad" and source is not None and _pads_one_zero(node) and _is_of_all(entries(source)):
        return _shifted(entries(source), -1)
    if name == "getitem" and source is not None and isinstance(node.args[1], slice):
        key = node.args[1]
        if key.step in (None, 1) and type(key.start or 0) is int and (key.start or 0) >= 0:
            return _shifted(entries(source), key.start or 0)
    return Size(node)


def _is_wide(value: torch.Tensor) -> bool:
    """Whether numbers of rows are themselves in the dtype of a tensor."""
    return value.dtype in (torch.int64, torch.int32)


def root(node: fx.Node) -> fx.Node:
    """The tensor whose integers ``node`` has."""
    while operation(node) in PASSES_INTEGERS and not is_written_to(node) and _is_wide(example_value(node)):
        source = first_input(node)
        value = None if source is None else example_value(source)
        if source is None or not isinstance(value, torch.Tensor) or value.dim() != 1 or is_written_to(source):
            break
        if not _is_wide(value) and not (value.is_floating_point() and are_counts(source)):
            break
        node = source
    return node


def _after_a_zero(node: fx.Node, parts: list[object]) -> Prefix | Size:
    first, rest = (parts[0], parts[1]) if len(parts) == 2 else (None, None)
    if isinstance(first, fx.Node) and isinstance(rest, fx.Node) and _is_one_zero(first):
        found = entries(rest)
        if _is_of_all(found) and (*node.args[1:], *node.kwargs.values()) in ((), (0,), (-1,)):
            return _shifted(found, -1) or Size(node)
    return Size(node)


def _is_of_all(found: Bound) -> bool:
    """Whether the first entry is the first of the sizes: after a zero, entry e is then the sum of the first e."""
    return isinstance(found, Prefix) and found.shift == 1


def _is_one_zero(node: fx.Node) -> bool:
    value = example_value(node)
    if not isinstance(value, torch.Tensor) or list(value.shape) != [1] or is_written_to(node):
        return False
    if operation(node) in ("zeros", "new_zeros"):
        return True
    return operation(node) in ("tensor", "new_tensor") and node.args[-1] == [0]


def _pads_one_zero(node: fx.Node) -> bool:
    given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    value, mode = given.get("value"), given.get("mode", "constant")
    return tuple(given.get("pad", ())) == (1, 0) and mode == "constant" and value in (None, 0)  # type: ignore[arg-type]


def _shifted(found: Bound, shift: int) -> Prefix | Size | None:
    if not isinstance(found, (Prefix, Size)):
        return None
    return dataclasses.replace(found, shift=found.shift + shift)


def _sum(left: Bound, right: Bound) -> Bound:
    for a, b in ((left, right), (right, left)):
        if isinstance(a, Prefix) and isinstance(b, Size) and a.sizes in (None, b.sizes) and a.shift == b.shift:
            return Prefix(b.sizes, a.shift + 1)
        if isinstance(b, int) and b == 0:
            return a
    return None


def _difference(left: Bound, right: Bound) -> Bound:
    if isinstance(left, Prefix) and isinstance(right, Size) and left.sizes is right.sizes:
        return Prefix(left.sizes, left.shift - 1) if left.shift == right.shift + 1 else None
    if isinstance(left, Prefix) and isinstance(right, Prefix) and left.sizes is right.sizes and left.sizes is not None:
        return Size(left.sizes, right.shift) if left.shift == right.shift + 1 else None
    return left if right == 0 and isinstance(right, int) else None


def _shift_from_index(key: object) -> int | None:
    """``c`` where a key is the loop's index plus ``c``."""
    if not isinstance(key, fx.Node):
        return None
    if key.target is markers.number:
        return 0
    name = operation(key)
    if name in ("add", "sub") and len(key.args) == 2:
        left, right = key.args
        if name == "add" and isinstance(left, int):
            left, right = right, left
        shift = _shift_from_index(left)
        if shift is not None and isinstance(right, int):
            return shift + right if name == "add" else shift - right
    return None


# --- what sizes are known to be --------------------------------------------------------------------------------------


def are_counts(sizes: fx.Node) -> bool:
    """Whether none of ``sizes`` is below 0."""
    if is_written_to(sizes) or not (_is_wide(example_value(sizes)) or example_value(sizes).is_floating_point()):
        return False
    if _known_total(sizes) is not None:
        return True
    name, source = operation(sizes), first_input(sizes)
    if name == "bincount":
        return len(sizes.args) < 2 and "weights" not in sizes.kwargs
    if name == "histc":
        return True
    return name == "sum" and source is not None and _is_zeros_and_ones(source)


def is_total(sizes: fx.Node, rows: int | torch.SymInt, experts: int) -> bool:
    """Whether the first ``experts`` of ``sizes`` are known to add up to ``rows``."""
    total = None if is_written_to(sizes) else _known_total(sizes)
    if total is not None:
        return example_value(sizes).shape[0] == experts and same_size(total, rows)
    name, source = operation(sizes), first_input(sizes)
    if source is None or is_written_to(sizes):
        return False
    if name == "bincount" and are_counts(sizes):
        return _are_below(source, experts) and same_size(example_value(source).numel(), rows)
    is_exact = not example_value(sizes).is_floating_point()
    if name == "sum" and is_exact and (*sizes.args[1:], *sizes.kwargs.values()) == (0,):
        while operation(source) in PASSES_INTEGERS and first_input(source) is not None:
            source = first_input(source)
            assert source is not None
        ids = _ids_of_ones(source)
        if ids is None or example_value(source).shape[-1] != experts:
            return False
        value = example_value(ids)
        alike = value.dim() == 2 and example_value(source).dim() == 2
        each_once = isinstance(value.shape[-1], int) and distinct_run(ids) % value.shape[-1] == 0
        return alike and each_once and _are_below(ids, experts) and same_size(value.numel(), rows)
    return False


def _known_total(sizes: fx.Node) -> int | torch.SymInt | None:
    """What is noted of sizes, or of their running sum."""
    waiting = [sizes]
    while waiting:
        node = waiting.pop()
        if TOTAL in node.meta:
            total: int | torch.SymInt = node.meta[TOTAL]
            return total
        if node is sizes or operation(node) in PASSES_INTEGERS:
            waiting += [user for user in node.users if operation(user) in ("cumsum", *PASSES_INTEGERS)]
    return None


def _is_zeros_and_ones(node: fx.Node) -> bool:
    if is_written_to(node):
        return _ids_of_ones(node) is not None
    while operation(node) in PASSES_INTEGERS and (source := first_input(node)) is not None:
        if example_value(node).dtype is torch.bool or example_value(source).dtype is torch.bool:
            return True
        if is_written_to(source):
            return _ids_of_ones(source) is not None
        node = source
    value = example_value(node)
    if isinstance(value, torch.Tensor) and value.dtype is torch.bool:
        return True
    return (operation(node) == "one_hot" and not is_written_to(node)) or _ids_of_ones(node) is not None


def _ids_of_ones(node: fx.Node) -> fx.Node | None:
    """The ids at which a tensor of zeros was set to one along its last dimension, ``zeros.scatter_(1, ids, 1)``."""
    scatter: fx.Node | None = node
    if operation(node) != "scatter":
        changes = [user for user in node.users if operation(user).endswith("_") and user.args[0] is node]
        scatter = changes[0] if len(changes) == 1 and operation(changes[0]) == "scatter_" else None
        others = [user for user in node.users if user is not scatter]
        nodes = list(node.graph.nodes)
        if scatter is None or any(nodes.index(user) < nodes.index(scatter) for user in others):
            return None
        if example_value(node)._version != 1:
            return None
    base = first_input(scatter) if scatter is not None else None
    if scatter is None or base is None or operation(base) not in ("zeros", "new_zeros", "zeros_like") or scatter.kwargs:
        return None
    if operation(node) == "scatter" and is_written_to(base):
        return None
    dim, ids, one = (*scatter.args[1:], None, None, None)[:3]
    last = example_value(base).dim() - 1
    plain = dim in (last, -1) and one == 1 and isinstance(one, (int, float)) and isinstance(ids, fx.Node)
    return ids if plain and isinstance(ids, fx.Node) and not is_written_to(ids) else None


def _are_below(ids: fx.Node, experts: int) -> bool:
    limit = upper_bound(ids)
    return limit is not None and limit <= experts


# --- what a way through the body says of sizes -----------------------------------------------------------------------


def says_empty(conditions: Iterable[fx.Node], sizes: fx.Node, known: Mapping[fx.Node, Bound], experts: range) -> bool:
    """Whether some of the ``condition`` markers of a path says that the expert's entry of ``sizes`` is 0.

    That entry is none below 0. ``known`` and ``experts`` are those of :func:`bound`.
    """
    return any(_empties(node.args[1], bool(node.args[2]), known, experts) == Size(sizes) for node in conditions)


def _empties(truth: object, taken: bool, known: Mapping[fx.Node, Bound], experts: range) -> Bound:
    """What is 0 where ``bool(truth)`` is ``taken``."""
    direct = bound(truth, known, experts)
    if direct is not None:
        return None if taken else direct
    if not isinstance(truth, fx.Node) or len(truth.args) < 2:
        return None
    name = operation(truth)
    left, right = (bound(arg, known, experts) for arg in truth.args[:2])
    if (name, taken) in (("eq", True), ("ne", False), ("le", True), ("gt", False)):
        return left if right == 0 and isinstance(right, int) else _difference(left, right) or _difference(right, left)
    if (name, taken) in (("lt", True), ("ge", False)):
        return left if right == 1 and isinstance(right, int) else None
    return None
