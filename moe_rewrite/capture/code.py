"""Is the code that was traced still the code that Python would run?

Dynamo takes it that methods of classes do not change: it guards neither on the ``forward`` of a module that it inlines
nor on the methods that this calls. Stock Dynamo seldom has to know of an expert's: where a loop over experts breaks its
graph, each expert is a frame of its own, which is found by its code. What this package captures is one frame, so it
looks at the code itself. A class counts once, however many modules are of it.

This runs at every call of compiled code, so most of it is done by loops in C over what was listed beforehand. What is
looked at is not kept alive: a method may capture a model, and compiled code lives as long as the code it was made of.
"""

from __future__ import annotations

import itertools
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

_Hold: TypeAlias = Callable[[Any], Any]
_Get: TypeAlias = Callable[[list[Any]], Iterable[Any]]

_flat = itertools.chain.from_iterable
_order = operator.attrgetter("__mro__")
_of_function = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__", "__closure__")

_HEAP_TYPE = 1 << 9
"""The flag of classes that are made by a ``class`` statement: others cannot change."""

_GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = tuple(
    vars(torch.nn.modules.module)[name]
    for name in (  # seen in 2.11 and 2.13
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)
"""Hooks of all modules. Dynamo does not guard on how many there are."""


class CodeWatch:
    """The code of some classes and functions as it is now, and the hooks of all modules.

    Args:
        classes: the classes of the objects that the traced code has used. Their bases count, too.
        functions: the functions that were traced.
        frame: the code of the frame that they were traced in.
    """

    def __init__(self, classes: Iterable[type], functions: Iterable[types.FunctionType], frame: types.CodeType) -> None:
        traced, used = list(dict.fromkeys(functions)), list(filter(_can_change, dict.fromkeys(classes)))
        bases = list(filter(_can_change, dict.fromkeys(_flat(map(_order, used)))))
        read = frozenset(_flat(_names(code) for code in (frame, *(function.__code__ for function in traced))))
        self._parts: list[_Functions | _Orders | _Contents] = []
        for hold, get, is_among in ((_as_is, iter, _is_for_good), (_weakly, _called, _is_not_for_good)):
            self._parts.append(_Functions(list(filter(is_among, traced)), hold, get))
            self._parts.append(_Orders(list(filter(is_among, used)), hold, get))
            self._parts.append(_Contents(list(filter(is_among, bases)), read, hold, get))
        self._hooks = list(map(_Kept, _hooks()))

    def unchanged(self) -> bool:
        """Every function has the code and the defaults that it had, and every name leads from each class to the same.

        Attributes of a class that are no code, and that no traced function has the name of, may have other values. But
        none may be there that was not there before: it could stand before another one.
        """
        return all(part.unchanged() for part in self._parts) and _are_still(_hooks(), self._hooks)


class _Functions:
    """Some functions: their code, their defaults, and what they capture.

    Dynamo guards on the latter, but in 2.11 not at each call where it has found a function by a module.

    Args:
        functions: the functions.
        hold: makes of a value what is kept of it.
        get: the values of a list of what is kept, None for those that are gone.
    """

    def __init__(self, functions: list[types.FunctionType], hold: _Hold, get: _Get) -> None:
        # Nearly all have nothing besides their code. The defaults of torch's own functions are constants.
        plain = [function for function in functions if hold is _as_is or _of_function(function)[1:] == (None,) * 3]
        others = [function for function in functions if function not in plain]
        self._get = get
        self._plain, self._codes = list(map(hold, plain)), list(map(_of_function, plain))
        self._others = list(map(hold, others))
        self._kept = [list(map(_Kept, _looked_into(function))) for function in others]

    def unchanged(self) -> bool:
        plain, others = list(self._get(self._plain)), list(self._get(self._others))
        return (
            None not in plain
            and None not in others
            and list(map(_of_function, plain)) == self._codes
            and all(map(_are_still, map(_looked_into, others), self._kept))
        )


class _Orders:
    """In which order some classes and their bases are looked into. Arguments are those of :class:`_Functions`."""

    def __init__(self, classes: list[type], hold: _Hold, get: _Get) -> None:
        self._get, self._classes = get, list(map(hold, classes))
        self._orders = [list(map(hold, cls.__mro__)) for cls in classes]

    def unchanged(self) -> bool:
        classes = list(self._get(self._classes))
        return None not in classes and all(map(self._is_same, classes, self._orders))

    def _is_same(self, cls: type, order: list[Any]) -> bool:
        return all(map(operator.is_, cls.__mro__, self._get(order)))


class _Contents:
    """What is in some classes.

    Args:
        classes: the classes.
        read: the names of attributes that the traced code reads.
        hold, get: as of :class:`_Functions`.
    """

    def __init__(self, classes: list[type], read: frozenset[str], hold: _Hold, get: _Get) -> None:
        self._hold, self._get, self._read = hold, get, read
        self._classes = list(map(hold, classes))
        self._looks = [{name: _Kept(value) for name, value in self._look(vars(cls)).items()} for cls in classes]
        self._see([vars(cls) for cls in classes])

    def unchanged(self) -> bool:
        classes = list(self._get(self._classes))
        if None in classes:
            return False
        contents = [vars(cls) for cls in classes]
        same_names = list(_flat(contents)) == self._names  # so there are as many values
        if same_names and all(map(operator.is_, _values_in(contents), self._get(self._values))):
            return True
        for content, look in zip(contents, self._looks, strict=True):
            now = self._look(content)
            if now.keys() != look.keys() or not all(look[name].is_still(value) for name, value in now.items()):
                return False
        self._see(contents)
        return True

    def _see(self, contents: list[types.MappingProxyType[str, Any]]) -> None:
        self._names, self._values = list(_flat(contents)), list(map(self._hold, _values_in(contents)))

    def _look(self, content: types.MappingProxyType[str, Any]) -> dict[str, Any]:
        """What is in a class, by name, but for values that do not matter, and for what Python itself leaves there."""
        found = {}
        for name, value in content.items():
            matters = name in self._read or hasattr(type(value), "__get__")
            if matters or not name.startswith("__"):
                found[name] = value if matters else None
        return found


class _Kept:
    """What a value was. It is not kept alive where that is possible, and small containers are looked into."""

    def __init__(self, value: Any, depth: int = 0) -> None:
        self._type: Any = type(value)
        self._parts: Any = None
        if type(value) not in _CONTAINERS or len(value) > _MOST_ENTRIES or depth == _DEEPEST:
            self._value = _weakly(value)
            if type(value) not in _NUMBERS:
                self._type = None  # the class would be kept alive
        elif type(value) is dict:
            self._parts = {key: _Kept(item, depth + 1) for key, item in value.items()}
        else:
            self._parts = [_Kept(item, depth + 1) for item in value]

    def is_still(self, value: Any) -> bool:
        if self._parts is None and self._value() is value:
            return True
        if type(value) is not self._type:
            return False
        if self._parts is None:
            before = self._value()
            return bool(value == before and repr(value) == repr(before))  # 0.0 is not -0.0
        if self._type is dict:
            return value.keys() == self._parts.keys() and all(self._parts[key].is_still(value[key]) for key in value)
        return _are_still(value, self._parts)


_CONTAINERS = (list, tuple, dict)
_MOST_ENTRIES, _DEEPEST = 32, 4
"""What is larger is compared as an object: the traced code has guards of its own on what it has read there."""

_NUMBERS = (int, float, complex, bool, str, bytes)


def _are_still(values: Sequence[Any], kept: list[_Kept]) -> bool:
    return len(values) == len(kept) and all(map(_Kept.is_still, kept, values))


def _as_is(value: Any) -> Any:
    return value


def _weakly(value: Any) -> Callable[[], Any]:
    """What gives ``value`` when it is called, for as long as it is there, and None after that."""
    if type(value) in _FIELDS:  # it holds the class that it is in
        owner, name = weakref.ref(value.__objclass__), value.__name__

        def field() -> Any:
            now = vars(owner()).get(name)
            return now if type(now) in _FIELDS else None

        return field
    try:
        return weakref.ref(value)
    except TypeError:
        return itertools.repeat(value).__next__


_FIELDS = (types.GetSetDescriptorType, types.MemberDescriptorType)
"""What Python itself puts into a class: ``__dict__``, ``__slots__``."""


def _called(held: list[Callable[[], Any]]) -> Iterator[Any]:
    return map(operator.call, held)


def _looked_into(function: types.FunctionType) -> list[Any]:
    code, defaults, of_keywords, cells = _of_function(function)
    return [code, defaults, of_keywords, *map(_content, cells or ())]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned to it
        return cell


def _can_change(cls: type) -> bool:
    return bool(cls.__flags__ & _HEAP_TYPE)


def _is_for_good(value: Any) -> bool:
    """Whether a class or a function is torch's own, and can be imported."""
    module = str(value.__module__)
    if module.partition(".")[0] != "torch" or getattr(value, "__closure__", None):
        return False
    return getattr(sys.modules.get(module), value.__name__, None) is value


def _is_not_for_good(value: Any) -> bool:
    return not _is_for_good(value)


def _names(code: types.CodeType) -> Iterator[str]:
    """The names of attributes in some code, and in the functions that it makes."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _values_in(contents: Iterable[types.MappingProxyType[str, Any]]) -> Iterator[Any]:
    return _flat(map(types.MappingProxyType.values, contents))


def _hooks() -> list[Any]:
    return [hook for hooks in _GLOBAL_HOOKS for hook in (len(hooks), *hooks.values())]
