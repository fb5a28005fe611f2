"""The points of the part ``experts``: shapes, numbers of tokens, and passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moe_rewrite.benchmark.measure import Row
from moe_rewrite.benchmark.shapes import SHAPES, ExpertsInputs, ExpertsShape
from moe_rewrite.benchmark.variants import Work

PART = "experts"
STAGES = ((16, 64, 512, 1, 4), (4096, 16384))
"""Numbers of tokens, the most important first. All shapes of one stage come before the next stage."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One shape, one number of tokens, forward alone or with backward."""

    shape: ExpertsShape
    tokens: int
    backward: bool

    @property
    def label(self) -> str:
        return f"{self.shape.name}:{self.tokens}{':backward' if self.backward else ''}"

    @property
    def pairs(self) -> int:
        return self.tokens * self.shape.top_k

    @property
    def work(self) -> Work:
        shape = self.shape
        return Work(self.tokens, shape.top_k, shape.num_experts, shape.expert_bytes, self.backward)

    def row(self) -> Row:
        return {
            "part": PART,
            "case": self.label,
            "shape": self.shape.name,
            "tokens": self.tokens,
            "pairs": self.pairs,
            "pass": "backward" if self.backward else "forward",
        }

    def arguments(self) -> list[str]:
        """The command line of this point alone."""
        passes = "backward" if self.backward else "forward"
        return ["--shapes", self.shape.name, "--tokens", str(self.tokens), "--passes", passes]


def make_stages(
    shapes: Sequence[str], tokens: Sequence[int], passes: Sequence[str], min_backward_tokens: int
) -> list[list[Point]]:
    """The points, in lists that are worked off one after another; those of one shape stand together.

    With backward from ``min_backward_tokens`` tokens on.
    """
    order = [[t for t in stage if t in tokens] for stage in STAGES]
    order[-1] += [t for t in tokens if not any(t in stage for stage in STAGES)]
    stages = []
    if "forward" in passes:
        stages += [[Point(SHAPES[name], t, False) for name in shapes for t in stage] for stage in order]
    if "backward" in passes:
        large = [t for stage in order for t in stage if t >= min_backward_tokens]
        stages.append([Point(SHAPES[name], t, True) for name in shapes for t in large])
    return [stage for stage in stages if stage]


@dataclasses.dataclass
class Experts:
    """A shape's module, and how to call it."""

    module: nn.Module
    backward: bool

    def __post_init__(self) -> None:
        self.module.requires_grad_(self.backward)

    @property
    def names(self) -> list[str]:
        """What a call returns: the output, and gradients."""
        weights = [name for name, _ in self.module.named_parameters()]
        return ["output", "hidden", "weights", *weights] if self.backward else ["output"]

    def call(self, run: Callable[..., Tensor], inputs: ExpertsInputs) -> tuple[Tensor, ...]:
        """The output ``[T, H]``; with backward also the gradients of all that have one, as ``names`` has them."""
        if not self.backward:
            with torch.no_grad():
                return (run(*inputs.arguments),)
        out = run(*inputs.arguments)
        leaves = [inputs.hidden, inputs.weights, *self.module.parameters()]
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.gradient))
