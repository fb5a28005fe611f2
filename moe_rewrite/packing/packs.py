"""Packs: the tables of some experts, and the module that is traced in their place."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.packing.alike import (
    INTERNAL,
    Anatomy,
    NotAlike,
    anatomies,
    copied,
    difference,
    is_unreal,
    join,
    tensor_attributes,
)
from moe_rewrite.packing.structure import Structure, TableSpec, same_attributes
from moe_rewrite.packing.table import Table, check_memory, let_go_of, ordinary_tensors
from moe_rewrite.packing.watch import ModulesWatch, TensorsWatch

log = logging.getLogger("moe_rewrite")

_packs: weakref.WeakKeyDictionary[nn.Module, list[Pack]] = weakref.WeakKeyDictionary()
"""The packs of the experts that begin with a module, the latest last. Packs do not keep that module."""

_refused: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The first of those experts that :func:`pack_of` could not pack."""

_tables: weakref.WeakValueDictionary[tuple[int, ...], Table] = weakref.WeakValueDictionary()
"""The tables that hold parameters, by the ids of those. Modules in two places may have the same parameters."""

_MOST_PACKS = 8
"""How many packs of one list of experts are remembered. As many as Dynamo compiles a function by default."""

_lock = threading.RLock()

ABSENT = object()
"""Stands for an attribute that is not there."""


def pack(modules: Sequence[nn.Module], *, copy: bool = True) -> Pack:
    """Put the parameters and buffers of alike experts into one table for each name.

    The same pack comes back for as long as nothing changed. Where only attributes changed (``train()``, ``eval()``),
    the next pack has the same tables, and the earlier one is good again when the attributes are as they were.

    Args:
        modules: the experts: modules of one class that differ in nothing but the values of their parameters and
            buffers, and in which of them require a gradient.
        copy: move the parameters into the tables: each keeps its identity and becomes a view of its row. Without, they
            stay where they are and :meth:`Pack.inputs` stacks them at each call. Fake and meta tensors always stay.

    Raises:
        NotAlike: the experts cannot be packed; says which one, and why. Nothing was changed.
    """
    experts = list(modules)
    with _lock:
        if experts and isinstance(experts[0], nn.Module):
            for before in reversed(_packs.get(experts[0], [])):
                if before.copy == copy and before.unchanged(experts) and before.has_same_attributes():
                    return before
        made = Pack(anatomies(experts), copy)
        others = [before for before in _packs.get(experts[0], []) if not before.released]
        _packs[experts[0]] = [*others[1 - _MOST_PACKS :], made]
        return made


def pack_of(modules: Sequence[nn.Module], structure: Structure) -> Pack | None:
    """The pack of these experts if they are of a structure; None where they are not.

    Experts that are not packed yet are packed, so that code which was traced for others can serve them. Those that once
    could not be packed are not tried again.
    """
    if not structure.may_be_of(modules):
        return None
    first = modules[0]
    with _lock:
        for known in reversed(_packs.get(first, [])):
            if known.structure is structure and known.unchanged(modules):
                return known
        if first in _refused:
            return None
        try:
            found = pack(modules, copy=structure.copy)
        except NotAlike:
            _refused.add(first)
            return None
        found.release()
        return found if found.structure is structure else None


