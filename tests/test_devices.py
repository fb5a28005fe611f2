"""Tensors of the CPU among those of another device. The meta device stands for one: tracing needs no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import capture
from torch import Tensor, nn

from moe_rewrite.config import ExpertsMapping
from moe_rewrite.loop import Refusal
from moe_rewrite.lower import devices
from moe_rewrite.rewrite import make_plans

NUM_EXPERTS, HIDDEN = 4, 8


def constant(value: Any = 1.5, **how: Any) -> Tensor:
    return torch.tensor(value, **how)


class Experts(nn.Module):
    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor, scale: Tensor, of_cpu: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            token, slot = torch.where(ids == expert)
            out.index_add_(0, token, self.body(x[token] @ weight[expert], expert, scale, of_cpu))
        return out


def reason(body: Callable[..., Tensor]) -> str | None:
    """Why the loop is refused."""
    shapes = ((6, HIDDEN), (NUM_EXPERTS, HIDDEN, HIDDEN), (NUM_EXPERTS,))
    x, weight, scale = (torch.empty(shape, device="meta") for shape in shapes)
    ids = torch.empty(6, 2, dtype=torch.int64, device="meta")
    gm = capture(Experts(body), x, ids, weight, scale, torch.ones(NUM_EXPERTS))
    (plan,) = make_plans(gm, ExpertsMapping.parse("grouped_mm"), "")
    assert plan.report is not None
    refusal = plan.report.refusal
    return refusal.reason if isinstance(refusal, Refusal) else None


TAKEN = {
    "a factor": lambda rows, *_: rows * constant(),
    "what is divided": lambda rows, *_: constant() / rows,
    "a power": lambda rows, *_: rows ** constant(2),
    "the smaller one": lambda rows, *_: torch.minimum(rows, constant()),
    "a comparison": lambda rows, *_: rows * (rows > constant()),
    "a choice": lambda rows, *_: torch.where(rows > 0, constant(), constant(2.0)) + rows,
    "with what the expert has": lambda rows, e, scale, _: rows * (scale[e] * constant()),
    "computed on the CPU": lambda rows, *_: rows * (constant() + constant(2.0)).exp(),
    "moved": lambda rows, *_: rows.clamp(max=constant().to(rows.device)),
    "a number": lambda rows, *_: rows.clamp(max=1.5).lerp(rows, 0.5),
    "an index": lambda rows, *_: rows[:, torch.tensor([*range(HIDDEN)][::-1])],
    "a table that is moved": lambda rows, e, _, of_cpu: rows * of_cpu[e].to(rows.device),
}
REFUSED = {
    "a bound": (lambda rows, *_: rows.clamp(max=constant()), "aten.clamp"),
    "a bound by name": (lambda rows, *_: torch.clamp_min(rows, constant()), "aten.clamp_min"),
    "between": (lambda rows, *_: rows.lerp(rows * 2, constant()), "aten.lerp"),
    "added times": (lambda rows, *_: torch.addcmul(rows, rows, constant()), "aten.addcmul"),
    "a logarithm": (lambda rows, *_: torch.logaddexp(rows, constant()), "aten.logaddexp"),
    "side by side": (lambda rows, e, scale, _: rows * torch.stack([scale[e], constant()]).sum(), "aten.stack"),
    "a condition": (lambda rows, *_: torch.where(constant(True), rows, -rows), "aten.where"),
    "of each expert": (lambda rows, e, _, of_cpu: rows * of_cpu[e], "which each expert has"),
    "of each expert, with others": (lambda rows, e, scale, of_cpu: rows * (of_cpu[e] * scale[e]), "differs between"),
}


@pytest.mark.parametrize("body", TAKEN.values(), ids=TAKEN)
def test_taken(body: Callable[..., Tensor]) -> None:
    """What eager takes."""
    assert reason(body) is None


@pytest.mark.parametrize(("body", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(body: Callable[..., Tensor], said: str) -> None:
    """What eager raises for, and what would have dimensions for all experts."""
    found = reason(body)
    assert found is not None and said in found and "cpu" in found


def test_operators_that_take_them() -> None:
    """None for which torch checks that all devices are the same."""
    yaml, torchgen = pytest.importorskip("yaml"), pytest.importorskip("torchgen")
    import pathlib

    found = pathlib.Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    if not found.exists():
        pytest.skip("torch comes without its list of functions")
    checks = {one["func"].split("(")[0]: one.get("device_check") for one in yaml.safe_load(found.read_text())}
    for op in (*devices._TWO_OPERANDS, *devices._TAKEN):
        name = op._schema.name.removeprefix("aten::") + (f".{op._overloadname}" * (op._overloadname != "default"))
        assert checks[name] == "NoCheck", name
