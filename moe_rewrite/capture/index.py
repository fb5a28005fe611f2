"""The symbolic index of a rolled loop, as Dynamo sees it.

It is a tensor variable that every torch function applied to it comes back to, so that ``weight[index]`` becomes
``moe_rewrite.select(weight, 0, index)`` and a question such as ``index == num_experts`` is answered by the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch

from moe_rewrite import markers
from moe_rewrite.capture import dynamo, dynamo_modules

if TYPE_CHECKING:
    from moe_rewrite.capture.rolled import RolledIterator

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_REFLECTED = {"eq": "eq", "ne": "ne", "lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}

# What leaves the index as it is, and what makes a Python number of it.
_SAME_INDEX = frozenset(("clone", "contiguous", "cpu", "detach", "long"))
_TO_NUMBER = frozenset(("__index__", "__int__", "int", "item"))


class ExpertIndexVariable(dynamo.TensorWithTFOverrideVariable):  # type: ignore[misc]
    """The symbolic index: every torch function applied to it comes to :meth:`call_torch_function`."""

    _nonvar_fields: ClassVar[set[str]] = {"iterator", *dynamo.TensorWithTFOverrideVariable._nonvar_fields}

    def __init__(self, *, iterator: RolledIterator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.iterator = iterator

    @classmethod
    def wrap(cls, tensor: Any, iterator: RolledIterator) -> ExpertIndexVariable:
        """The index whose value in the graph is ``tensor``, a row of the iterated hits."""
        fields = dict(tensor.__dict__)
        fields["class_type"] = torch.Tensor
        return cls(iterator=iterator, **fields)

    def as_tensor(self) -> Any:
        """The same graph value as an ordinary tensor variable."""
        fields = {name: value for name, value in self.__dict__.items() if name not in ("iterator", "torch_function_fn")}
        fields["class_type"] = torch.Tensor
        return dynamo.TensorVariable(**fields)

    def call_method(self, tx: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name in _SAME_INDEX:
            return self
        if name in _TO_NUMBER:
            return self.as_number(tx)
        if name == "squeeze":
            return self.as_scalar(tx)
        return super().call_method(tx, name, args, kwargs)

    def call_torch_function(self, tx: Any, fn: Any, types: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
        arguments = list(args)
        name = dynamo.function_name(fn)
        if name in _SAME_INDEX:
            return self
        if name in _TO_NUMBER:
            return self.as_number(tx)
        if name == "squeeze":
            return self.as_scalar(tx)
        if name in _COMPARISONS and len(arguments) == 2:
            answer = self._compare(tx, name, *arguments)
            if answer is not None:
                return answer
        if name == "getitem":
            container, key = arguments
            if container is not self:
                return self._select(tx, container, key)
            if self.ndim == 1 and key.is_python_constant() and key.as_python_constant() in (0, -1):
                return self.as_scalar(tx)
        plain = [_plain(argument) for argument in arguments]
        return fn.call_function(tx, plain, {key: _plain(value) for key, value in kwargs.items()})

    def _compare(self, tx: Any, name: str, left: Any, right: Any) -> Any:
        other = right if left is self else left
        if not other.is_python_constant() or not isinstance(other.as_python_constant(), int):
            return None
        compare = _COMPARISONS[name if left is self else _REFLECTED[name]]
        constant = other.as_python_constant()
        return ExpertCondition(tx, self, lambda value: compare(value, constant))

    def _select(self, tx: Any, container: Any, key: Any) -> Any:
        keys = list(key.items) if dynamo.is_tuple(key) else [key]
        if self.ndim == 0 and self in keys and isinstance(container, dynamo.TensorVariable):
            return subscript(tx, self.iterator, _plain(container), key)
        dim = keys.index(self) if self in keys else -1
        if dim < 0 or not isinstance(container, dynamo.TensorVariable) or not all(map(_is_full_slice, keys[:dim])):
            self.iterator.refuse("the expert's index is used in a way of indexing that is not understood", tx)
        selected = dynamo.call_in_graph(tx, markers.select, [_plain(container), dim, self.as_scalar(tx).as_tensor()])
        if self.ndim == 1:  # indexing with a row of one keeps a dimension of one
            selected = selected.call_method(tx, "unsqueeze", [dynamo.constant(tx, dim)], {})
        rest = keys[:dim] + [dynamo.full_slice()] * self.ndim + keys[dim + 1 :]
        return selected if all(map(_is_full_slice, rest)) else dynamo.index(tx, selected, rest)

    def unpacked(self, tx: Any, count: int) -> Any:
        """The items of ``(expert,) = index``; None where there are not as many."""
        return [self.as_scalar(tx)] if self.ndim == 1 and count == 1 else None

    def as_scalar(self, tx: Any) -> ExpertIndexVariable:
        """The index as a 0-dim tensor variable."""
        if self.ndim == 0:
            return self
        scalar = self.as_tensor().call_method(tx, "reshape", [dynamo.tuple_of([])], {})
        return ExpertIndexVariable.wrap(scalar, self.iterator)

    def as_number(self, tx: Any) -> Any:
        """The index as a Python number: a symbolic integer."""
        path = self.iterator.path
        if path is None:
            self.iterator.refuse("the expert's index is used after its iteration", tx)
        if path.number is None:
            tensor = self.as_scalar(tx).as_tensor()
            path.number = dynamo.call_in_graph(tx, markers.number, [tensor, max(path.experts) + 1])
        return path.number


class ExpertCondition(dynamo.SymNodeVariable):  # type: ignore[misc]
    """A comparison of the index, of which only the truth is asked (``if``, ``while``, ``and``, ``or``, ``not``).

    In eager it is a tensor, and as a value it would have to be one here. To Dynamo it is a symbolic truth that nothing
    is known of, so that no code of Dynamo's can answer in the place of :meth:`evaluate_expr`.
    """

    def __init__(self, tx: Any, index: ExpertIndexVariable, holds: Callable[[int], bool]) -> None:
        unknown = dynamo.call_in_graph(tx, markers.number, [index.as_scalar(tx).as_tensor(), 2**62])
        super().__init__(unknown.proxy, unknown.sym_num == 2**31)
        self.iterator = index.iterator
        self.holds = holds

    def python_type(self) -> Any:
        return torch.Tensor

    def evaluate_expr(self, output: Any = None) -> bool:
        return self.iterator.decide(self.holds)

    def as_proxy(self) -> NoReturn:
        self.iterator.refuse("a comparison of the expert's index is used as a value")

    def as_tensor(self, *args: Any) -> NoReturn:
        self.as_proxy()


def _plain(variable: Any) -> Any:
    if isinstance(variable, ExpertIndexVariable):
        return variable.as_tensor()
    if dynamo.is_tuple(variable) and any(isinstance(item, ExpertIndexVariable) for item in variable.items):
        return dynamo.tuple_of([_plain(item) for item in variable.items])
    return variable


def _is_full_slice(variable: Any) -> bool:
    if not variable.is_python_constant():
        return False
    value = variable.as_python_constant()
    return value is Ellipsis or (isinstance(value, slice) and value == slice(None))


def subscript(tx: Any, loop: Any, container: Any, key: Any) -> Any:
    """``container[..., index, ...]`` for the loop's index as a number or a 0-dim tensor; None if it is not a key.

    Such an index picks from its own dimension before the other keys are looked at, as an integer does.
    """
    keys = list(key.items) if dynamo.is_tuple(key) else [key]
    keys = [_as_number_for_each(tx, item, keys) for item in keys]
    if any(_block(loop, item) for item in keys):
        return _take_block(tx, loop, container, keys)
    offsets = [loop.offset_of(item) if getattr(item, "ndim", 0) == 0 else None for item in keys]
    places = [place for place, offset in enumerate(offsets) if offset is not None]
    if not places:
        return None
    if len(places) > 1:
        loop.refuse("the expert's index is used in a way of indexing that is not understood", tx)
    place = places[0]
    before, after = [_dims(item) for item in keys[:place]], [_dims(item) for item in keys[place + 1 :]]
    if any(dims is None for dims in after):
        dim = sum(dims or 0 for dims in before)
    else:  # counted from the end, an ellipsis before the index does not matter
        has_ellipsis = any(dims is None for dims in before)
        dim = container.ndim - sum(dims or 0 for dims in after) - 1 if has_ellipsis else sum(d or 0 for d in before)
    offset = offsets[place] or 0
    if offset and not _has_entries(container, dim, max(loop.path.experts) + offset + 1):
        return None
    selected = loop.select(tx, container, dim, offset)
    rest = [_plain(item) for item in keys[:place] + keys[place + 1 :]]
    return selected if all(map(_is_full_slice, rest)) else dynamo.index(tx, selected, rest)


def _has_entries(container: Any, dim: int, count: int) -> bool:
    """Whether a tensor is known to have so many along a dimension."""
    size = container.as_proxy().node.meta["example_value"].shape[dim]
    return isinstance(size, int) and size >= count


def _block(loop: Any, key: Any) -> tuple[int, int, int] | None:
    """``(stride, first, length)`` of a key ``index * stride + first : index * stride + first + length``."""
    bounds = dynamo.slice_bounds(key)
    if bounds is None or loop.path.number is None or not dynamo_modules.is_none(bounds[2]):
        return None
    start, stop = (dynamo.steps_of(bound, loop.path.number) for bound in bounds[:2])
    if start is None or stop is None or start[0] != stop[0]:
        return None
    stride, first, length = start[0], start[1], stop[1] - start[1]
    return (stride, first, length) if stride > 0 and first >= 0 and 0 < length <= stride - first else None


def _take_block(tx: Any, loop: Any, container: Any, keys: list[Any]) -> Any:
    """``weight[expert * n : (expert + 1) * n]``: the expert's part of ``weight.unflatten(0, (-1, n))``."""
    dim = next(place for place, key in enumerate(keys) if _block(loop, key))
    size = container.as_proxy().node.meta["example_value"].shape[dim] if dim < container.ndim else None
    stride, first, length = _block(loop, keys[dim]) or (0, 0, 0)
    others = keys[:dim] + keys[dim + 1 :]
    if not isinstance(size, int) or size % stride or not all(map(_is_full_slice, others)):
        return None
    if any(key.as_python_constant() is Ellipsis for key in others):
        return None
    parts = dynamo.tuple_of([dynamo.constant(tx, size // stride), dynamo.constant(tx, stride)])
    blocks = container.call_method(tx, "unflatten", [dynamo.constant(tx, dim), parts], {})
    own = loop.select(tx, blocks, dim, 0)
    if length == stride:
        return own
    return own.call_method(tx, "narrow", [dynamo.constant(tx, number) for number in (dim, first, length)], {})


def _as_number_for_each(tx: Any, key: Any, keys: list[Any]) -> Any:
    """An index ``[1]`` beside positions ``[R]`` is the same number for each of them; other keys as they are."""
    if not isinstance(key, ExpertIndexVariable) or key.ndim == 0:
        return key
    others = [other for other in keys if other is not key]
    while others and others[-1].is_python_constant() and others[-1].as_python_constant() is None:
        others.pop()
    beside = others and all(
        isinstance(other, dynamo.TensorVariable)
        and not isinstance(other, ExpertIndexVariable)
        and other.ndim == 1
        and other.dtype in (torch.int64, torch.int32)
        for other in others
    )
    return key.as_scalar(tx) if beside else key


def _dims(key: Any) -> int | None:
    """How many dimensions of a tensor a key of its subscript is for; None for an ellipsis."""
    if isinstance(key, dynamo.TensorVariable):
        is_mask = key.dtype in (torch.bool, torch.uint8)
        return int(key.ndim) if is_mask else 1
    if not key.is_python_constant():
        return 1
    value = key.as_python_constant()
    return None if value is Ellipsis else 0 if value is None or isinstance(value, bool) else 1


def truth(tx: Any, loop: Any, variable: Any) -> Any:
    """``variable`` as a Python truth where it is a tensor of one element, or a number that is not known."""
    if isinstance(variable, dynamo_modules.SymNodeVariable) and not isinstance(variable, ExpertCondition):
        is_number = isinstance(variable.sym_num, torch.SymInt)
        return dynamo_modules.compute(tx, operator.ne, variable, 0) if is_number else variable
    if dynamo_modules.element_count(variable) != 1:
        return variable
    taken = loop.answer()
    index = loop.path.index.as_tensor()
    dynamo.call_in_graph(tx, markers.condition, [index, variable, taken])
    return dynamo.constant(tx, taken)
