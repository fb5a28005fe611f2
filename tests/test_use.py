"""Where a compiled model is used: generation, layers compiled each by itself, several models and threads, and later
processes that find what an earlier one compiled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from graphs import Graphs
from hub import build, experts_modules, logits, random_tokens
from loops import Experts, Stack, inputs, states
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from transformers import CompileConfig

from moe_rewrite.lower import digest

NEW_TOKENS = 6


def compiled(model: Any, inner: Any, experts: Any = "auto", **kwargs: Any) -> Any:
    options = {"experts": experts, "inner": inner}
    return torch.compile(model, backend="moe_rewrite", options=options, **{"fullgraph": True, **kwargs})


def generate(model: nn.Module, prompt: Tensor, **kwargs: Any) -> Tensor:
    """Greedy tokens."""
    given = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    result: Tensor = model.generate(prompt, **given)
    return result


def graphs_of(graphs: Graphs) -> list[set[str]]:
    """The experts backends of each graph."""
    return [{name for _, name in _rewritten(gm)} for gm in graphs]


def _rewritten(gm: torch.fx.GraphModule) -> set[tuple[str, str]]:
    only = Graphs()
    only.append(gm)
    return only.rewritten()


# --- model.generate --------------------------------------------------------------------------------------------------

GENERATING = ("mixtral", "qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize("name", GENERATING)
def test_generate_with_compiled_forward(name: str) -> None:
    """A graph for the prompt and one for a single token, each with the experts backend that suits it, and no more."""
    model, graphs, prompt = build(name), Graphs(), random_tokens(2, 9)
    expected = generate(model, prompt)
    model.forward = compiled(model.forward, graphs)
    assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)
    assert graphs_of(graphs) == [{"grouped_mm"}, {"batched_mm"}]
    assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)
    assert len(graphs) == 2, "a second call compiles nothing"
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", GENERATING)
def test_generate_with_compile_config(name: str) -> None:
    """transformers compiles the decoding steps alone, and off a GPU only where it is told to."""
    model, graphs, prompt = build(name), Graphs(), random_tokens(2, 9)
    expected = generate(model, prompt)

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:  # a config is copied, and a list would be, too
        return graphs(gm, example_inputs)

    config = CompileConfig(backend="moe_rewrite", fullgraph=True, mode=None, options={"inner": inner})
    config._compile_all_devices = True
    for _ in range(2):
        result = generate(model, prompt, cache_implementation="static", compile_config=config)
        assert torch.equal(result, expected)
    assert graphs_of(graphs) == [{"batched_mm"}]
    assert graphs.rewritten() == {(path, "batched_mm") for path in experts_modules(model)}


def test_generate_with_the_default_mode() -> None:
    """``CompileConfig`` asks for ``mode="reduce-overhead"`` where nothing else is said."""
    model, prompt = build("mixtral", moe_layers=1), random_tokens(1, 5)
    expected = generate(model, prompt)
    config = CompileConfig(backend="moe_rewrite", fullgraph=True)
    assert config.mode == "reduce-overhead"
    config._compile_all_devices = True
    result = generate(model, prompt, cache_implementation="static", compile_config=config)
    assert torch.equal(result, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_generate_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, prompt = build("mixtral").cuda(), random_tokens(2, 9).cuda()
    expected = generate(model, prompt)
    config = CompileConfig(backend="moe_rewrite", fullgraph=True)
    result = generate(model, prompt, cache_implementation="static", compile_config=config)
    assert torch.equal(result, expected)
    assert counters["stats"]["unique_graphs"] == 1


# --- layers compiled each by itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False], ids=["layer.compile", "torch.compile"])
@pytest.mark.parametrize(("name", "graphs_needed"), [("mixtral", 1), ("qwen3_moe", 1), ("deepseek_v3", 2)])
def test_layers_compiled_each_by_itself(name: str, graphs_needed: int, in_place: bool) -> None:
    """What is compiled for one layer serves all ten. DeepSeek-V3 has a layer without experts, too."""
    model, graphs, token_ids = build(name, moe_layers=10), Graphs(), random_tokens(2, 7)
    layers = model.model.layers
    with torch.no_grad():
        expected = logits(model, token_ids)
        for number, layer in enumerate(layers):
            if in_place:
                layer.compile(backend="moe_rewrite", fullgraph=True, options={"inner": graphs})
            else:
                layers[number] = compiled(layer, graphs)
        actual = logits(model, token_ids)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(logits(model, token_ids), actual)
    assert len(graphs) == graphs_needed
    assert {path for path, _ in graphs.rewritten()} == {"mlp.experts"}


def test_layers_with_mappings_of_their_own() -> None:
    model, graphs, token_ids = build("mixtral", moe_layers=3), Graphs(), random_tokens(2, 7)
    with torch.no_grad():
        expected = logits(model, token_ids)
        for layer, name in zip(model.model.layers, ("batched_mm", "grouped_mm", "batched_mm"), strict=True):
            layer.compile(backend="moe_rewrite", fullgraph=True, options={"inner": graphs, "experts": name})
        torch.testing.assert_close(logits(model, token_ids), expected, rtol=1e-4, atol=1e-5)
    assert graphs_of(graphs) == [{"batched_mm"}, {"grouped_mm"}]


# --- modes of the caller ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_inside_of_a_mode(mode: Callable[[], Any], inner: str) -> None:
    """Compiled and called inside, then called outside with gradients, then inside again."""
    model, graphs = Stack(), Graphs(inner)
    expected = model(states())
    with mode():
        fast = compiled(model, graphs)
        inside = fast(states())
        torch.testing.assert_close(inside, expected)
        assert not inside.requires_grad
    assert len(graphs) == 1
    x = states().requires_grad_()
    fast(x).sum().backward()
    given = x.grad.clone(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    x.grad = None
    model(x).sum().backward()
    wanted = x.grad, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(given, wanted)
    count = len(graphs)
    with mode():
        torch.testing.assert_close(fast(states()), expected)
    assert len(graphs) == count == 2


class InMode(nn.Module):
    """A loop under a mode that its own module switches, as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.experts, self.how = Experts(), how

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        m, out = self.experts, torch.zeros_like(x)
        if self.how == "function":
            with torch.inference_mode():
                out = m(x, ids, weights)
        elif self.how == "body":
            for expert in range(m.num_experts):
                token, slot = torch.where(ids == expert)
                with torch.inference_mode():
                    out.index_add_(0, token, m.expert(x[token], expert) * weights[token, slot, None])
        else:
            with torch.inference_mode(self.how == "with") if self.how != "before" else contextlib.nullcontext():
                out = torch.zeros_like(x) if self.how == "with False" else out
                for expert in range(m.num_experts):
                    token, slot = torch.where(ids == expert)
                    out.index_add_(0, token, m.expert(x[token], expert) * weights[token, slot, None])
            with torch.inference_mode():
                weights * 2
        return out * 1

    @torch.inference_mode()
    def decorated(self, *args: Tensor) -> Tensor:
        return self.forward(*args)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["with", "with False", "body", "function", "decorated", "before"])
