"""Every class of the installed transformers that loops over experts: rewritten, or known to be left as it is.

float32, on the CPU, through the inner compiler "eager": what is compared with eager are the numbers of the rewrite.
The classes are found in transformers' source; one that is not rewritten is in ``NOT_REWRITTEN``, with the reason.
"""

from __future__ import annotations

import copy

import pytest
import torch
from experts_classes import (
    EXPERTS_BACKENDS,
    IDLE_EXPERT,
    NOT_REWRITTEN,
    WHOLE_MODELS,
    ExpertsClass,
    Inputs,
    assert_equals_eager,
    build,
    build_whole,
    by_body,
    compiled,
    experts_classes,
    result,
)
from graphs import Graphs
from hub import MODELS

CLASSES = {cls.name: cls for cls in experts_classes()}


def in_order(names) -> list:
    """``names`` as parameters. Those of :data:`NOT_REWRITTEN` have to fail: one that works must be removed there."""
    return [
        pytest.param(CLASSES[name], id=name, marks=[pytest.mark.xfail(strict=True, reason=NOT_REWRITTEN[name])])
        if name in NOT_REWRITTEN
        else pytest.param(CLASSES[name], id=name)
        for name in names
        if name in CLASSES
    ]


def test_classes_are_found():
    assert {"MixtralExperts", "Qwen3MoeExperts", "GptOssExperts", "DbrxExperts", "JetMoeParallelExperts"} <= set(
        CLASSES
    )
    assert len(CLASSES) == len(experts_classes()), "two classes of one name"
    assert sum(map(len, by_body().values())) == len(CLASSES)


@pytest.mark.parametrize("cls", [pytest.param(cls, id=name) for name, cls in CLASSES.items()])
def test_inputs_leave_one_expert_without_tokens(cls):
    """One expert has no token, all others have some, and the result depends on them."""
    built = build(cls)
    inputs = built.inputs(7)
    with torch.no_grad():
        expected = built.module(*inputs)
        for parameter in built.module.parameters():
            parameter.zero_()
        assert (built.module(*inputs) - expected).abs().mean() > 0.05
    if len(inputs) == 1:
        return  # the block routes by itself
    ids = inputs[1].argmax(-1) if inputs[1].dim() == 3 and inputs[1].shape[-1] > 1 else inputs[1]
    experts = set(ids.flatten().tolist())
    assert experts == set(range(max(experts) + 1)) - {IDLE_EXPERT}


@pytest.mark.parametrize("experts_backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize("cls", in_order(CLASSES))
def test_rewritten_with_the_numbers_of_eager(cls, experts_backend):
    built, graphs = build(cls), Graphs()
    fast = compiled(built.module, experts_backend, graphs)
    for tokens in (7, 1):
        graphs.clear()
        assert_equals_eager(built, fast, built.inputs(tokens))
        assert len(graphs) == 1
        assert {backend for _, backend in graphs.rewritten()} == {experts_backend}
    if astray := inputs_astray(cls):
        assert_equals_eager(built, fast, astray)
        assert len(graphs) == 1, "no other graph"


def inputs_astray(cls: ExpertsClass) -> Inputs | None:
    """Where a token has an expert that does not exist; None where eager does not take such."""
    built = build(cls)
    try:
        inputs = built.inputs(7, astray=True)
        with torch.no_grad():
            built.module(*inputs)
    except (RuntimeError, IndexError):
        return None
    return inputs


@pytest.mark.parametrize("experts_backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize("cls", [pytest.param(CLASSES[name], id=name) for name in NOT_REWRITTEN if name in CLASSES])
def test_not_rewritten_has_the_numbers_of_eager(cls, experts_backend):
    """Without fullgraph=True, whether the loop is unrolled or left: a wrong number is no expected failure."""
    built = build(cls)
    fast = compiled(built.module, experts_backend, "eager", fullgraph=False)
    for tokens in (7, 1):
        assert_equals_eager(built, fast, built.inputs(tokens))


def test_each_body_is_tested_in_a_whole_model():
    without = [
        group[0].name
        for group in by_body().values()
        if not any(cls.name in WHOLE_MODELS or cls.model in MODELS for cls in group)
    ]
    assert not without, "add a tiny model to WHOLE_MODELS"


@pytest.mark.parametrize("cls", in_order(WHOLE_MODELS))
def test_whole_model(cls):
    """One graph, every loop of it rewritten, with the result of eager; and the result depends on the experts."""
    model, arguments = build_whole(cls)
    experts_backend = EXPERTS_BACKENDS[sorted(WHOLE_MODELS).index(cls.name) % 2]
    graphs = Graphs()
    fast = compiled(model, experts_backend, graphs)
    without, zeroed = copy.deepcopy(model), []
    for path, module in without.named_modules():
        if type(module).__name__ == cls.name:
            zeroed.append((path, experts_backend))
            for parameter in module.parameters():
                parameter.data.zero_()
    with torch.no_grad():
        expected, actual = result(model, arguments), result(fast, arguments)
        assert (result(without, arguments) - expected).abs().mean() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert graphs.rewritten() == set(zeroed)
