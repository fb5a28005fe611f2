"""The experts backend ``triton``: its kernels, what is computed in them, and whole loops.

Without a GPU the kernels run in Triton's interpreter, on sizes as small as show something. It truncates where a GPU
rounds to bf16, so that a result may be one unit in the last place off.
"""

from __future__ import annotations

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
import numpy
import pytest
import test_forms
import test_spellings
import torch
import torch.nn.functional as F
from loops import HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOKENS, Moe, hits, inputs, loop_over, sentinel, weigh_up
from loops import plain as plain_loop
from rolled import Compiled, Python, Rolled, compiled
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import deterministic

import moe_rewrite
from moe_rewrite.lower import epilogue, kernels, rows_mm
from moe_rewrite.lower import triton as experts_backend
from moe_rewrite.loop import ExpertsLoop, TopKDispatch

triton = pytest.importorskip("triton", reason="torch for the CPU comes without triton")

_VERSIONS = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)]
needs_interpreter = pytest.mark.skipif(
    not torch.cuda.is_available() and _VERSIONS[0] < (3, 7) and _VERSIONS[1] >= (2, 4),
    reason="the interpreter of triton < 3.7 needs numpy < 2.4",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    allowed = unit.eps * exact.abs() + (terms + 2) * EPS * size + unit.smallest_normal * unit.eps
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
few_routings = pytest.mark.parametrize(
    ("ids", "groups"), [ROUTINGS[name] for name in ("pairs of no expert", "one expert")], ids=["some", "one"]
)


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
@pytest.mark.parametrize(("inner", "columns"), [(20, 24), (64, 16)], ids=str)
def test_rows_mm(poisoned, ids, groups, way, inner, columns):
    if way == "one by one":
        ids = ids[:20]  # for few pairs
    rows = drawn(len(ids), inner)
    multiply_and_compare(rows, [drawn(groups, columns, inner, seed=1).transpose(1, 2)], [], ids, way)


@needs_interpreter
@every_way
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("inner", "columns"), [(32, 64), (70, 17), (1, 1)], ids=str)
def test_layouts(poisoned, way, layout, inner, columns):
    ids, groups = ROUTINGS["pairs of no expert"]
    rows = drawn(2 * len(ids), 3 * inner, seed=3)[1::2, ::3]
    multiply_and_compare(rows, [layout(groups, inner, columns, seed=1)], [], ids, way)


@needs_interpreter
@every_way
@pytest.mark.parametrize("two", TWO.values(), ids=TWO)
@pytest.mark.parametrize("layout", [LAYOUTS[name] for name in ("along N", "along K", "along neither")], ids=str)
@pytest.mark.parametrize("columns", [16, 19])
def test_two_products(poisoned, way, two, layout, columns):
    ids, groups = ROUTINGS["pairs of no expert"]
    multiply_and_compare(drawn(len(ids), 37), two(layout, groups, 37, columns), [], ids, way)


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
@every_way
@few_routings
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_dtypes(poisoned, way, ids, groups, dtype, wanted):
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
@every_way
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
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
    for row in (~bad).nonzero().flatten():
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
@every_way
@pytest.mark.parametrize("gather", [None, *GATHERS.values()], ids=["each its own", *GATHERS])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients(poisoned, way, gather, loss):
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
    result = rows_mm.rows_mm(
        leaves[0], [leaves[1]], [leaves[2]], gather=(6, 3, 2), epilogue=rows_mm.ADD_VECTOR, **told
    )
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
@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
@pytest.mark.parametrize("pairs", [0, 1, 15, 16, 17, 127, 128, 129, 300, 1025])
@pytest.mark.parametrize("groups", [1, 2, 14, 60])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
def test_sort_by_expert(poisoned, pairs, groups, dtype):
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
EXACT = {"relu", "abs", "neg", "square", "float16", *BINARY} - {"div"}
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
    rtol = torch.finfo(torch.bfloat16).eps if name == "bfloat16" else 8 * EPS
    # 1 + erf(x) and 1 + tanh(x) cancel below zero.
    atol = 64 * EPS if name.startswith("gelu") else 1e-37
    assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}")


@needs_interpreter
@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    given = torch.cat([torch.tensor(SPECIAL), torch.linspace(-12, 12, 97)]).to(DEVICE)
    if name == "bfloat16":
        given = given.bfloat16().float()[given.abs() != 3e38]
    # In float64 where it is not exact: torch's own `gelu` of inf is NaN on a CPU.
    expected = UNARY[name](given) if name in EXACT | {"bfloat16"} else UNARY[name](given.double()).float()
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
@pytest.mark.parametrize("number", [-2.5, 1e-05, -1e-05, 0.1, 1e20, math.inf, -math.inf, 7.0, 1.702, 2.0**-140], ids=str)
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
@pytest.mark.parametrize("body_uses", ["the result", "a product of it"])
def test_fused(recorded, name, body_uses):
    function, program = FUSED[name]

    def body(m, x, ids, weights, expert, slot, token):
        rows = function(m, Rows(m, x, token, expert, "with bias" in name))
        return second(m, rows, expert) if body_uses == "a product of it" else torch.cat([rows, rows], -1)

    if name == "through bfloat16":
        module = Moe(loop_over(body), dtype=torch.float32)
        with torch.no_grad():
            fast(module)(*inputs(dtype=torch.float32))  # a number may be rounded the other way
    else:
        check_fused(recorded, loop_over(body), inputs(dtype=torch.float32))
    assert recorded.programs == [program, *([""] if body_uses == "a product of it" else [])]


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
    "used by a product too": (lambda m, r: second(m, F.silu(r[:, FOUR]), r.expert) + r.whole, ["", ""]),
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
