"""The parts that the experts backends are made of: pairs in two orders, and the grouped product."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from moe_rewrite.loop import EveryToken, ExpertsLoop, Kind, TopKDispatch, Value
from moe_rewrite.lower import auto, launch, triton
from moe_rewrite.lower import grouped_product as grouped
from moe_rewrite.lower.batched_product import gather_and_multiply, multiply_and_sum
from moe_rewrite.lower.grouped_product import grouped_product
from moe_rewrite.lower.pairs import Pairs, sort_by_expert

NUM_EXPERTS = 5


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Expert ids, and the experts that the loop runs for."""

    ids: Tensor
    experts: tuple[range, ...] = (range(NUM_EXPERTS),)
    visited: Tensor | None = None
    in_range: bool = False

    @property
    def num_experts(self) -> int:
        return max(experts.stop for experts in self.experts)

    def pairs(self) -> Pairs:
        dispatch = TopKDispatch(Value("ids", Kind.INVARIANT, self.ids), self.in_range)
        loop = ExpertsLoop("", "", self.experts, self.num_experts, dispatch, (), (), ())
        return Pairs.in_token_order(loop, self.ids, self.visited)

    def counts(self) -> list[bool]:
        """For each entry of the ids, whether the loop runs its expert."""
        run = {expert for experts in self.experts for expert in experts}
        if self.visited is not None:
            run &= set(self.visited.nonzero().flatten().tolist())
        return [expert in run for expert in self.ids.flatten().tolist()]


def drawn(*shape: int, low: int = 0, high: int = NUM_EXPERTS) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "top-k": Case(drawn(7, 2), in_range=True),
    "not known to be in range": Case(drawn(7, 2)),
    "int32": Case(drawn(7, 2).int()),
    "one pair": Case(torch.tensor([[3]]), in_range=True),
    "no pair": Case(drawn(0, 2), in_range=True),
    "no pair, not known to be in range": Case(drawn(0, 2)),
    "one dimension": Case(drawn(9)),
    "three dimensions": Case(drawn(2, 3, 2)),
    "one slot": Case(drawn(6, 1)),
    "all on the first": Case(torch.zeros(4, 2, dtype=torch.int64), in_range=True),
    "all on the last": Case(torch.full((4, 2), NUM_EXPERTS - 1), in_range=True),
    "expert with no token": Case(drawn(8, 2, high=2), in_range=True),
    "out of range": Case(drawn(9, 2, low=-2, high=NUM_EXPERTS + 3)),
    "all out of range": Case(torch.full((3, 2), NUM_EXPERTS)),
    "all but one out of range": Case(torch.tensor([[NUM_EXPERTS, NUM_EXPERTS], [-1, 2]])),
    "some experts": Case(drawn(9, 2), experts=(range(1, 3),)),
    "two ranges": Case(drawn(9, 2), experts=(range(0, 1), range(3, 5))),
    "visited": Case(drawn(9, 2), visited=torch.tensor([True, False, True, True, False])),
    "visited, as counts": Case(drawn(9, 2), visited=torch.tensor([2, 0, 256, 1, 0])),
    "none visited": Case(drawn(9, 2), visited=torch.zeros(NUM_EXPERTS, dtype=torch.bool)),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
both_orders = pytest.mark.parametrize("is_sorted", [False, True], ids=["token order", "sorted"])


def in_order(case: Case, is_sorted: bool) -> Pairs:
    return case.pairs().sorted_by_expert(case.num_experts) if is_sorted else case.pairs()


def valid_of(pairs: Pairs) -> Tensor:
    return torch.ones_like(pairs.expert, dtype=torch.bool) if pairs.valid is None else pairs.valid


@every_case
def test_token_order(case):
    pairs, counts = case.pairs(), case.counts()
    assert pairs.shape == case.ids.shape
    assert pairs.offsets is None
    assert pairs.inverse is None
    assert valid_of(pairs).tolist() == counts
    assert [0 <= key < case.num_experts for key in pairs.key.tolist()] == counts
    for place, (expert, count) in enumerate(zip(case.ids.flatten().tolist(), counts, strict=True)):
        if count:
            assert (pairs.expert[place], pairs.position[place]) == (expert, place)


