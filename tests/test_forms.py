"""The forms of experts loops that are understood besides the plain one, each with what it is easily taken for.

Every loop that is accepted runs, with both experts backends, to the same as the loop in Python: results, gradients and
side effects, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import HIDDEN, NUM_EXPERTS, TOKENS, TOP_K, Moe, assert_same, inputs, observe
from rolled import Compiled, Python, Rolled, compiled
from torch import Tensor

from moe_rewrite import markers
from moe_rewrite.loop import EveryToken, ExpertsLoop, MaskDispatch, TopKDispatch

BACKENDS = ("batched_mm", "grouped_mm")
Form = Callable[..., Any]
"""``form(m, loop, x, ids, weights)``: a loop, or several, by the methods of :class:`Python`."""


class Experts(Moe):
    """A module whose loops are run by ``loops``."""

    def __init__(self, form: Form, loops: type[Python]) -> None:
        super().__init__(form)
        self.loops = loops

    def forward(self, *args: Any) -> Any:
        return self.loop(self, self.loops(self.num_experts), *args)


def given_twice() -> tuple[Tensor, ...]:
    """Ids with the same expert twice in a token."""
    x, ids, weights = inputs()
    ids = torch.randint(0, NUM_EXPERTS, ids.shape, generator=torch.Generator().manual_seed(3))
    ids[0] = 2
    return x, ids, weights


def one_expert_idle() -> tuple[Tensor, ...]:
    x, ids, weights = inputs()
    return x, ids.clamp(max=NUM_EXPERTS - 2), weights


ROUTINGS = {"top-k": inputs, "an expert twice in a token": given_twice, "one expert idle": one_expert_idle}


def check(form: Form, args: tuple[Tensor, ...], backend: str, backward: bool = True) -> ExpertsLoop:
    """The last loop of ``form``, which runs to the same rewritten as in Python."""
    module = Experts(form, Python)
    expected = observe(module, module, args, backward)
    module, compiler = Experts(form, Rolled), Compiled(backend)
    with torch.set_grad_enabled(backward):
        assert_same(observe(compiled(module, compiler), module, args, backward), expected)
    return compiler.loops[-1]


def routed(m: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Routing weights and ids by the scores of some of the parameters."""
    weights, ids = (x @ m.weight[0][:, :NUM_EXPERTS]).softmax(-1).topk(TOP_K)
    return weights, ids


def _adds(m, loop, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)

    def body(e):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, m.expert(x[token], e) * weights[token, slot, None])

    loop.each(body)
    return out


def _asks_for_rows(m, loop, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)

    def body(e):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, m.expert(x[token], e) * weights[token, slot, None])

    loop.each_with_rows(body, lambda e: torch.where(mask[e])[0])
    return out


def _adds_back(m, loop, x, ids, weights):
    """``out[token] += rows``, for ids that are known to differ within a token."""
    out, (weights, ids) = torch.zeros_like(x), routed(m, x)

    def body(e):
        token, slot = torch.where(ids == e)
        out[token] += m.expert(x[token], e) * weights[token, slot, None]

    loop.each(body)
    return out


def _adds_back_by_pair(m, loop, x, ids, weights):
    out, (weights, ids) = torch.zeros_like(x), routed(m, x)
    flat, flat_weights = ids.flatten(), weights.flatten()

    def body(e):
        pair = (flat == e).nonzero().squeeze(-1)
        token = pair // TOP_K
        out[token] = out[token] + m.expert(x[token], e) * flat_weights[pair, None]

    loop.each(body)
    return out


def _writes_pairs(m, loop, x, ids, weights):
    flat, rows = ids.view(-1), x.repeat_interleave(TOP_K, 0)
    out = torch.empty_like(rows)

    def body(e):
        mask = flat == e
        out[mask] = m.expert(rows[mask], e)

    loop.each(body)
    return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


