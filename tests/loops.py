"""Small Mixture-of-Experts modules written as plain loops, and what is to be looked at after they ran."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

NUM_EXPERTS, TOKENS, TOP_K, HIDDEN, INTERMEDIATE = 4, 6, 2, 8, 6

Loop = Callable[..., Any]
"""``loop(m, x, ids, weights)``: the forward of a :class:`Moe` ``m``, written out."""

Body = Callable[..., Tensor]
"""``body(m, x, ids, weights, expert, slot, token)``: the rows that one iteration adds to the output."""


class Moe(nn.Module):
    """The parameters that the loops use. Its forward is the loop it is given.

    In float64, so that a rounding is told from a wrong number by many orders of magnitude.
    """

    def __init__(self, loop: Loop, num_experts: int = NUM_EXPERTS, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / 2)

        self.loop = loop
        self.num_experts = num_experts
        self.up = parameter(num_experts, INTERMEDIATE, HIDDEN)
        self.down = parameter(num_experts, HIDDEN, INTERMEDIATE)
        self.bias = parameter(num_experts, HIDDEN)
        self.scale = parameter(num_experts)
        self.weight = parameter(num_experts, HIDDEN, HIDDEN)
        self.pairwise = parameter(num_experts, num_experts)
        self.cube = parameter(HIDDEN, HIDDEN, HIDDEN)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, dtype=dtype) for _ in range(num_experts))
        for module in self.experts:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        self.register_buffer("counts", torch.zeros(num_experts))
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0
        self.seen: list[Any] = []
        self.table: dict[str, int] = {}
        self.last: Any = None

    def forward(self, *args: Any) -> Any:
        return self.loop(self, *args)

    def mask(self, ids: Tensor) -> Tensor:
        """``[E, K, T]``: whether a token has the expert in a slot."""
        return F.one_hot(ids, self.num_experts).permute(2, 1, 0)

    def expert(self, rows: Tensor, expert: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.up[expert])), self.down[expert])


def hits(mask: Tensor) -> Tensor:
    """``[u, 1]``: the experts that have a token."""
    return mask.sum((-1, -2)).greater(0).nonzero()


def loop_over(body: Body) -> Loop:
    """The plain loop, with ``body`` for its rows."""

    def loop(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), m.mask(ids)
        for expert in hits(mask):
            expert = expert[0]
            slot, token = torch.where(mask[expert])
            out.index_add_(0, token, body(m, x, ids, weights, expert, slot, token))
        return out

    loop.__name__ = loop.__qualname__ = body.__name__
    return loop


@loop_over
def plain(m: Moe, x: Tensor, ids: Tensor, weights: Tensor, expert: Tensor, slot: Tensor, token: Tensor) -> Tensor:
    return m.expert(x[token], expert) * weights[token, slot, None]


def sentinel(m: Moe, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Ids of ``num_experts`` are of no expert here."""
    out, mask = torch.zeros_like(x), F.one_hot(ids, m.num_experts + 1).permute(2, 1, 0)
    for expert in hits(mask):
        expert = expert[0]
        if expert == m.num_experts:
            continue
        slot, token = torch.where(mask[expert])
        out.index_add_(0, token, m.expert(x[token], expert) * weights[token, slot, None])
    return out


Args = tuple[Any, ...]


