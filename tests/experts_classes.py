"""The classes of the installed transformers whose forward loops over experts, found in its source and built tiny.

Nothing here is a list of classes: a version of transformers with a new one is followed as it is.

``python tests/experts_classes.py`` prints the page docs/experts-classes.md.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import functools
import importlib
import inspect
import pathlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from graphs import Graphs
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import moe_rewrite

SIZES: dict[str, Any] = {
    # multiples of four: grouped_mm takes rows of multiples of 16 bytes
    "hidden_size": 16,
    "d_model": 16,
    "moe_hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 24,
    "ffn_dim": 24,
    "d_ff": 24,
    "mlp_ratio": 2,
    "part_features": 8,
    "num_experts": 6,
    "n_routed_experts": 6,
    "num_local_experts": 6,
    "moe_num_experts": 6,
    "zero_expert_num": 2,
    "num_experts_per_tok": 3,
    "swiglu_limit": 0.5,  # small enough to be reached
}
"""What attributes of a config, or arguments of a class, are set to where there are such."""

TOP_K = 3
"""Experts of a token. With two, the order in which their results are added would not show."""

IDLE_EXPERT = 1
"""This expert gets no token."""

NOT_REWRITTEN: dict[str, str] = {}
"""The classes whose loop is left as it is, and why."""


@dataclasses.dataclass(frozen=True)
class ExpertsClass:
    """A class with a loop over experts.

    Attributes:
        name: of the class.
        file: its model's file, ``"mixtral/modeling_mixtral.py"``.
        body: the text of its loop, and of the methods that the loop calls, with all local names replaced.
        hosts: the names of the classes of that file whose ``__init__`` makes one.
    """

    name: str
    file: str
    body: str = dataclasses.field(repr=False)
    hosts: tuple[str, ...] = dataclasses.field(repr=False)

    @property
    def model(self) -> str:
        """The name of the model's folder: ``"mixtral"``."""
        return self.file.partition("/")[0]

    def module(self) -> types.ModuleType:
        """The imported ``modeling_*`` module."""
        return importlib.import_module(f"transformers.models.{self.file.removesuffix('.py').replace('/', '.')}")


# --- finding them in the source --------------------------------------------------------------------------------------


