"""Everything this package uses of ``torch._dynamo``, and nothing else.

All of it is private API. Each use names the versions of torch in which it was seen to work; when torch moves, this
is the file to mend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

# The classes a variable tracker of ours derives from, or is compared with. torch 2.11, 2.13.
from torch._dynamo import current_scope_id
from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import (
    RestartAnalysis,
    ShortenTraceback,
    SkipFrame,
    TensorifyScalarRestartAnalysis,
    Unsupported,
    UserError,
    raise_observed_exception,
    unimplemented,
)
from torch._dynamo.symbolic_convert import InstructionTranslator, InstructionTranslatorBase
from torch._dynamo.variables import (
    ConstantVariable,
    ConstDictVariable,
    SliceVariable,
    TensorVariable,
    TupleVariable,
    UnspecializedNNModuleVariable,
)
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import SourcelessBuilder
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.functions import LocalGeneratorObjectVariable
from torch._dynamo.variables.iter import IteratorVariable
from torch._dynamo.variables.tensor import SymNodeVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._dynamo.variables.torch_function import TensorWithTFOverrideVariable
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

__all__ = [
    "BuiltinVariable",
    "ConstDictVariable",
    "InstructionTranslator",
    "IteratorVariable",
    "SymNodeVariable",
    "TensorVariable",
    "TensorWithTFOverrideVariable",
    "TorchInGraphFunctionVariable",
    "UnspecializedNNModuleVariable",
    "Unsupported",
    "VariableTracker",
]

DYNAMO_ERRORS = (Unsupported, UserError, GuardOnDataDependentSymNode)
"""What Dynamo raises where it cannot trace on. torch 2.11, 2.13."""


CONTROL_FLOW = (RestartAnalysis, SkipFrame)
"""What Dynamo raises to go on in another way. torch 2.11, 2.13."""


class RestartFrame(TensorifyScalarRestartAnalysis):  # type: ignore[misc]
    """Makes Dynamo trace the frame again from its start.

    It derives from the one restart that passes unchanged through the call of a compiler backend. torch 2.11, 2.13.
    """


def error_shown_as_is(error: Exception) -> Exception:
    """``error`` as a type that Dynamo hands to the user unwrapped (``ShortenTraceback``). torch 2.11, 2.13."""
    own = type(error)

    def remove_dynamo_frames(self: Any) -> Any:
        return self

    cls = type(
        own.__name__,
        (own, ShortenTraceback),
        {"__init__": Exception.__init__, "__module__": own.__module__, "remove_dynamo_frames": remove_dynamo_frames},
    )
    shown: Exception = cls(*error.args)
    return shown


def compiler_wrapper(compiler_fn: Any) -> Any:
    """The object that ``torch.compile`` made of ``backend=``, out of Dynamo's debug wrappers. torch 2.11, 2.13."""
    while hasattr(compiler_fn, "_torchdynamo_orig_backend"):
        compiler_fn = compiler_fn._torchdynamo_orig_backend
    return compiler_fn


# --- what a frame is made of -----------------------------------------------------------------------------------------


def allow_data_dependent_shapes(output: Any) -> bool:
    """Let this frame's graph hold operators such as ``nonzero``. Returns whether it could not before.

    The same as ``config.capture_dynamic_output_shape_ops``, for this one compile: the config is left alone.
    torch 2.11, 2.13.
    """
    settings = output.shape_env.settings
    output.shape_env.settings = dataclasses.replace(settings, allow_dynamic_output_shape_ops=True)
    return not settings.allow_dynamic_output_shape_ops


def abandon(tx: Any) -> None:
    """Leave a frame that will not be traced as Dynamo itself does when tracing fails. torch 2.11, 2.13."""
    tx.output.cleanup()
    tx.output.mark_bytecode_tracing_stop()


def is_for_loop_over(tx: Any, iterator: Any) -> bool:
    """Whether ``tx`` is right now at the head of ``for ... in iterator``, outside a generator. torch 2.11, 2.13."""
    generator_flags = 0x20 | 0x80 | 0x200  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR
    return (
        tx.current_instruction.opname == "FOR_ITER"
        and bool(tx.stack)
        and tx.stack[-1] is iterator
        and not tx.f_code.co_flags & generator_flags
    )


