"""From a retraced body to a row program: gives each value its kind and each operator its step, or refuses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_rewrite import markers
from moe_rewrite.loop import Kind, Place, Primitive, Step, Value
from moe_rewrite.nodes import is_supposed
from moe_rewrite.recognise import promotion, rules
from moe_rewrite.recognise.convolution import product_of_rows
from moe_rewrite.recognise.effects import Effects, Special
from moe_rewrite.recognise.leading import PERMUTES, RESHAPES, Behind, operator_behind, rearranged
from moe_rewrite.recognise.lookups import LOOKUPS, check_embedding, is_masked, looked_up
from moe_rewrite.recognise.membership import Form, is_index_number, meanings
from moe_rewrite.recognise.products import MATMULS, matmul
from moe_rewrite.recognise.refused import Refused
from moe_rewrite.recognise.selection import Selection, merged_dims

aten = torch.ops.aten


class RowProgram:
    """The row program of one body, built operator by operator.

    Args:
        graph: the body on ATen.
        inputs: the nodes of Dynamo's graph that its placeholders stand for.
        differentiated: whether gradients may be taken of what the body computes.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[fx.Node], differentiated: bool) -> None:
        self.graph = graph
        self.inputs = inputs
        self.differentiated = differentiated
        self.meanings = meanings(graph, inputs)
        self.steps: list[Step] = []
        self.selection: Selection | None = None
        self.conditions: list[tuple[fx.Node, bool]] = []
        self.values: dict[fx.Node, Any] = {}
        self.places: dict[Value, Place] = {}
        self._columns: dict[tuple[fx.Node, Any], Value] = {}
        self.effects = Effects(self)
        for node in graph.nodes:
            self.values[node] = self._visit(node)

    def value(self, node: fx.Node) -> Value:
        """The value that a node of the retraced body stands for."""
        value = self.values[node]
        assert isinstance(value, Value)
        return value

    # --- one node --------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            position = sum(isinstance(step.op, Primitive) and step.op is Primitive.INPUT for step in self.steps)
            return self.step(node, Kind.INVARIANT, Primitive.INPUT, position)
        if node.op == "output":
            return None
        if node.op == "get_attr" and isinstance(constant := _attribute(node), torch.Tensor):
            value = Value(node.name, Kind.INVARIANT, constant)
            self.steps.append(Step(value, Primitive.CONSTANT, (constant,)))
            return value
        if node.op != "call_function":
            raise Refused(f"a {node.op} node in the body", node)
        self.effects.check_reads(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._python_function(node)
        if node.target is aten._assert_scalar.default:
            return None
        if node.target in (markers.loop_begin, markers.number):
            return self.step(node, Kind.PER_EXPERT, Primitive.EXPERT_INDEX)
        if node.target is markers.condition:
            self.conditions.append((node.args[1], bool(node.args[2])))  # type: ignore[arg-type]
            return None
        if node.target in (markers.carry_in, markers.carry_out, markers.collect):
            return self.effects.marker(node)
        if node.target is markers.select or (node.target is aten.select.int and is_index_number(node.args[2])):
            return self._select(node)
        if node.target is markers.select_shifted:
            if self.effects.is_accumulator(node):
                raise Refused("the part of another expert is written to", node)
            return self._select(node)
        if node.target is aten.nonzero.default:
            return self._nonzero(node)
        if self._is_coordinate(node):
            return self._coordinate(node)
        if node.target is aten.sym_size.int:
            return self._size(node)
        return self._operator(node, node.target)

    def step(self, node: fx.Node, kind: Kind, op: Any, *args: Any, **kwargs: Any) -> Value:
        """Add a step whose result is the value of ``node``."""
        example = node.meta.get("val")
        known = isinstance(example, torch.Tensor) and not free_unbacked_symbols(example) and 0 not in example.shape
        if kind is Kind.PER_ROW and known:
            # The body's shapes may hold a number in the place of the row count, and all pairs are more rows than that.
            raise Refused("the number of rows is taken for one that is known", node)
        if isinstance(example, torch.Tensor) and any(map(is_supposed, example.shape[kind is Kind.PER_ROW :])):
            raise Refused("a size that only run time knows is taken for another one", node)
        value = Value(node.name, kind, node.meta.get("val"))
        self.steps.append(Step(value, op, args, kwargs))
        return value

    def extra_step(self, name: str, kind: Kind, example: Any, op: Any, *args: Any, **kwargs: Any) -> Value:
        """Add a step that no node of the body stands for."""
        value = Value(f"{name}_{len(self.steps)}", kind, example)
        self.steps.append(Step(value, op, args, kwargs))
        return value

    def taken_apart(self, together: Value, wrap: Callable[[Value], Any]) -> tuple[Any, ...]:
        """The results of a step that has several."""
        parts = enumerate(together.example)
        return tuple(
            wrap(self.extra_step("part", together.kind, example, operator.getitem, together, i)) for i, example in parts
        )

    def _python_function(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda n: self.values[n])
        if any(isinstance(arg, Special) for arg in args):
            return self.effects.read(node)
        if node.target is operator.getitem:
            if not isinstance(args[0], Value):
                return args[0][args[1]]
            return self.step(node, args[0].kind, node.target, *args)
        kinds = {arg.kind for arg in args if isinstance(arg, Value)}
        if kinds <= {Kind.INVARIANT}:
            return self.step(node, Kind.INVARIANT, node.target, *args)
        if not node.users or all(user.target is aten._assert_scalar.default for user in node.users):
            return None  # a comparison that only an assertion on the row count used
        if (
            Kind.PER_ROW not in kinds
            and node.target in _INTEGER_ARITHMETIC
            and isinstance(node.meta["val"], (int, torch.SymInt))
        ):
            return self.step(node, Kind.PER_EXPERT, node.target, *args)
        raise Refused("the body computes with the number of rows, or with the expert's index as a number", node)

    def _select(self, node: fx.Node) -> Any:
        source, dim = self.values[node.args[0]], node.args[1]  # type: ignore[index]
        if self.effects.is_accumulator(node):
            return self.effects.part(node)
        if isinstance(source, Special):
            return self.effects.read(node)
        if source.kind is not Kind.INVARIANT:
            raise Refused("something that depends on the expert is indexed by the expert", node)
        offset = node.args[3:] if node.target is markers.select_shifted else ()
        return self.step(node, Kind.PER_EXPERT, Primitive.SELECT_EXPERT, source, dim % source.example.dim(), *offset)

    # --- which rows ------------------------------------------------------------------------------------------------

    def _nonzero(self, node: fx.Node) -> None:
        """``nonzero`` of a mask: where a loop's rows come from."""
        mask = node.args[0]
        assert isinstance(mask, fx.Node)
        value = self.values[mask]
        if not isinstance(value, Value) or value.kind is Kind.PER_ROW:
            raise Refused("some of an expert's rows are selected among them", node)
        self._select_rows(mask, node)

    def _select_rows(self, mask: fx.Node, node: fx.Node) -> Selection:
        if self.value(mask).kind is not Kind.PER_EXPERT:
            raise Refused("the selected rows do not depend on the expert", node)
        mask, _ = self._behind_view(mask)
        selection = Selection.by(mask, self.meanings.get(mask))
        if selection.ids is not None and self.value(selection.ids).kind is not Kind.INVARIANT:
            selection = Selection.by(mask, None)
        if self.selection is not None and not self.selection.is_same(selection):
            raise Refused("the body selects rows in two different ways", node)
        self.selection = self.selection or selection
        return selection

    def _behind_view(self, mask: fx.Node) -> tuple[fx.Node, list[list[int]]]:
        """The mask that ``mask`` is a flattened view of, if its meaning is known, and its dimensions for each."""
        found = merged_dims(mask)
        meaning = None if found is None else self.meanings.get(found[0])
        if found is not None and meaning is not None and meaning.form is Form.SELECTED:
            return found
        return mask, [[dim] for dim in range(mask.meta["val"].dim())]

    def _nonzero_behind(self, node: Any) -> fx.Node | None:
        """The ``nonzero`` that ``node`` is, or is the columns of."""
        while isinstance(node, fx.Node) and node.args:
            if node.target is aten.nonzero.default:
                return node
            if node.target not in (*_TAKES_A_COLUMN, *_DROPS_THE_COLUMN, *_TRANSPOSES, operator.getitem):
                return None
            node = node.args[0]
        return None

    def _is_coordinate(self, node: fx.Node) -> bool:
        """Whether a node is one of the columns of ``nonzero(mask)``, or all of them."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        if node.target in _TAKES_A_COLUMN and source.target in _TRANSPOSES:
            source = source.args[0]  # type: ignore[assignment]
        elif node.target not in (*_TAKES_A_COLUMN, *_DROPS_THE_COLUMN, *_TRANSPOSES):
            return False
        return isinstance(source, fx.Node) and source.target is aten.nonzero.default

    def _coordinate(self, node: fx.Node) -> Any:
        """Columns of ``nonzero(mask)``: ``unbind(rows, 1)`` gives all of them, ``select(rows, 1, j)`` one."""
        nonzero, source, example = self._nonzero_behind(node), node.args[0], node.meta["val"]
        assert nonzero is not None and isinstance(source, fx.Node)
        mask, columns = nonzero.args[0], nonzero.meta["val"].shape[1]
        if node.target in _TRANSPOSES:
            return None  # asked for a column, it gives one
        if node.target in _DROPS_THE_COLUMN:
            if rules.squeezes(node, 0):
                raise Refused(rules.SQUEEZED, node)
            if columns != 1 or example.dim() != 1:
                raise Refused("the table of selected positions is used as a whole", node)
            return self.column(mask, 0, example)
        dim = (node.args[1] if len(node.args) > 1 else 0) % 2  # type: ignore[operator]
        if dim != (0 if source.target in _TRANSPOSES else 1):
            raise Refused("single rows are picked out of an expert's rows", node)
        if node.target is aten.unbind.int:
            return tuple(self.column(mask, j, one) for j, one in enumerate(example))
        return self.column(mask, node.args[2] % columns, example)  # type: ignore[operator]

    def column(self, mask: Any, dim: int, example: Any) -> Value:
        """Where the rows that ``mask`` selects stand along one of its dimensions."""
        base, dims = self._behind_view(mask)
        first, *rest = dims[dim]
        position = self._position(first, example)
        for inner in rest:
            size = base.meta["val"].shape[inner]
            if not isinstance(size, int):
                size = self.extra_step("size", Kind.INVARIANT, size, aten.sym_size.int, self.value(base), inner)
            outer = self.extra_step("position", Kind.PER_ROW, example, aten.mul.Tensor, position, size)
            within = self._position(inner, example)
            position = self.extra_step("position", Kind.PER_ROW, example, aten.add.Tensor, outer, within)
        if rest:
            assert self.selection is not None
            axes = [self.selection.axes[inner] for inner in dims[dim]]
            if None not in axes and axes == list(range(axes[0], axes[0] + len(axes))):  # type: ignore[arg-type, operator]
                self.places[position] = Place(range(axes[0], axes[0] + len(axes)))  # type: ignore[arg-type, operator]
        return position

    def _position(self, dim: int, example: Any) -> Value:
        """Where the selected rows stand along a dimension of the mask that they are selected by."""
        assert self.selection is not None
        axis = self.selection.axes[dim]
        known = self._columns.get((axis, dim))
        if known is None:
            known = self.extra_step("position", Kind.PER_ROW, example, Primitive.COORDINATE, axis)
            self._columns[axis, dim] = known
            if axis is not None:
                self.places[known] = Place(range(axis, axis + 1))
        return known

    def columns_of(self, mask: fx.Node, rows: Any) -> list[Value]:
        """The positions of the rows that a mask selects, one value for each of its dimensions.

        Args:
            mask: the mask, as it is used for an index.
            rows: the fake tensor of what is selected; its first dimension is that of the rows.
        """
        self._select_rows(mask, mask)
        example = rows.new_empty(rows.shape[0], dtype=torch.int64)
        return [self.column(mask, dim, example) for dim in range(mask.meta["val"].dim())]

    def _size(self, node: fx.Node) -> Any:
        source, dim = node.args
        if dim == 0 and self._nonzero_behind(source) is not None:
            return self.step(node, Kind.PER_ROW, Primitive.ROW_COUNT)
        value = self.values[source]  # type: ignore[index]
        if isinstance(value, Value) and value.kind is Kind.PER_ROW and dim == 0:
            return self.step(node, Kind.PER_ROW, Primitive.ROW_COUNT)
        if not isinstance(value, Value):  # what was read of an accumulator has the rows of its index
            if not free_unbacked_symbols(node.meta["val"]):
                raise Refused("the body reads the accumulator that it adds to", node)
            return self.step(node, Kind.PER_ROW, Primitive.ROW_COUNT)
        return self.step(node, Kind.INVARIANT, node.target, value, dim)

    # --- operators -------------------------------------------------------------------------------------------------

    def _operator(self, node: fx.Node, op: torch._ops.OpOverload) -> Any:
        tables = (source for source in node.all_input_nodes if source.meta.get("val") is not None)
        if any(self.values[source] is None for source in tables):
            raise Refused("the table of selected positions is used as a whole", node)
        if op in _PICKS:  # how many, torch supposes of where two such meet; eager may broadcast them
            raise Refused(f"`{op}` gives a size that only run time knows", node)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.values[n])  # type: ignore[misc]
        given = rules.arguments(op, args, kwargs)
        if any(isinstance(leaf, Special) for leaf in rules.leaves(given)):
            return self.effects.operator(node, op, given)
        if op._schema.is_mutable and any(isinstance(leaf, Behind) for leaf in rules.leaves(given)):
            raise Refused(f"`{op}` changes a tensor in place whose rows are not in the first dimension", node)
        if op._schema.is_mutable:
            return self.effects.mutation(node, op, given)
        if rules.is_random(op, given):
            raise Refused("random numbers in the body: each expert draws its own in eager", node)
        if any(isinstance(leaf, Behind) for leaf in rules.leaves(given)):
            return operator_behind(self, node, op, given)
        kinds = {value.kind for value in rules.tensors(given)}
        if op is aten.index.Tensor and self.effects.is_accumulator(node.args[0]):
            return self.effects.reading(node, given)
        if op is aten.index.Tensor and is_masked(node):
            return looked_up(self, node, op, given)
        if Kind.PER_ROW in kinds:
            return self.on_rows(node, op, given, args, kwargs)
        if Kind.PER_EXPERT in kinds:
            return self.per_expert(node, op, given, args, kwargs)
        return self.step(node, Kind.INVARIANT, op, *args, **kwargs)

    def per_expert(self, node: fx.Node, op: Any, given: dict[str, Any], args: Any, kwargs: Any) -> Value:
        """The step of an operator on what each expert has."""
        numbers = any(value.kind is Kind.PER_EXPERT and rules.is_number(value) for value in rules.tensors(given))
        lifted = rules.taking_tensors(op) if numbers else op
        if lifted is not None and rules.is_pointwise(lifted):
            lifted, args, kwargs = self._elementwise(node, lifted, given, args, kwargs)
        if lifted is None or not rules.has_form_over_experts(lifted):
            raise Refused(f"`{op}` of a value that each expert has", node)
        check_embedding(self, node, lifted, given)
        return self.step(node, Kind.PER_EXPERT, lifted, *args, **kwargs)

    def _elementwise(self, node: fx.Node, op: Any, given: dict[str, Any], args: Any, kwargs: Any) -> tuple[Any, ...]:
        """An elementwise operator and its arguments, some of them cast, where values of the expert get more entries."""
        if op is aten.masked_fill.Tensor and given["value"].kind is Kind.PER_EXPERT:  # it takes no entries
            op, args, kwargs = aten.where.self, (given["mask"], given["value"], given["self"]), {}
        casts = promotion.casts(op, given, node.meta["val"])

        def cast(value: Any) -> Any:
            if not isinstance(value, Value) or value not in casts:
                return value
            to, example = casts[value], value.example
            is_tensor = isinstance(example, torch.Tensor)
            cast_example = example.to(to) if is_tensor else node.meta["val"].new_empty((), dtype=to)
            return self.extra_step("promoted", value.kind, cast_example, aten._to_copy.default, value, dtype=to)

        return op, tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    def on_rows(self, node: fx.Node, op: Any, given: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """The step of an operator on rows."""
        if op in MATMULS:
            return matmul(self, node, op, given)
        if op is aten.convolution.default:
            return product_of_rows(self, node, given)
        if op in LOOKUPS:
            return looked_up(self, node, op, given)
        if _depends_on_row_count(node.meta["val"]):
            moves = op in (*RESHAPES, *PERMUTES) and isinstance(given["self"], Value)
            behind = rearranged(self, node, op, given["self"]) if moves else None
            if behind is not None:
                return behind
            raise Refused(f"`{op}` pairs the rows of an expert with each other", node)
        numbers = {value.kind for value in rules.tensors(given) if rules.is_number(value)}
        if Kind.PER_ROW in numbers and op.overloadpacket not in rules.RESHAPES:
            raise Refused("the body computes with the number of rows", node)
        if rules.is_pointwise(op):
            return self.pointwise(node, op, given, args, kwargs, node.meta["val"])
        if op.overloadpacket in _CONSTANTS and all(isinstance(size, int) for size in node.meta["val"].shape):
            fill = given.get("fill_value", _CONSTANTS[op.overloadpacket])
            if not isinstance(fill, Value):
                example = node.meta["val"]
                like = {"dtype": example.dtype, "device": example.device}
                return self.step(node, Kind.INVARIANT, aten.full.default, list(example.shape), fill, **like)
        if Kind.PER_EXPERT in numbers:
            raise Refused("the body computes with the expert's index as a number", node)
        rows = given.get("self", given.get("tensors"))
        if isinstance(rows, Value) and rows.kind is not Kind.PER_ROW:
            raise Refused(f"`{op}` of something that is not rows, with rows", node)
        reason = rules.rowwise_refusal(op, given, node.meta["val"])
        if reason is not None:
            raise Refused(reason, node)
        return self.step(node, Kind.PER_ROW, op, *args, **kwargs)

    def pointwise(
        self, node: fx.Node, op: Any, given: dict[str, Any], args: Any, kwargs: Any, example: torch.Tensor
    ) -> Value:
        """The step of an elementwise operator, with what has no rows aligned with those that ``example`` has."""
        rank = example.dim()
        if any(value.kind is Kind.PER_EXPERT and rules.is_number(value) for value in rules.tensors(given)):
            lifted = rules.taking_tensors(op)
            if lifted is None or node.meta["val"].dtype in (torch.float16, torch.bfloat16):
                raise Refused("the body computes with the expert's index as a number", node)
            op = lifted
        op, args, kwargs = self._elementwise(node, op, given, args, kwargs)

        def aligned(value: Any) -> Any:
            if not isinstance(value, Value):
                return value
            if value.kind is Kind.PER_EXPERT:
                return self.gathered(value, rank, node)
            if not isinstance(value.example, torch.Tensor):
                return value
            if value.kind is Kind.PER_ROW:
                if value.example.dim() != rank:
                    raise Refused(f"`{op}` broadcasts rows against rows", node)
                return value
            if rank and value.example.dim() == rank and not rules.is_one(value.example.shape[0]):
                raise Refused(f"`{op}` combines the rows, by their order, with something that is not rows", node)
            return value

        aligned_kwargs = {name: aligned(value) for name, value in kwargs.items()}
        result = Value(node.name, Kind.PER_ROW, example)
        self.steps.append(Step(result, op, tuple(map(aligned, args)), aligned_kwargs))
        self._follow_place(result, op, given)
        return result

    def _follow_place(self, result: Value, op: Any, given: dict[str, Any]) -> None:
        """``pair // K`` and ``pair % K`` of positions that run along a multiple of ``K``."""
        place, by = self.places.get(given.get("self")), given.get("other")  # type: ignore[arg-type]
        if op in (aten._to_copy.default, aten.clone.default) and place is not None:
            if result.example.dtype in (torch.int64, torch.int32):
                self.places[result] = place
            return
        divides = op.overloadpacket in (aten.floor_divide, aten.remainder) or (
            op.overloadpacket is aten.div and given.get("rounding_mode") in ("floor", "trunc")
        )
        if place is None or not divides or not isinstance(by, int) or by < 1 or self.selection is None:
            return
        _, own, _ = place.extents(self.selection.shape)
        if not rules.same_size(own % by, 0):
            return
        if op.overloadpacket is aten.remainder:
            self.places[result] = Place(place.axes, place.divisor, by)
        elif place.modulus is None:
            self.places[result] = Place(place.axes, place.divisor * by)

    def gathered(self, value: Value, rank: int, node: fx.Node) -> Value:
        """The value of each row's expert, its dimensions aligned with rows of ``rank`` dimensions."""
        shape: Any = value.example.shape if isinstance(value.example, torch.Tensor) else ()
        if rank and len(shape) == rank and not rules.is_one(shape[0]):
            raise Refused("a value of the expert is combined with its rows by their order", node)
        return self.extra_step(
            f"{value.name}_of_row", Kind.PER_ROW, value.example, Primitive.GATHER_EXPERT, value, rank
        )


_CONSTANTS = {aten.new_zeros: 0, aten.new_ones: 1, aten.new_full: None}
_PICKS = (
    *(aten.masked_select.default, aten.repeat_interleave.Tensor),
    *(aten._unique.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
)
_TAKES_A_COLUMN = (aten.unbind.int, aten.select.int)
_DROPS_THE_COLUMN = (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.view.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
_INTEGER_ARITHMETIC = (operator.add, operator.sub, operator.mul)


def _attribute(node: fx.Node) -> Any:
    """What a ``get_attr`` node stands for."""
    return getattr(node.graph.owning_module, str(node.target), None)


def _depends_on_row_count(result: Any) -> bool:
    """Whether a dimension other than the first has a size that is known only at run time."""
    results = result if isinstance(result, (tuple, list)) else [result]
    sizes = [size for value in results if isinstance(value, torch.Tensor) for size in value.shape[1:]]
    return any(isinstance(size, torch.SymInt) and free_unbacked_symbols(size) for size in sizes)