@functools.cache
def experts_classes() -> tuple[ExpertsClass, ...]:
    """All classes whose ``forward``, or a method it calls on ``self``, loops over experts, by model and name."""
    models = pathlib.Path(transformers.__file__).parent / "models"
    found = []
    for path in sorted(models.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "expert" not in source:
            continue
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        for cls in classes:
            body = _loop_text(cls)
            if body is not None:
                hosts = tuple(other.name for other in classes if _makes(other, cls.name))
                found.append(ExpertsClass(cls.name, path.relative_to(models).as_posix(), body, hosts))
    return tuple(found)


def by_body() -> dict[str, list[ExpertsClass]]:
    """The classes of each distinct body, the most frequent first."""
    groups: dict[str, list[ExpertsClass]] = collections.defaultdict(list)
    for cls in experts_classes():
        groups[cls.body].append(cls)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _loop_text(cls: ast.ClassDef) -> str | None:
    """The normalised text of the loop over experts in ``cls``, None where there is none."""
    methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    for name in _reachable(methods, ["forward"]):
        for node in ast.walk(methods[name]):
            if isinstance(node, ast.For) and "expert" in ast.unparse([node.target, node.iter]).lower():
                helpers = _reachable(methods, _called_on_self(node))
                texts = [_normalised(node, methods[name]), *(_normalised(methods[h], methods[h]) for h in helpers)]
                return "\n".join(texts)
    return None


def _reachable(methods: dict[str, ast.FunctionDef], start: Sequence[str]) -> list[str]:
    """The methods that ``start`` leads to by calls on ``self``, with ``start``, in the order they are met."""
    reached: dict[str, None] = {}
    pending = list(start)
    while pending:
        name = pending.pop(0)
        if name in methods and name not in reached:
            reached[name] = None
            pending += _called_on_self(methods[name])
    return list(reached)


def _called_on_self(node: ast.AST) -> list[str]:
    calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return [
        func.attr
        for func in calls
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "self"
    ]


def _normalised(node: ast.AST, function: ast.FunctionDef) -> str:
    """The text of ``node`` with the arguments and local variables of its ``function`` numbered in order of use."""
    local = {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)} - {"self"}
    local |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    numbers: dict[str, str] = {}

    class Renamed(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.Name:
            return ast.Name(self._number(node.id), node.ctx)

        def visit_arg(self, node: ast.arg) -> ast.arg:
            return ast.arg(self._number(node.arg))

        def _number(self, name: str) -> str:
            return numbers.setdefault(name, f"v{len(numbers)}") if name in local else name

    return ast.unparse(Renamed().visit(ast.parse(ast.unparse(node))))


def _makes(cls: ast.ClassDef, name: str) -> bool:
    return any(
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name
        for method in cls.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        for call in ast.walk(method)
    )


# --- building them ---------------------------------------------------------------------------------------------------


Inputs = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Built:
    """A tiny instance.

    Attributes:
        module: the instance, or that of a class that makes one where it takes no config.
        inputs: ``inputs(tokens)`` are the arguments of a call. Where they say which experts a token has,
            :data:`IDLE_EXPERT` has none, and ``inputs(tokens, astray=True)`` gives a token an expert that is not there.
    """

    module: nn.Module
    inputs: Callable[..., Inputs]


def build(cls: ExpertsClass) -> Built:
    """A tiny instance of ``cls`` with random parameters, in eval mode, on the CPU, its experts the eager loop.

    Raises:
        RuntimeError: no instance could be made, or called, with what is known here.
    """
    problems = []
    for name in (cls.name, *cls.hosts):
        for config in _configs(cls):
            try:
                module = _instance(getattr(cls.module(), name), config)
                return Built(module, _inputs_of(module, config))
            except Exception as error:
                problems.append(f"{name}({type(config).__name__}): {type(error).__name__}: {error}")
    raise RuntimeError("\n".join([f"{cls.file}: no instance of {cls.name}", *problems]))


def _configs(cls: ExpertsClass) -> Iterator[Any]:
    """Tiny configs of the model, that in the annotation of the class first, each with the configs nested in it."""
    module = importlib.import_module(cls.module().__name__.replace("modeling_", "configuration_"))
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, transformers.PreTrainedConfig)
        and value.__module__ == module.__name__
    ]
    annotation = inspect.signature(getattr(cls.module(), cls.name)).parameters.get("config")
    name = None if annotation is None else getattr(annotation.annotation, "__name__", annotation.annotation)
    for config_class in sorted(classes, key=lambda value: value.__name__ != name):
        with quiet(), contextlib.suppress(Exception):
            yield from tiny(config_class())


def tiny(config: Any) -> list[Any]:
    """``config``, changed to tiny sizes and the eager loop, and the configs nested in it."""
    configs = [config]
    for nested in list(vars(config).values()):
        if isinstance(nested, transformers.PreTrainedConfig):
            configs += tiny(nested)
    for name, value in SIZES.items():
        if hasattr(config, name):
            with contextlib.suppress(Exception):  # it may be of another type there
                setattr(config, name, value)
    config._experts_implementation = "eager"
    return configs


