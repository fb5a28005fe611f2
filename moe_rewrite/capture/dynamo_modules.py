"""What this package uses of ``torch._dynamo`` to know what a loop iterates, and to trace one module for many.

The rest is in ``dynamo.py``; the same holds here: private API, each use with the versions it was seen to work in.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.bytecode_transformation import create_call_function
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.polyfills import builtins as builtins_polyfill
from torch._dynamo.source import AttrSource, GenericAttrSource, GlobalSource, GlobalStateSource
from torch._dynamo.variables import (
    ConstantVariable,
    ConstDictVariable,
    ListVariable,
    TensorVariable,
    TupleVariable,
    UnspecializedNNModuleVariable,
    UserDefinedClassVariable,
    UserDefinedObjectVariable,
)
from torch._dynamo.variables.base import (
    AttributeMutationExisting,
    ValueMutationExisting,
    ValueMutationNew,
    VariableTracker,
)
from torch._dynamo.variables.builder import GraphArg, wrap_fx_proxy
from torch._dynamo.variables.functions import LocalGeneratorObjectVariable
from torch._dynamo.variables.iter import IteratorVariable, ZipVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import ListIteratorVariable, RangeIteratorVariable, TupleIteratorVariable
from torch._dynamo.variables.misc import StringFormatVariable
from torch._dynamo.variables.tensor import SymNodeVariable
from torch._guards import ChainedSource, Guard
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    StatefulSymbolicContext,
    free_unbacked_symbols,
    statically_known_true,
)

from moe_rewrite import markers
from moe_rewrite.memory import rows_of, shares_memory
from moe_rewrite.tree import is_module

__all__ = ["SymNodeVariable", "TensorVariable", "UnspecializedNNModuleVariable"]


# --- what an iterator will yield -------------------------------------------------------------------------------------


def range_left(iterator: Any) -> range | None:
    """The numbers that a range iterator has yet to yield. torch 2.11, 2.13, 2.15."""
    if not isinstance(iterator, RangeIteratorVariable):
        return None
    return range(iterator.start, iterator.start + iterator.step * iterator.len, iterator.step)


def enumerated(iterator: Any) -> tuple[Any, int] | None:
    """What an ``enumerate`` that was not advanced yet goes over, and its first number. torch 2.11, 2.13, 2.15."""
    if not isinstance(iterator, LocalGeneratorObjectVariable):
        return None
    code, given = iterator.code, iterator.inline_tracer.symbolic_locals
    if code.co_filename != builtins_polyfill.__file__ or code.co_name != "enumerate" or len(given) != 2:
        return None
    return given["iterable"], given["start"].as_python_constant()


_PARAMETERS = next(code for code in nn.ParameterList.__iter__.__code__.co_consts if isinstance(code, types.CodeType))
"""The generator in ``iter(self[i] for i in range(len(self)))``. torch 2.11, 2.13, 2.15."""


def parameters_iterated(tx: Any, iterator: Any) -> Any:
    """The ``ParameterList`` that an iterator which was not advanced yet goes over. torch 2.11, 2.13, 2.15."""
    if not isinstance(iterator, LocalGeneratorObjectVariable) or iterator.code is not _PARAMETERS:
        return None
    given = iterator.inline_tracer.symbolic_locals
    container = tx.output.side_effects.load_cell(given["self"]).realize()
    left = range_left(given["implicit0"])
    return container if _is_module(container) and left == range(len(container.value)) else None


def zipped(iterator: Any) -> list[Any] | None:
    """What a ``zip`` goes over: iterables, or lists of items. torch 2.11 (``iterables``), 2.13, 2.15 (``iterable``)."""
    if not isinstance(iterator, ZipVariable):
        return None
    if hasattr(iterator, "iterables"):
        return list(iterator.iterables) if iterator.index == 0 else None
    return list(iterator.iterable.items)


_LIST_ITERATORS = (ListIteratorVariable, TupleIteratorVariable)


def items_left(iterator: Any) -> list[Any] | None:
    """What an iterator over a list, a tuple or a view of a dict has yet to yield. torch 2.11, 2.13, 2.15."""
    if isinstance(iterator, _LIST_ITERATORS):
        return list(iterator.items[iterator.index :])
    if hasattr(iterator, "_iter") and hasattr(iterator, "view_type"):  # 2.13: an iterator over a view of a dict
        left = list(copy.copy(iterator._iter))  # a copy of a dict's iterator does not advance it
        if iterator.view_type == "keys":
            return [key.vt for key in left]
        return left if iterator.view_type == "values" else [TupleVariable([key.vt, value]) for key, value in left]
    return None


def iterator_over(tx: Any, iterable: Any) -> Any:
    """``iter(iterable)``. torch 2.11, 2.13, 2.15."""
    if isinstance(iterable, list):
        return ListIteratorVariable(iterable)
    return VariableTracker.build(tx, iter).call_function(tx, [iterable], {})


def realized(variable: Any) -> Any:
    return variable.realize()


def source_name(variable: Any) -> str:
    """How the traced code comes to an object that was there before; ``""`` for others. torch 2.11, 2.13."""
    name = getattr(getattr(variable, "source", None), "name", "")
    return str(name() if callable(name) else name)


def tuple_items(variable: Any) -> list[Any] | None:
    """The items of a tuple. torch 2.11, 2.13, 2.15."""
    return list(variable.items) if type(variable) is TupleVariable else None


def tensor_of_rows(items: list[Any]) -> Any:
    """The proxy of the tensor whose rows, in order, are ``items``; None for other items. torch 2.11, 2.13, 2.15."""
    if not items or not all(type(item) is TensorVariable for item in items):
        return None
    whole = rows_of([item.as_proxy().node for item in items])
    return None if whole is None else items[0].as_proxy().tracer.proxy(whole)


def sequence_items(variable: Any) -> list[Any] | None:
    """The items of a list or a tuple that the traced code does not see change. torch 2.11, 2.13, 2.15."""
    return list(variable.items) if type(variable) in (ListVariable, TupleVariable) else None


def put_in_graph(tx: Any, op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)`` of proxies and numbers in the graph, as a variable. torch 2.11, 2.13, 2.15."""
    return wrap_fx_proxy(tx, tx.output.create_proxy("call_function", op, args, {}))


