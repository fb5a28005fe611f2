"""Packing: the parameters of experts that are modules of their own, in one table for each name."""

from __future__ import annotations

import collections
import copy
import gc
import io
import logging
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.packing import NotAlike, Pack, pack

E, HIDDEN, INNER = 4, 8, 12


class Config:
    """An object that all experts have in common."""


CONFIG = Config()


class Expert(nn.Module):
    def __init__(self, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden)
        self.act = nn.LeakyReLU(0.1)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.randn(inner))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("none", None)
        self.config = CONFIG
        self.scale, self.name, self.sizes, self.table = 2.0, "ffn", [1, 2], {"a": (1, 2)}

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x) + self.offset)) * self.gain * self.scale


NAMES = {"gain", "offset", "calls", "w1.weight", "w2.weight", "w2.bias"}


def make(cls: Callable[[], nn.Module] = Expert, num_experts: int = E) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(cls() for _ in range(num_experts))


def test_experts_that_are_collected_while_something_is_traced(few_objects: None) -> None:
    """What is traced does not see it. When they are collected is up to Python."""
    experts = make()
    holder = [experts]
    packed = pack(experts)
    del experts

    def traced(x: Tensor) -> Tensor:
        if holder:
            holder.clear()
            gc.collect()
        return x + 1

    graph = make_fx(traced, tracing_mode="fake")(torch.ones(2)).graph
    assert packed.released
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]


def test_unreal_experts_that_are_collected_in_another_fake_mode(
    few_objects: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with FakeTensorMode():
        experts = make()
        packed = pack(experts)
    with FakeTensorMode():
        del experts
        gc.collect()
    assert packed.released
    assert not raised


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(module).items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def assert_tables_hold(packed: Pack, experts: Iterable[nn.Module]) -> None:
    for index, expert in enumerate(experts):
        for name, tensor in tensors(expert).items():
            row = packed.table(name)[index]
            assert torch.equal(row, tensor)
            assert row.data_ptr() == tensor.data_ptr()


@pytest.fixture
def few_objects() -> Iterator[None]:
    """Only what the test makes is looked at. Other tests leave a million objects: a look at them takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """The bytes of all memory that some tensor is in, each counted once."""
    spans = sorted(
        {
            (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
            for obj in gc.get_objects()
            if type(obj) in (Tensor, nn.Parameter) and obj.device.type == "cpu" and obj.layout is torch.strided
            for storage in [obj.untyped_storage()]
        }
    )
    total, end = 0, 0
    for start, stop in spans:
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


# What packing does


def test_tables_hold_the_parameters() -> None:
    experts = make()
    before, objects, result = values(experts), tensors(experts), experts[2](torch.ones(3, HIDDEN))
    packed = pack(experts)
    assert set(packed.names) == NAMES
    assert_same(values(experts), before)
    assert_tables_hold(packed, experts)
    for name, tensor in tensors(experts).items():
        assert tensor is objects[name]
    for name in NAMES:
        table = packed.table(name)
        assert type(table) is Tensor and table.is_leaf and table.is_contiguous() and table.shape[0] == E
        assert table.requires_grad == isinstance(tensors(experts[0])[name], nn.Parameter)
        assert packed.table(name) is table
    assert torch.equal(experts[2](torch.ones(3, HIDDEN)), result)
    assert packed.unchanged(list(experts))
    assert packed.unchanged(tuple(experts))


def test_template_is_like_an_expert() -> None:
    experts = make()
    experts.eval()
    packed = pack(experts)
    template, first = packed.template, experts[0]
    assert type(template) is Expert
    assert template is not first
    assert list(vars(template)) == list(vars(first))
    assert [(name, type(module)) for name, module in template.named_modules()] == [
        (name, type(module)) for name, module in first.named_modules()
    ]
    assert list(tensors(template)) == list(tensors(first))
    for name, tensor in tensors(template).items():
        original = tensors(first)[name]
        assert type(tensor) is type(original)
        assert tensor is not original
        assert tensor.requires_grad == original.requires_grad
        assert tensor.data_ptr() == packed.table(name).data_ptr() == original.data_ptr()
        assert tensor.is_leaf
    x = torch.randn(3, HIDDEN)
    assert torch.equal(template(x), first(x))
    mutable = (dict, list, set, collections.OrderedDict)
    for mine, theirs in zip(template.modules(), first.modules(), strict=True):
        assert mine is not theirs
        for name, value in vars(mine).items():
            if isinstance(value, mutable):
                assert value is not vars(theirs)[name], name
    template.eval().train()
    template.sizes.append(3)
    template.register_forward_hook(lambda *args: None)
    template.register_buffer("more", torch.ones(1))
    assert packed.unchanged(experts)


def test_template_requires_grad_if_any_expert_does() -> None:
    experts = make()
    for expert in experts[:-1]:
        expert.requires_grad_(False)
    experts.w1_frozen = [expert.w1.requires_grad_(False) for expert in experts]
    packed = pack(list(experts))
    assert {name for name in NAMES if packed.table(name).requires_grad} == {"w2.weight", "w2.bias", "gain"}
    assert {name for name, p in packed.template.named_parameters() if p.requires_grad} == {
        "w2.weight",
        "w2.bias",
        "gain",
    }


def test_experts_without_parameters() -> None:
    packed = pack(make(nn.SiLU))
    assert packed.names == ()
    assert type(packed.template) is nn.SiLU


@pytest.mark.parametrize(
    "container",
    [list, tuple, lambda experts: nn.ModuleDict({f"expert_{i}": e for i, e in enumerate(experts)}).values()],
    ids=["list", "tuple", "ModuleDict"],
)
def test_any_sequence(container: Any) -> None:
    experts = container(make())
    packed = pack(experts)
    assert_tables_hold(packed, experts)
    assert packed.unchanged(experts)


def test_one_expert_that_is_a_layer() -> None:
    experts = [nn.Linear(3, 5)]
    packed = pack(experts)
    assert set(packed.names) == {"weight", "bias"}
    assert_tables_hold(packed, experts)


class Odd(nn.Module):
    """Shapes and dtypes that are rare."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.quantised = nn.Parameter(torch.randint(0, 9, (3,), dtype=torch.uint8), requires_grad=False)
        self.phases = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.low = nn.Parameter(torch.randn(5).half())
        self.register_buffer("flags", torch.tensor([True, False, True]), persistent=False)
        self.register_buffer("trained", torch.randn(2, requires_grad=True))
        self.register_parameter("none", None)
        self.both = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"a": nn.LayerNorm(2)})])


