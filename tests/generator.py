"""A grammar of experts loops: dispatch x rows x combine x storage, rendered as the modules that users write.

:func:`programs` draws a :class:`Program`, :func:`source` renders it, and :func:`check` runs it in Python and compiled.
A loop may be rewritten or refused with a reason; a result, a gradient or a side effect of its own is a :class:`Defect`.

    python tests/generator.py --count 500 > docs/generated-loops.md     # the page on what is rewritten
    python tests/generator.py --count 2500 --seed 7 --defects defects/  # a long run; each defect made small
    python tests/generator.py --merge defects/                          # all runs with that folder, as one page
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import linecache
import logging
import random
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from hypothesis import strategies as st
from torch import Tensor, nn

HIDDEN, INNER = 4, 6

# --- the grammar ------------------------------------------------------------------------------------------------------
# The first of each is the plainest: that is where a failing program shrinks to.

ROUTINGS = ("softmax", "given", "sigmoid", "argmax", "sorted", "dropped", "dropped to -1")
"""Where ids and weights come from: arguments, or scores of the module, some of them dropped for being small."""
GIVEN_IDS = ("distinct", "repeated", "one idle", "all on one", "sentinels", "negative")
USUAL_TOKENS = (5, 9, 4, 5, 9, 9, 1, 0)

HITS, RANGE, MODULES, ROWS = "hits", "range", "modules", "rows"
LOOPS = (HITS, RANGE, MODULES, ROWS)
"""``for e in mask.nonzero()``, ``range(E)``, ``enumerate(self.experts)``, ``enumerate(zip(self.w1, self.w2))``."""
INDICES = ("e[0]", "flattened", "item", "int", "kept", "where", "unpacked", "tolist", "column")
"""How one of the hits becomes an index."""

LONG, MASK, COLUMNS, DENSE = "positions", "mask", "two columns", "all tokens"
SELECTIONS = {
    "where(mask[e])": LONG,
    "where(ids == e)": LONG,
    "nonzero(ids == e)": LONG,
    "weights[ids == e]": LONG,
    "table of positions": LONG,
    "pairs // K": LONG,
    "any(-1)": MASK,
    "any(-1).nonzero()": LONG,
    "nonzero().squeeze()": LONG,
    "pair.squeeze()": LONG,
    "threshold": MASK,
    "threshold.nonzero()": LONG,
    "expert choice": LONG,
    "capacity": LONG,
    "capacity mask": MASK,
    "two columns": COLUMNS,
    "dense by table": DENSE,
    "dense by ids": DENSE,
}
SKIPS = ("none", "numel", "shape", "len", "not any", "expert 1", "effect")
"""``continue`` for experts without rows, for one expert; ``effect`` is one that changes the result before."""

GATHERS = ("x[t]", "index_select", "x[t, :]", "x[None, t]", "gather", "embedding", "repeated")
"""How the rows of the selected tokens are taken; ``repeated``: from a copy of ``x`` with one row for each pair."""

COMBINES = {
    LONG: (
        "index_add_",
        "out[t] +=",
        "out[t] = out[t] +",
        "index_put_",
        "scatter_add_",
        "index_add",
        "scatter_add",
        "out + zeros.index_add",
        "cat",
        "out[t] =",
        "index_copy_",
        "pairs[t] =",
    ),
    MASK: ("out[t] +=", "out[t] = out[t] +", "index_put_", "index_put", "masked_scatter", "out[t] ="),
    COLUMNS: ("index_put_", "out[t] +=", "out[t] = out[t] +", "out[t] ="),
    DENSE: ("out + y", "out += y", "add_", "stack", "list sum", "cat columns", "parts[:, e] =", "torch.add"),
}
STARTS = (
    "zeros",
    "new_zeros",
    "shared expert",
    "clone",
    "view of zeros",
    "columns of zeros",
    "transposed zeros",
    "negative zeros",
    "large",
    "x itself",
)
UNUSUAL_STARTS = ("transposed zeros", "negative zeros", "large", "x itself")
"""``large``: only some orders of adding the rows stay below the largest number of the dtype."""

ALPHAS = (1, 2, -0.5, 0.1)
TAKE_ALPHA = ("index_add_", "index_add", "torch.add", "add_")

POSITIONS = ("t", "t - tokens", "t // 2", "t * 0", "t % 2", "-1 - t", "t + 1", "t.flip(0)")
"""Where a row is taken from or comes to: positions that are below 0, come up again, or are none (eager raises)."""
MOVED = ("combine", "gather", "both")

ROW_WRITES = (
    "index_add_",
    "[t] +=",
    "[t] =",
    "[t] = [t] +",
    "index_put_",
    "index_put_ once",
    "scatter_add_",
    "index_copy_",
)
WHOLE_WRITES = ("+=", "add_", "copy_", "[:] =", "mul_", "zero_", "+", "[e] +=", "[e] =")
WRITES = (*ROW_WRITES, *WHOLE_WRITES)
"""What else the body does, to ``aux``. Those of the whole add what the expert has (``bias[e]``), or all rows."""

TARGETS = {
    "apart": None,
    "out": None,
    "view of out": None,
    "transposed": None,
    "x": None,
    "view of x": None,
    "buffer": None,
    "halves": ("2 * x.shape[0], *x.shape[1:]", "whole[: x.shape[0]]", "whole[x.shape[0] :]"),
    "overlapping rows": ("x.shape[0] + 1, *x.shape[1:]", "whole[:-1]", "whole[1:]"),
    "columns": (f"*x.shape[:-1], {2 * HIDDEN}", f"whole[..., :{HIDDEN}]", f"whole[..., {HIDDEN}:]"),
    "overlapping columns": (f"*x.shape[:-1], {HIDDEN + 1}", "whole[..., :-1]", "whole[..., 1:]"),
    "interleaved": (f"*x.shape[:-1], {2 * HIDDEN}", "whole[..., ::2]", "whole[..., 1::2]"),
    "chunks": (f"*x.shape[:-1], {2 * HIDDEN}", "whole.chunk(2, dim=-1)[0]", "whole.chunk(2, dim=-1)[1]"),
    "unbound": ("2, *x.shape", "whole.unbind(0)[0]", "whole.unbind(0)[1]"),
    "picked": ("2, *x.shape", "whole[0]", "whole[1]"),
    "expanded": ("1, *x.shape[1:]", "torch.zeros_like(x)", "whole.expand(x.shape)"),
}
"""What ``aux`` is; where it shares memory with ``out``: the sizes of that memory, ``out`` and ``aux``."""

PATHS = {
    "both": None,
    "before": None,
    "some": "{e} % 2 == 0",
    "even": "{e} % 2 == 0",
    "one": "{e} == 1",
    "later": "{e} > 1",
    "rows": "len(t) > 0",
    "few rows": "t.numel() < 2",
    "other ids": "(ids[..., :1] == {e}).any()",
}
"""Which experts do what: ``both``, ``before``: all do both; ``some``: some do the other too; else: either."""

CHANGES = {
    "none": "",
    "attribute of the block": "self.factor = 3",
    "global": "globals()['FACTOR'] = 3",
    "global function": "globals()['scaled'] = lambda h: h * 3",
    "mode": "self.eval()",
    "another parameter": "{owner}.{name} = nn.Parameter({owner}.{name}.detach() * 2)",
    "data of a parameter": "{owner}.{name}.data = {owner}.{name}.data * 2",
    "parameter written": "{owner}.{name}.data.mul_(2)",
    "attributes of the experts": "for expert in {experts}: expert.factor = 3",
    "attribute of one expert": "{one}.factor = 3",
    "attribute of the class": "Expert.factor = 3",
    "another expert": "{one} = copy.deepcopy({other})",
    "other order": "{one}, {other} = {other}, {one}",
    "forward of the class": "old = Expert.forward; Expert.forward = lambda self, h: old(self, h) * 2",
    "forward of one expert": "{one}.forward = lambda h, expert={one}: Expert.forward(expert, h) * 2",
    "hook": "{one}.register_forward_hook(lambda module, args, h: h * 2)",
}
"""What is changed between two calls, and how."""
CHANGES_OF_MODULES = tuple(CHANGES)[8:]
CHANGES_OF_CALLS = tuple(CHANGES)[13:]

AUTOCASTS = ("none", "loop", "body", "outside", "off in the body")
NARROW = ("none", "mask", "one_hot", "no guard", "table", "loop")
"""What is too short: eager raises where an expert is hit that it has no entry for."""

STORAGES = (
    "stacked",
    "transposed",
    "flat",
    "ParameterList",
    "ModuleList",
    "ModuleDict",
    "tied",
    "numbered",
)
MODULE_STORAGES = STORAGES[4:]
UNUSUAL_STORAGES = ("ParameterList", "tied", "numbered")
"""Those that are known to be left."""

STEPS = (
    "linear",
    "matmul",
    "mm",
    "einsum",
    "addmm",
    "gate chunk",
    "gate interleaved",
    "gate split",
    "bias",
    "silu",
    "gelu",
    "tanh",
    "relu",
    "quick gelu",
    "layer_norm",
    "rms_norm",
    "normalize",
    "softmax",
    "residual",
    "clamp",
    "clamp_max",
    "lora",
    "scale",
    "vector scale",
    "heads",
    "leaky where",
    "rotate",
    "position",
    "router row",
    "table of tokens",
    "add_ to rows",
    "mul_ rows",
    "column written",
    "negative written",
    "squeeze",
    "detach",
    "outer",
    "bmm",
)
STEPS_OF_INTEGERS = (
    *("linear", "matmul", "mm", "einsum", "addmm", "bias", "lora", "scale", "vector scale", "squeeze", "outer"),
    *("residual", "position", "add_ to rows", "rotate", "bmm"),
)
NOT_SMOOTH = {"relu", "clamp", "clamp_max", "leaky where", "negative written"}
"""Their gradients jump: in low precision eager itself is on the one or the other side."""
TRAPS = (
    "mean of rows",
    "cumsum",
    "first row",
    "by number of rows",
    "softmax of rows",
    "largest of all",
    "flipped",
    "sorted",
    "attention",
    "reads accumulator",
    "noise",
    "dropout",
    "input written",
    "few rows",
    "previous row",
    "batch norm",
)
EXTRAS = (
    "none",
    "second accumulator",
    "counts calls",
    "notes sizes",
    "counts in buffer",
    "scale carried",
    "rows used after",
    "loss of rows",
    "break",
    "loss of weights",
    "expert used after",
)

VALUES = ("ordinary", "infinite token", "zero token", "transposed", "without gradient")
"""What the hidden states are like; ``transposed``: in memory."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
}
INTEGERS = ("int64", "int32")
LOW_DTYPES = ("float32", "bfloat16", "float16")
ID_DTYPES = ("int32", "uint8", "int8", "int16")
LARGE = {"float16": (-60000.0, 30000.0)}
"""What the result starts at, and what the rows are multiplied by, for a start that is ``large``."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One loop, how it is compiled and what it is called with.

    Attributes:
        routing: one of ``ROUTINGS``.
        given: what the ids are like where they are arguments.
        experts: number of experts.
        top_k: slots of a token.
        ids_dtype: of ids that are arguments.
        wide_weights: the weights are float32, where the dtype is a lower one.
        values: one of ``VALUES``.
        tokens: how many tokens each call has, one after the other.
        batched: whether the input is ``[B, S, H]``.
        mask: the mask ``[E, K, T]`` is ``one_hot`` or compares with ``arange``.
        loop: one of ``LOOPS``.
        index: one of ``INDICES``, for hits.
        selection: one of ``SELECTIONS``.
        skip: one of ``SKIPS``.
        steps: the row program: some of ``STEPS`` and ``TRAPS``.
        called: how many of the first steps stand in the expert's ``forward``, where experts are modules.
        gather: one of ``GATHERS``.
        weight: the routing weight is applied ``after`` the steps, ``before`` them or not at all (``none``).
        combine: one of ``COMBINES``.
        start: one of ``STARTS``.
        storage: one of ``STORAGES``.
        extra: one of ``EXTRAS``.
        experts_backend: what it is rewritten to.
        inner: the inner compiler.
        dtype: one of ``DTYPES``.
        grad: whether gradients are compared.
        layers: how many such blocks stand one after the other.
        narrow: one of ``NARROW``.
        arange_dtype: of the numbers of the experts that the mask is made with.
        moved: one of ``POSITIONS``.
        moved_in: whether that is where rows are taken from, where they come to, or both.
        alpha: a factor for what is added.
        out_dtype: of the result, ``same`` as that of the values or another one.
        cast: whether values are cast to that.
        writes: what else the body does, of ``WRITES``.
        target: what that is done to, one of ``TARGETS``.
        paths: which experts do it, one of ``PATHS``.
        changes: what is changed between the calls, one of ``CHANGES``.
        autocast: one of ``AUTOCASTS``.
    """

    routing: str = "softmax"
    given: str = "distinct"
    ids_dtype: str = "int64"
    wide_weights: bool = False
    values: str = "ordinary"
    experts: int = 4
    top_k: int = 2
    tokens: tuple[int, ...] = (5,)
    batched: bool = False
    mask: str = "one_hot"
    loop: str = HITS
    index: str = "e[0]"
    selection: str = "where(mask[e])"
    skip: str = "none"
    steps: tuple[str, ...] = ("linear",)
    called: int = 0
    gather: str = "x[t]"
    weight: str = "after"
    combine: str = "index_add_"
    start: str = "zeros"
    storage: str = "stacked"
    extra: str = "none"
    experts_backend: str = "grouped_mm"
    inner: str = "eager"
    dtype: str = "float64"
    grad: bool = True
    layers: int = 1
    narrow: str = "none"
    arange_dtype: str = "int64"
    moved: str = "t"
    moved_in: str = "combine"
    alpha: float = 1
    out_dtype: str = "same"
    cast: bool = True
    writes: tuple[str, ...] = ()
    target: str = "apart"
    paths: str = "both"
    changes: str = "none"
    autocast: str = "none"

    @property
    def has_modules(self) -> bool:
        return self.storage in MODULE_STORAGES

    @property
    def position(self) -> str:
        """What the selection gives: positions, a mask, two columns or all tokens."""
        return SELECTIONS[self.selection]

    @property
    def has_mask(self) -> bool:
        """Whether a mask of all experts is made."""
        return self.selection == "where(mask[e])" or self.loop == HITS

    @property
    def takes_ids(self) -> bool:
        return self.routing == "given"

    @property
    def in_range(self) -> bool:
        """Whether all ids are of experts."""
        return not self.routing.startswith("dropped") and not (
            self.takes_ids and self.given in ("sentinels", "negative")
        )

    @property
    def has_out(self) -> bool:
        """Whether there is a result that is added to."""
        return self.combine not in ("pairs[t] =", "parts[:, e] =")

    @property
    def is_integer(self) -> bool:
        return self.dtype in INTEGERS

    @property
    def rounding(self) -> float:
        """The relative error of casts to a dtype below that of what is compared; 0 where there are none."""
        if self.autocast != "none":
            return torch.finfo(torch.bfloat16).eps
        if self.out_dtype == "same" or self.is_integer:
            return 0.0
        return torch.finfo(DTYPES[self.out_dtype]).eps

    @property
    def has_error(self) -> bool:
        """Whether even eager has an error that is to be seen: then the same in float64 says how large one may be."""
        lower = self.out_dtype not in ("same", "float64")
        return not self.is_integer and (self.dtype != "float64" or lower)

    @property
    def is_trap(self) -> bool:
        return bool(set(self.steps) & set(TRAPS)) or self.extra in EXTRAS[2:] or self.skip == "effect"

    def __str__(self) -> str:
        """What differs from the plain program."""
        plain = Program()
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        return f"Program({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def problem(self) -> str | None:
        """What makes it no program at all; None for a good one."""
        negative = self.routing == "dropped to -1" or (self.takes_ids and self.given == "negative")
        rules = {
            "one_hot of negative ids": negative and self.mask == "one_hot",
            "unsigned negative ids": self.given == "negative" and self.ids_dtype == "uint8",
            "ids that the module makes": self.ids_dtype != "int64" and not self.takes_ids,
            "no lower dtype": self.wide_weights and self.dtype not in ("bfloat16", "float16"),
            "one_hot of other ids": self.ids_dtype != "int64" and self.selection in CAPACITY_OR_TABLE,
            "no error to compare": self.dtype != "float64" and self.values == "infinite token",
            "argmax gives one": self.routing == "argmax" and self.top_k != 1,
            "more slots than experts": self.top_k > self.experts,
            "no scores": "threshold" in self.selection and self.dtype != "float64",
            "combine": self.combine not in COMBINES[self.position],
            "a loop over modules needs modules": self.loop == MODULES and not self.has_modules,
            "a loop over rows needs stacked parameters": self.loop == ROWS and self.storage != "stacked",
            "two columns are of batched input": self.position == COLUMNS and not self.batched,
            "capacity or a table of sentinels": not self.in_range and self.selection in CAPACITY_OR_TABLE,
            "scores are no arguments": self.dtype != "float64"
            and (not self.takes_ids or self.selection == "expert choice"),
            "a jump in low precision": self.dtype != "float64" and bool(NOT_SMOOTH & set(self.steps)),
            "rows by slot": self.combine == "pairs[t] =" and self.selection not in BY_SLOT,
            "a start that is not used": self.start != "zeros" and self.combine in ("pairs[t] =", "parts[:, e] ="),
            "columns as a start": self.start in ("columns of zeros", "transposed zeros")
            and self.combine in ("cat", "stack", "list sum"),
            "nothing to ask": self.skip in ("numel", "shape", "len", "not any", "effect") and self.position == DENSE,
            "no large number": self.start == "large" and (self.dtype not in LARGE or self.out_dtype != "same"),
            "no zero with a sign": self.start == "negative zeros" and self.is_integer,
            "starts of another dtype": self.out_dtype != "same" and self.start not in STARTS_OF_ANY_DTYPE,
            "nothing to cast": not self.cast and self.out_dtype == "same",
            "a dtype for nothing": self.out_dtype != "same" and not self.has_out,
            "steps of integers": self.is_integer and not set(self.steps) <= set(STEPS_OF_INTEGERS),
            "gradients of integers": self.is_integer and self.grad,
            "integers and numbers": self.is_integer and (self.alpha not in (1, 2) or self.out_dtype != "same"),
            "nothing takes alpha": self.alpha != 1 and self.combine not in TAKE_ALPHA,
            "positions to move": self.moved != "t" and (self.position != LONG or self.combine in ("pairs[t] =", "cat")),
            "how nothing is moved": self.moved == "t" and self.moved_in != "combine",
            "other writes": not self.writes and (self.target != "apart" or self.paths != "both"),
            "rows to write": self.position == DENSE and bool(set(self.writes) & set(ROW_WRITES)),
            "rows to put once": self.position != LONG
            and bool(set(self.writes) & {"index_add_", "scatter_add_", "index_copy_"}),
            "nothing that shares memory": self.target != "apart" and (self.start != "zeros" or not self.has_out),
            "a result of another dtype": self.target in ("x", "view of x") and self.out_dtype != "same",
            "rows of two columns": self.target == "transposed" and self.position == COLUMNS,
            "no rows to ask for": self.paths in ("rows", "few rows") and self.position != LONG,
            "nothing to change": self.changes in CHANGES_OF_MODULES and not self.has_modules,
            "no call to change": self.changes in CHANGES_OF_CALLS and not self.called,
            "no second call": self.changes != "none" and (len(self.tokens) < 2 or self.layers > 1),
            "autocast of other dtypes": self.autocast != "none" and self.dtype != "float32",
            "no mask": self.narrow == "mask" and (self.mask != "arange" or not self.has_mask),
            "no one_hot": self.narrow in ("one_hot", "no guard")
            and (self.mask != "one_hot" or self.loop != HITS or self.in_range),
            "no table": self.narrow == "table" and self.storage not in ("stacked", "transposed"),
            "no range": self.narrow == "loop" and self.loop != RANGE,
            "no arange": self.arange_dtype != "int64" and (self.mask != "arange" or not self.has_mask),
            "many experts": self.experts > 4
            and (self.loop != HITS or not self.takes_ids or self.has_modules or self.mask != "arange"),
            "called": self.called > len(self.steps) or bool(self.called and not self.has_modules),
            "a second accumulator by position": self.extra == "second accumulator" and self.position != LONG,
            "gathers by positions": self.gather not in ("x[t]", "repeated") and self.position != LONG,
            "pairs to repeat for": self.gather == "repeated" and self.selection != "pairs // K",
            "layers that route": self.layers > 1 and self.takes_ids,
            "rows of no length": self.extra == "notes sizes" and self.position != LONG,
        }
        return next((rule for rule, broken in rules.items() if broken), None)


