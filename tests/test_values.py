"""How many tokens, experts and slots there are, and values that must not get anywhere else."""

from __future__ import annotations

import math

import modes
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from loops import (
    HIDDEN,
    NUM_EXPERTS,
    Moe,
    Observed,
    Routed,
    assert_same,
    fresh,
    inputs,
    observe,
    plain,
    sentinel,
    states,
    weigh_up,
)
from torch import Tensor, nn

from moe_rewrite.lower import grouped_product

BACKENDS = ("batched_mm", "grouped_mm")
both_backends = pytest.mark.parametrize("experts", BACKENDS)


def compiled(module, experts, inner="eager", **kwargs):
    options = {"experts": experts, "inner": inner}
    return torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options, **kwargs)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def both_ways(run, module, args) -> Observed:
    """Forward and backward. What eager's loop did not come to has no gradient there, and may have zeros here."""
    args = fresh(args, requires_grad=True)
    module.zero_grad()
    result = run(*args)
    if result.requires_grad:
        weigh_up(result).backward()
    leaves = {**dict(module.named_parameters()), **{str(i): arg for i, arg in enumerate(args) if arg.requires_grad}}
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return Observed(result.detach().clone(), {}, {}, {name: grad.clone() for name, grad in gradients.items()})


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [*BACKENDS, "auto"])
@pytest.mark.parametrize(
    ("dynamic", "most"),
    [
        pytest.param(True, 3, id="dynamic"),  # 0, 1, any other
        pytest.param(None, 4, id="by default"),  # the first, then 0, 1, any other
    ],
)
def test_number_of_tokens_changes(experts, dynamic, most):
    """Without a graph for each, and with the numbers of eager."""
    module = Routed()
    run = compiled(module, experts, dynamic=dynamic)
    seen = []
    for tokens in (6, 9, 33, 2, 1, 0, 128, 5, 6, 0, 1, 77):
        args = (states(tokens),)
        assert_same(both_ways(run, module, args), both_ways(module, module, args))
        seen.append(graphs())
    assert seen[-1] <= most
    assert seen[2:4] == [seen[1]] * 2, "33 and 2 tokens are served by the graph of 9"


@both_backends
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (2, 1), (2, 2), (NUM_EXPERTS, 3), (NUM_EXPERTS, NUM_EXPERTS), (65, 6)]
)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_number_of_experts_and_slots(experts, num_experts, top_k, tokens):
    module = Moe(plain, num_experts)
    args = inputs(tokens, top_k, num_experts)
    actual, expected = both_ways(compiled(module, experts, "aot_eager"), module, args), both_ways(module, module, args)
    assert actual.result.shape == (tokens, HIDDEN)
    assert_same(actual, expected)


# --- memory that nobody wrote to --------------------------------------------------------------------------------------


DROPPED = {
    "some": [[4, 4], [0, 4], [1, 0], [4, 2], [1, 2], [2, 4]],
    "all but one": [[4, 4], [4, 4], [4, 4], [4, 2], [4, 4], [4, 4]],
    "all": [[4, 4]] * 6,
}


@both_backends
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("ids", DROPPED.values(), ids=DROPPED)
def test_dropped_pairs_in_poisoned_memory(poisoned, experts, inner, ids):
    x, _, weights = inputs()
    args = (x, torch.tensor(ids), weights)
    module = Moe(sentinel)
    assert_same(both_ways(compiled(module, experts, inner), module, args), both_ways(module, module, args))


@pytest.mark.parametrize("ids", ["topk", "given"])
@pytest.mark.parametrize("compiler", ["aot_eager default", "inductor default"])
def test_kernel_in_poisoned_memory(poisoned, monkeypatch, compiler, ids):
    """torch's own kernel leaves rows of no group as they are: on the CPU as on a GPU that has one."""
    monkeypatch.setattr(grouped_product, "_device_has_kernel", lambda device: True)
    modes.check(modes.Case("grouped_mm", compiler, "bf16", "dynamic", "aligned", ids), "cpu")


