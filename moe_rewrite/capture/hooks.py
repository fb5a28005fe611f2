"""Hooks into how Dynamo traces opcodes, builtin functions and methods of tensors.

They act in the frames which this package's backend compiles, and in no other: each looks for the capture of the frame
that is being traced, and calls the original where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_rewrite.capture import dynamo, dynamo_code, dynamo_modules, static
from moe_rewrite.capture.frames import FrameCapture, current, report_refused
from moe_rewrite.capture.index import ExpertIndexVariable, subscript, truth
from moe_rewrite.capture.lists import CollectingList, CountOfPieces, concatenated, rows_of_all
from moe_rewrite.capture.modules import parameter_attribute, pick, pick_attribute, standing_for
from moe_rewrite.capture.numbers import (
    NumbersOfTensor,
    PositionsAsList,
    UnreadIterator,
    arithmetic,
    as_number,
    bincount,
    is_tally,
)
from moe_rewrite.capture.pieces import SplitTensor, put, take
from moe_rewrite.capture.rolled import RolledIterator
from moe_rewrite.loop import Refusal
from moe_rewrite.nodes import example_value
from moe_rewrite.recognise.hits import hit_mask
from moe_rewrite.recognise.provenance import clean_path, module_path


def install() -> None:
    """Hook into Dynamo, once per process."""
    dynamo.wrap_method(dynamo.TensorVariable, dynamo.iteration_method(), _iterate_tensor)
    dynamo.wrap_method(dynamo.SymNodeVariable, "evaluate_expr", _evaluate_size)
    dynamo.wrap_tensor_method("tolist", _to_list)
    dynamo.wrap_tensor_method("numpy", _to_list)
    dynamo.wrap_tensor_method("item", _to_number)
    dynamo.wrap_method(dynamo.TensorVariable, "call_method", _call_method)
    dynamo.wrap_method(dynamo.TorchInGraphFunctionVariable, "call_function", _call_torch)
    dynamo.wrap_opcodes(lambda opcode: opcode == "BINARY_OP", _binary_operator)
    dynamo.wrap_opcodes(lambda opcode: opcode == "BINARY_SLICE", _slice)
    dynamo.wrap_opcodes(lambda opcode: opcode == "LIST_APPEND", _append)
    dynamo.wrap_opcodes(lambda opcode: opcode == "UNPACK_SEQUENCE", _unpack)
    dynamo.wrap_opcodes(lambda opcode: opcode == "STORE_SLICE", _store_slice)
    dynamo.wrap_opcodes(lambda opcode: opcode == "STORE_DEREF", _store_captured)
    dynamo.wrap_opcodes(lambda opcode: opcode == "GET_ITER", _get_iterator)
    dynamo.wrap_opcodes(_takes_truth, _take_truth)
    dynamo.wrap_opcodes(lambda opcode: opcode in ("IS_OP", "CONTAINS_OP", "COMPARE_OP"), _compare)
    dynamo.wrap_method(dynamo.TensorVariable, "method_attr_requires_grad", _requires_grad)
    dynamo.wrap_method(dynamo.TensorVariable, dynamo.ATTRIBUTE_METHOD, _get_attribute)
    dynamo.wrap_method(dynamo.ConstDictVariable, "call_method", _look_up)
    for name in ("call_id", "call_hash"):
        if hasattr(dynamo.BuiltinVariable, name):
            dynamo.wrap_method(dynamo.BuiltinVariable, name, _identify)
    dynamo.wrap_method(dynamo.BuiltinVariable, "call_type", _type_of)
    dynamo.wrap_method(dynamo.BuiltinVariable, "call_len", _length)
    dynamo.wrap_method(*dynamo.getattr_method(), _get_attribute_by_name)
    dynamo.wrap_method(dynamo.BuiltinVariable, "call_zip", _zip)
    dynamo.wrap_opcodes(_formats_value, _format_value)
    dynamo.wrap_opcodes(lambda opcode: opcode == "BINARY_SUBSCR", _subscript)
    dynamo.wrap_opcodes(lambda opcode: opcode == "STORE_SUBSCR", _store_subscript)
    dynamo.wrap_method(dynamo_modules.UnspecializedNNModuleVariable, *_pick_module())
    dynamo.on_inline(_inline)
    dynamo.on_attribute_set(_set_attribute)
    for iterator in dynamo.iterators():
        dynamo.wrap_method(iterator, "__init__", _make_iterator)
        dynamo.wrap_method(iterator, dynamo.NEXT_METHOD, _advance_iterator)
    dynamo.forget_handlers()


def _tracing(tx_output: Any) -> FrameCapture | None:
    """The capture of the frame whose ``OutputGraph`` this is, while a loop's body is traced."""
    capture = current()
    return capture if capture is not None and capture.loops and capture.tx.output is tx_output else None


