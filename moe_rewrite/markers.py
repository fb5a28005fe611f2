"""The operators that hold a captured loop in a graph.

A loop ``for expert in hits: body`` is captured *rolled*: its body stands in the graph once,
for one symbolic expert, between two markers::

    index = moe_rewrite.loop_begin(hits, 0)
    ...                                    # the body; W[index] is moe_rewrite.select(W, 0, index)
    moe_rewrite.loop_end(index, [0, 8], True)

Where Python in the body asks about the index (``if expert == num_experts: continue``) the body is
captured once for each set of index values that takes the same way through it, a *path*; ``loop_end`` names
that set. Every marker raises when it is executed: a captured loop is rewritten or it is not run.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from moe_rewrite.errors import MarkerExecutedError

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
_LIBRARY.define("loop_begin(Tensor hits, int path) -> Tensor")
_LIBRARY.define("select(Tensor input, int dim, Tensor index) -> Tensor")
_LIBRARY.define("number(Tensor index, int num_values) -> SymInt")
_LIBRARY.define("loop_end(Tensor index, int[] experts, bool assumes_rows) -> ()")

loop_begin = torch.ops.moe_rewrite.loop_begin.default
"""``loop_begin(hits, path) -> index``. Opens a loop over the rows of ``hits``; ``index`` has the shape of one row.

``path`` counts the paths of one loop from 0.
"""

select = torch.ops.moe_rewrite.select.default
"""``select(input, dim, index)``. ``input.select(dim, index)`` for the symbolic index of a loop."""

number = torch.ops.moe_rewrite.number.default
"""``number(index, num_values) -> int``. ``index.item()``, a number from 0 to ``num_values - 1``."""

loop_end = torch.ops.moe_rewrite.loop_end.default
"""``loop_end(index, experts, assumes_rows)``. Closes the loop that ``index`` opened.

``experts`` holds half-open ranges ``[start, stop, start, stop, ...]``: the index values for which the body
between the markers is what the loop does. ``assumes_rows`` says that Python in the body asked whether the
expert had any rows, and was told that it had.
"""


def _refuse_to_run(*_: Any) -> NoReturn:
    raise MarkerExecutedError(
        "a Mixture-of-Experts loop captured by moe_rewrite reached execution without having been rewritten. "
        "Its markers hold no computation. Compile the model with backend='moe_rewrite', or pass the graph "
        "through moe_rewrite.rewrite() before you run it."
    )


for _name in ("loop_begin", "select", "number", "loop_end"):
    _LIBRARY.impl(_name, _refuse_to_run, "CompositeExplicitAutograd")


@torch.library.register_fake("moe_rewrite::loop_begin", lib=_LIBRARY)
def _(hits: Tensor, path: int) -> Tensor:
    return hits.new_empty(hits.shape[1:])


@torch.library.register_fake("moe_rewrite::select", lib=_LIBRARY)
def _(input: Tensor, dim: int, index: Tensor) -> Tensor:
    # The strides of a select, so that what the body does next (a view, say) is judged on the real layout.
    dim = dim % input.dim()
    shape, stride = list(input.shape), list(input.stride())
    del shape[dim], stride[dim]
    return input.new_empty_strided(shape, stride)


@torch.library.register_fake("moe_rewrite::number", lib=_LIBRARY)
def _(index: Tensor, num_values: int) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size(min=0, max=num_values - 1)


@torch.library.register_fake("moe_rewrite::loop_end", lib=_LIBRARY)
def _(index: Tensor, experts: list[int], assumes_rows: bool) -> None:
    return None


def _no_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    _refuse_to_run()


torch.library.register_autograd("moe_rewrite::select", _no_backward, lib=_LIBRARY)

# `loop_end` has no result: without this, dead code elimination would drop it.
torch.fx.node.has_side_effect(loop_end)
torch.fx.node.has_side_effect(loop_begin)