def inputs(
    tokens: int = TOKENS,
    top_k: int = TOP_K,
    num_experts: int = NUM_EXPERTS,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> Args:
    """Hidden states ``[T, H]``, top-k expert ids ``[T, K]`` and routing weights ``[T, K]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    scores = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    weights, ids = scores.softmax(-1).topk(top_k)
    return x.to(dtype), ids, weights.to(dtype)


# --- what to compare -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Observed:
    """All that a run did: its result, and what it left in the module and in its arguments."""

    result: Any
    tensors: dict[str, Tensor]
    python: dict[str, Any]
    gradients: dict[str, Tensor | None]


def fresh(args: Args, requires_grad: bool = False) -> Args:
    """Copies of ``args``; tensors that share memory still do."""
    copied = copy.deepcopy([arg.detach() if isinstance(arg, Tensor) else arg for arg in args])
    for arg in copied if requires_grad else ():
        if isinstance(arg, Tensor) and arg.is_floating_point():
            arg.requires_grad_()
    return tuple(copied)


def observe(run: Callable[..., Any], module: nn.Module, args: Args, backward: bool = False) -> Observed:
    """Call ``run``, which is ``module`` or was compiled from it, with copies of ``args``."""
    torch.manual_seed(0)
    random.seed(0)
    args = fresh(args, backward)
    module.zero_grad()
    result = run(*args)
    named_args = {f"argument {i}": arg for i, arg in enumerate(args) if isinstance(arg, Tensor)}
    gradients: dict[str, Tensor | None] = {}
    if backward:
        weigh_up(result).backward()
        leaves = {**dict(module.named_parameters()), **named_args}
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **named_args}
    names = ("calls", "seen", "table", "training")
    return Observed(
        detached(result),
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
        {name: copy.deepcopy(getattr(module, name)) for name in names if hasattr(module, name)},
        gradients,
    )


def weigh_up(result: Any) -> Tensor:
    """A number that depends on every entry of the result in another way."""
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return sum((leaf * torch.linspace(-1, 2, leaf.numel()).view_as(leaf).to(leaf)).sum() for leaf in leaves)  # type: ignore[return-value]


def detached(result: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), result)


TOLERANCES = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-5, 1e-5)}
"""Relative and absolute tolerance by dtype. The errors of sums in another order are some 1e-15 and 1e-6."""


def assert_same(actual: Observed, expected: Observed) -> None:
    """Results, side effects and gradients agree; what is no sum of floating-point numbers agrees to the bit."""
    for field in dataclasses.fields(Observed):
        given, wanted = getattr(actual, field.name), getattr(expected, field.name)
        leaves, spec = pytree.tree_flatten(given)
        wanted_leaves, wanted_spec = pytree.tree_flatten(wanted)
        assert spec == wanted_spec, f"{field.name}: {given} is not of the form of {wanted}"
        for leaf, wanted_leaf in zip(leaves, wanted_leaves, strict=True):
            if not isinstance(wanted_leaf, Tensor):
                assert leaf == wanted_leaf, f"{field.name}: {given} is not {wanted}"
                continue
            rtol, atol = TOLERANCES.get(wanted_leaf.dtype, (0.0, 0.0))
            assert_close(leaf, wanted_leaf, rtol=rtol, atol=atol, equal_nan=True)


# --- modules with a structure ----------------------------------------------------------------------------------------


class Experts(Moe):
    """The plain loop in the forward of the module itself, as in most models."""

    def __init__(self) -> None:
        super().__init__(plain)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        out, mask = torch.zeros_like(x), self.mask(ids)
        for expert in hits(mask):
            expert = expert[0]
            slot, token = torch.where(mask[expert])
            out.index_add_(0, token, self.expert(x[token], expert) * weights[token, slot, None])
        return out


class Routed(nn.Module):
    """A residual block that routes by itself: ``[T, H] -> [T, H]``."""

    def __init__(self, seed: int = 0, loop: Loop | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.router = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, generator=generator, dtype=torch.float64))
        self.experts = Experts() if loop is None else Moe(loop)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.linear(x, self.router).softmax(-1).topk(TOP_K)
        return x + self.experts(x, ids, weights)


class Stack(nn.Module):
    """Residual blocks, one after the other. ``loops``: a loop for each, None for the plain one."""

    def __init__(self, loops: Sequence[Loop | None] = (None, None)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Routed(seed, loop) for seed, loop in enumerate(loops))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def states(tokens: int = TOKENS) -> Tensor:
    """Hidden states ``[T, H]`` for the two above."""
    return inputs(tokens)[0]


# --- what stock torch.compile makes of a model ------------------------------------------------------------------------


def stock_graphs(model: nn.Module) -> list[Any]:
    """How many graphs and graph breaks stock Dynamo makes of a model, and what the graphs call."""
    graphs: list[str] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
        graphs.append(str([str(node.target) for node in gm.graph.nodes if node.op.startswith("call")]))
        return gm

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(model, backend=keep)(states())
    return [len(graphs), sum(torch._dynamo.utils.counters["graph_break"].values()), sorted(graphs)]
