"""Which rows an expert has: what a ``nonzero`` in the body, or indexing by a mask, selects."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from moe_rewrite.loop import Place
from moe_rewrite.recognise.membership import EXPERT, Form, Meaning
from moe_rewrite.recognise.refused import Refused
from moe_rewrite.recognise.rules import same_size

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of an expert, one for each entry that is set in a mask.

    Attributes:
        mask: the mask of the loop's expert.
        ids: the expert ids, where the mask is "some id equals the expert"; None where nothing is known of it.
        axes: for each dimension of the mask, the axis of the ids that it runs along (of the mask itself, where there
            are no ids); None for a dimension of size 1.
    """

    mask: fx.Node
    ids: fx.Node | None
    axes: tuple[int | None, ...]

    @classmethod
    def by(cls, mask: fx.Node, meaning: Meaning | None) -> Selection:
        """The rows that a mask selects. ``meaning``: what is known of its entries."""
        if meaning is not None and meaning.form is Form.SELECTED and meaning.ids is not None:
            axes = tuple(label for label in meaning.labels if isinstance(label, int))
            if EXPERT not in meaning.labels and len(set(axes)) == len(axes):
                return cls(mask, meaning.ids, meaning.labels)  # type: ignore[arg-type]
        return cls(mask, None, tuple(range(mask.meta["val"].dim())))

    @property
    def shape(self) -> torch.Size:
        """The shape that the axes are of."""
        shape: torch.Size = (self.mask if self.ids is None else self.ids).meta["val"].shape
        return shape

    @property
    def kept(self) -> list[int]:
        """The axes that rows are told apart by, in the order of the mask."""
        return [axis for axis in self.axes if axis is not None]

    @property
    def merged(self) -> Place | None:
        """What the rows of an expert are told apart by, where that is not every axis.

        Raises:
            Refused: the ids that make one row do not lie together.
        """
        kept = sorted(self.kept)
        if len(kept) == len(self.shape):
            return None
        if not kept or kept[-1] - kept[0] != len(kept) - 1:
            raise Refused("the ids of which one makes a row are not those along neighbouring axes", self.mask)
        return Place(range(kept[0], kept[-1] + 1))

    def is_same(self, other: Selection) -> bool:
        """Whether both select the same rows in the same order."""
        if self.axes != other.axes or self.ids is not other.ids:
            return False
        return self.ids is not None or same_computation(self.mask, other.mask)


def merged_dims(mask: fx.Node) -> tuple[fx.Node, list[list[int]]] | None:
    """``(base, dims)`` of a mask that is a view of ``base``, with the dimensions of ``base`` that each of its own is.

    None for a mask that is no view, or one that does more than to merge neighbouring dimensions.
    """
    base = mask.args[0] if mask.args else None
    if mask.target not in (aten.view.default, aten._unsafe_view.default) or not isinstance(base, fx.Node):
        return None
    sizes, groups, dim = base.meta["val"].shape, [], 0
    for size in mask.meta["val"].shape:
        group, along = [dim], sizes[dim] if dim < len(sizes) else 0
        while not same_size(along, size) and group[-1] + 1 < len(sizes):
            group.append(group[-1] + 1)
            along = along * sizes[group[-1]]
        if not same_size(along, size):
            return None
        groups.append(group)
        dim = group[-1] + 1
    while groups and dim < len(sizes) and same_size(sizes[dim], 1):
        groups[-1].append(dim)
        dim += 1
    return (base, groups) if dim == len(sizes) else None


def same_computation(a: object, b: object) -> bool:
    """Whether two arguments are the same node, or nodes that compute the same from the same, or equal constants."""
    if a is b:
        return True
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if a.op != "call_function" or a.target is not b.target or not isinstance(a.target, torch._ops.OpOverload):
            return False
        if a.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in a.target.tags:
            return False
        return same_computation((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs)))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same_computation, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_computation(a[key], b[key]) for key in a)
    return type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b)
