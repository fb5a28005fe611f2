"""Train a small Mixture-of-Experts model, eager and compiled with ``backend="moe_rewrite"``: the losses are the same.

    python examples/train.py

The weights are random: nothing is downloaded.
"""

from __future__ import annotations

import time

import torch
import transformers
from torch import nn

STEPS = 30


def small_model() -> nn.Module:
    """A Mixtral of one layer with random weights, the same each time."""
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_local_experts=8
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").train()


def train(model: nn.Module, compiled: bool) -> tuple[list[float], float]:
    """The loss of each step, and the milliseconds of a step, the first one left out."""
    call = torch.compile(model, backend="moe_rewrite", fullgraph=True) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Sequences that go up by one, from random starts.
    tokens = (torch.randint(256, (8, 1)) + torch.arange(32)) % 256
    losses = []
    for step in range(STEPS):
        if step == 1:
            start = time.perf_counter()
        loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, 1e3 * (time.perf_counter() - start) / (STEPS - 1)


def main() -> None:
    transformers.logging.set_verbosity_error()
    (eager, eager_ms), (compiled, compiled_ms) = (train(small_model(), compiled) for compiled in (False, True))
    print(f"{'step':>4} {'loss, eager':>12} {'loss, compiled':>15}")
    for step in range(0, STEPS, 6):
        print(f"{step:>4} {eager[step]:12.5f} {compiled[step]:15.5f}")
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=0)
    print(f"a step: eager {eager_ms:.0f} ms, compiled {compiled_ms:.0f} ms")


if __name__ == "__main__":
    main()
