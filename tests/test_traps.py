"""Loops that look like Mixture-of-Experts loops and mean something else.

Whatever is done with them, the result and every side effect are eager's. A loop that is left as it is says why: in the
log, and with ``fullgraph=True`` in the error, beside the user's own line.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import (
    NUM_EXPERTS,
    Args,
    Body,
    Loop,
    Moe,
    assert_same,
    fresh,
    hits,
    inputs,
    loop_over,
    observe,
    plain,
    sentinel,
)
from torch import Tensor
from torch._dynamo.exc import Unsupported


@dataclasses.dataclass(frozen=True)
class Trap:
    """One loop and what must become of it.

    Attributes:
        loop: the loop.
        reason: a regular expression for why it is left as it is; None where it may be rewritten.
        args: makes its arguments.
    """

    loop: Loop
    reason: str | None = None
    args: Callable[[], Args] = inputs


SIDE_EFFECT = "side effect|Python object|`setattr`"

REFUSED: dict[str, Trap] = {}
CARRIED: dict[str, Loop] = {}
"""Loops that may leave behind what they started from, where nobody sees it."""
RIGHT: dict[str, Trap] = {}


def refused(reason: str, **fields: Any) -> Callable[[Loop], Loop]:
    """Registers a loop that has to be left as it is, for a ``reason``."""

    def register(loop: Loop) -> Loop:
        REFUSED[loop.__name__] = Trap(loop, reason, **fields)
        return loop

    return register


def refused_body(reason: str, **fields: Any) -> Callable[[Body], Loop]:
    """The same for the body of the plain loop."""
    return lambda body: refused(reason, **fields)(loop_over(body))


def right(**fields: Any) -> Callable[[Loop], Loop]:
    """Registers a loop that may be rewritten or not."""

    def register(loop: Loop) -> Loop:
        RIGHT[loop.__name__] = Trap(loop, **fields)
        return loop

    return register


def right_body(**fields: Any) -> Callable[[Body], Loop]:
    return lambda body: right(**fields)(loop_over(body))


def compiled(trap: Trap, module: Moe, own_frame: bool = True, **kwargs: Any) -> Callable[..., Any]:
    """The loop compiled as a frame of its own, or as a function that the module's forward calls."""
    options = {"inner": "eager", "experts": "grouped_mm"}
    if not own_frame:
        return torch.compile(module, backend="moe_rewrite", options=options, **kwargs)
    loop = torch.compile(trap.loop, backend="moe_rewrite", options=options, **kwargs)
    return lambda *args: loop(module, *args)


def expect(trap: Trap) -> tuple[Moe, Any, Args]:
    """A fresh module, and what eager observes with another."""
    args = trap.args()
    eager = Moe(trap.loop)
    return Moe(trap.loop), observe(eager, eager, args), args


# --- the rows of an expert mix ----------------------------------------------------------------------------------------


@refused_body("along the rows")
def mean_over_rows(m, x, ids, weights, expert, slot, token):
    return x[token] - x[token].mean(0)


@refused_body("along the rows")
def softmax_over_rows(m, x, ids, weights, expert, slot, token):
    return x[token].softmax(0)


@refused_body("data-dependent")
def batch_norm(m, x, ids, weights, expert, slot, token):
    return F.batch_norm(x[token], None, None, training=True)


@refused_body("along the rows")
def cumsum_over_rows(m, x, ids, weights, expert, slot, token):
    return x[token].cumsum(0)


@refused_body("along the rows")
def sort_over_rows(m, x, ids, weights, expert, slot, token):
    return x[token].sort(dim=0)[0]


@refused_body("along the rows")
def flip_rows(m, x, ids, weights, expert, slot, token):
    return x[token].flip(0)


@refused_body("all dimensions at once")
def max_of_all_rows(m, x, ids, weights, expert, slot, token):
    return x[token] / x[token].abs().max()


@refused_body("data-dependent")
def roll_rows(m, x, ids, weights, expert, slot, token):
    return x[token].roll(1, 0)


@refused_body("number of rows|along the rows")
def first_row_taken_off(m, x, ids, weights, expert, slot, token):
    return x[token] - x[token][:1]


@refused_body("pairs the rows")
def attention_among_rows(m, x, ids, weights, expert, slot, token):
    rows = x[token]
    return (rows @ rows.T).softmax(-1) @ rows


@refused_body("not known to act on each row alone")
def attention_in_each_row(m, x, ids, weights, expert, slot, token):
    """No random numbers are drawn."""
    heads = x[token].view(-1, 1, 2, 4)
    return F.scaled_dot_product_attention(heads, heads, heads).reshape(-1, 8)


@refused_body("merges or splits the rows")
def flattened_softmax(m, x, ids, weights, expert, slot, token):
    rows = x[token]
    return rows.reshape(-1).softmax(-1).reshape_as(rows)


@refused_body("along the rows")
def rows_reordered(m, x, ids, weights, expert, slot, token):
    return x[token][weights[token, slot].argsort()]


@refused_body("at other positions")
def rows_filtered(m, x, ids, weights, expert, slot, token):
    rows = x[token]
    return rows * rows[weights[token, slot] > 0.3].sum()


# --- how many rows there are ------------------------------------------------------------------------------------------


@refused_body("number of rows")
def divided_by_number_of_rows(m, x, ids, weights, expert, slot, token):
    return x[token] / token.shape[0]


@refused_body("number of rows")
def times_reciprocal_of_number_of_rows(m, x, ids, weights, expert, slot, token):
    return x[token] * (1 / len(token))


@refused_body("number of rows")
def scale_divided_by_number_of_rows(m, x, ids, weights, expert, slot, token):
    return x[token] * (m.scale[expert] / token.numel())


@refused_body("number of rows")
def divided_in_place_by_number_of_rows(m, x, ids, weights, expert, slot, token):
    rows = x[token]
    rows.div_(token.shape[0])
    return rows


@refused_body("number of rows")
def clamped_in_place_by_number_of_rows(m, x, ids, weights, expert, slot, token):
    rows = x[token] * 9
    return rows.clamp_(max=token.shape[0])


@refused_body("data-dependent|number of rows")
def padded_with_number_of_rows(m, x, ids, weights, expert, slot, token):
    return F.pad(x[token][:, :-1], (0, 1), value=token.shape[0])


@refused_body("number of rows")
def column_at_number_of_rows(m, x, ids, weights, expert, slot, token):
    return x[token] * x[token].select(1, token.shape[0]).unsqueeze(1)


@refused_body("data-dependent|number of rows")
def norm_of_number_of_rows(m, x, ids, weights, expert, slot, token):
    return torch.linalg.vector_norm(x[token], ord=token.shape[0], dim=1, keepdim=True) * x[token]


@refused_body("number of rows")
def filled_with_number_of_rows(m, x, ids, weights, expert, slot, token):
    return torch.full_like(x[token], token.shape[0])


@refused_body("number of rows")
def root_of_number_of_rows(m, x, ids, weights, expert, slot, token):
    return x[token] * math.sqrt(token.shape[0])


@refused_body("number of rows")
def rows_counted_off(m, x, ids, weights, expert, slot, token):
    return x[token] * torch.arange(token.shape[0])[:, None]


# --- the accumulator is read while it changes -------------------------------------------------------------------------


def accumulating(make: Callable[..., tuple[Tensor, Tensor]], read: Callable[..., Tensor], name: str) -> Loop:
    """``make(x) -> out, seen``: the accumulator and what ``read(seen, token)`` reads."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, seen = make(x)
        mask = m.mask(ids)
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            out.index_add_(0, token, (x[token] + read(seen, token)) @ m.weight[expert])
        return out

    loop.__name__ = loop.__qualname__ = name
    return loop


def itself(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor, tensor


def idle(tensor: Tensor) -> Tensor:
    return torch.dropout(tensor, p=0.5, train=False)


for _name, _make, _read in (
    ("accumulator_read", lambda x: itself(torch.zeros_like(x)), lambda seen, token: seen[token]),
    ("accumulator_is_view", lambda x: (x.view(-1, x.shape[-1]), x), lambda seen, token: seen[token]),
    ("accumulator_is_contiguous", lambda x: (x.contiguous(), x * 2), lambda seen, token: seen[token]),
    ("accumulator_is_detached", lambda x: (x.detach(), x), lambda seen, token: 0 * seen[token]),
    ("accumulator_is_input", lambda x: (x, x * 1), lambda seen, token: seen[token]),
    ("accumulator_seen_by_view", lambda x: (lambda out: (out, out.view(-1)))(torch.zeros_like(x)), lambda s, t: s[0]),
    ("accumulator_seen_by_base", lambda x: (lambda s: (s.view(-1, 8), s))(x.new_zeros(48)), lambda s, t: s[7]),
    # Dropout that drops nothing gives its input itself; a fake tensor says that it is a copy.
    ("accumulator_is_idle_dropout", lambda x: (F.dropout(x, 0.1, False), x * 1), lambda seen, token: seen[token]),
    ("accumulator_is_dropout_of_none", lambda x: (F.dropout(x.view(-1, 8), 0), x * 1), lambda s, token: s[token]),
    ("accumulator_is_idle_twice", lambda x: (idle(idle(x)[:]), x * 1), lambda seen, token: seen[token]),
    ("accumulator_seen_by_dropout", lambda x: (lambda y: (y, idle(y)))(x * 2), lambda seen, token: seen[token]),
    ("accumulator_seen_beside", lambda x: (lambda y: (idle(y), idle(y)[:]))(x * 2), lambda seen, token: seen[token]),
):
    refused("accumulator")(accumulating(_make, _read, _name))


def frames(make: Callable[[Tensor, int], Tensor], name: str) -> Loop:
    """``make(whole, length)``: the accumulator ``[T, length]`` as windows of one row of numbers."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        whole, mask = x.new_zeros((x.shape[0] + 1) * 8), m.mask(ids)
        out = make(whole, 8)[: x.shape[0]]
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            out.index_add_(0, token, x[token] @ m.weight[expert])
        return whole

    loop.__name__ = loop.__qualname__ = name
    return loop


