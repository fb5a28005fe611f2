"""The operators that hold a captured loop in a graph.

A loop ``for expert in hits: body`` is captured *rolled*: its body stands in the graph once,
for one symbolic expert, between two markers::

    index = moe_rewrite.loop_begin(hits, 0)
    ...                                    # the body; W[index] is moe_rewrite.select(W, 0, index)
    moe_rewrite.loop_end(index, [0, 8], SOME_ROWS)

A loop over a range, or over modules that are alike, has ``torch.arange(E)`` for its hits. What one iteration leaves to
the next in a local variable goes through a pair of markers, as does what it appends to a list::

    index = moe_rewrite.loop_begin(arange, 0)
    carry = moe_rewrite.carry_in(index, out)
    ...
    out_after = moe_rewrite.carry_out(index, carry, added)     # `out` after the last iteration
    collected = moe_rewrite.collect(index, y, 8)               # `torch.stack` of what the 8 iterations appended
    moe_rewrite.loop_end(index, [0, 8], ANY_ROWS)

Rows that are a contiguous piece of a tensor, ``x[start:stop]`` with numbers that the iteration computes, are the rows
at ``moe_rewrite.piece(index, start, stop, x)``. What ``torch.cat`` makes of a list of such rows is
``moe_rewrite.collect_rows(index, y, total)``.

Where Python in the body asks about the index (``if expert == num_experts: continue``), whether there are rows, or
about a truth that is a tensor, the body is captured once for each way through it, a *path*; ``loop_end`` and
``condition`` say for which iterations the path holds. Every marker raises when it is executed: a captured loop is
rewritten or it is not run.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from moe_rewrite.errors import MarkerExecutedError

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
_LIBRARY.define("loop_begin(Tensor hits, int path) -> Tensor")
_LIBRARY.define("select(Tensor input, int dim, Tensor index) -> Tensor")
_LIBRARY.define("select_shifted(Tensor input, int dim, Tensor index, int offset) -> Tensor")
_LIBRARY.define("number(Tensor index, int num_values) -> SymInt")
_LIBRARY.define("condition(Tensor index, Tensor truth, bool taken) -> ()")
_LIBRARY.define("carry_in(Tensor index, Tensor start) -> Tensor")
_LIBRARY.define("carry_out(Tensor index, Tensor carry, Tensor end) -> Tensor")
_LIBRARY.define("collect(Tensor index, Tensor value, int num_values) -> Tensor")
_LIBRARY.define("piece(Tensor index, Tensor start, Tensor stop, Tensor container) -> Tensor")
_LIBRARY.define("collect_rows(Tensor index, Tensor value, SymInt total) -> Tensor")
_LIBRARY.define("loop_end(Tensor index, int[] experts, int rows) -> ()")

loop_begin = torch.ops.moe_rewrite.loop_begin.default
"""``loop_begin(hits, path) -> index``. Opens a loop over the rows of ``hits``; ``index`` has the shape of one row.

``path`` counts the paths of one loop from 0.
"""

select = torch.ops.moe_rewrite.select.default
"""``select(input, dim, index)``. ``input.select(dim, index)`` for the symbolic index of a loop."""

select_shifted = torch.ops.moe_rewrite.select_shifted.default
"""``select_shifted(input, dim, index, offset)``. ``input.select(dim, index + offset)``, never counted from the end."""

number = torch.ops.moe_rewrite.number.default
"""``number(index, num_values) -> int``. ``index.item()``, a number from 0 to ``num_values - 1``."""

condition = torch.ops.moe_rewrite.condition.default
"""``condition(index, truth, taken)``. The path holds for the iterations in which ``bool(truth)`` is ``taken``."""

carry_in = torch.ops.moe_rewrite.carry_in.default
"""``carry_in(index, start)``. A local variable at the start of an iteration; ``start`` is its value before the loop."""

carry_out = torch.ops.moe_rewrite.carry_out.default
"""``carry_out(index, carry, end)``. Its value after the loop; ``end`` is its value at the end of an iteration."""

collect = torch.ops.moe_rewrite.collect.default
"""``collect(index, value, num_values) -> [num_values, ...]``. The ``value`` of each iteration, one after the other."""

piece = torch.ops.moe_rewrite.piece.default
"""``piece(index, start, stop, container) -> [rows] int64``. ``torch.arange(len(container))[start:stop]``."""

collect_rows = torch.ops.moe_rewrite.collect_rows.default
"""``collect_rows(index, value, total) -> [total, ...]``. The rows of each iteration's ``value``, one after the other.

