"""A loop over experts, traced once for a symbolic expert index.

A :class:`RolledIterator` stands in for the iterator of a ``for`` statement: instead of one item for each expert it
yields one symbolic item, so that the body is traced once. Python in the body may ask about the index
(``if expert == num_experts: continue``), whether there are rows (``if token.numel() == 0: continue``) or about a truth
that is a tensor (``if mask.any():``). The answer then has to hold for all iterations that the traced body stands for,
so a question that divides them makes the body be traced once more, for the others: a *path*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from moe_rewrite import markers
from moe_rewrite.capture import dynamo, dynamo_code, dynamo_modules, static
from moe_rewrite.capture.index import ExpertIndexVariable
from moe_rewrite.capture.lists import COMPREHENSION, CollectingList
from moe_rewrite.capture.numbers import NumberAfterLoop, carried_number, is_marked, marked
from moe_rewrite.capture.pieces import Piece, check_unchanged
from moe_rewrite.loop import Refusal
from moe_rewrite.memory import times_written
from moe_rewrite.recognise.provenance import LOCATION

MAX_PATHS = 8
"""How many different ways through one body are traced before the loop is refused."""


MAX_QUESTIONS = 16
"""How many questions about tensors one way through the body may answer: ``while tensor:`` would never end."""


@dataclasses.dataclass
class Path:
    """One way through the body of a loop, while it is being traced.

    Attributes:
        experts: the index values it stands for.
        answers: what was answered, in order, to the questions that are not about the index.
        asked: how many such questions there were so far.
        rows: whether Python was told that the expert has rows, as in ``loop_end``.
        index: the variable of the symbolic row.
        caches_fake_results: what Dynamo did before the body, see `dynamo.cache_fake_results`.
        is_some: what was supposed of each number of rows that was asked about: at least 1, or 0.
        number: the variable of the index as a Python number, once the body has asked for it.
        carried: the variable of each local that one iteration leaves to the next, at the start of the iteration.
        lists: what stands in for each list that the body appends to, by the name of the local variable.
        templates: what stands for the experts of each pack while this path is traced, by its id and the offset.
        pieces: the contiguous pieces of tensors that the body has taken.
        asked_pieces: the positions of their rows, by the numbers that they stand between.
    """

    experts: list[int]
    answers: list[bool]
    index: Any
    locals_at_start: dict[str, Any]
    symbols_at_start: frozenset[Any]
    scope: int
    caches_fake_results: bool
    state_at_start: dict[Any, Any]
    asked: int = 0
    rows: int = markers.ANY_ROWS
    is_some: dict[Any, bool] = dataclasses.field(default_factory=dict)
    number: Any = None
    carried: dict[str, Any] = dataclasses.field(default_factory=dict)
    lists: dict[str, CollectingList] = dataclasses.field(default_factory=dict)
    templates: dict[tuple[int, int], Any] = dataclasses.field(default_factory=dict)
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    asked_pieces: dict[Any, Any] = dataclasses.field(default_factory=dict)


class RolledIterator(dynamo.IteratorVariable):  # type: ignore[misc]
    """Yields one symbolic item for each way through the body.

    Args:
        hits: the variable of the tensor that the loop iterates, ``[u]`` or ``[u, 1]`` int64.
        values: the values that its rows can have.
        frame: the capture that this loop belongs to.
        path: path of the module that the loop stands in.
        location: the user's ``file:line`` of the loop.
        item: what the loop yields, by the symbolic index; None for a loop over ``hits`` itself.
        site: which ``for`` statement it is, of a loop whose length Python knows; None for a loop over hits.
        carries: the local variables that one iteration leaves to the next.
        lists: the local variables with a list that the body appends to.
        lines: the lines that the body stands in, ``file:line``, where ``site`` is known.
    """

    def __init__(
        self,
        hits: Any,
        values: range,
        frame: Any,
        path: str,
        location: str,
        item: Callable[[Any, RolledIterator], Any] | None = None,
        site: Any = None,
        carries: tuple[str, ...] = (),
        lists: tuple[str, ...] = (),
        lines: frozenset[str] = frozenset(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hits = hits
        self.values = values
        self.frame = frame
        self.module_path = path
        self.location = location
        self.item = item
        self.site = site
        self.carries = carries
        self.lists = lists
        self.lines = lines
        self.waiting: list[tuple[list[int], list[bool]]] = [(list(values), [])]
        self.paths_traced = 0
        self.path: Path | None = None
        self._made_unknown_sizes = False

    def refuse(self, reason: str, tx: Any = None) -> NoReturn:
        """Leave the loop as stock Dynamo has it. ``tx``: where in the body the reason stands."""
        where = "" if tx is None else f", at {dynamo.user_location(tx)}"
        self.frame.refuse(self, Refusal(self.module_path, self.location, f"{reason}{where}"))
        raise AssertionError("unreachable")

    @property
    def has_unknown_sizes(self) -> bool:
        """Whether the body made sizes that only run time knows, as the selection of an expert's rows does."""
        if self.path is not None:
            born = dynamo.unbacked_symbols(self.frame.tx.output) - self.path.symbols_at_start
            index = () if self.path.number is None else dynamo.symbols_of(self.path.number)
            self._made_unknown_sizes |= bool(born.difference(index))
        return self._made_unknown_sizes

    @property
    def has_frozen_experts(self) -> bool:
        """Whether some experts' parameters require a gradient and others' do not."""
        return self.path is not None and any(template.is_mixed for template in self.path.templates.values())

    def python_type(self) -> type:
        iterator_type: type = type(iter(()))  # what iter(tensor) is in eager
        return iterator_type

    # Dynamo before 2.13 calls `next_variable`, later ones `tp_iternext_impl`.
    def tp_iternext_impl(self, tx: Any) -> Any:
        return self.next_variable(tx)

    def next_variable(self, tx: Any) -> Any:
        if not dynamo_code.is_for_loop_over(tx, self):
            self.refuse("the hits are iterated by something other than a plain `for` statement", tx)
        if self.path is not None:
            self._close_path(tx, self.path)
        elif self.site is None:  # of a loop over hits this is the first that is seen of its body
            self.carries = static.carries(tx) or ()
        if not self.waiting:
            self.frame.loops.remove(self)
            dynamo.stop_iteration(tx)
        return self._open_path(tx)

    def _open_path(self, tx: Any) -> Any:
        if self.paths_traced == MAX_PATHS:
            self.refuse(f"the body takes more than {MAX_PATHS} different ways", tx)
        if dynamo.has_forward_gradients():  # markers have none: tangents would be taken for zeros
            self.refuse("forward-mode gradients are computed of the loop", tx)
        self.paths_traced += 1
        if self not in self.frame.loops:
            if self.frame.loops:
                self.frame.loops[-1].refuse("a loop over experts stands inside another one", tx)
            self.frame.loops.append(self)
        row = dynamo.call_in_graph(tx, markers.loop_begin, [self.hits, self.paths_traced - 1])
        row.as_proxy().node.meta[LOCATION] = self.location
        index = ExpertIndexVariable.wrap(row, self)
        experts, answers = self.waiting.pop()
        known = dynamo.unbacked_symbols(tx.output)
        scope = dynamo.enter_scope()
        carried = {}
        for name in self.carries:
            start = dynamo.local_variables(tx)[name]
            start = carried_number(tx, start) or start
            carried[name] = dynamo.call_in_graph(tx, markers.carry_in, [index.as_tensor(), start])
            node = carried[name].as_proxy().node
            node.meta[markers.TIMES_WRITTEN] = times_written(node.args[1])
            if is_marked(start):
                marked(carried[name])
            dynamo.set_local_variable(tx, name, carried[name])
        lists = {name: CollectingList(self, _list_at(tx, name)) for name in self.lists}
        for name, stand_in in lists.items():
            _put_list(tx, name, stand_in)
        self.path = Path(
            experts=experts,
            answers=answers,
            index=index,
            locals_at_start=dynamo.local_variables(tx),
            symbols_at_start=known,
            scope=scope,
            # The body's sizes are new, so nothing that is kept is ever found. To keep it takes a third of the tracing.
            caches_fake_results=dynamo.cache_fake_results(tx.output, False),
            state_at_start=dynamo.python_state(tx.output, scope),
            carried=carried,
            lists=lists,
        )
        return index if self.item is None else self.item(tx, self)

    def _close_path(self, tx: Any, path: Path) -> None:
        dynamo.cache_fake_results(tx.output, path.caches_fake_results)
        if dynamo.is_under_inference_mode(tx, path.index.as_proxy().node):
            # AOTAutograd takes no graph that changes something in place there.
            self.refuse("`torch.inference_mode` is switched inside of the compiled function, around the loop or in it")
        check_unchanged(self, path.pieces)
        before, now = path.locals_at_start, dynamo.local_variables(tx)
        changed = [name for name in {**before, **now} if before.get(name) is not now.get(name)]
        for name in changed:
            if name in self.carries or name in self.lists or not dynamo_code.is_live(tx, name):
                continue
            if not dynamo.is_same_memory(before.get(name), now.get(name)):
                self.refuse(
                    f"local variable `{name}` is changed by one iteration and read by the next, or after the loop", tx
                )
            dynamo.set_local_variable(tx, name, before[name])  # `out += y`: the tensor has changed, in place
        if dynamo.python_state(tx.output, path.scope) != path.state_at_start:
            self.refuse("the body changes a Python object, or draws a random number, once in every iteration")
        dynamo.leave_scope(path.scope)
        self._made_unknown_sizes = self.has_unknown_sizes
        self.path = None
        index = path.index.as_tensor()
        for name, carry in path.carried.items():
            end = now.get(name)
            if not dynamo.is_alike_tensor(carry, end):
                self.refuse(f"local variable `{name}` is of another shape or dtype after an iteration", tx)
            after = dynamo.call_in_graph(tx, markers.carry_out, [index, carry, end])
            if is_marked(carry):
                after = marked(after) if self.waiting else NumberAfterLoop(self)
            dynamo.set_local_variable(tx, name, after)
        left = [stand_in.appended[0] for stand_in in path.lists.values() if stand_in.appended]
        left += [now[name] for name in path.carried if now[name] is not path.carried[name]]
        if dynamo_modules.any_share_memory(left):
            self.refuse("what an iteration leaves behind lies in the same memory twice", tx)
        collected = {name: stand_in.collect(tx, path) for name, stand_in in path.lists.items()}
        dynamo.call_in_graph(tx, markers.loop_end, [index, _ranges(path.experts), path.rows])
        for name, stand_in in path.lists.items():
            alone = not self.waiting and self.paths_traced == 1
            if stand_in.is_of_rows:
                alone = not stand_in.has_rows_already
            if _list_at(tx, name, now) is not stand_in or (collected[name] is not None and not alone):
                self.refuse(f"not every iteration appends to the list `{name}` in the same way", tx)
            _put_list(tx, name, stand_in.original)
            stand_in.end()
            if collected[name] is not None:
                stand_in.extend(tx, collected[name])
        for template in path.templates.values():
            template.end(tx)

    # --- questions ---------------------------------------------------------------------------------------------------

    def decide(self, holds: Callable[[int], bool]) -> bool:
        """Answer a question about the index so that the answer holds for all index values of the path."""
        path = self.path
        if path is None:
            self.refuse("the expert's index is used after its iteration")
        yes = [value for value in path.experts if holds(value)]
        no = [value for value in path.experts if not holds(value)]
        if yes and no:
            path.experts, other = (yes, no) if len(yes) > len(no) else (no, yes)
            self.waiting.append((other, path.answers[: path.asked]))
            if path.number is not None:
                dynamo.narrow(path.number, min(path.experts), max(path.experts))
            return path.experts is yes
        return bool(yes)

    def decide_number(self, variable: Any) -> bool | None:
        """Answer a condition on the index as a Python number; None where ``variable`` is no such condition."""
        number = self.path.number if self.path is not None else None
        holds = None if number is None else dynamo.condition_on(variable, number)
        return None if holds is None else self.decide(holds)

    def answer(self) -> bool:
        """Answer a question that is not about the index: "yes" on this path, "no" on another one."""
        path = self.path
        assert path is not None
        if path.asked == MAX_QUESTIONS:
            self.refuse("the body asks about values of tensors over and over")
        if path.asked == len(path.answers):
            self.waiting.append((list(path.experts), [*path.answers, False]))
            path.answers.append(True)
        path.asked += 1
        return path.answers[path.asked - 1]

    def decide_rows(self, variable: Any, output: Any) -> bool | None:
        """Answer a question about how many rows there are: suppose some, or suppose none.

        None where ``variable`` is something else, or where that does not answer it. A loop over the experts that were
        hit has no iteration without rows.
        """
        path = self.path
        if path is None:
            return None
        index = dynamo.symbols_of(path.number) if path.number is not None else frozenset()
        sizes = [s for s in dynamo.unknown_sizes(variable, output, path.symbols_at_start) if s not in index]
        for symbol in sizes:
            if symbol not in path.is_some:
                path.is_some[symbol] = self.site is None or self.answer()
            if path.rows != markers.NO_ROWS:
                path.rows = markers.SOME_ROWS if path.is_some[symbol] else markers.NO_ROWS
        return dynamo.truth_of_sizes(variable, output, path.is_some) if sizes else None

    def is_index(self, variable: Any) -> bool:
        """Whether ``variable`` is the loop's index, as a tensor or as a number."""
        if isinstance(variable, ExpertIndexVariable):
            return variable.iterator is self
        number = self.path.number if self.path is not None else None
        return number is not None and dynamo.is_same_number(variable, number)

    def offset_of(self, variable: Any) -> int | None:
        """``b`` where ``variable`` is the loop's index plus ``b``; None for others, and where it may be negative."""
        if self.is_index(variable):
            return 0
        steps = None if self.path is None or self.path.number is None else dynamo.steps_of(variable, self.path.number)
        if steps is None or self.path is None or steps[0] != 1 or min(self.path.experts) + steps[1] < 0:
            return None
        return steps[1]

    def select(self, tx: Any, container: Any, dim: int, offset: int) -> Any:
        """``container.select(dim, index + offset)`` in the graph."""
        assert self.path is not None
        index = self.path.index.as_scalar(tx).as_tensor()
        if not offset:
            return dynamo.call_in_graph(tx, markers.select, [container, dim, index])
        return dynamo.call_in_graph(tx, markers.select_shifted, [container, dim, index, offset])

    def is_made_of_index(self, variable: Any) -> bool:
        """Whether ``variable`` is the loop's index, or a number that depends on nothing else, such as ``index + 1``."""
        number = self.path.number if self.path is not None else None
        return self.is_index(variable) or (number is not None and dynamo.depends_only_on(variable, number))

    def reconstruct(self, codegen: Any) -> NoReturn:
        """Dynamo wants the iterator back as bytecode: the graph breaks inside the body."""
        self.refuse("the graph breaks inside the loop's body", codegen.tx)


def _list_at(tx: Any, name: str, variables: dict[str, Any] | None = None) -> Any:
    """The list that is called ``name``, or that the comprehension makes."""
    if name == COMPREHENSION:
        return dynamo_code.below_iterator(tx)
    found = (dynamo.local_variables(tx) if variables is None else variables).get(name)
    return None if found is None else dynamo_modules.realized(found)  # an argument becomes a list when it is read


def _put_list(tx: Any, name: str, variable: Any) -> None:
    if name == COMPREHENSION:
        dynamo_code.set_below_iterator(tx, variable)
    else:
        dynamo.set_local_variable(tx, name, variable)


def _ranges(values: Iterable[int]) -> list[int]:
    """``[0, 1, 2, 5] -> [0, 3, 5, 6]``: half-open ranges, flattened."""
    ranges: list[int] = []
    for value in sorted(values):
        if ranges and ranges[-1] == value:
            ranges[-1] = value + 1
        else:
            ranges += [value, value + 1]
    return ranges
