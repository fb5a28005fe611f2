"""What is compared: whose experts, which experts backend, and which mode of ``torch.compile``."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from moe_rewrite.benchmark.compiler import OURS, our_backend
from moe_rewrite.lower import AUTO, EAGER, list_experts_backends

THEIRS, PLAIN, DEFAULT = "transformers", "plain", "default"
TUNED = "max-autotune-no-cudagraphs"
OWN_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which inductor captures CUDA graphs itself."""
MAX_BATCHED_TOKENS, MAX_BATCHED_BACKWARD_TOKENS = 512, 64
MAX_EAGER_GRADIENT_BYTES = 1e12


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a module. ``transformers/eager/plain`` is the loop as it is."""

    provider: str
    experts: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.provider}/{self.experts}/{self.mode}"

    @property
    def uncapturable(self) -> str | None:
        """Why no CUDA graph of it can be captured by hand, or None."""
        if self.experts == EAGER:
            return "the loop reads from the device"
        return "the mode has CUDA graphs of its own" if self.mode in OWN_GRAPHS else None

    def matches(self, patterns: Sequence[str] | None) -> bool:
        """Whether its name is like one of ``patterns``; without any, it is."""
        return patterns is None or any(fnmatch.fnmatch(self.name, pattern) for pattern in patterns)

    def prepare(self, module: nn.Module, inner: str = "inductor") -> Callable[..., Any]:
        """``module``, to be called in this way. Compiles at its first call, one graph for one size.

        Sets the module's experts implementation: only the variant that was prepared last may be called.

        Args:
            module: a transformers model or experts module; or another module, for a variant of ours.
            inner: what compiles the graphs. With another one than inductor the mode is not used.
        """
        implementation = EAGER if self.provider == OURS else self.experts
        if hasattr(module, "set_experts_implementation"):
            module.set_experts_implementation(implementation)
        elif hasattr(module, "config"):
            module.config._experts_implementation = implementation
        if self.provider == THEIRS and self.mode == PLAIN:
            return module  # type: ignore[no-any-return]
        how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if self.provider == OURS:
            options = {"experts": self.experts, "inner": inner}
            options |= {"mode": self.mode} if inner == "inductor" else {}
            return torch.compile(module, backend=our_backend(), options=options, **how)  # type: ignore[no-any-return]
        how |= {"mode": self.mode} if inner == "inductor" else {"backend": inner}
        return torch.compile(module, **how)  # type: ignore[no-any-return]


def our_experts() -> list[str]:
    """Our experts backends as far as they rewrite, the most important first: ``auto``, and all that are registered."""
    return [AUTO, *sorted((name for name in list_experts_backends() if name not in (AUTO, EAGER)), reverse=True)]


def make_variants(modes: Sequence[str], patterns: Sequence[str] | None = None) -> list[Variant]:
    """All variants of ``modes``, mode by mode, whose names match one of ``patterns``.

    Peers stand beside ours, so that a run that is cut off has compared something.
    """
    found: list[Variant] = []
    for mode in modes:
        if mode == PLAIN:
            found += [Variant(THEIRS, experts, PLAIN) for experts in ("grouped_mm", "batched_mm", EAGER)]
            continue
        found += [Variant(THEIRS, "grouped_mm", mode), *(Variant(OURS, name, mode) for name in our_experts())]
        found.append(Variant(THEIRS, "batched_mm", mode))
    return [variant for variant in found if variant.matches(patterns)]


@dataclasses.dataclass(frozen=True)
class Work:
    """How much one call has to do.

    Attributes:
        tokens: tokens of the call.
        top_k: experts of a token.
        num_experts: experts of a layer.
        expert_bytes: bytes of the weights of one expert.
        backward: whether gradients are computed too.
    """

    tokens: int
    top_k: int
    num_experts: int
    expert_bytes: int
    backward: bool = False

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the weights of every (token, expert) pair."""
        return self.tokens * self.top_k * self.expert_bytes


def left_out(variant: Variant, work: Work, memory: float | None) -> str | None:
    """Why a variant is not run at this size, or None where it is.

    Args:
        variant: the variant.
        work: how much a call has to do.
        memory: bytes of the device's memory; None where they are not known.
    """
    if variant.experts == EAGER and work.backward:
        written = work.num_experts**2 * work.expert_bytes
        if written > MAX_EAGER_GRADIENT_BYTES:
            return f"the loop's backward writes a gradient of all weights for every expert, {written / 1e9:.0f} GB"
    if variant.experts != "batched_mm":
        return None
    gathered = f"{work.gathered_bytes / 1e9:.0f} GB"
    if work.backward and work.tokens > MAX_BATCHED_BACKWARD_TOKENS:
        return f"backward of batched_mm may write the gradient of every pair's weights, {gathered}"
    if work.tokens > MAX_BATCHED_TOKENS:
        return f"above {MAX_BATCHED_TOKENS} tokens: batched_mm reads the weights of every pair, {gathered}"
    if variant.provider == THEIRS and memory is not None and work.gathered_bytes > memory / 3:
        return f"the copy of every pair's weights, {gathered}, is more than a third of the device's memory"
    return None