def python_number(variable: Any) -> int | None:
    """A Python integer that is known. torch 2.11, 2.13, 2.15.

    Where the traced code has found it in an object, there is a guard on its value from now on.
    """
    if isinstance(variable, LazyVariableTracker) and not variable.is_realized() and variable.peek_type() is not int:
        return None
    variable = variable.realize()
    if not isinstance(variable, ConstantVariable):
        return None
    value = variable.as_python_constant()
    return value if type(value) is int else None


# --- what the traced code has changed --------------------------------------------------------------------------------
#
# Dynamo changes Python objects after the graph ran. Until then they are as they were before the frame, and what the
# traced code has done to them is known to the variables alone.


def has_changed_anything(tx: Any) -> bool:
    """Whether the traced code has changed any object by now that is older than it: else none need be asked about.

    torch 2.11, 2.13.
    """
    effects = tx.output.side_effects
    olds = (variable for variable in effects.id_to_variable.values() if isinstance(variable.mutation_type, _OLD))
    return any(map(effects.is_modified, olds))


_OLD = (AttributeMutationExisting, ValueMutationExisting)


def changed_attributes(tx: Any, owner: nn.Module | torch.Tensor) -> list[str]:
    """The attributes that the traced code has deleted by now, or set to something else than what was there.

    Those are the ones in ``__dict__``: parameters, buffers and submodules are :func:`has_other_contents` of a register.
    torch 2.11, 2.13.
    """
    effects = tx.output.side_effects
    stored = effects.store_attr_mutations.get(effects.id_to_variable.get(id(owner)), {})
    return [name for name, new in stored.items() if name not in vars(owner) or not _is_constant(new, vars(owner)[name])]


def _is_constant(variable: Any, value: Any) -> bool:
    """Whether a variable is a plain constant, of a type whose equal values are the same. torch 2.11, 2.13."""
    if type(value) not in (bool, int, str, type(None)) or not variable.is_python_constant():
        return False
    constant = variable.as_python_constant()
    return type(constant) is type(value) and constant == value