def test_rare_shapes_and_dtypes() -> None:
    experts = make(Odd)
    before = values(experts)
    packed = pack(experts)
    assert_tables_hold(packed, experts)
    assert_same(values(experts), before)
    assert packed.unchanged(experts)
    assert packed.table("trained").requires_grad
    assert list(packed.template.state_dict()) == list(experts[0].state_dict())
    assert not packed.table("quantised").requires_grad


def test_module_that_all_experts_share() -> None:
    act = nn.GELU()

    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_act = self.up_act = act
            self.w = nn.Linear(2, 2)

    experts = make(Sharing)
    packed = pack(experts)
    assert packed.template.gate_act is packed.template.up_act is not act
    assert packed.unchanged(experts)
    act.approximate = "tanh"
    assert not packed.unchanged(experts)


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        FakeTensorMode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["inference", "no_grad", "fake", "default device", "autocast"],
)
def test_mode_of_the_caller(mode: Callable[[], Any]) -> None:
    experts = make()
    before = values(experts)
    with mode():
        packed = pack(experts)
        assert packed.unchanged(experts)
    assert_same(values(experts), before)
    assert_tables_hold(packed, experts)
    for tensor in (*tensors(packed.template).values(), *map(packed.table, packed.names)):
        assert type(tensor) in (Tensor, nn.Parameter)
        assert not tensor.is_inference()
    experts[1](torch.ones(2, HIDDEN)).sum().backward()


def test_log(caplog: pytest.LogCaptureFixture) -> None:
    experts = [nn.Linear(512, 512) for _ in range(3)]
    with caplog.at_level(logging.INFO, "moe_rewrite"):
        pack(experts)
        pack(experts)
    assert caplog.messages == ["packed 3 experts (Linear): weight, bias, 3.0 MiB"]


# Who keeps what


def test_same_pack_while_unchanged() -> None:
    experts = make()
    packed = pack(experts)
    assert pack(list(experts)) is packed
    assert pack(list(experts)[:2]) is not packed
    assert not packed.unchanged(experts)


def test_two_packs_of_other_attributes_have_the_same_tables() -> None:
    experts = make()
    training = pack(experts)
    experts.eval()
    assert not training.unchanged(experts)
    evaluating = pack(experts)
    assert evaluating is not training
    assert not evaluating.template.training
    assert evaluating.template.w1.weight.data_ptr() == training.template.w1.weight.data_ptr()
    assert evaluating.table("w1.weight") is training.table("w1.weight")
    assert_tables_hold(evaluating, experts)
    experts.train()
    assert training.unchanged(experts)
    assert not evaluating.unchanged(experts)
    assert pack(experts) is training
    experts.requires_grad_(False)
    frozen = pack(experts)
    assert not frozen.table("w1.weight").requires_grad
    assert frozen.table("w1.weight").data_ptr() == training.table("w1.weight").data_ptr()
    assert training.table("w1.weight").requires_grad
    experts.double()
    assert not any(each.unchanged(experts) for each in (training, evaluating, frozen))
    assert training.released and frozen.released


def test_packs_do_not_keep_the_experts(few_objects: None) -> None:
    gc.collect()
    before = live_bytes()
    experts = make()
    alive = [weakref.ref(module) for module in experts.modules()]
    packed = pack(experts)
    del experts
    gc.collect()
    assert not any(module() is not None for module in alive)
    assert packed.released
    with pytest.raises(MoeRewriteError, match="released"):
        packed.inputs("w1.weight")
    held = live_bytes() - before
    assert held == 0
    packs = [weakref.ref(packed)]
    del packed
    assert packs[0]() is None


