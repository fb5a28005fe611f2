"""``moe_rewrite.export``: programs without a loop, that are saved, loaded, run and packaged."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from hub import build, logits, random_tokens
from loops import Stack, plain, states
from test_module_experts import FORMS, Block
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import moe_rewrite
from moe_rewrite.errors import MoeRewriteError, OptionsError

T = Dim("T", min=2, max=1000)
BACKENDS = ("batched_mm", "grouped_mm")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def of_modules() -> nn.Module:
    return Block(FORMS["range_over_mask"])


every_model = pytest.mark.parametrize("make", [Stack, of_modules], ids=["stacked", "modules"])


def called(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def has_product(program: ExportedProgram, backend: str) -> bool:
    name = "aten.bmm.default" if backend == "batched_mm" else "grouped_mm"
    return any(name in target for target in called(program))


def has_loop(program: ExportedProgram) -> bool:
    """A loop over experts has data-dependent sizes, and markers while it is captured."""
    return any("nonzero" in target or "loop_" in target for target in called(program))


def assert_same(call: Callable[[Tensor], Tensor], model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    for tokens in (2, 5, 50):
        x = states(tokens).to(dtype)
        torch.testing.assert_close(call(x), model(x))


@every_backend
@every_model
def test_any_number_of_tokens(make: Callable[[], nn.Module], backend: str) -> None:
    model = make()
    program = moe_rewrite.export(model, (states(8),), dynamic_shapes=({0: T},), experts=backend)
    assert has_product(program, backend) and not has_loop(program)
    assert_same(program.module(), model)
    (bounds,) = program.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (2, 1000)


def test_fixed_number_of_tokens() -> None:
    model = Stack()
    program = moe_rewrite.export(model, (states(8),))
    assert not program.range_constraints
    torch.testing.assert_close(program.module()(states(8)), model(states(8)))
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(states(9))


@every_model
def test_parameters_keep_their_names(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    program = moe_rewrite.export(model, (states(8),))
    assert set(program.state_dict) == set(model.state_dict())
    assert {name for name, _ in program.named_parameters()} == set(program.graph_signature.parameters)
    used = {name for name, _ in model.named_parameters() if "router" in name or "up" in name or "down" in name}
    assert used <= set(program.graph_signature.parameters)
    assert (
        not program.graph_signature.buffers
        or set(program.graph_signature.buffers) <= dict(model.named_buffers()).keys()
    )
    after = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    assert all(after[name][0] is before[name][0] and after[name][1] == before[name][1] for name in before)


@every_backend
@every_model
def test_other_parameters_in_a_loaded_program(make: Callable[[], nn.Module], backend: str) -> None:
    """What is saved and loaded computes with its own parameters, not with constants."""
    model = make()
    program = moe_rewrite.export(model, (states(8),), dynamic_shapes=({0: T},), experts=backend)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    assert_same(loaded, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    missing, _ = loaded.load_state_dict(other.state_dict(), strict=False)  # it has those alone that it uses
    assert not missing
    assert_same(loaded, other)


@every_backend
def test_gradients_of_a_program(backend: str) -> None:
    model = Stack()
    run = moe_rewrite.export(model, (states(8),), experts=backend).module()
    run(states(8)).square().sum().backward()
    exported = {name: parameter.grad for name, parameter in run.named_parameters()}
    model.zero_grad()
    model(states(8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(exported[name], parameter.grad)


@every_backend
@every_model
def test_ahead_of_time_package(make: Callable[[], nn.Module], backend: str, tmp_path: Path) -> None:
    model = make().float()
    with torch.no_grad():
        program = moe_rewrite.export(model, (states(8).float(),), dynamic_shapes=({0: T},), experts=backend)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        assert_same(torch._inductor.aoti_load_package(path), model, torch.float32)


@every_backend
def test_whole_model(backend: str, tmp_path: Path) -> None:
    """Gradients are on while it is exported: transformers makes masks without, of which nothing may be left."""
    model = build("mixtral")
    given = {"input_ids": random_tokens(2, 8), "use_cache": False}
    shapes = {"input_ids": {1: T}, "use_cache": None}
    program = moe_rewrite.export(model, (), given, dynamic_shapes=shapes, experts=backend)
    assert has_product(program, backend) and not has_loop(program)
    assert set(program.state_dict) == set(model.state_dict())
    torch.export.save(program, tmp_path / "program.pt2")
    run = torch.export.load(tmp_path / "program.pt2").module()
    for length in (2, 7, 33):
        token_ids = random_tokens(2, length)
        with torch.no_grad():
            actual = run(input_ids=token_ids, use_cache=False).logits
            torch.testing.assert_close(actual, logits(model, token_ids), rtol=1e-4, atol=1e-5)


def test_batched_mm_needs_no_operators_of_ours(tmp_path: Path) -> None:
    """A program with ``batched_mm`` is loaded and run by a process without this package."""
    program = moe_rewrite.export(Stack(), (states(8),), experts="batched_mm")
    assert not [target for target in called(program) if target.startswith("moe_rewrite")]
    torch.export.save(program, tmp_path / "program.pt2")
    alone = (
        "import sys, torch; sys.modules['moe_rewrite'] = None\n"
        "program = torch.export.load(sys.argv[1]); args, _ = program.example_inputs\n"
        "print(program.module()(*args).shape)"
    )
    run = [sys.executable, "-c", alone, str(tmp_path / "program.pt2")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- options, refusals, and what is left behind ----------------------------------------------------------------------


def test_mapping(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="moe_rewrite")
    mapping = {"layers.0": "batched_mm", "": "grouped_mm"}
    program = moe_rewrite.export(Stack(), (states(8),), experts=mapping)
    assert all(has_product(program, name) for name in BACKENDS)
    said = [record.getMessage() for record in caplog.records if record.name == "moe_rewrite"]
    assert [line.split(":")[0] for line in said] == ["layers.0.experts", "layers.1.experts"]
    assert ["batched_mm" in said[0], "grouped_mm" in said[1]] == [True, True]


def test_mapping_of_a_compiled_model() -> None:
    fast = torch.compile(Stack(), backend="moe_rewrite", options={"experts": "batched_mm"})
    assert has_product(moe_rewrite.export(fast, (states(8),)), "batched_mm")
    assert has_product(moe_rewrite.export(fast, (states(8),), experts="grouped_mm"), "grouped_mm")


def test_prefix_that_matches_nothing() -> None:
    with pytest.warns(UserWarning, match="'layers.7' of the experts mapping matches no module of Stack"):
        moe_rewrite.export(Stack(), (states(8),), experts={"layers.7": "batched_mm"})


def subtracts_mean(m: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, mask = torch.zeros_like(x), m.mask(ids)
    for expert in mask.sum((-1, -2)).nonzero():
        slot, token = torch.where(mask[expert[0]])
        y = x[token] @ m.weight[expert[0]]
        out.index_add_(0, token, (y - y.mean(0)) * weights[token, slot, None])
    return out


def test_refused_loop() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"layers\.1\.experts: .*along the rows of an expert"):
        moe_rewrite.export(Stack([plain, subtracts_mean]), (states(8),))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"experts": "no_such"}, OptionsError, "no_such"),
        ({"strict": False}, MoeRewriteError, "strict=True"),
    ],
    ids=["experts", "strict"],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        moe_rewrite.export(Stack(), (states(8),), **arguments)


def test_what_is_no_module() -> None:
    with pytest.raises(MoeRewriteError, match=r"export takes an nn\.Module"):
        moe_rewrite.export(lambda x: x, (states(8),))  # type: ignore[arg-type]


def test_torch_export_is_as_ever() -> None:
    """Also after an export of ours that failed."""
    for fails in (False, True):
        if fails:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                moe_rewrite.export(Stack([subtracts_mean]), (states(8),))
        else:
            moe_rewrite.export(Stack(), (states(8),))
        with pytest.raises(Exception, match=r"u0|data-dependent"):
            torch.export.export(Stack(), (states(8),), strict=True)
        dense = nn.Linear(8, 8).double()
        program = torch.export.export(dense, (states(8),), strict=True)
        torch.testing.assert_close(program.module()(states(8)), dense(states(8)))


@every_model
def test_exporting_what_was_compiled(make: Callable[[], nn.Module]) -> None:
    """Expert modules are packed then: their parameters are rows of tables."""
    model = make()
    fast = torch.compile(model, backend="moe_rewrite", fullgraph=True, options={"inner": "eager"})
    fast(states(8))
    program = moe_rewrite.export(fast, (states(8),), dynamic_shapes=({0: T},))
    assert set(program.state_dict) == set(model.state_dict())
    assert_same(program.module(), model)
    assert_same(fast, model)


def test_compiling_after_exporting() -> None:
    model = Stack()
    moe_rewrite.export(model, (states(8),))
    fast = torch.compile(model, backend="moe_rewrite", fullgraph=True, options={"inner": "eager"})
    torch.testing.assert_close(fast(states(8)), model(states(8)))
