"""Whole loops with the experts backend ``triton``: interpreted where there is no GPU."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import hub
import modes
import pytest
import test_forms
import test_spellings
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from fused import FOUR, Recorded, assert_same_numbers, fast, inputs, recording
from loops import HIDDEN, INTERMEDIATE, NUM_EXPERTS, Moe, hits, sentinel, weigh_up
from loops import plain as plain_loop
from operands import DEVICE, needs_interpreter
from rolled import Compiled, Python, Rolled, compiled
from torch import Tensor, nn
from torch.testing import assert_close

from moe_rewrite.lower import grouped_product
from moe_rewrite.lower import triton as experts_backend

triton = pytest.importorskip("triton", reason="torch for the CPU comes without triton")


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    return recording(monkeypatch)


# --- whole loops ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Some loops over experts, and what stands around them, on ``DEVICE``. ``[T, HIDDEN]`` to the same."""

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
        self.to(DEVICE)

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


def run_block(module: nn.Module, args: tuple[Tensor, ...], run: Callable[..., Any], grad: str) -> dict[str, Tensor]:
    """Output and gradients. ``grad``: what requires one."""
    args = tuple(arg.detach().clone() for arg in args)
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


def check_block(block: Callable[..., Tensor], grad: str, inner: str = "eager") -> None:
    module, args = Block(block), inputs()
    module.requires_grad_(grad != "x")
    expected = run_block(module, args, module, grad)
    assert any(tensor.any() for name, tensor in expected.items() if name != "output") == (
        grad in ("all", "x") or block is _switches_on
    )
    assert_same_numbers(run_block(module, args, fast(module, inner=inner), grad), expected)


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
            args = inputs(tokens)
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
        args = inputs(tokens, num_experts=32)
        for grad in ("no_grad", "all"):
            torch._dynamo.reset()
            expected = run_block(module, args, module, grad)
            assert_same_numbers(run_block(module, args, fast(module), grad), expected)
        assert set(told) == {one_by_one}
        told.clear()


@needs_interpreter
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize(("experts", "module_of_it"), [("triton", experts_backend), ("grouped_mm", grouped_product)])
def test_searches_where_it_is_asked_for(monkeypatch, experts, module_of_it, mode):
    told = []
    multiply = module_of_it.rows_mm
    monkeypatch.setattr(
        module_of_it, "rows_mm", lambda *args, **how: told.append(how["max_autotune"]) or multiply(*args, **how)
    )
    monkeypatch.setattr(grouped_product, "has_kernel_of_ours", lambda rows: True)
    module = Block(_one_each)
    options = {"experts": experts, "mode": mode}
    with torch.no_grad():
        torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)(*inputs())
    assert told and set(told) == {mode != "default"}


@needs_interpreter
def test_only_what_is_before_requires_grad(recorded):
    """Something before the first loop is trained: nothing is fused after it."""

    def loops(b, x, ids, weights):
        return _two_loops(b, x * b.moe.scale[0], ids, weights)

    module = Block(loops).requires_grad_(False)
    module.moe.scale.requires_grad_()
    args = inputs()
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
    module, args = Block(BLOCKS["swiglu"]).requires_grad_(False), inputs()
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
    module = Moe(sentinel).to(DEVICE)
    args = inputs(dtype=torch.float64)
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
        "gpt_oss": "add v1 v2;clamp_min v4 -7.0;clamp_max v5 7.0;add v6 1.0;"
        "add v0 v3;clamp_max v8 7.0;mul v9 1.702;sigmoid v10;mul v9 v11;mul v7 v12",
    }[name]
    assert recorded.programs[0] == program
    assert len(recorded.programs) == 2


# --- the forms and spellings of the other tests -----------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("form", [*test_forms.TOP_K_FORMS, *test_forms.MASK_FORMS], ids=lambda form: form.__name__)
def test_forms_in_float32(form):
    """Each form, with ids that a token has twice."""
    args = [arg.to(DEVICE, torch.float32 if arg.is_floating_point() else arg.dtype) for arg in test_forms.given_twice()]
    rolled, python = (test_forms.Experts(form, loops).to(DEVICE, torch.float32) for loops in (Rolled, Python))
    with torch.no_grad():
        expected = weigh_up(python(*args))
        function = compiled(rolled, Compiled("triton"))
        assert_same_numbers(weigh_up(function(*args)), expected)


@needs_interpreter
@pytest.mark.parametrize("loop", test_spellings.REWRITTEN, ids=lambda loop: loop.__name__)
def test_spellings_in_float32(monkeypatch, loop):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # eager's convolutions on a GPU have it by default
    module = Moe(loop, dtype=torch.float32).to(DEVICE).requires_grad_(False)
    args = inputs()
    assert_same_numbers(fast(module)(*copy.deepcopy(args)), module(*copy.deepcopy(args)))


# --- what pairs of no expert look up ----------------------------------------------------------------------------------


def _longer_ids(m, x, ids, weights):
    return swiglu(m, x, torch.cat([ids, torch.full_like(ids[:2], NUM_EXPERTS)]), weights)


def _wider_ids(m, x, ids, weights):
    return swiglu(m, x, torch.cat([ids, torch.full_like(ids, NUM_EXPERTS)], 1), weights)


def _short_table(m, x, ids, weights):
    ids = torch.where(torch.arange(x.shape[0], device=x.device)[:, None] < 4, ids, NUM_EXPERTS)
    return swiglu(m, x[:4], ids, weights[:4])


def _table_of_each_expert(m, x, ids, weights):
    """A part of each expert's own that the token's number is an index of."""
    ids = torch.where(torch.arange(x.shape[0], device=x.device)[:, None] < 4, ids, NUM_EXPERTS)
    out, mask = torch.zeros_like(x), F.one_hot(ids, NUM_EXPERTS + 1).permute(2, 1, 0)
    for expert in hits(mask[:NUM_EXPERTS]):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert] * m.pairwise[expert][token][:, None])
    return out


def _selected_otherwise(m, x, ids, weights):
    ids = torch.where(torch.arange(x.shape[0], device=x.device)[:, None] < 4, ids, NUM_EXPERTS)
    short, out, mask = x[:4].clone(), torch.zeros_like(x), F.one_hot(ids, NUM_EXPERTS + 1).permute(2, 1, 0)
    for expert in hits(mask[:NUM_EXPERTS]):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        rows = short.index_select(0, token) + F.embedding(token, short)
        out.index_add_(0, token, rows @ m.weight[expert] + m.bias[:2][slot])
    return out


def _number_as_an_index(m, x, ids, weights):
    """Integers that are computed for each row."""
    ids = torch.where(torch.arange(x.shape[0], device=x.device)[:, None] < 3, ids, NUM_EXPERTS)
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
    module = Moe(loop, dtype=torch.float32).to(DEVICE)
    x, ids, weights = inputs()
    function = fast(module, experts)
    for given in (ids, torch.full_like(ids, NUM_EXPERTS)):
        with torch.set_grad_enabled(grad):
            actual, expected = function(x, given, weights), module(x, given, weights)
            assert_same_numbers(actual, expected)
            if grad and expected.requires_grad:
                weight = [torch.autograd.grad(weigh_up(one), module.weight)[0] for one in (actual, expected)]
                assert_same_numbers(*weight)
