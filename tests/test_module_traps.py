"""Loops over modules, ranges and lists that look as if one iteration could stand for all, and cannot.

Python sees more of a loop than what is computed in it: other names of the same list, the iterator itself, which object
an expert is. Whatever is done with such a loop, the result, the gradients and every side effect are eager's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import moe_rewrite  # noqa: F401 (the backend)

E, K, HIDDEN, INNER, TOKENS = 4, 2, 6, 5, 7


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


Loop = Callable[..., Any]
"""``loop(m, x, ids, weights)``: the forward of a :class:`Block`, written out."""


@dataclasses.dataclass(frozen=True)
class Trap:
    """One loop, and how its module is made.

    Attributes:
        loop: the loop.
        make: makes an expert.
        prepare: called with the module once it is made.
        container: the class of ``m.experts``.
        stock_too: whether stock Dynamo cannot trace it with ``fullgraph=True`` either.
        fails: why it is not eager's yet; None where it is.
    """

    loop: Loop
    make: Callable[[], nn.Module] = Expert
    prepare: Callable[[Any], Any] = lambda m: None
    container: type[nn.Module] = nn.ModuleList
    stock_too: bool = False
    fails: str | None = None


TRAPS: dict[str, Trap] = {}


def trap(**kwargs: Any) -> Callable[[Loop], Loop]:
    def register(loop: Loop) -> Loop:
        TRAPS[loop.__name__] = Trap(loop, **kwargs)
        return loop

    return register


class Block(nn.Module):
    def __init__(self, trap: Trap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop = trap.loop
        self.router = nn.Linear(HIDDEN, E, bias=False)
        self.experts: Any = trap.container([trap.make() for _ in range(E)])
        self.table = nn.Parameter(torch.randn(E, HIDDEN))
        self.last: Any = None
        self.double()
        trap.prepare(self)

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.router(x).softmax(-1).topk(K)
        return self.loop(self, x, ids, weights)


def dense(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)


def by_module(m: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A plain loop over modules."""
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
    return out


