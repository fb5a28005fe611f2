"""From a retraced body to a row program: gives each value its kind and each operator its step, or refuses."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_rewrite import markers
from moe_rewrite.loop import Combine, Kind, Primitive, Step, Value
from moe_rewrite.recognise import rules
from moe_rewrite.recognise.membership import Form, Meaning, is_index_number, meanings

aten = torch.ops.aten


class Refused(Exception):
    """The body cannot be proved rewritable. ``node`` is what stands in the way."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


class RowProgram:
    """The row program of one body, built operator by operator.

    Args:
        graph: the body on ATen. Its placeholders are the loop's inputs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.meanings = meanings(graph)
        self.steps: list[Step] = []
        self.combines: list[Combine] = []
        self.rows_of: Meaning | None = None
        self.rows_node: fx.Node | None = None
        self._values: dict[fx.Node, Any] = {}
        self._accumulators: set[fx.Node] = set()
        for node in graph.nodes:
            self._values[node] = self._visit(node)
        for accumulator in self._accumulators:
            if len(accumulator.users) != 1:
                raise Refused("the body reads the accumulator that it adds to", accumulator)

    def value(self, node: fx.Node) -> Value:
        """The value that a node of the retraced body stands for."""
        value = self._values[node]
        assert isinstance(value, Value)
        return value

    # --- one node --------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            position = sum(isinstance(step.op, Primitive) and step.op is Primitive.INPUT for step in self.steps)
            return self._step(node, Kind.INVARIANT, Primitive.INPUT, position)
        if node.op == "output":
            return None
        if node.op != "call_function":
            raise Refused(f"a {node.op} node in the body", node)
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._python_function(node)
        if node.target is aten._assert_scalar.default:
            return None
        if node.target is markers.loop_begin:
            return self._step(node, Kind.PER_EXPERT, Primitive.EXPERT_INDEX)
        if node.target is markers.select:
            return self._select(node)
        if node.target is markers.number:
            return self._step(node, Kind.PER_EXPERT, Primitive.EXPERT_INDEX)
        if node.target is aten.select.int and is_index_number(node.args[2]):
            return self._select(node)
        if node.target is aten.nonzero.default:
            return self._select_rows(node)
        if self._is_coordinate(node):
            return self._coordinate(node)
        if node.target is aten.sym_size.int:
            return self._size(node)
        return self._operator(node, node.target)

    def _step(self, node: fx.Node, kind: Kind, op: Any, *args: Any, **kwargs: Any) -> Value:
        value = Value(node.name, kind, node.meta.get("val"))
        self.steps.append(Step(value, op, args, kwargs))
        return value

    def _python_function(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda n: self._values[n])
        if node.target is operator.getitem:
            if not isinstance(args[0], Value):
                return args[0][args[1]]
            return self._step(node, args[0].kind, node.target, *args)
        if any(isinstance(arg, Value) and arg.kind is not Kind.INVARIANT for arg in args):
            if not node.users or all(user.target is aten._assert_scalar.default for user in node.users):
                return None  # a comparison that only an assertion on the row count used
            raise Refused("the body computes with the number of rows, or with the expert's index as a number", node)
        return self._step(node, Kind.INVARIANT, node.target, *args)

    def _select(self, node: fx.Node) -> Any:
        source, dim = self._values[node.args[0]], node.args[1]  # type: ignore[index]
        if source.kind is not Kind.INVARIANT:
            raise Refused("something that depends on the expert is indexed by the expert", node)
        return self._step(node, Kind.PER_EXPERT, Primitive.SELECT_EXPERT, source, dim % source.example.dim())

    # --- which rows ------------------------------------------------------------------------------------------------

    def _select_rows(self, node: fx.Node) -> None:
        """``nonzero`` of a mask: where a loop's rows come from."""
        meaning = self.meanings.get(node.args[0])  # type: ignore[arg-type]
        if meaning is None or meaning.form is not Form.SELECTED:
            if meaning is not None and meaning.form in (Form.COUNT, Form.ANY):
                return None  # the hits that the loop iterates
            raise Refused("the selected rows are not proved to be those whose expert id is the loop's index", node)
        if self.rows_of is not None and self.rows_of != meaning:
            raise Refused("the body selects rows in two different ways", node)
        rank = self._ids(meaning, node).meta["val"].dim()
        if sorted(label for label in meaning.labels if isinstance(label, int)) != list(range(rank)):
            raise Refused("the mask does not have every axis of the expert ids once", node)
        self.rows_of, self.rows_node = meaning, self.rows_node or node
        return None

    def _ids(self, meaning: Meaning, node: fx.Node) -> fx.Node:
        if meaning.ids is None:
            raise Refused("the rows do not depend on expert ids", node)
        return meaning.ids

    def _nonzero_behind(self, node: fx.Node) -> fx.Node | None:
        """The ``nonzero`` whose columns ``node`` is made of."""
        while node.args and isinstance(node.args[0], fx.Node):
            if node.target is aten.nonzero.default:
                return node
            if node.target not in (aten.unbind.int, aten.select.int, operator.getitem):
                return None
            node = node.args[0]
        return None

    def _is_coordinate(self, node: fx.Node) -> bool:
        """Whether a node is one of the columns of ``nonzero(mask)``, or all of them."""
        if node.target in (aten.unbind.int, aten.select.int):
            return self._nonzero_behind(node) is not None
        source = node.args[0] if node.args else None
        return (
            node.target in (aten.squeeze.dim, aten.view.default)  # the only column
            and isinstance(source, fx.Node)
            and source.target is aten.nonzero.default
            and node.meta["val"].dim() == 1
        )

    def _coordinate(self, node: fx.Node) -> Any:
        """A column of ``nonzero(mask)``: ``unbind(rows, 1)`` gives all of them, ``select(rows, 1, j)`` one."""
        nonzero = self._nonzero_behind(node)
        assert nonzero is not None
        meaning = self.meanings[nonzero.args[0]]  # type: ignore[index]
        if node.target in (aten.squeeze.dim, aten.view.default):
            return self._column(node.name, meaning.labels[0], node.meta["val"])
        if node.args[1] not in (1, -1):
            raise Refused("single rows are picked out of an expert's rows", node)
        if node.target is aten.unbind.int:
            examples = node.meta["val"]
            return tuple(
                self._column(f"{node.name}_{j}", label, example)
                for j, (label, example) in enumerate(zip(meaning.labels, examples, strict=True))
            )
        return self._column(node.name, meaning.labels[node.args[2]], node.meta["val"])  # type: ignore[index]

    def _column(self, name: str, label: Any, example: Any) -> Value:
        value = Value(name, Kind.PER_ROW, example)
        self.steps.append(Step(value, Primitive.COORDINATE, (label,)))
        return value

    def _size(self, node: fx.Node) -> Any:
        source, dim = node.args
        if self._nonzero_behind(source) is not None and dim == 0:  # type: ignore[arg-type]
            return self._step(node, Kind.PER_ROW, Primitive.ROW_COUNT)
        value = self._values[source]  # type: ignore[index]
        if value.kind is Kind.PER_ROW and dim == 0:
            return self._step(node, Kind.PER_ROW, Primitive.ROW_COUNT)
        return self._step(node, Kind.INVARIANT, node.target, value, dim)

    # --- operators -------------------------------------------------------------------------------------------------

    def _operator(self, node: fx.Node, op: torch._ops.OpOverload) -> Any:
        if any(source.target is aten.nonzero.default for source in node.all_input_nodes):
            raise Refused("the table of selected positions is used as a whole", node)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self._values[n])  # type: ignore[misc]
        given = rules.arguments(op, args, kwargs)
        if op._schema.is_mutable:
            return self._mutation(node, op, given)
        if rules.is_random(op):
            raise Refused("random numbers in the body: each expert draws its own in eager", node)
        values = _tensors(given)
        if any(value.kind is Kind.PER_EXPERT and _is_number(value) for value in values):
            meaning = self.meanings.get(node)
            if meaning is None or meaning.form is not Form.SELECTED:
                raise Refused("the body computes with the expert's index as a number", node)
            return Value(node.name, Kind.PER_EXPERT, node.meta["val"])  # a mask, of which only the meaning is used
        kinds = {value.kind for value in values}
        if Kind.PER_ROW in kinds:
            return self._on_rows(node, op, given, args, kwargs)
        if Kind.PER_EXPERT in kinds:
            if not (rules.is_pointwise(op) or op.overloadpacket in rules.ROWWISE or op in _MATMULS):
                raise Refused(f"`{op}` of a value that each expert has", node)
            return self._step(node, Kind.PER_EXPERT, op, *args, **kwargs)
        return self._step(node, Kind.INVARIANT, op, *args, **kwargs)

    def _on_rows(self, node: fx.Node, op: Any, given: dict[str, Any], args: Any, kwargs: Any) -> Any:
        if op in _MATMULS:
            return self._matmul(node, op, given)
        if op in (aten.index.Tensor, aten.index_select.default, aten.embedding.default):
            return self._gather(node, op, given, args)
        if _depends_on_row_count(node.meta["val"]):
            raise Refused(f"`{op}` pairs the rows of an expert with each other", node)
        if (
            any(value.kind is Kind.PER_ROW and _is_number(value) for value in _tensors(given))
            and op.overloadpacket not in rules.RESHAPES
        ):
            raise Refused("the body computes with the number of rows", node)
        if rules.is_pointwise(op):
            return self._pointwise(node, op, args, kwargs)
        rows = given.get("self", given.get("tensors"))
        if isinstance(rows, Value) and rows.kind is not Kind.PER_ROW:
            raise Refused(f"`{op}` of something that is not rows, with rows", node)
        reason = rules.rowwise_refusal(op, given, node.meta["val"])
        if reason is not None:
            raise Refused(reason, node)
        return self._step(node, Kind.PER_ROW, op, *args, **kwargs)

    def _pointwise(self, node: fx.Node, op: Any, args: Any, kwargs: Any) -> Value:
        rank = node.meta["val"].dim()

        def aligned(value: Any) -> Any:
            if not isinstance(value, Value) or not isinstance(value.example, torch.Tensor):
                return value
            if value.kind is Kind.PER_ROW:
                if value.example.dim() != rank:
                    raise Refused(f"`{op}` broadcasts rows against rows", node)
                return value
            if value.kind is Kind.PER_EXPERT:
                return self._gathered(value, rank, node)
            if rank and value.example.dim() == rank and not _is_one(value.example.shape[0]):
                raise Refused(f"`{op}` combines the rows, by their order, with something that is not rows", node)
            return value

        return self._step(node, Kind.PER_ROW, op, *map(aligned, args), **{k: aligned(v) for k, v in kwargs.items()})

    def _gathered(self, value: Value, rank: int, node: fx.Node) -> Value:
        """The value of each row's expert, its dimensions aligned with rows of ``rank`` dimensions."""
        if rank and value.example.dim() == rank and not _is_one(value.example.shape[0]):
            raise Refused("a value of the expert is combined with its rows by their order", node)
        result = Value(f"{value.name}_of_row_{len(self.steps)}", Kind.PER_ROW, value.example)
        self.steps.append(Step(result, Primitive.GATHER_EXPERT, (value, rank)))
        return result

    def _matmul(self, node: fx.Node, op: Any, given: dict[str, Any]) -> Value:
        left, right = given.get("mat1", given["self"]), given["mat2"]
        if left.kind is not Kind.PER_ROW or right.kind is Kind.PER_ROW:
            raise Refused(f"`{op}` contracts or moves the rows of an expert", node)
        if op is aten.mm.default:
            return self._product(node, left, right)
        if given["beta"] != 1 or given["alpha"] != 1:
            raise Refused(f"`{op}` with factors", node)
        product = self._product(node, left, right, f"{node.name}_product")
        bias = given["self"]
        if bias.kind is Kind.PER_EXPERT:
            bias = self._gathered(bias, 2, node)
        elif bias.kind is Kind.INVARIANT and bias.example.dim() == 2 and not _is_one(bias.example.shape[0]):
            raise Refused(f"`{op}` adds something to the rows by their order", node)
        return self._step(node, Kind.PER_ROW, aten.add.Tensor, product, bias)

    def _product(self, node: fx.Node, rows: Value, weight: Value, name: str | None = None) -> Value:
        op = Primitive.MATMUL if weight.kind is Kind.PER_EXPERT else aten.mm.default
        value = Value(name or node.name, Kind.PER_ROW, node.meta["val"])
        self.steps.append(Step(value, op, (rows, weight)))
        return value

    def _gather(self, node: fx.Node, op: Any, given: dict[str, Any], args: Any) -> Value:
        """``source[token]``: each row reads at its own position of something that is no row."""
        source = given["self"] if "self" in given else given["weight"]
        indices = given["indices"] if op is not aten.index_select.default else [given["index"]]
        indices = indices if isinstance(indices, (list, tuple)) else [indices]
        if source.kind is not Kind.INVARIANT:
            raise Refused(f"`{op}` reads an expert's rows, or a value of the expert, at other positions", node)
        positions = [index for index in indices if index is not None]
        if any(
            index.kind is not Kind.PER_ROW or index.example.dim() != 1 or index.example.dtype is torch.bool
            for index in positions
        ):
            raise Refused(f"`{op}` with an index that is not one position for each row", node)
        if op is aten.index_select.default and given["dim"] % source.example.dim() != 0:
            raise Refused(f"`{op}` puts the rows in another dimension than the first", node)
        if op is aten.index.Tensor and indices[0] is None:
            raise Refused(f"`{op}` puts the rows in another dimension than the first", node)
        if op is aten.index.Tensor and any(index is None for index in indices[: len(positions)]):
            raise Refused(f"`{op}` with indices that are not side by side", node)
        return self._step(node, Kind.PER_ROW, op, *args)

    # --- effects ---------------------------------------------------------------------------------------------------

    def _in_place(self, node: fx.Node, op: torch._ops.OpOverload, target: fx.Node) -> Value:
        """``rows.mul_(2)`` is ``rows * 2`` from there on, where nothing else sees the memory of ``rows``."""
        functional = getattr(getattr(aten, op.overloadpacket.__name__.removesuffix("_"), None), op._overloadname, None)
        value = self._values[target]
        if functional is None or not rules.is_pointwise(functional) or not isinstance(value, Value):
            raise Refused(f"`{op}` changes a tensor in place, other than by adding rows to an accumulator", node)
        if value.kind is not Kind.PER_ROW or _may_alias(target) or any(map(_may_alias, target.users)):
            raise Refused(f"`{op}` changes a tensor in place that something else may see", node)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self._values[n])  # type: ignore[misc]
        result: Value = self._on_rows(node, functional, rules.arguments(functional, args, kwargs), args, kwargs)
        self._values[target] = result
        return result

    def _mutation(self, node: fx.Node, op: Any, given: dict[str, Any]) -> Any:
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if op is aten.index_add_.default:
            index, rows, adds = given["index"], given["source"], given["alpha"] == 1 and given["dim"] == 0
        elif op is aten.index_put_.default and given["accumulate"] and len(given["indices"]) == 1:
            index, rows, adds = given["indices"][0], given["values"], True
        else:
            return self._in_place(node, op, target)
        if target.op != "placeholder":
            raise Refused("rows are added to something that the body itself made", node)
        if node.users:
            raise Refused("the body reads the accumulator that it adds to", node)
        if not adds or index.kind is not Kind.PER_ROW or rows.kind is not Kind.PER_ROW or index.example.dim() != 1:
            raise Refused("what is added to the accumulator is not one row for each position", node)
        accumulator, added = given["self"].example, rows.example
        if accumulator.dtype is torch.bool:
            raise Refused("rows are added to an accumulator of truth values", node)
        if added.dim() != accumulator.dim() or not all(map(rules._same_size, added.shape[1:], accumulator.shape[1:])):
            raise Refused("what is added to the accumulator does not have the shape of its rows", node)
        self._accumulators.add(target)
        position = next(step.args[0] for step in self.steps if step.result is self._values[target])
        self.combines.append(Combine(position, index, rows, self._token_axis(index, given["self"])))

    def _token_axis(self, index: Value, accumulator: Value) -> int | None:
        step = next(step for step in self.steps if step.result is index)
        axis = step.args[0] if step.op is Primitive.COORDINATE else None
        if not isinstance(axis, int) or self.rows_of is None or self.rows_of.ids is None:
            return None
        length = self.rows_of.ids.meta["val"].shape[axis]
        return axis if rules._same_size(length, accumulator.example.shape[0]) else None


_MATMULS = (aten.mm.default, aten.addmm.default)


def _tensors(given: Any) -> list[Value]:
    """All values among an operator's arguments, those in lists included."""
    if isinstance(given, Value):
        return [given]
    if isinstance(given, dict):
        given = list(given.values())
    return [value for item in given for value in _tensors(item)] if isinstance(given, (list, tuple)) else []


def _may_alias(node: fx.Node) -> bool:
    """Whether the result of a node may lie in the memory of its input, unless it is the in-place result itself."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def _depends_on_row_count(result: Any) -> bool:
    """Whether a dimension other than the first has a size that is known only at run time."""
    results = result if isinstance(result, (tuple, list)) else [result]
    sizes = [size for value in results if isinstance(value, torch.Tensor) for size in value.shape[1:]]
    return any(isinstance(size, torch.SymInt) and free_unbacked_symbols(size) for size in sizes)


def _is_number(value: Value) -> bool:
    return not isinstance(value.example, (torch.Tensor, tuple, list))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
