"""Lists that the body of a rolled loop appends to: ``outputs.append(expert(x))``, once for each expert."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from moe_rewrite import markers
from moe_rewrite.capture import dynamo, dynamo_modules

if TYPE_CHECKING:
    from moe_rewrite.capture.rolled import RolledIterator


class CollectingList(dynamo.VariableTracker):  # type: ignore[misc]
    """Stands in for a list while a body is traced: it can be appended to once, and nothing else."""

    _nonvar_fields: ClassVar[set[str]] = {"loop", "appended", *dynamo.VariableTracker._nonvar_fields}

    def __init__(self, loop: RolledIterator, original: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loop = loop
        self.original = original
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
        return dynamo.call_in_graph(tx, markers.collect, [index, self.appended[0], len(self.loop.values)])

    def extend(self, tx: Any, collected: Any) -> None:
        """Append all of ``collected`` to the list that this one stands in for."""
        for i in range(len(self.loop.values)):
            item = dynamo_modules.compute(tx, operator.getitem, collected, i)
            self.original.call_method(tx, "append", [item], {})
