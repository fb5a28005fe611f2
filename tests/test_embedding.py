"""Tables that are looked up in the body, whose gradients may be other than those of an index."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moe_rewrite

TOKENS, HIDDEN, NUM_EXPERTS, VOCABULARY = 6, 8, 4, 5


class Selecting(nn.Module):
    """Each expert adds an embedding to its rows, of one table or of its own."""

    def __init__(self, of_each: bool, **how: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN))
        self.tables = nn.ModuleList(nn.Embedding(VOCABULARY, HIDDEN, **how) for _ in range(NUM_EXPERTS))
        self.of_each = of_each

    def forward(self, words: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            token, _ = torch.where(ids == expert)
            table = self.tables[expert] if self.of_each else self.tables[0]
            out.index_add_(0, token, (x[token] + table(words[token])) @ self.weight[expert])
        return out


class Dense(nn.Module):
    """Each expert gets every token, and a column of its words."""

    def __init__(self, **how: object) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VOCABULARY, HIDDEN, **how) for _ in range(NUM_EXPERTS))

    def forward(self, words: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        words, out = words[:, None].expand(TOKENS, NUM_EXPERTS), torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            out = out + self.tables[expert](words[:, expert])
        return out


FORMS = {
    "one table": lambda **how: Selecting(False, **how),
    "a table each": lambda **how: Selecting(True, **how),
    "dense": lambda **how: Dense(**how),
}
KINDS = {
    "plain": {},
    "padding": {"padding_idx": 0},
    "padding from the end": {"padding_idx": -1},
    "scaled": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
}


def given() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(TOKENS, NUM_EXPERTS, generator=generator).topk(2).indices
    return torch.tensor([0, 0, 1, 2, 3, 4]), torch.randn(TOKENS, HIDDEN, generator=generator), ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, kind):
    torch.manual_seed(0)
    module = FORMS[form](**KINDS[kind])
    kept = kind == "plain" or (form == "one table" and kind.startswith("padding"))
    reports = moe_rewrite.explain(module, *given()).loops
    if kept:
        assert [report.refusal for report in reports] == [None]
    else:  # a dense loop is unrolled, of which `explain` says nothing
        assert ["gradient of its own" in report.refusal.reason for report in reports] == [True] * (form != "dense")
    with torch.no_grad():
        (report,) = moe_rewrite.explain(module, *given()).loops
        assert report.refusal is None
    gradients = []
    for run in (lambda m: m, lambda m: torch.compile(m, backend="moe_rewrite", options={"inner": "eager"})):
        own = copy.deepcopy(module)
        run(own)(*given()).sum().backward()
        gradients.append([parameter.grad for parameter in own.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        if expected is None:  # of tables that are not looked up
            assert actual is None or not actual.any()
        else:
            assert actual.layout is expected.layout
            torch.testing.assert_close(actual.to_dense(), expected.to_dense())
