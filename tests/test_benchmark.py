"""The benchmark: its command line in small on a CPU, and the arithmetic of its tables."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from moe_rewrite.benchmark import __main__ as cli
from moe_rewrite.benchmark import ahead, compile_time, measure, output, summary, variants
from moe_rewrite.benchmark.floor import H200, Ceilings, floor_ms, mean_hit
from moe_rewrite.benchmark.points import STAGES, Experts, make_stages
from moe_rewrite.benchmark.reference import Exact
from moe_rewrite.benchmark.shapes import REAL, SHAPES, TINY, TOKENS, ExpertsInputs

CPU = torch.device("cpu")
FEW = ["transformers/eager/plain", "transformers/grouped_mm/default", "moe_rewrite/auto/default"]
QUICK = ["--tiny", "--inner", "eager", "--repeats", "2", "--device", "cpu"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    cli.main()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def printed_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- the command line -------------------------------------------------------------------------------------------------


def test_experts(monkeypatch, tmp_path, capsys):
    """Rows of all variants, right numbers among them, a summary; then the tables and the plots of what was written."""
    given = ["--passes", "forward", "backward", "--tokens", "4", "--shapes", "tiny-gpt-oss"]
    chosen = [*FEW, "moe_rewrite/grouped_mm/default"]
    run(monkeypatch, "experts", *QUICK, *given, "--variants", *chosen, "--output", str(tmp_path))
    printed = capsys.readouterr().out
    about, *_, last = read(tmp_path / "experts.jsonl")
    assert about["kind"] == "about" and about["torch"] == torch.__version__ and about["ceilings"]["bandwidth"] > 0
    assert last["kind"] == "summary"
    assert last["forward"]["default"]["points"] == last["backward"]["default"]["points"] == 1
    rows = output.read_rows([tmp_path], "experts")
    cases = {"tiny-gpt-oss:4", "tiny-gpt-oss:4:backward"}
    assert sorted((row["case"], row["variant"]) for row in rows) == sorted(itertools.product(cases, chosen))
    for row in rows:
        assert row["pairs"] == 8 and 1 <= row["hit"] <= 8 and row["floor_ms"] > 0
        assert row["ms"] > 0 and len(row["times_ms"]) == 2
        assert 0 < row["rel_err"] < 0.02  # some roundings to bf16, 2**-9 each
        best = min(one["ms"] for one in rows if one["case"] == row["case"] and one["provider"] == "transformers")
        assert row["of_best"] == pytest.approx(row["ms"] / best)
        assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        if row["variant"] == "moe_rewrite/auto/default":
            assert row["loops"] == {"batched_mm": 1} and row["compile_s"] > row["dynamo_s"] > 0
    in_table = [cells for cells in printed_rows(printed) if cells[1] in chosen]
    assert len(in_table) == len(rows)
    assert "geometric mean of 1 points" in printed and "fastest experts backend of ours" in printed

    run(monkeypatch, "summary", str(tmp_path))
    assert [cells for cells in printed_rows(capsys.readouterr().out) if cells[1] in chosen] == in_table

    pytest.importorskip("matplotlib", reason="plots are an extra")
    run(monkeypatch, "plot", str(tmp_path), "--output", str(tmp_path / "plots"))
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [picture.name for picture in pictures] == ["tiny-gpt-oss-backward.png", "tiny-gpt-oss-forward.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert str(pictures[0]) in capsys.readouterr().out


def test_model(monkeypatch, tmp_path, capsys):
    """Prefill and decode steps: the logits are those of the eager model, up to rounding."""
    run(monkeypatch, "model", *QUICK, "--layers", "1", "--variants", *FEW, "--output", str(tmp_path))
    rows = output.read_rows([tmp_path], "model")
    cases = ["1x16", "decode-1x16"]
    assert [(row["case"], row["variant"]) for row in rows] == list(itertools.product(cases, FEW))
    for row in rows:
        assert "error" not in row and row["ms"] > 0 and row["b2b_ms"] > 0
        assert row["tokens"] == (1 if row["case"].startswith("decode") else 16)
        assert row["rel_err"] == 0 if row["experts"] == "eager" else 0 < row["rel_err"] < 0.05
    assert [row["loops"] for row in rows if row["experts"] == "auto"] == [{"grouped_mm": 1}, {"batched_mm": 1}]
    assert list(read(tmp_path / "model.jsonl")[-1]["cases"]) == cases
    assert "best of transformers" in capsys.readouterr().out


def test_compile(monkeypatch, tmp_path):
    """Seconds of ours and of the peer; experts that are modules have none."""
    run(monkeypatch, "compile", *QUICK, "--experts", "8", "--layers", "1", "--output", str(tmp_path))
    rows = output.read_rows([tmp_path], "compile")
    assert [(row["case"], row["variant"]) for row in rows] == [
        ("stacked:8", "transformers/grouped_mm/default"),
        ("stacked:8", "moe_rewrite/grouped_mm/default"),
        ("modules:8", "moe_rewrite/grouped_mm/default"),
    ]
    for row in rows:
        assert "error" not in row
        assert all(row[f"{name}_s"] > row[f"{name}_dynamo_s"] > 0 for name in ("cold", "warm"))
        assert row["provider"] == "transformers" or row["loops"] == {"grouped_mm": 1}
    assert rows[1]["of_peer_cold"] == pytest.approx(rows[1]["cold_s"] / rows[0]["cold_s"])
    assert "of_peer_cold" not in rows[2]


def test_growth_of_dynamo_time():
    """Against the first number of experts, in the same form, of the same variant."""
    known = {"form": "stacked", "variant": "v", "mode": "default", "provider": "moe_rewrite"}
    rows = [{**known, "case": f"stacked:{number}", "cold_dynamo_s": float(number)} for number in (8, 16)]
    other = {**known, "case": "modules:8", "form": "modules", "cold_dynamo_s": 1.0}
    compile_time.compare(rows[0], [])
    compile_time.compare(other, rows[:1])
    compile_time.compare(rows[1], [rows[0], other])
    assert [row["of_first_dynamo"] for row in (*rows, other)] == [1, 2, 1]


def test_time_budget_and_failures(monkeypatch, tmp_path, capsys):
    """A spent budget begins no point and says so; one variant that fails does not end the run."""
    run(monkeypatch, "experts", *QUICK, "--time-budget", "0", "--output", str(tmp_path))
    assert "out of time: tiny:64, tiny:4" in capsys.readouterr().out
    assert output.read_rows([tmp_path], "experts") == []
    given = ["--shapes", "tiny", "--tokens", "4", "--output", str(tmp_path)]
    monkeypatch.setattr(Experts, "call", _fails_for_compiled(Experts.call))
    run(monkeypatch, "experts", *QUICK, *given, "--variants", FEW[0], FEW[1])
    rows = {row["variant"]: row for row in output.read_rows([tmp_path], "experts")}
    assert "ms" in rows[FEW[0]] and rows[FEW[1]]["error"] == "RuntimeError: not today"
    assert "not today" in capsys.readouterr().out


def _fails_for_compiled(call):
    def wrapped(self, run, inputs):
        if hasattr(run, "_orig_mod"):
            raise RuntimeError("not today\nand more")
        return call(self, run, inputs)

    return wrapped


def test_workers(monkeypatch, tmp_path, capsys):
    """A worker compiles a point's variants of one mode, and its seconds stand in their rows."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    given = ["--shapes", "tiny", "--tokens", "4", "--workers", "1", "--output", str(tmp_path)]
    run(monkeypatch, "experts", *QUICK, *given, "--variants", *FEW)
    rows = {row["variant"]: row for row in output.read_rows([tmp_path], "experts")}
    assert {name: row["cold_s"] is not None for name, row in rows.items()} == {
        FEW[0]: False,
        FEW[1]: True,
        "moe_rewrite/auto/default": True,
    }
    assert "compiled ahead: tiny:4 default, 2 of 2 variants" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model", "--shapes", "1by16"], "is no case"),
        (["experts", "--shapes", "qwen9"], "invalid choice"),
        (["plot", "/nowhere"], "there is no '/nowhere'"),
        (["experts", "--tokens", "0"], "is no positive number"),
        (["compile", "--modes", "plain"], "has no mode 'plain'"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *arguments)
    assert said in capsys.readouterr().err + str(exit_.value)


