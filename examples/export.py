"""Export a Mixture-of-Experts model with ``moe_rewrite.export``, save it, load it, and compile it ahead of time.

    python examples/export.py

The weights are random: nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch._inductor
import transformers
from torch import Tensor, nn

import moe_rewrite


class Logits(nn.Module):
    """A causal language model as a function from token ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def main() -> None:
    transformers.logging.set_verbosity_error()
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_local_experts=8
    )
    torch.manual_seed(0)
    model = Logits(transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval())
    ids = torch.randint(256, (1, 8))
    length = torch.export.Dim("length", min=2, max=512)

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = moe_rewrite.export(model, (ids,), dynamic_shapes={"ids": {1: length}}, experts="batched_mm")
        operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        print(f"exported: {len(list(program.graph.nodes))} nodes, no loop: {'aten.nonzero.default' not in operators}")
        print(f"parameters have the model's names: {set(program.state_dict) == set(model.state_dict())}")

        torch.export.save(program, Path(folder, "program.pt2"))
        loaded = torch.export.load(Path(folder, "program.pt2"))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "package.pt2")))
        packaged = torch._inductor.aoti_load_package(package)
        for tokens in (2, 8, 100):
            ids = torch.randint(256, (1, tokens))
            differences = [(run(ids) - model(ids)).abs().max().item() for run in (loaded.module(), packaged)]
            print(f"{tokens:4} tokens: largest difference loaded {differences[0]:.0e}, packaged {differences[1]:.0e}")


if __name__ == "__main__":
    main()