def _once_a_token(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        mask = (ids == e).any(-1)
        out[mask] += m.expert(x[mask], e) * (weights * (ids == e)).sum(-1)[mask][:, None]

    loop.each(body)
    return out


def _once_a_token_by_count(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        token = ((ids == e).sum(-1) > 0).nonzero()[:, 0]
        out.index_add_(0, token, m.expert(x[token], e) * (weights * (ids == e)).sum(-1)[token, None])

    loop.each(body)
    return out


def _any_mask(m, loop, x, ids, weights):
    out, mask = torch.zeros_like(x), (x[:, :NUM_EXPERTS] > 0).T

    def body(e):
        token = torch.where(mask[e])[0]
        out.index_add_(0, token, m.expert(x[token], e))

    loop.each(body)
    return out


def _threshold(m, loop, x, ids, weights):
    """A mask of two dimensions, indexed by both."""
    out, scores = torch.zeros_like(x).view(2, -1, HIDDEN), x.view(2, -1, HIDDEN)
    batched = x.view(2, -1, HIDDEN)

    def body(e):
        mask = scores.select(2, e) > 0.2
        out[mask] += m.expert(batched[mask], e) * scores.select(2, e)[mask].unsqueeze(-1)

    loop.each(body)
    return out


def _overwrites_by_mask(m, loop, x, ids, weights):
    """A token goes to several experts, and the largest writes last."""
    out, mask = x.clone(), (x[:, :NUM_EXPERTS] > 0).T

    def body(e):
        out[mask[e]] = m.expert(x[mask[e]], e)

    loop.each(body)
    return out


def _overwrites(m, loop, x, ids, weights):
    out, (weights, ids) = x.clone(), routed(m, x)

    def body(e):
        token, slot = torch.where(ids == e)
        out[token] = m.expert(x[token], e) * weights[token, slot, None]

    loop.each(body)
    return out


def _two_columns(m, loop, x, ids, weights):
    out, batched, batched_ids = (t.view(2, -1, t.shape[-1]) for t in (torch.zeros_like(x), x, ids))

    def body(e):
        batch, place, slot = torch.where(batched_ids == e)
        out.index_put_((batch, place), m.expert(batched[batch, place], e), accumulate=True)

    loop.each(body)
    return out


def _scatters(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        token, slot = torch.where(ids == e)
        out.scatter_add_(0, token[:, None].expand(-1, HIDDEN), m.expert(x[token], e))

    loop.each(body)
    return out


def _with_a_factor(m, loop, x, ids, weights):
    out = torch.ones_like(x)

    def body(e):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e), alpha=-0.5)

    loop.each(body)
    return out


def _every_token(m, loop, x, ids, weights):
    def body(e, out):
        return out + m.expert(x, e) * (weights * (ids == e)).sum(-1, keepdim=True)

    return loop.carry(body, torch.zeros_like(x))


def _every_token_in_place(m, loop, x, ids, weights):
    out, scores = torch.zeros_like(x), x.softmax(-1)

    def body(e):
        out.add_(m.expert(x, e) * scores.select(1, e)[:, None])

    loop.each(body)
    return out


def _in_place_on_what_is_carried(m, loop, x, ids, weights):
    out = torch.zeros_like(x)
    other = out  # sees what is added

    def body(e, out):
        out += m.expert(x, e)
        return out

    return loop.carry(body, out), other


def _carried(m, loop, x, ids, weights):
    mask = m.mask(ids)

    def body(e, out):
        slot, token = torch.where(mask[e])
        return out.index_add(0, token, m.expert(x[token], e) * weights[token, slot, None])

    start = torch.ones_like(x)
    return loop.carry(body, start), start


def _left_as_it_is(m, loop, x, ids, weights):
    return loop.carry(lambda e, out: out, x * 2)


def _stacked(m, loop, x, ids, weights):
    stacked = loop.stack(lambda e: m.expert(x, e))
    return torch.einsum("ete,eth->th", m.pairwise.unsqueeze(1).expand(-1, TOKENS, -1), stacked)


def _parts(m, loop, x, ids, weights):
    out = x.new_empty(TOKENS, NUM_EXPERTS, HIDDEN)

    def body(e):
        out.select(1, e).copy_(m.expert(x, e))

    loop.each(body)
    return (out * 2).sum(1)


def _parts_added(m, loop, x, ids, weights):
    out = x.unsqueeze(0).repeat(NUM_EXPERTS, 1, 1)

    def body(e):
        out[e] += m.expert(x, e)

    loop.each(body)
    return out


def _experts_choose(m, loop, x, ids, weights):
    out, scores = torch.zeros_like(x), x @ m.weight[0][:, :NUM_EXPERTS]

    def body(e):
        gate, token = scores.select(1, e).topk(2)
        out.index_add_(0, token, m.expert(x[token], e) * gate[:, None])

    loop.each(body)
    return out


def _experts_choose_and_add_back(m, loop, x, ids, weights):
    out, scores = torch.zeros_like(x), x @ m.weight[0][:, :NUM_EXPERTS]

    def body(e):
        gate, token = scores.select(1, e).topk(2)
        out[token] += m.expert(x[token], e) * gate[:, None]

    loop.each(body)
    return out


def _once_a_token_written(m, loop, x, ids, weights):
    out = x * 2

    def body(e):
        mask = (ids == e).any(1)
        out[mask] = m.expert(x[mask], e)

    loop.each(body)
    return out


def _ids_of_each_expert(m, loop, x, ids, weights):
    """What is compared with the expert's number is another tensor for each expert."""
    out, numbers = torch.zeros_like(x), torch.arange(NUM_EXPERTS * TOKENS, device=x.device)
    table = numbers.view(NUM_EXPERTS, TOKENS) % 3

    def body(e):
        token = torch.where(table[e] == e)[0]
        out.index_add_(0, token, m.expert(x[token], e))

    loop.each(body)
    return out


def _if_any(m, loop, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)

    def body(e):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, m.expert(x[token], e) * weights[token, slot, None])

    loop.each_if(lambda e: mask[e].any(), body, lambda e: None)
    return out


