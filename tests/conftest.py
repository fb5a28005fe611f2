"""What every test starts from."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils import deterministic


def _can_interpret() -> bool:
    """Triton's interpreter up to 3.6 needs numpy < 2.4."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    old, new = (tuple(map(int, version.split(".")[:2])) for version in (found, numpy.__version__))
    return old >= (3, 7) or new < (2, 4)


if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it with deterministic algorithms
elif _can_interpret():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU, slowly


def _round_to_bf16() -> None:
    """Triton's interpreter (seen in 3.6 and 3.7) truncates where a GPU rounds."""
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:  # torch for the CPU comes without it
        return
    cast = InterpreterBuilder.cast_impl

    def round_to_bf16(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        rounded = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy().reshape(source.data.shape), dtype.scalar)

    InterpreterBuilder.cast_impl = round_to_bf16


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_to_bf16()

# pytest 9 adds a handler to every logger that does not propagate. torch writes its structured traces, at half of the
# time of a compile, as soon as this one has a handler.
logging.getLogger("torch.__trace").propagate = True

import torch._dynamo.guards  # noqa: E402 (it imports triton)

# Dynamo times the guards of each compile, for its logs: 20 ms.
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0


def pytest_collection_finish() -> None:
    """The garbage collector leaves alone what was imported, and comes less often: a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled, nothing counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]
