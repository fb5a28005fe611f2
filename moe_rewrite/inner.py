"""The inner compiler: what the rewritten graph is handed to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from moe_rewrite.config import Options
from moe_rewrite.lower import descriptors


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile ``gm`` with the inner compiler, exactly as ``torch.compile(backend=inner, ...)`` would."""
    with descriptors.in_graph(example_inputs):
        return _compile(gm, example_inputs, options)


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    inner_options = dict(options.inner_options)
    if options.inner == "inductor":
        # What torch.compile itself makes of mode= and options= for inductor. Private; torch 2.11, 2.13, 2.15.
        wrapper = torch._TorchCompileInductorWrapper(options.mode, inner_options, None)
        compiled: Callable[..., Any] = wrapper(gm, example_inputs)
        return compiled
    kwargs: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        kwargs["mode"] = options.mode
    if inner_options:
        kwargs["options"] = inner_options
    inner: Callable[..., Any] = lookup_backend(options.inner)  # type: ignore[assignment]
    result: Callable[..., Any] = inner(gm, example_inputs, **kwargs)
    return result
