"""Every sparse block of transformers 4 that loops over experts: rewritten, or known to be left as it is.

float32, on the CPU: results and gradients at 7 tokens and at 1, which leaves most experts without a token.
"""

from __future__ import annotations

import pytest
import torch
from blocks import assert_equals_eager, blocks, build
from experts_classes import EXPERTS_BACKENDS, by_body, compiled
from graphs import Graphs
from refused import NOT_REWRITTEN, marks_of

BLOCKS = blocks()
ONE_OF_EACH_BODY = [group[0].name for group in by_body().values()]


def test_blocks_are_found():
    """Blocks of each kind: hits and a range over a list of modules, packed experts, dense experts."""
    known = {"MixtralSparseMoeBlock", "OlmoeSparseMoeBlock", "DeepseekV3MoE", "GptOssExperts", "VitPoseBackboneMoeMLP"}
    assert known <= set(BLOCKS)
    assert set(NOT_REWRITTEN) <= set(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_result_depends_on_the_experts(name):
    """A comparison of blocks whose experts add next to nothing would not notice if they were left out."""
    built = build(BLOCKS[name])
    inputs = built.inputs(7)
    with torch.no_grad():
        expected = _first(built.module(*inputs))
        experts = [p for path, p in built.module.named_parameters() if "experts." in path or "ffn." in path]
        for parameter in experts or built.module.parameters():
            parameter.zero_()
        assert (_first(built.module(*inputs)) - expected).abs().mean() > 0.02


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("experts_backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize(
    ("name", "inner"),
    [
        pytest.param(name, inner, marks=marks_of(name))
        for inner, names in {"eager": BLOCKS, "aot_eager": ONE_OF_EACH_BODY}.items()
        for name in names
    ],
)
def test_rewritten_with_the_numbers_of_eager(name, experts_backend, inner):
    built, graphs = build(BLOCKS[name]), Graphs(inner)
    fast = compiled(built.module, experts_backend, graphs)
    for tokens in (7, 1):
        graphs.clear()
        assert_equals_eager(built, fast, built.inputs(tokens))
        assert len(graphs) == 1
        assert {backend for _, backend in graphs.rewritten()} == {experts_backend}


@pytest.mark.parametrize("experts_backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize("name", NOT_REWRITTEN)
def test_not_rewritten_has_the_numbers_of_eager(name, experts_backend):
    """Without fullgraph=True, whether the loop is unrolled or left: a wrong number is no expected failure."""
    built = build(BLOCKS[name])
    fast = compiled(built.module, experts_backend, "eager", fullgraph=False)
    for tokens in (7, 1):
        assert_equals_eager(built, fast, built.inputs(tokens))


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH_BODY if name not in NOT_REWRITTEN])
def test_state_dict_and_parameters_stay(name):
    """Packing the experts keeps the parameters that a user sees: the same objects, keys, values; saved and loaded."""
    built = build(BLOCKS[name])
    parameters = dict(built.module.named_parameters())
    before = {key: value.clone() for key, value in built.module.state_dict().items()}
    fast = compiled(built.module, "grouped_mm", "eager")
    fast(*built.inputs(7))
    after = built.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(value is parameters[key] for key, value in built.module.named_parameters())
    built.module.load_state_dict({key: 0.5 * value for key, value in before.items()})
    with torch.no_grad():
        torch.testing.assert_close(
            _first(fast(*built.inputs(7))), _first(built.module(*built.inputs(7))), rtol=1e-4, atol=1e-5
        )
