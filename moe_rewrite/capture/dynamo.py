"""What this package uses of ``torch._dynamo``: variables, graph values, side effects, and how methods are wrapped.

All of it is private API. Each use names the versions of torch in which it was seen to work; when torch moves, this
is the file to mend, with ``dynamo_modules.py`` (modules, guards, sources), ``dynamo_code.py`` (bytecode) and
``dynamo_calls.py`` (calls of ``torch.compile``). Nothing else uses private API of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

# The classes a variable tracker of ours derives from, or is compared with. torch 2.11, 2.13, 2.15.
from torch._dynamo import current_scope_id
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
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.symbolic_convert import (
    InliningInstructionTranslator,
    InstructionTranslator,
    InstructionTranslatorBase,
)
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
"""What Dynamo raises where it cannot trace on. torch 2.11, 2.13, 2.15."""


CONTROL_FLOW = (RestartAnalysis, SkipFrame)
"""What Dynamo raises to go on in another way. torch 2.11, 2.13, 2.15."""


class RestartFrame(TensorifyScalarRestartAnalysis):  # type: ignore[misc]
    """Makes Dynamo trace the frame again from its start.

    It derives from the one restart that passes unchanged through the call of a compiler backend.
    torch 2.11, 2.13, 2.15.
    """


def error_shown_as_is(error: Exception) -> Exception:
    """``error`` as a type that Dynamo hands to the user unwrapped (``ShortenTraceback``). torch 2.11, 2.13, 2.15."""
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


# --- what a frame is made of -----------------------------------------------------------------------------------------


def allow_data_dependent_shapes(output: Any) -> bool:
    """Let this frame's graph hold operators such as ``nonzero``. Returns whether it could not before.

    The same as ``config.capture_dynamic_output_shape_ops``, for this one compile: the config is left alone.
    torch 2.11, 2.13, 2.15.
    """
    settings = output.shape_env.settings
    output.shape_env.settings = dataclasses.replace(settings, allow_dynamic_output_shape_ops=True)
    return not settings.allow_dynamic_output_shape_ops


def abandon(tx: Any) -> None:
    """Leave a frame that will not be traced as Dynamo itself does when tracing fails. torch 2.11, 2.13, 2.15."""
    tx.output.cleanup()
    tx.output.mark_bytecode_tracing_stop()


def enclosing_operator(tx: Any) -> str | None:
    """The name of the innermost higher-order operator whose body is being traced, but for checkpoints.

    A hook has no operator, and ``autograd.Function`` has a name for it. torch 2.11, 2.13.
    """
    tracer = tx.output.current_tracer
    while tracer.parent is not None:
        target = tracer.source_target
        name = target if isinstance(target, str) else getattr(target, "__name__", str(tracer.description))
        if name not in _CHECKPOINTS:
            return name
        tracer = tracer.parent
    return None


_CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")
"""The operators of ``torch.utils.checkpoint``: AOTAutograd takes their bodies apart. torch 2.11, 2.13."""


def local_variables(tx: Any) -> dict[str, Any]:
    """The frame's local variables by name. torch 2.11, 2.13, 2.15."""
    return dict(tx.symbolic_locals)


def set_local_variable(tx: Any, name: str, variable: Any) -> None:
    tx.symbolic_locals[name] = variable


def user_location(tx: Any) -> str:
    """``file:line`` of the instruction that is being traced; of its caller where Dynamo put code of its own there."""
    while tx.parent is not None and "/torch/_dynamo/" in tx.f_code.co_filename:
        tx = tx.parent
    return f"{tx.f_code.co_filename}:{tx.lineno}"


