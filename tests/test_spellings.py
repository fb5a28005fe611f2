"""Spellings of experts loops that only Dynamo sees, and what is easily taken for them.

Results, gradients and side effects are eager's, in float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import run
from loops import HIDDEN, INTERMEDIATE, NUM_EXPERTS, Loop, hits, inputs

BACKENDS = ("batched_mm", "grouped_mm")


# --- rewritten --------------------------------------------------------------------------------------------------------


def adds_to_a_new_tensor(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for (e,) in hits(mask):
        slot, token = torch.where(mask[e])
        out = out.index_add(0, token, m.expert(x[token], e) * weights[token, slot, None])
    return out


def scatters_to_a_new_tensor(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in hits(mask):
        slot, token = torch.where(mask[e[0]])
        rows = m.expert(x[token], e[0]) * weights[token, slot, None]
        out = out.scatter_add(0, token[:, None].expand(-1, HIDDEN), rows)
    return out


def _block(m, e):
    """The up and the down projection as blocks of two matrices that hold all of them."""
    up, down = m.up.view(-1, HIDDEN), m.down.transpose(1, 2).reshape(-1, HIDDEN)
    return up[e * INTERMEDIATE : (e + 1) * INTERMEDIATE], down[e * INTERMEDIATE : (e + 1) * INTERMEDIATE]


def blocks_of_one_matrix(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        up, down = _block(m, e)
        out.index_add_(0, token, F.silu(x[token] @ up.T) @ down * weights[token, slot, None])
    return out


def halves_of_blocks(m, x, ids, weights):
    """Two weights of each expert, one after the other in one matrix."""
    out, mask, both = torch.zeros_like(x), m.mask(ids), torch.cat([m.up, m.up * 2], 1).view(-1, HIDDEN)
    n = INTERMEDIATE
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        gate, up = both[e * 2 * n : e * 2 * n + n, :], both[e * 2 * n + n : (e + 1) * 2 * n, :]
        rows = F.silu(x[token] @ gate.T) * (x[token] @ up.T) @ m.down[e].T
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


def comprehension_and_stack(m, x, ids, weights):
    gates = torch.zeros(x.shape[0], NUM_EXPERTS, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
    outputs = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (outputs * gates.unsqueeze(-1)).sum(1)


def comprehension_over_numbers(m, x, ids, weights):
    gates = torch.zeros(x.shape[0], NUM_EXPERTS, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
    outputs = [m.expert(x, e) * gates[:, e, None] for e in range(NUM_EXPERTS)]
    return torch.stack(outputs).sum(0)


def positions_as_lists(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        if token.shape[0] == 0:
            continue
        tokens, slots = token.tolist(), slot.tolist()
        rows = x[None, tokens].reshape(-1, HIDDEN)
        out.index_add_(0, token, m.expert(rows, e) * weights[tokens, slots, None])
    return out


def convolutions_of_one_position(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        rows = F.silu(F.conv1d(x[token].unsqueeze(-1), m.up[e].unsqueeze(-1)))
        rows = F.conv1d(rows, m.down[e].unsqueeze(-1), m.bias[e]).squeeze(-1)
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


def convolution_over_a_whole_row(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        rows = F.conv2d(x[token].view(-1, 2, 2, 2), m.weight[e].view(HIDDEN, 2, 2, 2), m.bias[0])
        out.index_add_(0, token, rows.flatten(1) * weights[token, slot, None])
    return out


def writes_by_a_mask_and_reads_by_its_flat_view(m, x, ids, weights):
    out, batched, batched_ids = (t.view(2, -1, t.shape[-1]) for t in (torch.zeros_like(x), x, ids))
    flat, gates = x, torch.zeros(x.shape[0], NUM_EXPERTS, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
    for e in range(NUM_EXPERTS):
        mask = (batched_ids == e).any(dim=-1)
        flat_mask = mask.view(-1)
        if flat_mask.any():
            out[mask] += m.expert(flat[flat_mask], e) * gates[flat_mask, e].unsqueeze(1)
    return out + batched


def constants(m, x, ids, weights):
    """Two loops that differ in their constants alone."""
    out, mask = torch.zeros_like(x), m.mask(ids)
    for limit, scale in ((0.5, [1.0, 2.0]), (0.25, [3.0, -1.0])):
        for (e,) in hits(mask):
            slot, token = torch.where(mask[e])
            rows = m.expert(x[token], e).clamp(max=torch.tensor(limit, dtype=x.dtype, device=x.device))
            rows = torch.minimum(rows, torch.tensor(limit / 2)) - torch.where(rows > 0, rows, torch.tensor(limit))
            rows = rows * torch.tensor(scale, dtype=x.dtype, device=x.device).repeat(HIDDEN // 2) + torch.as_tensor(1)
            out.index_add_(0, token, rows * weights[token, slot, None])
    return out


def columns_by_a_list(m, x, ids, weights):
    out, mask, order = torch.zeros_like(x), m.mask(ids), list(range(HIDDEN))
    for (e,) in hits(mask):
        slot, token = torch.where(mask[e])
        rows = m.expert(x[token][:, order[::-1]], e)[..., torch.tensor(order[1:] + order[:1])]
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


REWRITTEN: tuple[Loop, ...] = (
    *(constants, columns_by_a_list),
    *(adds_to_a_new_tensor, scatters_to_a_new_tensor, blocks_of_one_matrix, halves_of_blocks),
    *(
        comprehension_and_stack,
        comprehension_over_numbers,
        positions_as_lists,
        writes_by_a_mask_and_reads_by_its_flat_view,
    ),
    *(convolutions_of_one_position, convolution_over_a_whole_row),
)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_constants_through_the_compilers(inner: str) -> None:
    assert run(constants, inputs(), "grouped_mm", inner=inner, fullgraph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loop", REWRITTEN, ids=lambda loop: loop.__name__)
def test_rewritten(loop: Loop, backend: str) -> None:
    assert run(loop, inputs(), backend, fullgraph=True)


# --- left as they are, or right ---------------------------------------------------------------------------------------


def reads_what_it_adds_to(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for (e,) in hits(mask):
        slot, token = torch.where(mask[e])
        out = out.index_add(0, token, m.expert(x[token] + out[token], e))
    return out


def changes_a_constant(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for (e,) in hits(mask):
        slot, token = torch.where(mask[e])
        scale = torch.tensor([1.0, 2.0], dtype=x.dtype)
        scale[0] += 1
        scale.mul_(2)
        out.index_add_(0, token, m.expert(x[token], e) * scale.sum())
    return out


def constant_from_before(m, x, ids, weights):
    """One tensor for all experts: each changes it."""
    out, mask, scale = torch.zeros_like(x), m.mask(ids), torch.tensor(1.0, dtype=x.dtype)
    for (e,) in hits(mask):
        slot, token = torch.where(mask[e])
        scale *= 2
        out.index_add_(0, token, m.expert(x[token], e) * scale)
    return out


def starts_again(m, x, ids, weights):
    """Each iteration begins with what was there before the loop: the last one counts."""
    start, mask = torch.zeros_like(x), m.mask(ids)
    for (e,) in hits(mask):
        slot, token = torch.where(mask[e])
        out = start.index_add(0, token, m.expert(x[token], e))
    return out


def keeps_the_first(m, x, ids, weights):
    out = first = torch.zeros_like(x)
    for (e,) in hits(m.mask(ids)):
        slot, token = torch.where(m.mask(ids)[e])
        out = out.index_add(0, token, m.expert(x[token], e))
    return out + first


def doubles(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for (e,) in hits(mask):
        slot, token = torch.where(mask[e])
        out = (out * 2).index_add(0, token, m.expert(x[token], e))
    return out


def overlapping_blocks(m, x, ids, weights):
    out, mask, rows = torch.zeros_like(x), m.mask(ids), m.weight.view(-1, HIDDEN)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, x[token] @ rows[e * 3 : e * 3 + HIDDEN])
    return out


def blocks_past_the_end(m, x, ids, weights):
    """The last block is shorter."""
    out, mask, rows = torch.zeros_like(x), m.mask(ids), m.weight.view(-1, HIDDEN)[: 4 * HIDDEN - 3]
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, (x[token] @ rows[e * HIDDEN : (e + 1) * HIDDEN].T).sum(-1, keepdim=True).expand(-1, 8))
    return out


def blocks_backwards(m, x, ids, weights):
    out, mask, rows = torch.zeros_like(x), m.mask(ids), m.weight.view(-1, HIDDEN)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        first = (NUM_EXPERTS - 1 - e) * HIDDEN
        out.index_add_(0, token, x[token] @ rows[first : first + HIDDEN])
    return out


def block_of_the_next(m, x, ids, weights):
    out, mask, rows = torch.zeros_like(x), m.mask(ids), m.weight.view(-1, HIDDEN)
    for e in range(NUM_EXPERTS - 1):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, x[token] @ rows[(e + 1) * HIDDEN : (e + 2) * HIDDEN])
    return out


def writes_blocks(m, x, ids, weights):
    out = torch.zeros(NUM_EXPERTS * x.shape[0], HIDDEN, dtype=x.dtype)
    n = x.shape[0]
    for e in range(NUM_EXPERTS):
        out[e * n : (e + 1) * n] = m.expert(x, e)
    return out


def changes_blocks_in_place(m, x, ids, weights):
    scaled = m.weight.detach().clone().view(-1, HIDDEN)
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        block = scaled[e * HIDDEN : (e + 1) * HIDDEN]
        block.mul_(2)
        out.index_add_(0, token, x[token] @ block)
    return out + scaled.sum()


def comprehension_with_a_condition(m, x, ids, weights):
    return torch.stack([m.expert(x, e) for e in range(NUM_EXPERTS) if e != 1]).sum(0)


def comprehension_by_data(m, x, ids, weights):
    return torch.stack([m.expert(x, e) for e in range(NUM_EXPERTS) if (ids == e).any()]).sum(0)


def comprehension_with_a_side_effect(m, x, ids, weights):
    def count(y):
        m.calls += 1
        return y

    return torch.stack([count(m.expert(x, e)) for e in range(NUM_EXPERTS)]).sum(0)


def comprehension_of_views(m, x, ids, weights):
    x = x.clone()
    parts = [x[:, e] for e in range(NUM_EXPERTS)]
    parts[0].mul_(2)
    return torch.stack(parts).sum(0) + x.sum()


def nested_comprehension(m, x, ids, weights):
    return torch.stack([torch.stack([m.expert(x, e) * k for k in range(1, 3)]).sum(0) for e in range(NUM_EXPERTS)])


def comprehension_of_pairs(m, x, ids, weights):
    pairs = [(m.expert(x, e), e) for e in range(NUM_EXPERTS)]
    return sum(y * e for y, e in pairs)


def comprehension_of_random_numbers(m, x, ids, weights):
    return torch.stack([m.expert(x, e) + torch.rand_like(x) for e in range(NUM_EXPERTS)]).sum(0)


def positions_in_another_order(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        tokens = token.tolist()
        out.index_add_(0, token, m.expert(x[tokens[::-1]], e))
    return out


def positions_that_change(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        tokens = token.tolist()
        token.fill_(0)
        out[tokens] += m.expert(x[tokens], e) + x[token]
    return out


def how_many_positions(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        tokens = token.tolist()
        out.index_add_(0, token, m.expert(x[tokens], e) * len(tokens))
    return out


def _convolved(m, x, ids, **how):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, F.conv1d(x[token].unsqueeze(1), m.weight[e, :1, None, :3], **how).squeeze(1))
    return out


def convolution_that_moves(m, x, ids, weights):
    return _convolved(m, x, ids, padding=1)


def convolution_in_groups(m, x, ids, weights):
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        out.index_add_(0, token, F.conv1d(x[token].unsqueeze(-1), m.weight[e, :, :4, None], groups=2).squeeze(-1))
    return out


def convolution_over_the_rows(m, x, ids, weights):
    """The rows are what a kernel of 3 moves over."""
    out, mask = torch.zeros_like(x), m.mask(ids)
    for e in range(NUM_EXPERTS):
        slot, token = torch.where(mask[e])
        kernel = m.weight[e, :, :, None].expand(-1, -1, 3)
        out.index_add_(0, token, F.conv1d(x[token].t().unsqueeze(0), kernel, padding=1).squeeze(0).t())
    return out


def a_mask_and_its_transpose(m, x, ids, weights):
    """As many rows, in another order."""
    out, batched_ids = torch.zeros_like(x).view(2, -1, HIDDEN), ids.view(2, -1, ids.shape[-1])
    for e in range(NUM_EXPERTS):
        mask = (batched_ids == e).any(dim=-1)
        if mask.any():
            out[mask] += m.expert(x[mask.T.reshape(-1)], e)
    return out


RIGHT: tuple[Loop, ...] = (
    *(reads_what_it_adds_to, starts_again, keeps_the_first, doubles, overlapping_blocks, blocks_past_the_end),
    *(blocks_backwards, block_of_the_next, writes_blocks, changes_blocks_in_place, comprehension_with_a_condition),
    *(comprehension_by_data, comprehension_with_a_side_effect, comprehension_of_views, nested_comprehension),
    *(comprehension_of_pairs, comprehension_of_random_numbers, a_mask_and_its_transpose),
    *(convolution_that_moves, convolution_in_groups, convolution_over_the_rows),
    *(positions_in_another_order, positions_that_change, how_many_positions),
    *(changes_a_constant, constant_from_before),
)


@pytest.mark.parametrize("loop", RIGHT, ids=lambda loop: loop.__name__)
def test_right(loop: Loop) -> None:
    run(loop, inputs(), "grouped_mm", backward=loop not in (changes_blocks_in_place, constant_from_before))