def _instance(cls: type[nn.Module], config: Any) -> nn.Module:
    parameters = list(inspect.signature(cls).parameters.values())
    assert parameters and parameters[0].name == "config", "takes no config"
    others = {p.name: SIZES[p.name] for p in parameters[1:] if p.name in SIZES}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config, **others).parameters())
    assert size < 100_000, f"is not tiny: {size} parameters"
    module = cls(config, **others)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _inputs_of(module: nn.Module, config: Any) -> Callable[[int], Inputs]:
    """The first kind of arguments that eager takes."""
    problems = []
    sizes = {size for parameter in module.parameters() for size in parameter.shape}
    widths = [config.hidden_size, *sorted(sizes - {config.hidden_size})]
    for make in _KINDS[len(inspect.signature(module.forward).parameters)]:
        for width in widths:
            inputs = functools.partial(make, width, _num_experts(module))
            try:
                with torch.no_grad():
                    module(*inputs(7))
                return inputs
            except Exception as error:
                problems.append(f"{make.__name__}, width {width}: {type(error).__name__}: {error}")
    raise RuntimeError("; ".join(problems))


def _num_experts(module: nn.Module) -> int:
    """The largest number that an attribute with "expert" in its name says."""
    numbers = [value for name, value in vars(module).items() if "expert" in name and type(value) is int]
    return max(numbers, default=0)


def _hidden_states(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] + 1))


def _expert_ids(tokens: int, top_k: int, experts: int, astray: bool) -> Tensor:
    """Ids ``[tokens, top_k] int64``: all experts but the idle one in turn, in a random order."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(2))
    order = order[order != IDLE_EXPERT]
    ids = order.repeat(tokens * top_k)[: tokens * top_k].view(tokens, top_k).clone()
    if astray:
        ids[0, 0] = experts
    return ids


def _weights(tokens: int, top_k: int) -> Tensor:
    return torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(3)) + 0.1


def _top_k(width: int, experts: int, tokens: int, astray: bool = False) -> Inputs:
    return _hidden_states(tokens, width), _expert_ids(tokens, TOP_K, experts, astray), _weights(tokens, TOP_K)


def _one_hot(width: int, experts: int, tokens: int, astray: bool = False) -> Inputs:
    ids = nn.functional.one_hot(_expert_ids(tokens, 1, experts, astray), experts)
    return _hidden_states(tokens, width), ids, _weights(tokens, 1)


def _expert_of_image(width: int, experts: int, tokens: int, astray: bool = False) -> Inputs:
    return _hidden_states(tokens, 1, width), _expert_ids(tokens, 1, experts, astray)[..., None]


def _block(width: int, experts: int, tokens: int, astray: bool = False) -> Inputs:
    return (_hidden_states(1, tokens, width),)


_KINDS = {1: (_block,), 2: (_expert_of_image,), 3: (_top_k, _one_hot)}
"""What a forward may take, by how many arguments it has."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks on configs this small."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


# --- whole models ----------------------------------------------------------------------------------------------------

_WHOLE_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "d_ff": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "hc_mult": 2,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "n_group": 2,
    "topk_group": 1,
    "swiglu_limit": 0.5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

WHOLE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "AriaExperts": ("AriaTextForCausalLM", {}),
    "BeamExperts": ("BeamForCausalLM", {}),
    "DeepseekV4Experts": (
        "DeepseekV4ForCausalLM",
        {
            "num_key_value_heads": 1,
            "layer_types": ["sliding_attention"] * 2,
            "mlp_layer_types": None,
            "o_groups": 2,
            "o_lora_rank": 8,
        },
    ),
    "Glm5NextTextExperts": (
        "Glm5NextTextModel",
        {
            "qk_rope_head_dim": 0,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "indexed_attention"],
            "index_kpool": 4,
        },
    ),
    "Inkling2Experts": (
        "Inkling2ForCausalLM",
        {
            "unpadded_vocab_size": 64,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "rel_extent": 16,
            "n_layers_per_attn_res_block": 2,
        },
    ),
    "JetMoeParallelExperts": ("JetMoeForCausalLM", {"kv_channels": 8}),
    "LongcatFlashExperts": (
        "LongcatFlashForCausalLM",
        {"num_layers": 1, "expert_ffn_hidden_size": 24, "zero_expert_num": 2},
    ),
    "MiniMaxM3VLExperts": (
        "MiniMaxM3VLForCausalLM",
        {"dense_intermediate_size": 48, "shared_intermediate_size": 24, "rotary_dim": 4},
    ),
    "MuseSparkExperts": ("MuseSparkTextModel", {"moe_hidden_size": 16}),
    "NllbMoeExperts": (
        "NllbMoeForConditionalGeneration",
        {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
        },
    ),
    "OpenAIPrivacyFilterExperts": ("OpenAIPrivacyFilterModel", {}),
    "Step3p7Experts": (
        "Step3p7TextModel",
        {"share_expert_dim": 24, "sliding_window": 8, "swiglu_limits": [None, 0.5]},
    ),
    # Dynamo cannot trace a whole Switch model into one graph, experts or not: its block, with the router
    "SwitchTransformersExperts": ("SwitchTransformersSparseMLP", {"expert_capacity": 2}),
    "VitPoseNaiveMoe": ("VitPoseBackbone", {"image_size": [32, 32], "num_experts": 3, "part_features": 8}),
}
"""For one class of each body that tests/hub.py has no model of: the model that holds it, and more for its config."""


