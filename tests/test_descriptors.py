"""Products and gradients whose operands are read by descriptors: many rows an expert, in 16 bits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from operands import DEVICE, LAYOUTS, TWO, assert_near, dispatch, drawn, each, needs_interpreter
from torch import Tensor

from moe_rewrite.lower import descriptors, launch, rows_mm

# How many pairs each expert has: ends of an eighth of a tile, of more than half of one, of a whole one, and none.
COUNTS = [150, 0, 100, 128, 3]
NONE = 5
"""Pairs of no expert."""
DTYPES = (torch.bfloat16, torch.float16)


def ids() -> Tensor:
    of_experts = [expert for expert, count in enumerate(COUNTS) for _ in range(count)]
    every = torch.tensor([*of_experts, *[-1] * NONE])
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))].to(DEVICE)


GROUPS = len(COUNTS)
PAIRS = sum(COUNTS) + NONE


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The blocks of all descriptors that were made."""
    found: list[tuple[int, ...]] = []

    def describe(tensor: Tensor, *block: int) -> Any:
        found.append(block)
        return descriptors.describe(tensor, *block)

    monkeypatch.setattr(launch, "describe", describe)
    monkeypatch.setattr(launch, "MUCH_WORK", 0)
    return found


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["along K", "along N", "part of a larger one"])
@pytest.mark.parametrize("way", ["sorted here", "sorted already"])
def test_product(poisoned, described, dtype, layout, way):
    inner, columns = (72, 40) if layout != "part of a larger one" else (69, 35)
    own, told = dispatch(ids(), GROUPS, way)
    rows, weight = drawn(PAIRS, inner, dtype=dtype), LAYOUTS[layout](GROUPS, inner, columns, seed=1, dtype=dtype)
    bias = drawn(GROUPS, columns, seed=2, dtype=dtype)
    result = rows_mm.rows_mm(rows, [weight], [bias], **told, epilogue=rows_mm.ADD_VECTOR)
    one = torch.ones(PAIRS, 1, device=DEVICE)
    exact = each(rows, weight, own) + each(one, bias.unsqueeze(1), own)
    size = each(rows.abs(), weight.abs(), own) + each(one, bias.abs().unsqueeze(1), own)
    assert_near(result, exact, size, inner)
    assert not result[own < 0].any()
    # Nothing is gained along N, and parts start anywhere: what is not aligned has no descriptor.
    assert bool(described) is (layout == "along K")


@needs_interpreter
@pytest.mark.parametrize("two", TWO)
@pytest.mark.parametrize("layout", ["along K", "along N"])
def test_two_products(poisoned, described, two, layout):
    inner, columns = 80, 24
    weights = TWO[two](LAYOUTS[layout], GROUPS, inner, columns, dtype=torch.bfloat16)
    rows, (own, told) = drawn(PAIRS, inner, dtype=torch.bfloat16), dispatch(ids(), GROUPS, "sorted here")
    result = rows_mm.rows_mm(rows, weights, [], **told, epilogue="sub v0 v1")
    first, second = (each(rows, weight, own) for weight in weights)
    size = sum(each(rows.abs(), weight.abs(), own) for weight in weights)
    assert_near(result, first - second, size, 2 * inner)
    assert bool(described) is (layout == "along K")


@needs_interpreter
@pytest.mark.parametrize("layout", ["along K", "along N"])
def test_interleaved(poisoned, described, layout):
    """One weight that is two, and rows that are gathered."""
    inner, columns, own, after = 64, 40, math.ceil(PAIRS / 2), 2
    rows, expert = drawn(own, inner, dtype=torch.bfloat16), ids()
    expert = torch.cat([expert, expert[: own * after - PAIRS]])
    weight = LAYOUTS[layout](GROUPS, inner, 2 * columns, dtype=torch.bfloat16)
    _, told = dispatch(expert, GROUPS, "sorted here")
    gather = own * after, own, after
    how = {"interleaved": True, "epilogue": "sub v0 v1", "gather": gather}
    result = rows_mm.rows_mm(rows, [weight], [], **how, **told)
    exact, size = (each(r.repeat_interleave(2, 0), w, expert) for r, w in ((rows, weight), (rows.abs(), weight.abs())))
    assert_near(result, exact[:, ::2] - exact[:, 1::2], size[:, ::2] + size[:, 1::2], 2 * inner)
    assert bool(described) is (layout == "along K")


