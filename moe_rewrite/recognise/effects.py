"""What an iteration leaves behind: rows added to an accumulator, values carried to the next iteration, lists.

An accumulator is changed in place; a carried value is replaced by the sum of itself and something. Both may be changed
in ways that are understood, and not be read otherwise: what is read would depend on the experts before.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx

from moe_rewrite import markers
from moe_rewrite.loop import Combine, Kind, Place, Value, Write, root_of
from moe_rewrite.memory import MemoryRegion, written_by
from moe_rewrite.recognise import rules
from moe_rewrite.recognise.membership import is_index_number
from moe_rewrite.recognise.origins import origin_of
from moe_rewrite.recognise.refused import Refused

if TYPE_CHECKING:
    from moe_rewrite.recognise.rows import RowProgram

aten = torch.ops.aten


class Special:
    """What a node stands for that is no value of the row program: it depends on the iterations before."""


@dataclasses.dataclass(frozen=True)
class Carried(Special):
    """What the iterations before left in a local variable. ``version``: after how many changes in this iteration."""

    carry: int
    version: int


@dataclasses.dataclass(frozen=True)
class Reading(Special):
    """The accumulator at some positions, or an expert's part of it; to be added to and put back.

    ``effects``: how many there were before it was read; None for a part, which is no copy.
    """

    target: Target
    index: tuple[Value, ...]
    effects: int | None


@dataclasses.dataclass(frozen=True)
class Sum(Special):
    """Such a reading and what is added to it. ``effects``: how many there were before the reading was made."""

    reading: Reading
    added: Value
    effects: int


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that may be changed.

    Attributes:
        accumulator: the accumulator, or a view of it.
        expert_dim: the dimension along which the part of an expert is meant; None where the whole is.
        carry: the carried value it is; None for an accumulator.
    """

    accumulator: Value
    expert_dim: int | None = None
    carry: int | None = None


@dataclasses.dataclass
class Carry:
    """A local variable that one iteration leaves to the next."""

    start: Value
    node: fx.Node
    version: int = 0
    in_place: bool = False
    replaced: bool = False