class Masked(nn.Module):
    """Each expert takes the tokens that a mask of its own gives it, in a dtype and sizes that torch's kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 16, 16, generator=generator).bfloat16())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(3):
            token = mask[expert].nonzero()[:, 0]
            out.index_add_(0, token, x[token] @ self.weight[expert])
        return out


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_kernel_and_rows_of_a_mask(monkeypatch, inner):
    """How many rows there are is known only at run time: some, or none at all."""
    monkeypatch.setattr(grouped_product, "_device_has_kernel", lambda device: True)
    module = Masked()
    run = compiled(module, "grouped_mm", inner)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    for mask in (torch.arange(18).reshape(3, 6) % 4 < 2, torch.zeros(3, 6, dtype=torch.bool)):
        # Up to three sums of 16 terms of order 1, each rounded to 2**-9.
        actual, expected = (both_ways(one, module, (x, mask)) for one in (run, module))
        torch.testing.assert_close(actual.result, expected.result, rtol=2**-5, atol=2**-5)
        torch.testing.assert_close(actual.gradients, expected.gradients, rtol=2**-5, atol=2**-5)


# --- values that are not finite ---------------------------------------------------------------------------------------

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@both_backends
@pytest.mark.parametrize(
    ("bad", "where", "inner"),
    [
        *((bad, where, "aot_eager") for bad in BAD for where in ("hidden states", "routing weights")),
        ("nan", "hidden states", "inductor"),
    ],
)
def test_bad_value_stays_with_its_token(experts, bad, where, inner):
    """The other tokens get what they get without it, result and gradient."""
    module = Moe(sentinel)
    args = inputs(tokens=7, top_k=2)
    changed = fresh(args)
    (changed[0] if where == "hidden states" else changed[2])[3] = BAD[bad]
    run = compiled(module, experts, inner)
    clean, dirty = observe(run, module, args, backward=True), observe(run, module, changed, backward=True)
    others = torch.arange(7) != 3
    assert not dirty.result[3].isfinite().all()
    torch.testing.assert_close(dirty.result[others], clean.result[others])
    for name in ("argument 0", "argument 2"):
        torch.testing.assert_close(dirty.gradients[name][others], clean.gradients[name][others])
    assert_same(dirty, observe(module, module, changed, backward=True))


@both_backends
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_bad_weights_of_an_expert_without_tokens(experts, bad, backward):
    module = Moe(plain)
    x, ids, weights = inputs()
    args = (x, ids.clamp(max=1), weights)
    with torch.no_grad():
        for parameter in (module.up, module.down):
            parameter[2:] = bad
    actual = observe(compiled(module, experts, "aot_eager"), module, args, backward=backward)
    assert actual.result.isfinite().all()
    assert_same(actual, observe(module, module, args, backward=backward))


def _biased(m, x, ids, weights):
    """Adds a bias of the expert to its rows before they are activated."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, m.num_experts + 1).permute(2, 1, 0)
    for expert in mask.sum((-1, -2)).greater(0).nonzero():
        expert = expert[0]
        if expert == m.num_experts:
            continue
        slot, token = torch.where(mask[expert])
        rows = F.silu(x[token] @ m.weight[expert] + m.bias[expert])
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


@both_backends
@pytest.mark.parametrize("expert", [0, NUM_EXPERTS - 1])
def test_bad_bias_where_all_pairs_are_dropped(experts, expert):
    """Rows of no expert have the weights of some expert, which eager does not touch."""
    module = Moe(_biased)
    x, ids, weights = inputs()
    with torch.no_grad():
        module.bias[expert] = math.nan
    args = (x, torch.full_like(ids, NUM_EXPERTS), weights)
    actual = both_ways(compiled(module, experts, "aot_eager"), module, args)
    assert all(gradient.isfinite().all() for gradient in actual.gradients.values())
    assert_same(actual, both_ways(module, module, args))


@both_backends
@pytest.mark.parametrize("ids", DROPPED.values(), ids=DROPPED)
def test_bad_values_of_a_dropped_token(experts, ids):
    """It is read by nobody, so that every gradient is finite."""
    x, _, weights = inputs()
    ids = torch.tensor(ids)
    dropped = (ids == NUM_EXPERTS).all(-1)
    x[dropped], weights[dropped] = math.nan, math.inf
    module = Moe(sentinel)
    args = (x, ids, weights)
    actual = both_ways(compiled(module, experts, "aot_eager"), module, args)
    assert actual.result.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in actual.gradients.values())
    assert_same(actual, both_ways(module, module, args))


# --- gradients as they come -------------------------------------------------------------------------------------------


