"""Columns put together, so that what computes them writes them where they belong.

Inductor (2.11, 2.13) makes one elementwise kernel of a ``cat`` on a GPU, which computes all parts for each entry and
keeps one: for the gradient of ``silu(gate) * up`` that takes half as long again as its memory does. Where parts are
written into one piece of memory it fuses their kernels, and computes what they share once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
_LIBRARY.define("joined(Tensor[] parts, bool in_turn) -> Tensor")


def joined(parts: list[Tensor], in_turn: bool) -> Tensor:
    """Columns one part after the other, or one of each part in turn.

    Args:
        parts: ``[P, n]`` each, of one dtype; in turn all of one size.
        in_turn: whether the first columns of all parts come first.

    Returns:
        ``[P, sum of n]``, contiguous.
    """
    _teach_inductor()
    result: Tensor = torch.ops.moe_rewrite.joined(parts, in_turn)
    return result


@functools.cache
def _teach_inductor() -> None:
    """Tell inductor how it computes the operator. Without that it would call it, as other compilers do."""
    # Seen to work in 2.11 and 2.13.
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings, register_lowering

    @register_lowering(torch.ops.moe_rewrite.joined.default, type_promotion_kind=None)  # type: ignore[untyped-decorator]
    def lowered(parts: list[Any], in_turn: bool) -> Any:
        aten = torch.ops.aten
        if not in_turn:
            return ir.TensorBox(ir.ConcatKernel.create(parts, 1))
        rows, columns = parts[0].get_size()
        side_by_side = [lowerings[aten.unsqueeze.default](part, 2) for part in parts]
        together = ir.TensorBox(ir.ConcatKernel.create(side_by_side, 2))
        return lowerings[aten.view.default](together, [rows, columns * len(parts)])


@torch.library.impl(_LIBRARY, "joined", "CompositeExplicitAutograd")
def _joined(parts: list[Tensor], in_turn: bool) -> Tensor:
    return torch.stack(parts, 2).flatten(1) if in_turn else torch.cat(parts, 1)


torch.library.register_fake("moe_rewrite::joined", _joined, lib=_LIBRARY)
