"""Tiny whole models of transformers 4 whose layers loop over experts, with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from experts_classes import quiet
from torch import Tensor, nn

VOCABULARY = 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of a config, where it has such."""

MODELS: dict[str, dict[str, Any]] = {
    "DbrxForCausalLM": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 3},
    },
    "DeepseekV2ForCausalLM": {},
    "DeepseekV3ForCausalLM": {},
    "Dots1ForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {"moe_layer_start_index": 0},
    "FlexOlmoForCausalLM": {},
    "Glm4MoeForCausalLM": {},
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {},
    "JambaForCausalLM": {"attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "JetMoeForCausalLM": {"kv_channels": 8},
    "LongcatFlashForCausalLM": {
        "num_layers": 1,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": 48,
    },
    "MiniMaxForCausalLM": {"layer_types": ["full_attention"] * 2},
    "MixtralForCausalLM": {},
    "OlmoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": {"layer_types": ["full_attention"] * 2},
}
"""What the config of each model says besides the sizes above."""

LOOPS = {
    "DbrxForCausalLM": "DbrxExperts",
    "DeepseekV2ForCausalLM": "DeepseekV2MoE",
    "DeepseekV3ForCausalLM": "DeepseekV3MoE",
    "Dots1ForCausalLM": "Dots1MoE",
    "Ernie4_5_MoeForCausalLM": "Ernie4_5_MoeSparseMoeBlock",
    "FlexOlmoForCausalLM": "FlexOlmoSparseMoeBlock",
    "Glm4MoeForCausalLM": "Glm4MoeMoE",
    "GptOssForCausalLM": "GptOssExperts",
    "GraniteMoeForCausalLM": "GraniteMoeParallelExperts",
    "HunYuanMoEV1ForCausalLM": "HunYuanMoEV1Moe",
    "JambaForCausalLM": "JambaSparseMoeBlock",
    "JetMoeForCausalLM": "JetMoeParallelExperts",
    "LongcatFlashForCausalLM": "LongcatFlashMoE",
    "MiniMaxForCausalLM": "MiniMaxSparseMoeBlock",
    "MixtralForCausalLM": "MixtralSparseMoeBlock",
    "OlmoeForCausalLM": "OlmoeSparseMoeBlock",
    "PhimoeForCausalLM": "PhimoeSparseMoeBlock",
    "Qwen2MoeForCausalLM": "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeForCausalLM": "Qwen3MoeSparseMoeBlock",
    "Qwen3NextForCausalLM": "Qwen3NextSparseMoeBlock",
}
"""The class in each model whose forward loops over experts."""

BROKEN = {"JambaForCausalLM", "Qwen3NextForCausalLM"}
"""Stock Dynamo cannot trace these into one graph, experts or not: `if cache_position[0] > 0` in the model."""


def build(name: str) -> nn.Module:
    """A tiny model in eval mode, on the CPU. Its weights are large enough for the experts to matter."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    known = inspect.signature(config_class).parameters
    sizes = {key: value for key, value in _SIZES.items() if key in known}
    with quiet():
        model = model_class(config_class(**sizes | MODELS[name]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in path and parameter.dim() == 1
            parameter.copy_(1 + 0.1 * drawn if is_norm else 0.2 * drawn)
    return model.eval()


def logits(model: Any, length: int = 9) -> Tensor:
    """The logits ``[2, length, VOCABULARY]`` of random tokens, without a cache."""
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def experts_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the experts that tokens are routed to."""
    return [
        parameter
        for path, parameter in model.named_parameters()
        if any(part in path for part in (".experts.", ".input_linear.", ".output_linear.")) and "shared" not in path
    ]
