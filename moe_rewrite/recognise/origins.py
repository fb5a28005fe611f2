"""Where the expert ids of a retraced body come from in Dynamo's graph: that says what values they can have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from moe_rewrite.recognise.bounds import distinct_run, upper_bound

_aten = torch.ops.aten
_SAME_ORDER = (
    *(_aten.view.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.alias.default, _aten.detach.default),
    _aten._to_copy.default,
)
_SAME_ENTRIES = (_aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.expand.default)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known of expert ids.

    Attributes:
        bound: a number that all are below, while none is below 0; None where it is not known.
        distinct: how many of them, one after the other when they are flattened, are known to differ.
    """

    bound: int | None = None
    distinct: int = 1


def origin_of(ids: fx.Node, inputs: Sequence[fx.Node]) -> Origin:
    """What is known of ``ids``, a node of a retraced body whose placeholders stand for ``inputs``."""
    keeps_order = True
    placeholders = list(ids.graph.find_nodes(op="placeholder"))
    while ids.op != "placeholder":
        if ids.target in _SAME_ENTRIES:
            keeps_order = False
        elif ids.target not in _SAME_ORDER or ids.meta["val"].dtype not in (torch.int32, torch.int64):
            return Origin()
        ids = ids.args[0]  # type: ignore[assignment]
    source = inputs[placeholders.index(ids)]
    return Origin(upper_bound(source), distinct_run(source) if keeps_order else 1)
