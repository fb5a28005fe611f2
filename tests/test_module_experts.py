"""Experts that are modules, and loops whose length Python knows: as transformers 4 and most research code have them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import losses_of_training
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import moe_rewrite

E, K, HIDDEN, INNER, TOKENS = 4, 2, 8, 6, 7


class Expert(nn.Module):
    def __init__(self, inner: int = INNER, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, inner, bias=bias)
        self.up = nn.Linear(HIDDEN, inner, bias=bias)
        self.down = nn.Linear(inner, HIDDEN, bias=bias)
        self.act = nn.SiLU()
        self.scale = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x)) * self.scale


class Block(nn.Module):
    """A block that routes by itself; what it does with its experts is ``loop(block, x, ids, weights)``."""

    def __init__(self, loop: Callable[..., Tensor], make: Callable[[int], nn.Module] = lambda i: Expert()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop = loop
        self.num_experts = E
        self.router = nn.Linear(HIDDEN, E, bias=False)
        experts = [make(i) for i in range(E)]
        by_name = nn.ModuleDict({f"expert_{i}": expert for i, expert in enumerate(experts)})
        self.experts = by_name if loop in BY_NAME else nn.ModuleList(experts)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return self.loop(self, x, ids, weights)


Loop = Callable[[Block, Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Loop] = {}
BY_NAME: list[Loop] = []


def form(loop: Loop) -> Loop:
    FORMS[loop.__name__] = loop
    return loop


def mask_of(ids: Tensor) -> Tensor:
    return F.one_hot(ids, E).permute(2, 1, 0)


@form
def range_over_mask(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None])
    return out


@form
def range_with_leading_one(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(m.num_experts):
        expert = m.experts[i]
        slot, token = torch.where(mask[i])
        rows = x[None, token].reshape(-1, x.shape[-1])
        out.index_add_(0, token, expert(rows) * weights[token, slot, None])
    return out


@form
def range_that_skips_experts_without_rows(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        if token.shape[0] == 0:
            continue
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None])
    return out


@form
def hits_that_pick_a_module(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        layer = m.experts[expert]
        slot, token = torch.where(mask[expert].squeeze(0))
        out.index_add_(0, token, layer(x[token]) * weights[token, slot, None])
    return out


@form
def hits_that_pick_by_name(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[expert].squeeze(0))
        out.index_add_(0, token, m.experts[f"expert_{expert[0]}"](x[token]) * weights[token, slot, None])
    return out


BY_NAME.append(hits_that_pick_by_name)


@form
def rows_of_one_expert_keep_a_dimension(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids[:, :1])
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[expert].squeeze(0))  # [1, 1, T]: without the first dimension, [1, T]
        out.index_add_(0, token, m.experts[expert](x[token]) * weights[token, slot, None])
    return out


@form
def enumerated_with_indexed_add(m, x, ids, weights):
    results = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(ids == i)
        results[token] += weights[token, nth, None] * expert(x[token])
    return results


@form
def iterated_with_enumerated_ids(m, x, ids, weights):
    out = torch.zeros_like(x)
    for (i, expert), _ in zip(enumerate(m.experts), range(E), strict=True):
        token, nth = torch.where(ids == i)
        out = out.index_add(0, token, weights[token, nth, None] * expert(x[token]))
    return out


@form
def boolean_mask_of_tokens(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(m.num_experts):
        mask = (ids == i).any(-1)
        if mask.any():
            scale = (weights * (ids == i)).sum(-1)
            out[mask] += m.experts[i](x[mask]) * scale[mask].unsqueeze(-1)
    return out


@form
def every_expert_on_every_token(m, x, ids, weights):
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        out = out + dense[:, i, None] * expert(x)
    return out


@form
def every_expert_in_place(m, x, ids, weights):
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
    out = torch.zeros_like(x)
    for expert, column in zip(m.experts, dense.t(), strict=True):
        out += column.unsqueeze(-1) * expert(x)
    return out


@form
def list_and_stack(m, x, ids, weights):
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
    outputs = []
    for expert in m.experts:
        outputs.append(expert(x))
    return (torch.stack(outputs, dim=1) * dense.unsqueeze(-1)).sum(1)


@form
def shared_expert_first(m, x, ids, weights):
    out = x * 2 + 1
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(ids == i)
        out.index_add_(0, token, weights[token, nth, None] * expert(x[token]))
    return out


@form
def one_expert_counts_more(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(ids == i)
        if token.numel() == 0:
            continue
        y = expert(x[token]) * weights[token, nth, None]
        if i == 1:
            y = y * 3
        out.index_add_(0, token, y)
    return out


@form
def three_ways_to_the_next_iteration(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        if i == 0:
            continue
        if i == 2:
            out = out.index_add(0, token, m.experts[i](x[token]).relu())
        else:
            out = out.index_add(0, token, m.experts[i].down(x[token, :INNER]) * weights[token, slot, None])
    return out


@form
def hits_of_which_one_is_special(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[expert].squeeze(0))
        if expert == 3:
            out.index_add_(0, token, m.experts[expert](-x[token]))
        else:
            out.index_add_(0, token, m.experts[expert](x[token]) * weights[token, slot, None])
    return out


@form
def the_same_experts_twice(m, x, ids, weights):
    return enumerated_with_indexed_add(m, range_over_mask(m, x, ids, weights), ids, weights)


@form
def hits_that_pick_by_attribute(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[expert].squeeze(0))
        layer = getattr(m.experts, f"expert_{expert[0]}")
        out.index_add_(0, token, layer(x[token]) * weights[token, slot, None])
    return out


@form
def range_that_picks_by_attribute(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        out.index_add_(0, token, getattr(m.experts, f"expert_{i}")(x[token]) * weights[token, slot, None])
    return out


BY_NAME += [hits_that_pick_by_attribute, range_that_picks_by_attribute]


def inputs(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(module: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The result, and the gradients of the input and of all parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    result = module(x)
    weight = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view_as(result)
    ((result * weight).sum() + x.sum()).backward()  # some results depend on nothing that has a gradient
    return {"result": result.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, wanted in expected.items():
        given = actual[name]
        if wanted is None or given is None:
            # An expert without rows: None in eager where its parameters were not used, zeros from a table.
            assert all(grad is None or not grad.any() for grad in (given, wanted)), name
            continue
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def compiled(model: nn.Module, inner: Any = "aot_eager", **kwargs: Any) -> Any:
    return torch.compile(model, backend="moe_rewrite", options={"inner": inner, "experts": "grouped_mm"}, **kwargs)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What the logger said so far."""
    caplog.set_level(logging.INFO, logger="moe_rewrite")
    return lambda: "\n".join(record.getMessage() for record in caplog.records if record.name == "moe_rewrite")


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str, log: Callable[[], str]) -> None:
    eager, model = Block(FORMS[name]), Block(FORMS[name])
    fast = compiled(model, fullgraph=True)
    for tokens in (TOKENS, 1):
        assert_same(run(fast, model, inputs(tokens)), run(eager, eager, inputs(tokens)))
    assert "-> grouped_mm" in log()
    assert "left as it is" not in log()


