"""``auto``: which of the built-in experts backends a loop gets when nothing is configured."""

from __future__ import annotations

from moe_rewrite.loop import EveryToken, ExpertsLoop

MAX_BATCHED_PAIRS = {"cuda": 16, "cpu": 16}
"""Up to how many pairs ``batched_mm`` is chosen, by device type."""


def pick(loop: ExpertsLoop) -> tuple[str, str]:
    """The experts backend for ``loop``, and why."""
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
    return "grouped_mm", f"auto: {pairs} pairs, more than {limit} on {device}"
