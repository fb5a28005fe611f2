"""What the recogniser makes of a loop: its fields, the spellings it sees through, and its reasons to refuse.

Every loop that is accepted is also run, with both experts backends, and compared with eager: results, gradients and
side effects, in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from graphs import Graphs
from hypothesis import strategies as st
from loops import (
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    TOKENS,
    TOP_K,
    Moe,
    assert_same,
    hits,
    inputs,
    loop_over,
    observe,
    plain,
    sentinel,
)
from torch import Tensor, nn

import moe_rewrite
from moe_rewrite import lower
from moe_rewrite.loop import ExpertsLoop, Refusal
from moe_rewrite.lower import Lifted
from moe_rewrite.report import LoopReport

BACKENDS = ("batched_mm", "grouped_mm")


class Experts(Moe):
    """A :class:`Moe` with more parameters."""

    def __init__(self, loop: Callable[..., Tensor], **kwargs: object) -> None:
        super().__init__(loop, **kwargs)
        generator = torch.Generator().manual_seed(2)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 2)

        self.up_kn = parameter(NUM_EXPERTS, HIDDEN, INTERMEDIATE)
        self.down_kn = parameter(NUM_EXPERTS, INTERMEDIATE, HIDDEN)
        self.up_flat = parameter(NUM_EXPERTS * INTERMEDIATE, HIDDEN)
        self.gate_up = parameter(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        self.bias_up = parameter(NUM_EXPERTS, INTERMEDIATE)
        self.mix = parameter(NUM_EXPERTS, HIDDEN, HIDDEN)
        self.norm = parameter(NUM_EXPERTS, HIDDEN)
        self.lora_a = parameter(NUM_EXPERTS, HIDDEN, 2)
        self.lora_b = parameter(NUM_EXPERTS, 2, INTERMEDIATE)
        self.base = parameter(INTERMEDIATE, HIDDEN)
        self.shared_bias = parameter(HIDDEN)
        self.by_token = parameter(TOKENS, HIDDEN)


def explained(module: nn.Module, *args: Tensor) -> list[LoopReport]:
    return moe_rewrite.explain(module, *args).loops


def rewritten(module: nn.Module, *args: Tensor, backends: tuple[str, ...] = BACKENDS) -> ExpertsLoop:
    """The one loop of ``module``; it is rewritten in one graph, to the same as eager."""
    expected = observe(module, module, args, backward=True)
    loops: list[ExpertsLoop] = []
    for name in backends:
        torch._dynamo.reset()
        graphs = Graphs()
        with recorded(name, loops) as recording:
            options = {"experts": recording, "inner": graphs}
            fast = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)
            assert_same(observe(fast, module, args, backward=True), expected)
        assert [mark for _, mark in graphs.rewritten()] == [recording]
        assert len(graphs) == 1
    return loops[-1]


@contextlib.contextmanager
def recorded(name: str, loops: list[ExpertsLoop]) -> Iterator[str]:
    """The name of an experts backend that does what ``name`` does and keeps what it is given."""

    def record(loop: ExpertsLoop, lifted: Lifted) -> None:
        loops.append(loop)
        lower._REGISTRY[name].lower(loop, lifted)

    with mock.patch.dict(lower._REGISTRY):
        yield moe_rewrite.register_experts_backend(f"recorded_{name}", record).name


def parametrised(cases: dict[str, object]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


# --- the fields ------------------------------------------------------------------------------------------------------


def test_fields():
    loop = rewritten(Experts(plain), *inputs())
    first_line = plain.__code__.co_firstlineno
    file, line = loop.location.rsplit(":", 1)
    assert file == plain.__code__.co_filename
    assert first_line <= int(line) <= first_line + 10
    assert loop.path == ""
    assert loop.experts == (range(NUM_EXPERTS),)
    assert (loop.num_experts, loop.top_k, loop.num_pairs) == (NUM_EXPERTS, TOP_K, TOKENS * TOP_K)
    assert loop.dispatch.shape == (TOKENS, TOP_K)
    assert loop.visited is None
    weights = [tuple(step.args[1].example.shape) for step in loop.matmuls()]
    assert weights == [(HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
    (combine,) = loop.combines
    assert combine.token_axis == 0
    assert loop.accumulator(combine).shape == (TOKENS, HIDDEN)
    assert loop.summary() == "gather > matmul[8 x 6] > silu > matmul[6 x 8] > gather > mul"


def test_printed():
    (report,) = explained(Experts(plain), *inputs())
    text = str(report.loop)
    head, dispatch, *steps = text.splitlines()
    assert head.startswith("experts loop <root> (")
    assert dispatch.strip().startswith("4 experts, top-k of [6, 2] expert ids")
    assert "silu" in "".join(steps)
    assert "] += mul" in steps[-1]


def test_frozen():
    loop = rewritten(Experts(plain), *inputs(), backends=BACKENDS[:1])
    for item, field in ((loop, "path"), (loop.dispatch, "in_range"), (loop.steps[0], "op"), (loop.combines[0], "rows")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item, field, None)


def test_path_of_a_nested_module():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts(plain)}) for _ in range(2)])

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer["experts"](x, ids, weights)
            return x

    loops = explained(Block(), *inputs())
    assert [report.path for report in loops] == ["layers.0.experts", "layers.1.experts"]
    assert [report.loop.path for report in loops if report.loop is not None] == ["layers.0.experts", "layers.1.experts"]


def routed(route: Callable[[Tensor], tuple[Tensor, Tensor]], loop: Callable[..., Tensor] = plain) -> Experts:
    """A module that makes its ids of router scores itself: ``route(scores) -> (weights, ids)``."""

    def forward(m: Experts, x: Tensor, scores: Tensor) -> Tensor:
        weights, ids = route(scores)
        return loop(m, x, ids, weights)

    return Experts(forward)


ROUTES: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], int, bool]] = {
    # name: (route, number of scores, whether the ids are proved to be in range)
    "topk": (lambda scores: scores.softmax(-1).topk(TOP_K), NUM_EXPERTS, True),
    "torch.topk": (lambda scores: torch.topk(scores, TOP_K, dim=-1, sorted=False), NUM_EXPERTS, True),
    "fewer scores than experts": (lambda scores: scores.topk(TOP_K), NUM_EXPERTS - 1, True),
    "sort": (lambda scores: tuple(t[:, :TOP_K] for t in scores.sort(-1, descending=True)), NUM_EXPERTS, False),
    "argmax": (lambda scores: (scores, scores.argmax(-1, keepdim=True)), NUM_EXPERTS, True),
}


@parametrised(ROUTES)
def test_whether_ids_are_in_range(case):
    route, num_scores, in_range = case
    module = routed(route)
    args = inputs()[0], torch.randn(TOKENS, num_scores, dtype=torch.float64)
    dispatch = rewritten(module, *args).dispatch
    assert dispatch.in_range == in_range
    assert str(dispatch).endswith("some may be of no expert here") != in_range


def test_more_scores_than_experts_are_not_in_range():
    """Ids past the last expert: one_hot has a class for them, the loop skips it."""
    module = routed(lambda scores: scores.topk(TOP_K), sentinel)
    args = inputs()[0], torch.randn(TOKENS, NUM_EXPERTS + 1, dtype=torch.float64)
    loop = rewritten(module, *args)
    assert not loop.dispatch.in_range
    assert loop.experts == (range(NUM_EXPERTS),)


@pytest.mark.parametrize("mask", ["int32 ids", "int32 ids and back"])
def test_ids_that_fit_are_in_range_after_a_cast(mask):
    module = routed(lambda scores: scores.topk(TOP_K), over(mask=MASKS[mask]).loop)
    args = inputs()[0], torch.randn(TOKENS, NUM_EXPERTS, dtype=torch.float64)
    assert rewritten(module, *args, backends=BACKENDS[:1]).dispatch.in_range


def test_ids_that_are_given_are_not_in_range():
    assert not rewritten(Experts(plain), *inputs(), backends=BACKENDS[:1]).dispatch.in_range


# --- spellings -------------------------------------------------------------------------------------------------------


def over(
    *,
    mask: Callable[[Tensor], Tensor] = lambda ids: F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0),
    visited: Callable[[Tensor], Tensor] = hits,
    select: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] = lambda ids, mask, e: torch.where(mask[e])[::-1],
) -> Experts:
    """The plain loop with one part of it spelt otherwise: ``select(ids, mask, expert) -> (token, slot)``."""

    def loop(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, members = torch.zeros_like(x), mask(ids)
        experts = visited(members)
        is_column = experts.dim() == 2
        for expert in experts:
            if is_column:
                expert = expert[0]
            token, slot = select(ids, members, expert)
            out.index_add_(0, token, m.expert(x[token], expert) * weights[token, slot, None])
        return out

    return Experts(loop)


def check_spelling(module: Experts, *, visits_every_expert_hit: bool = True) -> None:
    """One experts backend will do: what another would be given is the same."""
    loop = rewritten(module, *inputs(), backends=("grouped_mm",))
    assert (loop.visited is None) == visits_every_expert_hit


def _experts() -> Tensor:
    return torch.arange(NUM_EXPERTS)


def _one_hot(ids: Tensor) -> Tensor:
    return F.one_hot(ids, NUM_EXPERTS)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {  # [E, K, T]
    "permute": lambda ids: _one_hot(ids).permute(2, 1, 0),
    "class of no expert": lambda ids: F.one_hot(ids, NUM_EXPERTS + 1).permute(2, 1, 0),
    "transpose": lambda ids: _one_hot(ids).transpose(0, 2),
    "swapaxes": lambda ids: _one_hot(ids).swapaxes(0, -1),
    "mT": lambda ids: _one_hot(ids).permute(2, 0, 1).mT,
    "movedim": lambda ids: _one_hot(ids).movedim(-1, 0).transpose(1, 2),
    "einsum": lambda ids: torch.einsum("tke->ekt", _one_hot(ids)),
    "contiguous": lambda ids: _one_hot(ids).permute(2, 1, 0).contiguous(),
    "bool": lambda ids: _one_hot(ids).permute(2, 1, 0).bool(),
    "to(bool)": lambda ids: _one_hot(ids).to(torch.bool).permute(2, 1, 0),
    "int32": lambda ids: _one_hot(ids).permute(2, 1, 0).int(),
    "> 0": lambda ids: _one_hot(ids).permute(2, 1, 0) > 0,
    "!= 0": lambda ids: _one_hot(ids).permute(2, 1, 0) != 0,
    ">= 1": lambda ids: _one_hot(ids).permute(2, 1, 0) >= 1,
    "== 1": lambda ids: _one_hot(ids).permute(2, 1, 0) == 1,
    "== arange": lambda ids: (ids.unsqueeze(-1) == _experts()).permute(2, 1, 0),
    "arange ==": lambda ids: _experts()[:, None, None] == ids.t(),
    "torch.eq": lambda ids: torch.eq(ids.t()[None], _experts().view(-1, 1, 1)),
    "int32 ids": lambda ids: (ids.int().unsqueeze(-1) == _experts()).permute(2, 1, 0),
    "int32 ids and back": lambda ids: _one_hot(ids.int().long()).permute(2, 1, 0),
}


@parametrised(MASKS)
def test_spellings_of_the_mask(case):
    check_spelling(over(mask=case))


HITS: dict[str, Callable[[Tensor], Tensor]] = {  # mask [E, K, T] -> [u] or [u, 1]
    "sum, greater": lambda mask: mask.sum(dim=(-1, -2)).greater(0).nonzero(),
    "torch.greater": lambda mask: torch.greater(mask.sum((1, 2)), 0).nonzero(),
    "squeeze": lambda mask: (mask.sum((-1, -2)) > 0).nonzero().squeeze(-1),
    "first column": lambda mask: (mask.sum((-1, -2)) > 0).nonzero()[:, 0],
    "flatten": lambda mask: (mask.sum((-1, -2)) > 0).nonzero().flatten(),
    "view": lambda mask: (mask.sum((-1, -2)) > 0).nonzero().view(-1),
    "counts": lambda mask: mask.sum((-1, -2)).nonzero(),
    "!= 0": lambda mask: (mask.sum((-1, -2)) != 0).nonzero(),
    ">= 1": lambda mask: (mask.sum((-1, -2)) >= 1).nonzero(),
    "bool": lambda mask: mask.sum((-1, -2)).bool().nonzero(),
    "as_tuple": lambda mask: mask.sum((-1, -2)).nonzero(as_tuple=True)[0],
    "where": lambda mask: torch.where(mask.sum((-1, -2)) > 0)[0],
    "argwhere": lambda mask: torch.argwhere(mask.sum((-1, -2)) > 0),
    "any": lambda mask: mask.bool().any(dim=(-1, -2)).nonzero(),
    "summed twice": lambda mask: mask.sum(-1).sum(-1).gt(0).nonzero(),
    "any twice": lambda mask: mask.bool().any(-1).any(-1).nonzero(),
    "amax": lambda mask: mask.amax((-1, -2)).nonzero(),
    "keepdim": lambda mask: mask.sum((1, 2), keepdim=True).view(-1).nonzero(),
}


@parametrised(HITS)
def test_spellings_of_the_hits(case):
    check_spelling(over(visited=case))


OTHER_HITS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda mask: mask.double().mean((-1, -2)).gt(0).nonzero(),
    "by the first slot alone": lambda mask: mask[:, 0].sum(-1).gt(0).nonzero(),
    "not the last expert": lambda mask: (mask.sum((-1, -2)).gt(0) & (_experts() < NUM_EXPERTS - 1)).nonzero(),
    "all": lambda mask: torch.ones(NUM_EXPERTS, dtype=torch.bool).nonzero(),
}


@parametrised(OTHER_HITS)
def test_hits_that_are_taken_as_they_come(case):
    """What is not proved to be every expert with a row is looked up when the loop runs."""
    check_spelling(over(visited=case), visits_every_expert_hit=False)


SELECTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {  # (token, slot)
    "where": lambda ids, mask, e: torch.where(mask[e])[::-1],
    "nonzero as_tuple": lambda ids, mask, e: mask[e].nonzero(as_tuple=True)[::-1],
    "torch.nonzero": lambda ids, mask, e: torch.nonzero(mask[e], as_tuple=True)[::-1],
    "unbind": lambda ids, mask, e: mask[e].nonzero().unbind(1)[::-1],
    "columns": lambda ids, mask, e: (mask[e].nonzero()[:, 1], mask[e].nonzero()[:, 0]),
    "ids == e": lambda ids, mask, e: torch.where(ids == e),
    "e == ids": lambda ids, mask, e: torch.where(e == ids),
    "torch.eq": lambda ids, mask, e: torch.eq(ids, e).nonzero(as_tuple=True),
    "ids.T == e": lambda ids, mask, e: torch.where(ids.T == e)[::-1],
    "> 0": lambda ids, mask, e: torch.where(mask[e] > 0)[::-1],
    "bool": lambda ids, mask, e: torch.where(mask[e].bool())[::-1],
    "squeeze": lambda ids, mask, e: torch.where(mask[e].squeeze(0))[::-1],
    "transposed": lambda ids, mask, e: torch.where(mask[e].t()),
}


@parametrised(SELECTS)
def test_spellings_of_the_selection(case):
    check_spelling(over(select=case))


# --- ids of other shapes ---------------------------------------------------------------------------------------------


def _top_1(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, ids = torch.zeros_like(x), ids[:, 0]
    for expert in _one_hot(ids).sum(0).nonzero().flatten():
        (token,) = torch.where(ids == expert)
        out.index_add_(0, token, m.expert(x[token], expert))
    return out


def _flattened_pairs(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    top_k = ids.shape[1]
    rows, ids = x.repeat_interleave(top_k, 0), ids.flatten()
    out, mask = torch.zeros_like(rows), F.one_hot(ids, NUM_EXPERTS).T
    for expert in mask.sum(-1).nonzero().flatten():
        pair = torch.where(mask[expert])[0]
        out.index_add_(0, pair, m.expert(rows[pair], expert))
    return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


def _three_dimensions(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    batched, batched_ids, batched_weights = (t.view(2, -1, t.shape[-1]) for t in (x, ids, weights))
    out, length = torch.zeros_like(x), batched.shape[1]
    mask = _one_hot(batched_ids).permute(3, 2, 0, 1)
    for expert in mask.sum((1, 2, 3)).nonzero().flatten():
        slot, batch, place = torch.where(mask[expert])
        rows = m.expert(batched[batch, place], expert) * batched_weights[batch, place, slot, None]
        out.index_add_(0, batch * length + place, rows)
    return out


def _index_put(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        out.index_put_((token,), m.expert(x[token], expert[0]), accumulate=True)
    return out


def _two_accumulators(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, total, mask = torch.zeros_like(x), torch.zeros_like(x[:, 0]), m.mask(ids)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        rows = m.expert(x[token], expert[0])
        out.index_add_(0, token, rows)
        total.index_add_(0, token, rows.square().sum(-1) * weights[token, slot])
    return torch.cat([out, total.unsqueeze(-1)], -1)


def _another_mask(m: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Rows by the sign of the hidden states: not by expert ids."""
    out, mask = torch.zeros_like(x), (x[:, :NUM_EXPERTS] > 0).T
    for expert in mask.any(-1).nonzero():
        token = torch.where(mask[expert[0]])[0]
        out.index_add_(0, token, m.expert(x[token], expert[0]))
    return out