@pytest.mark.parametrize("name", ["range_over_mask", "enumerated_with_indexed_add"])
def test_captured_once_whatever_the_number_of_experts(name: str) -> None:
    """The body stands in the graph once, before it is rewritten."""
    explanation = moe_rewrite.explain(Block(FORMS[name]), inputs())
    (loop,) = explanation.loops
    assert loop.refusal is None, str(loop)
    assert loop.before.count("torch._C._nn.linear(") == 3


def _by_a_list_of_numbers(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in m.order:
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None])
    return out


def _by_a_list_of_factors(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i, (expert, factor) in enumerate(zip(m.experts, m.order, strict=True)):
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, expert(x[token]) * weights[token, slot, None] * factor)
    return out


@pytest.mark.parametrize("dynamic", [None, False])
@pytest.mark.parametrize("loop", [_by_a_list_of_numbers, _by_a_list_of_factors])
def test_numbers_in_a_list_of_the_model(loop: Loop, dynamic: bool | None, log: Callable[[], str]) -> None:
    """As a list that is written out. The compiled loop is for these numbers alone."""
    eager, model = Block(loop), Block(loop)
    fast = compiled(model, fullgraph=True, dynamic=dynamic)
    for order in ([0, 1, 2, 3], [1, 1, 2, 3], [0, 1, 2, 3], [3, 1, 0, 2]):
        eager.order, model.order = list(order), list(order)
        for _ in range(2):
            assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))
            assert "-> grouped_mm" in log()  # by the first order
            eager.order[0] = model.order[0] = 2


