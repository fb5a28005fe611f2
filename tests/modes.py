"""Every experts backend in every mode, dtype and kind of shape: what has to hold for each, and a page on what was run.

    python tests/modes.py run [--device cuda] [--full] > docs/modes/NAME.jsonl
    python tests/modes.py table docs/modes/*.jsonl > docs/modes.md

``run`` writes one line for each case as soon as it is done, ``table`` makes the page of such files. Without ``--full``
the cases are few, but any two values of two axes meet in one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

COMPILERS = (
    "inductor default",
    "inductor reduce-overhead",
    "inductor max-autotune",
    "inductor max-autotune-no-cudagraphs",
    "aot_eager default",
)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "autocast": torch.float32,
    "fp64": torch.float64,
}
SIZES = {"aligned": (32, 48), "odd": (30, 45)}
"""``(H, I)``: multiples of 8, as the kernel of ``torch.nn.functional.grouped_mm`` needs them, and no such."""
NUM_EXPERTS, TOP_K = 8, 2
FEW = 100
"""Fewer entries than this tell little of how large errors are as a rule."""
TOKENS = {"static": (96,), "dynamic": (96, 64, 128, 1, 0)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to compile and run a block of experts.

    Attributes:
        experts: the experts backend.
        compiler: the inner compiler and its mode.
        dtype: of parameters and inputs; ``autocast`` is bf16 over parameters in fp32.
        shapes: whether the number of tokens changes from call to call.
        sizes: whether hidden and intermediate size are multiples of 8.
        ids: where expert ids come from: a ``topk`` in the graph, or the caller, with ids that are of no expert.
    """

    experts: str
    compiler: str
    dtype: str
    shapes: str
    sizes: str
    ids: str

    def __str__(self) -> str:
        return "-".join(dataclasses.astuple(self)).replace(" ", "-")


def axes(device: str) -> tuple[tuple[str, ...], ...]:
    """The values that each field of a case can have."""
    dtypes = tuple(name for name in DTYPES if device == "cpu" or name != "fp64")
    return (
        ("eager", "batched_mm", "grouped_mm", "triton", "auto"),
        COMPILERS,
        dtypes,
        ("static", "dynamic"),
        tuple(SIZES),
        ("topk", "given"),
    )


def full(device: str) -> list[Case]:
    """Every experts backend, compiler, dtype and kind of shape; sizes and ids take turns."""
    turns = itertools.cycle(itertools.product(*axes(device)[4:]))
    return [Case(*first, *last) for first, last in zip(itertools.product(*axes(device)[:4]), turns, strict=False)]


@functools.cache
def covering(device: str) -> list[Case]:
    """Few cases in which each two values of two axes meet."""
    values = axes(device)
    missing = set(pairs_of(values))
    cases = []
    while missing:
        best = max(itertools.product(*values), key=lambda case: len(missing & set(_met(case))))
        missing -= set(_met(best))
        cases.append(Case(*best))
    return cases


def pairs_of(values: Sequence[Sequence[str]]) -> Iterator[tuple[int, str, int, str]]:
    """All pairs of values of two axes."""
    for (i, first), (j, second) in itertools.combinations(enumerate(values), 2):
        yield from ((i, one, j, other) for one in first for other in second)


def _met(case: Sequence[str]) -> Iterator[tuple[int, str, int, str]]:
    return pairs_of([[value] for value in case])


# --- what is compiled -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Experts with a bias in one matrix each, looped over as models do."""

    def __init__(self, sizes: str, ids: str) -> None:
        super().__init__()
        hidden, intermediate = SIZES[sizes]
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1]))

        self.gate_up = parameter(NUM_EXPERTS, 2 * intermediate, hidden)
        self.gate_up_bias = parameter(NUM_EXPERTS, 2 * intermediate)
        self.down = parameter(NUM_EXPERTS, hidden, intermediate)
        self.given = ids == "given"

    def forward(self, x: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        if self.given:
            weights = scores[:, :TOP_K]
        else:
            weights, ids = scores.topk(TOP_K)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, NUM_EXPERTS + 1).permute(2, 1, 0)
        for expert in mask.sum((-1, -2)).greater(0).nonzero():
            expert = expert[0]
            if expert == NUM_EXPERTS:
                continue
            slot, token = torch.where(mask[expert])
            gate, up = F.linear(x[token], self.gate_up[expert], self.gate_up_bias[expert]).chunk(2, -1)
            rows = F.linear(F.silu(gate) * up, self.down[expert])
            out.index_add_(0, token, (rows * weights[token, slot, None]).to(out.dtype))
        return out


