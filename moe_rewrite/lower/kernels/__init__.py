"""Triton kernels for products of rows with the weights of their experts.

Rows stay in the order of the expert ids. What sorts them by expert is one list of numbers, and the kernels read and
write rows through it: nothing is permuted in memory, but for long gradients of weights (``launch.outer``).

The pairs of an expert are cut into tiles of rows. How many tiles there are is known only on the device; there are at
most as many as whole tiles in all pairs, and one more for each expert. So many programs are started, and each finds its
own tile in the offsets. Nothing is read back, so the kernels can be captured in a CUDA graph, and nothing is added by
atomics, so two runs give the same bits.

Functions called by kernels take no pointers that they load from where their results say what is written: torch's search
for what a kernel writes takes all arguments of such a call for that, and copies of them would be made. And no two of
them have one name: inductor writes what a kernel calls into one file.
"""

from moe_rewrite.lower.kernels.gradients import outer
from moe_rewrite.lower.kernels.lending import lend
from moe_rewrite.lower.kernels.products import multiply, multiply_each
from moe_rewrite.lower.kernels.sorting import count, sort

__all__ = ["count", "lend", "multiply", "multiply_each", "outer", "sort"]
