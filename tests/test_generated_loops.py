"""Generated loops (``generator.py``): whatever a program does, compiled it does the same, or says why it is left.

    GENERATED_LOOPS=3000 pytest tests/test_generated_loops.py::test_generated

runs that many programs, drawn anew each time, in place of the fixed ones. ``python tests/generator.py --help`` has
another way to run many, which goes on after a defect and collects them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import generator
import hypothesis
import pytest
import torch
from generator import Defect, Program, check, programs

import moe_rewrite
from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower import Lifted

NUMBER = int(os.environ.get("GENERATED_LOOPS", "0"))
"""How many programs, drawn anew; 0 for a few that are the same each time."""


@hypothesis.settings(
    max_examples=NUMBER or 60,
    derandomize=not NUMBER,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(programs())
@pytest.mark.timeout(0 if NUMBER else 900)
def test_generated(program: Program) -> None:
    hypothesis.assume(check(program).kind != "invalid")


REWRITTEN = {
    "plain": Program(),
    "modules": Program(storage="ModuleList", steps=("gate chunk", "linear"), called=2),
    "modules by name": Program(storage="ModuleDict", index="item", selection="where(ids == e)"),
    "range": Program(loop="range", selection="nonzero(ids == e)", skip="numel", combine="index_add"),
    "enumerated": Program(loop="modules", storage="ModuleList", selection="any(-1)", combine="out[t] +="),
    "rows of weights": Program(loop="rows", steps=("matmul", "bias", "silu"), selection="pairs // K"),
    "all tokens": Program(loop="range", selection="dense by table", combine="out + y", steps=("gelu", "linear")),
    "any mask": Program(loop="range", selection="threshold", combine="out[t] +=", start="clone"),
    "dropped ids": Program(routing="dropped", selection="where(ids == e)"),
    "sentinels": Program(routing="given", given="sentinels", tokens=(9, 5)),
    "two columns": Program(batched=True, selection="two columns", combine="index_put_"),
    "bfloat16": Program(routing="given", dtype="bfloat16", start="float32", inner="aot_eager"),
}


@pytest.mark.parametrize("experts_backend", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", REWRITTEN)
def test_common_programs_are_rewritten(name: str, experts_backend: str) -> None:
    """The generated programs are near enough to what users write: these are no traps, and nothing is refused."""
    program = dataclasses.replace(REWRITTEN[name], experts_backend=experts_backend)
    outcome = check(program)
    assert outcome.kind == "rewritten", f"{outcome}\n{generator.source(program)}"


FOUND: dict[str, Program] = {
    "one token, whose number of rows was taken for a constant": Program(
        tokens=(1,), selection="any(-1).nonzero()", skip="numel", steps=("detach", "normalize")
    ),
    "list of hits, rows put into lists": Program(index="tolist", steps=(), combine="cat"),
}
"""Programs that once were wrong, failed, or went without a word."""


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    assert check(FOUND[name]).kind != "invalid"


# --- the generator itself ---------------------------------------------------------------------------------------------


def test_most_programs_run_in_eager() -> None:
    """A generator whose programs all failed in eager would find nothing."""
    generator_of_choices = generator.random.Random(3)
    drawn = [generator.build(generator_of_choices.choice) for _ in range(300)]
    assert not [program.problem() for program in drawn if program.problem() is not None]
    failed = [program for program in drawn if not _runs(program)]
    assert len(failed) < len(drawn) / 10, failed[0]


def _runs(program: Program) -> bool:
    module = generator.make_class(program)().to(generator.DTYPES[program.dtype])
    try:
        for call in range(len(program.tokens)):
            generator.observe(module, module, generator.arguments(program, call), program.grad)
    except Exception:
        return False
    return True


@pytest.fixture
def experts_backend_that_doubles() -> Iterator[str]:
    """An experts backend that gives every row twice what it should."""

    def lower(loop: ExpertsLoop, lifted: Lifted) -> None:
        pairs = lifted.pairs()
        lifted.run(pairs, lambda rows, weight: 2 * torch.bmm(rows.unsqueeze(1), weight[pairs.expert]).squeeze(1))

    name = "twice"
    moe_rewrite.register_experts_backend(name, lower, overwrite=True)
    yield name


@pytest.mark.parametrize("dtype", generator.DTYPES)
def test_finds_what_is_wrong(dtype: str, experts_backend_that_doubles: str) -> None:
    program = Program(routing="given", dtype=dtype, experts_backend=experts_backend_that_doubles)
    with pytest.raises(Defect, match="WRONG result"):
        check(program)


def test_makes_a_failing_program_small(experts_backend_that_doubles: str) -> None:
    program = Program(
        experts_backend=experts_backend_that_doubles,
        steps=("bias", "matmul", "gelu"),
        combine="out[t] +=",
        tokens=(9, 5),
    )
    with pytest.raises(Defect) as found:
        check(program)
    small = generator.minimise(found.value).program
    assert small == Program(experts_backend=experts_backend_that_doubles, steps=small.steps)
    assert len(small.steps) == 1