def _if_many(m, loop, x, ids, weights):
    """Both ways do something."""
    out, mask = torch.zeros_like(x), m.mask(ids)

    def body(e):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, m.expert(x[token], e) * weights[token, slot, None])

    def other(e):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, x[token])

    loop.each_if(lambda e: mask[e].sum() > 2, body, other)
    return out


def _if_large(m, loop, x, ids, weights):
    """A truth that has nothing to do with rows."""
    out = torch.zeros_like(x)

    def body(e):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e))

    loop.each_if(lambda e: m.scale[e].detach() > 0, body, lambda e: None)
    return out


def _number(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e) * (e + 1))

    loop.each(body)
    return out


TOP_K_FORMS = [
    *(_adds, _asks_for_rows, _adds_back, _adds_back_by_pair, _writes_pairs, _once_a_token, _once_a_token_by_count),
    *(
        _overwrites,
        _once_a_token_written,
        _two_columns,
        _scatters,
        _with_a_factor,
        _carried,
        _if_any,
        _if_many,
        _if_large,
        _number,
    ),
]
MASK_FORMS = [_any_mask, _threshold, _overwrites_by_mask, _ids_of_each_expert]
DENSE_FORMS = [
    *(_every_token, _every_token_in_place, _in_place_on_what_is_carried, _stacked, _parts, _parts_added),
    *(_experts_choose, _experts_choose_and_add_back),
]
FORMS: list[Any] = [
    *(pytest.param(form, TopKDispatch, id=form.__name__) for form in TOP_K_FORMS),
    *(pytest.param(form, MaskDispatch, id=form.__name__) for form in MASK_FORMS),
    *(pytest.param(form, EveryToken, id=form.__name__) for form in DENSE_FORMS),
]
every_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


@pytest.mark.parametrize(("form", "dispatch"), FORMS)
@every_routing
@pytest.mark.parametrize("backend", BACKENDS)
def test_forms(form, dispatch, routing, backend):
    loop = check(form, routing(), backend)
    assert isinstance(loop.dispatch, dispatch)


