"""``torch.compile(model, backend="moe_rewrite")``: the pass, then the inner compiler."""

from __future__ import annotations

import dataclasses
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from moe_rewrite.config import ExpertsMapping, Options, config_of
from moe_rewrite.inner import compile_inner
from moe_rewrite.loop import Refusal
from moe_rewrite.lower import EAGER, InnerCompiler
from moe_rewrite.nodes import has_unknown_size
from moe_rewrite.recognise.erase import erase_unused
from moe_rewrite.report import LoopReport, log_reports
from moe_rewrite.rewrite import LoopRefused, carry_out, make_plans
from moe_rewrite.tree import is_module, named_modules

TESTED_TORCH = ("2.11", "2.15")
"""The range of torch versions that the tests were run with."""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


try:
    from moe_rewrite.capture import dynamo_calls, frames, hooks
    from moe_rewrite.capture.modules import writes_into

    _unavailable = ""
except (ImportError, AttributeError) as _error:  # torch moved its private parts
    _unavailable = _said(_error)


def moe_rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The compiler backend. Users name it: ``torch.compile(model, backend="moe_rewrite")``.

    Args:
        gm: Dynamo's graph.
        example_inputs: the graph's inputs.
        mode: the mode given to ``torch.compile``.
        options: the options given to it: ``"experts"`` (a mapping from module path prefixes to experts backends),
            ``"inner"`` (the inner compiler, ``"inductor"`` by default), ``"mode"``, and the inner compiler's own.

    Returns:
        The compiled function.

    Raises:
        OptionsError: an option is wrong.
    """
    parsed = Options.parse(mode, options)
    capture = frames.current() if not _unavailable else None
    session = capture.session if capture is not None else Session(parsed)
    plans = make_plans(gm, session.mapping, session.base_path)
    refused = [plan.report for plan in plans if plan.report is not None and plan.report.refusal is not None]
    if refused and capture is None:
        session.refused(refused)
        raise LoopRefused(refused)
    if capture is not None and writes_into(gm, capture.tables.values()):
        refused = [plan.report.refused(_WRITTEN) for plan in plans if plan.report is not None]
    if refused and capture is not None:
        capture.give_up(refused)
    try:
        fuses = parsed.inner == "inductor" or session.explains
        reports = carry_out(gm, plans, InnerCompiler(fuses, parsed.max_autotune))
    except LoopRefused as error:
        if capture is not None:
            session.refused(error.reports)
            capture.restart_as_stock([report.refusal for report in error.reports if report.refusal is not None])
        raise
    if capture is not None:
        capture.tell_of_unrolled(gm)
    if capture is not None and capture.widened and not refused and _has_unknown_sizes_of_its_own(gm):
        capture.restart_as_stock([Refusal(session.base_path, "", "the graph holds data-dependent shapes of its own")])
    if capture is not None and reports:
        capture.guard_on_code()
    session.rewritten(reports)
    return compile_inner(gm, example_inputs, parsed)


_WRITTEN = "the graph writes into a parameter of the experts"


def _has_unknown_sizes_of_its_own(gm: fx.GraphModule) -> bool:
    """Whether the graph, apart from what loops were rewritten into, holds sizes that only run time knows.

    What nothing uses does not count, and goes.
    """
    erase_unused([node for node in gm.graph.nodes if has_unknown_size(node)])
    gm.recompile()
    return any(has_unknown_size(node) for node in gm.graph.nodes if "moe_rewrite" not in node.meta)


@dataclasses.dataclass
class Session:
    """What this backend knows while it compiles one frame.

    Attributes:
        options: the user's options.
        root: the module that paths start at: the compiled one, unless a function was compiled. None where no module
            is known.
        module: the module that the frame is of; None for a function that gets none.
        base_path: the path of ``module`` in ``root``.
        mapping: the experts mapping, with names of sub-configs replaced by module paths.
        memory: what is remembered from frame to frame of one ``torch.compile`` call.
    """

    options: Options
    root: nn.Module | None = None
    module: nn.Module | None = None
    base_path: str = ""
    memory: Memory = dataclasses.field(default_factory=lambda: Memory())
    mapping: ExpertsMapping = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        experts = self.options.experts
        self.mapping = experts.with_sub_configs(self.root) if self.root is not None else experts

    @property
    def explains(self) -> bool:
        """Whether the graph is only looked at: loops that are left as they are need not run."""
        return self.memory.explains

    def full_path(self, path: str) -> str:
        """``path`` in this frame's module as a path in the root module."""
        return ".".join(filter(None, (self.base_path, path)))

    def leaves_alone(self, path: str) -> bool:
        """Whether the loop at ``path`` is configured to stay as it is, so that it need not be captured."""
        return not self.explains and self.mapping.choose(path) == EAGER

    def is_particular(self) -> bool:
        """Whether the mapping treats the frame's module otherwise than another one of its class.

        What is compiled for one module would serve the other too. An explanation has something to say of each.
        """
        if self.root is None or self.module is None or self.explains:
            return self.explains
        own = self.mapping.below(self.base_path)
        alike = ((path, other) for path, other in named_modules(self.root) if type(other) is type(self.module))
        return any(self.mapping.below(path) != own for path, _ in alike)

    def refused(self, reports: list[LoopReport]) -> None:
        known = {(report.path, report.location) for report in self.memory.reports}
        for report in reports:
            if (report.path, report.location) not in known:  # a frame of its own may refuse the same loop again
                known.add((report.path, report.location))  # each way through one body is refused for itself
                self.memory.reports.append(report)
                if not self.explains:
                    log_reports([report])

    def rewritten(self, reports: list[LoopReport]) -> None:
        self.memory.reports += reports
        if not self.explains:
            log_reports(reports)
        self._hint_at_other_implementation(reports)
        if reports and self.root is not None:
            self._warn_of_unmatched_prefixes(reports)

    def _warn_of_unmatched_prefixes(self, reports: list[LoopReport]) -> None:
        assert self.root is not None
        unmatched = self.mapping.unmatched(path for path, _ in named_modules(self.root))
        for prefix in unmatched:
            if prefix not in self.memory.warned:
                self.memory.warned.add(prefix)
                paths = ", ".join(sorted({repr(report.path) for report in reports}))
                warnings.warn(
                    f"moe_rewrite: the prefix {prefix!r} of the experts mapping matches no module of "
                    f"{type(self.root).__name__}. The experts loops are at: {paths}.",
                    stacklevel=2,
                )

    def _hint_at_other_implementation(self, reports: list[LoopReport]) -> None:
        """A transformers model set to one of transformers' own implementations has no loop to find."""
        if reports or self.module is not self.root or "implementation" in self.memory.warned:
            return
        chosen = other_implementation(self.root)
        if chosen is None:
            return
        self.memory.warned.add("implementation")
        warnings.warn(f"moe_rewrite: {chosen}", stacklevel=2)


