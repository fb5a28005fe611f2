"""What became of each loop: one line each in the log, and a table for ``explain``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from torch import fx

from moe_rewrite.loop import ExpertsLoop, Refusal

log = logging.getLogger("moe_rewrite")


@dataclasses.dataclass(frozen=True)
class LoopReport:
    """What became of one loop.

    Attributes:
        path: path of the module the loop stands in.
        location: the user's ``file:line`` of the loop.
        loop: what it was recognised as; None where it was refused.
        refusal: why it was left as it is; None where it was rewritten.
        experts_backend: what it was rewritten into; ``"eager"`` where it was left as it is.
        why: why that experts backend was chosen.
        before: the captured loop, as code.
        after: what stands in its place, as code.
    """

    path: str
    location: str
    loop: ExpertsLoop | None
    refusal: Refusal | None
    experts_backend: str
    why: str
    before: str = dataclasses.field(repr=False, default="")
    after: str = dataclasses.field(repr=False, default="")

    def __str__(self) -> str:
        """One line, as the log has it."""
        name = self.path or "<root>"
        if self.loop is None:
            return f"{name}: left as it is: {self.refusal.reason if self.refusal else self.why}"
        return f"{name}: {self.loop.num_experts} experts, {self.loop.dispatch} -> {self.experts_backend} ({self.why})"


def standalone_code(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> str:
    """``nodes`` as the code of a function of ``inputs``."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        env[node] = graph.node_copy(node, lambda n: env.get(n) or graph.placeholder(n.name))
    code: str = graph.python_code("self").src
    return code.strip() + "\n"
