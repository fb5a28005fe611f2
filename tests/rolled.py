"""Loops over experts that are rolled by hand: the markers that capture puts in, put in by the loop itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn

import moe_rewrite
from moe_rewrite import markers
from moe_rewrite.loop import ExpertsLoop


class Python:
    """Loops as Python runs them: ``range(num_experts)``, one expert after the other."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def each(self, body: Callable[..., Any]) -> None:
        """``for expert in range(num_experts): body(expert)``."""
        for expert in range(self.num_experts):
            body(expert)

    def each_with_rows(self, body: Callable[..., Any], rows: Callable[..., Tensor]) -> None:
        """The same for experts for which ``rows(expert)`` is not empty."""
        for expert in range(self.num_experts):
            if rows(expert).shape[0] > 0:
                body(expert)

    def each_if(self, truth: Callable[..., Tensor], body: Callable[..., Any], other: Callable[..., Any]) -> None:
        """``body`` for the experts for which ``truth(expert)`` holds, ``other`` for those for which it does not."""
        for expert in range(self.num_experts):
            if truth(expert):
                body(expert)
            else:
                other(expert)

    def carry(self, body: Callable[..., Tensor], start: Tensor) -> Tensor:
        """``for expert in ...: start = body(expert, start)``."""
        for expert in range(self.num_experts):
            start = body(expert, start)
        return start

    def stack(self, body: Callable[..., Tensor]) -> Tensor:
        """What the iterations return, one after the other."""
        return torch.stack([body(expert) for expert in range(self.num_experts)])


class Rolled(Python):
    """The same loops, captured."""

    def _begin(self, path: int) -> Any:
        index = markers.loop_begin(torch.arange(self.num_experts), path)
        return index, markers.number(index, self.num_experts)

    def _end(self, index: Tensor, rows: int = markers.ANY_ROWS) -> None:
        markers.loop_end(index, [0, self.num_experts], rows)

    def each(self, body: Callable[..., Any]) -> None:
        index, expert = self._begin(0)
        body(expert)
        self._end(index)

    def each_with_rows(self, body: Callable[..., Any], rows: Callable[..., Tensor]) -> None:
        index, expert = self._begin(0)
        body(expert)
        self._end(index, markers.SOME_ROWS)
        index, expert = self._begin(1)
        rows(expert)
        self._end(index, markers.NO_ROWS)

    def each_but_empty(self, body: Callable[..., Any], other: Callable[..., Any]) -> None:
        """``body`` for experts with rows, ``other`` for those without."""
        index, expert = self._begin(0)
        body(expert)
        self._end(index, markers.SOME_ROWS)
        index, expert = self._begin(1)
        other(expert)
        self._end(index, markers.NO_ROWS)

    def each_if(self, truth: Callable[..., Tensor], body: Callable[..., Any], other: Callable[..., Any]) -> None:
        for path, way in enumerate((body, other)):
            index, expert = self._begin(path)
            markers.condition(index, truth(expert), path == 0)
            way(expert)
            self._end(index)

    def carry(self, body: Callable[..., Tensor], start: Tensor) -> Tensor:
        index, expert = self._begin(0)
        carried = markers.carry_in(index, start)
        result = markers.carry_out(index, carried, body(expert, carried))
        self._end(index)
        return result

    def stack(self, body: Callable[..., Tensor]) -> Tensor:
        index, expert = self._begin(0)
        result = markers.collect(index, body(expert), self.num_experts)
        self._end(index)
        return result


class Compiled:
    """A compiler backend for :class:`Rolled` loops: the pass, and nothing after it.

    Attributes:
        loops: what the loops were recognised as.
        graphs: the rewritten graphs.
    """

    def __init__(self, experts_backend: str, inner: Callable[..., Any] | None = None) -> None:
        self.experts_backend = experts_backend
        self.inner = inner
        self.loops: list[ExpertsLoop] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        reports = moe_rewrite.rewrite(gm, self.experts_backend, fuses=self.inner is not None)
        self.loops += [report.loop for report in reports if report.loop is not None]
        self.graphs.append(gm)
        return gm if self.inner is None else self.inner(gm, example_inputs)


def compiled(module: nn.Module, backend: Compiled, dynamic: bool | None = None) -> Callable[..., Any]:
    """``module``, whose loops are :class:`Rolled`, through the pass."""
    torch._dynamo.reset()
    run = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)

    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
            return run(*args)

    return call
