"""Loops of a length that Python knows: what they yield by their index, and what one iteration leaves to the next.

They go over numbers, modules, rows of a tensor, or tuples of these.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from moe_rewrite import markers
from moe_rewrite.capture import dynamo, dynamo_code, dynamo_modules
from moe_rewrite.capture.lists import COMPREHENSION
from moe_rewrite.capture.modules import ExpertModules
from moe_rewrite.capture.numbers import NumbersOfTensor, UnreadIterator
from moe_rewrite.capture.pieces import SplitTensor


@dataclasses.dataclass(frozen=True)
class Numbers:
    """``values[index]``, or the index itself where :func:`index_values` says so."""

    values: range

    def __len__(self) -> int:
        return len(self.values)

    def at_index(self, tx: Any, loop: Any) -> Any:
        number = loop.path.index.as_number(tx)
        if index_values(self) == self.values and loop.values == self.values:
            return number
        if self.values.step != 1:
            number = dynamo_modules.compute(tx, operator.mul, number, self.values.step)
        start = self.values.start
        return dynamo_modules.compute(tx, operator.add, number, start) if start else number


@dataclasses.dataclass(frozen=True)
class Rows:
    """``tensor[index]``, of the proxy of a tensor."""

    tensor: Any
    length: int

    def __len__(self) -> int:
        return self.length

    def at_index(self, tx: Any, loop: Any) -> Any:
        index = loop.path.index.as_scalar(tx).as_proxy()
        return dynamo_modules.put_in_graph(tx, markers.select, self.tensor, 0, index)


@dataclasses.dataclass(frozen=True)
class Tuple:
    """One of each."""

    parts: tuple[Any, ...]

    def __len__(self) -> int:
        return min(map(len, self.parts))

    def at_index(self, tx: Any, loop: Any) -> Any:
        return dynamo.tuple_of([part.at_index(tx, loop) for part in self.parts])

    @property
    def even(self) -> bool:
        """Whether all parts are of one length."""
        return len({len(part) for part in self.parts}) == 1


@dataclasses.dataclass(frozen=True)
class NumbersRead:
    """``numbers[index]`` of the numbers of a tensor."""

    numbers: NumbersOfTensor
    length: int

    def __len__(self) -> int:
        return self.length

    def at_index(self, tx: Any, loop: Any) -> Any:
        return self.numbers.at_index(tx, loop, loop.path.index)


@dataclasses.dataclass(frozen=True)
class SplitPieces:
    """``pieces[index]`` of a tensor that was split."""

    pieces: SplitTensor
    length: int

    def __len__(self) -> int:
        return self.length

    def at_index(self, tx: Any, loop: Any) -> Any:
        return self.pieces.at_index(tx, loop)


Elements = Numbers | Rows | Tuple | NumbersRead | SplitPieces | ExpertModules


def elements(tx: Any, iterator: Any) -> Elements | None:
    """What ``iterator`` has yet to yield; None where that is not one of the above. Nothing is advanced."""
    if isinstance(iterator, UnreadIterator):
        return _unread(iterator.items)
    numbers = dynamo_modules.range_left(iterator)
    if numbers is not None:
        return Numbers(numbers)
    enumerated = dynamo_modules.enumerated(iterator)
    if enumerated is not None:
        iterable, start = enumerated
        inner = _of_iterable(tx, iterable)
        return None if inner is None else Tuple((Numbers(range(start, start + len(inner))), inner))
    zipped = dynamo_modules.zipped(iterator)
    if zipped is not None:
        if len({id(part) for part in zipped}) < len(zipped):
            return None  # `zip(iterator, iterator)` takes turns
        parts = [_of_iterable(tx, part) for part in zipped]
        pair = None if not parts or any(part is None for part in parts) else Tuple(tuple(filter(None, parts)))
        return pair if pair is not None and pair.even else None
    parameters = dynamo_modules.parameters_iterated(tx, iterator)
    if parameters is not None:
        return ExpertModules.of_list(parameters)
    items = dynamo_modules.items_left(iterator)
    return None if not items else _of_items(items)


def _of_iterable(tx: Any, iterable: Any) -> Elements | None:
    if not isinstance(iterable, list):
        iterable = dynamo_modules.realized(iterable)
        if isinstance(iterable, (NumbersOfTensor, SplitTensor)):
            return _unread(iterable)
        if isinstance(iterable, dynamo_modules.TensorVariable):
            return _rows(iterable.as_proxy())
        if isinstance(iterable, dynamo_modules.SymNodeVariable):
            return None
    return elements(tx, dynamo_modules.iterator_over(tx, iterable))


def _unread(items: NumbersOfTensor | SplitTensor) -> NumbersRead | SplitPieces | None:
    if items.length is None:
        return None
    return SplitPieces(items, items.length) if isinstance(items, SplitTensor) else NumbersRead(items, items.length)


def _rows(tensor: Any) -> Rows | None:
    shape = tensor.node.meta["example_value"].shape
    return Rows(tensor, shape[0]) if len(shape) and isinstance(shape[0], int) and shape[0] else None


def _of_items(items: list[Any]) -> Elements | None:
    modules = ExpertModules.of_items(items)
    if modules is not None:
        return modules
    tuples = [dynamo_modules.tuple_items(item) for item in items]
    if all(entry is not None and len(entry) == len(tuples[0] or ()) for entry in tuples):
        parts = [_of_items(list(column)) for column in zip(*tuples, strict=True)]  # type: ignore[arg-type]
        return None if any(part is None for part in parts) else Tuple(tuple(filter(None, parts)))
    tensor = dynamo_modules.tensor_of_rows(items)
    if tensor is not None:
        return _rows(tensor)
    numbers = [dynamo_modules.python_number(item) for item in items]
    known = [number for number in numbers if number is not None]
    if len(known) < len(items) or len(known) < 2 or known[1] == known[0]:
        return None
    step = known[1] - known[0]
    values = range(known[0], known[0] + step * len(known), step)
    return Numbers(values) if list(values) == known else None


def index_values(found: Elements) -> range:
    """The values that the index of a loop over ``found`` takes: the numbers themselves, if it is over numbers."""
    if isinstance(found, Numbers) and found.values.step == 1 and found.values.start >= 0:
        return found.values
    return range(len(found))


_ADDS = frozenset(
    ("add", "index_add", "index_put", "scatter_add", "scatter_reduce", "index_copy", "where", "masked_scatter", "addmm")
)
"""Functions that give a tensor of another one and what is added to it."""


def carries(tx: Any) -> tuple[str, ...] | None:
    """The local variables that an iteration of the loop at hand leaves to the next; None where it cannot be rolled.

    A variable may be a tensor that each iteration adds to. In-place ``+=`` changes the tensor, not the variable.
    """
    body = dynamo_code.loop_body(tx)
    if not body:
        return None
    methods, values = dynamo_code.methods_called(body), dynamo.local_variables(tx)
    names = []
    for name, stores in dynamo_code.names_stored(body).items():
        if not dynamo_code.is_live(tx, name):
            continue
        value = values.get(name)
        if value is not None and dynamo_modules.python_number(dynamo_modules.realized(value)) is not None:
            if not dynamo_code.takes_slices(body):
                return None  # such as a counter
            names.append(name)
            continue
        if value is None or not isinstance(dynamo_modules.realized(value), dynamo_modules.TensorVariable):
            return None
        if all(map(dynamo_code.is_in_place, stores)):
            continue
        if dynamo_code.times_loaded(body, name) > len(stores):
            return None  # `x = x + layer(x)` does more than to add to it
        if not all(store.opname == "BINARY_OP" for store in stores) and methods.isdisjoint(_ADDS):
            return None
        names.append(name)
    return tuple(names)


def lists(tx: Any) -> tuple[str, ...]:
    """The local variables with a list that the body of the loop at hand appends to."""
    values = dynamo.local_variables(tx)
    body = dynamo_code.loop_body(tx)
    if dynamo_code.is_comprehension(body) and dynamo_modules.is_list(dynamo_code.below_iterator(tx)):
        return (COMPREHENSION,)
    names = dict.fromkeys(dynamo_code.appended_to(body))
    return tuple(name for name in names if name in values and dynamo_modules.is_list(values[name]))


def number_of_row(tx: Any, loop: Any) -> Any:
    """What ``hits.tolist()`` holds for a row of ``hits``: a number, or a list of one for rows of one."""
    number = loop.path.index.as_number(tx)
    return number if loop.path.index.ndim == 0 else dynamo_modules.list_of(number)


def pick_row(tx: Any, loop: Any, items: list[Any] | None) -> Any:
    """``items[index]`` of a list that holds the rows of a tensor; None for other lists."""
    tensor = dynamo_modules.tensor_of_rows(items or [])
    rows = None if tensor is None else _rows(tensor)
    return None if rows is None else rows.at_index(tx, loop)
