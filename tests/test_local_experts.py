"""Loops over the experts that are held here, some of all: as with expert parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_module_experts import CHANGES, HIDDEN, TOKENS, E, Expert, K, assert_same, inputs, mask_of, run
from test_regional_compilation import NUM_LAYERS, assert_equal, layers_of
from torch import Tensor, nn

LOW, HIGH = 1, 3
"""The experts that are here: all but the first and the last."""


class Block(nn.Module):
    """``experts`` holds those that are here, ``spread`` has None in the places of the others."""

    def __init__(self, loop: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop = loop
        self.low, self.high = LOW, HIGH
        self.router = nn.Linear(HIDDEN, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(LOW, HIGH))
        self.spread = nn.ModuleList(self.experts[i - LOW] if LOW <= i < HIGH else None for i in range(E))
        self.lists = nn.ParameterList(0.3 * torch.randn(HIDDEN, HIDDEN) for _ in range(LOW, HIGH))
        self.stacked = nn.Parameter(0.3 * torch.randn(HIGH - LOW, HIDDEN, HIDDEN))
        self.all = nn.Parameter(0.3 * torch.randn(E, HIDDEN, HIDDEN))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return self.loop(self, x, ids, weights)


Compute = Callable[[Any, Any, Tensor], Tensor]


def over_range(compute: Compute, first: int | None = None, last: int | None = None) -> Callable[..., Tensor]:
    def loop(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(m.low if first is None else first, m.high if last is None else last):
            token, slot = torch.where(ids == i)
            out.index_add_(0, token, compute(m, i, x[token]) * weights[token, slot, None])
        return out

    return loop


FORMS: dict[str, Callable[..., Tensor]] = {
    "modules": over_range(lambda m, i, x: m.experts[i - m.low](x)),
    "parameters": over_range(lambda m, i, x: x @ m.lists[i - m.low]),
    "one tensor": over_range(lambda m, i, x: x @ m.stacked[i - m.low]),
    "one tensor, another dimension": over_range(lambda m, i, x: x @ m.all.movedim(0, 1)[:, i - m.low]),
    "here and everywhere": over_range(lambda m, i, x: m.experts[i - m.low](x) @ m.all[i]),
    "the next of all": over_range(lambda m, i, x: m.experts[i - m.low](x) @ m.all[i + 1]),
    "the next from 0": over_range(lambda m, i, x: x @ m.all[i + 1], 0, E - 1),
    "index too": over_range(lambda m, i, x: m.experts[i - m.low](x) * (i + 1)),
    "two neighbours": over_range(lambda m, i, x: x @ m.all[i] + x @ m.all[i - 1], 1, E),
    "None elsewhere": over_range(lambda m, i, x: m.spread[i](x)),
}


def form(loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
    FORMS[loop.__name__] = loop
    return loop


@form
def none_is_left_out(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.spread):
        if expert is None:
            continue
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
    return out


@form
def none_is_left_out_of_a_range(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(E):
        token, slot = torch.where(ids == i)
        if m.spread[i] is not None:
            out.index_add_(0, token, m.spread[i](x[token]) * weights[token, slot, None])
    return out


@form
def none_is_replaced(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(E):
        expert = m.spread[i]
        token, slot = torch.where(ids == i)
        rows = x[token] if expert is None else expert(x[token])
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


@form
def ids_less_the_first(m, x, ids, weights):
    out, ids = torch.zeros_like(x), ids - m.low
    for i in range(m.high - m.low):
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None])
    return out


@form
def hits(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        i = int(hit[0])
        if i < m.low or i >= m.high:
            continue
        slot, token = torch.where(mask[i])
        out.index_add_(0, token, m.experts[i - m.low](x[token]) * weights[token, slot, None])
    return out


@form
def skips_those_without_rows(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(m.low, m.high):
        mask = (ids == i).any(-1)
        if mask.any():
            out[mask] += m.experts[i - m.low](x[mask]) * weights[mask, :1]
    return out


def compiled(model: nn.Module, inner: str = "eager", **kwargs: Any) -> Any:
    return torch.compile(model, backend="moe_rewrite", options={"inner": inner, "experts": "grouped_mm"}, **kwargs)


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="moe_rewrite")
    eager, model = Block(FORMS[name]), Block(FORMS[name])
    fast = compiled(model, "aot_eager", fullgraph=True)
    for tokens in (TOKENS, 1, 30):
        assert_same(run(fast, model, inputs(tokens)), run(eager, eager, inputs(tokens)))
    assert "-> grouped_mm" in caplog.text
    assert "left as it is" not in caplog.text


@pytest.mark.parametrize("experts", ["batched_mm", "auto"])
@pytest.mark.parametrize("name", ["modules", "hits", "none_is_replaced", "skips_those_without_rows"])
def test_experts_backend(name: str, experts: str) -> None:
    eager, model = Block(FORMS[name]), Block(FORMS[name])
    fast = torch.compile(model, backend="moe_rewrite", options={"inner": "aot_eager", "experts": experts})
    for tokens in (TOKENS, 30):
        assert_same(run(fast, model, inputs(tokens)), run(eager, eager, inputs(tokens)))


def test_ids_of_no_expert_and_negative_ids() -> None:
    def loop(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return FORMS["modules"](m, x, torch.where(ids == 2, ids - 9, ids * 3), weights)

    eager, model = Block(loop), Block(loop)
    assert_same(run(compiled(model, fullgraph=True), model, inputs(30)), run(eager, eager, inputs(30)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32], ids=str)
def test_dtype_of_ids(dtype: torch.dtype) -> None:
    def loop(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return FORMS["modules"](m, x, ids.to(dtype), weights)

    eager, model = Block(loop), Block(loop)
    assert_same(run(compiled(model, fullgraph=True), model, inputs(30)), run(eager, eager, inputs(30)))


TRAPS: dict[str, Callable[..., Tensor]] = {
    "from the end": over_range(lambda m, i, x: m.experts[i - 2](x)),
    "parameter from the end": over_range(lambda m, i, x: x @ m.lists[i - 2]),
    "row from the end": over_range(lambda m, i, x: x @ m.all[i - 2]),
    "backwards": over_range(lambda m, i, x: m.experts[m.high - 1 - i](x)),
    "every other one": over_range(lambda m, i, x: x @ m.all[2 * i - 2]),
    "past the end": over_range(lambda m, i, x: x @ m.stacked[i - m.low] if i < E - 1 else x, LOW, E),
    "two lists": over_range(lambda m, i, x: m.experts[i - m.low](x) + m.spread[i](x)),
    "None is not called": over_range(lambda m, i, x: x if m.spread[i] is None else m.spread[i](x), 0, E),
    "first of all is read": over_range(lambda m, i, x: m.experts[i - m.low](x) @ m.all[0]),
}


def trap(loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
    TRAPS[loop.__name__] = loop
    return loop


@trap
def the_next_is_written(m, x, ids, weights):
    parts = torch.zeros(E + 1, *x.shape, dtype=x.dtype)
    for i in range(E):
        token, slot = torch.where(ids == i)
        parts[i + 1].index_add_(0, token, x[token] * weights[token, slot, None])
    return parts.sum(0) + parts[2] * 3


@trap
def the_next_is_set(m, x, ids, weights):
    parts = torch.zeros(E + 1, *x.shape, dtype=x.dtype)
    for i in range(E):
        parts[i + 1] = x @ m.all[i] * weights[:, :1]
    return parts.sum(0) + parts[2] * 3


@trap
def the_one_before_is_read(m, x, ids, weights):
    parts = torch.zeros(E + 1, *x.shape, dtype=x.dtype)
    for i in range(E):
        parts[i + 1] += x @ m.all[i] + parts[i]
    return parts.sum(0)


@trap
def mask_of_the_next(m, x, ids, weights):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for i in range(E - 1):
        slot, token = torch.where(mask[i + 1])
        out.index_add_(0, token, x[token] @ m.all[i] * weights[token, slot, None])
    return out


@trap
def each_leaves_something(m, x, ids, weights):
    outputs = []
    for i in range(m.low, m.high):
        outputs.append(m.experts[i - m.low](x))
    return torch.stack(outputs).sum(0) + outputs[-1]


@trap
def every_expert_that_is_here(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(m.low, m.high):
        out = out + m.experts[i - m.low](x) * weights[:, :1]
    return out


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str) -> None:
    eager, model = Block(TRAPS[name]), Block(TRAPS[name])
    fast = compiled(model)
    for tokens in (TOKENS, 1):
        assert_same(run(fast, model, inputs(tokens)), run(eager, eager, inputs(tokens)))


# --- changes ----------------------------------------------------------------------------------------------------------


def _present(m: Block) -> None:
    torch.manual_seed(3)
    m.spread[0] = Expert().double()
    m.low = 0


def _gone(m: Block) -> None:
    m.spread[1] = None
    m.low = 2


def _other_place(m: Block) -> None:
    """The same modules one place further, for those that look at None."""
    m.spread = nn.ModuleList([None, None, *list(m.spread)[1:3]])
    m.low, m.high = 2, 4


HERE: dict[str, Callable[[Block], None]] = {"present": _present, "gone": _gone, "other place": _other_place}


@pytest.mark.parametrize("change", HERE)
@pytest.mark.parametrize("name", ["None elsewhere", "none_is_left_out", "none_is_replaced"])
def test_change_of_what_is_here_shows(name: str, change: str) -> None:
    eager, model = Block(FORMS[name]), Block(FORMS[name])
    fast = compiled(model)
    assert_same(run(fast, model, inputs(30)), run(eager, eager, inputs(30)))
    for module in (eager, model):
        HERE[change](module)
    assert_same(run(fast, model, inputs(30)), run(eager, eager, inputs(30)))


OF_ONE = {"another parameter", "other data", "written in place", "loaded", "another expert", "another attribute of one"}


@pytest.mark.parametrize("change", sorted(OF_ONE))
def test_change_of_an_expert_shows(change: str) -> None:
    def do(module: Any) -> None:
        whole = module.experts
        module.experts = nn.ModuleList([*whole, *whole])  # the changes are of the experts 0 to 3
        CHANGES[change](module)
        module.experts = whole

    eager, model = Block(FORMS["here and everywhere"]), Block(FORMS["here and everywhere"])
    fast = compiled(model)
    assert_same(run(fast, model, inputs(30)), run(eager, eager, inputs(30)))
    for module in (eager, model):
        do(module)
    assert_same(run(fast, model, inputs(30)), run(eager, eager, inputs(30)))


@pytest.mark.parametrize("name", ["modules", "none_is_left_out", "parameters"])
def test_one_compilation_for_all_layers(name: str) -> None:
    eager, model, inner = layers_of(lambda i: Block(FORMS[name]), NUM_LAYERS)
    for _ in range(2):
        assert_equal(model, eager)
    assert inner.graphs == 1


def test_layers_that_have_others_here() -> None:
    def make(i: int) -> Block:
        block = Block(FORMS["none_is_left_out"])
        if i == 1:
            _other_place(block)
        return block

    eager, model, _ = layers_of(make)
    for _ in range(2):
        assert_equal(model, eager)
