"""Layers of one class that are compiled each by itself: what was compiled for the first serves them all."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_module_experts import (
    CHANGES,
    HIDDEN,
    Block,
    Expert,
    assert_same,
    enumerated_with_indexed_add,
    hits_that_pick_by_name,
    inputs,
    one_expert_counts_more,
    range_over_mask,
    run,
)
from torch import Tensor, nn

from moe_rewrite import packing
from moe_rewrite.capture import dynamo_modules
from moe_rewrite.errors import MoeRewriteError

NUM_LAYERS = torch._dynamo.config.recompile_limit + 1


class Counting:
    """An inner compiler that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs += 1
        return gm.forward


class Model(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def layers_of(
    make: Callable[[int], nn.Module], count: int = 3, pack: bool = True, fullgraph: bool = True
) -> tuple[Model, Model, Counting]:
    """The eager model, an equal one whose layers are compiled, and what counts the compilations."""
    layers = [make(i) for i in range(count)]
    for seed, layer in enumerate(layers):
        torch.manual_seed(seed)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    model = Model(layers)
    eager, inner = copy.deepcopy(model), Counting()
    for layer in model.layers:
        layer.compile(backend="moe_rewrite", options={"inner": inner, "pack": pack}, fullgraph=fullgraph)
    return eager, model, inner


def assert_equal(model: Model, eager: Model) -> None:
    assert_same(run(model, model, inputs()), run(eager, eager, inputs()))


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "stacked"])
@pytest.mark.parametrize(
    "loop",
    [range_over_mask, enumerated_with_indexed_add, hits_that_pick_by_name, one_expert_counts_more],
    ids=lambda loop: loop.__name__,
)
def test_one_compilation_for_all_layers(loop: Any, pack: bool) -> None:
    eager, model, inner = layers_of(lambda i: Block(loop), NUM_LAYERS, pack)
    for _ in range(2):
        assert_equal(model, eager)
    assert inner.graphs == 1


def test_memory_to_trace_with_is_released() -> None:
    _, model, _ = layers_of(lambda i: Block(range_over_mask), pack=False)
    model(inputs())
    packs = [packing.pack(list(layer.experts), copy=False) for layer in model.layers]
    assert [pack._tables["up.weight"]._tensor.untyped_storage().nbytes() for pack in packs] == [0, 0, 0]


class Sensitive(Expert):
    """An expert that shows whatever is changed in it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias=bias)
        self.leaky = nn.LeakyReLU(0.1)
        self.sizes, self.table = [1.0, 2.0], {"a": 1.0}
        self.register_buffer("offset", torch.linspace(-1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        y = self.leaky(super().forward(x)) + self.offset
        y = y * sum(self.sizes) - sum(self.table.values())
        if self.up.training:
            y = y * 1.5
        if not self.gate.weight.requires_grad:
            y = y.abs()
        return y * getattr(self, "more", 1.0)


def on_expert(do: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda layer: do(layer.experts[2])


def _set(path: str, name: str, value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def change(expert: nn.Module) -> None:
        owner = expert.get_submodule(path)
        setattr(owner, name, value(getattr(owner, name, None)))

    return on_expert(change)


def _data(path: str, value: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def change(expert: nn.Module) -> None:
        weight = expert.get_parameter(path)
        weight.data = value(weight.data)

    return on_expert(change)


def _fresh(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach() + 1, requires_grad=parameter.requires_grad)


def _halve(module: nn.Module, given: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
    """A hook before a forward, or after a backward."""
    return tuple(value / 2 for value in given)


def _in_register(expert: nn.Module) -> None:
    expert.up._parameters["weight"] = _fresh(expert.up.weight)  # type: ignore[union-attr, arg-type]


def _tied(layer: Any) -> None:
    layer.experts[2].up.weight = layer.experts[1].up.weight


def _frozen(layer: Any) -> None:
    for expert in layer.experts:
        expert.gate.weight.requires_grad_(False)


ANY_CHANGES: dict[str, Callable[[Any], Any]] = {
    **CHANGES,
    "parameter by assignment": _set("up", "weight", _fresh),
    "parameter in its register": on_expert(_in_register),
    "parameter of another expert": _tied,
    "parameter that is gone": _set("down", "bias", lambda bias: None),
    "data cloned": _data("up.weight", lambda data: data.clone() + 1),
    "data that is no longer contiguous": _data("up.weight", lambda data: data.t().contiguous().t()),
    "tensors swapped": on_expert(lambda expert: torch.utils.swap_tensors(expert.up.weight, _fresh(expert.up.weight))),
    "buffer by assignment": _set("", "offset", lambda offset: offset + 1),
    "buffer written": on_expert(lambda expert: expert.offset.add_(1)),
    "frozen in one": on_expert(lambda expert: expert.gate.weight.requires_grad_(False)),
    "frozen in all": _frozen,
    "evaluated in one": on_expert(lambda expert: expert.up.eval()),
    "evaluated in all": lambda layer: layer.experts.eval(),
    "number of a submodule": _set("leaky", "negative_slope", lambda slope: 0.5),
    "class of a submodule": _set("leaky", "__class__", lambda cls: nn.ReLU),
    "list appended to": on_expert(lambda expert: expert.sizes.append(3.0)),
    "dict updated": on_expert(lambda expert: expert.table.update(b=3.0)),
    "attribute that is new": _set("", "more", lambda _: 3.0),
    "submodule": _set("", "leaky", lambda _: nn.Tanh()),
    "activation of all": lambda layer: [setattr(expert, "act", nn.GELU()) for expert in layer.experts],
    "forward of one": _set("", "forward", lambda forward: lambda x: x * 2),
    "pre-hook of a submodule": on_expert(lambda expert: expert.up.register_forward_pre_hook(_halve)),
    "hook of a submodule": on_expert(lambda expert: expert.up.register_forward_hook(lambda m, x, y: y / 2)),
    "backward hook": on_expert(lambda expert: expert.down.register_full_backward_hook(_halve)),
    "hook on a gradient": on_expert(lambda expert: expert.up.weight.register_hook(lambda grad: grad * 2)),
    "parametrized": on_expert(lambda expert: nn.utils.parametrizations.weight_norm(expert.up)),
    "one more expert": lambda layer: layer.experts.append(Sensitive().double()),
}


@pytest.fixture
def hooks_are_guarded() -> Iterator[None]:
    """Where a loop is left as it is, stock Dynamo compiles an expert's forward once, for all hooks that there are."""
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        yield


