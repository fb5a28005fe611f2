"""Products of integers, which compilers are not to take apart.

Inductor (2.11, 2.13) makes a sum of products of a ``bmm`` with one row or one column, and on the CPU of an ``mm`` with
both. Sums of integers are int64 in torch: what is computed with them would see numbers that do not fit in the dtype of
the product, where eager's have wrapped around.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from moe_rewrite.lower.precision import is_fractional

_LIBRARY = torch.library.Library("moe_rewrite", "FRAGMENT")
_LIBRARY.define("integer_matmul(Tensor left, Tensor right) -> Tensor")


def keep_products(graph: fx.Graph) -> None:
    """Have the products of integers in an ATen graph called as they are."""
    for target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if not is_fractional(node.meta["val"].dtype):
                node.target = torch.ops.moe_rewrite.integer_matmul.default


@torch.library.impl(_LIBRARY, "integer_matmul", "CompositeExplicitAutograd")
def _integer_matmul(left: Tensor, right: Tensor) -> Tensor:
    return torch.matmul(left, right)


@torch.library.register_fake("moe_rewrite::integer_matmul", lib=_LIBRARY)
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])
