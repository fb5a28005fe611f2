"""``torch.compile(model, backend="moe_rewrite")``: the pass, then the inner compiler."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from moe_rewrite.config import ExpertsMapping, Options
from moe_rewrite.inner import compile_inner
from moe_rewrite.loop import Refusal
from moe_rewrite.lower import EAGER
from moe_rewrite.nodes import has_unknown_size
from moe_rewrite.report import LoopReport, log_reports
from moe_rewrite.rewrite import LoopRefused, carry_out, make_plans

TESTED_TORCH = ("2.11", "2.13")
"""The range of torch versions that the tests were run with."""

try:
    from moe_rewrite.capture import frames

    _unavailable = ""
except (ImportError, AttributeError) as _error:  # torch moved its private parts
    _unavailable = f"{type(_error).__name__}: {_error}"


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
    if refused and not session.explains:
        session.refused(refused)
        if capture is None:
            raise LoopRefused(refused)
        capture.restart_as_stock([report.refusal for report in refused if report.refusal is not None])
    reports = carry_out(plans, fuses=parsed.inner == "inductor" or session.explains)
    if capture is not None and capture.widened and not refused and any(map(has_unknown_size, gm.graph.nodes)):
        capture.restart_as_stock([Refusal(session.base_path, "", "the graph holds data-dependent shapes of its own")])
    session.rewritten(reports)
    return compile_inner(gm, example_inputs, parsed)


@dataclasses.dataclass
class Session:
    """What this backend knows while it compiles one frame.

    Attributes:
        options: the user's options.
        root: the module whose ``forward`` the frame is; None for a function.
        base_path: the path of ``root`` in the module that was compiled first.
        mapping: the experts mapping, with names of sub-configs replaced by module paths.
        memory: what is remembered from frame to frame of one ``torch.compile`` call.
    """

    options: Options
    root: nn.Module | None = None
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
        """``path`` in this frame's module as a path in the module that was compiled first."""
        return ".".join(filter(None, (self.base_path, path)))

    def leaves_alone(self, path: str) -> bool:
        """Whether the loop at ``path`` is configured to stay as it is, so that it need not be captured."""
        return not self.explains and self.mapping.choose(path) == EAGER

    def refused(self, reports: list[LoopReport]) -> None:
        known = {(report.path, report.location) for report in self.memory.reports}
        for report in reports:
            if (report.path, report.location) not in known:  # a frame of its own may refuse the same loop again
                self.memory.reports.append(report)
                if not self.explains:
                    log_reports([report])

    def rewritten(self, reports: list[LoopReport]) -> None:
        self.memory.reports += reports
        if not self.explains:
            log_reports(reports)
        self._hint_at_other_implementation(reports)
        if reports and self.root is not None and not self.base_path:
            self._warn_of_unmatched_prefixes(reports)

    def _warn_of_unmatched_prefixes(self, reports: list[LoopReport]) -> None:
        assert self.root is not None
        unmatched = self.mapping.unmatched(path for path, _ in self.root.named_modules())
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
        chosen = other_implementation(self.root)
        if chosen is None or reports or self.base_path or "implementation" in self.memory.warned:
            return
        self.memory.warned.add("implementation")
        warnings.warn(f"moe_rewrite: {chosen}", stacklevel=2)


def other_implementation(model: nn.Module | None) -> str | None:
    """What to tell the user of a model that computes its experts by an implementation of transformers' own."""
    config = getattr(model, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    if chosen in (None, "eager") or not hasattr(model, "set_experts_implementation"):
        return None
    if not any("experts" in type(module).__name__.lower() for module in model.modules()):  # type: ignore[union-attr]
        return None
    return (
        f"{type(model).__name__} computes its experts by transformers' own {chosen!r} implementation, so there is no "
        f"loop to rewrite. Call model.set_experts_implementation('eager') before you compile it."
    )


@dataclasses.dataclass
class Memory:
    """What is remembered from frame to frame of one ``torch.compile`` call.

    Attributes:
        paths: the path of each module seen, in the module that was compiled first.
        warned: what was warned of already.
        reports: what became of each loop, in the order of compilation.
        explains: whether the model is only looked at.
    """

    paths: weakref.WeakKeyDictionary[nn.Module, str] = dataclasses.field(default_factory=weakref.WeakKeyDictionary)
    warned: set[str] = dataclasses.field(default_factory=set)
    reports: list[LoopReport] = dataclasses.field(default_factory=list)
    explains: bool = False

    def path_of(self, module: nn.Module) -> str:
        """The path of ``module``; ``""`` for one that is in no module seen before."""
        if module not in self.paths:
            for path, sub_module in module.named_modules():
                self.paths[sub_module] = path
        return self.paths[module]


def start_session(wrapper: Any, root: object) -> Session:
    """The session for a frame that is about to be traced for ``wrapper``, the object that ``torch.compile`` made.

    Args:
        wrapper: holds the ``kwargs`` that this backend is called with. What is remembered is kept on it.
        root: the ``self`` of the frame, if it has one.

    Raises:
        OptionsError: the options are wrong.
    """
    options = Options.parse(**getattr(wrapper, "kwargs", {}))
    memory = getattr(wrapper, "_moe_rewrite_memory", None)
    if memory is None:
        memory = wrapper._moe_rewrite_memory = Memory()
        _check_torch_version(memory)
    module = root if isinstance(root, nn.Module) else None
    return Session(options, module, memory.path_of(module) if module is not None else "", memory=memory)


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


if not _unavailable:
    frames.install(is_ours, start_session)
else:
    warnings.warn(
        f"moe_rewrite cannot hook into the Dynamo of torch {torch.__version__} ({_unavailable}): experts loops are "
        f"left as they are, and models compile as with the inner compiler alone.",
        stacklevel=2,
    )
