"""In which dtype products and sums are added up.

The one rule, of which every experts backend and every kernel is an instance:

* Floating-point numbers of less than 32 bits are added in float32 and rounded once, as a matmul of torch's adds them;
  their gradients, too. Complex numbers of such parts are added in complex64.
* All others are added in their own dtype: float64 loses nothing, and integers wrap around modulo 2**n, as in eager.
  ``torch.promote_types(dtype, torch.float32)`` would be float32 for integers, which is exact up to 2**24 only.

Products of what is no number with a fraction (:func:`is_fractional`) are torch's own ones: torch has none of truths,
and none of integers on a GPU, and says so. The Triton kernels add in float32, and are given nothing that asks for
another dtype (``rows_mm.DTYPES``).
"""

from __future__ import annotations

import torch


def accumulated_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers of ``dtype`` are added up in."""
    if dtype.is_floating_point:
        return torch.float32 if dtype.itemsize < 4 else dtype
    return torch.complex64 if dtype is torch.complex32 else dtype


def is_fractional(dtype: torch.dtype) -> bool:
    """Whether numbers of ``dtype`` are floating-point or complex ones."""
    return bool(dtype.is_floating_point or dtype.is_complex)