for _name, _make in (
    ("frames_that_overlap", lambda whole, length: whole.unfold(0, length, length // 2)),
    ("frames_one_entry_apart", lambda whole, length: whole.as_strided((9, length), (1, 1))),
    ("frames_that_overlap_by_one", lambda whole, length: whole.as_strided((7, length), (length - 1, 1))),
):
    refused("entries of the accumulator may lie in the same memory")(frames(_make, _name))
for _name, _make in (
    ("frames_side_by_side", lambda whole, length: whole.unfold(0, length, length)),
    ("frames_transposed", lambda whole, length: whole.view(length, -1).t()),
):
    right()(frames(_make, _name))


@refused("more than once")
def assigned_at_token(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out[token] += x[token] @ m.weight[expert]
    return out


@refused("reads the accumulator that it adds to")
def accumulator_rebound(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out = out.index_add(0, token, x[token] @ m.weight[expert]) * 2
    return out


def carrying(start: Callable[[Tensor], Tensor], after: Callable[..., Any], name: str) -> Loop:
    """``after(start, out, x)`` gives the result. Where no token has an expert, ``out`` is the start itself."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        first = out = start(x)
        mask = ids.t() == torch.arange(m.num_experts)[:, None, None]
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            out = out.index_add(0, token, x[token] @ m.weight[expert])
        return after(first, out, x)

    loop.__name__ = loop.__qualname__ = name
    return loop


def of_no_expert() -> Args:
    x, ids, weights = inputs()
    return x, torch.full_like(ids, NUM_EXPERTS), weights


def own(x: Tensor) -> Tensor:
    return x * 1


for _name, _start, _after in (
    ("result_changed", lambda x: x, lambda start, out, x: out.mul_(2)),
    ("result_changed_by_view", own, lambda start, out, x: (out.view(-1)[3:].zero_(), start * 2)),
    ("result_changed_by_data", own, lambda start, out, x: (out.data.zero_(), start * 2)),
    ("result_changed_by_idle_dropout", own, lambda start, out, x: (idle(out).mul_(2), start * 2)),
    ("result_changed_by_list", own, lambda start, out, x: (torch._foreach_mul_([out], 2), start * 2)),
    ("start_changed", own, lambda start, out, x: (start.mul_(2), out)),
    ("start_changed_by_view", lambda x: own(x)[:], lambda start, out, x: (start.t().mul_(2), out)),
    ("start_changed_by_data", own, lambda start, out, x: (start.data.mul_(2), out * 1)),
    ("start_is_idle_dropout", idle, lambda start, out, x: (x.mul_(2), out * 1)),
):
    refused("is changed in place", args=of_no_expert)(carrying(_start, _after, f"start_is_left_{_name}"))
for _name, _start, _after in (
    ("given", lambda x: x, lambda start, out, x: out),
    ("given_view", lambda x: x[:], lambda start, out, x: (out[1:], out * 2)),
    ("own", own, lambda start, out, x: (start, out)),
):
    refused("both are seen outside", args=of_no_expert)(carrying(_start, _after, f"start_is_left_{_name}"))
for _name, _start, _after in (
    ("not_seen", own, lambda start, out, x: out.mul_(2)),
    ("read", own, lambda start, out, x: out + start),
    ("given_and_read", lambda x: x, lambda start, out, x: out * 2),
    ("changed_before", lambda x: own(x).mul_(3), lambda start, out, x: out + start),
    ("copied", own, lambda start, out, x: (out.clone().mul_(2), start)),
):
    CARRIED[_name] = carrying(_start, _after, f"start_is_left_{_name}")
    right(args=of_no_expert)(CARRIED[_name])


@right()
def start_is_changed_by_one_way(m, x, ids, weights):
    start = out = x * 1
    for expert in range(m.num_experts):
        token, _ = torch.where(ids == expert)
        if expert == 0:
            out = out.index_add_(0, token, x[token] @ m.weight[expert])
        else:
            out = out.index_add(0, token, x[token] @ m.weight[expert])
    return out, start * 2


@right(args=of_no_expert)
def start_is_left_where_none_has_rows(m, x, ids, weights):
    start = out = x * 1
    for expert in range(m.num_experts):
        token, _ = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        out = out.index_add(0, token, x[token] @ m.weight[expert])
    start.mul_(2)
    return out


@right()
def range_always_makes_a_new_tensor(m, x, ids, weights):
    out = x
    for expert in range(m.num_experts):
        token, _ = torch.where(ids == expert)
        out = out.index_add(0, token, x[token] @ m.weight[expert])
    out.mul_(2)
    return out


@right()
def a_hit_always_makes_a_new_tensor(m, x, ids, weights):
    """Ids of ``topk`` are those of experts: some expert is hit."""
    out, ids = x, (x @ m.weight[0][:, : m.num_experts]).topk(2).indices
    mask = m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out = out.index_add(0, token, x[token] @ m.weight[expert])
    return out


@right()
def one_way_reads_what_another_adds(m, x, ids, weights):
    out, second, mask = torch.zeros_like(x), torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        if expert == 0:
            out.index_add_(0, token, x[token] @ m.weight[expert])
        else:
            second.index_add_(0, token, out[token] * 2)
    return out, second


@right()
def one_way_reads_a_view_of_what_another_adds(m, x, ids, weights):
    out, second, mask = torch.zeros_like(x), torch.zeros_like(x), m.mask(ids)
    flat = out.view(-1)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        if expert <= 1:
            out.index_add_(0, token, x[token] @ m.weight[expert])
        else:
            second.index_add_(0, token, x[token] * flat[0])
    return out, second


@right()
def added_with_a_factor(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert], alpha=2)
    return out


@refused("pairs the rows")
def added_in_columns(m, x, ids, weights):
    out, mask = torch.zeros_like(x).T.contiguous(), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(1, token, (x[token] @ m.weight[expert]).T)
    return out


@right(args=lambda: (inputs(tokens=8)[0], torch.arange(8)[:, None], inputs(tokens=8, top_k=1)[2]))
def values_of_lower_rank(m, x, ids, weights):
    """The values of index_put broadcast from the right: with one row for an expert, a number for the whole row."""
    out, mask = x.new_zeros(8, 8), F.one_hot(ids, 8).permute(2, 1, 0)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_put_((token,), x[token].sum(1), accumulate=True)
    return out


@right()
def bool_accumulator(m, x, ids, weights):
    out, mask = torch.zeros(x.shape[0], dtype=torch.bool), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token][:, 0] > 0.5)
    return out


@right()
def int8_accumulator(m, x, ids, weights):
    """Sums that do not fit wrap around."""
    out, mask = torch.full((x.shape[0],), 100, dtype=torch.int8), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, torch.full_like(token, 100, dtype=torch.int8))
    return out


@right()
def accumulator_not_zero(m, x, ids, weights):
    out, mask = x * 3, m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@right()
def accumulator_of_idle_dropout(m, x, ids, weights):
    """What it is a dropout of is seen by nobody else."""
    out, mask = idle(x * 3), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@right()
def accumulator_strided(m, x, ids, weights):
    whole = x.new_zeros(x.shape[0], 16)
    out, mask = whole[:, ::2], m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return whole


@right()
def two_accumulators(m, x, ids, weights):
    out, total, mask = torch.zeros_like(x), x.new_zeros(x.shape[0]), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
        total.index_add_(0, token, weights[token, slot] * (expert + 1))
    return out, total


@right()
def added_twice(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
        out.index_add_(0, token, x[token])
    return out


@right()
def added_by_slot_and_pair(m, x, ids, weights):
    slots, pairs, experts = x.new_zeros(2, 8), x.new_zeros(12, 8), x.new_zeros(NUM_EXPERTS, 8)
    mask = m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        slots.index_add_(0, slot, x[token] @ m.weight[expert])
        pairs.index_add_(0, token * 2 + slot, x[token] @ m.weight[expert])
        experts.index_add_(0, torch.zeros_like(token) + expert, x[token] @ m.weight[expert])
    return slots, pairs, experts


# --- Python remembers what the iterations did -------------------------------------------------------------------------


@refused("`count` is changed by one iteration")
def counter_used_after(m, x, ids, weights):
    out, mask, count = torch.zeros_like(x), m.mask(ids), 0
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        count += 1
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out * count


@refused("`scale` is changed by one iteration")
def changed_for_the_next(m, x, ids, weights):
    out, mask, scale = torch.zeros_like(x), m.mask(ids), 1.0
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert] * scale)
        scale *= 0.5
    return out


@refused("`rows` is changed by one iteration")
def last_rows_used_after(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        rows = x[token] @ m.weight[expert]
        out.index_add_(0, token, rows)
    return out + rows.sum()


@refused("`expert` is changed by one iteration")
def last_expert_used_after(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out * (expert + 1)


@refused("`previous` is changed by one iteration")
def reads_last_iteration(m, x, ids, weights):
    out, mask, previous = torch.zeros_like(x), m.mask(ids), 0
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert] + previous)
        previous = weights[0, 0] * expert
    return out


@refused("a function captures `rows`, which every iteration sets anew")
def rows_in_closure(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert_id = expert[0]
        _, token = torch.where(mask[expert_id])
        rows = x[token]
        out.index_add_(0, token, (lambda weight: rows @ weight)(m.weight[expert_id]))
    return out


@refused("a function captures `count`")
def counter_in_closure(m, x, ids, weights):
    out, mask, count = torch.zeros_like(x), m.mask(ids), 0

    def tick() -> None:
        nonlocal count
        count += 1

    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        tick()
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out * count


@refused("`scale` is changed by one iteration")
def deleted_by_the_first(m, x, ids, weights):
    out, mask, scale = torch.zeros_like(x), m.mask(ids), 2.0
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        try:
            own = scale
            del scale
        except UnboundLocalError:
            own = 1.0
        out.index_add_(0, token, x[token] @ m.weight[expert] * own)
    return out


def appending(use: Callable[[list[Any]], Any], name: str) -> Loop:
    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out, mask, found = torch.zeros_like(x), m.mask(ids), []
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            rows = x[token] @ m.weight[expert]
            out.index_add_(0, token, rows)
            found.append(rows)
        return out, use(found)

    loop.__name__ = loop.__qualname__ = name
    return loop


for _name, _use in (
    ("length_of_list_after", len),
    ("list_concatenated_after", torch.cat),
):
    refused(SIDE_EFFECT)(appending(_use, _name))


@refused("plain `for`|side effect|graph breaks|Python object")
def comprehension(m, x, ids, weights):
    mask = m.mask(ids)
    return torch.stack([(mask[expert].squeeze(0).sum() * m.scale[expert]).sum() for expert in hits(mask)])


@refused("plain `for`")
def generator_counts(m, x, ids, weights):
    return x * sum(1 for expert in hits(m.mask(ids)))


@refused("plain `for`")
def unpacked(m, x, ids, weights):
    first, *rest = hits(m.mask(ids))
    return x * len(rest) + first


def with_effect(effect: Callable[[Moe, Tensor, Tensor, Tensor], Any], name: str) -> Loop:
    """The plain loop with a statement that changes something: ``effect(m, x, expert, token)``."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), m.mask(ids)
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            effect(m, x, expert, token)
            out.index_add_(0, token, x[token] @ m.weight[expert])
        return out

    loop.__name__ = loop.__qualname__ = name
    return loop


def effect(reason: str = SIDE_EFFECT, **fields: Any) -> Callable[[Callable[..., Any]], Loop]:
    """Registers a statement that every iteration executes."""
    return lambda change: refused(reason, **fields)(with_effect(change, change.__name__))


@effect()
def counts_calls(m, x, expert, token):
    m.calls += 1


@effect()
def counts_calls_by_setattr(m, x, expert, token):
    setattr(m, "calls", m.calls + 2)  # noqa: B010


@effect()
def appends_to_attribute(m, x, expert, token):
    m.seen.append(1)


@effect()
def fills_dict(m, x, expert, token):
    m.table["calls"] = m.table.get("calls", 0) + 1


@effect("print")
def prints(m, x, expert, token):
    print("expert")


@effect("one row for each position|[Dd]ata.dependent")
def counts_tokens_in_buffer(m, x, expert, token):
    m.counts[expert] += token.shape[0]


@effect("reads the accumulator")
def counts_in_buffer(m, x, expert, token):
    m.steps.add_(1)


@effect()
def replaces_buffer(m, x, expert, token):
    m.steps = m.steps + 1


@effect("reads the accumulator|[Dd]ata.dependent")
def marks_expert_in_buffer(m, x, expert, token):
    m.counts[expert] = 1


@effect("in place")
def scales_weight(m, x, expert, token):
    with torch.no_grad():
        m.up[expert].mul_(2)


@effect("reads the accumulator")
def scales_rows_of_input(m, x, expert, token):
    x[token] *= 2


@effect("accumulator")
def adds_to_input(m, x, expert, token):
    x.index_add_(0, token, x[token])


@effect("in place")
def moves_index(m, x, expert, token):
    expert.add_(0)


class Counter:
    """A Python object that loops change."""

    calls = 0


COUNTER, CALLS, SEEN, QUEUE = Counter(), 0, [0], collections.deque()


def counting(change: Callable[[], Any], count: Callable[[], Any], name: str) -> Loop:
    """A loop that changes something global, and returns by how much it changed."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out, mask, before = torch.zeros_like(x), m.mask(ids), count()
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            change()
            out.index_add_(0, token, x[token] @ m.weight[expert])
        return out, count() - before

    loop.__name__ = loop.__qualname__ = name
    return loop


def count_global() -> None:
    global CALLS
    CALLS += 1


def count_in_object() -> None:
    COUNTER.calls += 1


def count_in_class() -> None:
    Counter.calls += 1


def append_to_global() -> None:
    SEEN.append(0)


def append_to_queue() -> None:
    QUEUE.append(0)


for _change, _count in (
    (count_global, lambda: CALLS),
    (count_in_object, lambda: COUNTER.calls),
    (count_in_class, lambda: Counter.calls),
    (append_to_global, lambda: len(SEEN)),
    (append_to_queue, lambda: len(QUEUE)),
):
    refused(SIDE_EFFECT)(counting(_change, _count, _change.__name__))


def advancing(make: Callable[[], Iterator[float]], name: str) -> Loop:
    """A loop that takes a number from an iterator in each iteration."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, numbers = torch.zeros_like(x), m.mask(ids), make()
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            out.index_add_(0, token, x[token] @ m.weight[expert] * next(numbers))
        return out

    loop.__name__ = loop.__qualname__ = name
    return loop


def halving() -> Iterator[float]:
    for power in range(20):
        yield 0.5**power


for _name, _numbers in (
    ("next_of_list", lambda: iter([1.0, 2.0, 3.0, 4.0])),
    ("next_of_count", lambda: itertools.count(1)),
    ("next_of_cycle", lambda: itertools.cycle([1.0, 2.0, 3.0])),
    ("next_of_generator", halving),
    ("next_of_range", lambda: iter(range(1, 9))),
    ("next_of_dict", lambda: iter({1.0: 0, 2.0: 0, 3.0: 0, 4.0: 0})),
    ("next_of_values", lambda: iter({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}.values())),
    ("next_of_set", lambda: iter({1, 2, 3, 4})),
):
    refused(f"{SIDE_EFFECT}|iterator")(advancing(_numbers, _name))


# --- how the loop is left, or not a `for` at all ----------------------------------------------------------------------

LEFT_EARLY = "left before it is exhausted"


@refused(LEFT_EARLY)
def break_at_expert(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        if expert == 2:
            break
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@refused(LEFT_EARLY)
def break_after_first(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
        break
    return out


@refused(LEFT_EARLY)
def return_from_loop(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
        if expert >= 1:
            return out * 2
    return out


@refused(LEFT_EARLY)
def for_else(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        if expert == 3:
            break
        out.index_add_(0, token, x[token] @ m.weight[expert])
    else:
        out = out * 2
    return out


@refused(LEFT_EARLY)
def left_by_exception(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    try:
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            if expert == 3:
                raise ValueError
            out.index_add_(0, token, x[token] @ m.weight[expert])
    except ValueError:
        return out * 2
    return out


@refused("left before it is exhausted|[Dd]ata-dependent")
def break_on_data(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        if x[token].sum() > 0:
            break
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@refused("acts on all dimensions|[Dd]ata-dependent")
def continue_on_data(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        if x[token].sum() > 0:
            continue
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@refused("selected among them|not proved")
def continue_without_strong_weights(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        if (weights[token, slot] > 0.4).nonzero().shape[0] == 0:
            continue
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@refused("data-dependent")
def continue_with_few_tokens(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        if token.shape[0] < 3:
            continue
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@right()
def continue_without_tokens(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        if token.numel() == 0:
            continue
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@right()
def continue_without_tokens_where_all_are_visited(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in torch.ones(NUM_EXPERTS).nonzero():
        expert = expert[0]
        _, token = torch.where(mask[expert])
        if token.numel() == 0:
            out = out + 0
            continue
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


def iterated(iterate: Callable[[Tensor], Any], name: str) -> Loop:
    """``iterate(hits)`` gives (anything, expert)."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), m.mask(ids)
        for number, expert in iterate(hits(mask)):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            out.index_add_(0, token, x[token] @ m.weight[expert] * (number + 1))
        return out

    loop.__name__ = loop.__qualname__ = name
    return loop


for _name, _iterate in (
    ("enumerated", enumerate),
    ("zipped", lambda found: zip([2.0, 3.0, 4.0, 5.0], found, strict=False)),
):
    refused("plain `for`")(iterated(_iterate, _name))


@refused("plain `for`")
def while_next(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    left = iter(hits(mask))
    while True:
        expert = next(left, None)
        if expert is None:
            return out
        _, token = torch.where(mask[expert[0]])
        out.index_add_(0, token, x[token] @ m.weight[expert[0]])


@refused("inside another")
def nested(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        for other in hits(mask):
            out.index_add_(0, token, x[token] @ m.weight[expert] * m.scale[other[0]])
    return out


@right()
def repeated(m, x, ids, weights):
    mask = m.mask(ids)
    for scale in (1.0, 0.5):
        out = torch.zeros_like(x)
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            out.index_add_(0, token, x[token] @ m.weight[expert] * scale)
        x = x + out
    return x


@right()
def second_loop_reads_the_first(m, x, ids, weights):
    first, second, mask = torch.zeros_like(x), torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        first.index_add_(0, token, x[token] @ m.weight[expert])
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        second.index_add_(0, token, first[token] @ m.weight[expert])
    return first, second


@right()
def loss_per_class(m, x, ids, weights):
    """A loop over a nonzero that is no Mixture of Experts."""
    labels, loss = ids[:, 0], x.new_zeros(())
    present = (labels[:, None] == torch.arange(NUM_EXPERTS)).any(0)
    for label in present.nonzero():
        loss = loss + F.mse_loss(x[labels == label], m.bias[label].expand(x[labels == label].shape))
    return loss


# --- what the index is asked ------------------------------------------------------------------------------------------


@right_body()
def special_expert(m, x, ids, weights, expert, slot, token):
    return x[token] if expert == 3 else x[token] @ m.weight[expert]


@right_body()
def experts_in_tuple(m, x, ids, weights, expert, slot, token):
    return x[token] if expert in (1, 3) else -x[token]


@right_body()
def experts_in_range(m, x, ids, weights, expert, slot, token):
    return x[token] if 0 < expert < 3 else -x[token]


@right_body()
def expert_number_compared(m, x, ids, weights, expert, slot, token):
    return x[token] if expert.item() == 3 or int(expert) <= 1 else -x[token]


@right_body()
def odd_expert(m, x, ids, weights, expert, slot, token):
    return x[token] if expert % 2 else -x[token]


@right_body()
def true_expert(m, x, ids, weights, expert, slot, token):
    return x[token] if expert else -x[token]


@right_body()
def expert_compared_with_tensor(m, x, ids, weights, expert, slot, token):
    return x[token] if expert == m.counts.sum() else -x[token]


@right_body()
def comparison_inverted(m, x, ids, weights, expert, slot, token):
    return x[token] * ~(expert == 0)


@right_body()
def comparisons_added(m, x, ids, weights, expert, slot, token):
    return x[token] * ((expert < 3) + (expert < 2))


@right_body()
def comparison_as_condition(m, x, ids, weights, expert, slot, token):
    return torch.where(expert == 0, x[token], -x[token])


@right_body()
def comparison_as_number(m, x, ids, weights, expert, slot, token):
    return x[token] * (expert == 0).to(x.dtype)


@right_body()
def comparison_as_mask(m, x, ids, weights, expert, slot, token):
    return x[token].masked_fill(expert == 0, 0.5) * ((expert > 0) & (x[token] > 0))


@right_body()
def comparison_is_tensor(m, x, ids, weights, expert, slot, token):
    return x[token] * (2 if (expert == 0) is True else 3)


@right_body()
def type_of_number(m, x, ids, weights, expert, slot, token):
    return x[token] if isinstance(expert.item(), int) else x[token] * 2


@right_body()
def type_of_index(m, x, ids, weights, expert, slot, token):
    return x[token] if type(expert) is Tensor else x[token] * 2


@right_body()
def index_is_tensor(m, x, ids, weights, expert, slot, token):
    return x[token] if isinstance(expert, Tensor) else x[token] * 2


@right_body()
def number_in_set(m, x, ids, weights, expert, slot, token):
    return x[token] * len({expert.item(), 0})


@right_body()
def number_times_float(m, x, ids, weights, expert, slot, token):
    return x[token] * (expert.item() * 0.1)


@right_body()
def number_divided(m, x, ids, weights, expert, slot, token):
    return x[token] * (expert.item() / 3) + 0.3 ** expert.item()


@right_body()
def number_to_python_functions(m, x, ids, weights, expert, slot, token):
    return x[token] * math.sqrt(expert.item() + 1) + min(expert.item(), 2) + float(expert)


@right_body()
def number_as_string(m, x, ids, weights, expert, slot, token):
    return x[token] * {"0": 1.0, "1": 2.0, "2": 3.0, "3": 4.0}[f"{expert.item()}"]


@refused_body("picks from a dict by `index`")
def number_in_dict(m, x, ids, weights, expert, slot, token):
    return x[token] * {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}[expert.item()]


@refused_body("picks from a list by `index`")
def number_in_list(m, x, ids, weights, expert, slot, token):
    return x[token] * [1.0, 2.0, 3.0, 4.0][expert]


@refused_body("Python needs the value of `index`")
def number_as_range(m, x, ids, weights, expert, slot, token):
    rows = x[token]
    for _ in range(expert.item()):
        rows = rows * 2
    return rows


@right_body()
def number_as_shift(m, x, ids, weights, expert, slot, token):
    return x[token].roll(expert.item(), 1)


@right_body()
def module_of_list(m, x, ids, weights, expert, slot, token):
    return m.experts[expert](x[token]) + m.experts[expert.item()](x[token])


@right_body()
def index_in_arithmetic(m, x, ids, weights, expert, slot, token):
    return x[token] * (expert / 3) + (expert + 1) // 2 - expert**2


# --- what is selected by it -------------------------------------------------------------------------------------------


@right_body()
def expert_before(m, x, ids, weights, expert, slot, token):
    return x[token] * m.bias[expert - 1]


@right_body()
def expert_from_the_end(m, x, ids, weights, expert, slot, token):
    return x[token] * m.bias[-expert]


@right_body()
def slice_of_expert(m, x, ids, weights, expert, slot, token):
    return x[token] * m.bias[expert : expert + 1]


@right_body()
def diagonal(m, x, ids, weights, expert, slot, token):
    return x[token] * m.pairwise[expert, expert]


@right_body()
def row_and_column(m, x, ids, weights, expert, slot, token):
    return x[token] * m.pairwise[expert].sum() + m.pairwise[:, expert].sum() + m.pairwise[..., expert].amax()


@right_body()
def last_dimension_of_three(m, x, ids, weights, expert, slot, token):
    return x[token] @ m.cube[..., expert]


@right_body()
def middle_dimension_of_three(m, x, ids, weights, expert, slot, token):
    return x[token] @ m.cube[:, expert] + x[token] @ m.cube[..., expert, :]


@right_body()
def after_new_dimension(m, x, ids, weights, expert, slot, token):
    return x[token] @ m.cube[None, expert].squeeze(0)


@right_body()
def expert_and_token(m, x, ids, weights, expert, slot, token):
    return x[token] * x.T.contiguous()[expert, token][:, None]


@right_body()
def token_and_expert(m, x, ids, weights, expert, slot, token):
    return x[token] * x[token, expert][:, None]


@right()
def index_keeps_its_dimension(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        _, token = torch.where(mask[expert].squeeze(0))
        out.index_add_(0, token, x[token] * x.T.contiguous()[expert, token][:, None] * m.pairwise[expert, expert])
    return out


@right()
def index_unpacked(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for (expert,) in hits(mask):
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@right(args=lambda: inputs(tokens=2, top_k=2))
def weights_by_the_wrong_axis(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert] * weights[slot, token, None])
    return out


@right(args=lambda: inputs(tokens=4, top_k=4))
def token_and_slot_swapped(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        token, slot = torch.where(mask[expert])
        out.index_add_(0, token, x[slot] @ m.weight[expert] * weights[token, slot, None])
    return out


@right_body(args=lambda: inputs(dtype=torch.float32))
def scale_of_expert_in_another_dtype(m, x, ids, weights, expert, slot, token):
    """A tensor without dimensions does not change the dtype of the rows in eager."""
    return F.linear(F.linear(x[token] * m.scale[expert], m.up[expert].float()), m.down[expert].float())


# --- which rows there are ---------------------------------------------------------------------------------------------


def masked(change: Callable[..., tuple[Tensor, Tensor]], name: str) -> Loop:
    """``change(mask, x, ids, weights) -> hits, mask``: what is iterated, and the mask that selects the rows."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        found, mask = change(m.mask(ids), x, ids, weights)
        for expert in found:
            expert = expert[0] if expert.ndim else expert
            slot, token = torch.where(mask[expert])
            out.index_add_(0, token, x[token] @ m.weight[expert] * weights[token, slot, None])
        return out

    loop.__name__ = loop.__qualname__ = name
    return loop


def within_capacity(mask: Tensor) -> Tensor:
    return mask * (mask.flatten(1).cumsum(1).view_as(mask) <= 2)


def other_mask(x: Tensor) -> Tensor:
    """``[E, K, T]``: another routing."""
    return F.one_hot(x[:, :NUM_EXPERTS].topk(2)[1], NUM_EXPERTS).permute(2, 1, 0)


for _name, _change in (
    ("capacity", lambda mask, x, ids, w: (lambda kept: (hits(kept), kept))(within_capacity(mask))),
    ("capacity_of_rows_alone", lambda mask, x, ids, w: (hits(mask), within_capacity(mask))),
    ("capacity_of_hits_alone", lambda mask, x, ids, w: (hits(within_capacity(mask)), mask)),
    ("strong_weights", lambda mask, x, ids, w: (hits(mask), mask.bool() & (w.t() > 0.4))),
    ("hits_of_strong_weights", lambda mask, x, ids, w: (hits(mask * (w.t() > 0.5)), mask)),
    ("hits_of_other_mask", lambda mask, x, ids, w: (hits(other_mask(x)), mask)),
    ("hits_of_first_slot", lambda mask, x, ids, w: (hits(mask[:, :1]), mask)),
    ("hits_of_some_tokens", lambda mask, x, ids, w: (hits(mask[..., :2]), mask)),
    ("hits_of_positive_states", lambda mask, x, ids, w: ((x[:, :NUM_EXPERTS] > 0.7).long().sum(0).nonzero(), mask)),
    ("hits_of_float_states", lambda mask, x, ids, w: (x[:, :NUM_EXPERTS].relu().amin(0).nonzero(), mask)),
    ("mask_is_inverted", lambda mask, x, ids, w: (hits(mask), 1 - mask)),
    ("mask_is_rolled", lambda mask, x, ids, w: (hits(mask), mask.roll(1, 0))),
    ("mask_is_flipped", lambda mask, x, ids, w: (hits(mask), mask.flip(0))),
    ("mask_of_neighbours", lambda mask, x, ids, w: (hits(mask), mask.roll(1, 2))),
    ("mask_of_larger_ids", lambda mask, x, ids, w: (hits(mask), ids.t() > torch.arange(NUM_EXPERTS)[:, None, None])),
    ("mask_of_equal_ids", lambda mask, x, ids, w: (hits(mask), ids.t() == torch.arange(NUM_EXPERTS)[:, None, None])),
    ("mask_of_reversed_range", lambda mask, x, ids, w: (hits(mask), ids.t() == torch.arange(3, -1, -1)[:, None, None])),
    ("mask_of_stepped_range", lambda mask, x, ids, w: (hits(mask), ids.t() == torch.arange(0, 8, 2)[:, None, None])),
    ("mask_of_moved_ids", lambda mask, x, ids, w: (hits(mask), F.one_hot((ids + 1) % 4, 4).permute(2, 1, 0))),
):
    right()(masked(_change, _name))


@right(args=lambda: inputs(tokens=2, top_k=2))
def mask_of_transposed_ids(m, x, ids, weights):
    """One axis for the other, and the shapes fit."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, m.num_experts).permute(2, 0, 1)
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert] * weights[token, slot, None])
    return out


COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda c: c.nonzero(),
    "none": lambda c: (c * 0).nonzero(),
    "reversed": lambda c: c.nonzero().flip(0),
    "without_first": lambda c: c.nonzero()[1:],
    "without_last": lambda c: c.nonzero()[:-1],
    "first_row": lambda c: c.nonzero()[0],
    "last_row": lambda c: c.nonzero()[-1],
    "squeezed": lambda c: c.nonzero().squeeze(-1),
    "where": lambda c: torch.where(c > 0)[0],
    "as_tuple": lambda c: torch.nonzero(c, as_tuple=True)[0],
    "unique": lambda c: c.nonzero().unique(),
    "twice": lambda c: c.nonzero().repeat(2, 1),
    "clamped": lambda c: c.nonzero().clamp(max=2),
    "times_zero": lambda c: c.nonzero() * 0,
    "more_than_one": lambda c: (c > 1).nonzero(),
    "at_least_zero": lambda c: (c >= 0).nonzero(),
    "fewer_than_three": lambda c: (c < 3).nonzero(),
    "not_hit": lambda c: (c == 0).nonzero(),
    "minus_one": lambda c: (c - 1).nonzero(),
    "half": lambda c: (c // 2).nonzero(),
    "inverted": lambda c: (c > 0).logical_not().nonzero(),
    "swapped": lambda c: torch.where(c > 0, 0, 1).nonzero(),
    "float": lambda c: c.float().nonzero(),
    "rolled": lambda c: c.roll(1).nonzero(),
    "summed_up": lambda c: c.cumsum(0).nonzero(),
    "first_three": lambda c: c[:3].nonzero(),
    "last_three": lambda c: c[1:].nonzero(),
    "padded": lambda c: F.pad(c, (1, 0))[:NUM_EXPERTS].nonzero(),
    "constant": lambda c: torch.tensor([1, 0, 1, 1]).nonzero(),
    "range": lambda c: torch.arange(NUM_EXPERTS).nonzero(),
    "every": lambda c: torch.ones(NUM_EXPERTS).nonzero(),
    "python": lambda c: [expert for expert, count in zip(torch.arange(4), c.tolist(), strict=True) if count],
}
"""What is iterated, by what is done with how many tokens each expert has, ``[E]``."""

COUNTED = [0, 1, 3, 4]
"""How many tokens the experts of :func:`test_iterated_experts` have."""


@pytest.mark.parametrize("name", COUNTS)
def test_iterated_experts(name: str) -> None:
    choose = COUNTS[name]
    loop = masked(lambda mask, x, ids, weights: (choose(mask.sum((-1, -2))), mask), name)
    trap = Trap(loop, args=lambda: inputs(tokens=4, seed=5))
    module, expected, args = expect(trap)
    assert args[1].flatten().bincount(minlength=NUM_EXPERTS).tolist() == COUNTED
    assert_same(observe(compiled(trap, module), module, args), expected)


def mutated(change: Callable[..., tuple[Tensor, Tensor]], name: str) -> Loop:
    """``change(ids) -> hits, mask``, with something changed in place on the way. Where that was first is kept."""
    return masked(lambda mask, x, ids, weights: change(ids.clone(), x), name)


def one_hot_mask(ids: Tensor) -> Tensor:
    return F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)


def changed(tensor: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    change(tensor)
    return tensor


def _ids_changed(change: Callable[[Tensor], Any], after_mask: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def made(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = one_hot_mask(ids)
        change(ids)
        return (hits(mask), mask) if after_mask else (hits(mask), one_hot_mask(ids))

    return made


def _clamp(ids: Tensor) -> None:
    ids.clamp_(max=1)


def _fill(ids: Tensor) -> None:
    ids.masked_fill_(ids == 2, 0)


def _assign(ids: Tensor) -> None:
    ids[0] = 3


def _through_view(ids: Tensor) -> None:
    ids.view(-1)[:3] = 1


def _through_data(ids: Tensor) -> None:
    ids.data.clamp_(max=1)


def _through_detached(ids: Tensor) -> None:
    ids.detach().T.fill_(1)


for _change in (_clamp, _fill, _assign, _through_view, _through_data, _through_detached):
    for _after in (True, False):
        right()(mutated(_ids_changed(_change, _after), f"ids{_change.__name__}_{'unused' if _after else 'used'}"))


def _hits_changed(change: Callable[[Tensor], Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda ids, x: (changed(hits(one_hot_mask(ids))[:, 0], change), one_hot_mask(ids))


def _add_assign(tensor: Tensor) -> None:
    tensor[-1] = 0


for _name, _mutate in (
    ("zeroed", lambda found: found.zero_()),
    ("clamped", lambda found: found.clamp_(max=1)),
    ("assigned", _add_assign),
    ("zeroed_through_view", lambda found: found.view(-1).zero_()),
):
    right()(mutated(_hits_changed(_mutate), f"hits_{_name}"))


def _hit_mask_zeroed(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    mask = one_hot_mask(ids)
    hit = mask.sum((-1, -2)) > 0
    found = hit.nonzero()
    hit.zero_()
    return found, mask


def _hit_mask_zeroed_before(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    mask = one_hot_mask(ids)
    hit = mask.sum((-1, -2)) > 0
    hit[0] = False
    return hit.nonzero(), mask


def _mask_zeroed(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    mask = one_hot_mask(ids).contiguous()
    found = hits(mask)
    mask[0] = 0
    return found, mask


def _ids_of_topk_filled(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    ids = x[:, :NUM_EXPERTS].topk(2)[1]
    ids[x[:, 0] > 0] = -1
    ids = ids.clone()
    mask = ids.t() == torch.arange(NUM_EXPERTS)[:, None, None]
    return hits(mask), mask


def _ids_of_topk_doubled(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    ids = x[:, :NUM_EXPERTS].topk(2)[1]
    ids.mul_(2)
    mask = F.one_hot(ids.long(), 7).permute(2, 1, 0)[:NUM_EXPERTS]
    return hits(mask), mask


for _made in (
    _hit_mask_zeroed,
    _hit_mask_zeroed_before,
    _mask_zeroed,
    _ids_of_topk_filled,
    _ids_of_topk_doubled,
):
    right()(mutated(_made, _made.__name__.strip("_")))


@right(args=lambda: (inputs(tokens=256, top_k=1)[0], torch.zeros(256, 1, dtype=torch.long), torch.ones(256, 1)))
def count_that_overflows(m, x, ids, weights):
    """256 tokens are counted as 0 in eight bits."""
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in mask.sum((-1, -2), dtype=torch.uint8).nonzero():
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token])
    return out


def _packed() -> Args:
    """Ids that have something else in their high bits; cut off, they are those of experts."""
    x, ids, weights = inputs()
    high = torch.tensor([8, 16, 32, 63])
    return x, ids | (1 << high[ids % 4].clamp(max=40)), weights


def _narrowed(dtype: torch.dtype, after: Callable[[Tensor], Tensor]) -> Loop:
    def loop(m, x, ids, weights):
        narrow = ids.to(dtype)
        return compared(m, x, after(narrow), weights) + compared(m, x, narrow, weights) * 2

    return loop


for _dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
    for _name, _after in (
        ("", lambda ids: ids),
        ("_and_back", Tensor.long),
        ("_by_float", lambda ids: ids.double().long()),
    ):
        _loop = _narrowed(_dtype, _after)
        _loop.__name__ = f"ids_cut_off_to_{_dtype}{_name}".replace("torch.", "")
        right(args=_packed)(_loop)


@right()
def ids_of_the_expert(m, x, ids, weights):
    """The ids themselves depend on the expert."""
    out, mask, table = torch.zeros_like(x), m.mask(ids), torch.stack([ids[:, 0], ids[:, 1], ids[:, 0], ids[:, 1]])
    for expert in hits(mask):
        expert = expert[0]
        (token,) = torch.where(table[expert] == expert)
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@right()
def rows_selected_twice(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        _, token_again = torch.where(ids.t() == expert)
        out.index_add_(0, token, x[token_again] @ m.weight[expert] * weights[token_again, slot, None])
    return out


# --- random numbers ---------------------------------------------------------------------------------------------------


@refused_body("random")
def dropout(m, x, ids, weights, expert, slot, token):
    return F.dropout(x[token], 0.5, training=True)


@refused_body("random|not known to act on each row alone")
def attention_that_drops(m, x, ids, weights, expert, slot, token):
    heads = x[token].view(-1, 1, 2, 4)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5).reshape(-1, 8)


@refused_body("random")
def noise(m, x, ids, weights, expert, slot, token):
    return x[token] + torch.randn_like(x[token])


@refused_body("random")
def noise_without_rows(m, x, ids, weights, expert, slot, token):
    return x[token] + torch.rand(8)


@refused_body("random")
def python_random(m, x, ids, weights, expert, slot, token):
    return x[token] * random.random()


@refused_body("random")
def python_randint(m, x, ids, weights, expert, slot, token):
    return x[token] * random.randint(1, 100)


# --- functions of functions -------------------------------------------------------------------------------------------


@right_body()
def idle_dropout_changed(m, x, ids, weights, expert, slot, token):
    """What is changed is what was dropped out of nothing."""
    rows = x[token]
    F.dropout(rows, 0.5, False).mul_(2)
    return rows


@right_body()
def vmapped(m, x, ids, weights, expert, slot, token):
    return torch.vmap(lambda row: row * 2 + m.bias[expert])(x[token])


@right_body()
def gradient_inside(m, x, ids, weights, expert, slot, token):
    return torch.func.grad(lambda rows: (rows**3).sum())(x[token])


@right_body()
def conditional(m, x, ids, weights, expert, slot, token):
    return torch.cond(x.sum() > 0, lambda rows: rows * 2, lambda rows: rows * 3, (x[token],))


@torch.compiler.disable
def _not_compiled(rows: Tensor) -> Tensor:
    return rows * 2


@refused_body("disable")
def disabled_function(m, x, ids, weights, expert, slot, token):
    return _not_compiled(x[token])


# --- the tests of the tables ------------------------------------------------------------------------------------------

UNREPORTED: dict[str, str] = {}
"""Loops that are left as they are without the right words, with what is wrong."""

WRONG: dict[str, str] = {}
"""Loops that do not equal eager yet, with what is wrong."""


def cases(traps: dict[str, Trap], *known: dict[str, str]) -> list[Any]:
    reasons: dict[str, str] = dict(itertools.chain.from_iterable(faults.items() for faults in known))
    return [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=reasons[name]) if name in reasons else ())
        for name in traps
    ]


@pytest.mark.parametrize("name", cases(REFUSED, UNREPORTED, WRONG))
def test_left_as_it_is(name: str, caplog: pytest.LogCaptureFixture) -> None:
    trap = REFUSED[name]
    module, expected, args = expect(trap)
    with caplog.at_level(logging.INFO, logger="moe_rewrite"):
        assert_same(observe(compiled(trap, module), module, args), expected)
    report = "\n".join(record.getMessage() for record in caplog.records if record.name == "moe_rewrite")
    assert "left as it is" in report
    assert re.search(trap.reason or "", report), report
    assert re.search(r"(test_traps|loops)\.py:\d+", report), report


@pytest.mark.parametrize("name", cases(REFUSED, UNREPORTED, WRONG))
def test_error_with_fullgraph(name: str) -> None:
    trap = REFUSED[name]
    with pytest.raises(Unsupported) as raised:
        compiled(trap, Moe(trap.loop), own_frame=False, fullgraph=True)(*fresh(trap.args()))
    text = str(raised.value)
    assert "moe_rewrite leaves this loop as it is" in text
    assert re.search(trap.reason or "", text), text
    assert re.search(r'File ".*(test_traps|loops)\.py", line \d+', text), text


@pytest.mark.parametrize("name", cases(RIGHT, WRONG))
def test_equals_eager(name: str) -> None:
    trap = RIGHT[name]
    module, expected, args = expect(trap)
    assert_same(observe(compiled(trap, module), module, args), expected)


# --- the data ---------------------------------------------------------------------------------------------------------

BACKENDS = ("batched_mm", "grouped_mm")


def with_ids(change: Callable[[Tensor], Tensor], **fields: Any) -> Args:
    x, ids, weights = inputs(**fields)
    return x, change(ids), weights


def with_states(change: Callable[[Tensor], Any], ids: Tensor | None = None) -> Args:
    x, own_ids, weights = inputs()
    return changed(x, change), own_ids if ids is None else ids, weights


DROPPED = torch.tensor([[4, 4], [0, 4], [1, 0], [4, 2], [1, 2], [2, 4]])
"""Ids of :func:`sentinel`: 4 is no expert. The first token has none, expert 3 has no token."""


def _not_finite(x: Tensor) -> None:
    x[1, 2], x[2, 3] = float("nan"), float("inf")


def _dropped_not_finite(x: Tensor) -> None:
    x[0] = float("nan")


def _dropped_infinite(x: Tensor) -> None:
    x[0, :3] = float("inf")


def _dropped_zero(x: Tensor) -> None:
    x[0] = 0.0


def normalised(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The gradient of a row of zeros is not finite."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, m.num_experts + 1).permute(2, 1, 0)
    for expert in hits(mask):
        expert = expert[0]
        if expert == m.num_experts:
            continue
        slot, token = torch.where(mask[expert])
        rows = x[token] / x[token].norm(dim=-1, keepdim=True) + x[token].abs().sqrt()
        out.index_add_(0, token, m.expert(rows, expert) * weights[token, slot, None])
    return out


def looked_up(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Looks something up by the expert's id, which for a dropped pair is past the end."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, m.num_experts + 1).permute(2, 1, 0)
    for expert in hits(mask):
        expert = expert[0]
        if expert == m.num_experts:
            continue
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, m.expert(x[token], expert) + m.bias[ids[token, slot]])
    return out


def sent_elsewhere(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Where a pair goes is computed, and past the end for a dropped one."""
    out, mask = x.new_zeros(NUM_EXPERTS, x.shape[1]), F.one_hot(ids, m.num_experts + 1).permute(2, 1, 0)
    for expert in hits(mask):
        expert = expert[0]
        if expert == m.num_experts:
            continue
        slot, token = torch.where(mask[expert])
        out.index_add_(0, ids[token, slot], m.expert(x[token], expert))
    return out


def not_skipped(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The expert past the end is not skipped: eager raises."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, m.num_experts + 1).permute(2, 1, 0)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        out.index_add_(0, token, m.expert(x[token], expert))
    return out


def compared(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Ids below 0 are of no expert."""
    out, mask = torch.zeros_like(x), ids.t() == torch.arange(m.num_experts)[:, None, None]
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, m.expert(x[token], expert) * weights[token, slot, None])
    return out


DATA: dict[str, tuple[Loop, Callable[[], Args]]] = {
    "plain": (plain, inputs),
    "one_token": (plain, lambda: inputs(tokens=1)),
    "one_slot": (plain, lambda: inputs(top_k=1)),
    "all_experts": (plain, lambda: inputs(top_k=NUM_EXPERTS)),
    "expert_twice": (plain, lambda: with_ids(lambda ids: ids[:, :1].repeat(1, 2))),
    "all_to_one": (plain, lambda: with_ids(lambda ids: torch.full_like(ids, 2))),
    "ids_int32": (compared, lambda: with_ids(lambda ids: ids.int())),
    "ids_transposed": (plain, lambda: with_ids(lambda ids: ids.t().contiguous().t())),
    "ids_below_zero": (compared, lambda: with_ids(lambda ids: ids - 2)),
    "not_finite": (plain, lambda: with_states(_not_finite)),
    "dropped": (sentinel, lambda: with_ids(lambda ids: DROPPED)),
    "dropped_not_finite": (sentinel, lambda: with_states(_dropped_not_finite, DROPPED)),
    "dropped_infinite": (sentinel, lambda: with_states(_dropped_infinite, DROPPED)),
    "dropped_normalised": (normalised, lambda: with_states(_dropped_zero, DROPPED)),
    "dropped_looked_up": (looked_up, lambda: with_ids(lambda ids: DROPPED)),
    "dropped_sent_elsewhere": (sent_elsewhere, lambda: with_ids(lambda ids: DROPPED)),
    "added_to_states": (RIGHT["accumulator_not_zero"].loop, inputs),
    "added_to_idle_dropout": (RIGHT["accumulator_of_idle_dropout"].loop, inputs),
    "range_always_makes_a_new_tensor": (RIGHT["range_always_makes_a_new_tensor"].loop, inputs),
    "a_hit_always_makes_a_new_tensor": (RIGHT["a_hit_always_makes_a_new_tensor"].loop, inputs),
    **{f"start_is_left_{name}": (loop, inputs) for name, loop in CARRIED.items()},
    "frames_side_by_side": (RIGHT["frames_side_by_side"].loop, inputs),
    "frames_transposed": (RIGHT["frames_transposed"].loop, inputs),
    "two_accumulators": (RIGHT["two_accumulators"].loop, inputs),
    "two_ways": (RIGHT["experts_in_range"].loop, inputs),
    "two_loops": (RIGHT["second_loop_reads_the_first"].loop, inputs),
}
"""Loops and their arguments. Each is rewritten, and trained."""

WRONG_DATA: dict[str, str] = {}


@pytest.mark.parametrize("experts_backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=WRONG_DATA[name]) if name in WRONG_DATA else ())
        for name in DATA
    ],
)
def test_result_and_gradients(name: str, experts_backend: str) -> None:
    loop, make = DATA[name]
    args, eager, module = make(), Moe(loop), Moe(loop)
    options = {"inner": "aot_eager", "experts": experts_backend}
    run = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)
    assert_same(observe(run, module, args, backward=True), observe(eager, eager, args, backward=True))


@pytest.mark.parametrize("experts_backend", BACKENDS)
@pytest.mark.parametrize("name", ["no_token", "all_dropped"])
def test_no_pair_at_all(name: str, experts_backend: str) -> None:
    args = {"no_token": inputs(tokens=0), "all_dropped": with_ids(lambda ids: torch.full_like(ids, 4))}[name]
    eager, module = Moe(sentinel), Moe(sentinel)
    options = {"inner": "eager", "experts": experts_backend}
    run = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)
    assert_same(observe(run, module, args), observe(eager, eager, args))


@pytest.mark.xfail(strict=True, reason="a known limit, in docs/architecture.md: the pair is dropped where eager raises")
@pytest.mark.parametrize("experts_backend", BACKENDS)
def test_expert_without_weights(experts_backend: str) -> None:
    """Eager raises IndexError where an expert past the end is hit; so must the rewritten loop, or it is left alone."""
    module, args = Moe(not_skipped), with_ids(lambda ids: DROPPED)
    with pytest.raises(IndexError):
        module(*args)
    options = {"inner": "eager", "experts": experts_backend}
    with pytest.raises(IndexError):
        torch.compile(module, backend="moe_rewrite", options=options)(*args)


@pytest.mark.parametrize("experts_backend", BACKENDS)
def test_other_shapes_later(experts_backend: str) -> None:
    """One compiled module, called with other numbers of tokens and slots."""
    module = Moe(plain)
    options = {"inner": "eager", "experts": experts_backend}
    run = torch.compile(module, backend="moe_rewrite", fullgraph=True, dynamic=True, options=options)
    for tokens, top_k in ((6, 2), (3, 4), (4, 4), (9, 2), (1, 3), (5, 1), (0, 2)):
        args = inputs(tokens=tokens, top_k=top_k)
        assert_same(observe(run, module, args), observe(module, module, args))


def integers(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, mask, tables = torch.zeros_like(x), m.mask(ids), torch.arange(256).reshape(4, 8, 8) % 5
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ tables[expert] + expert * slot[:, None])
    return out


@pytest.mark.parametrize("experts_backend", BACKENDS)
def test_integers(experts_backend: str) -> None:
    x, ids, weights = inputs()
    args = ((x * 10).long(), ids, weights)
    eager, module = Moe(integers), Moe(integers)
    options = {"inner": "eager", "experts": experts_backend}
    run = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)
    assert_same(observe(run, module, args), observe(eager, eager, args))


# --- memory that is shared at run time --------------------------------------------------------------------------------


def into(m: Moe, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    mask = m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, m.expert(x[token], expert) * weights[token, slot, None])
    return out


def _apart(whole: Tensor) -> tuple[Tensor, Tensor]:
    return whole[:6].clone(), whole[6:].clone()


def _beside(whole: Tensor) -> tuple[Tensor, Tensor]:
    return whole[:6], whole[6:]


def _overlapping(whole: Tensor) -> tuple[Tensor, Tensor]:
    return whole[:6], whole[1:7]


def _detached(whole: Tensor) -> tuple[Tensor, Tensor]:
    x = whole[:6].clone()
    return x, x.detach()


def _the_same(whole: Tensor) -> tuple[Tensor, Tensor]:
    x = whole[:6].clone()
    return x, x


LAYOUTS = (_apart, _beside, _overlapping, _detached, _the_same)


@pytest.mark.parametrize("first", LAYOUTS)
def test_output_given_as_argument(first: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """What is compiled for one layout must not run for another where that would be wrong."""
    _, ids, weights = inputs()
    module = Moe(into)
    run = torch.compile(module, backend="moe_rewrite", options={"inner": "eager"})
    for layout in (first, *LAYOUTS):
        results = []
        for function in (module, run):
            x, out = layout(inputs(tokens=12)[0])
            with torch.no_grad():
                results.append((function(x, ids, weights, out).clone(), x.clone()))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# --- gradients switched off, and autocast -----------------------------------------------------------------------------


def _rows_without_gradient(m, x, ids, weights, expert, slot, token):
    with torch.no_grad():
        gate = torch.sigmoid(x[token])
    return m.expert(x[token], expert) * gate


def _scale_without_gradient(m, x, ids, weights, expert, slot, token):
    with torch.no_grad():
        scale = m.scale[expert] * 2
    return m.expert(x[token], expert) * scale


def _changed_in_place_without_gradient(m, x, ids, weights, expert, slot, token):
    rows = x[token] * 1
    with torch.no_grad():
        rows.mul_(2)
    return rows * rows


def _straight_through(m, x, ids, weights, expert, slot, token):
    rows = m.expert(x[token], expert)
    return rows + (rows.round() - rows).detach()


def _weight_detached(m, x, ids, weights, expert, slot, token):
    return F.linear(F.linear(x[token], m.up[expert].detach()), m.down[expert])


def _index_compared_in_no_grad(m, x, ids, weights, expert, slot, token):
    with torch.no_grad():
        special = expert == 1
    return x[token] if special else m.expert(x[token], expert)


class Doubled(torch.autograd.Function):
    """Its gradient is not that of its result."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5


def _own_gradient(m, x, ids, weights, expert, slot, token):
    return Doubled.apply(m.expert(x[token], expert))


def _gradient_hook(m, x, ids, weights, expert, slot, token):
    rows = m.expert(x[token], expert)
    rows.register_hook(lambda grad: grad * 2)
    return rows


def _checkpointed(m, x, ids, weights, expert, slot, token):
    return torch.utils.checkpoint.checkpoint(m.expert, x[token], expert, use_reentrant=False)


def _whole_loop_in_no_grad(m, x, ids, weights):
    with torch.no_grad():
        out = plain(m, x, ids, weights)
    return out + x


def _whole_loop_checkpointed(m, x, ids, weights):
    return torch.utils.checkpoint.checkpoint(plain, m, x, ids, weights, use_reentrant=False)


def _combined_in_no_grad(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        rows = m.expert(x[token], expert)
        with torch.no_grad():
            out.index_add_(0, token, rows)
    return out + x


def _combined_in_enable_grad(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    with torch.no_grad():
        for expert in hits(mask):
            expert = expert[0]
            _, token = torch.where(mask[expert])
            rows = m.expert(x[token], expert)
            with torch.enable_grad():
                out.index_add_(0, token, rows + m.bias[expert])
    return out


GRADIENTS: tuple[Loop, ...] = (
    *map(
        loop_over,
        (
            _rows_without_gradient,
            _scale_without_gradient,
            _changed_in_place_without_gradient,
            _straight_through,
            _weight_detached,
            _index_compared_in_no_grad,
            _own_gradient,
            _gradient_hook,
            _checkpointed,
        ),
    ),
    _whole_loop_in_no_grad,
    _whole_loop_checkpointed,
    _combined_in_no_grad,
    _combined_in_enable_grad,
)


@pytest.mark.parametrize("loop", GRADIENTS, ids=lambda loop: loop.__name__.strip("_"))
def test_gradients_as_switched(loop: Loop) -> None:
    args, eager, module = inputs(), Moe(loop), Moe(loop)
    run = torch.compile(module, backend="moe_rewrite", options={"inner": "aot_eager", "experts": "grouped_mm"})
    assert_same(observe(run, module, args, backward=True), observe(eager, eager, args, backward=True))


def _autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def _in_body(m, x, ids, weights):
    return _loop_in(m, x, ids, contextlib.nullcontext, contextlib.nullcontext, _autocast)


def _not_in_body(m, x, ids, weights):
    return _loop_in(m, x, ids, _autocast, contextlib.nullcontext, lambda: _autocast(False))


def _around_loop(m, x, ids, weights):
    return _loop_in(m, x, ids, contextlib.nullcontext, _autocast, contextlib.nullcontext)


def _around_mask(m, x, ids, weights):
    return _loop_in(m, x, ids, _autocast, contextlib.nullcontext, contextlib.nullcontext)


def _off_around_loop(m, x, ids, weights):
    return _loop_in(m, x, ids, _autocast, lambda: _autocast(False), contextlib.nullcontext)


def _loop_in(m, x, ids, around_mask, around_loop, around_rows):
    """The plain loop with a context around its mask, around itself and around its rows."""
    with around_mask():
        out, mask = torch.zeros_like(x), m.mask(ids)
        found = hits(mask)
    with around_loop():
        for expert in found:
            expert = expert[0]
            _, token = torch.where(mask[expert])
            with around_rows():
                rows = m.expert(x[token], expert)
            out.index_add_(0, token, rows.to(out.dtype))
    return out


@pytest.mark.parametrize("experts_backend", BACKENDS)
@pytest.mark.parametrize("around", [False, True], ids=["plain", "in_autocast"])
@pytest.mark.parametrize(
    "loop",
    [_in_body, _not_in_body, _around_loop, _around_mask, _off_around_loop],
    ids=lambda loop: loop.__name__.strip("_"),
)
def test_autocast(loop: Loop, around: bool, experts_backend: str) -> None:
    """The rows are computed in the precision that eager computes them in.

    The difference of the two precisions is the unit: were the loop computed in the other one, the error would be 1.
    """
    args, module = inputs(dtype=torch.float32), Moe(loop, dtype=torch.float32)
    options = {"inner": "eager", "experts": experts_backend}
    run = torch.compile(module, backend="moe_rewrite", fullgraph=True, options=options)
    with torch.no_grad(), _autocast(around):
        expected, actual = module(*args), run(*args)
    results = []
    for in_bfloat16 in (False, True):
        with torch.no_grad(), _autocast(in_bfloat16):
            results.append(
                loop_over(lambda m, x, i, w, expert, slot, token: m.expert(x[token], expert).float())(module, *args)
            )
    unit = (results[0] - results[1]).norm()
    assert unit > 1e-3
    assert min((expected - result).norm() for result in results) < 1e-5
    assert (actual - expected).norm() < 0.2 * unit


# --- writes that fake tensors do not count ----------------------------------------------------------------------------


@torch.library.custom_op("moe_rewrite_traps::roll_all", mutates_args=("tensors",))
def _roll_all(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.copy_(tensor.roll(1, 0))


_LIBRARY = torch.library.Library("moe_rewrite_traps", "FRAGMENT")
_LIBRARY.define("roll(int shift, Tensor(a!) tensor) -> ()")
torch.library.impl("moe_rewrite_traps::roll", "cpu", lib=_LIBRARY)(lambda shift, tensor: _rolled(tensor, shift))
torch.library.register_fake("moe_rewrite_traps::roll", lambda shift, tensor: None, lib=_LIBRARY)


def _rolled(tensor: Tensor, shift: int) -> None:
    tensor.copy_(tensor.roll(shift, 0))


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "a list of torch's": lambda tensor: torch._foreach_copy_([tensor], [tensor.roll(1, 0)]),
    "zeros": lambda tensor: torch._foreach_zero_([tensor]),
    "a list of the user's": lambda tensor: _roll_all([tensor]),
    "by a schema alone": lambda tensor: torch.ops.moe_rewrite_traps.roll(1, tensor),
    "in place": lambda tensor: tensor.copy_(tensor.roll(1, 0)),
}
WRITTEN = ("ids", "mask", "hits", "rows", "weight", "x")


def _writes(write: Callable[[Tensor], Any], what: str) -> Loop:
    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, ids, weight = x * 1, ids * 1, m.weight * 1
        out, mask = torch.zeros_like(x), m.mask(ids)
        if what == "ids":
            write(ids)
        found = hits(mask)
        if what in ("mask", "hits"):
            write({"mask": mask, "hits": found}[what])
        for expert in found:
            expert = expert[0]
            slot, token = torch.where(mask[expert])
            rows = x[token] @ weight[expert]
            if what in ("rows", "weight", "x"):
                write({"rows": rows, "weight": weight, "x": x}[what])
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out

    return loop


@pytest.mark.parametrize("what", WRITTEN)
@pytest.mark.parametrize("how", WRITES)
def test_writes(how: str, what: str) -> None:
    args, module = inputs(), Moe(_writes(WRITES[how], what))
    with torch.no_grad():
        expected = module(*args)
        actual = torch.compile(module, backend="moe_rewrite", options={"inner": "aot_eager"})(*args)
    torch.testing.assert_close(actual, expected)


# --- gradients in forward mode ----------------------------------------------------------------------------------------


def _dense(x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        out = out + x @ weight[expert] * (ids == expert).any(-1, keepdim=True)
    return out


def _sparse(x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, _ = torch.where(ids == expert)
        out.index_add_(0, token, x[token] @ weight[expert])
    return out


@pytest.mark.parametrize("loop", [_dense, _sparse], ids=lambda loop: loop.__name__.strip("_"))
@pytest.mark.parametrize("of", ["x", "weight"])
def test_forward_gradients(loop: Callable[..., Tensor], of: str) -> None:
    x, ids, _ = inputs()
    weight = Moe(plain).weight.detach()

    def tangent() -> Tensor:
        if of == "x":
            return torch.func.jvp(lambda given: loop(given, ids, weight), (x,), (x * 3,))[1]
        return torch.func.jvp(lambda given: loop(x, ids, given), (weight,), (weight * 3,))[1]

    expected = tangent()
    assert expected.abs().sum() > 0
    actual = torch.compile(tangent, backend="moe_rewrite", options={"inner": "aot_eager"})()
    torch.testing.assert_close(actual, expected)
