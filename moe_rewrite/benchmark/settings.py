"""What all parts are told on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_rewrite.benchmark.measure import Budget


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to run a part.

    Attributes:
        device: where.
        modes: modes of ``torch.compile``, and "plain" for calls that are not compiled.
        variants: patterns of variants' names; None for all.
        repeats: timed calls of each variant.
        inner: what compiles the graphs, for peers and for ours.
        budget: seconds after which nothing new is begun.
        output: folder for the JSON lines; None for none.
        tiny: small sizes.
        workers: processes that compile beforehand, side by side; 0 for none.
        ahead_seconds: how long they may take.
    """

    device: torch.device
    modes: Sequence[str]
    variants: Sequence[str] | None = None
    repeats: int = 20
    inner: str = "inductor"
    budget: Budget = dataclasses.field(default_factory=Budget)
    output: Path | None = None
    tiny: bool = False
    workers: int = 0
    ahead_seconds: float = 300.0