def by_index(m: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A plain loop over a range."""
    out = torch.zeros_like(x)
    for i in range(E):
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, m.experts[i](x[token]) * weights[token, slot, None])
    return out


# --- other names of the list that is appended to ----------------------------------------------------------------------


@trap()
def length_by_another_name(m, x, ids, weights):
    outputs = []
    same = outputs
    for expert in m.experts:
        outputs.append(expert(x) * (1 + len(same)))
    return torch.stack(outputs).sum(0)


@trap()
def last_entry_out_of_a_tuple(m, x, ids, weights):
    outputs = [x]
    holder = (outputs,)
    for expert in m.experts:
        outputs.append(expert(holder[0][-1]))
    return outputs[-1]


@trap()
def last_entry_by_a_closure(m, x, ids, weights):
    outputs = [x]

    def last() -> Tensor:
        return outputs[-1]

    for expert in m.experts:
        outputs.append(expert(last()))
    return outputs[-1]


@trap()
def last_entry_by_an_attribute(m, x, ids, weights):
    outputs = m.last = [x]
    for expert in m.experts:
        outputs.append(expert(m.last[-1]))
    m.last = None
    return outputs[-1]


@trap()
def two_arguments_with_one_list(m, x, ids, weights):
    def fill(into: list[Tensor], look: list[Tensor]) -> None:
        for expert in m.experts:
            into.append(expert(look[-1]))

    outputs = [x]
    fill(outputs, outputs)
    return outputs[-1]


@trap()
def length_with_bound_append(m, x, ids, weights):
    outputs = [x]
    push = outputs.append
    for expert in m.experts:
        push(expert(x) * len(outputs))
    return torch.stack(outputs).sum(0)


@trap()
def one_list_under_two_names(m, x, ids, weights):
    first = second = []
    for expert in m.experts:
        first.append(expert(x))
        second.append(expert(x) * 2)
    return torch.stack(first).cumsum(0)


@trap()
def appended_by_parity(m, x, ids, weights):
    outputs = []
    for i, expert in enumerate(m.experts):
        if i % 2:
            outputs.append(expert(x))
        else:
            outputs.append(x * 2)
    return torch.stack(outputs).cumsum(0)


# --- what is appended is something else as well -----------------------------------------------------------------------


@trap()
def appends_what_was_there_before(m, x, ids, weights):
    outputs, y = [], x * 2
    for _ in m.experts:
        outputs.append(y)
    outputs[0].add_(1)
    return torch.stack(outputs).sum(0) + y


@trap()
def appends_views(m, x, ids, weights):
    outputs, y = [], x * 2
    for i in range(E):
        outputs.append(y[:, i])
    outputs[1].zero_()
    return y


@trap()
def asks_which_tensor_was_appended(m, x, ids, weights):
    outputs, y = [], x * 2
    for _ in m.experts:
        outputs.append(y)
    return sum(1 for output in outputs if output is y) + x


@trap()
def appends_a_view_to_a_second_list(m, x, ids, weights):
    outputs, parts = [], []
    for expert in m.experts:
        y = expert(x)
        outputs.append(y)
        parts.append(y[:, :2])
    outputs[0].zero_()
    return torch.stack(outputs).sum(0), torch.stack(parts)


@trap()
def changes_what_it_appended(m, x, ids, weights):
    outputs = []
    for expert in m.experts:
        y = expert(x)
        outputs.append(y)
        y.mul_(2)
    return torch.stack(outputs).sum(0)


@trap()
def appends_the_running_sum(m, x, ids, weights):
    outputs, out = [], torch.zeros_like(x)
    for expert in m.experts:
        out += expert(x)
        outputs.append(out)
    return torch.stack(outputs).sum(0)


# --- the iterator is used besides -------------------------------------------------------------------------------------


@trap()
def iterator_after_its_loop(m, x, ids, weights):
    out, iterator = torch.zeros_like(x), iter(m.experts)
    for expert in iterator:
        out = out + expert(x)
    return out + len(list(iterator))


@trap()
def range_iterator_twice(m, x, ids, weights):
    out, iterator, more = torch.zeros_like(x), iter(range(E)), 0
    for i in iterator:
        out = out + m.experts[i](x)
    for _ in iterator:
        more += 1
    return out + more


@trap()
def enumeration_twice(m, x, ids, weights):
    out, iterator, more = torch.zeros_like(x), enumerate(m.experts), 0
    for i, expert in iterator:
        out = out + expert(x) * i
    for _ in iterator:
        more += 1
    return out + more


@trap()
def iterator_inside_of_zip(m, x, ids, weights):
    out, inner = torch.zeros_like(x), iter(m.experts)
    for i, expert in zip(range(E), inner, strict=False):
        out = out + expert(x) * i
    return out + len(list(inner))


@trap()
def zip_of_one_iterator_twice(m, x, ids, weights):
    out, iterator = torch.zeros_like(x), iter(m.experts)
    for first, second in zip(iterator, iterator, strict=True):
        out = out + first(x) * second(x)
    return out


# --- which expert is it? ----------------------------------------------------------------------------------------------


@trap()
def is_it_the_first(m, x, ids, weights):
    out, share = torch.zeros_like(x), dense(x, ids, weights)
    for i, expert in enumerate(m.experts):
        y = expert(x)
        if expert is m.experts[0]:
            y = y * 3
        out = out + y * share[:, i, None]
    return out


@trap()
def is_it_among_some(m, x, ids, weights):
    out, some = torch.zeros_like(x), [m.experts[1], m.experts[2]]
    for expert in m.experts:
        out = out + expert(x) * (2 if expert in some else 1)
    return out


@trap()
def by_its_id(m, x, ids, weights):
    out, some = torch.zeros_like(x), {id(m.experts[1])}
    for expert in m.experts:
        out = out + expert(x) * (2 if id(expert) in some else 1)
    return out


class Registered(Expert):
    factors: dict[nn.Module, float] = {}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * Registered.factors.get(self, 1.0)


def _register(m: Block) -> None:
    Registered.factors = {m.experts[1]: 5.0}


class Asking(Expert):
    """Does something else once it has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (1 if self.up.weight.grad is None else 2)


class Counting(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Remembering(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(len(self.log))
        return super().forward(x) * len(self.log)


class Normed(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def every_expert(m: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out, share = torch.zeros_like(x), dense(x, ids, weights)
    for i, expert in enumerate(m.experts):
        out = out + expert(x) * share[:, i, None]
    return out


def _freeze_one(m: Block) -> None:
    m.experts[2].requires_grad_(False)


@trap(prepare=_freeze_one)
def does_it_require_a_gradient(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in m.experts:
        y = expert(x)
        out = out + (y * 2 if expert.up.weight.requires_grad else y)
    return out


def _share(m: Block) -> None:
    up = nn.Linear(HIDDEN, INNER).double()
    for expert in m.experts:
        expert.up = up


def _tie(m: Block) -> None:
    m.last = nn.Linear(HIDDEN, INNER, bias=False).double()
    m.last.weight = m.experts[1].up.weight


@trap(prepare=_tie)
def tied_to_a_module_outside(m, x, ids, weights):
    return every_expert(m, x, ids, weights) * m.last(x).sum(1, keepdim=True)


TRAPS |= {
    "registered by module": Trap(every_expert, Registered, _register),
    "asks for gradients": Trap(every_expert, Asking),
    "counts calls": Trap(every_expert, Counting),
    "keeps a log": Trap(every_expert, Remembering),
    "batch norm": Trap(every_expert, Normed),
    "one is frozen": Trap(by_module, prepare=_freeze_one),
    "one module in all": Trap(by_index, prepare=_share),
}


# --- containers with a mind of their own ------------------------------------------------------------------------------


def _other_order(m: Block) -> None:
    modules = list(m.experts)
    m.experts = nn.ModuleList()
    for i in (2, 0, 3, 1):
        m.experts.add_module(str(i), modules[i])


class FromTheEnd(nn.ModuleList):
    def _get_abs_string_index(self, idx: Any) -> str:
        return str(E - 1 - int(idx))


class Shuffled(nn.ModuleList):
    def __iter__(self) -> Any:
        return iter([self[2], self[1], self[3], self[0]])


class Shifted(nn.ModuleList):
    def __getitem__(self, idx: Any) -> Any:
        return super().__getitem__((idx + 1) % E)


TRAPS |= {
    "keys in another order": Trap(by_index, prepare=_other_order),
    "keys in another order, iterated": Trap(by_module, prepare=_other_order),
    "container that counts from the end": Trap(by_index, container=FromTheEnd),
    "container that shuffles": Trap(by_module, container=Shuffled),
    "container that shifts": Trap(by_index, container=Shifted),
}


# --- control flow -----------------------------------------------------------------------------------------------------


@trap()
def flag_that_only_a_handler_reads(m, x, ids, weights):
    out, flag = torch.zeros_like(x), False
    try:
        for i in range(E):
            out = out + m.experts[i](x)
            flag = i == 0
        raise KeyError("")
    except KeyError:
        return out + (10 if flag else 0)


@trap()
def number_that_a_handler_reads_in_the_next_iteration(m, x, ids, weights):
    out, before = torch.zeros_like(x), 0
    for i in range(E):
        scale = 1
        try:
            if i == 2:
                raise ValueError("")
            before = 5 if i == 1 else 0
        except ValueError:
            scale = before
        out = out + m.experts[i](x) * scale
    return out


@trap(stock_too=True)
def while_in_the_body(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        y, n = expert(x), torch.tensor(i)
        while (n > 0).any():
            n, y = n - 1, y * 2
        out = out + y
    return out


@trap()
def gradients_switched_by_the_index(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        torch.set_grad_enabled(i > 1)
        out = out + expert(x)
    torch.set_grad_enabled(True)
    return out


@trap()
def gradients_switched_off_on_the_way(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in m.experts:
        out = out + expert(x)
        torch.set_grad_enabled(False)
    torch.set_grad_enabled(True)
    return out + x


@trap()
def comprehension(m, x, ids, weights):
    share = dense(x, ids, weights)
    return sum([expert(x) * share[:, i, None] for i, expert in enumerate(m.experts)])


@trap(stock_too=True)
def range_past_the_last_expert(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(E + 1):
        out = out + m.experts[i](x)
    return out


@trap()
def leaves_early_and_has_an_else(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        if i == 2:
            break
        out = out + expert(x)
    else:
        out = out * 100
    return out


@trap()
def what_the_loop_left_in_its_variables(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts, 1):
        y = expert(x)
        out = out + y * i
    return out * i + expert(out) + y


@trap()
def result_of_the_iteration_before(m, x, ids, weights):
    out, before = torch.zeros_like(x), None
    for expert in m.experts:
        y = expert(x)
        if before is not None:
            out = out + y * before
        before = y
    return out


@trap()
def only_the_first_iteration(m, x, ids, weights):
    out, first = torch.zeros_like(x), True
    for expert in m.experts:
        out = out + expert(x) * (5 if first else 1)
        first = False
    return out


# --- what one iteration leaves to the next ----------------------------------------------------------------------------


@trap()
def swapped_in_each_iteration(m, x, ids, weights):
    a, b = torch.zeros_like(x), torch.ones_like(x)
    for expert in m.experts:
        a, b = b, a
        a = a.add(expert(x))
    return a - 3 * b


@trap()
def one_start_for_two_sums(m, x, ids, weights):
    a = b = torch.zeros_like(x)
    for expert in m.experts:
        y = expert(x)
        a += y
        b = b + y * 2
    return a - 3 * b


@trap()
def view_from_before_the_loop(m, x, ids, weights):
    out = torch.zeros_like(x)
    column = out[:, 0]
    for expert in m.experts:
        out += expert(x) * column[:, None].clone() + 1
    return out


@trap()
def start_of_another_shape(m, x, ids, weights):
    out = torch.zeros(1, dtype=x.dtype)
    for expert in m.experts:
        out = out + expert(x)
    return out


@trap()
def start_of_another_dtype(m, x, ids, weights):
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in m.experts:
        out = out + expert(x)
    return out


@trap()
def subtracted_from_the_new(m, x, ids, weights):
    out = torch.zeros_like(x)
    for expert in m.experts:
        out = expert(x) - out
    return out


@trap()
def the_last_one_wins(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        out = torch.where((ids == i).any(-1, keepdim=True), expert(x), out)
    return out


@trap()
def cell_that_a_function_replaces(m, x, ids, weights):
    out = torch.zeros_like(x)

    def add(y: Tensor) -> None:
        nonlocal out
        out = out + y

    for expert in m.experts:
        add(expert(x))
    return out


@trap()
def attribute_as_the_sum(m, x, ids, weights):
    m.last = torch.zeros_like(x)
    for expert in m.experts:
        m.last = m.last + expert(x)
    out, m.last = m.last, None
    return out


# --- parameters and places --------------------------------------------------------------------------------------------


@trap()
def parameter_written_before_the_loop(m, x, ids, weights):
    with torch.no_grad():
        m.experts[1].up.weight.mul_(0.5)
    return by_module(m, x, ids, weights)


@trap()
def one_expert_looked_at_before_the_loop(m, x, ids, weights):
    x = x.to(m.experts[0].up.weight.dtype)
    return by_module(m, x, ids, weights)


@trap()
def rows_of_the_experts_part(m, x, ids, weights):
    out = x.new_zeros(E, x.shape[0], HIDDEN)
    for i in range(E):
        token, slot = torch.where(ids == i)
        out[i, token] = m.experts[i](x[token]) * weights[token, slot, None]
    return out


@trap()
def rows_added_to_the_experts_part(m, x, ids, weights):
    out = x.new_zeros(E, x.shape[0], HIDDEN)
    for i in range(E):
        token, slot = torch.where(ids == i)
        out[i, token] += m.experts[i](x[token]) * weights[token, slot, None]
    return out


@trap()
def experts_from_the_end(m, x, ids, weights):
    out = torch.zeros_like(x)
    for i in range(-E, 0):
        out = out + m.experts[i](x) * m.experts[-1 - i](x) * m.table[i, 0]
    return out


# --- the index as a number --------------------------------------------------------------------------------------------

NUMBERS: dict[str, Callable[[Tensor, int], Any]] = {
    "alpha": lambda y, i: torch.add(y, y, alpha=i),
    "slope": lambda y, i: F.leaky_relu(y, 0.1 * i),
    "remainder of negative": lambda y, i: y * ((i - 2) % 3),
    "floor of negative": lambda y, i: y * ((i - 3) // 2),
    "and": lambda y, i: y * (i and 5),
    "in a set": lambda y, i: y * (2 if i in {0, 2} else 1),
    "as a name": lambda y, i: y * (2 if f"e{i}" in ("e0", "e2") else 1),
    "entry of a list": lambda y, i: y * [1.0, 2.0, 4.0, 8.0][i],
    "entry of a dict": lambda y, i: y * {0: 1.0, 1: 2.0}.get(i, 7.0),
    "compared with a float": lambda y, i: y * (2 if i < 1.5 else 1),
    "rounded": lambda y, i: y * round(i / 2),
    "slice": lambda y, i: y[:, : i + 1].sum(1, keepdim=True) + y,
}


def _with_number(compute: Callable[[Tensor, int], Any]) -> Loop:
    def loop(m: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(m.experts):
            out = out + compute(expert(x), i)
        return out

    return loop


TRAPS |= {f"number: {name}": Trap(_with_number(compute)) for name, compute in NUMBERS.items()}


# --- experts that the compiled function itself changes ----------------------------------------------------------------


class Changeable(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.scale, self.factors = torch.tanh, 2.0, [1.0, 3.0]
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.linspace(-1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(x))) * self.scale * self.factors[-1] + self.shift
        return y * 5 if self.training and self.drop.training else y


Change = Callable[[Block], Any]

CHANGES: dict[str, Change] = {}
"""What makes experts another program, or gives them other tensors."""

HARMLESS: dict[str, Change] = {}
"""What leaves the experts as they are."""


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


def harmless(function: Change) -> Change:
    HARMLESS[function.__name__] = function
    return function


def in_the_same_frame(change: Change, loop: Loop) -> Loop:
    def changed_before(m: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        change(m)
        return loop(m, x, ids, weights)

    return changed_before


@change
def parameter_of_another(m):
    m.experts[0].up.weight = m.experts[1].up.weight


@change
def parameter_in_the_register(m):
    m.experts[0].up._parameters["weight"] = m.experts[1].up.weight


@change
def parameters_computed(m):
    for expert in m.experts:
        expert.up._parameters["weight"] = expert.up.weight.detach() * 0.5


@change
def no_bias(m):
    m.experts[2].down.bias = None


@change
def no_bias_at_all(m):
    for expert in m.experts:
        expert.down.bias = None


@change
def buffer_of_one(m):
    m.experts[1].shift = m.experts[1].shift * 2


@change
def buffers(m):
    for expert in m.experts:
        expert.shift = expert.shift * 2


@change
def submodule_of_another(m):
    m.experts[0].up = m.experts[1].up


@change
def expert_twice(m):
    m.experts[0] = m.experts[1]


@change
def swapped(m):
    m.experts[0], m.experts[1] = m.experts[1], m.experts[0]


@change
def turned_round(m):
    for place, expert in enumerate(reversed(list(m.experts))):
        m.experts[place] = expert


@change
def one_less_and_one_more(m):
    m.experts.append(m.experts.pop(1))


@change
def number_of_one(m):
    m.experts[1].scale = 3.0


@change
def numbers(m):
    for expert in m.experts:
        expert.scale = 3.0


@change
def number_in_the_dict(m):
    vars(m.experts[1])["scale"] = 3.0


@change
def numbers_in_lists(m):
    for expert in m.experts:
        expert.factors.append(expert.factors[-1] + 1.0)


@change
def activations(m):
    for expert in m.experts:
        expert.act = torch.relu


@change
def forward_of_one(m):
    m.experts[0].up.forward = m.experts[1].up.forward


@change
def other_mode(m):
    m.train(not m.training)


@change
def other_mode_of_submodules(m):
    for expert in m.experts:
        expert.drop.training = not expert.drop.training


@harmless
def same_mode(m):
    m.train(m.training)


@harmless
def attributes_elsewhere(m):
    m.last = (m.last or 0) + 1


@harmless
def modules_elsewhere(m):
    m.router._buffers["count"] = m.table.detach().sum()
    m.router.training = not m.router.training


@harmless
def attribute_of_the_container(m):
    m.experts.last = 1


# torch 2.11 itself calls the forward of the class in the frame that sets another one.
TRAPS |= {
    f"changed: {name}, {loop.__name__}": Trap(
        in_the_same_frame(apply, loop), Changeable, stock_too=apply is forward_of_one
    )
    for name, apply in {**CHANGES, **HARMLESS}.items()
    for loop in (by_index, by_module)
}


@trap(make=Changeable)
def changed_between_two_loops(m, x, ids, weights):
    before = by_index(m, x, ids, weights)
    numbers(m)
    parameter_of_another(m)
    return before - 3 * by_index(m, x, ids, weights)


@trap(make=Changeable)
def changed_after_the_loop(m, x, ids, weights):
    out = by_index(m, x, ids, weights)
    numbers(m)
    buffers(m)
    return out


# --- what holds -------------------------------------------------------------------------------------------------------


def inputs(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def observe(run: Callable[[Tensor], Any], m: nn.Module, x: Tensor) -> dict[str, Any]:
    """The result, the gradients, and what the module holds afterwards; the type of what was raised."""
    x = x.clone().requires_grad_()
    try:
        result = run(x)
    except IndexError as error:
        return {"raised": type(error)}
    finally:
        gradients_on = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
    tensors = [leaf for leaf in pytree.tree_leaves(result) if leaf.requires_grad]
    if tensors:
        torch.autograd.backward(tensors, [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in tensors])
    attributes = {
        f"{path}.{name}": copy.copy(vars(module)[name])
        for path, module in m.named_modules()
        for name in ("calls", "log")
        if name in vars(module)
    }
    return {
        "gradients on": gradients_on,
        "result": pytree.tree_map(Tensor.detach, result),
        "x": x.grad,
        "gradients": {name: p.grad if p.grad is None else p.grad.clone() for name, p in m.named_parameters()},
        "state": {name: value.clone() for name, value in m.state_dict().items()},
        "attributes": attributes,
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys(), (actual, expected)
    for name, wanted in expected.items():
        given = actual[name]
        if name == "gradients":  # zeros and None are the same: what a table holds has a gradient for all experts
            present = [key for key, grad in wanted.items() if grad is not None and grad.any()]
            assert [key for key, grad in given.items() if grad is not None and grad.any()] == present
            given, wanted = ({key: those[key] for key in present} for those in (given, wanted))
        if name in ("gradients on", "raised", "attributes"):
            assert given == wanted, name
        else:
            assert_close(given, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def compiled(module: nn.Module, fullgraph: bool = False) -> Any:
    return torch.compile(module, backend="moe_rewrite", options={"inner": "eager"}, fullgraph=fullgraph)


def _params(traps: dict[str, Trap]) -> list[Any]:
    marks = {
        name: [pytest.mark.xfail(strict=True, reason=trap.fails)] if trap.fails else [] for name, trap in traps.items()
    }
    return [pytest.param(trap, id=name, marks=marks[name]) for name, trap in traps.items()]


@pytest.mark.parametrize("trap", _params(TRAPS))
def test_same_as_eager(trap: Trap) -> None:
    eager = Block(trap)
    expected = [observe(eager, eager, inputs(tokens)) for tokens in (TOKENS, 3)]
    model = Block(trap)
    fast = compiled(model)
    for tokens, wanted in zip((TOKENS, 3), expected, strict=True):
        assert_same(observe(fast, model, inputs(tokens)), wanted)


@pytest.mark.parametrize("trap", _params({name: trap for name, trap in TRAPS.items() if not trap.stock_too}))
def test_one_graph_as_stock_dynamo_makes_one(trap: Trap) -> None:
    """What stock Dynamo compiles with ``fullgraph=True``, this backend does too."""
    eager = Block(trap)
    expected = observe(eager, eager, inputs())
    model = Block(trap)
    assert_same(observe(compiled(model, fullgraph=True), model, inputs()), expected)


def rewritten(run: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said of the loops in the frames that are compiled for ``run``: of those that are rewritten, and not."""
    caplog.set_level("INFO", logger="moe_rewrite")
    caplog.clear()
    run()
    said = [record.getMessage() for record in caplog.records if record.name == "moe_rewrite"]
    return [line for line in said if not line.startswith("packed")]


@pytest.mark.parametrize("name", CHANGES)
def test_why_experts_that_the_function_changes_are_left(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Block(Trap(in_the_same_frame(CHANGES[name], by_index), Changeable))
    said = rewritten(lambda: compiled(model, fullgraph=True)(inputs()), caplog)
    assert said and all("left as it is: <root>: the compiled function itself has changed " in line for line in said)


@pytest.mark.parametrize("name", HARMLESS)
def test_changes_elsewhere_do_no_harm(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Block(Trap(in_the_same_frame(HARMLESS[name], by_index), Changeable))
    (said,) = rewritten(lambda: compiled(model, fullgraph=True)(inputs()), caplog)
    assert f"<root>: {E} experts" in said, said


GIVEN: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "of one expert": lambda name: name.startswith("experts.2.up."),
    "buffers": lambda name: name.endswith("shift"),
}
"""What ``functional_call`` is given, by name."""


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("loop", [by_index, by_module])
@pytest.mark.parametrize("given", GIVEN)
def test_functional_call(given: str, loop: Loop, pack: bool, fullgraph: bool) -> None:
    """The tensors that are given are used, and no others."""
    eager, model = (Block(Trap(loop, Changeable)) for _ in range(2))
    tensors = {name: tensor.detach() * 1.5 + 0.1 for name, tensor in model.state_dict().items() if GIVEN[given](name)}
    options = {"inner": "eager", "pack": pack}

    def call(m: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(m, tensors, (x,))

    fast = torch.compile(call, backend="moe_rewrite", options=options, fullgraph=fullgraph)
    for factor in (1.0, 2.0):
        given_now = {name: (tensor * factor).requires_grad_() for name, tensor in tensors.items()}
        results, gradients = [], []
        for run, m in ((fast, model), (call, eager)):
            results.append(run(m, given_now, inputs()))
            gradients.append(
                torch.autograd.grad(results[-1].square().sum(), list(given_now.values()), allow_unused=True)
            )
        assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
        assert_close(*([g for g in grads if g is not None] for grads in gradients), rtol=1e-9, atol=1e-11)
    assert_close(compiled(model)(inputs()), eager(inputs()), rtol=1e-9, atol=1e-11)


def test_functional_call_of_the_router(caplog: pytest.LogCaptureFixture) -> None:
    """The experts are the module's own: their loop is rewritten."""
    model = Block(Trap(by_index))
    given = {"router.weight": model.router.weight.detach() * 2}

    def call(given: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(model, given, (x,))

    fast = torch.compile(call, backend="moe_rewrite", options={"inner": "eager"}, fullgraph=True)
    (said,) = rewritten(lambda: assert_close(fast(given, inputs()), call(given, inputs())), caplog)
    assert f"{E} experts" in said and "left as it is" not in said, said


class Listed(nn.Module):
    """Experts that are parameters, in a list and under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.ParameterList(torch.randn(HIDDEN, HIDDEN) for _ in range(E))
        for i in range(E):
            self.register_parameter(f"v{i}", nn.Parameter(torch.randn(HIDDEN, HIDDEN)))
            self.register_buffer(f"b{i}", torch.randn(HIDDEN))
        self.register_buffer("calls", torch.zeros(()))
        self.last: Any = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        ids = self.last = x.topk(K).indices % E
        out = torch.zeros_like(x)
        for i in range(E):
            token, _ = torch.where(ids == i)
            out.index_add_(0, token, x[token] @ self.w[i] @ getattr(self, f"v{i}") + getattr(self, f"b{i}"))
        return out


def _list_entry(m: Listed) -> None:
    m.w[0] = m.w[1]


def _named_parameter(m: Listed) -> None:
    m.v0 = m.v1


def _named_buffer(m: Listed) -> None:
    m.b0 = m.b1 * 2


def _buffer_beside(m: Listed) -> None:
    m.calls = m.calls + 1


@pytest.mark.parametrize("apply", [_list_entry, _named_parameter, _named_buffer, _buffer_beside])
def test_parameters_that_the_function_changes(
    apply: Callable[[Listed], None], caplog: pytest.LogCaptureFixture
) -> None:
    def call(m: Listed, x: Tensor) -> Tensor:
        apply(m)
        return m(x)

    eager, model = Listed(), Listed()
    fast = torch.compile(call, backend="moe_rewrite", options={"inner": "eager"}, fullgraph=True)
    said = rewritten(lambda: assert_close(fast(model, inputs()), call(eager, inputs())), caplog)
    assert ("left as it is" in said[0]) == (apply is not _buffer_beside), said
    assert_close(fast(model, inputs(3)), call(eager, inputs(3)), rtol=1e-9, atol=1e-11)
    assert_close(model.state_dict(), eager.state_dict())


def test_more_modules_than_dynamo_compiles_a_function() -> None:
    """Layers of one class, each compiled by itself, are one compilation to stock Dynamo."""
    layers = nn.ModuleList(Block(Trap(by_index)) for _ in range(torch._dynamo.config.recompile_limit + 1))
    eager = copy.deepcopy(layers)
    for layer in layers:
        layer.compile(backend="moe_rewrite", options={"inner": "eager"}, fullgraph=True)
    for layer, wanted in zip(layers, eager, strict=True):
        assert_close(layer(inputs()), wanted(inputs()), rtol=1e-9, atol=1e-11)