def has_other_contents(tx: Any, container: Any, keys: Iterable[str] | None = None) -> bool:
    """Whether the traced code has changed by now what is in a dict, a list or a set; in a dict, only under ``keys``.

    torch 2.11, 2.13.
    """
    effects = tx.output.side_effects
    variable = effects.id_to_variable.get(id(container))
    if variable is None or variable.mutation_type is None or not effects.is_modified(variable):
        return False
    if keys is None or not isinstance(variable, ConstDictVariable):
        return True
    return not all(_has_entry(effects, variable, key, container) for key in keys)


def _has_entry(effects: Any, variable: Any, key: str, before: dict[str, Any]) -> bool:
    """Whether the variable of a dict has the same under a key as the dict had before. torch 2.11, 2.13."""
    now = variable.maybe_getitem_const(ConstantVariable.create(key))
    if now is None or key not in before:
        return now is None and key not in before
    if isinstance(now, LazyVariableTracker) and not now.is_realized():
        return now.peek_value() is before[key]
    if before[key] is None:
        return is_none(now.realize())
    return now.realize() is effects.id_to_variable.get(id(before[key]))


# --- modules ---------------------------------------------------------------------------------------------------------


def is_list(variable: Any) -> bool:
    """Whether a variable is a list that the traced code may change. torch 2.11, 2.13, 2.15."""
    return isinstance(variable, ListVariable) and variable.is_mutable()


def is_older_list(variable: Any) -> bool:
    """Whether a list was there before the traced code ran: its caller sees what becomes of it.

    torch 2.11, 2.13, 2.15.
    """
    return isinstance(variable.mutation_type, ValueMutationExisting)


def module_value(variable: Any) -> nn.Module | None:
    """The module that a variable stands for, without tracing more of it. torch 2.11, 2.13, 2.15."""
    if isinstance(variable, LazyVariableTracker) and not variable.is_realized():
        value = variable.peek_value()
    else:
        value = variable.realize().value if _is_module(variable.realize()) else None
    return value if is_module(value) and getattr(variable, "source", None) is not None else None


def is_nothing(variable: Any) -> bool:
    """Whether a variable stands for None, without tracing more of it. torch 2.11, 2.13, 2.15."""
    if isinstance(variable, LazyVariableTracker) and not variable.is_realized():
        return variable.peek_value() is None
    return is_none(variable.realize())


def module_at(tx: Any, source: Any) -> nn.Module | None:
    """The module that the traced code has found at a source, as it was before the frame ran. torch 2.11, 2.13."""
    found = (v.value for v in tx.output.side_effects.id_to_variable.values() if _is_module(v) and v.source == source)
    return next(found, None)


def sourced_module(variable: Any) -> tuple[Any, nn.Module] | None:
    """The source of a module, and the module; None for other variables, and for one that is not initialised.

    torch 2.11, 2.13, 2.15.
    """
    found = _is_module(variable) and variable.source is not None and is_module(variable.value)
    return (variable.source, variable.value) if found else None


def is_like(variable: Any, cls: type[nn.Module], methods: tuple[str, ...]) -> bool:
    """Whether a variable stands for a module that has all of ``methods`` from ``cls``."""
    if not _is_module(variable) or not is_module(variable.value):
        return False
    own = type(variable.value)
    return all(getattr(own, name, None) is getattr(cls, name, None) for name in methods)


def _is_module(variable: Any) -> bool:
    return isinstance(variable, UnspecializedNNModuleVariable)


def source_of_item(variable: Any) -> Any:
    """``(source of the container, key)`` of a module that was taken out of one; None for others.

    torch 2.11, 2.13, 2.15.
    """
    source = variable.source
    while source is not None and not hasattr(source, "index"):  # wrappers that only say what kind of module it is
        source = getattr(source, "base", None)
    held_in: Any = getattr(source, "base", None)
    if not isinstance(getattr(source, "index", None), str) or getattr(held_in, "member", None) != "_modules":
        return None
    return held_in.base, source.index