@pytest.mark.parametrize("missing", ["transformers", "matplotlib"])
def test_missing_extra(monkeypatch, tmp_path, missing):
    """The error says what to install."""
    output.Recorder(tmp_path, "experts").write("row", {**MADE_UP[0], "floor_ms": 1.0})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["plot", str(tmp_path)] if missing == "matplotlib" else ["experts", "--tiny"]
    with pytest.raises(SystemExit, match=rf"needs? {missing}: pip install 'moe_rewrite\[benchmark\]'"):
        run(monkeypatch, *arguments)


# --- the floor and the reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "hit", "tokens", "wanted"),
    [  # bytes over 4.2 TB/s, operations over 780 TFLOP/s
        ("qwen1.5-moe", 4, 1, 0.01648),
        ("qwen1.5-moe", 60, 512, 0.24717),
        ("qwen1.5-moe", 60, 16384, 1.45359),
        ("mixtral-8x7b", 8, 4096, 3.70005),
    ],
)
def test_floor(shape, hit, tokens, wanted):
    assert floor_ms(SHAPES[shape], hit, tokens, backward=False, ceilings=H200) == pytest.approx(wanted, rel=1e-3)


def test_floor_with_backward():
    """Reads again what was hit and writes all gradients, or twice the arithmetic."""
    shape, slow = SHAPES["tiny"], Ceilings(bandwidth=1e3, flops=math.inf)
    expert = 3 * 64 * 32 * 2
    assert floor_ms(shape, 3, 4, False, slow) == pytest.approx(3 * expert)
    assert floor_ms(shape, 3, 4, True, slow) == pytest.approx((3 + 3 + 8) * expert)
    forward = 2 * 4 * 2 * 3 * 64 * 32
    assert floor_ms(shape, 3, 4, True, Ceilings(math.inf, 1e3)) == pytest.approx(3 * forward)


