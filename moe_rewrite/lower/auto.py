"""``auto``: which of the built-in experts backends a loop gets when nothing is configured."""

from __future__ import annotations

from moe_rewrite.loop import ExpertsLoop

MAX_BATCHED_PAIRS = {"cuda": 16, "cpu": 16}
"""Up to how many pairs ``batched_mm`` is chosen, by device type."""


def pick(loop: ExpertsLoop) -> tuple[str, str]:
    """The experts backend for ``loop``, and why."""
    device = loop.accumulator(loop.combines[0]).device.type
    pairs, limit = loop.num_pairs, MAX_BATCHED_PAIRS.get(device, 0)
    if not isinstance(pairs, int):
        return "grouped_mm", f"auto: the number of pairs, {pairs}, is not known when compiling"
    if pairs <= limit:
        return "batched_mm", f"auto: {pairs} pairs, {limit} at most on {device}"
    return "grouped_mm", f"auto: {pairs} pairs, more than {limit} on {device}"