def _iterate_tensor(original: Callable[..., Any], hits: Any, tx: Any) -> Any:
    """``iter(tensor)``: roll the loop when the rows are the positions set in a mask of known length."""
    capture = _rolling(tx)
    loop = None if capture is None else _over_hits(tx, capture, hits)
    return original(hits, tx) if loop is None else loop


def _rolling(tx: Any) -> FrameCapture | None:
    """The capture of the frame that ``tx`` traces, if loops are rolled in it."""
    capture = current()
    return capture if capture is not None and capture.tx.output is tx.output and capture.rolls else None


def _to_list(original: Callable[..., Any], tensor: Any, tx: Any, **kwargs: Any) -> Any:
    """``tensor.tolist()``: read later, where a loop over experts may iterate it or pick from it."""
    capture = _rolling(tx)
    if capture is not None and capture.loops:
        positions = PositionsAsList.of(capture.loops[-1], tensor)
        return original(tensor, tx, **kwargs) if positions is None else positions
    if capture is None or capture.plain_lists:
        return original(tensor, tx, **kwargs)
    node = tensor.as_proxy().node
    if hit_mask(node) is None and not is_tally(node):
        return original(tensor, tx, **kwargs)
    capture.deferred = True
    return NumbersOfTensor(capture, tensor)


