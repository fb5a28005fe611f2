"""What identifies the code of this folder, for torch's caches of compiled code."""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable

from torch import fx


def mark(gm: fx.GraphModule) -> None:
    """Have AOTAutograd's cache tell ``gm`` from the same graph with operators of another version of this package.

    The cache knows operators by their names, and keeps what the compiler saw in them: kernels and tiles of the version
    that filled it. A graph's attributes are a part of its key (seen in torch 2.11, 2.13 and 2.15).
    """
    gm.moe_rewrite_code = _of_code()


@functools.cache
def _of_code() -> str:
    digest = hashlib.sha256()
    for source in _sources(files(__package__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _sources(folder: Traversable) -> list[Traversable]:
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _sources(entry)
        elif entry.name.endswith(".py"):
            found.append(entry)
    return found