def guard_on(source: Any, holds: Callable[[Any], bool], what: str) -> None:
    """Trace again once ``holds(value of source)`` is false, for a module. torch 2.11, 2.13, 2.15.

    Dynamo may pass over the guards below a module whose ``__dict__`` is as it was (the setting
    ``use_recursive_dict_tags_for_guards``, which is on in 2.11). What this one looks at lies deeper. A guard that goes
    another way than by ``__dict__`` keeps Dynamo from doing so for this module and its parents.
    """

    def guard_of(source: Any, holds: Callable[[Any], bool], code: list[str]) -> Guard:
        def build(builder: GuardBuilder, guard: Guard) -> None:
            guard.set_export_info("LAMBDA_GUARD", None, code, None)
            builder.get_guard_manager(guard).add_lambda_guard(holds, code, guard.user_stack)

        return Guard(source, build)

    install_guard(guard_of(source, holds, [f"moe_rewrite: {what}"]))
    by_another_way = GenericAttrSource(source, "training")
    install_guard(guard_of(by_another_way, lambda _: True, [f"moe_rewrite: look at {what} at each call"]))


def guard_always(holds: Callable[[Any], bool], what: str) -> None:
    """Trace again once ``holds`` is false: a guard on nothing that the frame was given. torch 2.11, 2.13."""

    def build(builder: GuardBuilder, guard: Guard) -> None:
        code = [f"moe_rewrite: {what}"]
        guard.set_export_info("LAMBDA_GUARD", None, code, None)
        builder.guard_manager.root.add_lambda_guard(holds, code, guard.user_stack)

    install_guard(Guard(GlobalStateSource(), build))


def guard_on_hooks(tx: Any, called: Iterable[Any]) -> None:
    """Trace again once one of the modules that were called, without hooks, has some. They are given by their sources.

    Dynamo makes such guards for every module and leaves them all out (``skip_nnmodule_hook_guards``). torch 2.11, 2.13.
    """
    sources = set(called)
    for guard in list(tx.output.guards):
        source = guard.originating_source
        if guard.create_fn is GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT and getattr(source, "base", None) in sources:
            install_guard(source.make_guard(GuardBuilder.SEQUENCE_LENGTH))


def source_of_module(variable: Any) -> Any:
    """Where the traced code has found a module that is no template; None for other variables. torch 2.11, 2.13."""
    found = sourced_module(variable.realize()) if is_realized(variable) else None
    return None if found is None or is_of_template(variable) else found[0]


def is_realized(variable: Any) -> bool:
    return not isinstance(variable, LazyVariableTracker) or variable.is_realized()


def classes_used(tx: Any) -> Iterable[type]:
    """The classes of all objects that the traced code has come to by now. torch 2.11, 2.13."""
    return classes_of(tx.output.side_effects.id_to_variable.values())


def classes_of(variables: Iterable[Any]) -> Iterable[type]:
    """The classes of those variables that stand for objects of classes, and the classes that others stand for.

    None of them is traced for that. torch 2.11, 2.13.
    """
    for variable in variables:
        if not is_realized(variable):
            continue
        variable = variable.realize()
        if isinstance(variable, UserDefinedObjectVariable):
            yield type(variable.value)
        elif isinstance(variable, UserDefinedClassVariable) and isinstance(variable.value, type):
            yield variable.value


def global_variable(tx: Any, prefix: str, value: Any) -> Any:
    """A variable for a Python object that the compiled code will find among its globals. torch 2.11, 2.13, 2.15.

    The shape of a tensor is that of a parameter: not dynamic.
    """
    if isinstance(value, torch.Tensor):
        value._dynamo_static_indices = set(range(value.dim()))  # type: ignore[attr-defined]  # as `mark_static` sets it
    return VariableTracker.build(tx, value, GlobalSource(_global_name(tx.output, prefix, value))).realize()


def _global_name(output: Any, prefix: str, value: Any) -> str:
    """What the global is called that holds an object for the code that is compiled. torch 2.11, 2.13, 2.15.

    The name is the same in the next process, as the key of AOTAutograd's cache holds the sources of a graph's inputs.
    Dynamo's ``install_global_by_id`` uses the address.
    """
    names: dict[int, str] = vars(output).setdefault("_moe_rewrite_globals", {})
    if id(value) not in names:
        possible = (f"{prefix}_{number}_c{output.compile_id}" for number in itertools.count())
        names[id(value)] = next(name for name in possible if name not in output.global_scope)
        output.install_global_unsafe(names[id(value)], value)
    return names[id(value)]


