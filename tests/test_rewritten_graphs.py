"""The graph that a loop is rewritten into, and what the pass leaves alone.

The expected graphs are written out for one small loop. To take over a change: ``EXPECTTEST_ACCEPT=1 pytest ...``.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import Graphs, capture, copy_of, readable, targets, unbacked
from torch import Tensor, fx, nn

import moe_rewrite
from moe_rewrite import LoopRefused, MarkerExecutedError

TOKENS, TOP_K, NUM_EXPERTS, HIDDEN = 6, 2, 4, 8
BACKENDS = ("batched_mm", "grouped_mm")
MARKERS = {"moe_rewrite.loop_begin.default", "moe_rewrite.select.default", "moe_rewrite.loop_end.default"}
OF_THE_LOOP_ALONE = {*MARKERS, "one_hot", "permute", "greater", "nonzero", "where", "index_add_"}
OF_UNKNOWN_SIZES = {"aten.sym_size.int", "aten._assert_scalar.default", "ge", "le"}


class Experts(nn.Module):
    """One product and one activation."""

    def forward(self, x: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
        routing_weights, ids = torch.topk(scores, TOP_K)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)
        for expert in mask.sum((-1, -2)).greater(0).nonzero():
            slot, token = torch.where(mask[expert[0]])
            rows = F.silu(x[token] @ weight[expert[0]])
            out.index_add_(0, token, rows * routing_weights[token, slot, None])
        return out


class Block(nn.Module):
    """Two loops with what a model has around them: a residual, statistics, writes into buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Experts(), Experts()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("load", torch.zeros(NUM_EXPERTS))
        self.register_buffer("last", torch.zeros(TOKENS, HIDDEN))

    def forward(self, x: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
        self.calls.add_(1)
        self.load += F.one_hot(scores.topk(TOP_K)[1], NUM_EXPERTS).sum((0, 1))
        x = x + self.first(x, scores, weight)
        self.last[:] = x
        x = x + self.second(x, -scores, weight)
        self.last.mul_(2)
        return x


IN_PLACE_IN_BLOCK = ["add_", "iadd", "setitem", "mul_"]


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (TOKENS, NUM_EXPERTS), (NUM_EXPERTS, HIDDEN, HIDDEN))
    x, scores, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, scores, weight


def rewritten(module: nn.Module, mapping: object, **kwargs: bool) -> fx.GraphModule:
    gm = capture(module, *arguments())
    moe_rewrite.rewrite(gm, mapping, **kwargs)
    return gm


