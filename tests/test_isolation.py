"""Other compiles of the process are none of our business."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from loops import Moe, Stack, inputs, plain, sentinel, states
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_rewrite
from moe_rewrite import markers

LOOP = plain


def count_graphs(backend: str | None = None) -> int:
    """How many graphs Dynamo makes of the plain loop, for a counting backend that is not ours."""
    graphs = 0

    def counting(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return gm

    torch._dynamo.reset()
    torch.compile(Moe(LOOP), backend=counting)(*inputs())
    return graphs


def compile_ours(**options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    module = Moe(LOOP)
    result: torch.Tensor = torch.compile(module, backend="moe_rewrite", options={"inner": "eager", **options})(
        *inputs()
    )
    torch.testing.assert_close(result, module(*inputs()))
    return result


def settings() -> dict[str, Any]:
    modules = (torch._dynamo.config, torch._inductor.config)
    return {f"{m.__name__}.{k}": copy.copy(v) for m in modules for k, v in m.get_config_copy().items()}


UNKNOWN_TORCH = """
import warnings
import torch._dynamo
del torch._dynamo.variables.builtin.BuiltinVariable.call_zip
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import moe_rewrite
    from test_isolation import count_graphs, compile_ours
print(sum("cannot hook into the Dynamo" in str(one.message) for one in caught))
compile_ours()
print(count_graphs())
"""


def test_torch_that_has_moved_its_private_parts() -> None:
    """It is said once, our backend gives eager's numbers, and others are left alone."""
    command = [sys.executable, "-c", UNKNOWN_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    assert done.stdout.split() == ["1", str(count_graphs())]


def test_stock_compiles_are_as_without_us() -> None:
    before = count_graphs()
    compile_ours()
    assert count_graphs() == before
    program = "import test_isolation, sys; print(test_isolation.count_graphs())"
    alone = "import sys; sys.modules['moe_rewrite.backend'] = None\n" + program  # the backend cannot be imported
    result = subprocess.run(
        [sys.executable, "-c", alone], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0 or int(result.stdout.split()[-1]) == before


def test_loop_is_no_graph_for_stock() -> None:
    assert count_graphs() > 1


def test_config_is_left_alone() -> None:
    before = settings()
    compile_ours()
    compile_ours(experts="eager")
    assert settings() == before


def test_nothing_is_left_behind_by_an_error() -> None:
    before, graphs = settings(), count_graphs()
    with pytest.raises(moe_rewrite.OptionsError):
        compile_ours(experts="no such")

    def fails(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise ZeroDivisionError

    with pytest.raises(Exception, match="ZeroDivisionError"):
        compile_ours(inner=fails)
    assert settings() == before
    assert count_graphs() == graphs
    compile_ours()


def test_fake_results_are_kept_outside_of_bodies() -> None:
    kept: dict[str, list[bool]] = {}
    call = FakeTensorMode.dispatch

    def dispatch(mode: FakeTensorMode, func: Any, *args: Any, **kwargs: Any) -> Any:
        kept.setdefault(str(func), []).append(mode.cache_enabled)
        return call(mode, func, *args, **kwargs)

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return sentinel(m, x.cos(), ids, weights).sin()

    with unittest.mock.patch.object(FakeTensorMode, "dispatch", dispatch):
        torch.compile(Moe(loop), backend="moe_rewrite", fullgraph=True, options={"inner": "eager"})(*inputs())
    first = {operator: calls[0] for operator, calls in kept.items()}
    assert first["aten.cos.default"] and first["aten.sin.default"] and not first["aten.index_add_.default"]


def test_switching_leaves_what_others_compiled() -> None:
    graphs = 0

    def counting(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return gm

    model = Stack()
    stock = torch.compile(model, backend=counting)
    ours = torch.compile(model, backend="moe_rewrite", options={"inner": "eager", "experts": "eager"})
    expected = ours(states())
    torch.testing.assert_close(stock(states()), expected)
    before = graphs
    moe_rewrite.set_experts_backend(ours, "grouped_mm")
    for run in (ours, stock, ours, stock):
        torch.testing.assert_close(run(states()), expected)
    assert graphs == before > 0


def test_two_threads() -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            module = Moe(LOOP)
            compiled = torch.compile(module, backend="moe_rewrite", options={"inner": "eager", "experts": name})
            torch.testing.assert_close(compiled(*inputs()), module(*inputs()))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("batched_mm", "grouped_mm")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    "call",
    [
        lambda: markers.loop_begin(torch.zeros(2, 1, dtype=torch.int64), 0),
        lambda: markers.select(torch.zeros(2, 3), 0, torch.tensor(1)),
        lambda: markers.number(torch.tensor(1), 4),
        lambda: markers.loop_end(torch.tensor(1), [0, 4], 0),
    ],
    ids=["loop_begin", "select", "number", "loop_end"],
)
def test_marker_that_is_executed(call: Any) -> None:
    with pytest.raises(moe_rewrite.MarkerExecutedError, match="without having been rewritten"):
        call()