GRADIENTS = {
    "expanded": lambda result: result.sum(),
    "expanded rows": lambda result: (result.sum(-1) * torch.arange(result.shape[0])).sum(),
    "transposed": lambda result: (result.t() @ torch.ones(result.shape[0], 3, dtype=result.dtype)).sum(),
    "every second": lambda result: weigh_up(result[::2, 1::2]),
    "zeros": lambda result: (result * 0).sum(),
}


@both_backends
@pytest.mark.parametrize("loss", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradient_of_any_stride(monkeypatch, experts, loss, dtype):
    """Through torch's kernel too, where the dtype has one."""
    monkeypatch.setattr(grouped_product, "_device_has_kernel", lambda device: True)
    module, (x, ids, weights) = Moe(sums, dtype=dtype), inputs(dtype=dtype)
    gradients = []
    for run in (module, compiled(module, experts, "aot_eager")):
        module.zero_grad()
        own = x.clone().requires_grad_()
        loss(run(own, ids, weights)).backward()
        gradients.append([own.grad, module.weight.grad])
    # bf16: sums of at most 16 terms of order 1, each rounded to 2**-9.
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype is torch.float64 else {"rtol": 2**-5, "atol": 2**-5}
    torch.testing.assert_close(gradients[1], gradients[0], **tolerance)


def sums(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Rows that are a sum: the gradient of their product is expanded already."""
    out = torch.zeros_like(x)
    for expert in m.mask(ids).sum((-1, -2)).greater(0).nonzero():
        expert = expert[0]
        slot, token = torch.where(m.mask(ids)[expert])
        out.index_add_(0, token, (x[token] @ m.weight[expert]).sum(-1, keepdim=True).expand(-1, HIDDEN))
    return out


class OfNoExpert(nn.Module):
    """Two products one after the other, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.full((2, 4, 4), math.nan)) for _ in range(2))
        self.bias = nn.Parameter(torch.full((2, 4), math.nan))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(2):
            token = torch.where(ids == expert)[0]
            rows = nn.functional.linear(x[token], self.first[expert], self.bias[expert]) @ self.second[expert]
            out.index_add_(0, token, rows)
        return out


@pytest.mark.parametrize("experts", [*BACKENDS, "triton"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_weights_that_nobody_uses(experts, inner):
    """All pairs are of no expert: whatever the weights are, all gradients are zeros."""
    torch._dynamo.reset()
    module = OfNoExpert()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = compiled(module, experts, inner)(x, torch.tensor([2, -1, 2]))
    out.sum().backward()
    assert not out.any()
    for leaf in (x, *module.parameters()):
        assert not leaf.grad.any()


# --- tokens whose experts are all elsewhere ---------------------------------------------------------------------------


class Elsewhere(nn.Module):
    """Experts that weigh a token's row before the product, or the result after it."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 4, 4, generator=generator, dtype=torch.float64))
        self.before = before

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(2):
            token, slot = torch.where(ids == expert)
            rows = x[token]
            rows = rows * weights[token, slot, None] if self.before else rows
            rows = torch.tanh(rows @ self.weight[expert])
            out.index_add_(0, token, rows if self.before else rows * weights[token, slot, None])
        return out


@pytest.mark.parametrize("experts", [*BACKENDS, "triton"])
@pytest.mark.parametrize("before", [False, True], ids=["weighed after", "weighed before"])
@pytest.mark.parametrize("bad", [0, 1, 2, 3], ids="token {} is NaN".format)
@pytest.mark.parametrize("ids", [[1, 0, 2, 1], [2, 1, 0, 2], [0, 2, -1, 1]], ids=str)
def test_nothing_of_one_token_gets_into_the_gradient_of_another(experts, before, bad, ids):
    """A pair of no expert is given the row, the expert and the weight of one and the same pair."""

    def gradients(run: object, module: nn.Module) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        x[bad] = math.nan
        leaves = [x.requires_grad_(), torch.rand(4, 1, generator=generator, dtype=torch.float64).requires_grad_()]
        out = run(leaves[0], torch.tensor(ids)[:, None], leaves[1])
        weighted = out * torch.linspace(1, 2, out.numel(), dtype=torch.float64).view_as(out)
        return [out, *torch.autograd.grad(weighted.sum(), [*leaves, *module.parameters()])]

    torch._dynamo.reset()
    module = Elsewhere(before)
    wanted = gradients(module, module)
    result = gradients(compiled(module, experts), module)
    torch.testing.assert_close(result, wanted, equal_nan=True)
