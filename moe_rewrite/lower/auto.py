"""``auto``: which of the built-in experts backends a loop gets when nothing is configured."""

from __future__ import annotations

from moe_rewrite.loop import EveryToken, ExpertsLoop
from moe_rewrite.lower import triton

MAX_BATCHED_PAIRS = {"cuda": 8, "cpu": 16}
"""Up to how many pairs ``batched_mm`` is chosen, by device type.

Measured on an H200 (docs/performance.md): at 4 pairs it is 1.1 times as fast as ``triton``, at 64 ``triton`` is 1.8
times as fast. What lies between is an estimate: the time of ``batched_mm`` grows by the pair.
"""


def pick(loop: ExpertsLoop, needs_grad: bool) -> tuple[str, str]:
    """The experts backend for ``loop``, and why.

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
    if pairs <= limit:
        return "batched_mm", f"auto: {pairs} pairs, {limit} at most on {device}"
    more = f"auto: {pairs} pairs, more than {limit} on {device}"
    if device == "cuda" and not needs_grad and triton.runs(loop):
        return "triton", more
    return "grouped_mm", f"{more}, to be trained" if device == "cuda" and needs_grad else more
