"""What a loop adds to an accumulator: in which dtype, in which order, and from which zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import moe_rewrite

NUM_EXPERTS, TOKENS, HIDDEN = 4, 5, 8
INNER = ["eager", "aot_eager"]
ALSO_COMPILED = [*INNER, "inductor"]


class _Calls(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


def compare(fn: Callable[..., Any], *args: Any, inner: str = "aot_eager", experts: str = "grouped_mm") -> None:
    """Eager and compiled give the same to the bit, and the loop is rewritten."""
    copies = [[arg.clone() if isinstance(arg, Tensor) else arg for arg in args] for _ in range(3)]
    expected = fn(*copies[0])
    torch._dynamo.reset()
    fast = torch.compile(_Calls(fn), backend="moe_rewrite", options={"inner": inner, "experts": experts})
    actual = fast(*copies[1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=False)
    if expected.is_floating_point():
        assert torch.equal(actual.signbit(), expected.signbit())
    reports = moe_rewrite.explain(fast, *copies[2]).loops
    assert reports and all(report.refusal is None for report in reports), reports


def ids_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


# --- dtype -----------------------------------------------------------------------------------------------------------

WIDE = [(torch.float32, torch.float16), (torch.float64, torch.float16), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("wide, narrow", WIDE)
def test_dense_sum_in_the_dtype_of_the_accumulator(wide: torch.dtype, narrow: torch.dtype, inner: str) -> None:
    """The sum is beyond what float16 holds, or has more digits than bfloat16."""
    scale = torch.tensor([1.0, 1.5, 1.0, 0.5]).to(narrow)

    def added(x: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=wide)
        for expert in range(NUM_EXPERTS):
            out = out + x * scale[expert]
        return out

    def in_place(x: Tensor) -> Tensor:
        out = torch.ones(x.shape, dtype=wide)
        for expert in range(NUM_EXPERTS):
            out += x * scale[expert]
        return out

    for fn in (added, in_place):
        compare(fn, torch.full((3, HIDDEN), 128.0 * 257).to(narrow), inner=inner)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_dense_loop(dtype: torch.dtype, inner: str) -> None:
    """Products in low precision, each exact, and a sum in float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-64, 65, (40, HIDDEN, HIDDEN), generator=generator) / 64 + 1

    def fn(x: Tensor) -> Tensor:
        out = torch.zeros(x.shape)
        with torch.autocast("cpu", dtype):
            for expert in range(40):
                out += F.linear(x, weight[expert])
        return out

    compare(fn, torch.eye(HIDDEN), inner=inner)