def other_implementation(model: nn.Module | None) -> str | None:
    """What to tell the user of a model that computes its experts by an implementation of transformers' own."""
    chosen = getattr(config_of(model), "_experts_implementation", None)
    if model is None or chosen in (None, "eager") or not hasattr(model, "set_experts_implementation"):
        return None
    if not any("experts" in type(module).__name__.lower() for _, module in named_modules(model)):
        return None
    return (
        f"{type(model).__name__} computes its experts by transformers' own {chosen!r} implementation, so there is no "
        f"loop to rewrite. Call model.set_experts_implementation('eager') before you compile it."
    )


_CodesOfModules: TypeAlias = weakref.WeakKeyDictionary[nn.Module, set[int]]


@dataclasses.dataclass
class Memory:
    """What is remembered from frame to frame of one ``torch.compile`` call.

    Attributes:
        roots: the modules that paths start at: the compiled one; where a function was compiled, those that its frames
            were of and that stand in no other of them.
        codes: the code of the frames that were traced, by its ``id``: different functions can have equal code.
        particular: by module, the ids of the codes of those frames whose mapping differs from that of the same frame of
            another module.
        given_up: by module, the ids of those among them that Dynamo gave up.
        warned: what was warned of already.
        reports: what became of each loop, in the order of compilation.
        explains: whether the model is only looked at.
    """

    roots: list[weakref.ref[nn.Module]] = dataclasses.field(default_factory=list)
    codes: dict[int, types.CodeType] = dataclasses.field(default_factory=dict)
    particular: _CodesOfModules = dataclasses.field(default_factory=weakref.WeakKeyDictionary)
    given_up: _CodesOfModules = dataclasses.field(default_factory=weakref.WeakKeyDictionary)
    warned: set[str] = dataclasses.field(default_factory=set)
    reports: list[LoopReport] = dataclasses.field(default_factory=list)
    explains: bool = False

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        """A copy of a compiled model is compiled anew: it remembers nothing."""
        return Memory, ()

    def locate(self, module: nn.Module | None) -> tuple[nn.Module | None, str]:
        """The root that ``module`` stands in, and its path there. A module that stands in none is a new root.

        None is located at the first root.
        """
        roots = [root for root in (reference() for reference in self.roots) if root is not None]
        if module is None:
            return (roots[0] if roots else None), ""
        for root in roots:
            for path, sub_module in named_modules(root):
                if sub_module is module:
                    return root, path
        self.roots.append(weakref.ref(module))
        return module, ""