class TestExpectedGraphs(TestCase):
    """``input -> topk -> [the rewritten loop] -> output``."""

    def test_batched_mm(self) -> None:
        self.assertExpectedInline(
            readable(rewritten(Experts(), "batched_mm", fuses=False)),
            """\
topk = topk(l_scores_, 2)
routing_weights = getitem(topk, 0)
ids = getitem(topk, 1)
out = zeros_like(l_x_)
unsqueeze = aten.unsqueeze.default(routing_weights, 2)
view = aten.view.default(ids, [-1])
arange = aten.arange.default(12, device=device(type='cpu'), pin_memory=False)
remainder = aten.remainder.Scalar(arange, 2)
floor_divide = aten.floor_divide.default(arange, 2)
index = aten.index.Tensor(l_x_, [floor_divide])
index_1 = aten.index.Tensor(l_weight_, [view])
unsqueeze_1 = aten.unsqueeze.default(index, 1)
bmm = aten.bmm.default(unsqueeze_1, index_1)
squeeze = aten.squeeze.dim(bmm, 1)
silu = aten.silu.default(squeeze)
index_2 = aten.index.Tensor(unsqueeze, [floor_divide, remainder])
mul_1 = aten.mul.Tensor(silu, index_2)
view_1 = aten.view.default(mul_1, [6, 2, 8])
sum_2 = aten.sum.dim_IntList(view_1, [1])
add_ = aten.add_.Tensor(out, sum_2)
return out""",
        )

    def test_batched_mm_for_a_compiler_that_fuses(self) -> None:
        self.assertExpectedInline(
            readable(rewritten(Experts(), "batched_mm", fuses=True)),
            """\
topk = topk(l_scores_, 2)
routing_weights = getitem(topk, 0)
ids = getitem(topk, 1)
out = zeros_like(l_x_)
unsqueeze = aten.unsqueeze.default(routing_weights, 2)
view = aten.view.default(ids, [-1])
arange = aten.arange.default(12, device=device(type='cpu'), pin_memory=False)
remainder = aten.remainder.Scalar(arange, 2)
floor_divide = aten.floor_divide.default(arange, 2)
index = aten.index.Tensor(l_x_, [floor_divide])
unsqueeze_1 = aten.unsqueeze.default(index, 2)
index_1 = aten.index.Tensor(l_weight_, [view])
mul_1 = aten.mul.Tensor(unsqueeze_1, index_1)
sum_2 = aten.sum.dim_IntList(mul_1, [1])
silu = aten.silu.default(sum_2)
index_2 = aten.index.Tensor(unsqueeze, [floor_divide, remainder])
mul_2 = aten.mul.Tensor(silu, index_2)
view_1 = aten.view.default(mul_2, [6, 2, 8])
sum_3 = aten.sum.dim_IntList(view_1, [1])
add_ = aten.add_.Tensor(out, sum_3)
return out""",
        )

    def test_grouped_mm(self) -> None:
        self.assertExpectedInline(
            readable(rewritten(Experts(), "grouped_mm")),
            """\
topk = topk(l_scores_, 2)
routing_weights = getitem(topk, 0)
ids = getitem(topk, 1)
out = zeros_like(l_x_)
unsqueeze = aten.unsqueeze.default(routing_weights, 2)
view = aten.view.default(ids, [-1])
arange = aten.arange.default(12, device=device(type='cpu'), pin_memory=False)
arange_1 = aten.arange.default(12, device=device(type='cpu'), pin_memory=False)
sort = aten.sort.stable(view, stable=True)
getitem = getitem(sort, 0)
getitem_1 = getitem(sort, 1)
empty_like = aten.empty_like.default(getitem_1, pin_memory=False)
scatter = aten.scatter.src(empty_like, 0, getitem_1, arange_1)
arange_2 = aten.arange.default(4, device=device(type='cpu'), pin_memory=False)
searchsorted = aten.searchsorted.Tensor(getitem, arange_2, out_int32=True, right=True)
index_1 = aten.index.Tensor(arange, [getitem_1])
remainder = aten.remainder.Scalar(index_1, 2)
floor_divide = aten.floor_divide.default(index_1, 2)
index_2 = aten.index.Tensor(l_x_, [floor_divide])
grouped_mm = moe_rewrite.grouped_mm.default(index_2, l_weight_, searchsorted, None)
silu = aten.silu.default(grouped_mm)
index_3 = aten.index.Tensor(unsqueeze, [floor_divide, remainder])
mul_1 = aten.mul.Tensor(silu, index_3)
index_4 = aten.index.Tensor(mul_1, [scatter])
view_1 = aten.view.default(index_4, [6, 2, 8])
sum_2 = aten.sum.dim_IntList(view_1, [1])
add_ = aten.add_.Tensor(out, sum_2)
return out""",
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_present_before_and_gone_after(backend):
    before = capture(Experts(), *arguments())
    after = copy_of(before)
    moe_rewrite.rewrite(after, backend)
    assert set(targets(before)) >= OF_THE_LOOP_ALONE | OF_UNKNOWN_SIZES
    assert not set(targets(after)) & (OF_THE_LOOP_ALONE | OF_UNKNOWN_SIZES)
    assert unbacked(before)
    assert not unbacked(after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_unknown_size_beside_symbolic_ones(backend):
    """Compiled for any number of tokens, sizes are symbols that guards know, and none that only the run will tell."""

    class Owner(Experts):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor, scores: Tensor) -> Tensor:
            return super().forward(x, scores, self.weight)

    x, scores, weight = arguments()
    graphs = Graphs()
    options = {"experts": backend, "inner": graphs}
    torch.compile(Owner(weight), backend="moe_rewrite", fullgraph=True, dynamic=True, options=options)(x, scores)
    (gm,) = graphs
    inputs = gm.graph.find_nodes(op="placeholder")
    assert any(isinstance(node.meta["example_value"], torch.SymInt) for node in inputs)
    assert not unbacked(gm)
    assert not set(targets(gm)) & {*MARKERS, "aten._assert_scalar.default"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("module", [Experts, Block])
def test_idempotent(module, backend):
    gm = capture(module(), *arguments())
    reports = moe_rewrite.rewrite(gm, backend)
    assert len(reports) == len(gm_paths(gm)) == (1 if module is Experts else 2)
    code = gm.code
    assert moe_rewrite.rewrite(gm, backend) == []
    assert gm.code == code


def gm_paths(gm: fx.GraphModule) -> dict[str, str]:
    """The experts backend of each rewritten loop by its path, as the nodes tell it."""
    marks = [node.meta["moe_rewrite"] for node in gm.graph.nodes if "moe_rewrite" in node.meta]
    return {mark["path"]: mark["experts_backend"] for mark in marks}


def test_provenance():
    """Every node that the pass put in, and no other, says which loop it computes and how."""
    gm = capture(Block(), *arguments())
    known = {node.name for node in gm.graph.nodes}
    moe_rewrite.rewrite(gm, {"": "grouped_mm", "second": "batched_mm"})
    assert gm_paths(gm) == {"first": "grouped_mm", "second": "batched_mm"}
    for node in gm.graph.nodes:
        assert ("moe_rewrite" in node.meta) == (node.name not in known), node
        if "moe_rewrite" in node.meta:
            path = node.meta["moe_rewrite"]["path"]
            assert next(reversed(node.meta["nn_module_stack"].values()))[0].endswith(path)
            assert "for expert in" in node.meta["stack_trace"]
            assert "example_value" in node.meta


def test_reports():
    gm = capture(Block(), *arguments())
    first, second = moe_rewrite.rewrite(gm, {"": "grouped_mm", "second": "batched_mm"})
    assert (first.path, second.path) == ("first", "second")
    assert (first.experts_backend, second.experts_backend) == ("grouped_mm", "batched_mm")
    for report in (first, second):
        assert report.refusal is None
        assert "moe_rewrite.loop_begin" in report.before
        assert "moe_rewrite.loop_end" in report.before
        assert "loop_begin" not in report.after
        assert "add_" in report.after


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_path(backend):
    gm = capture(Block(), *arguments())
    mapping = {"": "batched_mm", "model.layers.0.second": backend}
    reports = moe_rewrite.rewrite(gm, mapping, base_path="model.layers.0")
    assert [report.path for report in reports] == ["model.layers.0.first", "model.layers.0.second"]
    assert reports[1].experts_backend == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_in_place_elsewhere_are_kept(backend):
    before = capture(Block(), *arguments())
    after = copy_of(before)
    moe_rewrite.rewrite(after, backend)

    def in_place(gm: fx.GraphModule) -> list[str]:
        return [target for target in targets(gm) if target in IN_PLACE_IN_BLOCK]

    assert in_place(before) == in_place(after) == IN_PLACE_IN_BLOCK


@pytest.mark.parametrize("backend", BACKENDS)
def test_side_effects_elsewhere_happen_once_a_call(backend):
    module, args = Block(), arguments()
    graphs = Graphs()
    options = {"experts": backend, "inner": graphs}
    compiled = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)
    eager = Block()
    for _ in range(2):
        torch.testing.assert_close(compiled(*args), eager(*args))
        torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_loop_shares_with_others_is_kept(backend):
    """The mask also gives the load of each expert."""

    class WithLoad(Experts):
        def forward(self, x: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
            out, ids = super().forward(x, scores, weight), scores.topk(TOP_K)[1]
            mask = F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)
            load, other = mask.sum((-1, -2)), torch.zeros_like(x)
            for expert in load.nonzero():
                token = torch.where(mask[expert[0]])[1]
                other.index_add_(0, token, x[token] @ weight[expert[0]])
            return out + other + load.sum()

    module, args = WithLoad(), arguments()
    gm = rewritten(module, backend)
    assert targets(gm).count("one_hot") == 1
    assert not set(targets(gm)) & (MARKERS | OF_UNKNOWN_SIZES)
    options = {"experts": backend, "inner": "eager"}
    compiled = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)
    torch.testing.assert_close(compiled(*args), module(*args))