def is_get_iter(tx: Any) -> bool:
    """Whether ``tx`` executes the ``iter()`` that a ``for`` statement makes. torch 2.11, 2.13."""
    return bool(tx.current_instruction.opname == "GET_ITER")


def local_variables(tx: Any) -> dict[str, Any]:
    """The frame's local variables by name. torch 2.11, 2.13."""
    return dict(tx.symbolic_locals)


def set_local_variable(tx: Any, name: str, variable: Any) -> None:
    tx.symbolic_locals[name] = variable


def loop_site(tx: Any) -> tuple[Any, int]:
    """What tells one ``for`` from all others: its code and where in it the head is. torch 2.11, 2.13."""
    return tx.f_code, tx.current_instruction.offset


def is_of_torch(tx: Any) -> bool:
    """Whether the code that is being traced is torch's own. torch 2.11, 2.13."""
    return "/torch/" in tx.f_code.co_filename


def loop_body(tx: Any) -> list[Instruction]:
    """The instructions of the body of the ``for`` whose head is being traced. torch 2.11, 2.13."""
    position = {id(instruction): i for i, instruction in enumerate(tx.instructions)}
    head = tx.current_instruction
    end = position[id(head.target)]
    return list(tx.instructions[position[id(head)] + 1 : end])


def names_stored(body: list[Instruction]) -> dict[str, list[Instruction]]:
    """The local variables that a body stores, each with the instructions before its stores. torch 2.11, 2.13."""
    stored: dict[str, list[Instruction]] = {}
    for before, instruction in zip([body[0], *body], body, strict=False):
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if "STORE_FAST" in instruction.opname:
            # Of STORE_FAST_LOAD_FAST and STORE_FAST_STORE_FAST (Python 3.13) both names are taken as stored.
            for name in names:
                stored.setdefault(name, []).append(before)
    return stored


def times_loaded(body: list[Instruction], name: str) -> int:
    """How often a body loads a local variable. torch 2.11, 2.13."""
    loads = [instruction.argval for instruction in body if "LOAD_FAST" in instruction.opname]
    return sum(argument.count(name) if isinstance(argument, tuple) else argument == name for argument in loads)


FIRST_IN_PLACE = 13
"""CPython's ``NB_INPLACE_ADD``: ``NB_ADD`` is 0, and the others follow in the same order."""


def is_in_place(instruction: Instruction) -> bool:
    """Whether an instruction is ``+=`` or the like (CPython's ``NB_INPLACE_*``). torch 2.11, 2.13."""
    return instruction.opname == "BINARY_OP" and FIRST_IN_PLACE <= (instruction.arg or 0) <= 25


def is_comprehension(body: list[Instruction]) -> bool:
    """Whether a body is that of a list comprehension. torch 2.11, 2.13."""
    return len(body) > 1 and body[-2].opname == "LIST_APPEND" and body[-1].opname.startswith("JUMP")


def below_iterator(tx: Any) -> Any:
    """What stands on the stack below the iterator of a loop, at its head: the list that a comprehension makes."""
    return tx.stack[-2].realize() if len(tx.stack) > 1 else None


def set_below_iterator(tx: Any, variable: Any) -> None:
    tx.stack[-2] = variable


def takes_slices(body: list[Instruction]) -> bool:
    """Whether a body has a slice in it. torch 2.11, 2.13."""
    return any(i.opname in ("BUILD_SLICE", "BINARY_SLICE", "STORE_SLICE") for i in body)


def appended_to(body: list[Instruction]) -> list[str]:
    """The local variables ``name`` of which a body takes ``name.append``. torch 2.11, 2.13."""
    pairs = itertools.pairwise(body)
    return [
        before.argval
        for before, taken in pairs
        if taken.opname in ("LOAD_METHOD", "LOAD_ATTR")
        and taken.argval == "append"
        and before.opname.startswith("LOAD_FAST")
        and isinstance(before.argval, str)
    ]


def methods_called(body: list[Instruction]) -> set[str]:
    """The names of the attributes that a body takes. torch 2.11, 2.13."""
    return {str(i.argval) for i in body if i.opname in ("LOAD_METHOD", "LOAD_ATTR")}