# --- the parameters of the model --------------------------------------------------------------------------------------


def _other_weight(model: Block) -> None:
    model.experts[1].up.weight = nn.Parameter(torch.ones(INNER, HIDDEN, dtype=torch.float64))


def _other_data(model: Block) -> None:
    model.experts[2].down.weight.data = torch.ones(HIDDEN, INNER, dtype=torch.float64)


def _written_in_place(model: Block) -> None:
    with torch.no_grad():
        model.experts[3].gate.weight.mul_(2)


def _loaded(model: Block, assign: bool = False) -> None:
    torch.manual_seed(5)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def _other_expert(model: Block) -> None:
    torch.manual_seed(6)
    model.experts[0] = Expert().double()


def _other_scale(model: Block) -> None:
    model.experts[1].scale = 3.0


def _all_other_scales(model: Block) -> None:
    for expert in model.experts:
        expert.scale = 3.0


def _hook(model: Block) -> None:
    model.experts[1].register_forward_hook(lambda module, args, result: result * 2)


def _converted(model: Block) -> None:
    model.float().double()


CHANGES: dict[str, Callable[[Block], Any]] = {
    "another parameter": _other_weight,
    "other data": _other_data,
    "written in place": _written_in_place,
    "loaded": _loaded,
    "loaded by assignment": lambda model: _loaded(model, assign=True),
    "another expert": _other_expert,
    "another attribute of one": _other_scale,
    "another attribute of all": _all_other_scales,
    "a hook on one": _hook,
    "converted there and back": _converted,
    "swapped": lambda model: model.experts.insert(0, model.experts.pop(-1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_after_compilation_shows(change: Callable[[Block], Any]) -> None:
    eager, model = Block(range_over_mask), Block(range_over_mask)
    fast = compiled(model)
    assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))
    change(eager)
    change(model)
    assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))


def test_training_steps() -> None:
    eager, model = Block(range_over_mask), Block(range_over_mask)
    calls = ((eager, eager), (model, compiled(model, fullgraph=True)))
    losses = [losses_of_training(module, call, inputs, steps=5) for module, call in calls]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-12)
    assert losses[0][-1] < losses[0][0]


def test_parameters_are_the_same_objects() -> None:
    model = Block(range_over_mask)
    before, names = dict(model.named_parameters()), list(model.state_dict())
    compiled(model)(inputs())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_of_tables_are_known(dynamic: bool) -> None:
    """Also with dynamic shapes: the compilers are to know the sizes of weights."""
    inputs_seen: list[Tensor] = []

    def forward(gm: fx.GraphModule, example_inputs: Any) -> Any:
        inputs_seen.extend(node.meta["val"] for node in gm.graph.find_nodes(op="placeholder"))
        return make_boxed_func(gm.forward)

    compiled(Block(range_over_mask), aot_autograd(fw_compiler=forward), fullgraph=True, dynamic=dynamic)(inputs())
    tables = [value for value in inputs_seen if isinstance(value, Tensor) and value.dim() == 3]
    assert len(tables) >= 3
    assert all(isinstance(size, int) for table in tables for size in (*table.shape, *table.stride()))


