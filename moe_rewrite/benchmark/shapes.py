"""The shapes of the benchmark: experts modules of known models, with random weights, and inputs for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16
TOKENS = (1, 4, 16, 64, 512, 4096, 16384)
MIN_BACKWARD_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class ExpertsShape:
    """The experts of one layer of a model.

    Attributes:
        name: how the command line and the tables call it.
        num_experts: experts of the layer.
        hidden: size of a token's hidden state.
        intermediate: size between the two products of an expert.
        top_k: experts of a token.
        gpt_oss: transformers' GPT-OSS experts: biases, gate and up interleaved, clamped. Otherwise ``silu(gate) * up``
            of concatenated halves without biases, which is the same text in all other models of transformers 5 here.
    """

    name: str
    num_experts: int
    hidden: int
    intermediate: int
    top_k: int
    gpt_oss: bool = False

    @property
    def expert_elements(self) -> int:
        """Elements of the weights of one expert, biases included."""
        biases = 2 * self.intermediate + self.hidden if self.gpt_oss else 0
        return self.matrix_elements + biases

    @property
    def matrix_elements(self) -> int:
        """Elements of the matrices of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        """Bytes of the weights of one expert."""
        return self.expert_elements * int(DTYPE.itemsize)

    def build(self, device: torch.device, initialise: bool = True) -> nn.Module:
        """The experts module in bf16. Without ``initialise`` its weights hold anything."""
        if self.gpt_oss:
            from transformers import GptOssConfig as Config
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts
        else:
            from transformers import MixtralConfig as Config
            from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Experts
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.intermediate}
        with torch.device("meta"):
            module = Experts(Config(**sizes, num_local_experts=self.num_experts)).to(DTYPE).eval()
        module = module.to_empty(device=device)
        torch.manual_seed(0)
        for weight in module.parameters() if initialise else ():
            nn.init.normal_(weight, std=0.02)
        return module


SHAPES = {
    shape.name: shape
    for shape in (
        ExpertsShape("qwen1.5-moe", 60, 2048, 1408, 4),
        ExpertsShape("qwen3-30b-a3b", 128, 2048, 768, 8),
        ExpertsShape("mixtral-8x7b", 8, 4096, 14336, 2),
        ExpertsShape("gpt-oss-20b", 32, 2880, 2880, 4, gpt_oss=True),
        ExpertsShape("deepseek-v3", 256, 7168, 2048, 8),
        ExpertsShape("tiny", 8, 64, 32, 2),
        ExpertsShape("tiny-gpt-oss", 8, 64, 32, 2, gpt_oss=True),
    )
}
TINY = ("tiny", "tiny-gpt-oss")
REAL = tuple(name for name in SHAPES if name not in TINY)


@dataclasses.dataclass(frozen=True)
class ExpertsInputs:
    """One call's inputs.

    Attributes:
        hidden: hidden states ``[T, H] bf16``.
        index: the experts of each token, ``[T, K] int64``.
        weights: their routing weights, ``[T, K] bf16``.
        gradient: gradient of the output, ``[T, H] bf16``; None for a forward alone.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gradient: Tensor | None = None

    @classmethod
    def random(cls, shape: ExpertsShape, tokens: int, backward: bool, device: torch.device) -> ExpertsInputs:
        """Routed by random logits."""
        scores = torch.randn(tokens, shape.num_experts, device=device).softmax(-1)
        weights, index = torch.topk(scores, shape.top_k, dim=-1)
        hidden, gradient = torch.randn(2, tokens, shape.hidden, device=device, dtype=DTYPE)
        weights = (weights / weights.sum(-1, keepdim=True)).to(DTYPE)
        return cls(hidden, index, weights, gradient if backward else None).leaves()

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.index, self.weights

    def leaves(self) -> ExpertsInputs:
        """The same values in memory of their own; those that get gradients are leaves of autograd."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own: dict[str, Any] = {name: None if value is None else value.detach().clone() for name, value in given.items()}
        if self.gradient is not None:
            own["hidden"].requires_grad_()
            own["weights"].requires_grad_()
        return ExpertsInputs(**own)

    def copy_(self, other: ExpertsInputs) -> None:
        """Take over the values of ``other`` in place."""
        with torch.no_grad():
            for field in dataclasses.fields(self):
                if (mine := getattr(self, field.name)) is not None:
                    mine.copy_(getattr(other, field.name))
