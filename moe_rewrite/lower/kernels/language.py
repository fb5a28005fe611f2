"""Triton, where it is there: torch for the CPU comes without it."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import constexpr_function, jit
except ImportError:
    triton = tl = None

    def jit(function: Any) -> Any:
        return function

    constexpr_function = jit

__all__ = ["constexpr_function", "jit", "tl", "triton"]
