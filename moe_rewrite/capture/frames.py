"""The frames which this package's backend compiles: what is known of one while Dynamo traces it.

A frame is traced with its loops rolled. When a loop turns out not to be rewritable the whole frame is traced again
as stock Dynamo traces it: the graph then breaks where it always did, and the functions called below get frames of
their own, so loops beside a refused one are still rewritten.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from torch import fx

from moe_rewrite.capture import dynamo, dynamo_calls, dynamo_modules
from moe_rewrite.capture.code import CodeWatch
from moe_rewrite.capture.modules import ExpertModules, Places, TableInput, Tables
from moe_rewrite.capture.rolled import RolledIterator
from moe_rewrite.loop import Refusal
from moe_rewrite.nodes import has_unknown_size
from moe_rewrite.recognise.provenance import user_location
from moe_rewrite.report import LoopReport

_active = threading.local()


@dataclasses.dataclass
class FrameCapture:
    """The capture of one frame's loops, while Dynamo traces it.

    Attributes:
        tx: the translator of the root frame.
        session: what the compiler backend knows of the frame; it answers which experts backend is configured.
        refusals: why the frame is traced as stock, one for each loop that was refused; empty while loops are rolled.
        plain_lists: whether ``tensor.tolist()`` is a list of numbers at once.
        unrolled: the ``for`` statements of known length that are not rolled, as they turned out to be something else.
        deferred: whether some ``tensor.tolist()`` was not read yet.
        widened: whether the graph may hold data-dependent shapes only because its loops are rolled.
        loops: the loops whose body is being traced.
        rolled: all loops that were rolled, by path and location.
        tables: the tables of parameters that the graph reads, by the ids of their tensors.
        containers: the tables of the experts in a container, by its source and their places in it.
        templates: how many templates of each pack were traced, by its id.
        functions: the functions that Dynamo has inlined.
        classes: the classes of what they were called on.
        called: the sources of the modules that were called, by the translator of the function that calls them.
        loop_in: the translators of the functions that have a loop.
        unsaid: why loops of known length are not rolled, each with the lines of its body: it need not be over experts.
    """

    tx: Any
    session: Any
    refusals: list[Refusal]
    unrolled: frozenset[Any]
    widened: bool
    plain_lists: bool = False
    deferred: bool = False
    loops: list[RolledIterator] = dataclasses.field(default_factory=list)
    rolled: dict[tuple[str, str], RolledIterator] = dataclasses.field(default_factory=dict)
    tables: dict[int, TableInput] = dataclasses.field(default_factory=dict)
    containers: dict[tuple[Any, Places], Tables] = dataclasses.field(default_factory=dict)
    templates: dict[int, int] = dataclasses.field(default_factory=dict)
    functions: dict[Any, None] = dataclasses.field(default_factory=dict)
    classes: dict[type, None] = dataclasses.field(default_factory=dict)
    called: dict[Any, list[Any]] = dataclasses.field(default_factory=dict)
    loop_in: dict[Any, None] = dataclasses.field(default_factory=dict)
    unsaid: list[tuple[Refusal, frozenset[str]]] = dataclasses.field(default_factory=list)

    def has_rolled(self, tx: Any, loop: RolledIterator) -> None:
        """Note that ``loop`` stands in the function that ``tx`` traces."""
        self.rolled[loop.module_path, loop.location] = loop
        self.loop_in[tx] = None

    def inlines(self, tx: Any, function: Any, args: list[Any]) -> None:
        """Note that ``tx`` calls a Python function, which Dynamo is about to trace."""
        found = dynamo.python_function(function)
        if found is not None:
            self.functions[found] = None
        if args:
            self.classes.update(dict.fromkeys(dynamo_modules.classes_of(args[:1])))
            source = dynamo_modules.source_of_module(args[0])
            if source is not None:
                self.called.setdefault(tx, []).append(source)

    def refusal_of(self, path: str, location: str) -> Refusal | None:
        """Why the loop of the module at ``path`` was refused; None where it was not."""
        return next((r for r in self.refusals if (r.path, r.location) == (path, location)), None)

    def refuse(self, loop: RolledIterator, refusal: Refusal) -> NoReturn:
        """Trace the frame again without ``loop`` rolled."""
        if not self.is_only_unrolled(loop):
            self.session.refused([LoopReport.of_refusal(refusal)])
        self._restart([loop], [refusal])

    def give_up(self, reports: list[LoopReport]) -> None:
        """Trace the frame again without the loops that were refused.

        Not so where the graph is only looked at: there the refused loops may stay in it, but for those that may be no
        loops over experts at all.
        """
        quiet = [r for r in reports if self.is_only_unrolled(self.rolled.get((r.path, r.location)))]
        loud = [report for report in reports if report not in quiet]
        if self.session.explains:
            loud = []
        self.session.refused(loud)
        refusals = [report.refusal for report in loud or quiet if report.refusal is not None]
        if refusals:
            self.restart_as_stock(refusals)

    def tell_of_unrolled(self, gm: fx.GraphModule) -> None:
        """Say why loops are unrolled that turn out to select rows: their body makes sizes that only run time knows."""
        graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
        places = {user_location(node) for graph in graphs for node in graph.nodes if has_unknown_size(node)}
        told = {(refusal.path, refusal.location): refusal for refusal, lines in self.unsaid if lines & places}
        self.session.refused([LoopReport.of_refusal(refusal) for refusal in told.values()])

    def is_only_unrolled(self, loop: RolledIterator | None) -> bool:
        """Whether a loop that is refused was one of known length that need not have been over experts at all."""
        return loop is not None and loop.site is not None and not loop.has_unknown_sizes

    def is_unrolled(self, loop: RolledIterator | None) -> bool:
        """Whether Dynamo can go on without ``loop`` rolled, in one graph where that is asked for."""
        return self.is_only_unrolled(loop) or (loop is not None and loop.site is not None and bool(self.tx.one_graph))

    def restart_as_stock(self, refusals: list[Refusal]) -> NoReturn:
        """Trace the frame again with its loops left as stock Dynamo has them.

        With ``fullgraph=True`` stock Dynamo could do nothing with any loop: there the others stay rolled, so that the
        error is raised at a loop that was refused.
        """
        self._restart([self.rolled.get((refusal.path, refusal.location)) for refusal in refusals], refusals)

    def _restart(self, loops: list[RolledIterator | None], refusals: list[Refusal]) -> NoReturn:
        if all(refusal in self.refusals for refusal in refusals):  # said already: to trace it again would not help
            report_refused(self, refusals[0].path, refusals[0].location)
        log = self.tx.speculation_log  # lives as long as the frame's tracing, restarts included
        log.clear()
        if all(map(self.is_unrolled, loops)):
            log.moe_rewrite_unrolled = self.unrolled | {loop.site for loop in loops if loop is not None}
            log.moe_rewrite_refusals = self.refusals
            loud = [r for r, loop in zip(refusals, loops, strict=True) if not self.is_only_unrolled(loop)]
            log.moe_rewrite_not_rolled = [*getattr(log, "moe_rewrite_not_rolled", []), *loud]
            quiet = [(r, loop.lines) for r, loop in zip(refusals, loops, strict=True) if loop and r not in loud]
            log.moe_rewrite_unsaid = [*getattr(log, "moe_rewrite_unsaid", []), *quiet]
        else:
            log.moe_rewrite_refusals = [*self.refusals, *refusals]
        raise dynamo.RestartFrame(restart_reason=f"moe_rewrite: {'; '.join(map(str, refusals))}")

    def restart_with_plain_lists(self) -> NoReturn:
        """Trace the frame again with ``tensor.tolist()`` as Dynamo has it."""
        log = self.tx.speculation_log
        log.clear()
        log.moe_rewrite_plain_lists = True
        raise dynamo.RestartFrame(restart_reason="moe_rewrite: a list of a tensor's numbers is read")

    @property
    def rolls(self) -> bool:
        """Whether loops are rolled in this frame."""
        return not self.refusals or bool(self.tx.one_graph)

    def guard_on_code(self) -> None:
        """Trace again once the code that was traced is no longer what Python would run, for a frame with a loop in it.

        Stock Dynamo gives up a function with such a loop. Python then calls what it calls, modules with their hooks,
        and those are frames of their own.
        """
        if dynamo_calls.is_exported(self.tx):
            return
        classes = [*self.classes, *dynamo_modules.classes_used(self.tx)]
        watch = CodeWatch(classes, self.functions, self.tx.f_code)
        dynamo_modules.guard_always(lambda _: watch.unchanged(), "the code that was traced")
        dynamo_modules.guard_on_hooks(self.tx, (source for tx in self.loop_in for source in self.called.get(tx, ())))

    def next_template(self, pack: Any) -> int:
        """The number of the first template of ``pack`` that was not traced in this frame yet."""
        number = self.templates.get(id(pack), 0)
        self.templates[id(pack)] = number + 1
        return number

    def tables_of(self, experts: ExpertModules, pack: Any) -> Tables:
        """The tables of some experts, guarded on."""
        place = experts.source, experts.places
        if place not in self.containers:
            tables = self.containers[place] = Tables(experts, pack)
            dynamo_modules.guard_on(experts.source, tables.serve, "the experts' modules and parameters")
            if not all(other.pack.holds for other in self.containers.values()):
                self.loops[-1].refuse("parameters of the experts are also those of other experts, in another order")
        return self.containers[place]

    def table(self, tx: Any, given: Tables, name: str) -> Any:
        """The variable of the table that holds the alike modules' parameters called ``name``."""
        tensor = given.pack.table(name)
        if id(tensor) not in self.tables:
            if dynamo_calls.is_exported(tx):  # one model, whose parameters are attributes of the graph's module
                variable = dynamo_modules.global_variable(tx, "moe_rewrite_table", tensor)
            else:
                variable = dynamo_modules.input_from(tx, given.source, given.read, name, tensor, given.pack.is_in_place)
            self.tables[id(tensor)] = TableInput(given, name, variable)
        found = self.tables[id(tensor)]
        if found.given is not given:
            found.given.serve_no_other()
            given.serve_no_other()
        return found.variable


