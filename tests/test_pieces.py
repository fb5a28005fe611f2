"""Loops over contiguous pieces of something sorted by expert, and what only looks like them.

Whatever becomes of a loop, results, gradients and side effects are eager's, in float64.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from compare import run
from loops import HIDDEN, NUM_EXPERTS, TOP_K, Loop, Moe, assert_same, inputs, observe
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError, Unsupported, UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from moe_rewrite.loop import MaskDispatch, TopKDispatch

BACKENDS = ("batched_mm", "grouped_mm")


def in_order(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs sorted by expert, the rows of ``x`` in that order, and how many pairs each expert has."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    return order, x[order // ids.shape[1]], flat.bincount(minlength=NUM_EXPERTS)


def combined(x: Tensor, weights: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    weighted = rows * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // weights.shape[1], weighted)


def routed(m: Moe, x: Tensor) -> tuple[Tensor, Tensor]:
    """Routing weights and ids of a ``topk`` in the same graph, which says that each id is an expert's."""
    weights, ids = (x @ m.weight[0][:, :NUM_EXPERTS]).softmax(-1).topk(TOP_K)
    return weights, ids


# --- rewritten --------------------------------------------------------------------------------------------------------


def between_offsets(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    out = torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        start, end = offsets[e], offsets[e + 1]
        out[start:end] = m.expert(rows[start:end], e)
    return combined(x, weights, order, out)


def between_padded_offsets(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)).tolist(), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return combined(x, weights, order, out)


def up_to_the_sum(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    ends, out = counts.cumsum(0).tolist(), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        start = 0 if e == 0 else ends[e - 1]
        out[start : ends[e]] = m.expert(rows[start : ends[e]], e)
    return combined(x, weights, order, out)


def previous_end(m, x, ids, weights):
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    out, start = torch.zeros_like(rows), 0
    for e, end in enumerate(counts.cumsum(0).tolist()):
        out[start:end] = m.expert(rows[start:end], e)
        start = end
    return combined(x, weights, order, out)


def counted_up(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        end = start + counts[e]
        if counts[e] == 0:
            continue
        out[start:end] = m.expert(rows[start:end], e)
        start = end
    return combined(x, weights, order, out)


def counted_up_in_place(m, x, ids, weights):
    """``start += n`` makes a new number: ``first`` keeps the old one."""
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        first = start
        start += counts[e]
        out[first:start] = m.expert(rows[first:start], e)
    return combined(x, weights, order, out)


def counted_by_item(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    out, start = torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        n = counts[e].item()
        out[start : start + n] = m.expert(rows[start : start + n], e)
        start += n
    return combined(x, weights, order, out)


def pairs_of_bounds(m, x, ids, weights):
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    ends = counts.cumsum(0)
    starts, out = ends - counts, torch.zeros_like(rows)
    for e, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        out[start:end] += m.expert(rows[start:end], e)
    return combined(x, weights, order, out)


def neighbours_in_offsets(m, x, ids, weights):
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        out[start:end, :] = m.expert(rows[start:end, :], e)
    return combined(x, weights, order, out)


def counts_of_one_hot(m, x, ids, weights):
    order, rows, _ = in_order(x, ids)
    counts, out = F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0), torch.zeros_like(rows)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return combined(x, weights, order, out)


def counts_of_histogram(m, x, ids, weights):
    order, rows, _ = in_order(x, ids)
    counts = torch.histc(ids.flatten().float(), bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS - 1).to(torch.long).cpu()
    out, offsets = torch.zeros_like(rows), torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return combined(x, weights, order, out)


def split_and_cat(m, x, ids, weights):
    order, rows, _ = in_order(x, ids)
    pieces = rows.split(F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist(), dim=0)
    out = []
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e], e))
    return combined(x, weights, order, torch.cat(out, dim=0))


