"""Launches of Triton kernels that compilers see, of which we know what they write.

``torch.library.wrap_triton`` is there for kernels of which nothing is known. AOTAutograd finds out what each launch
writes by an analysis of the kernel, for which Triton generates its code anew: 25 to 50 ms each time, in each layer of a
model (docs/performance.md). Here the launch is put into the graph as AOTAutograd would have put it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Seen to work in 2.11, 2.13 and 2.15.
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

from moe_rewrite.lower.descriptors import Described
from moe_rewrite.lower.kernels.language import triton


def is_traced(kernel: Any) -> bool:
    """Whether a launch of ``kernel`` now becomes a part of a graph. One that is interpreted never does."""
    is_compiled = isinstance(kernel, (triton.JITFunction, triton.runtime.Autotuner))
    return is_compiled and torch.library.wrap_triton(kernel) is not kernel


def computed_once(kernel: Any, tensor: Tensor) -> Tensor:
    """``tensor``, which ``kernel`` and others read: in a graph, what inductor has in memory before the first of them.

    Inductor asks for each operand of a kernel by itself, and so computes one that is in no memory yet for each of them.
    An operator of its own that fixes strides ends that. Seen to work in 2.11 and 2.13.
    """
    if not is_traced(kernel):
        return tensor
    import torch._inductor.inductor_prims  # where it is registered

    fixed: Tensor = torch.ops.prims.inductor_force_stride_order.default(tensor, tensor.stride())
    return fixed


def launch(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    written: tuple[str, ...],
) -> list[Tensor]:
    """Launch ``kernel``, in an operator of ``torch.library.triton_op``.

    Args:
        kernel: of ``triton.jit``, or of ``triton.autotune`` on top of that.
        grid: its grid, by what a configuration says.
        args: its first arguments, descriptors among them.
        constants: its other arguments by name, without what configurations say.
        written: the names of those that it writes.

    Returns:
        What it wrote: the given memory, or in a graph other tensors, which the compiler puts there.
    """
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
    if not is_traced(kernel):
        return run(kernel, grid, args, constants, written)
    wrapped = torch.library.wrap_triton(kernel)
    configurations = [tile.kwargs for tile in getattr(kernel, "configs", ())] or [{}]
    results = triton_kernel_wrapper_functional(
        kernel_idx=wrapped.kernel_idx,
        constant_args_idx=kernel_side_table.add_constant_args({}),
        grid=[(*grid(said), 1, 1)[:3] for said in configurations],
        tma_descriptor_metadata={
            # As `create_tma_stable_metadata` of 2.11 and 2.13 has it. The blocks are hashed: they are no list.
            name: ("stable", (arg.block,))
            for name, arg in given.items()
            if isinstance(arg, Described)
        },
        kwargs={name: _memory(arg) for name, arg in given.items()},
        tensors_to_clone=list(written),
    )
    return [results[name] for name in written]


def run(
    kernel: Any, grid: Any, args: tuple[Any, ...], constants: dict[str, Any], written: tuple[str, ...]
) -> list[Any]:
    """Launch ``kernel`` where nothing is traced; ``grid`` may be its sizes. Returns the memory that it wrote."""
    kernel[grid](*(arg.descriptor() if isinstance(arg, Described) else arg for arg in args), **constants)
    return [_memory(args[kernel.arg_names.index(name)]) for name in written]


def _memory(arg: Any) -> Any:
    return arg.tensor if isinstance(arg, Described) else arg