def test_graph_without_a_loop():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    gm = capture(module, torch.randn(2, 4))
    code = gm.code
    assert moe_rewrite.rewrite(gm, "grouped_mm") == []
    assert gm.code == code


def test_refused_graph_is_left_as_it_was():
    gm = capture(Block(), *arguments())
    code = gm.code
    with pytest.raises(LoopRefused, match="'eager' is configured for it") as error:
        moe_rewrite.rewrite(gm, {"": "grouped_mm", "second": "eager"})
    assert gm.code == code
    assert [report.refusal is None for report in error.value.reports] == [True, False]
    moe_rewrite.rewrite(gm, "grouped_mm")
    assert gm_paths(gm) == dict.fromkeys(("first", "second"), "grouped_mm")


def test_captured_graph_does_not_run():
    gm = capture(Experts(), *arguments())
    by_name = dict(zip(("L_x_", "L_scores_", "L_weight_"), arguments(), strict=True))
    inputs = [by_name[node.target] for node in gm.graph.find_nodes(op="placeholder")]
    with pytest.raises(MarkerExecutedError, match="reached execution without having been rewritten"):
        gm(*inputs)
    moe_rewrite.rewrite(gm, "grouped_mm")
    torch.testing.assert_close(gm(*inputs)[0], Experts()(*arguments()))
