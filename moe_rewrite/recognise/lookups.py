"""What each row looks up at its own position: ``source[token]``, embeddings, rows by a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moe_rewrite.loop import Kind, Primitive, Value
from moe_rewrite.recognise.leading import Behind
from moe_rewrite.recognise.refused import Refused
from moe_rewrite.recognise.rules import is_one

if TYPE_CHECKING:
    from moe_rewrite.recognise.rows import RowProgram

aten = torch.ops.aten
LOOKUPS = (aten.index.Tensor, aten.index_select.default, aten.embedding.default)


def looked_up(program: RowProgram, node: fx.Node, op: Any, given: dict[str, Any]) -> Value | Behind:
    """``source[token]``: each row reads at its own position of something that is no row."""
    source = given["self"] if "self" in given else given["weight"]
    if _keeps_rows(op, given, source):
        args = [given["dim"], given["index"]] if op is aten.index_select.default else [given["indices"]]
        return program.step(node, Kind.PER_ROW, op, source, *args)
    if source.kind is Kind.PER_ROW:
        raise Refused(f"`{op}` reads an expert's rows at other positions", node)
    indices = given["indices"] if op is not aten.index_select.default else [given["index"]]
    indices = list(indices) if isinstance(indices, (list, tuple)) else [indices]
    if is_masked(node):
        indices = _mask_as_positions(program, node)
    positions = [index for index in indices if index is not None]
    check_embedding(program, node, op, given)
    if any(
        index.kind is not Kind.PER_ROW or index.example.dim() != 1 or index.example.dtype is torch.bool
        for index in positions
    ):
        raise Refused(f"`{op}` with an index that is not one position for each row", node)
    if op is aten.index_select.default and given["dim"] % source.example.dim() != 0:
        raise Refused(f"`{op}` puts the rows in another dimension than the first", node)
    if op is aten.index.Tensor and indices[0] is None:
        return _looked_up_behind(program, node, source, indices)
    if op is aten.index.Tensor and any(index is None for index in indices[: len(positions)]):
        raise Refused(f"`{op}` with indices that are not side by side", node)
    if source.kind is Kind.PER_EXPERT:
        return program.step(node, Kind.PER_ROW, Primitive.INDEX_EXPERT, source, tuple(positions))
    if op is aten.index.Tensor:
        return program.step(node, Kind.PER_ROW, op, source, indices)
    is_select = op is aten.index_select.default
    rest = [given["dim"], given["index"]] if is_select else [given["indices"], given["padding_idx"]]
    return program.step(node, Kind.PER_ROW, op, source, *rest)


def _looked_up_behind(program: RowProgram, node: fx.Node, source: Value, indices: list[Any]) -> Behind:
    """``source[None, token]``, with ``None`` for dimensions of size 1."""
    leading = next(dim for dim, index in enumerate(indices) if index is not None)
    own = indices[leading:]
    if not all(map(is_one, source.example.shape[:leading])) or source.kind is not Kind.INVARIANT or None in own:
        raise Refused(f"`{node.target}` puts the rows in another dimension than the first", node)
    for _ in range(leading):
        example = source.example.select(0, 0)
        source = program.extra_step("entry", Kind.INVARIANT, example, aten.select.int, source, 0, 0)
    rows = node.meta["val"].new_empty(*node.meta["val"].shape[leading:])
    return Behind(program.extra_step(node.name, Kind.PER_ROW, rows, aten.index.Tensor, source, own), leading)


def _keeps_rows(op: Any, given: dict[str, Any], source: Value) -> bool:
    """Whether entries of each row are picked by an index that is the same for all: ``rows[:, index]``."""
    if source.kind is not Kind.PER_ROW or op is aten.embedding.default:
        return False
    if op is aten.index_select.default:
        return given["index"].kind is Kind.INVARIANT and given["dim"] % source.example.dim() != 0
    used = [dim for dim, index in enumerate(given["indices"]) if index is not None]
    side_by_side = used == list(range(used[0], used[-1] + 1)) and used[0] > 0
    return side_by_side and all(given["indices"][dim].kind is Kind.INVARIANT for dim in used)


def _mask_as_positions(program: RowProgram, node: fx.Node) -> list[Value]:
    """The index ``[mask]`` as positions, one for each dimension of the mask."""
    given: Any = node.args[1]
    indices = [index for index in given if index is not None]
    if len(indices) != 1 or given[0] is None:
        raise Refused(f"`{node.target}` with a mask and something besides", node)
    return program.columns_of(indices[0], node.meta["val"])


def check_embedding(program: RowProgram, node: fx.Node, op: Any, given: dict[str, Any]) -> None:
    """Where gradients are taken, an embedding's must be that of an index; of one table it may leave out a row."""
    if op is not aten.embedding.default or not program.differentiated:
        return
    leaves_out = given["padding_idx"] >= 0 and given["weight"].kind is not Kind.INVARIANT
    if leaves_out or given["scale_grad_by_freq"] or given["sparse"]:
        raise Refused(f"`{op}` with a gradient of its own: padding_idx, scale_grad_by_freq or sparse", node)


def is_masked(node: fx.Node) -> bool:
    """Whether an ``index`` node has a mask for an index."""
    indices = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], (list, tuple)) else ()
    examples = [index.meta["val"] for index in indices if isinstance(index, fx.Node)]
    return any(example.dtype in (torch.bool, torch.uint8) for example in examples)
