"""``batched_mm``: every pair multiplies with the weights of its expert on its own. For few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower.lift import Lifted


def lower(loop: ExpertsLoop, lifted: Lifted) -> None:
    """Lower ``loop`` to one product for each pair, in token order."""
    pairs = lifted.pairs()

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        if lifted.fuses:
            return _multiply_and_sum(rows, weight, pairs.expert)
        return torch.bmm(rows.unsqueeze(1), weight[pairs.expert]).squeeze(1)

    lifted.run(pairs, product)


def _multiply_and_sum(rows: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """The product written so that inductor makes one kernel of it, which reads the weights where they are.

    ``bmm`` would get a copy of the weights for each pair. Products are added in fp32, as a matmul adds them.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide).unsqueeze(2) * weight.to(wide)[expert]).sum(1).to(rows.dtype)
