"""``auto``: which of the built-in experts backends a loop gets when nothing is configured."""

from __future__ import annotations

import torch

from moe_rewrite.loop import EveryToken, ExpertsLoop
from moe_rewrite.lower import triton

MAX_BATCHED_PAIRS = {"cuda": 8, "cpu": 16}
"""Up to how many pairs ``batched_mm`` is chosen, by device type, where ``triton`` is not."""
HEAVY_ROWS = 512
"""From how many rows an expert on ``grouped_mm`` is chosen for heavy experts, see :func:`_is_heavy`."""
HEAVY_WORK = 8192
"""From how many multiplications on, for each number of a row that comes in or goes out, an expert is heavy."""


def pick(loop: ExpertsLoop, needs_grad: bool) -> tuple[str, str]:
    """The experts backend for ``loop``, and why. The numbers were measured on an H200 (docs/performance.md).

    Args:
        loop: the loop.
        needs_grad: whether there may be a gradient to compute.
    """
    if isinstance(loop.dispatch, EveryToken):
        return "batched_mm", "auto: each expert takes every token"
    device = loop.device.type
    pairs, limit = loop.num_pairs, MAX_BATCHED_PAIRS.get(device, 0)
    if pairs is None:
        return "grouped_mm", "auto: the number of pairs is known only at run time"
    if not isinstance(pairs, int):
        return "grouped_mm", f"auto: the number of pairs, {pairs}, is not known when compiling"
    if device == "cuda" and not needs_grad and triton.runs(loop):
        if _is_heavy(loop, pairs):
            return "grouped_mm", f"auto: {pairs} pairs, many for each of the experts, which are wide"
        return "triton", f"auto: {pairs} pairs, no gradients"
    if pairs <= limit:
        return "batched_mm", f"auto: {pairs} pairs, {limit} at most on {device}"
    more = f"auto: {pairs} pairs, more than {limit} on {device}"
    return "grouped_mm", f"{more}, to be trained" if device == "cuda" and needs_grad else more


def _is_heavy(loop: ExpertsLoop, pairs: int) -> bool:
    """Whether the products outweigh what ``grouped_mm`` does besides, sorting and permuting rows.

    Then its bf16 kernel is faster than ours: by 3 to 5 % in the shape of Mixtral-8x7B (1.5 times 14336 multiplications
    for each number permuted) at 1024 and 4096 rows an expert, not at 128; not in those of GPT-OSS-20B (1.5 times 2880)
    and narrower ones.
    """
    weights = [step.args[1].example for step in loop.matmuls()]
    if any(weight.dtype is not torch.bfloat16 for weight in weights) or pairs < HEAVY_ROWS * loop.num_experts:
        return False
    work = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    permuted = weights[0].shape[0] + weights[-1].shape[1]
    return bool(work >= HEAVY_WORK * permuted)