``total`` is how many there are of all iterations; -1 where only run time knows.
"""

loop_end = torch.ops.moe_rewrite.loop_end.default
"""``loop_end(index, experts, rows)``. Closes the loop that ``index`` opened.

``experts`` holds half-open ranges ``[start, stop, start, stop, ...]``: the index values for which the body
between the markers is what the loop does. ``rows`` says what Python in the body was told when it asked whether the
expert had any rows: :data:`ANY_ROWS` where it did not ask.
"""

ANY_ROWS, SOME_ROWS, NO_ROWS = range(3)
"""Whether the body between the markers is for experts with rows, for those without, or for all."""


TIMES_WRITTEN = "moe_rewrite_times_written"
"""``node.meta`` key of ``carry_in``: how often the start had been written to before the loop."""


def _refuse_to_run(*_: Any) -> NoReturn:
    raise MarkerExecutedError(
        "a Mixture-of-Experts loop captured by moe_rewrite reached execution without having been rewritten. "
        "Its markers hold no computation. Compile the model with backend='moe_rewrite', or pass the graph "
        "through moe_rewrite.rewrite() before you run it."
    )


_NAMES = ("loop_begin", "select", "number", "condition", "carry_in", "carry_out", "collect", "loop_end")
for _name in (*_NAMES, "select_shifted", "piece", "collect_rows"):
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


@torch.library.register_fake("moe_rewrite::select_shifted", lib=_LIBRARY)
def _(input: Tensor, dim: int, index: Tensor, offset: int) -> Tensor:
    return select(input, dim, index)


@torch.library.register_fake("moe_rewrite::number", lib=_LIBRARY)
def _(index: Tensor, num_values: int) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size(min=0, max=num_values - 1)


@torch.library.register_fake("moe_rewrite::loop_end", lib=_LIBRARY)
def _(index: Tensor, experts: list[int], rows: int) -> None:
    return None


@torch.library.register_fake("moe_rewrite::condition", lib=_LIBRARY)
def _(index: Tensor, truth: Tensor, taken: bool) -> None:
    return None


@torch.library.register_fake("moe_rewrite::carry_in", lib=_LIBRARY)
def _(index: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(start)


@torch.library.register_fake("moe_rewrite::carry_out", lib=_LIBRARY)
def _(index: Tensor, carry: Tensor, end: Tensor) -> Tensor:
    return torch.empty_like(end)


@torch.library.register_fake("moe_rewrite::collect", lib=_LIBRARY)
def _(index: Tensor, value: Tensor, num_values: int) -> Tensor:
    one = torch.empty_like(value)  # each item of the list is strided as the value, without gaps
    return one.new_empty_strided((num_values, *one.shape), (one.numel(), *one.stride()))


@torch.library.register_fake("moe_rewrite::piece", lib=_LIBRARY)
def _(index: Tensor, start: Tensor, stop: Tensor, container: Tensor) -> Tensor:
    return index.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.register_fake("moe_rewrite::collect_rows", lib=_LIBRARY)
def _(index: Tensor, value: Tensor, total: int) -> Tensor:
    unknown = isinstance(total, int) and total < 0
    rows = torch.library.get_ctx().new_dynamic_size() if unknown else total
    return value.new_empty(rows, *value.shape[1:])


def _no_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    _refuse_to_run()


for _name in ("select", "carry_in", "carry_out", "collect", "collect_rows"):
    torch.library.register_autograd(f"moe_rewrite::{_name}", _no_backward, lib=_LIBRARY)

# Without this, dead code elimination would drop those that have no result.
for _marker in (loop_begin, condition, loop_end):
    torch.fx.node.has_side_effect(_marker)
