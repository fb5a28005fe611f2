"""``batched_mm``: every pair multiplies with its own copy of the weights. For few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower.lift import Lifted


def lower(loop: ExpertsLoop, lifted: Lifted) -> None:
    """Lower ``loop`` to batched products, in token order."""
    pairs = lifted.pairs()

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(rows.unsqueeze(1), weight[pairs.expert]).squeeze(1)

    lifted.run(pairs, product)
