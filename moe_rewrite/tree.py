"""Modules as they stand in each other, also where some are only half built.

The frame that is traced may be a module's own ``__init__`` or ``__setstate__``. Until ``nn.Module.__init__`` has run
there is nothing to look at, and whatever the class defines (``__getattr__``, ``__class__``) may fail. So nothing here
runs code of a module's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

REGISTERS = ("_parameters", "_buffers", "_modules")
"""Where a module looks for an attribute, in this order."""


def is_module(value: object) -> bool:
    """Whether an object is a module that is initialised, so that it has parameters, buffers and submodules."""
    if not issubclass(type(value), nn.Module):
        return False
    own = _own(value)
    return all(isinstance(own.get(register), dict) for register in REGISTERS)


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What ``root.named_modules()`` says, but for modules that are not initialised."""
    waiting: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen or not is_module(module):
            continue
        seen.add(id(module))
        yield path, module
        children = _own(module)["_modules"].items()
        waiting += [(f"{path}.{name}" if path else name, child) for name, child in reversed(children)]


def _own(value: object) -> dict[str, Any]:
    own: dict[str, Any] = object.__getattribute__(value, "__dict__")
    return own
