"""How results are strided: a view may be taken of them, and written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from graphs import Graphs
from torch import Tensor, nn

import moe_rewrite

TOKENS, HIDDEN, NUM_EXPERTS, TOP_K = 10, 8, 4, 2


class Moe(nn.Module):
    """``add(out, token, rows)`` gives the next ``out``; ``after(out)`` is what is done with the last one."""

    def __init__(self, add: Callable[..., Tensor], after: Callable[[Tensor], Tensor], hits: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)))
        self.add, self.after, self.hits = add, after, hits

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        every = (nn.functional.one_hot(ids, NUM_EXPERTS).sum((0, 1)) > 0).nonzero() if self.hits else range(NUM_EXPERTS)
        for expert in every:
            token, slot = torch.where(ids == expert)
            out = self.add(out, token, (x[token] @ self.weight[expert].squeeze(0)) * weights[token, slot, None])
        return self.after(out)


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that are transposed in memory, as is then ``torch.zeros_like`` of them."""
    generator = torch.Generator().manual_seed(1)
    weights, ids = torch.rand(TOKENS, NUM_EXPERTS, generator=generator).topk(TOP_K)
    return torch.randn(HIDDEN, TOKENS, generator=generator).t(), ids, weights


def _written_through_a_view(out: Tensor) -> Tensor:
    out.reshape(-1).mul_(2)  # a view of what is contiguous, a copy of what is not
    return out


ADDS: dict[str, Callable[..., Tensor]] = {
    "index_add": lambda out, token, rows: out.index_add(0, token, rows),
    "scatter_add": lambda out, token, rows: out.scatter_add(0, token[:, None].expand(-1, HIDDEN), rows),
    "index_put": lambda out, token, rows: out.index_put((token,), rows, accumulate=True),
    "in place": lambda out, token, rows: out.index_add_(0, token, rows),
}
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda out: out,
    "a view": lambda out: out.view(-1),
    "written through a view": _written_through_a_view,
    "as_strided": lambda out: out.as_strided((4, 4), (HIDDEN, 1)).clone(),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("add", ADDS)
def test_as_in_eager(add: str, after: str, inner: str) -> None:
    module, args = Moe(ADDS[add], AFTER[after]), arguments()
    run = torch.compile(module, backend="moe_rewrite", options={"inner": inner})
    torch._dynamo.reset()
    with torch.no_grad():
        try:
            expected = module(*args)
        except RuntimeError:  # a view of what is not contiguous
            with pytest.raises(Exception, match="view"):
                run(*args)
            return
        actual = run(*args)
    torch.testing.assert_close(actual, expected)
    assert actual.stride() == expected.stride()
    assert [report.refusal for report in moe_rewrite.explain(run, *args).loops] == [None]


def test_start_that_is_strided_in_another_way() -> None:
    """Where nothing is hit, eager gives the start: its strides are known at run time only."""
    module, (x, ids, weights) = Moe(ADDS["index_add"], AFTER["as it is"], hits=True), arguments()
    run = torch.compile(module, backend="moe_rewrite", options={"inner": "eager"})
    (report,) = moe_rewrite.explain(run, x, ids, weights).loops
    assert report.refusal is not None and "strided in another way" in str(report.refusal)
    for given in (ids, ids[:0]):
        args = x[: len(given)], given, weights[: len(given)]
        torch.testing.assert_close(run(*args), module(*args))
        assert run(*args).stride() == module(*args).stride()


INDICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "columns": lambda ids, slot: ids[:, slot],
    "rows of what is transposed": lambda ids, slot: ids.t()[slot],
    "columns of two dimensions": lambda ids, slot: ids.view(2, -1, TOP_K).permute(2, 1, 0)[slot].t().reshape(-1),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("index", INDICES)
def test_looked_up_by_columns(index: str, inner: str) -> None:
    """A loop over slots. What ``table[ids.t()]`` gives is strided like ``ids.t()``; fake tensors say something else."""
    graphs = Graphs(inner)
    table = torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN)

    def loop(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for slot in range(TOP_K):
            matrices = table[INDICES[index](ids, slot)]
            out = out + weights[:, slot, None] * torch.einsum("th,tho->to", x, matrices)
        return out

    args = arguments()
    torch._dynamo.reset()
    run = torch.compile(loop, backend="moe_rewrite", fullgraph=True, options={"inner": graphs})
    torch.testing.assert_close(run(*args), loop(*args))
    assert graphs.rewritten()


class Listed(nn.Module):
    """``item(weight, x)`` of each expert goes into a list."""

    def __init__(self, item: Callable[..., Tensor], after: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)))
        self.item, self.after = item, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after([self.item(self.weight[expert], x) for expert in range(NUM_EXPERTS)])


def _one_written_through_a_view(items: list[Tensor]) -> Tensor:
    items[0].t().reshape(-1).mul_(2)
    return items[0]


ITEMS: dict[str, Callable[..., Tensor]] = {
    "rows": lambda weight, x: x @ weight,
    "columns": lambda weight, x: (weight @ x.t()).t(),
    "part": lambda weight, x: (x @ weight)[:, :4],
    "expanded": lambda weight, x: (x @ weight)[:, :1].expand(-1, 4),
}
AFTER_LIST: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum": lambda items: torch.stack(items).sum(0),
    "one": lambda items: items[1],
    "view": lambda items: items[1].t().view(-1),
    "written through a view": _one_written_through_a_view,
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("after", AFTER_LIST)
@pytest.mark.parametrize("item", ITEMS)
def test_list_as_in_eager(item: str, after: str, inner: str) -> None:
    module, x = Listed(ITEMS[item], AFTER_LIST[after]), torch.randn(TOKENS, HIDDEN)
    run = torch.compile(module, backend="moe_rewrite", options={"inner": inner})
    torch._dynamo.reset()
    with torch.no_grad():
        try:
            expected = module(x)
        except RuntimeError:  # a view of what is not contiguous
            return
        actual = run(x)
    torch.testing.assert_close(actual, expected)
    if item in ("rows", "columns"):
        assert actual.stride() == expected.stride()