@every_case
def test_sorted_by_expert(case):
    """The pairs of one expert stand side by side, in token order; those of no expert come last."""
    pairs, counts = in_order(case, True), case.counts()
    ids = case.ids.flatten().tolist()
    assert pairs.offsets.dtype is torch.int32
    assert pairs.offsets.shape == (case.num_experts,)
    ends = pairs.offsets.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        own = [place for place, (e, count) in enumerate(zip(ids, counts, strict=True)) if count and e == expert]
        assert pairs.position[start:end].tolist() == own
        assert pairs.expert[start:end].tolist() == [expert] * len(own)
    assert ends[-1] == sum(counts)
    assert valid_of(pairs).tolist() == [place < sum(counts) for place in range(len(ids))]


def test_no_pairs_are_sorted_without_a_search():
    """inductor 2.11 makes code of a search in nothing that Triton cannot compile for a GPU."""
    graph = make_fx(lambda key: sort_by_expert(key, NUM_EXPERTS))(torch.empty(0, dtype=torch.int64)).graph
    found = {node.target for node in graph.nodes if node.op == "call_function"}
    assert not found & {torch.ops.aten.searchsorted.Tensor, torch.ops.aten.sort.stable}
    assert len(found) > 1


@every_case
@both_orders
def test_pairs_of_no_expert_borrow_one_that_counts(case, is_sorted):
    """What is computed for them is computed from a token, a slot and an expert that eager combines too."""
    pairs, counts = in_order(case, is_sorted), case.counts()
    assert ((pairs.expert >= 0) & (pairs.expert < case.num_experts)).all()
    ids = case.ids.flatten()
    for expert, position in zip(pairs.expert.tolist(), pairs.position.tolist(), strict=True):
        if any(counts):
            assert counts[position]
            assert ids[position] == expert


@every_case
@both_orders
def test_back_to_token_order(case, is_sorted):
    pairs, counts = in_order(case, is_sorted), torch.tensor(case.counts(), dtype=torch.bool)
    rows = torch.randn(case.ids.numel(), 3, generator=torch.Generator().manual_seed(0))
    back = pairs.to_token_order(rows[pairs.position])
    assert back.shape == rows.shape
    assert torch.equal(back[counts], rows[counts])


@every_case
@both_orders
def test_coordinates(case, is_sorted):
    pairs = in_order(case, is_sorted)
    wanted = torch.unravel_index(pairs.position, case.ids.shape)
    for axis in range(case.ids.dim()):
        assert torch.equal(pairs.coordinate(axis), wanted[axis])
    assert torch.equal(pairs.coordinate(None), torch.zeros_like(pairs.position))


@every_case
@both_orders
@pytest.mark.parametrize("trailing", [(), (2,), (2, 3)], ids=len)
def test_only_valid(case, is_sorted, trailing):
    """Not even a NaN gets out of a pair of no expert, forward or backward."""
    pairs = in_order(case, is_sorted)
    valid = valid_of(pairs)
    rows = torch.randn(case.ids.numel(), *trailing, dtype=torch.float64)
    rows[~valid] = math.nan
    rows.requires_grad_()
    kept = pairs.only_valid(rows)
    assert torch.equal(kept[valid], rows[valid])
    assert not kept[~valid].any()
    (gradient,) = torch.autograd.grad(kept.square().sum(), rows)
    assert torch.equal(gradient[valid], 2 * rows[valid].detach())
    assert not gradient[~valid].any()


@every_case
def test_lent_rows(case):
    """The rows of pairs of no expert, which a kernel may leave unwritten, are replaced by those of the one pair whose
    token, slot and expert they borrowed: a NaN of any other must not come in."""
    pairs = in_order(case, True)
    valid = valid_of(pairs)
    rows = torch.randn(case.ids.numel(), 3, dtype=torch.float64)
    rows[~valid] = math.nan
    rows.requires_grad_()
    lent = pairs.lend(rows)
    assert torch.equal(lent[valid], rows[valid])
    if valid.any():
        (lender,) = (valid & torch.isin(pairs.position, pairs.position[~valid])).nonzero().flatten().tolist() or [0]
        assert (lent[~valid] == rows[lender]).all()
        (gradient,) = torch.autograd.grad(lent.sum(), rows)
        assert gradient.isfinite().all()
        assert not gradient[~valid].any()


@every_case
@both_orders
def test_harmless_index(case, is_sorted):
    """Where no pair counts, what would be looked up for them is looked up at 0."""
    pairs = in_order(case, is_sorted)
    index = pairs.position + 100
    harmless = pairs.harmless_index(index)
    assert torch.equal(harmless, index if any(case.counts()) or case.in_range else torch.zeros_like(index))


# --- the grouped product ---------------------------------------------------------------------------------------------

