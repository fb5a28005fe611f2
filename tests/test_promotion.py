"""Values of the expert without dimensions give way to the rows' dtype, as they do in eager."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_rewrite
from moe_rewrite.loop import Kind, Value
from moe_rewrite.recognise import promotion

TOKENS, HIDDEN, NUM_EXPERTS = 6, 8, 4
TENTHS = (0.1, 0.2, 0.3, 0.7)
"""Numbers that no binary format has: another one in each dtype."""


class Moe(nn.Module):
    """``body(m, rows, expert)`` for each expert, by a loop that selects rows or that takes all tokens."""

    def __init__(self, body: Callable[..., Tensor], threshold: Tensor, selects: bool = True) -> None:
        super().__init__()
        self.body, self.selects = body, selects
        self.register_buffer("threshold", threshold)
        self.register_buffer("one", torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("weight", torch.tensor(TENTHS).repeat(HIDDEN, 2).repeat(NUM_EXPERTS, 1, 1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.selected(x, ids) if self.selects else self.dense(x, ids)

    def selected(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            token, _ = torch.where(ids == expert)
            out.index_add_(0, token, self.body(self, x[token], expert).to(x.dtype))
        return out

    def dense(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            hit = (ids == expert).any(-1, keepdim=True)
            out = out + self.body(self, x, expert).to(x.dtype) * hit
        return out


def bytes_of(rows: Tensor) -> Tensor:
    return (rows * 10).to(torch.uint8)


def clamped_in_place(m: Moe, rows: Tensor, expert: int) -> Tensor:
    rows = rows * 1
    return rows.mul_(m.threshold[expert]).remainder_(m.threshold[expert])


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CASES: dict[str, tuple[Callable[..., Any], torch.dtype, torch.dtype]] = {
    "compared": (lambda m, r, e: r * (r > m.threshold[e]), F32, F64),
    "compared in low precision": (lambda m, r, e: r * (r > m.threshold[e]), BF16, F32),
    "the other way round": (lambda m, r, e: r * (m.threshold[e] < r), BF16, F32),
    "where": (lambda m, r, e: torch.where(r > m.threshold[e], r, r * 0.1), BF16, F32),
    "where, of a truth": (lambda m, r, e: torch.where(m.threshold[e] > 0.2, r, m.threshold[e]) == r, F32, F64),
    "remainder": (lambda m, r, e: torch.remainder(r, m.threshold[e]), F32, F64),
    "rounded": (lambda m, r, e: torch.div(r, m.threshold[e], rounding_mode="trunc"), F32, F64),
    "in place": (clamped_in_place, F32, F64),
    "filled": (lambda m, r, e: r.masked_fill(r > 0.2, m.threshold[e]) == m.threshold[e].to(r.dtype), F32, F64),
    "filled in place": (lambda m, r, e: (r * 1).masked_fill_(r > 0.2, m.threshold[e]), BF16, F32),
    "computed before": (lambda m, r, e: r * (r > m.threshold[e] * m.one), F32, F32),
    "of two": (lambda m, r, e: torch.addcmul(r, r, m.threshold[e]).remainder(m.threshold[e]), F32, F64),
    "weights": (lambda m, r, e: r @ (m.weight[e] * (m.weight[e] > m.threshold[e])), F32, F64),
    "weights of all": (lambda m, r, e: r @ (m.weight[0] * (m.weight[0] > m.threshold[e])), F32, F64),
    "negative, with bytes": (lambda m, r, e: r * (bytes_of(r) > (m.threshold[e] * 10 - 3).long()), F32, F32),
    "number, with bytes": (lambda m, r, e: r * (bytes_of(r) > e - 2), F32, F32),
    "number, with a byte of the expert": (lambda m, r, e: r * (bytes_of(m.threshold)[e] > e - 2), F32, F32),
    "a quotient of integers": (lambda m, r, e: r + bytes_of(r) / (m.threshold[e] * 9000).long(), F32, F32),
    "a quotient by a number": (lambda m, r, e: r + bytes_of(r) / (e + 250), F32, F32),
    "an angle of integers": (lambda m, r, e: torch.atan2(bytes_of(r), (m.threshold[e] * 9000).long()), F32, F32),
    "weights of integers": (lambda m, r, e: r @ (bytes_of(m.weight[e]) / (m.threshold[e] * 9000).long()), F32, F32),
    "a product in low precision": (lambda m, r, e: r * m.threshold[e], BF16, F32),
    "a product, the other way round": (lambda m, r, e: m.threshold[e] * r, BF16, F32),
    "a quotient in low precision": (lambda m, r, e: r / m.threshold[e], BF16, F32),
    "a quotient rounded in low precision": (
        lambda m, r, e: torch.div(r, m.threshold[e], rounding_mode="trunc"),
        *(BF16, F32),
    ),
    "a floor in low precision": (lambda m, r, e: r // m.threshold[e] + 1, torch.float16, F32),
    "a sum in low precision": (lambda m, r, e: r + m.threshold[e], BF16, F32),
    "beyond float16": (lambda m, r, e: (r * 1e-4) * (m.threshold[e] * 1e6), torch.float16, F32),
    "integers with a float": (lambda m, r, e: r * (bytes_of(r) * m.threshold[e] > 0.2), F32, F32),
}


@pytest.mark.parametrize(
    ("selects", "experts"), [(True, "grouped_mm"), (True, "batched_mm"), (False, "batched_mm")], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_as_in_eager(name, selects, experts):
    body, dtype, of_expert = CASES[name]
    x = torch.tensor(TENTHS).repeat(TOKENS, 2).to(dtype)
    ids = torch.rand(TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(0)).topk(2).indices
    module = Moe(body, torch.tensor(TENTHS, dtype=torch.float64).to(of_expert), selects)
    reports = moe_rewrite.explain(module, x, ids).loops
    # Nothing is changed in place that has no rows: such a dense loop is unrolled, of which `explain` says nothing.
    assert [report.refusal for report in reports] == ([] if "in place" in name and not selects else [None])
    expected = module(x, ids)
    assert expected.any()
    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        options = {"experts": experts, "inner": inner}
        actual = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)(x, ids)
        torch.testing.assert_close(actual, expected, rtol=1e-6 if dtype is F32 else 0, atol=0)


DTYPES = (*(torch.bool, torch.uint8, torch.int32, torch.int64), *(torch.float16, BF16, F32, F64, torch.complex64))


def test_as_torch_says():
    """For any two operands, of each kind and rank."""
    kinds = [("rows", dtype) for dtype in DTYPES] + [("of all", dtype) for dtype in DTYPES]
    kinds += [("of the expert", dtype) for dtype in DTYPES] + [("number", torch.bool), ("number", torch.int64)]
    numbers = {torch.bool: True, torch.int64: 3}
    casts = 0
    for pair in itertools.product(kinds, repeat=2):
        values, operands, lifted = [], [], []
        for kind, dtype in pair:
            operand: Any = (
                numbers[dtype] if kind == "number" else torch.ones([2, 2] if kind == "rows" else [], dtype=dtype)
            )
            own = {"rows": Kind.PER_ROW, "of all": Kind.INVARIANT}.get(kind, Kind.PER_EXPERT)
            values.append(Value("v", own, operand))
            operands.append(operand)
            lifted.append(torch.as_tensor(operand).expand(2, 2) if own is Kind.PER_EXPERT else operand)
        wanted = torch.result_type(*operands)
        result = torch.empty(2, 2, dtype=wanted)
        found = promotion.casts(torch.ops.aten.add.Tensor, dict(zip(("self", "other"), values, strict=True)), result)
        assert (not found) == (wanted is torch.result_type(*lifted)), pair
        assert set(found.values()) <= {wanted}, pair
        if found:
            casts += 1
            after = [one.to(found[value]) if value in found else one for value, one in zip(values, lifted, strict=True)]
            assert torch.result_type(*after) is wanted, pair
    assert casts > 50


def test_numbers():
    rows = Value("rows", Kind.PER_ROW, torch.empty(3, 2, dtype=torch.uint8))

    def cast_with(kind: Kind, number: Any) -> list[torch.dtype]:
        given = {"self": rows, "other": Value("e", kind, number)}
        return list(promotion.casts(torch.ops.aten.add.Tensor, given, rows.example).values())

    assert cast_with(Kind.PER_EXPERT, 3) == [torch.uint8]
    assert cast_with(Kind.INVARIANT, 3) == []
    assert cast_with(Kind.PER_EXPERT, 0.5) == []