def has_forward_gradients() -> bool:
    """Whether forward-mode gradients are being computed where Dynamo stands. torch 2.11 and 2.13."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def is_under_inference_mode(tx: Any, begin: Any) -> bool:
    """Whether the traced code is under a ``torch.inference_mode`` of its own, or has been since the node ``begin``.

    One that is around the compiled call is not seen: Dynamo traces without it. torch 2.11 and 2.13.
    """
    enter, tracer = torch.autograd.grad_mode._enter_inference_mode, tx.output.current_tracer
    while tracer is not None:
        entered = tracer.graph.find_nodes(op="call_function", target=enter)
        if any(not node.users or (node.graph is begin.graph and begin < max(node.users)) for node in entered):
            return True
        tracer = tracer.parent
    return False


def module_stack_path(tx: Any) -> str:
    """The source of the innermost module whose code is being traced; ``""`` outside of any. torch 2.11, 2.13, 2.15."""
    stack = tx.nn_module_stack
    return str(next(reversed(stack.values()))[0]) if stack else ""


def stop_iteration(tx: Any) -> NoReturn:
    raise_observed_exception(StopIteration, tx)
    raise AssertionError("unreachable")


def raise_attribute_error(tx: Any, value: Any, name: str) -> None:
    """``value`` has no attribute ``name``, in the traced code.

    torch 2.13. In 2.11 ``getattr`` with a default does not know of such an error: there nothing is raised.
    """
    if getattr_method()[0] is not BuiltinVariable:
        what = f"{type(value).__name__!r} object has no attribute {name!r}"
        raise_observed_exception(AttributeError, tx, args=[what])


def graph_break(reason: str, explanation: str, hints: list[str]) -> NoReturn:
    """End the graph here as Dynamo itself does; with ``fullgraph=True`` this is the user's error.

    torch 2.11, 2.13, 2.15.
    """
    unimplemented(gb_type=reason, context="", explanation=explanation, hints=hints)
    raise AssertionError("unreachable")


# --- side effects ----------------------------------------------------------------------------------------------------


def enter_scope() -> int:
    """From now on Dynamo refuses to change Python objects that are older than this call. Returns the scope to leave to.

    This is how Dynamo itself keeps the body of a higher-order operator free of side effects. torch 2.11, 2.13, 2.15.
    """
    scope: int = current_scope_id.current_scope_id()
    current_scope_id._current_scope_id.value = scope + 1
    return scope


def leave_scope(scope: int) -> None:
    current_scope_id._current_scope_id.value = scope


def cache_fake_results(output: Any, enabled: bool) -> bool:
    """From now on, whether what an operator gives for fake tensors is kept, for operators with equal arguments.

    Returns what it was before. What is given here is the frame's own: Dynamo makes a mode of fake tensors for each time
    that it traces a frame. torch 2.11, 2.13, 2.14.
    """
    before: bool = output.fake_mode.cache_enabled
    output.fake_mode.cache_enabled = enabled
    return before


def python_state(output: Any, scope: int) -> dict[Any, Any]:
    """What code in the frame has done so far to Python objects that were there before ``scope`` was left, as far as
    Dynamo lets it pass: attributes (some of them it checks late), globals, hooks, random numbers.
    torch 2.11, 2.13, 2.15.
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
    """Put ``op(*args)`` into the graph; arguments are variables or Python constants. torch 2.11, 2.13, 2.15."""
    variables = [arg if isinstance(arg, VariableTracker) else SourcelessBuilder.create(tx, arg) for arg in args]
    return TorchInGraphFunctionVariable(op).call_function(tx, variables, {})


def index(tx: Any, tensor: Any, keys: list[Any]) -> Any:
    """``tensor[keys]``, traced as the user's own indexing would be. torch 2.11, 2.13, 2.15."""
    return tensor.call_method(tx, "__getitem__", [tuple_of(keys)], {})


def constant(tx: Any, value: Any) -> Any:
    return ConstantVariable.create(value)


def tuple_of(items: list[Any]) -> Any:
    return TupleVariable(items)


def full_slice() -> Any:
    return SliceVariable([ConstantVariable.create(None)] * 2)


def slice_bounds(variable: Any) -> list[Any] | None:
    """The start, the stop and the step of a slice; None for other variables. torch 2.11, 2.13, 2.15."""
    variable = variable.realize()
    return [item.realize() for item in variable.items] if isinstance(variable, SliceVariable) else None


def slice_of(bounds: list[Any]) -> Any:
    """``slice(*bounds)``. torch 2.11, 2.13, 2.15."""
    return SliceVariable(bounds)


def is_tuple(variable: Any) -> bool:
    return isinstance(variable, TupleVariable)


