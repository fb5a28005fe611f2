"""A model whose experts are modules in an ``nn.ModuleList``, looped over one by one, as in transformers 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_rewrite.benchmark.shapes import DTYPE


class Expert(nn.Module):
    """A gated expert of three linear layers."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A router and its experts; ``[T, H]`` to ``[T, H]``."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, intermediate) for _ in range(num_experts))
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        mask = F.one_hot(ids, len(self.experts)).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for i in range(len(self.experts)):
            slot, token = torch.where(mask[i])
            out.index_add_(0, token, self.experts[i](x[token]) * weights[token, slot, None])
        return x + out


def build_layers(
    num_layers: int, num_experts: int, hidden: int, intermediate: int, top_k: int, device: torch.device
) -> nn.Module:
    """``num_layers`` layers in bf16 with random weights and no gradients."""
    torch.manual_seed(0)
    with device:
        layers = [Layer(num_experts, hidden, intermediate, top_k) for _ in range(num_layers)]
    return nn.Sequential(*layers).to(DTYPE).eval().requires_grad_(False)