class Effects:
    """The effects of one body.

    Args:
        program: the row program that is being built.

    Attributes:
        combines: what comes into which accumulator.
        carries: the local variables that one iteration leaves to the next.
        collected: what is appended to lists.
        results: the carries (by number) and the collected values, in the order of the markers that give them.
    """

    def __init__(self, program: RowProgram) -> None:
        self.program = program
        self.combines: list[Combine] = []
        self.carries: list[Carry] = []
        self.collected: list[tuple[Value, int]] = []
        self.results: list[tuple[str, int]] = []
        self._views: dict[fx.Node, Target | None] = {}
        for node in program.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                if written_by(node) != [node.args[0]]:
                    raise Refused(f"`{node.target}` changes other tensors than its first argument in place", node)
                root = _root(node.args[0])
                if root.op == "placeholder":
                    self._views[root] = None  # becomes a target once its value is known

    # --- reads -----------------------------------------------------------------------------------------------------

    def is_accumulator(self, node: Any) -> bool:
        """Whether a node is an accumulator that the body changes in place, or a view of one."""
        return node in self._views

    def target_of(self, node: fx.Node) -> Target:
        """The accumulator, or the view of it, that a node is."""
        target = self._views[node]
        if target is None:
            target = self._views[node] = Target(self.program.value(node))
        return target

    def check_reads(self, node: fx.Node) -> None:
        """Refuse a node that reads an accumulator other than in a way that is looked at elsewhere."""
        for source in node.all_input_nodes:
            if source not in self._views:
                continue
            others = [leaf for leaf in rules.leaves([*node.args[1:], dict(node.kwargs)]) if leaf is source]
            if node.target is aten.copy_.default and node.args[1] is source:
                continue
            is_first = node.args[0] is source and not others
            if is_first and (node.target in _SIZES or node.target is aten.index.Tensor or _is_mutable(node)):
                continue
            if is_first and _selects_expert(node) and self.target_of(source).expert_dim is None:
                target = self.target_of(source)
                dim = node.args[1] % target.accumulator.example.dim()  # type: ignore[operator]
                self._views[node] = Target(target.accumulator, dim)
            elif is_first and rules.is_view(node) and self.target_of(source).expert_dim is None:
                self._views[node] = None
            else:
                self._refuse_read(source)

    def part(self, node: fx.Node) -> Reading:
        """``out[:, expert]``, which may be changed in place, or added to and put back."""
        return Reading(self.target_of(node), (), None)

    def read(self, node: fx.Node) -> NoReturn:
        """Refuse a node that reads what depends on the iterations before."""
        self._refuse_read(node)

    def _refuse_read(self, node: fx.Node) -> NoReturn:
        raise Refused("the body reads the accumulator that it adds to", node)

    def reading(self, node: fx.Node, given: dict[str, Any]) -> Reading:
        """``out[index]``, which may be added to and put back."""
        target = self.target_of(node.args[0])  # type: ignore[arg-type]
        return Reading(target, self._columns(node, given["indices"]), len(self.combines))

    # --- markers ---------------------------------------------------------------------------------------------------

    def marker(self, node: fx.Node) -> Any:
        if node.target is markers.carry_in:
            start = self.program.values[node.args[1]]  # type: ignore[index]
            if not isinstance(start, Value) or start.kind is not Kind.INVARIANT:
                raise Refused("the start of a carried value depends on the iteration", node)
            self.carries.append(Carry(start, node.args[1]))  # type: ignore[arg-type]
            return Carried(len(self.carries) - 1, 0)
        if node.target is markers.carry_out:
            return self._carry_out(node)
        value = self.program.values[node.args[1]]  # type: ignore[index]
        if not isinstance(value, Value):
            self._refuse_read(node)
        if value.kind is Kind.PER_ROW:
            raise Refused("the rows of each expert are put into a list", node)
        self.results.append(("collect", len(self.collected)))
        self.collected.append((value, node.args[2]))  # type: ignore[arg-type]
        return Special()

    def _carry_out(self, node: fx.Node) -> Special:
        carried, end = (self.program.values[arg] for arg in node.args[1:])  # type: ignore[index]
        assert isinstance(carried, Carried)
        carry = self.carries[carried.carry]
        if not isinstance(end, Carried) or end != Carried(carried.carry, carry.version):
            raise Refused("what one iteration leaves to the next is not what it found, with something added", node)
        start, now = carry.start.example, node.args[2].meta["val"]  # type: ignore[union-attr]
        if start.dtype is not now.dtype or start.device != now.device or not _same_shape(start.shape, now.shape):
            raise Refused("what one iteration leaves to the next is of another dtype or shape than it found", node)
        self.results.append(("carry", carried.carry))
        return Special()

    # --- operators -------------------------------------------------------------------------------------------------

    def operator(self, node: fx.Node, op: Any, given: dict[str, Any]) -> Any:
        """An operator with something among its arguments that depends on the iterations before."""
        first = given.get("self")
        if op._schema.is_mutable and self.is_accumulator(node.args[0]):
            return self.mutation(node, op, given)
        if isinstance(first, Carried):
            return self._change_carry(node, op, given, first)
        if isinstance(given.get("other"), Carried) and op is aten.add.Tensor and given["alpha"] == 1:
            swapped = {**given, "self": given["other"], "other": given["self"]}
            return self._change_carry(node, op, swapped, given["other"])
        if isinstance(first, Reading) and op in (aten.add.Tensor, aten.add_.Tensor) and given["alpha"] == 1:
            return self._add_to_reading(node, op, first, given["other"])
        other = given.get("other")
        if isinstance(other, Reading) and op is aten.add.Tensor and given["alpha"] == 1:
            return self._add_to_reading(node, op, other, first)
        return self.read(node)

    def _add_to_reading(self, node: fx.Node, op: Any, reading: Reading, added: Any) -> Sum:
        if not isinstance(added, Value):
            self._refuse_read(node)
        total = Sum(reading, added, len(self.combines) if reading.effects is None else reading.effects)
        if op is aten.add_.Tensor:
            self.program.values[node.args[0]] = total  # type: ignore[index]
        return total

    def _change_carry(self, node: fx.Node, op: Any, given: dict[str, Any], carried: Carried) -> Special:
        carry = self.carries[carried.carry]
        if op.overloadpacket.__name__.removesuffix("_") not in _EFFECTS:
            self._refuse_read(node)
        if op is aten.index.Tensor:
            index = self._columns(node, given["indices"])
            return Reading(Target(carry.start, None, carried.carry), index, len(self.combines))
        if op is aten.alias.default:
            return carried
        if carried.version != carry.version:
            raise Refused("the body reads what one iteration leaves to the next, and what it makes of that", node)
        is_mutable = op._schema.is_mutable
        if carry.replaced if is_mutable else carry.in_place:
            raise Refused("what one iteration leaves to the next is replaced and changed in place", node)
        carry.in_place, carry.replaced = carry.in_place or is_mutable, carry.replaced or not is_mutable
        if is_mutable and len(carry.node.users) > 1:
            raise Refused("the body reads the accumulator that it adds to", carry.node)
        self._effect(node, op, given, Target(carry.start, None, carried.carry))
        if not is_mutable:
            carry.version += 1
        return Carried(carried.carry, carry.version)

    def mutation(self, node: fx.Node, op: Any, given: dict[str, Any]) -> Any:
        """An operator that changes its first argument in place."""
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if not self.is_accumulator(target):
            if isinstance(self.program.values[target], Value):
                return self._in_place(node, op, target, given)
            self._refuse_read(node)
        self._effect(node, op, given, self.target_of(target))
        self._views[node] = self.target_of(target)  # what is returned is the accumulator again
        return self.program.values[target]

    def _in_place(self, node: fx.Node, op: torch._ops.OpOverload, target: fx.Node, given: dict[str, Any]) -> Value:
        """``rows.mul_(2)`` is ``rows * 2`` from there on, where nothing else sees the memory of ``rows``."""
        functional = getattr(getattr(aten, op.overloadpacket.__name__.removesuffix("_"), None), op._overloadname, None)
        value = self.program.value(target)
        kinds = {value.kind for value in rules.tensors(given)}
        if functional is None or not rules.is_pointwise(functional) or rules.is_random(op, given):
            raise Refused(f"`{op}` changes a tensor in place, other than by adding rows to an accumulator", node)
        alone = not rules.is_view(target) and not any(map(rules.is_view, target.users))
        if value.kind is Kind.INVARIANT or not alone or (value.kind is Kind.PER_EXPERT and Kind.PER_ROW in kinds):
            raise Refused(f"`{op}` changes a tensor in place that something else may see", node)
        args, kwargs = fx.map_arg(  # type: ignore[misc]
            (node.args, dict(node.kwargs)), lambda n: self.program.values[n]
        )
        on_kind = self.program.on_rows if value.kind is Kind.PER_ROW else self.program.per_expert
        result: Value = on_kind(node, functional, rules.arguments(functional, args, kwargs), args, kwargs)
        self.program.values[target] = result
        return result

    # --- one effect ------------------------------------------------------------------------------------------------

    def _effect(self, node: fx.Node, op: Any, given: dict[str, Any], target: Target) -> None:
        """Understand one operator that changes ``target``, in place or by its result."""
        name = op.overloadpacket.__name__.removesuffix("_")
        index: tuple[Value, ...] = ()
        write = Write.ADD
        alpha = given.get("alpha", 1)
        if isinstance(alpha, Value):
            raise Refused(f"`{op}` with a factor that is computed", node)
        if name == "index_add" and _is_first(given["dim"], target):
            index, values = self._columns(node, [given["index"]]), given["source"]
        elif name == "scatter_add" and _is_first(given["dim"], target):
            index, values = (self._expanded(node, given),), given["src"]
        elif name == "index_put":
            index, values = self._columns(node, given["indices"]), given["values"]
            write = Write.ADD if given["accumulate"] else Write.SET
        elif name == "add" and op._overloadname == "Tensor":
            values = given["other"]
        elif name == "copy" or op is aten.select_scatter.default:
            write, values = Write.SET, given["src"]
            if op is aten.select_scatter.default:
                if not is_index_number(node.args[3]):
                    raise Refused(f"`{op}` does not write to the part of the expert", node)
                target = dataclasses.replace(target, expert_dim=given["dim"] % target.accumulator.example.dim())
        else:
            raise Refused(f"`{op}` changes a tensor in place, other than by adding rows to an accumulator", node)
        given_dtype = node.args[_VALUES[name]].meta["val"].dtype if name in _VALUES else None  # type: ignore[union-attr]
        if given_dtype not in (None, target.accumulator.example.dtype):
            raise Refused(
                f"`{op}` of values in {given_dtype} raises an error: the accumulator is in another dtype", node
            )
        if values == Reading(target, index, None) and write is Write.SET:
            return  # `out[e] += y` puts back what it has changed in place
        if isinstance(values, Sum) and write is Write.SET:
            read = values.reading
            if (read.target, read.index) != (target, index) or values.effects != len(self.combines):
                self._refuse_read(node)
            write, values = Write.ADD_LAST, values.added
        if not isinstance(values, Value):
            self._refuse_read(node)
        if target.accumulator.kind is not Kind.INVARIANT:
            raise Refused("what is added to depends on the iteration", node)
        if name == "index_put":
            index = self._from_the_start(index, target)
        if index and any(column.kind is Kind.PER_ROW for column in index):
            combine = self._rows(node, target, index, values, write)
        else:
            combine = self._whole(node, target, index, values, write)
        if target.carry is not None and self.carries[target.carry].in_place:
            combine = dataclasses.replace(combine, carry=None)
        combine = dataclasses.replace(combine, alpha=alpha)
        self._check_mixture(node, combine)
        self.combines.append(combine)

    def _check_mixture(self, node: fx.Node, combine: Combine) -> None:
        """Refuse what is written to memory that the body changes in another way, too: the experts take turns there."""
        steps = {step.result: step for step in self.program.steps}
        root = root_of(combine.accumulator, steps)
        mine = MemoryRegion.of(combine.accumulator.example, within=root.example)
        for other in self.combines:
            alike = other.carry == combine.carry and root_of(other.accumulator, steps) is root
            if not alike or Write.SET not in (other.write, combine.write):
                continue  # sums may be added up in any order
            if not mine.is_apart(MemoryRegion.of(other.accumulator.example, within=root.example)):
                raise Refused("rows are written to an accumulator that is changed in another way too", node)

    def _columns(self, node: fx.Node, indices: Any) -> tuple[Value, ...]:
        """The index of each of the first dimensions; a mask gives one for each of its own."""
        given = node.args[1] if node.target in _INDEXED else [node.args[2]]
        nodes = [index for index in given if index is not None]  # type: ignore[union-attr]
        if len(nodes) != len(indices):
            raise Refused(f"`{node.target}` with an index that leaves out a dimension", node)
        if any(not isinstance(index, Value) for index in indices):
            self._refuse_read(node)
        masks = [i for i, index in enumerate(indices) if index.example.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return tuple(indices)
        if len(indices) > 1 or indices[0].kind is not Kind.PER_EXPERT:
            raise Refused(f"`{node.target}` with a mask and something besides", node)
        values = node.args[2] if node.target is not aten.index.Tensor else node
        rows = values.meta["val"] if isinstance(values, fx.Node) else None
        if rows is None or rows.dim() == 0:
            raise Refused("what is added to the accumulator is not one row for each position", node)
        return tuple(self.program.columns_of(nodes[0], rows))

    def _from_the_start(self, index: tuple[Value, ...], target: Target) -> tuple[Value, ...]:
        """Positions of which some may be counted from the end, as an index allows; sums at positions do not."""
        return tuple(
            column if column in self.program.places else self._counted(column, target.accumulator, dim)
            for dim, column in enumerate(index)
        )

    def _counted(self, column: Value, accumulator: Value, dim: int) -> Value:
        extra, kind, example = self.program.extra_step, column.kind, column.example
        size = accumulator.example.shape[dim]
        if not isinstance(size, int):
            size = extra("size", Kind.INVARIANT, size, aten.sym_size.int, accumulator, dim)
        truths = example.new_empty(example.shape, dtype=torch.bool)
        negative = extra("negative", kind, truths, aten.lt.Scalar, column, 0)
        counted = extra("counted", kind, example, aten.add.Tensor, column, size)
        return extra("from_start", kind, example, aten.where.self, negative, counted, column)

    def _expanded(self, node: fx.Node, given: dict[str, Any]) -> Value:
        """The positions that the index of a ``scatter_add`` is expanded from."""
        index = node.args[2]
        while isinstance(index, fx.Node) and index.target in _ADDS_TRAILING and index.meta["val"].dim() > 1:
            index = index.args[0]  # type: ignore[assignment]
        value = self.program.values[index] if isinstance(index, fx.Node) else None
        whole = isinstance(given["src"], Value) and _same_shape(
            given["index"].example.shape, given["src"].example.shape
        )
        if not isinstance(value, Value) or value.kind is not Kind.PER_ROW or value.example.dim() != 1 or not whole:
            raise Refused(f"`{node.target}` with an index that is not one position for each row", node)
        return value

    def _rows(self, node: fx.Node, target: Target, index: tuple[Value, ...], values: Value, write: Write) -> Combine:
        """Rows at positions of the accumulator."""
        accumulator, rows = target.accumulator.example, values.example
        per_row = values.kind is Kind.PER_ROW and all(column.kind is Kind.PER_ROW for column in index)
        if not per_row or any(column.example.dim() != 1 for column in index) or target.expert_dim is not None:
            raise Refused("what is added to the accumulator is not one row for each position", node)
        if accumulator.dtype is torch.bool and write is not Write.SET:
            raise Refused("rows are added to an accumulator of truth values", node)
        if not _same_shape(rows.shape[1:], accumulator.shape[len(index) :]):
            raise Refused("what is added to the accumulator does not have the shape of its rows", node)
        place = self._place(index, accumulator)
        if write is Write.ADD:
            return Combine(target.accumulator, index, values, write, place, carry=target.carry)
        once = self._is_once(index, place, write)
        if once is None:
            raise Refused("rows are written to positions of which one may come up more than once", node)
        if write is Write.ADD_LAST and once:
            write = Write.ADD
        return Combine(target.accumulator, index, values, write, place, carry=target.carry)

    def _place(self, index: tuple[Value, ...], accumulator: torch.Tensor) -> Place | None:
        """Where the index is known to stand among the expert ids, if it covers the accumulator's first dimensions."""
        selection, places = self.program.selection, [self.program.places.get(column) for column in index]
        if selection is None or selection.ids is None or None in places:
            return None
        first = places[0]
        assert first is not None
        simple = all(p is not None and len(p.axes) == 1 and p.divisor == 1 and p.modulus is None for p in places)
        if len(places) > 1 and not simple:
            return None
        axes = [axis for place in places if place is not None for axis in place.axes]
        if axes != list(range(axes[0], axes[0] + len(axes))):
            return None
        for column, size in zip(places, accumulator.shape, strict=False):
            if column is None or not _same(column.extents(selection.shape)[1], size):
                return None
        return first if len(places) == 1 else Place(range(axes[0], axes[-1] + 1))

    def _is_once(self, index: tuple[Value, ...], place: Place | None, write: Write) -> bool | None:
        """Whether no two rows of one expert have the same index; None where it cannot be told which comes last."""
        selection = self.program.selection
        assert selection is not None
        told_apart = {axis for column in index for axis in self._axes(column)}
        if told_apart == set(selection.kept):
            return True if write is Write.ADD_LAST or selection.ids is None or place is not None else None
        if place is None or selection.ids is None or selection.merged is not None:
            return None
        before, _, after = place.extents(selection.shape)
        if _same(before, 1) and _same(origin_of(selection.ids, self.program.inputs).distinct % after, 0):
            return True  # the slots of a token
        rest = [axis for axis in selection.kept if axis not in place.axes]
        is_split = place.divisor != 1 or place.modulus is not None
        in_order = selection.kept == sorted(selection.kept) if is_split else rest == sorted(rest)
        few = isinstance(before, int) and isinstance(after, int) and before * after <= MAX_SLOTS
        # In eager, rows that others overwrite in one go still get the gradient of those.
        return False if in_order and few and not self.program.differentiated else None

    def _differ(self, index: Value) -> bool:
        """Whether the entries of an index of the expert's own are known to differ: the positions of a ``topk``."""
        made_by = {step.result: step for step in self.program.steps}
        step = made_by[index]
        if step.op is not operator.getitem or step.args[1] != 1 or index.example.dim() != 1:
            return False
        return made_by[step.args[0]].op in (aten.topk.default, aten.sort.default, aten.sort.stable)

    def _axes(self, column: Value) -> list[int]:
        place = self.program.places.get(column)
        plain = place is not None and place.divisor == 1 and place.modulus is None
        return list(place.axes) if place is not None and plain else []

    def _whole(self, node: fx.Node, target: Target, index: tuple[Value, ...], values: Value, write: Write) -> Combine:
        """A value of each expert: for the whole accumulator, for the expert's part of it, or at its own positions."""
        accumulator, example = target.accumulator.example, values.example
        if values.kind is not Kind.PER_EXPERT or not isinstance(example, torch.Tensor):
            raise Refused(
                "what is added to the accumulator is neither one row for each position nor the expert's", node
            )
        if any(column.kind is not Kind.PER_EXPERT or column.example.dim() != 1 for column in index):
            raise Refused("what is added to the accumulator is not at positions of the expert's own", node)
        if accumulator.dtype is torch.bool:
            raise Refused("rows are added to an accumulator of truth values", node)
        shape = list(accumulator.shape)
        if index:
            shape = [index[0].example.shape[0], *shape[len(index) :]]
            once = write is Write.ADD or (write is Write.ADD_LAST and self._differ(index[0]))
            write = Write.ADD if once else write
            if len(index) > 1 or target.expert_dim is not None or not once:
                raise Refused("values are written to positions of which one may come up more than once", node)
        elif target.expert_dim is not None:
            del shape[target.expert_dim]
            write = Write.ADD if write is Write.ADD_LAST else write
        elif write is not Write.ADD:
            raise Refused("each expert overwrites all that the others wrote", node)
        is_whole = not index and target.expert_dim is None
        fits = _broadcasts(example.shape, shape) if is_whole else _same_shape(example.shape, shape)
        if not fits:
            raise Refused("what is added to the accumulator does not have the shape of its rows", node)
        return Combine(target.accumulator, index, values, write, None, target.expert_dim, target.carry)


MAX_SLOTS = 64
"""Up to how many slots of a token are compared with each other."""

_EFFECTS = {"index_add", "scatter_add", "index_put", "add", "copy", "select_scatter", "index", "alias"}
_VALUES = {"index_add": 3, "scatter_add": 3, "index_put": 2}
"""Where operators that cast nothing have their values. With fake tensors some of them take what raises in eager."""
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_ADDS_TRAILING = (aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.repeat.default)
_SIZES = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default)


def _root(node: Any) -> Any:
    """The node whose memory a view lies in."""
    while (
        isinstance(node, fx.Node) and node.args and (rules.is_view(node) or _selects_expert(node) or _is_mutable(node))
    ):
        if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def _selects_expert(node: fx.Node) -> bool:
    if node.target is markers.select_shifted:
        return True
    return node.target is markers.select or (node.target is aten.select.int and is_index_number(node.args[2]))


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _is_first(dim: int, target: Target) -> bool:
    return bool(dim % max(target.accumulator.example.dim(), 1) == 0)


def _same(a: Any, b: Any) -> bool:
    return bool(rules.same_size(a, b))


def _same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _broadcasts(shape: Any, to: Any) -> bool:
    """Whether ``shape`` is broadcast to ``to``."""
    trailing = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(_same(a, 1) or _same(a, b) for a, b in zip(shape, trailing, strict=False))
