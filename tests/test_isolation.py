"""Compiling with this backend leaves every other compile, and the process, as they were."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from graphs import Graphs, capture
from loops import (
    Loop,
    Moe,
    Routed,
    Stack,
    assert_same,
    hits,
    inputs,
    loop_over,
    observe,
    plain,
    states,
    stock_graphs,
)
from torch import Tensor

import moe_rewrite
from moe_rewrite import lower, markers


def ours(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="moe_rewrite", options={"inner": "eager", **options})


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def broken(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Changes a list, asks for two ways through the body, and then breaks the graph."""
    out, mask, seen = torch.zeros_like(x), m.mask(ids), []
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        seen.append(1)
        if expert == 1:
            print(end="")
        if x[token].sum() > 100:
            break
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out * len(seen)


def autocast_inside(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Refused within autocast and without gradients."""
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in hits(mask):
        expert = expert[0]
        _, token = torch.where(mask[expert])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rows = (x[token] @ m.weight[expert]).softmax(0).to(x.dtype)
        out.index_add_(0, token, rows)
    return out


@loop_over
def differentiated(m, x, ids, weights, expert, slot, token):
    return torch.func.grad(lambda rows: (rows**3).sum())(x[token])


@loop_over
def raising(m, x, ids, weights, expert, slot, token):
    raise LookupError("raised by the body")


LOOPS = [plain, broken, differentiated]
"""One that is rewritten and two that are not."""


@pytest.fixture
def register() -> Iterator[Callable[..., Any]]:
    """Registers experts backends for the length of a test."""
    before = dict(lower._REGISTRY)
    yield moe_rewrite.register_experts_backend
    lower._REGISTRY.clear()
    lower._REGISTRY.update(before)


# --- other compilers --------------------------------------------------------------------------------------------------

STOCK = """
import json, sys
sys.path.insert(0, {tests!r})
from loops import Routed, stock_graphs
print(json.dumps(stock_graphs(Routed())))
assert "moe_rewrite" not in sys.modules
"""


def test_stock_compiles_as_before() -> None:
    """As in a process that never imported this package, after compiles with it that rewrote and that refused."""
    code = STOCK.format(tests=str(Path(__file__).parent))
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert alone.returncode == 0, alone.stderr
    expected = json.loads(alone.stdout)
    assert expected[0] > 1
    assert stock_graphs(Routed()) == expected
    for loop in LOOPS:
        ours(Routed(loop=loop))(states())
    assert stock_graphs(Routed()) == expected


def test_one_model_compiled_with_both() -> None:
    """Each keeps its own code: the loop is a graph break for the one, and in the one graph of the other."""
    model, graphs = Routed(), Graphs()
    stock, rewritten = torch.compile(model, backend="eager"), ours(model, inner=graphs)
    for compiled in (stock, rewritten) * 2:
        assert_close(compiled(states()), model(states()))
    assert len(graphs) == 1
    assert graphs.rewritten()


def test_inductor_by_itself() -> None:
    ours(Routed())(states())
    torch._dynamo.reset()
    assert_close(torch.compile(Routed(), backend="inductor")(states()), Routed()(states()))


def test_fullgraph_of_stock_still_fails() -> None:
    """The loop is captured for this backend alone."""
    ours(Routed())(states())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as raised:
        torch.compile(Routed(), backend="eager", fullgraph=True)(states())
    assert "moe_rewrite" not in str(raised.value)


def settings() -> dict[str, Any]:
    modules = (torch._dynamo.config, torch._inductor.config)
    return {f"{m.__name__}.{k}": copy.deepcopy(v) for m in modules for k, v in m.get_config_copy().items()}


def test_settings_are_left_alone() -> None:
    before = settings()
    for loop in LOOPS:
        ours(Moe(loop))(*inputs())
    assert settings() == before
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Moe(broken), backend="moe_rewrite", fullgraph=True)(*inputs())
    assert settings() == before


# --- the process ------------------------------------------------------------------------------------------------------


def process_state() -> dict[str, Any]:
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "saved tensor hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "functorch levels": torch._C._functorch.peek_interpreter_stack() is None,
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "random numbers": torch.get_rng_state().sum().item(),
        "tracing": torch._guards.TracingContext.try_get() is None,
        "scope of side effects": torch._dynamo.current_scope_id.current_scope_id(),
        "default dtype": torch.get_default_dtype(),
    }


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graph_breaks", "fullgraph"])
@pytest.mark.parametrize(
    "loop", [plain, broken, differentiated, raising, autocast_inside], ids=lambda loop: loop.__name__
)
def test_nothing_is_left_behind(loop: Loop, fullgraph: bool) -> None:
    """Whether tracing ends well, in a graph break, in an error of Dynamo's or in one of the user's."""
    module, args, before = Moe(loop), inputs(), process_state()
    with contextlib.suppress(LookupError, torch._dynamo.exc.TorchDynamoException):
        torch.compile(module, backend="moe_rewrite", options={"inner": "eager"}, fullgraph=fullgraph)(*args)
    assert process_state() == before
    later = Moe(plain)
    expected = observe(later, later, args)
    for backend, kwargs in (("eager", {}), ("moe_rewrite", {"options": {"inner": "eager"}, "fullgraph": True})):
        torch._dynamo.reset()
        assert_same(observe(torch.compile(later, backend=backend, **kwargs), later, args), expected)


def test_error_of_the_body_is_the_users() -> None:
    with pytest.raises(LookupError, match="raised by the body"):
        ours(Moe(raising))(*inputs())


@pytest.mark.parametrize("where", ["inner", "experts", "check"])
def test_error_while_compiling(where: str, register: Callable[..., Any]) -> None:
    """The inner compiler or an experts backend fails: the error says so, and the next compile works."""

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("failed on purpose")

    def nothing(*args: Any) -> None:
        return None

    register("failing", nothing if where == "check" else fail, check=fail if where == "check" else None)
    model, options = Routed(), {"inner": fail} if where == "inner" else {"experts": "failing"}
    before = process_state()
    with pytest.raises(Exception, match="failed on purpose"):
        ours(model, **options)(states())
    assert process_state() == before
    assert_close(ours(Routed())(states()), Routed()(states()))


def test_threads() -> None:
    """Compiles of ours, and of stock, at the same time."""
    models = {
        "ours": (Stack(), lambda model: ours(model, experts="grouped_mm")),
        "ours, another": (Routed(), lambda model: ours(model, experts="batched_mm")),
        "ours, refused": (Routed(loop=broken), ours),
        "stock": (Routed(), lambda model: torch.compile(model, backend="eager")),
    }
    expected = {name: model(states()) for name, (model, _) in models.items()}
    results: dict[str, list[Tensor]] = {}
    start = threading.Barrier(len(models))

    def work(name: str) -> None:
        model, compile_it = models[name]
        start.wait()
        compiled = compile_it(model)
        results[name] = [compiled(states()) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == set(models)
    for name, values in results.items():
        for value in values:
            assert_close(value, expected[name])


# --- markers ----------------------------------------------------------------------------------------------------------

MARKERS: dict[str, Callable[[], Any]] = {
    "loop_begin": lambda: markers.loop_begin(torch.tensor([[0], [1]]), 0),
    "select": lambda: markers.select(torch.ones(4, 2), 0, torch.tensor(1)),
    "select of a parameter": lambda: markers.select(torch.ones(4, 2, requires_grad=True), 0, torch.tensor(1)),
    "number": lambda: markers.number(torch.tensor(1), 4),
    "loop_end": lambda: markers.loop_end(torch.tensor(0), [0, 4], False),
}


@pytest.mark.parametrize("name", MARKERS)
def test_marker_does_not_run(name: str) -> None:
    with pytest.raises(moe_rewrite.MarkerExecutedError, match="without having been rewritten"):
        MARKERS[name]()


def test_captured_graph_does_not_run() -> None:
    """A graph with markers, as Dynamo made it."""
    module, args = Moe(plain), inputs()
    graph = capture(module, *args)
    values = {(value.shape, value.dtype): value for value in (*args, module.up, module.down)}
    examples = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    with pytest.raises(moe_rewrite.MarkerExecutedError):
        graph(*(values[example.shape, example.dtype] for example in examples))
