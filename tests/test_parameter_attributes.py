"""What Python reads of an expert's parameter: attributes that were set on it, and flags of the tensor object.

While a body is traced, a row of a table stands for the parameter. What eager reads of the parameter is read of it, or
the loop is left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import moe_rewrite  # noqa: F401 (the backend)

E, HIDDEN, TOKENS = 4, 6, 7

Body = Callable[[Tensor, Any], Tensor]
"""``body(rows, weight)``"""


class Expert(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.weight)


class OfModules(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert(body) for _ in range(E)])

    def weights(self) -> list[Any]:
        return [expert.weight for expert in self.experts]

    def expert(self, x: Tensor, i: int) -> Tensor:
        return self.experts[i](x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(E):
            token, _ = torch.where(ids == i)
            out.index_add_(0, token, self.expert(x[token], i))
        return out


class OfParameters(OfModules):
    def __init__(self, body: Body) -> None:
        nn.Module.__init__(self)
        self.body = body
        self.list = nn.ParameterList([torch.randn(HIDDEN, HIDDEN) for _ in range(E)])

    def weights(self) -> list[Any]:
        return list(self.list)

    def expert(self, x: Tensor, i: int) -> Tensor:
        return self.body(x, self.list[i])


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, E).topk(2).indices


def sets(**attributes: Any) -> Callable[[Any, int], None]:
    def prepare(weight: Any, i: int) -> None:
        for name, value in attributes.items():
            setattr(weight, name, value)

    return prepare


def nothing(weight: Any, i: int) -> None:
    pass


class Config:
    factor = 5.0


def triple(x: Tensor) -> Tensor:
    return x * 3


def caught(x: Tensor, w: Any) -> Tensor:
    try:
        factor = w.scale
    except AttributeError:
        factor = 7.0
    return x @ w * factor


ALIKE: dict[str, tuple[Body, Callable[[Any, int], None]]] = {
    "attribute": (lambda x, w: x @ w * w.scale, sets(scale=3.0)),
    "getattr": (lambda x, w: x @ w * getattr(w, "scale", 1.0), sets(scale=3.0)),
    "getattr, absent": (lambda x, w: x @ w * getattr(w, "scale", 1.0), nothing),
    "hasattr": (lambda x, w: x @ w * (2 if hasattr(w, "scale") else 3), sets(scale=None)),
    "hasattr, absent": (lambda x, w: x @ w * (2 if hasattr(w, "scale") else 3), nothing),
    "caught": (caught, sets(scale=3.0)),
    "string": (lambda x, w: x @ w if w.kind == "plain" else x, sets(kind="plain")),
    "list": (lambda x, w: x @ w * w.scales[1], sets(scales=[2.0, 3.0])),
    "object": (lambda x, w: x @ w * w.config.factor, sets(config=Config())),
    "function": (lambda x, w: w.act(x @ w), sets(act=triple)),
    "tensor": (lambda x, w: x @ w * w.vector, sets(vector=torch.arange(1.0, HIDDEN + 1))),
    "flag of a buffer": (lambda x, w: x @ w * (2 if isinstance(w, nn.Buffer) else 3), nothing),
    "requires_grad": (lambda x, w: x @ w * (2 if w.requires_grad else 3), nothing),
    "requires_grad by name": (lambda x, w: x @ w * (2 if getattr(w, "requires_grad", None) else 3), nothing),
    "requires_grad of a frozen one": (lambda x, w: x @ w * (2 if w.requires_grad else 3), sets(requires_grad=False)),
    "requires_grad of itself": (lambda x, w: x @ w * (2 if w.to(x.dtype).requires_grad else 3), nothing),
    "attribute of itself": (lambda x, w: x @ w * getattr(w.contiguous().to(x.dtype), "scale", 1.0), sets(scale=3.0)),
    "class": (lambda x, w: x @ w * (2 if isinstance(w, nn.Parameter) else 3), nothing),
    "no attribute of what is computed": (lambda x, w: x @ w * getattr(w.t(), "scale", 1.0), sets(scale=3.0)),
    "metadata": (
        lambda x, w: x @ w * w.ndim * w.shape[0] * (2 if w.is_contiguous() and not w.is_nested else 3),
        nothing,
    ),
}
"""A body that is rewritten, and what is done to each parameter before."""


def differs(weight: Any, i: int) -> None:
    weight.scale = 1.0 + i


def has_one(weight: Any, i: int) -> None:
    if i == 2:
        weight.scale = 2.0


LEFT: dict[str, tuple[Body, Callable[[Any, int], None], str]] = {
    "other values": (lambda x, w: x @ w * w.scale, differs, "differ in the attribute scale of the tensor"),
    "one has it": (lambda x, w: x @ w * getattr(w, "scale", 1.0), has_one, "differ in the attribute scale"),
    "is_leaf": (lambda x, w: x @ w * (2 if w.is_leaf else 3), nothing, "what autograd knows (`is_leaf`)"),
    "grad": (lambda x, w: x @ w * (2 if w.grad is None else 3), nothing, "what autograd knows (`grad`)"),
    "hooks": (lambda x, w: x @ w * (2 if w._backward_hooks is None else 3), nothing, "asks for `_backward_hooks`"),
    "output_nr": (lambda x, w: x @ w * (2 if w.output_nr == 0 else 3), nothing, "asks for `output_nr` of an expert's"),
    "type": (lambda x, w: x @ w * (2 if type(w) is nn.Parameter else 3), nothing, "asks for the class of an expert's"),
    "offset": (lambda x, w: x @ w * (2 if w.storage_offset() == 0 else 3), nothing, "asks for `storage_offset` of an"),
    "view": (lambda x, w: x @ w * (2 if w._is_view() else 3), nothing, "asks for `_is_view` of an expert's"),
    "set": (
        lambda x, w: (setattr(w, "seen", 1), x @ w)[1],
        nothing,
        "the body sets the attribute `seen` of an expert's",
    ),
    "requires_grad_": (lambda x, w: x @ w.requires_grad_(True), nothing, "asks for `requires_grad_` of an expert's"),
    "what may be another": (
        lambda x, w: x @ w * getattr(w.to(x.dtype, copy=True), "scale", 1.0),
        sets(scale=3.0),
        "asks for `scale` of what may be an expert's parameter itself",
    ),
}
"""A body that is left as it is, what is done to each parameter before, and the reason."""


def compiled_and_eager(
    kind: type[OfModules], body: Body, prepare: Callable[[Any, int], None], pack: bool
) -> tuple[OfModules, Any]:
    torch.manual_seed(0)
    model = kind(body)
    for i, weight in enumerate(model.weights()):
        prepare(weight, i)
    return model, torch.compile(model, backend="moe_rewrite", options={"inner": "eager", "pack": pack})


is_of_either_kind = pytest.mark.parametrize("kind", [OfModules, OfParameters])
is_packed_or_not = pytest.mark.parametrize("pack", [True, False], ids=["packed", "stacked"])


@is_packed_or_not
@is_of_either_kind
@pytest.mark.parametrize("name", ALIKE)
def test_what_is_alike_is_read_of_the_parameter(
    name: str, kind: type[OfModules], pack: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, compiled = compiled_and_eager(kind, *ALIKE[name], pack)
    with caplog.at_level(logging.INFO, "moe_rewrite"):
        for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
            with mode:
                assert_close(compiled(*inputs()), model(*inputs()))
    assert not any(message.startswith("left as it is") for message in caplog.messages), caplog.messages


@is_packed_or_not
@is_of_either_kind
@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_is_a_reason(
    name: str, kind: type[OfModules], pack: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body, prepare, reason = LEFT[name]
    model, compiled = compiled_and_eager(kind, body, prepare, pack)
    with torch.no_grad(), caplog.at_level(logging.INFO, "moe_rewrite"):
        assert_close(compiled(*inputs()), model(*inputs()))
    assert any(message.startswith("left as it is") and reason in message for message in caplog.messages)


def test_a_part_of_a_parameter_under_no_grad(caplog: pytest.LogCaptureFixture) -> None:
    """In eager a view says of itself what the parameter says, also where gradients are switched off."""
    bodies: list[Body] = [
        lambda x, w: x @ w * (2 if w.t().requires_grad else 3),
        lambda x, w: x @ w * (2 if w[:].requires_grad else 3),
        lambda x, w: x @ w * (2 if (w * 2).requires_grad else 3),
    ]
    for body in bodies:
        model, compiled = compiled_and_eager(OfModules, body, nothing, True)
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode:
                assert_close(compiled(*inputs()), model(*inputs()))


def test_a_row_of_a_parameter_under_no_grad() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN))
            self.frozen = nn.Parameter(torch.randn(E, HIDDEN, HIDDEN), requires_grad=False)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for i in range(E):
                token, _ = torch.where(ids == i)
                w, frozen = self.w[i], self.frozen[i]
                factor = (2 if w.requires_grad else 3) * (5 if frozen.requires_grad else 7)
                out.index_add_(0, token, x[token] @ w @ frozen * factor)
            return out

    model = Stacked()
    compiled = torch.compile(model, backend="moe_rewrite", options={"inner": "eager"})
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            assert_close(compiled(*inputs()), model(*inputs()))


def on_all(change: Callable[[Any], Any]) -> Callable[[OfModules], None]:
    def changed(model: OfModules) -> None:
        for weight in model.weights():
            change(weight)

    return changed


CHANGES: dict[str, Callable[[OfModules], Any]] = {
    "another value": on_all(lambda w: setattr(w, "scale", 5.0)),
    "back": on_all(lambda w: setattr(w, "scale", 3.0)),
    "deleted": on_all(lambda w: delattr(w, "scale")),
    "set again": on_all(lambda w: setattr(w, "scale", 7.0)),
    "frozen": on_all(lambda w: w.requires_grad_(False)),
    "not frozen": on_all(lambda w: w.requires_grad_(True)),
}

CHANGES_OF_ONE: dict[str, Callable[[OfModules], Any]] = {
    "another value": lambda model: setattr(model.weights()[2], "scale", 9.0),
    "deleted": lambda model: delattr(model.weights()[2], "scale"),
    "frozen": lambda model: model.weights()[2].requires_grad_(False),
}
"""After these the loop is left as it is."""


def body_that_asks(x: Tensor, w: Any) -> Tensor:
    factor = (2 if w.requires_grad else 3) * (5 if hasattr(w, "scale") else 7)
    return x @ w * getattr(w, "scale", 1.0) * factor  # type: ignore[no-any-return]


@is_packed_or_not
@is_of_either_kind
def test_attributes_that_change(kind: type[OfModules], pack: bool) -> None:
    model, compiled = compiled_and_eager(kind, body_that_asks, sets(scale=3.0), pack)
    with torch.no_grad():
        assert_close(compiled(*inputs()), model(*inputs()))
        for name, change in CHANGES.items():
            change(model)
            assert_close(compiled(*inputs()), model(*inputs()), msg=name)


@is_packed_or_not
@is_of_either_kind
@pytest.mark.parametrize("name", CHANGES_OF_ONE)
def test_attributes_of_one_that_change(name: str, kind: type[OfModules], pack: bool) -> None:
    model, compiled = compiled_and_eager(kind, body_that_asks, sets(scale=3.0), pack)
    with torch.no_grad():
        assert_close(compiled(*inputs()), model(*inputs()))
        CHANGES_OF_ONE[name](model)
        assert_close(compiled(*inputs()), model(*inputs()))


@is_of_either_kind
def test_a_list_that_changes(kind: type[OfModules]) -> None:
    model, compiled = compiled_and_eager(
        kind, lambda x, w: x @ w * w.scales[0], lambda w, i: setattr(w, "scales", [3.0]), True
    )
    assert_close(compiled(*inputs()), model(*inputs()))
    for weight in model.weights():
        weight.scales[0] = 5.0
    assert_close(compiled(*inputs()), model(*inputs()))
    model.weights()[1].scales.append(7.0)
    assert_close(compiled(*inputs()), model(*inputs()))


@is_of_either_kind
def test_attributes_that_are_not_read_may_change(kind: type[OfModules]) -> None:
    model, compiled = compiled_and_eager(kind, lambda x, w: x @ w, nothing, True)
    compiled(*inputs())
    model.weights()[1].note = "read by nobody"
    assert_close(compiled(*inputs()), model(*inputs()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@is_packed_or_not
@is_of_either_kind
def test_layers_with_values_of_their_own(kind: type[OfModules], pack: bool) -> None:
    layers = [compiled_and_eager(kind, BODY_WITH_SCALE, sets(scale=float(n)), pack)[0] for n in (2, 3, 2)]
    for layer in layers:
        layer.compile(backend="moe_rewrite", options={"inner": "eager", "pack": pack}, fullgraph=True)
    for _ in range(2):
        for layer in layers:
            assert_close(layer(*inputs()), layer.forward(*inputs()))


def BODY_WITH_SCALE(x: Tensor, w: Any) -> Tensor:
    return x @ w * w.scale  # type: ignore[no-any-return]
