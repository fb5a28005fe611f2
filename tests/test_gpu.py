"""What only a GPU can show: no synchronisation, CUDA graphs, the same bits twice, and every mode and dtype."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import modes
import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

from moe_rewrite.benchmark.measure import Replay
from moe_rewrite.benchmark.points import Experts
from moe_rewrite.benchmark.shapes import SHAPES, ExpertsInputs
from moe_rewrite.benchmark.variants import Variant
from moe_rewrite.lower import grouped_product as grouped
from moe_rewrite.lower import launch
from moe_rewrite.lower.rows_mm import DTYPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

BACKENDS = ("batched_mm", "grouped_mm", "triton")
LOW = ("bf16", "fp16", "fp32")
TOKENS = 96


def case(experts: str, dtype: str, sizes: str = "aligned", ids: str = "given", compiler: str = "") -> modes.Case:
    return modes.Case(experts, compiler or "aot_eager default", dtype, "static", sizes, ids)


def compiled(given: modes.Case, block: modes.Block) -> torch.nn.Module:
    inner, mode = given.compiler.split(" ")
    options = {"experts": given.experts, "inner": inner, "mode": mode}
    return torch.compile(block, backend="moe_rewrite", fullgraph=True, dynamic=False, options=options)


def build(given: modes.Case) -> tuple[modes.Block, list[Tensor]]:
    """A block on the GPU, and its arguments."""
    dtype = modes.DTYPES[given.dtype]
    x, scores, ids = modes.arguments(given, TOKENS)
    return modes.Block(given.sizes, given.ids).to("cuda", dtype), [
        x.to("cuda", dtype),
        scores.to("cuda", dtype),
        ids.cuda(),
    ]


# --- the kernels ------------------------------------------------------------------------------------------------------

GROUPS = {
    "some empty": [3, 0, 4, 1],
    "all empty": [0, 0, 0],
    "one group": [6],
    "more than a tile": [70, 1, 0, 300],
}


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels(sizes, dtype):
    """Any sizes and strides, against fp64 on the CPU; what is past the last group is not looked at."""
    generator = torch.Generator().manual_seed(0)
    for (inner, columns), rest in itertools.product([(6, 4), (37, 70), (64, 256)], [0, 3]):
        pairs = sum(sizes) + rest
        rows = torch.randn(pairs, 2 * inner, generator=generator).to(dtype)[:, ::2]
        rows[sum(sizes) :] = math.nan
        weight = torch.randn(len(sizes), columns, inner, generator=generator).to(dtype).transpose(1, 2)
        bias = torch.randn(columns, len(sizes), generator=generator).to(dtype).t()
        grad = torch.randn(columns, generator=generator).to(dtype).expand(pairs, columns)
        offsets = torch.tensor(sizes).cumsum(0).int()
        groups, grads = (tensor[: sum(sizes)].double().split(sizes) for tensor in (rows, grad))
        on_gpu = [tensor.cuda() for tensor in (rows, weight, offsets, bias)]
        result = grouped.grouped_product(*on_gpu)[: sum(sizes)].cpu()
        wanted = [group @ own.double() + b.double() for group, own, b in zip(groups, weight, bias, strict=True)]
        torch.testing.assert_close(result, torch.cat(wanted).to(dtype), atol=_atol(dtype), rtol=_rtol(dtype))
        outer = grouped.grouped_outer(on_gpu[0], grad.cuda(), on_gpu[2]).cpu()
        wanted = [group.T @ own for group, own in zip(groups, grads, strict=True)]
        torch.testing.assert_close(outer, torch.stack(wanted).to(dtype), atol=_atol(dtype), rtol=_rtol(dtype))


def _rtol(dtype: torch.dtype) -> float:
    return 2 * torch.finfo(dtype).eps  # rounded once, and the expected value once


def _atol(dtype: torch.dtype) -> float:
    """Of sums of up to 300 products of order 1 in fp32.

    Partial sums are of order sqrt(300), so that 300 roundings make sqrt(300) * sqrt(300) * eps / 2; eight times that.
    """
    return 8 * 300 * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", modes.SIZES)
def test_gradients_of_any_stride(dtype, sizes):
    """Neither an expanded gradient nor one that lies otherwise is an error, aligned or not."""
    inner, columns = (2 * size for size in modes.SIZES[sizes])
    rows = torch.ones(5, inner, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.ones(3, inner, columns, device="cuda", dtype=dtype, requires_grad=True)
    offsets = torch.tensor([2, 2, 5], device="cuda", dtype=torch.int32)
    for loss in (lambda y: y.sum(), lambda y: y.t().contiguous().t()[:, ::2].sum(), lambda y: (y.t() @ y).trace()):
        result = torch.autograd.grad(loss(grouped.grouped_product(rows, weight, offsets)), (rows, weight))
        expected = torch.autograd.grad(loss(torch.cat([rows[:2] @ weight[0], rows[2:] @ weight[2]])), (rows, weight))
        torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


# --- the compiled loop ------------------------------------------------------------------------------------------------

every_way = pytest.mark.parametrize("sizes", modes.SIZES)
every_dtype = pytest.mark.parametrize("dtype", LOW)
both_backends = pytest.mark.parametrize("experts", BACKENDS)


@pytest.fixture
def syncs_are_errors() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@both_backends
@every_dtype
@every_way
@pytest.mark.parametrize("ids", ["topk", "given"])
def test_no_synchronisation(syncs_are_errors, experts, dtype, sizes, ids):
    """Nothing is read back from the device, forward or backward."""
    block, (x, scores, ids) = build(case(experts, dtype, sizes, ids))
    run = compiled(case(experts, dtype, sizes), block)
    gradient = torch.ones_like(x)
    for mode in ("default", "error"):  # compiled first
        torch.cuda.set_sync_debug_mode(mode)
        run(x.requires_grad_(), scores.requires_grad_(), ids).backward(gradient)
    torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()


@both_backends
@every_dtype
@every_way
@pytest.mark.parametrize("compiler", ["aot_eager default", "inductor default"])
def test_captured_in_a_cuda_graph(experts, dtype, sizes, compiler):
    """By hand, and replayed with other values and other experts."""
    if compiler.startswith("inductor") and sizes == "aligned" and dtype != "bf16":
        pytest.skip("inductor calls the same operator as for sizes that are not aligned: covered there")
    given = case(experts, dtype, sizes, compiler=compiler)
    block, (x, scores, ids) = build(given)
    run = compiled(given, block)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(x, scores, ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x, scores, ids)
        for seed in (1, 2):
            generator = torch.Generator("cuda").manual_seed(seed)
            x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
            ids.copy_(torch.rand(TOKENS, modes.NUM_EXPERTS + 1, device="cuda", generator=generator).argsort(-1)[:, :2])
            graph.replay()
            torch.testing.assert_close(out, run(x, scores, ids))


@both_backends
@every_dtype
@pytest.mark.parametrize("strict", [False, True], ids=["", "deterministic algorithms"])
def test_same_bits_twice(experts, dtype, strict):
    """The result; with deterministic algorithms the gradients too, in memory full of NaN."""
    given = case(experts, dtype)
    block, _ = build(given)
    before = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(strict, warn_only=False)
    deterministic.fill_uninitialized_memory = strict
    try:
        run = compiled(given, block)
        first, second = (modes.run(given, run, block, TOKENS, "cuda", modes.DTYPES[dtype]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = before
    for name in first if strict else ["output"]:
        assert first[name].isfinite().all(), name
        assert torch.equal(first[name], second[name]), name


@both_backends
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_memory_that_nobody_wrote_to(experts, dtype):
    """Rows of pairs of no expert are not written by any kernel, and must not be read either."""
    given = case(experts, dtype, compiler="inductor default")
    block, _ = build(given)
    run = compiled(given, block)
    wanted = modes.run(given, run, block, TOKENS, "cuda", modes.DTYPES[dtype])
    waste = [torch.full((2**size,), math.nan, device="cuda", dtype=torch.float32) for size in range(4, 24)]
    torch.cuda.synchronize()
    del waste  # what is allocated next is full of NaN
    result = modes.run(given, run, block, TOKENS, "cuda", modes.DTYPES[dtype])
    for name, tensor in result.items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(tensor, wanted[name])


def test_float32_is_multiplied_as_by_matmul():
    """In full precision unless the user allows TF32."""
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator("cuda").manual_seed(0)
    rows, weight = (torch.randn(size, device="cuda", generator=generator) for size in ((64, 512), (1, 512, 64)))
    offsets, exact = torch.tensor([64], device="cuda", dtype=torch.int32), rows.double() @ weight[0].double()
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = (grouped.grouped_product(rows, weight, offsets) - exact).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 1e-3 < errors["high"]


def test_parts_of_a_model_on_one_stream_and_another():
    """The kernels run on the current stream."""
    given = case("grouped_mm", "fp16", "odd")
    block, arguments = build(given)
    run = compiled(given, copy.deepcopy(block))
    with torch.no_grad():
        expected = run(*arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = run(*arguments)
        stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_replay_of_the_benchmark(backward):
    """What it times computes its own inputs' results, those of each replay anew, and takes time."""
    device, shape = torch.device("cuda"), SHAPES["tiny"]
    inputs = [ExpertsInputs.random(shape, TOKENS, backward, device) for _ in range(2)]
    experts = Experts(shape.build(device), backward)
    run = Variant("moe_rewrite", "grouped_mm", "default").prepare(experts.module)
    replay = Replay(
        lambda given: experts.call(run, given), inputs, torch.empty(1 << 20, dtype=torch.int8, device=device)
    )
    for given in (*inputs, inputs[0]):
        assert replay.time() > 0
        torch.testing.assert_close(replay.results, experts.call(run, given))


