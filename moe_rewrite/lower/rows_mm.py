"""Products of rows with the weights of their experts, by Triton kernels (``lower/kernels``).

They take any strides and sizes, bf16, fp16 and fp32, read nothing back from the device and write every row.

Each operator is there twice. Where all sizes are known it is one of ``torch.library.triton_op``: compilers see the
kernels, launch them like their own and plan memory for them. Where sizes are symbols, choosing tiles would tie the
graph to ranges of sizes: there it is an operator that they do not see into, which chooses when it is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_rewrite.lower import launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels multiply. They add in float32."""

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
# Pair `p` has row `p // after % own`; where `own` is 0 it has row `p`.
_LIBRARY.define(
    "rows_mm(Tensor rows, Tensor[] weights, Tensor[] vectors, Tensor? order, Tensor? offsets, Tensor? experts, "
    "SymInt pairs, SymInt own, SymInt after, bool interleaved, str epilogue, ScalarType dtype, "
    "bool max_autotune, Tensor? behind) -> Tensor"
)
_LIBRARY.define(
    "rows_outer(Tensor rows, Tensor grad, Tensor? order, Tensor offsets, SymInt own, SymInt after, "
    "bool along_inner, bool max_autotune) -> Tensor"
)
_LIBRARY.define("sort_by_expert(Tensor experts, SymInt groups) -> (Tensor, Tensor, Tensor)")