@needs_interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_an_expert_is_an_experts_own(poisoned, described, bad):
    """Rows and weights of one expert that are not finite show up in no other: blocks reach over the ends of experts."""
    rows, weight = drawn(PAIRS, 64, dtype=torch.bfloat16), LAYOUTS["along K"](GROUPS, 64, 40, dtype=torch.bfloat16)
    own, told = dispatch(ids(), GROUPS, "sorted already")
    grad = drawn(PAIRS, 40, dtype=torch.bfloat16)
    clean, clean_outer = rows_mm.rows_mm(rows, [weight], [], **told), rows_mm.rows_outer(rows, grad, **told)
    rows[own == 2], weight[2], grad[own == 2], rows[own < 0], grad[own < 0] = bad, bad, bad, bad, bad
    others = own != 2
    assert torch.equal(rows_mm.rows_mm(rows, [weight], [], **told)[others], clean[others])
    outer = rows_mm.rows_outer(rows, grad, **told)
    assert not outer[2].isfinite().any()
    for expert in (0, 1, 3, 4):
        assert torch.equal(outer[expert], clean_outer[expert])
    assert len(described) == 2 * (2 + 3)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("along_inner", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("way", ["sorted here", "sorted already"])
def test_gradient_of_weights(poisoned, described, dtype, along_inner, gathered, way):
    inner, columns = 136, 40
    own, told = dispatch(ids(), GROUPS, way)
    after = 3 if gathered else 1
    table = math.ceil(PAIRS / after)
    rows, grad = drawn(table, inner, dtype=dtype), drawn(PAIRS, columns, seed=1, dtype=dtype)
    of_pair = torch.arange(PAIRS, device=DEVICE) // after % table
    how = {"own": table, "after": after} if gathered else {}
    result = rows_mm.rows_outer(rows, grad, **told, **how, along_inner=along_inner)
    assert result.stride() == ((inner * columns, 1, inner) if along_inner else (inner * columns, columns, 1))
    member = (own[None] == torch.arange(GROUPS, device=DEVICE)[:, None]).double()
    left, right = rows[of_pair].double(), grad.double()
    exact = torch.einsum("ep,pk,pn->ekn", member, left, right)
    assert_near(result, exact, torch.einsum("ep,pk,pn->ekn", member, left.abs(), right.abs()), PAIRS)
    assert len(described) == 3  # both operands and the result


@needs_interpreter
def test_rows_that_come_again(poisoned, described):
    """A table of rows for pairs that go through it twice, and are sorted."""
    own, after, pairs = 64, 2, 256
    offsets = torch.tensor([100, 256], dtype=torch.int32, device=DEVICE)
    rows, grad = drawn(own, 24, dtype=torch.bfloat16), drawn(pairs, 16, seed=1, dtype=torch.bfloat16)
    result = rows_mm.rows_outer(rows, grad, offsets, None, own, after)
    left = rows[torch.arange(pairs, device=DEVICE) // after % own].double()
    parts = [(left[a:b], grad[a:b].double()) for a, b in ((0, 100), (100, 256))]
    exact, size = (torch.stack([f(x).T @ f(y) for x, y in parts]) for f in (lambda t: t, torch.abs))
    assert_near(result, exact, size, pairs)
    assert described


@needs_interpreter
@pytest.mark.parametrize("layout", ["along K", "along N"])
def test_backward(poisoned, described, layout):
    """All three products of a training step, the weight's gradient in the layout of the weight."""
    rows = drawn(PAIRS, 48, dtype=torch.bfloat16).requires_grad_()
    weight = LAYOUTS[layout](GROUPS, 48, 40, seed=1, dtype=torch.bfloat16).requires_grad_()
    own, told = dispatch(ids(), GROUPS, "sorted already")
    grad = drawn(PAIRS, 40, seed=2, dtype=torch.bfloat16)
    rows_mm.rows_mm(rows, [weight], [], **told).backward(grad)
    member = (own[None] == torch.arange(GROUPS, device=DEVICE)[:, None]).double()
    assert rows.grad is not None and weight.grad is not None and weight.grad.stride() == weight.stride()
    transposed = weight.detach().transpose(1, 2)
    assert_near(rows.grad, each(grad, transposed, own), each(grad.abs(), transposed.abs(), own), 40)
    exact, size = (
        torch.einsum("ep,pk,pn->ekn", member, left, right)
        for left, right in ((rows.double(), grad.double()), (rows.double().abs(), grad.double().abs()))
    )
    assert_near(weight.grad, exact.detach(), size.detach(), PAIRS)
    assert len(described) == 2 + 3  # the weight, twice in one direction; both sides of its gradient, and that


@needs_interpreter
def test_memory_that_is_not_aligned(poisoned, described):
    """Its layout does not tell."""
    memory = bytearray(GROUPS * 16 * 16 * 2 + 2)
    weight = torch.frombuffer(memory, dtype=torch.bfloat16, offset=2).view(GROUPS, 16, 16)
    weight.copy_(drawn(GROUPS, 16, 16))
    if DEVICE == "cuda":
        weight = (
            torch.empty(GROUPS * 256 + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(GROUPS, 16, 16).copy_(weight)
        )
    rows, (own, told) = drawn(PAIRS, 16, dtype=torch.bfloat16), dispatch(ids(), GROUPS, "sorted here")
    result = rows_mm.rows_mm(rows, [weight], [], **told)
    assert_near(result, each(rows, weight, own), each(rows.abs(), weight.abs(), own), 16)
    assert not described


@dataclasses.dataclass
class Layout:
    """What decides, of tensors that are nowhere."""

    weight: Tensor
    rows: Any = 49 * 4
    work: int = 49 * 4 * 16 * 24
    is_read_so: bool = True


def _weight(*strides: int, dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> Tensor:
    return torch.empty(2**16, dtype=dtype).as_strided((4, 16, 24), strides, offset)


@pytest.mark.skipif(descriptors.TensorDescriptor is None, reason="torch for the CPU comes without triton")
@pytest.mark.parametrize(
    "case",
    {
        "along K": Layout(_weight(384, 1, 16)),
        "along N": Layout(_weight(384, 24, 1), is_read_so=False),
        "with gaps": Layout(_weight(1024, 1, 32, offset=8)),
        "few rows": Layout(_weight(384, 1, 16), rows=49 * 4 - 1, is_read_so=False),
        "a number of rows that is a symbol": Layout(_weight(384, 1, 16), rows=object(), is_read_so=False),
        "little work": Layout(_weight(384, 1, 16), work=49 * 4 * 16 * 24 + 1, is_read_so=False),
        "float32": Layout(_weight(384, 1, 16, dtype=torch.float32), is_read_so=False),
        "columns that are not aligned": Layout(_weight(504, 1, 20), is_read_so=False),
        "experts that are not aligned": Layout(_weight(388, 1, 16), is_read_so=False),
        "a start that is not aligned": Layout(_weight(384, 1, 16, offset=4), is_read_so=False),
        "no dimension contiguous": Layout(_weight(1024, 2, 64), is_read_so=False),
        "both contiguous": Layout(_weight(384, 1, 1), is_read_so=False),
        "one for all experts": Layout(_weight(0, 1, 16), is_read_so=False),
        "experts contiguous": Layout(_weight(1, 96, 8), is_read_so=False),
    }.values(),
    ids=lambda case: f"{case.weight.stride()}",
)
def test_what_is_read_by_descriptors(monkeypatch, case):
    monkeypatch.setattr(launch, "MUCH_WORK", case.work)
    assert launch.describes([case.weight], case.rows) is case.is_read_so
