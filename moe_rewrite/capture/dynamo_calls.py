"""What of Dynamo's private API tells which call of ``torch.compile`` a frame is of, and whether it is traced.

Each use names the versions of torch in which it was seen to work; see ``dynamo.py``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch

# The classes a variable tracker of ours derives from, or is compared with. torch 2.11, 2.13, 2.15.
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.symbolic_convert import InstructionTranslator

from moe_rewrite.capture.dynamo import wrap_method
from moe_rewrite.tree import is_module


def compiler_wrapper(compiler_fn: Any) -> Any:
    """The object that ``torch.compile`` made of ``backend=``, out of Dynamo's debug wrappers.

    torch 2.11, 2.13, 2.15.
    """
    while hasattr(compiler_fn, "_torchdynamo_orig_backend"):
        compiler_fn = compiler_fn._torchdynamo_orig_backend
    return compiler_fn


def compiled_with(module: Any) -> Any:
    """The object that ``torch.compile`` made of ``backend=`` for a compiled module; None for anything else.

    torch 2.11, 2.13, 2.15.
    """
    if not isinstance(module, OptimizedModule):
        return None
    return compiler_wrapper(module.dynamo_ctx.callback)


def compile_again(module: Any, wrapper: Any) -> None:
    """Compile a compiled module with another ``wrapper`` from its next call on. torch 2.11, 2.13, 2.15.

    What was compiled before is kept, and used again once an equal wrapper comes back.
    """
    module.dynamo_ctx = _context_like(module.dynamo_ctx, wrapper)
    module._initialize()


def _context_like(context: Any, wrapper: Any) -> Any:
    """What ``torch.compile`` made, with another ``wrapper`` and all else that it was told.

    torch 2.11 (without a limit, an isolated region and a shapes spec, which came later), 2.13.
    """
    told = {
        "guard_filter_fn": context._hooks.guard_filter_fn,
        "recompile_limit": getattr(context.callback._torchdynamo_orig_backend, "_recompile_limit", None),
        "shapes_spec": getattr(context, "_shapes_spec", None),
    }
    given = {name: value for name, value in told.items() if value is not None}
    fresh = torch._dynamo.optimize(backend=wrapper, nopython=context.fullgraph, dynamic=wrapper.dynamic, **given)
    if hasattr(context, "_isolate_recompiles_id"):  # the region stays the same: it holds what was compiled before
        fresh._isolate_recompiles_id = context._isolate_recompiles_id
    return fresh


def wrapper_like(wrapper: Any, options: dict[str, Any]) -> Any:
    """A wrapper of the same compiler backend with other options. torch 2.11, 2.13, 2.15."""
    return torch._TorchCompileWrapper(wrapper.compiler_fn, None, options, wrapper.dynamic)


def compiled_module(wrapper: Any) -> torch.nn.Module | None:
    """The module whose compiled call is running: that of ``torch.compile(module)``, ``module.compile()`` or
    ``torch.compile(module.method)`` which made ``wrapper``. None for other functions. torch 2.11, 2.13, 2.15.

    The frame that is being traced may be of a function far below: Dynamo passes over frames that it once gave up.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename == torch._dynamo.eval_frame.__file__:
            variables = frame.f_locals
            if compiler_wrapper(variables.get("callback")) is wrapper:
                fn = variables.get("fn")
                wrapped = getattr(fn, "__wrapped__", None)  # where Dynamo put a frame of its own around it
                owners = (getattr(fn, "__self__", None), wrapped, getattr(wrapped, "__self__", None))
                return next((owner for owner in owners if is_module(owner)), None)
        frame = frame.f_back
    return None


def traced_frame() -> tuple[types.CodeType, dict[str, Any]]:
    """The code and the arguments of the frame that this thread is about to trace. torch 2.11, 2.13, 2.15."""
    tx = InstructionTranslator.current_tx()
    return tx.f_code, tx.f_locals


def trace_again(code: types.CodeType) -> None:
    """Let Dynamo look at the frames of ``code`` again if it gave them up. What is compiled is kept.
    torch 2.11, 2.13, 2.15.

    Dynamo gives up a frame with a graph break in a ``for`` statement for good, and for all compiler backends. One that
    gives it up as well traces it once more at its next call.
    """
    eval_frame = torch._dynamo.eval_frame
    default = eval_frame.FrameAction.DEFAULT
    eval_frame.set_code_exec_strategy(code, eval_frame.FrameExecStrategy(default, default))