_NEVER_FALLS_THROUGH = ("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")


def is_live(tx: Any, name: str) -> bool:
    """Whether local variable ``name`` may still be read, unchanged, from the current instruction on.

    Dynamo's own ``livevars_analysis`` calls every variable of a body with a ``continue`` live. torch 2.11, 2.13.
    """
    position = {id(instruction): i for i, instruction in enumerate(tx.instructions)}
    waiting, seen = [position[id(tx.current_instruction)]], set()
    while waiting:
        i = waiting.pop()
        if i in seen or i >= len(tx.instructions):
            continue
        seen.add(i)
        instruction = tx.instructions[i]
        if instruction.exn_tab_entry is not None:
            handler = position[id(instruction.exn_tab_entry.target)]
            # That of a `with` block raises the exception again, as far as the contexts go that Dynamo traces.
            if not any(i.opname == "WITH_EXCEPT_START" for i in tx.instructions[handler : handler + 2]):
                waiting.append(handler)
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if name in names and "FAST" in instruction.opname:
            if "LOAD" in instruction.opname:
                return True
            continue  # stored or deleted: what it held does not matter on this path
        if isinstance(instruction.target, Instruction):
            waiting.append(position[id(instruction.target)])
        if not instruction.opname.startswith(_NEVER_FALLS_THROUGH):
            waiting.append(i + 1)
    return False


def user_location(tx: Any) -> str:
    """``file:line`` of the instruction that is being traced; of its caller where Dynamo put code of its own there."""
    while tx.parent is not None and "/torch/_dynamo/" in tx.f_code.co_filename:
        tx = tx.parent
    return f"{tx.f_code.co_filename}:{tx.lineno}"


def module_stack_path(tx: Any) -> str:
    """The source of the innermost module whose code is being traced; ``""`` outside of any. torch 2.11, 2.13."""
    stack = tx.nn_module_stack
    return str(next(reversed(stack.values()))[0]) if stack else ""


def stop_iteration(tx: Any) -> NoReturn:
    raise_observed_exception(StopIteration, tx)
    raise AssertionError("unreachable")


def graph_break(reason: str, explanation: str, hints: list[str]) -> NoReturn:
    """End the graph here as Dynamo itself does; with ``fullgraph=True`` this is the user's error. torch 2.11, 2.13."""
    unimplemented(gb_type=reason, context="", explanation=explanation, hints=hints)
    raise AssertionError("unreachable")


# --- side effects ----------------------------------------------------------------------------------------------------


def enter_scope() -> int:
    """From now on Dynamo refuses to change Python objects that are older than this call. Returns the scope to leave to.

    This is how Dynamo itself keeps the body of a higher-order operator free of side effects. torch 2.11, 2.13.
    """
    scope: int = current_scope_id.current_scope_id()
    current_scope_id._current_scope_id.value = scope + 1
    return scope


def leave_scope(scope: int) -> None:
    current_scope_id._current_scope_id.value = scope


def python_state(output: Any, scope: int) -> dict[Any, Any]:
    """What code in the frame has done so far to Python objects that were there before ``scope`` was left, as far as
    Dynamo lets it pass: attributes (some of them it checks late), globals, hooks, random numbers. torch 2.11, 2.13.
    """
    effects = output.side_effects
    state: dict[Any, Any] = {
        (id(variable), name): id(value)
        for variable, attributes in effects.store_attr_mutations.items()
        if getattr(variable.mutation_type, "scope", 0) <= scope
        for name, value in attributes.items()
    }
    state["late"] = {k: v for k, v in getattr(effects, "deferred_attr_mutations", {}).items() if v[0] != v[1]}
    state["hooks"] = len(effects.tensor_hooks)
    state["random"] = len(output.random_calls)
    return state


@contextlib.contextmanager
def same_scope_after() -> Iterator[None]:
    """Leave every scope that was entered inside, whatever happens."""
    scope = current_scope_id.current_scope_id()
    try:
        yield
    finally:
        leave_scope(scope)


# --- graph values ----------------------------------------------------------------------------------------------------


