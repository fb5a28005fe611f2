"""Lists at the edge of a rolled loop: those that its body appends to, and those that are a tensor's numbers."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import fx

from moe_rewrite import markers
from moe_rewrite.capture import dynamo, dynamo_modules
from moe_rewrite.nodes import example_value, first_input, operation

if TYPE_CHECKING:
    from moe_rewrite.capture.frames import FrameCapture
    from moe_rewrite.capture.rolled import RolledIterator


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

    def collect(self, tx: Any, index: Any) -> Any:
        """The tensor of what all iterations append, ``[iterations, ...]``; None where they append nothing."""
        if not self.appended:
            return None
        if dynamo_modules.is_older(self.appended[0], index):
            self.loop.refuse("what is appended to a list was there before the iteration")
        return dynamo.call_in_graph(tx, markers.collect, [index, self.appended[0], len(self.loop.values)])

    def end(self) -> None:
        """The list may be read again."""
        self.original.items = self._items

    def extend(self, tx: Any, collected: Any) -> None:
        """Append all of ``collected`` to the list that this one stands in for."""
        for i in range(len(self.loop.values)):
            item = dynamo_modules.compute(tx, operator.getitem, collected, i)
            self.original.call_method(tx, "append", [item], {})


class _Unreadable(list[Any]):
    """The items of a list that has other items in every iteration."""

    def __init__(self, items: list[Any], loop: RolledIterator) -> None:
        super().__init__(items)
        self._loop = loop

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        self._loop.refuse("the body reads a list that it appends to")

    __len__ = __iter__ = __getitem__ = __contains__ = __reversed__ = __add__ = __mul__ = __eq__ = _refuse  # type: ignore[assignment]
    append = extend = insert = pop = remove = clear = index = count = copy = sort = reverse = _refuse  # type: ignore[assignment]


class NumbersOfTensor(dynamo.VariableTracker):  # type: ignore[misc]
    """``tensor.tolist()``, not read yet: a rolled loop iterates it, or picks from it by its index.

    For anything else the frame is traced again with the list as Dynamo makes it.
    """

    _nonvar_fields: ClassVar[set[str]] = {"frame", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, frame: FrameCapture, tensor: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frame = frame
        self.tensor = tensor

    def python_type(self) -> type:
        return list

    def at_index(self, tx: Any, loop: RolledIterator) -> Any:
        """The number at the index of ``loop``, as a 0-dim tensor."""
        index = loop.path.index.as_scalar(tx).as_proxy()  # type: ignore[union-attr]
        return dynamo_modules.put_in_graph(tx, markers.select, self.tensor.as_proxy(), 0, index)

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        self.frame.restart_with_plain_lists()

    call_method = call_function = as_proxy = reconstruct = unpack_var_sequence = _read
    var_getattr = call_obj_hasattr = has_unpack_var_sequence = force_unpack_var_sequence = _read


def is_tally(node: fx.Node) -> bool:
    """Whether a tensor of integers counts things, as tokens for each expert are counted."""
    value = example_value(node)
    integers = isinstance(value, torch.Tensor) and value.dim() == 1 and value.dtype in (torch.int64, torch.int32)
    source: fx.Node | None = node
    while integers and source is not None:
        name = operation(source)
        if name in ("bincount", "histc", "sum"):
            return True
        source = first_input(source) if name in ("cpu", "to", "long", "int", "detach", "contiguous") else None
    return False
