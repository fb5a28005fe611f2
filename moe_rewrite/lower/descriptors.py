"""Descriptors of tensors, by which a program reads or writes a block at once (TMA, on GPUs of SM90 and SM100)."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # torch for the CPU comes without it, and Triton before 3.4 without descriptors
    TensorDescriptor = None

HAS_DESCRIPTORS = TensorDescriptor is not None
_ALIGNED = 16
"""Bytes that addresses, and strides of all dimensions but one, are multiples of."""

_in_graph: contextvars.ContextVar[bool] = contextvars.ContextVar("moe_rewrite_descriptors_in_graph", default=True)


@contextlib.contextmanager
def in_graph(inputs: Sequence[Any]) -> Iterator[None]:
    """While a graph is compiled that is to be called with ``inputs``: no descriptors if one of them is not aligned.

    Compilers align what they allocate. Inductor copies an input that is not aligned, but not where none was when it
    compiled.
    """
    token = _in_graph.set(all(is_aligned(one) for one in inputs if type(one) in _REAL and one.is_cuda))
    try:
        yield
    finally:
        _in_graph.reset(token)


_REAL = (Tensor, torch.nn.Parameter)
"""Whose memory is there, unlike that of fake tensors."""


@dataclasses.dataclass(frozen=True)
class Described:
    """What a kernel gets a descriptor for.

    Attributes:
        tensor: the tensor, with the dimension last that is contiguous.
        block: the sizes of the blocks, of as many dimensions.
    """

    tensor: Tensor
    block: tuple[int, ...]

    def descriptor(self) -> Any:
        """The descriptor of the tensor as it is in memory now."""
        return TensorDescriptor(self.tensor, list(self.tensor.shape), list(self.tensor.stride()), list(self.block))


def can_be_described(tensor: Tensor) -> bool:
    """Whether there is a descriptor for it, by its layout: one dimension is contiguous, and all others are aligned.

    Where the memory is not known, as when compiling, it is taken for one that starts at an aligned address.
    """
    given: list[Any] = [*tensor.stride(), tensor.storage_offset()]
    if (
        not HAS_DESCRIPTORS
        or not _in_graph.get()
        or not all(isinstance(one, int) for one in given)
        or 1 not in given[-3:-1]
    ):
        return False
    given.remove(1)
    if any(one * tensor.dtype.itemsize % _ALIGNED for one in given):
        return False
    return all(stride > 0 for stride in tensor.stride())


def is_aligned(tensor: Tensor) -> bool:
    """Whether the memory, which is there, starts at an aligned address."""
    return bool(tensor.data_ptr() % _ALIGNED == 0)


def describe(tensor: Tensor, *block: int) -> Described:
    """``tensor`` in blocks; of its last two dimensions the contiguous one comes last in both."""
    if tensor.stride(-1) != 1:
        tensor, block = tensor.transpose(-1, -2), (*block[:-2], block[-1], block[-2])
    return Described(tensor, block)
