"""Tiny causal language models of transformers, with their experts as the eager loop and random weights.

The weights are drawn larger than transformers initialises them: with its own initialisation the experts of a model this
small add some 1e-6 to the logits, and a test of the logits would not notice if they were left out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

NUM_EXPERTS = 8
VOCABULARY = 64
_ROUTER_WEIGHT = re.compile(r"\.(gate|router)(\.layer)?\.weight$")
_CONSTANT = 12.0
"""What every token's embedding has in channel 0, so that a router can tell nothing from nothing by a weight there."""

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _mixtral(top_k: int, layers: int) -> Any:
    return transformers.MixtralConfig(
        **_COMMON, num_hidden_layers=layers, num_local_experts=NUM_EXPERTS, num_experts_per_tok=top_k
    )


def _qwen2_moe(top_k: int, layers: int) -> Any:
    return transformers.Qwen2MoeConfig(
        **_COMMON,
        num_hidden_layers=layers,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    )


def _qwen3_moe(top_k: int, layers: int) -> Any:
    return transformers.Qwen3MoeConfig(
        **_COMMON,
        num_hidden_layers=layers,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        moe_intermediate_size=24,
        head_dim=8,
        norm_topk_prob=True,
    )


def _deepseek_v3(top_k: int, layers: int) -> Any:
    return transformers.DeepseekV3Config(
        **{**_COMMON, "num_key_value_heads": 4},
        num_hidden_layers=layers + 1,
        first_k_dense_replace=1,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        moe_intermediate_size=24,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


def _gpt_oss(top_k: int, layers: int) -> Any:
    return transformers.GptOssConfig(
        **_COMMON, num_hidden_layers=layers, num_local_experts=NUM_EXPERTS, num_experts_per_tok=top_k, head_dim=8
    )


def _dbrx(top_k: int, layers: int) -> Any:
    return transformers.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=layers,
        vocab_size=VOCABULARY,
        max_seq_len=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": NUM_EXPERTS, "moe_top_k": top_k},
    )


def _nemotron_h(top_k: int, layers: int) -> Any:
    return transformers.NemotronHConfig(
        **_COMMON,
        head_dim=8,
        layers_block_type=["attention", *["moe"] * layers],
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_group=2,
        topk_group=1,
    )


def _olmoe(top_k: int, layers: int) -> Any:
    return transformers.OlmoeConfig(
        **_COMMON, num_hidden_layers=layers, num_experts=NUM_EXPERTS, num_experts_per_tok=top_k
    )


_CONFIGS: dict[str, tuple[Callable[[int, int], Any], int]] = {
    "mixtral": (_mixtral, 2),
    "qwen2_moe": (_qwen2_moe, 4),
    "qwen3_moe": (_qwen3_moe, 3),
    "deepseek_v3": (_deepseek_v3, 2),
    "gpt_oss": (_gpt_oss, 2),
    "dbrx": (_dbrx, 2),
    "nemotron_h": (_nemotron_h, 2),
    "olmoe": (_olmoe, 3),
}
"""For each model its config as a function of (experts per token, MoE layers), and how many experts a token has."""

MODELS = sorted(_CONFIGS)


def build(
    name: str, *, top_k: int | None = None, moe_layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """A tiny model, in eval mode, on the CPU.

    Args:
        name: one of :data:`MODELS`.
        top_k: how many experts a token has; the model's own number by default.
        moe_layers: how many layers have experts.
        dtype: dtype of the parameters. The same seed gives the same numbers, rounded to it.
        seed: of the weights.
    """
    configure, own_top_k = _CONFIGS[name]
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_config(
            configure(top_k or own_top_k, moe_layers), experts_implementation="eager", dtype=dtype
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in path and parameter.dim() == 1
            parameter.copy_(1 + 0.1 * drawn if is_norm else 0.2 * drawn)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        embedding = model.get_input_embeddings().weight
        embedding.mul_(5)  # of the size of what the layers add to it
        embedding[:, 0] = _CONSTANT
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on special tokens that a small vocabulary does not have."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Token ids ``[batch, length]``."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def identical_tokens(batch: int, length: int) -> Tensor:
    """Token ids ``[batch, length]``, all the same: every token goes to the same experts."""
    return torch.full((batch, length), 5)


def logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    """The logits ``[batch, length, vocabulary]`` of one forward without a cache."""
    result: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return result


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold an experts loop, by path."""
    return {path: module for path, module in model.named_modules() if path.endswith(".experts")}


@contextlib.contextmanager
def only_experts(model: nn.Module, allowed: Sequence[int] | None) -> Iterator[None]:
    """Let the routers choose among ``allowed`` alone: the others get no token. None lets them choose among all."""
    routers = [parameter for path, parameter in model.named_parameters() if _ROUTER_WEIGHT.search(path)]
    assert len(routers) == len(experts_modules(model)), "each experts module has one router"
    before = [router.detach().clone() for router in routers]
    with torch.no_grad():
        for router in routers if allowed is not None else []:
            for expert in range(NUM_EXPERTS):
                router[expert, 0] = 0.5 if expert in allowed else -8.0
    try:
        yield
    finally:
        with torch.no_grad():
            for router, values in zip(routers, before, strict=True):
                router.copy_(values)


Call = tuple[Tensor, Tensor, Tensor]
"""What an experts module is called with: hidden states, the experts of each token, their weights."""


def calls_of_experts(model: nn.Module, token_ids: Tensor) -> dict[str, Call]:
    """What each experts module of an eager ``model`` is called with, by path."""
    calls: dict[str, Call] = {}
    with contextlib.ExitStack() as stack:
        for path, module in experts_modules(model).items():

            def record(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                calls[path] = tuple(value.detach().clone() for value in (*args, *kwargs.values()))

            stack.enter_context(_hooked(module, record))
        with torch.no_grad():
            logits(model, token_ids)
    return calls


@contextlib.contextmanager
def routed_as(model: nn.Module, calls: dict[str, Call]) -> Iterator[None]:
    """Route the tokens of an eager ``model`` as in ``calls``, whatever its routers say."""
    with contextlib.ExitStack() as stack:
        for path, module in experts_modules(model).items():
            _, experts, weights = calls[path]

            def replace(
                module: nn.Module, args: Any, kwargs: Any, experts: Tensor = experts, weights: Tensor = weights
            ) -> Any:
                hidden_states = (*args, *kwargs.values())[0]
                return (hidden_states, experts, weights.to(hidden_states.dtype)), {}

            stack.enter_context(_hooked(module, replace))
        yield


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def tokens_of_experts(model: nn.Module, token_ids: Tensor) -> dict[str, Tensor]:
    """How many tokens each expert gets, ``[NUM_EXPERTS]``, by the path of the experts module."""
    calls = calls_of_experts(model, token_ids)
    return {path: torch.bincount(experts.flatten(), minlength=NUM_EXPERTS) for path, (_, experts, _) in calls.items()}