def test_threads_get_the_same_pack() -> None:
    experts, packs = make(), []
    threads = [threading.Thread(target=lambda: packs.append(pack(experts))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packs) == 4
    assert len(set(map(id, packs))) == 1
    assert packs[0].unchanged(experts)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The most live bytes after any copy."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.copies, self.bytes = self.copies + 1, max(self.bytes, live_bytes())
        return result


def test_memory(few_objects: None) -> None:
    gc.collect()
    others = live_bytes()
    experts = [Expert(64, 96) for _ in range(E)]
    largest = E * experts[0].w1.weight.nbytes
    before = live_bytes()
    own = before - others
    with Peak() as peak:
        packed = pack(experts)
    after = live_bytes()
    assert after == before
    assert peak.copies == E * len(NAMES)
    assert before < peak.bytes <= before + largest
    for expert in experts:
        expert.half()
    assert not packed.unchanged(experts)
    assert live_bytes() - others < own * 0.6
    experts[0].float().half()
    pack(experts)
    assert live_bytes() - others < own * 0.6


def test_replaced_parameters_are_not_kept(few_objects: None) -> None:
    experts = make()
    before = live_bytes()
    packed = pack(experts)
    experts.load_state_dict(copy.deepcopy(experts.state_dict()), assign=True)
    assert not packed.unchanged(experts)
    assert live_bytes() == before
    gone = weakref.ref(packed)
    del packed
    pack(experts)
    assert gone() is None


# What is noticed


def replace(owner: str, name: str, value: Callable[[Any], Any]) -> Callable[[nn.ModuleList], None]:
    def change(experts: nn.ModuleList) -> None:
        module = experts[2].get_submodule(owner)
        setattr(module, name, value(getattr(module, name)))

    return change


def on_weight(do: Callable[[nn.Parameter], Any]) -> Callable[[nn.ModuleList], Any]:
    return lambda experts: do(experts[2].w1.weight)


def set_data(value: Callable[[Tensor], Tensor]) -> Callable[[nn.ModuleList], None]:
    def change(experts: nn.ModuleList) -> None:
        experts[2].w1.weight.data = value(experts[2].w1.weight.data)

    return change


def replace_register(experts: nn.ModuleList) -> None:
    """Another dict with the same parameter, then an equal parameter in it."""
    experts[2].__dict__["_parameters"] = dict(experts[2]._parameters)
    experts[2]._parameters["gain"] = nn.Parameter(experts[2].gain.detach().clone())


def replace_dict(experts: nn.ModuleList) -> None:
    experts[2].__dict__ = dict(experts[2].__dict__)
    experts[2].scale = 3.0


def move(experts: nn.ModuleList) -> None:
    """The values of all modules one after the other are what they were."""
    vars(experts[1])["more"] = vars(experts[2]).pop("training")


def rename(experts: nn.ModuleList) -> None:
    """The last of its register, so that the order stays."""
    bias = experts[2].w2._parameters.pop("bias")  # type: ignore[union-attr]
    experts[2].w2.register_parameter("shift", bias)  # type: ignore[union-attr]


OTHER_ATTRIBUTES = {
    "eval": lambda experts: experts.eval(),
    "eval of a submodule": lambda experts: experts[2].act.eval(),
    "forward hook": lambda experts: experts[2].w1.register_forward_hook(print),
    "forward pre-hook": lambda experts: experts[2].register_forward_pre_hook(print),
    "backward hook": lambda experts: experts[2].act.register_full_backward_hook(print),
    "backward pre-hook": lambda experts: experts[2].register_full_backward_pre_hook(print),
    "number": replace("act", "negative_slope", lambda slope: 0.2),
    "number of another type": replace("", "scale", int),
    "text": replace("", "name", str.upper),
    "object": replace("", "config", lambda config: Config()),
    "new attribute": lambda experts: setattr(experts[2], "more", 1),
    "moved attribute": move,
    "no attribute": lambda experts: delattr(experts[2], "name"),
    "list": lambda experts: experts[2].sizes.append(3),
    "dict": lambda experts: experts[2].table.update(b=1),
    "forward": lambda experts: setattr(experts[2], "forward", print),
    "dict of the module": replace_dict,
    "class": lambda experts: setattr(experts[2].act, "__class__", nn.ReLU),
    "requires_grad": on_weight(lambda weight: weight.requires_grad_(False)),
    "new child": lambda experts: experts[2].add_module("more", nn.ReLU()),
    "new buffer": lambda experts: experts[2].act.register_buffer("more", torch.ones(1)),
}
"""Changes after which the parameters are still in the tables."""

OTHER_TENSORS = {
    "parameter": replace("w1", "weight", lambda weight: nn.Parameter(weight.detach().clone())),
    "equal parameter of one element": replace("", "gain", lambda gain: nn.Parameter(gain.detach().clone())),
    "no parameter": replace("w2", "bias", lambda bias: None),
    "buffer": replace("", "offset", Tensor.clone),
    "equal buffer of one element": replace("", "calls", Tensor.clone),
    "register": replace_register,
    "submodule": replace("", "w1", copy.deepcopy),
    "data": set_data(Tensor.clone),
    "half": lambda experts: experts.half(),
    "half of one": lambda experts: experts[2].half(),
    "assigned": lambda experts: experts.load_state_dict(copy.deepcopy(experts.state_dict()), assign=True),
    "swapped": on_weight(
        lambda weight: torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone())),
    ),
    "parametrized": lambda experts: nn.utils.parametrizations.weight_norm(experts[2].w1),
    "shared memory": lambda experts: experts.share_memory(),
    "meta": lambda experts: experts.to("meta"),
}
"""Changes after which a parameter is no longer in its table."""

OTHER_VIEWS = {
    "transposed": set_data(Tensor.t),
    "fewer rows": set_data(lambda weight: weight[:3]),
    "other shape": set_data(lambda weight: weight.view(-1)),
    "other dtype": set_data(lambda weight: weight.view(torch.int32)),
    "renamed": rename,
}
"""Changes after which a parameter is in its table and yet another."""


@pytest.mark.parametrize("change", OTHER_ATTRIBUTES.values(), ids=OTHER_ATTRIBUTES)
def test_change_of_attributes_is_noticed(change: Callable[[nn.ModuleList], Any]) -> None:
    experts = make()
    packed = pack(experts)
    assert packed.unchanged(experts)
    change(experts)
    assert not packed.unchanged(experts)
    assert not packed.unchanged(experts)
    assert not packed.released
    assert_tables_hold(packed, [experts[0]])


@pytest.mark.parametrize("change", OTHER_TENSORS.values(), ids=OTHER_TENSORS)
def test_change_of_tensors_is_noticed(change: Callable[[nn.ModuleList], Any]) -> None:
    experts = make()
    packed = pack(experts)
    table, template = packed.table("w1.weight"), packed.template
    assert packed.unchanged(experts)
    change(experts)
    assert not packed.unchanged(experts)
    assert packed.released
    for tensor in (table, *tensors(template).values()):
        assert tensor.untyped_storage().nbytes() == 0
    with pytest.raises(MoeRewriteError, match="released"):
        packed.inputs("w1.weight")


