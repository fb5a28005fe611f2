"""Where eager raises an error for the numbers that it is given, a rewritten loop raises one on a CPU, or is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from compare import run
from loops import HIDDEN, NUM_EXPERTS, TOKENS, TOP_K, Args, Loop, Moe, hits, inputs
from torch import Tensor

import moe_rewrite

INNER = ["eager", "aot_eager", "inductor"]


def given(ids: Tensor) -> Args:
    x, _, weights = inputs()
    return x, ids, weights


def _reports(loop: Loop, args: Args, inner: str = "eager") -> list[Any]:
    fast = torch.compile(Moe(loop), backend="moe_rewrite", options={"inner": inner})
    with torch.no_grad():
        return moe_rewrite.explain(fast, *args).loops


def _one_hot(m, x, ids, weights):
    out, mask = torch.zeros_like(x), F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)
    for expert in range(NUM_EXPERTS):
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


def _one_hot_hits(m, x, ids, weights):
    out, mask = torch.zeros_like(x), F.one_hot(ids, num_classes=NUM_EXPERTS).permute(2, 1, 0)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        out.index_add_(0, token, x[token] @ m.weight[expert[0]])
    return out


def _no_weights(m, x, ids, weights):
    """One expert more is hit than there are weights for."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, NUM_EXPERTS + 1).permute(2, 1, 0)
    for expert in hits(mask):
        slot, token = torch.where(mask[expert[0]])
        out.index_add_(0, token, x[token] @ m.weight[expert[0]])
    return out


def _no_weights_for_numbers(m, x, ids, weights):
    out, mask = torch.zeros_like(x), (ids.unsqueeze(-1) == torch.arange(NUM_EXPERTS + 3)).permute(2, 1, 0)
    for expert in hits(mask).flatten().tolist():
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


def _no_weights_by_a_mask(m, x, ids, weights):
    out, mask = torch.zeros_like(x), F.pad(ids, (0, 5)).T == NUM_EXPERTS
    for expert in mask.any(1).nonzero().flatten():
        (token,) = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert + NUM_EXPERTS - 1])
    return out