def test_shapes():
    """The bytes of an expert are those of the module's parameters; ids of no expert are not hit."""
    for name in TINY:
        module = SHAPES[name].build(CPU)
        stored = sum(weight.numel() * weight.element_size() for weight in module.parameters())
        assert stored == SHAPES[name].num_experts * SHAPES[name].expert_bytes
    assert mean_hit([torch.tensor([[0, 1], [1, 8]]), torch.tensor([[3, 3]])], 8) == 1.5


@pytest.mark.parametrize("name", TINY)
def test_reference(name):
    """It is the module's own loop in float64, gradients included; and it notices a wrong one of each."""
    shape = SHAPES[name]
    module = shape.build(CPU)
    inputs = ExpertsInputs.random(shape, 16, True, CPU)
    exact = Exact.of(module, inputs)
    assert exact.output.dtype == torch.float64
    module.config._experts_implementation = "eager"
    double = ExpertsInputs(*(t.double() if t.is_floating_point() else t for t in (*inputs.arguments, inputs.gradient)))
    experts = Experts(module.double(), True)
    results = experts.call(module, double.leaves())
    assert exact.error(results, experts.names) < 1e-12
    for wrong in ("output", "hidden", "down_proj"):
        at = experts.names.index(wrong)
        changed = [*results[:at], results[at] * 1.25, *results[at + 1 :]]
        assert exact.error(tuple(changed), experts.names) == pytest.approx(0.25)


# --- what is run, and in which order ----------------------------------------------------------------------------------


def test_stages():
    """Every point once; backward last, and from 512 tokens on."""
    stages = make_stages(REAL, TOKENS, ["forward", "backward"], 512)
    points = [point for stage in stages for point in stage]
    assert len(points) == len(set(points)) == 5 * 7 + 5 * 3
    assert [point.tokens for point in stages[0][:5]] == list(STAGES[0])
    assert {point.tokens for point in points if point.backward} == {512, 4096, 16384}
    assert [point.label for stage in make_stages(["tiny"], [7, 16], ["forward"], 0) for point in stage] == [
        "tiny:16",
        "tiny:7",
    ]