GROUPS = {
    "some empty": [3, 0, 4, 1],
    "all empty": [0, 0, 0],
    "one group": [6],
    "all in the first": [5, 0, 0],
    "all in the last": [0, 0, 5],
    "one row each": [1, 1, 1, 1],
}
LAYOUTS = {  # how a weight [E, K, N] lies in memory
    "[E, K, N]": lambda weight: weight,
    "[E, N, K]": lambda weight: weight.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a larger one": lambda weight: torch.cat([weight, weight], -1)[..., : weight.shape[-1]],
}
every_grouping = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
past_the_last = pytest.mark.parametrize("rest", [0, 3], ids=["no rows past the last group", "rows past the last group"])


def operands(sizes: list[int], rest: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[P, 6]``, weight ``[E, 6, 4]`` and offsets for groups of ``sizes`` rows and ``rest`` rows of no group."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes) + rest, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(sizes), 6, 4, generator=generator, dtype=torch.float64)
    return rows.to(dtype), weight.to(dtype), torch.tensor(sizes).cumsum(0).int()


def one_by_one(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    groups = rows[: sum(sizes)].split(sizes)
    return torch.cat([group @ matrix for group, matrix in zip(groups, weight, strict=True)])


@every_grouping
@past_the_last
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_grouped_product(sizes, rest, layout):
    rows, weight, offsets = operands(sizes, rest)
    result = grouped_product(rows, layout(weight), offsets)
    assert result.shape == (sum(sizes) + rest, weight.shape[2])
    torch.testing.assert_close(result[: sum(sizes)], one_by_one(rows, weight, sizes))


@every_grouping
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grouped_product_in_other_dtypes(sizes, dtype):
    """The same kernel on the same operands as one product after the other."""
    rows, weight, offsets = operands(sizes, dtype=dtype)
    result = grouped_product(rows, weight, offsets)
    assert result.dtype is dtype
    torch.testing.assert_close(result, one_by_one(rows, weight, sizes))


@every_grouping
@past_the_last
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_grouped_product_gradients(sizes, rest, layout):
    rows, weight, offsets = operands(sizes, rest)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return grouped_product(rows, weight, offsets)[: sum(sizes)]

    inputs = rows.requires_grad_(), layout(weight).detach().requires_grad_()
    assert torch.autograd.gradcheck(product, inputs)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_complex_operands(layout):
    """The first ones and the second ones, of a bias too."""
    *parts, offsets = operands(GROUPS["some empty"])
    rows, weight = (torch.complex(part, part.flip(-1).cos()) for part in parts)
    inputs = rows, layout(weight), weight[:, 0].clone()
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)

    def product(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return grouped_product(rows, weight, offsets, bias)

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@every_grouping
def test_gradient_that_is_expanded(sizes):
    """``result.sum().backward()`` gives a gradient without memory of its own."""
    rows, weight, offsets = operands(sizes)
    rows.requires_grad_()
    weight.requires_grad_()
    actual = torch.autograd.grad(grouped_product(rows, weight, offsets).sum(), (rows, weight))
    expected = torch.autograd.grad(one_by_one(rows, weight, sizes).sum(), (rows, weight))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("only", [0, 1], ids=["rows", "weight"])
def test_gradient_of_one_operand(only):
    sizes = GROUPS["some empty"]
    *inputs, offsets = operands(sizes)
    inputs[only].requires_grad_()
    (actual,) = torch.autograd.grad(grouped_product(*inputs, offsets).square().sum(), inputs[only])
    (expected,) = torch.autograd.grad(one_by_one(*inputs, sizes).square().sum(), inputs[only])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], [0, 0, 0]], ids=str)