@pytest.mark.parametrize("experts", ["grouped_mm", "triton"])
@pytest.mark.parametrize("ids", ["topk", "given"])
@pytest.mark.parametrize(
    ("dtype", "compiler"),
    [
        ("bf16", "inductor default"),
        ("bf16", "inductor reduce-overhead"),
        ("fp16", "inductor default"),
        ("fp32", "aot_eager default"),
    ],
)
def test_many_rows(monkeypatch, experts, ids, dtype, compiler):
    """150 an expert, which are read by descriptors in 16 bits."""
    monkeypatch.setitem(modes.TOKENS, "static", (600,))
    monkeypatch.setattr(launch, "MUCH_WORK", 0)
    modes.check(case(experts, dtype, "aligned", ids, compiler=compiler), "cuda")


@pytest.mark.parametrize("experts", BACKENDS)
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_constants_in_a_body(experts, inner):
    """On the device, and beside it."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(TOKENS, 32, generator=generator), torch.randn(8, 32, 32, generator=generator) / 6
    x, weight, ids = x.to("cuda"), weight.to("cuda"), torch.rand(TOKENS, 8, generator=generator).topk(2)[1].to("cuda")

    def loop(x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(8):
            token, _ = torch.where(ids == expert)
            rows = (x[token] @ weight[expert]).clamp(max=torch.tensor(1.5, device=x.device))
            out.index_add_(0, token, rows * torch.tensor([1.0, 2.0], device=x.device).repeat(16) + torch.tensor(0.5))
        return out

    run = torch.compile(loop, backend="moe_rewrite", fullgraph=True, options={"experts": experts, "inner": inner})
    torch._dynamo.reset()
    torch.testing.assert_close(run(x, ids), loop(x, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", modes.cases("cuda"), ids=str)
def test_case(given):
    modes.check(given, "cuda")
