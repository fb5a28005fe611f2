"""What became of each loop: one line each in the log, and a table for ``explain``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from moe_rewrite.loop import ExpertsLoop, Refusal

_log = logging.getLogger("moe_rewrite")


@dataclasses.dataclass(frozen=True)
class LoopReport:
    """What became of one loop.

    Attributes:
        path: path of the module the loop stands in.
        location: the user's ``file:line`` of the loop.
        loop: what it was recognised as; None where it was not.
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

    @classmethod
    def of_refusal(cls, refusal: Refusal, loop: ExpertsLoop | None = None, before: str = "") -> LoopReport:
        return cls(refusal.path, refusal.location, loop, refusal, "eager", refusal.reason, before)

    def refused(self, reason: str) -> LoopReport:
        """The same loop, left as it is for a ``reason``."""
        return LoopReport.of_refusal(Refusal(self.path, self.location, reason), self.loop, self.before)

    def __str__(self) -> str:
        """One line, as the log has it."""
        if self.refusal is not None:
            return f"left as it is: {self.refusal}"
        assert self.loop is not None
        what = f"{self.loop.num_experts} experts, {self.loop.dispatch}"
        return f"{self.path or '<root>'}: {what} -> {self.experts_backend} ({self.why})"


def log_reports(reports: Sequence[LoopReport]) -> None:
    """One line for each loop, at level INFO of the logger ``moe_rewrite``."""
    for report in reports:
        _log.info("%s", report)
