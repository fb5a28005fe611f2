"""Are these experts the same program with other values?

Then tracing one of them is tracing all of them. What is compared is what the forward of a module can see: classes,
submodules, plain attributes, and the parameters and buffers but for their values.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # seen to work in 2.11, 2.13 and 2.15

from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.tree import is_module

INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""What every module has in its ``__dict__`` besides attributes of its own."""

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Hooks that run when the module is called. Those of ``state_dict`` are none of our business."""

_SCALARS = (int, float, complex, bool, str, bytes, type(None))
_CONTAINERS = (list, tuple, dict, set, frozenset)


class NotAlike(MoeRewriteError):
    """The experts cannot be packed. The message says which one, and why."""


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What one expert is made of. Position 0 is the expert itself.

    Attributes:
        modules: each module once, in the order in which they are met.
        paths: the path of each from the expert, ``""`` for itself.
        children: for each module, the names and positions of its children (None for a child that is None).
        tensors: parameters and buffers that are not None, by their path.
    """

    modules: tuple[nn.Module, ...]
    paths: tuple[str, ...]
    children: tuple[tuple[tuple[str, int | None], ...], ...]
    tensors: dict[str, Tensor]


def anatomies(experts: Sequence[nn.Module]) -> list[Anatomy]:
    """What each expert is made of, all of them alike.

    Raises:
        NotAlike: they are not.
    """
    if not experts:
        raise NotAlike("there are no experts")
    if len({id(expert) for expert in experts}) < len(experts):
        raise NotAlike("the same expert is there twice")
    found = [_dissect(expert, f"experts[{number}]") for number, expert in enumerate(experts)]
    for number, anatomy in enumerate(found):  # the first with itself too: not every attribute may be in a template
        _compare(found[0], anatomy, f"experts[{number}]")
    owners: dict[int, str] = {}
    for number, anatomy in enumerate(found):
        for name, tensor in anatomy.tensors.items():
            place = join(f"experts[{number}]", name)
            owner = owners.setdefault(id(tensor), place)
            if owner != place:
                raise NotAlike(f"{place} is the same tensor as {owner}")
    return found


def tensors_of(expert: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of an expert, by their path from it: as they are registered, whatever its class has.

    Raises:
        NotAlike: they are none that could be packed.
    """
    return _dissect(expert, "the expert").tensors


def join(*path: str) -> str:
    return ".".join(part for part in path if part)


def attributes(module: nn.Module) -> dict[str, Any]:
    """What is in a module's ``__dict__`` besides what every module has there."""
    return {name: value for name, value in vars(module).items() if name not in INTERNAL}


def tensor_attributes(tensor: Tensor) -> dict[str, Any]:
    """What was set on a tensor, but for the marks that Dynamo leaves on those it has seen."""
    if isinstance(tensor, FakeTensor):
        return {}
    return {name: value for name, value in vars(tensor).items() if not name.startswith("_dynamo")}


def is_unreal(tensor: Tensor) -> bool:
    """Without memory of its own."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def copied(value: Any) -> Any:
    """``value``, its containers copied."""
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value


def is_container(value: Any) -> bool:
    """Can change without being another object."""
    return type(value) in _CONTAINERS


def parts(expert: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every object of an expert that a template has another one for, with its path from the expert.

    Those are modules, tensors, and the containers in the ``__dict__`` of these, which have the path of their owner.
    """
    waiting, seen = [("", expert)], {id(expert)}
    for path, module in waiting:  # grows on the way
        if not is_module(module):  # not initialised yet: it has only what is in its `__dict__`
            yield path, module
            continue
        tensors = [*module._parameters.items(), *module._buffers.items()]
        there = [(join(path, name), tensor) for name, tensor in tensors if tensor is not None]
        for place, owner in ((path, module), *there):
            yield place, owner
            for name, value in vars(owner).items():
                yield from ((place, part) for part in _containers(value, name in INTERNAL))
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append((join(path, name), child))


def _containers(value: Any, is_internal: bool = False) -> Iterator[Any]:
    """What :func:`copied` copies, and the registers and hooks of a module."""
    if is_container(value):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)
    elif is_internal and isinstance(value, dict):
        yield value


def difference(mine: Any, theirs: Any) -> str | None:
    """Why one value cannot stand for the other: ``"is 1, theirs 2"``; None where it can."""
    if type(mine) is not type(theirs):
        return f"is {_short(mine)} and not {_short(theirs)}"
    if type(mine) in _SCALARS:
        # repr too: 0.0 == -0.0
        return None if mine == theirs and repr(mine) == repr(theirs) else f"is {_short(mine)} and not {_short(theirs)}"
    if type(mine) in (set, frozenset):
        same = mine == theirs and all(type(item) in _SCALARS for item in mine | theirs)
        return None if same and sorted(map(repr, mine)) == sorted(map(repr, theirs)) else "is another set"
    if type(mine) in _CONTAINERS:
        if len(mine) != len(theirs):
            return f"has {len(mine)} entries and not {len(theirs)}"
        if type(mine) is dict:
            pairs = [*zip(mine, theirs, strict=True), *zip(mine.values(), theirs.values(), strict=True)]
        else:
            pairs = [*zip(mine, theirs, strict=True)]
        whys = (difference(one, other) for one, other in pairs)
        return next((f"holds an entry that {why}" for why in whys if why is not None), None)
    if isinstance(mine, nn.Module):
        return "is a module that is held outside of the registered submodules"
    if isinstance(mine, types.MethodType) and isinstance(mine.__self__, nn.Module):
        return "is a method bound to a module"
    if mine is not theirs:
        return f"is an object of its own in each expert ({type(mine).__name__})"
    return None