@pytest.mark.parametrize("form", [form.values[0] for form in FORMS], ids=lambda form: form.__name__)
def test_no_marker_is_left(form):
    compiler = Compiled("grouped_mm")
    compiled(Experts(form, Rolled), compiler)(*inputs())
    called = {node.target for node in compiler.graphs[0].graph.nodes}
    assert not called & {markers.loop_begin, markers.loop_end, markers.carry_out, markers.collect, markers.condition}


def test_unchanged():
    module = Experts(_left_as_it_is, Rolled)
    compiler = Compiled("grouped_mm")
    assert torch.equal(compiled(module, compiler)(*inputs()), inputs()[0] * 2)
    assert compiler.loops == []


# --- ids that may be the same within a token --------------------------------------------------------------------------


def _adds_back_given(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        token, slot = torch.where(ids == e)
        out[token] += m.expert(x[token], e) * weights[token, slot, None]

    loop.each(body)
    return out


def _adds_back_given_by_pair(m, loop, x, ids, weights):
    out, flat, flat_weights = torch.zeros_like(x), ids.flatten(), weights.flatten()

    def body(e):
        (pair,) = torch.where(flat == e)
        token = pair // TOP_K
        out[token] = flat_weights[pair, None] * m.expert(x[token], e) + out[token]

    loop.each(body)
    return out


def _overwrites_given(m, loop, x, ids, weights):
    out = x.clone()

    def body(e):
        token, slot = torch.where(ids == e)
        out[token] = m.expert(x[token], e) * weights[token, slot, None]

    loop.each(body)
    return out


GIVEN = [_adds_back_given, _adds_back_given_by_pair, _overwrites_given]


@pytest.mark.parametrize("form", GIVEN, ids=lambda form: form.__name__)
@every_routing
@pytest.mark.parametrize("backend", BACKENDS)
def test_last_of_the_same_token(form, routing, backend):
    """Of the rows of one expert for one token, the last is what counts."""
    check(form, routing(), backend, backward=False)


# --- refusals --------------------------------------------------------------------------------------------------------


def _for_experts_without_rows(m, loop, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)

    def body(e):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, m.expert(x[token], e))

    loop.each_but_empty(body, lambda e: out.add_(m.bias[e]))
    return out


def _interleaved(m, loop, x, ids, weights):
    """Positions of two dimensions, one after the other."""
    out, mask = torch.zeros_like(x), m.mask(ids)

    def body(e):
        token = mask[e].nonzero().flatten()
        out.index_add_(0, token, m.expert(x[token], e))

    loop.each(body)
    return out


def _carries_what_it_reads(m, loop, x, ids, weights):
    return loop.carry(lambda e, out: out + m.expert(out, e), x * 1)


def _carries_a_product(m, loop, x, ids, weights):
    return loop.carry(lambda e, out: out * m.scale[e], x * 1)


def _carries_another_dtype(m, loop, x, ids, weights):
    return loop.carry(lambda e, out: out + m.expert(x, e), torch.zeros(TOKENS, HIDDEN))


