"""Loops that are wrong without one condition of a proof, or one of what a replacement looks at.

Each was found by taking that condition away. What has to become of a loop is said beside it: it is rewritten, or left
as it is for a reason; in both cases it does what it does in Python.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import HIDDEN, NUM_EXPERTS, TOKENS, Args, Loop, Moe, assert_same, hits, inputs, observe
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_rewrite import fingerprint, lower
from moe_rewrite.lower import digest

REWRITTEN = "-> grouped_mm"


@dataclasses.dataclass(frozen=True)
class Guarded:
    """One loop and what becomes of it.

    Attributes:
        loop: the loop.
        told: what the log says, as a regular expression.
        args: makes its arguments.
        backward: whether its gradients are compared.
    """

    loop: Loop
    told: str
    args: Callable[[], Args]
    backward: bool


GUARDED: dict[str, Guarded] = {}


def guarded(told: str = REWRITTEN, args: Callable[[], Args] = inputs, backward: bool = True) -> Callable[[Loop], Loop]:
    """Registers a loop of which the log says ``told``."""

    def register(loop: Loop) -> Loop:
        GUARDED[loop.__name__] = Guarded(loop, told, args, backward)
        return loop

    return register


def given(ids: Any) -> Callable[[], Args]:
    """Arguments with these ids, ``[T, K]``, and a weight for each."""
    held = torch.tensor(ids)

    def args() -> Args:
        weights = torch.linspace(0.5, 1.5, held.numel(), dtype=torch.float64).view(held.shape)
        return inputs(held.shape[0])[0], held, weights

    return args


def by_slot(ids: Any) -> Callable[[], Args]:
    """The same with ids and weights ``[K, T]``."""

    def args() -> Args:
        x, *rest = given(ids)()
        return x, *(one.t().contiguous() for one in rest)

    return args


WITH_SENTINELS = [[0, 4], [1, 2], [4, 2], [3, 9], [4, 4], [2, 0]]
UNEVEN = [[0, 1], [1, 2], [2, 1], [1, 0], [1, 3], [2, 1]]
TWICE = [[0, 0], [1, 2], [2, 2], [3, 1], [1, 1], [2, 0]]


@pytest.mark.parametrize("name", GUARDED)
def test_guarded(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = GUARDED[name]
    eager, module, args = Moe(case.loop), Moe(case.loop), case.args()
    compiled = torch.compile(module, backend="moe_rewrite", options={"inner": "eager", "experts": "grouped_mm"})
    with torch.set_grad_enabled(case.backward), caplog.at_level(logging.INFO, logger="moe_rewrite"):
        expected = observe(eager, eager, args, case.backward)
        assert_same(observe(compiled, module, args, case.backward), expected)
    assert re.search(case.told, caplog.text), caplog.text


# --- several accumulators, several paths ------------------------------------------------------------------------------


@guarded("one way through the body reads what another one adds to", backward=False)
def writes_on_one_path_and_adds_to_a_view_on_another(m, x, ids, weights):
    out = torch.zeros_like(x)
    view = out[:]
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        if e == 2:
            out[token] = m.expert(x[token], e)
        else:
            view.index_add_(0, token, m.expert(x[token], e))
    return out


@guarded("something besides rows comes of each expert")
def adds_what_the_expert_has_where_there_are_rows(m, x, ids, weights):
    out, aux, mask = torch.zeros_like(x), torch.zeros_like(x), m.mask(ids.clamp(max=2))
    for e in range(NUM_EXPERTS):
        if mask[e].any():
            _slot, token = torch.where(mask[e])
            out.index_add_(0, token, m.expert(x[token], e))
            aux.add_(m.bias[e])
    return out + aux


def entries_written_by_path(first: Callable[..., Any], second: Callable[..., Any], told: str, **fields: Any) -> None:
    """Registers a loop of two paths that write the same entries: ``(ids, index, condition)`` of each."""

    def loop(m, x, ids, weights):
        out = x.new_zeros(*ids.shape, HIDDEN)
        for e in range(NUM_EXPERTS):
            if e % 2 == 0:
                one, at = first(ids)
            else:
                one, at = second(ids)
            found = torch.where(one == e)
            if e % 2 == 0:
                out[at(*found)] = m.expert(x[found[0]], e)
            else:
                out[at(*found)] = m.expert(x[found[0]], e) * 2
        return out

    loop.__name__ = f"{first.__name__}_and_{second.__name__}".replace("__", "_").strip("_")
    guarded(told, backward=False, **fields)(loop)


def _by_ids(ids):
    return ids, lambda token, slot: (token, slot)


def _by_flipped_ids(ids):
    return ids.flip(0), lambda token, slot: (token, slot)


WRITES_WHERE_ANOTHER_DOES = "one way through the body writes where another one does"

entries_written_by_path(_by_ids, _by_ids, REWRITTEN)
entries_written_by_path(_by_ids, _by_flipped_ids, WRITES_WHERE_ANOTHER_DOES)
entries_written_by_path(_by_flipped_ids, _by_ids, WRITES_WHERE_ANOTHER_DOES)


@guarded(WRITES_WHERE_ANOTHER_DOES, given(TWICE), backward=False)
def tokens_written_by_two_paths(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, slot = torch.where(ids == e)
        if e % 2 == 0:
            out[token] = m.expert(x[token], e) * weights[token, slot, None]
        else:
            out[token] = m.expert(x[token], e)
    return out


@guarded(WRITES_WHERE_ANOTHER_DOES, given(TWICE), backward=False)
def tokens_written_anew_by_two_paths(m, x, ids, weights):
    out = torch.zeros_like(x) + 1
    for e in range(NUM_EXPERTS):
        if e % 2 == 0:
            token = torch.where(ids[:, 0] == e)[0]
            out = out.index_put((token,), m.expert(x[token], e))
        else:
            token = torch.where(ids[:, 1] == e)[0]
            out = out.index_put((token,), m.expert(x[token], e))
    return out


@guarded("one way through the body reads what another one adds to")
def one_path_reads_what_another_adds_to(m, x, ids, weights):
    out, seen = torch.zeros_like(x), torch.ones_like(x)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        if e % 2 == 0:
            seen.index_add_(0, token, x[token])
        else:
            out.index_add_(0, token, m.expert(x[token], e) * seen[token])
    return out + seen


@guarded("written to an accumulator that is changed in another way too", backward=False)
def writes_and_adds_to_a_part(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in hits(m.mask(ids)):
        token, slot = torch.where(ids[:, :1] == expert[0])
        y = m.expert(x[token], expert[0])
        out[token] = y * (slot + 2).unsqueeze(-1)
        out[:, 1:].index_add_(0, token, y[:, 1:])
    return out


# --- which experts are visited ----------------------------------------------------------------------------------------


@guarded()
def hits_of_other_ids(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in hits(m.mask(ids.clamp(max=NUM_EXPERTS - 2))):
        token, slot = torch.where(ids == expert[0])
        out.index_add_(0, token, m.expert(x[token], expert[0]) * weights[token, slot, None])
    return out


@guarded()
def hits_of_some_of_the_ids(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in hits(m.mask(ids[:, :1])):
        token, slot = torch.where(ids == expert[0])
        out.index_add_(0, token, m.expert(x[token], expert[0]) * weights[token, slot, None])
    return out


@guarded()
def a_mask_and_an_expert_that_is_passed_over(m, x, ids, weights):
    out, mask = torch.zeros_like(x), x[:, :NUM_EXPERTS].T > 0
    for e in range(NUM_EXPERTS):
        if e == 1:
            continue
        token = torch.where(mask[e])[0]
        out.index_add_(0, token, m.expert(x[token], e))
    return out


@guarded()
def a_mask_and_the_hits_of_another(m, x, ids, weights):
    out, mask = torch.zeros_like(x), x[:, :NUM_EXPERTS].T > 0
    for expert in (x[1, :NUM_EXPERTS] > 0).nonzero():
        token = torch.where(mask[expert[0]])[0]
        out.index_add_(0, token, m.expert(x[token], expert[0]))
    return out


@guarded(args=lambda: (inputs()[0], inputs()[0][:, :NUM_EXPERTS], None))
def a_topk_and_an_expert_that_is_passed_over(m, x, scores, weights):
    out, ids = torch.zeros_like(x), scores.topk(2)[1]
    for e in range(NUM_EXPERTS):
        if e == 1:
            continue
        token, _slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e))
    return out


@guarded(args=lambda: (inputs()[0], inputs()[0][:, :NUM_EXPERTS], None))
def a_topk_and_hits_of_its_first_slot(m, x, scores, weights):
    out, ids = torch.zeros_like(x), scores[:2].topk(1)[1]
    every = scores.topk(2)[1]
    for expert in hits(m.mask(ids)):
        token, _slot = torch.where(every == expert[0])
        out.index_add_(0, token, m.expert(x[token], expert[0]))
    return out


@guarded(args=lambda: (inputs()[0], inputs()[0][:, :NUM_EXPERTS], None))
def a_topk_and_experts_that_a_number_picks(m, x, scores, weights):
    out, ids = torch.zeros_like(x), scores.topk(2)[1]
    for e in range(NUM_EXPERTS):
        if m.scale[e] > 0:
            token, _slot = torch.where(ids == e)
            out.index_add_(0, token, m.expert(x[token], e))
    return out


@guarded("something besides rows comes of each expert")
def adds_what_the_expert_has_if_it_has_rows(m, x, ids, weights):
    out, aux, some = torch.zeros_like(x), torch.zeros_like(x), ids.clamp(max=2)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(some == e)
        if token.numel() > 0:
            out.index_add_(0, token, m.expert(x[token], e))
            aux.add_(m.bias[e])
    return out + aux


@guarded("something besides rows comes of each expert")
def adds_what_the_expert_has_where_it_is_hit(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in hits(m.mask(ids.clamp(max=2))):
        out.add_(m.bias[expert[0]])
    return out


@guarded("something besides rows comes of each expert")
def adds_what_all_experts_have_but_one(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        if e != 1:
            out.add_(m.bias[e])
        out.index_add_(0, token, m.expert(x[token], e))
    return out


@guarded(args=given(UNEVEN))
def asks_for_rows_of_other_ids(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        if not (ids[:, 0] == e).any():
            continue
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e) * weights[token, slot, None])
    return out


@guarded("the truth of more than one value is asked|left as it is", given(UNEVEN))
def asks_whether_there_are_no_rows(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in hits(m.mask(ids.clamp(max=2))):
        token, slot = torch.where(ids == expert[0])
        if token.numel() > 0:
            out.index_add_(0, token, m.expert(x[token], expert[0]) * weights[token, slot, None])
    return out


# --- ids that come up more than once, ids of no expert ----------------------------------------------------------------


@guarded(args=lambda: (*inputs(2)[:1], torch.randn(NUM_EXPERTS, 6, generator=torch.Generator().manual_seed(0)), None))
def slots_of_a_topk_along_the_first_dimension(m, x, scores, weights):
    """``[2, 6]``: a column has an expert once, a row several times."""
    with torch.no_grad():
        ids, out = scores.topk(2, dim=0)[1], torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            token, slot = torch.where(ids == e)
            out[token] += x[token] * (slot + 1).unsqueeze(-1) * m.scale[e]
    return out + 0 * x


@guarded(args=lambda: (*inputs(2)[:1], torch.randn(NUM_EXPERTS, 6, generator=torch.Generator().manual_seed(0)), None))
def one_row_for_slots_of_a_topk_along_the_first_dimension(m, x, scores, weights):
    out, ids = torch.zeros_like(x), scores.topk(2, dim=0)[1]
    for e in range(NUM_EXPERTS):
        token = (ids == e).any(-1).nonzero()[:, 0]
        out.index_add_(0, token, m.expert(x[token], e))
    return out


@guarded(args=given(WITH_SENTINELS), backward=False)
def adds_and_puts_back_with_ids_of_no_expert(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, slot = torch.where(ids == e)
        out[token] = out[token] + m.expert(x[token], e) * weights[token, slot, None]
    return out


@guarded(args=given(WITH_SENTINELS), backward=False)
def writes_with_ids_of_no_expert(m, x, ids, weights):
    out = torch.ones_like(x)
    for e in range(NUM_EXPERTS):
        token, slot = torch.where(ids == e)
        out[token] = m.expert(x[token], e) * weights[token, slot, None]
    return out


@guarded(args=given(TWICE), backward=False)
def writes_with_ids_that_come_up_twice(m, x, ids, weights):
    out = torch.ones_like(x)
    for e in range(NUM_EXPERTS):
        token, slot = torch.where(ids == e)
        out[token] = m.expert(x[token], e) * weights[token, slot, None]
    return out


@guarded(args=by_slot(TWICE), backward=False)
def ids_by_slot_that_come_up_twice(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(ids == e)
        out[token] = out[token] + m.expert(x[token], e) * weights[slot, token, None]
    return out


@guarded(args=by_slot(TWICE))
def one_row_for_ids_by_slot_that_come_up_twice(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token = (ids == e).any(0).nonzero()[:, 0]
        out.index_add_(0, token, m.expert(x[token], e))
    return out


# --- what is known of ids ---------------------------------------------------------------------------------------------


def scored(tokens: int = TOKENS, scores: int = NUM_EXPERTS) -> Callable[[], Args]:
    """Hidden states and scores, some of which are equal when they are rounded down."""

    def args() -> Args:
        made = torch.rand(tokens, scores, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return inputs(tokens)[0], made, None

    return args


def add_and_put_back(m, x, ids):
    """Of the rows of one expert and token, the last is what counts."""
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, slot = torch.where(ids == e)
        out[token] = out[token] + m.expert(x[token], e) * (slot + 1).unsqueeze(-1)
    return out


def add(m, x, ids):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e) * (slot + 1).unsqueeze(-1) * m.scale[e])
    return out


@guarded(args=scored())
def ids_that_were_written_to(m, x, scores, weights):
    ids = scores.topk(2)[1]
    ids.add_(1)
    return add(m, x, ids)


@guarded(args=scored(), backward=False)
def ids_that_were_made_equal(m, x, scores, weights):
    ids = scores.topk(2)[1]
    ids[:, 1] = ids[:, 0]
    return add_and_put_back(m, x, ids)


@guarded(args=scored(), backward=False)
def numbers_of_a_topk_as_ids(m, x, scores, weights):
    return add(m, x, (scores * 7).topk(2)[0].long())


@guarded(args=scored(), backward=False)
def equal_numbers_of_a_topk_as_ids(m, x, scores, weights):
    return add_and_put_back(m, x, (scores * 4).topk(2)[0].long())


@guarded(args=scored(scores=NUM_EXPERTS + 2))
def more_scores_than_experts(m, x, scores, weights):
    return add(m, x, scores.topk(2)[1])


@guarded(args=scored(), backward=False)
def positions_in_all_scores(m, x, scores, weights):
    return add(m, x, scores.argmax().expand(TOKENS, 1))


@guarded(args=scored(), backward=False)
def ids_that_stand_there_twice(m, x, scores, weights):
    ids = scores.topk(2)[1].unsqueeze(-1).expand(-1, -1, 2)
    out = x.new_zeros(*ids.shape[:2], HIDDEN)
    for e in range(NUM_EXPERTS):
        token, slot, again = torch.where(ids == e)
        out[token, slot] = out[token, slot] + m.expert(x[token], e) * (again + 1).unsqueeze(-1)
    return out


@guarded(args=scored(scores=300), backward=False)
def ids_that_a_cast_makes_equal(m, x, scores, weights):
    scores = scores.clone()
    scores[:, 1], scores[:, 257] = 2, 3
    return add_and_put_back(m, x, scores.topk(2)[1].to(torch.uint8))


@guarded(args=given([[0, 2**32 + 1], [1, 2], [2**32 + 2, 2], [3, 2**32], [2**33, 2], [2, 0]]))
def ids_that_a_cast_cuts_off(m, x, ids, weights):
    return add(m, x, ids.int())


@guarded(args=given([[0, 2**32 + 1], [1, 2], [2**32 + 2, 2], [3, 2**32], [2**33, 2], [2, 0]]))
def ids_that_a_cast_would_cut_off(m, x, ids, weights):
    out, mask = torch.zeros_like(x), ids.int().unsqueeze(-1) == torch.arange(NUM_EXPERTS)
    for e in range(NUM_EXPERTS):
        token, slot = torch.where(mask[..., e])
        out.index_add_(0, token, m.expert(x[token], e) * weights[token, slot, None])
    return out


@guarded("cannot hold the number of each expert", given([[0, 9], [1, 252], [3, 255], [4, 5], [7, 2]]))
def bytes_less_the_first_expert(m, x, ids, weights):
    """``ids - 4`` would be 252 for an id of 0."""
    held, scale = ids.to(torch.uint8), torch.linspace(1, 2, 296, dtype=x.dtype)
    out, mask = torch.zeros_like(x), (held.unsqueeze(-1) == torch.arange(300)).permute(2, 1, 0)
    for expert in hits(mask):
        e = expert[0].item()
        if e < 4:
            continue
        slot, token = torch.where(held.t() == e)
        out.index_add_(0, token, x[token] * scale[e - 4] * weights[token, slot, None])
    return out


# --- masks that are nearly "the ids equal the expert" -----------------------------------------------------------------


def of_mask(select: Callable[..., Any], told: str = REWRITTEN, **fields: Any) -> None:
    """Registers a loop over all experts whose rows are at ``select(ids, e)``: tokens, and slots or nothing else."""

    def loop(m, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            found = select(ids, e)
            out.index_add_(0, found[0], m.expert(x[found[0]], e) * (found[-1] + 1).unsqueeze(-1))
        return out

    loop.__name__ = select.__name__
    guarded(told, **fields)(loop)


@of_mask
def numbers_from_one(ids, e):
    return torch.where((ids.unsqueeze(-1) == torch.arange(1, NUM_EXPERTS + 1))[..., e])


@of_mask
def every_other_number(ids, e):
    return torch.where((ids.unsqueeze(-1) == torch.arange(0, 2 * NUM_EXPERTS, 2))[..., e])


@of_mask
def entries_that_are_not_set(ids, e):
    return torch.where(F.one_hot(ids, NUM_EXPERTS)[..., e] == 0)


@of_mask
def entries_above_one(ids, e):
    return torch.where((F.one_hot(ids, NUM_EXPERTS) * 2)[..., e] > 1)


@of_mask
def tokens_with_the_expert_twice(ids, e):
    return torch.where((ids == e).sum(-1) > 1)


def as_many_slots_as_experts() -> Args:
    return inputs(top_k=NUM_EXPERTS)


def _all_but_the_experts_rows(ids, e):
    return torch.where(torch.isin(ids, e, invert=True))


def _slot_of_the_experts_number(ids, e):
    return torch.where(F.one_hot(ids, NUM_EXPERTS)[:, e])


def _number_in_its_own_slot(ids, e):
    return torch.where((ids == torch.arange(NUM_EXPERTS))[:, e])


of_mask(_all_but_the_experts_rows, told="`aten.isin.Tensor_Scalar` of a value that each expert has")
of_mask(_slot_of_the_experts_number, args=as_many_slots_as_experts)
of_mask(_number_in_its_own_slot, args=as_many_slots_as_experts)


def many_on_one_expert() -> Args:
    """256 rows of expert 1, which a byte counts as none, and some of the others."""
    x, ids, weights = inputs(260, top_k=1)
    ids[:256] = 1
    ids[256:] = torch.tensor([[0], [2], [3], [2]])
    return x, ids, weights


def hits_by(count: Callable[..., Any], args: Callable[[], Args], backward: bool = True) -> None:
    """Registers a loop over the positions of ``count(mask)`` that are not 0."""

    def loop(m, x, ids, weights):
        out, mask = torch.zeros_like(x), m.mask(ids)
        for expert in count(mask).nonzero():
            slot, token = torch.where(mask[expert[0]])
            out.index_add_(0, token, m.expert(x[token], expert[0]) * weights[token, slot, None])
        return out

    loop.__name__ = f"hits_{count.__name__.strip('_')}"
    guarded(args=args, backward=backward)(loop)


def _by_a_sum_of_bytes(mask):
    return mask.sum((1, 2), dtype=torch.uint8) > 0


def _by_a_sum_that_is_cast_to_bytes(mask):
    return mask.sum((1, 2)).to(torch.uint8) > 0


def _with_more_than_three_rows(mask):
    return mask.sum((1, 2)) > 3


def _with_an_odd_number_of_rows(mask):
    return mask.sum((1, 2)) % 2 == 1


def _without_rows(mask):
    return mask.sum((1, 2)) == 0


def _with_exactly_one_row(mask):
    return mask.sum((1, 2)) == 1


hits_by(_by_a_sum_of_bytes, many_on_one_expert)
hits_by(_by_a_sum_that_is_cast_to_bytes, many_on_one_expert)
hits_by(_with_more_than_three_rows, given(UNEVEN))
hits_by(_with_an_odd_number_of_rows, given(UNEVEN))
hits_by(_without_rows, given([[0, 1], [1, 0], [0, 2]]), backward=False)
hits_by(_with_exactly_one_row, given(UNEVEN))


@guarded(args=given(UNEVEN))
def passes_over_experts_with_one_row(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        if (ids == e).sum() == 1:
            continue
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e) * weights[token, slot, None])
    return out


@guarded("the body selects rows in two different ways")
def rows_in_two_orders(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        _slot, token = torch.where(mask[e])
        by_token, slot = torch.where(mask[e].t())
        out.index_add_(0, token, m.expert(x[token], e) * weights[by_token, slot, None])
    return out


@guarded("the body selects rows in two different ways")
def rows_of_two_masks(m, x, ids, weights):
    out, one = torch.zeros_like(x), x > 0
    other = one.flip(0)
    for e in range(NUM_EXPERTS):
        token, partner = torch.where(one[:, e])[0], torch.where(other[:, e])[0]
        out.index_add_(0, token, m.expert(x[token], e) + x[partner])
    return out


@guarded("those along neighbouring axes")
def ids_along_an_axis_between(m, x, ids, weights):
    three = torch.stack([ids, ids.flip(0)], dim=-1)
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, column = torch.where((three == e).any(1))
        out.index_add_(0, token, m.expert(x[token], e) * (column + 1).unsqueeze(-1))
    return out


# --- what comes into an accumulator -----------------------------------------------------------------------------------


@guarded("reads the accumulator", backward=False)
def puts_back_what_it_has_read_before(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        before, y = out[token], m.expert(x[token], e)
        out.index_add_(0, token, y * 2)
        out[token] = before + y
    return out


@guarded("reads the accumulator", backward=False)
def reads_one_accumulator_and_writes_another(m, x, ids, weights):
    out, other = torch.zeros_like(x), torch.ones_like(x)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        other[token] = out[token] + m.expert(x[token], e)
        out.index_add_(0, token, x[token])
    return out + other


@guarded("reads the accumulator", backward=False)
def reads_at_other_positions_than_it_writes_at(m, x, ids, weights):
    out = x.new_zeros(TOKENS + 1, HIDDEN)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        out[token + 1] = out[token] + m.expert(x[token], e)
    return out


@guarded("more than once", args=given(TWICE))
def puts_back_and_takes_gradients(m, x, ids, weights):
    return add_and_put_back(m, x, ids)


@guarded("more than once", backward=False)
def puts_back_at_positions_of_its_own_that_come_up_again(m, x, ids, weights):
    out, scores = torch.zeros_like(x), x[:, :NUM_EXPERTS].T
    for expert in hits(m.mask(ids)):
        best = scores[expert[0]].topk(4)[1]
        half = best // 2
        out[half] = out[half] + x[best] * m.scale[expert[0]]
    return out


@guarded()
def slots_first(m, x, ids, weights):
    out = x.new_zeros(ids.shape[1], TOKENS, HIDDEN)
    for e in range(NUM_EXPERTS):
        token, slot = torch.where(ids == e)
        out.index_put_((slot, token), m.expert(x[token], e), accumulate=True)
    return out


@guarded()
def more_places_than_tokens(m, x, ids, weights):
    out = x.new_zeros(TOKENS + 2, HIDDEN)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e))
    return out


@guarded("one position for each row", backward=False)
def some_columns_scattered(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        out.scatter_add_(0, token.unsqueeze(-1).expand(-1, HIDDEN // 2), m.expert(x[token], e))
    return out


@guarded(args=given([[0, 0], [9, 9], [1, 2], [9, 1], [9, 9]]), backward=False)
def minus_zero_where_nothing_is_added(m, x, ids, weights):
    out = torch.zeros_like(x)
    out.neg_()
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        out.index_add_(0, token, m.expert(x[token], e))
    return 1 / out


@guarded("another way too", backward=False)
def adds_to_all_and_writes_a_part(m, x, ids, weights):
    out = x.new_zeros(NUM_EXPERTS, HIDDEN)
    for expert in hits(m.mask(ids)):
        out[expert[0]] = m.bias[expert[0]]
        out += m.bias[expert[0]]
    return out


@guarded("each expert overwrites all that the others wrote|another way", backward=False)
def copies_over_what_the_others_wrote(m, x, ids, weights):
    out = torch.zeros_like(x[0])
    for expert in hits(m.mask(ids)):
        out.copy_(m.bias[expert[0]])
    return out


@guarded("shares its memory with something that the body reads", backward=False)
def reads_a_view_of_the_accumulator(m, x, ids, weights):
    out = torch.ones_like(x)
    seen = out.view(x.shape)
    for expert in hits(m.mask(ids)):
        token, _slot = torch.where(ids == expert[0])
        out.index_add_(0, token, m.expert(x[token], expert[0]) + seen[token])
    return out


@guarded("something else may see")
def rows_changed_under_a_view(m, x, ids, weights):
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        token, _slot = torch.where(ids == e)
        h = x[token] * 2
        first = h[:, :1]
        h.mul_(3)
        out.index_add_(0, token, h * first)
    return out


LEFT_AND_CHANGED = "may be what the loop started from, and is changed in place"


@guarded(LEFT_AND_CHANGED, backward=False)
def start_that_no_number_picks(m, x, ids, weights):
    start = torch.zeros_like(x)
    out = start
    for e in range(NUM_EXPERTS):
        if m.scale[e] > 100:
            token, _slot = torch.where(ids == e)
            out = out.index_add(0, token, m.expert(x[token], e))
    start.add_(1)
    return out


@guarded(LEFT_AND_CHANGED, given([[9, 9], [9, 9]]), backward=False)
def start_that_two_loops_leave(m, x, ids, weights):
    start, mask = torch.zeros_like(x), (ids.unsqueeze(-1) == torch.arange(NUM_EXPERTS)).permute(2, 1, 0)
    out = start
    for expert in hits(mask):
        _slot, token = torch.where(mask[expert[0]])
        out = out.index_add(0, token, m.expert(x[token], expert[0]))
    for expert in hits(mask):
        _slot, token = torch.where(mask[expert[0]])
        out = out.index_add(0, token, m.expert(x[token], expert[0]))
    out.add_(1)
    return start + 1, out


@guarded(
    LEFT_AND_CHANGED, lambda: (*inputs(0)[:1], torch.ones(0, NUM_EXPERTS, dtype=torch.float64), None), backward=False
)
def start_that_no_token_leaves(m, x, scores, weights):
    start, ids = x.new_zeros(TOKENS, HIDDEN), scores.topk(2)[1]
    mask, out = m.mask(ids), start
    for expert in hits(mask):
        _slot, token = torch.where(mask[expert[0]])
        out = out.index_add(0, token, m.expert(x[token], expert[0]))
    start.add_(1)
    return out


@guarded(
    LEFT_AND_CHANGED, lambda: (inputs()[0], torch.eye(NUM_EXPERTS).double()[1].expand(TOKENS, -1), None), backward=False
)
def start_that_the_experts_which_are_hit_leave(m, x, scores, weights):
    start, ids = torch.zeros_like(x), scores.topk(1)[1]
    mask, out = m.mask(ids), start
    for expert in hits(mask):
        if expert[0] == 1:
            continue
        _slot, token = torch.where(mask[expert[0]])
        out = out.index_add(0, token, m.expert(x[token], expert[0]))
    start.add_(1)
    return out


# --- pieces -----------------------------------------------------------------------------------------------------------


@guarded("^$")
def bounds_that_change_after_they_were_read(m, x, ids, weights):
    """The list is read where Python reads it, and nothing is left to be told of."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    rows, ends = x[order // ids.shape[1]], flat.bincount(minlength=NUM_EXPERTS).cumsum(0)
    out, stops = torch.zeros_like(rows), ends.tolist()
    ends.sub_(1)
    for e in range(NUM_EXPERTS):
        start = 0 if e == 0 else stops[e - 1]
        out[start : stops[e]] = m.expert(rows[start : stops[e]], e)
    return torch.zeros_like(x).index_add(0, order // ids.shape[1], out)


def pieces_between(bounds: Callable[..., Any], told: str = REWRITTEN, backward: bool = True) -> None:
    """Registers a loop over pieces from one bound to another, of rows that are sorted by expert."""

    def loop(m, x, ids, weights):
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        rows, counts = x[order // ids.shape[1]], flat.bincount(minlength=NUM_EXPERTS)
        starts, stops = bounds(counts)
        out = torch.zeros_like(rows)
        for e in range(NUM_EXPERTS - 1):
            out[starts[e] : stops[e]] = m.expert(rows[starts[e] : stops[e]], e)
        return torch.zeros_like(x).index_add(0, order // ids.shape[1], out)

    loop.__name__ = bounds.__name__
    guarded(told, given(UNEVEN), backward)(loop)


@pieces_between
def sums_without_the_first(counts):
    stops = counts[1:].cumsum(0)
    return F.pad(stops, (1, 0)), stops


@pieces_between
def sums_after_ones(counts):
    stops = counts.cumsum(0)
    return torch.cat([torch.ones(1, dtype=torch.long), stops]), stops


@pieces_between
def sums_after_a_one(counts):
    stops = counts.cumsum(0)
    return torch.cat([counts.new_tensor([1]), stops]), stops


@pieces_between
def sums_padded_with_a_one(counts):
    stops = counts.cumsum(0)
    return F.pad(stops, (1, 0), value=1), stops


def _sums_padded_at_the_end(counts):
    stops = counts.cumsum(0)
    return F.pad(stops, (0, 1)), stops


pieces_between(_sums_padded_at_the_end, backward=False)


@pieces_between
def sums_less_other_sizes(counts):
    stops = counts.cumsum(0)
    return stops - counts.roll(1), stops


@pieces_between
def sums_of_sums(counts):
    stops = counts.cumsum(0).cumsum(0)
    return F.pad(stops, (1, 0)), stops


@guarded("", given(UNEVEN))
def starts_at_the_end_for_the_first_expert(m, x, ids, weights):
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    rows, ends = x[order // ids.shape[1]], flat.bincount(minlength=NUM_EXPERTS).cumsum(0).tolist()
    out = torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        out[ends[e - 1] : ends[e]] = m.expert(rows[ends[e - 1] : ends[e]], e)
    return torch.zeros_like(x).index_add(0, order // ids.shape[1], out)


@guarded("", given(UNEVEN))
def list_of_all_pieces_but_the_last(m, x, ids, weights):
    flat = ids.flatten()
    rows, found = x[flat.argsort(stable=True) // ids.shape[1]], []
    pieces = rows.split(F.one_hot(flat, NUM_EXPERTS).sum(0).tolist())
    for e in range(NUM_EXPERTS - 1):
        found.append(m.expert(pieces[e], e))
    return x + (torch.cat(found) + 1).sum(0)


def pieces_in_a_list(sizes: Callable[..., Any], scores: int, told: str = "", more: bool = False) -> None:
    """Registers a loop that puts its pieces into a list: how many rows all have is known, or is not."""

    def loop(m, x, scores, weights):
        flat = scores.topk(2)[1].flatten()
        rows, counts, found = x[flat.argsort(stable=True) // 2], sizes(flat).tolist(), []
        rows = torch.cat([rows, x]) if more else rows
        start = 0
        for e in range(NUM_EXPERTS):
            n = counts[e]
            if n == 0:
                continue
            found.append(m.expert(rows[start : start + n], e))
            start += n
        return x + (torch.cat(found) + 1).sum(0)

    loop.__name__ = f"list_{sizes.__name__.strip('_')}{'_and_more' if more else ''}"
    guarded(told, lambda: (inputs()[0], inputs()[0][:, :scores], None))(loop)


def _of_all_rows(flat):
    return flat.bincount(minlength=NUM_EXPERTS)


def _of_the_rows_of_some_ids(flat):
    return flat[3:].bincount(minlength=NUM_EXPERTS)


def _of_the_rows_of_some_experts(flat):
    return flat.bincount(minlength=NUM_EXPERTS + 2)


pieces_in_a_list(_of_all_rows, NUM_EXPERTS, REWRITTEN)
pieces_in_a_list(_of_all_rows, NUM_EXPERTS, more=True)
pieces_in_a_list(_of_the_rows_of_some_ids, NUM_EXPERTS)
pieces_in_a_list(_of_the_rows_of_some_experts, NUM_EXPERTS + 2)


# --- what is looked at besides ----------------------------------------------------------------------------------------


def test_digest_is_of_every_file() -> None:
    """Kernels stand in a folder of their own."""
    folder = Path(digest.__file__).parent
    names = [str(Path(str(source)).relative_to(folder)) for source in digest._sources(files(lower))]
    assert sorted(names) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    assert any(len(Path(name).parts) > 1 for name in names)


@pytest.mark.parametrize("most", [4, 5])
def test_sizes_of_run_time_with_other_bounds_are_others(most: int) -> None:
    """What is traced may ask for them, and then it is other code: a branch for at most four experts."""
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        keys = []
        for bound in (4, most):
            size = shape_env.create_unbacked_symint()
            torch._check(size >= 0)
            torch._check(size <= bound)
            node = fx.Graph().placeholder("x")
            node.meta["example_value"] = torch.empty(size, 2)
            keys.append(fingerprint.of_inputs([node]))
    assert (keys[0] == keys[1]) is (most == 4)
