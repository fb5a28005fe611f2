"""``explain``: what is found in a model and what becomes of it, without running it."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils import _pytree as pytree

from moe_rewrite.backend import Memory, is_ours, moe_rewrite, other_implementation, traced_codes
from moe_rewrite.capture import dynamo_calls
from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.report import LoopReport


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. It prints as a table.

    Attributes:
        loops: one report for each loop, in the order of compilation. ``before`` and ``after`` hold its graph.
        graphs: the rewritten graphs, one for each that Dynamo made of the model.
        notes: what else there is to say, such as what kept a part of the model from being looked at.
    """

    loops: list[LoopReport]
    graphs: list[fx.GraphModule] = dataclasses.field(repr=False)
    notes: list[str]

    def __str__(self) -> str:
        head = ("module", "recognised", "experts backend", "why")
        rows = [_row(report) for report in self.loops]
        lines = [_table([head, *rows])] if rows else ["no experts loop was found"]
        lines.append(f"{len(self.graphs)} graph{'' if len(self.graphs) == 1 else 's'}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Find the experts loops of a model and say what becomes of each.

    The model is traced with fake tensors: no kernel runs, no weight is read, and a model on the meta device will do (it
    is then explained as for the GPU, or the CPU where there is none). The model and what is compiled of it stay as they
    are.

    Args:
        model: a model. The options of one that is compiled with ``backend="moe_rewrite"`` are used.
        args: positional arguments of a call of the model.
        kwargs: keyword arguments of it.

    Raises:
        MoeRewriteError: ``model`` is no module, is compiled with another backend, or cannot be copied.
    """
    model, given = model_and_options(model, "explain")
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm

    options = {"experts": given.get("experts", {}), "inner": keep}
    fake_mode = _FakeRun(shape_env=ShapeEnv())
    fake_model = _fake_copy(model, fake_mode)
    fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, lambda t: _fake(t, fake_mode), (args, kwargs))
    memory, notes = Memory(explains=True), []
    compiled = torch.compile(fake_model, backend=moe_rewrite, options=options)
    wrapper = dynamo_calls.compiled_with(compiled)
    wrapper._moe_rewrite_memory = memory
    try:
        with fake_mode:
            compiled(*fake_args, **fake_kwargs)
    except Exception as error:  # what is left as it is runs in Python, and there are no values to run it on
        what = str(error).strip().splitlines()
        notes.append(f"tracing ended at: {type(error).__name__}: {what[0] if what else ''}")
    finally:
        dynamo_calls.forget(wrapper, traced_codes(wrapper))
    other = other_implementation(model)
    if other is not None and not memory.reports:
        notes.append(other)
    return Explanation(list(dict.fromkeys(memory.reports)), graphs, notes)


class _FakeRun(FakeTensorMode):  # type: ignore[misc]
    """A fake tensor mode in which a loop over an unknown number of rows that is left in Python makes no iteration.

    There is no number to go by, and what comes after the loop is to be looked at too. In torch 2.11 the iteration fails
    before it gets here: there the explanation ends at such a loop, with a note.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.unbind.int and not dynamo_calls.is_tracing():
            tensor, dim = args[0], args[1] if len(args) > 1 else 0
            if free_unbacked_symbols(tensor.shape[dim]):
                return ()
        return super().__torch_dispatch__(func, types, args, kwargs)


def model_and_options(model: object, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The module that was given to function ``name``, and the options that it was compiled with, if it was."""
    wrapper = dynamo_calls.compiled_with(model)
    if wrapper is not None:
        if not is_ours(wrapper):
            raise MoeRewriteError(f"{name} got a model that is compiled with another backend; give it the model itself")
        assert isinstance(model, nn.Module)
        original: nn.Module = model._orig_mod  # type: ignore[assignment]
        return original, _options(wrapper)
    if not isinstance(model, nn.Module):
        raise MoeRewriteError(
            f"{name} takes an nn.Module or what torch.compile made of one, got {type(model).__name__}"
        )
    in_place = dynamo_calls.compiled_in_place_with(model)
    return model, _options(in_place) if in_place is not None and is_ours(in_place) else {}


def _options(wrapper: Any) -> dict[str, Any]:
    return dict(wrapper.kwargs.get("options", {}))


def _fake(tensor: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor like ``tensor``, on its device; on a real one where that is the meta device."""
    if tensor.device.type != "meta":
        fake: torch.Tensor = fake_mode.from_tensor(tensor, static_shapes=True)
        return fake
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with fake_mode:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty.requires_grad_(tensor.requires_grad)


def _fake_copy(model: nn.Module, fake_mode: FakeTensorMode) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are fake. It takes no memory for them."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _fake(tensor, fake_mode) for tensor in tensors}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise MoeRewriteError(
            f"explain works on a copy of the model, and {type(model).__name__} cannot be copied: {error}"
        ) from error
    # Compiled code is cached on the code object of `forward`: with one of its own, the model's cache is left alone.
    forward = copied.forward
    if isinstance(forward, types.MethodType) and isinstance(forward.__func__, types.FunctionType):
        copied.forward = types.MethodType(_with_own_code(forward.__func__), copied)
    return copied


def _with_own_code(function: types.FunctionType) -> types.FunctionType:
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    own.__dict__.update(function.__dict__)
    own.__module__, own.__qualname__ = function.__module__, function.__qualname__
    return own


def _row(report: LoopReport) -> tuple[str, str, str, str]:
    loop = report.loop
    what = "-" if loop is None else f"{loop.num_experts} experts, {loop.dispatch}: {loop.summary()}"
    return report.path or "<root>", what, report.experts_backend, report.why


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
