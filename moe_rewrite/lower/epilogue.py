"""Which elementwise steps of a row program can be computed where the product is, and how that is written.

A product gives a tile of columns. What follows acts on each entry alone as long as all operands are columns of products
of the same rows, or of vectors of the expert: ``silu(gate) * up`` with the two halves, or every other column, of one
product, or with two products. Each operand is then a view of a weight, ``weight[:, :, start::step]``.

The steps are computed in float32 and rounded where the program says so, as inductor does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.utils import _pytree as pytree

from moe_rewrite.loop import ExpertsLoop, Kind, Primitive, Step, Value
from moe_rewrite.lower.columns import SPLITS, taken

MOST = 2
"""How many products, and how many vectors, a kernel takes."""

_LARGEST = 64
"""How many operators and operands an epilogue has at most, those that are used twice counted twice."""

_DTYPES = {torch.float32: "", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_UNARY = ("silu", "sigmoid", "relu", "exp", "abs", "neg")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")
_SAME = ("alias", "clone", "detach")


@dataclasses.dataclass(frozen=True)
class Columns:
    """``value[..., start::step]``, ``width`` columns of it.

    Attributes:
        value: the weight of a product, ``[E, K, N]``, or a vector, ``[E, N]``.
        rows: what the weight is multiplied by; None for a vector.
    """

    value: Value
    rows: Value | None
    start: int
    step: int
    width: int

    def of(self, start: int, step: int, width: int) -> Columns:
        return dataclasses.replace(self, start=self.start + start * self.step, step=self.step * step, width=width)

    def columns(self) -> Iterator[Columns]:
        yield self


@dataclasses.dataclass(frozen=True)
class Apply:
    """An elementwise operator of ``lower/kernels`` on columns and numbers."""

    operator: str
    operands: tuple[Columns | Apply | float, ...]
    width: int

    def of(self, start: int, step: int, width: int) -> Apply:
        operands = tuple(one if isinstance(one, float) else one.of(start, step, width) for one in self.operands)
        return Apply(self.operator, operands, width)

    def columns(self) -> Iterator[Columns]:
        for operand in self.operands:
            if not isinstance(operand, float):
                yield from operand.columns()


Expression = Columns | Apply


@dataclasses.dataclass(frozen=True)
class Stage:
    """A value that one kernel computes.

    Attributes:
        result: the value.
        rows: the rows that are multiplied.
        products: what of the weights they are multiplied with.
        vectors: what of the vectors of the expert the epilogue uses.
        epilogue: the program, see ``lower/kernels``.
    """

    result: Value
    rows: Value
    products: tuple[Columns, ...]
    vectors: tuple[Columns, ...]
    epilogue: str


def stages(loop: ExpertsLoop) -> list[Stage]:
    """The largest parts of the row program that one kernel each computes. Each product is in one of them at most."""
    expressions, parts = _expressions(loop)
    users = _users(loop)
    found: list[Stage] = []
    taken: set[Value] = set()
    for step in reversed(loop.steps):
        expression = expressions.get(step.result)
        if isinstance(expression, Columns | Apply) and not parts[step.result] & taken:
            inside = parts[step.result]
            if all(users[value] <= inside for value in inside if value is not step.result):
                stage = _stage(step.result, expression)
                if stage is not None:
                    found.append(stage)
                    taken |= inside
    return found


def interleaved(products: tuple[Columns, ...]) -> Columns | None:
    """The columns that are those of two products in turn, if there are such."""
    if len(products) != 2:
        return None
    first, second = products
    step = first.step // 2
    if dataclasses.replace(first, start=first.start + step) != second or first.step % 2:
        return None
    return dataclasses.replace(first, step=step, width=2 * first.width)


def _stage(result: Value, expression: Expression) -> Stage | None:
    columns = list(dict.fromkeys(expression.columns()))
    # In the order in which they are in memory: even columns before odd ones.
    products = sorted((one for one in columns if one.rows is not None), key=lambda one: one.start)
    vectors = [one for one in columns if one.rows is None]
    if not products or len(products) > MOST or len(vectors) > MOST or len({one.rows for one in products}) > 1:
        return None
    rows = products[0].rows
    assert rows is not None
    if rows.example.dtype is not products[0].value.example.dtype:
        return None
    program = _write(expression, [*products, *vectors])
    return Stage(result, rows, tuple(products), tuple(vectors), program)


def _write(expression: Expression, columns: list[Columns]) -> str:
    words: dict[Expression, str] = {one: f"v{number}" for number, one in enumerate(columns)}
    lines: list[str] = []

    def word(operand: Expression | float) -> str:
        if isinstance(operand, float):
            return repr(operand)
        if operand not in words:
            assert isinstance(operand, Apply)
            lines.append(" ".join([operand.operator, *map(word, operand.operands)]))
            words[operand] = f"v{len(columns) + len(lines) - 1}"
        return words[operand]

    last = word(expression)
    assert not lines or last == f"v{len(columns) + len(lines) - 1}"
    return ";".join(lines)


def _users(loop: ExpertsLoop) -> dict[Value, set[Value | None]]:
    """By whose computation each value is used; None stands for what becomes of it after the row program."""
    users: dict[Value, set[Value | None]] = {step.result: set() for step in loop.steps}
    for step in loop.steps:
        for value in _values(step):
            users[value].add(step.result)
    ends = [one.accumulator for one in loop.combines] + [one.values for one in loop.combines]
    ends += [value for one in loop.combines for value in one.index]
    ends += [*loop.collected, *loop.carried, *(one.truth for one in loop.conditions)]
    for value in ends:
        users[value].add(None)
    return users


def _values(step: Step) -> Iterator[Value]:
    return (leaf for leaf in pytree.tree_leaves((step.args, step.kwargs)) if isinstance(leaf, Value))


_Found = Expression | list["Expression | None"] | None


def _expressions(loop: ExpertsLoop) -> tuple[dict[Value, _Found], dict[Value, set[Value]]]:
    """What per-row values are made of, where that is columns alone; and the per-row values that went into each."""
    found: dict[Value, _Found] = {}
    parts: dict[Value, set[Value]] = {}
    sizes: dict[Value, int] = {}
    for step in loop.steps:
        if step.result.kind is not Kind.PER_ROW:
            continue
        before = [] if step.op is Primitive.MATMUL else list(_values(step))  # rows are where a product begins
        size = 1 + sum(sizes.get(value, 0) for value in before)
        expression = _expression(step, found) if size <= _LARGEST else None
        if expression is not None:
            found[step.result] = expression
            sizes[step.result] = size
            parts[step.result] = {step.result}.union(*(parts.get(value, set()) for value in before))
    return found, parts


def _expression(step: Step, found: dict[Value, _Found]) -> _Found:
    example = step.result.example
    if step.op is Primitive.MATMUL:
        rows, weight, *bias = step.args
        product = _whole(weight, rows) if weight.example.dim() == 2 and example.dtype in _DTYPES else None
        vector = _whole(bias[0], None) if bias else None
        if product is None or (bias and vector is None):
            return None
        return product if vector is None else Apply("add", (product, vector), product.width)
    if step.op is Primitive.GATHER_EXPERT:
        value, rank = step.args
        is_vector = isinstance(value.example, torch.Tensor) and value.example.dim() == 1 and rank == 2
        return _whole(value, None) if is_vector else None
    source = found.get(step.args[0]) if step.args and isinstance(step.args[0], Value) else None
    if step.name == "getitem":
        return source[step.args[1]] if isinstance(source, list) else None
    if step.name in SPLITS:
        return _taken(step, source)
    if not isinstance(example, torch.Tensor) or example.dim() != 2 or example.dtype not in _DTYPES:
        return None
    if step.name == "slice":
        parts = _taken(step, source)
        return None if parts is None else parts[0]
    return _elementwise(step, found)


def _whole(value: Value, rows: Value | None) -> Columns | None:
    width = value.example.shape[-1]
    if value.kind is not Kind.PER_EXPERT or value.example.dtype not in _DTYPES or not isinstance(width, int):
        return None
    return Columns(value, rows, 0, 1, width)


def _taken(step: Step, source: _Found) -> list[Expression | None] | None:
    ranges = taken(step)
    if ranges is None or not isinstance(source, Columns | Apply):
        return None
    return [source.of(one.start, one.step, len(one)) for one in ranges]


def _elementwise(step: Step, found: dict[Value, _Found]) -> _Found:
    operands: list[Expression | float] = []
    width = step.result.example.shape[1]
    if not isinstance(width, int):
        return None
    for arg in step.args:
        if arg is None and step.name == "clamp":
            continue
        if isinstance(arg, bool) or not isinstance(arg, int | float | Value):
            return None
        operand = found.get(arg) if isinstance(arg, Value) else float(arg)
        if not isinstance(operand, Columns | Apply | float) or operand != operand:  # a bound of NaN gives NaN
            return None
        if not isinstance(operand, float) and operand.width != width:
            return None
        operands.append(operand)
    if not operands or isinstance(operands[0], float):
        return None
    return _operator(step, operands[0], operands[1:], width)


def _operator(step: Step, first: Expression, rest: list[Expression | float], width: int) -> _Found:
    name, kwargs = step.name, step.kwargs
    if name in _SAME or (name in ("_to_copy", "to") and set(kwargs) <= {"dtype"}):
        if rest:
            return None
        rounding = _DTYPES[step.result.example.dtype]
        narrows = rounding and step.args[0].example.dtype is not step.result.example.dtype
        return Apply(rounding, (first,), width) if narrows else first
    if name == "gelu" and not rest and set(kwargs) <= {"approximate"}:
        approximate = kwargs.get("approximate", "none")
        return Apply("gelu" if approximate == "none" else "gelu_tanh", (first,), width)
    if kwargs:
        return None
    if name in _UNARY and not rest:
        return Apply(name, (first,), width)
    if name in _BINARY and len(rest) == 1:
        return Apply(name, (first, rest[0]), width)
    if name == "pow" and rest == [2.0]:
        return Apply("square", (first,), width)
    if name in ("clamp", "clamp_min", "clamp_max"):
        return _clamp(step, first, width)
    return None


def _clamp(step: Step, first: Expression, width: int) -> _Found:
    bounds = [*step.args[1:], None][:2]
    if step.name == "clamp_max":
        bounds = [None, bounds[0]]
    if any(isinstance(bound, Value) for bound in bounds):
        return None
    for operator, bound in zip(("clamp_min", "clamp_max"), bounds, strict=True):
        if bound is not None:
            first = Apply(operator, (first, float(bound)), width)
    return first
