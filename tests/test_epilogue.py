"""What of a row program is computed in the kernel of a product, and what is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from fused import FOUR, Recorded, assert_same_numbers, fast, inputs, recording
from loops import HIDDEN, INTERMEDIATE, NUM_EXPERTS, Moe, hits, loop_over
from operands import DEVICE, drawn, needs_interpreter
from torch import Tensor

triton = pytest.importorskip("triton", reason="torch for the CPU comes without triton")


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    return recording(monkeypatch)


def first(m, x, token, expert, bias=False):
    """A product of rows, ``[rows, HIDDEN]``."""
    return F.linear(x[token], m.weight[expert], m.bias[expert] if bias else None)


def second(m, rows, expert):
    """A product of half as wide rows."""
    return F.linear(rows, m.weight[expert].t()[:, FOUR])


FUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "halves": (lambda m, r: F.silu(r.halves[0]) * r.halves[1], "silu v0;mul v2 v1"),
    "halves with bias": (
        lambda m, r: F.silu(r.halves[0]) * r.halves[1],
        "add v0 v2;silu v4;add v1 v3;mul v5 v6",
    ),
    "up first": (lambda m, r: r.halves[1] * F.silu(r.halves[0]), "silu v0;mul v1 v2"),
    "split": (lambda m, r: torch.mul(*r.whole.split(HIDDEN // 2, -1)), "mul v0 v1"),
    "slices of unequal steps": (lambda m, r: r.whole[:, :4] * r.whole[:, ::2], "mul v0 v1"),
    "slice of a slice": (lambda m, r: r.whole[:, 1:][:, ::2] * r.whole[:, 1::2][:, :4], "mul v0 v0"),
    "one half": (lambda m, r: F.relu(r.halves[1]), "relu v0"),
    "gpt_oss, with bias": (
        lambda m, r: _gated(r.whole[:, ::2].clamp(max=0.7), r.whole[:, 1::2].clamp(-0.5, 0.5)),
        "add v1 v2;clamp_min v4 -0.5;clamp_max v5 0.5;add v6 1.0;"
        "add v0 v3;clamp_max v8 0.7;mul v9 1.702;sigmoid v10;mul v9 v11;mul v7 v12",
    ),
    "relu squared": (lambda m, r: F.relu(r.whole[:, FOUR]) ** 2, "relu v0;square v1"),
    "relu times itself": (lambda m, r: _times_itself(F.relu(r.whole[:, FOUR])), "relu v0;mul v1 v1"),
    "gelu": (lambda m, r: F.gelu(r.halves[0]) * r.halves[1], "gelu v0;mul v2 v1"),
    "gelu tanh": (lambda m, r: F.gelu(r.halves[0], approximate="tanh") * r.halves[1], "gelu_tanh v0;mul v2 v1"),
    "gathered bias": (lambda m, r: F.silu(r.whole + r.bias)[:, FOUR], "add v0 v1;silu v2"),
    "all the operators": (
        lambda m, r: (
            torch.maximum(-r.halves[0], r.halves[1].abs().exp()) / torch.minimum(*r.halves).clamp_min(2)
            - r.halves[0].clamp_max(0.25)
        ),
        "neg v0;abs v1;exp v3;maximum v2 v4;minimum v0 v1;clamp_min v6 2.0;div v5 v7;clamp_max v0 0.25;sub v8 v9",
    ),
    "a number on the right": (lambda m, r: (r.whole[:, FOUR] - 1e-05) / -3, "sub v0 1e-05;div v1 -3.0"),
    "to float32 and back": (lambda m, r: F.silu(r.whole[:, FOUR].float()).to(r.dtype), "silu v0"),
    "through bfloat16": (lambda m, r: r.whole[:, FOUR].bfloat16().float(), "bfloat16 v0"),
    "in place": (lambda m, r: F.relu_((r.whole * 1).mul_(2))[:, FOUR], "mul v0 1.0;mul v1 2.0;relu v2"),
}
"""What one kernel computes: a function of the first product, and the program."""


def _gated(gate, up):
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def _times_itself(rows):
    return rows * rows


class Rows:
    """The first product of a body, whole and in halves, and what went into it."""

    def __init__(self, m, x, token, expert, has_bias):
        self.x, self.token, self.expert, self.dtype = x, token, expert, x.dtype
        self.weight, self.bias = m.weight[expert], m.bias[expert]
        self.whole = F.linear(x[token], self.weight, self.bias if has_bias else None)
        self.halves = self.whole.chunk(2, -1)


def check_fused(recorded: Recorded, loop: Any, same_numbers: bool = True) -> None:
    module, args = Moe(loop, dtype=torch.float32).to(DEVICE), inputs()
    with torch.no_grad():
        actual, expected = fast(module)(*args), module(*args)
    assert len(recorded.loops) == 1
    if same_numbers:
        assert_same_numbers(actual, expected)


@needs_interpreter
@pytest.mark.parametrize("name", FUSED)
def test_fused(recorded, name):
    function, program = FUSED[name]

    def body(m, x, ids, weights, expert, slot, token):
        rows = function(m, Rows(m, x, token, expert, "with bias" in name))
        return second(m, rows, expert)

    # Of bfloat16 a number may be rounded the other way.
    check_fused(recorded, loop_over(body), same_numbers=name != "through bfloat16")
    assert recorded.programs == [program, ""]


@needs_interpreter
def test_operands_of_a_stage(recorded):
    """Which columns of which values, by start and step."""

    def interleaved(m, x, ids, weights, expert, slot, token):
        y = first(m, x, token, expert, bias=True)
        return second(m, F.silu(y[:, 1::2]) * y[:, ::2], expert)

    check_fused(recorded, loop_over(interleaved))
    last, stage = recorded.stages[-1]
    assert stage.epilogue == "add v1 v2;silu v4;add v0 v3;mul v5 v6"
    assert [(one.start, one.step, one.width) for one in stage.products] == [(0, 2, 4), (1, 2, 4)]
    assert [(one.start, one.step, one.width) for one in stage.vectors] == [(1, 2, 4), (0, 2, 4)]
    assert len({one.value for one in stage.products}) == len({one.value for one in stage.vectors}) == 1
    assert all(one.rows is stage.rows for one in stage.products)
    assert all(one.rows is None for one in stage.vectors)
    assert last.rows is stage.result
    assert [(one.start, one.step, one.width) for one in last.products] == [(0, 1, HIDDEN)]


@needs_interpreter
def test_operands_of_two_products(recorded):
    """Two weights for the same rows."""

    @loop_over
    def two(m, x, ids, weights, expert, slot, token):
        rows = x[token]
        gate, up = F.linear(rows, m.up[expert]), F.linear(rows, m.weight[expert][:INTERMEDIATE])
        return F.linear(F.silu(gate) * up, m.down[expert]) * weights[token, slot, None]

    check_fused(recorded, two)
    _, stage = recorded.stages[-1]
    assert stage.epilogue == "silu v0;mul v2 v1"
    assert [(one.start, one.step, one.width) for one in stage.products] == [(0, 1, INTERMEDIATE)] * 2
    assert len({one.value for one in stage.products}) == 2


SEPARATE: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    # what it is, and the programs there are: products as they are, and what can be fused still
    "used by a product too": (lambda m, r: r.whole + F.linear(F.silu(r.whole), r.weight), ["", ""]),
    "used by a norm too": (lambda m, r: F.silu(r.whole) * r.whole.mean(-1, keepdim=True), [""]),
    "norm between": (lambda m, r: F.silu(F.layer_norm(r.whole, (HIDDEN,))), [""]),
    "softmax": (lambda m, r: r.whole.softmax(-1) * r.whole, [""]),
    "products of other rows": (lambda m, r: r.whole * F.linear(r.x[r.token] * 2, r.weight), ["", ""]),
    "product of itself": (lambda m, r: r.whole * F.linear(r.whole, r.weight), ["", ""]),
    "three products": (lambda m, r: _thirds(r.whole), [""]),
    "three vectors": (
        lambda m, r: r.whole + r.bias + r.weight[0] + r.weight[1],
        ["add v0 v1;add v3 v2"],
    ),
    "a number of each row": (lambda m, r: F.silu(r.whole) * r.x[r.token][:, :1], ["silu v0"]),
    "a number of the expert": (lambda m, r: F.silu(r.whole) * m.scale[r.expert], ["silu v0"]),
    "a column for all": (lambda m, r: F.silu(r.whole) * r.whole[:, :1], [""]),
    "truths": (lambda m, r: (r.whole > 0).to(r.dtype) * r.whole, [""]),
    "integers": (lambda m, r: (r.whole * 4).int() / 4, ["mul v0 4.0"]),
    "through float64": (lambda m, r: r.whole.double().exp().to(r.dtype), [""]),
    "where": (lambda m, r: torch.where(r.whole > 0, r.whole, r.whole * 0.5), [""]),
    "add with alpha": (lambda m, r: torch.add(r.whole, r.whole, alpha=2), [""]),
    "subtract with alpha": (lambda m, r: torch.sub(r.whole, 1, alpha=2), [""]),
    "division that rounds": (lambda m, r: torch.div(r.whole, 0.3, rounding_mode="floor") + r.whole, [""]),
    "clamp by a vector": (lambda m, r: torch.clamp(r.whole, max=r.bias), [""]),
    "clamp by NaN": (lambda m, r: torch.clamp(r.whole, max=math.nan), [""]),
    "cube": (lambda m, r: r.whole**3, [""]),
    "power of two": (lambda m, r: 2**r.whole, [""]),
    "from a number": (lambda m, r: 1 - r.whole, [""]),
    "a vector for all experts": (lambda m, r: F.silu(r.whole + m.cube[0, 0]), [""]),
    "a row of the token": (lambda m, r: F.silu(r.whole + r.x[r.token]), [""]),
    "columns turned round": (lambda m, r: r.whole.flip(-1) * r.whole, [""]),
    "halves put together": (lambda m, r: torch.cat(r.halves[::-1], -1), [""]),
    "used again and again": (lambda m, r: _grows(r.whole), None),  # type: ignore[dict-item]
}
"""What one kernel must not compute, or not all of it."""


def _thirds(whole):
    a, b, c = whole[:, :2], whole[:, 2:4], whole[:, 4:6]
    return torch.cat([F.silu(a) * b + c] * 4, -1)


def _grows(rows):
    for _ in range(40):
        rows = rows + rows * 0.001
    return rows


@needs_interpreter
@pytest.mark.parametrize("name", SEPARATE)
def test_not_fused(recorded, name):
    function, programs = SEPARATE[name]

    def body(m, x, ids, weights, expert, slot, token):
        return function(m, Rows(m, x, token, expert, False))

    check_fused(recorded, loop_over(body))
    assert len(recorded.programs) == 1 if programs is None else recorded.programs == programs


@needs_interpreter
@pytest.mark.parametrize("what", ["added elsewhere", "added twice", "part added elsewhere"])
def test_what_is_combined_is_not_lost(recorded, what):
    """A value inside that comes into an accumulator by itself."""

    def loop(m, x, ids, weights):
        out, other = torch.zeros_like(x), torch.zeros_like(x)
        half, mask = torch.zeros_like(x[:, FOUR]), m.mask(ids)
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            gate = first(m, x, token, expert)
            rows = F.silu(gate)
            out.index_add_(0, token, rows)
            if what == "added elsewhere":
                other.index_add_(0, token, gate)
            elif what == "added twice":
                other.index_add_(0, token, rows)
            else:
                half.index_add_(0, token, gate[:, FOUR])
        return out + 3 * other + F.pad(half, (0, HIDDEN // 2)) * 7

    check_fused(recorded, loop)
    assert recorded.programs == ["silu v0" if what == "added twice" else ""]


@needs_interpreter
@pytest.mark.parametrize("changes", [False, True], ids=["known", "not known"])
def test_widths(recorded, changes):
    """Weights that are arguments: nothing is fused whose columns are not known when compiling."""

    def loop(m, x, ids, weights, up, down):
        out, mask = torch.zeros_like(x), m.mask(ids)
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            gate, value = F.linear(x[token], up[expert]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(gate) * value, down[expert]))
        return out

    module = Moe(loop, dtype=torch.float32).to(DEVICE)
    function = fast(module, dynamic=None if changes else False)
    for width in (4, 6):
        up, down = drawn(NUM_EXPERTS, 2 * width, HIDDEN), drawn(NUM_EXPERTS, HIDDEN, width)
        if changes:
            torch._dynamo.mark_dynamic(up, 1)
            torch._dynamo.mark_dynamic(down, 2)
        args = (*inputs(), up, down)
        with torch.no_grad():
            assert_same_numbers(function(*args), module(*args))
    assert len(recorded.loops) == (1 if changes else 2)
    assert recorded.programs == ([""] if changes else ["silu v0;mul v2 v1", ""])
