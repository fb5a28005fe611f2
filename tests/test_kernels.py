"""The Triton kernels by themselves.

Without a GPU they run in Triton's interpreter, on sizes as small as show something.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from operands import (
    DEVICE,
    DTYPES,
    EPS,
    LAYOUTS,
    TWO,
    WAYS,
    assert_near,
    both_kernels,
    dispatch,
    drawn,
    each,
    every_way,
    ids_of,
    needs_interpreter,
)
from torch import Tensor
from torch.testing import assert_close

import moe_rewrite
from moe_rewrite.lower import launch as launches
from moe_rewrite.lower import rows_mm, tiles
from moe_rewrite.lower.kernels import steps

triton = pytest.importorskip("triton", reason="torch for the CPU comes without triton")

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
        order, _, offsets = rows_mm.sort_by_expert(column, groups)
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
@pytest.mark.parametrize("way", WAYS)
def test_what_comes_before_is_not_read(poisoned, way):
    _, told = dispatch(ids_of(6), 4, way)
    rows, weight = drawn(6, 7), drawn(4, 7, 6)
    result = rows_mm.rows_mm(rows, [weight], [], behind=torch.full((1,), torch.nan, device=DEVICE), **told)
    assert_close(result, rows_mm.rows_mm(rows, [weight], [], **told), rtol=0, atol=0)
    assert result.isfinite().all()


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
    order, _, offsets = rows_mm.sort_by_expert(ids_of(pairs, low=-1, high=4), 3)
    rows, weight, bias = (
        tensor.requires_grad_(requires_grad) for tensor in (drawn(own or pairs, 4), drawn(3, 4, 5), drawn(3, 5))
    )
    op = torch.ops.moe_rewrite.rows_mm.default
    how = False, rows_mm.ADD_VECTOR, rows.dtype, False, None
    torch.library.opcheck(op, (rows, [weight], [bias], order, offsets, None, pairs, own, after, *how))


@needs_interpreter
def test_operators_without_gradient():
    ids, grad = ids_of(10, low=-1, high=4), drawn(10, 5)
    order, _, offsets = rows_mm.sort_by_expert(ids, 3)
    torch.library.opcheck(torch.ops.moe_rewrite.sort_by_expert.default, (ids, 3))
    for along_inner in (False, True):
        given = drawn(5, 4), grad, order, offsets, 5, 2, along_inner, False
        torch.library.opcheck(torch.ops.moe_rewrite.rows_outer.default, given)


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
        *((300, 2, torch.int64), (1025, 60, torch.int64), (16500, 60, torch.int64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_counted_first", [False, True])
def test_sort_by_expert(poisoned, monkeypatch, pairs, groups, dtype, is_counted_first):
    monkeypatch.setattr(launches, "FEW", 0 if is_counted_first else 2**20)
    ids = ids_of(pairs, low=-2, high=groups + 3)
    if dtype is torch.int64:
        ids[::7], ids[3::11] = 2**40, -(2**40)
    ids = ids.to(dtype)
    order, inverse, offsets = rows_mm.sort_by_expert(ids, groups)
    key = torch.where((ids >= 0) & (ids < groups), ids, groups).to(torch.int64)
    assert order.dtype is offsets.dtype is torch.int32
    assert torch.equal(order.long(), torch.sort(key, stable=True).indices)
    assert inverse.dtype is torch.int32 and torch.equal(
        inverse[order.long()].long(), torch.arange(pairs, device=DEVICE)
    )
    assert torch.equal(offsets.long(), key.bincount(minlength=groups + 1)[:groups].cumsum(0))


# --- rows of pairs of no expert ---------------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pairs", "columns"), [(1, 1), (70, 20), (130, 1030)], ids=str)
@pytest.mark.parametrize("ends", [[0], [0, 0], [3, 3, 40], [66], [200, 200]], ids=str)
def test_lent_rows(dtype, pairs, columns, ends):
    """Those past the last offset are the first one, the others what they were."""
    ends = [min(end, pairs) for end in ends]
    offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    rows = drawn(pairs, columns, dtype=dtype)
    rows[ends[-1] :] = math.nan
    before = rows.clone()
    result = launches.lend(rows, offsets)
    expected = before.clone()
    expected[ends[-1] :] = before[:1] if ends[-1] else 0
    assert torch.equal(result, expected)
    assert torch.equal(rows.nan_to_num(7), before.nan_to_num(7)), "what is not traced leaves its operands alone"


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
OF_EITHER_SIGN = {"relu"}
"""Of whose zeros torch has one sign on a CPU and the other on a GPU."""


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
        same = (actual == expected) & ((actual.signbit() == expected.signbit()) | (name in OF_EITHER_SIGN))
        same |= actual.isnan() & expected.isnan()
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
    told = [[steps._is_value(program, step, 1), steps._is_binary(program, step)] for step in range(4)]
    assert [[bool(one) for one in two] for two in told] == [[True, True], [True, True], [True, True], [True, False]]
    assert steps._index(program, 0, 2) == 12
    assert not steps._is_value(program, 1, 2)
    assert steps._constant(program, 1, 2) == -1e-05
    assert not steps._is_value(program, 2, 2)
    assert steps._constant(program, 2, 2) == math.inf
    assert steps._length(program) == 4
    assert steps._length("") == 0


# --- compiled without a GPU -------------------------------------------------------------------------------------------

COMPILE = '''
import json, re, subprocess, sys, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_rewrite.lower import kernels, rows_mm, tiles
from moe_rewrite.lower import launch as launches


def compiled(capability, name, dtype, constants, pointers, options):
    kernel = getattr(kernels, name)
    kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    types = {one: own for own, names in (("*" + kind, pointers[0]), ("*i32", pointers[1])) for one in names.split()}
    types |= {one: "*i64" for one in pointers[2].split()}
    types |= {one: f"tensordesc<{kind}{block}>" for one, block in (pointers[3:] or [{}])[0].items()}
    signature, attributes, given = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], given[(place,)] = "constexpr", constants[argument]
        else:
            signature[argument] = types.get(argument, "i32")
            is_size = argument in ("inner", "columns") or argument[-2:] in ("_e", "_m", "_k", "_n")
            if is_size or signature[argument][0] == "*":
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


def _multiply(
    shape: Shape, tokens: int, dtype: str, wide: bool = True, described: bool = False
) -> list[tuple[Any, ...]]:
    kind = getattr(torch, dtype)
    found = tiles.of_products(
        tokens * shape.top_k, shape.experts, shape.inner, shape.columns, shape.products, kind, wide
    )
    more = {"GROUPS": tiles.power(shape.experts + 1), "HAS_ORDER": True, "PRECISION": "ieee", "WIDEN": False}
    more |= {"TILES_TOGETHER": 8, "HALVES": True, "DESCRIBED": described}
    if not described:
        return [("multiply", dtype, *_launch(shape, more, tile), ROWS) for tile in found]
    blocks = dict(found[0].blocks)
    block = [1, blocks["BLOCK_N"] * (2 if shape.interleaved else 1), blocks["BLOCK_K"]]
    pointers = "rows vector second_vector result", *ROWS[1:], dict.fromkeys(("weight", "second_weight"), block)
    return [("multiply", dtype, *_launch(shape, more, found[0]), pointers)]


def _each(shape: Shape, dtype: str) -> list[tuple[Any, ...]]:
    found = tiles.of_single_rows(shape.inner, shape.columns, shape.products, shape.contiguous == "k")
    return [("multiply_each", dtype, *_launch(shape, {}, tile), (ROWS[0], "", "experts")) for tile in found]


def _launch(shape: Shape, more: dict[str, Any], tile: tiles.Tile) -> tuple[dict[str, Any], dict[str, Any]]:
    constants = {
        "DIVIDES_K": tiles.divisor(shape.inner),
        "DIVIDES_N": tiles.divisor(shape.columns),
        "PRODUCTS": shape.products,
        "INTERLEAVED": shape.interleaved,
        "VECTORS": shape.vectors,
        "EPILOGUE": shape.program,
        **dict.fromkeys(("rows_k", f"weight_{shape.contiguous}"), 1),
        **({} if shape.interleaved else dict.fromkeys((f"second_{shape.contiguous}", "vector_n"), 1)),
        **more,
    }
    return _with_tile(constants, tile)


def _with_tile(constants: dict[str, Any], tile: tiles.Tile) -> tuple[dict[str, Any], dict[str, Any]]:
    return {**constants, **dict(tile.blocks)}, {"num_warps": tile.warps, "num_stages": tile.stages}


def _outer(shape: Shape, dtype: str, wide: bool = True, described: bool = False, stored: str = "") -> list[Any]:
    constants = {"HAS_ORDER": not described, "PRECISION": "ieee", "WIDEN": False, "rows_k": 1, "grad_n": 1}
    constants |= {"DESCRIBED": described, "STORED": stored, "result_k" if described else "result_n": 1}
    found = tiles.of_gradients(shape.inner, shape.columns, getattr(torch, dtype), wide, described, bool(stored))
    m, k, n = (dict(found[0].blocks)[f"BLOCK_{name}"] for name in "MKN")
    block = {"described_rows": [m, k], "described_grad": [m, n]} if described else {}
    block |= {"described_result": [1, n, k] if stored == "inner" else [1, k, n]} if stored else {}
    of_dtype = ["rows", "grad", "result", "described_rows", "described_grad", "described_result"]
    pointers = (" ".join(name for name in of_dtype if name not in block), "order offsets", "", block)
    return [("outer", dtype, *_with_tile(constants, tile), pointers) for tile in found]


def _sort(pairs: int, groups: int) -> list[tuple[Any, ...]]:
    many, bins = pairs > launches.FEW, tiles.power(groups + 2)
    constants = {**tiles.of_sort(pairs, bins, many), "GROUPS": bins, "HAS_COUNTS": many}
    return [("sort", "bfloat16", constants, {}, ("", "counts order inverse offsets", "experts"))]


def _count(pairs: int, groups: int) -> list[tuple[Any, ...]]:
    bins = tiles.power(groups + 2)
    constants = {"BLOCK": tiles.of_sort(pairs, bins, True)["BLOCK"], "GROUPS": bins}
    return [("count", "bfloat16", constants, {}, ("", "counts", "experts"))]


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
    "described": (_multiply(QWEN_UP, 4096, "bfloat16", described=True), (90, 100)),
    "described, one product": (_multiply(QWEN_DOWN, 4096, "float16", described=True), (90, 100)),
    "described, interleaved": (_multiply(GPT_OSS_UP, 4096, "bfloat16", described=True), (90,)),
    "float32": (_multiply(QWEN_UP, 4096, "float32"), (80, 90)),
    "one by one": (_each(QWEN_UP, "bfloat16"), (80, 90)),
    "one by one, one product": (_each(QWEN_DOWN, "bfloat16"), (80, 90)),
    "one by one, interleaved": (_each(GPT_OSS_UP, "bfloat16"), (90,)),
    "one by one, along columns": (_each(GPT_OSS_ALONG_N, "bfloat16"), (90,)),
    "gradient of the weight": (_outer(QWEN_DOWN, "bfloat16"), (90, 100)),
    "gradient of the weight, described": (_outer(QWEN_DOWN, "bfloat16", described=True), (90, 100)),
    "gradient of the weight, stored": (_outer(QWEN_DOWN, "bfloat16", stored="inner"), (90, 100)),
    "gradient of the weight, described and stored": (_outer(QWEN_DOWN, "float16", True, True, "columns"), (90, 100)),
    "gradient of the weight, narrow": (_outer(QWEN_DOWN, "bfloat16", wide=False), (80, 89)),
    "gradient of the weight in float32": (_outer(QWEN_DOWN, "float32"), (90,)),
    "sort": (_sort(4096 * 4, 60), (80, 90)),
    "sort of few": (_sort(8, 60), (90,)),
    "sort of many": (_sort(16384 * 8, 256), (90,)),
    "count": (_count(4096 * 4, 60), (90,)),
}
TUNED = ("few tokens", "some tokens", "many tokens", "gradient of the weight")
SPILLS = {
    "interleaved": 288,
    "interleaved along N": 32,
    "described, interleaved": 16,
}
"""Bytes of registers that are put away: the long epilogue of the widest tile has too many values at a time. It is
triton 3.9 that puts away so many, for SM100; 3.6 and 3.7 put away 224."""


def test_compiled_for_gpus(tmp_path):
    """It compiles and shared memory suffices, on an H200 with every tile; with the one taken registers do too."""
    cases = [
        (f"{name}, tile {number}", capability, case)
        for name, (of_tiles, capabilities) in COMPILED.items()
        for capability in capabilities
        for number, case in enumerate(of_tiles[: None if capability == 90 and name in TUNED else 1])
    ]
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
        kernel, _, number = name.rpartition(", tile ")
        assert int(number) or one["spills"] <= SPILLS.get(kernel, 0), f"{name} on SM{capability}: {one}"


def _ordered(case: tuple[Any, ...]) -> tuple[Any, ...]:
    name, dtype, constants, options, pointers = case
    return name, dtype, constants, pointers, options
