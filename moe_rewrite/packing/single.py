"""Tensors that a module has under several names, each as a module of its own: what is packed are modules."""

from __future__ import annotations

import threading
from collections.abc import MutableMapping, Sequence

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary  # seen to work in 2.11, 2.13 and 2.15

TENSOR = "tensor"
"""What the tensor of an :class:`OneTensor` is called."""


class OneTensor(nn.Module):
    """A module with one parameter or buffer."""

    def __init__(self, register: str, tensor: Tensor) -> None:
        super().__init__()
        vars(self)[register][TENSOR] = tensor


_made: MutableMapping[nn.Module, dict[tuple[str, str], OneTensor]] = WeakIdKeyDictionary()
"""Those of each module, by register and name: they live as long as it does, and its tensors at most until it is asked
for them again."""

_lock = threading.RLock()


def singles(holder: nn.Module, register: str, names: Sequence[str]) -> tuple[nn.Module, ...] | None:
    """What ``holder`` has in a register under ``names``, as modules: the same ones for as long as it has these tensors.

    None where it has no tensor of one of the names. Modules are returned as they are.
    """
    found = [vars(holder)[register].get(name) for name in names]
    if any(entry is None for entry in found):
        return None
    if register == "_modules":
        return tuple(found)  # type: ignore[arg-type]
    with _lock:
        made = _made.setdefault(holder, {})
        for name, tensor in zip(names, found, strict=True):
            known = made.get((register, name))
            if known is None or vars(known)[register][TENSOR] is not tensor:
                made[register, name] = OneTensor(register, tensor)  # type: ignore[arg-type]
        return tuple(made[register, name] for name in names)
