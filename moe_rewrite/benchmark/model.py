"""The part ``model``: a whole model with random weights, prefill and decode steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_rewrite.benchmark import compiler, measure, output, summary
from moe_rewrite.benchmark.ahead import Job, compile_ahead, first_call_alone
from moe_rewrite.benchmark.measure import Row
from moe_rewrite.benchmark.reference import relative_error
from moe_rewrite.benchmark.settings import Settings
from moe_rewrite.benchmark.shapes import DTYPE
from moe_rewrite.benchmark.variants import PLAIN, THEIRS, Variant, Work, left_out, make_variants
from moe_rewrite.lower import EAGER

PART = "model"
CASES = ("1x1", "1x16", "4x16", "1x128", "4x128", "decode-1x128", "decode-4x128")
TINY_CASES = ("1x16", "decode-1x16")
COLUMNS = {
    **dict.fromkeys(("ms", "b2b_ms", "of_grouped"), ".3f"),
    **{"peak_gib": ".2f", "own_gib": ".3f", "of_eager": ".3f"},
    **{"compile_s": ".1f", "dynamo_s": ".1f", "cold_s": ".1f", "rel_err": ".2e"},
}
NEW_TOKENS = 512  # room for decode steps behind the prompt


def model_config(tiny: bool, layers: int | None = None, **sizes: Any) -> Any:
    """Qwen1.5-MoE-A2.7B, whose sizes are the defaults of transformers' config; or a small one."""
    from transformers import Qwen2MoeConfig

    if tiny:
        small: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_experts": 8,
        }
        small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256, "num_hidden_layers": 2}
        small |= {"initializer_range": 0.3}  # else so small a model's experts change nothing in bf16
        sizes = {**small, "shared_expert_intermediate_size": 64, **sizes}
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return Qwen2MoeConfig(**sizes)


def build_model(config: Any, device: torch.device, initialise: bool = True) -> nn.Module:
    """A causal language model in bf16 with random weights, made on the device.

    Without ``initialise`` it takes no more memory than it takes to compile it: parameters of one shape share theirs.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device if initialise else torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval().requires_grad_(False)
    if not initialise:
        _share_memory(model, device)
    return model


def _share_memory(model: nn.Module, device: torch.device) -> None:
    of_shape: dict[Any, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in [(name, old) for name, old in tensors.items() if old is not None]:
                data = of_shape.setdefault((old.shape, old.dtype), torch.empty_like(old, device=device)).fill_(0.01)
                tensors[name] = nn.Parameter(data, requires_grad=False) if isinstance(old, nn.Parameter) else data


@dataclasses.dataclass
class Case:
    """Inputs of one size for a model: ``4x128`` is a prefill of 4 sequences of 128 tokens without a cache, and
    ``decode-4x128`` a step of one more token for each of them, with their keys and values in a static cache.
    """

    label: str
    model: nn.Module
    device: torch.device

    def __post_init__(self) -> None:
        self.batch, self.length = map(int, self.label.removeprefix("decode-").split("x"))
        torch.manual_seed(1)
        size = (self.batch, 1 if self.decodes else self.length)
        vocabulary = self.model.config.vocab_size
        self.inputs: dict[str, Any] = {"input_ids": torch.randint(vocabulary, size).to(self.device), "use_cache": False}
        if self.decodes:
            from transformers import StaticCache

            prompt = torch.randint(vocabulary, (self.batch, self.length)).to(self.device)
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.length + NEW_TOKENS)
            with torch.no_grad():  # not compiled: it gives the cache its memory
                run = Variant(THEIRS, "grouped_mm", PLAIN).prepare(self.model)
                run(prompt, past_key_values=self.cache, use_cache=True)
            self.inputs |= {"past_key_values": self.cache, "use_cache": True}

    @property
    def decodes(self) -> bool:
        return self.label.startswith("decode-")

    @property
    def tokens(self) -> int:
        """Tokens of one call."""
        return self.inputs["input_ids"].numel()  # type: ignore[no-any-return]

    def rewind(self) -> None:
        """Let the next step be the first one after the prompt again."""
        for layer in self.cache.layers if self.decodes else ():
            layer.cumulative_length.fill_(self.length)

    def call(self, run: Callable[..., Any]) -> Tensor:
        """The logits ``[batch, tokens, vocabulary]``."""
        with torch.no_grad():
            logits: Tensor = run(**self.inputs).logits
        return logits


def run(settings: Settings, labels: Sequence[str], layers: int | None) -> None:
    """Measure all cases; print and record their rows, and the summary."""
    variants = make_variants(settings.modes, settings.variants)
    recorder = output.Recorder(settings.output, PART)
    recorder.write("about", output.about(settings.device))
    config = model_config(settings.tiny, layers)
    output.progress(f"{config.num_hidden_layers} layers, {len(labels)} cases, {len(variants)} variants")
    cold = compile_ahead(settings, PART, _jobs(settings, labels, layers, variants))
    model = build_model(config, settings.device)
    rows: list[Row] = []
    output.say(output.header(COLUMNS))
    for label in labels:
        if settings.budget.spent:
            output.progress(f"out of time: {label}")
            continue
        output.progress(f"{label}; {settings.budget.elapsed:.0f} s so far")
        case = Case(label, model, settings.device)
        reference = case.call(Variant(THEIRS, EAGER, PLAIN).prepare(model)).cpu()
        of_case: list[Row] = []
        for variant in sorted(variants, key=lambda variant: variant.experts != EAGER):
            if settings.budget.spent:
                output.progress(f"out of time: {label} {variant.name}")
                continue
            row = {"part": PART, "case": label, "tokens": case.tokens, "variant": variant.name}
            row |= dataclasses.asdict(variant) | {"cold_s": cold.get((label, variant))}
            row |= _measure(case, variant, settings, reference)
            compare(row, of_case)
            of_case.append(row)
            output.say(output.line(row, COLUMNS))
            recorder.write("row", row)
        rows += of_case
        del case
        measure.release(settings.device)
    text, data = summary.best_of_modes(rows)
    recorder.write("summary", data)
    output.say(f"\n{text}")


def compile_only(settings: Settings, labels: Sequence[str], layers: int | None) -> None:
    """Print each variant's name and the seconds of its first call: what workers do."""
    model = build_model(model_config(settings.tiny, layers), settings.device, initialise=False)
    for label in labels:
        case = Case(label, model, settings.device)
        for variant in make_variants(settings.modes, settings.variants):
            case.rewind()
            action = partial(case.call, variant.prepare(model, settings.inner))
            first_call_alone(variant, action, settings.device)


