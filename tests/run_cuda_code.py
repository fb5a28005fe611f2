"""Runs the code that inductor generates for an H200 on the CPU, and compares its numbers with the eager loop's.

    python tests/run_cuda_code.py triton --tokens 16 --num-experts 8 --hidden 64 --intermediate 48 --top-k 2 --backward
    python tests/run_cuda_code.py --cases cases.txt     # one case a line, arguments as above

``cuda_code.py`` generates the code, in a process of its own. Here Triton interprets the kernels, ours and inductor's,
launched as the generated code says: the order of arguments, constants and grids are inductor's. Memory that nothing was
written to holds NaN or the largest integer, tokens and routing weights of no expert are NaN, and nothing may be written
to what is given. Seen to work with torch 2.11 and triton 3.6, whose interpreter needs numpy < 2.4. Small sizes only: it
is slow.

For each tensor it prints how far it is from eager in float64, and in brackets how far eager is in the same dtype, in
units of the dtype's epsilon times the largest value. What it cannot show: races, what a GPU's compiler makes of a
kernel, and anything about time.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import inspect
import os
import pickle
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from cuda_code import Graph, arguments, experts_of, generate, pretend, stubbed
from torch import Tensor

_HEURISTICS = ("user_autotune", "pointwise", "reduction", "persistent_reduction")
_BLOCKS = {"x": ("XBLOCK", 64), "y": ("YBLOCK", 16), "z": ("ZBLOCK", 4), "r0_": ("R0_BLOCK", 64)}


def _cases(given: list[str]) -> list[argparse.Namespace]:
    """The cases of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--sentinels", action="store_true", help="half of the expert ids are of no expert")
    parser.add_argument("--first", type=int, default=0, help="so many first tokens are of no expert")
    parser.add_argument("--cases", type=Path, help="a file of cases, one a line")
    parsed = parser.parse_args(given)
    if parsed.cases is None:
        return [parsed]
    lines = [shlex.split(line) for line in parsed.cases.read_text().splitlines() if line]
    return [parser.parse_args(line) for line in lines]


def _generate(cases: list[argparse.Namespace], pipe: int) -> None:
    pretend()
    with open(pipe, "wb") as out:
        for case in cases:
            torch._dynamo.reset()
            try:
                made: Any = generate(case)
            except Exception:
                made = traceback.format_exc()
            pickle.dump(made, out)
            out.flush()