@dataclasses.dataclass(frozen=True)
class TableSource(ChainedSource):  # type: ignore[misc]
    """Where the compiled code gets a tensor: from a function among its globals, by an object and a name.

    So one compiled function gets the tensors of each object that it is called for. There are no guards on such a
    source. torch 2.11, 2.13, 2.15.
    """

    function: str
    member: str

    def reconstruct(self, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.append_output(codegen.create_load_global(self.function, add=True)))
        codegen(self.base)
        codegen.append_output(codegen.create_load_const(self.member))
        codegen.extend_output(create_call_function(2, False))

    @property
    def _name_template(self) -> str:
        return f"G[{self.function!r}]({{0}}, {self.member!r})"


def input_from(tx: Any, base: Any, function: Any, name: str, example: torch.Tensor, is_static: bool) -> Any:
    """An input of the graph that is ``function(object at base, name)`` at each call. torch 2.11, 2.13, 2.15.

    Args:
        base: the source of the object.
        example: the tensor for the call that is traced. All that come later must look like it; no guard checks that.
        is_static: whether it is in the same memory at each call for the same object, as a parameter is.
    """
    source = TableSource(base, _global_name(tx.output, "moe_rewrite_tables", function), name)
    sizes = StatefulSymbolicContext([DimDynamic.STATIC] * example.dim(), tensor_source=source)
    fake = tx.fake_mode.from_tensor(example, source=source, symbolic_context=sizes)
    # AOTAutograd makes a fake tensor of it anew, and would have symbols for its sizes.
    tx.output.tracing_context.tensor_to_context[example] = sizes
    label = re.sub(r"[^a-zA-Z0-9]+", "_", f"moe_rewrite_table_{name}")
    proxy = tx.output.root_tracer.create_graph_input(label, type(example), fake, source=source)
    variable = wrap_fx_proxy(tx, proxy, example_value=fake, source=source)
    proxy.node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"} if is_static else {}
    proxy.node.meta["grapharg"] = GraphArg(source, example, False, fake)
    return variable


def stand_in(tx: Any, value: torch.Tensor, variable: Any) -> None:
    """From now on, tracing finds ``variable`` where it comes to the tensor ``value``. torch 2.11, 2.13, 2.15."""
    effects = tx.output.side_effects
    variable.class_type = type(value)  # `isinstance(weight, nn.Parameter)`
    variable.moe_rewrite_stands_in = True
    variable.as_proxy().node.meta.setdefault("tensor_dict", {})  # where Dynamo notes things about a parameter
    effects.id_to_variable[id(value)] = variable
    effects.keepalive.append(value)


def attribute_of(tx: Any, tensor: torch.Tensor, name: str) -> Any:
    """The variable of what was set on a tensor of a template. torch 2.11, 2.13."""
    source = GlobalSource(_global_name(tx.output, "moe_rewrite_parameter", tensor))
    return VariableTracker.build(tx, vars(tensor)[name], AttrSource(source, name)).realize()


def unchanged_by_calls(variable: Any) -> tuple[torch.fx.Node, bool]:
    """The node of a tensor, behind calls that may have returned their tensor itself; and whether they all have.

    They do where there is nothing to do. torch 2.11, 2.13.
    """
    node, is_itself = variable.as_proxy().node, True
    while node.op == "call_method" and node.target in _RETURN_THEMSELVES:
        made, given = (n.meta["example_value"] for n in (node, node.args[0]))
        if (made.dtype, made.device) != (given.dtype, given.device):
            break
        # `copy=True`, or another memory format
        is_itself = is_itself and not node.kwargs and len(node.args) <= 2 and given.is_contiguous()
        node = node.args[0]
    return node, is_itself


_RETURN_THEMSELVES = frozenset(
    (
        *("to", "type", "type_as", "contiguous", "cpu", "cuda", "xpu", "resolve_conj", "resolve_neg", "positive"),
        *("float", "double", "half", "bfloat16", "int", "long", "short", "char", "byte", "bool"),
        *("cfloat", "cdouble", "chalf"),
    )
)
"""Methods of a tensor that may return it."""


def is_same_value(variable: Any, node: torch.fx.Node) -> bool:
    """Whether a variable is a node's value. torch 2.11, 2.13."""
    return variable.as_proxy().node is node


