"""Which columns the steps of a row program take, and rows whose columns are all taken: by halves, or in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from moe_rewrite.loop import ExpertsLoop, Kind, Step, Value
from moe_rewrite.lower.adjoints import columns

SPLITS = ("split", "split_with_sizes")


def taken(step: Step) -> list[range] | None:
    """Which columns of its rows ``[P, N]`` a step gives: of a slice one range, of a split one for each part.

    None for other steps, for none at all, and where sizes are symbols.
    """
    source = step.args[0] if step.args else None
    if step.name not in (*SPLITS, "slice") or not isinstance(source, Value):
        return None
    example = source.example
    if not isinstance(example, Tensor) or example.dim() != 2 or not isinstance(example.shape[1], int):
        return None
    ranges = _of_slice(step, example.shape[1]) if step.name == "slice" else _of_split(step, example.shape[1])
    return ranges if ranges and all(map(len, ranges)) else None


def taken_apart(loop: ExpertsLoop, value: Callable[[Value], Any]) -> dict[Value, Callable[[], Any]]:
    """Steps that take rows apart, each column once, and how to do so with gradients that are written where they belong.

    Args:
        loop: the loop.
        value: gives the value, over all pairs, of a step that was run.

    Returns:
        For the results of such steps what computes them.
    """
    instead: dict[Value, Callable[[], Any]] = {}
    slices: dict[Value, list[tuple[range, Value]]] = {}
    for step in loop.steps:
        ranges = taken(step) if step.result.kind is Kind.PER_ROW else None
        if ranges is None or not step.args[0].example.is_floating_point():
            continue
        source = step.args[0]
        if step.name in SPLITS:
            instead[step.result] = partial(_apart, value, source, tuple(map(len, ranges)), False)
        else:
            slices.setdefault(source, []).append((ranges[0], step.result))
    for source, parts in slices.items():
        parts.sort(key=lambda part: part[0].start)
        ranges = [one for one, _ in parts]
        in_turn = len({one.step for one in ranges}) == 1 and ranges[0].step == len(ranges) > 1
        if len(parts) > 1 and ranges == _every_column(ranges, source.example.shape[1], in_turn):
            # They are computed together, when the turn of the first comes.
            compute = functools.cache(partial(_apart, value, source, tuple(map(len, ranges)), in_turn))
            for number, (_, result) in enumerate(parts):
                instead[result] = partial(_one_of, compute, number)
    return instead


def _every_column(parts: list[range], width: int, in_turn: bool) -> list[range] | None:
    """The ranges that ``width`` columns fall into if parts of these lengths take each once; None if none do."""
    if in_turn:
        every = [range(width)[start :: len(parts)] for start in range(len(parts))]
        return every if width % len(parts) == 0 else None
    ends = [sum(map(len, parts[: number + 1])) for number in range(len(parts))]
    return [range(end - len(part), end) for part, end in zip(parts, ends, strict=True)] if ends[-1] == width else None


def _apart(value: Callable[[Value], Any], source: Value, sizes: tuple[int, ...], in_turn: bool) -> list[Tensor]:
    return columns(value(source), list(sizes), in_turn)


def _one_of(compute: Callable[[], list[Tensor]], number: int) -> Tensor:
    return compute()[number]


def _of_split(step: Step, width: int) -> list[range] | None:
    sizes, dim = step.args[1], step.args[2] if len(step.args) > 2 else step.kwargs.get("dim", 0)
    if dim not in (-1, 1):
        return None
    if isinstance(sizes, int):
        sizes = [min(sizes, width - start) for start in range(0, width, sizes)]
    if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
        return None
    return [range(sum(sizes[:number]), sum(sizes[: number + 1])) for number in range(len(sizes))]


def _of_slice(step: Step, width: int) -> list[range] | None:
    given: list[Any] = [*step.args[1:]]
    dim, start, end, by = given + [0, None, None, 1][len(given) :]
    if dim not in (-1, 1) or step.kwargs or not all(isinstance(size, int | None) for size in (start, end, by)):
        return None
    return [range(width)[slice(start, end, by)]]
