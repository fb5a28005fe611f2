"""The part ``experts``: the experts module alone, in the shapes of known models, over numbers of tokens."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_rewrite.benchmark import compiler, measure, output, summary
from moe_rewrite.benchmark.ahead import Job, compile_ahead, first_call_alone
from moe_rewrite.benchmark.floor import Ceilings, floor_ms, mean_hit
from moe_rewrite.benchmark.measure import Replay, Row
from moe_rewrite.benchmark.points import PART, Experts, Point
from moe_rewrite.benchmark.reference import Exact
from moe_rewrite.benchmark.settings import Settings
from moe_rewrite.benchmark.shapes import ExpertsInputs
from moe_rewrite.benchmark.variants import PLAIN, THEIRS, Variant, left_out, make_variants

COLUMNS = {
    **dict.fromkeys(("replay_ms", "ms", "b2b_ms", "floor_ms"), ".4f"),
    **dict.fromkeys(("of_floor", "of_best"), ".3f"),
    **{"peak_gib": ".2f", "own_gib": ".3f", "compile_s": ".1f", "dynamo_s": ".1f", "cold_s": ".1f", "rel_err": ".2e"},
}
INPUT_SETS = 8  # calls take turns with them, so that not always the same experts are hit
HELD_GIB = 16.0  # how much memory captured CUDA graphs may hold until all variants of a point are replayed in turn


def run(settings: Settings, stages: Sequence[Sequence[Point]], ceilings: Ceilings) -> None:
    """Measure all points; print and record their rows, and the summary."""
    variants = make_variants(settings.modes, settings.variants)
    recorder = output.Recorder(settings.output, PART)
    recorder.write("about", {**output.about(settings.device), "ceilings": dataclasses.asdict(ceilings)})
    points = [point for stage in stages for point in stage]
    output.progress(f"{len(points)} points, {len(variants)} variants; floor: {ceilings}")
    cold = compile_ahead(settings, PART, [job for point in points for job in _jobs(settings, point, variants)])
    output.say(output.header(COLUMNS))
    rows: list[Row] = []
    done = itertools.count(1)
    for stage in stages:
        for shape, group in itertools.groupby(stage, key=lambda point: point.shape):
            if settings.budget.spent:
                output.progress(f"out of time: {', '.join(point.label for point in group)}")
                continue
            module = shape.build(settings.device)
            for point in group:
                if settings.budget.spent:
                    output.progress(f"out of time: {point.label}")
                    continue
                output.progress(f"[{next(done)}/{len(points)}] {point.label}; {settings.budget.elapsed:.0f} s so far")
                bench = PointBenchmark(point, module, settings, ceilings, cold)
                for row in bench.run(variants, recorder):
                    rows.append(row)
                    output.say(output.line(row, COLUMNS))
            del module
            measure.release(settings.device)
    text, data = summary.summarise(rows)
    recorder.write("summary", data)
    output.say(f"\n{text}")


def compile_only(settings: Settings, stages: Sequence[Sequence[Point]]) -> None:
    """Print each variant's name and the seconds of its first call: what workers do."""
    for point in itertools.chain(*stages):
        experts = Experts(point.shape.build(settings.device, initialise=False), point.backward)
        inputs = ExpertsInputs.random(point.shape, point.tokens, point.backward, settings.device)
        for variant in make_variants(settings.modes, settings.variants):
            call = variant.prepare(experts.module, settings.inner)
            first_call_alone(variant, partial(experts.call, call, inputs), settings.device)


def _jobs(settings: Settings, point: Point, variants: Sequence[Variant]) -> list[Job]:
    """What workers compile for a point: a job for each mode."""
    shape, memory = point.shape, measure.device_memory(settings.device)
    chosen: dict[str, list[Variant]] = {}
    gathered = 0
    for v in variants:
        out = left_out(v, point.work, memory)
        if v.mode == PLAIN or out is not None:
            continue
        if v.experts == "batched_mm" and v.provider == THEIRS:
            gathered = point.work.gathered_bytes
        chosen.setdefault(v.mode, []).append(v)
    needed = shape.num_experts * shape.expert_bytes * (2 if point.backward else 1)
    needed += gathered + 64 * point.pairs * (shape.hidden + shape.intermediate)
    return [Job(point.label, mode, of_mode, point.arguments(), needed) for mode, of_mode in chosen.items()]