def lies_in_what_requires_grad(variable: Any) -> bool:
    """Whether a tensor is a part of what an index has picked from something that requires a gradient.

    In eager it is a view of that, and says of itself what that says, also where gradients are switched off.
    torch 2.11, 2.13.
    """
    node = variable.as_proxy().node
    picked = (other for other in node.graph.nodes if other.target in (markers.select, markers.select_shifted))
    asked = (other for other in picked if other.args[0].meta["example_value"].requires_grad)
    return any(other is node or shares_memory(other, node) for other in asked)


def end_stand_in(tx: Any, value: torch.Tensor) -> None:
    """Undo :func:`stand_in`. torch 2.11, 2.13, 2.15.

    Dynamo looks up what it keeps alive after the body of each higher-order operator, so both have to go.
    """
    effects = tx.output.side_effects
    effects.id_to_variable.pop(id(value), None)
    effects.keepalive = [kept for kept in effects.keepalive if kept is not value]


def graph_input(node: Any) -> Any:
    """The Python object that a placeholder stands for; None where that is not known. torch 2.11, 2.13, 2.15."""
    argument = node.meta.get("grapharg")
    return getattr(argument, "example", None) if argument is not None else None


def arange(tx: Any, length: int, device: torch.device | None = None) -> Any:
    """``torch.arange(length, device=device)`` in the graph. torch 2.11, 2.13, 2.15."""
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    named = {} if device is None else {"device": VariableTracker.build(tx, device)}
    return TorchInGraphFunctionVariable(torch.arange).call_function(tx, [ConstantVariable.create(length)], named)


def is_along_first(tensor: Any, dims: list[Any]) -> bool:
    """Whether ``dims``, what a function was given for its ``dim``, says the first dimension. torch 2.11, 2.13, 2.15."""
    if not dims:
        return True
    dim = dims[0].as_python_constant() if len(dims) == 1 and dims[0].is_python_constant() else None
    return isinstance(dim, int) and dim % tensor.ndim == 0


def full(tx: Any, number: int) -> Any:
    """``torch.full((), number)`` in the graph. torch 2.11, 2.13, 2.15."""
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    given = [TupleVariable([]), ConstantVariable.create(number)]
    return TorchInGraphFunctionVariable(torch.full).call_function(tx, given, {})


def size_of(tx: Any, tensor: torch.fx.Node) -> Any:
    """``tensor.shape[0]`` of a node of the graph. torch 2.11, 2.13, 2.15."""
    size = tensor.meta["example_value"].shape[0]
    if isinstance(size, int):
        return ConstantVariable.create(size)
    return put_in_graph(tx, torch.ops.aten.sym_size.int, tx.output.current_tracer.proxy(tensor), 0)


def built(tx: Any, value: Any) -> Any:
    """A variable of a Python object that is a constant to Dynamo. torch 2.11, 2.13, 2.15."""
    return VariableTracker.build(tx, value)


def compute(tx: Any, function: Any, *args: Any) -> Any:
    """``function(*args)`` for a builtin function of variables and numbers. torch 2.11, 2.13, 2.15."""
    given = [arg if isinstance(arg, VariableTracker) else ConstantVariable.create(arg) for arg in args]
    return VariableTracker.build(tx, function).call_function(tx, given, {})


def element_count(variable: Any) -> Any:
    """How many elements a computed tensor has; None for other variables. torch 2.11, 2.13, 2.15."""
    if type(variable) is not TensorVariable or variable.source is not None:
        return None
    return variable.as_proxy().node.meta["example_value"].numel()


def formatted(variable: Any) -> Any:
    """``f"{variable}"``, as a string that is not known yet. torch 2.11, 2.13, 2.15."""
    return StringFormatVariable("{}", [variable], {})


def is_format(variable: Any) -> bool:
    """Whether a variable is a string that is not known yet. torch 2.11, 2.13, 2.15."""
    return isinstance(variable, StringFormatVariable)


def names_of(variable: Any, is_index: Callable[[Any], bool]) -> Callable[[int], str] | None:
    """A string that is made of an index, as a function of the index; None for others. torch 2.11, 2.13, 2.15."""
    if not isinstance(variable, StringFormatVariable) or variable.sym_kwargs:
        return None
    form, parts = variable.format_string, list(variable.sym_args)
    if not all(part.is_python_constant() or is_index(part) for part in parts):
        return None
    known = [None if is_index(part) else part.as_python_constant() for part in parts]
    return lambda index: form.format(*(index if part is None else part for part in known))


