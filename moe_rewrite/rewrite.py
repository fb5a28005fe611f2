"""The pass: every captured loop of a graph is recognised and replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moe_rewrite import fingerprint, lower, splice
from moe_rewrite.config import ExpertsMapping
from moe_rewrite.errors import MoeRewriteError, NotLiftedError
from moe_rewrite.loop import ExpertsLoop, Refusal
from moe_rewrite.lower import ExpertsBackend, InnerCompiler, Lifted, digest
from moe_rewrite.nodes import example_value, has_unknown_size, standalone_code
from moe_rewrite.recognise import Finding, find_loops, rules
from moe_rewrite.recognise.pieces import spell_out_pieces
from moe_rewrite.report import LoopReport, log_reports


class LoopRefused(MoeRewriteError):
    """A captured loop is not to be rewritten, or cannot be proved rewritable. It cannot be run as it stands either.

    Attributes:
        reports: what was found, the refused loops among them.
    """

    def __init__(self, reports: list[LoopReport]) -> None:
        super().__init__("; ".join(str(report) for report in reports if report.refusal is not None))
        self.reports = reports


def rewrite(
    gm: fx.GraphModule,
    mapping: ExpertsMapping | Mapping[str, str] | str | None = None,
    *,
    base_path: str = "",
    fuses: bool = True,
) -> list[LoopReport]:
    """Replace every captured loop of ``gm``, in place. A graph without one is left alone.

    Args:
        gm: a graph of Dynamo's that holds captured loops. Its nodes carry fake tensors in ``meta["example_value"]``.
        mapping: the experts mapping; without one, every loop gets ``auto``.
        base_path: path of the module that the graph was traced from.
        fuses: whether the graph goes to a compiler that fuses elementwise operators into reductions, as inductor does.

    Returns:
        What became of each loop, in order.

    Raises:
        LoopRefused: a loop is not to be rewritten, or cannot be proved rewritable. ``gm`` is left as it was.
        OptionsError: the mapping is wrong.
    """
    plans = make_plans(gm, ExpertsMapping.parse(mapping if mapping is not None else {}), base_path)
    if any(plan.report is not None and plan.report.refusal is not None for plan in plans):
        raise LoopRefused([plan.report for plan in plans if plan.report is not None])
    reports = carry_out(gm, plans, InnerCompiler(fuses))
    log_reports(reports)
    return reports


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to become of one captured body.

    Attributes:
        gm: the graph it stands in: the graph itself or a subgraph of a higher-order operator.
        finding: the body.
        report: what is reported of it; None for a body without effect.
        backend: the experts backend it is lowered to; None for a body that is refused or has no effect.
        needs_grad: whether the graph may be run backward.
    """

    gm: fx.GraphModule
    finding: Finding
    report: LoopReport | None
    backend: ExpertsBackend | None
    needs_grad: bool = False


def make_plans(gm: fx.GraphModule, experts: ExpertsMapping, base_path: str) -> list[Plan]:
    """What is to become of each captured body of ``gm``, in order. Nothing is replaced yet."""
    graphs = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    for graph in graphs:
        spell_out_pieces(graph.graph)
    findings = [(graph, finding) for graph in graphs for finding in find_loops(graph)]
    needs_grad = _may_need_grad(gm)
    return [_plan(graph, finding, experts, base_path, needs_grad) for graph, finding in findings]


def _may_need_grad(gm: fx.GraphModule) -> bool:
    """Whether a gradient can be asked for: of an input, as the compilers decide it, or of what the graph computes.

    A graph may switch gradients on that are off outside, and make tensors that require one.
    """
    nodes = [node for module in gm.modules() if isinstance(module, fx.GraphModule) for node in module.graph.nodes]
    switched_on = any(node.target is torch._C._set_grad_enabled and node.args[0] for node in nodes)
    return (torch.is_grad_enabled() or switched_on) and any(map(_may_require_grad, nodes))


