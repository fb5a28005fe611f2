"""Spells out contiguous pieces of something sorted by expert as rows that are selected by an expert id.

``x[start:stop]``, between two entries of a running sum, is ``x[ids == expert]`` where ``ids`` says for each row of
``x`` between which two entries it stands. Numbers that one iteration leaves to the next become entries of a running
sum, and ``torch.cat`` of a list of pieces a tensor that each piece is written to. After that nothing about pieces is
special.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_rewrite import markers
from moe_rewrite.memory import is_written_to
from moe_rewrite.nodes import changes_something, example_value, first_input, operation
from moe_rewrite.recognise.erase import erase_unused
from moe_rewrite.recognise.hits import length_of_range
from moe_rewrite.recognise.regions import Region, find_regions
from moe_rewrite.recognise.running import Bound, Prefix, are_counts, bound, root, says_empty


def spell_out_pieces(graph: fx.Graph) -> None:
    """Rewrite the markers of pieces and of carried numbers in all captured bodies of ``graph``, in place.

    A marker that cannot be understood stays, with the reason in ``meta["moe_rewrite_reason"]``.
    """
    regions = [region for region in find_regions(graph) if region.end is not None]
    for first in dict.fromkeys(region.loop for region in regions):
        paths = [region for region in regions if region.loop is first]
        if any(node.target in (markers.piece, markers.carry_in) for path in paths for node in path.body):
            _Loop(paths).spell_out()


_EFFECTS = (markers.piece, markers.collect, markers.collect_rows, markers.carry_out)

REASON = "moe_rewrite_reason"
"""``node.meta`` key of why a marker was not understood."""


@dataclasses.dataclass
class _Pieces:
    """The pieces of one path between the entries of one running sum. ``positions``: those of a piece's rows."""

    sizes: fx.Node
    positions: fx.Node
    length: Any


def _experts(path: Region) -> range:
    """From the smallest to the largest expert of a path."""
    return range(min(r.start for r in path.experts), max(r.stop for r in path.experts))