def test_without_packing() -> None:
    eager, model = Block(range_over_mask), Block(range_over_mask)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    options = {"inner": "aot_eager", "experts": "grouped_mm", "pack": False}
    fast = torch.compile(model, backend="moe_rewrite", options=options, fullgraph=True)
    assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    _other_data(eager)
    _other_data(model)
    assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))


def test_copy_of_a_compiled_model() -> None:
    model = Block(range_over_mask)
    compiled(model)(inputs())
    other = copy.deepcopy(model)
    _written_in_place(model)
    assert_same(run(compiled(other), other, inputs()), run(other, other, inputs()))
    assert_same(run(compiled(model), model, inputs()), run(model, model, inputs()))


# --- experts that are not alike, and loops that are something else ----------------------------------------------------


class Noting(Expert):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def _tied(i: int, made: list[Expert] = []) -> Expert:  # noqa: B006
    made.append(Expert())
    return made[-1 - i % 2]


def _hooked(i: int) -> Expert:
    expert = Expert()
    if i == 2:
        expert.register_forward_hook(lambda module, args, result: result * 3)
    return expert


def _numbered(i: int) -> Expert:
    expert = Expert()
    expert.scale = float(i)
    return expert


UNLIKE: dict[str, Callable[[int], nn.Module]] = {
    "sizes": lambda i: Expert(INNER + i),
    "biases": lambda i: Expert(bias=i == 1),
    "classes": lambda i: Expert() if i else nn.Linear(HIDDEN, HIDDEN),
    "hook on one": _hooked,
    "attribute": _numbered,
    "parametrised": lambda i: nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, HIDDEN)),
    "dtypes": lambda i: nn.Linear(HIDDEN, HIDDEN).to(torch.float32),
}


@pytest.mark.parametrize("make", [UNLIKE[name] for name in UNLIKE if name != "dtypes"], ids=list(UNLIKE)[:-1])
@pytest.mark.parametrize("loop", [range_over_mask, every_expert_on_every_token], ids=lambda loop: loop.__name__)
def test_experts_that_are_not_alike(make: Callable[[int], nn.Module], loop: Loop, log: Callable[[], str]) -> None:
    eager, model = Block(loop, make), Block(loop, make)
    assert_same(run(compiled(model), model, inputs()), run(eager, eager, inputs()))
    assert "-> grouped_mm" not in log()


def hits_that_pick_by_attribute_twice(m, x, ids, weights):
    """One of the experts is asked for by a shorter list of names."""
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        y = x[token] if i == 3 else getattr(m.experts, f"expert_{i}")(x[token])
        out.index_add_(0, token, getattr(m.experts, f"expert_{i}")(y) * weights[token, slot, None])
    return out


BY_NAME.append(hits_that_pick_by_attribute_twice)


def _shadow(holder: Any) -> None:
    vars(holder)["expert_1"] = lambda x: x * 3


class Shadowing(nn.ModuleDict):
    expert_1 = staticmethod(lambda x: x * 3)


class OtherWay(nn.ModuleDict):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__({"expert_1": "expert_2"}.get(name, name))


def _becomes(cls: type) -> Callable[[Any], None]:
    return lambda holder: setattr(holder, "__class__", cls)


def _gap(holder: Any) -> None:
    holder["expert_x"] = holder.pop("expert_1")
    vars(holder)["expert_1"] = holder["expert_x"]


SHADOWS = {
    "in the dict": _shadow,
    "by the class": _becomes(Shadowing),
    "by another getattr": _becomes(OtherWay),
    "a name with a gap": _gap,
}


@pytest.mark.parametrize("when", ["before", "after", "another layer"])
@pytest.mark.parametrize("shadow", SHADOWS.values(), ids=SHADOWS)
@pytest.mark.parametrize(
    "loop",
    [range_that_picks_by_attribute, hits_that_pick_by_attribute, hits_that_pick_by_attribute_twice],
    ids=lambda loop: loop.__name__,
)
def test_attribute_before_an_expert(loop: Loop, shadow: Callable[[Any], None], when: str) -> None:
    pairs = [(Block(loop), Block(loop)) for _ in range(2)]
    if when == "before":
        for module in pairs[0]:
            shadow(module.experts)
    for eager, model in pairs:
        if when == "another layer" and model is pairs[1][1]:
            for module in (eager, model):
                shadow(module.experts)
        model.compile(backend="moe_rewrite", options={"inner": "eager"})
        assert_same(run(model, model, inputs()), run(eager, eager, inputs()))
        if when == "after" and model is pairs[1][1]:
            for module in (eager, model):
                shadow(module.experts)
        assert_same(run(model, model, inputs()), run(eager, eager, inputs()))


