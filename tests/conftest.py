"""What every test starts from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU, slowly

# pytest 9 adds a handler to every logger that does not propagate. torch writes its structured traces, at half of the
# time of a compile, as soon as this one has a handler.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled, nothing counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