@past_the_last
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_operator_of_the_product(sizes, rest, requires_grad, has_bias):
    rows, weight, offsets = operands(sizes, rest)
    bias = weight[:, 0].clone().requires_grad_(requires_grad) if has_bias else None
    inputs = rows.requires_grad_(requires_grad), weight.requires_grad_(requires_grad), offsets, bias
    torch.library.opcheck(torch.ops.moe_rewrite.grouped_mm.default, inputs)


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], [0, 0, 0]], ids=str)
@past_the_last
def test_operator_of_the_weight_gradient(sizes, rest):
    rows, weight, offsets = operands(sizes, rest)
    gradient = torch.randn(rows.shape[0], weight.shape[2], dtype=rows.dtype)
    torch.library.opcheck(torch.ops.moe_rewrite.grouped_outer.default, (rows, gradient, offsets))
    result = torch.ops.moe_rewrite.grouped_outer(rows, gradient, offsets)
    groups = zip(rows[: sum(sizes)].split(sizes), gradient[: sum(sizes)].split(sizes), strict=True)
    torch.testing.assert_close(result, torch.stack([group.T @ own for group, own in groups]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_grouped_product_compiles(dynamic):
    compiled = torch.compile(grouped_product, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for sizes in GROUPS["some empty"], [2, 2, 2, 5]:
        rows, weight, offsets = operands(sizes)
        rows.requires_grad_()
        result = compiled(rows, weight, offsets)
        torch.testing.assert_close(result, one_by_one(rows, weight, sizes))
        (gradient,) = torch.autograd.grad(result.square().sum(), rows)
        (expected,) = torch.autograd.grad(one_by_one(rows, weight, sizes).square().sum(), rows)
        torch.testing.assert_close(gradient, expected)


@every_grouping
@past_the_last
def test_grouped_product_with_bias(sizes, rest):
    rows, weight, offsets = operands(sizes, rest)
    bias = torch.randn(len(sizes), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = grouped_product(rows, weight, offsets, bias)[: sum(sizes)]
    torch.testing.assert_close(result, one_by_one(rows, weight, sizes) + bias.repeat_interleave(torch.tensor(sizes), 0))

    def product(*inputs: Tensor) -> Tensor:
        rows, weight, bias = inputs
        return grouped_product(rows, weight, offsets, bias)[: sum(sizes)]

    assert torch.autograd.gradcheck(product, [tensor.requires_grad_() for tensor in (rows, weight, bias)])


# --- torch's kernel ---------------------------------------------------------------------------------------------------

_WEIGHTS = {  # what of a bf16 weight [E, K, N] the kernel takes
    "[E, K, N]": (lambda zeros: zeros(3, 16, 8), True),
    "[E, N, K]": (lambda zeros: zeros(3, 8, 16).transpose(1, 2), True),
    "every second expert": (lambda zeros: zeros(6, 8, 16)[::2].transpose(1, 2), True),
    "half of the columns": (lambda zeros: zeros(3, 16, 16)[..., 8:], True),
    "K is no multiple of 8": (lambda zeros: zeros(3, 12, 8), False),
    "N is no multiple of 8": (lambda zeros: zeros(3, 8, 12), False),
    "starts in between": (lambda zeros: zeros(3, 8, 24)[..., 4:20], False),
    "rows are 12 apart": (lambda zeros: zeros(3, 8, 12)[..., :8], False),
    "every second column": (lambda zeros: zeros(3, 8, 16)[..., ::2], False),
    "one row for all": (lambda zeros: zeros(3, 1, 8).expand(3, 16, 8), False),
}


@pytest.fixture
def has_kernel(monkeypatch):
    """The kernel's choice and shape checks are the same on all devices; that the CPU has one serves the tests alone."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no torch.nn.functional.grouped_mm")
    monkeypatch.setattr(grouped, "_device_has_kernel", lambda device: True)


@pytest.mark.parametrize(("build", "taken"), _WEIGHTS.values(), ids=_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_what_the_kernel_takes(has_kernel, build, taken, dtype, strided):
    """Never an error about alignment or strides, and a gradient without memory of its own."""
    weight = build(lambda *shape: torch.zeros(shape, dtype=dtype)).detach().requires_grad_()
    rows = torch.ones(4, 2 * weight.shape[1], dtype=dtype)[:, :: 2 if strided else 1][:, : weight.shape[1]]
    rows = rows.detach().requires_grad_()
    offsets = torch.tensor([1, 1, 4], dtype=torch.int32)
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    traced = make_fx(lambda *given: grouped_product(*given), tracing_mode="fake")(
        rows.detach(), weight.detach(), offsets
    )
    # With the checks that a compiler makes with tensors without data, forward and backward.
    product = torch.compile(traced, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    product(rows, weight, offsets).sum().backward()
    used = [node.target for gm in graphs for node in gm.graph.nodes].count(torch.ops.aten._grouped_mm.default)
    assert used == (3 if taken and dtype is torch.bfloat16 else 0)
    assert torch.equal(weight.grad, torch.tensor([1, 0, 3]).to(dtype).view(3, 1, 1).expand_as(weight))
    assert not rows.grad.any()


# --- the product one by one -------------------------------------------------------------------------------------------

both_products = pytest.mark.parametrize("multiply", [multiply_and_sum, gather_and_multiply])


@both_products
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_batched_product(multiply, has_bias):
    rows, weight, _ = operands([3, 0, 4, 1])
    expert = torch.tensor([2, 0, 0, 3, 2, 2, 2, 0])
    bias = weight[:, 0].clone().requires_grad_() if has_bias else None
    expected = torch.stack(
        [row @ weight[e] + (bias[e] if has_bias else 0) for row, e in zip(rows, expert, strict=True)]
    )
    torch.testing.assert_close(multiply(rows, weight, expert, bias), expected)
    inputs = [tensor.requires_grad_() for tensor in (rows, weight, bias) if tensor is not None]
    assert torch.autograd.gradcheck(lambda rows, weight, bias=None: multiply(rows, weight, expert, bias), inputs)


@both_products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_many_rows_is_added_in_float32(multiply, dtype):
    """Adding ones in bf16 stops at 256, in fp16 at 2048."""
    many = 4096
    weight, bias = torch.ones(2, 1, 1, dtype=dtype).requires_grad_(), torch.ones(2, 1, dtype=dtype).requires_grad_()
    rows = torch.ones(many, 1, dtype=dtype)
    multiply(rows, weight, torch.zeros(many, dtype=torch.int64), bias).sum().backward()
    assert weight.grad.flatten().tolist() == bias.grad.flatten().tolist() == [many, 0]


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operator_of_the_batched_product(has_bias, dtype):
    rows, weight, _ = operands([3, 0, 4, 1], dtype=dtype)
    bias = weight[:, 0].clone().requires_grad_() if has_bias else None
    expert = torch.tensor([2, 0, 0, 3, 2, 2, 2, 0])
    inputs = rows.requires_grad_(), weight.requires_grad_(), expert, bias
    torch.library.opcheck(torch.ops.moe_rewrite.batched_mm.default, inputs)


# --- auto -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sized:
    """What ``auto`` looks at in a loop."""

    num_pairs: Any
    device: torch.device
    dispatch: Any = None
    dtype: torch.dtype = torch.bfloat16
    intermediate: int = 2880
    num_experts: int = 8

    def matmuls(self) -> list[Any]:
        hidden = 2880

        def product(inner: int, columns: int) -> Any:
            shapes = (4, inner), (inner, columns)
            examples = [torch.empty(shape, dtype=self.dtype, device="meta") for shape in shapes]
            return types.SimpleNamespace(args=[types.SimpleNamespace(example=example) for example in examples])

        return [product(hidden, 2 * self.intermediate), product(self.intermediate, hidden)]


GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("loop", "needs_grad", "chosen"),
    [
        (Sized(1, GPU), False, "triton"),
        (Sized(8, GPU), True, "batched_mm"),
        (Sized(9, GPU), True, "grouped_mm"),
        (Sized(8, GPU, dtype=torch.float64), False, "batched_mm"),
        (Sized(2**20, GPU), False, "triton"),
        (Sized(4096, GPU, intermediate=14336), False, "grouped_mm"),
        (Sized(4095, GPU, intermediate=14336), False, "triton"),
        (Sized(4096, GPU, intermediate=14336, num_experts=9), False, "triton"),
        (Sized(4096, GPU, dtype=torch.float16, intermediate=14336), False, "triton"),
        (Sized(2**20, GPU, dtype=torch.float64), False, "grouped_mm"),
        (Sized(None, GPU), False, "grouped_mm"),
        (Sized(16, CPU), False, "batched_mm"),
        (Sized(17, CPU), False, "grouped_mm"),
        (Sized(2**20, torch.device("xpu")), False, "grouped_mm"),
        (Sized(2**20, GPU, EveryToken()), False, "batched_mm"),
    ],
)
def test_auto(monkeypatch, loop, needs_grad, chosen):
    monkeypatch.setattr(triton, "available", lambda device: device.type == "cuda")
    name, why = auto.pick(loop, needs_grad)
    assert (name, why.split(":")[0]) == (chosen, "auto")


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_which_gpus_have_the_kernels(monkeypatch, capability, runs):
    monkeypatch.setattr(launch, "triton", object())
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.available(GPU) is runs
    assert not launch.available(CPU)


def test_auto_without_kernels(monkeypatch):
    monkeypatch.setattr(triton, "available", lambda device: False)
    assert auto.pick(Sized(8, GPU), False)[0] == "batched_mm"
    assert auto.pick(Sized(9, GPU), False)[0] == "grouped_mm"
