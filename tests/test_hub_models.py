"""Whole models of transformers, from their eager loop to one graph, with the numbers of eager.

float32 is compared with eager directly. Two sums of 48 float32 products of order 1, added in another order, differ by
some 1e-6; the required rtol 1e-4 / atol 1e-5 leaves room for two layers of that.

bfloat16 and float16 are compared through a float64 reference of the same rounded weights: our error may be at most
:data:`MAX_ERROR_RATIO` times eager's own, both as the root of the mean squared error over all entries. Why that factor:
ours rounds where eager rounds in the rows (the same operators in the same dtypes), and once instead of K times where
the rows of a token are added up. So its error is drawn from the same distribution as eager's or from a narrower one.
Such a root, estimated from n entries with independent errors, has a relative deviation of 1/sqrt(2n), and the ratio of
two of them 1/sqrt(n): 1.8 % for the 99 x 32 entries of an experts block, and 1.1 is five deviations away. There is no
floor of an ulp: with this many entries eager's error is not small by luck.

A top-k whose candidates are closer than a rounding is broken differently by different roundings, and a token that goes
to another expert gets another result: with 200 choices in bfloat16 some are always that close. Therefore

* one block of experts is compared with the hidden states, experts and weights given, the same for all three;
* whole models in low precision have one MoE layer and inner="eager", so that everything up to the router is eager's
  own computation, bit for bit, and so is the choice; the float64 reference is routed by eager's choice, through a hook.
"""

from __future__ import annotations

import copy

import pytest
import torch
from graphs import Graphs
from hub import (
    MODELS,
    NUM_EXPERTS,
    build,
    calls_of_experts,
    experts_modules,
    identical_tokens,
    logits,
    only_experts,
    random_tokens,
    routed_as,
    tokens_of_experts,
)
from torch import Tensor, nn

BACKENDS = ("batched_mm", "grouped_mm")
LOW_PRECISION = (torch.bfloat16, torch.float16)
MAX_ERROR_RATIO = 1.1


def compiled(model: nn.Module, experts_backend: str, inner, **kwargs):
    options = {"experts": experts_backend, "inner": inner}
    return torch.compile(model, backend="moe_rewrite", fullgraph=True, options=options, **kwargs)


def assert_equals_eager(compiled_model, model: nn.Module, token_ids: Tensor, case: str) -> None:
    with torch.no_grad():
        expected, actual = logits(model, token_ids), logits(compiled_model, token_ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda message: f"{case}: {message}")


def every_loop(model: nn.Module, experts_backend: str) -> set[tuple[str, str]]:
    return {(path, experts_backend) for path in experts_modules(model)}


def rms(difference: Tensor) -> float:
    return difference.double().square().mean().sqrt().item()