def arguments(case: Case, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``[T, H]``, scores ``[T, E]`` and expert ids ``[T, K]``, some of them of no expert.

    The scores of a token differ in every dtype, so that the choice of experts is the same.
    """
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, SIZES[case.sizes][0], generator=generator, dtype=torch.float64)
    order = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(-1)
    ids = torch.rand(tokens, NUM_EXPERTS + 1, generator=generator).argsort(-1)[:, :TOP_K]
    return x, (order.double() + 1) / NUM_EXPERTS, ids


def run(
    case: Case, function: Callable[..., Tensor], block: nn.Module, tokens: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients of ``function``, which is ``block`` or was compiled from it."""
    x, scores, ids = arguments(case, tokens)
    inputs = [tensor.to(device, dtype).requires_grad_() for tensor in (x, scores)]
    block.zero_grad(set_to_none=True)
    is_mixed = case.dtype == "autocast" and dtype is not torch.float64
    with torch.autocast(device, torch.bfloat16) if is_mixed else contextlib.nullcontext():
        out = function(*inputs, ids.to(device))
    weighted = out.double() * torch.linspace(-1, 2, out.numel(), dtype=torch.float64, device=device).view_as(out)
    if out.requires_grad:  # without a token eager's loop does nothing
        weighted.sum().backward()
    leaves = {"hidden states": inputs[0], "scores": inputs[1], **dict(block.named_parameters())}
    tensors = {"output": out}
    for name, leaf in leaves.items():
        tensors[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# --- what has to hold -------------------------------------------------------------------------------------------------


def check(case: Case, device: str) -> dict[str, Any]:
    """Compile and run one case, and compare it with the eager loop.

    fp64 and fp32 are compared directly. Lower precision is compared through the eager loop in fp64: the root of our
    mean squared error is at most that of eager's, but for what is left to chance: with n entries the ratio of two such
    roots deviates by ``1 / sqrt(n)``, and five of that are allowed. Of few entries eager's error may be small by luck;
    there one rounding of the largest entry is allowed.

    Returns:
        How many graphs were compiled, and the largest ratio of our error and eager's where entries are many.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reference = Block(case.sizes, case.ids).to(device)
    block = copy.deepcopy(reference).to(DTYPES[case.dtype])
    reference.load_state_dict(block.state_dict())
    inner, mode = case.compiler.split(" ")
    options = {"experts": case.experts, "inner": inner, "mode": mode}
    # The experts backend `eager` leaves the loop as it is: no compiler makes one graph of that.
    compiled = torch.compile(
        block,
        backend="moe_rewrite",
        options=options,
        dynamic=case.shapes == "dynamic",
        fullgraph=case.experts != "eager",
    )
    ratio = 0.0
    for tokens in TOKENS[case.shapes]:
        eager = run(case, block, block, tokens, device, DTYPES[case.dtype])
        for _ in range(3 if mode in ("reduce-overhead", "max-autotune") and device == "cuda" else 1):
            torch.compiler.cudagraph_mark_step_begin()
            ours = run(case, compiled, block, tokens, device, DTYPES[case.dtype])
        exact = run(case, reference, reference, tokens, device, torch.float64)
        for name, expected in eager.items():
            ratio = max(ratio, _compare(case, f"{name}, {tokens} tokens", ours[name], expected, exact[name]))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if case.experts != "eager":
        assert graphs <= (3 if case.shapes == "dynamic" else 1), f"{graphs} graphs"
    return {"graphs": graphs, "error ratio": round(ratio, 3)}


def _compare(case: Case, what: str, ours: Tensor, eager: Tensor, exact: Tensor) -> float:
    assert ours.dtype is eager.dtype and ours.shape == eager.shape, what
    if case.dtype in ("fp32", "fp64"):
        rtol, atol = (1e-4, 1e-5) if case.dtype == "fp32" else (1e-9, 1e-11)
        torch.testing.assert_close(ours, eager, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")
        return 0.0
    own, theirs = (_rms(tensor.double() - exact) for tensor in (ours, eager))
    entries = int(exact.count_nonzero())
    allowed = theirs * (1 + 5 / math.sqrt(max(1, entries)))
    if 0 < entries < FEW:
        eps = torch.finfo(torch.bfloat16 if case.dtype == "autocast" else eager.dtype).eps
        allowed = max(allowed, eps * exact.abs().max().item())
    assert own <= allowed, f"{what}: our error is {own}, eager's {theirs}; {allowed} is allowed"
    return own / theirs if entries >= FEW and theirs else 0.0


def _rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item() if difference.numel() else 0.0


# --- the page ---------------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}"


def _cpu_info() -> list[str]:
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def record(case: Case, device: str) -> dict[str, Any]:
    """A line on one case: how it was run, and what came of it."""
    start = time.monotonic()
    try:
        outcome = {"result": "ok", **check(case, device)}
    except Exception as error:
        outcome = {"result": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    place = {"device": device_name(device), "torch": torch.__version__}
    return {**place, **dataclasses.asdict(case), **outcome, "seconds": round(time.monotonic() - start, 1)}


def table(records: list[dict[str, Any]]) -> str:
    lines = [_HEAD]
    places = sorted({(record["device"], record["torch"]) for record in records})
    for device, version in places:
        here = [record for record in records if (record["device"], record["torch"]) == (device, version)]
        failed = [record for record in here if record["result"] != "ok"]
        dtypes = [name for name in DTYPES if any(record["dtype"] == name for record in here)]
        lines += [f"## {device}, torch {version}", ""]
        lines += [f"{len(here)} cases were run, {len(failed)} of them failed.", ""]
        lines += [
            f"| experts backend | inner compiler and mode | {' | '.join(dtypes)} |",
            "| --- " * (len(dtypes) + 2) + "|",
        ]
        for experts, compiler in itertools.product(axes("cpu")[0], COMPILERS):
            cells = [_cell(here, experts, compiler, dtype) for dtype in dtypes]
            if any(cells):
                lines.append(f"| {experts} | {compiler} | {' | '.join(cells)} |")
        lines.append("")
        for one in failed:
            note = f"; {one['note']}" if "note" in one else ""
            lines.append(f"* {' '.join(one[field.name] for field in dataclasses.fields(Case))}: {one['result']}{note}")
        lines += [""] if failed else []
        ratios = [record["error ratio"] for record in here if record.get("error ratio")]
        if ratios:
            lines += [f"Largest error against fp64, as a multiple of eager's: {max(ratios):.3f}.", ""]
    return "\n".join(lines).rstrip()


def _cell(records: list[dict[str, Any]], experts: str, compiler: str, dtype: str) -> str:
    found = [r for r in records if (r["experts"], r["compiler"], r["dtype"]) == (experts, compiler, dtype)]
    shapes = [shapes for shapes in TOKENS if any(r["shapes"] == shapes for r in found)]
    words = []
    for one in shapes:
        good = all(r["result"] == "ok" for r in found if r["shapes"] == one)
        words.append(one if good else f"{one} FAILED")
    return ", ".join(words)


_HEAD = """# Modes, dtypes and shapes

Made by `python tests/modes.py table docs/modes/*.jsonl > docs/modes.md`. What was run is in those files, one line a
case.

A block of 8 experts with biases, top 2, is compiled, then called forward and backward. Output and gradients of hidden
states, scores and every parameter are compared with the eager loop: fp32 within rtol 1e-4 and atol 1e-5, fp64 within
1e-9 and 1e-11; in lower precision our distance from an fp64 reference is at most eager's, but for chance (see
`tests/modes.py`). `fullgraph=True`, except for the experts backend `eager`, which leaves the loop as it is.

* A cell names the kinds of shapes that were run and held: *static* (96 tokens) and *dynamic* (96, 64, 128, 1 and 0
  tokens with at most three graphs). An empty cell was not run.
* *autocast* is bf16 over parameters in fp32.
* On a CPU `triton` is what `grouped_mm` makes of a loop: its kernels are interpreted in tests alone.
* Sizes are multiples of 8 or not, expert ids come from a `topk` in the graph or are given with some that are of no
  expert: by turns.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the cases, one line of JSON each")
    runs.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    runs.add_argument("--full", action="store_true", help="all cases instead of a covering choice")
    tables = commands.add_parser("table", help="the page of what was run")
    tables.add_argument("files", nargs="+")
    given = parser.parse_args()
    if given.command == "table":
        print(table([json.loads(line) for file in given.files for line in pathlib.Path(file).read_text().splitlines()]))
        return
    for case in full(given.device) if given.full else covering(given.device):
        print(json.dumps(record(case, given.device)), flush=True)


def cases(device: str) -> list[Case]:
    """What the tests run: all with ``MOE_REWRITE_MODES=full``."""
    return full(device) if os.environ.get("MOE_REWRITE_MODES") == "full" else covering(device)


if __name__ == "__main__":
    sys.exit(main())