def test_variants():
    found = [variant.name for variant in variants.make_variants(["default", "plain"])]
    assert found[:2] == ["transformers/grouped_mm/default", "moe_rewrite/auto/default"]
    assert {"moe_rewrite/batched_mm/default", "transformers/batched_mm/plain", "transformers/eager/plain"} < set(found)
    assert not any(name.startswith("moe_rewrite/eager") for name in found)


@pytest.mark.parametrize(
    ("name", "shape", "tokens", "backward", "said"),
    [
        ("transformers/batched_mm/default", "qwen3-30b-a3b", 16, False, None),
        ("transformers/batched_mm/default", "qwen3-30b-a3b", 512, False, "39 GB, is more than a third"),
        ("moe_rewrite/batched_mm/default", "qwen3-30b-a3b", 512, False, None),
        ("moe_rewrite/batched_mm/default", "qwen3-30b-a3b", 4096, False, "above 512 tokens"),
        ("moe_rewrite/batched_mm/default", "qwen3-30b-a3b", 64, True, None),
        ("moe_rewrite/batched_mm/default", "qwen3-30b-a3b", 512, True, "gradient of every pair's weights"),
        ("transformers/eager/plain", "deepseek-v3", 16384, False, None),
        ("transformers/eager/plain", "qwen3-30b-a3b", 16384, True, None),
        ("transformers/eager/plain", "deepseek-v3", 512, True, "gradient of all weights for every expert"),
        ("moe_rewrite/auto/default", "deepseek-v3", 16384, True, None),
    ],
)
def test_left_out(name, shape, tokens, backward, said):
    (point,) = make_stages([shape], [tokens], ["backward" if backward else "forward"], 0)[0]
    why = variants.left_out(variants.Variant(*name.split("/")), point.work, memory=100e9)
    assert (why is None) if said is None else (why is not None and said in why)


def test_memory_gate():
    """Jobs that fit together enter together; one that never fits waits until it is alone."""
    gate = ahead.MemoryGate(10)
    with gate.enter(6), gate.enter(4):
        assert gate.used == 10
    with gate.enter(100):
        assert gate.used == 100
    assert gate.used == 0


def test_interleaved():
    """Replays take turns; the first turn does not count."""
    order: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name, self.calls = name, 0

        def time(self) -> float:
            order.append(self.name)
            self.calls += 1
            return float(self.calls)

    assert measure.interleaved({"a": Fake("a"), "b": Fake("b")}, 2) == {"a": [2.0, 3.0], "b": [2.0, 3.0]}
    assert order == ["a", "b"] * 3


# --- the summary ------------------------------------------------------------------------------------------------------


def row(case: str, pairs: int, variant: str, ms: float | None, **more: object) -> output.Row:
    provider, experts, mode = variant.split("/")
    known = {"part": "experts", "case": case, "shape": "s", "pass": "forward", "tokens": pairs, "pairs": pairs}
    return {**known, "variant": variant, "provider": provider, "experts": experts, "mode": mode, "ms": ms, **more}


MADE_UP = [
    row("s:8", 8, "transformers/grouped_mm/default", 4.0),
    row("s:8", 8, "transformers/batched_mm/plain", 2.0),
    row("s:8", 8, "moe_rewrite/auto/default", 1.0, loops={"batched_mm": 1}),
    row("s:8", 8, "moe_rewrite/batched_mm/default", 1.0),
    row("s:8", 8, "moe_rewrite/grouped_mm/default", 3.0),
    row("s:64", 64, "transformers/grouped_mm/default", 4.0),
    row("s:64", 64, "transformers/batched_mm/plain", None, left_out="too slow"),
    row("s:64", 64, "moe_rewrite/auto/default", 8.0, loops={"batched_mm": 1}),
    row("s:64", 64, "moe_rewrite/batched_mm/default", 8.0),
    row("s:64", 64, "moe_rewrite/grouped_mm/default", 2.0),
    row("s:512", 512, "transformers/grouped_mm/default", 64.0),
    row("s:512", 512, "moe_rewrite/auto/default", 4.0, loops={"grouped_mm": 1}),
    row("s:512", 512, "moe_rewrite/batched_mm/default", None, error="no"),
    row("s:512", 512, "moe_rewrite/grouped_mm/default", 4.0),
]


