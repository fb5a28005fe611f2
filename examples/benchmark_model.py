"""Latency, peak memory, compile time and accuracy of a whole Mixture-of-Experts model, or of its experts alone.

    python examples/benchmark_model.py --output results            # Qwen1.5-MoE-A2.7B, random weights, prefill
    python examples/benchmark_model.py --experts --output results  # the experts module alone, in three models' shapes
    python examples/benchmark_model.py --tiny                      # either of them in small, on a CPU

What is measured is a *variant*, ``provider/experts/mode``: ``moe_rewrite/grouped_mm/default`` is the eager model
compiled with ``backend="moe_rewrite"``, ``transformers/grouped_mm/default`` has transformers' own implementation,
compiled with stock inductor; in the mode ``plain`` nothing is compiled. ``transformers/eager/plain`` is the reference.

One model serves all variants. Every shape is compiled for itself (``dynamic=False``, ``fullgraph=True``), without
gradients (as under ``torch.no_grad()``) and without a cache of keys and values. Variants to be compared run in turn.

The columns, times in milliseconds:

* ``ms``: median latency, the device idle before each call. ``b2b_ms``: calls back to back, divided by their number;
* ``replay_ms`` (``--experts``): one replay of a CUDA graph of the call, captured by hand, caches flushed before it;
* ``floor_ms`` (``--experts``): the longer of reading the weights of the experts hit, and of the arithmetic;
* ``of_grouped``: ``ms`` (``replay_ms`` where there is one) over that of transformers' grouped_mm in the same mode;
* ``peak_gib``: most memory allocated at a time after the first call, recording of CUDA graphs included. ``own_gib``:
  less what was allocated before, such as the weights. ``of_eager``: ``peak_gib`` over that of the eager module;
* ``compile_s``: from the first call to its result, of that Dynamo ``dynamo_s``; the rest is the compiler backend. A
  ``*`` marks a result out of inductor's cache. ``cold_s``: without cache, one of as many as ``--workers`` at a time;
* ``rel_err``, ``max_err``: output (logits) against the eager module's: norm of the difference over the norm, and
  largest element. ``fp64_err`` (``--experts``): as ``rel_err``, against the same computed in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import gc
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

START = time.perf_counter()
BANDWIDTH, FLOPS = 4.2e12, 780e12  # reached on an H200: bytes/s of a copy, FLOP/s of a large bf16 matrix product
OURS, THEIRS, PLAIN = "moe_rewrite", "transformers", "plain"
MODEL_SHAPES = ["1x16", "1x128", "4x16", "4x128"]
EXPERTS_SHAPES = {  # number of experts, hidden size, intermediate size, experts per token
    "qwen1.5-moe": (60, 2048, 1408, 4),
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "tiny": (8, 64, 32, 2),
}
EXPERTS_TOKENS = [16, 64, 512, 1, 4096, 4]
WARM_UP = 4  # calls after the first one and before the timed ones; CUDA graphs are recorded in them
COLUMNS = dict.fromkeys(("ms", "b2b_ms", "replay_ms", "floor_ms", "of_grouped", "own_gib"), ".3f")
COLUMNS |= {"peak_gib": ".2f", "of_eager": ".3f", "compile_s": ".1f", "dynamo_s": ".1f", "cold_s": ".1f"}
COLUMNS |= dict.fromkeys(("rel_err", "max_err", "fp64_err"), ".2e")

Inputs = dict[str, Any]
Call = Callable[[Inputs], Tensor]
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a module: whose experts, which experts backend, and which mode of ``torch.compile``."""

    provider: str
    experts: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.provider}/{self.experts}/{self.mode}"

    def prepare(self, module: nn.Module) -> Call:
        """A function that runs ``module`` in this way. Compiles at its first call."""
        implementation = "eager" if self.provider == OURS else self.experts
        if hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation(implementation)
        else:
            module.config._experts_implementation = implementation
        run: Callable[..., Any] = module
        if self.provider == OURS:
            options = {"experts": self.experts, "mode": self.mode}
            run = torch.compile(module, backend=our_backend(), fullgraph=True, dynamic=False, options=options)
        elif self.mode != PLAIN:
            run = torch.compile(module, mode=self.mode, fullgraph=True, dynamic=False)

        def call(inputs: Inputs) -> Tensor:
            output = run(**inputs)
            result: Tensor = getattr(output, "logits", output)
            return result

        return call