def list_of(*items: Any) -> Any:
    """``[*items]``. torch 2.11, 2.13, 2.15."""
    return ListVariable(list(items), mutation_type=ValueMutationNew())


def has_unknown_length(variable: Any) -> bool:
    """Whether only run time knows how many rows a tensor has. torch 2.11, 2.13, 2.15."""
    node = variable.realize().as_proxy().node
    value = node.meta["example_value"]
    return bool(value.dim()) and bool(free_unbacked_symbols(value.shape[0]))


def is_of_length(tensor: Any, positions: Any) -> bool:
    """Whether a tensor has a row for each of some positions. torch 2.11, 2.13, 2.15."""
    rows, wanted = (v.realize().as_proxy().node.meta["example_value"].shape[0] for v in (tensor, positions))
    return bool(statically_known_true(rows == wanted))


def length_of(argument: Any) -> Any:
    """The size that an argument of a node is. torch 2.11, 2.13, 2.15."""
    return argument.meta["example_value"] if isinstance(argument, torch.fx.Node) else argument


def is_older(variable: Any, mark: Any) -> bool:
    """Whether a tensor lies in memory that was there before the node of ``mark``. torch 2.11, 2.13, 2.15."""
    node, begin = variable.as_proxy().node, mark.as_proxy().node
    before = True
    for other in begin.graph.nodes:
        before = before and other is not begin
        # A row that was picked by the index is a part of something older, though its fake tensor is not.
        picked = other.target in (markers.select, markers.select_shifted)
        if (before or picked) and (other is node or shares_memory(other, node)):
            return True
    return False


def exhaust(iterator: Any) -> None:
    """Leave an iterator, and those that it goes over, as after their last item. torch 2.11, 2.13, 2.15."""
    if isinstance(iterator, RangeIteratorVariable):
        iterator.start, iterator.len = iterator.start + iterator.step * iterator.len, 0
    elif isinstance(iterator, _LIST_ITERATORS):
        iterator.index, iterator.is_exhausted = len(iterator.items), True
    elif isinstance(iterator, ZipVariable):
        for part in zipped(iterator) or []:
            exhaust(part)
        if hasattr(iterator, "iterables"):
            iterator.index = max((len(part) for part in iterator.iterables if isinstance(part, list)), default=0)
    elif isinstance(iterator, LocalGeneratorObjectVariable):
        over = enumerated(iterator)
        if over is not None and is_iterator(realized(over[0])):
            exhaust(realized(over[0]))
        if hasattr(iterator.inline_tracer, "frame_state"):  # 2.15
            iterator.inline_tracer.frame_state = torch._dynamo.utils.FrameState.FRAME_CLEARED
        else:
            iterator.inline_tracer.generator_exhausted = True
    elif hasattr(iterator, "_iter"):
        iterator._iter = iter(())


def is_iterator(variable: Any) -> bool:
    """Whether a variable is an iterator: going over it changes it. torch 2.11, 2.13, 2.15."""
    return isinstance(variable, (IteratorVariable, LocalGeneratorObjectVariable))


def is_of_parameter(variable: Any) -> bool:
    """Whether a variable is a tensor that is traced in the place of many parameters."""
    return bool(getattr(variable, "moe_rewrite_stands_in", False))


def is_of_template(variable: Any) -> bool:
    """Whether a variable is a module or a parameter that is traced in the place of many. torch 2.11, 2.13, 2.15."""
    variable = variable.realize() if isinstance(variable, VariableTracker) else None
    if is_of_parameter(variable):
        return True
    return _is_module(variable) and TEMPLATE in source_name(variable)


def is_none(variable: Any) -> bool:
    return bool(variable.is_python_constant() and variable.as_python_constant() is None)


TEMPLATE = "moe_rewrite_template"
"""What the globals are called that hold templates."""


def any_share_memory(variables: list[Any]) -> bool:
    """Whether two of some tensors lie in the same memory. torch 2.11, 2.13, 2.15."""
    nodes = [variable.as_proxy().node for variable in variables]
    return any(shares_memory(a, b) for a, b in itertools.combinations(nodes, 2))
