"""Modules that are only half built where Dynamo starts a frame: their own ``__init__``, a copy that is being made."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from moe_rewrite.packing import NotAlike, pack
from moe_rewrite.tree import is_module, named_modules

E, HIDDEN = 4, 6


def graph_break() -> None:
    torch._dynamo.graph_break()


class Holder(nn.Module):
    """A module that is made by the compiled function."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w


class BrokenEverywhere(nn.Module):
    """Frames of it start before ``nn.Module.__init__``, right after, and at the end."""

    def __init__(self, w: Tensor) -> None:
        graph_break()
        self.__dict__["early"] = 1
        super().__init__()
        graph_break()
        self.w = w
        graph_break()


class AsksItself(BrokenEverywhere):
    """Its ``__getattr__`` needs what is not there yet."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("w", "inner") else getattr(self.inner, name)


class Hashed(BrokenEverywhere):
    def __init__(self, w: Tensor) -> None:
        graph_break()
        nn.Module.__init__(self)
        graph_break()
        self.name = "hashed"
        self.w = w

    def __hash__(self) -> int:
        return hash(self.name)


class WithChild(nn.Module):
    """A submodule is registered before it is initialised."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        child: Any = Holder.__new__(Holder)
        self._modules["child"] = child
        graph_break()
        self.early = torch.ones(1) + 1
        graph_break()
        nn.Module.__init__(child)
        self.w = w


class Restored(Holder):
    def __setstate__(self, state: dict[str, Any]) -> None:
        graph_break()
        early = torch.ones(1) + 1
        graph_break()
        self.__dict__.update(state, early=early)


class Doubled(nn.Module):
    """A parametrization."""

    def __init__(self) -> None:
        graph_break()
        super().__init__()
        graph_break()

    def forward(self, w: Tensor) -> Tensor:
        return w * 2


def parametrized(w: Tensor) -> nn.Module:
    holder = nn.Module()
    holder.w = nn.Parameter(w.detach().clone())
    graph_break()
    parametrize.register_parametrization(holder, "w", Doubled())
    graph_break()
    return holder


MAKERS: dict[str, Callable[[Tensor], Any]] = {
    "init": BrokenEverywhere,
    "getattr": AsksItself,
    "hash": Hashed,
    "child": WithChild,
    "deepcopy": lambda w: copy.deepcopy(Restored(w.detach())),
    "pickle": lambda w: pickle.loads(pickle.dumps(Restored(w.detach()))),
    "parametrization": parametrized,
}


class Block(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN, dtype=torch.float64))
        self.make = make

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        made = self.make(self.w * 2)
        graph_break()
        out = torch.zeros_like(x)
        for e in range(E):
            token, _ = torch.where(ids == e)
            out.index_add_(0, token, x[token] @ made.w[e])
        return out


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(7, HIDDEN, dtype=torch.float64), torch.randn(7, E).topk(2).indices


@pytest.mark.parametrize("name", MAKERS)
def test_modules_that_the_compiled_function_makes(name: str) -> None:
    block = Block(MAKERS[name])
    compiled = torch.compile(block, backend="moe_rewrite", options={"inner": "eager"})
    for _ in range(2):
        assert_close(compiled(*inputs()), block(*inputs()))


class NeverInitialised(nn.Module):
    """Has its parameters in ``__dict__`` alone, and is no module that could be called."""

    def __init__(self) -> None:
        for e in range(E):
            object.__setattr__(self, f"w{e}", torch.randn(HIDDEN, HIDDEN, dtype=torch.float64))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, _ = torch.where(ids == e)
            out.index_add_(0, token, x[token] @ getattr(self, f"w{e}"))
        return out


def test_a_module_that_is_never_initialised() -> None:
    model = NeverInitialised()
    compiled = torch.compile(model.forward, backend="moe_rewrite", options={"inner": "eager"})
    assert_close(compiled(*inputs()), model.forward(*inputs()))


class Lying:
    @property
    def __class__(self) -> type:
        raise RuntimeError("asked for its class")


def test_only_what_is_initialised_is_a_module() -> None:
    assert is_module(nn.Linear(2, 2))
    for other in (Holder.__new__(Holder), NeverInitialised(), Lying(), None, nn.Linear):
        assert not is_module(other)


def test_names_are_those_of_torch() -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    root = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), shared), "b": shared, "c": shared[0], "d": nn.Tanh()})
    root.register_module("none", None)
    assert list(named_modules(root)) == list(root.named_modules())
    root.add_module("early", Holder.__new__(Holder))
    assert "early" not in dict(named_modules(root))


def test_half_built_experts_are_not_packed() -> None:
    experts = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    experts[1]._modules["0"] = nn.Linear.__new__(nn.Linear)
    with pytest.raises(NotAlike, match=r"experts\[1\].0 is not initialised"):
        pack(experts)