SHAPES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], int | None, list[int | None]]] = {
    # name: (loop, shape of the ids, top_k, token axis of each combine)
    "one expert per token": (_top_1, (TOKENS,), None, [0]),
    "flattened pairs": (_flattened_pairs, (TOKENS * TOP_K,), None, [0]),
    "batch, token, slot": (_three_dimensions, (2, TOKENS // 2, TOP_K), None, [None]),
    "index_put_": (_index_put, (TOKENS, TOP_K), TOP_K, [0]),
    "two accumulators": (_two_accumulators, (TOKENS, TOP_K), TOP_K, [0, 0]),
    "another mask": (_another_mask, (TOKENS,), None, [None]),
}


@parametrised(SHAPES)
def test_ids_and_accumulators_of_other_shapes(case):
    forward, shape, top_k, token_axes = case
    loop = rewritten(Experts(forward), *inputs())
    assert (loop.dispatch.shape, loop.top_k) == (shape, top_k)
    assert [combine.token_axis for combine in loop.combines] == token_axes


# --- row programs ----------------------------------------------------------------------------------------------------


def _swiglu(m: Experts, y: Tensor, e: Tensor) -> Tensor:
    gate, up = F.linear(y, m.gate_up[e]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, m.down[e])


def _gpt_oss(m: Experts, y: Tensor, e: Tensor) -> Tensor:
    gate_up = F.linear(y, m.gate_up[e])
    gate, up = gate_up[..., ::2].clamp(max=0.5), gate_up[..., 1::2].clamp(min=-0.5, max=0.5)
    return ((up + 1) * gate * torch.sigmoid(gate * 1.702)) @ m.down_kn[e] + m.bias[e]


def _halves(m: Experts, y: Tensor, e: Tensor) -> Tensor:
    gate_up = F.linear(y, m.gate_up[e])
    return (gate_up[:, :INTERMEDIATE].tanh() * gate_up[:, INTERMEDIATE:]) @ m.down_kn[e]


def _unbound(m: Experts, y: Tensor, e: Tensor) -> Tensor:
    gate, up = F.linear(y, m.gate_up[e]).view(-1, 2, INTERMEDIATE).unbind(1)
    return (gate.sigmoid() * up) @ m.down_kn[e]


def _rms_norm(m: Experts, y: Tensor, e: Tensor) -> Tensor:
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * m.norm[e]


def _activation(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda m, y, e: function(y @ m.up_kn[e]) @ m.down_kn[e]


def _in_place(m: Experts, y: Tensor, e: Tensor) -> Tensor:
    y = F.silu(F.linear(y, m.up[e]), inplace=True)
    y += m.bias_up[e]
    return y.mul_(2).clamp_(max=3) @ m.down_kn[e]


BODIES: dict[str, tuple[Callable[[Experts, Tensor, Tensor], Tensor], int]] = {
    # name: (rows of an expert, number of products with its weights)
    "[E, N, K]": (lambda m, y, e: F.linear(y, m.mix[e]), 1),
    "[E, K, N]": (lambda m, y, e: y @ m.mix[e], 1),
    "transposed weight": (lambda m, y, e: torch.matmul(y, m.mix[e].T), 1),
    "mm": (lambda m, y, e: y.mm(m.mix[e].transpose(0, 1)), 1),
    "flat weight": (lambda m, y, e: F.linear(y, m.up_flat.view(NUM_EXPERTS, -1, HIDDEN)[e]) @ m.down_kn[e], 2),
    "linear with bias": (lambda m, y, e: F.linear(y, m.up[e], m.bias_up[e]) @ m.down_kn[e] + m.bias[e], 2),
    "addmm": (lambda m, y, e: torch.addmm(m.bias[e], y, m.mix[e]), 1),
    "addmm, shared bias": (lambda m, y, e: torch.addmm(m.shared_bias, y, m.mix[e]), 1),
    "matrix of one row": (lambda m, y, e: (y.unsqueeze(1) @ m.mix[e]).squeeze(1), 1),
    "multiply and sum": (lambda m, y, e: (y.unsqueeze(-1) * m.mix[e]).sum(1), 0),
    "slice of the weight": (lambda m, y, e: y @ m.mix[e][:, :INTERMEDIATE] @ m.down_kn[e], 2),
    "computed weight": (lambda m, y, e: y @ (m.mix[e] * m.norm[e] + m.mix[e].T), 1),
    "weight of a product": (lambda m, y, e: y @ (m.lora_a[e] @ m.lora_b[e]) @ m.down_kn[e], 2),
    "tied weights": (lambda m, y, e: F.relu(F.linear(y, m.up[e])) @ m.up[e], 2),
    "three products": (lambda m, y, e: F.silu(F.linear(y, m.up[e])) * (y @ m.up_kn[e]) @ m.down_kn[e], 3),
    "shared product": (lambda m, y, e: F.linear(y, m.base) @ m.down_kn[e], 1),
    "lora": (lambda m, y, e: (F.linear(y, m.base) + y @ m.lora_a[e] @ m.lora_b[e]) @ m.down_kn[e], 3),
    "residual": (lambda m, y, e: y + F.linear(y, m.mix[e]), 1),
    "swiglu": (_swiglu, 2),
    "gpt-oss": (_gpt_oss, 2),
    "halves": (_halves, 2),
    "unbind": (_unbound, 2),
    "glu": (lambda m, y, e: F.glu(F.linear(y, m.gate_up[e])) @ m.down_kn[e], 2),
    "squared relu": (_activation(lambda y: F.relu(y).square()), 2),
    "gelu tanh": (_activation(lambda y: F.gelu(y, approximate="tanh")), 2),
    "softplus": (_activation(F.softplus), 2),
    "mish": (_activation(F.mish), 2),
    "leaky relu": (_activation(lambda y: F.leaky_relu(y, 0.2)), 2),
    "where": (_activation(lambda y: torch.where(y > 0, y, y.exp() - 1)), 2),
    "masked_fill": (_activation(lambda y: y.masked_fill(y < 0, 0.1)), 2),
    "rms norm": (_rms_norm, 0),
    "layer norm": (lambda m, y, e: F.layer_norm(y, (HIDDEN,), m.norm[e], m.bias[e]) @ m.mix[e], 1),
    "shared layer norm": (lambda m, y, e: F.layer_norm(y @ m.mix[e], (HIDDEN,), m.shared_bias), 1),
    "normalize": (lambda m, y, e: F.normalize(y @ m.mix[e], dim=-1), 1),
    "softmax": (lambda m, y, e: (y @ m.mix[e]).softmax(-1), 1),
    "std": (lambda m, y, e: y / (y.std(-1, keepdim=True) + 1), 0),
    "cumsum": (lambda m, y, e: (y @ m.mix[e]).cumsum(1), 1),
    "flip": (lambda m, y, e: (y @ m.mix[e]).flip(-1), 1),
    "sort": (lambda m, y, e: (y @ m.mix[e]).sort(-1).values, 1),
    "number of the expert": (lambda m, y, e: y * m.scale[e].exp(), 0),
    "index of the expert": (lambda m, y, e: y * (e + 1), 0),
    "concatenated": (lambda m, y, e: torch.cat([y, y @ m.up_kn[e]], -1)[:, -HIDDEN:], 1),
    "padded": (lambda m, y, e: F.pad(y @ m.up_kn[e], (1, 1)), 1),
    "zeros": (lambda m, y, e: torch.zeros_like(y) + y @ m.mix[e], 1),
    "addmm with factors": (lambda m, y, e: torch.addmm(m.bias[e], y, m.mix[e], alpha=0.5, beta=-2), 1),
    "matrix times vector": (lambda m, y, e: y * (y @ m.norm[e])[:, None], 1),
    "stack": (lambda m, y, e: torch.stack([y, y @ m.mix[e]], 1).mean(1), 1),
    "repeat": (lambda m, y, e: (y @ m.up_kn[e])[:, :4].repeat(1, 2), 1),
    "index of columns": (lambda m, y, e: (y @ m.mix[e])[:, torch.arange(HIDDEN).flip(0)], 1),
    "log sigmoid": (_activation(F.logsigmoid), 2),
    "prelu": (_activation(lambda y: F.prelu(y, torch.full((1,), 0.3, dtype=y.dtype))), 2),
    "hardswish": (_activation(F.hardswish), 2),
    "reversed difference": (_activation(lambda y: 1 - y), 2),
    "masked_fill with a tensor": (_activation(lambda y: y.masked_fill(y < 0, torch.full((), 0.1, dtype=y.dtype))), 2),
    "changed in place": (_in_place, 2),
    "einsum": (lambda m, y, e: torch.einsum("th,hi->ti", y, m.mix[e]), 1),
    "einsum, transposed": (lambda m, y, e: torch.einsum("th,ih->ti", y, m.mix[e]), 1),
    "bmm": (lambda m, y, e: torch.bmm(y.unsqueeze(0), m.mix[e].unsqueeze(0)).squeeze(0), 1),
    "in front of it one": (lambda m, y, e: (F.linear(y[None], m.mix[e]).softmax(-1) * m.norm[e])[0], 1),
    "viewed as one": (lambda m, y, e: F.silu(F.linear(y.view(1, -1, HIDDEN), m.mix[e])).view(-1, HIDDEN), 1),
    "dropout in eval": (lambda m, y, e: F.dropout(y @ m.mix[e], 0.5, training=False), 1),
}


def body_of(rows: Callable[[Experts, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    @loop_over
    def body(
        m: Experts, x: Tensor, ids: Tensor, weights: Tensor, expert: Tensor, slot: Tensor, token: Tensor
    ) -> Tensor:
        return rows(m, x[token], expert) * weights[token, slot, None]

    return body


@parametrised(BODIES)
def test_row_programs(case):
    rows, matmuls = case
    assert len(list(rewritten(Experts(body_of(rows)), *inputs()).matmuls())) == matmuls


@loop_over
def _reads_by_token(m, x, ids, weights, expert, slot, token):
    return m.expert(x[token] + m.by_token[token], expert)


@loop_over
def _uses_slot_and_token(m, x, ids, weights, expert, slot, token):
    return m.expert(x[token], expert) * (slot + 1)[:, None] / (1 + token.unsqueeze(-1))


@loop_over
def _weights_before_the_product(m, x, ids, weights, expert, slot, token):
    return m.expert(x[token] * weights[token, slot].unsqueeze(-1), expert)


@loop_over
def _reads_with_a_dimension_of_one(m, x, ids, weights, expert, slot, token):
    return m.expert(x[None, token].reshape(-1, HIDDEN), expert) * weights[token, slot, None]


POSITIONS = {
    loop.__name__: loop
    for loop in (_reads_with_a_dimension_of_one, _reads_by_token, _uses_slot_and_token, _weights_before_the_product)
}


@parametrised(POSITIONS)
def test_rows_that_use_their_position(case):
    assert len(rewritten(Experts(case), *inputs()).combines) == 1


def test_rows_in_another_dtype():
    module = Experts(body_of(lambda m, y, e: (y.double() @ m.mix[e].double()).float())).float()
    (product,) = rewritten(module, *inputs(dtype=torch.float32)).matmuls()
    assert product.result.example.dtype == torch.float64


# --- refusals --------------------------------------------------------------------------------------------------------


@loop_over
def _mean_of_the_rows(m, x, ids, weights, expert, slot, token):
    rows = m.expert(x[token], expert)
    return rows - rows.mean(0)


@loop_over
def _softmax_over_rows(m, x, ids, weights, expert, slot, token):
    return m.expert(x[token], expert).softmax(0)


@loop_over
def _rows_reversed(m, x, ids, weights, expert, slot, token):
    return m.expert(x[token], expert).flip(0)


@loop_over
def _rows_with_each_other(m, x, ids, weights, expert, slot, token):
    return (x[token] @ x[token].T) @ x[token]


@loop_over
def _rows_repeated(m, x, ids, weights, expert, slot, token):
    rows = m.expert(x[token], expert)
    return rows.repeat(2, 1)[: token.shape[0]]


@loop_over
def _softmax_over_rows_behind(m, x, ids, weights, expert, slot, token):
    return F.linear(x[None, token], m.weight[expert]).softmax(1)[0]


@loop_over
def _rows_turned(m, x, ids, weights, expert, slot, token):
    return F.linear(x[None, token], m.weight[expert]).expand(2, -1, -1).mean(0)


@loop_over
def _in_place_behind(m, x, ids, weights, expert, slot, token):
    rows = F.linear(x[None, token], m.weight[expert])
    rows += m.bias[expert]
    return rows[0]


@loop_over
def _rows_stacked(m, x, ids, weights, expert, slot, token):
    rows = m.expert(x[token], expert)
    return torch.stack([rows, rows]).mean(0)


@loop_over
def _number_of_rows(m, x, ids, weights, expert, slot, token):
    return m.expert(x[token], expert) / token.shape[0]


@loop_over
def _order_of_the_rows(m, x, ids, weights, expert, slot, token):
    return m.expert(x[token], expert) * torch.arange(token.shape[0]).unsqueeze(-1)


@loop_over
def _random(m, x, ids, weights, expert, slot, token):
    return F.dropout(m.expert(x[token], expert), 0.5, training=True)


@loop_over
def _python_on_values(m, x, ids, weights, expert, slot, token):
    rows = m.expert(x[token], expert)
    return rows if rows.sum() > 0 else -rows


def _reads_the_accumulator(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        out.index_add_(0, token, m.expert(x[token], expert[0]) + 0.5 * out[token])
    return out


def _overwrites(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        out[token] = m.expert(x[token], expert[0])
    return out


def _leaves_early(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        out.index_add_(0, token, m.expert(x[token], expert[0]))
        break
    return out


def _last_iteration(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        rows = m.expert(x[token], expert[0])
        out.index_add_(0, token, rows)
    return out + rows.sum()


def _carried(m, x, ids, weights):
    out, mask, total = torch.zeros_like(x), m.mask(ids), torch.zeros((), dtype=x.dtype)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        rows = m.expert(x[token], expert[0])
        total = total + rows.sum()
        out.index_add_(0, token, rows * total)
    return out


def _rows_among_rows(m, x, ids, weights):
    """Rows of the expert by their sign: not by what is known before there are rows."""
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        token = token[x[token, 0] > 0]
        out.index_add_(0, token, m.expert(x[token], expert[0]))
    return out


def _sizes_that_meet(m, x, ids, weights):
    """Two counts that only run time knows: eager adds as many numbers as there are, or broadcasts one of them."""
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        one, some = weights[0], x[0]  # one of `one` is chosen
        scale = (one.masked_select(one == one.max()) + some.masked_select(some > 0)).sum()
        out.index_add_(0, token, m.expert(x[token], expert[0]) * scale)
    return out


def _nested(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        for other in hits(mask):
            slot, token = torch.where(mask[expert[0]])
            out.index_add_(0, token, m.expert(x[token], other[0]))
    return out


REFUSALS: dict[str, tuple[Callable[..., Tensor], str]] = {  # name: (loop, in the reason)
    "mean of the rows": (_mean_of_the_rows, "`aten.mean.dim` acts along the rows of an expert"),
    "softmax over rows": (_softmax_over_rows, "acts along the rows of an expert"),
    "rows reversed": (_rows_reversed, "`aten.flip.default` acts along the rows of an expert"),
    "rows with each other": (_rows_with_each_other, "the rows of an expert"),
    "rows repeated": (_rows_repeated, "rows"),
    "softmax over rows behind": (_softmax_over_rows_behind, "another dimension than the first"),
    "rows turned": (_rows_turned, "another dimension than the first"),
    "in place behind": (_in_place_behind, "rows are not in the first dimension"),
    "rows stacked": (_rows_stacked, "with each other"),
    "number of rows": (_number_of_rows, "number of rows"),
    "order of the rows": (_order_of_the_rows, "number of rows"),
    "random": (_random, "random numbers in the body"),
    "reads the accumulator": (_reads_the_accumulator, "the body reads the accumulator that it adds to"),
    "overwrites": (_overwrites, "rows are written to positions of which one may come up more than once"),
    "leaves early": (_leaves_early, "left before it is exhausted"),
    "last iteration": (_last_iteration, "local variable `rows` is changed by one iteration and read .* after the loop"),
    "carried": (_carried, "local variable `total` is changed by one iteration and read by the next"),
    "rows among rows": (_rows_among_rows, "reads an expert's rows at other positions"),
    "sizes that meet": (_sizes_that_meet, "a size that only run time knows"),
    "nested": (_nested, "a loop over experts stands inside another one"),
}


def check_runs_as_stock(forward: Callable[..., Tensor]) -> None:
    module, args = Experts(forward), inputs()
    expected = observe(module, module, args, backward=True)
    fast = torch.compile(module, backend="moe_rewrite", options={"inner": "eager"})
    assert_same(observe(fast, module, args, backward=True), expected)


@parametrised(REFUSALS)
def test_refusals(case):
    """With fullgraph the reason and the loop's line are the error; without, it runs as it does with stock Dynamo."""
    forward, reason = case
    fast = torch.compile(Experts(forward), backend="moe_rewrite", fullgraph=True, options={"inner": "eager"})
    ours = rf"moe_rewrite leaves this loop as it is: .*{reason}.*\(/.*/tests/\w+\.py:\d+"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=ours):
        fast(*inputs())
    torch._dynamo.reset()
    check_runs_as_stock(forward)


def _changed_in_place(m, x, ids, weights):
    return plain(m, x, ids.clone().clamp_(min=1), weights)


@parametrised({loop.__name__: loop for loop in (_python_on_values, _changed_in_place)})
def test_runs_rewritten_or_as_stock(case):
    check_runs_as_stock(case)


def test_refusal_is_falsy_and_says_where():
    (report,) = explained(Experts(_overwrites), *inputs())
    refusal = report.refusal
    assert isinstance(refusal, Refusal)
    assert not refusal
    assert report.loop is None
    assert report.experts_backend == "eager"
    assert "come up more than once" in refusal.reason
    assert refusal.location.startswith(f"{__file__}:")
    assert refusal.reason in str(refusal)
    assert refusal.location in str(refusal)


# --- any row program -------------------------------------------------------------------------------------------------


def _narrowed(function: Callable[[Tensor], Tensor], least: int) -> Callable[..., Tensor]:
    return lambda m, y, e, x: function(y) if y.shape[-1] >= least else y


def _rms_normalised(m: Experts, y: Tensor, e: Tensor, x: Tensor) -> Tensor:
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 0.1) * m.norm[e][: y.shape[-1]].exp()


def _gated(y: Tensor) -> Tensor:
    gate, up = y[:, : y.shape[-1] // 2 * 2].chunk(2, dim=-1)
    return gate.sigmoid() * up


def _doubled(m: Experts, y: Tensor, e: Tensor, x: Tensor) -> Tensor:
    return torch.cat([y, y.tanh()], -1)[:, :HIDDEN]


OPERATIONS: dict[str, Callable[[Experts, Tensor, Tensor, Tensor], Tensor]] = {
    # (module, rows, expert, hidden states of the rows) -> rows; at most HIDDEN wide
    "tanh": lambda m, y, e, x: y.tanh(),
    "gelu": lambda m, y, e, x: F.gelu(y),
    "clamp": lambda m, y, e, x: y.clamp(-0.5, 1.5),
    "where": lambda m, y, e, x: torch.where(y > 0, y, 0.1 * y),
    "scale": lambda m, y, e, x: y * m.scale[e],
    "matmul": lambda m, y, e, x: y @ m.mix[e][: y.shape[-1]],
    "narrow matmul": lambda m, y, e, x: y @ m.up_kn[e][: y.shape[-1]],
    "linear": lambda m, y, e, x: F.linear(y, m.mix[e][:, : y.shape[-1]], m.bias[e]),
    "shared matmul": lambda m, y, e, x: F.linear(y, m.base[:, : y.shape[-1]]),
    "bias": lambda m, y, e, x: y + m.bias[e][: y.shape[-1]],
    "shared bias": lambda m, y, e, x: y + m.shared_bias[: y.shape[-1]],
    "residual": lambda m, y, e, x: y + x[:, : y.shape[-1]],
    "rms norm": _rms_normalised,
    "layer norm": lambda m, y, e, x: F.layer_norm(y, y.shape[1:]) * m.norm[e][: y.shape[-1]],
    "softmax": lambda m, y, e, x: y.softmax(-1),
    "gate": _narrowed(_gated, 2),
    "every other": _narrowed(lambda y: y[..., ::2], 4),
    "slice": _narrowed(lambda y: y[:, 1:-1], 4),
    "concat": _doubled,
}


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    names=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=6),
    tokens=st.sampled_from([1, 5]),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_any_row_program(names, tokens, top_k, seed):
    def rows(m: Experts, y: Tensor, e: Tensor) -> Tensor:
        x = y
        for name in names:
            y = OPERATIONS[name](m, y, e, x)
        return F.pad(y, (0, HIDDEN - y.shape[-1]))

    torch._dynamo.reset()
    assert rewritten(Experts(body_of(rows)), *inputs(tokens, top_k, seed=seed)).num_pairs == tokens * top_k
