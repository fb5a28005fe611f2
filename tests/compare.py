"""Compares a loop with itself in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from loops import Loop, Moe, assert_same, observe
from torch import Tensor, nn

import moe_rewrite
from moe_rewrite.loop import ExpertsLoop


def run(
    loop: Loop, args: tuple[Any, ...], backend: str, backward: bool = True, inner: str = "eager", **kwargs: Any
) -> list[ExpertsLoop]:
    """Assert that a loop does compiled what it does in Python; what it was recognised as, where it was rewritten."""
    eager, module = Moe(loop), Moe(loop)
    for made in (eager, module):
        for index, expert in enumerate(made.experts):
            nn.init.normal_(expert.weight, generator=torch.Generator().manual_seed(index))
    options = {"inner": inner, "experts": backend}
    torch._dynamo.reset()
    fn = torch.compile(module, backend="moe_rewrite", options=options, **kwargs)
    expected = observe(eager, eager, args, backward)
    assert_same(observe(fn, module, args, backward), expected)
    with torch.set_grad_enabled(backward):
        return [report.loop for report in moe_rewrite.explain(fn, *args).loops if report.refusal is None]


def losses_of_training(
    module: nn.Module, call: Callable[..., Tensor], args: Callable[[], Tensor], steps: int
) -> list[float]:
    """The loss of each step, as ``call``, which is ``module`` or was compiled from it, is trained."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = (call(args()) - 1).square().mean()
        module.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses
