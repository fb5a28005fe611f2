"""Compiled with the experts backend ``triton``, and what was computed in one kernel."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
from loops import HIDDEN
from operands import DEVICE
from torch import Tensor, nn
from torch.testing import assert_close

from moe_rewrite.loop import ExpertsLoop
from moe_rewrite.lower import epilogue


class Recorded:
    """The loops that were lowered, and the stages that were found in each."""

    def __init__(self) -> None:
        self.loops: list[ExpertsLoop] = []
        self.stages: list[list[epilogue.Stage]] = []

    @property
    def programs(self) -> list[str]:
        """The programs of the last loop, in the order of the loop."""
        return [stage.epilogue for stage in reversed(self.stages[-1])]


def recording(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """What is lowered from now on."""
    found, stages = Recorded(), epilogue.stages

    def record(loop: ExpertsLoop) -> list[epilogue.Stage]:
        found.loops.append(loop)
        found.stages.append(stages(loop))
        return found.stages[-1]

    monkeypatch.setattr(epilogue, "stages", record)
    return found


def inputs(*sizes: int, dtype: torch.dtype = torch.float32, **how: Any) -> tuple[Tensor, ...]:
    """As :func:`loops.inputs`, in float32 and on the device of the kernels."""
    return tuple(arg.to(DEVICE) for arg in loops.inputs(*sizes, dtype=dtype, **how))


def fast(module: nn.Module, experts: str = "triton", inner: str = "eager", **how: Any) -> Any:
    options = {"inner": inner, "experts": experts}
    return torch.compile(module, backend="moe_rewrite", options=options, **{"fullgraph": True, **how})


def assert_same_numbers(actual: Any, expected: Any) -> None:
    """In float32, as ``modes.py`` has it."""
    assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


FOUR = slice(0, HIDDEN // 2)
