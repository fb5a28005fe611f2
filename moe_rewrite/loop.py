"""The typed description of one experts loop: all that an experts backend needs to know.

A loop is *select* (which (token, slot) pairs belong to an expert), *rows* (a program that acts on each selected row
alone) and *combine* (the rows added back at their tokens). The row program is a list of :class:`Step` over
:class:`Value`, written for one expert; an experts backend runs it for all pairs at once.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx


class Kind(enum.Enum):
    """How a value in the body of a loop depends on the expert."""

    INVARIANT = "invariant"
    """The same in every iteration."""
    PER_EXPERT = "per expert"
    """One for each expert. Over all experts: a leading dimension of ``num_experts``."""
    PER_ROW = "per row"
    """One for each selected row, in dimension 0. Over all experts: dimension 0 has one entry for each pair."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value in the body of a loop.

    Attributes:
        name: for printing; unique in its program.
        kind: how it depends on the expert.
        example: a fake tensor (or number) of the shape and dtype it has for *one* expert.
    """

    name: str
    kind: Kind
    example: Any

    def __repr__(self) -> str:
        return self.name


class Primitive(enum.Enum):
    """What a step does that is no ATen operator on the values as they stand."""

    INPUT = "input"
    """``INPUT(position)``: one of the loop's inputs."""
    CONSTANT = "constant"
    """``CONSTANT(tensor)``: a tensor whose values are written in the body, as in ``torch.tensor(1.5)``."""
    EXPERT_INDEX = "expert_index"
    """``EXPERT_INDEX()``: the index of the expert, a 0-dim int64 tensor. ``EXPERT_INDEX(first)``: more by that."""
    SELECT_EXPERT = "select_expert"
    """``SELECT_EXPERT(input, dim)``: ``input.select(dim, expert)``. ``SELECT_EXPERT(input, dim, offset)``:
    ``input.select(dim, expert + offset)``, not negative."""
    COORDINATE = "coordinate"
    """``COORDINATE(axis)``: where the row stands along an axis of the expert ids (its token, its slot), or of the mask
    where that is what says which rows there are; 0 for an axis of None. ``[rows]``."""
    ROW_COUNT = "row_count"
    """``ROW_COUNT()``: how many rows there are."""
    MATMUL = "matmul"
    """``MATMUL(rows, weight)``: rows ``[rows, K]`` times the weight ``[K, N]`` of the row's expert.
    ``MATMUL(rows, weight, bias)`` adds the bias ``[N]`` of the expert before it rounds."""
    GATHER_EXPERT = "gather_expert"
    """``GATHER_EXPERT(value, rank)``: for each row the value of its expert, as ``[rows, ...]`` with ``rank`` dims."""
    INDEX_EXPERT = "index_expert"
    """``INDEX_EXPERT(value, indices)``: ``value[indices]`` of the value of the row's expert."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """``result = op(*args, **kwargs)``; ``args`` hold values and constants."""

    result: Value
    op: torch._ops.OpOverload | Primitive | Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The operator's plain name, ``mm`` for ``aten.mm.default``."""
        if isinstance(self.op, Primitive):
            return self.op.value
        packet = getattr(self.op, "overloadpacket", None)
        return str(packet.__name__ if packet is not None else self.op.__name__)

    def __str__(self) -> str:
        args = [repr(arg) for arg in self.args] + [f"{key}={value!r}" for key, value in self.kwargs.items()]
        return f"{self.result.name} = {self.name}({', '.join(args)})  # {self.result.kind.value}"


