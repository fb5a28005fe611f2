"""Experts that are modules: one of them is traced, for a symbolic index, in the place of all.

The parameters of alike modules are kept in one table for each name (``moe_rewrite.packing``). Dynamo traces a template
of the modules, whose parameters are ``moe_rewrite.select(table, 0, index)``.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary  # seen to work in 2.11, 2.13 and 2.15

from moe_rewrite import packing
from moe_rewrite.capture import dynamo, dynamo_modules
from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.memory import is_written_to
from moe_rewrite.tree import REGISTERS

_PICKING = {
    nn.ModuleList: ("__getitem__", "__getattr__", "__len__", "_get_abs_string_index"),
    nn.ModuleDict: ("__getitem__", "__getattr__", "__len__"),
    nn.ParameterList: ("__getitem__", "__getattr__", "__getattribute__", "__len__", "_get_abs_string_index"),
    nn.ParameterDict: ("__getitem__", "__getattr__", "__getattribute__", "_key_to_attr"),
    nn.Module: ("__getattr__", "__getattribute__"),
}
"""What decides which entry of a container an index picks."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where in a container the experts are, or their parameters.

    Attributes:
        keys: their keys, by index.
        register: what they are registered as: ``"_modules"``, ``"_parameters"`` or ``"_buffers"``.
        are_attributes: whether the index picks them as attributes, which something else may stand before.
    """

    keys: tuple[str, ...]
    register: str = "_modules"
    are_attributes: bool = False

    @classmethod
    def of_attributes(cls, holder: nn.Module, names: Sequence[str]) -> Places:
        """Those of ``getattr(holder, name)``, up to a name that is not in the same register as the first."""
        first = next((register for register in REGISTERS if names[0] in vars(holder)[register]), "_modules")
        return cls(tuple(itertools.takewhile(vars(holder)[first].__contains__, names)), first, are_attributes=True)

    def experts(self, container: nn.Module) -> tuple[nn.Module, ...] | None:
        """What is there, each as a module; None where something is not there, or is not found."""
        if self.are_attributes:
            registers = itertools.takewhile(lambda register: register != self.register, REGISTERS)
            before = (vars(container), *(vars(container)[register] for register in registers))
            if any(key in there for key in self.keys for there in before):
                return None
            if any(hasattr(type(container), key) for key in self.keys):
                return None
        return packing.singles(container, self.register, self.keys)

    def are_changed(self, tx: Any, container: nn.Module) -> bool:
        """Whether the traced code may find something else there by now than what was there before."""
        attributes = dynamo_modules.changed_attributes(tx, container)
        if any(name in self.keys or name.startswith("_") for name in attributes):
            return True
        registers = [vars(container)[register] for register in REGISTERS]
        return any(dynamo_modules.has_other_contents(tx, register, self.keys) for register in registers)


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertModules:
    """Modules that a loop's index picks from, or parameters: each of those is a module of one.

    Attributes:
        source: where the traced code finds the container that holds them.
        places: where in it they are, by index.
        modules: the modules, by index; None where a list has None, for an expert that is held elsewhere.
    """

    source: Any
    places: Places
    modules: tuple[nn.Module | None, ...]

    @classmethod
    def of_list(cls, container: Any) -> ExpertModules | None:
        """Those of a ``ModuleList`` or a ``ParameterList``, as its ``[index]`` finds them; None for other variables."""
        for kind in (nn.ModuleList, nn.ParameterList):
            if dynamo_modules.is_like(container, kind, _PICKING[kind]):
                names = list(map(str, range(len(container.value))))
                return cls._at(container, names, len(names), are_attributes=kind is nn.ParameterList)
        return None

    @classmethod
    def of_dict(cls, container: Any, keys: list[str], least: int) -> ExpertModules | None:
        """Those that a ``ModuleDict`` or a ``ParameterDict`` has under ``keys``, up to one that is missing.

        None for other variables, and where there are not ``least``.
        """
        for kind in (nn.ModuleDict, nn.ParameterDict):
            if dynamo_modules.is_like(container, kind, _PICKING[kind]):
                return cls._at(container, keys, least, are_attributes=kind is nn.ParameterDict)
        return None

    @classmethod
    def of_attributes(cls, container: Any, names: list[str], least: int) -> ExpertModules | None:
        """What :meth:`of_dict` says, of what a module has registered as attributes called ``names``."""
        if not dynamo_modules.is_like(container, nn.Module, _PICKING[nn.Module]):
            return None
        return cls._at(container, names, least, are_attributes=True)

    @classmethod
    def _at(cls, container: Any, keys: list[str], least: int, are_attributes: bool) -> ExpertModules | None:
        found = dynamo_modules.sourced_module(container)
        if found is None or not keys:
            return None
        source, module = found
        if are_attributes:
            places = Places.of_attributes(module, keys)
        else:
            places = Places(tuple(itertools.takewhile(module._modules.__contains__, keys)))
        if len(places.keys) < least:
            return None
        modules: tuple[nn.Module | None, ...] | None = places.experts(module)
        if modules is None and not are_attributes:
            modules = tuple(map(module._modules.__getitem__, places.keys))
        return None if modules is None else cls(source, places, modules)

    @classmethod
    def of_items(cls, items: list[Any]) -> ExpertModules | None:
        """Those that a loop iterates, taken out of one container; None for anything else."""
        modules = [dynamo_modules.module_value(item) for item in items]
        present = [item for item, module in zip(items, modules, strict=True) if module is not None]
        places = [dynamo_modules.source_of_item(item) for item in present]
        if not places or any(place is None or place[0] != places[0][0] for place in places):
            return None
        keys = [key for _, key in places]  # type: ignore[misc]
        if len(present) < len(items):
            keys = list(map(str, range(len(items))))
            alike = (key == at[1] for key, module, at in _beside(keys, modules, places))
            nothing = (dynamo_modules.is_nothing(i) for i, m in zip(items, modules, strict=True) if m is None)
            if not all(alike) or not all(nothing):
                return None
        return cls(places[0][0], Places(tuple(keys)), tuple(modules))  # type: ignore[index]

    def __len__(self) -> int:
        return len(self.modules)

    def at_index(self, tx: Any, loop: Any, offset: int = 0) -> Any:
        """The variable of the module (the parameter) at the index of ``loop`` plus ``offset``."""
        operator = dynamo.enclosing_operator(tx)
        if operator is not None:
            # Dynamo may use what it traced again for other modules, and asks none of our guards then. The branches of
            # `cond` have to return gradients of equal strides, and those of tables have others.
            loop.refuse(f"the experts are modules or parameters, picked in the body of the operator `{operator}`", tx)
        changed = self._changed(tx)
        if changed is not None:
            loop.refuse(f"the compiled function itself has changed {changed} before it picks an expert", tx)
        if any(module is None for module in self.modules):
            return self._at_index_if_there(tx, loop, offset)
        path, modules = loop.path, cast(tuple[nn.Module, ...], self.modules)
        try:
            pack = packing.pack(modules, copy=getattr(loop.frame.session.options, "pack", True))
        except packing.NotAlike as error:
            loop.refuse(f"the experts are modules that are not alike: {error}", tx)
        tables = loop.frame.tables_of(self, pack)
        if (id(pack), offset) not in path.templates:
            module = pack.template_of(loop.frame.next_template(pack))
            path.templates[id(pack), offset] = Template.start(tx, loop, tables, module, modules, offset)
        template = path.templates[id(pack), offset]
        if self.places.register != "_modules":
            (selected,) = template.selected
            return selected
        return dynamo_modules.global_variable(tx, dynamo_modules.TEMPLATE, template.module)

    def _changed(self, tx: Any) -> str | None:
        """What the traced code has changed by now, as Python objects go; None where the experts are as they were.

        They are packed as they were before the frame. What is written into a parameter is in the graph, and no change.
        """
        if not dynamo_modules.has_changed_anything(tx):
            return None
        container = dynamo_modules.module_at(tx, self.source)
        if container is None or self.places.are_changed(tx, container):
            return "the experts' container"
        for number, module in enumerate(self.modules):
            for path, part in () if module is None else packing.parts(module):
                if _is_changed(tx, part):
                    return packing.join(f"experts[{number}]", path)
        return None

    def _at_index_if_there(self, tx: Any, loop: Any, offset: int) -> Any:
        """What :meth:`at_index` says, where some are None: a path of its own."""
        nones = {key: module is None for key, module in zip(self.places.keys, self.modules, strict=True)}

        def holds(container: nn.Module) -> bool:
            return {key: container._modules.get(key) is None for key in nones} == nones

        dynamo_modules.guard_on(self.source, holds, "which experts are None")
        there = [place for place, module in enumerate(self.modules) if module is not None]
        if loop.decide(lambda index: index + offset < len(self) and self.modules[index + offset] is None):
            return dynamo.constant(tx, None)
        if not there or there != list(range(there[0], there[-1] + 1)):
            loop.refuse("some experts are None, and those that are not do not stand side by side", tx)
        own = slice(there[0], there[-1] + 1)
        places = dataclasses.replace(self.places, keys=self.places.keys[own])
        return ExpertModules(self.source, places, self.modules[own]).at_index(tx, loop, offset - there[0])


def _is_changed(tx: Any, part: Any) -> bool:
    """Whether the traced code has changed by now what a template has a copy of."""
    if isinstance(part, (nn.Module, Tensor)):  # the body of a loop is refused where it looks at gradients
        return any(name not in ("grad", "_grad") for name in dynamo_modules.changed_attributes(tx, part))
    return dynamo_modules.has_other_contents(tx, part)


def _beside(keys: list[str], modules: list[Any], places: list[Any]) -> Iterable[tuple[str, Any, Any]]:
    """The keys and modules that are not None, each with its place."""
    present = [(key, module) for key, module in zip(keys, modules, strict=True) if module is not None]
    return ((key, module, place) for (key, module), place in zip(present, places, strict=True))


class Tables:
    """The tables of the experts in a container, for code that was traced for one container and serves others.

    Dynamo compiles a function once for many modules of a class. The guard asks :meth:`serve` for each of them, and the
    bytecode then gets the tables of that module by calling :attr:`read`.

    Attributes:
        source: where the traced code finds the container.
        pack: what the experts that were traced are in.
        read: :meth:`_read`, without Dynamo looking into it. One object, as it is found by its identity.

    Args:
        experts: the experts that were traced.
    """

    def __init__(self, experts: ExpertModules, pack: packing.Pack) -> None:
        self.source = experts.source
        self.pack = pack
        self.read = torch.compiler.disable(self._read)
        self._places = experts.places
        self._all_keys: tuple[str, ...] | None = None  # of all that is in the container, as the guard first saw it
        self._structure = pack.structure
        self._asked: dict[tuple[str, str], Any] = {}
        self._only: packing.Pack | None = None
        # Once a table is read, the next call has to ask again.
        self._served: MutableMapping[nn.Module, tuple[packing.Pack, set[str]]] = WeakIdKeyDictionary()

    def serve(self, container: nn.Module) -> bool:
        """Whether the code serves the experts in ``container``. They are packed if they are not."""
        self._served.pop(container, None)
        all_keys = tuple(vars(container)[self._places.register])
        if self._all_keys not in (None, all_keys):
            return False
        experts = self._places.experts(container)
        if experts is None:
            return False
        pack = packing.pack_of(experts, self._structure)
        is_other = pack is not self.pack and (self._all_keys is None or self._only is not None)
        if pack is None or is_other or not pack.has_attributes(self._asked):
            return False
        self._all_keys = all_keys
        self._served[container] = pack, set()
        return True

    def serve_no_other(self) -> None:
        """Serve the experts that were traced alone: the traced code finds them in another place, too."""
        self._only = self.pack

    def asked(self, name: str, attribute: str, value: Any) -> None:
        """Serve only experts whose tensors called ``name`` have an attribute of this value, or no such attribute."""
        self._asked[name, attribute] = value

    def _read(self, container: nn.Module, name: str) -> Tensor:
        """``[E, ...]``: what a call of the compiled code gets for the table of ``name``.

        Dynamo runs the guards before each call. Where it does not (it can be told to pass over them), this does.

        Raises:
            MoeRewriteError: the experts are no longer what the code was compiled for.
        """
        pack, names_read = self._served.get(container, (None, ()))
        if pack is None or name in names_read:
            if not self.serve(container):
                raise MoeRewriteError("the experts are no longer those that this code was compiled for")
            pack, names_read = self._served[container]
        names_read.add(name)  # type: ignore[union-attr]
        return pack.inputs(name)


@dataclasses.dataclass(frozen=True)
class Template:
    """A template whose parameters stand for those of the expert at a loop's index, while a path is traced.

    Each path has a template of its own: Dynamo remembers what it found in a module for as long as it traces the frame.

    Attributes:
        module: the template.
        given: where the tables of its parameters and buffers come from.
        tensors: its parameters and buffers, by their path.
        selected: the variables that stand for them.
        is_mixed: whether some of the experts' parameters require a gradient where others' do not.
    """

    module: nn.Module
    given: Tables
    tensors: dict[str, Tensor]
    selected: tuple[Any, ...]
    is_mixed: bool

    @classmethod
    def start(
        cls, tx: Any, loop: Any, given: Tables, template: nn.Module, modules: Sequence[nn.Module], offset: int
    ) -> Template:
        tensors, variables = packing.tensors_of(template), []
        for name in given.pack.names:
            table = loop.frame.table(tx, given, name)
            selected = loop.select(tx, table, 0, offset)
            dynamo_modules.stand_in(tx, tensors[name], selected)
            variables.append(selected)
        asked = {tuple(parameter.requires_grad for parameter in module.parameters()) for module in modules}
        return cls(template, given, tensors, tuple(variables), len(asked) > 1)

    def end(self, tx: Any) -> None:
        for tensor in self.tensors.values():
            dynamo_modules.end_stand_in(tx, tensor)

    def attribute(self, tx: Any, loop: Any, tensor: Tensor, attribute: str) -> Any:
        """What the body gets for ``tensor.attribute``, of one of :attr:`tensors`.

        None where the row of a table that stands for it has the same.
        """
        name = next(name for name, known in self.tensors.items() if known is tensor)
        cls = nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor
        of_class, own = inspect.getattr_static(cls, attribute, packing.ABSENT), packing.tensor_attributes(tensor)
        comes_first = hasattr(type(of_class), "__set__")  # before what is in the tensor's `__dict__`
        if attribute in _OF_OBJECTS or (comes_first and attribute not in _OF_ROWS):
            loop.refuse(f"the body asks for `{attribute}` of an expert's parameter, and has a row of a table", tx)
        if comes_first:
            return None
        if attribute in own:
            self.given.asked(name, attribute, own[attribute])
            return dynamo_modules.attribute_of(tx, tensor, attribute)
        elif of_class is packing.ABSENT:
            self.given.asked(name, attribute, packing.ABSENT)
            dynamo.raise_attribute_error(tx, tensor, attribute)
        return None


_OF_ROWS = frozenset(
    (
        *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "name", "__class__", "requires_grad"),
        *("data", "real", "imag", "T", "H", "mT", "mH"),
        *("is_cpu", "is_cuda", "is_hpu", "is_ipu", "is_maia", "is_meta", "is_mps", "is_mtia", "is_vulkan", "is_xla"),
        *("is_xpu", "is_mkldnn", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr"),
    )
)
"""Attributes that a row of a table has as the parameter that it stands for has them."""

_OF_OBJECTS = frozenset(
    (
        *("__dict__", "__dir__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__getattribute__", "__setstate__"),
        *(
            "data_ptr",
            "storage",
            "untyped_storage",
            "_typed_storage",
            "storage_offset",
            "is_set_to",
            "set_",
            "_is_view",
        ),
        *("is_shared", "share_memory_", "is_pinned", "is_inference", "requires_grad_", "retain_grad", "backward"),
        *("register_hook", "register_post_accumulate_grad_hook", "_make_subclass"),
    )
)
"""Methods that do something to a parameter itself, or tell something of it and not of its values."""


def parameter_attribute(tx: Any, loop: Any, variable: Any, attribute: str) -> Any:
    """``variable.attribute`` in a body; None where it is to be traced as it is.

    A parameter is a Python object, on which anything may have been set. What stands for it was computed.
    """
    found = standing_for(loop, variable)
    if found is None:
        return None
    template, tensor, is_itself = found
    value = template.attribute(tx, loop, tensor, attribute)
    if value is not None and not is_itself:
        loop.refuse(f"the body asks for `{attribute}` of what may be an expert's parameter itself", tx)
    return value


def standing_for(loop: Any, variable: Any) -> tuple[Template, Tensor, bool] | None:
    """The template, and the tensor of it, that a variable stands for; None for others.

    With it comes whether it is that tensor for sure. Some methods (``weight.to(x.dtype)``) return a tensor itself where
    there is nothing to do.
    """
    if loop.path is None:
        return None
    root, is_itself = dynamo_modules.unchanged_by_calls(variable)
    for template in loop.path.templates.values():
        for tensor, selected in zip(template.tensors.values(), template.selected, strict=True):
            if dynamo_modules.is_same_value(selected, root):
                return template, tensor, is_itself
    return None


def pick_attribute(tx: Any, loop: Any, holder: Any, name: Any) -> Any:
    """``getattr(holder, name)`` for a name that is made of a loop's index; None for other names."""
    names = dynamo_modules.names_of(name.realize(), loop.is_index)
    if names is None:
        return None
    possible, least = [names(index) for index in range(max(loop.values) + 1)], max(loop.path.experts) + 1
    picked = ExpertModules.of_attributes(holder.realize(), possible, least)
    if picked is None:
        return loop.refuse("the expert's index picks an attribute that is no submodule, parameter or buffer", tx)
    return picked.at_index(tx, loop)


