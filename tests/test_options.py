"""Options, the experts mapping, and what is said of bad ones."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F
from loops import TOP_K, Moe, Routed, Stack, inputs, loop_over, plain, states
from torch import Tensor, fx, nn

import moe_rewrite
from moe_rewrite import splice
from moe_rewrite.config import ExpertsMapping, Options
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
        torch.compile(Moe(LOOP), backend="moe_rewrite", options=options)  # already, not at the first call
    for word in words:
        assert word in str(raised.value)


def test_mode_given_twice() -> None:
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(Moe(LOOP), backend="moe_rewrite", mode="max-autotune", options={"mode": "default"})


@pytest.mark.parametrize(
    ("mode", "options", "searches"),
    [
        (None, {}, False),
        ("reduce-overhead", {}, False),
        ("max-autotune", {}, True),
        ("max-autotune-no-cudagraphs", {}, True),
        (None, {"mode": "max-autotune"}, True),
        (None, {"max_autotune": True}, True),
        (None, {"max_autotune": False}, False),
        (None, {"max_autotune_gemm": True}, True),
    ],
)
def test_max_autotune(mode: str | None, options: dict[str, Any], searches: bool) -> None:
    assert Options.parse(mode, options).max_autotune is searches


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


def compiled_anew(model: nn.Module, **kwargs: Any) -> nn.Module:
    return torch.compile(model, **kwargs)


def compiled_in_place(model: nn.Module, **kwargs: Any) -> nn.Module:
    model.compile(**kwargs)
    return model


@pytest.mark.parametrize("compile_it", [compiled_anew, compiled_in_place])
@pytest.mark.parametrize("isolate", [False, True])
def test_switching_keeps_the_recompile_limit(compile_it: Callable[..., nn.Module], isolate: bool) -> None:
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this torch has no such argument")
    inner, module = Counting(), Moe(LOOP)
    given = {"dynamic": False, "recompile_limit": 64, "isolate_recompiles": isolate, "options": {"inner": inner}}
    compiled = compile_it(module, backend="moe_rewrite", fullgraph=True, **given)
    lengths = range(2, 4 + torch._dynamo.config.recompile_limit)
    for mapping in ("batched_mm", "grouped_mm", "batched_mm"):  # the last one finds what the first one compiled
        moe_rewrite.set_experts_backend(compiled, mapping)
        for length in lengths:
            torch.testing.assert_close(compiled(*inputs(length)), module._call_impl(*inputs(length)))
    assert inner.graphs == 2 * len(lengths)


@pytest.mark.parametrize("compile_it", [compiled_anew, compiled_in_place])
def test_switching_keeps_the_guard_filter(compile_it: Callable[..., nn.Module]) -> None:
    calls = []

    def keep_all(guards: Any) -> list[bool]:
        calls.append(len(guards))
        return [True] * len(guards)

    compiled = compile_it(
        Moe(LOOP), backend="moe_rewrite", fullgraph=True, options={"inner": "eager", "guard_filter_fn": keep_all}
    )
    moe_rewrite.set_experts_backend(compiled, "batched_mm")
    compiled(*inputs())
    assert calls


@pytest.mark.parametrize("compile_it", [lambda model: None, lambda model: model.compile(backend="eager")])
def test_switching_what_is_not_ours(compile_it: Callable[[nn.Module], None]) -> None:
    compile_it(model := Moe(LOOP))
    for other in (model, torch.compile(model, backend="eager"), torch.compile(model.forward, backend="moe_rewrite")):
        for words in (r"torch\.compile\(model, backend='moe_rewrite'\)", r"module\.compile\(backend='moe_rewrite'\)"):
            with pytest.raises(moe_rewrite.MoeRewriteError, match=words):
                moe_rewrite.set_experts_backend(other, "grouped_mm")


# --- paths and mappings where Dynamo has given up the frames above ---------------------------------------------------

MAPPING = {"layers.0": "grouped_mm", "layers.1": "batched_mm"}
CHOSEN = {"layers.0.experts": "grouped_mm", "layers.1.experts": "batched_mm"}


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("", {"": "grouped_mm", "a.b": "eager", "a.b.c": "batched_mm"}),
        ("a", {"": "grouped_mm", "b": "eager", "b.c": "batched_mm"}),
        ("a.b", {"": "eager", "c": "batched_mm"}),
        ("a.b.d", {"": "eager"}),
        ("a.bc", {"": "grouped_mm"}),
    ],
)
def test_mapping_as_a_module_sees_it(path: str, seen: dict[str, str]) -> None:
    given = ExpertsMapping.parse({"": "grouped_mm", "a.b": "eager", "a.b.c": "batched_mm"})
    assert given.below(path).as_dict() == seen


@loop_over
def overwrites(m: Moe, x: Tensor, ids: Tensor, weights: Tensor, expert: Tensor, slot: Tensor, token: Tensor) -> Tensor:
    """Refused: every iteration leaves a number in the module."""
    m.calls = m.calls + 1
    return m.expert(x[token], expert)


def rewritten(caplog: pytest.LogCaptureFixture, run: Callable[[Tensor], Tensor], model: nn.Module) -> dict[str, str]:
    """Run a compiled ``model``, which must give eager's numbers without a warning.

    Gradients are off: with them on the first layer, whose input needs none, is compiled apart from the others anyway.

    Returns:
        For each loop that was rewritten meanwhile its path and experts backend, as the log has them.
    """
    caplog.clear()
    with caplog.at_level("INFO", "moe_rewrite"), warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="moe_rewrite")
        actual = run(states())
    torch.testing.assert_close(actual, model(states()) if run is not model else model._call_impl(states()))
    lines = (re.fullmatch(r"(\S+): .* -> (\w+) \(.*\)", record.message) for record in caplog.records)
    return {line[1]: line[2] for line in lines if line}


def another_compiler(model: nn.Module, ours: Any) -> None:
    torch.compile(model, backend="eager")(states())


def eager_experts(model: nn.Module, ours: Any) -> None:
    moe_rewrite.set_experts_backend(ours, "eager")
    ours(states())
    moe_rewrite.set_experts_backend(ours, MAPPING)


def one_eager_layer(model: nn.Module, ours: Any) -> None:
    with moe_rewrite.experts_backend(ours, {"layers.0": "eager"}):
        ours(states())


@pytest.mark.parametrize("before", [another_compiler, eager_experts, one_eager_layer])
def test_paths_below_frames_that_were_given_up(before: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    model, inner = Stack(), Counting()
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": inner, "experts": MAPPING})
    before(model, ours)
    inner.graphs = 0
    assert rewritten(caplog, ours, model) == CHOSEN
    # What this model's own compiling gave up is traced again, in one piece; what another compiler gave up is not.
    assert inner.graphs == (2 if before is another_compiler else 1)


def test_prefix_that_matches_nothing_below_frames_that_were_given_up() -> None:
    model = Stack()
    another_compiler(model, None)
    options = {"inner": "eager", "experts": {**MAPPING, "layers.2": "eager"}}
    with pytest.warns(UserWarning, match=r"'layers\.2' .* matches no module of Stack.*'layers\.0\.experts'") as warned:
        torch.compile(model, backend="moe_rewrite", options=options)(states())
    assert len(warned) == 1


def test_sub_configs_below_frames_that_were_given_up(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    model.layers[1].config = object()
    model.config = types.SimpleNamespace(text_config=model.layers[1].config)
    another_compiler(model, None)
    options = {"inner": "eager", "experts": {"": "grouped_mm", "text_config": "batched_mm"}}
    assert rewritten(caplog, torch.compile(model, backend="moe_rewrite", options=options), model) == CHOSEN


def test_paths_beside_a_refused_loop(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack((None, overwrites))
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": "eager", "experts": "batched_mm"})
    assert rewritten(caplog, ours, model) == {"layers.0.experts": "batched_mm"}
    moe_rewrite.set_experts_backend(ours, MAPPING)
    assert rewritten(caplog, ours, model) == {"layers.0.experts": "grouped_mm"}


@pytest.mark.parametrize("eager_layer", range(3))
def test_one_layer_is_left_alone(eager_layer: int, caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo gives up functions, and layers of one class have the same: that is no reason to leave the others."""
    model, inner = Stack((None, None, None)), Counting()
    mapping = {"": "grouped_mm", f"layers.{eager_layer}": "eager"}
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": inner, "experts": mapping})
    others = {f"layers.{i}.experts": "grouped_mm" for i in range(3) if i != eager_layer}
    assert rewritten(caplog, ours, model) == others
    left = [record.message for record in caplog.records if "left as it is" in record.message]
    assert len(left) == 1 and f"layers.{eager_layer}.experts" in left[0]
    graphs = inner.graphs
    assert rewritten(caplog, ours, model) == {}
    assert inner.graphs == graphs


