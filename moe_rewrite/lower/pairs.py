"""The (token, slot) pairs of a loop: which expert each one goes to, and in which order they are computed.

There is one for each of the expert ids; where any other mask says which rows an expert has, one for each entry set in
it.

Expert ids may name experts that the loop does not run: sentinels of expert parallelism, dropped tokens. Eager never
looks at such a pair. Here it has a place among the others, so it gets the token, slot and expert of a pair that does
count: all that is computed for it is then as finite as what eager computes, in the gradient too, before it is dropped.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from moe_rewrite.loop import ExpertsLoop, Place, TopKDispatch
from moe_rewrite.lower import rows_mm
from moe_rewrite.lower.adjoints import permuted
from moe_rewrite.lower.launch import available

MAX_COUNTED_EXPERTS = 4096
"""Up to how many experts pairs are sorted by our kernel, which counts those of each expert in each block of pairs."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All pairs of a loop, in token order or sorted by expert.

    Attributes:
        expert: the expert of each pair, ``[P]`` int64 in ``[0, num_experts)``.
        valid: whether the pair has an expert in this loop, ``[P]`` bool; None where all have.
        position: where each pair stands among the flattened expert ids, or in the flattened mask of its expert,
            ``[P]`` int64.
        inverse: where each entry of the flattened expert ids stands among the pairs, ``[P]``; None in token order, and
            for pairs of a mask.
        key: the expert of each pair, ``[P]`` of an integer dtype: outside ``[0, num_experts)`` for pairs of no expert.
        offsets: where the pairs of each expert end, ``[num_experts]`` int32; None in token order. Pairs of no expert
            come after the last of them.
        shape: shape of the expert ids, or of the mask of one expert.
        lender: the pair whose rows the pairs of no expert get, one number; None for the first. Sorted, it is the first.
        order: which entry of the flattened expert ids each pair is, ``[P]``, the inverse of ``inverse``; None where
            that is, and where there are no gradients.
    """

    expert: Tensor
    valid: Tensor | None
    position: Tensor
    inverse: Tensor | None
    key: Tensor
    offsets: Tensor | None
    shape: torch.Size
    lender: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def in_token_order(cls, loop: ExpertsLoop, expert_ids: Tensor, visited: Tensor | None, lends: bool = True) -> Pairs:
        """The pairs as they stand in ``expert_ids``.

        Args:
            loop: the loop. Its dispatch is top-k.
            expert_ids: the value of its expert ids, any shape and integer dtype.
            visited: which experts the loop visits, ``[n]``: those that are not 0; None for all that have pairs.
            lends: whether pairs of no expert get the token, slot and expert of another. Where they do not, they keep
                their own token and slot and get some expert.
        """
        dispatch = loop.dispatch
        assert isinstance(dispatch, TopKDispatch)
        ids = expert_ids.reshape(-1).to(torch.int64)
        position = torch.arange(ids.shape[0], device=ids.device)
        once = None if dispatch.merged is None else first_of_slots(ids, expert_ids.shape, dispatch.merged, dispatch)
        if dispatch.in_range and once is None:
            return cls(ids, None, position, None, ids, None, expert_ids.shape)
        valid = torch.zeros_like(ids, dtype=torch.bool)
        for experts in loop.experts:
            valid = valid | ((ids >= experts.start) & (ids < experts.stop))
        expert = torch.where(valid, ids, loop.experts[0].start)
        if visited is not None:
            valid = valid & (visited[expert] != 0)
        if once is not None:
            valid = valid & once
        plain = loop.experts == (range(loop.num_experts),) and visited is None and once is None
        key = ids if plain else torch.where(valid, expert, loop.num_experts)
        if ids.shape[0] == 0 or not lends:
            return cls(expert, valid, position, None, key, None, expert_ids.shape)
        # The first pair that counts. Of int8, inductor's code for a GPU casts the index to int8 too (seen in 2.11).
        lender = valid.to(torch.int32).argmax()
        source = torch.where(valid, position, lender)
        return cls(expert[source], valid, source, None, key, None, expert_ids.shape, lender)

    @classmethod
    def of_mask(cls, loop: ExpertsLoop, mask: Tensor, visited: Tensor | None) -> Pairs:
        """The entries that are set in a mask, sorted by expert. Their number is known only once it is computed.

        Args:
            loop: the loop. Its dispatch is by a mask.
            mask: which entries each expert has, ``[num_experts, ...]``: those that are not 0.
            visited: which experts the loop visits, ``[n]``: those that are not 0; None for all.
        """
        flat = mask.reshape(mask.shape[0], -1) != 0
        if loop.experts != (range(loop.num_experts),):
            number = torch.arange(mask.shape[0], device=mask.device)
            runs = torch.zeros_like(number, dtype=torch.bool)
            for experts in loop.experts:
                runs = runs | ((number >= experts.start) & (number < experts.stop))
            flat = flat & runs.unsqueeze(1)
        if visited is not None:
            flat = flat & (visited[: mask.shape[0]] != 0).unsqueeze(1)
        expert, position = flat.nonzero().unbind(1)
        offsets = flat.sum(1).cumsum(0).to(torch.int32)
        return cls(expert, None, position, None, expert, offsets, mask.shape[1:])

    def sorted_by_expert(self, num_experts: int, needs_grad: bool = True) -> Pairs:
        """The same pairs with those of one expert side by side, without synchronisation with the device."""
        if self.offsets is not None:
            return self
        key = self.key if self.valid is None else torch.where(self.valid, self.key, num_experts)
        order, inverse, offsets = sort_by_expert(key, num_experts)
        kept = order if needs_grad else None
        if self.valid is None:
            expert = key[order]
            return Pairs(expert, None, self.position[order], inverse, expert, offsets, self.shape, order=kept)
        valid = torch.arange(order.shape[0], device=order.device) < offsets[-1:]
        if self.lender is None:
            expert, position = self.expert[order], self.position[order]
        else:  # the first pair of the sorted ones lends: to find it takes no search
            position = torch.where(valid, order, order[:1])
            expert = key[position].clamp(max=num_experts - 1)
        return Pairs(expert, valid, position, inverse, key[order], offsets, self.shape, order=kept)

    def coordinate(self, axis: int | None) -> Tensor:
        """Where each pair stands along an axis of the expert ids, ``[P]`` int64; 0 for an axis of length 1 (None)."""
        if axis is None:
            return torch.zeros_like(self.position)
        step = math.prod(self.shape[axis + 1 :])
        along = self.position // step if axis + 1 < len(self.shape) else self.position
        return along % self.shape[axis] if axis > 0 else along

    def only_valid(self, rows: Tensor, zero: float = 0) -> Tensor:
        """``rows`` ``[P, ...]`` with ``zero`` for the pairs of no expert, and zeros in the gradient."""
        return rows if self.valid is None else torch.where(_column(self.valid, rows), rows, zero)

    def lend(self, rows: Tensor) -> Tensor:
        """``rows`` ``[P, ...]`` with those of the lender for the pairs of no expert."""
        if self.valid is None:
            return rows
        own = self.only_valid(rows)
        lent = own[:1] if self.lender is None else own.index_select(0, self.lender.reshape(1))
        # What comes of them is dropped, so their gradients are zeros: the lender need not add them up.
        return torch.where(_column(self.valid, rows), rows, lent.detach())

    def lend_product(self, rows: Tensor) -> Tensor:
        """The same for what a grouped product just gave, whose gradient for pairs of no expert nothing looks at."""
        if self.valid is None:
            return rows
        assert self.offsets is not None, "pairs of a grouped product are sorted"
        lent = rows_mm.lend_rows(rows, self.offsets)
        return self.lend(rows) if lent is None else lent

    def harmless_index(self, index: Tensor) -> Tensor:
        """An index for each pair, 0 where no pair at all counts: what the ids lead to could be out of range there."""
        return index if self.valid is None else torch.where(self._any_valid(), index, 0)

    def harmless_rows(self, rows: Tensor) -> Tensor:
        """``rows`` ``[P, ...]``, ones where no pair at all counts: NaN would reach the gradients of weights."""
        return rows if self.valid is None else torch.where(self._any_valid(), rows, 1)

    def _any_valid(self) -> Tensor:
        assert self.valid is not None
        # Counted: what inductor makes of `any` on a GPU (2.11, 2.13) is an int8, for which Triton has no `where`.
        return (self.valid.sum() if self.offsets is None else self.offsets[-1]) > 0

    def to_token_order(self, rows: Tensor) -> Tensor:
        """``rows`` ``[P, ...]`` of these pairs in the order of the expert ids."""
        if self.inverse is None:
            return rows
        if self.order is None or not rows.is_floating_point():
            return rows[self.inverse]
        return permuted(rows, self.inverse, self.order)

    def from_token_order(self, rows: Tensor) -> Tensor:
        """``rows`` ``[P, ...]`` in the order of the expert ids, in the order of these pairs."""
        if self.inverse is None:
            return rows
        assert self.order is not None, "they were sorted without gradients"
        return permuted(rows, self.order, self.inverse)


def first_of_slots(ids: Tensor, shape: torch.Size, place: Place, dispatch: TopKDispatch) -> Tensor | None:
    """Which ids are the first of those that are equal and agree in ``place``, ``[P]`` bool; None if all are.

    Args:
        ids: the flattened expert ids, ``[P]``.
        shape: their shape.
        place: what makes one row of equal ids, such as the token.
        dispatch: what is known of the ids.
    """
    return _alone(ids, shape, place, dispatch, last=False)


def last_of_slots(ids: Tensor, shape: torch.Size, place: Place, dispatch: TopKDispatch) -> Tensor | None:
    """The same for the last of them."""
    return _alone(ids, shape, place, dispatch, last=True)


def _alone(ids: Tensor, shape: torch.Size, place: Place, dispatch: TopKDispatch, last: bool) -> Tensor | None:
    before, own, after = place.extents(shape)
    slots = before * after
    runs_differ = before == 1 and dispatch.distinct % after == 0
    if slots == 1 or runs_differ:
        return None
    by_slot = ids.reshape(before, own, after).transpose(0, 1).reshape(own, slots)
    slot = torch.arange(slots, device=ids.device)
    others = slot.unsqueeze(0) > slot.unsqueeze(1) if last else slot.unsqueeze(0) < slot.unsqueeze(1)
    again = ((by_slot.unsqueeze(1) == by_slot.unsqueeze(2)) & others).any(-1)  # [own, slot]
    return ~again.reshape(own, before, after).transpose(0, 1).reshape(-1)


def _column(valid: Tensor, rows: Tensor) -> Tensor:
    return valid.view(-1, *[1] * (rows.dim() - 1))


def sort_by_expert(key: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable sort of ``key`` ``[P]`` in ``[0, num_experts]``.

    Returns:
        The order, its inverse (``[P]`` int64 each), and where each key below ``num_experts`` ends (int32).
    """
    pairs = key.shape[0]
    place = torch.arange(pairs, device=key.device)
    if isinstance(pairs, int) and pairs == 0:  # of a search in nothing inductor makes code that Triton cannot compile
        return place, place, key.new_zeros(num_experts, dtype=torch.int32)
    if key.device.type == "cuda" and available(key.device) and num_experts <= MAX_COUNTED_EXPERTS:
        # A few launches less than operators of torch's have.
        order, inverse, offsets = rows_mm.sort_by_expert(key, num_experts)
        return order.to(torch.int64), inverse.to(torch.int64), offsets
    sorted_key, order = torch.sort(key, stable=True)
    inverse = torch.empty_like(order).scatter(0, order, place)
    bins = torch.arange(num_experts, device=key.device)
    return order, inverse, torch.searchsorted(sorted_key, bins, right=True, out_int32=True)