def _unwritten(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty_strided(size, stride, dtype=dtype)
    if dtype.is_floating_point:
        return tensor.fill_(torch.nan)
    return tensor.fill_(True if dtype is torch.bool else torch.iinfo(dtype).max)


class Kernel:
    """A generated kernel that Triton interprets. Its launcher is inductor's."""

    def __init__(self, function: Any, triton_meta: dict[str, Any], inductor_meta: dict[str, Any], **rest: Any) -> None:
        from torch._inductor.runtime import triton_heuristics as heuristics
        from triton import Config

        parameters = inspect.signature(function.fn).parameters
        constants = {index for index, one in enumerate(parameters.values()) if "constexpr" in str(one.annotation)}
        if rest.get("custom_kernel"):
            config = heuristics.config_from_dict(rest["configs"][0]) if rest["configs"] else Config({})
        else:
            sizes = {name: size for name, size in _BLOCKS.values() if name in parameters}
            config = Config(sizes)
        meta = copy.deepcopy(triton_meta)
        meta["constants"].update({name: size for name, size in config.kwargs.items() if name in parameters})
        if "WIDEN" in meta["constants"]:
            meta["constants"]["WIDEN"] = "*bf16" in meta["signature"].values()
        result = heuristics.TritonCompileResult.__new__(heuristics.TritonCompileResult)
        result.config, result.compile_meta, result.inductor_meta = config, meta, inductor_meta
        names = list(parameters)
        call_args, def_args, _ = result._get_arg_lists(names, constants)

        def runner(*args: Any) -> None:
            function[args[:3]](*args[3:])

        grid = ["grid_0", "grid_1", "grid_2"]
        self._launcher = result._gen_launcher_code({"runner": runner}, def_args, [*grid, *call_args])

    def run(self, *args: Any, stream: Any) -> None:
        self._launcher(*args, stream=stream)


def _load(self: Any, name: str, source: str, device_str: str) -> Kernel:
    """In the place of inductor's compiler of kernels. The source is in a file: the interpreter reads it again."""
    file = Path(tempfile.mkdtemp(prefix="cuda_code")) / f"{name[:50]}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel: Kernel = getattr(module, name)
    return kernel


class _Libdevice:
    """CUDA's functions, by those of Triton that have the same name."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl

        return getattr(tl, name)


def _add_bf16() -> None:
    """Triton's interpreter has no atomic addition of bf16. Its programs run one after the other."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    atomic = InterpreterBuilder.create_atomic_rmw

    def add(self: Any, operation: Any, at: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if value.dtype.scalar.name != "bf16":
            return atomic(self, operation, at, value, mask, *rest)
        assert "FADD" in str(operation)
        found = numpy.zeros_like(value.data)
        for i in numpy.ndindex(value.data.shape):
            if mask.data[i]:
                bits = ctypes.c_uint16.from_address(int(at.data[i]))
                found[i] = bits.value
                both = torch.tensor([found[i], value.data[i]], dtype=torch.uint16).view(torch.bfloat16)
                bits.value = int((both[0] + both[1]).reshape(1).view(torch.uint16).item())
        return TensorHandle(found, value.dtype.scalar)

    InterpreterBuilder.create_atomic_rmw = add


def _interpret() -> None:
    """Put stand-ins in the place of what generated code takes from torch and Triton."""
    from conftest import _round_to_bf16
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    def record(**meta: Any) -> Callable[[Any], Kernel]:
        return lambda function: Kernel(function, **meta)

    for name in _HEURISTICS:
        setattr(triton_heuristics, name, lambda *args, **meta: record(**meta))
    triton_helpers.set_driver_to_gpu, triton_helpers.libdevice = lambda: None, _Libdevice()
    AsyncCompile.triton, AsyncCompile.wait = _load, lambda self, scope: None
    torch._C._dynamo.guards._empty_strided_cuda = _unwritten
    torch._C._cuda_getCurrentRawStream = lambda device: 0

    class Nothing:
        def __init__(self, *args: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args: Any) -> None: ...

    torch.cuda._DeviceGuard, torch.cuda.set_device = Nothing, lambda device: None
    _round_to_bf16()
    _add_bf16()


def _call(graph: Graph, args: list[Tensor]) -> list[Tensor | None]:
    """Run a generated file."""
    scope: dict[str, Any] = {"__name__": "generated", "__file__": __file__}
    exec(compile(graph.code, "generated", "exec"), scope)
    results: list[Tensor | None] = list(scope["call"](args))
    return results


def _same(first: Tensor, second: Tensor) -> bool:
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _inputs(case: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The module in float64 and what it is called with; all are numbers of the dtype of the case."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    experts = experts_of(case)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    experts = experts.to(dtype).double()
    scores = torch.rand(case.tokens, case.num_experts)
    ids = scores.topk(case.top_k).indices
    if case.sentinels:
        ids = torch.where(torch.rand(ids.shape) < 0.5, case.num_experts, ids)
    ids[: case.first] = case.num_experts
    x = torch.randn(case.tokens, case.hidden).to(dtype).double()
    weights = torch.rand(ids.shape).to(dtype).double()
    nobody = ids == case.num_experts  # eager never looks at what these have
    weights[nobody], x[nobody.all(1)] = torch.nan, torch.nan
    return experts, {"x": x, "ids": ids, "weights": weights}


def _eager(
    case: argparse.Namespace, experts: torch.nn.Module, inputs: dict[str, Tensor], tangent: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    experts = copy.deepcopy(experts).to(dtype)
    x, weights = (inputs[name].clone().to(dtype).requires_grad_(case.backward) for name in ("x", "weights"))
    out = experts(x, inputs["ids"], weights)
    found = {"result": out.detach()}
    if case.backward:
        if not out.requires_grad:
            out = out + (x * 0).nan_to_num()  # eager took no tokens
        out.backward(tangent.to(dtype))
        named = {"x": x, "weights": weights, **dict(experts.named_parameters())}
        found |= {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in named.items()}
    return found


def _generated(
    case: argparse.Namespace,
    made: tuple[list[Graph], dict[int, str]],
    experts: torch.nn.Module,
    inputs: dict[str, Tensor],
    tangent: Tensor,
) -> dict[str, Tensor]:
    """What the generated code gives: the result, and the gradient of each input by its name."""
    (forward, *rest), names = made
    dtype = getattr(torch, case.dtype)
    tensors = {**inputs, **{name: one.detach() for name, one in experts.named_parameters()}}
    tensors = {name: one.to(dtype) if one.is_floating_point() else one for name, one in tensors.items()}
    of = dict(zip(forward.inputs, (names.get(one, "") for one in forward.given), strict=True))
    before = {name: one.clone() for name, one in tensors.items()}
    outputs = _call(forward, [tensors[of[name]] for name in forward.inputs])
    found = {"result": outputs[0]}
    for backward in rest:
        saved = outputs[1 - len(backward.inputs) :]  # its other argument is the tangent
        for name, one in zip(backward.inputs, saved, strict=False):
            assert name not in of or one is tensors[of[name]], f"{name} is saved as something else"
        gradients = _call(backward, [*saved, tangent.to(dtype)])
        found |= {of[name]: one for name, one in zip(forward.inputs, gradients, strict=True) if one is not None}
    # Backward may write to what forward has saved, but not to this.
    for name, one in tensors.items():
        assert _same(one, before[name]), f"{name} is written to"
    return found


def _compare(case: argparse.Namespace, made: Any) -> bool:
    """Print how far eager and the generated code are from eager in float64, in units of the dtype's epsilon."""
    experts, inputs = _inputs(case)
    tangent = torch.randn(case.tokens, case.hidden).to(getattr(torch, case.dtype))
    exact = _eager(case, experts, inputs, tangent, torch.float64)
    eager = _eager(case, experts, inputs, tangent, getattr(torch, case.dtype))
    if isinstance(made, str):
        raise RuntimeError(made)
    found = _generated(case, made, experts, inputs, tangent)
    epsilon = torch.finfo(getattr(torch, case.dtype)).eps
    good = set(found) == set(exact)
    # Sums in another order show in float32; in 16 bits they are hidden by what is rounded between products.
    least = 8.0 if case.dtype == "float32" else 2.0
    said = []
    for name, value in found.items():
        wanted = exact[name]
        scale = max(_largest(wanted), 1e-30) * epsilon
        own, other = (_largest(one.double() - wanted) / scale for one in (value, eager[name]))
        fine = value.shape == wanted.shape and own <= max(3 * other, least)  # false for NaN
        good = good and fine
        said.append(f"{name} {own:.2f} ({other:.2f}){'' if fine else ' WRONG'}")
    print(f"  {', '.join(said)}{'' if good else f'  BAD {sorted(set(exact) ^ set(found))}'}", flush=True)
    return good


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def main() -> None:
    given = sys.argv[1:]
    cases = _cases(given)
    if "_CUDA_STUBS" in os.environ:
        _generate(cases, int(os.environ["_CUDA_CODE"]))
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    reader, writer = os.pipe()
    environment = {**stubbed(), "_CUDA_CODE": str(writer)}
    generator = subprocess.Popen([sys.executable, *sys.argv], env=environment, pass_fds=[writer])
    os.close(writer)
    _interpret()
    bad = 0
    with open(reader, "rb") as source:
        for case in cases:
            print(" ".join(f"{name}={value}" for name, value in vars(case).items() if value), flush=True)
            try:
                bad += not _compare(case, pickle.load(source))
            except Exception:
                bad += 1
                print("  " + "\n  ".join(traceback.format_exc(-6).splitlines()), flush=True)
    generator.wait()
    print(f"{len(cases)} cases, {bad} bad")
    sys.exit(bad > 0)


if __name__ == "__main__":
    import moe_rewrite  # noqa: F401  its operators

    main()
