"""The typed description of one experts loop: all that an experts backend needs to know.

A loop is *select* (which (token, slot) pairs belong to an expert), *rows* (a program that acts on each selected row
alone) and *combine* (the rows added back at their tokens). The row program is a list of :class:`Step` over
:class:`Value`, written for one expert; an experts backend runs it for all pairs at once.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
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
    EXPERT_INDEX = "expert_index"
    """``EXPERT_INDEX()``: the index of the expert, a 0-dim int64 tensor."""
    SELECT_EXPERT = "select_expert"
    """``SELECT_EXPERT(input, dim)``: ``input.select(dim, expert)``."""
    COORDINATE = "coordinate"
    """``COORDINATE(axis)``: where the row stands along an axis of the expert ids (its token, its slot). ``[rows]``."""
    ROW_COUNT = "row_count"
    """``ROW_COUNT()``: how many rows there are."""
    MATMUL = "matmul"
    """``MATMUL(rows, weight)``: rows ``[rows, K]`` times the weight ``[K, N]`` of the row's expert."""
    GATHER_EXPERT = "gather_expert"
    """``GATHER_EXPERT(value, rank)``: for each row the value of its expert, as ``[rows, ...]`` with ``rank`` dims."""


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
class Combine:
    """``accumulator.index_add_(0, index, rows)``.

    Attributes:
        accumulator: position of the accumulator among the loop's inputs.
        index: where in dimension 0 of the accumulator each row is added, ``[rows]`` integers.
        rows: what is added, ``[rows, ...]``, in the accumulator's dtype.
        token_axis: the axis of the expert ids that ``index`` runs along; None where it is some other index.
    """

    accumulator: int
    index: Value
    rows: Value
    token_axis: int | None


@dataclasses.dataclass(frozen=True)
class TopKDispatch:
    """Every entry of an integer tensor of expert ids is one pair.

    Attributes:
        expert_ids: the ids, any shape (``[T, K]`` as a rule). Entries outside the loop's experts are no pairs.
        visited: which experts the loop visits, ``[n]`` bool; None where it visits every expert that has a pair.
        in_range: whether each id is known to be one of the loop's experts.
    """

    expert_ids: Value
    visited: Value | None
    in_range: bool

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = self.expert_ids.example.shape
        return shape

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"top-k of [{shape}] expert ids" + ("" if self.in_range else ", some may be of no expert here")


@dataclasses.dataclass(frozen=True)
class ExpertsLoop:
    """One loop over experts, proved to be select, rows and combine.

    Attributes:
        path: path of the module the loop stands in, ``"model.layers.0.mlp.experts"``; ``""`` for the root.
        location: the user's ``file:line`` of the loop.
        experts: the expert indices that the loop runs for.
        num_experts: one more than the largest of them; the leading size of every per-expert value.
        dispatch: which (token, slot) pairs there are, and the expert of each.
        steps: the program for the rows of one expert, in order.
        combines: what happens to its results.
        inputs: the nodes of the graph whose values are the inputs.
    """

    path: str
    location: str
    experts: tuple[range, ...]
    num_experts: int
    dispatch: TopKDispatch
    steps: tuple[Step, ...]
    combines: tuple[Combine, ...]
    inputs: tuple[fx.Node, ...] = dataclasses.field(repr=False)

    @property
    def top_k(self) -> int | torch.SymInt | None:
        """How many experts a token has, where the ids are ``[T, K]``; None for ids of another rank."""
        shape = self.dispatch.shape
        return shape[1] if len(shape) == 2 else None

    @property
    def num_pairs(self) -> int | torch.SymInt:
        """How many (token, slot) pairs there are, those of no expert included."""
        return self.dispatch.expert_ids.example.numel()

    def matmuls(self) -> Iterator[Step]:
        """The products of rows with per-expert weights."""
        return (step for step in self.steps if step.op is Primitive.MATMUL)

    def accumulator(self, combine: Combine) -> Any:
        """The fake value of a combine's accumulator."""
        for step in self.steps:
            if step.op is Primitive.INPUT and step.args[0] == combine.accumulator:
                return step.result.example
        raise AssertionError(f"input {combine.accumulator} has no step")

    def summary(self) -> str:
        """The row program in one line."""
        shown = []
        for step in self.steps:
            if step.result.kind is not Kind.PER_ROW or step.op in (Primitive.COORDINATE, Primitive.GATHER_EXPERT):
                continue
            if step.name in ("getitem", "view", "unsqueeze", "squeeze", "t", "alias"):
                continue
            if step.op is Primitive.MATMUL:
                shown.append(f"matmul[{' x '.join(map(str, step.args[1].example.shape))}]")
            else:
                shown.append("gather" if step.name == "index" else step.name)
        return " > ".join(shown)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"experts loop {self.path or '<root>'} ({self.location})",
                f"  {self.num_experts} experts, {self.dispatch}",
                *(f"    {step}" for step in self.steps),
                *(f"    input {c.accumulator}.index_add_(0, {c.index}, {c.rows})" for c in self.combines),
            ]
        )


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
