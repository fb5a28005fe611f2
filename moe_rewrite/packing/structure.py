"""What code that was traced with a template depends on: all of an expert but the values of its tensors.

The layers of a model often have experts of one structure. Code that was traced for the experts of one layer then
serves those of every other one, with their tables in the place of the first ones.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_rewrite.packing.alike import Anatomy, NotAlike, compare_modules, difference, tensor_attributes


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """What a table of one name looks like.

    Attributes:
        name: the path from an expert.
        shape: of one expert's.
        requires_grad: for each expert.
        cls: the class of the tensors.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: tuple[bool, ...]
    cls: type[Tensor]

    @classmethod
    def of(cls, name: str, members: Sequence[Tensor]) -> TableSpec:
        first = members[0]
        wants_grad = tuple(member.requires_grad for member in members)
        return cls(name, first.shape, first.dtype, first.device, wants_grad, type(first))


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What some experts are but for the values of their tensors. Packs of equal structure have the same object.

    Attributes:
        num_experts: how many they are.
        copy: whether their parameters are in tables, or stay where they are.
        specs: the parameters and buffers.
        template: the anatomy of a template. Its tensors may be empty by now, but not what is set on them.
    """

    num_experts: int
    copy: bool
    specs: tuple[TableSpec, ...]
    template: Anatomy

    @classmethod
    def shared(cls, num_experts: int, copy: bool, specs: tuple[TableSpec, ...], template: Anatomy) -> Structure:
        """The structure that is equal to this one, if there is one already."""
        made = cls(num_experts, copy, specs, template)
        with _lock:
            found = next((known for known in _structures if known._is_equal(made)), made)
            _structures.add(found)
        return found

    def may_be_of(self, modules: Sequence[nn.Module]) -> bool:
        """Whether it is worth a closer look."""
        return len(modules) == self.num_experts and type(modules[0]) is type(self.template.modules[0])

    def _is_equal(self, other: Structure) -> bool:
        mine, theirs = self.template, other.template
        if (self.num_experts, self.copy, self.specs) != (other.num_experts, other.copy, other.specs):
            return False
        try:
            compare_modules(mine, theirs, "this")
        except NotAlike:
            return False
        return all(same_attributes(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())


def same_attributes(mine: Tensor, theirs: Tensor) -> bool:
    """Whether the same was set on two tensors."""
    own: dict[str, Any] = tensor_attributes(mine)
    others = tensor_attributes(theirs)
    return own.keys() == others.keys() and all(difference(own[name], others[name]) is None for name in own)


_structures: weakref.WeakSet[Structure] = weakref.WeakSet()

_lock = threading.RLock()