STARTS_OF_ANY_DTYPE = ("zeros", "new_zeros", "clone", "negative zeros")
BY_SLOT = (
    "where(mask[e])",
    "where(ids == e)",
    "nonzero(ids == e)",
    "weights[ids == e]",
    "table of positions",
    "pairs // K",
)
CAPACITY_OR_TABLE = ("capacity", "capacity mask", "dense by table")


MOST_CHOICES = 128

Choose = Callable[[Sequence[Any]], Any]
"""Picks one of a sequence."""


def build(choose: Choose) -> Program:
    """A program that is a loop of experts, or nearly one, made of many choices."""

    def seldom(one_in: int) -> bool:
        return bool(choose(range(one_in)) == one_in - 1)

    special = tuple(choose(tuple(SPECIALS)) for _ in range(choose((0, 1, 1, 1, 2, 0))))
    is_calm = bool(special) and not seldom(4)

    def pick(values: Sequence[Any]) -> Any:
        """Any of them; where the program is special, the plainest as a rule."""
        return values[0] if is_calm and not seldom(6) else choose(values)

    dtype = _dtype(choose, special, seldom(10))
    low_precision = dtype != "float64"
    of_arguments = low_precision or "ids" in special or "many experts" in special
    routing = "given" if of_arguments else pick(("softmax", "given", *ROUTINGS))
    given = pick(GIVEN_IDS) if routing == "given" else "distinct"
    in_range = not routing.startswith("dropped") and given not in ("sentinels", "negative")
    batched = seldom(12 if is_calm else 3)
    other_ids = ("int32", "int8", "int16") if given == "negative" else ID_DTYPES
    ids_dtype = choose(other_ids) if routing == "given" and ("ids" in special or seldom(5)) else "int64"
    by_number = "positions" in special or "row writes" in special
    selection = pick(
        [
            name
            for name, position in SELECTIONS.items()
            if not (position == COLUMNS and not batched)
            and not (name in CAPACITY_OR_TABLE and (not in_range or ids_dtype != "int64"))
            and not (low_precision and ("threshold" in name or name == "expert choice"))
            and not (by_number and position != LONG)
        ]
    )
    if "squeeze" in special:
        selection = choose(("nonzero().squeeze()", "pair.squeeze()"))
    position = SELECTIONS[selection]
    by_slot = selection in BY_SLOT and not set(special) & {
        "positions",
        "out dtype",
        "start",
        "row writes",
        "whole writes",
    }
    listed = ("cat", "stack", "list sum")
    combines = [c for c in COMBINES[position] if c != "pairs[t] =" or by_slot]
    if special:
        combines = [c for c in combines if c not in (*listed, "pairs[t] =", "parts[:, e] =")]
    if "alpha" in special:
        combines = [c for c in combines if c in TAKE_ALPHA] or combines
    combine = pick(combines)
    has_out = combine not in ("pairs[t] =", "parts[:, e] =")
    target, writes = "apart", []
    if "row writes" in special:
        writes = [choose(ROW_WRITES)]
    if "whole writes" in special:
        allowed = [w for w in WRITES if w in WHOLE_WRITES or position == LONG]
        writes += [choose(WHOLE_WRITES), *([choose(allowed)] if seldom(3) else [])]
    out_dtypes = [d for d in ("float32", "float64", "bfloat16", "float16") if d != dtype]
    out_dtype = choose(out_dtypes) if "out dtype" in special and dtype not in INTEGERS else "same"
    if writes and not seldom(4):
        same_dtype = out_dtype == "same"
        target = choose(
            [
                name
                for name in TARGETS
                if not (name in ("x", "view of x") and not same_dtype)
                and not (name == "transposed" and position == COLUMNS)
            ]
        )
    starts = [
        start
        for start in STARTS
        if start not in UNUSUAL_STARTS
        and (start == "zeros" or (has_out and target == "apart"))
        and (start != "columns of zeros" or combine not in listed)
        and (out_dtype == "same" or start in STARTS_OF_ANY_DTYPE)
    ]
    start = pick(starts)
    if "start" in special and has_out and target == "apart" and out_dtype == "same":
        start = (
            "large" if dtype in LARGE else choose(("transposed zeros", "negative zeros", "negative zeros", "x itself"))
        )
        start = "clone" if start == "negative zeros" and dtype in INTEGERS else start
    known_steps = [step for step in STEPS if not (low_precision and step in NOT_SMOOTH)]
    known_steps = list(STEPS_OF_INTEGERS) if dtype in INTEGERS else known_steps
    steps = [choose(known_steps) for _ in range(choose((1, 0, 2)) if is_calm else choose(range(6)))]
    if dtype not in INTEGERS and seldom(24 if is_calm else 8):
        steps.insert(choose(range(len(steps) + 1)), choose(TRAPS))
    changed = "changes" in special and not (low_precision and "autocast" in special)
    unusual_storage = seldom(24 if is_calm else 8)
    usual = tuple(s for s in STORAGES if s not in UNUSUAL_STORAGES)
    storage = choose(UNUSUAL_STORAGES) if unusual_storage else choose(usual) if changed else pick(usual)
    experts = choose((4, 3))
    if "many experts" in special:
        storage, experts = choose(("stacked", "transposed", "flat")), choose((260, 130))
    of_modules = storage in MODULE_STORAGES
    loops = [HITS, RANGE, *([MODULES] if of_modules else []), *([ROWS] if storage == "stacked" else [])]
    loop = HITS if experts > 4 else pick(loops)
    by_position = ("second accumulator", "notes sizes")
    extras = [extra for extra in EXTRAS if position == LONG or extra not in by_position]
    skips = ("none", "expert 1") if position == DENSE else ("none", *SKIPS[:-1])
    negative = routing == "dropped to -1" or given == "negative"
    mask = "arange" if negative or experts > 4 or "ids" in special else pick(("one_hot", "arange"))
    has_mask = selection == "where(mask[e])" or loop == HITS
    paths = [name for name in PATHS if position == LONG or name not in ("rows", "few rows")]
    gathers = [gather for gather in GATHERS if position == LONG and (gather != "repeated" or selection == "pairs // K")]
    called = (choose(range(len(steps) + 1)) if not changed else len(steps)) if of_modules else 0
    narrows = [
        narrow
        for narrow, possible in {
            "mask": mask == "arange" and has_mask,
            "one_hot": mask == "one_hot" and loop == HITS and not in_range,
            "no guard": mask == "one_hot" and loop == HITS and not in_range,
            "table": storage in ("stacked", "transposed"),
            "loop": loop == RANGE,
        }.items()
        if possible
    ]
    changes = [
        name
        for name in list(CHANGES)[1:]
        if (of_modules or name not in CHANGES_OF_MODULES) and (called or name not in CHANGES_OF_CALLS)
    ]
    moved = choose(POSITIONS[1:]) if "positions" in special and combine not in ("pairs[t] =", "cat") else "t"
    calls = 2 if changed else choose((1, 1, 2))
    return Program(
        routing=routing,
        given=given,
        ids_dtype=ids_dtype,
        wide_weights=dtype in ("bfloat16", "float16") and out_dtype == "same" and start != "large" and seldom(2),
        values=pick(VALUES if not low_precision and out_dtype == "same" else ("ordinary",))
        if seldom(4)
        else "ordinary",
        experts=experts,
        top_k=1 if routing == "argmax" else choose((2, 1, 3)),
        tokens=tuple(choose(USUAL_TOKENS) for _ in range(calls)),
        batched=batched,
        mask=mask,
        loop=loop,
        index=pick(INDICES) if loop == HITS else "e[0]",
        selection=selection,
        skip="effect" if position != DENSE and seldom(80) else pick(skips),
        steps=tuple(steps),
        called=called,
        gather=pick(("x[t]", *gathers)),
        weight=choose(("after", "before", "none")),
        combine=combine,
        start=start,
        storage=storage,
        extra=choose(extras) if seldom(24 if is_calm else 8) else "none",
        experts_backend=choose(("grouped_mm", "batched_mm")),
        inner=choose(("eager", "eager", "aot_eager")),
        dtype=dtype,
        # In place on one of several views of something without a gradient, eager raises as a rule.
        grad=dtype not in INTEGERS and not seldom(5) and not (target != "apart" and not seldom(4)),
        layers=2 if routing != "given" and not changed and seldom(10) else 1,
        narrow=choose(narrows) if "narrow" in special and narrows else "none",
        arange_dtype=choose(ID_DTYPES) if has_mask and mask == "arange" and "ids" in special else "int64",
        moved=moved,
        moved_in=choose(MOVED) if moved != "t" else "combine",
        alpha=choose((2,) if dtype in INTEGERS else ALPHAS[1:]) if "alpha" in special and combine in TAKE_ALPHA else 1,
        out_dtype=out_dtype if has_out else "same",
        cast=not (out_dtype != "same" and has_out and seldom(6)),
        writes=tuple(writes),
        target=target if has_out else "apart",
        paths=choose(paths) if writes and not seldom(3) else "both",
        changes=choose(changes) if changed else "none",
        autocast=choose(AUTOCASTS[1:]) if "autocast" in special and dtype == "float32" else "none",
    )