def build_whole(cls: ExpertsClass) -> tuple[nn.Module, dict[str, Any]]:
    """The tiny model in :data:`WHOLE_MODELS` with random parameters, in eval mode, and the arguments of a call."""
    name, own_sizes = WHOLE_MODELS[cls.name]
    model_class = getattr(cls.module(), name)
    is_block = not hasattr(model_class, "config_class")
    config_class = inspect.signature(model_class).parameters["config"].annotation if is_block else None
    config_class = config_class or model_class.config_class
    known = set(inspect.signature(config_class).parameters)
    with quiet():
        config = config_class(**{key: value for key, value in _WHOLE_SIZES.items() if key in known} | own_sizes)
        config._experts_implementation = "eager"
        model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in path and parameter.dim() == 1
            parameter.copy_(1 + 0.1 * drawn if is_norm else 0.2 * drawn)
    return model.eval(), _arguments(model, is_block)


def _arguments(model: nn.Module, is_block: bool) -> dict[str, Any]:
    """Two sequences of nine tokens, or two images, as the forward takes them."""
    generator = torch.Generator().manual_seed(1)
    known = inspect.signature(model.forward).parameters
    if "pixel_values" in known:
        images = torch.randn(2, 3, 32, 32, generator=generator)
        return {"pixel_values": images, "dataset_index": torch.tensor([0, 2])}
    if is_block:
        return {"hidden_states": torch.randn(2, 9, _WHOLE_SIZES["hidden_size"], generator=generator)}
    token_ids = torch.randint(3, _WHOLE_SIZES["vocab_size"], (2, 9), generator=generator)
    decoded = {"decoder_input_ids": token_ids.flip(0)} if "decoder_input_ids" in known else {}
    return {"input_ids": token_ids, "use_cache": False, **decoded}


