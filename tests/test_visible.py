"""Launches that compilers see: the graph holds what torch would have put there, had it looked for what kernels write.

In a process of its own, where kernels are not interpreted. Nothing is launched.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

import moe_rewrite

pytest.importorskip("triton", reason="torch for the CPU comes without triton")

TRACED = '''
import json, re, torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from moe_rewrite.lower import launch, visible


class Target:
    """What torch asks for when it looks for what kernels write."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Target())


def by_torch(kernel, grid, args, constants, written):
    given = {**dict(zip(kernel.arg_names, args)), **constants}
    torch.library.wrap_triton(kernel)[grid](**given)
    return [given[name] for name in written]


def traced(launches, function, tensors):
    """The launches in the graph. Each gets a new number in a table of arguments, which are none.

    In torch 2.15 they say besides how they were written, and what views are views of.
    """
    visible.launch = launches
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(torch.func.functionalize(function))(*map(torch.empty_like, tensors))
    code = re.sub(r"constant_args_idx = \\d+", "constant_args_idx = ...", graph.code)
    code = re.sub(r", (launch_kwargs|tensor_bases) = [({][^)}]*[)}]", "", code)
    return re.findall(r"triton_kernel_wrapper_functional\\((.*)\\);", code)


def of(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def numbers(*shape, dtype=torch.int32):
    return of(*shape, dtype=dtype)


def multiply(program, tunes, interleaved=False):
    def run(rows, weight, order, offsets, *vectors):
        weights = [weight] if interleaved or not program else list(weight.chunk(2, -1))
        sizes = (order.shape[0], rows.shape[0], 4)
        how = interleaved, program, torch.bfloat16, tunes
        return launch.multiply(rows, weights, list(vectors), order, offsets, None, *sizes, *how, seen=True)

    return run


def multiply_each(rows, weight, experts):
    how = False, "", torch.bfloat16, True
    return launch.multiply(rows, [weight], [], None, None, experts, len(experts), 0, 1, *how, seen=True)


def outer(along_inner, tunes):
    def run(rows, grad, order, offsets):
        return launch.outer(rows, grad, order, offsets, rows.shape[0], 4, along_inner, tunes, seen=True)

    return run


def sort(keys):
    return launch.sort(keys, 6, seen=True)


CASES = {
    "rows that are lent": (launch.lend, of(100, 64), numbers(6)),
    "sort of few": (sort, numbers(100, dtype=torch.int64)),
    "sort of many": (sort, numbers(4096, dtype=torch.int64)),
    "product": (multiply("", False), of(8, 64), of(6, 64, 32), numbers(32), numbers(6)),
    "product, tuned": (multiply("", True), of(800, 64), of(6, 64, 32), numbers(3200), numbers(6)),
    "two": (multiply("silu v0;mul v2 v1", False), of(8, 64), of(6, 64, 64), numbers(32), numbers(6)),
    "vectors": (
        multiply("add v0 v2;add v1 v3;mul v4 v5", False, True),
        *(of(8, 64), of(6, 64, 64), numbers(32), numbers(6), of(6, 32), of(6, 32)),
    ),
    "one by one": (multiply_each, of(8, 64), of(6, 64, 32), numbers(8, dtype=torch.int64)),
    "gradient": (outer(True, False), of(8, 64), of(32, 48), numbers(32), numbers(6)),
    "gradient, tuned": (outer(False, True), of(8, 64), of(32, 48), numbers(32), numbers(6)),
}
launch._stores_gradients = lambda result: False  # torch.library.wrap_triton takes no descriptors, up to torch 2.13
ours = visible.launch
for name, (function, *tensors) in CASES.items():
    tensors = [torch.empty_like(tensor, device="cpu") for tensor in tensors]
    print(json.dumps([name, *(traced(one, function, tensors) for one in (ours, by_torch))]), flush=True)
'''

DESCRIBED = (
    TRACED[: TRACED.index("CASES =")]
    + """
launch.MUCH_WORK = 0
ours = visible.launch
weight = of(6, 32, 64).transpose(1, 2)
for function, *tensors in (
    (multiply("", False), of(400, 64), weight, numbers(1600), numbers(6)),
    (outer(True, False), of(400, 64), of(1600, 48), numbers(1600), numbers(6)),
    (outer(False, True), of(8, 64), of(32, 48), numbers(32), numbers(6)),
):
    tensors = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in tensors]
    (found,) = traced(ours, function, tensors)
    print(re.search("tma_descriptor_metadata = {(.*?)}", found)[1])
"""
)

BEHIND = (
    TRACED[: TRACED.index("CASES =")]
    + """
def behind(rows, weight, order, offsets, gradient):
    how = False, "", torch.bfloat16, False, gradient
    return launch.multiply(rows, [weight], [], order, offsets, None, 32, 8, 4, *how, seen=True)


tensors = of(8, 64), of(6, 64, 32), numbers(32), numbers(6), of(6, 64, 48)
(found,) = traced(visible.launch, behind, [torch.empty_like(tensor, device="cpu") for tensor in tensors])
print(sorted(re.findall(r"'([a-z_]+)': gradient_1", found)))
"""
)


def _said(program: str, tmp_path: pathlib.Path) -> list[str]:
    """What a program prints in a process of its own."""
    root = pathlib.Path(moe_rewrite.__file__).parent.parent
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-3000:]
    return said.stdout.splitlines()


def test_graphs_as_torch_makes_them(tmp_path):
    found = [json.loads(line) for line in _said(TRACED, tmp_path)]
    assert len(found) == 10
    for name, ours, by_torch in found:
        assert len(ours) == (2 if name == "sort of many" else 1), name
        assert ours == by_torch, name
        assert ("1), (" in ours[0]) == name.endswith("tuned"), "a grid for each tile"


def test_descriptors_in_graphs(tmp_path):
    """Blocks of what is read and written by descriptors, the contiguous dimension last."""
    assert _said(DESCRIBED, tmp_path) == [
        "'weight': ('stable', ((1, 32, 64),)), 'second_weight': ('stable', ((1, 32, 64),))",
        "'described_rows': ('stable', ((32, 64),)), 'described_grad': ('stable', ((32, 64),)), "
        "'described_result': ('stable', ((1, 64, 64),))",
        "'described_result': ('stable', ((1, 64, 64),))",
    ]


def test_what_a_product_is_to_come_after_is_an_operand(tmp_path):
    """It stands for vectors that are not there: so the compiler computes it before."""
    assert _said(BEHIND, tmp_path) == ["['second_vector', 'vector']"]
