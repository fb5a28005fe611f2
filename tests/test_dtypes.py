"""Products and sums in the dtype that eager computes them in: integers to the bit, float64 in float64, and so on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from graphs import Graphs, targets
from torch import Tensor

from moe_rewrite.lower import batched_product
from moe_rewrite.lower.precision import accumulated_in

NUM_EXPERTS = 4
SETTINGS = [
    *(("batched_mm", "inductor"), ("grouped_mm", "inductor")),
    *(("batched_mm", "eager"), ("grouped_mm", "aot_eager"), ("triton", "eager")),
]
every_setting = pytest.mark.parametrize(("experts", "inner"), SETTINGS)

PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "@": lambda x, w, b: x @ w,
    "@ and a bias": lambda x, w, b: x @ w + b,
    "linear": lambda x, w, b: F.linear(x, w.t(), b),
    "addmm": lambda x, w, b: torch.addmm(b, x, w, beta=3, alpha=-2),
    "einsum": lambda x, w, b: torch.einsum("tk,kn->tn", x, w),
    "mv": lambda x, w, b: torch.mv(x, w[:, 0])[:, None].expand(-1, w.shape[1]),
    "matmul": lambda x, w, b: torch.matmul(x[:, None], w)[:, 0],
    "two": lambda x, w, b: (x @ w) @ (w.t() @ w),
}


def rows(x: Tensor, ids: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    """Of each expert its own rows. What follows the product sees whether it has wrapped around."""
    found = []
    for product in PRODUCTS.values():
        out = torch.zeros(x.shape[0], w.shape[2], dtype=x.dtype)
        for expert in range(NUM_EXPERTS):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, torch.div(product(x[token], w[expert], b[expert]), 3, rounding_mode="floor"))
        found.append(out)
    return found


def dense(x: Tensor, ids: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    """Every expert on every token, added up and put side by side."""
    found = []
    for product in PRODUCTS.values():
        out = torch.zeros(x.shape[0], w.shape[2], dtype=x.dtype)
        for expert in range(NUM_EXPERTS):
            out += torch.div(product(x, w[expert], b[expert]), 3, rounding_mode="floor")
        stacked = torch.stack([product(x, w[expert], b[expert]) for expert in range(NUM_EXPERTS)])
        found += [out, stacked.sum(0), stacked.amax(0)]
    return found


def drawn(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    most = min(torch.iinfo(dtype).max, 2**40)
    return torch.randint(0, most, shape, generator=generator, dtype=torch.int64).to(dtype)


def operands(dtype: torch.dtype, tokens: int, inner: int, columns: int) -> tuple[Tensor, ...]:
    ids = torch.rand(tokens, NUM_EXPERTS + 1, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :2]
    weight = drawn(dtype, NUM_EXPERTS, inner, columns, seed=2)
    return drawn(dtype, tokens, inner, seed=1), ids, weight, drawn(dtype, NUM_EXPERTS, columns, seed=3)


def compiled(function: Callable[..., list[Tensor]], experts: str, inner: str) -> Callable[..., list[Tensor]]:
    options = {"experts": experts, "inner": inner}
    return torch.compile(function, backend="moe_rewrite", fullgraph=True, dynamic=False, options=options)


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@pytest.mark.parametrize(
    ("experts", "inner", "dtype"),
    [*((*SETTINGS[2 + n % 3], dtype) for n, dtype in enumerate(INTEGERS)), ("triton", "eager", torch.int64)],
    ids=str,
)
def test_integers(experts: str, inner: str, dtype: torch.dtype) -> None:
    """To the bit: they wrap around."""
    args = operands(dtype, 5, 6, 6)
    for result, expected in zip(compiled(rows, experts, inner)(*args), rows(*args), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("experts", ["auto", "grouped_mm"])
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.int64, (5, 6, 6)), (torch.int32, (1, 3, 6))], ids=str)
def test_integers_through_inductor(experts: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Of a product with one row it makes a sum, and sums of integers are int64."""
    args = operands(dtype, *sizes)
    for result, expected in zip(compiled(rows, experts, "inductor")(*args), rows(*args), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.int64, (5, 6, 6)), (torch.int32, (1, 3, 6))], ids=str)
