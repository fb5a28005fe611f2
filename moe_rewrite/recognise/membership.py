"""Which rows an expert gets: proves that a mask over experts is ``expert_ids == expert``.

Many programs say the same thing: ``one_hot(ids, E).permute(2, 1, 0)[expert]``, ``ids == expert``,
``ids.unsqueeze(-1) == arange(E)``. On ATen they all come down to comparing integers with a range or with the
expert's index, and moving dimensions. So each integer value of the body gets a meaning, dimension by dimension.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import torch
from torch import fx

from moe_rewrite import markers
from moe_rewrite.recognise.origins import origin_of
from moe_rewrite.recognise.rules import is_one

aten = torch.ops.aten


class Form(enum.Enum):
    """What the entries of an integer tensor are, in terms of expert ids and experts.

    A tensor that has not every axis of the ids among its labels speaks of all the ids along those it has not: *some* id
    equals the expert.
    """

    IDS = "the expert ids"
    RANGE = "0, 1, 2, ... along the expert dimension"
    INDEX = "the index of the loop's expert"
    MEMBER = "whether some id equals the expert, for all experts"
    SELECTED = "whether some id equals the loop's expert"
    MISSED = "whether no id equals the loop's expert"
    COUNT = "a number that is 0 where no id equals the expert and more than 0 elsewhere, for all experts"
    SELECTED_COUNT = "such a number for the loop's expert"


_REDUCED = {
    Form.MEMBER: (Form.MEMBER, Form.COUNT),
    Form.SELECTED: (Form.SELECTED, Form.SELECTED_COUNT),
    Form.COUNT: (Form.MEMBER, Form.COUNT),
    Form.SELECTED_COUNT: (Form.SELECTED, Form.SELECTED_COUNT),
}
"""What becomes of a form by `any`, and by `sum`."""


EXPERT = "expert"
"""Label of the dimension that runs over experts. Other labels are axes of the ids (int), or None for a size of 1."""

Label = int | str | None


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What an integer tensor holds.

    Attributes:
        form: the form of its entries.
        labels: what each dimension runs along.
        ids: the node of the expert ids it speaks of.
    """

    form: Form
    labels: tuple[Label, ...]
    ids: fx.Node | None = None


def meanings(graph: fx.Graph, inputs: Sequence[fx.Node]) -> dict[fx.Node, Meaning]:
    """The meaning of each integer tensor in a retraced body; an opaque one is taken as expert ids of its own.

    Args:
        graph: the body on ATen.
        inputs: the nodes of Dynamo's graph that its placeholders stand for.
    """
    found: dict[fx.Node, Meaning] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        meaning = _meaning(node, found, inputs)
        if meaning is None and not value.is_floating_point() and not value.is_complex() and value.dim() > 0:
            meaning = Meaning(Form.IDS, tuple(range(value.dim())), node)
        if meaning is not None:
            found[node] = meaning
    return found


def _meaning(node: fx.Node, found: dict[fx.Node, Meaning], inputs: Sequence[fx.Node]) -> Meaning | None:
    if node.op != "call_function":
        return None
    target, value = node.target, node.meta["val"]
    if target is markers.loop_begin:
        return Meaning(Form.INDEX, (None,) * value.dim())
    if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        start = 0 if target is aten.arange.default else node.args[0]
        step = node.args[2] if target is aten.arange.start_step and len(node.args) > 2 else 1
        return Meaning(Form.RANGE, (EXPERT,)) if start == 0 and step == 1 and _counts_up(value) else None
    source = found.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None:
        return None
    if target is markers.select or (target is aten.select.int and is_index_number(node.args[2])):
        return _selected(node, source)
    if target in (aten.eq.Scalar, aten.eq.Tensor, aten.isin.Tensor_Scalar) and is_index_number(node.args[1]):
        plain = source.form is Form.IDS and len(node.args) == 2 and not node.kwargs
        return Meaning(Form.SELECTED, source.labels, source.ids) if plain else None
    if target is aten.eq.Tensor:
        other = found.get(node.args[1])  # type: ignore[arg-type]
        return None if other is None else _equal(source, other) or _equal(other, source)
    if target in _REDUCTIONS:
        return _reduced(node, source)
    if target is aten.logical_not.default:
        return dataclasses.replace(source, form=Form.MISSED) if source.form in _OF_ONE_EXPERT else None
    if target is aten._to_copy.default or target in (aten.clone.default, aten.alias.default, aten.detach.default):
        return source if _keeps_values(source, source_dtype(node), value.dtype, inputs) else None
    if target in (aten.gt.Scalar, aten.ne.Scalar, aten.ge.Scalar, aten.eq.Scalar):
        return _thresholded(node, source)
    return _moved(node, source)


