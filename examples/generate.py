"""Generate text (here: token numbers) with ``model.generate``, its forward compiled with ``backend="moe_rewrite"``.

    python examples/generate.py

The weights are random: nothing is downloaded.
"""

from __future__ import annotations

import time

import torch
import transformers
from torch._dynamo.utils import counters

NEW_TOKENS = 24


def main() -> None:
    transformers.logging.set_verbosity_error()
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_local_experts=8
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    prompt = torch.randint(512, (1, 16))
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def timed(**others: object) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        tokens = model.generate(prompt, **arguments, **others)
        return tokens, 1e3 * (time.perf_counter() - start)

    expected, _ = timed()
    _, eager = timed()
    # One graph for the prompt and one for a single token. A static cache keeps the shapes as they are.
    model.forward = torch.compile(model.forward, backend="moe_rewrite", fullgraph=True)
    timed(cache_implementation="static")
    tokens, compiled = timed(cache_implementation="static")
    assert torch.equal(tokens, expected)
    print(f"{NEW_TOKENS} tokens after a prompt of {prompt.shape[1]}, the same as eager's")
    print(f"eager {eager:.0f} ms, compiled {compiled:.0f} ms, {counters['stats']['unique_graphs']} graphs")


if __name__ == "__main__":
    main()
