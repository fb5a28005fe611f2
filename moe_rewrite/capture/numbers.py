"""Python numbers that are read from a tensor, such as how many tokens each expert has.

While a loop's body is traced, a number of an iteration is a 0-dim integer tensor. It is *marked*, as it has to behave
as a number where the two differ: ``start += n`` makes a new number, and a quotient is a double.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import fx

from moe_rewrite import markers
from moe_rewrite.capture import dynamo, dynamo_code, dynamo_modules
from moe_rewrite.memory import is_written_to, times_written
from moe_rewrite.nodes import example_value, first_input, operation
from moe_rewrite.recognise.bounds import upper_bound
from moe_rewrite.recognise.running import PASSES_INTEGERS, TOTAL

if TYPE_CHECKING:
    from moe_rewrite.capture.frames import FrameCapture
    from moe_rewrite.capture.rolled import RolledIterator

_NUMBER = "moe_rewrite_number"
"""``node.meta`` key of the 0-dim tensors that stand for Python numbers."""


class NumbersOfTensor(dynamo.VariableTracker):  # type: ignore[misc]
    """``tensor.tolist()`` or ``tensor.numpy()`` of a 1-D tensor, not read yet.

    A rolled loop iterates it, or picks from it by its index. For anything else the frame is traced again with the list
    as Dynamo makes it.
    """

    _nonvar_fields: ClassVar[set[str]] = {"frame", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, frame: FrameCapture, tensor: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frame = frame
        self.tensor = tensor
        self._changes = self._times_changed()

    def _times_changed(self) -> int:
        return times_written(self.tensor.as_proxy().node)

    def python_type(self) -> type:
        return list

    def at_index(self, tx: Any, loop: RolledIterator, key: Any) -> Any:
        """The number at ``key``, a number that is made of the index of ``loop``."""
        tensor = self.unchanged_tensor()
        if loop.is_index(key):
            index = loop.path.index.as_scalar(tx).as_proxy()  # type: ignore[union-attr]
            picked = dynamo_modules.put_in_graph(tx, markers.select, tensor.as_proxy(), 0, index)
        else:
            picked = tensor.call_method(tx, "__getitem__", [key], {})
        return marked(picked)

    def part(self, tx: Any, bounds: Any) -> NumbersOfTensor:
        """``numbers[1:]``."""
        return NumbersOfTensor(self.frame, self.unchanged_tensor().call_method(tx, "__getitem__", [bounds], {}))

    def unchanged_tensor(self) -> Any:
        """The tensor, if it has not changed since eager has read the numbers."""
        if self._times_changed() != self._changes:
            self._read()
        return self.tensor

    @property
    def length(self) -> int | None:
        """How many numbers there are, where that is known."""
        size = example_value(self.tensor.as_proxy().node).shape[0]
        return size if isinstance(size, int) else None

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        self.frame.restart_with_plain_lists()

    call_method = call_function = as_proxy = reconstruct = unpack_var_sequence = _read
    var_getattr = call_obj_hasattr = has_unpack_var_sequence = force_unpack_var_sequence = _read


class PositionsAsList(dynamo.VariableTracker):  # type: ignore[misc]
    """``token.tolist()`` in a body, of the positions of an expert's rows: an index, as the tensor itself is."""

    _nonvar_fields: ClassVar[set[str]] = {"loop", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, loop: RolledIterator, tensor: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loop = loop
        self.tensor = tensor

    def python_type(self) -> type:
        return list

    @classmethod
    def of(cls, loop: RolledIterator, tensor: Any) -> PositionsAsList | None:
        """None for a tensor that is no row of integers of a length that only run time knows, or that changes."""
        node = tensor.as_proxy().node
        value = example_value(node)
        integers = isinstance(value, torch.Tensor) and value.dim() == 1 and value.dtype is torch.int64
        unknown = integers and not isinstance(value.shape[0], int) and dynamo_modules.has_unknown_length(tensor)
        return cls(loop, tensor) if unknown and not is_written_to(node) else None

    @classmethod
    def as_tensors(cls, key: Any) -> Any:
        """A key with tensors in the place of such lists; None where it holds none."""
        keys = list(key.items) if dynamo.is_tuple(key) else [key]
        if not any(isinstance(item, cls) for item in keys):
            return None
        return dynamo.tuple_of([item.read() if isinstance(item, cls) else item for item in keys])

    def read(self) -> Any:
        """The tensor, if it has not changed since."""
        if is_written_to(self.tensor.as_proxy().node):
            self._read()
        return self.tensor

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        self.loop.refuse("the positions of an expert's rows are read back as a list, and used for more than an index")

    call_method = call_function = as_proxy = reconstruct = unpack_var_sequence = _read
    var_getattr = call_obj_hasattr = has_unpack_var_sequence = force_unpack_var_sequence = _read


class UnreadIterator(dynamo.IteratorVariable):  # type: ignore[misc]
    """``iter(tensor.tolist())`` or ``iter(x.split(sizes))``, for a ``for`` statement that may be rolled."""

    _nonvar_fields: ClassVar[set[str]] = {"items", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, items: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.items = items

    def python_type(self) -> type:
        return type(iter([]))

    def next_variable(self, tx: Any) -> Any:
        return self.items.frame.restart_with_plain_lists()

    tp_iternext_impl = next_variable


class NumberAfterLoop(dynamo.VariableTracker):  # type: ignore[misc]
    """A number that the iterations have added up, after the loop."""

    _nonvar_fields: ClassVar[set[str]] = {"loop", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, loop: RolledIterator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loop = loop

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        self.loop.refuse("a number that the iterations add up is used after the loop")

    call_method = call_function = as_proxy = reconstruct = unpack_var_sequence = python_type = _read
    var_getattr = call_obj_hasattr = has_unpack_var_sequence = force_unpack_var_sequence = _read


def is_tally(node: fx.Node) -> bool:
    """Whether a tensor of integers counts things, as tokens for each expert are counted, or adds such counts up."""
    value = example_value(node)
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.dtype not in (torch.int64, torch.int32):
        return False
    return any(operation(source) in _COUNTS for source in _sources(node))


_COUNTS = ("bincount", "histc", "sum", "scatter_add", "scatter_add_", "count_nonzero")
_MAKES_NUMBERS_OF_COUNTS = (*PASSES_INTEGERS, "cumsum", "cat", "concat", "pad", "sub", "add", "getitem")


def _sources(node: fx.Node) -> list[fx.Node]:
    found, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        found.append(node)
        if operation(node) in _MAKES_NUMBERS_OF_COUNTS:
            waiting += [source for source in node.all_input_nodes if source not in found]
    return found


def bincount(tx: Any, ids: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """``ids.bincount(minlength=n)`` of ids that are known to be below ``n``, as a tensor of known length ``[n]``.

    None for others: how long their result is only run time knows, and stock Dynamo breaks the graph there.
    """
    given = dict(zip(("weights", "minlength"), args, strict=False)) | kwargs
    weights, length = given.get("weights"), given.get("minlength")
    number = None if length is None else dynamo_modules.python_number(dynamo_modules.realized(length))
    if (
        number is None
        or not (weights is None or dynamo_modules.is_none(weights))
        or set(given) - {"weights", "minlength"}
    ):
        return None
    if not isinstance(ids, dynamo.TensorVariable) or ids.ndim != 1:
        return None
    limit = upper_bound(ids.as_proxy().node)
    if limit is None or limit > number:
        return None
    numbers = dynamo_modules.arange(tx, number, ids.device)
    column = ids.call_method(tx, "unsqueeze", [dynamo.constant(tx, 1)], {})
    same = column.call_method(tx, "__eq__", [numbers], {})
    counts = same.call_method(tx, "sum", [dynamo.constant(tx, 0)], {})
    counts.as_proxy().node.meta[TOTAL] = example_value(ids.as_proxy().node).shape[0]
    return counts


def marked(variable: Any) -> Any:
    """``variable``, a 0-dim integer tensor, as a Python number."""
    variable.as_proxy().node.meta[_NUMBER] = True
    return variable


def is_marked(variable: Any) -> bool:
    """Whether a variable is a 0-dim tensor in the place of a Python number."""
    return isinstance(variable, dynamo.TensorVariable) and _NUMBER in variable.as_proxy().node.meta


def source_of_number(node: fx.Node) -> fx.Node:
    """The tensor that a marked number is a clone of, where that has not changed since."""
    source = first_input(node)
    is_clone = operation(node) == "clone" and _NUMBER in node.meta and source is not None
    return source if is_clone and source is not None and not is_written_to(source) else node


def carried_number(tx: Any, variable: Any) -> Any:
    """A 0-dim tensor in the place of a Python integer that is known; None for other variables."""
    number = dynamo_modules.python_number(variable)
    return None if number is None else marked(dynamo_modules.full(tx, number))


def arithmetic(original: Callable[..., Any], tx: Any, loop: RolledIterator, instruction: Any) -> None:
    """``a + b``, ``a += b`` where one of the two is a marked number."""
    operands = [operand.realize() for operand in tx.stack[-2:]]
    plain = list(map(_is_integer, operands))
    if not any(map(is_marked, operands)):
        original(tx, instruction)
        return
    if not all(plain) and (dynamo_code.is_in_place(instruction) or not all(map(_takes_numbers_alike, operands))):
        loop.refuse("the body computes with a number that is read from a tensor in a way that is not understood", tx)
    if dynamo_code.is_in_place(instruction) and is_marked(operands[0]):
        instruction = dataclasses.replace(instruction, arg=instruction.arg - dynamo_code.FIRST_IN_PLACE)
    original(tx, instruction)
    if all(plain):
        result = tx.stack[-1].realize()
        value = example_value(result.as_proxy().node) if isinstance(result, dynamo.TensorVariable) else None
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            loop.refuse("the body makes a fraction of a number that is read from a tensor", tx)
        marked(result)


def _is_integer(operand: Any) -> bool:
    """Whether an operand is a Python integer in eager."""
    is_size = isinstance(operand, dynamo.SymNodeVariable) and isinstance(operand.sym_num, torch.SymInt)
    return is_size or is_marked(operand) or dynamo_modules.python_number(operand) is not None


def _takes_numbers_alike(operand: Any) -> bool:
    """Whether an operand makes the same of a Python integer and of a 0-dim tensor: dtypes are promoted alike."""
    if not isinstance(operand, dynamo.TensorVariable):
        return False
    return bool(is_marked(operand) or operand.dtype.is_floating_point or operand.dtype is torch.int64 or operand.ndim)


def as_number(tx: Any, tensor: Any) -> Any:
    """``tensor.item()`` in a body; None where that is no integer."""
    value = example_value(tensor.as_proxy().node)
    one = isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype in (torch.int64, torch.int32)
    # A clone, so that the tensor itself goes on as one.
    return marked(tensor.call_method(tx, "clone", [], {})) if one else None
