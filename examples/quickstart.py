"""Compile a Mixture-of-Experts model with ``backend="moe_rewrite"``, see what became of its loops, and time it.

    python examples/quickstart.py
    python examples/quickstart.py --model path/to/checkpoint

Without ``--model`` it builds a small Qwen2-MoE model with random weights: nothing is downloaded. The model is a
transformers model whose experts are the plain loop (``experts_implementation="eager"``); no line of it is changed.
"""

from __future__ import annotations

import argparse
import re
import statistics
import textwrap
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

import moe_rewrite

Forward = Callable[[Tensor], Tensor]


def random_model() -> nn.Module:
    """A Qwen2-MoE causal language model of two layers with 60 experts each, top 4, and random weights."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=60,
        num_experts_per_tok=4,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def compile_with(model: nn.Module, backend: str, options: dict[str, object] | None = None) -> Forward:
    """``model`` compiled, as a function from input ids to logits."""
    compiled = torch.compile(model, backend=backend, options=options)
    return lambda ids: compiled(ids, use_cache=False).logits


def timed(function: Forward, ids: Tensor) -> tuple[Tensor, float]:
    """The logits of one call, and its milliseconds."""
    synchronize = torch.cuda.synchronize if ids.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    logits = function(ids)
    synchronize()
    return logits, 1e3 * (time.perf_counter() - start)


def latencies(functions: dict[str, Forward], ids: Tensor, repeats: int) -> dict[str, float]:
    """The median milliseconds of one call. They take turns, so that whatever else the machine does falls on all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for warm_up in [True] * 2 + [False] * repeats:
        for name, function in functions.items():
            _, ms = timed(function, ids)
            if not warm_up:
                times[name].append(ms)
    return {name: statistics.median(each) for name, each in times.items()}


def readable(code: str) -> str:
    """A graph's code, indented, without the ``; x = None`` that free its values."""
    return textwrap.indent(re.sub(r";  [^;]* = None$", "", code.strip(), flags=re.MULTILINE), "    ")


def show_one_block(reports: list[moe_rewrite.report.LoopReport]) -> None:
    """The loop before and the subgraph after, for the first loop that was rewritten."""
    rewritten = [report for report in reports if report.refusal is None]
    if not rewritten:
        print("\nNo loop was rewritten.")
        return
    report = rewritten[0]
    print(f"\n{report.path}: the loop before, its body once for a symbolic expert")
    print(readable(report.before))
    print(f"\n{report.path}: the subgraph after, {report.experts_backend}")
    print(readable(report.after))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile a Mixture-of-Experts model with moe_rewrite, and time it.")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint to load instead of the small random model")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="length of the input (default: 64)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls, of which the median counts")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model is None:
        model = random_model()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, experts_implementation="eager", dtype="auto"
        )
    model = model.eval().requires_grad_(False).to(device)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, args.tokens), device=device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{type(model).__name__}: {parameters / 1e6:.1f} M parameters, {model.dtype}, {args.tokens} tokens, {device}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
    )

    with torch.inference_mode():
        explanation = moe_rewrite.explain(model, ids, use_cache=False)
        print(explanation)
        show_one_block(explanation.loops)

        functions: dict[str, Forward] = {
            "eager": lambda ids: model(ids, use_cache=False).logits,
            'backend="inductor"': compile_with(model, "inductor"),
            'backend="moe_rewrite", batched_mm': compile_with(model, "moe_rewrite", {"experts": "batched_mm"}),
            'backend="moe_rewrite", grouped_mm': compile_with(model, "moe_rewrite", {"experts": "grouped_mm"}),
        }
        print("\nCompiling ...", flush=True)
        first_calls = {name: timed(function, ids) for name, function in functions.items()}
        expected, _ = first_calls["eager"]
        medians = latencies(functions, ids, args.repeats)

    print(f"Forward pass of {args.tokens} tokens, median of {args.repeats} calls\n")
    print(f"{'':34} {'ms':>9} {'speed-up':>9} {'largest difference':>19} {'first call, s':>14}")
    for name, ms in medians.items():
        logits, first_ms = first_calls[name]
        difference = (logits - expected).abs().max().item()
        print(f"{name:34} {ms:9.2f} {medians['eager'] / ms:8.2f}x {difference:19.1e} {first_ms / 1e3:14.1f}")
    print(f"\nDifferences are to the eager logits, the largest of which is {expected.abs().max().item():.2f}.")


if __name__ == "__main__":
    main()