@dataclasses.dataclass(frozen=True)
class Place:
    """What an index tells of a row's position among the flattened expert ids: ``position // after % own``.

    Attributes:
        axes: the axes of the expert ids that the index runs along, as one; they are side by side.
        divisor: what the position along them is divided by.
        modulus: what the rest of that is taken of; None where it is not.
    """

    axes: range
    divisor: int = 1
    modulus: int | None = None

    def extents(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """``(before, own, after)`` of ids of ``shape``: their positions are ``[before, own, after]``, flattened."""
        along = math.prod(shape[self.axes.start : self.axes.stop])
        after = math.prod(shape[self.axes.stop :]) * self.divisor
        if self.modulus is not None:
            rest = along // (self.divisor * self.modulus)
            return math.prod(shape[: self.axes.start]) * rest, self.modulus, after
        return math.prod(shape[: self.axes.start]), along // self.divisor, after


class Write(enum.Enum):
    """What a combine does to the accumulator."""

    ADD = "add"
    """Every row is added."""
    ADD_LAST = "add last"
    """Of the rows of one expert with one index the last is added: ``out[index] = out[index] + rows``."""
    SET = "set"
    """Rows take the place of what was there. The largest expert writes last, and of its rows the last."""


@dataclasses.dataclass(frozen=True)
class Combine:
    """How one result of an iteration comes into an accumulator.

    Attributes:
        accumulator: the accumulator, an input of the loop or a view of one.
        index: per-row integers ``[rows]``, one for each of the accumulator's first dimensions, that say where the rows
            go; one per-expert index ``[n]`` where the values are per expert too; empty where the values are of the
            accumulator's own shape, or of one expert's part of it.
        values: what is combined: ``[rows, ...]``, or per expert.
        write: whether values are added or take a place.
        place: what the index tells of the position among the expert ids; None where that is not known.
        expert_dim: the dimension of the accumulator along which each expert has a part of its own, which the values are
            for; None where there is none.
        carry: which of the loop's carried values the accumulator is; None where it is changed in place.
        alpha: a number that the values are multiplied by, in the dtype that they are added in.
        from_zero: whether each entry of the accumulator is known to be 0, and not -0.0, before the loop.
    """

    accumulator: Value
    index: tuple[Value, ...]
    values: Value
    write: Write = Write.ADD
    place: Place | None = None
    expert_dim: int | None = None
    carry: int | None = None
    alpha: int | float | complex = 1
    from_zero: bool = False

    @property
    def rows(self) -> Value:
        """What is combined."""
        return self.values

    @property
    def token_axis(self) -> int | None:
        """The axis of the expert ids that the index runs along; None where it is some other index."""
        place = self.place
        simple = place is not None and len(place.axes) == 1 and place.divisor == 1 and place.modulus is None
        return place.axes.start if place is not None and simple else None

    def __str__(self) -> str:
        where = ", ".join(map(str, self.index)) or (":" if self.expert_dim is None else f"expert at {self.expert_dim}")
        assign = {Write.ADD: "+=", Write.ADD_LAST: "+= last", Write.SET: "="}[self.write]
        times = "" if self.alpha == 1 else f"{self.alpha} * "
        return f"{self.accumulator}[{where}] {assign} {times}{self.values}"


@dataclasses.dataclass(frozen=True)
class TopKDispatch:
    """Every entry of an integer tensor of expert ids is one pair.

    Attributes:
        expert_ids: the ids, any shape (``[T, K]`` as a rule). Entries outside the loop's experts are no pairs.
        in_range: whether each id is known to be one of the loop's experts.
        distinct: how many entries, one after the other among the flattened ids, are known to differ; 1 where nothing is
            known. The ids of a ``topk`` differ within a token.
        merged: where an expert has one row for all entries that agree in this, such as the token; None where it has one
            for each entry.
    """

    expert_ids: Value
    in_range: bool
    distinct: int = 1
    merged: Place | None = None

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = self.expert_ids.example.shape
        return shape

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"top-k of [{shape}] expert ids" + ("" if self.in_range else ", some may be of no expert here")


@dataclasses.dataclass(frozen=True)
class MaskDispatch:
    """Every entry that is set in a mask of each expert is one pair. How many there are is known only at run time.

    Attributes:
        mask: the mask of an expert, per expert, any shape and dtype: what is not 0 is set.
    """

    mask: Value

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = self.mask.example.shape
        return shape

    def __str__(self) -> str:
        return f"any mask of [experts, {', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class EveryToken:
    """No rows are selected: each expert takes what there is."""

    def __str__(self) -> str:
        return "each takes every token"


@dataclasses.dataclass(frozen=True)
class Condition:
    """The body is what the loop does for the experts for which ``bool(truth)`` is ``taken``.

    Attributes:
        truth: one number or truth, per expert.
        taken: which truth it is.
    """

    truth: Value
    taken: bool


@dataclasses.dataclass(frozen=True)
class Error:
    """Something that eager raises an error for.

    Attributes:
        truth: whether it is so, one truth.
        message: what the error says.
    """

    truth: Value
    message: str


@dataclasses.dataclass(frozen=True)
class ExpertsLoop:
    """One loop over experts, proved to be select, rows and combine.

    Attributes:
        path: path of the module the loop stands in, ``"model.layers.0.mlp.experts"``; ``""`` for the root.
        location: the user's ``file:line`` of the loop.
        experts: the expert indices that the loop runs for.
        num_experts: one more than the largest of them; the leading size of every per-expert value.
        dispatch: which rows an expert has.
        steps: the program for the rows of one expert, in order.
        combines: what happens to its results.
        inputs: the nodes of the graph whose values are the inputs.
        visited: which experts the loop visits, ``[n]``: those that are not 0. None where it visits every expert that
            has a row, or simply every one.
        conditions: what else says for which experts the body holds.
        carried: the start of each value that one iteration leaves to the next.
        collected: the per-expert values that the loop collects, one after the other.
        errors: for what the loop raises an error before it is done. It is checked where that needs no reading from the
            device: on a CPU.
    """

    path: str
    location: str
    experts: tuple[range, ...]
    num_experts: int
    dispatch: TopKDispatch | MaskDispatch | EveryToken
    steps: tuple[Step, ...]
    combines: tuple[Combine, ...]
    inputs: tuple[fx.Node, ...] = dataclasses.field(repr=False)
    visited: Value | None = None
    conditions: tuple[Condition, ...] = ()
    carried: tuple[Value, ...] = ()
    collected: tuple[Value, ...] = ()
    errors: tuple[Error, ...] = ()

    @property
    def top_k(self) -> int | torch.SymInt | None:
        """How many experts a token has, where the ids are ``[T, K]``; None for another dispatch."""
        dispatch = self.dispatch
        return dispatch.shape[1] if isinstance(dispatch, TopKDispatch) and len(dispatch.shape) == 2 else None

    @property
    def num_pairs(self) -> int | torch.SymInt | None:
        """How many (token, slot) pairs there are, those of no expert included; None where only the run will tell."""
        return self.dispatch.expert_ids.example.numel() if isinstance(self.dispatch, TopKDispatch) else None

    def root(self, value: Value) -> Value:
        """What an accumulator is, or is a view of: one of the loop's inputs, or the start of a carried value."""
        return root_of(value, {step.result: step for step in self.steps})

    def matmuls(self) -> Iterator[Step]:
        """The products of rows with per-expert weights."""
        return (step for step in self.steps if step.op is Primitive.MATMUL)

    def accumulator(self, combine: Combine) -> Any:
        """The fake value of a combine's accumulator."""
        return combine.accumulator.example

    @property
    def device(self) -> torch.device:
        """The device that the loop computes on."""
        results = [*(combine.accumulator for combine in self.combines), *self.carried, *self.collected]
        device: torch.device = results[0].example.device
        return device

    def summary(self) -> str:
        """The program in one line: what is done to rows, or for each expert where there are none."""
        kind = Kind.PER_EXPERT if isinstance(self.dispatch, EveryToken) else Kind.PER_ROW
        shown = []
        for step in self.steps:
            if step.result.kind is not kind or step.op in (Primitive.COORDINATE, Primitive.GATHER_EXPERT):
                continue
            if step.op in (Primitive.SELECT_EXPERT, Primitive.EXPERT_INDEX):
                continue
            if step.name in ("getitem", "view", "unsqueeze", "squeeze", "t", "alias"):
                continue
            if step.op is Primitive.MATMUL:
                shown.append(f"matmul[{' x '.join(map(str, step.args[1].example.shape))}]")
            else:
                shown.append("gather" if step.name in ("index", "index_expert") else step.name)
        return " > ".join(shown)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"experts loop {self.path or '<root>'} ({self.location})",
                f"  {self.num_experts} experts, {self.dispatch}",
                *(f"    {step}" for step in self.steps),
                *(f"    {combine}" for combine in self.combines),
                *(f"    collect {value}" for value in self.collected),
            ]
        )


def root_of(value: Value, steps: Mapping[Value, Step]) -> Value:
    """What ``value`` is a view of, down to what no view made; ``steps`` by their results."""
    step = steps[value]
    while is_view(step.op) and isinstance(step.args[0], Value):
        value = step.args[0]
        step = steps[value]
    return value


def is_view(op: Any) -> bool:
    """Whether the result of an operator lies in the memory of its first argument."""
    if isinstance(op, torch._ops.OpOverload):
        returns = op._schema.returns
        return not op._schema.is_mutable and any(result.alias_info is not None for result in returns)
    return op is operator.getitem  # of what `split` gives


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a loop is left as it is.

    Attributes:
        path: path of the module the loop stands in.
        location: the user's ``file:line`` of the loop.
        reason: what stands in the way.
        node: the operator that stands in the way, where it is one.
    """

    path: str
    location: str
    reason: str
    node: str = ""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        at = f" (at `{self.node}`)" if self.node else ""
        return f"{self.path or '<root>'}: {self.reason}{at} ({self.location})"
