"""``grouped_mm``: pairs sorted by expert once, then one grouped product for each product of the expert."""

from __future__ import annotations

from torch import Tensor

from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower.grouped_product import grouped_product
from moe_rewrite.lower.lift import Lifted


def lower(loop: ExpertsLoop, lifted: Lifted) -> None:
    """Lower ``loop`` to grouped products over the pairs, sorted by expert."""
    pairs = lifted.pairs().sorted_by_expert(loop.num_experts, lifted.needs_grad)
    offsets = pairs.offsets
    assert offsets is not None

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # The kernel leaves rows past the last offset unwritten, in the result and in the gradient of its input.
        rows = pairs.only_valid(rows) if lifted.needs_grad else rows
        result = grouped_product(rows, weight, offsets, bias, lifted.max_autotune, lifted.needs_grad)
        return pairs.lend_product(result) if lifted.lends else result

    lifted.run(pairs, product, with_bias=product)