def test_integers_of_every_token(inner: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    args = operands(dtype, *sizes)
    for result, expected in zip(compiled(dense, "auto", inner)(*args), dense(*args), strict=True):
        assert result.dtype is expected.dtype
        assert torch.equal(result, expected)


@every_setting
def test_truths_have_no_products(experts: str, inner: str) -> None:
    """As in eager."""
    x, ids, w, b = operands(torch.int8, 5, 6, 6)

    def product(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], w.shape[2], dtype=torch.int64)
        for expert in range(NUM_EXPERTS):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, (x[token] @ w[expert]).long())
        return out

    for run in (product, compiled(product, experts, inner)):
        with pytest.raises(Exception, match="'Bool'"):
            run(x > 60, ids, w > 60)


WIDE = (torch.float64, torch.complex128, torch.complex64)


@pytest.mark.parametrize(
    ("experts", "inner", "dtype"),
    [*((*setting, WIDE[0]) for setting in SETTINGS), *((*SETTINGS[n], WIDE[1 + n % 2]) for n in range(1, 5))],
    ids=str,
)
def test_wide_numbers(experts: str, inner: str, dtype: torch.dtype) -> None:
    def sums(x: Tensor, ids: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], w.shape[2], dtype=x.dtype)
        for expert in range(NUM_EXPERTS):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, F.linear(x[token], w[expert].t(), b[expert]) * b[expert, 0])
        return out

    args = operands(dtype, 5, 6, 6)
    assert torch.promote_types(dtype, torch.float32) is accumulated_in(dtype) is dtype
    # Sums of 6 terms of order 1 in another order.
    tolerance = 1e-5 if dtype is torch.complex64 else 1e-14
    torch.testing.assert_close(compiled(sums, experts, inner)(*args), sums(*args), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_added_in_float32(inner: str, dtype: torch.dtype) -> None:
    """Ones: adding them in fp16 ends at 2048, in bf16 at 256."""

    def sums(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], w.shape[2], dtype=x.dtype)
        for expert in range(NUM_EXPERTS):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, x[token] @ w[expert])
        return out

    x, w = torch.ones(2, 4096, dtype=dtype), torch.ones(NUM_EXPERTS, 4096, 1, dtype=dtype)
    for experts in ("batched_mm", "grouped_mm"):
        torch._dynamo.reset()
        assert compiled(sums, experts, inner)(x, torch.tensor([[0], [3]]), w).tolist() == [[4096]] * 2


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm", "triton"])
def test_conditions_are_truths(experts: str) -> None:
    """What inductor makes of ``any`` on a GPU is an int8, for which Triton is to have no ``where``."""

    def loop(x: Tensor, ids: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, F.linear(x[token], w[expert], b[expert]) * b[expert])
        return out

    x, ids, w, b = operands(torch.float32, 5, 6, 6)
    graphs = Graphs("eager")
    torch.compile(loop, backend="moe_rewrite", fullgraph=True, options={"experts": experts, "inner": graphs})(
        x, ids, w.requires_grad_(), b
    )
    (graph,) = graphs
    assert "aten.where.self" in targets(graph)
    assert not any("any" in name for name in targets(graph))


DTYPES = {
    **dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16), torch.float32),
    torch.complex32: torch.complex64,
    **{dtype: dtype for dtype in (torch.float32, torch.float64, torch.complex64, torch.bool, torch.uint16, *INTEGERS)},
}


@pytest.mark.parametrize(("dtype", "wide"), DTYPES.items(), ids=str)
def test_the_rule(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert accumulated_in(dtype) is wide


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_one_by_one(dtype: torch.dtype) -> None:
    x, ids, w, b = operands(dtype, 5, 6, 3)
    expert = ids[:, 0].clamp(max=NUM_EXPERTS - 1)
    expected = torch.stack([row @ w[e] + b[e] for row, e in zip(x, expert, strict=True)])
    for multiply in (batched_product.multiply_and_sum, batched_product.gather_and_multiply):
        assert torch.equal(multiply(x, w, expert, b), expected)