def _counts_up(numbers: torch.Tensor) -> bool:
    """Whether a dtype holds the numbers 0, 1, 2... of a range as they are, and no other number is taken for one."""
    dtype, length = numbers.dtype, numbers.shape[0]
    if not isinstance(length, int):
        return dtype is torch.int64
    if dtype.is_floating_point:  # every whole number up to 1 / eps is one of its numbers
        return bool(length <= 1 / torch.finfo(dtype).eps)
    return not dtype.is_complex and dtype is not torch.bool and bool(length - 1 <= torch.iinfo(dtype).max)


def is_index_number(argument: object) -> bool:
    """Whether an argument is the loop's index as a Python number."""
    return isinstance(argument, fx.Node) and argument.target is markers.number


def _selected(node: fx.Node, source: Meaning) -> Meaning | None:
    dim = node.args[1] % len(source.labels)  # type: ignore[operator]
    if source.labels[dim] != EXPERT:
        return None
    labels = source.labels[:dim] + source.labels[dim + 1 :]
    forms = {Form.MEMBER: Form.SELECTED, Form.COUNT: Form.SELECTED_COUNT, Form.RANGE: Form.INDEX}
    form = forms.get(source.form)
    return None if form is None else Meaning(form, labels, source.ids)


def _equal(left: Meaning, right: Meaning) -> Meaning | None:
    if left.form is not Form.IDS or right.form not in (Form.RANGE, Form.INDEX):
        return None
    rank = max(len(left.labels), len(right.labels))
    pairs = zip(_padded(left.labels, rank), _padded(right.labels, rank), strict=True)
    labels = []
    for a, b in pairs:
        if a is not None and b is not None:
            return None
        labels.append(b if a is None else a)
    return Meaning(Form.MEMBER if right.form is Form.RANGE else Form.SELECTED, tuple(labels), left.ids)


def _padded(labels: tuple[Label, ...], rank: int) -> tuple[Label, ...]:
    return (None,) * (rank - len(labels)) + labels


_REDUCTIONS = {
    *(aten.sum.dim_IntList, aten.sum.default, aten.any.dims, aten.any.dim, aten.any.default),
    *(aten.amax.default, aten.max.default),
}
_OF_ONE_EXPERT = (Form.SELECTED, Form.SELECTED_COUNT)


