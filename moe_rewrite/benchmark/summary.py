"""What the rows say together: geometric means, worst points, and where which experts backend is fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moe_rewrite.benchmark.compiler import OURS
from moe_rewrite.benchmark.output import Row, table
from moe_rewrite.benchmark.variants import THEIRS
from moe_rewrite.lower import AUTO


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``auto`` in one mode against others at one point: how many times faster it is than the fastest of them."""

    case: str
    ratio: float
    other: str


def ms_of(row: Row, replayed: bool) -> float | None:
    """The figure that counts, or None."""
    figure = row.get("replay_ms" if replayed else "ms")
    return None if figure is None or math.isnan(figure) else figure


def figures(rows: Iterable[Row]) -> dict[str, float]:
    """Milliseconds of the variants of one point: all of CUDA-graph replays where there are any, else of plain calls."""
    rows = list(rows)
    replayed = any(row.get("replay_ms") is not None for row in rows)
    found = {row["variant"]: ms_of(row, replayed) for row in rows}
    return {name: figure for name, figure in found.items() if figure is not None}


def points(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each case, in order."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def fastest(found: dict[str, float], provider: str, mode: str | None = None, but: str = "") -> str | None:
    """The fastest variant of a provider, in any mode or in one; ``but`` names experts that do not take part."""
    names = [name for name in found if _parts(name)[0] == provider and mode in (None, _parts(name)[2])]
    return min((name for name in names if _parts(name)[1] != but), key=found.__getitem__, default=None)


def modes_of(rows: Iterable[Row], provider: str = OURS) -> list[str]:
    return list(dict.fromkeys(row["mode"] for row in rows if row["provider"] == provider))


def against_theirs(rows: Sequence[Row], mode: str) -> list[Comparison]:
    """``auto`` in ``mode`` against the fastest variant of transformers at each point, in whichever mode that is."""
    return _compare(rows, mode, lambda found: fastest(found, THEIRS))


def against_ours(rows: Sequence[Row], mode: str) -> list[Comparison]:
    """``auto`` in ``mode`` against the fastest experts backend of ours in that mode: below 1, it chose badly."""
    return _compare(rows, mode, lambda found: fastest(found, OURS, mode, but=AUTO))


def _compare(rows: Sequence[Row], mode: str, pick: Callable[[dict[str, float]], str | None]) -> list[Comparison]:
    result = []
    for case, of_case in points(rows).items():
        found = figures(of_case)
        own, other = found.get(f"{OURS}/{AUTO}/{mode}"), pick(found)
        if own is not None and other is not None:
            result.append(Comparison(case, found[other] / own, other))
    return result


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Up to ``last`` pairs from ``first`` on, of those measured, ``experts`` is the fastest of our experts backends."""

    case: str
    mode: str
    experts: str
    first: int
    last: int

    @property
    def range(self) -> str:
        return f"{self.first} to {self.last}" if self.first < self.last else str(self.first)


def crossovers(rows: Sequence[Row], mode: str) -> list[Crossover]:
    """For each shape and pass: which of our experts backends (not ``auto``) is fastest over which numbers of pairs."""
    result: list[Crossover] = []
    series: dict[str, list[tuple[int, str]]] = {}
    for of_case in points(rows).values():
        name = fastest(figures(of_case), OURS, mode, but=AUTO)
        if name is not None:
            one = of_case[0]
            series.setdefault(f"{one['shape']} {one['pass']}", []).append((one["pairs"], _parts(name)[1]))
    for case, measured in series.items():
        for pairs, experts in sorted(measured):
            last = result[-1] if result and result[-1].case == case else None
            if last is not None and last.experts == experts:
                result[-1] = dataclasses.replace(last, last=pairs)
            else:
                result.append(Crossover(case, mode, experts, pairs, pairs))
    return result


def summarise(rows: Sequence[Row]) -> tuple[str, Row]:
    """The summary as text, and as a row for the JSON lines: for each pass, for each mode in which ours was run."""
    text: list[str] = []
    data: Row = {}
    for which in dict.fromkeys(row["pass"] for row in rows):
        of_pass = [row for row in rows if row["pass"] == which]
        for mode in modes_of(of_pass):
            theirs, ours = against_theirs(of_pass, mode), against_ours(of_pass, mode)
            found = crossovers(of_pass, mode)
            data.setdefault(which, {})[mode] = {
                "geometric_mean": geometric_mean(c.ratio for c in theirs) if theirs else None,
                "points": len(theirs),
                "slower_at": [c.case for c in theirs if c.ratio < 1],
                "worst": dataclasses.asdict(worst(theirs)) if theirs else None,
                "auto_worst": dataclasses.asdict(worst(ours)) if ours else None,
                "crossovers": [dataclasses.asdict(crossover) for crossover in found],
            }
            text += [f"{which}, {mode}", "", *_sentences(theirs, ours), "", _own_table(of_pass, mode)]
            cells = [[c.case, c.range, c.experts] for c in found]
            text += ["", table([["shape and pass", "pairs", "fastest experts backend of ours"], *cells]), ""]
    return "\n".join(text), data


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    return min(comparisons, key=lambda comparison: comparison.ratio)


def _sentences(theirs: Sequence[Comparison], ours: Sequence[Comparison]) -> list[str]:
    text = []
    if theirs:
        mean, slower = geometric_mean(c.ratio for c in theirs), sum(c.ratio < 1 for c in theirs)
        text.append(
            f"auto against the best transformers variant of any mode: {mean:.3f}x faster (geometric mean of "
            f"{len(theirs)} points), slower at {slower}; worst at {_at(theirs)}"
        )
    if ours:
        text.append(f"auto against the best of ours in its mode: worst at {_at(ours)}")
    return text


def _at(comparisons: Sequence[Comparison]) -> str:
    point = worst(comparisons)
    return f"{point.case}, {point.ratio:.3f}x of {point.other}"


def _own_table(rows: Sequence[Row], mode: str) -> str:
    """Milliseconds of each experts backend of ours at each point, what ``auto`` chose, and how good that was."""
    names = list(dict.fromkeys(row["experts"] for row in rows if row["provider"] == OURS and row["mode"] == mode))
    ratios = {comparison.case: comparison for comparison in against_ours(rows, mode)}
    cells = []
    for case, of_case in points(rows).items():
        found = figures(of_case)
        own = [found.get(f"{OURS}/{name}/{mode}") for name in names]
        auto = next((row for row in of_case if row["variant"] == f"{OURS}/{AUTO}/{mode}"), {})
        best = _parts(ratios[case].other)[1] if case in ratios else ""
        ratio = f"{ratios[case].ratio:.3f}" if case in ratios else ""
        shown = ["" if figure is None else f"{figure:.4f}" for figure in own]
        cells.append([case, str(of_case[0]["pairs"]), *shown, ", ".join(auto.get("loops") or {}), best, ratio])
    return table([["case", "pairs", *names, "auto chose", "fastest", "its time over auto's"], *cells])


def best_of_modes(rows: Sequence[Row]) -> tuple[str, Row]:
    """For each case the fastest variant of transformers and of ours, as text and as a row for the JSON lines."""
    cells: list[list[str]] = []
    data: dict[str, dict[str, Any]] = {}
    for case, of_case in points(rows).items():
        found = figures(of_case)
        theirs, ours = fastest(found, THEIRS), fastest(found, OURS)
        if theirs is not None and ours is not None:
            ratio = found[theirs] / found[ours]
            cells.append([case, theirs, f"{found[theirs]:.3f}", ours, f"{found[ours]:.3f}", f"{ratio:.3f}"])
            data[case] = {"theirs": theirs, "ours": ours, "ratio": ratio}
    mean = geometric_mean(entry["ratio"] for entry in data.values())
    head = ["case", "best of transformers", "ms", "best of ours", "ms", "times faster"]
    text = f"{table([head, *cells])}\n\n{mean:.3f}x faster (geometric mean of {len(cells)} cases)" if cells else ""
    return text, {"cases": data, "geometric_mean": mean if cells else None}


def _parts(name: str) -> tuple[str, str, str]:
    provider, experts, mode = name.split("/")
    return provider, experts, mode
