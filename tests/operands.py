"""What the kernels are called with in tests, and what their results are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from moe_rewrite.lower import launch, rows_mm

triton = pytest.importorskip("triton", reason="torch for the CPU comes without triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_interpreter = pytest.mark.skipif(
    not launch.available(torch.device(DEVICE)), reason="the interpreter of triton < 3.7 needs numpy < 2.4"
)
DTYPES = rows_mm.DTYPES
EPS = torch.finfo(torch.float32).eps


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def ids_of(*shape: int, low: int = 0, high: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "along N": lambda e, k, n, **how: drawn(e, k, n, **how),
    "along K": lambda e, k, n, **how: drawn(e, n, k, **how).transpose(1, 2),
    "along neither": lambda e, k, n, **how: drawn(e, 2 * k, 3 * n, **how)[:, ::2, ::3],
    "part of a larger one": lambda e, k, n, **how: drawn(e + 2, k + 3, n + 5, **how)[1:-1, 2:-1, 4:-1],
    "along E": lambda e, k, n, **how: drawn(k, n, e, **how).permute(2, 0, 1),
    "one for all": lambda e, k, n, **how: drawn(1, k, n, **how).expand(e, k, n),
}
"""How a weight ``[E, K, N]`` lies in memory."""


def _pair(whole: Tensor, start: int, step: int, n: int) -> list[Tensor]:
    return [whole[..., :n] if step == 1 else whole[..., ::2], whole[..., start::step]]


TWO: dict[str, Callable[..., list[Tensor]]] = {
    "halves": lambda lay, e, k, n, **how: _pair(lay(e, k, 2 * n, **how), n, 1, n),
    "interleaved": lambda lay, e, k, n, **how: _pair(lay(e, k, 2 * n, **how), 1, 2, n),
    "separate": lambda lay, e, k, n, **how: [lay(e, k, n, seed=5, **how), lay(e, k, n, seed=6, **how)],
    "odd, then even": lambda lay, e, k, n, **how: _pair(lay(e, k, 2 * n, **how), 1, 2, n)[::-1],
    "of two layouts": lambda lay, e, k, n, **how: [
        lay(e, k, n, seed=5, **how),
        drawn(e, n, k, seed=6, **how).transpose(1, 2),
    ],
}
"""Two weights ``[E, K, N]``."""

WAYS = ("sorted here", "sorted already", "one by one")
every_way = pytest.mark.parametrize("way", WAYS)
both_kernels = pytest.mark.parametrize("way", WAYS[::2])


def dispatch(ids: Tensor, groups: int, way: str) -> tuple[Tensor, dict[str, Any]]:
    """The expert of each pair, and how the kernel is told. Of pairs that are sorted already those of none are last."""
    if way == "one by one":
        return ids, {"experts": ids}
    none = torch.where((ids >= 0) & (ids < groups), ids, groups)
    if way == "sorted already":
        ids = ids[none.argsort(stable=True)]
    order = none.argsort(stable=True).int()
    offsets = (none.unsqueeze(0) <= torch.arange(groups, device=ids.device).unsqueeze(1)).sum(1).int()
    return ids, {"offsets": offsets, **({"order": order} if way == "sorted here" else {})}


def each(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """``rows[p] @ weight[ids[p]]`` in float64, zeros for ids of no expert."""
    counts = (ids >= 0) & (ids < weight.shape[0])
    safe = torch.where(counts, ids, 0)
    product = torch.einsum("pk,pkn->pn", torch.where(counts[:, None], rows.double(), 0), weight.double()[safe])
    return torch.where(counts[:, None], product, 0)


def assert_near(actual: Tensor, exact: Tensor, size: Tensor, terms: int) -> None:
    """As near as a sum of ``terms`` in float32 is, rounded once; ``size``: the sum of the terms without their signs."""
    unit = torch.finfo(actual.dtype)
    allowed = unit.eps / 2 * exact.abs() + (terms + 2) * EPS * size + unit.smallest_normal * unit.eps
    off = (actual.double() - exact).abs() > allowed
    assert not off.any(), f"{int(off.sum())} of {off.numel()}: {actual[off][:4]} is not {exact[off][:4]}"
    assert actual.isfinite().all()