SPECIALS = (
    *("row writes", "whole writes", "positions", "changes", "out dtype", "integers", "alpha", "start", "autocast"),
    *("ids", "narrow", "squeeze", "many experts", "row writes", "whole writes", "changes"),
)
"""What a program may have, one or two of it, while the rest is plainer than that of others."""


def _dtype(choose: Choose, special: tuple[str, ...], is_low: bool) -> str:
    if "integers" in special:
        return str(choose(INTEGERS))
    if "autocast" in special:
        return "float32"
    if "start" in special:
        return str(choose((*LARGE, *LARGE, "float64", "float64", *LOW_DTYPES)))
    if "out dtype" in special:
        return str(choose((*LOW_DTYPES, "float64", "float64")))
    return str(choose(LOW_DTYPES)) if is_low else "float64"


def programs() -> st.SearchStrategy[Program]:
    """:func:`build` by choices of hypothesis: one byte for each.

    Hypothesis repeats parts of an example in the next ones, where they are drawn one by one; bytes it draws anew.
    """

    def built(choices: bytes) -> Program:
        left = iter(choices)
        return build(lambda values: values[next(left) % len(values)])

    return st.binary(min_size=MOST_CHOICES, max_size=MOST_CHOICES).map(built)


# --- a program as source ----------------------------------------------------------------------------------------------


