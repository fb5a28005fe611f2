"""What is left as it is, and why. An entry whose loop is rewritten after all fails its test, and has to be removed."""

from __future__ import annotations

from typing import Any

import pytest

NOT_REWRITTEN = {
    "LongcatFlashMoE": "the last experts are modules of another class, nn.Identity",
    "NllbMoeSparseMLP": "rows are read from, and written into, a tensor for each expert",
}
"""By the name of the class that loops."""


OLDER_NOT_REWRITTEN: dict[str, str] = {}
"""By the name of the form in older.py."""


def marks_of(name: str, reasons: dict[str, str] = NOT_REWRITTEN) -> list[Any]:
    """The marks of a test that has to fail for the classes above."""
    return [pytest.mark.xfail(strict=True, reason=reasons[name])] if name in reasons else []
