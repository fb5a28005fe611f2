"""Loops of one structure are traced once, and only those."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from loops import HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOKENS, TOP_K
from torch import Tensor, fx, nn

import moe_rewrite
from moe_rewrite import fingerprint, splice
from moe_rewrite.recognise import aten


class Layer(nn.Module):
    def __init__(self, scale: float = 1.0, experts: int = NUM_EXPERTS, inner: int = INTERMEDIATE, act=torch.tanh):
        super().__init__()
        self.router = nn.Parameter(torch.randn(HIDDEN, experts, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(experts, HIDDEN, inner, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(experts, inner, HIDDEN, dtype=torch.float64))
        self.scale, self.act = scale, act
        self.dtype, self.autocast = torch.float64, False

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = (x @ self.router).topk(TOP_K)
        out = torch.zeros_like(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            for expert in nn.functional.one_hot(ids, self.up.shape[0]).sum((0, 1)).nonzero():
                token, slot = torch.where(ids == expert[0])
                rows = self.act(x[token].to(self.dtype) @ self.up[expert[0]].to(self.dtype))
                rows = (rows @ self.down[expert[0]].to(self.dtype)).to(out.dtype)
                out.index_add_(0, token, rows * weights[token, slot, None] * self.scale)
        return x + out


def changed(**values):
    layer = Layer()
    vars(layer).update(values)
    return layer


OTHERS = {
    "same": Layer,
    "scale": lambda: Layer(2.0),
    "scale of another type": lambda: Layer(1),
    "sign of zero": lambda: Layer(-0.0),
    "sizes": lambda: Layer(inner=4),
    "experts": lambda: Layer(experts=3),
    "function": lambda: Layer(act=torch.relu),
    "dtype": lambda: changed(dtype=torch.float32),
    "autocast": lambda: changed(autocast=True, dtype=torch.float32),
    "frozen": lambda: Layer().requires_grad_(False),
}


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """What was traced: bodies of loops, and replacements."""
    seen = []

    def count(name, original, *args):
        seen.append(name)
        return original(*args)

    for module, name in ((aten, "retrace"), (splice, "trace_replacement")):
        monkeypatch.setattr(module, name, functools.partial(count, name, getattr(module, name)))
    return seen


@pytest.mark.parametrize("other", OTHERS)
def test_layers(other, traced):
    """Results and gradients are eager's whatever layers have in common."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), OTHERS[other](), Layer(), OTHERS[other]())
    run = torch.compile(model, backend="moe_rewrite", fullgraph=True, options={"inner": "eager"})
    gradients = []
    for function in (model, run):
        x = torch.linspace(-1, 1, TOKENS * HIDDEN, dtype=torch.float64).reshape(TOKENS, HIDDEN).requires_grad_()
        result = function(x)
        used = [x, *(one for one in model.parameters() if one.requires_grad)]
        gradients.append((result, *torch.autograd.grad(result.square().sum(), used)))
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if other not in ("dtype", "autocast") else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(gradients[1], gradients[0], **tolerance)
    structures = 1 if other in ("same", "frozen") else 2
    assert traced.count("retrace") == traced.count("trace_replacement") == structures


def test_sizes_of_run_time_are_each_loops_own(traced):
    """A mask of any kind has as many pairs as it has; two of them are not one number."""

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for _ in range(2):
                out = torch.zeros_like(x)
                for expert in mask.sum(1).nonzero():
                    (token,) = torch.where(mask[expert[0]])
                    out.index_add_(0, token, x[token] * (expert[0] + 1))
                x = out
            return x

    module = Masked()
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    x = torch.randn(4, HIDDEN, dtype=torch.float64)
    run = torch.compile(module, backend="moe_rewrite", fullgraph=True, options={"inner": "aot_eager"})
    torch.testing.assert_close(run(x, mask), module(x, mask))
    assert traced == ["retrace", "trace_replacement", "trace_replacement"]


NUMBERS = [0, 0.0, -0.0, False, 1, True, 1.0, math.nan, None, "1", (1,), [1], slice(1), range(1), torch.float32]


def test_arguments_of_other_types_differ():
    keys = [fingerprint.of_arguments([value], hash) for value in NUMBERS]
    assert len(set(keys)) == len(NUMBERS)
    assert keys == [fingerprint.of_arguments([value], hash) for value in NUMBERS]


def test_what_cannot_be_compared_has_no_fingerprint():
    for value in (object(), torch.ones(1), {1: object()}, [lambda: 0, object()]):
        with pytest.raises(fingerprint.NoFingerprint):
            fingerprint.of_arguments(value, hash)


def test_tensors_differ_by_all_that_tracing_may_look_at():
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        base = torch.empty(4, 6)
        tensors = [base, base.t(), base[:, :4], base[:, 1:5], base.double(), base.to(torch.complex64).conj()]
        tensors += [base.to("meta"), base.reshape(24), base.new_empty(4, 6, 1)]
    keys = set()
    for tensor in tensors:
        node = fx.Graph().placeholder("x")
        node.meta["example_value"] = tensor
        keys.add(fingerprint.of_inputs([node]))
    assert len(keys) == len(tensors)


def test_own_backends_may_look_at_the_path(traced):
    from moe_rewrite.lower import batched_mm

    seen = []

    def lower(loop, lifted):
        seen.append(loop.path)
        batched_mm.lower(loop, lifted)

    moe_rewrite.register_experts_backend("looks", lower, overwrite=True)
    model = nn.Sequential(Layer(), Layer())
    options = {"inner": "eager", "experts": "looks"}
    torch.compile(model, backend="moe_rewrite", fullgraph=True, options=options)(torch.ones(2, HIDDEN).double())
    assert seen == ["0", "1"]
    assert traced.count("retrace") == 1
