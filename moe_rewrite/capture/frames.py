"""Hooks into Dynamo that act on the frames which this package's backend compiles, and on no other.

A frame is traced with its loops rolled. When a loop turns out not to be rewritable the whole frame is traced again
as stock Dynamo traces it: the graph then breaks where it always did, and the functions called below get frames of
their own, so loops beside a refused one are still rewritten.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from moe_rewrite.capture import dynamo
from moe_rewrite.capture.rolled import RolledIterator
from moe_rewrite.loop import Refusal
from moe_rewrite.nodes import example_value
from moe_rewrite.recognise.hits import hit_mask
from moe_rewrite.recognise.provenance import module_path

_active = threading.local()


@dataclasses.dataclass
class FrameCapture:
    """The capture of one frame's loops, while Dynamo traces it.

    Attributes:
        tx: the translator of the root frame.
        session: what the compiler backend knows of the frame; it answers which experts backend is configured.
        refusals: why the frame is traced as stock, one for each loop that was refused; empty while loops are rolled.
        widened: whether the graph may hold data-dependent shapes only because its loops are rolled.
        loops: the loops whose body is being traced.
    """

    tx: Any
    session: Any
    refusals: list[Refusal]
    widened: bool
    loops: list[RolledIterator] = dataclasses.field(default_factory=list)

    def refusal_of(self, path: str, location: str) -> Refusal | None:
        """Why the loop of the module at ``path`` was refused; None where it was not."""
        return next((r for r in self.refusals if (r.path, r.location) == (path, location)), None)

    def restart_as_stock(self, refusals: list[Refusal]) -> NoReturn:
        """Trace the frame again with its loops left as stock Dynamo has them.

        With ``fullgraph=True`` stock Dynamo could do nothing with any loop: there the others stay rolled, so that the
        error is raised at a loop that was refused.
        """
        log = self.tx.speculation_log  # lives as long as the frame's tracing, restarts included
        log.clear()
        log.moe_rewrite_refusals = [*self.refusals, *refusals]
        raise dynamo.RestartFrame(restart_reason=f"moe_rewrite: {'; '.join(map(str, refusals))}")


def current() -> FrameCapture | None:
    """The frame that this thread is tracing, if it is compiled with this package's backend."""
    return getattr(_active, "capture", None)


def install(is_ours: Callable[[Any], bool], start_session: Callable[[Any, Any], Any]) -> None:
    """Hook into Dynamo, once per process.

    Args:
        is_ours: whether an object that ``torch.compile`` made of its ``backend=`` is this package's.
        start_session: called with that object and the frame's ``self`` before a frame is traced; raises on bad options.
    """

    def run_frame(original: Callable[..., Any], tx: Any) -> Any:
        wrapper = dynamo.compiler_wrapper(tx.output.compiler_fn)
        if not is_ours(wrapper):
            return original(tx)
        try:
            session = start_session(wrapper, tx.f_locals.get("self"))
        except Exception as error:
            dynamo.abandon(tx)
            raise dynamo.error_shown_as_is(error) from None
        refusals = getattr(tx.speculation_log, "moe_rewrite_refusals", [])
        stock = bool(refusals) and not tx.one_graph
        widened = not stock and dynamo.allow_data_dependent_shapes(tx.output)
        outer = current()
        _active.capture = capture = FrameCapture(tx, session, refusals, widened)
        try:
            with dynamo.same_scope_after():
                return original(tx)
        except dynamo.DYNAMO_ERRORS as error:
            reason = _reason(error)
            if capture.loops:
                capture.loops[-1].refuse(f"Dynamo cannot trace the body: {reason}")
            if not widened or isinstance(error, dynamo.Unsupported):
                raise
            # Python needs a size that stock Dynamo would not have traced up to: it breaks the graph before.
            capture.restart_as_stock([Refusal(session.base_path, dynamo.user_location(tx), reason)])
        finally:
            _active.capture = outer

    dynamo.wrap_method(dynamo.InstructionTranslator, "run", run_frame)
    dynamo.wrap_method(dynamo.TensorVariable, dynamo.iteration_method(), _iterate_tensor)
    dynamo.wrap_method(dynamo.SymNodeVariable, "evaluate_expr", _evaluate_size)
    for iterator in dynamo.iterators():
        dynamo.wrap_method(iterator, "__init__", _make_iterator)
        dynamo.wrap_method(iterator, dynamo.NEXT_METHOD, _advance_iterator)


def _iterate_tensor(original: Callable[..., Any], hits: Any, tx: Any) -> Any:
    """``iter(tensor)``: roll the loop when the rows are the positions set in a mask of known length."""
    capture = current()
    if capture is None or capture.tx.output is not tx.output or (capture.refusals and not tx.one_graph):
        return original(hits, tx)
    node = hits.as_proxy().node
    mask = hit_mask(node)
    if mask is None:
        return original(hits, tx)
    path, location = capture.session.full_path(module_path(node)), dynamo.user_location(tx)
    refusal = capture.refusal_of(path, location)
    if refusal is not None:
        dynamo.graph_break(
            "Mixture-of-Experts loop not rewritten",
            f"moe_rewrite leaves this loop as it is: {refusal}",
            ["Compile without fullgraph=True: the loop then runs in Python, as with every other backend."],
        )
    loop = RolledIterator(hits, example_value(mask).shape[0], capture, path, location)
    if capture.session.leaves_alone(path):
        loop.refuse("experts backend 'eager' is configured for it")
    if not dynamo.is_get_iter(tx):
        loop.refuse("the hits are iterated by something other than a plain `for` statement")
    return loop


def _evaluate_size(original: Callable[..., Any], variable: Any, output: Any = None) -> Any:
    """A size becomes a Python number. In a rolled body, rows are never empty: experts without rows are not visited."""
    capture = current()
    if capture is not None and capture.loops and capture.tx.output is output:
        answer = capture.loops[-1].decide_number(variable)
        if answer is not None:
            return answer
        path = capture.loops[-1].path
        if path is not None and dynamo.assume_not_empty(variable, output, path.symbols_at_start):
            path.assumes_rows = True
    return original(variable, output)


def _reason(error: BaseException) -> str:
    """What Dynamo could not do, in one line: the error that others were raised from says it best."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None and isinstance(cause, dynamo.DYNAMO_ERRORS):
        first = cause
    lines = [line.strip() for line in str(first).strip().splitlines()]
    explanation = next((line for line in lines if line.startswith("Explanation:")), "")
    return " ".join(filter(None, (lines[0] if lines else type(first).__name__, explanation)))


def _make_iterator(original: Callable[..., Any], iterator: Any, *args: Any, **kwargs: Any) -> None:
    original(iterator, *args, **kwargs)
    iterator.moe_rewrite_scope = dynamo.current_scope()


def _advance_iterator(original: Callable[..., Any], iterator: Any, tx: Any) -> Any:
    """An iterator that is older than a rolled loop gives its body another value in every iteration."""
    capture = current()
    if capture is not None and capture.loops and capture.tx.output is tx.output:
        path = capture.loops[-1].path
        if path is not None and getattr(iterator, "moe_rewrite_scope", 0) <= path.scope:
            capture.loops[-1].refuse("the body advances an iterator that was made before the loop", tx)
    return original(iterator, tx)