def _jobs(settings: Settings, labels: Sequence[str], layers: int | None, variants: Sequence[Variant]) -> list[Job]:
    """What workers compile: a job for each case and mode. Not where transformers copies many weights."""
    jobs = []
    for label in labels:
        batch, length = map(int, label.removeprefix("decode-").split("x"))
        few = batch * (1 if label.startswith("decode-") else length) <= 64
        for mode in [mode for mode in settings.modes if mode != PLAIN]:
            chosen = [v for v in variants if v.mode == mode and (few or v.experts != "batched_mm")]
            arguments = ["--shapes", label, *(["--layers", str(layers)] if layers is not None else [])]
            if chosen:
                jobs.append(Job(label, mode, chosen, arguments, 8 << 30))
    return jobs


def _measure(case: Case, variant: Variant, settings: Settings, reference: Tensor) -> Row:
    config = case.model.config
    expert_bytes = 3 * config.hidden_size * config.moe_intermediate_size * DTYPE.itemsize
    work = Work(case.tokens, config.num_experts_per_tok, config.num_experts, expert_bytes)
    why = left_out(variant, work, measure.device_memory(settings.device))
    if why is not None:
        return {"left_out": why}

    def measured() -> Row:
        base = measure.allocated_gib(settings.device)
        run = variant.prepare(case.model, settings.inner)
        case.rewind()
        row = measure.first_call(lambda: case.call(run), settings.device)
        row |= measure.plain_calls(lambda: case.call(run), settings.repeats, settings.device, case.rewind)
        if "peak_gib" in row:
            row["own_gib"] = row["peak_gib"] - base
        row["cudagraph_skips"] = compiler.cudagraph_skips()
        case.rewind()
        row["rel_err"] = relative_error(case.call(run), reference)
        return row

    measure.release(settings.device)
    row = output.guarded(measured)
    measure.release(settings.device)
    return row


def compare(row: Row, others: Sequence[Row]) -> None:
    """Add the ratios to what was measured before in the same case.

    To transformers' grouped_mm in the same mode, and to the memory of eager.
    """
    done = {other["variant"]: other for other in [*others, row]}
    found = summary.figures(done.values())
    own, peer = found.get(row["variant"]), found.get(f"{THEIRS}/grouped_mm/{row['mode']}")
    eager = done.get(f"{THEIRS}/{EAGER}/{PLAIN}", {}).get("peak_gib")
    row["of_grouped"] = own / peer if own is not None and peer is not None else None
    row["of_eager"] = row["peak_gib"] / eager if eager and "peak_gib" in row else None