def call_in_graph(tx: Any, op: torch._ops.OpOverload, args: list[Any]) -> Any:
    """Put ``op(*args)`` into the graph; arguments are variables or Python constants. torch 2.11, 2.13."""
    variables = [arg if isinstance(arg, VariableTracker) else SourcelessBuilder.create(tx, arg) for arg in args]
    return TorchInGraphFunctionVariable(op).call_function(tx, variables, {})


def index(tx: Any, tensor: Any, keys: list[Any]) -> Any:
    """``tensor[keys]``, traced as the user's own indexing would be. torch 2.11, 2.13."""
    return tensor.call_method(tx, "__getitem__", [tuple_of(keys)], {})


def constant(tx: Any, value: Any) -> Any:
    return ConstantVariable.create(value)


def tuple_of(items: list[Any]) -> Any:
    return TupleVariable(items)


def full_slice() -> Any:
    return SliceVariable([ConstantVariable.create(None)] * 2)


def slice_bounds(variable: Any) -> list[Any] | None:
    """The start, the stop and the step of a slice; None for other variables. torch 2.11, 2.13."""
    variable = variable.realize()
    return [item.realize() for item in variable.items] if isinstance(variable, SliceVariable) else None


def slice_of(bounds: list[Any]) -> Any:
    """``slice(*bounds)``. torch 2.11, 2.13."""
    return SliceVariable(bounds)


def is_tuple(variable: Any) -> bool:
    return isinstance(variable, TupleVariable)


def function_name(fn: Any) -> str:
    """The plain name of a function that reached ``__torch_function__``: ``eq`` for ``Tensor.__eq__``, ``operator.eq``,
    ``torch.eq`` ... Which of them arrives differs between versions. torch 2.11, 2.13.
    """
    value = fn.fn if isinstance(fn, BuiltinVariable) else getattr(fn, "value", None)
    if value is None and fn.is_python_constant():
        value = fn.as_python_constant()
    if value is None:
        value = getattr(fn, "name", None) or getattr(fn, "method_name", "")
    name = value if isinstance(value, str) else getattr(value, "__name__", str(value))
    stripped = name.removeprefix("__").removesuffix("__")
    return name if stripped in ("int", "index") else stripped


def unbacked_symbols(output: Any) -> frozenset[Any]:
    """The symbols of data-dependent sizes that exist by now. torch 2.11, 2.13."""
    shape_env = output.shape_env
    return frozenset(symbol for symbol in shape_env.var_to_range if shape_env.is_unbacked_symint(symbol))


def unknown_sizes(variable: Any, output: Any, known_before: frozenset[Any]) -> list[Any]:
    """The symbols born since ``known_before`` that a symbolic number or truth depends on. torch 2.11, 2.13."""
    expression = getattr(getattr(variable.sym_num, "node", None), "expr", None)
    born = [s for s in getattr(expression, "free_symbols", ()) if s not in known_before]
    return [symbol for symbol in born if output.shape_env.is_unbacked_symint(symbol)]


def symbols_of(variable: Any) -> frozenset[Any]:
    """The symbols in a symbolic number. torch 2.11, 2.13."""
    return frozenset(getattr(getattr(variable.sym_num, "node", None), "expr", variable.sym_num).free_symbols)


def is_same_number(variable: Any, number: Any) -> bool:
    """Whether ``variable`` is the symbolic number ``number``. torch 2.11, 2.13."""
    if not isinstance(variable, SymNodeVariable) or not isinstance(variable.sym_num, torch.SymInt):
        return False
    return bool(variable.sym_num.node.expr == number.sym_num.node.expr)


def depends_only_on(variable: Any, number: Any) -> bool:
    """Whether ``variable`` is a number that is computed from the symbolic number ``number`` alone. torch 2.11, 2.13."""
    if not isinstance(variable, SymNodeVariable) or not isinstance(variable.sym_num, torch.SymInt):
        return False
    return bool(variable.sym_num.node.expr.free_symbols == number.sym_num.node.expr.free_symbols)


