"""The floor: how fast the hardware could at best compute the experts of one call."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_rewrite.benchmark.shapes import DTYPE, ExpertsShape


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: bytes per second of a copy, operations per second of a large bf16 product."""

    bandwidth: float
    flops: float

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e12:.3g} TB/s, {self.flops / 1e12:.3g} TFLOP/s"


H200 = Ceilings(bandwidth=4.2e12, flops=780e12)


def floor_ms(shape: ExpertsShape, hit: float, tokens: int, backward: bool, ceilings: Ceilings) -> float:
    """Milliseconds below which no computation of these experts can be.

    Forward: the longer of reading the weights of the experts that were hit, and of the arithmetic. Backward, added to
    it where asked for: the longer of reading the same weights again and writing the gradient of *all* experts' weights
    (it is dense), and of twice the arithmetic. Activations and their traffic are left out.

    Args:
        shape: the experts.
        hit: experts that have at least one pair; a mean over several inputs need not be whole.
        tokens: tokens of the call; each has ``shape.top_k`` pairs.
        backward: whether the gradients are computed too.
        ceilings: what the machine reaches.
    """
    arithmetic = 2 * tokens * shape.top_k * shape.matrix_elements / ceilings.flops
    expert = shape.expert_bytes / ceilings.bandwidth
    seconds = max(hit * expert, arithmetic)
    if backward:
        seconds += max((hit + shape.num_experts) * expert, 2 * arithmetic)
    return seconds * 1e3


def mean_hit(indices: Sequence[Tensor], num_experts: int) -> float:
    """The mean number of experts hit by calls with these ``[T, K]`` expert ids. Ids of no expert do not count."""
    return statistics.mean(len(ids[(ids >= 0) & (ids < num_experts)].unique()) for ids in indices)


def measured_ceilings() -> Ceilings:
    """Of this machine's CPU, in a moment: the best of a few copies and products."""
    source, matrix = torch.ones(32 << 20, dtype=torch.uint8), torch.ones(512, 512, dtype=DTYPE)
    target = torch.empty_like(source)

    def best(action: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return min(times)

    copy, product = best(lambda: target.copy_(source)), best(lambda: matrix @ matrix)
    return Ceilings(2 * source.numel() / copy, 2 * 512**3 / product)
