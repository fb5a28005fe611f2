"""Loops in and beside the bodies of higher-order operators, such as ``torch.cond``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import Moe, plain
from loops import inputs as routed_inputs
from test_module_experts import (
    Block,
    assert_same,
    compiled,
    enumerated_with_indexed_add,
    hits_that_pick_a_module,
    inputs,
    range_over_mask,
    run,
)
from torch import Tensor, nn

import moe_rewrite

region = torch.compiler.nested_compile_region(lambda layer, *args: layer(*args))


class Layers(nn.Module):
    """Two layers of experts that are modules, which ``call(layers, x)`` uses as it likes."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], loop: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call
        self.first, self.second = Block(loop), Block(loop)
        for parameter in self.second.parameters():
            parameter.data.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def in_region(m: Layers, x: Tensor) -> Tensor:
    return region(m.second, region(m.first, x))


def in_cond(m: Layers, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, m.first, m.second, (x,))


def in_region_beside_the_frame(m: Layers, x: Tensor) -> Tensor:
    return region(m.second, region(m.first, m.first(x)))


def before_cond(m: Layers, x: Tensor) -> Tensor:
    x = m.second(m.first(x))
    return torch.cond(x.sum() > 0, lambda x: m.first.router(x), lambda x: m.second.router(x), (x,))


def in_python(call: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """``call`` without higher-order operators."""

    def either(m: Layers, x: Tensor) -> Tensor:
        return m.first(x) if x.sum() > 0 else m.second(x)

    def either_router(m: Layers, x: Tensor) -> Tensor:
        x = m.second(m.first(x))
        return m.first.router(x) if x.sum() > 0 else m.second.router(x)

    return {
        in_region: lambda m, x: m.second(m.first(x)),
        in_cond: either,
        in_region_beside_the_frame: lambda m, x: m.second(m.first(m.first(x))),
        before_cond: either_router,
    }[call]


def assert_as_in_python(model: Layers, fn: Any) -> None:
    eager = copy.deepcopy(model)
    eager.call = in_python(model.call)
    for x in (inputs(), -inputs()):
        assert_same(run(fn, model, x), run(eager, eager, x))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("loop", [range_over_mask, enumerated_with_indexed_add])
@pytest.mark.parametrize(("call", "operator"), [(in_region, "invoke_subgraph"), (in_cond, "cond")])
def test_modules_in_a_body(
    call: Callable[..., Tensor],
    operator: str,
    loop: Callable[..., Tensor],
    pack: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """These loops are unrolled, as stock Dynamo does it."""
    caplog.set_level("INFO", "moe_rewrite")
    model = Layers(call, loop)
    options = {"inner": "aot_eager", "pack": pack}
    assert_as_in_python(model, torch.compile(model, backend="moe_rewrite", fullgraph=True, options=options))
    assert f"in the body of the operator `{operator}`" in caplog.text


@pytest.mark.parametrize("call", [in_region, in_cond])
def test_hits_and_modules_in_a_body(call: Callable[..., Tensor]) -> None:
    """What stock Dynamo cannot unroll, either, is refused with the reason."""
    model = Layers(call, hits_that_pick_a_module)
    with pytest.raises(torch._dynamo.exc.UncapturedHigherOrderOpError, match="in the body of the operator"):
        compiled(model, fullgraph=True)(inputs())


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(("call", "rewritten"), [(in_region_beside_the_frame, 1), (before_cond, 2)])
def test_modules_beside_a_body(call: Callable[..., Tensor], rewritten: int, fullgraph: bool) -> None:
    model = Layers(call, range_over_mask if fullgraph or call is before_cond else enumerated_with_indexed_add)
    fn = compiled(model, fullgraph=fullgraph)
    assert_as_in_python(model, fn)
    loops = moe_rewrite.explain(fn, inputs()).loops
    assert len([each for each in loops if each.refusal is None]) == rewritten


class Stacked(nn.Module):
    """Two layers whose experts' weights are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Moe(plain), Moe(plain)])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        for layer in self.layers:
            x = region(layer, x, ids, weights)
        return x


@pytest.mark.parametrize("fullgraph", [True, False])
def test_stacked_weights_in_a_body(fullgraph: bool) -> None:
    model, (x, ids, weights) = Stacked(), routed_inputs()
    fn = compiled(model, fullgraph=fullgraph)
    expected = run(lambda x: model(x, ids, weights), model, x)
    assert_same(run(lambda x: fn(x, ids, weights), model, x), expected)
    assert {each.refusal for each in moe_rewrite.explain(fn, x, ids, weights).loops} == {None}