@dataclasses.dataclass
class Case:
    """A module and its inputs of one size. For the first of them: the output in float64, and the eager one."""

    label: str
    tokens: int
    module: nn.Module
    inputs: list[Inputs]
    floor_ms: float | None = None
    exact: Tensor | None = None
    reference: Tensor | None = None


def our_backend() -> Any:
    """The backend's name; the function itself where the package is on the path but not installed."""
    if OURS in torch._dynamo.list_backends(exclude_tags=()):
        return OURS
    from moe_rewrite.backend import moe_rewrite

    return moe_rewrite


def release(device: torch.device) -> None:
    """Drop compiled code, CUDA graphs and cached memory, so that variants do not add up."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def seconds_of(region: Callable[[], Any], device: torch.device) -> float:
    """How long ``region`` takes, by the host's clock."""
    start = time.perf_counter()
    region()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def milliseconds(region: Callable[[], Any], device: torch.device, before: Callable[[], Any] = lambda: None) -> float:
    """How long ``region`` takes, by the device's clock. Untimed work of ``before`` hides how long a launch takes."""
    if device.type != "cuda":
        return seconds_of(region, device) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before()
    begin.record()
    region()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def replay_times(call: Call, inputs: list[Inputs], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each replay of a CUDA graph of ``call``, captured by hand."""
    static, rotation = {name: value.clone() for name, value in inputs[0].items()}, itertools.cycle(inputs)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call(static)
    torch.cuda.current_stream(device).wait_stream(side)
    graph, flush = torch.cuda.CUDAGraph(), torch.empty(256 << 20, dtype=torch.int8, device=device)
    with torch.cuda.graph(graph):
        call(static)

    def next_inputs_and_empty_caches() -> None:
        for name, value in next(rotation).items():
            static[name].copy_(value)
        flush.zero_()

    return [milliseconds(graph.replay, device, next_inputs_and_empty_caches) for _ in range(repeats)]


def first_call(call: Call, inputs: Inputs, device: torch.device) -> Result:
    """Call once, and tell what is known of the compilation: seconds, cache hits, what became of the loops."""
    loops: Counter[str] = Counter()

    def count(record: logging.LogRecord) -> bool:
        loops.update(report.experts_backend for report in record.args or () if hasattr(report, "experts_backend"))
        return False

    logger = logging.getLogger(OURS)
    logger.setLevel(logging.INFO)
    logger.addFilter(count)
    try:
        result: Result = {"compile_s": seconds_of(lambda: call(inputs), device), "loops": dict(loops)}
    finally:
        logger.removeFilter(count)
    counters, spent = torch._dynamo.utils.counters, torch._dynamo.utils.calculate_time_spent()
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    if "backend_compile" in spent:
        result["dynamo_s"] = spent["entire_frame_compile"] - spent["backend_compile"]
    return result | {"cache_hit": hits > 0}


def measure(case: Case, variant: Variant, args: argparse.Namespace) -> Result:
    """Everything about one variant in one case. Raises whatever the variant raises."""
    device, inputs, repeats = args.device, case.inputs, args.repeats
    if case.reference is None:  # kept in the host's memory
        case.reference = Variant(THEIRS, "eager", PLAIN).prepare(case.module)(inputs[0]).cpu()
    release(device)
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    call = variant.prepare(case.module)
    result = first_call(call, inputs[0], device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rotation, half = itertools.cycle(inputs), max(1, repeats // 2)

    def calls(count: int) -> None:
        for _ in range(count):
            call(next(rotation))

    calls(WARM_UP)
    times = [milliseconds(lambda: calls(1), device) for _ in range(repeats)]
    result |= {"ms": statistics.median(times), "b2b_ms": milliseconds(lambda: calls(half), device) / half}
    result["times_ms"] = times
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        result |= {"peak_gib": peak / 2**30, "own_gib": (peak - base) / 2**30}
        result["cudagraph_skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    output, wanted = call(inputs[0]).double(), case.reference.to(device).double()
    off = output - wanted
    result |= {"max_err": float(off.abs().max()), "rel_err": float(off.norm() / wanted.norm())}
    if case.exact is not None:
        result["fp64_err"] = float((output - case.exact).norm() / case.exact.norm())
    capturable = variant.experts != "eager" and variant.mode in (PLAIN, "default")
    if args.experts and capturable and device.type == "cuda":
        try:
            result["replay_ms"] = statistics.median(replay_times(call, inputs, repeats, device))
        except Exception as error:  # the other figures of this variant stand
            result["replay_error"] = f"{type(error).__name__}: {error}"
    return result


def model_cases(args: argparse.Namespace) -> Iterator[list[Case]]:
    """A whole model with random weights, made on the device; one case for each ``batch x tokens``."""
    sizes: dict[str, int] = {}  # the defaults of the config are the sizes of Qwen1.5-MoE-A2.7B
    if args.tiny:
        sizes |= {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "vocab_size": 256}
    if args.layers or args.tiny:
        sizes["num_hidden_layers"] = args.layers or 2
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(**sizes)
    with torch.device("meta") if args.compile_only else args.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if args.compile_only:
        share_memory(model, args.device)
    cases = []
    for label in args.shapes or (MODEL_SHAPES[:1] if args.tiny else MODEL_SHAPES):
        batch, length = map(int, label.split("x"))
        ids = torch.randint(config.vocab_size, (batch, length)).to(args.device)
        cases.append(Case(label, batch * length, model, [{"input_ids": ids, "use_cache": False}]))
    yield cases


def share_memory(model: nn.Module, device: torch.device) -> None:
    """Give a model without memory as much as it takes to compile it: one tensor for all parameters of one shape."""
    of_shape: dict[Any, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in ((name, old) for name, old in tensors.items() if old is not None):
                data = of_shape.setdefault((old.shape, old.dtype), torch.empty_like(old, device=device)).fill_(0.01)
                tensors[name] = nn.Parameter(data) if isinstance(old, nn.Parameter) else data


def experts_cases(args: argparse.Namespace) -> Iterator[list[Case]]:
    """The experts module alone: a list for each shape, in it a case for each number of tokens."""
    for name in args.shapes or (["tiny"] if args.tiny else [name for name in EXPERTS_SHAPES if name != "tiny"]):
        num_experts, hidden, intermediate, top_k = EXPERTS_SHAPES[name]
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_local_experts": num_experts}
        torch.manual_seed(0)
        with args.device:
            experts = MixtralExperts(transformers.MixtralConfig(**sizes)).to(torch.bfloat16).eval()
            for weight in experts.parameters():
                weight.normal_(std=0.02)
        cases = []
        for tokens in args.tokens or (EXPERTS_TOKENS[:1] if args.tiny else EXPERTS_TOKENS):
            inputs = [routed_inputs(tokens, hidden, num_experts, top_k, args.device) for _ in range(8)]
            hit = statistics.mean(len(one["top_k_index"].unique()) for one in inputs)
            weights = hidden * intermediate * 3
            floor = max(hit * weights * 2 / BANDWIDTH, tokens * top_k * weights * 2 / FLOPS)
            exact = exact_output(experts, inputs[0]) if not args.compile_only else None
            cases.append(Case(f"{name}:{tokens}", tokens, experts, inputs, floor * 1e3, exact))
        yield cases


def routed_inputs(tokens: int, hidden: int, num_experts: int, top_k: int, device: torch.device) -> Inputs:
    """Hidden states ``[T, H]`` and, by random logits, ``top_k_index`` and ``top_k_weights``, both ``[T, K]``."""
    weights, index = torch.topk(torch.randn(tokens, num_experts, device=device).softmax(-1), top_k, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
    states = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    return {"hidden_states": states, "top_k_index": index, "top_k_weights": weights}


def exact_output(experts: nn.Module, inputs: Inputs) -> Tensor:
    """The output of gated experts in float64, one expert at a time."""
    states, index = inputs["hidden_states"].double(), inputs["top_k_index"]
    output = torch.zeros_like(states)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        gate, up = (states[token] @ experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        rows = (nn.functional.silu(gate) * up) @ experts.down_proj[expert].double().T
        output.index_add_(0, token, rows * inputs["top_k_weights"][token, slot, None].double())
    return output


def plan(cases: list[Case], args: argparse.Namespace) -> list[tuple[Case, Variant]]:
    """What to run, the most important first, variants to be compared side by side."""
    rank = ["eager", "grouped_mm", "auto", "batched_mm"].index
    modes = args.modes or ([PLAIN, "default"] if args.experts else [PLAIN, "reduce-overhead", "default"])
    variants = [Variant(THEIRS, name, PLAIN) for name in ("eager", "grouped_mm", "batched_mm") if PLAIN in modes]
    for mode in modes:
        for experts in ("grouped_mm", "auto", "batched_mm") if mode != PLAIN else ():
            variants += [Variant(THEIRS, experts, mode)] if experts != "auto" else []
            variants.append(Variant(OURS, experts, mode))
    variants = [v for v in variants if args.variants is None or v.experts in args.variants]
    variants = [v for v in variants if args.rows is None or any(fnmatch.fnmatch(v.name, p) for p in args.rows)]
    limit = args.batched_tokens or (64 if args.experts else None)
    jobs = [(c, v) for c in cases for v in variants if v.experts != "batched_mm" or not limit or c.tokens <= limit]
    return sorted(jobs, key=lambda job: (rank(job[1].experts), cases.index(job[0]), modes.index(job[1].mode)))


def compile_ahead(jobs: list[tuple[Case, Variant]], args: argparse.Namespace) -> dict[Any, float]:
    """Compile ``jobs`` in processes of their own, many at a time, into inductor's cache. Returns the seconds of each.

    What fails or does not end in time is compiled later, alone. So are ``auto``, which is one of the others, and
    ``batched_mm`` where it may copy many weights.
    """
    jobs = [(c, v) for c, v in jobs if v.mode != PLAIN and v.experts != "auto"]
    jobs = [(c, v) for c, v in jobs if v.experts != "batched_mm" or c.tokens <= 128]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // args.workers))}
    deadline = time.perf_counter() + args.ahead_seconds

    def compile_one(job: tuple[Case, Variant]) -> float | None:
        shape, _, tokens = job[0].label.partition(":")
        command = [sys.executable, __file__, "--compile-only", "--shapes", shape, "--rows", job[1].name]
        command += ["--modes", job[1].mode, "--device", str(args.device)] + ["--tiny"] * args.tiny
        command += ["--experts", "--tokens", tokens] if args.experts else []
        command += ["--layers", str(args.layers)] if args.layers else []
        left = max(0.0, deadline - time.perf_counter())
        try:
            done = subprocess.run(command, env=environment, timeout=left, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode != 0:
            print(f"# not compiled ahead: {job[0].label} {job[1].name}: {done.stderr[-500:]}", flush=True)
        return float(done.stdout.split()[-1]) if done.returncode == 0 else None

    with ThreadPoolExecutor(args.workers) as pool:
        seconds = list(pool.map(compile_one, jobs))
    return {(case.label, v): took for (case, v), took in zip(jobs, seconds, strict=True) if took is not None}


def compare(row: Result, rows: list[Result]) -> None:
    """Add the ratios to transformers' grouped_mm in the same mode, and to the eager module's memory."""
    done = {other["variant"]: other for other in [*rows, row] if other["case"] == row["case"]}
    peer = done.get(f"{THEIRS}/grouped_mm/{row['variant'].rpartition('/')[2]}", {})
    eager = done.get(f"{THEIRS}/eager/{PLAIN}", {})
    key = "replay_ms" if "replay_ms" in row and "replay_ms" in peer else "ms"
    row["of_grouped"] = row[key] / peer[key] if key in row and key in peer else None
    row["of_eager"] = row["peak_gib"] / eager["peak_gib"] if "peak_gib" in row and "peak_gib" in eager else None


def line(row: Result) -> str:
    """A row of the table, in Markdown."""
    shown = [format(row[key], style) if row.get(key) is not None else "" for key, style in COLUMNS.items()]
    shown[list(COLUMNS).index("compile_s")] += "*" * row.get("cache_hit", False)
    notes = [f"{count} {name}" for name, count in row.get("loops", {}).items()]
    notes += [f"{row['cudagraph_skips']} graphs not captured"] if row.get("cudagraph_skips") else []
    notes += [row[key].strip().splitlines()[0][:200] for key in ("error", "replay_error") if key in row]
    return "| " + " | ".join([row["case"], row["variant"], *shown, ", ".join(notes)]) + " |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--experts", action="store_true", help="the experts module alone")
    add("--tiny", action="store_true", help="small sizes, for a trial on a CPU")
    add("--shapes", nargs="+", help=f"of {MODEL_SHAPES} and the like; with --experts, of {list(EXPERTS_SHAPES)}")
    add("--tokens", nargs="+", type=int, help=f"with --experts: numbers of tokens, {EXPERTS_TOKENS} unless given")
    add("--modes", nargs="+", help="plain (not compiled) and modes of torch.compile")
    add("--variants", nargs="+", help="experts backends: eager, grouped_mm, auto, batched_mm")
    add("--rows", nargs="+", help="patterns of variants' names, like 'moe_rewrite/*/default'")
    add("--layers", type=int, help="number of the model's layers, 24 unless given")
    add("--repeats", type=int, default=20, help="timed calls of each variant")
    add("--batched-tokens", type=int, help="no batched_mm for more tokens (with --experts: 64 unless given)")
    add("--time-budget", type=float, default=float("inf"), help="seconds after which no variant is started")
    add("--workers", type=int, default=0, help="compile in so many processes first, to fill inductor's cache")
    add("--ahead-seconds", type=float, default=300, help="how long the workers may take")
    add("--compile-only", action="store_true", help="print the seconds of each variant's first call, and no more")
    add("--device", type=torch.device, default=torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    add("--output", type=Path, help="folder for the results, rewritten after each variant")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_grad_enabled(False)
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "device": name, "argv": sys.argv[1:]}
    rows: list[Result] = []
    head = f"| case | variant | {' | '.join(COLUMNS)} | notes |\n{'| --- ' * (len(COLUMNS) + 3)}|"
    for cases in (experts_cases if args.experts else model_cases)(args):
        jobs, cold = plan(cases, args), {}
        if args.compile_only:
            for case, variant in jobs:
                print(first_call(variant.prepare(case.module), case.inputs[0], args.device)["compile_s"], flush=True)
            continue
        print(f"# {len(jobs)} variants to run; {time.perf_counter() - START:.0f} s so far", flush=True)
        if args.workers:
            cold = compile_ahead(jobs, args)
            print(f"# {len(cold)} compiled ahead; {time.perf_counter() - START:.0f} s so far", flush=True)
        print(head, flush=True)
        for case, variant in jobs:
            if time.perf_counter() - START > args.time_budget:
                print(f"# out of time: {case.label} {variant.name}", flush=True)
                continue
            row: Result = {"case": case.label, "variant": variant.name, "floor_ms": case.floor_ms}
            try:
                row |= measure(case, variant, args)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
            row |= {"cold_s": cold.get((case.label, variant)), "elapsed_s": time.perf_counter() - START}
            compare(row, rows)
            rows.append(row)
            print(line(row), flush=True)
            if args.output is not None:
                args.output.mkdir(parents=True, exist_ok=True)
                path = args.output / ("experts.json" if args.experts else "model.json")
                path.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    if rows:
        labels = list(dict.fromkeys(row["case"] for row in rows))
        print("\n" + "\n".join([head, *map(line, sorted(rows, key=lambda row: labels.index(row["case"])))]), flush=True)


if __name__ == "__main__":
    main()
