"""``export``: ``torch.export.export`` with the experts loops rewritten.

Strict export traces the model with Dynamo, in one frame. Its compiler there only keeps the graph. For the length of a
call of :func:`export`, in this thread and for that frame alone, the pass runs before it. All else is torch's own: the
signature, the constraints on dynamic shapes, the parameters' names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from moe_rewrite.backend import Memory, moe_rewrite
from moe_rewrite.capture import dynamo, dynamo_calls, frames
from moe_rewrite.capture.modules import TableInput
from moe_rewrite.config import ExpertsMapping
from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.explain import model_and_options

_active = threading.local()


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    experts: Mapping[str, str] | str | None = None,
    **others: Any,
) -> torch.export.ExportedProgram:
    """``torch.export.export(model, args, kwargs, strict=True)``, with every experts loop rewritten.

    Parameters and buffers keep their names. Where the experts are modules, each parameter is one of the program, and
    they are stacked in it. Like every strict export, it makes Dynamo forget what it compiled before.

    Args:
        model: a model, or a compiled one, whose mapping is then used.
        args: positional arguments of a call.
        kwargs: keyword arguments of it.
        dynamic_shapes: which sizes may change, as ``torch.export.export`` takes it.
        experts: the experts mapping, as in ``options={"experts": ...}``. Without one that of the compiled model, else
            ``auto``.
        others: other arguments of ``torch.export.export``.

    Raises:
        MoeRewriteError: ``model`` is no module, or is compiled with another backend; or ``strict=False`` is asked for.
        OptionsError: the mapping is wrong.
        Unsupported: (of ``torch._dynamo.exc``) a loop cannot be rewritten, with the reason; or Dynamo cannot trace the
            model.
    """
    if not others.pop("strict", True):
        raise MoeRewriteError("moe_rewrite.export needs strict=True: without, no loop is seen that could be rewritten")
    model, options = model_and_options(model, "export")
    mapping = ExpertsMapping.parse(experts if experts is not None else options.get("experts", {}))
    with _rewriting(_Export(model, mapping)):
        program: torch.export.ExportedProgram = torch.export.export(
            model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=True, **others
        )
    _forget_unused_sizes(program)
    return program


class _Export:
    """One call of :func:`export`."""

    def __init__(self, model: nn.Module, mapping: ExpertsMapping) -> None:
        self.model = model
        self.mapping = mapping
        self.memory = Memory(roots=[weakref.ref(model)])


@contextlib.contextmanager
def _rewriting(export: _Export) -> Iterator[None]:
    _active.export = export
    try:
        yield
    finally:
        _active.export = None


class _Compiler:
    """What Dynamo gets for its compiler while it traces an exported model: the pass, then the one it had.

    It looks like what ``torch.compile(backend="moe_rewrite")`` makes.
    """

    __name__ = "moe_rewrite"

    def __init__(self, export: _Export, stock: Callable[..., Any]) -> None:
        self.compiler_fn = moe_rewrite
        self.exported = export.model
        self._names = {id(tensor): name for name, tensor in _tensors(export.model)}
        # With the parameters moved into tables a program would hold each twice, by its name and in the table.
        self.kwargs: dict[str, Any] = {
            "options": {"experts": export.mapping.as_dict(), "inner": self._keep, "pack": False}
        }
        self._moe_rewrite_memory = export.memory
        self._stock = stock
        self._attributes: _Attributes | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        self._attributes = _Attributes.lift(gm)
        return moe_rewrite(gm, example_inputs, **self.kwargs)

    def _keep(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        """The inner compiler."""
        capture = frames.current()
        assert capture is not None and self._attributes is not None
        self._attributes.put_back(gm, capture.tables, self._names)
        return self._stock(gm, example_inputs)


@dataclasses.dataclass(frozen=True)
class _Attributes:
    """The tensors that are attributes of an exported graph's module, while they are inputs of the graph.

    Everywhere else the pass meets parameters as inputs, and what it knows of inputs (that two of them may overlap)
    holds for these, too.

    Attributes:
        names: the name of the attribute that each placeholder stands for.
    """

    names: dict[fx.Node, str]

    @classmethod
    def lift(cls, gm: fx.GraphModule) -> _Attributes:
        """Make them inputs."""
        inputs: dict[str, fx.Node] = {}
        first: fx.Node = next(node for node in gm.graph.nodes if node.op != "placeholder")
        for node in gm.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            value = _attribute(gm, name)
            if not isinstance(value, torch.Tensor):
                continue
            if name not in inputs:
                with gm.graph.inserting_before(first):
                    inputs[name] = gm.graph.placeholder(node.name)
                inputs[name].meta = {**node.meta, "grapharg": _Given(value)}
            node.replace_all_uses_with(inputs[name])
            if node is first:
                first = node.next
            gm.graph.erase_node(node)
        return cls({node: name for name, node in inputs.items()})

    def put_back(self, gm: fx.GraphModule, tables: Mapping[int, TableInput], names: Mapping[int, str]) -> None:
        """Make them attributes again; a table of parameters becomes what stacks them.

        Args:
            gm: the graph.
            tables: the tables of parameters, by the ids of their tensors.
            names: the names of the model's parameters and buffers, by their ids.
        """
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        for node, name in self.names.items():
            table = tables.get(id(_attribute(gm, name)))
            meta = {key: value for key, value in node.meta.items() if key != "grapharg"}
            with gm.graph.inserting_before(first):
                if table is None:
                    value = gm.graph.get_attr(name)
                    value.meta = meta
                else:
                    value = _stacked(gm, table.members, names)
                    value.meta = meta
                    delattr(gm, name)
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
        gm.graph.lint()
        gm.recompile()


@dataclasses.dataclass(frozen=True)
class _Given:
    """What a placeholder stands for, as Dynamo notes it in ``meta["grapharg"]``."""

    example: torch.Tensor


def _stacked(gm: fx.GraphModule, members: Sequence[torch.Tensor], names: Mapping[int, str]) -> fx.Node:
    """The node of ``torch.stack`` of some parameters or buffers, which become attributes of ``gm``.

    ``names``: what they are called in the model, by their ids.
    """
    held = {id(value): name for name, value in _tensors(gm)}
    nodes = []
    for member in members:
        name = held.get(id(member))
        if name is None:
            name = "moe_rewrite_" + names[id(member)].replace(".", "_")
            if isinstance(member, nn.Parameter):
                gm.register_parameter(name, member)
            else:
                gm.register_buffer(name, member)
        nodes.append(gm.graph.get_attr(name))
    return gm.graph.call_function(torch.stack, (nodes,))


def _forget_unused_sizes(program: torch.export.ExportedProgram) -> None:
    """Drop the ranges of data-dependent sizes that only the captured bodies had."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    used = {symbol for value in pytree.tree_leaves(values) for symbol in free_symbols(value)}
    for symbol in [symbol for symbol in program.range_constraints if symbol not in used]:
        del program.range_constraints[symbol]


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _attribute(gm: fx.GraphModule, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(gm.get_submodule(path), last)


def _run_frame(original: Callable[..., Any], tx: Any) -> Any:
    export: _Export | None = getattr(_active, "export", None)
    if export is not None and dynamo_calls.is_exported(tx):
        dynamo_calls.set_compiler(tx, _Compiler(export, dynamo_calls.compiler(tx)))
    return original(tx)


dynamo.wrap_method(dynamo.InstructionTranslator, "run", _run_frame)
