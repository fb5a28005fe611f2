"""``batched_mm``: every pair multiplies with the weights of its expert on its own. For few tokens."""

from __future__ import annotations

from torch import Tensor

from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower.batched_product import gather_and_multiply, multiply_and_sum
from moe_rewrite.lower.lift import Lifted


def lower(loop: ExpertsLoop, lifted: Lifted) -> None:
    """Lower ``loop`` to one product for each pair, in token order."""
    pairs = lifted.pairs()
    multiply = multiply_and_sum if lifted.fuses else gather_and_multiply

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = multiply(rows, weight, pairs.expert, bias)
        # Where no pair counts, the weights are those of an expert that eager does not touch: they may be NaN.
        return pairs.harmless_rows(result) if lifted.needs_grad else result

    lifted.run(pairs, product, with_bias=product)