def split_beside_modules(m, x, ids, weights):
    order, rows, _ = in_order(x, ids)
    out = []
    sizes = F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist()
    for expert, piece in zip(m.experts, torch.split(rows, sizes), strict=True):
        out.append(expert(piece))
    return combined(x, weights, order, torch.cat(out))


def split_twice(m, x, ids, weights):
    """Two loops over pieces of the same sizes, as for a module that holds one matrix of each expert."""
    order, rows, _ = in_order(x, ids)
    sizes = F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist()
    for weight in (m.up, m.down):
        pieces, out = rows.split(sizes), []
        for e in range(NUM_EXPERTS):
            out.append(F.linear(pieces[e], weight[e]))
        rows = F.silu(torch.cat(out))
    return combined(x, weights, order, rows)


def only_those_with_rows(m, x, ids, weights):
    """A list that gets nothing of experts without rows; ids of a ``topk`` say how many rows there are in all."""
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    outputs, start = [], 0
    for e, n in enumerate(counts.tolist()):
        end = start + n
        if n == 0:
            continue
        outputs.append(m.expert(rows[start:end], e))
        start = end
    result = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
    return combined(x, weights, order, result)


def inference_of_modules(m, x, ids, weights):
    """Sort, slice for each expert, concatenate, put back in order, weigh and add."""
    weights, ids = routed(m, x)
    counts = ids.new_zeros((ids.shape[0], len(m.experts)))
    counts.scatter_(1, ids, 1)
    counts = counts.sum(dim=0)
    order = ids.view(-1).argsort()
    rows, counts = x[order // ids.shape[1]], counts.cpu().numpy()
    outputs, start = [], 0
    for i, n in enumerate(counts):
        end = start + n
        if n == 0:
            continue
        outputs.append(m.experts[i](rows[start:end]))
        start = end
    outs = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
    back = torch.empty_like(outs)
    back[order] = outs
    return (back.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


def weights_in_pieces(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, scale, token = F.pad(counts.cumsum(0), (1, 0)), weights.flatten()[order], order // TOP_K
    out = torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        start, end = offsets[e], offsets[e + 1]
        out.index_add_(0, token[start:end], m.expert(rows[start:end], e) * scale[start:end, None])
    return out


def lower_precision_result(m, x, ids, weights):
    """Writing to a slice casts."""
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows, dtype=torch.float32)
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return combined(x, weights, order, out.double())


REWRITTEN: tuple[Loop, ...] = (
    *(between_offsets, between_padded_offsets, up_to_the_sum, previous_end, counted_up, counted_up_in_place),
    *(counted_by_item, pairs_of_bounds, neighbours_in_offsets, counts_of_one_hot, counts_of_histogram),
    *(split_and_cat, split_beside_modules, split_twice, only_those_with_rows, inference_of_modules),
    *(weights_in_pieces, lower_precision_result),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loop", REWRITTEN, ids=lambda loop: loop.__name__)
def test_rewritten(loop: Loop, backend: str) -> None:
    loops = run(loop, inputs(), backend, fullgraph=True)
    assert loops
    for found in loops:
        assert isinstance(found.dispatch, TopKDispatch)
        assert list(found.dispatch.shape) == [inputs()[1].numel()]


def idle(expert: int) -> tuple[Any, ...]:
    """One expert has no token."""
    x, ids, weights = inputs()
    return x, torch.where(ids == expert, (ids + 1) % NUM_EXPERTS, ids), weights


def one_for_all() -> tuple[Any, ...]:
    x, ids, weights = inputs()
    return x, torch.full_like(ids, 2), weights


DATA: dict[str, Callable[[], tuple[Any, ...]]] = {
    "the first expert is idle": lambda: idle(0),
    "the last expert is idle": lambda: idle(NUM_EXPERTS - 1),
    "one expert has every token": one_for_all,
    "one token": lambda: inputs(tokens=1),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    "loop", [between_offsets, counted_up, split_and_cat, pairs_of_bounds], ids=lambda f: f.__name__
)
def test_idle_experts(loop: Loop, data: str) -> None:
    assert run(loop, DATA[data](), "grouped_mm", fullgraph=True)


@pytest.mark.parametrize(
    "loop", [between_offsets, counted_up, split_and_cat, inference_of_modules], ids=lambda f: f.__name__
)
def test_other_numbers_of_tokens(loop: Loop) -> None:
    eager, module = Moe(loop), Moe(loop)
    torch._dynamo.reset()
    options = {"inner": "eager", "experts": "grouped_mm"}
    fn = torch.compile(module, backend="moe_rewrite", options=options, fullgraph=True, dynamic=True)
    backward = loop is not inference_of_modules  # where an expert has no token, eager gives its module no gradient
    for tokens in (6, 3, 9, 2):
        args = inputs(tokens=tokens)
        assert_same(observe(fn, module, args, backward), observe(eager, eager, args, backward))


@pytest.mark.parametrize("loop", [between_offsets, split_and_cat, only_those_with_rows], ids=lambda f: f.__name__)
def test_with_inductor(loop: Loop) -> None:
    torch._dynamo.reset()
    eager, module = Moe(loop), Moe(loop)
    fn = torch.compile(module, backend="moe_rewrite", options={"experts": "grouped_mm"}, fullgraph=True)
    assert_same(observe(fn, module, inputs(), True), observe(eager, eager, inputs(), True))


# --- rewritten in another form ----------------------------------------------------------------------------------------


def windows(m, x, ids, weights):
    """Pieces that overlap, and leave rows out."""
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    ends, out = counts.cumsum(0), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        start = ends[e]
        out[start - 2 : start + 1] += m.expert(rows[start - 2 : start + 1], e)
    return combined(x, weights, order, out)


def from_the_end(m, x, ids, weights):
    """Bounds below 0 count from the end."""
    _, rows, counts = in_order(x, ids)
    ends, out = counts.cumsum(0) - rows.shape[0], torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        start = ends[e]
        out[start:-1] += m.expert(rows[start:-1], e)
    return out


def sizes_that_may_be_negative(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad((counts - 1).cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        start, end = offsets[e], offsets[e] + 2
        out[start:end] += m.expert(rows[start:end], e)
    return combined(x, weights, order, out)


def experts_without_the_first(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e in range(1, NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return combined(x, weights, order, out)


def more_rows_than_ids(m, x, ids, weights):
    """The last rows are no expert's."""
    _, rows, counts = in_order(x, ids)
    rows, offsets = torch.cat([rows, x]), F.pad(counts.cumsum(0), (1, 0))
    out = torch.ones_like(rows)
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return out


def fewer_rows_than_ids(m, x, ids, weights):
    """Slices go past the end."""
    _, rows, counts = in_order(x, ids)
    rows, offsets = rows[:-3], F.pad(counts.cumsum(0), (1, 0))
    out = torch.ones_like(rows)
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return out


def unknown_total(m, x, ids, weights):
    """Only run time knows how many rows come of it."""
    order, rows, counts = in_order(x, ids)
    rows, counts, out, start = torch.cat([rows, x]), counts.tolist(), [], 0
    for e in range(NUM_EXPERTS):
        end = start + counts[e]
        out.append(m.expert(rows[start:end], e))
        start = end
    return torch.cat(out)


def changed_between(m, x, ids, weights):
    """What is sliced changes before the loop, through a view."""
    order, rows, counts = in_order(x, ids)
    pieces, out = rows.split(F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist()), []
    rows[0].mul_(2)
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e], e))
    return combined(x, weights, order, torch.cat(out))


# --- left as they are, or right ---------------------------------------------------------------------------------------


def piece_changed_in_place(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        piece = rows[offsets[e] : offsets[e + 1]]
        piece.mul_(2)
        out[offsets[e] : offsets[e + 1]] = m.expert(piece, e)
    return combined(x, weights, order, out) + rows.sum()


def result_changed_in_place(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]].copy_(m.expert(rows[offsets[e] : offsets[e + 1]], e))
    return combined(x, weights, order, out)


def changed_after_it_was_put_back(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        piece = out[offsets[e] : offsets[e + 1]]
        piece += m.expert(rows[offsets[e] : offsets[e + 1]], e)
        out[offsets[e] : offsets[e + 1]] = piece
        piece.mul_(3)
    return combined(x, weights, order, out)


def starts_at_one(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 1
    for e in range(NUM_EXPERTS):
        out[start : start + counts[e]] = m.expert(rows[start : start + counts[e]], e)
        start += counts[e]
    return combined(x, weights, order, out)


def starts_with_the_second(m, x, ids, weights):
    """The sum starts at 0 with expert 1."""
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(1, NUM_EXPERTS):
        out[start : start + counts[e]] = m.expert(rows[start : start + counts[e]], e)
        start += counts[e]
    return combined(x, weights, order, out)


def backwards(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS - 1, -1, -1):
        out[start : start + counts[e]] = m.expert(rows[start : start + counts[e]], e)
        start += counts[e]
    return combined(x, weights, order, out)


def adds_one_more(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        out[start : start + counts[e]] = m.expert(rows[start : start + counts[e]], e)
        start += counts[e] + 1
    return combined(x, weights, order, out)


def adds_only_large_counts(m, x, ids, weights):
    """Small experts are left out, and the next starts where they would have."""
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        n = counts[e]
        if n < 3:
            continue
        out[start : start + n] = m.expert(rows[start : start + n], e)
        start += n
    return combined(x, weights, order, out)


def leaves_small_ones_out_of_the_list(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), [], 0
    for e in range(NUM_EXPERTS):
        n = counts[e]
        start += n
        if n < 3:
            continue
        out.append(m.expert(rows[start - n : start], e))
    return torch.cat(out)


def other_counts(m, x, ids, weights):
    """The bounds are of one running sum, what is added of another."""
    order, rows, counts = in_order(x, ids)
    counts, others, out, start = counts.tolist(), counts.flip(0).tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        out[start : start + counts[e]] += m.expert(rows[start : start + counts[e]], e)
        start += others[e]
    return combined(x, weights, order, out)


def counts_changed_in_place(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    offsets[1:] -= 1
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return combined(x, weights, order, out)


def number_after_the_loop(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts[:NUM_EXPERTS].tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS - 1):
        out[start : start + counts[e]] = m.expert(rows[start : start + counts[e]], e)
        start += counts[e]
    return combined(x, weights, order, out) * start


def a_fraction(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        n = counts[e]
        out[start : start + n] = m.expert(rows[start : start + n], e) * (n / 7)
        start += n
    return combined(x, weights, order, out)


def mean_of_a_piece(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        piece = rows[offsets[e] : offsets[e + 1]]
        out[offsets[e] : offsets[e + 1]] = m.expert(piece, e) - piece.mean(0)
    return combined(x, weights, order, out)


def piece_upside_down(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e).flip(0)
    return combined(x, weights, order, out)


def how_many_pieces(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), [], 0
    for e in range(NUM_EXPERTS):
        n = counts[e]
        if n == 0:
            continue
        out.append(m.expert(rows[start : start + n], e))
        start += n
    return combined(x, weights, order, torch.cat(out)) * len(out)


def picks_from_the_list(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    pieces, out = rows.split(F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist()), []
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e], e))
    return out[2].sum() + combined(x, weights, order, torch.cat(out))


def list_upside_down(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    pieces, out = rows.split(F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist()), []
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e], e))
    return combined(x, weights, order, torch.cat(out[::-1]))


def list_with_a_first_entry(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    pieces, out = rows.split(F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist()), [x]
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e], e))
    return torch.cat(out)


def pieces_side_by_side(m, x, ids, weights):
    """``cat`` along the other dimension: pieces of one size."""
    ids = torch.arange(NUM_EXPERTS).repeat_interleave(3)
    sizes = F.one_hot(ids, NUM_EXPERTS).sum(0).tolist()
    pieces, out = torch.cat([x, x]).split(sizes), []
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e], e))
    return torch.cat(out, dim=1)


def appended_twice(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    pieces, out = rows.split(F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist()), []
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e], e))
        out.append(pieces[e])
    return torch.cat(out)


