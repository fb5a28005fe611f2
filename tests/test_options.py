"""Options, the experts mapping, and what is said of bad ones."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from loops import Moe, inputs, plain
from torch import fx, nn

import moe_rewrite
from moe_rewrite.config import ExpertsMapping
from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower import Lifted

LOOP = plain


class Layers(nn.Module):
    """Eleven layers with one loop each, so that ``layers.1`` and ``layers.10`` both exist."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Moe(LOOP) for _ in range(11)])

    def forward(self, *args: Any) -> Any:
        return sum(layer(*args) for layer in self.layers)


class Counting:
    """An inner compiler that counts the graphs it gets."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs += 1
        return gm


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": "grouped"}, ["'grouped'", "Did you mean 'grouped_mm'", "'batched_mm'"]),
        ({"experts": {"": 3}}, ["3", "'grouped_mm'"]),
        ({"experts": ["grouped_mm"]}, ["list", "dict", "Example"]),
        ({"experts": {"model..layers": "eager"}}, ["'model..layers'", "dots"]),
        ({"experts": {".layers": "eager"}}, ["'.layers'"]),
        ({"inner": "inducto"}, ["'inducto'", "Did you mean 'inductor'"]),
        ({"inner": "moe_rewrite"}, ["'moe_rewrite'", "'inductor'"]),
        ({"inner": 3}, ["3", "function"]),
        ({"expert": "eager"}, ["'expert'", "Did you mean 'experts'", "'inner'"]),
        ({"max_autotun": True}, ["'max_autotun'", "Did you mean 'max_autotune'"]),
        ({"inner": "eager", "max_autotune": True}, ["'max_autotune'", "no options of its own"]),
        ({"mode": "reduce"}, ["'reduce'", "'reduce-overhead'"]),
        ({"inner": "eager", "mode": "reduce-overhead"}, ["'reduce-overhead'", "'eager' takes none"]),
    ],
)
def test_bad_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(moe_rewrite.OptionsError) as raised:
        torch.compile(Moe(LOOP), backend="moe_rewrite", options=options)(*inputs())
    for word in words:
        assert word in str(raised.value)


def test_mode_given_twice() -> None:
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(Moe(LOOP), backend="moe_rewrite", mode="max-autotune", options={"mode": "default"})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", "grouped_mm"),
        ("model.layers.10", "grouped_mm"),
        ("model.layers.1", "eager"),
        ("model.layers.1.mlp.experts", "batched_mm"),
        ("model.layers.1.mlpx", "eager"),
    ],
)
def test_longest_prefix_on_dots(path: str, name: str) -> None:
    given = {"": "grouped_mm", "model.layers.1": "eager", "model.layers.1.mlp": "batched_mm"}
    assert ExpertsMapping.parse(given).choose(path) == name


def test_mapping_reaches_the_loops() -> None:
    explanation = moe_rewrite.explain(
        torch.compile(
            Layers(), backend="moe_rewrite", options={"experts": {"": "grouped_mm", "layers.1": "batched_mm"}}
        ),
        *inputs(),
    )
    chosen = {report.path: report.experts_backend for report in explanation.loops}
    assert chosen == {f"layers.{i}": "batched_mm" if i == 1 else "grouped_mm" for i in range(11)}


def test_prefix_that_matches_nothing() -> None:
    compiled = torch.compile(
        Layers(), backend="moe_rewrite", options={"inner": "eager", "experts": {"layer.1": "eager"}}, fullgraph=True
    )
    with pytest.warns(UserWarning, match=r"'layer\.1' .* matches no module of Layers.*'layers\.0'"):
        compiled(*inputs())


def test_sub_configs() -> None:
    model = nn.Module()
    model.text, model.vision = nn.Module(), nn.Module()
    model.text.config, model.vision.config = object(), object()
    model.config = types.SimpleNamespace(text_config=model.text.config, vision_config=model.vision.config)
    mapping = ExpertsMapping.parse({"text_config": "grouped_mm", "vision_config": "eager"}).with_sub_configs(model)
    assert mapping.as_dict() == {"text": "grouped_mm", "vision": "eager"}


def test_switching_at_run_time() -> None:
    inner, module = Counting(), Moe(LOOP)
    compiled = torch.compile(module, backend="moe_rewrite", options={"inner": inner}, fullgraph=True)
    expected = module(*inputs())
    seen = []
    for mapping in ({}, {"": "batched_mm"}, {"": "grouped_mm"}, {"": "batched_mm"}, {}):
        moe_rewrite.set_experts_backend(compiled, mapping)
        assert moe_rewrite.get_experts_backend(compiled) == mapping
        torch.testing.assert_close(compiled(*inputs()), expected)
        seen.append(inner.graphs)
    assert seen == [1, 2, 3, 3, 3]
    with moe_rewrite.experts_backend(compiled, "grouped_mm"):
        assert moe_rewrite.get_experts_backend(compiled) == {"": "grouped_mm"}
    assert moe_rewrite.get_experts_backend(compiled) == {}


def test_switching_what_is_not_ours() -> None:
    for other in (Moe(LOOP), torch.compile(Moe(LOOP), backend="eager")):
        with pytest.raises(moe_rewrite.MoeRewriteError, match=r"torch\.compile\(model, backend='moe_rewrite'\)"):
            moe_rewrite.set_experts_backend(other, "grouped_mm")


@pytest.mark.parametrize("name", ["auto", "eager", "grouped_mm", "two words", 3])
def test_bad_names_of_experts_backends(name: Any) -> None:
    with pytest.raises(moe_rewrite.OptionsError):
        moe_rewrite.register_experts_backend(name, lambda loop, lifted: None)


def test_experts_backend_of_the_user() -> None:
    calls = []

    def lower(loop: ExpertsLoop, lifted: Lifted) -> None:
        calls.append(loop.num_experts)
        pairs = lifted.pairs()
        lifted.run(pairs, lambda rows, weight: torch.einsum("pk,pkn->pn", rows, weight[pairs.expert]))

    def check(loop: ExpertsLoop) -> str | None:
        return "seven experts at most" if loop.num_experts > 7 else None

    moe_rewrite.register_experts_backend("einsum", lower, check=check, overwrite=True)
    module = Moe(LOOP)
    options = {"inner": "eager", "experts": "einsum"}
    torch.testing.assert_close(
        torch.compile(module, backend="moe_rewrite", options=options, fullgraph=True)(*inputs()), module(*inputs())
    )
    assert len(calls) == 1
    moe_rewrite.register_experts_backend("einsum", lower, check=lambda loop: "not today", overwrite=True)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="'einsum' cannot take it: not today"):
        torch.compile(module, backend="moe_rewrite", options=options, fullgraph=True)(*inputs())


def test_model_without_experts() -> None:
    inner, module = Counting(), nn.Linear(3, 4)
    x = torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(module, backend="moe_rewrite", options={"inner": inner})(x), module(x))
    assert inner.graphs == 1


def test_backend_is_listed() -> None:
    assert "moe_rewrite" in torch._dynamo.list_backends()
