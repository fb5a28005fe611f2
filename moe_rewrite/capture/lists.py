"""Lists that the body of a rolled loop appends to."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from moe_rewrite import markers
from moe_rewrite.capture import dynamo, dynamo_modules
from moe_rewrite.recognise.running import Prefix, bound, is_total

if TYPE_CHECKING:
    from moe_rewrite.capture.rolled import Path, RolledIterator


COMPREHENSION = "[... for ...]"
"""The name of the list that a comprehension makes."""


class CollectingList(dynamo.VariableTracker):  # type: ignore[misc]
    """Stands in for a list while a body is traced: it can be appended to once, and nothing else."""

    _nonvar_fields: ClassVar[set[str]] = {"loop", "appended", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, loop: RolledIterator, original: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loop = loop
        self.original = original
        self._items = original.items
        original.items = _Unreadable(self._items, loop)  # whatever name, attribute or container it is read by
        self.appended: list[Any] = []

    def python_type(self) -> type:
        return list

    def call_method(self, tx: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        plain = name == "append" and len(args) == 1 and not kwargs and not self.appended
        if not plain or not isinstance(dynamo_modules.realized(args[0]), dynamo_modules.TensorVariable):
            self.loop.refuse("the body does more with a list than to append one tensor to it", tx)
        self.appended.append(args[0])
        return dynamo.constant(tx, None)

    def reconstruct(self, codegen: Any) -> NoReturn:
        self.loop.refuse("the graph breaks inside the loop's body", codegen.tx)

    def collect(self, tx: Any, path: Path) -> Any:
        """The tensor of what all iterations append, ``[iterations, ...]``; None where they append nothing."""
        if not self.appended:
            return None
        index = path.index.as_tensor()
        if dynamo_modules.is_older(self.appended[0], index):
            self.loop.refuse("what is appended to a list was there before the iteration")
        if any(dynamo_modules.any_share_memory([self.appended[0], piece.rows]) for piece in path.pieces):
            self.loop.refuse("a piece of a tensor is put into a list as it is")
        if self.is_of_rows:
            if dynamo_modules.is_older_list(self.original):  # it would have to hold each expert's rows for itself
                self.loop.refuse("each expert's rows are appended to a list that was there before", tx)
            return dynamo.call_in_graph(tx, markers.collect_rows, [index, self.appended[0], self._total(tx, path)])
        return dynamo.call_in_graph(tx, markers.collect, [index, self.appended[0], len(self.loop.values)])

    @property
    def is_of_rows(self) -> bool:
        """Whether what the body appends are an expert's rows, of which only run time knows how many there are."""
        return bool(self.appended) and dynamo_modules.has_unknown_length(self.appended[0])

    @property
    def has_rows_already(self) -> bool:
        """Whether another way through the body has appended rows."""
        return isinstance(self._items, RowsOfAll)

    def _total(self, tx: Any, path: Path) -> Any:
        """How many rows there are of all iterations; -1 where only run time knows."""
        known = {carried.as_proxy().node: Prefix(None, 0) for carried in path.carried.values()}
        for key, positions in path.asked_pieces.items():
            stop = bound(key[1], known, range(min(path.experts), max(path.experts) + 1))
            found = isinstance(stop, Prefix) and stop.sizes is not None
            if found and dynamo_modules.is_of_length(self.appended[0], positions):
                container = positions.as_proxy().node.args[3]
                rows = container.meta["example_value"].shape[0]
                if is_total(stop.sizes, rows, len(self.loop.values)):  # type: ignore[union-attr, arg-type]
                    return dynamo_modules.size_of(tx, container)
        return -1

    def end(self) -> None:
        """The list may be read again."""
        self.original.items = self._items

    def extend(self, tx: Any, collected: Any) -> None:
        """Append all of ``collected`` to the list that this one stands in for."""
        if self.is_of_rows:
            self.original.items = RowsOfAll(self._items, self.loop, collected)
            return
        for i in range(len(self.loop.values)):
            item = dynamo_modules.compute(tx, operator.getitem, collected, i)
            self.original.call_method(tx, "append", [item], {})


class _Unreadable(list[Any]):
    """The items of a list that has other items in every iteration."""

    reason = "the body reads a list that it appends to"

    def __init__(self, items: list[Any], loop: RolledIterator) -> None:
        super().__init__(list.__getitem__(items, slice(None)))  # not by the methods below
        self._loop = loop

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        self._loop.refuse(self.reason)

    __len__ = __iter__ = __getitem__ = __contains__ = __reversed__ = __add__ = __mul__ = __eq__ = _refuse  # type: ignore[assignment]
    append = extend = insert = pop = remove = clear = index = count = copy = sort = reverse = _refuse  # type: ignore[assignment]


class RowsOfAll(_Unreadable):
    """The items of a list that each iteration has appended its rows to. How many items they are is not known.

    Attributes:
        before: the items before the loop.
        rows: the rows of all iterations, one after the other.
        total: how many there are; -1 where only run time knows.
    """

    reason = "a list with each expert's rows is used by something other than torch.cat"

    def __init__(self, before: list[Any], loop: RolledIterator, rows: Any) -> None:
        super().__init__(before, loop)
        self.before = before
        self.rows = rows
        self.total = rows.as_proxy().node.args[2]

    @property
    def is_some(self) -> bool:
        """Whether the list is known to hold something."""
        if self.before:
            return True
        total = dynamo_modules.length_of(self.total)
        return bool(total > 0)  # of a size that is dynamic, this is a guard


class CountOfPieces(dynamo.VariableTracker):  # type: ignore[misc]
    """``len(list)`` of a list that holds each expert's rows: not 0. Nothing else is known of it."""

    _nonvar_fields: ClassVar[set[str]] = {"items", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, items: RowsOfAll, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.items = items

    def python_type(self) -> type:
        return int

    def compared(self, operator: str, other: Any) -> bool:
        """``len(list) > 0`` and the like."""
        answer = {">": True, "!=": True, "==": False, "<=": False}.get(operator)
        if answer is None or dynamo_modules.python_number(other) != 0:
            self._read()
        return bool(answer)

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        self.items._refuse()

    call_method = call_function = as_proxy = reconstruct = unpack_var_sequence = _read
    var_getattr = call_obj_hasattr = has_unpack_var_sequence = force_unpack_var_sequence = _read


def rows_of_all(variable: Any) -> RowsOfAll | None:
    """The items of a list that holds each expert's rows; None for other variables."""
    return variable.items if dynamo_modules.is_list(variable) and isinstance(variable.items, RowsOfAll) else None


def concatenated(items: RowsOfAll) -> list[Any]:
    """What ``torch.cat`` is to put together."""
    return [*items.before, items.rows]