def guard_identity(name: str) -> None:
    """What is compiled of the frame that is being traced is to serve the object in its argument ``name`` alone.

    Otherwise Dynamo takes it for every other object that looks the same, such as the next layer.
    torch 2.11, 2.13, 2.15.
    """
    in_cell = name in InstructionTranslator.current_tx().f_code.co_cellvars
    source = torch._dynamo.source.LocalSource(name, is_input=True, is_derefed_cell_contents=in_cell)
    torch._dynamo.guards.install_guard(source.make_guard(torch._dynamo.guards.GuardBuilder.ID_MATCH))


def on_convert_frame(hook: Callable[..., Any]) -> None:
    """Have ``hook(original, converter, frame, *args)`` called for each frame that Dynamo may give up, to convert it.

    ``converter`` leads to the :func:`compiler_wrapper`; ``original`` returns a result for :func:`is_given_up`.
    torch 2.11, 2.13, 2.15.
    """
    wrap_method(torch._dynamo.convert_frame.ConvertFrame, "__call__", hook)


def on_compile(hook: Callable[..., Any]) -> None:
    """Have ``hook(original, compiler)`` called for each ``torch.compile``, with what it made of its ``backend=``.

    It is called before anything is traced, also where this package is imported by that call. torch 2.11, 2.13, 2.15.
    """
    wrap_method(torch._dynamo.eval_frame, "get_compiler_fn", hook)


def is_given_up(result: Any) -> bool:
    """Whether converting a frame gave nothing, so that no frame of its code is traced again. torch 2.11, 2.13, 2.15."""
    skip = torch._dynamo.types.FrameAction.SKIP
    return result.guarded_code is None and bool(result.frame_exec_strategy.cur_action == skip)


def given_up_once() -> Any:
    """The result of converting a frame that is given up this time, but not all frames of its code.

    torch 2.11, 2.13, 2.15.
    """
    return torch._dynamo.types.ConvertFrameReturn(apply_to_code=False)


def forget(wrapper: Any, codes: list[types.CodeType]) -> None:
    """Drop what was compiled for ``wrapper``, and that frames were given up, as if it had never been traced.

    Code that something else is compiled for as well is left alone: it could only be dropped together.
    torch 2.11, 2.13, 2.15.
    """
    eval_frame = torch._dynamo.eval_frame
    for code in codes:
        if all(compiler_wrapper(entry.backend) is wrapper for entry in eval_frame._debug_get_cache_entry_list(code)):
            eval_frame.reset_code(code)


def compiled_in_place_with(module: Any) -> Any:
    """What :func:`compiled_with` says, for a module after ``module.compile()``. torch 2.11, 2.13, 2.15."""
    context = _context_in_place(module)
    return None if context is None else compiler_wrapper(context.callback)


def compile_in_place_again(module: torch.nn.Module, wrapper: Any) -> None:
    """What :func:`compile_again` does, for a module after ``module.compile()``. torch 2.11, 2.13, 2.15."""
    module._compiled_call_impl = _context_like(_context_in_place(module), wrapper)(module._call_impl)


def _context_in_place(module: Any) -> Any:
    """The context that ``torch.compile`` made for ``module.compile()``; None for anything else."""
    call = vars(module).get("_compiled_call_impl") if isinstance(module, torch.nn.Module) else None
    closure = getattr(call, "__closure__", None) or ()
    names = call.__code__.co_freevars if closure else ()  # type: ignore[union-attr]
    contexts = (cell.cell_contents for name, cell in zip(names, closure, strict=True) if name == "self")
    return next((context for context in contexts if hasattr(context, "callback")), None)


def is_exported(tx: Any) -> bool:
    """Whether the frame that ``tx`` traces is that of a module in strict ``torch.export.export``.

    torch 2.11, 2.13, 2.15.
    """
    return bool(tx.output.export)


def compiler(tx: Any) -> Any:
    """What the graph of the frame that ``tx`` traces is handed to. torch 2.11, 2.13, 2.15."""
    return tx.output.compiler_fn


def set_compiler(tx: Any, compiler_fn: Any) -> None:
    """Hand the graph of the frame that ``tx`` traces to something else. torch 2.11, 2.13, 2.15."""
    tx.output.compiler_fn = compiler_fn


def is_tracing() -> bool:
    """Whether this thread is inside of the compilation of a frame. torch 2.11, 2.13, 2.15."""
    return torch._guards.TracingContext.try_get() is not None
