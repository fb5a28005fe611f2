"""Experts that are modules: one of them is traced, for a symbolic index, in the place of all.

The parameters of alike modules are kept in one table for each name (``moe_rewrite.packing``). Dynamo traces a template
of the modules, whose parameters are ``moe_rewrite.select(table, 0, index)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from moe_rewrite import markers, packing
from moe_rewrite.capture import dynamo, dynamo_modules
from moe_rewrite.nodes import is_written_to

_PICKING = ("__getitem__", "__getattr__", "__len__", "_get_abs_string_index")
"""What decides which module of a container an index picks."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertModules:
    """Modules that a loop's index picks from.

    Attributes:
        source: where the traced code finds the container that holds them.
        keys: their keys in it, by index.
        modules: the modules, by index.
    """

    source: Any
    keys: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @classmethod
    def of_container(cls, tx: Any, container: Any) -> ExpertModules | None:
        """Those of a ``ModuleList`` (or the like), as its ``[index]`` finds them; None for other variables."""
        if not dynamo_modules.is_like(container, nn.ModuleList, _PICKING):
            return None
        found = dynamo_modules.container_items(tx, container)
        return None if found is None else cls._of_dict(found, list(map(str, range(len(found[1])))))

    @classmethod
    def of_dict(cls, tx: Any, container: Any, keys: list[str]) -> ExpertModules | None:
        """Those that a ``ModuleDict`` has under ``keys``; None for other variables, and where one is missing."""
        if not dynamo_modules.is_like(container, nn.ModuleDict, _PICKING):
            return None
        return cls._of_dict(dynamo_modules.container_items(tx, container), keys)

    @classmethod
    def _of_dict(cls, found: tuple[Any, dict[str, nn.Module]] | None, keys: list[str]) -> ExpertModules | None:
        if found is None:
            return None
        source, modules = found
        if not keys or any(key not in modules for key in keys):
            return None
        return cls(source, tuple(keys), tuple(modules[key] for key in keys))

    @classmethod
    def of_items(cls, items: list[Any]) -> ExpertModules | None:
        """Those that a loop iterates, taken out of one container; None for anything else."""
        modules = [dynamo_modules.module_value(item) for item in items]
        if not modules or any(module is None for module in modules):
            return None
        places = [dynamo_modules.source_of_item(item) for item in items]
        if any(place is None or place[0] != places[0][0] for place in places):
            return None
        return cls(places[0][0], tuple(key for _, key in places), tuple(modules))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.modules)

    def at_index(self, tx: Any, loop: Any) -> Any:
        """The variable of the module at the index of ``loop``."""
        path = loop.path
        try:
            pack = packing.pack(self.modules, copy=getattr(loop.frame.session.options, "pack", True))
        except packing.NotAlike as error:
            loop.refuse(f"the experts are modules that are not alike: {error}", tx)
        dynamo_modules.guard_on(self.source, _unchanged(pack, self.keys), "the experts' modules and parameters")
        if id(pack) not in path.templates:
            module = pack.template_of(loop.frame.next_template(pack))
            path.templates[id(pack)] = Template.start(tx, loop, pack, module, self.modules)
        return dynamo_modules.global_variable(tx, dynamo_modules.TEMPLATE, path.templates[id(pack)].module)


def _unchanged(pack: Any, keys: tuple[str, ...]) -> Callable[[Any], bool]:
    def unchanged(container: nn.Module) -> bool:
        modules = container._modules
        return all(key in modules for key in keys) and bool(pack.unchanged([modules[key] for key in keys]))

    return unchanged


@dataclasses.dataclass(frozen=True)
class Template:
    """A template whose parameters stand for those of the expert at a loop's index, while a path is traced.

    Each path has a template of its own: Dynamo remembers what it found in a module for as long as it traces the frame.

    Attributes:
        module: the template.
        tensors: its parameters and buffers.
        is_mixed: whether some of the experts' parameters require a gradient where others' do not.
    """

    module: nn.Module
    tensors: tuple[Any, ...]
    is_mixed: bool

    @classmethod
    def start(cls, tx: Any, loop: Any, pack: Any, template: nn.Module, modules: Sequence[nn.Module]) -> Template:
        index = loop.path.index.as_scalar(tx).as_tensor()
        tensors = []
        for name in pack.names:
            table = loop.frame.table(tx, pack, name)
            module_name, _, tensor_name = name.rpartition(".")
            tensor = getattr(template.get_submodule(module_name), tensor_name)
            selected = dynamo.call_in_graph(tx, markers.select, [table, 0, index])
            dynamo_modules.stand_in(tx, tensor, selected)
            tensors.append(tensor)
        asked = {tuple(parameter.requires_grad for parameter in module.parameters()) for module in modules}
        return cls(template, tuple(tensors), len(asked) > 1)

    def end(self, tx: Any) -> None:
        for tensor in self.tensors:
            dynamo_modules.end_stand_in(tx, tensor)


def pick(tx: Any, loop: Any, container: Any, key: Any) -> Any:
    """``container[key]`` for the index of a loop, or for a name that is made of it; None for other keys."""
    name = dynamo_modules.names_of(key, loop.is_index)
    if name is not None:
        picked = ExpertModules.of_dict(tx, container, [name(index) for index in range(max(loop.path.experts) + 1)])
    elif loop.is_index(key):
        picked = ExpertModules.of_container(tx, container)
    else:
        return None
    if picked is not None and loop.site is not None and max(loop.path.experts) >= len(picked):
        return loop.refuse(f"the loop goes on after the last of {len(picked)} experts", tx)
    if picked is not None:
        return picked.at_index(tx, loop)
    return loop.refuse("the expert's index picks from something that is no plain container of modules", tx)


def writes_into(gm: fx.GraphModule, tables: dict[int, tuple[Any, str]]) -> bool:
    """Whether the graph writes into a row of one of ``tables``: it would read the table as it was before."""
    rows = {id(row) for pack, name in tables.values() for row in pack.members(name)}
    inputs = gm.graph.find_nodes(op="placeholder")
    return any(id(dynamo_modules.graph_input(node)) in rows and is_written_to(node) for node in inputs)


def with_tables(gm: fx.GraphModule, tables: dict[int, tuple[Any, str]], compiled: Callable[..., Any]) -> Any:
    """``compiled``, called with tables whose gradient flows to the parameters they hold.

    Args:
        gm: the graph that was compiled.
        tables: the pack and the name of each table, by the id of its tensor.
        compiled: the compiled function of the graph's inputs.
    """
    given = [dynamo_modules.graph_input(node) for node in gm.graph.find_nodes(op="placeholder")]
    places = [(place, *tables[id(tensor)]) for place, tensor in enumerate(given) if id(tensor) in tables]
    if not places:
        return compiled

    def run(*inputs: Any) -> Any:
        filled = list(inputs)
        for place, pack, name in places:
            filled[place] = pack.inputs(name)
        return compiled(*filled)

    return run