class _Loop:
    def __init__(self, paths: list[Region]) -> None:
        self.paths = paths
        self.first = paths[0].begin
        self.graph = self.first.graph
        self.known: dict[fx.Node, Bound] = {}
        self._made: dict[Any, fx.Node] = {}
        self._pieces: dict[fx.Node, _Pieces] = {}
        self._asked: set[tuple[fx.Node, fx.Node]] = set()

    def spell_out(self) -> None:
        self._tallies()
        for carries in self._chains():
            self._running_sum(carries)
        for path in self.paths:
            for node in path.body:
                if node.target is markers.piece:
                    self._piece(path, node)
        for path in self.paths:
            for node in path.body:
                if node.target is markers.collect_rows:
                    self._collected(path, node)
        for path in self.paths:
            self._drop_dead(path)
        erase_unused([sizes for kind, sizes, *_ in map(tuple, self._made) if kind == "tally"])

    # --- graph -------------------------------------------------------------------------------------------------------

    def _put(
        self, before: fx.Node, fn: Callable[..., Any] | str, *args: Any, value: Any = None, **kwargs: Any
    ) -> fx.Node:
        """``fn(*args)`` in the graph before a node. A name is that of a method.

        ``value``: its fake value, where it is not to be computed.
        """
        with self.graph.inserting_before(before):
            create = self.graph.call_method if isinstance(fn, str) else self.graph.call_function
            node = create(fn, args, kwargs)  # type: ignore[arg-type]
        node.meta = {key: self.first.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.first.meta}
        if value is None:
            given, named = fx.map_arg((args, kwargs), example_value)  # type: ignore[misc]
            with example_value(self.first).fake_mode, torch.no_grad():
                value = getattr(given[0], fn)(*given[1:], **named) if isinstance(fn, str) else fn(*given, **named)
        node.meta["example_value"] = value
        return node

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _stops(self, sizes: fx.Node, device: torch.device) -> fx.Node:
        """The running sum of sizes, before the loop."""

        def make() -> fx.Node:
            known = self._tally(sizes) or sizes
            counts = self._put(self.first, "to", known, device=device, dtype=torch.int64)
            return self._put(self.first, torch.cumsum, counts, 0)

        return self._once(("stops", sizes, device), make)

    # --- counts of a length that only run time knows ---------------------------------------------------------------

    def _tallies(self) -> None:
        """Let the bodies read what ``bincount`` counts for the loop's experts from a tensor of known length."""
        for path in self.paths:
            for node in [node for node in path.body if node.target is markers.select and node.args[1] == 0]:
                table = node.args[0]
                assert isinstance(table, fx.Node)
                counts = self._tally(root(table))
                if counts is not None and example_value(table).dim() == 1:
                    node.args = (self._cast(counts, example_value(table)), *node.args[1:])

    def _cast(self, counts: fx.Node, like: torch.Tensor) -> fx.Node:
        def make() -> fx.Node:
            return self._put(self.first, "to", counts, device=like.device, dtype=like.dtype)

        return self._once(("cast", counts, like.device, like.dtype), make)

    def _tally(self, sizes: fx.Node) -> fx.Node | None:
        """``[experts]``: how many entries each expert has, as a ``bincount`` has it; None for other nodes."""
        given = dict(zip(("input", "weights", "minlength"), sizes.args, strict=False)) | sizes.kwargs
        experts, ids, shortest = self._last_expert() + 1, given.get("input"), given.get("minlength", 0)
        known = operation(sizes) == "bincount" and given.get("weights") is None and isinstance(ids, fx.Node)
        if not known or not isinstance(shortest, int) or shortest < experts or is_written_to(sizes):
            return None
        assert isinstance(ids, fx.Node)
        device = example_value(ids).device

        def make() -> fx.Node:
            numbers = self._put(self.first, torch.arange, experts, device=device)
            column = self._put(self.first, torch.unsqueeze, ids, 1)
            same = self._put(self.first, torch.eq, column, numbers)
            return self._put(self.first, torch.sum, same, 0)

        return self._once(("tally", sizes), make) if sizes < self.first and not is_written_to(ids) else None

    # --- numbers that one iteration leaves to the next -------------------------------------------------------------

    def _chains(self) -> list[list[tuple[Region, fx.Node, fx.Node]]]:
        """For each carried number its ``carry_in`` and ``carry_out`` in each path, in order."""
        chains: list[list[tuple[Region, fx.Node, fx.Node]]] = []
        chained = {carry for path in self.paths for carry in path.body if carry.target is markers.carry_in}
        for path in self.paths:
            for carry in [node for node in path.body if node.target is markers.carry_in]:
                value = example_value(carry)
                end = next((user for user in carry.users if user.target is markers.carry_out), None)
                if value.dim() != 0 or value.dtype is not torch.int64 or end is None or end.args[1] is not carry:
                    continue
                if any(user not in chained for user in end.users):
                    continue
                chain = next((chain for chain in chains if chain[-1][2] is carry.args[1]), None)
                if chain is None:
                    chains.append([(path, carry, end)])
                else:
                    chain.append((path, carry, end))
        return [
            chain for chain in chains if bound(chain[0][1].args[1], {}, range(0)) == 0 and len(chain) == len(self.paths)
        ]

    def _running_sum(self, chain: list[tuple[Region, fx.Node, fx.Node]]) -> None:
        """A number that starts at 0 and to which each iteration adds an entry of some sizes."""
        ends = [(path, carry, end.args[2]) for path, carry, end in chain]
        found = {bound(end, {carry: Prefix(None, 0)}, _experts(path)) for path, carry, end in ends if end is not carry}
        sizes = next((entry.sizes for entry in found if isinstance(entry, Prefix)), None)
        if sizes is None or found != {Prefix(sizes, 1)} or self._first_expert() != 0 or not self._stand_before(sizes):
            return
        known: dict[fx.Node, Bound] = {carry: Prefix(sizes, 0) for _, carry, _ in ends}
        for path, carry, end in ends:
            if end is carry and not (are_counts(sizes) and self._is_empty(path, sizes, known)):
                return
        device = example_value(sizes).device
        stops = self._stops(sizes, device)
        counts = first_input(stops)
        starts = self._once(("starts", sizes), lambda: self._put(self.first, torch.sub, stops, counts))
        for path, carry, _ in chain:
            index = self._scalar_index(path)
            entry = self._put(carry, markers.select, starts, 0, index, value=example_value(carry))
            carry.replace_all_uses_with(entry)
            self.known[entry] = Prefix(sizes, 0)
        for _, carry, end in reversed(chain):
            self.graph.erase_node(end)
            self.graph.erase_node(carry)

    def _first_expert(self) -> int | None:
        """The first index that the loop visits, if it visits all after it in order."""
        first = min(_experts(path).start for path in self.paths)
        return first if length_of_range(self.paths[0].hits) is not None else None

    def _last_expert(self) -> int:
        last: int = max(r.stop for path in self.paths for r in path.experts) - 1
        return last

    def _scalar_index(self, path: Region) -> fx.Node:
        return path.begin  # a loop of known length goes over a range, whose rows are numbers

    def _stand_before(self, node: fx.Node) -> bool:
        return bool(node < self.first)

    def _is_empty(self, path: Region, sizes: fx.Node, known: dict[fx.Node, Bound]) -> bool:
        """Whether a path is for experts whose entry of ``sizes`` is 0."""
        conditions = [node for node in path.body if node.target is markers.condition]
        if says_empty(conditions, sizes, known, _experts(path)):
            return True
        pieces = [node for node in path.body if node.target is markers.piece and not node._erased]
        asked = (path.begin, sizes) in self._asked or any(self._sizes(path, node) is sizes for node in pieces)
        return path.rows == markers.NO_ROWS and asked

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _sizes(self, path: Region, piece: fx.Node) -> fx.Node | None:
        """The sizes between entries of whose running sum a piece stands, for each expert of a path."""
        start, stop = (bound(arg, self.known, _experts(path)) for arg in piece.args[1:3])
        if not isinstance(stop, Prefix) or stop.sizes is None or stop.shift != 1:
            return None
        at_zero = start == 0 and isinstance(start, int) and path.experts == (range(1),)
        if not at_zero and start != Prefix(stop.sizes, 0):
            return None
        return stop.sizes if self._stand_before(stop.sizes) and are_counts(stop.sizes) else None

    def _piece(self, path: Region, node: fx.Node) -> None:
        container = node.args[3]
        assert isinstance(container, fx.Node)
        if not self._stand_before(container):
            node.meta[REASON] = "a slice of something that the body computes"
            return
        length, device = self._length(container), example_value(node).device
        rows = self._once(("rows", length, device), lambda: self._put(self.first, torch.arange, length, device=device))
        sizes = self._sizes(path, node)
        if sizes is not None:
            stops = self._stops(sizes, device)
            ids = self._once(
                ("ids", sizes, length, device),
                lambda: self._put(self.first, torch.bucketize, rows, stops, right=True),
            )
            mask = self._put(node, torch.eq, ids, self._scalar_index(path))
        else:
            mask = self._between(node, rows, length)
        taken = self._put(
            node, torch.nonzero, mask, value=example_value(node).new_empty((*example_value(node).shape, 1))
        )
        positions = self._put(node, torch.select, taken, 1, 0, value=example_value(node))
        if sizes is not None:
            self._pieces[positions] = _Pieces(sizes, positions, length)
            self._asked.add((path.begin, sizes))
        self._replace(node, positions)

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        """Put a node in the place of a marker."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _drop_dead(self, path: Region) -> None:
        """Erase what nothing uses any more, such as the bounds of pieces."""
        for node in reversed(path.body):
            is_computed = not node._erased and node.op in ("call_function", "call_method")
            if is_computed and not node.users and not changes_something(node) and node.target not in _EFFECTS:
                led_to_it = list(node.all_input_nodes)
                self.graph.erase_node(node)
                erase_unused([source for source in led_to_it if source < self.first])

    def _length(self, container: fx.Node) -> Any:
        """How many rows a tensor has: a number, or a node before the loop."""
        size = example_value(container).shape[0]
        if isinstance(size, int):
            return size
        return self._once(
            ("length", str(size)), lambda: self._put(self.first, torch.ops.aten.sym_size.int, container, 0)
        )

    def _between(self, node: fx.Node, rows: fx.Node, length: Any) -> fx.Node:
        """Whether each of ``rows`` stands between the bounds of a piece. Below 0 they count from the end."""
        bounds = []
        for arg in node.args[1:3]:
            number = self._put(node, "to", arg, torch.int64)
            from_end = self._put(node, torch.add, number, length)
            below = self._put(node, torch.lt, number, 0)
            bounds.append(self._put(node, torch.where, below, from_end, number))
        after_start = self._put(node, torch.ge, rows, bounds[0])
        before_stop = self._put(node, torch.lt, rows, bounds[1])
        return self._put(node, torch.logical_and, after_start, before_stop)

    # --- lists of pieces ---------------------------------------------------------------------------------------------

    def _collected(self, path: Region, node: fx.Node) -> None:
        """``torch.cat`` of the rows of all pieces: a tensor that each piece is written to, at its positions."""
        _, value, total = node.args
        example = example_value(value)  # type: ignore[arg-type]
        pieces = self._piece_of_rows(path, example.shape[0])
        if pieces is None:
            node.meta[REASON] = "what is put into a list are not the rows of a piece of something sorted by expert"
            return
        for other in self.paths:
            if other is not path and not self._is_empty(other, pieces.sizes, self.known):
                node.meta[REASON] = "not every iteration with rows puts them into the list"
                return
        if not all(isinstance(size, int) for size in example.shape[1:]):
            node.meta[REASON] = "the size of what is put into a list is not known when compiling"
            return
        shape = (pieces.length, *example.shape[1:])
        given = {"dtype": example.dtype, "device": example.device}
        gathered = self._put(self.first, torch.zeros, shape, **given)
        example_value(gathered).zero_()  # counts as a change, as the one in the body
        written = (gathered, (pieces.positions,), value)
        self._put(node, torch.ops.aten.index_put_.default, *written, value=example_value(gathered))
        end = path.end
        assert end is not None
        result = gathered
        if total == -1:
            after = end.next
            stops = self._stops(pieces.sizes, example_value(pieces.positions).device)
            last = self._put(self.first, torch.select, stops, 0, self._last_expert())
            clipped = self._put(self.first, torch.clamp, last, max=pieces.length)
            rows = self._put(after, "item", clipped, value=example_value(node).shape[0])
            result = self._put(after, torch.narrow, gathered, 0, 0, rows, value=example_value(node))
            self._move_users(node, result, end)
        self._replace(node, result)

    def _move_users(self, node: fx.Node, behind: fx.Node, end: fx.Node) -> None:
        """Let what asks for the size of ``node`` inside the body ask for it behind another node."""
        moved, last = {node}, behind
        for user in list(self.graph.nodes):
            if node < user < end and not moved.isdisjoint(user.all_input_nodes):
                moved.add(user)
        for user in [user for user in self.graph.nodes if user in moved and user is not node]:
            last.append(user)
            last = user

    def _piece_of_rows(self, path: Region, rows: Any) -> _Pieces | None:
        for positions, pieces in self._pieces.items():
            inside = path.begin < positions and (path.end is None or positions < path.end)
            if inside and str(example_value(positions).shape[0]) == str(rows):
                return pieces
        return None
