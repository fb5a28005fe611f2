"""How long Dynamo takes over layers of experts that are modules, by the number of experts.

A loop over alike modules is traced once, whatever their number. Prints the seconds of Dynamo, recogniser and lowering
(inner compiler "eager", so that nothing else is in them), packing included and apart:

    python examples/benchmark_capture.py --experts 8 32 128 --layers 4
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, num_experts: int, hidden: int, inner: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(num_experts))
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        mask = F.one_hot(ids, len(self.experts)).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for i in range(len(self.experts)):
            slot, token = torch.where(mask[i])
            out.index_add_(0, token, self.experts[i](x[token]) * weights[token, slot, None])
        return x + out


def seconds(num_experts: int, num_layers: int, hidden: int, inner: int, repeats: int) -> list[float]:
    """Seconds of the first call of a freshly compiled model, for each of some repeats."""
    times = []
    for _ in range(repeats):
        torch._dynamo.reset()
        model = nn.Sequential(*(Layer(num_experts, hidden, inner, 2) for _ in range(num_layers)))
        x = torch.randn(64, hidden)
        fast = torch.compile(
            model, backend="moe_rewrite", fullgraph=True, options={"inner": "eager", "experts": "grouped_mm"}
        )
        with torch.no_grad():
            start = time.perf_counter()
            fast(x)
            times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--inner", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    seconds(2, 1, args.hidden, args.inner, 1)  # the first compile of a process pays for imports
    first = None
    print(f"{args.layers} layers; seconds of the first call, best of {args.repeats}")
    for num_experts in args.experts:
        best = min(seconds(num_experts, args.layers, args.hidden, args.inner, args.repeats))
        first = first or best
        print(f"{num_experts:5d} experts: {best:6.2f} s, {best / first:4.2f} x", flush=True)


if __name__ == "__main__":
    main()