def test_attributes_of_the_block_itself(log: Callable[[], str]) -> None:
    class Flat(Block):
        def __init__(self) -> None:
            super().__init__(Flat.loop)
            for i, expert in enumerate(self.experts):
                self.add_module(f"expert_{i}", expert)
            del self.experts

        def loop(self, m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            raise AssertionError

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(K)
            out = torch.zeros_like(x)
            for i in range(self.num_experts):
                token, slot = torch.where(ids == i)
                out.index_add_(0, token, getattr(self, f"expert_{i}")(x[token]) * weights[token, slot, None])
            return out

    eager, model = Flat(), Flat()
    fast = compiled(model, fullgraph=True)
    assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))
    assert "-> grouped_mm" in log()
    for module in (eager, model):
        torch.manual_seed(4)
        module.expert_2 = Expert().double()
    assert_same(run(fast, model, inputs()), run(eager, eager, inputs()))


def test_reason_for_experts_that_are_not_alike(log: Callable[[], str]) -> None:
    """Unrolled, the loop is traced as stock Dynamo traces it: in one graph where it can."""
    eager, model = Block(range_over_mask, UNLIKE["sizes"]), Block(range_over_mask, UNLIKE["sizes"])
    assert_same(run(compiled(model, fullgraph=True), model, inputs()), run(eager, eager, inputs()))
    assert "left as it is: <root>: the experts are modules that are not alike" in log()


def _counting(m: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, mask, number = torch.zeros_like(x), mask_of(ids), 0
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        number = number * 2 + i
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None])
    return out * number


def _in_odd_order(m: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in (2, 0, 3, 1):
        slot, token = torch.where(mask[i])
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None])
    return out


def _captured(m: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(m.num_experts):
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, (lambda rows: m.experts[i](rows))(x[token]) * weights[token, slot, None])
    return out


def _picking(pick: Callable[[Any, int], Any], backwards: bool = False) -> Loop:
    """``pick(block, i)``: what the expert with the number ``i`` does with its rows."""

    def loop(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in reversed(range(E)) if backwards else range(E):
            token, slot = torch.where(ids == i)
            out.index_add_(0, token, pick(m, i)(x[token]) * weights[token, slot, None])
        return out

    return loop


FACTORS = [0.5, 1.0, 2.0, 4.0]
PICKS = {
    "ModuleList (`experts`) by `index - 1`": _picking(lambda m, i: m.experts[i - 1]),
    "ModuleList (`experts`) by `Mod(index + 1, 4)`": _picking(lambda m, i: m.experts[(i + 1) % E]),
    "ModuleList (`experts`) by `3 - index`": _picking(lambda m, i: m.experts[i], backwards=True),
    "list by `index`": _picking(lambda m, i: lambda rows: rows * FACTORS[i]),
}


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (_counting, "an iteration leaves something to the next"),
        (_in_odd_order, "it goes over something else"),
        (_captured, "a function captures `i`, which every iteration sets anew"),
        *((loop, f"the expert's index picks from a {what}; it may") for what, loop in PICKS.items()),
    ],
)
def test_reason_for_loops_that_are_not_rolled(loop: Loop, reason: str, log: Callable[[], str]) -> None:
    """They select rows, so they are told from loops over layers."""
    eager, model = Block(loop), Block(loop)
    assert_same(run(compiled(model, fullgraph=True), model, inputs()), run(eager, eager, inputs()))
    assert f"left as it is: <root>: {reason}" in log()
    assert "/test_module_experts.py:" in log()