@pytest.mark.parametrize("change", OTHER_VIEWS.values(), ids=OTHER_VIEWS)
def test_change_of_views_is_noticed(change: Callable[[nn.ModuleList], Any]) -> None:
    experts = make(lambda: Expert(HIDDEN, HIDDEN))
    experts.requires_grad_(False)
    packed = pack(experts)
    assert packed.unchanged(experts)
    change(experts)
    assert not packed.unchanged(experts)


@pytest.mark.parametrize(
    "value",
    [lambda weight: weight[:3], lambda weight: weight.view(HIDDEN // 2, -1), lambda weight: weight.view(torch.int32)],
    ids=["fewer rows", "other shape", "other dtype"],
)
def test_other_views_of_all_are_packed_anew(value: Callable[[Tensor], Tensor]) -> None:
    """They begin where the rows of the table begin."""
    experts = make(lambda: Expert(HIDDEN, HIDDEN))
    experts.requires_grad_(False)
    pack(experts)
    for expert in experts:
        expert.w1.weight.data = value(expert.w1.weight.data)  # type: ignore[union-attr, operator]
    wanted = torch.stack([expert.w1.weight for expert in experts])  # type: ignore[union-attr, misc]
    assert torch.equal(pack(experts).table("w1.weight"), wanted)


def test_parameters_of_two_lists_of_modules_are_in_one_table() -> None:
    """Else each pack would move them out of the other's."""
    first, second = make(), make()
    for mine, theirs in zip(first, second, strict=True):
        theirs.w1.weight = mine.w1.weight  # type: ignore[union-attr]
    packs = [pack(first), pack(second)]
    assert packs[0].table("w1.weight") is packs[1].table("w1.weight")
    assert packs[0].unchanged(first) and packs[1].unchanged(second)
    before = values(second)
    del first, mine
    gc.collect()
    assert packs[0].released
    assert_same(values(second), before)
    assert_tables_hold(pack(second), second)


def train(experts: nn.ModuleList) -> None:
    optimiser = torch.optim.AdamW(experts.parameters())
    sum(expert(torch.ones(2, HIDDEN)).square().sum() for expert in experts).backward()  # type: ignore[union-attr]
    optimiser.step()
    optimiser.zero_grad()


def write(experts: nn.ModuleList) -> None:
    experts[2].calls += 1
    experts[1].offset.zero_()
    with torch.no_grad():
        experts[3].w1.weight.mul_(2)


NO_CHANGES = {
    "training": train,
    "written": write,
    "loaded": lambda experts: experts.load_state_dict(make(lambda: Expert().double()).state_dict()),
    "called": lambda experts: experts[2](torch.ones(1, HIDDEN)),
    "state dict": lambda experts: experts.state_dict(),
    "state dict hook": lambda experts: experts[1].register_state_dict_post_hook(lambda *args: None),
    "hook that is gone": lambda experts: experts[1].register_forward_hook(print).remove(),
    "eval and back": lambda experts: experts.eval().train(),
    "copied": copy.deepcopy,
    "same dtype": lambda experts: experts.float(),
}


@pytest.mark.parametrize("act", NO_CHANGES.values(), ids=NO_CHANGES)
def test_what_is_no_change(act: Callable[[nn.ModuleList], Any]) -> None:
    experts = make()
    packed = pack(experts)
    act(experts)
    assert packed.unchanged(experts)
    assert_tables_hold(packed, experts)
    assert pack(experts) is packed


def test_other_experts_are_no_change_of_these() -> None:
    experts, others = make(), make()
    packed = pack(experts)
    for those in (others, list(experts)[:-1], list(experts)[::-1], []):
        assert not packed.unchanged(those)
    assert packed.unchanged(experts)
    assert not packed.released


# Gradients


def loss_of(tables: dict[str, Tensor]) -> Tensor:
    x = torch.linspace(-1, 1, HIDDEN)
    y = F.leaky_relu(torch.einsum("enk,k->en", tables["w1.weight"], x), 0.1)
    return (torch.einsum("ekn,en->ek", tables["w2.weight"], y) + tables["w2.bias"]).square().sum()


def inputs_of(packed: Pack) -> dict[str, Tensor]:
    return {name: packed.inputs(name) for name in packed.names}


def stacked(experts: nn.ModuleList) -> dict[str, Tensor]:
    return {name: torch.stack([tensors(expert)[name] for expert in experts]) for name in NAMES}


@pytest.mark.parametrize("copied", [True, False])
def test_gradients_go_to_the_parameters(copied: bool) -> None:
    experts = make()
    experts[1].requires_grad_(False)
    experts[3].w1.weight.requires_grad_(False)
    reference = copy.deepcopy(experts)
    packed = pack(experts, copy=copied)
    for _ in range(2):  # the second adds up
        loss, expected = loss_of(inputs_of(packed)), loss_of(stacked(reference))
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        for (name, mine), theirs in zip(experts.named_parameters(), reference.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            if mine.grad is not None:
                assert torch.equal(mine.grad, theirs.grad), name
    assert experts[0].w1.weight.grad is not None
    assert experts[1].w1.weight.grad is None
    assert experts[3].w1.weight.grad is None


def test_inputs_are_the_table_where_no_gradient_is_wanted() -> None:
    experts = make()
    packed = pack(experts)
    with torch.no_grad():
        assert packed.inputs("w1.weight") is packed.table("w1.weight")
    assert packed.inputs("offset") is packed.table("offset")
    aliased = packed.inputs("w1.weight")
    assert aliased is not packed.table("w1.weight")
    assert aliased.data_ptr() == packed.table("w1.weight").data_ptr()
    assert aliased.requires_grad
    experts.requires_grad_(False)
    frozen = pack(experts)
    assert frozen.inputs("w1.weight") is frozen.table("w1.weight")


def test_gradient_of_all_experts_alike_is_not_shared_by_them() -> None:
    experts = make()
    packed = pack(experts)
    packed.inputs("w1.weight").sum(0).square().sum().backward()
    gradients = [expert.w1.weight.grad for expert in experts]
    assert len({gradient.data_ptr() for gradient in gradients}) == E
    kept = gradients[1].clone()
    gradients[0].zero_()
    assert torch.equal(gradients[1], kept)


def test_hooks_of_a_parameter_see_its_gradient() -> None:
    experts, seen = make(), []
    experts[2].gain.register_hook(lambda grad: seen.append(grad.clone()))
    experts[2].gain.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    (pack(experts).inputs("gain") * torch.arange(E)[:, None]).sum().backward()
    assert [grad.tolist() for grad in seen] == [[2.0], [2.0]]


def test_second_derivatives_are_refused() -> None:
    experts = make()
    (gradient,) = torch.autograd.grad(pack(experts).inputs("gain").pow(3).sum(), [experts[0].gain], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_write_between_forward_and_backward_is_refused() -> None:
    experts = make()
    loss = loss_of(inputs_of(pack(experts)))
    with torch.no_grad():
        experts[2].w1.weight.mul_(2)
    with pytest.raises(MoeRewriteError, match=r"experts\[2\]\.w1\.weight was modified by an inplace operation"):
        loss.backward()


def test_backward_after_the_pack_is_gone() -> None:
    experts = make()
    reference = copy.deepcopy(experts)
    packed = pack(experts)
    loss = loss_of(inputs_of(packed))
    experts[0].w1 = nn.Linear(HIDDEN, INNER)
    assert not packed.unchanged(experts)
    assert packed.released
    loss.backward()
    loss_of(stacked(reference)).backward()
    assert torch.equal(experts[1].w1.weight.grad, reference[1].w1.weight.grad)


# Without moving anything


def test_parameters_that_stay() -> None:
    experts = make()
    pointers = {name: tensor.data_ptr() for name, tensor in tensors(experts).items()}
    packed = pack(experts, copy=False)
    assert {name: tensor.data_ptr() for name, tensor in tensors(experts).items()} == pointers
    assert packed.unchanged(experts)
    assert pack(experts, copy=False) is packed
    for name in NAMES:
        table, members = packed.table(name), [tensors(expert)[name] for expert in experts]
        assert table.shape == (E, *members[0].shape)
        assert table.is_contiguous() and table.is_leaf and table.requires_grad == members[0].requires_grad
        assert torch.equal(packed.inputs(name), torch.stack(members))
    experts[0].w1.weight.data = experts[0].w1.weight.data + 1  # it may move
    assert packed.unchanged(experts)
    assert torch.equal(packed.inputs("w1.weight")[0], experts[0].w1.weight)
    experts[0].double()
    assert not packed.unchanged(experts)


def test_parameters_that_stay_may_not_change_device() -> None:
    experts = make()
    packed = pack(experts, copy=False)
    torch.utils.swap_tensors(experts[2].w1.weight, nn.Parameter(torch.empty(INNER, HIDDEN, device="meta")))
    assert not packed.unchanged(experts)


def test_memory_for_tracing_is_released(few_objects: None) -> None:
    experts = make()
    before = live_bytes()
    packed = pack(experts, copy=False)
    assert live_bytes() > before
    packed.release()
    assert live_bytes() == before
    assert packed.unchanged(experts)
    table = packed.table("w1.weight")
    assert table.untyped_storage().nbytes() == table.nbytes
    packed.release()
    pack(experts).release()  # holds the parameters: nothing to release
    assert_tables_hold(pack(experts), experts)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_memory(kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        experts = make()
    packed = pack(experts)
    assert packed.unchanged(experts)
    assert pack(experts) is packed
    for name in NAMES:
        original = tensors(experts[0])[name]
        for tensor in (packed.table(name), packed.inputs(name)):
            assert tensor.shape == (E, *original.shape)
            assert type(tensor) is not Tensor or tensor.is_meta
            assert tensor.requires_grad == original.requires_grad
        assert tensors(packed.template)[name].shape == original.shape
    packed.release()
    experts.eval()
    assert not packed.unchanged(experts)


# Copies and checkpoints


def test_deepcopy_is_independent() -> None:
    experts = make()
    packed = pack(experts)
    copied = copy.deepcopy(experts)
    assert_same(values(copied), values(experts))
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(copied).values()}) == E * len(NAMES)
    with torch.no_grad():
        for tensor in tensors(copied).values():
            tensor.zero_()
    assert packed.unchanged(experts)
    assert experts[1].w1.weight.abs().sum() > 0
    assert pack(copied) is not packed
    assert_tables_hold(pack(copied), copied)
    one = copy.deepcopy(experts[1])
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors(one).values()) == sum(
        tensor.nbytes for tensor in tensors(one).values()
    )


def save_module(experts: nn.ModuleList) -> tuple[int, Any]:
    file = io.BytesIO()
    torch.save(experts, file)
    size = file.tell()
    file.seek(0)
    return size, torch.load(file, weights_only=False).state_dict()


def save_state_dict(experts: nn.ModuleList) -> tuple[int, Any]:
    file = io.BytesIO()
    torch.save(experts.state_dict(), file)
    size = file.tell()
    file.seek(0)
    return size, torch.load(file)


def pickle_module(experts: nn.ModuleList) -> tuple[int, Any]:
    dumped = pickle.dumps(experts)
    return len(dumped), pickle.loads(dumped).state_dict()


def save_one(experts: nn.ModuleList) -> tuple[int, Any]:
    return save_module(experts[1])


def save_safetensors(experts: nn.ModuleList) -> tuple[int, Any]:
    safetensors = pytest.importorskip("safetensors.torch")
    dumped = safetensors.save(experts.state_dict())
    return len(dumped), safetensors.load(dumped)


SAVERS = [save_module, save_state_dict, pickle_module, save_one, save_safetensors]


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_saving(save: Callable[[nn.ModuleList], tuple[int, Any]]) -> None:
    experts = make(lambda: Expert(32, 48))
    size, state = save(experts)
    packed = pack(experts)
    packed_size, packed_state = save(experts)
    assert abs(packed_size - size) < 64 * len(state)  # names of storages, padding
    assert_same(packed_state, state)
    assert packed.unchanged(experts)


def test_loaded_module_can_be_packed() -> None:
    experts = make()
    pack(experts)
    loaded = pickle.loads(pickle.dumps(experts))
    assert_same(values(loaded), values(experts))
    assert_tables_hold(pack(loaded), loaded)


def test_safetensors_save_model(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    experts = make()
    pack(experts)
    safetensors.save_model(experts, str(tmp_path / "model.safetensors"))
    other = make(lambda: Expert().requires_grad_(False))
    nn.init.zeros_(other[0].w1.weight)
    packed = pack(other)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert packed.unchanged(other)
    assert_same(values(other), values(experts))
    assert_tables_hold(packed, other)


def test_save_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class TinyConfig(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
        model_type = "tiny_experts"

    class Tiny(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
        config_class = TinyConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.experts = make(lambda: Expert(32, 48))
            self.post_init()

    model = Tiny(TinyConfig())
    model.save_pretrained(tmp_path / "before")
    packed = pack(model.experts)
    model.save_pretrained(tmp_path / "after")
    assert packed.unchanged(model.experts)
    sizes = [(tmp_path / when / "model.safetensors").stat().st_size for when in ("before", "after")]
    assert sizes[0] == sizes[1]
    again = Tiny.from_pretrained(tmp_path / "after")
    assert_same(values(again), values(model))
    assert_tables_hold(pack(again.experts), again.experts)


# Refusals


class Scaled(nn.Module):
    def __init__(self, scale: Any = 1.0, size: int = 2) -> None:
        super().__init__()
        self.w = nn.Linear(size, 2)
        self.scale = scale


def two(change: Callable[[Scaled, Scaled], Any], scale: Callable[[], Any] = float) -> Callable[[], list[nn.Module]]:
    """Two alike experts, after a change of the second (given with the first)."""

    def build() -> list[nn.Module]:
        first, second = Scaled(scale()), Scaled(scale())
        change(second, first)
        return [first, second]

    return build


def attribute(scale: Callable[[], Any]) -> Callable[[], list[nn.Module]]:
    return lambda: [Scaled(scale()), Scaled(scale())]


def tie(second: Scaled, first: Scaled) -> None:
    second.w.weight = first.w.weight


def tie_memory(second: Scaled, first: Scaled) -> None:
    second.w.weight.data = first.w.weight.data


def tie_inside(second: Scaled, first: Scaled) -> None:
    for expert in (first, second):
        expert.more = expert.w.weight


def own_forward(second: Scaled, first: Scaled) -> None:
    second.forward = types.MethodType(lambda self, x: x, second)


class Slotted(nn.Module):
    __slots__ = ("hidden",)


class Subclass(Tensor):
    pass


def put_subclass(second: Scaled, first: Scaled) -> None:
    for expert in (first, second):
        expert.register_buffer("more", torch.ones(2).as_subclass(Subclass))


def put_lazy(second: Scaled, first: Scaled) -> None:
    for expert in (first, second):
        expert.more = nn.UninitializedParameter()


def cycle(second: Scaled, first: Scaled) -> None:
    for expert in (first, second):
        expert.w.add_module("parent", expert)


class Equal:
    """Equal to any other of its class, and another object."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "Equal()"


def put_plain_parameter(second: Scaled, first: Scaled) -> None:
    for expert in (first, second):
        expert._parameters["more"] = torch.ones(1)  # as code does that goes around ``register_parameter``


def put_other_kind(second: Scaled, first: Scaled) -> None:
    first.register_buffer("more", torch.ones(1))
    second.register_buffer("more", nn.Parameter(torch.ones(1), requires_grad=False))


def put_in_another_order(second: Scaled, first: Scaled) -> None:
    second.w._parameters["weight"] = second.w._parameters.pop("weight")


def buffer(make: Callable[[], Tensor]) -> Callable[[Scaled, Scaled], None]:
    """Both get a buffer of their own."""

    def put(second: Scaled, first: Scaled) -> None:
        for expert in (first, second):
            expert.register_buffer("more", make())

    return put


UNUSUAL = r"experts\[0\]\.more is sparse, quantised, or lazily conjugated or negated"

NOT_ALIKE: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (list, "there are no experts"),
    "no module": (lambda: [Scaled(), print], r"experts\[1\] is no module but a builtin"),
    "the same twice": (lambda: [Scaled()] * 2, "the same expert is there twice"),
    "class": (lambda: [nn.SiLU(), nn.GELU()], r"experts\[1\] is a GELU, experts\[0\] a SiLU"),
    "class inside": (
        two(lambda second, first: setattr(second, "w", nn.Bilinear(2, 2, 2))),
        r"experts\[1\]\.w is a Bilinear, experts\[0\]\.w a Linear",
    ),
    "child": (
        two(lambda second, first: second.add_module("more", nn.SiLU())),
        r"experts\[1\] is built in another way than experts\[0\]: experts\[1\]\.more is only in one of them",
    ),
    "child under two names": (
        two(lambda second, first: second.add_module("more", second.w)),
        r"experts\[1\] is built in another way than experts\[0\]: experts\[1\]\.more is only in one of them",
    ),
    "number": (two(lambda second, first: setattr(second, "scale", 2.0)), r"experts\[1\]\.scale is 2\.0 and not 0\.0"),
    "negative zero": (
        two(lambda second, first: setattr(second, "scale", -0.0)),
        r"experts\[1\]\.scale is -0\.0 and not 0\.0",
    ),
    "type of a container": (
        two(lambda second, first: setattr(second, "scale", (1,)), lambda: [1]),
        r"experts\[1\]\.scale is a tuple and not a list",
    ),
    "keys of a dict": (
        two(lambda second, first: setattr(second, "scale", {"b": 1}), lambda: {"a": 1}),
        r"experts\[1\]\.scale holds an entry that is 'b' and not 'a'",
    ),
    "order of a dict": (
        two(lambda second, first: setattr(second, "scale", {"b": 1, "a": 1}), lambda: {"a": 1, "b": 1}),
        r"experts\[1\]\.scale holds an entry that is 'b' and not 'a'",
    ),
    "sign in a set": (
        two(lambda second, first: setattr(second, "scale", {-0.0}), lambda: {0.0}),
        r"experts\[1\]\.scale is another set",
    ),
    "set of equal objects": (attribute(lambda: {Equal()}), r"experts\[0\]\.scale is another set"),
    "type of a number": (two(lambda second, first: setattr(second, "scale", 0)), r"scale is 0 and not 0\.0"),
    "attribute": (two(lambda second, first: delattr(second, "scale")), "only one of them has scale"),
    "attribute inside": (
        two(lambda second, first: setattr(second.w, "in_features", 3)),
        r"experts\[1\]\.w\.in_features is 3 and not 2",
    ),
    "list": (
        two(lambda second, first: second.scale.append(1), list),
        r"experts\[1\]\.scale has 1 entries and not 0",
    ),
    "object": (attribute(Config), r"experts\[1\]\.scale is an object of its own in each expert \(Config\)"),
    "tensor": (attribute(lambda: torch.ones(1)), r"experts\[1\]\.scale is an object of its own in each expert"),
    "hidden module": (attribute(lambda: [nn.SiLU()]), r"experts\[0\]\.scale holds an entry that is a module"),
    "bound method": (
        lambda: [Scaled(CONFIG_MODULE.extra_repr)],
        r"experts\[0\]\.scale is a method bound to a module",
    ),
    "training": (two(lambda second, first: second.w.eval()), r"experts\[1\]\.w\.training is False and not True"),
    "bias": (
        two(lambda second, first: setattr(second, "w", nn.Linear(2, 2, bias=False))),
        r"experts\[1\]\.w\.bias is only in one of them",
    ),
    "buffer": (
        two(lambda second, first: second.register_buffer("more", torch.ones(1))),
        r"have other buffers: experts\[1\]\.more is only in one of them",
    ),
    "shape": (
        two(lambda second, first: setattr(second.w, "weight", nn.Parameter(torch.ones(2, 3)))),
        r"experts\[1\]\.w\.weight has shape \(2, 3\), experts\[0\]\.w\.weight has \(2, 2\)",
    ),
    "dtype": (
        two(lambda second, first: second.w.half()),
        r"experts\[1\]\.w\.weight has dtype torch\.float16, experts\[0\]\.w\.weight has torch\.float32",
    ),
    "device": (two(lambda second, first: second.w.to("meta")), r"has device meta, experts\[0\]\.w\.weight has cpu"),
    "layout": (
        two(lambda second, first: setattr(second.w.weight, "data", second.w.weight.data.t())),
        r"experts\[1\]\.w\.weight is not contiguous",
    ),
    "sparse": (
        two(lambda second, first: second.register_buffer("more", torch.ones(2).to_sparse())),
        r"experts\[1\]\.more is sparse",
    ),
    "quantised": (
        two(buffer(lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8))),
        UNUSUAL,
    ),
    "conjugated": (two(buffer(lambda: torch.ones(2, dtype=torch.complex64).conj())), UNUSUAL),
    "negated": (two(buffer(lambda: torch.ones(2, 1, dtype=torch.complex64).conj().imag)), UNUSUAL),
    "plain parameter": (two(put_plain_parameter), r"experts\[0\]\.more is a Tensor and no plain tensor"),
    "parameter as a buffer": (two(put_other_kind), r"experts\[1\]\.more is a Parameter, experts\[0\]\.more a Tensor"),
    "order of parameters": (
        two(put_in_another_order),
        r"experts\[1\]\.w and experts\[0\]\.w have other parameters: in another order",
    ),
    "subclass": (two(put_subclass), r"experts\[0\]\.more is a Subclass and no plain tensor"),
    "lazy": (two(put_lazy), r"experts\[0\]\.more is a UninitializedParameter and no plain tensor"),
    "computed": (
        two(lambda second, first: second.register_buffer("more", second.w.weight * 2)),
        r"experts\[1\]\.more is computed from other tensors",
    ),
    "tensor attribute": (
        two(lambda second, first: setattr(second.w.weight, "shard", 1)),
        r"experts\[1\]\.w\.weight and experts\[0\]\.w\.weight differ in the attribute shard",
    ),
    "tied": (two(tie), r"experts\[1\]\.w\.weight is the same tensor as experts\[0\]\.w\.weight"),
    "tied inside": (two(tie_inside), r"experts\[0\]\.w\.weight is the same tensor as experts\[0\]\.more"),
    "tied memory": (two(tie_memory), r"experts\[1\]\.w\.weight shares its memory with experts\[0\]\.w\.weight"),
    "shared between processes": (
        two(lambda second, first: second.share_memory()),
        r"experts\[1\]\.w\.weight is in memory that is shared between processes",
    ),
    "forward hook": (
        two(lambda second, first: second.w.register_forward_hook(print)),
        r"experts\[1\]\.w has forward hooks",
    ),
    "forward pre-hook": (
        two(lambda second, first: second.register_forward_pre_hook(print)),
        r"experts\[1\] has forward pre hooks",
    ),
    "backward hook": (
        two(lambda second, first: second.register_full_backward_hook(print)),
        r"experts\[1\] has backward hooks",
    ),
    "own forward": (two(own_forward), r"experts\[1\] has a forward of its own"),
    "parametrization": (
        two(lambda second, first: nn.utils.parametrizations.weight_norm(second.w)),
        r"experts\[1\]\.w has parametrizations",
    ),
    "slots": (lambda: [Slotted(), Slotted()], r"experts\[0\] keeps attributes in __slots__"),
    "script": (lambda: [torch.jit.script(nn.SiLU())], r"experts\[0\] is a ScriptModule"),
    "cycle": (two(cycle), r"experts\[0\]\.w\.parent is the expert itself"),
}

CONFIG_MODULE = nn.SiLU()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("build", "reason"), NOT_ALIKE.values(), ids=NOT_ALIKE)
def test_refusals(build: Callable[[], Any], reason: str) -> None:
    experts = build()
    pointers = [t.data_ptr() for expert in experts if isinstance(expert, Scaled) for t in expert.w.parameters()]
    with pytest.raises(NotAlike, match=reason):
        pack(experts)
    assert pointers == [t.data_ptr() for expert in experts if isinstance(expert, Scaled) for t in expert.w.parameters()]


@pytest.mark.parametrize(
    "value",
    [
        lambda: F.silu,
        lambda: torch.float16,
        lambda: [1, (2.0, "a"), {"b": None, "c": {1, 2}}],
        lambda: CONFIG,
        lambda: float,
        lambda: collections,
    ],
    ids=["function", "dtype", "containers", "object", "class", "module of Python"],
)
def test_attributes_that_may_be_there(value: Callable[[], Any]) -> None:
    experts = attribute(value)()
    packed = pack(experts)
    assert packed.template.scale == experts[0].scale
    assert packed.unchanged(experts)


def test_inference_tensors_are_refused() -> None:
    with torch.inference_mode():
        experts = make()
        with pytest.raises(NotAlike, match="was made in inference mode"):
            pack(experts)


def test_memory_that_someone_else_holds_is_refused() -> None:
    experts = make()
    state = experts.state_dict()
    pointer = experts[0].w1.weight.data_ptr()
    with pytest.raises(NotAlike, match="shares its memory with another tensor"):
        pack(experts)
    assert experts[0].w1.weight.data_ptr() == pointer
    assert pack(experts, copy=False).unchanged(experts)
    del state
    assert_tables_hold(pack(experts), experts)


def test_garbage_is_no_obstacle() -> None:
    experts = make()
    gc.disable()
    try:
        garbage: list[Any] = [experts[0].gain.detach()]
        garbage.append(garbage)
        del garbage
        assert_tables_hold(pack(experts), experts)
    finally:
        gc.enable()


def test_graph_of_an_eager_call_is_no_obstacle() -> None:
    experts = make()
    reference = copy.deepcopy(experts)
    x = torch.ones(2, HIDDEN, requires_grad=True)
    loss = sum(expert(x).sum() + (x @ expert.w1.weight.t()).sum() for expert in experts)
    pack(experts)
    loss.backward()  # type: ignore[union-attr]
    sum(e(x).sum() + (x @ e.w1.weight.t()).sum() for e in reference).backward()  # type: ignore[union-attr]
    for mine, theirs in zip(experts.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("watched", [False, True])
def test_buffer_that_is_a_view(watched: bool, few_objects: None) -> None:
    experts = make()
    before = live_bytes()
    for expert in experts:
        expert.offset = expert.offset.clone()[...]  # type: ignore[index, operator]
        expert.offset.mark = "kept"
    held = experts[0].offset._base  # type: ignore[union-attr]
    with pytest.raises(NotAlike, match=r"experts\[0\]\.offset shares its memory"):
        kept = [held]
        pack(experts)
    del held, kept
    references = [weakref.ref(expert.offset) for expert in experts] if watched else []
    packed = pack(experts)
    assert packed.unchanged(experts)
    assert_tables_hold(packed, experts)
    experts[1].offset.zero_()  # type: ignore[operator]
    assert not packed.table("offset")[1].any()
    assert experts[1].offset.mark == packed.template.offset.mark == "kept"  # type: ignore[union-attr]
    if not references:
        assert live_bytes() == before


def test_unknown_name() -> None:
    with pytest.raises(MoeRewriteError, match=r"no parameter or buffer 'w9'; there are: weight, bias"):
        pack([nn.Linear(2, 2)]).table("w9")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    experts = make(lambda: Expert(256, 512)).cuda()
    before = values(experts)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        packed = pack(experts)
    slack = 512 * len(NAMES) * E  # the allocator rounds to 512 bytes
    assert abs(torch.cuda.memory_allocated() - allocated) <= slack
    assert torch.cuda.max_memory_allocated() <= allocated + packed.table("w1.weight").nbytes + slack
    assert_same(values(experts), before)
    assert_tables_hold(packed, experts)
    assert packed.unchanged(experts)
    experts[1](torch.ones(2, 256, device="cuda")).sum().backward()  # type: ignore[operator]
    experts.cpu()
    assert not packed.unchanged(experts)
    torch._C._cuda_clearCublasWorkspaces()  # of the forward and backward: larger than the experts
    assert torch.cuda.memory_allocated() < allocated / 2
    with pytest.raises(NotAlike, match="has device"):
        pack([experts[0], experts[1].cuda()])
