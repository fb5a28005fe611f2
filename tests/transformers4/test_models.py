"""Whole models of transformers 4, tiny: one graph, all their loops rewritten, the logits of eager."""

from __future__ import annotations

import copy

import pytest
import torch
from experts_classes import EXPERTS_BACKENDS, compiled
from graphs import Graphs
from models import BROKEN, LOOPS, MODELS, build, experts_of, logits
from refused import NOT_REWRITTEN, marks_of


def parameters():
    return [pytest.param(name, marks=marks_of(LOOPS[name]), id=name) for name in MODELS]


def experts_backend_of(name):
    """The models are divided between the experts backends: both were tried on each block."""
    return EXPERTS_BACKENDS[list(MODELS).index(name) % len(EXPERTS_BACKENDS)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_depend_on_the_experts(name):
    model = build(name)
    without = copy.deepcopy(model)
    for parameter in experts_of(without):
        parameter.data.zero_()
    with torch.no_grad():
        assert (logits(without) - logits(model)).abs().mean() > 0.05


@pytest.mark.parametrize("name", parameters())
def test_rewritten_with_the_logits_of_eager(name):
    model, graphs = build(name), Graphs()
    holders = blocks_of(model)
    assert holders
    fast = compiled(model, experts_backend_of(name), graphs, fullgraph=name not in BROKEN)
    with torch.no_grad():
        for length in (9, 1):
            torch.testing.assert_close(logits(fast, length), logits(model, length), rtol=1e-4, atol=1e-5)
            assert len(graphs) == 1 or name in BROKEN
            assert {path for path, _ in graphs.rewritten()} == holders
            graphs.clear()
            torch._dynamo.reset()


def blocks_of(model):
    """The paths of the modules whose forward loops over experts."""
    return {path for path, module in model.named_modules() if type(module).__name__ == LOOPS[type(model).__name__]}


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"])
def test_trains_as_eager(name):
    """Three steps of SGD on the loss of the model: the parameters stay those of eager."""
    eager = build(name)
    trained = copy.deepcopy(eager)
    fast = compiled(trained, experts_backend_of(name), "aot_eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (eager, trained)]
    for step in range(3):
        for model, optimizer in zip((eager, fast), optimizers, strict=True):
            optimizer.zero_grad()
            logits(model, 5 + step).square().mean().backward()
            optimizer.step()
    for (path, ours), expected in zip(trained.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("name", [name for name in MODELS if LOOPS[name] in NOT_REWRITTEN])
def test_not_rewritten_has_the_logits_of_eager(name):
    model = build(name)
    fast = compiled(model, experts_backend_of(name), "eager", fullgraph=False)
    with torch.no_grad():
        for length in (9, 1):
            torch.testing.assert_close(logits(fast, length), logits(model, length), rtol=1e-4, atol=1e-5)