@pytest.mark.parametrize("name", MODELS)
def test_logits_depend_on_the_experts(name):
    """Without their experts the models give other logits by far: what the other tests compare is not the rest alone."""
    model, token_ids = build(name), random_tokens(1, 33)
    without = copy.deepcopy(model)
    for experts in experts_modules(without).values():
        for parameter in experts.parameters():
            parameter.data.zero_()
    with torch.no_grad():
        assert rms(logits(without, token_ids) - logits(model, token_ids)) > 0.1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_with_the_logits_of_eager(name, backend, length, batch):
    layers = 2 if (batch, length) == (3, 33) else 1  # to be quick
    model, graphs = build(name, moe_layers=layers), Graphs()
    fast = compiled(model, backend, graphs)
    token_ids = random_tokens(batch, length)
    assert_equals_eager(fast, model, token_ids, "random tokens")

    top_k = calls_of_experts(model, token_ids).popitem()[1][1].shape[1]
    allowed = range(max(4, top_k + 1))
    with only_experts(model, allowed):
        for counts in tokens_of_experts(model, token_ids).values():
            assert counts[len(allowed) :].sum() == 0, "the last experts get no token"
        assert_equals_eager(fast, model, token_ids, "experts without tokens")

    same = identical_tokens(batch, length)
    counts = next(iter(tokens_of_experts(model, same).values()))
    assert sorted(counts.tolist()) == [0] * (NUM_EXPERTS - top_k) + [batch * length] * top_k
    assert_equals_eager(fast, model, same, "identical tokens")

    assert len(graphs) == 1
    assert graphs.rewritten() == every_loop(model, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_all_tokens_on_one_expert(name, backend):
    model, graphs = build(name, top_k=1), Graphs("aot_eager")
    fast = compiled(model, backend, graphs)
    token_ids = random_tokens(3, 7)
    for expert in (0, 3, NUM_EXPERTS - 1):
        with only_experts(model, [expert]):
            for counts in tokens_of_experts(model, token_ids).values():
                assert counts[expert] == counts.sum() == token_ids.numel()
            assert_equals_eager(fast, model, token_ids, f"all on expert {expert}")
    assert len(graphs) == 1
    assert graphs.rewritten() == every_loop(model, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_inductor(name, backend):
    model = build(name, moe_layers=1)
    fast = compiled(model, backend, "inductor")
    assert_equals_eager(fast, model, random_tokens(3, 7), "inductor")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_reduce_overhead():
    model = build("mixtral", moe_layers=1)
    options = {"experts": "grouped_mm", "mode": "reduce-overhead"}
    fast = torch.compile(model, backend="moe_rewrite", fullgraph=True, options=options)
    for seed in (1, 2, 3):  # CUDA graphs, where there are any, come from the third call on
        assert_equals_eager(fast, model, random_tokens(3, 7, seed), f"call {seed}")


# --- changing numbers of tokens --------------------------------------------------------------------------------------

SIZES = ((2, 5), (2, 33), (2, 12), (2, 7))


def graphs_by_size(name: str, backend: str, sizes: tuple[tuple[int, int], ...], dynamic: bool | None) -> list[int]:
    """How many graphs there are after each of ``sizes`` (batch, length); each is compared with eager."""
    model, graphs, counts = build(name, moe_layers=1), Graphs(), []
    fast = compiled(model, backend, graphs, dynamic=dynamic)
    for batch, length in sizes:
        assert_equals_eager(fast, model, random_tokens(batch, length), f"{batch} x {length}")
        counts.append(len(graphs))
    assert graphs.rewritten() == every_loop(model, backend)
    return counts


@pytest.mark.parametrize(("name", "backend"), [(name, BACKENDS[i % 2]) for i, name in enumerate(MODELS)])
def test_dynamic_compiles_once(name, backend):
    assert graphs_by_size(name, backend, (*SIZES, (3, 12), (5, 40)), dynamic=True) == [1] * 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_automatic_dynamic_compiles_twice(name, backend):
    """For the first length as it is, from the second on for any."""
    assert graphs_by_size(name, backend, SIZES, dynamic=None) == [1, 2, 2, 2]


# --- low precision ---------------------------------------------------------------------------------------------------


IN_LOW_PRECISION = [
    *((name, backend, dtype, "eager") for name in MODELS for backend in BACKENDS for dtype in LOW_PRECISION),
    ("mixtral", "grouped_mm", torch.bfloat16, "inductor"),
    ("gpt_oss", "batched_mm", torch.float16, "inductor"),
]


@pytest.mark.parametrize(("name", "backend", "dtype", "inner"), IN_LOW_PRECISION, ids=str)
def test_low_precision_experts_err_no_more_than_eager(name, backend, dtype, inner):
    """A block of experts, its routing given."""
    model = build(name, moe_layers=1, dtype=dtype)
    (path, call), *_ = calls_of_experts(model, random_tokens(3, 33)).items()
    experts, graphs = experts_modules(model)[path], Graphs(inner)
    hidden_states, chosen, weights = call
    with torch.no_grad():
        eager = experts(*call)
        ours = compiled(experts, backend, graphs)(*call)
        reference = copy.deepcopy(experts).double()(hidden_states.double(), chosen, weights.double())
    assert ours.dtype == eager.dtype == dtype
    assert rms(ours - reference) <= MAX_ERROR_RATIO * rms(eager - reference)
    assert len(graphs) == 1


@pytest.mark.parametrize(("backend", "dtype"), zip(BACKENDS, LOW_PRECISION, strict=True), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_low_precision_logits_err_no_more_than_eager(name, backend, dtype):
    """A whole model; see above for how its routing is kept the same."""
    model, graphs, token_ids = build(name, moe_layers=1, dtype=dtype), Graphs(), random_tokens(3, 33)
    reference_model = copy.deepcopy(model).double()
    with torch.no_grad():
        eager, ours = logits(model, token_ids), logits(compiled(model, backend, graphs), token_ids)
        with routed_as(reference_model, calls_of_experts(model, token_ids)):
            reference = logits(reference_model, token_ids)
    assert ours.dtype == eager.dtype  # not `dtype` for all: Nemotron-H gives its logits in float32
    assert rms(ours - reference) <= MAX_ERROR_RATIO * rms(eager - reference)
    assert len(graphs) == 1
    assert graphs.rewritten() == every_loop(model, backend)