@pytest.mark.parametrize("inner", ALSO_COMPILED)
def test_autocast_of_rows(inner: str) -> None:
    """`out[token] += rows` takes rows of a narrower dtype."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 9, (NUM_EXPERTS, HIDDEN, HIDDEN), generator=generator).float()

    def fn(x: Tensor, ids: Tensor) -> Tensor:
        out = torch.full(x.shape, 2.0**12)
        with torch.autocast("cpu", torch.bfloat16):
            for expert in range(NUM_EXPERTS):
                token, _ = torch.where(ids == expert)
                out[token] += F.linear(x[token], weight[expert])
        return out

    compare(fn, torch.eye(HIDDEN)[:TOKENS], torch.rand(TOKENS, NUM_EXPERTS, generator=generator).argsort(), inner=inner)


ALPHA: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index_add_": lambda out, token, rows: out.index_add_(0, token, rows, alpha=2),
    "index_add": lambda out, token, rows: out.index_add(0, token, rows, alpha=2),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("how", ALPHA)
def test_factor_of_rows(how: str, inner: str) -> None:
    """Twice 3e4, two times, is more than float16 holds, and less than that with what there is."""

    def fn(x: Tensor, ids: Tensor) -> Tensor:
        out = torch.full_like(x, -6e4)
        for expert in range(NUM_EXPERTS):
            token, _ = torch.where(ids == expert)
            out = ALPHA[how](out, token, x[token])
        return out

    compare(fn, torch.full((3, HIDDEN), 3e4, dtype=torch.float16), ids_of([0, 1], [1, 9], [9, 9]), inner=inner)


@pytest.mark.parametrize("inner", INNER)
def test_factor_of_a_dense_loop(inner: str) -> None:
    scale = torch.ones(NUM_EXPERTS, dtype=torch.float16)

    def fn(x: Tensor) -> Tensor:
        out = torch.zeros(x.shape)
        for expert in range(NUM_EXPERTS):
            out = torch.add(out, x * scale[expert], alpha=3)
        return out

    compare(fn, torch.full((3, HIDDEN), 4e4, dtype=torch.float16), inner=inner)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_integers_wrap_around(dtype: torch.dtype, inner: str) -> None:
    """Sums of integers are exact, also where they go past the largest one."""
    largest = torch.iinfo(dtype).max

    def dense(x: Tensor) -> Tensor:
        out = torch.full_like(x, 5)
        for expert in range(NUM_EXPERTS):
            out += x * (expert + 1)
        return out

    def rows(x: Tensor, ids: Tensor) -> Tensor:
        out = torch.full_like(x, 5)
        for expert in range(NUM_EXPERTS):
            token, _ = torch.where(ids == expert)
            out.index_add_(0, token, x[token] * 3, alpha=2)
        return out

    x = torch.arange(HIDDEN).repeat(3, 1).to(dtype) + (largest - 7)
    compare(dense, x, inner=inner)
    compare(rows, x, ids_of([0, 1], [1, 1], [9, 9]), inner=inner)


# --- order -----------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    out = start.clone()
    for expert in range(NUM_EXPERTS):
        token, _ = torch.where(ids == expert)
        out.index_add_(0, token, x[token])
    return out


def _rows_of_slots(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    """By experts 6e4, -6e4, 6e4; by slots 6e4, 6e4, -6e4."""
    out = start.clone()
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out[token] += x[token] * (1 - slot.unsqueeze(-1).div(2, rounding_mode="floor") * 2).to(x.dtype)
    return out


def _rows_elsewhere(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    """At positions of which nothing is known."""
    out = start.clone()
    for expert in range(NUM_EXPERTS):
        token, _ = torch.where(ids == expert)
        out.index_add_(0, (token * 2) % 3, x[token])
    return out


def _rows_twice(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    """What one sum takes past the largest number, the other brings back before the next expert comes."""
    out = torch.zeros_like(start)
    for expert in range(NUM_EXPERTS):
        token, _ = torch.where(ids == expert)
        out.index_add_(0, token, x[token])
        out[:, :4].index_add_(0, token, -x[token, :4])
        out[:, 4:].index_add_(0, token, -x[token, 4:])
    return out


def _all_of_each(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    out, scale = start.clone(), torch.tensor([0.5, 1.25]).to(x.dtype)
    for expert in range(2):
        out = out + x * scale[expert]
    return out


def _mask(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    out, mask = start.clone(), (ids.sum(-1) > 0).expand(NUM_EXPERTS, -1)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).to(x.dtype)
    for expert in range(NUM_EXPERTS):
        (token,) = torch.where(mask[expert])
        out.index_add_(0, token, x[token] * sign[expert])
    return out


ORDERS = [_rows, _rows_elsewhere, _rows_twice, _all_of_each, _mask]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("loop", ORDERS, ids=lambda loop: loop.__name__)
def test_no_finite_sum_overflows(loop: Callable[..., Tensor], experts: str, inner: str) -> None:
    """Eager adds to what there is, so that the sum never leaves float16. All numbers have few digits."""
    x = torch.full((3, HIDDEN), 49152.0).half()
    start = torch.full((3, HIDDEN), -61440.0).half()
    ids = ids_of([0, 1], [1, 3], [2, 9])
    expected = loop(x, ids, start)
    assert expected.isfinite().all()
    compare(loop, x, ids, start, inner=inner, experts=experts)


@pytest.mark.parametrize("inner", ALSO_COMPILED)
def test_no_order_of_slots_overflows(inner: str) -> None:
    x, ids = torch.full((3, HIDDEN), 6e4).half(), ids_of([0, 2, 1]).expand(3, 3).contiguous()
    compare(_rows_of_slots, x, ids, torch.zeros(3, HIDDEN).half(), inner=inner)


# --- the sign of zero ------------------------------------------------------------------------------------------------


def _minus_zero_values(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    """What is added is -0.0, too."""
    out = start.clone()
    for expert in range(NUM_EXPERTS):
        token, _ = torch.where(ids == expert)
        out.index_add_(0, token, x[token] * -0.0)
    return out


def _all_of_each_minus_zero(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    out, scale = start.clone(), -torch.zeros(NUM_EXPERTS, dtype=x.dtype)
    for expert in range(NUM_EXPERTS):
        out += x.abs() * scale[expert]
    return out


def _added_last(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    out = start.clone()
    for expert in range(NUM_EXPERTS):
        token, _ = torch.where(ids == expert)
        out[token] = out[token] + x[token] * 0.0
    return out


def _carried(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    out = start
    for expert in range(NUM_EXPERTS):
        token, _ = torch.where(ids == expert)
        out = out.index_add(0, token, x[token])
    return out


def _many_slots(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    return _minus_zero_values(x.abs(), ids.repeat(1, 10), start)


def _from_zeros_that_were_negated(x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    out = torch.zeros_like(start)
    out.mul_(-1)
    for expert in range(NUM_EXPERTS):
        token, _ = torch.where(ids == expert)
        out.index_add_(0, token, x[token])
    return out


SIGNS = [
    *(_rows, _rows_elsewhere, _minus_zero_values, _all_of_each_minus_zero, _added_last, _carried, _many_slots),
    _from_zeros_that_were_negated,
]


@pytest.mark.parametrize("inner", ALSO_COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loop", SIGNS, ids=lambda loop: loop.__name__)
def test_sign_of_zero(loop: Callable[..., Tensor], dtype: torch.dtype, inner: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 9, (TOKENS, HIDDEN), generator=generator).to(dtype)
    ids = ids_of([0, 9], [1, 3], [9, 9], [2, 3], [9, 1])
    start = torch.where(torch.arange(HIDDEN) % 2 == 0, -0.0, 0.0).to(dtype).expand(TOKENS, HIDDEN).contiguous()
    compare(loop, x, ids, start, inner=inner)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, ids: Tensor, start: Tensor) -> Tensor:
        out = start * 1.0
        for expert in range(NUM_EXPERTS):
            token, _ = torch.where(ids == expert)
            out.index_add_(0, token, (x[token] @ self.weight[expert]).relu())
        return out


@pytest.mark.parametrize("slots", [2, 20])
@pytest.mark.parametrize("inner", ALSO_COMPILED)
def test_gradients_where_zeros_are_added(inner: str, slots: int) -> None:
    """Where each value is -0.0 or 0.0 the gradient is that of a sum all the same."""
    module, generator = Plain(), torch.Generator().manual_seed(1)
    ids = torch.randint(0, NUM_EXPERTS + 1, (TOKENS, slots), generator=generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    fast = torch.compile(module, backend="moe_rewrite", options={"inner": inner, "experts": "grouped_mm"})
    found = []
    for run in (module, fast):
        leaves = x.clone().requires_grad_(), torch.full((TOKENS, HIDDEN), -0.0, dtype=torch.float64).requires_grad_()
        module.zero_grad()
        run(leaves[0], ids, leaves[1]).sin().sum().backward()
        found.append((leaves[0].grad, leaves[1].grad, module.weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