def _reduced(node: fx.Node, source: Meaning) -> Meaning | None:
    """Count or any over axes of the ids."""
    value, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    dims = node.args[1] if len(node.args) > 1 else None
    given = range(value.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    wanted = {dim % value.dim() for dim in given}  # type: ignore[union-attr]
    if source.form not in _REDUCED or any(source.labels[dim] == EXPERT for dim in wanted):
        return None
    keepdim = len(node.args) > 2 and bool(node.args[2])
    labels = tuple(None if i in wanted else source.labels[i] for i in range(value.dim()) if keepdim or i not in wanted)
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    is_any, is_count = _REDUCED[source.form]
    if name in ("amax", "max"):
        return Meaning(source.form, labels, source.ids)
    if name == "any":
        return Meaning(is_any, labels, source.ids)
    # A narrow integer could count round to 0.
    wide = result.dtype in (torch.int64, torch.int32) or result.dtype.is_floating_point
    return Meaning(is_count, labels, source.ids) if wide else None


def _thresholded(node: fx.Node, source: Meaning) -> Meaning | None:
    """A comparison that tells 0 from everything above."""
    bound = node.args[1]
    if source.form in (Form.COUNT, Form.SELECTED_COUNT):
        form = _REDUCED[source.form][0]
        whole = not source_dtype(node).is_floating_point
        tells = {aten.gt.Scalar: bound == 0, aten.ne.Scalar: bound == 0, aten.ge.Scalar: bound == 1 and whole}
        if tells.get(node.target, False):  # type: ignore[call-overload]
            return dataclasses.replace(source, form=form)
        missed = source.form is Form.SELECTED_COUNT and node.target is aten.eq.Scalar and bound == 0
        return dataclasses.replace(source, form=Form.MISSED) if missed else None
    if source.form in (Form.MEMBER, Form.SELECTED):
        positive = {aten.gt.Scalar: 0, aten.ne.Scalar: 0, aten.ge.Scalar: 1, aten.eq.Scalar: 1}
        return source if node.target in positive and positive[node.target] == bound else None
    return None


def source_dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    return dtype


def _keeps_values(source: Meaning, before: torch.dtype, after: torch.dtype, inputs: Sequence[fx.Node]) -> bool:
    """Whether a cast leaves all entries as they are. Where it may wrap ids, what it gives are ids of their own."""
    if source.form in (Form.IDS, Form.RANGE, Form.INDEX):
        wide = after in (torch.int64, torch.int32)
        if not wide or source.ids is None or _holds(after, before):
            return wide
        bound = origin_of(source.ids, inputs).bound
        return bound is not None and bound <= torch.iinfo(after).max
    if source.form in (Form.COUNT, Form.SELECTED_COUNT):
        return after in (torch.int64, torch.int32, torch.bool)
    return True  # 0 and 1 are themselves in every dtype


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every integer of ``other`` is one of ``dtype``."""
    if other is torch.bool:
        return True
    own, its = torch.iinfo(dtype), torch.iinfo(other)
    return bool(own.min <= its.min and its.max <= own.max)


def _moved(node: fx.Node, source: Meaning) -> Meaning | None:
    """Operators that only move, add or drop dimensions (of size 1)."""
    labels, target, args = source.labels, node.target, node.args
    rank = len(labels)
    if target is aten.permute.default:
        order: Sequence[int] = args[1]  # type: ignore[assignment]
        labels = tuple(labels[dim % rank] for dim in order)
    elif target in (aten.t.default, aten.numpy_T.default):
        labels = labels[::-1]
    elif target is aten.transpose.int:
        moved = list(labels)
        a, b = args[1] % rank, args[2] % rank  # type: ignore[operator]
        moved[a], moved[b] = moved[b], moved[a]
        labels = tuple(moved)
    elif target is aten.unsqueeze.default:
        dim = args[1] % (rank + 1)  # type: ignore[operator]
        labels = (*labels[:dim], None, *labels[dim:])
    elif target is aten.squeeze.dim:
        dim = args[1] % rank  # type: ignore[operator]
        size = args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
        if not isinstance(size, int) or (size == 1 and labels[dim] == EXPERT):
            return None
        labels = labels[:dim] + labels[dim + 1 :] if size == 1 else labels
    elif target in (aten.squeeze.dims, aten.view.default, aten.squeeze.default):
        return _reshaped(node, source)
    else:
        return None
    return dataclasses.replace(source, labels=labels)


def _reshaped(node: fx.Node, source: Meaning) -> Meaning | None:
    """A reshape that only adds or drops dimensions of size 1."""
    before = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    after = node.meta["val"].shape
    kept = [(size, label) for size, label in zip(before, source.labels, strict=True) if not is_one(size)]
    if any(label is not None for size, label in zip(before, source.labels, strict=True) if is_one(size)):
        return None  # an axis of length 1 must keep its place to be told apart
    labels: list[Label] = []
    for size in after:
        if is_one(size):
            labels.append(None)
        elif kept and _same(kept[0][0], size):
            labels.append(kept.pop(0)[1])
        else:
            return None
    return None if kept else dataclasses.replace(source, labels=tuple(labels))


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))