def test_summary():
    """Against the best of transformers: 2, 1/2 and 16 times, whose geometric mean is the cube root of 16."""
    text, data = summary.summarise(MADE_UP)
    found = data["forward"]["default"]
    assert found["geometric_mean"] == pytest.approx(16 ** (1 / 3))
    assert found["points"] == 3 and found["slower_at"] == ["s:64"]
    assert found["worst"] == {"case": "s:64", "ratio": 0.5, "other": "transformers/grouped_mm/default"}
    assert found["auto_worst"] == {"case": "s:64", "ratio": 0.25, "other": "moe_rewrite/grouped_mm/default"}
    assert [(c["experts"], c["first"], c["last"]) for c in found["crossovers"]] == [
        ("batched_mm", 8, 8),
        ("grouped_mm", 64, 512),
    ]
    rows = printed_rows(text)
    assert ["s:64", "64", "8.0000", "8.0000", "2.0000", "batched_mm", "grouped_mm", "0.250"] in rows
    assert ["s forward", "64 to 512", "grouped_mm"] in rows
    assert "2.520x faster (geometric mean of 3 points), slower at 1; worst at s:64, 0.500x of transformers" in text


def test_replays_count_where_there_are_any():
    """A variant without a replay does not compete with plain calls of others."""
    rows = [
        row("s:8", 8, "transformers/grouped_mm/default", 1.0, replay_ms=6.0),
        row("s:8", 8, "transformers/eager/plain", 2.0),
        row("s:8", 8, "moe_rewrite/auto/default", 9.0, replay_ms=3.0),
    ]
    assert summary.against_theirs(rows, "default") == [
        summary.Comparison("s:8", 2.0, "transformers/grouped_mm/default"),
    ]


def test_nothing_to_sum_up():
    assert summary.summarise([]) == ("", {})
    assert summary.summarise(MADE_UP[:1]) == ("", {})
    assert math.isnan(summary.geometric_mean([]))
    assert summary.best_of_modes(MADE_UP[:1])[1] == {"cases": {}, "geometric_mean": None}


def test_lines_that_were_cut_off(tmp_path):
    """Of rows of one case and variant the last counts; half a line does not."""
    recorder = output.Recorder(tmp_path, "experts")
    for ms in (1.0, 2.0):
        recorder.write("row", row("s:8", 8, "moe_rewrite/auto/default", ms))
    with (tmp_path / "experts.jsonl").open("a") as file:
        file.write('{"kind": "row", "part": "exp')
    assert [found["ms"] for found in output.read_rows([tmp_path], "experts")] == [2.0]


def test_rows_of_several_runs(monkeypatch, tmp_path, capsys):
    """They are compared with each other, whatever they were compared with before."""
    for name, chosen in {"one": MADE_UP[:2], "other": MADE_UP[2:5]}.items():
        for each in chosen:
            output.Recorder(tmp_path / name, "experts").write("row", {**each, "floor_ms": 0.5, "of_best": 7.0})
    run(monkeypatch, "summary", str(tmp_path / "one"), str(tmp_path / "other"))
    printed = capsys.readouterr().out
    heads, _, *rows = printed_rows(printed)[:7]
    found = {cells[1]: (cells[heads.index("of_best")], cells[heads.index("of_floor")]) for cells in rows}
    assert found["moe_rewrite/auto/default"] == ("0.500", "2.000")
    assert found["transformers/grouped_mm/default"] == ("2.000", "8.000")
    assert "2.000x faster (geometric mean of 1 points)" in printed


def test_reasons():
    """Of a refused loop our reason, of other errors the first line; a bar does not end a cell."""
    refused = (
        "Mixture-of-Experts loop not rewritten\n  Explanation: moe_rewrite leaves this loop as it is: <root>: why\n"
    )
    assert output.reason(RuntimeError(refused)) == "RuntimeError: <root>: why"
    assert output.reason(RuntimeError("\none\ntwo")) == "RuntimeError: one"
    assert output.line({"case": "c", "variant": "v", "error": "a | b"}, {"ms": ".1f"}) == r"| c | v |  | a \| b |"