class _Renderer:
    """Renders one program. Rows are ``h``, of ``HIDDEN`` columns or of ``INNER``."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.parameters: dict[str, tuple[int, ...]] = {}
        """Of one expert, by name."""
        self.buffers: dict[str, tuple[int, ...]] = {}
        self.width = HIDDEN
        self.inside = False
        """Whether the lines are those of an expert's ``forward``."""

    # Parameters and the index.

    @property
    def index(self) -> str:
        """The expert's index, where one that keeps its dimension would not do."""
        return "e[0]" if self.program.loop == HITS and self.program.index == "kept" else "e"

    def at_expert(self, tensor: str) -> str:
        """Row of the expert in ``tensor``."""
        kept = self.program.loop == HITS and self.program.index == "kept"
        return f"{tensor}[e].squeeze(0)" if kept else f"{tensor}[e]"

    def parameter(self, kind: str, *shape: int) -> str:
        """A new parameter of the expert, as the code at hand reads it."""
        name = f"{kind}_{len(self.parameters)}"
        self.parameters[name] = shape
        program = self.program
        if program.has_modules:
            return f"self.{name}" if self.inside else f"expert.{name}"
        if program.loop == ROWS:
            return f"{name}_e"
        if program.storage == "transposed" and len(shape) == 2:
            return f"{self.at_expert(f'self.{name}')}.t()"
        if program.storage == "flat":
            sizes = ", ".join(map(str, (program.experts, *shape)))
            return self.at_expert(f"self.{name}.view({sizes})")
        if program.storage == "ParameterList":
            return f"self.{name}[{self.index}]"
        return self.at_expert(f"self.{name}")

    # Rows.

    def of_rows(self, tensor: str) -> str:
        """Rows of ``tensor`` at the selected positions."""
        position = self.program.position
        return tensor if position == DENSE else f"{tensor}[b, t]" if position == COLUMNS else f"{tensor}[t]"

    def weight(self) -> str:
        """Routing weight of each row, ``[n, 1]``."""
        selection, e = self.program.selection, self.index
        if selection == "weights[ids == e]":
            return f"weights[ids == {e}].unsqueeze(-1)"
        if selection in BY_SLOT[:-1]:
            return "weights[t, slot, None]"
        if selection in ("pairs // K", "pair.squeeze()"):
            return "weights.reshape(-1)[pair].unsqueeze(-1)"
        if selection.startswith("any") or selection == "nonzero().squeeze()":
            return f"(weights * (ids == {e})).sum(-1)[t, None]"
        if selection.startswith("threshold"):
            return f"scores[:, {e}][t].unsqueeze(-1)"
        if selection == "expert choice":
            return "chosen.unsqueeze(-1)"
        if selection.startswith("capacity"):
            return "weights[t, :1]"
        if selection == "two columns":
            return "weights[b, t, slot, None]"
        if selection == "dense by table":
            return f"table[:, {e}, None]"
        return f"(weights * (ids == {e})).sum(-1, keepdim=True)"

    def random(self, shape: Sequence[int]) -> str:
        """Values of parameters. The products of integers are beyond what floating point has exactly."""
        sizes = ", ".join(map(str, shape))
        if self.program.is_integer:
            return f"torch.randint(-5000, 5000, ({sizes},), dtype=torch.{self.program.dtype})"
        return f"torch.randn({sizes})"

    def made(self, shape: Sequence[int]) -> str:
        """A new parameter."""
        if self.program.is_integer:
            return f"nn.Parameter({self.random(shape)}, requires_grad=False)"
        return f"nn.Parameter({self.random(shape)} / 2)"

    def other_width(self) -> int:
        return INNER if self.width == HIDDEN else HIDDEN

    def step(self, name: str) -> list[str]:
        """The lines of one step. Steps that need to know the token stand in the loop only."""
        width, other = self.width, self.other_width()
        parameter = self.parameter
        matmul = {
            "linear": (lambda w: f"F.linear(h, {w})", (other, width)),
            "matmul": (lambda w: f"h @ {w}", (width, other)),
            "mm": (lambda w: f"torch.mm(h, {w})", (width, other)),
            "einsum": (lambda w: f'torch.einsum("ni,oi->no", h, {w})', (other, width)),
        }
        if name in matmul:
            spell, shape = matmul[name]
            self.width = other
            return [f"h = {spell(parameter('w', *shape))}"]
        if name == "addmm":
            self.width = other
            return [f"h = torch.addmm({parameter('b', other)}, h, {parameter('w', width, other)})"]
        if name.startswith("gate"):
            self.width = other
            first = f"h = F.linear(h, {parameter('w', 2 * other, width)})"
            if name == "gate interleaved":
                return [first, "gate, up = h[..., ::2], h[..., 1::2]", "h = (up + 1) * gate * torch.sigmoid(gate * 2)"]
            halves = "h.chunk(2, dim=-1)" if name == "gate chunk" else f"h.split({other}, dim=-1)"
            return [first, f"gate, up = {halves}", "h = F.silu(gate) * up"]
        if name == "bmm":
            self.width = other
            return [f"h = torch.bmm(h.unsqueeze(1), {parameter('w', width, other)}.expand(h.shape[0], -1, -1))[:, 0]"]
        if name == "lora":
            return [f"h = h + (h @ {parameter('a', width, 2)}) @ {parameter('b', 2, width)}"]
        if name == "bias":
            return [f"h = h + {parameter('b', width)}"]
        if name == "scale":
            return [f"h = h * {parameter('s', 1)}"]
        if name == "vector scale":
            return [f"h = h * ({parameter('s', width)} + 1)"]
        if name == "batch norm":
            return ["h = F.batch_norm(h, None, None, training=True)"]
        simple = {
            "silu": "F.silu(h)",
            "gelu": "F.gelu(h)",
            "tanh": "torch.tanh(h)",
            "relu": "F.relu(h).pow(2)",
            "quick gelu": "h * torch.sigmoid(1.702 * h)",
            "layer_norm": "F.layer_norm(h, h.shape[-1:])",
            "rms_norm": "h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3)",
            "normalize": "F.normalize(h, dim=-1, eps=1e-3)",
            "softmax": "h.softmax(-1)",
            "clamp": "h.clamp(-0.7, 0.7)",
            "clamp_max": "h.clamp(max=0.5)",
            "heads": "h.view(-1, 2, h.shape[-1] // 2).softmax(-1).flatten(1)",
            "leaky where": "torch.where(h > 0, h, h * 0.1)",
            "rotate": f"torch.cat([-h[:, {width // 2}:], h[:, :{width // 2}]], dim=-1)",
            "squeeze": "(h.unsqueeze(0) * 2).squeeze(0)",
            "detach": "h - h.detach() * 0.5",
            "outer": "(h.unsqueeze(2) * h.unsqueeze(1)).sum(1)",
            "mean of rows": "h - h.mean(0)",
            "cumsum": "h.cumsum(0)",
            "first row": "h - h[:1]",
            "by number of rows": "h / (h.shape[0] + 1)",
            "softmax of rows": "h.softmax(0)",
            "largest of all": "h / (h.abs().sum() + 1)",
            "flipped": "h.flip(0)",
            "sorted": "h.sort(dim=0)[0]",
            "attention": "(h @ h.t()).softmax(-1) @ h",
            "noise": "h + torch.rand_like(h)",
            "dropout": "F.dropout(h, 0.5)",
            "previous row": "h + h.roll(1, 0)",
        }
        if name in simple:
            return [f"h = {simple[name]}"]
        plain = {
            "add_ to rows": ["h += 1"],
            "mul_ rows": ["h = h.mul_(0.5)"],
            "column written": ["h[:, 0] = 0.5"],
            "negative written": ["h[h < 0] = 0"],
            "few rows": ["if h.shape[0] > 2:", "    h = h * 3"],
        }
        if name in plain:
            return plain[name]
        if self.inside:
            return ["h = h * 1.25"]
        if name == "residual":
            return [f"h = h + {self.of_rows('x')}"] if width == HIDDEN else ["h = h + 1"]
        if name == "position":
            if self.program.position != LONG:
                return ["h = h * 0.75"]
            return ["h = h * (t + 1).unsqueeze(-1).to(h.dtype)"]
        if name == "router row":
            return [f"h = h * self.router[:, {self.index}].sum()"]
        if name == "table of tokens":
            self.buffers["table_of_tokens"] = (16, 1)
            spread = "self.table_of_tokens[:tokens]"
            return (
                [f"h = h + {self.of_rows(spread)}"] if self.program.position in (LONG, MASK, DENSE) else ["h = h + 0.5"]
            )
        if name == "reads accumulator":
            return [f"h = h + {self.of_rows('out')}.sum(-1, keepdim=True)"]
        if name == "input written":
            lines = [f"h = h * {self.of_rows('x')}.sum(-1, keepdim=True)"]
            return [*lines, "x.mul_(2)" if self.program.position == DENSE else f"{self.of_rows('x')} = 0.25"]
        raise AssertionError(name)

    # The parts of the module's forward.

    def routing(self) -> list[str]:
        program, k, e = self.program, self.program.top_k, self.program.experts
        lines = []
        if program.batched and program.position != COLUMNS:
            lines += ["shape = x.shape", f"x = x.reshape(-1, {HIDDEN})"]
            if program.takes_ids:
                lines += [f"ids, weights = ids.reshape(-1, {k}), weights.reshape(-1, {k})"]
        if program.position != COLUMNS:
            lines += ["tokens = x.shape[0]"]
        if program.dtype == "float64":
            lines += ["scores = x @ self.router"]
        if program.target in ("x", "view of x"):
            lines += ["x = x.clone()"]
        routes = {
            "softmax": [f"weights, ids = scores.softmax(-1).topk({k}, dim=-1)"],
            "sigmoid": [
                f"weights, ids = torch.topk(scores.sigmoid(), {k}, dim=-1)",
                "weights = weights / weights.sum(-1, keepdim=True)",
            ],
            "argmax": [
                "ids = scores.argmax(-1, keepdim=True)",
                "weights = scores.softmax(-1).gather(-1, ids)",
            ],
            "sorted": [
                "weights, ids = scores.sort(-1, descending=True)",
                f"weights, ids = weights[..., :{k}], ids[..., :{k}]",
            ],
            "dropped": [
                f"weights, ids = scores.softmax(-1).topk({k}, dim=-1)",
                f"ids = ids.masked_fill(weights < 0.3, {e})",
            ],
            "dropped to -1": [
                f"weights, ids = scores.softmax(-1).topk({k}, dim=-1)",
                "ids = torch.where(weights < 0.3, -1, ids)",
            ],
        }
        lines += routes.get(program.routing, [])
        flat = f"ids.reshape(-1, {k})" if program.position == COLUMNS else "ids"
        if program.has_mask:
            if program.mask == "one_hot":
                classes = e if program.in_range or program.narrow == "one_hot" else e + 4
                long = flat if program.ids_dtype == "int64" else f"{flat}.long()"
                lines += [f"mask = F.one_hot({long}, {classes}).permute(2, 1, 0)"]
            else:
                short = e - 1 if program.narrow == "mask" else e
                dtype = "" if program.arange_dtype == "int64" else f", dtype=torch.{program.arange_dtype}"
                lines += [f"mask = ({flat}.unsqueeze(-1) == torch.arange({short}{dtype})).permute(2, 1, 0)"]
        if program.selection.startswith("capacity"):
            lines += [
                f"first = F.one_hot(ids[:, 0], {e})",
                "kept = first * (first.cumsum(0) <= 2)",
            ]
        if program.gather == "repeated":
            lines += [f"repeated = x.repeat_interleave({k}, dim=0)"]
        if program.selection == "dense by table":
            lines += [f"table = torch.zeros(tokens, {e}, dtype=x.dtype).scatter_add(1, ids, weights)"]
        return lines

    def accumulator(self) -> list[str]:
        program = self.program
        if program.combine == "pairs[t] =":
            if program.selection == "pairs // K":
                return [f"pairs = x.new_zeros(tokens * {program.top_k}, {HIDDEN})"]
            return [f"pairs = x.new_zeros(tokens, {program.top_k}, {HIDDEN})"]
        if program.combine == "parts[:, e] =":
            # Some parts may stay as they are: then they are to be numbers.
            all_written = program.loop != HITS and program.skip == "none" and program.extra != "break"
            made = "new_empty" if all_written else "new_zeros"
            return [f"parts = x.{made}(tokens, {program.experts}, {HIDDEN})"]
        dtype = "" if program.out_dtype == "same" else f", dtype=torch.{program.out_dtype}"
        large = LARGE.get(program.dtype, (0.0,))[0]
        starts = {
            "zeros": [f"out = torch.zeros_like(x{dtype})"],
            "new_zeros": [f"out = x.new_zeros(x.shape{dtype})"],
            "shared expert": ["out = x @ self.shared"],
            "clone": ["out = x.clone()" if not dtype else f"out = x.to(torch.{program.out_dtype}, copy=True)"],
            "view of zeros": ["whole = x.new_zeros(x.numel())", "out = whole.view(x.shape)"],
            "columns of zeros": [f"whole = x.new_zeros(*x.shape[:-1], {2 * HIDDEN})", f"out = whole[..., :{HIDDEN}]"],
            "transposed zeros": [
                f"whole = x.new_zeros({HIDDEN}, *x.shape[:-1])",
                "out = whole.movedim(0, -1)",
            ],
            "negative zeros": [f"out = torch.full_like(x, -0.0{dtype})"],
            "large": [f"out = torch.full_like(x, {large})"],
            "x itself": ["out = x"],
        }
        lists = {
            "cat": ["positions, results = [], []"],
            "stack": ["results = []"],
            "list sum": ["results = []"],
            "cat columns": ["results = []"],
        }
        return starts[program.start] + self.second_accumulator() + lists.get(program.combine, [])

    def second_accumulator(self) -> list[str]:
        """``aux``, which shares memory with ``out`` or with what is read, or does not."""
        program = self.program
        if not program.writes:
            return []
        parts = TARGETS[program.target]
        if parts is not None:
            sizes, out, aux = parts
            return [f"whole = {self.zeros(sizes)}", f"out = {out}", f"aux = {aux}"]
        if program.target == "buffer":
            self.buffers["memory"] = (16, HIDDEN)
        like = "out" if program.has_out else "x"
        return {
            "apart": [f"aux = torch.zeros_like({like})"],
            "out": ["aux = out"],
            "view of out": ["aux = out.view(out.shape)"],
            "transposed": ["aux = out.t()"],
            "x": ["aux = x"],
            "view of x": ["aux = x.view(x.shape)"],
            "buffer": ["aux = self.memory[: x.shape[0]]"],
        }[program.target]

    def zeros(self, sizes: str) -> str:
        """Zeros of the result's dtype."""
        dtype = self.program.out_dtype
        return f"x.new_zeros({sizes})" if dtype == "same" else f"x.new_zeros(({sizes},), dtype=torch.{dtype})"

    def loop(self) -> list[str]:
        """What stands before the loop's body, its ``for`` last."""
        program = self.program
        if program.loop == HITS:
            hit = "mask.sum(dim=(-1, -2)).greater(0)"
            if program.index == "where":
                return [f"for e in torch.where({hit})[0]:"]
            iterated = {
                "unpacked": "for (e,) in hits:",
                "flattened": "for e in hits.flatten():",
                "tolist": "for e in hits.flatten().tolist():",
                "column": "for e in hits[:, 0]:",
            }.get(program.index, "for e in hits:")
            return [f"hits = {hit}.nonzero()", iterated]
        if program.loop == MODULES:
            values = ".values()" if program.storage == "ModuleDict" else ""
            return [f"for e, expert in enumerate(self.experts{values}):"]
        if program.loop == ROWS and self.parameters:
            names = ", ".join(f"{name}_e" for name in self.parameters)
            tensors = ", ".join(f"self.{name}" for name in self.parameters)
            if len(self.parameters) == 1:
                return [f"for e, {names} in enumerate({tensors}):"]
            return [f"for e, ({names}) in enumerate(zip({tensors})):"]
        return [f"for e in range({program.experts + (program.narrow == 'loop')}):"]

    def skips(self) -> list[str]:
        """``continue`` before the rows are taken, as it needs nothing of them."""
        program, lines = self.program, []
        if program.loop == HITS:
            lines += {"e[0]": ["e = e[0]"], "item": ["e = e.item()"], "int": ["e = int(e)"]}.get(program.index, [])
            if program.mask == "one_hot" and not program.in_range and program.narrow != "no guard":
                lines += [f"if {self.index} >= {program.experts}:", "    continue"]
        if program.skip == "expert 1":
            lines += [f"if {self.index} == 1:", "    continue"]
        return lines

    def select(self) -> list[str]:
        program, e = self.program, self.index
        lines = {
            "where(mask[e])": [f"slot, t = torch.where({self.at_expert('mask')})"],
            "where(ids == e)": [f"t, slot = torch.where(ids == {e})"],
            "nonzero(ids == e)": [f"t, slot = (ids == {e}).nonzero(as_tuple=True)"],
            "weights[ids == e]": [f"t, slot = torch.where(ids == {e})"],
            "table of positions": [f"found = torch.nonzero(ids == {e})", "t, slot = found[:, 0], found[:, 1]"],
            "pairs // K": [f"pair = (ids.reshape(-1) == {e}).nonzero().squeeze(-1)", f"t = pair // {program.top_k}"],
            "any(-1)": [f"t = (ids == {e}).any(-1)"],
            "any(-1).nonzero()": [f"t = (ids == {e}).any(dim=-1).nonzero()[:, 0]"],
            "nonzero().squeeze()": [f"t = (ids == {e}).any(dim=-1).nonzero().squeeze()"],
            "pair.squeeze()": [
                f"pair = (ids.reshape(-1) == {e}).nonzero().squeeze()",
                f"t = pair // {program.top_k}",
            ],
            "threshold": [f"t = scores[:, {e}] > 0.1"],
            "threshold.nonzero()": [f"t = torch.where(scores[:, {e}] > 0.1)[0]"],
            "expert choice": [f"chosen, t = scores.t()[{e}].topk(tokens // 2)"],
            "capacity": [f"t = torch.where(kept[:, {e}])[0]"],
            "capacity mask": [f"t = kept[:, {e}].bool()"],
            "two columns": [f"b, t, slot = torch.where(ids == {e})"],
        }.get(program.selection, [])
        empty = {
            "numel": "t.numel() == 0" if program.position != MASK else "t.sum() == 0",
            "shape": "t.shape[0] == 0" if program.position != MASK else "not t.any()",
            "len": "len(t) == 0" if program.position != MASK else "not torch.any(t)",
            "not any": "not t.any()" if program.position == MASK else "not t.numel()",
            "effect": "t.numel() == 0" if program.position != MASK else "not t.any()",
        }.get(program.skip)
        if empty is not None:
            lines = [*lines, f"if {empty}:"]
            has_out = program.combine not in ("pairs[t] =", "parts[:, e] =")
            lines += ["    out = out + 1"] if program.skip == "effect" and has_out else []
            lines += ["    continue"]
        return lines

    def rows(self) -> tuple[list[str], list[str]]:
        """The lines of the expert's ``forward``, and those of the loop's body."""
        program, forward = self.program, []
        taken = {
            "x[t]": self.of_rows("x"),
            "index_select": "x.index_select(0, t)",
            "x[t, :]": "x[t, :]",
            "x[None, t]": f"x[None, t].reshape(-1, {HIDDEN})",
            "gather": f"x.gather(0, t.unsqueeze(-1).expand(-1, {HIDDEN}))",
            "embedding": "F.embedding(t, x)",
            "repeated": "repeated[pair]",
        }
        lines = [f"h = {taken[program.gather]}"]
        if program.moved != "t":
            lines = [f"p = {program.moved}", *lines]
            if program.moved_in != "combine":
                lines[1] = re.sub(r"\bt\b", "p", lines[1])
        weigh = f"h = h * {self.weight()}"
        if program.wide_weights:
            weigh = f"h = (h * {self.weight()}).to(x.dtype)"
        if program.weight == "before":
            lines += [weigh]
        if program.has_modules:
            if program.loop != MODULES:
                key = f'f"expert_{{{self.index}}}"' if program.storage == "ModuleDict" else self.index
                lines += [f"expert = self.experts[{key}]"]
            self.inside = True
            for name in program.steps[: program.called]:
                forward += self.step(name)
            if program.storage == "numbered":
                forward += ["h = h * self.number"]
            if forward and program.changes in ("attributes of the experts", "attribute of one expert"):
                forward += ["h = h * self.factor"]
            if forward and program.changes == "attribute of the class":
                forward += ["h = h * Expert.factor"]
            self.inside = False
            if forward:
                lines += ["h = expert(h)"]
        for name in program.steps[program.called :]:
            lines += self.step(name)
        if self.width == INNER:
            lines += self.step("linear")
        lines += {
            "attribute of the block": ["h = h * self.factor"],
            "global": ["h = h * FACTOR"],
            "global function": ["h = scaled(h)"],
            "mode": ["h = h * (2 if self.training else 1)"],
        }.get(program.changes, [])
        if not forward and program.changes.startswith("attribute") and program.changes != "attribute of the block":
            lines += ["h = h * expert.factor"]
        if program.weight == "after":
            lines += [weigh]
        if program.start == "large":
            lines += [f"h = h * {LARGE[program.dtype][1]}"]
        return forward, lines

    def extra(self) -> tuple[list[str], list[str], list[str]]:
        """Lines before the loop, in its body and behind it."""
        weight = self.weight()
        program = self.program
        has_out = program.combine not in ("pairs[t] =", "parts[:, e] =")
        if program.extra == "counts in buffer":
            self.buffers["counts"] = (program.experts,)
        count = "h.shape[0]" if program.position == DENSE else "1"
        extras: dict[str, tuple[list[str], list[str], list[str]]] = {
            "none": ([], [], []),
            "second accumulator": (
                ["total = x.new_zeros(tokens)"],
                [f"total.index_add_(0, t, ({weight})[:, 0].to(total.dtype))"],
                ["out = out + total.unsqueeze(-1)"],
            ),
            "counts calls": ([], ["self.calls += 1"], []),
            "notes sizes": ([], ["self.notes.append(t.shape[0])"], []),
            "counts in buffer": ([], [f"self.counts[{self.index}] += {count}"], []),
            "scale carried": (["scale = 1.0"], ["h = h * scale", "scale = scale * 0.5"], []),
            "rows used after": (["h = x"], [], ["out = out + h.sum()"]),
            "loss of rows": (["loss = 0.0"], ["loss = loss + h.square().sum()"], ["out = out + loss"]),
            "loss of weights": (["loss = 0.0"], [f"loss = loss + ({weight}).sum()"], ["out = out + loss"]),
            "break": ([], [f"if {self.index} == 2:", "    break"], []),
            "expert used after": (["e = 0"], [], ["out = out + e"]),
        }
        before, body, after = extras[program.extra]
        return before, body, after if has_out or program.extra in ("none",) else []

    def combine(self) -> tuple[list[str], list[str]]:
        """The lines that add rows to the result, and those behind the loop."""
        program = self.program
        where = "b, t" if program.position == COLUMNS else "t"
        index = "(b, t)" if program.position == COLUMNS else "(t,)"
        other_dtype = program.out_dtype != "same" or program.autocast != "none"
        y = "h.to(out.dtype)" if other_dtype and program.cast and program.has_out else "h"
        alpha = "" if program.alpha == 1 else f", alpha={program.alpha}"
        if program.moved != "t" and program.moved_in != "gather":
            where, index = "p", "(p,)"
        spread = f"{where}.unsqueeze(-1).expand(-1, {HIDDEN})"
        e = self.index
        lines = {
            "index_add_": [f"out.index_add_(0, {where}, {y}{alpha})"],
            "out[t] +=": [f"out[{where}] += {y}"],
            "out[t] = out[t] +": [f"out[{where}] = out[{where}] + {y}"],
            "out[t] =": [f"out[{where}] = {y}"],
            "index_put_": [f"out.index_put_({index}, {y}, accumulate=True)"],
            "index_put": [f"out = out.index_put({index}, {y}, accumulate=True)"],
            "scatter_add_": [f"out.scatter_add_(0, {spread}, {y})"],
            "scatter_add": [f"out = out.scatter_add(0, {spread}, {y})"],
            "index_add": [f"out = out.index_add(0, {where}, {y}{alpha})"],
            "index_copy_": [f"out.index_copy_(0, {where}, {y})"],
            "out + zeros.index_add": [f"out = out + torch.zeros_like(x).index_add(0, {where}, h)"],
            "masked_scatter": ["out = out + torch.zeros_like(x).masked_scatter(t.unsqueeze(-1), h)"],
            "cat": ["positions.append(t)", f"results.append({y})"],
            "out + y": [f"out = out + {y}"],
            "torch.add": [f"out = torch.add(out, {y}{alpha})"],
            "out += y": [f"out += {y}"],
            "add_": [f"out.add_({y}{alpha})"],
            "stack": [f"results.append({y})"],
            "list sum": [f"results.append({y})"],
            "cat columns": [f"results.append({y})"],
            "parts[:, e] =": [f"parts[:, {e}] = {y}"],
            "pairs[t] =": ["pairs[pair] = h" if program.selection == "pairs // K" else "pairs[t, slot] = h"],
        }[program.combine]
        if program.combine == "pairs[t] =":
            return lines, [f"out = pairs.view(-1, {program.top_k}, {HIDDEN}).sum(1)"]
        if program.combine == "parts[:, e] =":
            return lines, ["out = parts.sum(1)"]
        after = {
            "cat": ["out = out.index_add(0, torch.cat(positions), torch.cat(results))"],
            "stack": ["out = out + torch.stack(results).sum(0)"],
            "list sum": ["out = out + sum(results)"],
            "cat columns": [f"out = out + torch.cat(results, dim=-1).view(*x.shape[:-1], -1, {HIDDEN}).sum(-2)"],
        }.get(program.combine, [])
        if program.start in ("view of zeros", "columns of zeros", "transposed zeros"):
            after = [*after, "out = out + whole.sum()"]
        return lines, after

    def others(self) -> tuple[list[str], list[str]]:
        """The lines of the other writes, and those behind the loop."""
        program = self.program
        if not program.writes:
            return [], []
        aux = "aux.t()" if program.target == "transposed" else "aux"
        at = "b, t" if program.position == COLUMNS else "p" if program.moved != "t" else "t"
        index, e = f"({at},)" if "," not in at else f"({at})", self.index
        y = "h.to(aux.dtype)" if program.autocast != "none" or program.out_dtype != "same" else "h"
        row = f"{aux}[{e} % 3]"
        lines = []
        for write in program.writes:
            bias = write in WHOLE_WRITES and program.position != DENSE
            whole = self.parameter("b", HIDDEN) if bias else y
            lines += {
                "index_add_": [f"{aux}.index_add_(0, {at}, {y})"],
                "[t] +=": [f"{aux}[{at}] += {y}"],
                "[t] =": [f"{aux}[{at}] = {y}"],
                "[t] = [t] +": [f"{aux}[{at}] = {aux}[{at}] + {y}"],
                "index_put_": [f"{aux}.index_put_({index}, {y}, accumulate=True)"],
                "index_put_ once": [f"{aux}.index_put_({index}, {y})"],
                "scatter_add_": [f"{aux}.scatter_add_(0, {at}.unsqueeze(-1).expand(-1, {HIDDEN}), {y})"],
                "index_copy_": [f"{aux}.index_copy_(0, {at}, {y})"],
                "+=": [f"{aux} += {whole}" if aux == "aux" else f"{aux}.add_({whole})"],
                "add_": [f"{aux}.add_({whole}, alpha=2)"],
                "copy_": [f"{aux}.copy_({whole})"],
                "[:] =": [f"{aux}[:] = {whole}"],
                "mul_": [f"{aux}.mul_(2)"],
                "zero_": [f"{aux}.zero_()"],
                "+": ["aux = aux + 1" if program.target == "transposed" else f"aux = aux + {whole}"],
                "[e] +=": [f"{row} += {whole if bias else 1}"],
                "[e] =": [f"{row} = {whole if bias else 1}"],
            }[write]
        return lines, [f"out = out + {aux} * 0.5" if not program.is_integer else f"out = out + {aux} * 3"]

    def on_paths(self, combine: list[str], others: list[str]) -> list[str]:
        """Which of these lines stand where in the body."""
        paths = self.program.paths
        condition = PATHS[paths]
        if not others or condition is None:
            return [*others, *combine] if paths == "before" else [*combine, *others]
        asked = [f"if {condition.format(e=self.index)}:"]
        if paths in ("some", "other ids"):
            return [*combine, *asked, *_indented(others)]
        return [*asked, *_indented(combine), "else:", *_indented(others)]

    def render(self) -> str:
        program = self.program
        expert_forward, rows = self.rows()
        combine, after_combine = self.combine()
        others, after_others = self.others()
        before, extra, after = self.extra()
        if program.autocast in ("body", "off in the body"):
            given = "torch.bfloat16" if program.autocast == "body" else "enabled=False"
            rows = [f'with torch.autocast("cpu", {given}):', *_indented(rows)]
        body = [*self.skips(), *self.select(), *rows, *extra, *self.on_paths(combine, others)]
        end = ["return out.view(shape)" if program.batched and program.position != COLUMNS else "return out"]
        accumulator = self.accumulator()
        loop = [*self.loop(), *_indented(body)]
        if program.autocast in ("loop", "off in the body"):
            loop = ['with torch.autocast("cpu", torch.bfloat16):', *_indented(loop)]
        forward = [*self.routing(), *accumulator, *before, *loop, *after_combine, *after_others, *after, *end]
        lines = [*self._globals(), *self._expert_class(expert_forward), *self._block_class(forward)]
        return "\n".join([*lines, ""])

    def _globals(self) -> list[str]:
        return {
            "global": ["FACTOR = 2", "", ""],
            "global function": ["def scaled(h):", "    return h * 2", "", ""],
        }.get(self.program.changes, [])

    def _change(self) -> list[str]:
        """The method that is called between two calls."""
        program = self.program
        if program.changes == "none":
            return []
        keys = ["'expert_1'", "'expert_0'"] if program.storage == "ModuleDict" else ["1", "0"]
        one, other = (f"self.experts[{key}]" for key in keys)
        experts = "self.experts.values()" if program.storage == "ModuleDict" else "self.experts"
        owner = one if program.has_modules else "self"
        name = next(iter(self.parameters), None)
        stored = f"{name}[1]" if program.storage == "ParameterList" else name
        if name is None:
            owner, stored = "self", "router"
        if stored == f"{name}[1]" and program.changes == "another parameter":
            code = f"self.{stored} = nn.Parameter(self.{stored}.detach() * 2)"
        else:
            given = {"one": one, "other": other, "experts": experts, "owner": owner, "name": stored}
            code = CHANGES[program.changes].format(**given)
        return ["", "    def change(self):", f"        {code}"]

    def _expert_class(self, forward: list[str]) -> list[str]:
        if not self.program.has_modules:
            return []
        made = [f"self.{name} = {self.made(shape)}" for name, shape in self.parameters.items()]
        if self.program.changes in ("attributes of the experts", "attribute of one expert"):
            made += ["self.factor = 2"]
        lines = ["class Expert(nn.Module):", "    def __init__(self, number):"]
        if self.program.changes == "attribute of the class":
            lines[1:1] = ["    factor = 2", ""]
        lines += _indented(["super().__init__()", "self.number = number", *made], 2)
        if forward:
            lines += ["", "    def forward(self, h):", *_indented([*forward, "return h"], 2)]
        return [*lines, "", ""]

    def _block_class(self, forward: list[str]) -> list[str]:
        program, e = self.program, self.program.experts
        made = ["super().__init__()"]
        made += [f"self.router = nn.Parameter(torch.randn({HIDDEN}, {e}))"]
        if program.start == "shared expert":
            made += [f"self.shared = {self.made((HIDDEN, HIDDEN))}"]
        made += [
            f'self.register_buffer("{name}", torch.arange({_product(shape)}.0).view({", ".join(map(str, shape))}))'
            for name, shape in self.buffers.items()
        ]
        if program.changes == "attribute of the block":
            made += ["self.factor = 2"]
        if program.extra == "counts calls":
            made += ["self.calls = 0"]
        if program.extra == "notes sizes":
            made += ["self.notes = []"]
        made += self._experts()
        arguments = "x, ids, weights" if program.takes_ids else "x"
        name = "Block" if program.layers == 1 else "Layer"
        lines = [
            f"class {name}(nn.Module):",
            *(['    around = torch.autocast("cpu", torch.bfloat16)', ""] if program.autocast == "outside" else []),
            "    def __init__(self):",
            *_indented(made, 2),
            "",
            f"    def forward(self, {arguments}):",
            *_indented(forward, 2),
            *self._change(),
        ]
        if program.layers == 1:
            return lines
        text = f"""

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range({program.layers}))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x"""
        return [*lines, *text.splitlines()]

    def _experts(self) -> list[str]:
        program, e = self.program, self.program.experts
        if program.has_modules:
            number = "1.5 + i" if program.storage == "numbered" else "1.5"
            if program.storage == "ModuleDict":
                return [f'self.experts = nn.ModuleDict({{f"expert_{{i}}": Expert({number}) for i in range({e})}})']
            lines = [f"self.experts = nn.ModuleList(Expert({number}) for i in range({e}))"]
            return [*lines, "self.experts[2] = self.experts[0]"] if program.storage == "tied" else lines
        made = []
        for name, shape in self.parameters.items():
            if program.storage == "ParameterList":
                made += [f"self.{name} = nn.ParameterList({self.made(shape)} for _ in range({e}))"]
                continue
            if program.storage == "flat":
                stored: tuple[int, ...] = (e * shape[0], *shape[1:])
            elif program.storage == "transposed" and len(shape) == 2:
                stored = (e, shape[1], shape[0])
            else:
                stored = (e, *shape)
            if program.narrow == "table":
                stored = (e - 1, *stored[1:])
            made += [f"self.{name} = {self.made(stored)}"]
        return made


