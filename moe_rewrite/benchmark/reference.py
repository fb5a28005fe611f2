"""The experts in float64, one at a time, and how far a result is from them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moe_rewrite.benchmark.shapes import ExpertsInputs


@dataclasses.dataclass(frozen=True)
class Exact:
    """What an experts module computes, in float64, in the host's memory.

    Attributes:
        output: ``[T, H]``.
        hidden: gradient of the hidden states ``[T, H]``; None for a forward alone.
        weight: gradient of one expert's second matrix, for a spot check of the weights' gradients; likewise.
        expert: that expert.
    """

    output: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    expert: int = 0

    @classmethod
    def of(cls, module: nn.Module, inputs: ExpertsInputs) -> Exact:
        """For a module with the weights, attributes and ``_apply_gate`` of transformers' experts classes.

        Only the weights of one expert are in float64 at a time.
        """
        output = torch.zeros_like(inputs.hidden, dtype=torch.float64, requires_grad=False)
        hidden = torch.zeros_like(output) if inputs.gradient is not None else None
        weight, first = None, int(inputs.index.min())
        for expert in inputs.index.unique().tolist():
            token, slot = torch.where(inputs.index == expert)
            rows = inputs.hidden.detach()[token].double().requires_grad_(hidden is not None)
            down = module.down_proj[expert].detach().double().requires_grad_(hidden is not None)
            with torch.set_grad_enabled(hidden is not None):
                out = _expert(module, expert, rows, down) * inputs.weights.detach()[token, slot, None].double()
            output.index_add_(0, token, out.detach())
            if hidden is not None and inputs.gradient is not None:
                of_rows, of_down = torch.autograd.grad(out, (rows, down), inputs.gradient[token].double())
                hidden.index_add_(0, token, of_rows)
                weight = of_down if expert == first else weight
        if hidden is None or weight is None:
            return cls(output.cpu())
        return cls(output.cpu(), hidden.cpu(), weight.cpu(), first)

    def error(self, results: tuple[Tensor, ...], names: list[str]) -> float:
        """The largest relative error (norm of the difference over the norm) of ``results``, which ``names`` names."""
        found = dict(zip(names, results, strict=True))
        pairs = [(found["output"], self.output)]
        if self.hidden is not None and self.weight is not None:
            pairs += [(found["hidden"], self.hidden), (found["down_proj"][self.expert], self.weight)]
        return max(relative_error(result, wanted) for result, wanted in pairs)


def _expert(module: nn.Module, expert: int, rows: Tensor, down: Tensor) -> Tensor:
    """One expert of ``rows [P, H]`` in their dtype, before its routing weight."""
    up: Tensor = module.gate_up_proj[expert].detach().to(rows.dtype)
    if not module.is_transposed:
        up, down = up.T, down.T
    inner = rows @ up
    if module.has_bias:
        inner = inner + module.gate_up_proj_bias[expert].detach()
    out: Tensor = module._apply_gate(inner) @ down
    return out + module.down_proj_bias[expert].detach() if module.has_bias else out


def relative_error(result: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm. NaN stays NaN."""
    wanted = wanted.to(result.device, torch.float64)
    return float((result.detach().double() - wanted).norm() / wanted.norm())