def function_name(fn: Any) -> str:
    """The plain name of a function that reached ``__torch_function__``: ``eq`` for ``Tensor.__eq__``, ``operator.eq``,
    ``torch.eq`` ... Which of them arrives differs between versions. torch 2.11, 2.13, 2.15.
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
    """The symbols of data-dependent sizes that exist by now. torch 2.11, 2.13, 2.15."""
    shape_env = output.shape_env
    return frozenset(symbol for symbol in shape_env.var_to_range if shape_env.is_unbacked_symint(symbol))


def unknown_sizes(variable: Any, output: Any, known_before: frozenset[Any]) -> list[Any]:
    """The symbols born since ``known_before`` that a symbolic number or truth depends on. torch 2.11, 2.13, 2.15."""
    expression = getattr(getattr(variable.sym_num, "node", None), "expr", None)
    born = [s for s in getattr(expression, "free_symbols", ()) if s not in known_before]
    return [symbol for symbol in born if output.shape_env.is_unbacked_symint(symbol)]


def symbols_of(variable: Any) -> frozenset[Any]:
    """The symbols in a symbolic number. torch 2.11, 2.13, 2.15."""
    return frozenset(getattr(getattr(variable.sym_num, "node", None), "expr", variable.sym_num).free_symbols)


def is_same_number(variable: Any, number: Any) -> bool:
    """Whether ``variable`` is the symbolic number ``number``. torch 2.11, 2.13, 2.15."""
    if not isinstance(variable, SymNodeVariable) or not isinstance(variable.sym_num, torch.SymInt):
        return False
    return bool(variable.sym_num.node.expr == number.sym_num.node.expr)


def depends_only_on(variable: Any, number: Any) -> bool:
    """Whether ``variable`` is a number that is computed from the symbolic number ``number`` alone.

    torch 2.11, 2.13, 2.15.
    """
    if not isinstance(variable, SymNodeVariable) or not isinstance(variable.sym_num, torch.SymInt):
        return False
    return bool(variable.sym_num.node.expr.free_symbols == number.sym_num.node.expr.free_symbols)


def steps_of(variable: Any, number: Any) -> tuple[int, int] | None:
    """``(a, b)`` where ``variable`` is ``a * number + b``; None for others. torch 2.11, 2.13, 2.15."""
    if not isinstance(variable, SymNodeVariable) or not isinstance(variable.sym_num, torch.SymInt):
        return None
    expression, symbol = variable.sym_num.node.expr, number.sym_num.node.expr
    step = expression.coeff(symbol)
    rest = expression - step * symbol
    return (int(step), int(rest)) if step.is_Integer and rest.expand().is_Integer else None


def spelled(variable: Any, number: Any) -> str:
    """A number that is computed from ``number`` alone, with that called ``index``. torch 2.11 and 2.13."""
    expression = getattr(getattr(getattr(variable, "sym_num", None), "node", None), "expr", None)
    return "index" if expression is None or number is None else _spelled(expression, number)


def _spelled(expression: Any, number: Any) -> str:
    return re.sub(rf"\b{number.sym_num.node.expr}\b", "index", str(expression))


def needed_number(error: BaseException | None, number: Any) -> str | None:
    """What :func:`spelled` says of the number that Dynamo had to know; None where that is not why it failed.

    torch 2.11 and 2.13.
    """
    while error is not None and not isinstance(error, GuardOnDataDependentSymNode):
        error = error.__cause__ or error.__context__
    if error is None or number is None or error.cond.free_symbols != number.sym_num.node.expr.free_symbols:
        return None
    return _spelled(error.cond, number)


def _example(variable: Any) -> torch.Tensor | None:
    if not isinstance(variable, TensorVariable):
        return None
    value = variable.as_proxy().node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def is_same_memory(a: Any, b: Any) -> bool:
    """Whether two variables are one tensor: of one shape, in one place. torch 2.11, 2.13, 2.15."""
    first, second = _example(a), _example(b)
    if first is None or second is None or not is_alike_tensor(a, b):
        return False
    one_storage = bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)
    return one_storage and first.stride() == second.stride() and first.storage_offset() == second.storage_offset()


def is_alike_tensor(a: Any, b: Any) -> bool:
    """Whether two variables are tensors of one shape, dtype and device. torch 2.11, 2.13, 2.15."""
    first, second = _example(a), _example(b)
    if first is None or second is None:
        return False
    return first.shape == second.shape and first.dtype is second.dtype and first.device == second.device


def truth_of_sizes(variable: Any, output: Any, is_some: dict[Any, bool]) -> bool | None:
    """A symbolic truth, where each size in it is 0 or at least 1 as ``is_some`` says; None if that does not settle it.

    Nothing is told to the shape environment: a size of at most 1 would become the number 1 in all later shapes.
    torch 2.11, 2.13, 2.15.
    """
    if not isinstance(variable.sym_num, torch.SymBool):
        return None
    expression = variable.sym_num.node.expr
    ranges = dict(output.shape_env.var_to_range)
    for symbol, some in is_some.items():
        ranges[symbol] = ValueRanges(1, max(1, ranges[symbol].upper)) if some else ValueRanges(0, 0)
    bounds = bound_sympy(expression, ranges)
    return bool(bounds.lower) if bounds.is_singleton() else None


def condition_on(variable: Any, number: Any) -> Callable[[int], bool] | None:
    """A symbolic condition as a function of the value of ``number``, where it depends on nothing else.

    torch 2.11, 2.13, 2.15.
    """
    condition = getattr(getattr(variable.sym_num, "node", None), "expr", None)
    symbol = number.sym_num.node.expr
    if not isinstance(variable.sym_num, torch.SymBool) or getattr(condition, "free_symbols", None) != {symbol}:
        return None
    return lambda value: bool(condition.subs(symbol, value))  # type: ignore[union-attr]


def narrow(number: Any, low: int, high: int) -> None:
    """Tell the shape environment that a symbolic integer is from ``low`` to ``high``. torch 2.11, 2.13, 2.15."""
    torch._check(number.sym_num >= low)
    torch._check(number.sym_num <= high)


# --- hooks -----------------------------------------------------------------------------------------------------------


def iteration_method() -> str:
    """The method of ``TensorVariable`` that ``iter(tensor)`` ends in.

    torch 2.11 (the latter), 2.13, 2.15 (the former).
    """
    return "tp_iter_impl" if hasattr(TensorVariable, "tp_iter_impl") else "method___iter__"


NEXT_METHOD = "tp_iternext_impl" if hasattr(VariableTracker, "tp_iternext_impl") else "next_variable"
"""The method that advances an iterator. torch 2.11 (the latter), 2.13, 2.15 (the former)."""


ATTRIBUTE_METHOD = "tp_getattro_impl" if hasattr(TensorVariable, "tp_getattro_impl") else "var_getattr"
"""The method that takes an attribute. torch 2.11, 2.13 (the latter), 2.15 (the former)."""


def iterators() -> list[type]:
    """Dynamo's classes of iterators, each of which advances in a way of its own. torch 2.11, 2.13, 2.15.

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
    """Put ``wrapper(original, tx, instruction)`` in the place of the handlers of some opcodes.

    torch 2.11, 2.13, 2.15.
    """
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
    """What handles the builtin ``getattr``.

    torch 2.11 (the latter, of all arguments), 2.13, 2.15 (the former, of a list).
    """
    own = getattr(torch._dynamo.variables.builtin, "GetAttrBuiltinVariable", None)
    return (BuiltinVariable, "call_getattr") if own is None else (own, "call_function")


