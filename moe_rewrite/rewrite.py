"""The pass: every captured loop of a graph is recognised and replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from moe_rewrite import lower, splice
from moe_rewrite.config import ExpertsMapping
from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.loop import ExpertsLoop, Refusal
from moe_rewrite.lower import ExpertsBackend, Lifted
from moe_rewrite.recognise import Finding, find_loops
from moe_rewrite.report import LoopReport, log, standalone_code


class LoopRefused(MoeRewriteError):
    """A captured loop could not be rewritten. A captured loop cannot be run either.

    Attributes:
        reports: what was found, the refused loops among them.
    """

    def __init__(self, message: str, reports: list[LoopReport]) -> None:
        super().__init__(message)
        self.reports = reports


def rewrite(
    gm: fx.GraphModule, mapping: ExpertsMapping | Mapping[str, str] | str | None = None, *, base_path: str = ""
) -> list[LoopReport]:
    """Replace every captured loop of ``gm``, in place. A graph without one is left alone.

    Args:
        gm: a graph of Dynamo's that holds captured loops. Its nodes carry fake tensors in ``meta["example_value"]``.
        mapping: the experts mapping; without one, every loop gets ``auto``.
        base_path: path of the module that the graph was traced from.

    Returns:
        What became of each loop, in order.

    Raises:
        LoopRefused: a loop is not to be rewritten, or cannot be proved rewritable. ``gm`` is left as it was.
        OptionsError: the mapping is wrong.
    """
    experts = ExpertsMapping.parse(mapping if mapping is not None else {})
    findings = find_loops(gm)
    plans = [_plan(finding, experts, base_path) for finding in findings]
    refused = [report for report, _ in plans if report is not None and report.loop is None]
    if refused:
        raise LoopRefused("; ".join(map(str, refused)), [report for report, _ in plans if report is not None])
    reports = []
    for finding, (report, backend) in zip(findings, plans, strict=True):
        if report is not None and backend is not None:
            reports.append(_replace(gm, finding, report, backend))
        splice.remove_region(gm.graph, finding.region)
    if findings:
        splice.finish(gm)
    for report in reports:
        log.info("%s", report)
    return reports


def _plan(finding: Finding, experts: ExpertsMapping, base_path: str) -> tuple[LoopReport | None, ExpertsBackend | None]:
    """What is to become of a loop: a report (none for a body without effect) and the experts backend to use."""
    outcome = finding.outcome
    path = ".".join(filter(None, (base_path, outcome.path)))
    region = finding.region
    before = standalone_code([region.begin, *region.body, *filter(None, [region.end])], list(region.inputs))
    if isinstance(outcome, Refusal):
        return LoopReport(path, outcome.location, None, outcome, lower.EAGER, str(outcome), before), None
    if not isinstance(outcome, ExpertsLoop):
        return None, None
    backend, why = lower.choose(experts.choose(path), outcome)
    if backend is None:
        refusal = Refusal(path, outcome.location, why)
        return LoopReport(path, outcome.location, None, refusal, lower.EAGER, why, before), None
    return LoopReport(path, outcome.location, outcome, None, backend.name, why, before), backend


def _replace(gm: fx.GraphModule, finding: Finding, report: LoopReport, backend: ExpertsBackend) -> LoopReport:
    loop = report.loop
    assert loop is not None

    def run(*inputs: torch.Tensor) -> None:
        backend.lower(loop, Lifted(loop, inputs))

    new = splice.replace_loop(gm.graph, finding.region, loop, backend.name, run)
    after = standalone_code(new, loop.inputs)
    fields: dict[str, Any] = {**vars(report), "after": after}
    return LoopReport(**fields)


__all__ = ["LoopRefused", "rewrite"]
