"""Generated loops (``generator.py``): whatever a program does, compiled it does the same, or says why it is left.

    GENERATED_LOOPS=3000 pytest tests/test_generated_loops.py::test_generated

runs that many programs, drawn anew each time, in place of the fixed ones. ``python tests/generator.py --help`` has
another way to run many, in several processes, which goes on after a defect and collects them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

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
    phases=[hypothesis.Phase.generate],  # a failing program is made small by its fields, not by the bytes it is made of
)
@hypothesis.given(programs())
@pytest.mark.timeout(0 if NUMBER else 900)
def test_generated(program: Program) -> None:
    try:
        hypothesis.assume(check(program).kind != "invalid")
    except Defect as defect:
        raise generator.minimise(defect) from None


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
    "bfloat16": Program(routing="given", dtype="bfloat16", out_dtype="float32", inner="aot_eager"),
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
    assert len(failed) < len(drawn) / 5, failed[0]


def _runs(program: Program) -> bool:
    calls = generator.expected(program)
    return calls is not None and calls[-1].eager is not None


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
    grad = dtype not in generator.INTEGERS
    program = Program(routing="given", dtype=dtype, grad=grad, experts_backend=experts_backend_that_doubles)
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


def test_runs_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts_backend_that_doubles: str) -> None:
    """Each run goes on after a defect; the second with all that a known one has, and more, is another one of that."""
    wrong = Program(experts_backend=experts_backend_that_doubles, tokens=(4,))
    drawn = iter([wrong, Program(), dataclasses.replace(wrong, skip="numel"), Program(tokens=(9,))])
    monkeypatch.setattr(generator, "build", lambda _: next(drawn))
    seen = [*generator.survey(2, 1, tmp_path), *generator.survey(2, 2, tmp_path)]
    outcomes, summary = generator.merged(tmp_path)
    assert outcomes == seen
    assert [outcome.kind for _, outcome in outcomes] == ["defect", "rewritten", "defect", "rewritten"]
    (file,) = tmp_path.glob("*.md")
    assert summary.startswith("4 programs, ") and f"2 x {file.stem} ## WRONG" in summary
    assert generator.page(outcomes, "").count("| rewritten | 2 |") == 1


@pytest.mark.parametrize(("signed", "differs"), [(False, False), (True, True)])
@pytest.mark.parametrize("exact", [None, {"result": torch.zeros(2)}], ids=["as eager", "as float64"])
def test_zeros_have_a_sign_where_that_is_asked(signed: bool, differs: bool, exact: generator.Observed | None) -> None:
    given, wanted = {"result": torch.tensor([0.0, -0.0])}, {"result": torch.tensor([-0.0, -0.0])}
    assert (generator.difference(given, wanted, exact, signed=signed) is not None) is differs
    assert generator.difference(wanted, wanted, exact, signed=signed) is None


RAISING = {
    "more experts than weights": Program(loop="range", steps=("matmul",), narrow="table"),
    "positions that there are not": Program(moved="t + 1"),
    "another dtype": Program(out_dtype="float32", cast=False),
}


@pytest.mark.parametrize("name", RAISING)
def test_programs_that_raise_are_counted_apart(name: str) -> None:
    assert check(RAISING[name]).kind == "raises"


SPECIAL = {
    "moved": Program(combine="out[t] +=", moved="t // 2"),
    "autocast": Program(routing="given", dtype="float32", autocast="loop"),
    "out_dtype": Program(out_dtype="float32"),
    "changes": Program(storage="ModuleList", called=1, tokens=(5, 5), changes="forward of the class"),
    "paths": Program(writes=("[t] +=",), paths="even", target="columns", grad=False),
    "target": Program(writes=("[t] +=",), target="overlapping columns", grad=False),
    "arange_dtype": Program(
        routing="given", experts=260, top_k=1, ids_dtype="uint8", arange_dtype="uint8", mask="arange"
    ),
    "alpha": Program(alpha=-0.5),
    "start": Program(routing="given", start="large", dtype="float16"),
}
"""By the field of the program that it is about."""


@pytest.mark.parametrize("field", SPECIAL)
def test_special_programs_give_something_else_in_eager(field: str) -> None:
    program = SPECIAL[field]
    given = [program, dataclasses.replace(program, **{field: getattr(Program(), field)})]
    special, plain = (generator.expected(program) for program in given)
    assert program.problem() is None and special is not None and plain is not None
    assert special[-1].eager is not None and plain[-1].eager is not None
    assert generator.difference(special[-1].eager, plain[-1].eager, None) is not None