def on_inline(hook: Callable[..., Any]) -> None:
    """Have ``hook(original, tx, function, args, ...)`` called for each Python function that is inlined.

    torch 2.11, 2.13.
    """
    wrap_method(InliningInstructionTranslator, "build_inline_tracer", hook)


def on_attribute_set(hook: Callable[..., Any]) -> None:
    """Have ``hook(original, effects, variable, name, ...)`` called where the traced code sets an attribute.

    ``effects`` are those of the graph's output. torch 2.11, 2.13.
    """
    wrap_method(SideEffects, "store_attr", hook)


def python_function(variable: Any) -> types.FunctionType | None:
    """The function that a variable stands for; None for one that the traced code itself has made. torch 2.11, 2.13."""
    found = getattr(getattr(variable, "vt", variable), "fn", None)  # of a generator function it is one deeper
    return found if type(found) is types.FunctionType else None


def forget_handlers() -> None:
    """Have Dynamo look again for what handles builtin functions: it keeps methods that it found.

    torch 2.11, 2.13, 2.15.
    """
    BuiltinVariable.call_function_handler_cache.clear()


def wrap_method(cls: type | types.ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``cls.name`` by ``wrapper(original, self, *args)``; a second call with the same wrapper does nothing."""
    original = getattr(cls, name)
    if getattr(original, "_moe_rewrite_wrapper", None) is not wrapper:
        setattr(cls, name, _wrapped(original, wrapper))


def wrap_tensor_method(name: str, wrapper: Callable[..., Any]) -> None:
    """:func:`wrap_method` for what traces ``tensor.name()``. torch 2.11, 2.13 (a method), 2.15 (in a table)."""
    entry = getattr(TensorVariable, "tp_methods", {}).get(name)
    if entry is None:
        wrap_method(TensorVariable, f"method_{name}", wrapper)
    elif getattr(entry.handler, "_moe_rewrite_wrapper", None) is not wrapper:
        TensorVariable.tp_methods[name] = dataclasses.replace(entry, handler=_wrapped(entry.handler, wrapper))


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original, assigned=("__name__", "__doc__"), updated=())
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    method._moe_rewrite_wrapper = wrapper  # type: ignore[attr-defined]
    return method