def _indented(lines: list[str], by: int = 1) -> list[str]:
    return [" " * 4 * by + line for line in lines]


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * _product(shape[1:]) if shape else 1


IMPORTS = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"


def source(program: Program, exact: bool = False) -> str:
    """The module, as a user would have written it. ``exact``: without any dtype below float64, and without autocast."""
    text = IMPORTS + _Renderer(program).render()
    text = f"import copy\n\n{text}" if "copy.deepcopy" in text else text
    if exact:
        text = re.sub(r"torch\.autocast\([^)]*\)", "contextlib.nullcontext()", text)
        text = re.sub(r"torch\.(float32|float16|bfloat16)\b", "torch.float64", text)
    return text


_number = itertools.count()


def make_class(program: Program, exact: bool = False) -> type[nn.Module]:
    """The module's class. Dynamo and tracebacks find its source."""
    text, name = source(program, exact), f"<generated {next(_number)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "generated", "contextlib": contextlib}
    exec(compile(text, name, "exec"), namespace)
    made: type[nn.Module] = namespace["Block"]
    return made


# --- running it -------------------------------------------------------------------------------------------------------


class Defect(AssertionError):
    """What must not be: WRONG, CRASH or SILENT, and what was seen."""

    def __init__(self, label: str, what: str, program: Program) -> None:
        super().__init__(f"{label} {what}\n{program}\n\n{source(program)}")
        self.label, self.what, self.program = label, what, program


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        kind: ``rewritten``; ``refused``; ``silent``: unrolled without a word; ``raises``: both eager and compiled fail;
            ``stock``: it is left as it is or something was changed between calls or eager raises, and stock
            ``torch.compile`` fails in the same way; ``invalid``: there is nothing to compare with; ``defect``.
        reasons: why it is refused, or the label of the defect.
    """

    kind: str
    reasons: tuple[str, ...] = ()


def arguments(program: Program, call: int) -> tuple[Tensor, ...]:
    """What the module is called with the ``call``-th time, in the program's dtype."""
    generator = torch.Generator().manual_seed(11 + call)
    tokens, k, e = program.tokens[call], program.top_k, program.experts
    batch = (2 if tokens % 2 == 0 and tokens else 1, -1) if program.batched else (-1,)
    dtype = DTYPES[program.dtype]
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    x = (x * 5000 if program.is_integer else x).to(dtype)
    scores = torch.rand(tokens, e, generator=generator, dtype=torch.float64)
    weights, ids = scores.topk(k)
    if e > 4:  # those that a small dtype takes for each other
        ids = torch.where(ids % 2 == 0, ids % 4, e - 1 - ids % 4)
    marked = torch.rand(tokens, k, generator=generator) < 0.4
    if program.given == "repeated":
        ids = torch.randint(0, e, ids.shape, generator=generator)
        ids[:2] = 2
    elif program.given == "one idle":
        ids = ids.clamp(min=1)
    elif program.given == "all on one":
        ids = torch.ones_like(ids)
    elif program.given == "sentinels":
        ids = torch.where(marked, torch.where(weights > 0.7, e, e + 3), ids)
    elif program.given == "negative":
        ids = torch.where(marked, -1, ids)
    if program.values == "infinite token":
        x[1:2, 0] = torch.inf
    elif program.values == "zero token":
        x[:2] = 0
    ids = ids.to(getattr(torch, program.ids_dtype))
    weights = (weights * 4).ceil() if program.is_integer else weights
    weights = weights.to(torch.float32 if program.wide_weights else dtype)
    sizes = (batch[0], tokens // batch[0]) if program.batched else (tokens,)
    x, ids, weights = (t.view(*sizes, t.shape[-1]).clone() for t in (x, ids, weights))
    if program.values == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    x.requires_grad_(program.grad and program.values != "without gradient")
    return (x, ids, weights) if program.takes_ids else (x,)


Observed = dict[str, Any]
"""What one call gave and left behind: tensors and Python values, by name."""


def observe(run: Callable[..., Tensor], module: nn.Module, args: tuple[Tensor, ...], grad: bool) -> Observed:
    """Call ``run``, which is ``module`` or was compiled from it."""
    torch.manual_seed(0)
    module.zero_grad()
    # A copy keeps the strides. Whether the hidden states want a gradient is a property of the program.
    wants_grad = [grad and arg.is_floating_point() and (i > 0 or arg.requires_grad) for i, arg in enumerate(args)]
    args = tuple(arg.detach().clone().requires_grad_(wants) for arg, wants in zip(args, wants_grad, strict=True))
    around = getattr(module, "around", contextlib.nullcontext())
    with torch.set_grad_enabled(grad), around:
        result = run(*args)
    observed: Observed = {"result": result.detach().clone()}
    if grad:
        weight = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view_as(result).to(result.dtype)
        loss = (result * weight).sum() + args[0].sum()
        if loss.requires_grad:  # some results depend on nothing that has a gradient
            loss.backward()
        leaves = {**{f"argument {i}": arg for i, arg in enumerate(args)}, **dict(module.named_parameters())}
        observed.update({f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad})
    observed.update({f"argument {i} after": arg.detach().clone() for i, arg in enumerate(args)})
    observed.update({f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()})
    for path, part in module.named_modules():
        names = [name for name in ("calls", "notes") if hasattr(part, name)]
        observed.update({f"attribute {path}.{name}": copy.copy(getattr(part, name)) for name in names})
    return observed


@torch.no_grad()
def train(module: nn.Module) -> None:
    """A step along the gradient that the last call left."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter -= 0.01 * parameter.grad.nan_to_num(0.0).clamp(-1, 1)


def difference(
    given: Observed, wanted: Observed, exact: Observed | None, rounding: float = 0.0, signed: bool = False
) -> str | None:
    """What differs, in words.

    Args:
        given: what the compiled module gave.
        wanted: what eager gives.
        exact: the same in float64, where there is a lower dtype.
        rounding: the relative error of a cast on the way, where that is more than the one of the dtype.
        signed: whether 0.0 is to be told from -0.0 in the result.
    """
    for name, expected in wanted.items():
        actual = given[name]
        if not isinstance(expected, Tensor) and not isinstance(actual, Tensor):
            if expected != actual:
                return f"{name}: {actual} is not {expected}"
            continue
        if expected is None or actual is None:
            # An expert without rows: None in eager where its parameters were not used, zeros from a table.
            if any(grad is not None and bool(grad.any()) for grad in (actual, expected)):
                return f"{name}: {actual} is not {expected}"
            continue
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            return f"{name}: {actual.dtype} {tuple(actual.shape)} is not {expected.dtype} {tuple(expected.shape)}"
        if exact is not None and expected.is_floating_point():
            reference = exact[name]
            reference = torch.zeros_like(expected).double() if reference is None else reference.double()
            # Where eager has no number, another order of adding may well have one.
            numbers = expected.isfinite() & reference.isfinite()
            error, own = (_largest((t.double() - reference)[numbers]) for t in (actual, expected))
            eps = max(torch.finfo(expected.dtype).eps, rounding)
            if not error <= 4 * own + eps * _largest(reference[numbers]):
                return f"{name}: an error of {error:.3g}, where eager has {own:.3g}"
            if signed and name == "result" and (told := _other_sign(actual, expected)) is not None:
                return f"{name}: {told}"
            continue
        tolerances = {"rtol": 1e-9, "atol": 1e-11} if expected.is_floating_point() else {"rtol": 0, "atol": 0}
        try:
            torch.testing.assert_close(actual, expected, equal_nan=True, **tolerances)
        except AssertionError:
            return f"{name}: {_shown(actual)} is not {_shown(expected)}"
        if signed and name == "result" and (told := _other_sign(actual, expected)) is not None:
            return f"{name}: {told}"
    return None


def _other_sign(actual: Tensor, expected: Tensor) -> str | None:
    """Which zeros have another sign: ``1 / out`` tells them apart."""
    zeros = (actual == 0) & (expected == 0)
    other = zeros & (actual.signbit() != expected.signbit())
    return (
        f"{int(other.sum())} zeros of another sign: {_shown(actual)} is not {_shown(expected)}" if other.any() else None
    )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _shown(tensor: Tensor) -> str:
    values = tensor.flatten()[:6].tolist()
    return f"[{', '.join(f'{value:.6g}' for value in values)}{', ...' if tensor.numel() > 6 else ''}]"


class _Lines(logging.Handler):
    """Keeps what the logger says."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """The lines of the logger ``moe_rewrite`` while this is entered."""
    logger, handler = logging.getLogger("moe_rewrite"), _Lines()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


LEFT = "left as it is: "


def check(program: Program) -> Outcome:
    """Run a program in Python and compiled.

    Raises:
        Defect: they differ, only the one or the other fails, or a loop over hits is neither rewritten nor reported.
    """
    assert program.problem() is None, program.problem()
    wanted = expected(program)
    if wanted is None:
        return Outcome("invalid")
    options = {"inner": program.inner, "experts": program.experts_backend}
    with logged() as lines:
        defect = _compare(program, wanted, backend="moe_rewrite", options=options)
    rewritten = any(f"-> {program.experts_backend}" in line for line in lines)
    raises = wanted[-1].eager is None
    if defect is not None:
        # Stock torch.compile has no guards for some of what may be changed, and does not raise all that eager does.
        is_asked = not rewritten or raises or program.changes != "none"
        stock = _compare(program, wanted, backend=program.inner) if is_asked else None
        if stock is not None and (not rewritten or stock[0] == defect[0]):
            return Outcome("stock")
        became = "; ".join(lines) or "nothing was reported"
        told = f"{defect[1]} ({became})" if defect[0] in ("WRONG", "NO ERROR") else defect[1]
        raise Defect(defect[0], told, program)
    if raises:
        return Outcome("raises")
    refused = [line.removeprefix(LEFT) for line in lines if line.startswith(LEFT)]
    if refused:
        if not all(_reason(line) for line in refused):
            raise Defect("SILENT", f"a refusal without a reason: {refused}", program)
        return Outcome("refused", tuple(dict.fromkeys(map(_reason, refused))))
    if rewritten:
        return Outcome("rewritten")
    does_something = max(program.tokens) > (1 if program.selection == "expert choice" else 0)
    if program.loop == HITS and does_something:
        raise Defect("SILENT", f"the loop is not rewritten, and nothing says why: {lines}", program)
    return Outcome("silent")


@dataclasses.dataclass(frozen=True)
class _Expected:
    """What one call is to give: in eager, and in float64 where there is a lower dtype.

    ``eager`` is None where the call fails.
    """

    args: tuple[Tensor, ...]
    eager: Observed | None
    exact: Observed | None


def _module(program: Program, dtype: torch.dtype, exact: bool = False) -> nn.Module:
    """A new module with the program's parameters, as its dtype rounds them."""
    torch.manual_seed(1)
    module = make_class(program, exact)()
    return module if program.is_integer else module.to(DTYPES[program.dtype]).to(dtype)


def _changed(module: nn.Module) -> None:
    """What the program changes between two calls."""
    if hasattr(module, "change"):
        module.change()


def expected(program: Program) -> list[_Expected] | None:
    """Of each call, up to the first that fails; None where nothing can be said of the error of one."""
    eager = _module(program, DTYPES[program.dtype])
    double = _module(program, torch.float64, exact=True) if program.has_error else None
    calls: list[_Expected] = []
    for call in range(len(program.tokens)):
        args, exact = arguments(program, call), None
        if call:
            _changed(eager)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                seen = observe(eager, eager, args, program.grad)
            except Exception as error:
                # AOTAutograd makes a graph without operators in place, which has no such error.
                is_of_eager_alone = "modified by an inplace operation" in str(error)
                return None if is_of_eager_alone else [*calls, _Expected(args, None, None)]
            if double is not None:
                if call:
                    _changed(double)
                try:
                    exact = observe(double, double, tuple(map(_doubled, args)), program.grad)
                except Exception:
                    return None
        calls.append(_Expected(args, seen, exact))
        if exact is None and not program.is_integer:
            train(eager)
    return calls


def _doubled(arg: Tensor) -> Tensor:
    return arg.detach().double().requires_grad_(arg.requires_grad) if arg.is_floating_point() else arg


def _compare(program: Program, wanted: list[_Expected], **how: Any) -> tuple[str, str] | None:
    """What is wrong with the program compiled in this way: ``(label, what)``."""
    torch._dynamo.reset()
    model = _module(program, DTYPES[program.dtype])
    compiled = torch.compile(model, **how)
    for number, call in enumerate(wanted):
        if number:
            _changed(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                given = observe(compiled, model, call.args, program.grad)
            except TimeoutError:
                raise
            except Exception as error:
                return ("CRASH", _error(error)) if call.eager is not None else None
        if call.eager is None:
            return "NO ERROR", "eager raises"
        what = difference(given, call.eager, call.exact, program.rounding, program.start == "negative zeros")
        if what is not None:
            return "WRONG", what
        if call.exact is None and not program.is_integer:
            train(model)
    return None


def _error(error: BaseException) -> str:
    """The first line that says something, and the last place."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = next((line for line in lines if line and not line.startswith("backend=")), "")
    places = [f"{Path(f.filename).name}:{f.name}" for f in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {said} (at {', '.join(places[-1:])})"


def _reason(refusal: str) -> str:
    """The reason of a refusal, without what stands for the one loop only: its module, the node and the place."""
    reason = re.sub(r" \([^()]*<generated \d+>:\d+[^()]*\)$", "", refusal)
    reason = re.sub(r",? at <generated \d+>:\d+", "", reason)
    reason = re.sub(r" \(at `\w+`\)| \(unhinted.*", "", reason)
    reason = re.sub(r"\bu\d+\b", "u", reason)
    return re.sub(r"\s+", " ", reason.partition(": ")[2]).strip()


# --- making a failing program small -----------------------------------------------------------------------------------


def same_defect(program: Program, label: str) -> Defect | None:
    """The defect of ``label`` that the program has, if it has one."""
    if program.problem() is not None:
        return None
    try:
        with _limit(120):
            check(program)
    except Defect as defect:
        return defect if defect.label == label else None
    except Exception:
        return None
    return None


def minimise(defect: Defect) -> Defect:
    """The same sort of defect in a program that differs from the plain one in as little as can be found."""
    plain, found = Program(), defect
    part = 2
    while part <= 2 * len(_deviations(found.program)):  # large pieces first: few of many deviations matter
        deviations = _deviations(found.program)
        size = -(-len(deviations) // part)
        pieces = [deviations[i : i + size] for i in range(0, len(deviations), size)]
        for piece in pieces:
            again = _same_kind(_without(found.program, piece), found)
            found = found if again is None else again
        part *= 2
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(found.program, plain):
            again = _same_kind(smaller, found)
            if again is not None:
                found, changed = again, True
                break
    return found


def _same_kind(program: Program, defect: Defect) -> Defect | None:
    again = same_defect(program, defect.label) if program != defect.program else None
    return again if again is not None and _kind(again) == _kind(defect) else None


def _deviations(program: Program) -> list[tuple[str, Any]]:
    """In what a program differs from the plain one: its fields and their values; each step and write for itself."""
    plain, found = Program(), []
    for field in dataclasses.fields(program):
        value = getattr(program, field.name)
        if field.name in ("steps", "writes"):
            found += [(field.name, entry) for entry in dict.fromkeys(value) if entry not in getattr(plain, field.name)]
        elif value != getattr(plain, field.name):
            found.append((field.name, value))
    return found


def _without(program: Program, deviations: list[tuple[str, Any]]) -> Program:
    """A program that is plain in these, as far as it is one then."""
    plain, names = Program(), {name for name, _ in deviations}
    fields = {name: getattr(plain, name) for name in names - {"steps", "writes"}}
    for name in names & {"steps", "writes"}:
        gone = {value for field, value in deviations if field == name}
        fields[name] = tuple(value for value in getattr(program, name) if value not in gone)
    smaller = dataclasses.replace(program, **fields)
    smaller = dataclasses.replace(smaller, called=min(smaller.called, len(smaller.steps)))
    if not smaller.writes:
        smaller = dataclasses.replace(smaller, target="apart", paths="both")
    if smaller.combine not in COMBINES[smaller.position]:
        smaller = dataclasses.replace(smaller, combine=COMBINES[smaller.position][0])
    return smaller


def is_covered(program: Program, small: Program) -> bool:
    """Whether all deviations of ``small`` are among those of ``program``."""
    return set(_deviations(small)) <= set(_deviations(program))


def _kind(defect: Defect) -> str:
    """What tells sorts of defects apart: the label, and the error."""
    return f"CRASH {re.sub(r'[0-9]+', '0', defect.what)}" if defect.label == "CRASH" else defect.label


def _smaller(program: Program, plain: Program) -> Iterator[Program]:
    """Programs with one thing less."""
    for i in range(len(program.tokens) - 1, -1, -1):
        if len(program.tokens) > 1:
            yield dataclasses.replace(program, tokens=program.tokens[:i] + program.tokens[i + 1 :])
    for i in range(len(program.steps)):
        steps = program.steps[:i] + program.steps[i + 1 :]
        yield dataclasses.replace(program, steps=steps, called=program.called - (i < program.called))
        yield dataclasses.replace(program, steps=steps, called=min(program.called, len(steps)))
    for i in range(len(program.writes)):
        writes = program.writes[:i] + program.writes[i + 1 :]
        yield dataclasses.replace(program, writes=writes)
        yield dataclasses.replace(program, writes=writes, target="apart", paths="both")
    pairs = {
        **{"selection": "combine", "routing": "top_k", "storage": "called", "loop": "index", "given": "mask"},
        **{"moved": "moved_in", "dtype": "grad", "autocast": "dtype", "arange_dtype": "mask", "narrow": "mask"},
        **{"experts": "arange_dtype", "start": "dtype", "wide_weights": "dtype"},
    }
    for field in dataclasses.fields(program):
        if field.name in ("steps", "writes") or getattr(program, field.name) == getattr(plain, field.name):
            continue
        smaller = dataclasses.replace(program, **{field.name: getattr(plain, field.name)})
        yield smaller
        if field.name in pairs:
            other = pairs[field.name]
            yield dataclasses.replace(smaller, **{other: getattr(plain, other)})


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# --- many of them -----------------------------------------------------------------------------------------------------


def survey(count: int, seed: int, folder: Path | None) -> list[tuple[Program, Outcome]]:
    """What became of ``count`` programs.

    Args:
        count: how many.
        seed: of the choices. Runs with other seeds may go on beside this one, with the same folder.
        folder: where each outcome is noted at once, and each new sort of defect is put, made small.
    """
    outcomes: list[tuple[Program, Outcome]] = []
    generator = random.Random(seed)
    note = contextlib.nullcontext() if folder is None else (folder / f"outcomes-{seed}.jsonl").open("w")
    with note as file:
        while len(outcomes) < count:
            program, started, what = build(generator.choice), time.process_time(), ""
            try:
                with _limit(300):
                    outcome = check(program)
            except Defect as defect:
                outcome = Outcome("defect", (defect.label,))
                print(f"{defect.label} {defect.what}\n{defect.program}", file=sys.stderr, flush=True)
                what = defect.label if folder is None else _write_down(defect, folder)
            except Exception:  # of the generator, or a program that takes too long: not to end a long run
                outcome = Outcome("defect", ("ERROR",))
                what = f"ERROR {traceback.format_exc().splitlines()[-1]}"
                print(f"ERROR {program}\n{traceback.format_exc()}", file=sys.stderr)
            seconds = time.process_time() - started
            outcomes.append((program, outcome))
            if file is not None:
                entry = {**dataclasses.asdict(outcome), "program": dataclasses.asdict(program)}
                file.write(json.dumps({**entry, "defect": what, "seconds": round(seconds, 2)}) + "\n")
                file.flush()
            became = f"{outcome.kind} {program} {'; '.join(outcome.reasons)}"
            print(f"{len(outcomes)} {seconds:.1f}s {became}", file=sys.stderr, flush=True)
    return outcomes


def _write_down(defect: Defect, folder: Path) -> str:
    """Put a defect into a file of its own, made small, unless one like it is there. Returns the file's name.

    A program with all that a known small one has, and more, is taken for another one of that.
    """
    for path in sorted(folder.glob("*.json")):
        known = json.loads(path.read_text())
        if known["kind"] == _kind(defect) and is_covered(defect.program, _program(known["program"])):
            return path.stem
    with contextlib.suppress(TimeoutError), _limit(900):
        defect = minimise(defect)
    digest = hashlib.sha256(f"{_kind(defect)} {defect.program}".encode()).hexdigest()[:8]
    name = f"{defect.label.lower().replace(' ', '-')}-{digest}"
    text = f"## {defect.label} {defect.what}\n\n`{defect.program}`\n\n```python\n{source(defect.program)}```\n"
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(
        json.dumps({"kind": _kind(defect), "program": dataclasses.asdict(defect.program)})
    )
    return name


def _program(fields: dict[str, Any]) -> Program:
    """A program that was written as JSON."""
    return Program(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def merged(folder: Path) -> tuple[list[tuple[Program, Outcome]], str]:
    """The outcomes of all runs with this folder, and a summary of their defects."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    outcomes = [(_program(line["program"]), Outcome(line["kind"], tuple(line["reasons"]))) for line in lines]
    kinds = collections.Counter(outcome.kind for _, outcome in outcomes)
    defects = collections.Counter(line["defect"] for line in lines if line["defect"])
    seconds = sum(line["seconds"] for line in lines)
    counted = [f"{len(lines)} programs, {seconds / max(len(lines), 1):.2f} s each", f"{dict(kinds)}"]
    for name, number in defects.most_common():
        path = folder / f"{name}.md"
        told = path.read_text().splitlines()[:3:2] if path.exists() else []
        counted.append(f"{number} x {name} {' '.join(told)[:300]}")
    return outcomes, "\n".join(counted)


DIMENSIONS: dict[str, Callable[[Program], Iterable[str]]] = {
    "routing": lambda p: [p.routing if not p.takes_ids else f"given, {p.given}"],
    "loop": lambda p: [p.loop],
    "index of hits": lambda p: [p.index] if p.loop == HITS else [],
    "selection": lambda p: [p.selection],
    "rows taken by": lambda p: [p.gather],
    "skip": lambda p: [p.skip],
    "combine": lambda p: [f"{p.combine} ({p.position})"],
    "start of the result": lambda p: [p.start],
    "storage": lambda p: [p.storage],
    "step": lambda p: sorted(set(p.steps) - set(TRAPS)),
    "trap": lambda p: sorted(set(p.steps) & set(TRAPS)),
    "besides": lambda p: [p.extra] if p.extra != "none" else [],
    "dtype": lambda p: [p.dtype],
    "dtype of ids": lambda p: [p.ids_dtype],
    "hidden states": lambda p: [p.values],
    "layers": lambda p: [str(p.layers)],
    "another write": lambda p: [f"{write} ({p.position})" for write in p.writes],
    "written to": lambda p: [p.target] if p.writes else [],
    "paths": lambda p: [p.paths] if p.writes else [],
    "positions": lambda p: [p.moved] if p.moved != "t" else [],
    "alpha": lambda p: [str(p.alpha)] if p.alpha != 1 else [],
    "dtype of the result": lambda p: (
        [f"{p.out_dtype}{'' if p.cast else ', not cast'}"] if p.out_dtype != "same" else []
    ),
    "autocast": lambda p: [p.autocast] if p.autocast != "none" else [],
    "dtype of arange": lambda p: [p.arange_dtype] if p.arange_dtype != "int64" else [],
    "experts": lambda p: [str(p.experts)] if p.experts > 4 else [],
    "too short": lambda p: [p.narrow] if p.narrow != "none" else [],
    "changed between calls": lambda p: [p.changes] if p.changes != "none" else [],
    "tokens": lambda p: [", then ".join(map(str, p.tokens))] if len(p.tokens) == 1 else ["two numbers, in two calls"],
}


def page(outcomes: list[tuple[Program, Outcome]], command: str) -> str:
    """The page on what is rewritten."""
    valid = [(program, outcome) for program, outcome in outcomes if outcome.kind not in ("invalid", "raises")]
    plain = [(program, outcome) for program, outcome in valid if not program.is_trap]
    kinds = collections.Counter(outcome.kind for _, outcome in valid)
    reasons = collections.Counter(reason for _, outcome in valid for reason in outcome.reasons)
    raising = sum(outcome.kind == "raises" for _, outcome in outcomes)
    failing = len(outcomes) - len(valid) - raising
    text = f"""\
# Generated loops

`tests/generator.py` draws experts loops from a grammar: a dispatch, a row program, a way to combine and a storage
of the parameters, each in the spellings that models use, and some traps that only look like experts loops. Every
program runs in Python and compiled, with one of the experts backends; results, gradients, side effects, shapes and
dtypes are compared. This page says what share of them is rewritten. It is made by

    {command}

with torch {torch.__version__.split("+")[0]}: {len(outcomes)} programs, of which {raising} raise an error, in eager and
compiled, and {failing} have nothing to be compared with; these do not count.

| | programs |
| --- | ---: |
| rewritten | {kinds["rewritten"]} |
| left as it is, with a reason | {kinds["refused"]} |
| a loop of known length that Dynamo unrolls, without a word | {kinds["silent"]} |
| left as it is, and stock `torch.compile` fails in the same way | {kinds["stock"]} |
| wrong, failed, or not reported | {kinds["defect"]} |

The dimensions are drawn apart from each other, so that many a program holds several things that no model has at
once, and each of them may be why it is left. Of the {len(plain)} programs without a trap,
{_share(outcome.kind == "rewritten" for _, outcome in plain)} are rewritten.

## What is rewritten

Programs without a trap, but for the rows of *trap* and *besides*, which count all.

"""
    lines = text.splitlines()
    lines += ["| | | programs | rewritten | refused | unrolled |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for dimension, values in DIMENSIONS.items():
        counted: dict[str, list[str]] = collections.defaultdict(list)
        for program, outcome in valid if dimension in ("trap", "besides") else plain:
            for value in values(program):
                counted[value].append(outcome.kind)
        for value, seen in sorted(counted.items(), key=lambda item: -_fraction(item[1], "rewritten")):
            shares = " | ".join(f"{_fraction(seen, kind):.0%}" for kind in ("rewritten", "refused", "silent"))
            lines.append(f"| {dimension} | `{value}` | {len(seen)} | {shares} |")
    lines += ["", "## Why loops are left", "", "| programs | reason |", "| ---: | --- |"]
    lines += [f"| {number} | {reason.replace('|', chr(92) + '|')} |" for reason, number in reasons.most_common(40)]
    return "\n".join(lines)


def _share(truths: Iterable[bool]) -> str:
    values = list(truths)
    return f"{sum(values) / max(len(values), 1):.0%}"


def _fraction(kinds: list[str], kind: str) -> float:
    return kinds.count(kind) / max(len(kinds), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw experts loops, check them, and print what became of them.")
    parser.add_argument("--count", type=int, default=500, help="how many programs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--defects", type=Path, help="a folder for each defect, made small, and for what was seen")
    parser.add_argument("--merge", type=Path, help="a folder of such runs: print what became of all of them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "torch._subclasses.fake_tensor", "torch.fx"):  # what fails is told by the defect
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    if given.merge is not None:
        outcomes, summary = merged(given.merge)
        print(summary, file=sys.stderr)
        print(page(outcomes, f"python tests/generator.py --merge {given.merge.name} > docs/generated-loops.md"))
        return
    if given.defects is not None:
        given.defects.mkdir(parents=True, exist_ok=True)
    seed = f" --seed {given.seed}" if given.seed else ""
    outcomes = survey(given.count, given.seed, given.defects)
    print(page(outcomes, f"python tests/generator.py --count {given.count}{seed} > docs/generated-loops.md"))


if __name__ == "__main__":
    main()
