"""What Dynamo's private API says of the code that is traced: bytecode, loops, and where local variables are used.

Each use names the versions of torch in which it was seen to work; see ``dynamo.py``.
"""

from __future__ import annotations

import itertools
from typing import Any

# The classes a variable tracker of ours derives from, or is compared with. torch 2.11, 2.13, 2.15.
from torch._dynamo.bytecode_transformation import Instruction


def is_for_loop_over(tx: Any, iterator: Any) -> bool:
    """Whether ``tx`` is right now at the head of ``for ... in iterator``, outside a generator.

    torch 2.11, 2.13, 2.15.
    """
    generator_flags = 0x20 | 0x80 | 0x200  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR
    return (
        tx.current_instruction.opname == "FOR_ITER"
        and bool(tx.stack)
        and tx.stack[-1] is iterator
        and not tx.f_code.co_flags & generator_flags
    )


def is_get_iter(tx: Any) -> bool:
    """Whether ``tx`` executes the ``iter()`` that a ``for`` statement makes. torch 2.11, 2.13, 2.15."""
    return bool(tx.current_instruction.opname == "GET_ITER")


def loop_site(tx: Any) -> tuple[Any, int]:
    """What tells one ``for`` from all others: its code and where in it the head is. torch 2.11, 2.13, 2.15."""
    return tx.f_code, tx.current_instruction.offset


def is_of_torch(tx: Any) -> bool:
    """Whether the code that is being traced is torch's own. torch 2.11, 2.13, 2.15."""
    return "/torch/" in tx.f_code.co_filename


def loop_body(tx: Any) -> list[Instruction]:
    """The instructions of the body of the ``for`` whose head is being traced. torch 2.11, 2.13, 2.15."""
    position = {id(instruction): i for i, instruction in enumerate(tx.instructions)}
    head = tx.current_instruction
    end = position[id(head.target)]
    return list(tx.instructions[position[id(head)] + 1 : end])


def loop_lines(tx: Any) -> frozenset[str]:
    """The lines of the body of the ``for`` whose head is being traced, ``file:line``. torch 2.11, 2.13, 2.15."""
    body = loop_body(tx)
    positions = [getattr(instruction, "positions", None) for instruction in body]
    lines = [position.lineno for position in positions if position is not None]
    lines += [
        instruction.starts_line for instruction in body
    ]  # Python 3.10 knows the first instruction of a line alone
    return frozenset(f"{tx.f_code.co_filename}:{line}" for line in lines if isinstance(line, int))


def names_stored(body: list[Instruction]) -> dict[str, list[Instruction]]:
    """The local variables that a body stores, each with the instructions before its stores. torch 2.11, 2.13, 2.15."""
    stored: dict[str, list[Instruction]] = {}
    for before, instruction in zip([body[0], *body], body, strict=False):
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        if "STORE_FAST" in instruction.opname:
            # Of STORE_FAST_LOAD_FAST and STORE_FAST_STORE_FAST (Python 3.13) both names are taken as stored.
            for name in names:
                stored.setdefault(name, []).append(before)
    return stored


def times_loaded(body: list[Instruction], name: str) -> int:
    """How often a body loads a local variable. torch 2.11, 2.13, 2.15."""
    loads = [instruction.argval for instruction in body if "LOAD_FAST" in instruction.opname]
    return sum(argument.count(name) if isinstance(argument, tuple) else argument == name for argument in loads)


FIRST_IN_PLACE = 13
"""CPython's ``NB_INPLACE_ADD``: ``NB_ADD`` is 0, and the others follow in the same order."""


def is_in_place(instruction: Instruction) -> bool:
    """Whether an instruction is ``+=`` or the like (CPython's ``NB_INPLACE_*``). torch 2.11, 2.13, 2.15."""
    return instruction.opname == "BINARY_OP" and FIRST_IN_PLACE <= (instruction.arg or 0) <= 25


def is_comprehension(body: list[Instruction]) -> bool:
    """Whether a body is that of a list comprehension. torch 2.11, 2.13, 2.15."""
    return len(body) > 1 and body[-2].opname == "LIST_APPEND" and body[-1].opname.startswith("JUMP")


def below_iterator(tx: Any) -> Any:
    """What stands on the stack below the iterator of a loop, at its head: the list that a comprehension makes."""
    return tx.stack[-2].realize() if len(tx.stack) > 1 else None


def set_below_iterator(tx: Any, variable: Any) -> None:
    tx.stack[-2] = variable


def takes_slices(body: list[Instruction]) -> bool:
    """Whether a body has a slice in it. torch 2.11, 2.13, 2.15."""
    return any(i.opname in ("BUILD_SLICE", "BINARY_SLICE", "STORE_SLICE") for i in body)


def appended_to(body: list[Instruction]) -> list[str]:
    """The local variables ``name`` of which a body takes ``name.append``. torch 2.11, 2.13, 2.15."""
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
    """The names of the attributes that a body takes. torch 2.11, 2.13, 2.15."""
    return {str(i.argval) for i in body if i.opname in ("LOAD_METHOD", "LOAD_ATTR")}


_NEVER_FALLS_THROUGH = ("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")


def is_live(tx: Any, name: str) -> bool:
    """Whether local variable ``name`` may still be read, unchanged, from the current instruction on.

    Dynamo's own ``livevars_analysis`` calls every variable of a body with a ``continue`` live. torch 2.11, 2.13, 2.15.
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