def some_other_rows_in_the_list(m, x, ids, weights):
    """What is appended has as many rows as a mask has entries set."""
    out = []
    for e in range(NUM_EXPERTS):
        token = torch.where(ids == e)[0]
        out.append(m.expert(x[token], e))
    return torch.cat(out)


def splits_of_another_order(m, x, ids, weights):
    """Each expert takes the piece of its neighbour."""
    order, rows, counts = in_order(x, ids)
    pieces, out = rows.split(F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist()), []
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e - 1], e))
    return torch.cat(out)


def with_a_step(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0), (1, 0)), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        out[offsets[e] : offsets[e + 1] : 2] = m.expert(rows[offsets[e] : offsets[e + 1] : 2], e)
    return combined(x, weights, order, out)


def columns(m, x, ids, weights):
    """Pieces of the columns."""
    order, rows, counts = in_order(x, ids)
    offsets, out = F.pad(counts.cumsum(0).clamp(max=HIDDEN), (1, 0)), torch.zeros_like(x)
    for e in range(NUM_EXPERTS):
        out[:, offsets[e] : offsets[e + 1]] = x[:, offsets[e] : offsets[e + 1]] * m.scale[e]
    return out


def reads_what_it_writes(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    for e in range(NUM_EXPERTS):
        rows[offsets[e] : offsets[e + 1]] = m.expert(rows[offsets[e] : offsets[e + 1]], e)
    return combined(x, weights, order, rows)


def spans(m, x, ids, weights):
    """A mean of each span: no experts at all."""
    counts, out, start = ids[:, 0].bincount(minlength=NUM_EXPERTS).tolist(), [], 0
    for n in counts:
        out.append(x[start : start + n].sum(0))
        start += n
    return torch.stack(out)


def stops_early(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        n = counts[e]
        if start + n > 7:
            break
        out[start : start + n] = m.expert(rows[start : start + n], e)
        start += n
    return combined(x, weights, order, out)


def drops_over_capacity(m, x, ids, weights):
    order, rows, counts = in_order(x, ids)
    counts, out, start = counts.tolist(), torch.zeros_like(rows), 0
    for e in range(NUM_EXPERTS):
        end = start + min(counts[e], 2)
        out[start:end] = m.expert(rows[start:end], e)
        start += counts[e]
    return combined(x, weights, order, out)


# What an adversary found: each of these was a wrong number once.


def truths_as_counts(m, x, ids, weights):
    """Sums of how many experts were hit, not of how many rows they have."""
    order, rows, counts = in_order(x, ids)
    ends, out = counts.to(torch.bool).cumsum(0), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        start = ends[e] - counts.to(torch.bool).to(torch.long)[e]
        out[start : ends[e]] = m.expert(rows[start : ends[e]], e)
    return combined(x, weights, order, out)


def narrow_counts(m, x, ids, weights):
    """300 rows of one expert are 44 in eight bits."""
    rows, counts = x.repeat(60, 1), torch.tensor([10, 300, 20, 30])
    ids = torch.arange(NUM_EXPERTS).repeat_interleave(counts)
    ends, out = ids.bincount(minlength=NUM_EXPERTS).to(torch.uint8).cumsum(0).tolist(), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        start = 0 if e == 0 else ends[e - 1]
        out[start : ends[e]] = m.expert(rows[start : ends[e]], e)
    return out


def counts_changed_after_they_were_read(m, x, ids, weights):
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    numbers, out, start = counts.tolist(), torch.zeros_like(rows), 0
    counts.fill_(1)
    for e, n in enumerate(numbers):
        out[start : start + n] = m.expert(rows[start : start + n], e)
        start += n
    return combined(x, weights, order, out) + counts.sum()


def summed_up_in_place_after_they_were_read(m, x, ids, weights):
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    sizes, out = counts.tolist(), []
    counts.cumsum_(0)
    for piece, expert in zip(rows.split(sizes), m.experts, strict=True):
        out.append(expert(piece))
    return combined(x, weights, order, torch.cat(out)) + counts.sum()


def sizes_changed_after_the_split(m, x, ids, weights):
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    pieces, out = rows.split(counts.tolist()), []
    counts.fill_(0)
    for e in range(NUM_EXPERTS):
        out.append(m.expert(pieces[e], e))
    return combined(x, weights, order, torch.cat(out))


def clamped_to_a_capacity(m, x, ids, weights):
    weights, ids = routed(m, x)
    _, rows, counts = in_order(x, ids)
    counts.clamp_(max=1)
    out, start = [], 0
    for e, n in enumerate(counts.tolist()):
        out.append(m.expert(rows[start : start + n], e))
        start += n
    return torch.cat(out)


def a_zero_before_the_tail(m, x, ids, weights):
    """Entry 0 of the ends is 0, not how many rows the first expert has."""
    order, rows, counts = in_order(x, ids)
    ends = counts.cumsum(0)
    stops, starts, out = torch.cat([ends.new_zeros(1), ends[1:]]), ends - counts, torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        out[starts[e] : stops[e]] = m.expert(rows[starts[e] : stops[e]], e)
    return combined(x, weights, order, out)


def padding_before_the_tail(m, x, ids, weights):
    weights, ids = routed(m, x)
    order, rows, counts = in_order(x, ids)
    ends = counts.cumsum(0)
    stops, starts, out = F.pad(ends[1:], (1, 0)).tolist(), (ends - counts).tolist(), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        out[starts[e] : stops[e]] = m.expert(rows[starts[e] : stops[e]], e)
    return combined(x, weights, order, out)


def an_index_that_wraps(m, x, ids, weights):
    """``ends[-1]`` is the last of them."""
    order, rows, counts = in_order(x, ids)
    ends, out = counts.cumsum(0), torch.zeros_like(rows)
    for e in range(NUM_EXPERTS):
        out[ends[e - 1] : ends[e]] = m.expert(rows[ends[e - 1] : ends[e]], e)
    return combined(x, weights, order, out)


def pieces_themselves(m, x, ids, weights):
    """The list holds views, which see what becomes of the tensor."""
    weights, ids = routed(m, x)
    _, rows, counts = in_order(x, ids)
    out, start = [], 0
    for n in counts.tolist():
        out.append(rows[start : start + n])
        start += n
    with torch.no_grad():
        rows.mul_(2)
    return torch.cat(out)


def ones_that_were_changed(m, x, ids, weights):
    """Counts that may be below 0."""
    order, rows, _ = in_order(x, ids)
    mask = (ids.unsqueeze(-1) == torch.arange(NUM_EXPERTS)).any(1).to(torch.long)
    mask[:2] = -1
    out, start = torch.zeros_like(rows), 0
    for e, n in enumerate(mask.sum(0).tolist()):
        out[start : start + n] = m.expert(rows[start : start + n], e)
        start += n
    return combined(x, weights, order, out)


RIGHT: tuple[Loop, ...] = (
    *(windows, from_the_end, sizes_that_may_be_negative, experts_without_the_first, more_rows_than_ids),
    *(fewer_rows_than_ids, unknown_total, changed_between, piece_changed_in_place, result_changed_in_place),
    *(changed_after_it_was_put_back, starts_at_one, starts_with_the_second, backwards, adds_one_more),
    *(adds_only_large_counts, leaves_small_ones_out_of_the_list, other_counts, counts_changed_in_place),
    *(number_after_the_loop, a_fraction, mean_of_a_piece, piece_upside_down, how_many_pieces, picks_from_the_list),
    *(list_upside_down, list_with_a_first_entry, pieces_side_by_side, appended_twice, some_other_rows_in_the_list),
    *(splits_of_another_order, with_a_step, columns, reads_what_it_writes, spans, stops_early, drops_over_capacity),
    *(truths_as_counts, narrow_counts, counts_changed_after_they_were_read, summed_up_in_place_after_they_were_read),
    *(sizes_changed_after_the_split, clamped_to_a_capacity, a_zero_before_the_tail, padding_before_the_tail),
    *(an_index_that_wraps, pieces_themselves, ones_that_were_changed),
)


NO_BACKWARD = (reads_what_it_writes, piece_changed_in_place, changed_between)
"""What eager does not differentiate either."""


@pytest.mark.parametrize("loop", RIGHT, ids=lambda loop: loop.__name__)
def test_right(loop: Loop) -> None:
    run(loop, inputs(), "grouped_mm", backward=loop not in NO_BACKWARD)


@pytest.mark.parametrize("loop", RIGHT, ids=lambda loop: loop.__name__)
def test_right_in_one_graph(loop: Loop) -> None:
    """Some are only captured where there has to be one graph; what cannot be is an error, and no other result."""
    with contextlib.suppress(Unsupported, UserError, InternalTorchDynamoError, GuardOnDataDependentSymNode):
        run(loop, inputs(), "grouped_mm", backward=loop not in NO_BACKWARD, fullgraph=True)


@pytest.mark.parametrize("loop", [windows, experts_without_the_first, more_rows_than_ids], ids=lambda f: f.__name__)
def test_rewritten_in_another_form(loop: Loop) -> None:
    (found,) = run(loop, inputs(), "grouped_mm", fullgraph=True)
    assert isinstance(found.dispatch, MaskDispatch if loop is windows else TopKDispatch)


def test_reason(caplog: pytest.LogCaptureFixture) -> None:
    module = Moe(mean_of_a_piece)
    with caplog.at_level(logging.INFO, logger="moe_rewrite"):
        torch.compile(module, backend="moe_rewrite", options={"inner": "eager"})(*inputs())
    assert "mixes the rows" in caplog.text or "mean" in caplog.text, caplog.text


class Listing(nn.Module):
    """Appends the rows of each expert to a list that others see."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = Moe(split_and_cat)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, given: list[Tensor] | None = None) -> Tensor:
        seen = self.seen if given is None else given
        order, rows, _ = in_order(x, ids)
        pieces = rows.split(F.one_hot(ids.flatten(), NUM_EXPERTS).sum(0).tolist(), dim=0)
        for e in range(NUM_EXPERTS):
            seen.append(self.moe.expert(pieces[e], e))
        return combined(x, weights, order, torch.cat(seen, dim=0))


@pytest.mark.parametrize("is_argument", [False, True])
def test_list_that_was_there_before(is_argument: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Its items are seen outside: it has to hold them one by one."""
    eager, module = Listing(), Listing()
    caplog.set_level("INFO", logger="moe_rewrite")
    fn = torch.compile(module, backend="moe_rewrite", options={"inner": "eager"})
    lists: list[list[Tensor]] = [[], []]
    results = [
        call(*inputs(), *([given] if is_argument else [])) for call, given in zip((eager, fn), lists, strict=True)
    ]
    torch.testing.assert_close(results[1], results[0])
    seen = lists if is_argument else [eager.seen, module.seen]
    assert len(seen[0]) == NUM_EXPERTS
    torch.testing.assert_close(seen[1], seen[0])
    assert "each expert's rows are appended to a list that was there before" in caplog.text
