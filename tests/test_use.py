"""Where a compiled model is used: generation, layers compiled each by itself, several models and threads, and later
processes that find what an earlier one compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Graphs
from hub import build, experts_modules, logits, random_tokens
from loops import Stack, states
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

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
    model = build("mixtral")
    fast = compiled(model, "aot_eager")
    expected = {length: logits(model, random_tokens(2, length)).detach() for length in (3, 7, 12, 20)}

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
import json, sys, torch, test_use
print(json.dumps(test_use.compile_once(**json.loads(sys.argv[1]))))
"""


def compile_once(name: str, experts: Any, train: bool) -> dict[str, Any]:
    """Compile and run a model with inductor. Returns what inductor's cache did, and how far the result is off."""
    from test_training import loss_of, of_modules

    model = of_modules().float() if name == "of_modules" else build(name, moe_layers=1).requires_grad_(train)
    fast = compiled(model, "inductor", experts)
    token_ids = random_tokens(2, 9)
    with torch.set_grad_enabled(train):
        actual, expected = loss_of(fast, token_ids), loss_of(model, token_ids)
    if train:
        actual.backward()
    said = counters["inductor"]
    return {
        "hits": said["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
        "misses": said["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"],
        "bypassed": said["fxgraph_cache_bypass"] + counters["aot_autograd"]["autograd_cache_bypass"],
        "error": (actual - expected).abs().item(),
    }


def in_a_new_process(cache: Path, **arguments: Any) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    run = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(run, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(("name", "train"), [("mixtral", False), ("of_modules", True)])
def test_cache_across_processes(name: str, train: bool, tmp_path: Path) -> None:
    first = in_a_new_process(tmp_path, name=name, experts="grouped_mm", train=train)
    again = in_a_new_process(tmp_path, name=name, experts="grouped_mm", train=train)
    other = in_a_new_process(tmp_path, name=name, experts="batched_mm", train=train)
    assert first["misses"] > 0 == first["hits"]
    assert again["hits"] > 0 == again["misses"]
    assert other["misses"] > 0 == other["hits"], "another mapping gets code of its own"
    for result in (first, again, other):
        assert result["bypassed"] == 0
        assert result["error"] < 1e-5