def _may_require_grad(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    if example is None:
        return node.op in ("placeholder", "get_attr")
    return any(getattr(leaf, "requires_grad", False) for leaf in pytree.tree_leaves(example))


def carry_out(gm: fx.GraphModule, plans: list[Plan], compiler: InnerCompiler) -> list[LoopReport]:
    """Replace the loops that are to be rewritten, and leave the refused ones. Returns what became of each loop.

    Args:
        gm: the graph, in which they stand or in whose subgraphs.
        plans: what is to become of each loop.
        compiler: what is known of the compiler that the graph goes to.

    Raises:
        LoopRefused: a loop cannot be lowered after all. What was done so far is not undone.
    """
    reports = []
    replaced: dict[fx.Node, fx.Node] = {}
    known: dict[Hashable, fx.GraphModule] = {}
    for plan in plans:
        report = plan.report
        if report is not None and report.refusal is not None:
            reports.append(report)
            continue
        outputs: list[fx.Node] = []
        if report is not None and plan.backend is not None:
            report, outputs = _replace(plan, report, plan.backend, compiler, replaced, known)
            reports.append(report)
        for marker, source in zip(plan.finding.region.results, plan.finding.results, strict=True):
            node = outputs[source] if isinstance(source, int) else source
            replaced[marker] = replaced.get(node, node)
            marker.replace_all_uses_with(replaced[marker])
        splice.remove_region(plan.gm.graph, plan.finding.region)
    if plans:
        splice.erase_empty_modes(gm.graph, torch.is_grad_enabled())
        for changed in {gm, *(plan.gm for plan in plans)}:
            splice.finish(changed)
    return reports


def _plan(gm: fx.GraphModule, finding: Finding, experts: ExpertsMapping, base_path: str, needs_grad: bool) -> Plan:
    outcome, region = finding.outcome, finding.region
    path = ".".join(filter(None, (base_path, outcome.path)))
    if not isinstance(outcome, (ExpertsLoop, Refusal)):
        return Plan(gm, finding, None, None)
    before = standalone_code([region.begin, *region.body, *filter(None, [region.end])], [region.hits, *region.inputs])
    if isinstance(outcome, Refusal):
        refusal = dataclasses.replace(outcome, path=path)
        return Plan(gm, finding, LoopReport.of_refusal(refusal, None, before), None)
    loop = dataclasses.replace(outcome, path=path)
    backend, why = lower.choose(experts.choose(path), loop, needs_grad)
    if backend is None:
        return Plan(gm, finding, LoopReport.of_refusal(Refusal(path, loop.location, why), loop, before), None)
    return Plan(
        gm, finding, LoopReport(path, loop.location, loop, None, backend.name, why, before), backend, needs_grad
    )


def _replace(
    plan: Plan,
    report: LoopReport,
    backend: ExpertsBackend,
    compiler: InnerCompiler,
    replaced: dict[fx.Node, fx.Node],
    known: dict[Hashable, fx.GraphModule],
) -> tuple[LoopReport, list[fx.Node]]:
    """Replace one loop.

    Args:
        plan: its plan.
        report: what is reported of it.
        backend: what it is lowered to.
        compiler: what is known of the compiler that the graph goes to.
        replaced: what stands in the place of results of loops before it.
        known: the replacements of loops before it, by what they were made of.
    """
    assert report.loop is not None
    loop = dataclasses.replace(report.loop, inputs=tuple(replaced.get(node, node) for node in report.loop.inputs))
    results = dict(zip(plan.finding.results, plan.finding.region.results, strict=True))

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        lifted = Lifted(loop, inputs, compiler, plan.needs_grad)
        backend.build(loop, lifted)
        return [_laid_out_as(example_value(results[n]), output) for n, output in enumerate(lifted.outputs)]

    try:
        key = _fingerprint(loop, backend, plan)
        replacement = known.get(key) or splice.trace_replacement(loop, run)
        made = [node for node in replacement.graph.nodes if node.op != "placeholder"]
        if not any(node.op == "get_attr" or has_unknown_size(node) for node in made):
            known[key] = replacement  # constants, and sizes that only run time knows, are each loop's own
        new, outputs = splice.replace_loop(plan.gm.graph, plan.finding.region, loop, backend.name, replacement)
    except Exception as error:  # sizes that only run time knows, say
        said = (str(error).splitlines() or [""])[0]
        reason = said if isinstance(error, NotLiftedError) else f"it cannot be lowered: {type(error).__name__}: {said}"
        raise LoopRefused([report.refused(reason)]) from error
    digest.mark(plan.gm)
    return dataclasses.replace(report, loop=loop, after=standalone_code(new, loop.inputs)), outputs


def _laid_out_as(example: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A result strided as it is in eager: a view may be taken of it."""
    if rules.same_layout(example, output):
        return output
    contiguous = output.contiguous()
    if rules.same_layout(example, contiguous):
        return contiguous
    return output.new_empty_strided(output.shape, example.stride()).copy_(output)


def _fingerprint(loop: ExpertsLoop, backend: ExpertsBackend, plan: Plan) -> Hashable:
    """What a replacement depends on; something of its own where that is not known."""
    try:
        structure = fingerprint.of_loop(loop), fingerprint.of_inputs(plan.finding.region.results)
    except fingerprint.NoFingerprint:
        return object()
    return backend.name, structure, plan.needs_grad, None if backend.is_built_in else (loop.path, loop.location)