def test_inference_mode_inside(
    how: str, around: Callable[[], Any], inner: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a loop is left as it is; one in a frame of its own, which Dynamo makes then, has the mode around it."""
    model, args, graphs = InMode("before" if how == "decorated" else how), inputs(), Graphs(inner)
    forward = model.decorated if how == "decorated" else model.forward
    fast = torch.compile(forward, backend="moe_rewrite", options={"inner": graphs})
    with around(), caplog.at_level(logging.INFO, logger="moe_rewrite"):
        expected, actual = forward(*args), fast(*args)
    torch.testing.assert_close(actual, expected)
    for flag in (Tensor.is_inference, lambda tensor: tensor.requires_grad):
        assert flag(actual) == flag(expected)
    said = [r.getMessage() for r in caplog.records if "left as it is" in r.getMessage()]
    assert bool(said) == (how != "before")
    assert all("`torch.inference_mode` is switched" in message for message in said)
    assert bool(graphs.rewritten()) == (how in ("before", "function", "decorated"))


def test_inference_mode_around_a_checkpoint() -> None:
    """The mode is entered in another graph than the loop stands in."""
    model, args = Experts(), inputs()

    def forward(*args: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.utils.checkpoint.checkpoint(model, *args, use_reentrant=False) * 1

    fast = torch.compile(forward, backend="moe_rewrite", fullgraph=True)
    with pytest.raises(Unsupported, match=r"`torch\.inference_mode` is switched"):
        fast(*args)


# --- several models, several threads ---------------------------------------------------------------------------------


def test_two_models_with_mappings_of_their_own() -> None:
    """Two models of one class, called in turn: neither gets what was compiled for the other."""
    mappings = ({"": "grouped_mm", "model.layers.0": "batched_mm"}, {"": "batched_mm", "model.layers.0": "grouped_mm"})
    models = [build("mixtral", seed=seed) for seed in (0, 1)]
    kept = [Graphs(), Graphs()]
    fast = [compiled(m, inner, mapping) for m, inner, mapping in zip(models, kept, mappings, strict=True)]
    with torch.no_grad():
        for seed in range(3):
            for model, call in zip(models, fast, strict=True):
                token_ids = random_tokens(2, 7, seed)
                torch.testing.assert_close(logits(call, token_ids), logits(model, token_ids), rtol=1e-4, atol=1e-5)
    for graphs, mapping in zip(kept, mappings, strict=True):
        first, second = mapping["model.layers.0"], mapping[""]
        assert len(graphs) == 1
        assert graphs.rewritten() == {("model.layers.0.mlp.experts", first), ("model.layers.1.mlp.experts", second)}


def in_threads(*works: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_that_share_a_compiled_model() -> None:
    model = build("mixtral", moe_layers=1)
    fast = compiled(model, "eager")
    expected = {length: logits(model, random_tokens(2, length)).detach() for length in (3, 7, 12)}

    def work(length: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                actual = logits(fast, random_tokens(2, length))
                torch.testing.assert_close(actual, expected[length], rtol=1e-4, atol=1e-5)

    in_threads(*(lambda length=length: work(length) for length in expected))


def test_threads_beside_a_stock_compile() -> None:
    """While one thread compiles with this backend, another one's stock compile is as ever."""
    model, dense = build("mixtral"), nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    x, graphs = torch.randn(3, 8), Graphs()

    def ours() -> None:
        with torch.no_grad():
            fast = compiled(model, "eager")
            torch.testing.assert_close(logits(fast, random_tokens(2, 7)), logits(model, random_tokens(2, 7)))

    def stock() -> None:
        torch.testing.assert_close(torch.compile(dense, backend=graphs, fullgraph=True)(x), dense(x))

    in_threads(ours, stock)
    assert len(graphs) == 1 and not graphs.rewritten()


# --- inductor's cache across processes -------------------------------------------------------------------------------

PROGRAM = """
import json, sys, torch
from loops import Experts, Stack, inputs, states, weigh_up
from test_module_experts import FORMS, Block, inputs
from torch._dynamo.utils import counters


def compile_once(model, x, experts, train):
    counters.clear()
    fast = torch.compile(model, backend="moe_rewrite", fullgraph=True, options={"experts": experts})
    with torch.set_grad_enabled(train):
        actual, expected = weigh_up(fast(x)), weigh_up(model(x))
    if train:
        actual.backward()
    caches = [(counters["inductor"], "fxgraph_cache"), (counters["aot_autograd"], "autograd_cache")]
    found = {what: sum(said[f"{name}_{what}"] for said, name in caches) for what in ("hit", "miss", "bypass")}
    return {**found, "error": (actual - expected).abs().item()}


experts, trains = sys.argv[1], sys.argv[2] == "True"
results = [compile_once(Stack(), states(), experts, train=False)]
if trains:
    results.append(compile_once(Block(FORMS["range_over_mask"]), inputs(), experts, train=True))
print(json.dumps(results))
"""


def test_another_version_does_not_get_cached_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached was made of operators of ours by name: it holds what this version made of them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cached = counters["aot_autograd"]

    def compile_it(version: str | None) -> tuple[int, int]:
        torch._dynamo.reset()
        cached.clear()
        if version is not None:
            monkeypatch.setattr(digest, "_of_code", lambda: version)
        fast = torch.compile(Stack(), backend="moe_rewrite", fullgraph=True, options={"experts": "grouped_mm"})
        with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=True):
            torch.testing.assert_close(fast(states()), Stack()(states()))
        return cached["autograd_cache_hit"], cached["autograd_cache_miss"]

    assert [compile_it(version) for version in (None, None, "another", "another")] == [(0, 1), (1, 0), (0, 1), (1, 0)]


def in_a_new_process(cache: Path, experts: str, trains: bool = True) -> list[dict[str, float]]:
    """Compile a model with stacked experts, and train one whose experts are modules. What inductor's caches did."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }
    run = [sys.executable, "-c", PROGRAM, experts, str(trains)]
    done = subprocess.run(run, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_cache_across_processes(tmp_path: Path) -> None:
    first, again = (in_a_new_process(tmp_path, "grouped_mm") for _ in range(2))
    other = in_a_new_process(tmp_path, "batched_mm", trains=False)
    for result in first:
        assert result["miss"] > 0 == result["hit"]
    for result in again:
        assert result["hit"] > 0 == result["miss"], "nothing is compiled again"
    for result in other:
        assert result["miss"] > 0 == result["hit"], "another mapping gets code of its own"
    for result in (*first, *again, *other):
        assert result["bypass"] == 0
        assert result["error"] < 1e-9