class Pack:
    """The tables of some experts. Made by :func:`pack`.

    Attributes:
        template: a module built as the experts are, of the same classes and with the same attributes. Parameters and
            buffers are views of row 0 of the tables. They require a gradient where those of any expert do.
        names: the paths of parameters and buffers from an expert: ``"w1.weight"``.
        structure: what code that was traced with a template depends on. Equal for alike experts, also of other packs.
        copy: as it was given to :func:`pack`.
        released: the tables are gone, for good.
    """

    def __init__(self, experts: Sequence[Anatomy], copy: bool) -> None:
        first = experts[0]
        self.names = tuple(first.tensors)
        self.copy = copy
        self.released = False
        members = {name: tuple(expert.tensors[name] for expert in experts) for name in self.names}
        self._unreal = any(map(is_unreal, first.tensors.values()))
        self._moves = copy and not self._unreal
        found = {name: _tables.get(tuple(map(id, those))) for name, those in members.items()} if self._moves else {}
        kept = {name: table for name, table in found.items() if table is not None and table.fits()}
        if self._moves:
            check_memory(
                {
                    join(f"experts[{number}]", name): tensor
                    for number, expert in enumerate(experts)
                    for name, tensor in expert.tensors.items()
                    if name not in kept
                }
            )
        self._tables = {name: kept.get(name) or Table(name, those, self._moves) for name, those in members.items()}
        if self._moves:
            _tables.update((tuple(map(id, table.members)), table) for table in self._tables.values())
        self._wants_grad = {name: any(t.requires_grad for t in those) for name, those in members.items()}
        with ordinary_tensors(self._unreal):
            self.template = _template(first, {name: self.table(name) for name in self.names})
        self._templates = [self.template]
        specs = tuple(TableSpec.of(name, those) for name, those in members.items())
        self.structure = Structure.shared(len(experts), copy, specs, anatomies([self.template])[0])
        self._modules_watch: ModulesWatch | None = ModulesWatch(experts)
        self._tensors_watch: TensorsWatch | None = TensorsWatch(
            [tensor for those in members.values() for tensor in those], may_move=not self._moves
        )
        gone = functools.partial(_gone, weakref.ref(self))
        self._experts = [weakref.ref(expert.modules[0], gone) for expert in experts]
        self._ids = [id(expert.modules[0]) for expert in experts]
        new = {name: table for name, table in self._tables.items() if table.packed and name not in kept}
        if new:
            log.info(
                "packed %d experts (%s): %s, %.1f MiB",
                len(experts),
                type(first.modules[0]).__name__,
                ", ".join(new),
                sum(table.nbytes for table in new.values()) / 2**20,
            )

    def template_of(self, number: int) -> nn.Module:
        """The template with a number, each an object of its own; :attr:`template` has number 0."""
        with ordinary_tensors(self._unreal):
            while len(self._templates) <= number:
                tables = {name: self.table(name) for name in self.names}
                self._templates.append(_template(anatomies([self.template])[0], tables))
        return self._templates[number]

    def table(self, name: str) -> Tensor:
        """All experts' ``name`` as ``[E, ...]``, to trace with: a leaf, detached from the parameters.

        Raises:
            MoeRewriteError: there is no such name.
        """
        return self._table(name).leaf(self._wants_grad[name])

    def members(self, name: str) -> tuple[Tensor, ...]:
        """Each expert's own ``name``.

        Raises:
            MoeRewriteError: there is no such name.
        """
        return self._table(name).members

    def inputs(self, name: str) -> Tensor:
        """What a call of the traced code gets for ``table(name)``.

        Where no gradient is wanted, the table itself. Else a tensor in the same memory, whose gradient goes to each
        expert's own parameter. Without ``copy``, the parameters stacked.

        Raises:
            MoeRewriteError: there is no such name, or the pack was released.
        """
        return self._table(name).read(self._wants_grad[name])

    def unchanged(self, modules: Sequence[nn.Module]) -> bool:
        """These are the experts of this pack, and tracing its template still means the same as tracing any of them.

        When their parameters are no longer in the tables, the tables are given up.

        What is not noticed: changes inside of attributes that are objects other than built-in containers (a config).
        The template has the same objects.
        """
        if self._modules_watch is None or self._tensors_watch is None or list(map(id, modules)) != self._ids:
            return False
        if self.holds:
            if self._modules_watch.unchanged(modules) and self._tensors_watch.unchanged():
                return True
            if self._has_own_tensors(modules):  # so only something else is different, and may come back
                return False
        self._give_up()
        return False

    def has_same_attributes(self) -> bool:
        """What was set on each tensor of the experts is what is set on that of the template."""
        template = self.structure.template.tensors
        return all(same_attributes(t, template[name]) for name, table in self._tables.items() for t in table.members)

    def has_attributes(self, asked: Mapping[tuple[str, str], Any]) -> bool:
        """Whether each expert's own tensor has some attributes.

        Args:
            asked: the value of an attribute, or :data:`ABSENT`, by the path of the tensor and the attribute's name.
        """
        return all(
            difference(vars(member).get(attribute, ABSENT), value) is None
            for (name, attribute), value in asked.items()
            for member in self.members(name)
        )

    @property
    def is_in_place(self) -> bool:
        """Whether the tables hold the parameters, so that their place in memory is the same at each call."""
        return self._moves

    @property
    def holds(self) -> bool:
        """Whether the parameters are still in the tables."""
        return all(map(Table.holds, self._tables.values()))

    def release(self) -> None:
        """Let go of the memory that is only there to trace with, until :meth:`table` is called again.

        Tables that hold the parameters have no such memory.
        """
        for table in self._tables.values():
            table.release()

    def _table(self, name: str) -> Table:
        if name not in self._tables:
            raise MoeRewriteError(f"no parameter or buffer {name!r}; there are: {', '.join(self.names) or 'none'}")
        return self._tables[name]

    def _has_own_tensors(self, modules: Sequence[nn.Module]) -> bool:
        """The experts still have the tensors that were packed."""
        now = [{id(tensor) for tensor in (*module.parameters(), *module.buffers())} for module in modules]
        return all(
            id(member) in have
            for table in self._tables.values()
            for member, have in zip(table.members, now, strict=True)
        )

    def _give_up(self) -> None:
        self.released = True
        self._modules_watch = self._tensors_watch = None
        for table in self._tables.values():
            table.give_up()
        if not self._unreal:
            let_go_of(tensor for one in self._templates for tensor in (*one.parameters(), *one.buffers()))


def _gone(pack: weakref.ref[Pack], _: Any) -> None:
    """An expert was deleted."""
    if sys.is_finalizing():  # nothing can be imported any more, and all memory goes
        return
    alive = pack()
    if alive is not None and not alive.released:
        alive._give_up()


def _template(first: Anatomy, tables: dict[str, Tensor]) -> nn.Module:
    clones = [object.__new__(type(module)) for module in first.modules]
    fresh = [vars(nn.Module()) for _ in clones]
    for clone, module, path, children, internals in zip(
        clones, first.modules, first.paths, first.children, fresh, strict=True
    ):
        # In the order of the module's own: the order of a `__dict__` can be seen.
        for name, value in vars(module).items():
            vars(clone)[name] = internals.get(name, value) if name in INTERNAL else copied(value)
        vars(clone)["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        vars(clone)["_modules"].update({name: None if at is None else clones[at] for name, at in children})
        for register in ("_parameters", "_buffers"):
            for name, tensor in vars(module)[register].items():
                row = None if tensor is None else _first_row(tables[join(path, name)], tensor)
                vars(clone)[register][name] = row
    return clones[0]


def _first_row(table: Tensor, like: Tensor) -> Tensor:
    row: Tensor = table.detach()[0].data  # no view of autograd's, which would keep the table
    row = nn.Parameter(row, requires_grad=False) if isinstance(like, nn.Parameter) else row
    row.requires_grad_(table.requires_grad)
    vars(row).update({name: copied(value) for name, value in tensor_attributes(like).items()})
    return row
