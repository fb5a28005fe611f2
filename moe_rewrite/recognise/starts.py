"""Whether it can be seen that a loop which adds to nothing leaves behind the very tensor that it started from.

``out = out.index_add(...)`` makes a new tensor; where no iteration comes to it, ``out`` is what it was. What a loop is
rewritten into gives a tensor of its own then, too: that is the same where nobody sees both, or nobody writes to one.
"""

from __future__ import annotations

import torch
from torch import fx

from moe_rewrite import markers
from moe_rewrite.memory import is_written_to, same_in_eager, shares_memory, times_written
from moe_rewrite.nodes import example_value, first_input, operation


def is_zero_before(tensor: fx.Node, loop: fx.Node) -> bool:
    """Whether each entry of a tensor is known to be 0, not -0.0, when a loop begins: it was made so, and is untouched.

    What is added to 0 never gives -0.0, so it is enough to look at what comes before the first path of the loop.
    """
    made = tensor
    while operation(made) in _SAME_ENTRIES and (source := first_input(made)) is not None:
        made = source
    nodes = list(made.graph.nodes)
    between = nodes[nodes.index(made) + 1 : nodes.index(loop)]
    if operation(made) not in _ZEROS or loop not in nodes[nodes.index(made) :]:
        return False
    uses = (node for node in between if any(shares_memory(source, made) for source in node.all_input_nodes))
    return all(_only_views(node, made) for node in uses)


def _only_views(node: fx.Node, made: fx.Node) -> bool:
    """Whether a node gives a view of a tensor, or one of its sizes, and does nothing else."""
    is_view = shares_memory(node, made) and operation(node) in _VIEWS
    return is_view or (not isinstance(example_value(node), torch.Tensor) and operation(node) in _SIZES)


_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_SAME_ENTRIES = {"view", "reshape", "flatten", "unsqueeze", "squeeze", "permute", "transpose", "t", "contiguous"}
_VIEWS = {*_SAME_ENTRIES, "getitem", "select", "narrow", "split", "chunk", "unbind", "expand", "detach"}
_SIZES = {"size", "stride", "dim", "numel", "getattr", "sym_size", "sym_numel"}


def told_from_start(carry_in: fx.Node, carry_out: fx.Node, changed_in_place: bool) -> str | None:
    """Why a carried value may not be another tensor than its start, in iterations that leave it as it is; else None.

    Args:
        carry_in: the marker of its start, in the first path.
        carry_out: the marker of its end, in the last path.
        changed_in_place: whether some path changes it in place.
    """
    start, results = carry_in.args[1], _results(carry_out)
    assert isinstance(start, fx.Node)
    same = _in_memory_of(start)
    later = _after(carry_out)
    given = any(node.op in ("placeholder", "get_attr") for node in same)
    if not given and not any(user in later for node in same for user in node.users):
        return None
    written = times_written(start) > carry_in.meta[markers.TIMES_WRITTEN]
    others = [*same_in_eager(start)[1:], *(node for result in results for node in same_in_eager(result))]
    apart = any(node.target is torch._C._autograd._get_data_attr for node in same)  # its writes are counted apart
    if written or changed_in_place or apart or any(map(is_written_to, others)):
        return "what one iteration leaves to the next may be what the loop started from, and is changed in place"
    left = carry_out.graph.output_node().all_input_nodes
    if (given or any(node in left for node in same)) and any(
        node in left for r in results for node in _in_memory_of(r)
    ):
        return "what the loop leaves behind may be what it started from, and both are seen outside of the graph"
    return None


def _results(carry_out: fx.Node) -> list[fx.Node]:
    """The end of a carried value, and of those of later loops that start from it."""
    found = [carry_out]
    for result in found:  # grows meanwhile
        starts = [user for node in _in_memory_of(result) for user in node.users if user.target is markers.carry_in]
        ends = [user for start in starts for user in start.users if user.target is markers.carry_out]
        found += [end for end in ends if end.args[1] in starts and end not in found]
    return found


def _in_memory_of(node: fx.Node) -> list[fx.Node]:
    alike = same_in_eager(node)
    tensors = (other for other in node.graph.nodes if isinstance(example_value(other), torch.Tensor))
    return [other for other in tensors if any(shares_memory(one, other) for one in alike)]


def _after(node: fx.Node) -> set[fx.Node]:
    """What comes after the loop that ``node`` is in."""
    nodes = list(node.graph.nodes)
    rest = nodes[nodes.index(node) :]
    end = next(place for place, other in enumerate(rest) if other.target is markers.loop_end)
    return set(rest[end:])