def sort_by_expert(experts: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable sort of pairs by expert, in one launch for few pairs and two for many.

    Args:
        experts: the expert of each pair, ``[P]``, any integer dtype. Those outside ``[0, groups)`` are of no expert.
        groups: the number of experts.

    Returns:
        The number of each pair in sorted order, ``[P]`` int32, those of no expert last; where each pair stands in that
        order, likewise; and where each expert's pairs end, ``[groups]`` int32.
    """
    sort = _sort_seen if _is_seen(experts, groups) else torch.ops.moe_rewrite.sort_by_expert
    order, inverse, offsets = sort(experts, groups)
    return order, inverse, offsets


def rows_mm(
    rows: Tensor,
    weights: list[Tensor],
    vectors: list[Tensor],
    *,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
    experts: Tensor | None = None,
    gather: tuple[int, int, int] | None = None,
    interleaved: bool = False,
    epilogue: str = "",
    dtype: torch.dtype | None = None,
    max_autotune: bool = False,
    behind: Tensor | None = None,
) -> Tensor:
    """For each pair ``epilogue(row @ weight of its expert, ...)``; zeros for a pair of no expert.

    The gradient is there for one weight without epilogue or with the one that adds a vector.

    Args:
        rows: ``[R, K]``.
        weights: one or two, ``[E, K, N]`` in the dtype of ``rows``.
        vectors: up to two that the epilogue uses, ``[E, N]``.
        order: the pairs sorted by expert, ``[P]`` int32; None where they are sorted.
        offsets: where the pairs of each expert end in that order, ``[E]`` int32.
        experts: the expert of each pair, ``[P]``: in the place of the two for few pairs.
        gather: ``(pairs, own, after)``: pair ``p`` has row ``p // after % own``; None where each has its own.
        interleaved: there is one weight, ``[E, K, 2 N]``, that is two: its even columns, and its odd ones.
        epilogue: a program as in ``lower/kernels``, over the products, then the vectors.
        dtype: of the result; that of the rows if None.
        max_autotune: whether the first call is to try several tiles. Only where compilers see the kernels.
        behind: what is to be computed before, for no more reason than memory: it is not read. Inductor (2.11) takes
            what kernels write for memory that is free again, and puts gradients of weights off to the end of a
            backward, until when all that they are made of is kept.

    Returns:
        ``[P, N]``, in the order of the pairs.
    """
    pairs, own, after = gather or (rows.shape[0], 0, 1)
    is_seen = _is_seen(rows, *weights, *vectors, order, offsets, experts, behind, pairs, own, after)
    multiply = _rows_mm_seen if is_seen else torch.ops.moe_rewrite.rows_mm
    how = interleaved, epilogue, dtype or rows.dtype, max_autotune, behind
    result: Tensor = multiply(rows, weights, vectors, order, offsets, experts, pairs, own, after, *how)
    return result


def rows_outer(
    rows: Tensor,
    grad: Tensor,
    offsets: Tensor,
    order: Tensor | None = None,
    own: int | None = None,
    after: int = 1,
    along_inner: bool = False,
    max_autotune: bool = False,
) -> Tensor:
    """For each expert the sum of ``row x gradient`` over its pairs, ``[E, K, N]``: the gradient of its weight.

    Args:
        rows: ``[R, K]``; pair ``p`` has row ``p // after % own``.
        grad: ``[P, N]``, in the dtype of ``rows``.
        offsets: where the pairs of each expert end, ``[E]`` int32. What is past the last of them counts for nothing.
        order: the pairs sorted by expert, ``[P]`` int32; None where they are sorted.
        own: the number of rows; None where each pair has its own.
        after: how many pairs in a row have the same row.
        along_inner: whether the result is to be contiguous along K, as a transposed ``[E, N, K]`` is.
        max_autotune: see :func:`rows_mm`.
    """
    is_seen = _is_seen(rows, grad, order, offsets, own, after)
    multiply = _rows_outer_seen if is_seen else torch.ops.moe_rewrite.rows_outer
    result: Tensor = multiply(rows, grad, order, offsets, own or 0, after, along_inner, max_autotune)
    return result


def lend_rows(rows: Tensor, offsets: Tensor) -> Tensor | None:
    """``rows`` with the first row in the place of those past the last offset; zeros where that is past it, too.

    The gradient is handed on as it is. So this is for what a grouped product gave, which looks at none past the last
    offset: a ``where`` would read and write all rows to change few, forward and backward.

    Args:
        rows: ``[P, N]``, contiguous and not used by anything else: they are changed in place.
        offsets: where the rows of each expert end, ``[E]`` int32.

    Returns:
        ``[P, N]``; None where compilers do not see the kernels.
    """
    if not _is_seen(rows, offsets) or not rows.is_contiguous() or rows.numel() == 0:
        return None
    result: Tensor = _lend_rows_seen(rows, offsets)
    return result


ADD_VECTOR = "add v0 v1"
"""The epilogue that adds the bias."""


def _is_seen(*given: Tensor | int | None) -> bool:
    """Whether compilers are to see the kernels: on a GPU, where no size or stride is a symbol."""
    if not launch.HAS_TRITON or launch.interpreted():
        return False
    sizes: list[Any] = []
    for one in given:
        if isinstance(one, Tensor):
            if one.device.type != "cuda":
                return False
            sizes += [*one.shape, *one.stride(), one.storage_offset()]
        elif one is not None:
            sizes.append(one)
    return all(isinstance(size, int) for size in sizes)


@torch.library.impl(_LIBRARY, "sort_by_expert", "CompositeExplicitAutograd")
def _sort_by_expert(experts: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch.sort(experts, groups, seen=False)


@torch.library.impl(_LIBRARY, "rows_mm", "CompositeExplicitAutograd")
def _rows_mm(*args: Any) -> Tensor:
    return launch.multiply(*args, seen=False)


@torch.library.impl(_LIBRARY, "rows_outer", "CompositeExplicitAutograd")
def _rows_outer(*args: Any) -> Tensor:
    return launch.outer(*args, seen=False)


def _triton_op(name: str) -> Any:
    """``torch.library.triton_op``; without Triton, where it would warn, the function as it is."""
    if not launch.HAS_TRITON:
        return lambda function: function
    return torch.library.triton_op(f"moe_rewrite::{name}", mutates_args=())


@_triton_op("sort_by_expert_seen")
def _sort_seen(experts: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch.sort(experts, groups, seen=True)


@_triton_op("rows_mm_seen")
def _rows_mm_seen(
    rows: Tensor,
    weights: list[Tensor],
    vectors: list[Tensor],
    order: Tensor | None,
    offsets: Tensor | None,
    experts: Tensor | None,
    pairs: int,
    own: int,
    after: int,
    interleaved: bool,
    epilogue: str,
    dtype: torch.dtype,
    max_autotune: bool,
    behind: Tensor | None,
) -> Tensor:
    how = interleaved, epilogue, dtype, max_autotune, behind
    return launch.multiply(rows, weights, vectors, order, offsets, experts, pairs, own, after, *how, seen=True)


@_triton_op("rows_outer_seen")
def _rows_outer_seen(
    rows: Tensor,
    grad: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    own: int,
    after: int,
    along_inner: bool,
    max_autotune: bool,
) -> Tensor:
    return launch.outer(rows, grad, order, offsets, own, after, along_inner, max_autotune, seen=True)


@_triton_op("lend_rows_seen")
def _lend_rows_seen(rows: Tensor, offsets: Tensor) -> Tensor:
    return launch.lend(rows, offsets)


@torch.library.register_fake("moe_rewrite::sort_by_expert", lib=_LIBRARY)
def _(experts: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    order, inverse = (experts.new_empty(experts.shape, dtype=torch.int32) for _ in range(2))
    return order, inverse, experts.new_empty(groups, dtype=torch.int32)


@torch.library.register_fake("moe_rewrite::rows_mm", lib=_LIBRARY)
def _(rows: Tensor, weights: list[Tensor], *rest: Any) -> Tensor:
    *_, pairs, _own, _after, interleaved, _epilogue, dtype, _max_autotune, _behind = rest
    columns = weights[0].shape[2]
    return rows.new_empty(pairs, columns // 2 if interleaved else columns, dtype=dtype)


@torch.library.register_fake("moe_rewrite::rows_outer", lib=_LIBRARY)
def _(rows: Tensor, grad: Tensor, order: Tensor | None, offsets: Tensor, *rest: Any) -> Tensor:
    _own, _after, along_inner, _max_autotune = rest
    return launch.empty_gradient(rows, grad, offsets, along_inner)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, vectors, order, offsets, experts, pairs, own, after, interleaved, epilogue, dtype, tunes, _ = inputs
    adds = (len(vectors), epilogue) in ((0, ""), (1, ADD_VECTOR))
    ctx.plain = len(weights) == 1 and not interleaved and adds and dtype is rows.dtype
    ctx.sizes = pairs, own, after, bool(vectors)
    ctx.max_autotune = tunes
    ctx.save_for_backward(rows, weights[0], order, offsets, experts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if not ctx.plain:
        raise NotImplementedError("rows_mm has no gradient with an epilogue other than the bias")
    rows, weight, order, offsets, experts = ctx.saved_tensors
    pairs, own, after, has_bias = ctx.sizes
    needs = ctx.needs_input_grad
    needs_weight = bool(needs[1] if isinstance(needs[1], bool) else any(needs[1]))
    needs_bias = has_bias and bool(needs[2] if isinstance(needs[2], bool) else any(needs[2]))
    grad_rows = grad_weight = grad_bias = None
    if needs_weight or needs_bias:
        if offsets is None:
            order, _, offsets = sort_by_expert(experts, weight.shape[0])
        if needs_weight:
            # In the layout of the weight: else autograd copies it where it is kept.
            grad_weight = rows_outer(rows, grad, offsets, order, own, after, weight.stride(1) == 1, ctx.max_autotune)
        if needs_bias:
            grad_bias = rows_outer(grad.new_ones(pairs, 1), grad, offsets, order).squeeze(1)
    if needs[0]:
        told = {"order": order, "offsets": offsets, "experts": experts, "max_autotune": ctx.max_autotune}
        grad_rows = rows_mm(grad, [weight.transpose(1, 2)], [], behind=grad_weight, **told)
        if isinstance(pairs, int) and pairs == 0:
            grad_rows = torch.zeros_like(rows)
        elif not (isinstance(own, int) and own == 0):
            grad_rows = grad_rows.reshape(-1, own, after, rows.shape[1]).sum((0, 2))
    vectors = [grad_bias] if has_bias else []
    return grad_rows, [grad_weight], vectors, *[None] * 11


def _save_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, grad, order, offsets, ctx.own, ctx.after, *_ = inputs
    ctx.save_for_backward(rows, grad, order, offsets)


def _outer_backward(ctx: Any, of_weight: Tensor) -> tuple[Any, ...]:
    """Of a sum of ``row x gradient``: the second gradients of products."""
    rows, grad, order, offsets = ctx.saved_tensors
    pairs, own, after = grad.shape[0], ctx.own, ctx.after
    told = {"order": order, "offsets": offsets}
    of_rows = of_grad = None
    if ctx.needs_input_grad[0]:
        of_rows = rows_mm(grad, [of_weight.transpose(1, 2)], [], **told)
        if not (isinstance(own, int) and own == 0):
            of_rows = of_rows.reshape(-1, own, after, rows.shape[1]).sum((0, 2))
    if ctx.needs_input_grad[1]:
        of_grad = rows_mm(rows, [of_weight], [], gather=(pairs, own, after), **told)
    return of_rows, of_grad, *[None] * 6


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _handed_on(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None


torch.library.register_autograd("moe_rewrite::rows_outer", _outer_backward, setup_context=_save_outer, lib=_LIBRARY)
if launch.HAS_TRITON:
    _rows_outer_seen.register_autograd(_outer_backward, setup_context=_save_outer)
    _lend_rows_seen.register_autograd(_handed_on, setup_context=_save_nothing)

torch.library.register_autograd("moe_rewrite::rows_mm", _backward, setup_context=_save, lib=_LIBRARY)
if launch.HAS_TRITON:
    _rows_mm_seen.register_autograd(_backward, setup_context=_save)