def test_nothing_is_said_of_other_loops_over_unlike_modules(log: Callable[[], str]) -> None:
    eager, model = (Block(every_expert_on_every_token, UNLIKE["sizes"]) for _ in range(2))
    assert_same(run(compiled(model), model, inputs()), run(eager, eager, inputs()))
    assert not log()


def test_expert_that_counts_its_calls() -> None:
    eager, model = Block(range_over_mask, lambda i: Noting()), Block(range_over_mask, lambda i: Noting())
    assert_same(run(compiled(model), model, inputs()), run(eager, eager, inputs()))
    assert [expert.calls for expert in model.experts] == [expert.calls for expert in eager.experts]


class Layers(nn.Module):
    """Layers one after the other: a loop over alike modules that must not be taken for one over experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.residual = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        for layer in self.residual:
            x = x + layer(x)
        for i in range(3):
            x = x * (i + 1) + self.layers[i](x)
        return x


def test_layers_one_after_the_other(log: Callable[[], str]) -> None:
    eager, model = Layers(), Layers()
    assert_same(run(compiled(model, fullgraph=True), model, inputs()), run(eager, eager, inputs()))
    assert "->" not in log()
    assert "left as it is" not in log()
    assert "packed" not in log()
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    torch.compile(Layers(), backend=counter)(inputs())
    assert counter.frame_count == 1


TRAPS: dict[str, Loop] = {}


def trap(loop: Loop) -> Loop:
    TRAPS[loop.__name__] = loop
    return loop


@trap
def effect_of_an_expert_without_rows(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        if token.shape[0] == 0:
            out += 1
            continue
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None])
    return out


@trap
def last_rows_kept(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        rows = m.experts[i](x[token]) * weights[token, slot, None]
        out.index_add_(0, token, rows)
    return out + rows.sum()


@trap
def number_kept(m, x, ids, weights):
    out, mask, scale = torch.zeros_like(x), mask_of(ids), 1.0
    for i in range(m.num_experts):
        slot, token = torch.where(mask[i])
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None] * scale)
        scale = scale / 2
    return out


@trap
def last_write_wins(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(ids == i)
        out[token] = weights[token, nth, None] * expert(x[token])
    return out


@trap
def only_when_many_rows(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        mask = (ids == i).any(-1)
        if mask.sum() > 2:
            out[mask] += expert(x[mask])
    return out


@trap
def one_after_the_other(m, x, ids, weights):
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(ids == i)
        x = x.index_add(0, token, weights[token, nth, None] * expert(x[token]))
    return x


@trap
def stops_at_the_first_without_rows(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        mask = (ids == i).any(-1)
        if not mask.any():
            break
        out[mask] += expert(x[mask])
    return out


@trap
def reads_the_list(m, x, ids, weights):
    outputs = [x]
    for expert in m.experts:
        outputs.append(expert(outputs[-1]))
    return torch.stack(outputs).sum(0)


@trap
def first_expert_is_special(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(ids == i)
        rows = m.experts[0](x[token]) if i == 2 else expert(x[token])
        out.index_add_(0, token, rows * weights[token, nth, None])
    return out


@trap
def one_fixed_expert(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(m.num_experts):
        token, nth = torch.where(ids == i)
        out.index_add_(0, token, m.experts[1](x[token]) * m.experts[i].scale)
    return out


@trap
def doubled_ids(m, x, ids, weights):
    return enumerated_with_indexed_add(m, x, ids[:, :1].expand(-1, 2), weights)


@trap
def batch_statistics(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        token, nth = torch.where(ids == i)
        rows = expert(x[token])
        out.index_add_(0, token, rows - rows.mean(0))
    return out


@pytest.mark.parametrize("tokens", [TOKENS, 1, 30])
@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str, tokens: int) -> None:
    eager, model = Block(TRAPS[name]), Block(TRAPS[name])
    assert_same(run(compiled(model), model, inputs(tokens)), run(eager, eager, inputs(tokens)))