def _reads_elsewhere(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        token, slot = torch.where(ids == e)
        out[token] = out[slot] + m.expert(x[token], e)

    loop.each(body)
    return out


def _reads_in_between(m, loop, x, ids, weights):
    out, (_, ids) = torch.zeros_like(x), routed(m, x)

    def body(e):
        token, slot = torch.where(ids == e)
        out[token] = out[token] + m.expert(out[token], e)

    loop.each(body)
    return out


def _scaled_back(m, loop, x, ids, weights):
    out, (_, ids) = torch.zeros_like(x), routed(m, x)

    def body(e):
        token, slot = torch.where(ids == e)
        out[token] = out[token] * 2 + m.expert(x[token], e)

    loop.each(body)
    return out


def _adds_and_overwrites(m, loop, x, ids, weights):
    out, (_, ids) = torch.zeros_like(x), routed(m, x)

    def body(e):
        token, slot = torch.where(ids == e)
        out[token] = m.expert(x[token], e)
        out.index_add_(0, token, x[token])

    loop.each(body)
    return out


def _puts_back_what_is_old(m, loop, x, ids, weights):
    out, (_, ids) = torch.zeros_like(x), routed(m, x)

    def body(e):
        token, slot = torch.where(ids == e)
        before = out[token]
        out.index_add_(0, token, x[token])
        out[token] = before + m.expert(x[token], e)

    loop.each(body)
    return out


def _for_all_alike(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        token = torch.where(x[:, 0] > 0)[0]
        out.index_add_(0, token, m.expert(x[token], e))

    loop.each(body)
    return out


def _by_values_of_rows(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e))

    loop.each_if(lambda e: x[torch.where(ids == e)[0]].sum() > 0, body, lambda e: None)
    return out


def _every_token_if(m, loop, x, ids, weights):
    out = torch.zeros_like(x)
    loop.each_if(lambda e: (ids == e).any(), lambda e: out.add_(m.expert(x, e)), lambda e: None)
    return out


def _overwrites_all(m, loop, x, ids, weights):
    out = torch.zeros_like(x)
    loop.each(lambda e: out.copy_(m.expert(x, e)))
    return out


def _random(m, loop, x, ids, weights):
    return loop.carry(lambda e, out: out + torch.rand_like(m.bias[e]), torch.zeros_like(x))


def _list_of_rows(m, loop, x, ids, weights):
    return loop.stack(lambda e: m.expert(x[torch.where(ids == e)[0]], e))


def _two_masks(m, loop, x, ids, weights):
    out = torch.zeros_like(x)

    def body(e):
        token = torch.where(x[:, 0] > m.scale[e])[0]
        other = torch.where(x[:, 1] > m.scale[e])[0]
        out.index_add_(0, token, m.expert(x[token], e))
        out.index_add_(0, other, m.expert(x[other], e))

    loop.each(body)
    return out


def _chosen_overwrite(m, loop, x, ids, weights):
    out, scores = torch.zeros_like(x), x @ m.weight[0][:, :NUM_EXPERTS]

    def body(e):
        token = scores.select(1, e).topk(2)[1]
        out[token] = m.expert(x[token], e)

    loop.each(body)
    return out


def _half_of_a_number(m, loop, x, ids, weights):
    return loop.carry(lambda e, out: out + m.expert(x, e) * (e * 0.1), torch.zeros_like(x))


REFUSALS: list[tuple[Form, str]] = [
    (_for_experts_without_rows, "does something for experts without rows"),
    (_interleaved, "number of rows|positions is used as a whole"),
    (_carries_what_it_reads, "reads the accumulator"),
    (_carries_a_product, "reads the accumulator"),
    (_carries_another_dtype, "of another dtype or shape"),
    (_reads_elsewhere, "reads the accumulator"),
    (_reads_in_between, "reads the accumulator"),
    (_scaled_back, "reads the accumulator"),
    (_adds_and_overwrites, "changed in another way too"),
    (_puts_back_what_is_old, "reads the accumulator"),
    (_for_all_alike, "do not depend on the expert"),
    (_by_values_of_rows, "depends on values of rows|acts on all dimensions at once"),
    (_every_token_if, "not every expert is visited in the same way"),
    (_overwrites_all, "each expert overwrites all that the others wrote"),
    (_random, "random numbers in the body"),
    (_list_of_rows, "put into a list"),
    (_two_masks, "in two different ways"),
    (_chosen_overwrite, "one may come up more than once"),
    (_half_of_a_number, "the expert's index as a number"),
    *((form, "one may come up more than once") for form in GIVEN),
]


@pytest.mark.parametrize(("form", "reason"), REFUSALS, ids=[form.__name__ for form, _ in REFUSALS])
def test_refusals(form, reason):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=reason):
        compiled(Experts(form, Rolled), Compiled("grouped_mm"))(*inputs())