@pytest.mark.usefixtures("hooks_are_guarded")
@pytest.mark.parametrize("change", ANY_CHANGES.values(), ids=ANY_CHANGES)
def test_change_of_one_layer_shows(change: Callable[[Any], Any]) -> None:
    eager, model, inner = layers_of(lambda i: Block(range_over_mask, lambda _: Sensitive()), fullgraph=False)
    assert_equal(model, eager)
    assert inner.graphs == 1
    steps = [
        (change, 1),
        (ANY_CHANGES["parameter by assignment"], 2),
        (change, 0),
    ]  # layer 0 is the one that was traced
    for do, number in steps:
        for module in (eager, model):
            torch.manual_seed(1)
            do(module.layers[number])
        assert_equal(model, eager)


@pytest.mark.usefixtures("hooks_are_guarded")
@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("change", [name for name in ANY_CHANGES if name not in CHANGES])
def test_layers_that_differ(change: str, changed: int) -> None:
    eager, model, _ = layers_of(lambda i: Block(range_over_mask, lambda _: Sensitive()), count=2, fullgraph=False)
    for module in (eager, model):
        torch.manual_seed(1)
        ANY_CHANGES[change](module.layers[changed])
    for _ in range(2):
        assert_equal(model, eager)


@pytest.mark.parametrize("change", ["other data", "another parameter", "another attribute of all", "a hook on one"])
def test_no_call_gets_the_tables_of_a_call_before(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were there no guard, or were it passed over, the tables would still not be those of experts that are no more."""
    monkeypatch.setattr(dynamo_modules, "guard_on", lambda *args: None)
    eager, model, inner = layers_of(lambda i: Block(range_over_mask))
    for _ in range(2):
        assert_equal(model, eager)
    for module in (eager, model):
        CHANGES[change](module.layers[1])
    if change in ("other data", "another parameter"):  # those can be packed again
        assert_equal(model, eager)
    else:
        with pytest.raises(MoeRewriteError, match="no longer those that this code was compiled for"):
            run(model, model, inputs())
    assert inner.graphs == 1


class Length(Block):
    """The routing weights have a place for more experts than there are, where that is asked for."""

    def __init__(self, loop: Callable[..., Tensor], count: int, classes: int) -> None:
        super().__init__(loop)
        self.experts = nn.ModuleList(Expert() for _ in range(count)).double()
        self.router = nn.Linear(HIDDEN, count, bias=False).double()
        self.classes = classes


def length_of_container(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(len(m.experts)):
        token, nth = torch.where(ids == i)
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, nth, None])
    return out


def modules_of_container(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(ids == i)
        out.index_add_(0, token, expert(x[token]) * weights[token, nth, None])
    return out


def hits_of_classes(m, x, ids, weights):
    out = torch.zeros_like(x)
    mask = torch.nn.functional.one_hot(ids, m.classes).permute(2, 1, 0)
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        nth, token = torch.where(mask[expert].squeeze(0))
        out.index_add_(0, token, m.experts[expert](x[token]) * weights[token, nth, None])
    return out


@pytest.mark.parametrize("counts", [(4, 6, 4), (6, 4, 5)], ids=str)
@pytest.mark.parametrize("classes", [0, 6], ids=["classes", "more classes"])
@pytest.mark.parametrize("loop", [length_of_container, modules_of_container, hits_of_classes], ids=lambda f: f.__name__)
def test_other_number_of_experts(loop: Callable[..., Tensor], classes: int, counts: tuple[int, ...]) -> None:
    eager, model, _ = layers_of(lambda i: Length(loop, counts[i], classes or counts[i]), fullgraph=False)
    for _ in range(2):
        assert_equal(model, eager)


def test_parameters_that_go_elsewhere_are_packed_again() -> None:
    """Nothing that was traced is different, so nothing is compiled."""
    eager, model, inner = layers_of(lambda i: Block(range_over_mask))
    for _ in range(NUM_LAYERS):
        for module in (eager, model):
            for layer in module.layers:
                CHANGES["other data"](layer)
        assert_equal(model, eager)
    assert inner.graphs == 1


def test_training_and_evaluation() -> None:
    eager, model, inner = layers_of(lambda i: Block(range_over_mask))
    for mode in (True, False, True, False):
        for module in (eager, model):
            module.train(mode)
        assert_equal(model, eager)
    assert inner.graphs == 2


def test_layers_of_other_structure_are_compiled_by_themselves() -> None:
    def make(i: int) -> Block:
        block = Block(range_over_mask, lambda _: Expert(6 + i // 3, bias=i == 2))
        for expert in block.experts:
            expert.scale = 1.5 if i < 2 else 2.5
        return block

    eager, model, inner = layers_of(make, count=6)
    for _ in range(2):
        assert_equal(model, eager)
    assert inner.graphs == 3  # 0 and 1; 2; 3, 4 and 5


def test_layer_whose_experts_are_not_alike() -> None:
    """They are not packed, and the code that was compiled for the others is not for them."""
    eager, model, _ = layers_of(lambda i: Block(range_over_mask, lambda j: Expert(bias=(i, j) == (1, 2))))
    places = [parameter.data_ptr() for parameter in model.layers[1].parameters()]
    for _ in range(2):
        assert_equal(model, eager)
    assert [parameter.data_ptr() for parameter in model.layers[1].parameters()] == places


class Asking(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.up.weight.requires_grad else 3)


def test_layer_with_frozen_experts() -> None:
    def make(i: int) -> Block:
        block = Block(range_over_mask, lambda _: Asking())
        for expert in list(block.experts)[: 2 * i]:
            expert.requires_grad_(False)
        return block

    layers = [make(i) for i in range(3)]
    eager = Model(layers)
    model = copy.deepcopy(eager)
    for layer in model.layers:
        layer.compile(backend="moe_rewrite", options={"inner": "eager"})
    assert_equal(model, eager)


class Twice(Block):
    """Its experts are found in two places, which are one in some layers."""

    def __init__(self, same: bool) -> None:
        super().__init__(range_over_mask)
        self.others = self.experts if same else copy.deepcopy(self.experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(ids == i)
            out.index_add_(0, token, expert(x[token]) * weights[token, nth, None])
        for i, expert in enumerate(self.others):
            token, nth = torch.where(ids == i)
            out.index_add_(0, token, expert(-x[token]) * weights[token, nth, None])
        return out


@pytest.mark.parametrize("same", [(True, False, True), (False, True, False)], ids=str)
def test_experts_in_two_places(same: tuple[bool, ...]) -> None:
    eager, model, _ = layers_of(lambda i: Twice(same[i]))
    for _ in range(2):
        assert_equal(model, eager)


@pytest.mark.parametrize("modules", [True, False], ids=["modules", "parameters"])
def test_layers_that_have_the_same_experts(modules: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What one layer is packed for leaves the table of the other where it is."""
    first = Block(range_over_mask)

    def make(i: int) -> Block:
        block = Block(range_over_mask) if i else first
        for number, expert in enumerate(first.experts):
            if modules:
                block.experts[number] = expert
            else:
                for path, parameter in expert.named_parameters():
                    block.experts[number].get_submodule(path.partition(".")[0]).weight = parameter
        return block

    caplog.set_level(logging.INFO, logger="moe_rewrite")
    eager, model, inner = layers_of(make)
    for _ in range(3):
        assert_equal(model, eager)
    assert inner.graphs == 1
    assert caplog.text.count("packed 4 experts") == 1


def test_layers_that_are_gone_let_go_of_their_memory() -> None:
    _, model, _ = layers_of(lambda i: Block(range_over_mask))
    model(inputs())
    packs = [packing.pack(list(layer.experts)) for layer in model.layers]
    del model.layers[0]
    gc.collect()
    assert [pack.released for pack in packs] == [True, False, False]
    before = model(inputs())
    torch.testing.assert_close(before, copy.deepcopy(model)(inputs()))
