"""What is asked of Dynamo and inductor beside ``torch.compile``: caches, counters and seconds.

Private parts of torch, all of them here; seen to work in 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils

OURS = "moe_rewrite"


def our_backend() -> Any:
    """The backend's name; the function itself where the package is on the path but not installed."""
    if OURS in torch._dynamo.list_backends(exclude_tags=()):
        return OURS
    from moe_rewrite.backend import moe_rewrite

    return moe_rewrite


def forget() -> None:
    """Drop what Dynamo compiled, its CUDA graphs and its counters. Caches on disk stay."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def dynamo_seconds() -> float | None:
    """Seconds of the compilation since :func:`forget` that were not the compiler backend's; None without one."""
    spent = torch._dynamo.utils.calculate_time_spent()
    return spent["entire_frame_compile"] - spent["backend_compile"] if "backend_compile" in spent else None


def cache_hit() -> bool:
    """Whether something came out of inductor's cache since :func:`forget`."""
    counters = torch._dynamo.utils.counters
    return bool(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])


def cudagraph_skips() -> int:
    """How many graphs inductor did not capture although the mode asks for it."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def graph_breaks() -> int:
    """How many graph breaks Dynamo counted since :func:`forget`."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """While it holds, inductor and Triton start from empty caches of their own."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def share_triton_cache() -> str:
    """One folder for compiled Triton kernels, for this process and those it starts. Returns it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(cache_dir(), "triton"))


@contextlib.contextmanager
def rewritten_loops() -> Iterator[Counter[str]]:
    """Counts what loops become meanwhile: names of experts backends, ``"eager"`` for loops left as they are."""
    loops: Counter[str] = Counter()

    def count(record: logging.LogRecord) -> bool:
        reports = record.args if isinstance(record.args, tuple) else ()
        loops.update(report.experts_backend for report in reports if hasattr(report, "experts_backend"))
        return False  # not printed

    logger = logging.getLogger(OURS)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(count)
    try:
        yield loops
    finally:
        logger.removeFilter(count)
        logger.setLevel(level)
