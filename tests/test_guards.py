"""Loops that are wrong without one condition of a proof, or one of what a replacement looks at.

Each was found by taking that condition away. What has to become of a loop is said beside it: it is rewritten, or left
as it is for a reason; in both cases it does what it does in Python.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import NUM_EXPERTS, Args, Loop, Moe, assert_same, hits, inputs, observe

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
