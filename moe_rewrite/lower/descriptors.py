"""Descriptors of tensors, by which a program of a GPU reads a block in one instruction (TMA: SM90 and SM100).

What reads through them goes to operators that compilers do not see into: ``torch.library.wrap_triton`` takes no
descriptors (torch 2.11 and 2.13; 2.15 does). That is for products that take long, where little is lost by it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # torch for the CPU comes without it, and Triton before 3.4 without descriptors
    TensorDescriptor = None

HAS_DESCRIPTORS = TensorDescriptor is not None
_ALIGNED = 16
"""Bytes that addresses, and strides of all dimensions but one, are multiples of."""


def can_be_described(tensor: Tensor) -> bool:
    """Whether there is a descriptor for it, by its layout: one dimension is contiguous, and all others are aligned.

    Where the memory is not known, as when compiling, it is taken for one that starts at an aligned address.
    """
    given: list[Any] = [*tensor.stride(), tensor.storage_offset()]
    if not HAS_DESCRIPTORS or not all(isinstance(one, int) for one in given) or 1 not in given[-3:-1]:
        return False
    given.remove(1)
    if any(one * tensor.dtype.itemsize % _ALIGNED for one in given):
        return False
    return all(stride > 0 for stride in tensor.stride())


def is_aligned(tensor: Tensor) -> bool:
    """Whether the memory, which is there, starts at an aligned address."""
    return bool(tensor.data_ptr() % _ALIGNED == 0)


def describe(tensor: Tensor, *block: int) -> Any:
    """A descriptor for blocks of ``tensor``; of its last two dimensions the contiguous one comes last in both."""
    if tensor.stride(-1) != 1:
        tensor, block = tensor.transpose(-1, -2), (*block[:-2], block[-1], block[-2])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
