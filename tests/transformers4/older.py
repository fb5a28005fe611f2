"""Blocks as they were written in transformers 4.36 to 4.56, and in the code that came with models of that time.

They have one shape: ``E`` experts of a gated MLP in an ``nn.ModuleList``, a router, a loop.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, E, K = 16, 24, 6, 3


class MLP(nn.Module):
    """A gated expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """The router and the experts. A subclass has the loop: ``moe(x [T, H], ids [T, K], weights [T, K]) -> [T, H]``."""

    experts: Any

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, E, bias=False)
        self.experts = nn.ModuleList([MLP() for _ in range(E)])

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        router_logits = self.gate(hidden_states)
        weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        weights, ids = torch.topk(weights, K, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(hidden_states.dtype)
        out = self.moe(hidden_states, ids, weights)
        return out.reshape(batch_size, sequence_length, hidden_dim), router_logits


class Mixtral436(Block):
    """Positions as lists, and no rows skipped by a `continue`."""

    def moe(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        hidden_dim = hidden_states.shape[-1]
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=E).permute(2, 1, 0)
        for expert_idx in range(E):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            if top_x.shape[0] == 0:
                continue
            top_x_list = top_x.tolist()
            idx_list = idx.tolist()
            current_state = hidden_states[None, top_x_list].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x_list, idx_list, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states


class Mixtral446(Block):
    """A range over the experts, `x[None, top_x]`."""

    def moe(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        hidden_dim = hidden_states.shape[-1]
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=E).permute(2, 1, 0)
        for expert_idx in range(E):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states


class Qwen3Moe453(Block):
    """The hits as a tensor, each of one element; the module is picked by it."""

    def moe(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        hidden_dim = hidden_states.shape[-1]
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=E).permute(2, 1, 0)
        expert_hitted = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hitted:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states


class HitsAsList(Block):
    """The hits read back as a list of numbers."""

    def moe(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        hidden_dim = hidden_states.shape[-1]
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=E).permute(2, 1, 0)
        expert_hitted = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero(as_tuple=True)[0].tolist()
        for expert_idx in expert_hitted:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states


class DeepseekMoeTraining(Block):
    """DeepSeek's own code in training: tokens repeated for each slot, written to where an id is the expert's."""

    def moe(self, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
        flat_topk_idx = topk_idx.view(-1)
        hidden_states = hidden_states.repeat_interleave(K, dim=0)
        y = torch.empty_like(hidden_states)
        for i, expert in enumerate(self.experts):
            y[flat_topk_idx == i] = expert(hidden_states[flat_topk_idx == i])
        return (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)


class DeepseekMoeInference(Block):
    """DeepSeek's own code in inference: rows sorted by expert, sliced by counts that are read back."""

    def moe(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        cnts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        cnts.scatter_(1, topk_ids, 1)
        tokens_per_expert = cnts.sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        outputs = []
        start_idx = 0
        for i, num_tokens in enumerate(tokens_per_expert.tolist()):
            end_idx = start_idx + num_tokens
            if num_tokens == 0:
                continue
            outputs.append(self.experts[i](sorted_tokens[start_idx:end_idx]))
            start_idx = end_idx
        outs = torch.cat(outputs, dim=0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        return (new_x.view(*topk_ids.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)


class Switch430(Block):
    """A mask of tokens for each expert; rows are written where it is set. One expert a token."""

    def moe(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        router_mask = F.one_hot(ids[:, 0], E)
        next_states = hidden_states.clone()
        for idx, expert in enumerate(self.experts):
            token_indices = router_mask[:, idx].bool()
            next_states[token_indices] = expert(hidden_states[token_indices]).to(next_states.dtype)
        return weights[:, :1] * next_states


class Dbrx440(nn.Module):
    """Parameters in a list of chunks, positions as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, E, bias=False)
        self.w1 = nn.Parameter(torch.empty(E * INNER, WIDTH))
        self.w2 = nn.Parameter(torch.empty(E * INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, WIDTH)
        top_weights, top_experts = torch.topk(self.gate(x).softmax(dim=-1), K, dim=-1)
        out = torch.zeros_like(x)
        expert_mask = F.one_hot(top_experts, num_classes=E).permute(2, 1, 0)
        w1_chunked = self.w1.view(E, INNER, WIDTH).chunk(E, dim=0)
        w2_chunked = self.w2.view(E, INNER, WIDTH).chunk(E, dim=0)
        w1_chunked = [w1.squeeze(dim=0) for w1 in w1_chunked]
        w2_chunked = [w2.squeeze(dim=0) for w2 in w2_chunked]
        for expert_idx in range(0, E):
            topk_idx, token_idx = torch.where(expert_mask[expert_idx])
            if token_idx.shape[0] == 0:
                continue
            token_list = token_idx.tolist()
            topk_list = topk_idx.tolist()
            expert_tokens = x[None, token_list].reshape(-1, WIDTH)
            hidden = F.silu(expert_tokens.matmul(w1_chunked[expert_idx].t()))
            expert_out = hidden.matmul(w2_chunked[expert_idx]) * top_weights[token_list, topk_list, None]
            out.index_add_(0, token_idx, expert_out)
        return out.reshape(shape)


FORMS: dict[str, type[nn.Module]] = {
    form.__name__: form
    for form in (
        Mixtral436,
        Mixtral446,
        Qwen3Moe453,
        HitsAsList,
        DeepseekMoeTraining,
        DeepseekMoeInference,
        Switch430,
        Dbrx440,
    )
}
