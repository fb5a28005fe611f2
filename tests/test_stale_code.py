"""Code that changes between two calls: methods of classes, functions, what they capture, hooks.

What is compiled is for the code that was there. Dynamo guards on little of it, as it expects experts to be frames of
their own.
"""

from __future__ import annotations

import functools
import gc
import logging
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import moe_rewrite  # noqa: F401 (the backend)
from moe_rewrite.capture.code import CodeWatch

E, HIDDEN, TOKENS = 4, 6, 7

Change = Callable[[Any], Any]
Case = tuple[nn.Module, Sequence[Change]]
"""A model, and what is done to it between two calls."""

CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__] = build
    return build


class Block(nn.Module):
    """Experts that are modules."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.experts: Any = nn.ModuleList([make() for _ in range(E)])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(ids == i)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class Stacked(nn.Module):
    """Experts that are rows of a parameter, or parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN))
        self.rows = nn.ParameterList([torch.randn(HIDDEN, HIDDEN) for _ in range(E)])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(E):
            token, slot = torch.where(ids == i)
            out.index_add_(0, token, self.expert(x[token], i) * weights[token, slot, None])
        return out

    def expert(self, x: Tensor, i: int) -> Tensor:
        return x @ self.w[i]


def expert_class(*bases: type) -> Any:
    """A class of experts of its own, which a test may change."""

    class Expert(*(bases or (nn.Module,))):  # type: ignore[misc]
        factor = 2.0

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(HIDDEN, HIDDEN)
            self.act = nn.SiLU()

        def gate(self, x: Tensor) -> Tensor:
            return self.act(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(self.a(x))

    return Expert


def with_forward(forward: Callable[..., Any], **attributes: Any) -> Any:
    """The class, with another forward and other attributes."""
    cls = expert_class()
    for name, value in {"forward": forward, **attributes}.items():
        setattr(cls, name, value)
    return cls


def sets(owner: Any, name: str, value: Any) -> Change:
    return lambda model: setattr(owner, name, value)


def sets_code(function: Any, other: Any) -> Change:
    return lambda model: setattr(function, "__code__", other.__code__)


# --- methods of the experts ---


@case
def forward() -> Case:
    cls, before = (cls := expert_class()), cls.forward
    return Block(cls), [sets(cls, "forward", lambda self, x: torch.tanh(self.a(x))), sets(cls, "forward", before)]


@case
def code_of_forward() -> Case:
    cls = expert_class()
    return Block(cls), [sets_code(cls.forward, lambda self, x: torch.tanh(self.a(x)))]


@case
def forward_of_a_subclass_and_its_base() -> Case:
    base = expert_class()
    cls = type("Sub", (base,), {})
    own = sets(cls, "forward", lambda self, x: torch.tanh(self.a(x)))
    return Block(cls), [own, lambda model: delattr(cls, "forward"), sets(base, "forward", lambda self, x: x * 2)]


@case
def helper_method() -> Case:
    cls = expert_class()
    first, second = (lambda self, x: torch.sin(x)), (lambda self, x: torch.cos(x))
    return Block(cls), [sets(cls, "gate", first), sets_code(first, second)]


@case
def helper_method_of_a_subclass() -> Case:
    cls = type("Sub", (expert_class(),), {})
    return Block(cls), [sets(cls, "gate", lambda self, x: torch.sin(x))]


@case
def helper_that_a_function_calls() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        def twice(rows: Tensor) -> Tensor:
            return self.gate(self.gate(rows))

        return twice(self.a(x))

    cls = with_forward(forward)
    return Block(cls), [sets(cls, "gate", lambda self, x: x * 3)]


@case
def generator_method() -> Case:
    def parts(self: Any, x: Tensor) -> Any:
        yield x * 2
        yield x * 3

    def other_parts(self: Any, x: Tensor) -> Any:
        yield x * 7

    cls = with_forward(lambda self, x: sum(self.parts(self.a(x))), parts=parts)
    return Block(cls), [sets(cls, "parts", other_parts)]


@case
def call() -> Case:
    cls = expert_class()
    return Block(cls), [sets(cls, "__call__", lambda self, x: x)]


@case
def getattr_method() -> Case:
    def finds(value: float) -> Any:
        return lambda self, name: value if name == "late" else nn.Module.__getattr__(self, name)

    cls = with_forward(lambda self, x: self.a(x) * self.late, __getattr__=finds(2.0))
    return Block(cls), [sets(cls, "__getattr__", finds(3.0))]


@case
def property_() -> Case:
    cls = with_forward(lambda self, x: self.a(x) * self.p, p=property(lambda self: 2.0))
    other = property(lambda self: 3.0)
    return Block(cls), [sets(cls, "p", other), sets_code(other.fget, lambda self: 4.0)]


@case
def static_method() -> Case:
    cls = with_forward(lambda self, x: self.s(self.a(x)), s=staticmethod(lambda x: x * 2))
    other = staticmethod(lambda x: x * 3)
    return Block(cls), [sets(cls, "s", other), sets_code(other.__func__, lambda x: x * 4)]


@case
def class_method() -> Case:
    cls = with_forward(lambda self, x: self.s(self.a(x)), s=classmethod(lambda cls, x: x * 2))
    other = classmethod(lambda cls, x: x * 3)
    return Block(cls), [sets(cls, "s", other), sets_code(other.__func__, lambda cls, x: x * 4)]


@case
def descriptor() -> Case:
    class Descriptor:
        def __init__(self, value: float) -> None:
            self.value = value

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            return self.value

    cls = with_forward(lambda self, x: self.a(x) * self.d, d=Descriptor(2.0))
    return Block(cls), [sets(cls, "d", Descriptor(3.0)), sets(Descriptor, "__get__", lambda self, i, o=None: 9.0)]


@case
def super_of_the_forward() -> Case:
    base = expert_class()

    class Sub(base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * 2

    return Block(Sub), [sets(base, "forward", lambda self, x: self.a(x) * 3)]


@case
def bases() -> Case:
    class First(nn.Module):
        def gate(self, x: Tensor) -> Tensor:
            return x * 3

    class Second(nn.Module):
        def gate(self, x: Tensor) -> Tensor:
            return x * 5

    cls = expert_class(First)
    del cls.gate
    return Block(cls), [sets(cls, "__bases__", (Second,))]


@case
def bases_that_are_asked_for() -> Case:
    plain = type("Plain", (), {})
    marked = type("Marked", (), {})
    cls = type("Sub", (expert_class(), plain), {})
    cls.forward = lambda self, x: self.a(x) * (2 if isinstance(self, marked) else 3)
    return Block(cls), [lambda model: setattr(cls, "__bases__", (cls.__bases__[0], marked))]


# --- classes of submodules, and of other objects ---


@case
def class_of_a_submodule() -> Case:
    class Act(nn.SiLU):
        pass

    cls = expert_class()

    def make() -> nn.Module:
        expert = cls()
        expert.act = Act()
        return expert  # type: ignore[no-any-return]

    other = lambda self, x: x * 3  # noqa: E731
    return Block(make), [sets(Act, "forward", other), sets_code(other, lambda self, x: x * 4)]


@case
def parameter_behind_an_attribute_of_the_class() -> Case:
    class Layer(nn.Linear):
        pass

    cls = with_forward(lambda self, x: x @ self.a.weight)

    def make() -> nn.Module:
        expert = cls()
        expert.a = Layer(HIDDEN, HIDDEN)
        return expert  # type: ignore[no-any-return]

    return Block(make), [sets(Layer, "weight", torch.ones(HIDDEN, HIDDEN)), lambda model: delattr(Layer, "weight")]


@case
def constant_of_a_subclass() -> Case:
    base = with_forward(lambda self, x: self.a(x) * self.factor)
    cls = type("Sub", (base,), {})
    return Block(cls), [sets(cls, "factor", 3.0), sets(base, "factor", 4.0), lambda model: delattr(cls, "factor")]


@case
def constant_that_the_class_is_asked_for() -> Case:
    cls = with_forward(lambda self, x: self.a(x) * type(self).factor)
    return Block(cls), [sets(cls, "factor", 3.0)]


@case
def methods_of_a_config() -> Case:
    class Config:
        factor = 2.0

        def scale(self, x: Tensor) -> Tensor:
            return x * self.factor

    config = Config()
    cls = with_forward(lambda self, x: self.config.scale(self.a(x)), config=config)
    return Block(cls), [sets(Config, "factor", 3.0), sets(Config, "scale", lambda self, x: x * 11)]


@case
def methods_of_a_global_object() -> Case:
    class Base:
        def __call__(self, x: Tensor) -> Tensor:
            return x * 2

    cls = type("Sub", (Base,), {})
    scale = cls()
    expert = with_forward(lambda self, x: scale(self.a(x)))
    return Block(expert), [
        sets(Base, "__call__", lambda self, x: x * 3),
        sets(cls, "__call__", lambda self, x: x * 4),
    ]


@case
def class_of_the_container() -> Case:
    class Experts(nn.ModuleList):
        pass

    block = Block(expert_class())
    block.experts = Experts(block.experts)
    return block, [sets(Experts, "__iter__", lambda self: iter(list(self._modules.values())[::-1]))]


@case
def container_that_is_indexed() -> Case:
    class Experts(nn.ModuleList):
        pass

    class Indexed(Stacked):
        def expert(self, x: Tensor, i: int) -> Tensor:
            return self.experts[i](x)  # type: ignore[no-any-return, index]

    block = Indexed()
    block.experts = Experts([nn.Linear(HIDDEN, HIDDEN) for _ in range(E)])
    return block, [sets(Experts, "__getitem__", lambda self, i: self._modules[str(E - 1 - i)])]


# --- functions ---


@case
def function_in_a_closure() -> Case:
    def scale(x: Tensor) -> Tensor:
        return x * 2

    def exchange(other: Any) -> None:
        nonlocal scale
        scale = other

    cls = with_forward(lambda self, x: scale(self.a(x)))
    other = lambda x: x * 3  # noqa: E731
    return Block(cls), [lambda model: exchange(other), sets_code(other, lambda x: x * 5)]


@case
def number_in_a_closure() -> Case:
    factor = 2.0

    def exchange(other: float) -> None:
        nonlocal factor
        factor = other

    cls = with_forward(lambda self, x: self.gate(self.a(x)) * factor, gate=lambda self, x: x * factor)
    return Block(cls), [lambda model: exchange(3.0), lambda model: exchange(4.0)]


@case
def defaults() -> Case:
    def gate(self: Any, x: Tensor, a: float = 2.0, *, b: float = 3.0) -> Tensor:
        return x * a * b

    cls = with_forward(lambda self, x: self.gate(self.a(x)), gate=gate)
    return Block(cls), [
        lambda model: setattr(gate, "__defaults__", (5.0,)),
        lambda model: setattr(gate, "__kwdefaults__", {"b": 7.0}),
        lambda model: gate.__kwdefaults__.update(b=8.0),
    ]


@case
def default_that_is_a_list() -> Case:
    def gate(self: Any, x: Tensor, a: Sequence[float] = [2.0]) -> Tensor:
        return x * a[0]

    cls = with_forward(lambda self, x: self.gate(self.a(x)), gate=gate)
    return Block(cls), [lambda model: gate.__defaults__[0].__setitem__(0, 4.0)]


@case
def decorated() -> Case:
    def doubled(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, x: Tensor) -> Any:
            return function(self, x) * 2

        return wrapper

    cls = expert_class()
    inner = cls.forward
    cls.forward = doubled(inner)
    return Block(cls), [sets_code(inner, lambda self, x: self.a(x) * 3)]


@case
def function_in_an_attribute() -> Case:
    def scale(x: Tensor) -> Tensor:
        return x * 2

    cls = with_forward(lambda self, x: self.scale(self.a(x)))

    def make() -> nn.Module:
        expert = cls()
        expert.scale = scale
        return expert  # type: ignore[no-any-return]

    return Block(make), [sets_code(scale, lambda x: x * 3)]


# --- instances ---


@case
def forward_of_one_expert() -> Case:
    block = Block(expert_class())
    own = lambda model: setattr(model.experts[2], "forward", lambda x: x * 5)  # noqa: E731
    return block, [own, lambda model: delattr(model.experts[2], "forward")]


@case
def helper_of_one_expert() -> Case:
    return Block(expert_class()), [lambda model: setattr(model.experts[2], "gate", lambda x: x * 5)]


@case
def class_of_one_expert() -> Case:
    base = expert_class()
    other = type("Sub", (base,), {"forward": lambda self, x: x * 5})
    return Block(base), [lambda model: setattr(model.experts[1], "__class__", other)]


@case
def training() -> Case:
    cls = with_forward(lambda self, x: self.a(x) * (2 if self.training else 3))
    return Block(cls), [lambda model: model.eval(), lambda model: model.experts[1].train()]


# --- hooks ---


@case
def hook_of_one_expert() -> Case:
    handles: list[Any] = []
    adds = lambda model: handles.append(model.experts[1].register_forward_hook(lambda m, a, out: out * 2))  # noqa: E731
    return Block(expert_class()), [adds, lambda model: handles.pop().remove()]


@case
def hooks_of_all_modules() -> Case:
    cls, handles, register = expert_class(), list[Any](), nn.modules.module
    after = lambda m, args, out: out * 2 if isinstance(m, cls) else None  # noqa: E731
    before = lambda m, args: (args[0] * 3,) if isinstance(m, cls) else None  # noqa: E731
    return Block(cls), [
        lambda model: handles.append(register.register_module_forward_hook(after)),
        lambda model: handles.pop().remove(),
        lambda model: handles.append(register.register_module_forward_pre_hook(before)),
        lambda model: handles.pop().remove(),
    ]


class Routed(Block):
    """What stands beside the loop is called in its function, too."""

    def __init__(self, make: Callable[[], nn.Module], router: nn.Module) -> None:
        super().__init__(make)
        self.router = router

    def prepare(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(self.prepare(x), ids, self.router(weights))

    def direct(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        weights = self.router(weights)
        out = torch.zeros_like(x)
        for i in range(E):
            token, slot = torch.where(ids == i)
            out.index_add_(0, token, self.experts[i](x[token]) * weights[token, slot, None])
        return out


@case
def hook_of_the_router() -> Case:
    handles: list[Any] = []
    block = Routed(expert_class(), nn.Linear(2, 2))
    block.forward = block.direct  # type: ignore[method-assign]
    return block, [
        lambda model: handles.append(model.router.register_forward_hook(lambda m, args, out: out * 3)),
        lambda model: handles.pop().remove(),
        lambda model: handles.append(model.router.register_forward_pre_hook(lambda m, args: (args[0] * 3,))),
        lambda model: handles.pop().remove(),
    ]


# --- beside the experts ---


@case
def method_of_the_block() -> Case:
    block_class = type("Own", (Routed,), {})
    block = block_class(expert_class(), nn.Identity())
    return block, [sets(block_class, "prepare", lambda self, x: x * 3)]


@case
def class_of_the_router() -> Case:
    router = type("Router", (nn.Identity,), {})
    return Routed(expert_class(), router()), [sets(router, "forward", lambda self, x: x * 3)]


# --- experts that are parameters ---


@case
def method_beside_a_parameter() -> Case:
    cls = type("Own", (Stacked,), {"gate": lambda self, x: x * 2})
    cls.expert = lambda self, x, i: self.gate(x @ self.w[i])  # type: ignore[attr-defined]
    gate, body = (lambda self, x: x * 3), (lambda self, x, i: x @ self.w[i] * 9)
    return cls(), [sets(cls, "gate", gate), sets_code(gate, lambda self, x: x * 4), sets(cls, "expert", body)]


@case
def closure_and_defaults_beside_a_parameter() -> Case:
    factor = 2.0

    def exchange(other: float) -> None:
        nonlocal factor
        factor = other

    def expert(self: Any, x: Tensor, i: int, a: float = 2.0) -> Tensor:
        return x @ self.w[i] * factor * a  # type: ignore[no-any-return]

    cls = type("Own", (Stacked,), {"expert": expert})
    return cls(), [lambda model: exchange(3.0), lambda model: setattr(expert, "__defaults__", (7.0,))]


@case
def act_beside_a_parameter() -> Case:
    act = type("Act", (nn.SiLU,), {})
    cls = type("Own", (Stacked,), {"expert": lambda self, x, i: self.act(x @ self.w[i])})
    block = cls()
    block.act = act()
    return block, [sets(act, "forward", lambda self, x: x * 3)]


@case
def method_beside_a_list_of_parameters() -> Case:
    cls = type("Own", (Stacked,), {"gate": lambda self, x: x * 2})
    cls.expert = lambda self, x, i: self.gate(x @ self.rows[i])  # type: ignore[attr-defined]
    return cls(), [sets(cls, "gate", lambda self, x: x * 3)]


@case
def class_of_a_list_of_parameters() -> Case:
    listed = type("Listed", (nn.ParameterList,), {})
    cls = type("Own", (Stacked,), {"expert": lambda self, x, i: x @ self.rows[i]})
    block = cls()
    block.rows = listed(block.rows)
    return block, [sets(listed, "__getitem__", lambda self, i: getattr(self, str(E - 1 - i)))]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, E).topk(2).indices, torch.rand(TOKENS, 2)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "stacked"])
@pytest.mark.parametrize("name", CASES)
def test_the_code_of_now_runs(name: str, pack: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, changes = CASES[name]()
    compiled = torch.compile(model, backend="moe_rewrite", options={"inner": "eager", "pack": pack})
    with torch.no_grad(), caplog.at_level(logging.INFO, "moe_rewrite"):
        assert_close(compiled(*inputs()), model(*inputs()))
        assert any(" -> " in message for message in caplog.messages)
        for change in changes:
            change(model)
            assert_close(compiled(*inputs()), model(*inputs()))


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_what_is_not_traced_may_change() -> None:
    cls = expert_class()
    cls.calls = 0
    block = Block(cls)
    compiled = torch.compile(block, backend="moe_rewrite", options={"inner": "eager"}, fullgraph=True)
    compiled(*inputs())
    for _ in range(3):
        cls.calls += 1
        cls.__doc__ = "Another text."
        compiled(*inputs())
    assert compilations() == 1


def test_code_that_comes_back_is_compiled_once() -> None:
    cls = expert_class()
    before, other = cls.forward, lambda self, x: torch.tanh(self.a(x))
    block = Block(cls)
    compiled = torch.compile(block, backend="moe_rewrite", options={"inner": "eager"}, fullgraph=True)
    for _ in range(3):
        for function in (before, other):
            cls.forward = function
            assert_close(compiled(*inputs()), block(*inputs()))
    assert compilations() == 2


def test_torch_itself_is_looked_at() -> None:
    block, before = Block(expert_class()), nn.SiLU.forward
    compiled = torch.compile(block, backend="moe_rewrite", options={"inner": "eager"})
    compiled(*inputs())
    try:
        nn.SiLU.forward = lambda self, x: x * 3  # type: ignore[method-assign]
        assert_close(compiled(*inputs()), block(*inputs()))
    finally:
        nn.SiLU.forward = before  # type: ignore[method-assign]
    assert_close(compiled(*inputs()), block(*inputs()))


def test_layers_of_one_class_share_what_is_compiled() -> None:
    cls = expert_class()
    layers = [Block(cls) for _ in range(3)]
    for layer in layers:
        layer.compile(backend="moe_rewrite", options={"inner": "eager"}, fullgraph=True)
    for change in (lambda: None, lambda: setattr(cls, "gate", lambda self, x: x * 2)):
        before = compilations()
        change()
        for layer in layers:
            assert_close(layer(*inputs()), layer.forward(*inputs()))
        assert compilations() == before + 1


def test_what_is_watched_is_not_kept() -> None:
    def watch() -> tuple[CodeWatch, list[weakref.ref[Any]]]:
        cls = expert_class()
        expert = cls()
        function = lambda x, y=[expert]: expert(x) + y[0](x)  # noqa: E731
        cls.captures = lambda self: expert
        others = [type("Plain", (), {"captures": cls.captures}), type("Slotted", (), {"__slots__": ("a",)})]
        watch = CodeWatch([cls, *others], [function, F.silu], function.__code__)
        assert watch.unchanged()
        return watch, [weakref.ref(kept) for kept in (cls, expert, *others)]

    watched, kept = watch()
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4
    assert not watched.unchanged()


def test_large_containers_are_objects() -> None:
    table = list(range(10_000))
    looping: list[Any] = []
    looping.append(looping)

    def function(x: list[Any] = looping, y: list[int] = table) -> Any:
        return x, y, table

    watch = CodeWatch([], [function], function.__code__)
    assert watch.unchanged()
    function.__defaults__ = (looping, [*table])
    assert not watch.unchanged()


def test_cells_without_contents() -> None:
    def function() -> Any:
        return late

    watch = CodeWatch([], [function], function.__code__)
    assert watch.unchanged()
    late = 1
    assert not watch.unchanged()
    assert isinstance(function, types.FunctionType)
