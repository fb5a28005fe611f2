"""The experts mapping of a compiled model, read and changed at run time."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from moe_rewrite.backend import is_ours, traced_codes
from moe_rewrite.capture import dynamo_calls
from moe_rewrite.config import ExpertsMapping, Options
from moe_rewrite.errors import MoeRewriteError

_wrappers: weakref.WeakKeyDictionary[nn.Module, dict[ExpertsMapping, Any]] = weakref.WeakKeyDictionary()
"""For each compiled model the compiler wrappers of the mappings it had: coming back to one finds its compiled code."""


def get_experts_backend(compiled_model: nn.Module) -> dict[str, str]:
    """The experts mapping of a compiled model; empty where nothing is configured.

    Args:
        compiled_model: what ``torch.compile(model, backend="moe_rewrite")`` returned, or a module after
            ``module.compile(backend="moe_rewrite")``.

    Raises:
        MoeRewriteError: it is something else.
    """
    return _options(_wrapper(compiled_model)).experts.as_dict()


def set_experts_backend(compiled_model: nn.Module, mapping: Mapping[str, str] | str) -> None:
    """Give a compiled model another experts mapping.

    The model itself is not touched. What the mapping changes is compiled at the next call; what was compiled with
    another mapping is kept and used again when that mapping comes back.

    Dynamo gives up the frame of a function with a graph break in a ``for`` statement, such as one over layers with a
    loop that is left as it is. Those that it gave up for this model are traced again. One that it gave up for another
    compiler backend before is not: what it calls is compiled function by function, with the same mapping.

    Args:
        compiled_model: what ``torch.compile(model, backend="moe_rewrite")`` returned, or a module after
            ``module.compile(backend="moe_rewrite")``.
        mapping: module path prefixes and experts backends, or the name of one for all.

    Raises:
        MoeRewriteError: ``compiled_model`` is something else.
        OptionsError: the mapping is wrong.
    """
    wanted = ExpertsMapping.parse(mapping)
    current = _wrapper(compiled_model)
    if wanted == _options(current).experts:
        return
    known = _wrappers.setdefault(compiled_model, {})
    known.setdefault(_options(current).experts, current)
    if wanted not in known:
        kwargs: dict[str, Any] = current.kwargs
        options = {**kwargs.get("options", {}), "experts": wanted.as_dict()}
        if "mode" in kwargs:
            options["mode"] = kwargs["mode"]
        known[wanted] = dynamo_calls.wrapper_like(current, options)
    for wrapper in known.values():
        for code in traced_codes(wrapper):
            dynamo_calls.trace_again(code)
    if dynamo_calls.compiled_with(compiled_model) is not None:
        dynamo_calls.compile_again(compiled_model, known[wanted])
    else:
        dynamo_calls.compile_in_place_again(compiled_model, known[wanted])


@contextlib.contextmanager
def experts_backend(compiled_model: nn.Module, mapping: Mapping[str, str] | str) -> Iterator[None]:
    """:func:`set_experts_backend` for the length of a ``with`` block."""
    before = get_experts_backend(compiled_model)
    set_experts_backend(compiled_model, mapping)
    try:
        yield
    finally:
        set_experts_backend(compiled_model, before)


def _options(wrapper: Any) -> Options:
    return Options.parse(**wrapper.kwargs)


def _wrapper(compiled_model: object) -> Any:
    wrapper = dynamo_calls.compiled_with(compiled_model) or dynamo_calls.compiled_in_place_with(compiled_model)
    if wrapper is None or not is_ours(wrapper):
        raise MoeRewriteError(
            f"expected what torch.compile(model, backend='moe_rewrite') returns, or a module after "
            f"module.compile(backend='moe_rewrite'), got {type(compiled_model).__name__}"
            + (" compiled with another backend" if wrapper is not None else "")
        )
    return wrapper