def steps_of(variable: Any, number: Any) -> tuple[int, int] | None:
    """``(a, b)`` where ``variable`` is ``a * number + b``; None for others. torch 2.11, 2.13."""
    if not isinstance(variable, SymNodeVariable) or not isinstance(variable.sym_num, torch.SymInt):
        return None
    expression, symbol = variable.sym_num.node.expr, number.sym_num.node.expr
    step = expression.coeff(symbol)
    rest = expression - step * symbol
    return (int(step), int(rest)) if step.is_Integer and rest.expand().is_Integer else None


def _example(variable: Any) -> torch.Tensor | None:
    if not isinstance(variable, TensorVariable):
        return None
    value = variable.as_proxy().node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def is_same_memory(a: Any, b: Any) -> bool:
    """Whether two variables are one tensor: of one shape, in one place. torch 2.11, 2.13."""
    first, second = _example(a), _example(b)
    if first is None or second is None or not is_alike_tensor(a, b):
        return False
    one_storage = bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)
    return one_storage and first.stride() == second.stride() and first.storage_offset() == second.storage_offset()


def is_alike_tensor(a: Any, b: Any) -> bool:
    """Whether two variables are tensors of one shape, dtype and device. torch 2.11, 2.13."""
    first, second = _example(a), _example(b)
    if first is None or second is None:
        return False
    return first.shape == second.shape and first.dtype is second.dtype and first.device == second.device


def truth_of_sizes(variable: Any, output: Any, is_some: dict[Any, bool]) -> bool | None:
    """A symbolic truth, where each size in it is 0 or at least 1 as ``is_some`` says; None if that does not settle it.

    Nothing is told to the shape environment: a size of at most 1 would become the number 1 in all later shapes.
    torch 2.11, 2.13.
    """
    if not isinstance(variable.sym_num, torch.SymBool):
        return None
    expression = variable.sym_num.node.expr
    ranges = dict(output.shape_env.var_to_range)
    for symbol, some in is_some.items():
        ranges[symbol] = ValueRanges(1, max(1, ranges[symbol].upper)) if some else ValueRanges(0, 0)
    bounds = bound_sympy(expression, ranges)
    return bool(bounds.lower) if bounds.is_singleton() else None


# --- compiled modules ------------------------------------------------------------------------------------------------


def compiled_with(module: Any) -> Any:
    """The object that ``torch.compile`` made of ``backend=`` for a compiled module; None for anything else.

    torch 2.11, 2.13.
    """
    if not isinstance(module, OptimizedModule):
        return None
    return compiler_wrapper(module.dynamo_ctx.callback)


def compile_again(module: Any, wrapper: Any) -> None:
    """Compile a compiled module with another ``wrapper`` from its next call on. torch 2.11, 2.13.

    What was compiled before is kept, and used again once an equal wrapper comes back.
    """
    context = module.dynamo_ctx
    fresh = torch._dynamo.optimize(backend=wrapper, nopython=context.fullgraph, dynamic=wrapper.dynamic)
    module.dynamo_ctx = fresh
    module._initialize()


def wrapper_like(wrapper: Any, options: dict[str, Any]) -> Any:
    """A wrapper of the same compiler backend with other options. torch 2.11, 2.13."""
    return torch._TorchCompileWrapper(wrapper.compiler_fn, None, options, wrapper.dynamic)


def condition_on(variable: Any, number: Any) -> Callable[[int], bool] | None:
    """A symbolic condition as a function of the value of ``number``, where it depends on nothing else.

    torch 2.11, 2.13.
    """
    condition = getattr(getattr(variable.sym_num, "node", None), "expr", None)
    symbol = number.sym_num.node.expr
    if not isinstance(variable.sym_num, torch.SymBool) or getattr(condition, "free_symbols", None) != {symbol}:
        return None
    return lambda value: bool(condition.subs(symbol, value))  # type: ignore[union-attr]


def narrow(number: Any, low: int, high: int) -> None:
    """Tell the shape environment that a symbolic integer is from ``low`` to ``high``. torch 2.11, 2.13."""
    torch._check(number.sym_num >= low)
    torch._check(number.sym_num <= high)


# --- hooks -----------------------------------------------------------------------------------------------------------


def iteration_method() -> str:
    """The method of ``TensorVariable`` that ``iter(tensor)`` ends in. torch 2.11 (the latter), 2.13 (the former)."""
    return "tp_iter_impl" if hasattr(TensorVariable, "tp_iter_impl") else "method___iter__"