class Cell(Routed):
    """``self`` is in a cell: a function inside uses it."""

    def forward(self, x: Tensor) -> Tensor:
        def route() -> Tensor:
            return F.linear(x, self.router)

        weights, ids = route().softmax(-1).topk(TOP_K)
        return x + self.experts(x, ids, weights)


@pytest.mark.parametrize("block", [Routed, Cell])
def test_every_layer_has_its_own(block: type[Routed], caplog: pytest.LogCaptureFixture) -> None:
    """More layers than Dynamo compiles one function for, unless they are told apart."""
    num_layers = torch._dynamo.config.recompile_limit + 2
    model = Stack()
    model.layers = nn.ModuleList(block(seed) for seed in range(num_layers))
    another_compiler(model, None)
    mapping = {f"layers.{i}": ("grouped_mm", "batched_mm")[i % 2] for i in range(num_layers)}
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": "eager", "experts": mapping})
    assert rewritten(caplog, ours, model) == {f"{path}.experts": name for path, name in mapping.items()}


@pytest.mark.parametrize(
    "mapping", [{"": "batched_mm"}, {"layers": "batched_mm"}, {"": "eager", "layers": "grouped_mm"}]
)
def test_layers_that_are_configured_alike_are_compiled_once(mapping: dict[str, str]) -> None:
    model, inner = Stack((None, None, None)), Counting()
    with torch.no_grad():
        another_compiler(model, None)
        ours = torch.compile(model, backend="moe_rewrite", options={"inner": inner, "experts": mapping})
        torch.testing.assert_close(ours(states()), model(states()))
    assert inner.graphs == 1


