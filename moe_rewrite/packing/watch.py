"""Are the experts still what they were when they were packed?

This runs at every call of compiled code, for every submodule of every expert. So all of it is done by loops in C over
lists that were flattened beforehand, and nearly all of it compares identities: ``==`` of tensors is no truth value.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moe_rewrite.packing.alike import CALL_HOOKS, Anatomy, attributes, copied, difference, is_container
from moe_rewrite.tree import REGISTERS

_flat = itertools.chain.from_iterable


class ModulesWatch:
    """The modules of some experts as they are now: classes, attributes, hooks, and which tensors they have.

    It keeps the submodules, but not the experts themselves.
    """

    def __init__(self, experts: Sequence[Anatomy]) -> None:
        roots = [expert.modules[0] for expert in experts]
        self._inner = list({id(module): module for expert in experts for module in expert.modules[1:]}.values())
        modules = [*roots, *self._inner]
        registers: list[dict[str, Any]] = [vars(module)[name] for module in modules for name in REGISTERS]
        self._types = list(map(type, modules))
        self._filled = [register for register in registers if register]
        self._names = list(map(tuple, self._filled))
        self._empty = [register for register in registers if not register]
        self._empty += [vars(module)[name] for module in modules for name in CALL_HOOKS]
        dicts: list[Any] = [*map(vars, modules), *self._filled]
        self._lengths = list(map(len, dicts))
        self._values = list(_flat(map(dict.values, dicts)))
        self._containers = [
            (value, copied(value)) for module in modules for value in attributes(module).values() if is_container(value)
        ]

    def unchanged(self, experts: Sequence[nn.Module]) -> bool:
        """Nothing in ``__dict__`` of any module is another object, and no container has other contents.

        Objects besides containers (a config, say) are compared by identity: what is in them may have changed.
        """
        modules = [*experts, *self._inner]
        dicts: list[Any] = [*map(vars, modules), *self._filled]
        return (
            list(map(type, modules)) == self._types
            and list(map(len, dicts)) == self._lengths
            and all(map(operator.is_, _flat(map(dict.values, dicts)), self._values))
            and not any(self._empty)
            and list(map(tuple, self._filled)) == self._names
            and all(difference(value, before) is None for value, before in self._containers)
        )


class TensorsWatch:
    """What some tensors are now, besides their values and their place in memory.

    Args:
        tensors: the tensors.
        may_move: their place in memory is not looked at elsewhere, so it does not tell their device.
    """

    def __init__(self, tensors: Sequence[Tensor], may_move: bool) -> None:
        self._tensors = list(tensors)
        self._sizes = [tensor.size() for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        self._may_move = [tensor for tensor in tensors if may_move or not tensor.numel()]
        self._devices = [tensor.device for tensor in self._may_move]
        self._requires_grad = [tensor.requires_grad for tensor in tensors]

    def unchanged(self) -> bool:
        """Shape, dtype, device, and whether they are contiguous and require a gradient."""
        tensors = self._tensors
        return (
            list(map(Tensor.size, tensors)) == self._sizes
            and all(map(Tensor.is_contiguous, tensors))
            and [tensor.dtype for tensor in tensors] == self._dtypes
            and [tensor.device for tensor in self._may_move] == self._devices
            and [tensor.requires_grad for tensor in tensors] == self._requires_grad
        )
