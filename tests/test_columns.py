"""Columns that a row program takes apart: which steps do, and gradients that are written part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused import FOUR
from loops import HIDDEN, Moe, inputs, loop_over
from torch import Tensor
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.testing import assert_close

from moe_rewrite.lower import columns, lift

H = HIDDEN
OTHER = slice(H // 2, None)

# What is made of a product of rows [rows, H] and [rows, H / 2] of it, and the parts that it is taken apart into.
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[list[int], bool]]]] = {
    "chunks": (lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], [([4, 4], False)] * 2),
    "split": (lambda h: torch.add(*h.split(4, 1)), [([4, 4], False)]),
    "one of the parts": (lambda h: h.split([4, 4], 1)[1].sin(), [([4, 4], False)]),
    "three parts": (lambda h: h.split([1, 3, 4], 1)[2] * h.split([1, 3, 4], 1)[0], [([1, 3, 4], False)] * 2),
    "slices": (lambda h: h[:, FOUR] * h[:, OTHER].sin(), [([4, 4], False)]),
    "slices, the second first": (lambda h: h[:, OTHER].sin() * h[:, FOUR], [([4, 4], False)]),
    "in turn": (lambda h: h[:, ::2] * h[:, 1::2].sin(), [([4, 4], True)]),
    "in turn, and all": (lambda h: h[:, ::2] * h[:, 1::2].sin() + h.sum(1, keepdim=True), [([4, 4], True)]),
    "in turn, from the end": (lambda h: h[..., -7::2].sin() * h[..., -8::2], [([4, 4], True)]),
    "four in turn": (lambda h: (h[:, ::4] * h[:, 2::4] + h[:, 1::4] * h[:, 3::4]).repeat(1, 2), [([2] * 4, True)]),
    "halves of halves": (lambda h: h[:, FOUR][:, ::2].repeat(1, 2) * h[:, FOUR][:, 1::2].repeat(1, 2), []),
    # Not every column once.
    "one slice": (lambda h: h[:, FOUR].sin(), []),
    "slices that overlap": (lambda h: h[:, :6][:, FOUR] * h[:, 2:][:, :4], []),
    "one of two in turn": (lambda h: h[:, ::2].sin(), []),
    "in turn, one twice": (lambda h: h[:, ::2] * h[:, ::2].sin(), []),
    "a column is missing": (lambda h: h[:, :4] * h[:, 4:7].sum(1, keepdim=True), []),
}


def moe(form: str) -> Moe:
    act = FORMS[form][0]

    def body(m, x, ids, weights, expert, slot, token):
        rows = act(F.linear(x[token], m.weight[expert]))
        return F.linear(rows, m.weight[expert].t()[:, FOUR]) * weights[token, slot, None]

    return Moe(loop_over(body))


@pytest.fixture
def parts(monkeypatch) -> list[tuple[list[int], bool]]:
    """What rows were taken apart into while loops were lowered, on the CPU too."""
    found: list[tuple[list[int], bool]] = []
    original = columns.columns

    def record(rows: Tensor, sizes: list[int], in_turn: bool) -> list[Tensor]:
        found.append((sizes, in_turn))
        return original(rows, sizes, in_turn)

    monkeypatch.setattr(columns, "columns", record)
    monkeypatch.setattr(lift, "BY_PARTS", ("cpu", "cuda"))
    return found


def gradients(run: Any, module: Moe) -> list[Tensor]:
    x, ids, weights = inputs()
    wanted = [x.requires_grad_(), weights.requires_grad_(), module.weight]
    result = run(x, ids, weights)
    return [result, *torch.autograd.grad(result.sin().sum(), wanted)]


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients(parts, form, experts):
    module = moe(form)
    expected = gradients(module, module)
    for inner, found in (("aot_eager", []), ("inductor", FORMS[form][1])):
        parts.clear()
        torch._dynamo.reset()
        options = {"experts": experts, "inner": inner}
        run = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)
        assert_close(gradients(run, module), expected)
        assert parts == found, inner


def test_not_without_gradients(parts):
    module = moe("chunks")
    with torch.no_grad():
        torch.compile(module, backend="moe_rewrite", fullgraph=True)(*inputs())
    assert parts == []


def test_one_kernel_writes_both_parts(parts):
    """Inductor computes the operator itself: the parts go to views of one piece of memory."""
    module = moe("in turn")
    run = torch.compile(module, backend="moe_rewrite", fullgraph=True, options={"experts": "batched_mm"})
    _, code = run_fw_bw_and_get_code(lambda: run(*inputs()))
    assert len(code) == 2
    assert parts
    assert "moe_rewrite.joined" not in code[1].split("def call", 1)[1].split("def benchmark", 1)[0]
    assert "moe_rewrite.columns" not in code[0]
