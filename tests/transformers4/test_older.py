"""How the loops were written before transformers 4.57."""

from __future__ import annotations

import pytest
import torch
from blocks import assert_equals_eager
from experts_classes import EXPERTS_BACKENDS, Built, compiled
from graphs import Graphs
from older import FORMS, WIDTH
from refused import OLDER_NOT_REWRITTEN, marks_of


def build(name: str) -> Built:
    """With random parameters; its inputs are ``[1, tokens, WIDTH]``."""
    module = FORMS[name]().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Built(module, lambda tokens: (torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1)),))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("experts_backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name, OLDER_NOT_REWRITTEN)) for name in FORMS])
def test_rewritten_with_the_numbers_of_eager(name, experts_backend, inner):
    built, graphs = build(name), Graphs(inner)
    fast = compiled(built.module, experts_backend, graphs)
    for tokens in (7, 1):
        graphs.clear()
        assert_equals_eager(built, fast, built.inputs(tokens))
        assert len(graphs) == 1
        assert {backend for _, backend in graphs.rewritten()} == {experts_backend}


@pytest.mark.parametrize("experts_backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize("name", OLDER_NOT_REWRITTEN)
def test_not_rewritten_has_the_numbers_of_eager(name, experts_backend):
    built = build(name)
    fast = compiled(built.module, experts_backend, "eager", fullgraph=False)
    for tokens in (7, 1):
        assert_equals_eager(built, fast, built.inputs(tokens))
