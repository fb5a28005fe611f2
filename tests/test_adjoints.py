"""Operators with gradients of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moe_rewrite.lower import adjoints
from moe_rewrite.lower.adjoints import permuted, repeated, slot_sum

ORDER = torch.tensor([3, 0, 4, 1, 2])
INVERSE = ORDER.argsort()

EXPERT = torch.tensor([0, 0, 2, 3, 3, 3])
OFFSETS = torch.tensor([2, 2, 3, 6], dtype=torch.int32)


def parted(sizes: list[int], in_turn: bool) -> Any:
    """A function of the parts of some columns, each with a gradient of its own."""

    def function(x: Tensor) -> Tensor:
        return torch.cat([part.sin() * (1 + n) for n, part in enumerate(adjoints.columns(x, sizes, in_turn))], 1)

    def reference(x: Tensor) -> Tensor:
        parts = [x[:, n :: len(sizes)] for n in range(len(sizes))] if in_turn else x.split(sizes, 1)
        return torch.cat([part.sin() * (1 + n) for n, part in enumerate(parts)], 1)

    return function, reference, (5, sum(sizes))


operator = torch.ops.moe_rewrite.repeated
CASES = {
    "permuted": (lambda x: permuted(x, ORDER, INVERSE), lambda x: x[ORDER], (5, 3)),
    "permuted, one dimension": (lambda x: permuted(x, ORDER, INVERSE), lambda x: x[ORDER], (5,)),
    "each row twice": (lambda x: repeated(x, 1, 2), lambda x: x.repeat_interleave(2, 0), (5, 3)),
    "each row ten times": (lambda x: operator(x, 1, 10), lambda x: x.repeat_interleave(10, 0), (5, 3)),
    "all rows three times": (lambda x: operator(x, 3, 1), lambda x: x.repeat(3, 1), (5, 3)),
    "both": (lambda x: operator(x, 3, 2), lambda x: x.repeat_interleave(2, 0).repeat(3, 1), (5, 3)),
    "as they are": (lambda x: repeated(x, 1, 1), lambda x: x, (5, 3)),
    "no rows": (lambda x: operator(x, 1, 4), lambda x: x.repeat_interleave(4, 0), (0, 3)),
    "of the expert": (lambda x: adjoints.of_expert(x, EXPERT, OFFSETS), lambda x: x[EXPERT], (4, 3)),
    "sum of ten slots": (lambda x: torch.ops.moe_rewrite.slot_sum(x, 1, x.dtype), lambda x: x.sum(1), (5, 10, 3)),
    "two halves": parted([4, 4], False),
    "three parts": parted([1, 5, 2], False),
    "columns in turn": parted([4, 4], True),
    "one of three in turn": parted([3, 3, 3], True),
    "sum of the first": (lambda x: torch.ops.moe_rewrite.slot_sum(x, 0, x.dtype), lambda x: x.sum(0), (9, 5)),
}


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["as it is", "aot_eager", "dynamic"])
def test_values_and_gradients(name, way):
    values_and_gradients(*CASES[name], way)


@pytest.mark.parametrize(
    "name", ["permuted", "both", "sum of ten slots", "two halves", "three parts", "columns in turn"]
)
def test_inductor(name):
    values_and_gradients(*CASES[name], "inductor")


def values_and_gradients(function: Any, reference: Any, shape: tuple[int, ...], way: str) -> None:
    torch._dynamo.reset()
    run = function
    if way != "as it is":
        backend = "inductor" if way == "inductor" else "aot_eager"
        run = torch.compile(function, backend=backend, dynamic=way == "dynamic", fullgraph=True)
    given, other = (drawn(shape).requires_grad_() for _ in range(2))
    result, expected = run(given), reference(other)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)
    weights = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(given.grad, other.grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("function", "reference", "shape"), CASES.values(), ids=CASES)
def test_second_gradients(function, reference, shape):
    if 0 not in shape:
        assert torch.autograd.gradgradcheck(lambda x: function(x).square(), drawn(shape).requires_grad_())


def test_operators():
    rows = drawn((5, 3)).requires_grad_()
    torch.library.opcheck(torch.ops.moe_rewrite.permuted.default, (rows, ORDER, INVERSE))
    torch.library.opcheck(torch.ops.moe_rewrite.repeated.default, (rows, 2, 3))
    torch.library.opcheck(torch.ops.moe_rewrite.slot_sum.default, (drawn((5, 9, 2)).requires_grad_(), 1, torch.float64))
    torch.library.opcheck(torch.ops.moe_rewrite.columns.default, (rows, [1, 2], False))
    torch.library.opcheck(torch.ops.moe_rewrite.joined.default, ([rows, rows[:, ::2]], False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_of_slots_are_rounded_once(dtype):
    """As ``sum`` rounds, which adds low precision in float32."""
    rows = drawn((64, 11, 5), dtype)
    result = adjoints._add_slots(rows, 1, rows.dtype)
    exact = rows.double().sum(1)
    assert result.dtype is dtype
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 11 * torch.finfo(torch.float32).eps * rows.double().abs().sum(
        1
    )
    assert ((result.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("slots", "device", "is_ours"), [(7, "cuda", 0), (8, "cuda", 1), (16, "cuda", 1), (17, "cuda", 0), (9, "cpu", 0)]
)
def test_which_sums_are_unrolled(slots, device, is_ours):
    """On a GPU, of as many slots as inductor makes a loop of."""
    with FakeTensorMode():
        rows = torch.empty(2, slots, 3, device=device)
        graph = make_fx(lambda rows: slot_sum(rows, 1), tracing_mode="fake")(rows).graph
    assert [node.target for node in graph.nodes].count(torch.ops.moe_rewrite.slot_sum.default) == is_ours


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
def test_whole_numbers_are_added_as_such(dtype):
    """float32 has not all of them."""
    with FakeTensorMode():
        rows = torch.empty(2, 8, 3, dtype=dtype, device="cuda")
        graph = make_fx(lambda rows: slot_sum(rows, 1), tracing_mode="fake")(rows).graph
    assert torch.ops.moe_rewrite.slot_sum.default not in [node.target for node in graph.nodes]


@pytest.mark.parametrize(("before", "after", "is_ours"), [(1, 8, 1), (1, 2, 0), (2, 8, 0), (1, 1, 0)])
def test_which_rows_are_repeated_by_an_operator_of_ours(before, after, is_ours):
    """Where the sum that is their gradient is unrolled, and nowhere else: programs are exported with it."""
    with FakeTensorMode():
        rows = torch.empty(5, 3, device="cuda")
        graph = make_fx(lambda rows: repeated(rows, before, after) * 1, tracing_mode="fake")(rows).graph
    assert [node.target for node in graph.nodes].count(torch.ops.moe_rewrite.repeated.default) == is_ours


def test_what_compilers_see():
    """Gathers and sums: nothing is scattered, and no operator of ours is left."""
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(graph.code)
        return graph.forward

    def routed(x: Tensor) -> Tensor:
        rows = permuted(repeated(x, 1, 2), torch.arange(10).flip(0), torch.arange(10).flip(0))
        return permuted(rows * 2, torch.arange(10).flip(0), torch.arange(10).flip(0)).view(5, 2, 3).sum(1)

    run = torch.compile(routed, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    run(drawn((5, 3)).requires_grad_()).sum().backward()
    forward, backward = seen
    assert "moe_rewrite" not in forward + backward
    assert "index_put" not in backward and "scatter" not in backward and "index.Tensor" in backward