class PointBenchmark:
    """All variants at one point: one after another, then their CUDA graphs in turn."""

    def __init__(
        self, point: Point, module: nn.Module, settings: Settings, ceilings: Ceilings, cold: dict[Any, float]
    ) -> None:
        self.point, self.settings, self.cold, self.device = point, settings, cold, settings.device
        self.weights_gib = measure.allocated_gib(self.device)
        torch.manual_seed(1)
        self.experts = Experts(module, point.backward)
        shape = point.shape
        self.inputs = [
            ExpertsInputs.random(shape, point.tokens, point.backward, self.device) for _ in range(INPUT_SETS)
        ]
        self.hit = mean_hit([inputs.index for inputs in self.inputs], shape.num_experts)
        self.floor = floor_ms(shape, self.hit, point.tokens, point.backward, ceilings)
        self.exact = Exact.of(module, self.inputs[0])
        flushed_bytes = measure.FLUSHED_BYTES if measure.on_gpu(self.device) else 0
        self.flushed = torch.zeros(flushed_bytes, dtype=torch.int8, device=self.device)
        self.held: dict[str, Replay] = {}
        self.rows: list[Row] = []

    def run(self, variants: Sequence[Variant], recorder: output.Recorder) -> list[Row]:
        """The finished rows. They are recorded as they come, and once more when finished."""
        measure.release(self.device)
        reserved = self._reserved()
        skipped: list[str] = []
        for variant in variants:
            if self.rows and self.settings.budget.spent:
                skipped.append(variant.name)
                continue
            row = self.point.row() | dataclasses.asdict(variant) | {"variant": variant.name}
            row |= {"hit": self.hit, "floor_ms": self.floor, "cold_s": self.cold.get((self.point.label, variant))}
            row |= self._variant(variant)
            self.rows.append(row)
            recorder.write("row", row)
            output.progress(f"  {variant.name}: {output.short(row)}")
            if self._reserved() - reserved > HELD_GIB:
                self._replay_in_turn()
        self._replay_in_turn()
        if skipped:
            output.progress(f"  out of time: {', '.join(skipped)}")
        compare(self.rows)
        for row in self.rows:
            recorder.write("row", row)
        return self.rows

    def _reserved(self) -> float:
        return torch.cuda.memory_reserved(self.device) / 2**30 if measure.on_gpu(self.device) else 0.0

    def _variant(self, variant: Variant) -> Row:
        why = left_out(variant, self.point.work, measure.device_memory(self.device))
        row = {"left_out": why} if why is not None else output.guarded(lambda: self._measure(variant))
        measure.release(self.device)
        return row

    def _measure(self, variant: Variant) -> Row:
        base = measure.allocated_gib(self.device)
        run, rotation = variant.prepare(self.experts.module, self.settings.inner), itertools.cycle(self.inputs)

        def call(inputs: ExpertsInputs) -> tuple[Tensor, ...]:
            return self.experts.call(run, inputs)

        row = measure.first_call(lambda: call(self.inputs[0]), self.device)
        row |= measure.plain_calls(lambda: call(next(rotation)), self.settings.repeats, self.device)
        if "peak_gib" in row:  # without what captured graphs of other variants hold
            row["own_gib"] = row["peak_gib"] - base
            row["peak_gib"] = row["own_gib"] + self.weights_gib
        row["rel_err"] = self.exact.error(call(self.inputs[0]), self.experts.names)
        row["cudagraph_skips"] = compiler.cudagraph_skips()
        if measure.on_gpu(self.device):
            row |= self._capture(variant, call)
        return row

    def _capture(self, variant: Variant, call: Callable[[ExpertsInputs], Any]) -> Row:
        """Hold a CUDA graph of ``call``, or say why there is none; the other figures of the variant stand."""
        if variant.uncapturable is not None:
            return {"replay_error": variant.uncapturable}
        try:
            self.held[variant.name] = Replay(call, self.inputs, self.flushed)
        except Exception as error:
            return {"replay_error": output.reason(error)}
        return {}

    def _replay_in_turn(self) -> None:
        try:
            for name, times in measure.interleaved(self.held, self.settings.repeats).items():
                row = next(row for row in self.rows if row["variant"] == name)
                row |= {"replay_ms": statistics.median(times), "replays_ms": times}
        finally:
            self.held.clear()
            measure.release(self.device)


def compare(rows: Sequence[Row]) -> None:
    """Add to the rows of one point the ratios to its floor and to the fastest variant of transformers."""
    found = summary.figures(rows)
    best = summary.fastest(found, THEIRS)
    for row in rows:
        own = found.get(row["variant"])
        row["of_floor"] = own / row["floor_ms"] if own is not None else None
        row["of_best"] = own / found[best] if own is not None and best is not None else None
