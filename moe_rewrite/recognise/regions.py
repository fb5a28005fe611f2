"""Where captured loops stand in a graph."""

from __future__ import annotations

import dataclasses

from torch import fx

from moe_rewrite import markers


@dataclasses.dataclass(frozen=True)
class Region:
    """One captured way through the body of a loop.

    Attributes:
        begin: the ``loop_begin`` marker; its value is the expert's index.
        end: the ``loop_end`` marker; None where the loop was left early (``break``, ``return``).
        body: the nodes between the two, in order.
        inputs: the nodes before the loop whose values the body uses, in order of first use.
        experts: the index values for which the body holds.
        rows: whether the body holds for experts with rows, for those without, or for all
            (``markers.SOME_ROWS``, ``NO_ROWS``, ``ANY_ROWS``).
        loop: the ``loop_begin`` marker of the first path of the same loop.
    """

    begin: fx.Node
    end: fx.Node | None
    body: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    experts: tuple[range, ...]
    rows: int
    loop: fx.Node

    @property
    def hits(self) -> fx.Node:
        """The tensor that the loop iterates."""
        hits = self.begin.args[0]
        assert isinstance(hits, fx.Node)
        return hits

    @property
    def results(self) -> list[fx.Node]:
        """The markers whose values are used after the loop, in order."""
        return [node for node in self.body if node.target in (markers.carry_out, markers.collect)]

    @property
    def ends(self) -> list[fx.Node]:
        """The markers of the carried values' ends, in order: that of the carried values."""
        return [node for node in self.results if node.target is markers.carry_out]

    def dependents(self) -> list[fx.Node]:
        """The nodes of the body whose value depends on the expert's index, in order."""
        dependent = {self.begin}
        for node in self.body:
            if not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
        return [node for node in self.body if node in dependent]


def find_regions(graph: fx.Graph) -> list[Region]:
    """All captured loop bodies of ``graph``, in order."""
    regions = []
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    loop = None
    for begin in graph.find_nodes(op="call_function", target=markers.loop_begin):
        loop = begin if begin.args[1] == 0 or loop is None else loop
        end = next((user for user in begin.users if user.target is markers.loop_end), None)
        body = tuple(nodes[position[begin] + 1 : position[end]]) if end is not None else ()
        inside = {begin, *body}
        inputs = dict.fromkeys(arg for node in body for arg in node.all_input_nodes if arg not in inside)
        bounds: list[int] = end.args[1] if end is not None else []  # type: ignore[assignment]
        experts = tuple(range(start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=True))
        regions.append(
            Region(
                begin,
                end,
                body,
                tuple(inputs),
                experts,
                int(end.args[2]) if end else markers.ANY_ROWS,
                loop,  # type: ignore[arg-type]
            )
        )
    return regions
