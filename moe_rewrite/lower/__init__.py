"""The experts backends: what a loop is rewritten into.

An experts backend is one function of an :class:`ExpertsLoop` and its :class:`Lifted` values, in a small file of its
own, and one line in the registry below.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from moe_rewrite.errors import OptionsError
from moe_rewrite.loop import EveryToken, ExpertsLoop
from moe_rewrite.lower import auto, batched_mm, devices, grouped_mm, triton
from moe_rewrite.lower.lift import InnerCompiler, Lifted
from moe_rewrite.lower.pairs import Pairs

__all__ = [
    "AUTO",
    "EAGER",
    "ExpertsBackend",
    "InnerCompiler",
    "Lifted",
    "Pairs",
    "check_name",
    "choose",
    "list_experts_backends",
    "register_experts_backend",
]

Lower = Callable[[ExpertsLoop, Lifted], None]
Check = Callable[[ExpertsLoop], str | None]

EAGER = "eager"
"""Leaves a loop as stock Dynamo has it."""
AUTO = "auto"
"""Picks one of the built-in experts backends for each loop."""


@dataclasses.dataclass(frozen=True)
class ExpertsBackend:
    """A way to compute the experts of a loop.

    Attributes:
        name: how users choose it.
        lower: builds the replacement: a function that is traced with fake tensors.
        check: why it cannot take a loop, or None where it can.
    """

    name: str
    lower: Lower
    check: Check

    @property
    def is_built_in(self) -> bool:
        """Whether it is known not to look at where a loop stands: one replacement serves all loops that are alike."""
        return self.lower.__module__.startswith("moe_rewrite.lower.")

    def build(self, loop: ExpertsLoop, lifted: Lifted) -> None:
        """Run ``lower``; where no rows are selected there is no product of rows that could be its own."""
        if isinstance(loop.dispatch, EveryToken):
            lifted.run(None, None)
        else:
            self.lower(loop, lifted)


_REGISTRY: dict[str, ExpertsBackend] = {}


def _takes_all(loop: ExpertsLoop) -> None:
    return None


def register_experts_backend(
    name: str, lower: Lower, *, check: Check | None = None, overwrite: bool = False
) -> ExpertsBackend:
    """Add an experts backend that users can choose by name.

    Args:
        name: the name.
        lower: ``lower(loop, lifted)``. Runs the row program with ``lifted.run(pairs, product)``, where
            ``product(rows [P, K], weight [E, K, N]) -> [P, N]`` multiplies each row by the weight of its expert. It is
            traced with fake tensors, so it must not depend on values, and it returns nothing: ``run`` adds to the
            loop's accumulators in place.
        check: ``check(loop)`` gives the reason why it cannot take a loop, or None. A loop it cannot take is left as
            it is.
        overwrite: replace an experts backend of the same name.

    Returns:
        The registered experts backend.

    Raises:
        OptionsError: the name is taken or reserved, or no proper name.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise OptionsError(f"an experts backend needs a name like a Python identifier, got {name!r}")
    if name in (AUTO, EAGER):
        raise OptionsError(f"{name!r} is reserved; choose another name for your experts backend")
    if name in _REGISTRY and not overwrite:
        raise OptionsError(f"an experts backend {name!r} exists already; pass overwrite=True to replace it")
    _REGISTRY[name] = ExpertsBackend(name, lower, check or _takes_all)
    return _REGISTRY[name]


def list_experts_backends() -> list[str]:
    """The names that a mapping may hold."""
    return sorted([AUTO, EAGER, *_REGISTRY])


def check_name(name: object) -> str:
    """``name`` as an experts backend's name.

    Raises:
        OptionsError: there is none of that name. The message lists those that exist.
    """
    names = list_experts_backends()
    if isinstance(name, str) and name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptionsError(f"there is no experts backend {name!r}.{hint} There are: {', '.join(map(repr, names))}.")


def choose(name: str, loop: ExpertsLoop, needs_grad: bool) -> tuple[ExpertsBackend | None, str]:
    """The experts backend that a mapping's ``name`` means for ``loop``, and why.

    ``needs_grad`` says whether there may be a gradient to compute. The first is None where the loop is to be left as it
    is: it is so configured, the backend cannot take the loop, or what it computes with is on several devices.
    """
    if name == EAGER:
        return None, "experts backend 'eager' is configured for it"
    why = "configured"
    if name == AUTO:
        name, why = auto.pick(loop, needs_grad)
    reason = devices.refusal(loop)
    if reason is not None:
        return None, reason
    backend = _REGISTRY[name]
    reason = backend.check(loop)
    if reason is not None:
        return None, f"experts backend {name!r} cannot take it: {reason}"
    return backend, why


register_experts_backend("batched_mm", batched_mm.lower)
register_experts_backend("grouped_mm", grouped_mm.lower)
register_experts_backend("triton", triton.lower)