def result(model: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
    """The logits of a call, or what the model gives in their place."""
    output = model(**arguments)
    first: Tensor = pytree.tree_leaves(output if isinstance(output, Tensor) else output.to_tuple())[0]
    return first


# --- comparing them --------------------------------------------------------------------------------------------------

EXPERTS_BACKENDS = ("grouped_mm", "batched_mm")


def compiled(module: nn.Module, experts_backend: str, inner: Any, fullgraph: bool = True) -> Callable[..., Any]:
    """``module`` with its loops rewritten into one experts backend."""
    options = {"experts": experts_backend, "inner": inner}
    return torch.compile(module, backend="moe_rewrite", fullgraph=fullgraph, options=options)


def assert_equals_eager(built: Built, fast: Callable[..., Any], inputs: Inputs) -> None:
    """The result and the gradients of all inputs and parameters are those of eager."""
    inputs = tuple(value.requires_grad_(value.is_floating_point()) for value in inputs)
    expected, actual = built.module(*inputs), fast(*inputs)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    variables = {f"input {i}": value for i, value in enumerate(inputs) if value.requires_grad}
    variables |= dict(built.module.named_parameters())
    gradients = [_gradients(value, variables, cotangent) for value in (actual, expected)]
    for what, ours, eager in zip(
        ["result", *variables], [actual, *gradients[0]], [expected, *gradients[1]], strict=True
    ):
        torch.testing.assert_close(
            ours, eager, rtol=1e-4, atol=1e-5, msg=lambda message, what=what: f"{what}: {message}"
        )


def _gradients(value: Tensor, variables: dict[str, Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """Zeros where there is none: a module whose expert gets no token has none in eager."""
    return torch.autograd.grad(value, list(variables.values()), cotangent, allow_unused=True, materialize_grads=True)


# --- the page --------------------------------------------------------------------------------------------------------

_PAGE = """\
# The experts classes of transformers

Every class of transformers {transformers} whose forward loops over experts: {classes} classes with {bodies} different
loops, a loop counted together with the methods it calls. With torch {torch} on the CPU a tiny instance of each was
compiled with `fullgraph=True` for each experts backend; its float32 result and gradients at 7 and at 1 tokens, with an
expert that has no token, were compared with eager's (rtol 1e-4, atol 1e-5).

* *rewritten*: one graph, in which the experts backend stands in the place of the loop, with the numbers of eager.
* *unrolled*: one graph with the numbers of eager, in which the loop stands expert by expert, as stock Dynamo has it.
* *left*: the loop runs in Python, as with every other compiler backend; `fullgraph=True` raises the reason.

"Loop" is what the rows of one expert go through, as recognised. This page is made by
`python tests/experts_classes.py > docs/experts-classes.md`; tests/test_experts_classes.py holds what it says.

{summary}

{table}
"""


def _page() -> str:
    head = ("class", "model file", "loop", *EXPERTS_BACKENDS, "why not")
    rows = [_row(cls) for cls in experts_classes()]
    lines = [head, ["---"] * len(head), *rows]
    counts = [collections.Counter(row[3 + i] for row in rows) for i in range(len(EXPERTS_BACKENDS))]
    summary = [
        f"`{name}`: {', '.join(f'{number} {status}' for status, number in count.most_common())}."
        for name, count in zip(EXPERTS_BACKENDS, counts, strict=True)
    ]
    return _PAGE.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        classes=len(rows),
        bodies=len(by_body()),
        summary=" ".join(summary),
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
    )


def _row(cls: ExpertsClass) -> tuple[str, ...]:
    built = build(cls)
    torch._dynamo.reset()
    loops = [report.loop for report in moe_rewrite.explain(built.module, *built.inputs(7)).loops]
    forms = {re.sub(r"\[.*?\]", "", loop.summary()) for loop in loops if loop is not None}
    outcomes = [_outcome(built, name) for name in EXPERTS_BACKENDS]
    why = NOT_REWRITTEN.get(cls.name) or next((why for _, why in outcomes if why), "")
    is_rewritten = all(status == "rewritten" for status, _ in outcomes)
    return (
        f"`{cls.name}`",
        f"`{cls.file}`",
        "; ".join(sorted(forms)).replace(">", "→") or "-",
        *(status for status, _ in outcomes),
        "" if is_rewritten else why,
    )


def _outcome(built: Built, experts_backend: str) -> tuple[str, str]:
    """What becomes of the loop, and why it is refused."""
    torch._dynamo.reset()
    graphs = Graphs()
    fast = compiled(built.module, experts_backend, graphs)
    try:
        for tokens in (7, 1):
            assert_equals_eager(built, fast, built.inputs(tokens))
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        ours = re.search(r"leaves this loop as it is: \S+: (.*) \(\S+:\d+\)\n", str(error))
        return "left", ours[1] if ours else ""
    return ("rewritten" if graphs.rewritten() else "unrolled"), ""


if __name__ == "__main__":
    print(_page(), end="")
