"""Plots of the part ``experts``: latency against tokens, one picture for each shape and pass, the floor as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_rewrite.benchmark import summary
from moe_rewrite.benchmark.compiler import OURS
from moe_rewrite.benchmark.output import Row
from moe_rewrite.lower import AUTO

Line = list[tuple[int, float]]


def series(rows: Sequence[Row]) -> tuple[Line, dict[str, Line]]:
    """The floor, and a line for each provider and experts backend, each in its fastest mode: ``(tokens, ms)``, sorted.

    Args:
        rows: of one shape and pass.
    """
    floor: Line = []
    lines: dict[str, Line] = {}
    for of_case in summary.points(rows).values():
        tokens, found = of_case[0]["tokens"], summary.figures(of_case)
        floor.append((tokens, of_case[0]["floor_ms"]))
        best: dict[str, float] = {}
        for variant, ms in found.items():
            name = variant.rpartition("/")[0]
            best[name] = min(ms, best.get(name, ms))
        for name, ms in best.items():
            lines.setdefault(name, []).append((tokens, ms))
    return sorted(floor), {name: sorted(line) for name, line in lines.items()}


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures and return their paths.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'moe_rewrite[benchmark]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for shape, which in dict.fromkeys((row["shape"], row["pass"]) for row in rows):
        chosen = [row for row in rows if (row["shape"], row["pass"]) == (shape, which)]
        floor, lines = series(chosen)
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, line in lines.items():
            auto = name == f"{OURS}/{AUTO}"
            style = {"linewidth": 2.5, "color": "black"} if auto else {"linewidth": 1.2}
            dashes = "-" if name.startswith(OURS) else "--"
            axes.plot(*zip(*line, strict=True), dashes, marker="o", markersize=4, label=name, **style)
        axes.plot(*zip(*floor, strict=True), ":", color="gray", linewidth=2, label="floor")
        replayed = any(row.get("replay_ms") is not None for row in chosen)
        both = "forward and backward" if which == "backward" else which
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=f"{shape}, {both}, fastest mode of each")
        axes.set_ylabel("ms, CUDA-graph replay" if replayed else "ms of a call")
        ticks = [tokens for tokens, _ in floor]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        written.append(folder / f"{shape}-{which}.png")
        figure.savefig(written[-1], dpi=120)
    return written
