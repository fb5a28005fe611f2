"""The part ``compile``: seconds from the call to the first result, by the number of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from moe_rewrite.benchmark import compiler, measure, output
from moe_rewrite.benchmark.compiler import OURS
from moe_rewrite.benchmark.lists import build_layers
from moe_rewrite.benchmark.measure import Row
from moe_rewrite.benchmark.model import build_model, model_config
from moe_rewrite.benchmark.settings import Settings
from moe_rewrite.benchmark.shapes import DTYPE
from moe_rewrite.benchmark.variants import THEIRS, Variant

PART = "compile"
NUM_EXPERTS = (8, 60, 128, 256)
STACKED, MODULES = "stacked", "modules"
FORMS = (STACKED, MODULES)
BATCH, LENGTH = 4, 16
EXPERTS = "grouped_mm"  # of both, so that the same products are compiled
COLUMNS = {
    **dict.fromkeys(("cold_s", "cold_dynamo_s", "warm_s", "warm_dynamo_s"), ".2f"),
    **dict.fromkeys(("of_peer_cold", "of_peer_warm", "of_first_dynamo"), ".2f"),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models that are compiled: layers, size of a token's hidden state, and of an expert."""

    layers: int
    hidden: int
    intermediate: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: its number of experts, and whether these are stacked in one parameter or modules in a list."""

    form: str
    num_experts: int
    sizes: Sizes

    @property
    def label(self) -> str:
        return f"{self.form}:{self.num_experts}"

    def build(self, device: torch.device, tiny: bool) -> tuple[nn.Module, Callable[[Callable[..., Any]], Any]]:
        """The model, and how to call it."""
        torch.manual_seed(1)
        size = self.sizes
        if self.form == MODULES:
            model = build_layers(size.layers, self.num_experts, size.hidden, size.intermediate, 4, device)
            x = torch.randn(BATCH * LENGTH, size.hidden, device=device, dtype=DTYPE)
            return model, lambda run: run(x)
        sizes = {"hidden_size": size.hidden, "moe_intermediate_size": size.intermediate}
        config = model_config(tiny, size.layers, **sizes, num_experts=self.num_experts)
        model = build_model(config, device)
        ids = torch.randint(config.vocab_size, (BATCH, LENGTH)).to(device)
        return model, lambda run: run(input_ids=ids, use_cache=False).logits

    def variants(self, modes: Sequence[str]) -> list[Variant]:
        """Peers first. Experts that are modules have no peer: no implementation of transformers takes them."""
        providers = [THEIRS, OURS] if self.form == STACKED else [OURS]
        return [Variant(provider, EXPERTS, mode) for mode in modes for provider in providers]


def run(settings: Settings, numbers: Sequence[int], forms: Sequence[str], sizes: Sizes) -> None:
    """Measure all cases; print and record their rows.

    ``cold``: with empty caches of inductor and Triton; ``warm``: the same once more, with what the first left there.
    """
    recorder = output.Recorder(settings.output, PART)
    recorder.write("about", {**output.about(settings.device), "sizes": dataclasses.asdict(sizes)})
    output.progress(f"{sizes.layers} layers, hidden {sizes.hidden}, intermediate {sizes.intermediate}")
    _warm_up(settings)
    output.say(output.header(COLUMNS))
    rows: list[Row] = []
    for form in forms:
        for number in numbers:
            case = Case(form, number, sizes)
            for variant in case.variants(settings.modes):
                if not variant.matches(settings.variants):
                    continue
                if settings.budget.spent:
                    output.progress(f"out of time: {case.label} {variant.name}")
                    continue
                row = {"part": PART, "case": case.label, "form": form, "num_experts": number, "variant": variant.name}
                row |= dataclasses.asdict(variant) | output.guarded(lambda: measured(case, variant, settings))  # noqa: B023
                compare(row, rows)
                rows.append(row)
                output.say(output.line(row, COLUMNS))
                recorder.write("row", row)


def _warm_up(settings: Settings) -> None:
    """The first compilation of a process pays for imports, and the first call on a device for its libraries."""
    for form, provider in ((STACKED, THEIRS), (MODULES, OURS)):
        model, call = Case(form, 8, Sizes(1, 64, 32)).build(settings.device, tiny=True)
        measure.release(settings.device)
        with torch.no_grad(), compiler.empty_cache():
            call(Variant(provider, EXPERTS, "default").prepare(model, settings.inner))
    measure.release(settings.device)


def measured(case: Case, variant: Variant, settings: Settings) -> Row:
    """Seconds of a first call with empty caches, and of the first call of a fresh model with full ones."""
    row: Row = {}
    with torch.no_grad(), compiler.empty_cache():
        for name in ("cold", "warm"):
            once = _first_call(case, variant, settings)
            row |= {f"{name}_s": once["compile_s"], f"{name}_dynamo_s": once["dynamo_s"], "loops": once["loops"]}
            row[f"{name}_hit"] = once["cache_hit"]
    measure.release(settings.device)
    return row


def _first_call(case: Case, variant: Variant, settings: Settings) -> Row:
    """Of a model of its own: packing is paid for once in a module's life."""
    measure.release(settings.device)
    model, call = case.build(settings.device, settings.tiny)
    run = variant.prepare(model, settings.inner)
    return measure.first_call(lambda: call(run), settings.device)


def compare(row: Row, others: Sequence[Row]) -> None:
    """Add the ratios to transformers in the same case and mode, and to Dynamo's time with the fewest experts."""
    peers = [o for o in others if o["case"] == row["case"] and o["mode"] == row["mode"] and o["provider"] == THEIRS]
    for name in ("cold", "warm"):
        if peers and f"{name}_s" in row and f"{name}_s" in peers[0]:
            row[f"of_peer_{name}"] = row[f"{name}_s"] / peers[0][f"{name}_s"]
    same = [o for o in [*others, row] if o["form"] == row["form"] and o["variant"] == row["variant"]]
    first = next((o for o in same if o.get("cold_dynamo_s")), None)
    if first is not None and row.get("cold_dynamo_s"):
        row["of_first_dynamo"] = row["cold_dynamo_s"] / first["cold_dynamo_s"]
