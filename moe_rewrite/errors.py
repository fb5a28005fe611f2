"""The errors this package raises. All of them are a :class:`MoeRewriteError`."""

from __future__ import annotations


class MoeRewriteError(RuntimeError):
    """Base class of every error raised by moe_rewrite."""


class OptionsError(MoeRewriteError, ValueError):
    """``options=`` or an experts mapping holds something that is not allowed."""


class NotLiftedError(MoeRewriteError):
    """An operator that one expert executes cannot be executed for all experts at once."""


class MarkerExecutedError(MoeRewriteError):
    """A captured loop reached execution without having been rewritten.

    The marker operators only describe a loop. They hold no computation, so running
    one could only give a wrong number.
    """
