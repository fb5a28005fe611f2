"""The sparse blocks of transformers 4 that loop over experts, found in its source and built tiny.

In transformers 4 the experts are modules, ``nn.ModuleList`` or ``nn.ModuleDict``, and the block that holds them has the
router and the loop. The classes are found and built as those of transformers 5 are (tests/experts_classes.py).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import experts_classes
import torch
import transformers
from experts_classes import Built, ExpertsClass
from torch import Tensor, nn
from torch.utils import _pytree as pytree

transformers.PreTrainedConfig = transformers.PretrainedConfig  # the name that it has in transformers 5

SIZES: dict[str, Any] = {
    "num_experts_per_tok": experts_classes.TOP_K,
    "moe_topk": experts_classes.TOP_K,
    "moe_k": experts_classes.TOP_K,
    "expert_capacity": 64,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
}
"""What is set besides the sizes of experts_classes.py."""

NEEDS_TRAINING = {"Qwen3VLMoeTextExperts"}
"""The classes whose loop is left out in eval mode."""

NOT_FOUND = {
    "AriaGroupedExpertsGemm": "aria/modeling_aria.py",
    "SwitchTransformersSparseMLP": "switch_transformers/modeling_switch_transformers.py",
}
"""Classes whose loop does not have "expert" in its head, or is in a function that they call, and their files."""


@functools.cache
def blocks() -> dict[str, ExpertsClass]:
    """The classes with a loop over experts, by name."""
    found = {cls.name: cls for cls in experts_classes.experts_classes()}
    assert len(found) == len(experts_classes.experts_classes()), "two classes of one name"
    hosts = {"AriaGroupedExpertsGemm": ("AriaTextMoELayer",)}
    return found | {
        name: ExpertsClass(name, file, body=name, hosts=hosts.get(name, ())) for name, file in NOT_FOUND.items()
    }


def build(cls: ExpertsClass) -> Built:
    """A tiny block of random parameters that holds the loop of ``cls``, on the CPU.

    Raises:
        RuntimeError: no block could be made, or called, with what is known here.
    """
    problems = []
    for name in (cls.name, *cls.hosts):
        for config in experts_classes._configs(cls):
            for key, value in SIZES.items():
                with contextlib.suppress(Exception):  # it may be of another type there
                    setattr(config, key, value)
            try:
                module = _instance(getattr(cls.module(), name), config)
                module.train(cls.name in NEEDS_TRAINING)
                return Built(module, _inputs_of(module, config))
            except Exception as error:
                problems.append(f"{name}({type(config).__name__}): {type(error).__name__}: {error}")
    raise RuntimeError("\n".join([f"{cls.file}: no block with {cls.name}", *problems]))


def _instance(cls: type[nn.Module], config: Any) -> nn.Module:
    """As in transformers 5; NllbMoeSparseMLP takes one more argument."""
    if "ffn_dim" in inspect.signature(cls).parameters:
        cls = functools.wraps(cls, updated=())(functools.partial(cls, ffn_dim=24))
    return experts_classes._instance(cls, config)


def _inputs_of(module: nn.Module, config: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The arguments of a call with so many tokens."""
    names = list(inspect.signature(module.forward).parameters)
    make = {
        ("hidden_state", "indices"): experts_classes._expert_of_image,
        ("hidden_states", "padding_mask"): _unpadded,
    }.get(tuple(names), experts_classes._block)
    inputs = functools.partial(make, getattr(config, "hidden_size", None) or config.d_model, 6)
    with torch.no_grad():
        module(*inputs(7))
    return inputs


def _unpadded(width: int, experts: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Of no token does the mask say that it is padding."""
    return *experts_classes._block(width, experts, tokens), torch.zeros(tokens)


def assert_equals_eager(built: Built, fast: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    """All floating point results, and their gradients to all inputs and parameters, are those of eager."""
    eager = copy.deepcopy(built.module)
    inputs = tuple(value.requires_grad_(value.is_floating_point()) for value in inputs)
    expected = _results_and_gradients(eager, eager, inputs)
    actual = _results_and_gradients(fast, built.module, inputs)
    assert list(actual) == list(expected)
    for what, value in expected.items():
        torch.testing.assert_close(
            actual[what], value, rtol=1e-4, atol=1e-5, msg=lambda text, what=what: f"{what}: {text}"
        )


def _results_and_gradients(
    call: Callable[..., Any], module: nn.Module, inputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Of a random combination of all results; zeros where there is none: an expert without tokens has none in eager."""
    leaves = pytree.tree_leaves(call(*inputs))
    results = [value for value in leaves if isinstance(value, Tensor) and value.is_floating_point()]
    # after the call: Dynamo gives a module that calls `.to` in its forward new parameters
    variables = {f"input {i}": value for i, value in enumerate(inputs) if value.requires_grad}
    variables |= {name: value for name, value in module.named_parameters() if value.requires_grad}
    generator = torch.Generator().manual_seed(4)
    total = sum(
        (value * torch.randn(value.shape, generator=generator)).sum() for value in results if value.requires_grad
    )
    gradients = torch.autograd.grad(total, list(variables.values()), allow_unused=True, materialize_grads=True)
    values = {f"result {i}": value for i, value in enumerate(results)}
    return values | {f"gradient of {name}": g for name, g in zip(variables, gradients, strict=True)}