def test_eager_for_a_while_costs_nothing_later() -> None:
    """What was compiled in one piece is used again, although its frame was given up meanwhile."""
    model, inner = Stack(), Counting()
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": inner, "experts": MAPPING})
    ours(states())
    for _ in range(2):
        with moe_rewrite.experts_backend(ours, "eager"):
            ours(states())
        inner.graphs = 0
        torch.testing.assert_close(ours(states()), model(states()))
        assert inner.graphs == 0


def test_compiled_in_place(caplog: pytest.LogCaptureFixture) -> None:
    model, inner = Stack(), Counting()
    model.compile(backend="moe_rewrite", fullgraph=True, options={"inner": inner, "experts": MAPPING})
    assert moe_rewrite.get_experts_backend(model) == MAPPING
    assert rewritten(caplog, model, model) == CHOSEN
    assert {loop.path: loop.experts_backend for loop in moe_rewrite.explain(model, states()).loops} == CHOSEN
    with moe_rewrite.experts_backend(model, "batched_mm"):
        assert rewritten(caplog, model, model) == dict.fromkeys(CHOSEN, "batched_mm")
    assert rewritten(caplog, model, model) == {}
    assert moe_rewrite.get_experts_backend(model) == MAPPING
    assert inner.graphs == 2
    with (
        moe_rewrite.experts_backend(model, "eager"),
        pytest.raises(torch._dynamo.exc.Unsupported, match="'eager' is configured"),
    ):
        model(states())  # fullgraph=True as before


