"""How a proof ends that does not hold."""

from __future__ import annotations

from torch import fx


class Refused(Exception):
    """The body cannot be proved rewritable. ``node`` is what stands in the way."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
