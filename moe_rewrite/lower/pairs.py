"""The (token, slot) pairs of a loop: which expert each one goes to, and in which order they are computed."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from moe_rewrite.loop import ExpertsLoop


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All pairs of a loop, in token order or sorted by expert.

    Attributes:
        expert: the expert of each pair, ``[P]`` int64 in ``[0, num_experts)``; some expert for pairs of none.
        valid: whether the pair has an expert in this loop, ``[P]`` bool; None where all have.
        position: where each pair stands among the flattened expert ids, ``[P]`` int64.
        inverse: where each entry of the flattened expert ids stands among the pairs, ``[P]``; None in token order.
        offsets: where the pairs of each expert end, ``[num_experts]`` int32; None in token order. Pairs of no expert
            come after the last of them.
        shape: shape of the expert ids.
    """

    expert: Tensor
    valid: Tensor | None
    position: Tensor
    inverse: Tensor | None
    offsets: Tensor | None
    shape: torch.Size

    @classmethod
    def in_token_order(cls, loop: ExpertsLoop, expert_ids: Tensor, visited: Tensor | None) -> Pairs:
        """The pairs as they stand in ``expert_ids``.

        Args:
            loop: the loop.
            expert_ids: the value of its expert ids, any shape and integer dtype.
            visited: which experts the loop visits, ``[n]`` bool; None for all that have pairs.
        """
        ids = expert_ids.reshape(-1).to(torch.int64)
        position = torch.arange(ids.shape[0], device=ids.device)
        if loop.dispatch.in_range:
            return cls(ids, None, position, None, None, expert_ids.shape)
        valid = torch.zeros_like(ids, dtype=torch.bool)
        for experts in loop.experts:
            valid = valid | ((ids >= experts.start) & (ids < experts.stop))
        expert = torch.where(valid, ids, loop.experts[0].start)
        if visited is not None:
            valid = valid & visited[expert]
        return cls(expert, valid, position, None, None, expert_ids.shape)

    def sorted_by_expert(self, num_experts: int) -> Pairs:
        """The same pairs with those of one expert side by side. Two sorts, no synchronisation with the device."""
        key = self.expert if self.valid is None else torch.where(self.valid, self.expert, num_experts)
        key, order = torch.sort(key, stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, self.position)
        bins = torch.arange(num_experts, device=key.device)
        offsets = torch.searchsorted(key, bins, right=True, out_int32=True)
        valid = None if self.valid is None else key < num_experts
        expert = key if valid is None else torch.where(valid, key, self.expert[order])
        return Pairs(expert, valid, order, inverse, offsets, self.shape)

    def coordinate(self, axis: int | None) -> Tensor:
        """Where each pair stands along an axis of the expert ids, ``[P]`` int64; 0 for an axis of length 1 (None)."""
        if axis is None:
            return torch.zeros_like(self.position)
        step = math.prod(self.shape[axis + 1 :])
        along = self.position // step if axis + 1 < len(self.shape) else self.position
        return along % self.shape[axis] if axis > 0 else along

    def only_valid(self, rows: Tensor) -> Tensor:
        """``rows`` ``[P, ...]`` with zeros for the pairs of no expert, in the result and in its gradient."""
        if self.valid is None:
            return rows
        return torch.where(self.valid.view(-1, *[1] * (rows.dim() - 1)), rows, 0)

    def to_token_order(self, rows: Tensor) -> Tensor:
        """``rows`` ``[P, ...]`` of these pairs in the order of the expert ids."""
        return rows if self.inverse is None else rows[self.inverse]
