"""Experts that are modules of their own, with their parameters in one buffer for each name.

A ``nn.ModuleList`` of experts holds E small weights where a rewritten loop needs one ``[E, N, K]`` table. :func:`pack`
puts them there: one buffer for each name, and every parameter a view of its row. The parameters stay the objects they
were, so optimisers, checkpoints and the eager model see nothing of it.

* ``alike.py``: are the experts the same program with other values?
* ``table.py``: one buffer for all experts' parameters of one name, and gradients back to each of them.
* ``watch.py``: is all of this still so?
* ``single.py``: parameters that no module of their own holds (``nn.ParameterList``).
* ``structure.py``: what code that was traced for some experts depends on.
* ``packs.py``: all of these together, and the packs that there are.
"""

from moe_rewrite.packing.alike import NotAlike, join, parts, tensor_attributes, tensors_of
from moe_rewrite.packing.packs import ABSENT, Pack, pack, pack_of
from moe_rewrite.packing.single import TENSOR, singles
from moe_rewrite.packing.structure import Structure

__all__ = [
    "ABSENT",
    "TENSOR",
    "NotAlike",
    "Pack",
    "Structure",
    "join",
    "pack",
    "pack_of",
    "parts",
    "singles",
    "tensor_attributes",
    "tensors_of",
]
