"""Contiguous pieces of a tensor, one for each expert: ``x[start:stop]`` and ``x.split(sizes)``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch

from moe_rewrite import markers
from moe_rewrite.capture import dynamo, dynamo_modules
from moe_rewrite.capture.numbers import NumbersOfTensor, is_marked, source_of_number
from moe_rewrite.memory import times_written
from moe_rewrite.nodes import example_value
from moe_rewrite.recognise.running import TOTAL, is_total, root

if TYPE_CHECKING:
    from moe_rewrite.capture.frames import FrameCapture
    from moe_rewrite.capture.rolled import RolledIterator


@dataclasses.dataclass
class Piece:
    """``container[start:stop]`` of an iteration: rows that were gathered, where eager has a view.

    Attributes:
        container: the tensor.
        positions: the positions of its rows, ``[rows]``.
        rows: the rows.
        written_back: how often the rows had been changed in place when they were last put back.
    """

    container: Any
    positions: Any
    rows: Any
    written_back: int = 0


class SplitTensor(dynamo.VariableTracker):  # type: ignore[misc]
    """``x.split(sizes.tolist())``, not read yet: a loop picks its pieces by its index, or iterates them."""

    _nonvar_fields: ClassVar[set[str]] = {"frame", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, tx: Any, numbers: NumbersOfTensor, tensor: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frame: FrameCapture = numbers.frame
        self.tensor = tensor
        sizes = numbers.unchanged_tensor()
        self.stops = sizes.call_method(tx, "cumsum", [dynamo.constant(tx, 0)], {})
        self.starts = self.stops.call_method(tx, "__sub__", [sizes], {})
        self.length = numbers.length
        rows = example_value(tensor.as_proxy().node).shape[0]
        if not is_total(root(sizes.as_proxy().node), rows, self.length or 0):
            self._check(tx, sizes)
        self.stops.as_proxy().node.meta[TOTAL] = rows

    def _check(self, tx: Any, sizes: Any) -> None:
        """Raise where eager does: where the sizes are no sizes, or are not as many rows as there are."""
        rows = dynamo_modules.size_of(tx, self.tensor.as_proxy().node)
        total = sizes.call_method(tx, "sum", [], {})
        fits = total.call_method(tx, "__eq__", [rows], {})
        counts = sizes.call_method(tx, "__ge__", [dynamo.constant(tx, 0)], {}).call_method(tx, "all", [], {})
        both = fits.call_method(tx, "__and__", [counts], {})
        dynamo.call_in_graph(
            tx, torch.ops.aten._assert_async.msg, [both, "split: the sizes are not those of the tensor"]
        )

    @classmethod
    def of(cls, tx: Any, tensor: Any, args: list[Any], kwargs: dict[str, Any]) -> SplitTensor | None:
        """``tensor.split(*args, **kwargs)``; None where the sizes are no unread numbers, or along another dimension."""
        given = dict(zip(("split_size_or_sections", "dim"), args, strict=False)) | kwargs
        sizes = given.get("split_size_or_sections", given.get("split_size", given.get("split_sizes")))
        dim = given.get("dim")
        first = dim is None or (dim.is_python_constant() and dim.as_python_constant() == 0)
        if not isinstance(sizes, NumbersOfTensor) or not first or not isinstance(tensor, dynamo.TensorVariable):
            return None
        return None if sizes.length is None else cls(tx, sizes, tensor)

    def python_type(self) -> type:
        return tuple

    def at_index(self, tx: Any, loop: RolledIterator) -> Any:
        """The piece at the index of ``loop``."""
        index = loop.path.index.as_scalar(tx).as_proxy()  # type: ignore[union-attr]
        bounds = [
            dynamo_modules.put_in_graph(tx, markers.select, ends.as_proxy(), 0, index)
            for ends in (self.starts, self.stops)
        ]
        return _rows(tx, loop, self.tensor, bounds[0], bounds[1], [])

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        self.frame.restart_with_plain_lists()

    call_method = call_function = as_proxy = reconstruct = unpack_var_sequence = _read
    var_getattr = call_obj_hasattr = has_unpack_var_sequence = force_unpack_var_sequence = _read


def take(tx: Any, loop: RolledIterator, container: Any, key: Any) -> Any:
    """``container[start:stop]`` for numbers that the iteration has computed; None for other keys."""
    found = _bounds(tx, loop, container, key)
    return None if found is None else _rows(tx, loop, container, *found)


def put(tx: Any, loop: RolledIterator, container: Any, key: Any, value: Any) -> bool:
    """``container[start:stop] = value``. Returns whether it was such a key."""
    found = _bounds(tx, loop, container, key)
    if found is None:
        return False
    start, stop, rest = found
    positions = _positions(tx, loop, container, start, stop)
    value = dynamo_modules.realized(value)
    if isinstance(value, dynamo.TensorVariable) and value.dtype is not container.dtype:
        value = value.call_method(tx, "to", [dynamo_modules.built(tx, container.dtype)], {})  # as a slice casts
    container.call_method(tx, "__setitem__", [dynamo.tuple_of([positions, *rest]), value], {})
    for piece in loop.path.pieces:  # type: ignore[union-attr]
        if dynamo.is_same_memory(piece.rows, value) and piece.container is container and piece.positions is positions:
            piece.written_back = _times_changed(piece.rows)
    return True


def check_unchanged(loop: RolledIterator, pieces: list[Piece]) -> None:
    """Refuse a loop that changes a piece in place: in eager that changes the tensor it is a piece of."""
    if any(_times_changed(piece.rows) > piece.written_back for piece in pieces):
        loop.refuse("the body changes a piece of a tensor in place")


def _times_changed(variable: Any) -> int:
    return times_written(variable.as_proxy().node)


def _bounds(tx: Any, loop: RolledIterator, container: Any, key: Any) -> tuple[Any, Any, list[Any]] | None:
    """The bounds of a slice along the first dimension, and the keys of the others."""
    keys = list(key.items) if dynamo.is_tuple(key) else [key]
    bounds = dynamo.slice_bounds(keys[0]) if keys else None
    if bounds is None or not any(map(_is_computed, bounds)):
        return None
    start, stop, step = bounds
    if not (step.is_python_constant() and step.as_python_constant() in (None, 1)):
        loop.refuse("a slice between computed numbers has a step", tx)
    return _bound(tx, loop, start, 0), _bound(tx, loop, stop, container), keys[1:]


def _is_computed(bound: Any) -> bool:
    return is_marked(bound) or (type(bound) is dynamo.TensorVariable and bound.dtype in (torch.int64, torch.int32))


def _bound(tx: Any, loop: RolledIterator, bound: Any, default: Any) -> Any:
    if bound.is_python_constant():
        value = bound.as_python_constant()
        if value is None and default != 0:
            value = example_value(default.as_proxy().node).shape[0]
        value = 0 if value is None else value
        if isinstance(value, int):
            return dynamo_modules.full(tx, value)
    if not _is_computed(bound) or bound.ndim != 0:
        loop.refuse("a slice between numbers that are not understood", tx)
    return bound


def _positions(tx: Any, loop: RolledIterator, container: Any, start: Any, stop: Any) -> Any:
    """The positions of the rows between two numbers; the same variable for the same numbers."""
    asked = loop.path.asked_pieces  # type: ignore[union-attr]
    bounds = (source_of_number(bound.as_proxy().node) for bound in (start, stop))
    key = (*bounds, str(example_value(container.as_proxy().node).shape[0]))
    if key not in asked:
        index = loop.path.index.as_scalar(tx).as_tensor()  # type: ignore[union-attr]
        asked[key] = dynamo.call_in_graph(tx, markers.piece, [index, start, stop, container])
    return asked[key]


def _rows(tx: Any, loop: RolledIterator, container: Any, start: Any, stop: Any, rest: list[Any]) -> Any:
    positions = _positions(tx, loop, container, start, stop)
    rows = dynamo.index(tx, container, [positions, *rest])
    loop.path.pieces.append(Piece(container, positions, rows))  # type: ignore[union-attr]
    return rows