def _short(value: Any) -> str:
    text = repr(value) if type(value) in _SCALARS else f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


def _dissect(expert: nn.Module, place: str) -> Anatomy:
    if not issubclass(type(expert), nn.Module):
        raise NotAlike(f"{place} is no module but a {type(expert).__name__}")
    modules, paths = [expert], [""]
    children: list[tuple[tuple[str, int | None], ...]] = []
    positions = {id(expert): 0}
    tensors: dict[str, Tensor] = {}
    for module, path in zip(modules, paths, strict=True):  # both grow on the way
        _check_module(module, join(place, path))
        mine: list[tuple[str, int | None]] = []
        for name, child in module._modules.items():
            if child is expert:
                raise NotAlike(f"{join(place, path, name)} is the expert itself")
            if child is not None and id(child) not in positions:
                positions[id(child)] = len(modules)
                modules.append(child)
                paths.append(join(path, name))
            mine.append((name, None if child is None else positions[id(child)]))
        children.append(tuple(mine))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors[join(path, name)] = tensor
                _check_tensor(tensor, join(place, path, name), name in module._parameters)
    return Anatomy(tuple(modules), tuple(paths), tuple(children), tensors)


def _check_module(module: nn.Module, place: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise NotAlike(f"{place} is a ScriptModule")
    if not is_module(module):
        raise NotAlike(f"{place} is not initialised: nn.Module.__init__ has not run")
    if nn.utils.parametrize.is_parametrized(module):
        raise NotAlike(f"{place} has parametrizations")
    for hooks in CALL_HOOKS:
        if vars(module).get(hooks):
            raise NotAlike(f"{place} has {hooks.strip('_').replace('_', ' ')}")
    if "forward" in vars(module):
        raise NotAlike(f"{place} has a forward of its own, which is not the one of its class")
    if any(vars(cls).get("__slots__") for cls in type(module).__mro__):
        raise NotAlike(f"{place} keeps attributes in __slots__")


def _check_tensor(tensor: Any, place: str, is_parameter: bool) -> None:
    plain = (nn.Parameter,) if is_parameter else (Tensor, nn.Parameter)
    if type(tensor) not in plain and not isinstance(tensor, FakeTensor):
        raise NotAlike(f"{place} is a {type(tensor).__name__} and no plain tensor")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise NotAlike(f"{place} is sparse, quantised, or lazily conjugated or negated")
    if tensor.grad_fn is not None:
        raise NotAlike(f"{place} is computed from other tensors")
    if not tensor.is_contiguous():
        raise NotAlike(f"{place} is not contiguous")
    if tensor.is_inference():
        raise NotAlike(f"{place} was made in inference mode")


def compare_modules(first: Anatomy, other: Anatomy, place: str) -> None:
    """Compare all but the tensors.

    Raises:
        NotAlike: they differ.
    """
    if other.paths != first.paths or other.children != first.children:
        mine, theirs = _leaves(other), _leaves(first)
        extra = sorted(mine ^ theirs)
        what = f"{join(place, extra[0])} is only in one of them" if extra else "the same modules in other places"
        raise NotAlike(f"{place} is built in another way than experts[0]: {what}")
    for path, mine, theirs in zip(first.paths, other.modules, first.modules, strict=True):
        _compare_modules(mine, theirs, join(place, path), join("experts[0]", path))


def _compare(first: Anatomy, other: Anatomy, place: str) -> None:
    compare_modules(first, other, place)
    for name, tensor in other.tensors.items():
        _compare_tensors(tensor, first.tensors[name], join(place, name), join("experts[0]", name))


def _leaves(anatomy: Anatomy) -> set[str]:
    return {
        join(path, name)
        for path, children in zip(anatomy.paths, anatomy.children, strict=True)
        for name, position in children
        if position is not None
    }


def _compare_modules(mine: nn.Module, theirs: nn.Module, place: str, first: str) -> None:
    if type(mine) is not type(theirs):
        raise NotAlike(f"{place} is a {type(mine).__name__}, {first} a {type(theirs).__name__}")
    for register in ("_parameters", "_buffers"):
        there = [[(name, t is not None) for name, t in vars(m)[register].items()] for m in (mine, theirs)]
        if there[0] != there[1]:
            names = [{name for name, is_there in those if is_there} for those in there]
            which = sorted(names[0] ^ names[1])
            what = f"{join(place, which[0])} is only in one of them" if which else "in another order"
            raise NotAlike(f"{place} and {first} have other {register.strip('_')}: {what}")
    own, others = attributes(mine), attributes(theirs)
    for name in {**own, **others}:
        if (name in own) != (name in others):
            raise NotAlike(f"{place} and {first} differ: only one of them has {name}")
        why = difference(own[name], others[name])
        if why is not None:
            raise NotAlike(f"{join(place, name)} {why}")


def _compare_tensors(mine: Tensor, theirs: Tensor, place: str, first: str) -> None:
    for what in ("shape", "dtype", "device"):
        if getattr(mine, what) != getattr(theirs, what):
            values = [v if what != "shape" else tuple(v) for v in (getattr(mine, what), getattr(theirs, what))]
            raise NotAlike(f"{place} has {what} {values[0]}, {first} has {values[1]}")
    if type(mine) is not type(theirs):
        raise NotAlike(f"{place} is a {type(mine).__name__}, {first} a {type(theirs).__name__}")
    own, others = tensor_attributes(mine), tensor_attributes(theirs)
    for name in {**own, **others}:
        if (name in own) != (name in others) or difference(own[name], others[name]) is not None:
            raise NotAlike(f"{place} and {first} differ in the attribute {name} of the tensor")
