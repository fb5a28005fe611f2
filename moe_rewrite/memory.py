"""Which tensors of a graph lie in one memory, who writes to it, and whether two of them can touch.

Every question of aliasing is answered here, from storages, offsets, sizes and strides: two nodes, and two values of a
row program, may be one memory without being one node.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from moe_rewrite.nodes import example_value, first_input, operation


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


def may_touch(a: fx.Node, b: fx.Node) -> bool:
    """Whether the tensors of two nodes may have an entry in common."""
    if shares_memory(a, b):
        return not MemoryRegion.of(_inside(example_value(a))).is_apart(MemoryRegion.of(_inside(example_value(b))))
    return may_share_memory(a, b)


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


# --- regions --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MemoryRegion:
    """The bytes of a storage that a tensor covers, in the order of its entries.

    Attributes:
        offset: where its first byte lies, counted from some place that is the same for all that are compared.
        shape: its sizes; the last is that of an entry in bytes.
        strides: how far apart neighbours along each dimension lie, in bytes.
    """

    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, within: torch.Tensor | None = None) -> MemoryRegion:
        """Where a (fake) tensor lies in its storage, or counted from the first entry of another one in it."""
        size = tensor.element_size()
        origin = 0 if within is None else within.storage_offset() * within.element_size()
        strides = (*(stride * size for stride in tensor.stride()), 1)
        return cls(tensor.storage_offset() * size - origin, (*tensor.shape, size), strides)

    def is_same(self, other: MemoryRegion) -> bool:
        """Whether both are known to be the same entries in the same order."""
        mine, theirs = (self.offset, *self.shape, *self.strides), (other.offset, *other.shape, *other.strides)
        return len(self.shape) == len(other.shape) and all(map(_equal, mine, theirs))

    def is_apart(self, other: MemoryRegion) -> bool:
        """Whether the two are known to have no entry in common.

        One ends before the other begins; or both repeat with one period, and what they cover of a period is apart: the
        columns ``[:, :4]`` and ``[:, 4:]``, the slots ``[:, 0]`` and ``[:, 1]``, ``[..., ::2]`` and ``[..., 1::2]``.
        """
        if any(_equal(size, 0) for size in (*self.shape, *other.shape)):
            return True
        if _before(self.offset, self._reach(), other.offset) or _before(other.offset, other._reach(), self.offset):
            return True
        periods = [stride for _, stride in (*self._dims(), *other._dims())]
        return any(_apart_within(self, other, period) for period in periods if _known(period > 1))

    def has_places_of_their_own(self) -> bool:
        """Whether any two entries are known to lie in different places: each stride reaches past what is within it."""
        return any(_nested(order) for order in itertools.permutations(reversed(self._dims())))

    def _dims(self) -> list[tuple[Any, Any]]:
        """The size and the stride of each dimension along which there is more than one entry."""
        return [dim for dim in zip(self.shape, self.strides, strict=True) if not _equal(dim[0], 1)]

    def _reach(self) -> Any:
        """How far the last entry is from the first."""
        return sum(((size - 1) * stride for size, stride in self._dims()), 0)

    def _within(self, period: Any) -> tuple[Any, Any] | None:
        """The first and the last place that it covers of each period; None where it may cross the end of one."""
        inner = [(size, stride) for size, stride in self._dims() if not _equal(stride % period, 0)]
        first = self.offset % period
        last = first + sum(((size - 1) * stride for size, stride in inner), 0)
        return (first, last) if _known(last < period) else None


def _apart_within(a: MemoryRegion, b: MemoryRegion, period: Any) -> bool:
    ours, theirs = a._within(period), b._within(period)
    if ours is None or theirs is None:
        return False
    return _known(ours[1] < theirs[0]) or _known(theirs[1] < ours[0])


def _nested(order: tuple[tuple[Any, Any], ...]) -> bool:
    reach: Any = 0
    for size, stride in order:
        if not _known(stride > reach):
            return False
        reach = reach + size * stride - stride
    return True


def _before(offset: Any, reach: Any, other: Any) -> bool:
    return _known(offset + reach < other)


def _equal(a: Any, b: Any) -> bool:
    return _known(a == b)


def _known(truth: Any) -> bool:
    return bool(statically_known_true(truth))