def _to_number(original: Callable[..., Any], tensor: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """``counts[expert].item()`` in a body."""
    capture = _tracing(tx.output)
    number = None if capture is None or args or kwargs else as_number(tx, tensor)
    return original(tensor, tx, *args, **kwargs) if number is None else number


def _call_method(original: Callable[..., Any], tensor: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """``x.split(counts.tolist())``, ``ids.bincount(minlength=num_experts)``"""
    made = None
    if name in _SPLITS and _rolling(tx):
        made = SplitTensor.of(tx, tensor, list(args), kwargs)
    elif name == "bincount" and _rolling(tx):
        made = bincount(tx, tensor, list(args), kwargs)
    return original(tensor, tx, name, args, kwargs) if made is None else made


_SPLITS = ("split", "split_with_sizes")


def _call_torch(original: Callable[..., Any], function: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """``torch.split(x, counts.tolist())``, ``torch.cat(rows_of_each_expert)``"""
    name = getattr(function.value, "__name__", "") if args and _rolling(tx) else ""
    if name in _SPLITS and not isinstance(dynamo_modules.realized(args[0]), NumbersOfTensor):
        pieces = SplitTensor.of(tx, dynamo_modules.realized(args[0]), list(args[1:]), kwargs)
        return original(function, tx, args, kwargs) if pieces is None else pieces
    if name == "bincount":
        counts = bincount(tx, dynamo_modules.realized(args[0]), list(args[1:]), kwargs)
        return original(function, tx, args, kwargs) if counts is None else counts
    items = rows_of_all(args[0]) if name in ("cat", "concat", "concatenate") else None
    if items is not None and dynamo_modules.is_along_first(items.rows, [*args[1:], *kwargs.values()]):
        return original(function, tx, [dynamo_modules.list_of(*concatenated(items))], {})
    return original(function, tx, args, kwargs)


def _binary_operator(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``start + counts[expert]`` in a body."""
    capture = _tracing(tx.output)
    return original(tx, instruction) if capture is None else arithmetic(original, tx, capture.loops[-1], instruction)


def _get_iterator(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``for expert in hits.tolist():``"""
    numbers = tx.stack[-1] if tx.stack else None
    if isinstance(numbers, SplitTensor):
        tx.stack[-1] = UnreadIterator(numbers)
        return None
    if not isinstance(numbers, NumbersOfTensor):
        return original(tx, instruction)
    loop = _over_hits(tx, numbers.frame, numbers.tensor, static.number_of_row)
    tx.stack[-1] = UnreadIterator(numbers) if loop is None else loop
    return None


def _over_hits(tx: Any, capture: FrameCapture, hits: Any, item: Any = None) -> RolledIterator | None:
    """The rolled loop over the rows of ``hits``; None where they are not the positions set in a mask.

    ``item`` is what it yields for a row, if not the row itself.
    """
    node = hits.as_proxy().node
    mask = hit_mask(node)
    if mask is None:
        return None
    path, location = capture.session.full_path(module_path(node)), dynamo.user_location(tx)
    report_refused(capture, path, location)
    loop = RolledIterator(hits, range(example_value(mask).shape[0]), capture, path, location, item)
    capture.has_rolled(tx, loop)
    if capture.session.leaves_alone(path):
        loop.refuse("experts backend 'eager' is configured for it")
    if not dynamo_code.is_get_iter(tx):
        loop.refuse("the hits are iterated by something other than a plain `for` statement")
    return loop


def _evaluate_size(original: Callable[..., Any], variable: Any, output: Any = None) -> Any:
    """A symbolic number or truth turns into a Python one."""
    capture = _tracing(output)
    if capture is not None:
        answer = capture.loops[-1].decide_number(variable)
        if answer is None:
            answer = capture.loops[-1].decide_rows(variable, output)
        if answer is not None:
            return answer
    return original(variable, output)


def _takes_truth(opcode: str) -> bool:
    return opcode in ("TO_BOOL", "UNARY_NOT") or (opcode.startswith("POP_JUMP") and "NONE" not in opcode)


def _take_truth(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``if mask.any():``, ``if len(token):`` in a body."""
    capture = _tracing(tx.output)
    if capture is not None and tx.stack:
        tx.stack[-1] = truth(tx, capture.loops[-1], tx.stack[-1])
    elif tx.stack and _rolling(tx) is not None and _is_some(tx.stack[-1]):
        tx.stack[-1] = dynamo.constant(tx, True)
    return original(tx, instruction)


def _is_some(variable: Any) -> bool:
    """Whether a variable is a list with each expert's rows, or how many there are, and not empty."""
    items = rows_of_all(variable)
    return isinstance(variable, CountOfPieces) or (items is not None and items.is_some)


def _subscript(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``tensor[..., index, ...]`` in a body, for the index as a Python number."""
    capture = _tracing(tx.output)
    container, key = (tx.stack[-2].realize(), tx.stack[-1].realize()) if capture is not None else (None, None)
    selected = None
    if capture is not None and isinstance(container, dynamo.TensorVariable):
        loop = capture.loops[-1]
        by_tensors = PositionsAsList.as_tensors(key)
        key = key if by_tensors is None else by_tensors
        selected = take(tx, loop, container, key) or subscript(tx, loop, container, key)
        if selected is None and by_tensors is not None:
            selected = dynamo.index(tx, container, list(by_tensors.items))
    elif capture is not None and isinstance(container, NumbersOfTensor) and capture.loops[-1].is_made_of_index(key):
        selected = container.at_index(tx, capture.loops[-1], key)
    elif capture is not None and isinstance(container, SplitTensor) and capture.loops[-1].is_index(key):
        selected = container.at_index(tx, capture.loops[-1])
    elif capture is not None and dynamo_modules.is_of_template(key):
        capture.loops[-1].refuse("the body asks which of the experts it has", tx)
    elif capture is not None and capture.loops[-1].is_index(key):
        selected = static.pick_row(tx, capture.loops[-1], dynamo_modules.sequence_items(container))
    if capture is None:
        selected = _part_of_numbers(tx, tx.stack[-2], tx.stack[-1])
    if selected is None:
        try:
            return original(tx, instruction)
        except dynamo.DYNAMO_ERRORS as error:
            if capture is not None:
                _refuse_pick(tx, capture.loops[-1], container, key, error)
            raise
    tx.stack[-2:] = [selected]
    return None


def _refuse_pick(tx: Any, loop: RolledIterator, container: Any, key: Any, error: Exception) -> None:
    """Say what ``container[key]`` may be, where Dynamo failed as it has no number for the index."""
    number = None if loop.path is None else loop.path.number
    picks = [item for item in (key.items if dynamo.is_tuple(key) else [key]) if loop.is_made_of_index(item)]
    # What else can be picked from may run code of the user's, which may fail for another reason.
    is_plain = isinstance(container, dynamo.TensorVariable) or dynamo_modules.sequence_items(container) is not None
    if not picks or not (is_plain or dynamo.needed_number(error, number)):
        return
    name = clean_path(dynamo_modules.source_name(container)).replace("_parameters.", "")
    what = container.python_type().__name__ + (f" (`{name}`)" if name else "")
    loop.refuse(
        f"the expert's index picks from a {what} by `{dynamo.spelled(picks[0], number)}`; it may pick from a tensor, "
        f"or a container of modules or parameters, by the index, or the index plus a number if that is never negative",
        tx,
    )


def _part_of_numbers(tx: Any, container: Any, key: Any) -> Any:
    """``offsets[1:]`` of ``offsets = counts.cumsum(0).tolist()``; None for anything else."""
    bounds = dynamo.slice_bounds(key) if isinstance(container, NumbersOfTensor) else None
    if bounds is None or not all(bound.is_python_constant() for bound in bounds):
        return None
    return container.part(tx, dynamo.slice_of(bounds))


def _store_subscript(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``tensor[..., index, ...] = value`` in a body."""
    capture = _tracing(tx.output)
    if capture is not None and isinstance(tx.stack[-2].realize(), dynamo.TensorVariable):
        value, container, key = (item.realize() for item in tx.stack[-3:])
        if _put(tx, capture.loops[-1], container, key, value):
            tx.stack[-3:] = []
            return None
    return original(tx, instruction)


def _slice(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``x[start:stop]`` in a body (Python 3.12)."""
    capture = _tracing(tx.output)
    if capture is None:
        rows = _part_of_numbers(tx, tx.stack[-3], dynamo.slice_of(list(tx.stack[-2:])))
        if rows is not None:
            tx.stack[-3:] = [rows]
            return None
    else:
        container, *bounds = (item.realize() for item in tx.stack[-3:])
        loop, key, rows = capture.loops[-1], dynamo.slice_of(bounds), None
        if isinstance(container, dynamo.TensorVariable):
            rows = take(tx, loop, container, key) or subscript(tx, loop, container, key)
        if rows is not None:
            tx.stack[-3:] = [rows]
            return None
    return original(tx, instruction)


def _store_slice(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``x[start:stop] = value`` in a body (Python 3.12)."""
    capture = _tracing(tx.output)
    if capture is not None:
        value, container, *bounds = (item.realize() for item in tx.stack[-4:])
        key = dynamo.slice_of(bounds)
        if isinstance(container, dynamo.TensorVariable) and _put(tx, capture.loops[-1], container, key, value):
            tx.stack[-4:] = []
            return None
    return original(tx, instruction)


def _store_captured(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``for expert in hits: f = lambda rows: rows @ weight[expert]``: functions share the variable."""
    capture = _tracing(tx.output)
    try:
        return original(tx, instruction)
    except dynamo.DYNAMO_ERRORS:
        if capture is not None:
            name = instruction.argval
            capture.loops[-1].refuse(f"a function captures `{name}`, which every iteration sets anew", tx)
        raise


def _put(tx: Any, loop: RolledIterator, container: Any, key: Any, value: Any) -> bool:
    """``container[key] = value`` for a key that is made of the iteration's numbers. Returns whether it is."""
    by_tensors = PositionsAsList.as_tensors(key)
    key = key if by_tensors is None else by_tensors
    if put(tx, loop, container, key, value):
        return True
    selected = subscript(tx, loop, container, key)
    if selected is not None:
        selected.call_method(tx, "copy_", [value], {})
    elif by_tensors is not None:
        container.call_method(tx, "__setitem__", [key, value], {})
    return selected is not None or by_tensors is not None


def _append(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``[expert(x) for expert in experts]``"""
    made = tx.stack[-1 - instruction.arg]
    if not isinstance(made, CollectingList):
        return original(tx, instruction)
    made.call_method(tx, "append", [tx.stack.pop()], {})
    return None


def _unpack(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``for (expert,) in hits:``"""
    index = tx.stack[-1]
    items = index.unpacked(tx, instruction.argval) if isinstance(index, ExpertIndexVariable) else None
    if items is None:
        return original(tx, instruction)
    tx.stack[-1:] = items
    return None


def _compare(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``expert is self.experts[0]``, ``expert in special`` in a body: the template is none of the experts."""
    capture = _tracing(tx.output)
    if capture is None and isinstance(tx.stack[-2], CountOfPieces):
        answer = tx.stack[-2].compared(instruction.argval, tx.stack[-1])
        tx.stack[-2:] = [dynamo.constant(tx, answer)]
        return None
    compared = [item.realize() for item in tx.stack[-2:]] if capture is not None else []
    if instruction.opname == "COMPARE_OP" or len({id(item) for item in compared}) == 1:
        asked = [item for item in compared if not isinstance(item, dynamo.TensorVariable)]
    else:
        asked = compared
    if any(map(dynamo_modules.is_of_template, asked)) and not any(map(dynamo_modules.is_none, compared)):
        assert capture is not None
        capture.loops[-1].refuse("the body asks which of the experts it has", tx)
    if capture is not None and any(map(dynamo_modules.is_format, compared)):
        capture.loops[-1].refuse("the body compares a string that is made of the expert's index", tx)
    return original(tx, instruction)


def _identify(original: Callable[..., Any], builtin: Any, tx: Any, *args: Any) -> Any:
    """``id(expert)`` in a body."""
    capture = _tracing(tx.output)
    if capture is not None and any(map(dynamo_modules.is_of_template, args)):
        capture.loops[-1].refuse("the body asks which of the experts it has", tx)
    return original(builtin, tx, *args)


def _type_of(original: Callable[..., Any], builtin: Any, tx: Any, *args: Any) -> Any:
    """``type(weight) is nn.Parameter`` in a body: there Dynamo compares sources, and a row of a table has none."""
    capture = _tracing(tx.output)
    is_tensor = len(args) == 1 and isinstance(args[0].realize(), dynamo.TensorVariable)
    if capture is not None and is_tensor and dynamo_modules.is_of_template(args[0]):
        capture.loops[-1].refuse("the body asks for the class of an expert's parameter", tx)
    return original(builtin, tx, *args)


def _length(original: Callable[..., Any], builtin: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """``if len(rows_of_each_expert):`` after a loop."""
    items = rows_of_all(args[0]) if args and _rolling(tx) is not None else None
    if items is not None and items.is_some:
        return CountOfPieces(items)
    return original(builtin, tx, *args, **kwargs)


def _zip(original: Callable[..., Any], builtin: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """``zip(experts, counts.tolist())``"""
    unread = (NumbersOfTensor, SplitTensor)
    given = [UnreadIterator(arg) if isinstance(arg, unread) else arg for arg in args]
    return original(builtin, tx, *given, **kwargs)


def _look_up(original: Callable[..., Any], table: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """``scales.get(expert)`` in a body."""
    capture = _tracing(tx.output)
    if capture is not None and any(map(dynamo_modules.is_of_template, args)):
        capture.loops[-1].refuse("the body asks which of the experts it has", tx)
    return original(table, tx, name, args, kwargs)


def _get_attribute(original: Callable[..., Any], tensor: Any, tx: Any, name: str) -> Any:
    """``weight.grad``, ``weight.is_leaf``, ``weight.scale`` in a body."""
    capture = _tracing(tx.output)
    if capture is None:
        return original(tensor, tx, name)
    if name in _OF_AUTOGRAD:
        capture.loops[-1].refuse(f"the body asks for a gradient, or what autograd knows (`{name}`)", tx)
    found = parameter_attribute(tx, capture.loops[-1], tensor, name)
    return original(tensor, tx, name) if found is None else found


def _set_attribute(
    original: Callable[..., Any], effects: Any, variable: Any, name: str, *others: Any, **named: Any
) -> Any:
    """``weight.seen = True`` in a body."""
    if dynamo_modules.is_of_parameter(variable):
        capture = current()
        if capture is not None and capture.loops and capture.tx.output.side_effects is effects:
            capture.loops[-1].refuse(f"the body sets the attribute `{name}` of an expert's parameter", capture.tx)
    return original(effects, variable, name, *others, **named)


_OF_AUTOGRAD = ("grad", "_grad", "grad_fn", "is_leaf", "retains_grad", "_base", "_version")
"""Attributes that an expert's parameter has another value of than a row of a table."""


def _get_attribute_by_name(original: Callable[..., Any], builtin: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """``getattr(self.experts, f"expert_{index}")`` in a body."""
    capture = _tracing(tx.output)
    given = args[0] if args and isinstance(args[0], list) else args
    picked = None
    if capture is not None and len(given) >= 2:
        picked = pick_attribute(tx, capture.loops[-1], given[0], given[1])
    return original(builtin, tx, *args, **kwargs) if picked is None else picked


def _requires_grad(original: Callable[..., Any], tensor: Any, tx: Any) -> Any:
    """``weight.requires_grad`` in a body: not the same for all experts where some are frozen."""
    capture = _tracing(tx.output)
    if capture is None:
        return original(tensor, tx)
    loop = capture.loops[-1]
    if loop.has_frozen_experts:
        loop.refuse("the body asks what requires a gradient, and that differs between experts", tx)
    found = standing_for(loop, tensor)
    if found is not None and found[2]:
        return dynamo.constant(tx, found[1].requires_grad)
    if not torch.is_grad_enabled() and dynamo_modules.lies_in_what_requires_grad(tensor):
        loop.refuse("the body asks what requires a gradient, of a part of a parameter and under `no_grad`", tx)
    return original(tensor, tx)


def _formats_value(opcode: str) -> bool:
    return opcode in ("FORMAT_VALUE", "FORMAT_SIMPLE")


def _format_value(original: Callable[..., Any], tx: Any, instruction: Any) -> Any:
    """``f"expert_{index}"`` in a body: a name for each index."""
    capture = _tracing(tx.output)
    if capture is not None and tx.stack and capture.loops[-1].is_index(tx.stack[-1]) and not instruction.arg:
        tx.stack[-1] = dynamo_modules.formatted(tx.stack[-1])
        return None
    return original(tx, instruction)


def _pick_module() -> tuple[str, Callable[..., Any]]:
    """The method behind ``modules[key]``, and what to do when the key is the index of a loop."""

    def subscript(original: Callable[..., Any], container: Any, tx: Any, key: Any) -> Any:
        capture = _tracing(tx.output)
        picked = None if capture is None else pick(tx, capture.loops[-1], container, key)
        return original(container, tx, key) if picked is None else picked

    def call_method(original: Callable[..., Any], container: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        capture = _tracing(tx.output) if name == "__getitem__" and len(args) == 1 else None
        picked = None if capture is None else pick(tx, capture.loops[-1], container, args[0])
        return original(container, tx, name, args, kwargs) if picked is None else picked

    if hasattr(dynamo_modules.UnspecializedNNModuleVariable, "mp_subscript_impl"):
        return "mp_subscript_impl", subscript
    return "call_method", call_method


def _inline(original: Callable[..., Any], tx: Any, function: Any, args: Any, *others: Any, **named: Any) -> Any:
    """A call of a Python function: note what is traced, as Dynamo does not guard on the code of methods."""
    capture = current()
    if capture is not None and capture.tx.output is tx.output:
        capture.inlines(tx, function, list(args))
    return original(tx, function, args, *others, **named)


def _make_iterator(original: Callable[..., Any], iterator: Any, *args: Any, **kwargs: Any) -> None:
    original(iterator, *args, **kwargs)
    iterator.moe_rewrite_scope = dynamo.current_scope()


def _advance_iterator(original: Callable[..., Any], iterator: Any, tx: Any) -> Any:
    """An iterator that is older than a rolled loop gives its body another value in every iteration."""
    capture = _tracing(tx.output)
    if capture is not None:
        path = capture.loops[-1].path
        if path is not None and getattr(iterator, "moe_rewrite_scope", 0) <= path.scope:
            capture.loops[-1].refuse("the body advances an iterator that was made before the loop", tx)
        return original(iterator, tx)
    capture = current()
    if capture is None or capture.tx.output is not tx.output or not dynamo_code.is_for_loop_over(tx, iterator):
        return original(iterator, tx)
    loop = None if getattr(iterator, "moe_rewrite_seen", False) else roll(tx, capture, iterator)
    iterator.moe_rewrite_seen = True
    if loop is None:
        return original(iterator, tx)
    dynamo_modules.exhaust(iterator)
    tx.stack[-1] = loop
    return loop.next_variable(tx)


def roll(tx: Any, capture: FrameCapture, iterator: Any) -> RolledIterator | None:
    """A rolled loop in the place of one over a range, over modules or the like; None where it is to be unrolled.

    Nothing says beforehand that such a loop goes over experts. Those that plainly do not, or cannot be rolled, are left
    out here; others are tried, and the frame is traced again where that fails.
    """
    site = dynamo_code.loop_site(tx)
    if not capture.rolls or site in capture.unrolled or dynamo_code.is_of_torch(tx):
        return None
    path = capture.session.full_path(clean_path(dynamo.module_stack_path(tx)))
    location = dynamo.user_location(tx)
    report_refused(capture, path, location)
    if capture.session.leaves_alone(path):
        return None
    carries = static.carries(tx)
    found = None if carries is None else static.elements(tx, iterator)
    if found is None or carries is None:
        what = "it goes over something else than numbers in steps, alike modules, rows of a tensor, or tuples of these"
        left = "an iteration leaves something to the next that is not a tensor that each adds to"
        refusal = Refusal(path, location, left if carries is None else what)
        capture.unsaid.append((refusal, dynamo_code.loop_lines(tx)))
        return None
    if len(found) < 2:
        return None
    values = static.index_values(found)
    hits = dynamo_modules.arange(tx, values.stop)
    lists, lines = static.lists(tx), dynamo_code.loop_lines(tx)
    loop = RolledIterator(hits, values, capture, path, location, found.at_index, site, carries, lists, lines)
    capture.has_rolled(tx, loop)
    return loop