def _far_positions(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out.index_put_((token - TOKENS - 1,), x[token] @ m.weight[expert], accumulate=True)
    return out


def _negative_positions(m, x, ids, weights):
    """`index_put_` counts negative positions from the end, `index_add_` does not."""
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out.index_add_(0, token - TOKENS, x[token] @ m.weight[expert])
    return out


def _few_rows(m, x, ids, weights):
    out = torch.zeros_like(x[:3])
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


ones = torch.ones(TOKENS, TOP_K, dtype=torch.int64)
RAISES: dict[str, tuple[Loop, Args, Args]] = {  # name: (loop, what raises, what does not)
    "ids past the classes": (_one_hot, given(ones * NUM_EXPERTS), given(ones)),
    "negative ids": (_one_hot, given(-ones), given(ones)),
    "ids past the classes, hits": (_one_hot_hits, given(ones * NUM_EXPERTS), given(ones)),
    "hit without weights": (_no_weights, given(ones * NUM_EXPERTS), given(ones)),
    "number without weights": (_no_weights_for_numbers, given(ones * NUM_EXPERTS + 1), given(ones + 5)),
    "far positions": (_far_positions, given(ones), given(ones - 2)),
    "negative positions": (_negative_positions, given(ones), given(ones - 2)),
    "few rows": (_few_rows, given(ones), given(ones.tril(-4).flip(0) - 1)),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("experts_backend", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", RAISES)
def test_raises_as_eager(name: str, experts_backend: str, inner: str) -> None:
    loop, bad, good = RAISES[name]
    module = Moe(loop)
    fast = torch.compile(module, backend="moe_rewrite", options={"inner": inner, "experts": experts_backend})
    with torch.no_grad():
        for args in (good, bad) if name != "number without weights" else (bad,):
            try:
                expected = module(*args)
            except (RuntimeError, IndexError):
                assert args is bad
                with pytest.raises((RuntimeError, IndexError)):
                    fast(*args)
            else:
                assert args is good
                torch.testing.assert_close(fast(*args), expected)
        reports = _reports(loop, good)
    assert reports and all(report.refusal is None for report in reports)


def _narrow_mask(m, x, ids, weights):
    out, mask = torch.zeros_like(x), (ids.unsqueeze(-1) == torch.arange(NUM_EXPERTS - 1)).permute(2, 1, 0)
    for expert in range(NUM_EXPERTS):
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


def _few_weights(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS + 1):
        token, slot = torch.where(ids == expert)
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


@pytest.mark.parametrize("loop", [_narrow_mask, _few_weights], ids=lambda loop: loop.__name__)
def test_loops_that_always_raise(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moe_rewrite")
    for run_loop in (Moe(loop), torch.compile(Moe(loop), backend="moe_rewrite", options={"inner": "eager"})):
        with pytest.raises(IndexError):
            run_loop(*inputs())
    assert "the loop goes on after the last of" in caplog.text


def _wider_rows(m, x, ids, weights):
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out.index_add_(0, token, x[token] @ m.weight[expert])
    return out


def _narrower_rows(m, x, ids, weights):
    out = x.new_zeros(TOKENS, TOP_K, HIDDEN)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out[token, slot] = (x[token] @ m.weight[expert]).float()
    return out


def _wider_sums(m, x, ids, weights):
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out[token] = out[token] + x[token] @ m.weight[expert]
    return out


@pytest.mark.parametrize("loop", [_wider_rows, _narrower_rows, _wider_sums], ids=lambda loop: loop.__name__)
def test_operators_that_cast_nothing(loop: Loop) -> None:
    for run_loop in (Moe(loop), torch.compile(Moe(loop), backend="moe_rewrite", options={"inner": "eager"})):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            run_loop(*inputs())


# --- a single row ----------------------------------------------------------------------------------------------------


def _squeezed(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token = (ids[:, 0] == expert).nonzero().squeeze()
        out.index_add_(0, token, (x[token] @ m.weight[expert]).softmax(1))
    return out


def _squeezed_and_set(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token = torch.squeeze(torch.nonzero(ids[:, 0] == expert))
        out[token] = x[token].cumsum(-1)
    return out


def _squeezed_by_both(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token = (ids[:, 0] == expert).nonzero().squeeze((0, 1))
        out[token] += x[token] @ m.weight[expert]
    return out


def _squeezed_behind(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out[token] += x[None, token].squeeze() @ m.weight[expert]
    return out


SQUEEZED: list[Callable[..., Tensor]] = [_squeezed, _squeezed_and_set, _squeezed_by_both, _squeezed_behind]


@pytest.mark.parametrize("loop", SQUEEZED, ids=lambda loop: loop.__name__)
def test_squeezed_positions(loop: Loop) -> None:
    """One position is a number then, and its row no row: some operators raise, some act along another dimension."""
    (report,) = [report for report in _reports(loop, inputs()) if report.refusal is not None][:1]
    assert "squeeze(-1)" in str(report.refusal)
    one_row = given(torch.tensor([0, 1, 1, 2, 2, 2]).unsqueeze(1).expand(-1, TOP_K).contiguous())
    module = Moe(loop)
    fast = torch.compile(module, backend="moe_rewrite", options={"inner": "eager"})
    with torch.no_grad():
        try:
            expected = module(*one_row)
        except (RuntimeError, IndexError):
            with pytest.raises((RuntimeError, IndexError)):
                fast(*one_row)
        else:
            torch.testing.assert_close(fast(*one_row), expected)


# --- positions and ranges --------------------------------------------------------------------------------------------


def _from_the_end(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out.index_put_((token - TOKENS,), x[token] @ m.weight[expert], accumulate=True)
    return out


def _some_from_the_end(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out.index_put_((token - 3,), x[token] @ m.weight[expert], accumulate=True)
    return out


def _two_from_the_end(m, x, ids, weights):
    out = x.new_zeros(TOKENS, TOP_K, HIDDEN)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out = out.index_put((token // 2 - 3, slot - TOP_K), x[token] @ m.weight[expert], accumulate=True)
    return out


def _read_from_the_end(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out.index_add_(0, token, x[token - TOKENS] @ m.weight[expert] * weights[token - TOKENS, slot - TOP_K, None])
    return out


def _repeated(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, slot = torch.where(ids == expert)
        out.index_put_((token * 0 - 1,), x[token] @ m.weight[expert], accumulate=True)
    return out


POSITIONS: list[Loop] = [_from_the_end, _some_from_the_end, _two_from_the_end, _read_from_the_end, _repeated]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("loop", POSITIONS, ids=lambda loop: loop.__name__)
def test_positions_from_the_end(loop: Loop, inner: str) -> None:
    assert len(run(loop, inputs(), "grouped_mm", inner=inner)) == 1


def _in_dtype(dtype: torch.dtype, experts: int) -> Loop:
    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = (ids.unsqueeze(-1) == torch.arange(experts, dtype=dtype)).permute(2, 1, 0)
        for expert in range(experts):
            slot, token = torch.where(mask[expert])
            out.index_add_(0, token, x[token] * m.weight[expert, 0])
        return out

    return loop


RANGES = [  # dtype, experts, whether it is known to count up; torch makes no range that an int8 cannot hold
    *((torch.uint8, 256, True), (torch.uint8, 257, False), (torch.int16, 257, True), (torch.int8, 100, True)),
    *((torch.float32, 257, False), (torch.bfloat16, 257, False)),
]


@pytest.mark.parametrize("dtype, experts, counts_up", RANGES)
def test_ranges_of_small_dtypes(dtype: torch.dtype, experts: int, counts_up: bool) -> None:
    """A range that starts again, or skips numbers, is not that of the experts: an id equals two of its entries."""
    loop, (x, _, weights) = _in_dtype(dtype, experts), inputs()
    module = Moe(loop, num_experts=experts)
    args = x, torch.tensor([[0, 1], [255, 99], [experts - 1, 2], [experts, 127], [300, 256], [-1, 128]]), weights
    fast = torch.compile(module, backend="moe_rewrite", options={"inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), module(*args))
        (report,) = moe_rewrite.explain(fast, *args).loops
    assert report.refusal is None and str(report.loop.dispatch).startswith("top-k" if counts_up else "any mask")
