"""Experts that are parameters in lists, in dicts and under names of their own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import losses_of_training
from test_module_experts import HIDDEN, INNER, TOKENS, E, K, assert_same, inputs, run
from test_regional_compilation import NUM_LAYERS, assert_equal, layers_of
from torch import Tensor, nn

import moe_rewrite

Loop = Callable[..., Tensor]


class Block(nn.Module):
    """Its experts are ``w1`` and ``w2``, held in each of the ways that :data:`HOLDERS` has."""

    def __init__(self, loop: Loop, hold: Callable[[Any], Any] = lambda m: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop = loop
        self.router = nn.Linear(HIDDEN, E, bias=False)
        self.w1 = nn.ParameterList([0.4 * torch.randn(INNER, HIDDEN) for _ in range(E)])
        self.w2 = nn.ParameterDict({f"expert_{i}": 0.4 * torch.randn(HIDDEN, INNER) for i in range(E)})
        for i in range(E):
            self.register_parameter(f"b1_{i}", nn.Parameter(torch.randn(INNER)))
            self.register_buffer(f"scale_{i}", torch.randn(()))
        self.double()
        hold(self)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return self.loop(self, x, ids, weights)


def expert(m: Any, i: Any, x: Tensor, w1: Tensor | None = None) -> Tensor:
    rows = x @ (m.w1[i] if w1 is None else w1).t()
    return torch.tanh(rows) @ m.w2[f"expert_{i}"].t()


FORMS: dict[str, Loop] = {}


def form(loop: Loop) -> Loop:
    FORMS[loop.__name__] = loop
    return loop


def over_range(compute: Callable[[Any, int, Tensor], Tensor]) -> Loop:
    def loop(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(E):
            token, slot = torch.where(ids == i)
            out.index_add_(0, token, compute(m, i, x[token]) * weights[token, slot, None])
        return out

    return loop


FORMS["list and dict"] = over_range(expert)
FORMS["attributes"] = over_range(lambda m, i, x: torch.tanh(x @ m.w1[i].t() + getattr(m, f"b1_{i}")) @ m.w1[i])
FORMS["buffers"] = over_range(lambda m, i, x: expert(m, i, x) * getattr(m, f"scale_{i}"))
FORMS["everything"] = over_range(
    lambda m, i, x: (
        nn.functional.linear(x, m.w1[i], getattr(m, f"b1_{i}")) @ m.w2[f"expert_{i}"].t() * getattr(m, f"scale_{i}")
    )
)
FORMS["attributes of a list"] = over_range(lambda m, i, x: torch.tanh(x @ getattr(m.w1, f"{i}").t()) @ m.w1[i])
FORMS["the same twice"] = over_range(lambda m, i, x: expert(m, i, x) * (2 if m.w1[i] is m.w1[i] else 1))
FORMS["compared with a number"] = over_range(lambda m, i, x: x @ (m.w1[i] * (m.w1[i] > 0)).t() @ m.w1[i])


@form
def hits(m, x, ids, weights):
    out, mask = torch.zeros_like(x), nn.functional.one_hot(ids, E).permute(2, 1, 0)
    for i in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[i].squeeze(0))
        rows = torch.tanh(x[token] @ m.w1[i].t()) @ m.w2[f"expert_{i[0]}"].t()
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


@form
def enumerated(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, w1 in enumerate(m.w1):
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, expert(m, i, x[token], w1) * weights[token, slot, None])
    return out


@form
def zipped(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, (w1, again) in enumerate(zip(m.w1, m.w1, strict=True)):
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, torch.tanh(x[token] @ w1.t()) @ again * weights[token, slot, None])
    return out


@form
def iterated(m, x, ids, weights):
    out = torch.zeros_like(x)
    for w1 in m.w1:
        out = out + torch.tanh(x @ w1.t()) @ w1
    return out


def compiled(model: nn.Module, **kwargs: Any) -> Any:
    return torch.compile(model, backend="moe_rewrite", options={"inner": "eager"}, **kwargs)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "stacked"])
@pytest.mark.parametrize("name", FORMS)
def test_form(name: str, pack: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="moe_rewrite")
    eager, model = Block(FORMS[name]), Block(FORMS[name])
    options = {"inner": "aot_eager", "experts": "grouped_mm", "pack": pack}
    fast = torch.compile(model, backend="moe_rewrite", options=options, fullgraph=True)
    for tokens in (TOKENS, 1):
        assert_same(run(fast, model, inputs(tokens)), run(eager, eager, inputs(tokens)))
    assert "-> grouped_mm" in caplog.text
    assert "left as it is" not in caplog.text


def test_captured_once_whatever_the_number_of_experts() -> None:
    (loop,) = moe_rewrite.explain(Block(FORMS["list and dict"]), inputs()).loops
    assert loop.refusal is None
    assert loop.before.count("moe_rewrite.select") == 2


# --- changes ----------------------------------------------------------------------------------------------------------


def _fresh(like: Tensor, **kwargs: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(like.shape, dtype=like.dtype), **kwargs)


def _loaded(m: Any, assign: bool = False) -> None:
    m.load_state_dict({name: torch.randn_like(value) for name, value in m.state_dict().items()}, assign=assign)


def _written(m: Any) -> None:
    with torch.no_grad():
        m.w1[1].mul_(2)


def _attribute(m: Any) -> None:
    del m.b1_1
    m.b1_1 = torch.ones(INNER, dtype=torch.float64)


def _swapped(m: Any) -> None:
    m.w1[0], m.w1[1] = m.w1[1], m.w1[0]


def _other_shape(m: Any) -> None:
    m.w1 = nn.ParameterList([torch.randn(INNER + 1, HIDDEN, dtype=torch.float64) for _ in range(E)])
    m.w2 = nn.ParameterDict({f"expert_{i}": w.detach().t().clone() for i, w in enumerate(m.w1)})
    for i in range(E):
        setattr(m, f"b1_{i}", nn.Parameter(torch.randn(INNER + 1, dtype=torch.float64)))


def _one_of_other_shape(m: Any) -> None:
    m.w1[1] = nn.Parameter(torch.randn(INNER + 1, HIDDEN, dtype=torch.float64))
    m.w2["expert_1"] = nn.Parameter(torch.randn(HIDDEN, INNER + 1, dtype=torch.float64))
    m.b1_1 = nn.Parameter(torch.randn(INNER + 1, dtype=torch.float64))


def _one_more(m: Any) -> None:
    m.w1.append(_fresh(m.w1[1]))
    m.w2[f"expert_{E}"] = _fresh(m.w2["expert_1"])


def _tied(m: Any) -> None:
    m.w1[1] = m.w1[0]


def _with_attribute(m: Any) -> None:
    m.w1[1].factor = 3.0


def _in_front(m: Any) -> None:
    vars(m.w1)["1"] = torch.ones(INNER, HIDDEN, dtype=torch.float64)
    vars(m.w2)["expert_2"] = torch.ones(HIDDEN, INNER, dtype=torch.float64)


class OtherList(nn.ParameterList):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(E - 1 - index)


def _other_class(m: Any) -> None:
    m.w1.__class__ = OtherList


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another parameter": lambda m: m.w1.__setitem__(1, _fresh(m.w1[1])),
    "another in a dict": lambda m: m.w2.update({"expert_1": _fresh(m.w2["expert_1"])}),
    "another attribute": lambda m: setattr(m, "b1_1", _fresh(m.b1_1)),
    "another buffer": lambda m: setattr(m, "scale_1", m.scale_1 + 1),
    "other data": lambda m: setattr(m.w1[1], "data", m.w1[1].data + 1),
    "written": _written,
    "loaded": _loaded,
    "loaded by assignment": lambda m: _loaded(m, assign=True),
    "tensor in the place of a parameter": _attribute,
    "frozen": lambda m: m.w1[1].requires_grad_(False),
    "all frozen": lambda m: m.requires_grad_(False),
    "swapped": _swapped,
    "one more": _one_more,
    "other shape": _other_shape,
    "one of other shape": _one_of_other_shape,
    "another list": lambda m: setattr(m, "w1", nn.ParameterList([_fresh(w) for w in m.w1])),
    "tied": _tied,
    "something in front of it": _in_front,
    "another class": _other_class,
    "hook on a gradient": lambda m: m.w1[1].register_hook(lambda grad: grad * 2),
    "attribute of the tensor": _with_attribute,
    "converted there and back": lambda m: m.float().double(),
}


NOT_ALIKE = (
    "frozen",
    "one of other shape",
    "tied",
    "something in front of it",
    "another class",
    "attribute of the tensor",
)
OF_THE_LIST = ("one more", "swapped", "another list", "tied", "something in front of it", "another class")


@pytest.mark.parametrize(
    ("change", "loop", "when"),
    [(change, "everything", "after") for change in CHANGES]
    + [(change, "everything", "before") for change in NOT_ALIKE]
    + [(change, loop, "after") for change in OF_THE_LIST for loop in ("enumerated", "hits")],
)
def test_change_shows(change: str, loop: str, when: str) -> None:
    eager, model = Block(FORMS[loop]), Block(FORMS[loop])
    fast = compiled(model)
    if when == "after":
        assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))
    for module in (eager, model):
        torch.manual_seed(5)
        CHANGES[change](module)
    for _ in range(2):
        assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))


@pytest.mark.parametrize("change", ["other data", "one more", *NOT_ALIKE[:3], *NOT_ALIKE[4:]])
def test_change_of_one_layer_shows(change: str) -> None:
    """What stands in front of a parameter in one layer alone is not seen by stock Dynamo either."""
    eager, model, inner = layers_of(lambda i: Block(FORMS["list and dict"]), count=2, fullgraph=False)
    assert_equal(model, eager)
    assert inner.graphs == 1
    for number in (1, 0):
        for module in (eager, model):
            torch.manual_seed(5)
            CHANGES[change](module.layers[number])
        assert_equal(model, eager)


@pytest.mark.parametrize("name", ["list and dict", "attributes", "hits"])
def test_one_compilation_for_all_layers(name: str) -> None:
    eager, model, inner = layers_of(lambda i: Block(FORMS[name]), NUM_LAYERS)
    for _ in range(2):
        assert_equal(model, eager)
    assert inner.graphs == 1


def test_parameters_are_the_same_objects() -> None:
    model = Block(FORMS["everything"])
    before, names = dict(model.named_parameters()), list(model.state_dict())
    compiled(model)(inputs())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == names
    other = copy.deepcopy(model)
    _written(model)
    for module in (model, other):
        assert_same(run(compiled(module), module, inputs()), run(module, module, inputs()))


def test_training_steps() -> None:
    eager, model = Block(FORMS["everything"]), Block(FORMS["everything"])
    calls = ((eager, eager), (model, compiled(model, fullgraph=True)))
    losses = [losses_of_training(module, call, inputs, steps=4) for module, call in calls]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-12)
    assert losses[0][-1] < losses[0][0]


def test_what_is_packed_is_let_go_of() -> None:
    model = Block(FORMS["list and dict"])
    compiled(model, fullgraph=True)(inputs())
    packs = {id(pack): pack for pack in moe_rewrite.packing.packs._packs.values() for pack in pack}
    mine = [pack for pack in packs.values() if pack.names == ("tensor",) and not pack.released]
    assert mine
    del model
    torch._dynamo.reset()
    gc.collect()
    assert all(pack.released for pack in mine)


# --- loops that look as if one iteration could stand for all ----------------------------------------------------------


TRAPS: dict[str, tuple[Loop, Callable[[Any], Any]]] = {}


def trap(compute: Callable[[Any, int, Tensor], Tensor], hold: Callable[[Any], Any] = lambda m: None) -> Any:
    return over_range(compute), hold


def _factors(m: Any) -> None:
    for i, w in enumerate(m.w1):
        w.factor = 1.0 + i


def _mixed(m: Any) -> None:
    m.w1 = nn.ParameterList([*list(m.w1)[: E - 1], 2.0])


def _shared(m: Any) -> None:
    m.others = nn.ParameterList([m.w1[i] for i in reversed(range(E))])


def _scaled(m: Any, i: int, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.w1[i].mul_(1.1)
    return x @ m.w1[i].t() @ m.w1[i]


def _first_written(m: Any, i: int, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.w1[0].mul_(1.1)
    return x * (m.w1[i] * 2).sum()  # keeps nothing for the backward that is written later


def _set(m: Any, i: int, x: Tensor) -> Tensor:
    m.w1[1] = m.w1[0] * 1.0
    return expert(m, i, x)


TRAPS |= {
    "which one it is": trap(lambda m, i, x: expert(m, i, x) * (2 if m.w1[i] is m.w1[1] else 1)),
    "which one it is by id": trap(lambda m, i, x: expert(m, i, x) * (2 if id(m.w1[i]) == id(m.w1[1]) else 1)),
    "which one it is in a list": trap(
        lambda m, i, x: expert(m, i, x) * (2 if any(m.w1[i] is w for w in (m.w1[0], m.w1[2])) else 1)
    ),
    "what it is": trap(lambda m, i, x: expert(m, i, x) * (2 if isinstance(m.w1[i], nn.Parameter) else 1)),
    "type": trap(lambda m, i, x: expert(m, i, x) * (2 if type(m.w1[i]) is nn.Parameter else 1)),
    "leaf": trap(lambda m, i, x: expert(m, i, x) * (2 if m.w1[i].is_leaf else 1)),
    "gradient": trap(lambda m, i, x: expert(m, i, x) * (2 if m.w1[i].grad is None else 1)),
    "attribute": trap(lambda m, i, x: expert(m, i, x) * m.w1[i].factor, _factors),
    "attribute asked for": trap(lambda m, i, x: expert(m, i, x) * getattr(m.w1[i], "factor", 1), _factors),
    "requires a gradient": trap(
        lambda m, i, x: expert(m, i, x) * (2 if m.w1[i].requires_grad else 1), CHANGES["frozen"]
    ),
    "number in the list": trap(lambda m, i, x: x * 2 if i == E - 1 else x @ m.w1[i].t() @ m.w1[i], _mixed),
    "in two lists": trap(lambda m, i, x: x @ m.w1[i].t() @ m.others[i], _shared),
    "from the end": trap(lambda m, i, x: x @ m.w1[i - 1].t() @ m.w1[i]),
    "negative": trap(lambda m, i, x: x @ m.w1[-i].t() @ m.w1[i]),
    "slice": trap(lambda m, i, x: x @ m.w1[i:][0].t() @ m.w1[i]),
    "written": (over_range(_scaled), lambda m: m.requires_grad_(False)),
    "first is written": (over_range(_first_written), lambda m: m.requires_grad_(False)),
    "set": (over_range(_set), lambda m: None),
    "data": trap(lambda m, i, x: x @ m.w1[i].data.t() @ m.w1[i]),
    "detached": trap(lambda m, i, x: x @ m.w1[i].detach().t() @ m.w1[i]),
    "one of them": trap(lambda m, i, x: x @ m.w1[1].t() @ m.w1[i]),
    "default of an attribute": trap(lambda m, i, x: expert(m, i, x) * getattr(m, f"scale_{i + 1}", 3.0)),
    "shape": trap(lambda m, i, x: expert(m, i, x) * len(m.w1) * m.w1[i].shape[0]),
}


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str) -> None:
    eager, model = Block(*TRAPS[name]), Block(*TRAPS[name])
    fast = compiled(model)
    for tokens in (TOKENS, 1):
        assert_same(run(fast, model, inputs(tokens)), run(eager, eager, inputs(tokens)))
    assert_same(dict(model.state_dict()), dict(eager.state_dict()))
