"""A loop over an unknown number of experts, traced once for a symbolic expert index.

Dynamo cannot iterate a tensor whose length is known only at run time. A :class:`RolledIterator` stands in for its
iterator: instead of one row per expert it yields one symbolic row, so that the body is traced once. Python in the
body may ask about the index (``if expert == num_experts: continue``). The answer then has to hold for every index value
that the traced body stands for, so a question that divides them makes the body be traced once more, for the others.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn

import torch

from moe_rewrite import markers
from moe_rewrite.capture import dynamo
from moe_rewrite.loop import Refusal
from moe_rewrite.report import LoopReport

MAX_PATHS = 8
"""How many different ways through one body are traced before the loop is refused."""

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_REFLECTED = {"eq": "eq", "ne": "ne", "lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}

# What leaves the index as it is, and what makes a Python number of it.
_SAME_INDEX = frozenset(("clone", "contiguous", "cpu", "detach", "long"))
_TO_NUMBER = frozenset(("__index__", "__int__", "int", "item"))


@dataclasses.dataclass
class Path:
    """One way through the body of a loop, while it is being traced."""

    experts: list[int]
    index: Any  # the variable of the symbolic row
    locals_at_start: dict[str, Any]
    symbols_at_start: frozenset[Any]
    scope: int
    state_at_start: dict[Any, Any]
    number: Any = None  # the variable of the index as a Python number, once the body has asked for it
    assumes_rows: bool = False


class RolledIterator(dynamo.IteratorVariable):  # type: ignore[misc]
    """Yields one symbolic row for each way through the body, instead of one row for each expert.

    Args:
        hits: the variable of the tensor that the loop iterates, ``[u]`` or ``[u, 1]`` int64.
        num_values: how many values the rows can have (0 to ``num_values - 1``).
        frame: the capture that this loop belongs to.
        path: path of the module that the loop stands in.
        location: the user's ``file:line`` of the loop.
    """

    def __init__(self, hits: Any, num_values: int, frame: Any, path: str, location: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hits = hits
        self.frame = frame
        self.module_path = path
        self.location = location
        self.waiting: list[list[int]] = [list(range(num_values))]
        self.paths_traced = 0
        self.path: Path | None = None

    def refuse(self, reason: str, tx: Any = None) -> NoReturn:
        """Leave the loop as stock Dynamo has it. ``tx``: where in the body the reason stands."""
        where = "" if tx is None else f", at {dynamo.user_location(tx)}"
        refusal = Refusal(self.module_path, self.location, f"{reason}{where}")
        self.frame.session.refused([LoopReport.of_refusal(refusal)])
        self.frame.restart_as_stock([refusal])
        raise AssertionError("unreachable")

    def python_type(self) -> type:
        iterator_type: type = type(iter(()))  # what iter(tensor) is in eager
        return iterator_type

    # Dynamo before 2.13 calls `next_variable`, later ones `tp_iternext_impl`.
    def tp_iternext_impl(self, tx: Any) -> Any:
        return self.next_variable(tx)

    def next_variable(self, tx: Any) -> Any:
        if not dynamo.is_for_loop_over(tx, self):
            self.refuse("the hits are iterated by something other than a plain `for` statement", tx)
        if self.path is not None:
            self._close_path(tx, self.path)
        if not self.waiting:
            self.frame.loops.remove(self)
            dynamo.stop_iteration(tx)
        return self._open_path(tx)

    def _open_path(self, tx: Any) -> Any:
        if self.paths_traced == MAX_PATHS:
            self.refuse(f"the body takes more than {MAX_PATHS} different ways, depending on the expert's index", tx)
        self.paths_traced += 1
        if self not in self.frame.loops:
            if self.frame.loops:
                self.refuse("a loop over experts stands inside another one", tx)
            self.frame.loops.append(self)
        row = dynamo.call_in_graph(tx, markers.loop_begin, [self.hits, self.paths_traced - 1])
        index = ExpertIndexVariable.wrap(row, self)
        scope = dynamo.enter_scope()
        self.path = Path(
            experts=self.waiting.pop(),
            index=index,
            locals_at_start=dynamo.local_variables(tx),
            symbols_at_start=dynamo.unbacked_symbols(tx.output),
            scope=scope,
            state_at_start=dynamo.python_state(tx.output, scope),
        )
        return index

    def _close_path(self, tx: Any, path: Path) -> None:
        dynamo.leave_scope(path.scope)
        self.path = None
        before, now = path.locals_at_start, dynamo.local_variables(tx)
        changed = (name for name in {**before, **now} if before.get(name) is not now.get(name))
        for name in filter(lambda name: dynamo.is_live(tx, name), changed):
            self.refuse(
                f"local variable `{name}` is changed by one iteration and read by the next, or after the loop", tx
            )
        if dynamo.python_state(tx.output, path.scope) != path.state_at_start:
            self.refuse("the body changes a Python object, or draws a random number, once in every iteration")
        rows = markers.SOME_ROWS if path.assumes_rows else markers.ANY_ROWS
        dynamo.call_in_graph(tx, markers.loop_end, [path.index.as_tensor(), _ranges(path.experts), rows])

    def decide(self, holds: Callable[[int], bool]) -> bool:
        """Answer a question about the index so that the answer holds for all index values of the path."""
        path = self.path
        if path is None:
            self.refuse("the expert's index is used after its iteration")
        yes = [value for value in path.experts if holds(value)]
        no = [value for value in path.experts if not holds(value)]
        if yes and no:
            path.experts, other = (yes, no) if len(yes) > len(no) else (no, yes)
            self.waiting.append(other)
            if path.number is not None:
                dynamo.narrow(path.number, min(path.experts), max(path.experts))
            return path.experts is yes
        return bool(yes)

    def decide_number(self, variable: Any) -> bool | None:
        """Answer a condition on the index as a Python number; None where ``variable`` is no such condition."""
        number = self.path.number if self.path is not None else None
        holds = None if number is None else dynamo.condition_on(variable, number)
        return None if holds is None else self.decide(holds)

    def reconstruct(self, codegen: Any) -> NoReturn:
        """Dynamo wants the iterator back as bytecode: the graph breaks inside the body."""
        self.refuse("the graph breaks inside the loop's body", codegen.tx)


def _ranges(values: Iterable[int]) -> list[int]:
    """``[0, 1, 2, 5] -> [0, 3, 5, 6]``: half-open ranges, flattened."""
    ranges: list[int] = []
    for value in sorted(values):
        if ranges and ranges[-1] == value:
            ranges[-1] = value + 1
        else:
            ranges += [value, value + 1]
    return ranges


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
        dim = keys.index(self) if self in keys else -1
        if dim < 0 or not isinstance(container, dynamo.TensorVariable) or not all(map(_is_full_slice, keys[:dim])):
            self.iterator.refuse("the expert's index is used in a way of indexing that is not understood", tx)
        selected = dynamo.call_in_graph(tx, markers.select, [_plain(container), dim, self.as_scalar(tx).as_tensor()])
        if self.ndim == 1:  # indexing with a row of one keeps a dimension of one
            selected = selected.call_method(tx, "unsqueeze", [dynamo.constant(tx, dim)], {})
        rest = keys[:dim] + [dynamo.full_slice()] * self.ndim + keys[dim + 1 :]
        return selected if all(map(_is_full_slice, rest)) else dynamo.index(tx, selected, rest)

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