def current() -> FrameCapture | None:
    """The frame that this thread is tracing, if it is compiled with this package's backend."""
    return getattr(_active, "capture", None)


def install(is_ours: Callable[[Any], bool], start_session: Callable[[Any], Any]) -> None:
    """Have Dynamo trace the frames of this package's backend with a :class:`FrameCapture`, once per process.

    Args:
        is_ours: whether an object that ``torch.compile`` made of its ``backend=`` is this package's.
        start_session: called with that object before a frame is traced; raises on bad options.
    """

    def run_frame(original: Callable[..., Any], tx: Any) -> Any:
        wrapper = dynamo_calls.compiler_wrapper(tx.output.compiler_fn)
        if not is_ours(wrapper):
            return original(tx)
        try:
            session = start_session(wrapper)
        except Exception as error:
            dynamo.abandon(tx)
            raise dynamo.error_shown_as_is(error) from None
        refusals = getattr(tx.speculation_log, "moe_rewrite_refusals", [])
        unrolled: frozenset[Any] = getattr(tx.speculation_log, "moe_rewrite_unrolled", frozenset())
        stock = bool(refusals) and not tx.one_graph
        plain_lists = getattr(tx.speculation_log, "moe_rewrite_plain_lists", False)
        widened = not stock and dynamo.allow_data_dependent_shapes(tx.output)
        outer = current()
        _active.capture = capture = FrameCapture(tx, session, refusals, unrolled, widened, plain_lists)
        capture.unsaid += getattr(tx.speculation_log, "moe_rewrite_unsaid", [])
        try:
            with dynamo.same_scope_after():
                return original(tx)
        except dynamo.CONTROL_FLOW:
            raise
        except Exception as error:
            not_rolled = getattr(tx.speculation_log, "moe_rewrite_not_rolled", [])
            may_be_our_doing = capture.loops or (not_rolled if tx.one_graph else widened)
            if not isinstance(error, dynamo.DYNAMO_ERRORS) and not may_be_our_doing:
                raise
            if capture.deferred and not capture.loops:
                capture.restart_with_plain_lists()
            reason = _reason(error)
            if not_rolled and not capture.loops:
                _say(f"{'; '.join(map(str, not_rolled))}. Unrolled, Dynamo cannot trace it in one graph: {reason}")
            if capture.loops:
                loop = capture.loops[-1]
                needed = None if loop.path is None else dynamo.needed_number(error, loop.path.number)
                if needed is not None:
                    loop.refuse(f"Python needs the value of `{needed}`, which differs between experts")
                loop.refuse(f"Dynamo cannot trace the body: {reason}")
            if not widened or isinstance(error, dynamo.Unsupported):
                raise
            # Python needs a size that stock Dynamo would not have traced up to, or Dynamo fails with one: it breaks the
            # graph before.
            capture.restart_as_stock([Refusal(session.base_path, dynamo.user_location(tx), reason)])
        finally:
            _active.capture = outer
            for table in capture.tables.values():
                table.given.pack.release()

    dynamo.wrap_method(dynamo.InstructionTranslator, "run", run_frame)


def report_refused(capture: FrameCapture, path: str, location: str) -> None:
    """Where there is no other way to trace a loop that was refused, say why."""
    refusal = capture.refusal_of(path, location)
    if refusal is not None:
        _say(str(refusal))


def _say(refusal: str) -> NoReturn:
    """End the graph with our reason."""
    dynamo.graph_break(
        "Mixture-of-Experts loop not rewritten",
        f"moe_rewrite leaves this loop as it is: {refusal}",
        ["Compile without fullgraph=True: the loop then runs in Python, as with every other backend."],
    )


def _reason(error: BaseException) -> str:
    """What Dynamo could not do, in one line: the error that others were raised from says it best."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None and isinstance(cause, dynamo.DYNAMO_ERRORS):
        first = cause
    lines = [line.strip() for line in str(first).strip().splitlines()]
    if "Unsafe side effect" in str(first):  # Dynamo speaks of a higher-order operator, and there is none
        return "the body changes a Python object that is older than the iteration"
    explanation = next((line for line in lines if line.startswith("Explanation:")), "")
    return " ".join(filter(None, (lines[0] if lines else type(first).__name__, explanation)))