def test_method_that_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    another_compiler(model, None)
    run = torch.compile(model.forward, backend="moe_rewrite", options={"inner": "eager", "experts": MAPPING})
    assert rewritten(caplog, run, model) == CHOSEN


def routed(layer: Routed, x: Tensor) -> Tensor:
    weights, ids = F.linear(x, layer.router).softmax(-1).topk(TOP_K)
    return x + layer.experts(x, ids, weights)


class ByFunction(Stack):
    """Each layer is computed by a function, which has a frame of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = routed(layer, x)
        return x


def test_paths_in_functions_of_a_module(caplog: pytest.LogCaptureFixture) -> None:
    model = ByFunction()
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": "eager", "experts": MAPPING})
    assert rewritten(caplog, ours, model) == CHOSEN


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda compiled: pickle.loads(pickle.dumps(compiled))])
def test_copy_of_a_compiled_model(copied: Callable[[Any], Any], caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": "eager", "experts": MAPPING})
    ours(states())
    torch._dynamo.reset()
    assert rewritten(caplog, copied(ours), model) == CHOSEN


PASSES_OVER_LOOPS = torch.__version__ >= "2.13"
"""Whether ``explain`` goes on after a loop that it leaves in Python."""


@pytest.mark.parametrize("loop", [plain, overwrites] if PASSES_OVER_LOOPS else [plain])
def test_explanation_of_loops_that_are_left(loop: Any) -> None:
    ours = torch.compile(Stack((loop, loop)), backend="moe_rewrite", options={"experts": "eager"})
    explanation = moe_rewrite.explain(ours, states())
    assert [(report.path, report.experts_backend) for report in explanation.loops] == [(p, "eager") for p in CHOSEN]
    assert "no experts loop was found" not in str(explanation)
    assert not explanation.notes


def test_explaining_often_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo stops to compile a function that it compiled too often, and gives up one whose graph breaks."""
    model = Stack((None, overwrites))
    explanations = {str(moe_rewrite.explain(model, states())) for _ in range(torch._dynamo.config.recompile_limit + 1)}
    assert len(explanations) == 1 and "layers.1.experts" in explanations.pop()
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": "eager", "experts": MAPPING})
    assert rewritten(caplog, ours, model) == {"layers.0.experts": "grouped_mm"}


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


@pytest.mark.parametrize(("size", "refused"), [(4, False), (splice.MAX_CONSTANT + 1, True)])
def test_constant_of_an_experts_backend(size: int, refused: bool) -> None:
    """It is written out: compilers do not know where a tensor comes from that no module has."""

    def lower(loop: ExpertsLoop, lifted: Lifted) -> None:
        pairs = lifted.pairs()
        factor = torch.tensor([2.0] * size, dtype=torch.float64)[0]
        lifted.run(pairs, lambda rows, weight: torch.einsum("pk,pkn->pn", rows, weight[pairs.expert]) * factor / 2)

    moe_rewrite.register_experts_backend("with_constant", lower, overwrite=True)
    module = Moe(LOOP)
    for inner in ("eager", "aot_eager", "inductor"):
        torch._dynamo.reset()
        options = {"inner": inner, "experts": "with_constant"}
        fn = torch.compile(module, backend="moe_rewrite", options=options)
        torch.testing.assert_close(fn(*inputs()), module(*inputs()))
        (report,) = moe_rewrite.explain(fn, *inputs()).loops
        assert (report.refusal is not None) == refused, report.refusal
        assert not refused or f"a constant of {size} numbers" in str(report.refusal)


def test_model_without_experts() -> None:
    inner, module = Counting(), nn.Linear(3, 4)
    x = torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(module, backend="moe_rewrite", options={"inner": inner})(x), module(x))
    assert inner.graphs == 1


def test_backend_is_listed() -> None:
    assert "moe_rewrite" in torch._dynamo.list_backends()