def pick(tx: Any, loop: Any, container: Any, key: Any) -> Any:
    """``container[key]`` for the index of a loop, or for a name that is made of it; None for other keys."""
    name, offset = dynamo_modules.names_of(key, loop.is_index), loop.offset_of(key)
    if name is not None:
        possible, least = [name(index) for index in range(max(loop.values) + 1)], max(loop.path.experts) + 1
        picked = ExpertModules.of_dict(container, possible, least)
    elif offset is not None:
        picked = ExpertModules.of_list(container)
    else:
        return None
    offset = offset or 0
    if picked is not None and (loop.site is not None or offset) and max(loop.path.experts) + offset >= len(picked):
        return loop.refuse(f"the loop goes on after the last of {len(picked)} experts", tx)
    if picked is not None:
        return picked.at_index(tx, loop, offset)
    return loop.refuse(
        "the expert's index picks from something that is no plain container of modules or parameters", tx
    )


@dataclasses.dataclass(frozen=True)
class TableInput:
    """A table that the graph reads: the one called ``name`` of those that are ``given`` at each call."""

    given: Tables
    name: str
    variable: Any

    @property
    def members(self) -> tuple[Tensor, ...]:
        """Each expert's own tensor, of those that were traced."""
        return self.given.pack.members(self.name)


def writes_into(gm: fx.GraphModule, tables: Iterable[TableInput]) -> bool:
    """Whether the graph writes into a row of one of ``tables``: it would read the table as it was before."""
    rows = {id(row) for table in tables for row in table.members}
    inputs = gm.graph.find_nodes(op="placeholder")
    return any(id(dynamo_modules.graph_input(node)) in rows and is_written_to(node) for node in inputs)
