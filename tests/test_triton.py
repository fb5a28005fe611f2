"""The experts backend ``triton``: its kernels, what is computed in them, and whole loops.

Without a GPU the kernels run in Triton's interpreter, on sizes as small as show something.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hub
import modes
import pytest
import test_forms
import test_spellings
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from loops import HIDDEN, INTERMEDIATE, NUM_EXPERTS, Moe, hits, inputs, loop_over, sentinel, weigh_up
from loops import plain as plain_loop
from rolled import Compiled, Python, Rolled, compiled
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import deterministic

import moe_rewrite
from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower import epilogue, kernels, rows_mm
from moe_rewrite.lower import triton as experts_backend

triton = pytest.importorskip("triton", reason="torch for the CPU comes without triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_interpreter = pytest.mark.skipif(
    not rows_mm.available(torch.device(DEVICE)), reason="the interpreter of triton < 3.7 needs numpy < 2.4"
)
DTYPES = rows_mm.DTYPES
EPS = torch.finfo(torch.float32).eps


# --- operands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def ids_of(*shape: int, low: int = 0, high: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "along N": lambda e, k, n, **how: drawn(e, k, n, **how),
    "along K": lambda e, k, n, **how: drawn(e, n, k, **how).transpose(1, 2),
    "along neither": lambda e, k, n, **how: drawn(e, 2 * k, 3 * n, **how)[:, ::2, ::3],
    "part of a larger one": lambda e, k, n, **how: drawn(e + 2, k + 3, n + 5, **how)[1:-1, 2:-1, 4:-1],
    "along E": lambda e, k, n, **how: drawn(k, n, e, **how).permute(2, 0, 1),
    "one for all": lambda e, k, n, **how: drawn(1, k, n, **how).expand(e, k, n),
}
"""How a weight ``[E, K, N]`` lies in memory."""


def _pair(whole: Tensor, start: int, step: int, n: int) -> list[Tensor]:
    return [whole[..., :n] if step == 1 else whole[..., ::2], whole[..., start::step]]


TWO: dict[str, Callable[..., list[Tensor]]] = {
    "halves": lambda lay, e, k, n, **how: _pair(lay(e, k, 2 * n, **how), n, 1, n),
    "interleaved": lambda lay, e, k, n, **how: _pair(lay(e, k, 2 * n, **how), 1, 2, n),
    "separate": lambda lay, e, k, n, **how: [lay(e, k, n, seed=5, **how), lay(e, k, n, seed=6, **how)],
    "odd, then even": lambda lay, e, k, n, **how: _pair(lay(e, k, 2 * n, **how), 1, 2, n)[::-1],
    "of two layouts": lambda lay, e, k, n, **how: [
        lay(e, k, n, seed=5, **how),
        drawn(e, n, k, seed=6, **how).transpose(1, 2),
    ],
}
"""Two weights ``[E, K, N]``."""

WAYS = ("sorted here", "sorted already", "one by one")
every_way = pytest.mark.parametrize("way", WAYS)
both_kernels = pytest.mark.parametrize("way", WAYS[::2])


def dispatch(ids: Tensor, groups: int, way: str) -> tuple[Tensor, dict[str, Any]]:
    """The expert of each pair, and how the kernel is told. Of pairs that are sorted already those of none are last."""
    if way == "one by one":
        return ids, {"experts": ids}
    none = torch.where((ids >= 0) & (ids < groups), ids, groups)
    if way == "sorted already":
        ids = ids[none.argsort(stable=True)]
    order = none.argsort(stable=True).int()
    offsets = (none.unsqueeze(0) <= torch.arange(groups, device=ids.device).unsqueeze(1)).sum(1).int()
    return ids, {"offsets": offsets, **({"order": order} if way == "sorted here" else {})}


def each(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """``rows[p] @ weight[ids[p]]`` in float64, zeros for ids of no expert."""
    counts = (ids >= 0) & (ids < weight.shape[0])
    safe = torch.where(counts, ids, 0)
    product = torch.einsum("pk,pkn->pn", torch.where(counts[:, None], rows.double(), 0), weight.double()[safe])
    return torch.where(counts[:, None], product, 0)


def assert_near(actual: Tensor, exact: Tensor, size: Tensor, terms: int) -> None:
    """As near as a sum of ``terms`` in float32 is, rounded once; ``size``: the sum of the terms without their signs."""
    unit = torch.finfo(actual.dtype)
    allowed = unit.eps / 2 * exact.abs() + (terms + 2) * EPS * size + unit.smallest_normal * unit.eps
    off = (actual.double() - exact).abs() > allowed
    assert not off.any(), f"{int(off.sum())} of {off.numel()}: {actual[off][:4]} is not {exact[off][:4]}"
    assert actual.isfinite().all()


# --- rows_mm ----------------------------------------------------------------------------------------------------------

ROUTINGS = {  # the experts of pairs, and how many experts there are
    "some experts without a pair": (torch.tensor([3, 0, 0, 3, 5, 0, 3, 5, 3]), 6),
    "pairs of no expert": (torch.tensor([3, -1, 0, 4, 1, 2**40, 0, -(2**40), 2, 4]), 4),
    "no pair of an expert": (torch.tensor([4, -1, 9]), 4),
    "more experts than pairs": (torch.tensor([17, 2, 30, -3]), 31),
    "one expert": (torch.tensor([0, 0, 1, 0, 0]), 1),
    "one pair": (torch.tensor([1]), 3),
    "tiles of 16 rows, some full": (ids_of(140, high=13).cpu(), 12),
    "tiles of 64 rows": (ids_of(90, low=-1, high=2).cpu(), 2),
    "tiles of 128 rows": (ids_of(140, low=-1, high=2).cpu(), 1),
}
every_routing = pytest.mark.parametrize(("ids", "groups"), ROUTINGS.values(), ids=ROUTINGS)


def multiply_and_compare(
    rows: Tensor, weights: list[Tensor], vectors: list[Tensor], ids: Tensor, way: str, dtype: torch.dtype | None = None
) -> Tensor:
    """``p0 - p1 + v0 - v1`` as far as these are given, compared with float64."""
    groups = weights[0].shape[0]
    ids, told = dispatch(ids.to(DEVICE), groups, way)
    values = [each(rows, weight, ids) for weight in weights]
    sizes = [each(rows.abs(), weight.abs(), ids) for weight in weights]
    ones = torch.ones(len(ids), 1, device=DEVICE)
    values += [each(ones, vector.unsqueeze(1), ids) for vector in vectors]
    sizes += [each(ones, vector.abs().unsqueeze(1), ids) for vector in vectors]
    steps, last = [], 0
    for number in range(1, len(values)):
        is_added = number == len(weights)
        steps.append(f"{'add' if is_added else 'sub'} v{last} v{number}")
        values[0] = values[0] + values[number] if is_added else values[0] - values[number]
        last = len(values) + len(steps) - 1
    result = rows_mm.rows_mm(rows, weights, vectors, **told, epilogue=";".join(steps), dtype=dtype)
    assert result.dtype is (dtype or rows.dtype)
    assert_near(result, values[0], sum(sizes), len(weights) * rows.shape[1])
    assert not result[(ids < 0) | (ids >= groups)].any()
    return result


@needs_interpreter
@every_routing
@every_way
def test_rows_mm(poisoned, ids, groups, way):
    inner, columns = (64, 16) if groups > 5 else (20, 24)  # with and without what is outside of a block
    if way == "one by one":
        ids = ids[:20]  # for few pairs
    rows = drawn(len(ids), inner)
    multiply_and_compare(rows, [drawn(groups, columns, inner, seed=1).transpose(1, 2)], [], ids, way)


@needs_interpreter
@both_kernels
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("inner", "columns"), [(32, 64), (70, 17)], ids=str)
def test_layouts(poisoned, way, layout, inner, columns):
    ids, groups = ROUTINGS["pairs of no expert"]
    rows = drawn(2 * len(ids), 3 * inner, seed=3)[1::2, ::3]
    multiply_and_compare(rows, [layout(groups, inner, columns, seed=1)], [], ids, way)


@needs_interpreter
@both_kernels
@pytest.mark.parametrize("two", TWO.values(), ids=TWO)
@pytest.mark.parametrize(("layout", "columns"), [("along N", 16), ("along K", 19), ("along neither", 1)])
def test_two_products(poisoned, way, two, layout, columns):
    ids, groups = ROUTINGS["pairs of no expert"]
    multiply_and_compare(drawn(len(ids), 37), two(LAYOUTS[layout], groups, 37, columns), [], ids, way)


@needs_interpreter
@every_way
@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("vectors", [1, 2])
def test_vectors(poisoned, way, products, vectors):
    ids, groups = ROUTINGS["pairs of no expert"]
    weights = [drawn(groups, 5, 19, seed=1), drawn(groups, 5, 19, seed=2)][:products]
    whole = drawn(groups, 2 * 19, seed=3)
    multiply_and_compare(drawn(len(ids), 5), weights, [whole[:, ::2], whole.flip(0)[:, 1::2]][:vectors], ids, way)


@needs_interpreter
@both_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_dtypes(poisoned, way, dtype, wanted):
    ids, groups = ROUTINGS["pairs of no expert"]
    weights = TWO["interleaved"](LAYOUTS["along K"], groups, 33, 9, dtype=dtype)
    multiply_and_compare(drawn(len(ids), 33, dtype=dtype), weights, [], ids, way, wanted)


@needs_interpreter
@pytest.mark.parametrize("products", [1, 2])
def test_tiles_in_groups(poisoned, products):
    """Several tiles of rows and of columns, in an order of their own: each is computed."""
    ids, groups = ids_of(170, low=-2, high=15), 14
    columns = 200 // products
    multiply_and_compare(drawn(170, 3), [drawn(groups, 3, columns, seed=s) for s in range(products)], [], ids, WAYS[0])


@needs_interpreter
@every_way
@pytest.mark.parametrize(("pairs", "inner", "columns"), [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)], ids=str)
def test_nothing(poisoned, way, pairs, inner, columns):
    """No pair, nothing to add up (which is the bias alone), no column."""
    ids = torch.arange(pairs) % 2
    vector = drawn(2, columns)
    result = multiply_and_compare(drawn(pairs, inner), [drawn(2, inner, columns)], [vector], ids, way)
    assert result.shape == (pairs, columns)


@needs_interpreter
@both_kernels
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_is_a_rows_own(poisoned, way, poison):
    """What is not finite stays in its row; in a row of no expert it is not even there."""
    ids, groups = ROUTINGS["pairs of no expert"]
    ids, told = dispatch(ids.to(DEVICE), groups, way)
    rows, weight, vector = drawn(len(ids), 20), drawn(groups, 20, 9, seed=1), drawn(groups, 9, seed=2)

    def multiply(rows: Tensor) -> Tensor:
        return rows_mm.rows_mm(rows, [weight], [vector], **told, epilogue=rows_mm.ADD_VECTOR)

    bad = (ids < 0) | (ids >= groups)
    expected = multiply(rows)
    assert torch.equal(multiply(torch.where(bad[:, None], poison, rows)), expected)
    assert not expected[bad].any()
    for row in (~bad).nonzero().flatten()[::3]:
        spoiled = rows.clone()
        spoiled[row, 3] = poison
        result = multiply(spoiled)
        others = torch.arange(len(ids), device=DEVICE) != row
        assert torch.equal(result[others], expected[others])
        assert not result[row].isfinite().any()


@needs_interpreter
@every_way
def test_an_expert_is_an_experts_own(poisoned, way):
    """A weight of NaN is nobody's but its expert's."""
    ids, groups = ROUTINGS["some experts without a pair"]
    ids, told = dispatch(ids.to(DEVICE), groups, way)
    rows, weight = drawn(len(ids), 20), drawn(groups, 20, 9, seed=1)
    expected = rows_mm.rows_mm(rows, [weight], [], **told)
    weight[5], weight[4] = math.nan, math.nan
    result = rows_mm.rows_mm(rows, [weight], [], **told)
    assert torch.equal(result[ids != 5], expected[ids != 5])
    assert result[ids == 5].isnan().all()


@needs_interpreter
def test_lists_that_are_not_contiguous(poisoned):
    """A column of ids, and one id for all."""
    ids, groups = ids_of(5, 2), 4
    rows, weight = drawn(5, 6), drawn(groups, 6, 4, seed=1)
    for column in (ids[:, 0], ids[1:2, 1].expand(5)):
        expected = each(rows, weight, column).float()
        assert_close(rows_mm.rows_mm(rows, [weight], [], experts=column), expected)
        order, offsets = rows_mm.sort_by_expert(column, groups)
        assert_close(rows_mm.rows_mm(rows, [weight], [], order=order, offsets=offsets), expected)
        strided = {"order": torch.stack([order, order], 1)[:, 0], "offsets": torch.stack([offsets] * 2, 1)[:, 1]}
        assert_close(rows_mm.rows_mm(rows, [weight], [], **strided), expected)
        outer = rows_mm.rows_outer(rows, rows, strided["offsets"], strided["order"])
        assert torch.equal(outer, rows_mm.rows_outer(rows, rows, offsets, order))


# --- rows that are gathered, and gradients ----------------------------------------------------------------------------

GATHERS = {  # pairs, own, after
    "[T, K]": (10, 5, 2),
    "[K, T]": (10, 5, 1),
    "[A, T, B]": (30, 5, 3),
    "one slot": (5, 5, 1),
    "one token": (4, 1, 4),
}
every_gather = pytest.mark.parametrize("gather", GATHERS.values(), ids=GATHERS)


@needs_interpreter
@every_way
@every_gather
def test_gathered_rows(poisoned, way, gather):
    """Forward, with a token whose row is NaN: it is where its pairs are."""
    pairs, own, after = gather
    ids, told = dispatch(ids_of(pairs, low=-1, high=4), 3, way)
    rows, weight = drawn(own, 7), drawn(3, 7, 6, seed=1)
    token = torch.arange(pairs, device=DEVICE) // after % own
    result = rows_mm.rows_mm(rows, [weight], [], gather=gather, **told)
    assert_near(result, each(rows[token], weight, ids), each(rows.abs()[token], weight.abs(), ids), 7)
    rows[own - 1] = math.nan
    spoiled = rows_mm.rows_mm(rows, [weight], [], gather=gather, **told)
    is_nan = (token == own - 1) & (ids >= 0) & (ids < 3)
    assert spoiled[is_nan].isnan().all()
    assert torch.equal(spoiled[~is_nan], result[~is_nan])


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "any gradient": lambda y: (y * torch.linspace(-1, 2, y.numel()).view_as(y).to(y)).sum(),
    "expanded": lambda y: y.sum(),
    "transposed": lambda y: (y.t().contiguous() * torch.linspace(-1, 2, y.numel()).view_as(y.t()).to(y)).sum(),
    "of every second column": lambda y: y[:, ::2].square().sum(),
}


@needs_interpreter
@both_kernels
@pytest.mark.parametrize(
    ("gather", "loss"),
    [
        *((name, "any gradient") for name in ("each its own", *GATHERS)),
        *(("[T, K]", loss) for loss in list(LOSSES)[1:]),
    ],
)
def test_gradients(poisoned, way, gather, loss):
    gather, loss = GATHERS.get(gather), LOSSES[loss]
    pairs, own, after = gather or (10, 10, 1)
    ids, told = dispatch(ids_of(pairs, low=-1, high=5), 4, way)
    token = torch.arange(pairs, device=DEVICE) // after % own
    leaves = [drawn(own, 7), drawn(4, 6, 7, seed=1).transpose(1, 2), drawn(4, 6, seed=2)]
    result = _gradients(
        leaves,
        lambda rows, weight, bias: loss(
            rows_mm.rows_mm(rows, [weight], [bias], gather=gather, epilogue=rows_mm.ADD_VECTOR, **told)
        ),
    )
    exact = _gradients(
        [leaf.double() for leaf in leaves],
        lambda rows, weight, bias: loss(
            each(rows[token], weight, ids) + each(rows.new_ones(pairs, 1), bias.unsqueeze(1), ids)
        ),
    )
    for actual, expected in zip(result, exact, strict=True):
        assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


def _gradients(leaves: list[Tensor], loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(loss(*leaves), leaves)


@needs_interpreter
@pytest.mark.parametrize("way", WAYS[::2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("only", [0, 1, 2], ids=["rows", "weight", "bias"])
def test_gradient_of_one_operand(poisoned, way, dtype, only):
    ids, told = dispatch(ids_of(6, low=-1, high=4), 3, way)
    leaves = [drawn(3, 5, dtype=dtype), drawn(3, 5, 4, seed=1, dtype=dtype), drawn(3, 4, seed=2, dtype=dtype)]
    leaves[only].requires_grad_()
    result = rows_mm.rows_mm(leaves[0], [leaves[1]], [leaves[2]], gather=(6, 3, 2), epilogue=rows_mm.ADD_VECTOR, **told)
    (actual,) = torch.autograd.grad(result.sum(), leaves[only])
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    token = torch.arange(6, device=DEVICE) // 2
    exact = each(wide[0][token], wide[1], ids) + each(wide[0].new_ones(6, 1), wide[2].unsqueeze(1), ids)
    (expected,) = torch.autograd.grad(exact.sum(), wide[only])
    assert actual.dtype is dtype
    # The gradient of each pair is rounded, then their sum.
    assert_close(actual.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * expected.abs().max().item())


@needs_interpreter
@pytest.mark.parametrize("way", WAYS[::2])
@pytest.mark.parametrize("gather", [None, (0, 0, 2), (0, 0, 1), (0, 3, 0)], ids=str)
def test_gradients_without_a_pair(poisoned, way, gather):
    """No token, or no slot."""
    _, told = dispatch(ids_of(0), 4, way)
    rows = drawn(gather[1] if gather else 0, 7).requires_grad_()
    weight, bias = drawn(4, 7, 6).requires_grad_(), drawn(4, 6).requires_grad_()
    result = rows_mm.rows_mm(rows, [weight], [bias], gather=gather, epilogue=rows_mm.ADD_VECTOR, **told)
    for leaf, gradient in zip(
        (rows, weight, bias), torch.autograd.grad(result.sum(), (rows, weight, bias)), strict=True
    ):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@needs_interpreter
@pytest.mark.parametrize("what", ["another epilogue", "two products", "another dtype"])
def test_no_gradient_is_said(what):
    """Never a wrong one."""
    rows, weight = drawn(3, 4).requires_grad_(), drawn(2, 4, 5)
    told = {"experts": torch.tensor([0, 1, 0], device=DEVICE)}
    how: dict[str, Any] = {
        "another epilogue": {"weights": [weight], "epilogue": "relu v0"},
        "two products": {"weights": [weight, weight], "epilogue": "mul v0 v1"},
        "another dtype": {"weights": [weight], "dtype": torch.float16},
    }[what]
    with pytest.raises(NotImplementedError, match="no gradient"):
        rows_mm.rows_mm(rows, vectors=[], **how, **told).sum().backward()


@needs_interpreter
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("gather", [None, GATHERS["[T, K]"]], ids=["each its own", "gathered"])
def test_operator(requires_grad, gather):
    pairs, own, after = gather or (10, 0, 1)
    order, offsets = rows_mm.sort_by_expert(ids_of(pairs, low=-1, high=4), 3)
    rows, weight, bias = (
        tensor.requires_grad_(requires_grad) for tensor in (drawn(own or pairs, 4), drawn(3, 4, 5), drawn(3, 5))
    )
    op = torch.ops.moe_rewrite.rows_mm.default
    given = [weight], [bias], order, offsets, None, pairs, own, after, rows_mm.ADD_VECTOR, rows.dtype
    torch.library.opcheck(op, (rows, *given))


@needs_interpreter
def test_operators_without_gradient():
    ids, grad = ids_of(10, low=-1, high=4), drawn(10, 5)
    order, offsets = rows_mm.sort_by_expert(ids, 3)
    torch.library.opcheck(torch.ops.moe_rewrite.sort_by_expert.default, (ids, 3))
    torch.library.opcheck(torch.ops.moe_rewrite.rows_outer.default, (drawn(5, 4), grad, order, offsets, 5, 2))


# --- rows_outer -------------------------------------------------------------------------------------------------------


@needs_interpreter
@every_routing
@pytest.mark.parametrize(("way", "dtype"), list(zip(WAYS[:2] * 2, DTYPES, strict=False)), ids=str)
def test_rows_outer(poisoned, ids, groups, way, dtype):
    """Pairs of no expert count for nothing, even where they hold NaN."""
    ids, told = dispatch(ids.to(DEVICE), groups, way)
    rows = drawn(2 * 11, len(ids), dtype=dtype).t()[:, ::2]
    grad = drawn(7, len(ids), seed=1, dtype=dtype).t()
    bad = (ids < 0) | (ids >= groups)
    rows[bad], grad[bad] = math.nan, math.nan
    result = rows_mm.rows_outer(rows, grad, **told)
    own = (ids[None] == torch.arange(groups, device=DEVICE)[:, None]).double()
    clean = [torch.where(bad[:, None], 0, tensor.double()) for tensor in (rows, grad)]
    exact = torch.einsum("ep,pk,pn->ekn", own, *clean)
    size = torch.einsum("ep,pk,pn->ekn", own, *(tensor.abs() for tensor in clean))
    assert_near(result, exact, size, len(ids))


@needs_interpreter
@every_gather
def test_rows_outer_of_gathered_rows(poisoned, gather):
    pairs, own, after = gather
    ids, told = dispatch(ids_of(pairs, low=-1, high=4), 3, WAYS[0])
    rows, grad = drawn(own, 70), drawn(1).expand(pairs, 66)
    result = rows_mm.rows_outer(rows, grad, **told, own=own, after=after)
    gathered = rows[torch.arange(pairs, device=DEVICE) // after % own]
    member = (ids[None] == torch.arange(3, device=DEVICE)[:, None]).double()
    exact, size = (
        torch.einsum("ep,pk,pn->ekn", member, *(t.double() for t in two))
        for two in ((gathered, grad), (gathered.abs(), grad.abs()))
    )
    assert_near(result, exact, size, pairs)


# --- sort_by_expert ---------------------------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize(
    ("pairs", "groups", "dtype"),
    [
        *((pairs, groups, torch.int64) for pairs in (0, 1, 16, 17, 129) for groups in (1, 14)),
        *((128, 60, dtype) for dtype in (torch.int64, torch.int32, torch.int16)),
        *((300, 2, torch.int64), (1025, 60, torch.int64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_counted_first", [False, True])
def test_sort_by_expert(poisoned, monkeypatch, pairs, groups, dtype, is_counted_first):
    monkeypatch.setattr(rows_mm, "FEW", 0 if is_counted_first else 2**20)
    ids = ids_of(pairs, low=-2, high=groups + 3)
    if dtype is torch.int64:
        ids[::7], ids[3::11] = 2**40, -(2**40)
    ids = ids.to(dtype)
    order, offsets = rows_mm.sort_by_expert(ids, groups)
    key = torch.where((ids >= 0) & (ids < groups), ids, groups).to(torch.int64)
    assert order.dtype is offsets.dtype is torch.int32
    assert torch.equal(order.long(), torch.sort(key, stable=True).indices)
    assert torch.equal(offsets.long(), key.bincount(minlength=groups + 1)[:groups].cumsum(0))


# --- what an epilogue computes ----------------------------------------------------------------------------------------

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 7.0, -7.5, 0.1, 1e-30, -1e-30, 3e38, -3e38, 40.0, -40.0]
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "exp": torch.exp,
    "abs": torch.abs,
    "neg": torch.neg,
    "square": torch.square,
    "bfloat16": lambda x: x.bfloat16().float(),
    "float16": lambda x: x.half().float(),
}
BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
EXACT = {"relu", "abs", "neg", "square", "bfloat16", "float16", *BINARY} - {"div"}
"""What is rounded at most once: to the bit, also the sign of a zero."""


def run_epilogue(program: str, *vectors: Tensor, ways: tuple[str, ...] = WAYS[::2]) -> Tensor:
    """What a program gives for its vectors ``v1`` and ``v2``, by each kernel."""
    rows, weight = torch.zeros(1, 1, device=DEVICE), torch.zeros(1, 1, vectors[0].numel(), device=DEVICE)
    _, *told = zip(*(dispatch(torch.zeros(1, dtype=torch.int64, device=DEVICE), 1, way) for way in ways), strict=True)
    results = [
        rows_mm.rows_mm(rows, [weight], [vector.reshape(1, -1) for vector in vectors], epilogue=program, **one)[0]
        for one in told[0]
    ]
    for other in results[1:]:
        assert_close(results[0], other, rtol=0, atol=0, equal_nan=True)
    return results[0]


def assert_like_torch(name: str, actual: Tensor, expected: Tensor) -> None:
    if name in EXACT:
        same = (actual == expected) & (actual.signbit() == expected.signbit()) | (actual.isnan() & expected.isnan())
        assert same.all(), f"{name}: {actual[~same]} is not {expected[~same]}"
        return
    # 1 + erf(x) and 1 + tanh(x) cancel below zero.
    atol = 64 * EPS if name.startswith("gelu") else 1e-37
    assert_close(actual, expected, rtol=8 * EPS, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}")


@needs_interpreter
@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    given = torch.cat([torch.tensor(SPECIAL), torch.linspace(-12, 12, 97)]).to(DEVICE)
    # In float64 where it is not exact: torch's own `gelu` of inf is NaN on a CPU.
    expected = UNARY[name](given) if name in EXACT else UNARY[name](given.double()).float()
    assert_like_torch(name, run_epilogue(f"{name} v1", given), expected)


@needs_interpreter
@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    special = torch.tensor(SPECIAL, device=DEVICE)
    a, b = (grid.flatten() for grid in torch.meshgrid(special, special, indexing="ij"))
    if name.startswith("clamp"):
        # The bound of a clamp is a number.
        for bound in SPECIAL[1:]:
            expected = BINARY[name](special, bound)
            actual = run_epilogue(f"{name} v1 {bound!r}", special)
            assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        return
    if name in ("maximum", "minimum"):  # of two zeros either is right
        keep = ~((a == 0) & (b == 0))
        a, b = a[keep], b[keep]
    assert_like_torch(name, run_epilogue(f"{name} v1 v2", a, b), BINARY[name](a, b))


@needs_interpreter
@pytest.mark.parametrize(
    "number", [-2.5, 1e-05, -1e-05, 0.1, 1e20, math.inf, -math.inf, 7.0, 1.702, 2.0**-140], ids=str
)
def test_constants(number):
    """As they are written: with signs, exponents and all."""
    given = torch.tensor(SPECIAL, device=DEVICE)
    assert_like_torch("mul", run_epilogue(f"mul v1 {number!r}", given), given * number)
    assert_like_torch("sub", run_epilogue(f"neg v1;sub {number!r} v2", given), number + given)


def test_values_are_told_from_numbers():
    program = "add v0 v12;mul v1 -1e-05;clamp_max v13 inf;silu v3"
    told = [[kernels._is_value(program, step, 1), kernels._is_binary(program, step)] for step in range(4)]
    assert [[bool(one) for one in two] for two in told] == [[True, True], [True, True], [True, True], [True, False]]
    assert kernels._index(program, 0, 2) == 12
    assert not kernels._is_value(program, 1, 2)
    assert kernels._constant(program, 1, 2) == -1e-05
    assert not kernels._is_value(program, 2, 2)
    assert kernels._constant(program, 2, 2) == math.inf
    assert kernels._length(program) == 4
    assert kernels._length("") == 0


# --- what is computed in one kernel -----------------------------------------------------------------------------------


class Recorded:
    """The loops that were lowered, and the stages that were found in each."""

    def __init__(self) -> None:
        self.loops: list[ExpertsLoop] = []
        self.stages: list[list[epilogue.Stage]] = []

    @property
    def programs(self) -> list[str]:
        """The programs of the last loop, in the order of the loop."""
        return [stage.epilogue for stage in reversed(self.stages[-1])]


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    found, stages = Recorded(), epilogue.stages

    def record(loop: ExpertsLoop) -> list[epilogue.Stage]:
        found.loops.append(loop)
        found.stages.append(stages(loop))
        return found.stages[-1]

    monkeypatch.setattr(epilogue, "stages", record)
    return found


def fast(module: nn.Module, experts: str = "triton", inner: str = "eager", **how: Any) -> Any:
    options = {"inner": inner, "experts": experts}
    return torch.compile(module, backend="moe_rewrite", options=options, **{"fullgraph": True, **how})


def assert_same_numbers(actual: Any, expected: Any) -> None:
    """In float32, as ``modes.py`` has it."""
    assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


FOUR = slice(0, HIDDEN // 2)


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
    "up first": (lambda m, r: r.halves[1] * F.silu(r.halves[0]), "silu v1;mul v0 v2"),
    "split": (lambda m, r: torch.mul(*r.whole.split(HIDDEN // 2, -1)), "mul v0 v1"),
    "slices of unequal steps": (lambda m, r: r.whole[:, :4] * r.whole[:, ::2], "mul v0 v1"),
    "slice of a slice": (lambda m, r: r.whole[:, 1:][:, ::2] * r.whole[:, 1::2][:, :4], "mul v0 v0"),
    "one half": (lambda m, r: F.relu(r.halves[1]), "relu v0"),
    "gpt_oss, with bias": (
        lambda m, r: _gated(r.whole[:, ::2].clamp(max=0.7), r.whole[:, 1::2].clamp(-0.5, 0.5)),
        "add v0 v2;clamp_min v4 -0.5;clamp_max v5 0.5;add v6 1.0;"
        "add v1 v3;clamp_max v8 0.7;mul v9 1.702;sigmoid v10;mul v9 v11;mul v7 v12",
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


def check_fused(recorded: Recorded, loop: Any, args: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    module = Moe(loop, dtype=dtype).to(DEVICE)
    args = tuple(arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)
    with torch.no_grad():
        actual, expected = fast(module)(*args), module(*args)
    assert len(recorded.loops) == 1
    if dtype is torch.float32:
        assert_same_numbers(actual, expected)
    return actual


@needs_interpreter
@pytest.mark.parametrize("name", FUSED)
def test_fused(recorded, name):
    function, program = FUSED[name]

    def body(m, x, ids, weights, expert, slot, token):
        rows = function(m, Rows(m, x, token, expert, "with bias" in name))
        return second(m, rows, expert)

    if name == "through bfloat16":
        module = Moe(loop_over(body), dtype=torch.float32)
        with torch.no_grad():
            fast(module)(*inputs(dtype=torch.float32))  # a number may be rounded the other way
    else:
        check_fused(recorded, loop_over(body), inputs(dtype=torch.float32))
    assert recorded.programs == [program, ""]


@needs_interpreter
def test_operands_of_a_stage(recorded):
    """Which columns of which values, by start and step."""

    def interleaved(m, x, ids, weights, expert, slot, token):
        y = first(m, x, token, expert, bias=True)
        return second(m, F.silu(y[:, 1::2]) * y[:, ::2], expert)

    check_fused(recorded, loop_over(interleaved), inputs(dtype=torch.float32))
    last, stage = recorded.stages[-1]
    assert stage.epilogue == "add v0 v2;silu v4;add v1 v3;mul v5 v6"
    assert [(one.start, one.step, one.width) for one in stage.products] == [(1, 2, 4), (0, 2, 4)]
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

    check_fused(recorded, two, inputs(dtype=torch.float32))
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

    check_fused(recorded, loop_over(body), inputs(dtype=torch.float32))
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

    check_fused(recorded, loop, inputs(dtype=torch.float32))
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

    module = Moe(loop, dtype=torch.float32)
    function = fast(module, dynamic=None if changes else False)
    for width in (4, 6):
        up, down = drawn(NUM_EXPERTS, 2 * width, HIDDEN), drawn(NUM_EXPERTS, HIDDEN, width)
        if changes:
            torch._dynamo.mark_dynamic(up, 1)
            torch._dynamo.mark_dynamic(down, 2)
        args = (*inputs(dtype=torch.float32), up, down)
        with torch.no_grad():
            assert_same_numbers(function(*args), module(*args))
    assert len(recorded.loops) == (1 if changes else 2)
    assert recorded.programs == ([""] if changes else ["silu v0;mul v2 v1", ""])


# --- whole loops ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Some loops over experts, and what stands around them. ``[T, HIDDEN]`` to the same."""

    def __init__(self, forward: Callable[..., Tensor], num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.moe = Moe(plain_loop, num_experts, dtype=torch.float32)
        self.w1, self.w3, self.w2 = (
            nn.ModuleList(nn.Linear(*sizes) for _ in range(num_experts))
            for sizes in ((HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN))
        )
        generator = torch.Generator().manual_seed(3)
        for parameter in [*self.w1.parameters(), *self.w3.parameters(), *self.w2.parameters()]:
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.function = forward

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.function(self, x, ids, weights)


def swiglu(m: Moe, x: Tensor, ids: Tensor, weights: Tensor, select: Callable[..., Any] | None = None) -> Tensor:
    """The loop of most models, with ids that may be of no expert."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, m.num_experts + 1).permute(2, 1, 0)
    for expert in hits(mask):
        expert = expert[0]
        if expert == m.num_experts:
            continue
        slot, token = torch.where(mask[expert])
        gate, up = F.linear(x[token], m.weight[expert], m.bias[expert]).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, m.weight[expert][:, FOUR])
        out.index_add_(0, token, (rows * weights[token, slot, None]).to(out.dtype))
    return out


def _modules(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(b.moe.num_experts):
        token, slot = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        rows = b.w2[expert](F.silu(b.w1[expert](x[token])) * b.w3[expert](x[token]))
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


def _transposed(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Ids ``[K, T]``: the slot comes first."""
    ids, weights, out = ids.t(), weights.t(), torch.zeros_like(x)
    for expert in range(b.moe.num_experts):
        slot, token = torch.where(ids == expert)
        out.index_add_(0, token, b.moe.expert(x[token], expert) * weights[slot, token, None])
    return out


def _one_each(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Ids ``[T]``, a column of others, and rows that are written."""
    ids, out = ids[:, 1], torch.zeros_like(x)
    for expert in range(b.moe.num_experts):
        (token,) = torch.where(ids == expert)
        out[token] = b.moe.expert(x[token], expert)
    return out


def _by_mask(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Any mask: how many pairs there are is known at run time."""
    out, mask = torch.zeros_like(x), (x[:, : b.moe.num_experts] > 0.1).t()
    for expert in range(b.moe.num_experts):
        (token,) = torch.where(mask[expert])
        out.index_add_(0, token, b.moe.expert(x[token], expert))
    return out


def _once_a_token(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """An expert that a token has twice counts once, and its rows are added to what is there."""
    out = torch.zeros_like(x)
    for expert in range(b.moe.num_experts):
        (token,) = torch.where((ids == expert).any(-1))
        out[token] += b.moe.expert(x[token], expert)
    return out


def _dropped(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Tokens whose ids are all of no expert, with an x of NaN, and some besides."""
    dropped = torch.arange(x.shape[0], device=x.device) % 3 == 1
    ids = torch.where(dropped[:, None] | (weights < 0.2), b.moe.num_experts, ids)
    return swiglu(b.moe, torch.where(dropped[:, None], math.nan, x), ids, weights)


def _shared(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """An expert for all tokens beside the loop, and a gate in front of it."""
    scores, ids = (x @ b.moe.weight[0][:, :NUM_EXPERTS]).softmax(-1).topk(2)
    return x + swiglu(b.moe, x, ids, scores) + F.silu(b.w1[0](x)) @ b.w2[0].weight.t()


def _two_loops(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return swiglu(b.moe, torch.tanh(swiglu(b.moe, x, ids, weights)), ids.flip(0), weights)


def _checkpointed(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(swiglu, b.moe, x, ids, weights, use_reentrant=False)


def _every_token(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(b.moe.num_experts):
        out = out + b.moe.expert(x, expert) * (ids == expert).sum(-1, keepdim=True)
    return out


def _switches_on(b: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    with torch.enable_grad():
        return swiglu(b.moe, x, ids, weights)


BLOCKS = {
    "swiglu": lambda b, *args: swiglu(b.moe, *args),
    "modules": _modules,
    "transposed": _transposed,
    "one each": _one_each,
    "by mask": _by_mask,
    "once a token": _once_a_token,
    "dropped": _dropped,
    "shared": _shared,
    "two loops": _two_loops,
    "checkpointed": _checkpointed,
    "every token": _every_token,
    "gradients switched on": _switches_on,
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def run_block(module: nn.Module, args: tuple[Any, ...], run: Callable[..., Any], grad: str) -> dict[str, Tensor]:
    """Output and gradients. ``grad``: what requires one."""
    args = tuple(arg.detach().clone().to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)
    x = args[0].requires_grad_(grad in ("all", "x"))
    for parameter in module.parameters():
        parameter.grad = None
    with contextlib.nullcontext() if grad in ("all", "x") else getattr(torch, grad)():
        out = run(x, *args[1:])
    if out.requires_grad:
        weigh_up(out).backward()
    leaves = {"x": x, **dict(module.named_parameters())}
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"output": out.detach(), **gradients}


def check_block(block: Callable[..., Tensor], grad: str, inner: str = "eager", args: Any = None, **how: Any) -> None:
    module = Block(block).to(DEVICE)
    args = args or inputs(dtype=torch.float32)
    module.requires_grad_(grad != "x")
    expected = run_block(module, args, module, grad)
    assert any(tensor.any() for name, tensor in expected.items() if name != "output") == (
        grad in ("all", "x") or block is _switches_on
    )
    assert_same_numbers(run_block(module, args, fast(module, inner=inner, **how), grad), expected)


@needs_interpreter
@every_block
@pytest.mark.parametrize("grad", ["no_grad", "all"])
def test_blocks(block, grad):
    check_block(block, grad)


@needs_interpreter
@pytest.mark.parametrize("name", ["modules", "dropped"])
def test_frozen_experts(name):
    check_block(BLOCKS[name], "x")


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "grad"), [("modules", "inference_mode"), ("by mask", "all"), ("two loops", "inference_mode")]
)
def test_blocks_through_the_compilers(name, grad):
    """With functions traced ahead of time, as inductor has them."""
    check_block(BLOCKS[name], grad, inner="aot_eager")


@needs_interpreter
def test_through_inductor():
    check_block(_dropped, "no_grad", inner="inductor")


@needs_interpreter
def test_numbers_of_tokens():
    """Any number of tokens, none and one among them, with at most three graphs each, fused or not."""
    for grad in ("no_grad", "all"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = Block(BLOCKS["swiglu"])
        function = fast(module, dynamic=True)
        for tokens in (5, 0, 1, 7, 40):
            args = inputs(tokens, dtype=torch.float32)
            expected = run_block(module, args, module, grad)
            assert_same_numbers(run_block(module, args, function, grad), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@needs_interpreter
def test_few_pairs_of_many_experts(recorded, monkeypatch):
    """One by one, with ids that are a column of others; at more pairs by a sort."""
    told = []
    multiply = experts_backend.rows_mm
    monkeypatch.setattr(
        experts_backend, "rows_mm", lambda *args, **how: told.append("experts" in how) or multiply(*args, **how)
    )
    for tokens, one_by_one in ((4, True), (12, False)):
        module = Block(_one_each, num_experts=32)
        args = inputs(tokens, num_experts=32, dtype=torch.float32)
        for grad in ("no_grad", "all"):
            torch._dynamo.reset()
            expected = run_block(module, args, module, grad)
            assert_same_numbers(run_block(module, args, fast(module), grad), expected)
        assert set(told) == {one_by_one}
        told.clear()


@needs_interpreter
def test_only_what_is_before_requires_grad(recorded):
    """Something before the first loop is trained: nothing is fused after it."""

    def loops(b, x, ids, weights):
        return _two_loops(b, x * b.moe.scale[0], ids, weights)

    module = Block(loops).requires_grad_(False)
    module.moe.scale.requires_grad_()
    args = inputs(dtype=torch.float32)
    with torch.enable_grad():
        expected, actual = (run_block(module, args, run, "all") for run in (module, fast(module)))
    assert expected["moe.scale"].any()
    assert_same_numbers(actual, expected)
    assert recorded.loops == []
    torch._dynamo.reset()
    module.requires_grad_(False)
    with torch.enable_grad():
        assert_same_numbers(fast(module)(*args), module(*args))
    assert len(recorded.loops) == 2


@needs_interpreter
def test_frozen_then_trained(recorded):
    """What was compiled without a gradient is not used where there is one."""
    module, args = Block(BLOCKS["swiglu"]).requires_grad_(False), inputs(dtype=torch.float32)
    function = fast(module)
    assert_same_numbers(function(*args), module(*args))
    assert len(recorded.loops) == 1
    module.requires_grad_()
    expected = run_block(module, args, module, "all")
    assert_same_numbers(run_block(module, args, function, "all"), expected)
    assert expected["moe.weight"].any()


@needs_interpreter
def test_float64_goes_elsewhere(monkeypatch):
    """The kernels add in float32; nothing in float64 is given to them."""
    monkeypatch.setattr(experts_backend, "rows_mm", None)
    module = Moe(sentinel)
    args = inputs()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch._dynamo.reset()
            assert_close(fast(module)(*args), module(*args), rtol=1e-9, atol=1e-11)


MODES = [
    modes.Case("triton", "aot_eager default", dtype, "static", sizes, ids)
    for dtype, (sizes, ids) in zip(
        ("bf16", "fp16", "autocast"), itertools.cycle(itertools.product(modes.SIZES, ("topk", "given")))
    )
]


@needs_interpreter
@pytest.mark.parametrize("case", MODES, ids=str)
def test_modes_fused(monkeypatch, case):
    """In low precision no further from float64 than eager is; with gradients that is tested in ``test_modes.py``."""
    monkeypatch.setattr(modes, "TOKENS", {"static": (24,)})
    with torch.no_grad():
        modes.check(case, DEVICE)


@needs_interpreter
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_models_of_transformers(recorded, name):
    model, tokens = hub.build(name, moe_layers=1).to(DEVICE), hub.random_tokens(1, 7).to(DEVICE)
    function = fast(model)
    with torch.no_grad():
        expected = hub.logits(model, tokens)
        assert_close(hub.logits(function, tokens), expected, rtol=1e-4, atol=1e-4)
    program = {
        "mixtral": "silu v0;mul v2 v1",
        "gpt_oss": "add v0 v2;clamp_min v4 -7.0;clamp_max v5 7.0;add v6 1.0;"
        "add v1 v3;clamp_max v8 7.0;mul v9 1.702;sigmoid v10;mul v9 v11;mul v7 v12",
    }[name]
    assert recorded.programs[0] == program
    assert len(recorded.programs) == 2


# --- the forms and spellings of the other tests -----------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("form", [*test_forms.TOP_K_FORMS, *test_forms.MASK_FORMS], ids=lambda form: form.__name__)
def test_forms_in_float32(form):
    """Each form, with ids that a token has twice."""
    args = tuple(arg.float() if arg.is_floating_point() else arg for arg in test_forms.given_twice())
    with torch.no_grad():
        expected = weigh_up(test_forms.Experts(form, Python).float()(*args))
        function = compiled(test_forms.Experts(form, Rolled).float(), Compiled("triton"))
        assert_same_numbers(weigh_up(function(*args)), expected)


@needs_interpreter
@pytest.mark.parametrize("loop", test_spellings.REWRITTEN, ids=lambda loop: loop.__name__)
def test_spellings_in_float32(loop):
    module = Moe(loop, dtype=torch.float32).requires_grad_(False)
    args = inputs(dtype=torch.float32)
    assert_same_numbers(fast(module)(*copy.deepcopy(args)), module(*copy.deepcopy(args)))


# --- what pairs of no expert look up ----------------------------------------------------------------------------------


def _longer_ids(m, x, ids, weights):
    return swiglu(m, x, torch.cat([ids, torch.full_like(ids[:2], NUM_EXPERTS)]), weights)


def _wider_ids(m, x, ids, weights):
    return swiglu(m, x, torch.cat([ids, torch.full_like(ids, NUM_EXPERTS)], 1), weights)


def _short_table(m, x, ids, weights):
    ids = torch.where(torch.arange(x.shape[0])[:, None] < 4, ids, NUM_EXPERTS)
    return swiglu(m, x[:4], ids, weights[:4])


def _table_of_each_expert(m, x, ids, weights):
    """A part of each expert's own that the token's number is an index of."""
    ids = torch.where(torch.arange(x.shape[0])[:, None] < 4, ids, NUM_EXPERTS)
    out, mask = torch.zeros_like(x), F.one_hot(ids, NUM_EXPERTS + 1).permute(2, 1, 0)
    for expert in hits(mask[:NUM_EXPERTS]):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert] * m.pairwise[expert][token][:, None])
    return out


def _selected_otherwise(m, x, ids, weights):
    ids = torch.where(torch.arange(x.shape[0])[:, None] < 4, ids, NUM_EXPERTS)
    short, out, mask = x[:4].clone(), torch.zeros_like(x), F.one_hot(ids, NUM_EXPERTS + 1).permute(2, 1, 0)
    for expert in hits(mask[:NUM_EXPERTS]):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        rows = short.index_select(0, token) + F.embedding(token, short)
        out.index_add_(0, token, rows @ m.weight[expert] + m.bias[:2][slot])
    return out


def _number_as_an_index(m, x, ids, weights):
    """Integers that are computed for each row."""
    ids = torch.where(torch.arange(x.shape[0])[:, None] < 3, ids, NUM_EXPERTS)
    out, mask = torch.zeros_like(x), F.one_hot(ids, NUM_EXPERTS + 1).permute(2, 1, 0)
    for expert in hits(mask[:NUM_EXPERTS]):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token * 2 + 1] @ m.weight[expert])
    return out


LOOKUPS = (_longer_ids, _wider_ids, _short_table, _table_of_each_expert, _selected_otherwise, _number_as_an_index)


@pytest.mark.parametrize("loop", LOOKUPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize(
    ("experts", "grad"),
    [
        *(("batched_mm", False), ("grouped_mm", False)),
        *(pytest.param("triton", grad, marks=needs_interpreter) for grad in (False, True)),
    ],
)
def test_what_pairs_of_no_expert_look_up(loop, experts, grad):
    """Nothing that is not there: a table may have no entry for a token whose ids are all of no expert."""
    module = Moe(loop, dtype=torch.float32)
    x, ids, weights = inputs(dtype=torch.float32)
    function = fast(module, experts)
    for given in (ids, torch.full_like(ids, NUM_EXPERTS)):
        with torch.set_grad_enabled(grad):
            actual, expected = function(x, given, weights), module(x, given, weights)
            assert_same_numbers(actual, expected)
            if grad and expected.requires_grad:
                weight = [torch.autograd.grad(weigh_up(one), module.weight)[0] for one in (actual, expected)]
                assert_same_numbers(*weight)


# --- compiled without a GPU -------------------------------------------------------------------------------------------

COMPILE = '''
import json, re, subprocess, sys, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_rewrite.lower import kernels, rows_mm


def compiled(capability, name, dtype, constants, pointers, options):
    kernel = getattr(kernels, name)
    whole = {"*" + {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]: pointers[0], "*i32": pointers[1]}
    types = {one: kind for kind, names in whole.items() for one in names.split()}
    types |= {one: "*i64" for one in pointers[2].split()}
    signature, attributes, given = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], given[(place,)] = "constexpr", constants[argument]
        else:
            signature[argument] = types.get(argument, "i32")
            if argument in types or argument in ("inner", "columns") or argument[-2:] in ("_e", "_m", "_k", "_n"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=given, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": result.metadata.shared, "spills": spills(result.asm["cubin"])}


def spills(cubin):
    """How many bytes of local memory the kernel has on its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(number) for number in re.findall(r"(?:STACK|LOCAL):(\\d+)", said))


for case in json.load(sys.stdin):
    print(json.dumps(compiled(*case)), flush=True)
'''


@dataclasses.dataclass(frozen=True)
class Shape:
    """Experts, and the product of one of their stages."""

    experts: int
    top_k: int
    inner: int
    columns: int
    products: int = 1
    interleaved: bool = False
    vectors: int = 0
    program: str = ""
    contiguous: str = "k"


GPT_OSS = (
    "add v0 v2;clamp_max v4 7.0;add v1 v3;clamp_min v6 -7.0;clamp_max v7 7.0;add v8 1.0;"
    "mul v5 1.702;sigmoid v10;mul v5 v11;mul v9 v12"
)
QWEN_UP = Shape(60, 4, 2048, 1408, 2, False, 0, "silu v0;mul v2 v1")
QWEN_DOWN = Shape(60, 4, 1408, 2048)
GPT_OSS_UP = Shape(32, 4, 2880, 2880, 2, True, 2, GPT_OSS)
GPT_OSS_ALONG_N = dataclasses.replace(GPT_OSS_UP, contiguous="n")
ROWS = ("rows weight second_weight vector second_vector result", "order offsets", "")


def _multiply(shape: Shape, tokens: int, dtype: str, wide: bool = True) -> tuple[Any, ...]:
    pairs, kind = tokens * shape.top_k, getattr(torch, dtype)
    launch = rows_mm._tile(pairs, shape.experts, shape.inner, shape.columns, shape.products, kind, wide)
    more = {"GROUPS": rows_mm._power(shape.experts + 1), "HAS_ORDER": True, "PRECISION": "ieee", "WIDEN": False}
    return "multiply", dtype, *_launch(shape, {**more, **launch}), ROWS


def _each(shape: Shape, dtype: str) -> tuple[Any, ...]:
    weight = torch.empty(shape.experts, shape.columns, shape.inner, device="meta").transpose(1, 2)
    launch = rows_mm._columns_of_a_program(shape.inner, shape.columns, weight)
    return "multiply_each", dtype, *_launch(shape, launch), (ROWS[0], "", "experts")


def _launch(shape: Shape, launch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    constants = {
        "PRODUCTS": shape.products,
        "INTERLEAVED": shape.interleaved,
        "VECTORS": shape.vectors,
        "EPILOGUE": shape.program,
        **dict.fromkeys(("rows_k", f"weight_{shape.contiguous}"), 1),
        **({} if shape.interleaved else dict.fromkeys((f"second_{shape.contiguous}", "vector_n"), 1)),
        **launch,
    }
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    return constants, options


def _outer(dtype: str) -> tuple[Any, ...]:
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    constants = {"BLOCK_M": 32, "BLOCK_N": 128 if size == 2 else 64, "BLOCK_K": 64, "HAS_ORDER": True}
    constants |= {"PRECISION": "ieee", "WIDEN": False, "rows_k": 1, "grad_n": 1}
    return "outer", dtype, constants, {}, ("rows grad result", "order offsets", "")


def _sort(pairs: int, groups: int) -> tuple[Any, ...]:
    many, part = pairs > rows_mm.FEW, rows_mm._block(pairs, 128)
    sizes = (1024, part, 16) if many else (part, part, rows_mm._block(pairs, 1024))
    constants = dict(zip(("BLOCK", "PART", "COUNTED"), sizes, strict=True))
    constants |= {"GROUPS": rows_mm._power(groups + 2), "HAS_COUNTS": many}
    return "sort", "bfloat16", constants, {}, ("", "counts order offsets", "experts")


def _count(groups: int) -> tuple[Any, ...]:
    constants = {"BLOCK": 1024, "GROUPS": rows_mm._power(groups + 2)}
    return "count", "bfloat16", constants, {}, ("", "counts", "experts")


SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""The most shared memory of a block, in KiB, by compute capability (CUDA C++ Programming Guide, table 24)."""
COMPILED = {
    "few tokens": (_multiply(QWEN_UP, 16, "bfloat16"), (80, 90)),
    "some tokens": (_multiply(QWEN_UP, 512, "bfloat16"), (80, 90)),
    "many tokens": (_multiply(QWEN_UP, 4096, "bfloat16"), (90, 100)),
    "many tokens, narrow": (_multiply(QWEN_UP, 4096, "bfloat16", wide=False), (80, 120)),
    "one product": (_multiply(QWEN_DOWN, 4096, "float16"), (90,)),
    "one product, narrow": (_multiply(QWEN_DOWN, 4096, "float16", wide=False), (80,)),
    "interleaved": (_multiply(GPT_OSS_UP, 4096, "bfloat16"), (90, 100)),
    "interleaved along N": (_multiply(GPT_OSS_ALONG_N, 4096, "bfloat16"), (90,)),
    "interleaved, narrow": (_multiply(GPT_OSS_UP, 4096, "bfloat16", wide=False), (80, 89)),
    "float32": (_multiply(QWEN_UP, 4096, "float32"), (80, 90)),
    "one by one": (_each(QWEN_UP, "bfloat16"), (80, 90)),
    "one by one, interleaved": (_each(GPT_OSS_UP, "bfloat16"), (90,)),
    "gradient of the weight": (_outer("bfloat16"), (80, 90)),
    "sort": (_sort(4096 * 4, 60), (80, 90)),
    "sort of few": (_sort(8, 60), (90,)),
    "count": (_count(60), (90,)),
}
SPILLS = {"interleaved": 224, "interleaved along N": 32}
"""Bytes of registers that are put away: the long epilogue of the widest tile has too many values at a time."""


def test_compiled_for_gpus(tmp_path):
    """As the launchers ask for it: it compiles, shared memory suffices, and registers do too."""
    cases = [(name, capability, case) for name, (case, capabilities) in COMPILED.items() for capability in capabilities]
    root = pathlib.Path(moe_rewrite.__file__).parent.parent
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps([(capability, *_ordered(case)) for _, capability, case in cases]),
        env={**clean, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-3000:]
    found = [json.loads(line) for line in said.stdout.splitlines()]
    for (name, capability, _), one in zip(cases, found, strict=True):
        print(f"{name} on SM{capability}: {one}")
    for (name, capability, _), one in zip(cases, found, strict=True):
        assert one["shared"] <= SHARED[capability] * 1024, f"{name} on SM{capability}: {one}"
        assert one["spills"] <= SPILLS.get(name, 0), f"{name} on SM{capability}: {one}"


def _ordered(case: tuple[Any, ...]) -> tuple[Any, ...]:
    name, dtype, constants, options, pointers = case
    return name, dtype, constants, pointers, options