NEXT_METHOD = "tp_iternext_impl" if hasattr(VariableTracker, "tp_iternext_impl") else "next_variable"
"""The method that advances an iterator. torch 2.11 (the latter), 2.13 (the former)."""


def iterators() -> list[type]:
    """Dynamo's classes of iterators, each of which advances in a way of its own. torch 2.11, 2.13.

    Not all of them ask whether they may be changed before they advance.
    """
    found, waiting = [], [IteratorVariable, LocalGeneratorObjectVariable]
    while waiting:
        cls = waiting.pop()
        waiting += [sub for sub in cls.__subclasses__() if sub.__module__.startswith("torch._dynamo")]
        if NEXT_METHOD in vars(cls):
            found.append(cls)
    return found


def current_scope() -> int:
    scope: int = current_scope_id.current_scope_id()
    return scope


def wrap_opcodes(names: Callable[[str], bool], wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper(original, tx, instruction)`` in the place of the handlers of some opcodes. torch 2.11, 2.13."""
    waiting: list[Any] = [InstructionTranslatorBase]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        for opcode, original in enumerate(cls.dispatch_table):
            if original is None or not names(dis.opname[opcode]) or hasattr(original, "_moe_rewrite_wrapper"):
                continue
            handler = functools.wraps(original)(functools.partial(wrapper, original))
            handler._moe_rewrite_wrapper = wrapper  # type: ignore[attr-defined]
            cls.dispatch_table[opcode] = handler


def getattr_method() -> tuple[type, str]:
    """What handles the builtin ``getattr``. torch 2.11 (the latter, of all arguments), 2.13 (the former, of a list)."""
    own = getattr(torch._dynamo.variables.builtin, "GetAttrBuiltinVariable", None)
    return (BuiltinVariable, "call_getattr") if own is None else (own, "call_function")


def forget_handlers() -> None:
    """Have Dynamo look again for what handles builtin functions: it keeps methods that it found. torch 2.11, 2.13."""
    BuiltinVariable.call_function_handler_cache.clear()


def wrap_method(cls: type | types.ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``cls.name`` by ``wrapper(original, self, *args)``; a second call with the same wrapper does nothing."""
    original = getattr(cls, name)
    if getattr(original, "_moe_rewrite_wrapper", None) is wrapper:
        return

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = original.__doc__
    method._moe_rewrite_wrapper = wrapper  # type: ignore[attr-defined]
    setattr(cls, name, method)


# --- which call of torch.compile a frame belongs to, and whether it is traced at all --------------------------------


def compiled_module(wrapper: Any) -> torch.nn.Module | None:
    """The module whose compiled call is running: that of ``torch.compile(module)``, ``module.compile()`` or
    ``torch.compile(module.method)`` which made ``wrapper``. None for other functions. torch 2.11, 2.13.

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
                return next((owner for owner in owners if isinstance(owner, torch.nn.Module)), None)
        frame = frame.f_back
    return None


def traced_frame() -> tuple[types.CodeType, dict[str, Any]]:
    """The code and the arguments of the frame that this thread is about to trace. torch 2.11, 2.13."""
    tx = InstructionTranslator.current_tx()
    return tx.f_code, tx.f_locals


def trace_again(code: types.CodeType) -> None:
    """Let Dynamo look at the frames of ``code`` again if it gave them up. What is compiled is kept. torch 2.11, 2.13.

    Dynamo gives up a frame with a graph break in a ``for`` statement for good, and for all compiler backends. One that
    gives it up as well traces it once more at its next call.
    """
    eval_frame = torch._dynamo.eval_frame
    default = eval_frame.FrameAction.DEFAULT
    eval_frame.set_code_exec_strategy(code, eval_frame.FrameExecStrategy(default, default))


def guard_identity(name: str) -> None:
    """What is compiled of the frame that is being traced is to serve the object in its argument ``name`` alone.

    Otherwise Dynamo takes it for every other object that looks the same, such as the next layer. torch 2.11, 2.13.
    """
    in_cell = name in InstructionTranslator.current_tx().f_code.co_cellvars
    source = torch._dynamo.source.LocalSource(name, is_input=True, is_derefed_cell_contents=in_cell)
    torch._dynamo.guards.install_guard(source.make_guard(torch._dynamo.guards.GuardBuilder.ID_MATCH))


def on_convert_frame(hook: Callable[..., Any]) -> None:
    """Have ``hook(original, converter, frame, *args)`` called for each frame that Dynamo may give up, to convert it.

    ``converter`` leads to the :func:`compiler_wrapper`; ``original`` returns a result for :func:`is_given_up`.
    torch 2.11, 2.13.
    """
    wrap_method(torch._dynamo.convert_frame.ConvertFrame, "__call__", hook)


def on_compile(hook: Callable[..., Any]) -> None:
    """Have ``hook(original, compiler)`` called for each ``torch.compile``, with what it made of its ``backend=``.

    It is called before anything is traced, also where this package is imported by that call. torch 2.11, 2.13.
    """
    wrap_method(torch._dynamo.eval_frame, "get_compiler_fn", hook)


def is_given_up(result: Any) -> bool:
    """Whether converting a frame gave nothing, so that no frame of its code is traced again. torch 2.11, 2.13."""
    skip = torch._dynamo.types.FrameAction.SKIP
    return result.guarded_code is None and bool(result.frame_exec_strategy.cur_action == skip)


def given_up_once() -> Any:
    """The result of converting a frame that is given up this time, but not all frames of its code. torch 2.11, 2.13."""
    return torch._dynamo.types.ConvertFrameReturn(apply_to_code=False)


def forget(wrapper: Any, codes: list[types.CodeType]) -> None:
    """Drop what was compiled for ``wrapper``, and that frames were given up, as if it had never been traced.

    Code that something else is compiled for as well is left alone: it could only be dropped together. torch 2.11, 2.13.
    """
    eval_frame = torch._dynamo.eval_frame
    for code in codes:
        if all(compiler_wrapper(entry.backend) is wrapper for entry in eval_frame._debug_get_cache_entry_list(code)):
            eval_frame.reset_code(code)


def compiled_in_place_with(module: Any) -> Any:
    """What :func:`compiled_with` says, for a module after ``module.compile()``. torch 2.11, 2.13."""
    context = _context_in_place(module)
    return None if context is None else compiler_wrapper(context.callback)


def compile_in_place_again(module: torch.nn.Module, wrapper: Any) -> None:
    """What :func:`compile_again` does, for a module after ``module.compile()``. torch 2.11, 2.13."""
    fullgraph = _context_in_place(module).fullgraph
    fresh = torch._dynamo.optimize(backend=wrapper, nopython=fullgraph, dynamic=wrapper.dynamic)
    module._compiled_call_impl = fresh(module._call_impl)


def _context_in_place(module: Any) -> Any:
    """The context that ``torch.compile`` made for ``module.compile()``; None for anything else."""
    call = vars(module).get("_compiled_call_impl") if isinstance(module, torch.nn.Module) else None
    closure = getattr(call, "__closure__", None) or ()
    names = call.__code__.co_freevars if closure else ()  # type: ignore[union-attr]
    contexts = (cell.cell_contents for name, cell in zip(names, closure, strict=True) if name == "self")
    return next((context for context in contexts if hasattr(context, "callback")), None)


# --- torch.export, which traces with Dynamo, too ---------------------------------------------------------------------


def is_exported(tx: Any) -> bool:
    """Whether the frame that ``tx`` traces is that of a module in strict ``torch.export.export``. torch 2.11, 2.13."""
    return bool(tx.output.export)


def compiler(tx: Any) -> Any:
    """What the graph of the frame that ``tx`` traces is handed to. torch 2.11, 2.13."""
    return tx.output.compiler_fn


def set_compiler(tx: Any, compiler_fn: Any) -> None:
    """Hand the graph of the frame that ``tx`` traces to something else. torch 2.11, 2.13."""
    tx.output.compiler_fn = compiler_fn


def is_tracing() -> bool:
    """Whether this thread is inside of the compilation of a frame. torch 2.11, 2.13."""
    return torch._guards.TracingContext.try_get() is not None