def start_session(wrapper: Any) -> Session:
    """The session for a frame that is about to be traced for ``wrapper``, the object that ``torch.compile`` made.

    Args:
        wrapper: holds the ``kwargs`` that this backend is called with. What is remembered is kept on it.

    Raises:
        OptionsError: the options are wrong.
    """
    options = Options.parse(**getattr(wrapper, "kwargs", {}))
    memory = _memory(wrapper)
    if memory is None:
        memory = wrapper._moe_rewrite_memory = Memory()
        _check_torch_version(memory)
    # The frame's own module may stand below it: Dynamo passes over frames that it gave up, also for another compiler.
    memory.locate(dynamo_calls.compiled_module(wrapper))
    code, arguments = dynamo_calls.traced_frame()
    memory.codes[id(code)] = code
    name, module = _module_among(arguments)
    module = getattr(wrapper, "exported", module)  # torch.export puts a module of its own around it
    root, path = memory.locate(module)
    session = Session(options, root, module, path, memory)
    if module is not None and session.is_particular():
        memory.particular.setdefault(module, set()).add(id(code))
        dynamo_calls.guard_identity(name)
    return session


def _module_among(arguments: Mapping[str, Any]) -> tuple[str, nn.Module | None]:
    """The module that a frame is of, and the argument that it is: ``self``, or the only module that a function gets.

    One that is not initialised yet (the frame may be its own ``__init__``) is none.
    """
    modules = {name: value for name, value in arguments.items() if is_module(value)}
    if "self" in modules:
        return "self", modules["self"]
    return next(iter(modules.items())) if len({id(module) for module in modules.values()}) == 1 else ("", None)


def _convert_frame(original: Callable[..., Any], converter: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
    """Dynamo gives up a function for all modules. Where the mapping tells modules apart, it is to do so for one.

    Layers are often of one class, and one of them may be configured to stay as it is.
    """
    wrapper = dynamo_calls.compiler_wrapper(converter)
    if not is_ours(wrapper):
        return original(converter, frame, *args, **kwargs)
    module, code = _module_among(frame.f_locals)[1], id(frame.f_code)
    memory = _memory(wrapper)
    if module is not None and memory is not None and code in memory.given_up.get(module, ()):
        return dynamo_calls.given_up_once()
    result = original(converter, frame, *args, **kwargs)
    memory = _memory(wrapper)
    if module is None or memory is None or code not in memory.particular.get(module, ()):
        return result
    if not dynamo_calls.is_given_up(result):
        return result
    memory.given_up.setdefault(module, set()).add(code)
    return dynamo_calls.given_up_once()


def traced_codes(wrapper: Any) -> list[types.CodeType]:
    """The code of the frames that were traced for ``wrapper``."""
    memory = _memory(wrapper)
    return list(memory.codes.values()) if memory is not None else []


def _memory(wrapper: Any) -> Memory | None:
    memory: Memory | None = getattr(wrapper, "_moe_rewrite_memory", None)
    return memory


def _check_options(original: Callable[..., Any], compiler: Any, *args: Any) -> Any:
    """Bad options are an error of ``torch.compile``, not of the first call of what it returns."""
    if is_ours(compiler):
        Options.parse(**getattr(compiler, "kwargs", {}))
    return original(compiler, *args)


def is_ours(wrapper: Any) -> bool:
    """Whether what ``torch.compile`` made of its ``backend=`` calls :func:`moe_rewrite`."""
    return getattr(wrapper, "compiler_fn", wrapper) is moe_rewrite


def _check_torch_version(memory: Memory) -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    lowest, highest = TESTED_TORCH
    outside = not _number(lowest) <= _number(version) <= _number(highest)
    if outside and not _version_warned:
        _version_warned.append(version)
        warnings.warn(
            f"moe_rewrite was tested with torch {lowest} to {highest}; this is {torch.__version__}. A loop is still "
            f"rewritten only where that is proved right.",
            stacklevel=2,
        )


_version_warned: list[str] = []


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _hook_into_dynamo() -> str:
    """Returns why that cannot be done; ``""`` where it is done."""
    if _unavailable:
        return _unavailable
    try:
        hooks.install()
        dynamo_calls.on_convert_frame(_convert_frame)
        dynamo_calls.on_compile(_check_options)
        frames.install(is_ours, start_session)  # the last: without a frame of ours the hooks pass everything on
    except AttributeError as error:
        return _said(error)
    return ""


_unavailable = _hook_into_dynamo()
if _unavailable:
    warnings.warn(
        f"moe_rewrite cannot hook into the Dynamo of torch {torch.__version__} ({_unavailable}): experts loops are "
        f"left as they are, and models compile as with the inner compiler alone.",
        stacklevel=2,
    )
