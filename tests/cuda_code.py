"""The code that inductor generates for an H200, on a machine that has none.

    python tests/cuda_code.py triton --tokens 16              # the calls of a Mixtral block's experts
    python tests/cuda_code.py grouped_mm --backward --whole   # the whole generated files, backward too
    python tests/cuda_code.py --kernels                       # shared memory, registers, instructions of our kernels

It needs a build of torch with CUDA (any of the package index's for Linux but the CPU ones; no driver, no GPU), gcc,
Triton and transformers; it was run with torch 2.11 and triton 3.6. Tensors are fake. What asks the driver is answered
by a stub of two shared libraries, and what asks Python for the properties of the device by those of an H200. Nothing is
executed, so nothing is tuned (``max-autotune`` fails) and no number is checked: it shows how many kernels there are,
what is fused and what is copied.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

_DRIVER = """
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuInit(unsigned flags) { return 0; }
"""
_RUNTIME = """
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -1; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = (void *)16; return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)32; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
"""


def stubbed() -> dict[str, str]:
    """The environment with the stubs in the place of CUDA's libraries."""
    folder = Path(tempfile.mkdtemp(prefix="cuda_stubs"))
    for name, code in (("libcuda.so.1", _DRIVER), ("libruntime.so", _RUNTIME)):
        (folder / f"{name}.c").write_text(code)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / name, folder / f"{name}.c"], check=True)
    paths = {"LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": str(folder / "libruntime.so"), "_CUDA_STUBS": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**environment, **paths}


class H200(types.SimpleNamespace):
    name, major, minor, multi_processor_count, warp_size = "NVIDIA H200", 9, 0, 132, 32
    total_memory, L2_cache_size, gcnArchName = 150 * 2**30, 50 * 2**20, ""
    max_threads_per_multi_processor, max_threads_per_block, regs_per_multiprocessor = 2048, 1024, 65536
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = 49152, 232448, 233472


def pretend() -> None:
    """Answer what torch, inductor and Triton ask about the device."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.config as config
    import torch._inductor.fx_passes.fuse_attention as attention
    import torch._inductor.fx_passes.misc_patterns as patterns
    import torch._inductor.fx_passes.pad_mm as padding
    import torch._subclasses.fake_tensor as fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Nothing:
        def __init__(self, *args: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args: Any) -> None: ...

    def answer(value: Any) -> Any:
        return lambda *args, **kwargs: value

    cuda: Any = torch.cuda
    for name in ("_lazy_init", "init", "synchronize", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, answer(None))
    for name in ("is_available", "is_initialized", "is_bf16_supported", "is_tf32_supported"):
        setattr(cuda, name, answer(True))
    cuda.device_count, cuda.current_device, cuda.get_device_name = answer(1), answer(0), answer(H200.name)
    cuda.get_device_properties, cuda.get_device_capability = answer(H200), answer((9, 0))
    cuda.get_rng_state = answer(torch.empty(16, dtype=torch.uint8))
    cuda.device = cuda.device_of = cuda._DeviceGuard = Nothing
    torch.accelerator.is_available = answer(False)
    fake_tensor.init_gpu_context = answer(None)

    class Worker(interfaces.CudaInterface.Worker):
        get_device_properties, current_device, set_device = map(staticmethod, map(answer, (H200, 0, None)))

    class Interface(interfaces.CudaInterface):
        device = Nothing
        get_device_properties, get_compute_capability = staticmethod(answer(H200)), staticmethod(answer(90))
        device_count, is_available, is_bf16_supported = map(staticmethod, map(answer, (1, True, True)))
        current_device, get_raw_stream, exchange_device, maybe_exchange_device = [staticmethod(answer(0))] * 4
        synchronize, set_device = [staticmethod(answer(None))] * 2

    Interface.Worker = Worker
    interfaces.init_device_reg()
    for name in ("cuda", "cuda:0"):
        interfaces.register_interface_for_device(name, Interface)

    class Driver:
        utils = types.SimpleNamespace(
            get_device_properties=answer({"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}),
            load_binary=answer((0, 0, 32, 0, 1024)),
        )
        get_current_target, get_current_device, get_current_stream = map(answer, (GPUTarget("cuda", 90, 32), 0, 0))
        is_active, get_active_torch_device = answer(True), answer(torch.device("cuda", 0))

        def launcher_cls(self, *args: Any) -> Any:
            return answer(None)

    driver.set_active(Driver())
    # These make tensors on the device to find patterns with.
    attention._sfdp_init = padding._pad_mm_init = patterns._misc_patterns_init = answer(None)
    config.joint_graph_constant_folding = False
    config.compile_threads, config.fx_graph_cache = 1, False


@dataclasses.dataclass
class Graph:
    """What inductor made of one graph.

    Attributes:
        code: the generated file.
        inputs: the names of the arguments of its ``call``.
        given: where the memory is of what that was called with.
    """

    code: str
    inputs: list[str]
    given: list[int] = dataclasses.field(default_factory=list)


def keep_code(graphs: list[Graph]) -> None:
    """Have inductor put what it makes of graphs into ``graphs``, and give fake tensors when they are called."""
    from torch._inductor.graph import GraphLowering

    def compile_to_module(self: Any) -> Any:
        code = self.codegen()[0]
        outputs = self.module.graph.output_node().args[0]
        graph = Graph(getattr(code, "value", code), list(self.graph_input_names))
        graphs.append(graph)

        def like(node: Any) -> Any:
            value = node.meta.get("val") if isinstance(node, torch.fx.Node) else node
            return torch.empty_like(value) if isinstance(value, torch.Tensor) else value

        def call(args: list[Any]) -> list[Any]:
            graph.given = [arg.untyped_storage()._cdata if isinstance(arg, torch.Tensor) else 0 for arg in args]
            return list(map(like, outputs))

        module = types.ModuleType("generated")
        module.call = call
        module.__file__ = __file__
        return module

    GraphLowering.compile_to_module = compile_to_module


def calls_of(code: str) -> str:
    """What a generated file calls, one line each."""
    body = code[code.rindex("def call(") : code.index("def benchmark_compiled_module")]
    shown = re.findall(r"^\s+((?:buf\d+ = |\w+\.run\(|extern_|torch\.ops|aten\.|return ).*)$", body, re.MULTILINE)
    return "\n".join(line[:200] for line in shown)


def experts_of(given: argparse.Namespace) -> torch.nn.Module:
    """A block of experts of transformers with its eager loop, in float32."""
    sizes = {
        "hidden_size": given.hidden,
        "intermediate_size": given.intermediate,
        "num_local_experts": given.num_experts,
    }
    if given.block == "gpt_oss":
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        return GptOssExperts(GptOssConfig(**sizes, experts_implementation="eager"))
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts(MixtralConfig(**sizes, experts_implementation="eager"))


def generate(given: argparse.Namespace) -> tuple[list[Graph], dict[int, str]]:
    """What inductor makes of one block of experts: forward, and backward if asked for; and the name of each input."""
    from torch._subclasses import FakeTensorMode

    from moe_rewrite.lower import launch

    if given.described:
        launch.MUCH_WORK = 0
    graphs: list[Graph] = []
    keep_code(graphs)
    dtype, shape = getattr(torch, given.dtype), (given.tokens, given.top_k)
    with torch.device("meta"):
        experts = experts_of(given).to(dtype)
    options = {"experts": given.experts, "mode": given.mode}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(given.backward):
        experts = experts.to_empty(device="cuda")
        x = torch.empty(given.tokens, given.hidden, device="cuda", dtype=dtype, requires_grad=given.backward)
        ids = torch.empty(shape, device="cuda", dtype=torch.int64)
        weights = torch.empty(shape, device="cuda", dtype=dtype, requires_grad=given.backward)
        run = torch.compile(experts, backend="moe_rewrite", fullgraph=True, dynamic=given.dynamic, options=options)
        result = run(x, ids, weights)
        if given.backward:
            result.sum().backward()
        tensors = {"x": x, "ids": ids, "weights": weights, **dict(experts.named_parameters())}
        names = {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()}
    return graphs, names


def describe_kernels(given: argparse.Namespace) -> None:
    """Compile our kernels as they are launched for some numbers of tokens, and say what came of it."""
    from moe_rewrite.lower import kernels, launch

    tool = glob.glob(os.path.join(os.path.dirname(sys.modules["triton"].__file__), "backends/nvidia/bin/cuobjdump"))
    original = kernels.multiply.__class__.run

    def describe(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = original(kernel, *args, grid=grid, warmup=True, **kwargs)
        ptx = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            used = subprocess.run([*tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        counts = {name: ptx.count(name) for name in ("wgmma.mma_async", "mma.sync", "cp.async.cg", "ld.global")}
        usage = re.findall(r"(REG|STACK):(\d+)", used)
        print(
            f"{kernel.__name__:14} shared {compiled.metadata.shared:7} {dict(usage)} {counts} grid {grid}", flush=True
        )

    kernels.multiply.__class__.run = describe
    dtype = getattr(torch, given.dtype)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(given.tokens, given.hidden, device="cuda", dtype=dtype)
        up = torch.empty(given.num_experts, 2 * given.intermediate, given.hidden, device="cuda", dtype=dtype)
        key = torch.empty(given.tokens * given.top_k, device="cuda", dtype=torch.int64)
        order, _, offsets = launch.sort(key, given.num_experts, seen=False)
        gate_up = list(up.transpose(1, 2).split(given.intermediate, 2))
        sizes = (given.tokens * given.top_k, given.tokens, given.top_k)
        for dispatch in ((order, offsets, None), (None, None, key)):
            how = False, "silu v0;mul v2 v1", dtype, False
            rows = launch.multiply(x, gate_up, [], *dispatch, *sizes, *how, seen=False)
            sizes_down, how = (len(rows), len(rows), 1), (False, "", dtype, False)
            launch.multiply(rows, [gate_up[0].transpose(1, 2)], [], *dispatch, *sizes_down, *how, seen=False)
        launch.outer(x, rows, order, offsets, *sizes[1:], False, False, seen=False)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Say to ``parser`` what a block of experts and its compilation are described by."""
    parser.add_argument("experts", nargs="?", default="auto", help="the experts backend")
    parser.add_argument("--block", default="mixtral", choices=["mixtral", "gpt_oss"])
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--described", action="store_true", help="read by descriptors, however little there is to do")
    parser.add_argument("--mode", default="default")
    parser.add_argument("--dtype", default="bfloat16")
    sizes = {"tokens": 16, "num-experts": 60, "hidden": 2048, "intermediate": 1408, "top-k": 4}  # Qwen1.5-MoE
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--whole", action="store_true", help="print the files, not the calls alone")
    given = parser.parse_args()
    if "_CUDA_STUBS" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], stubbed())
    if torch.version.cuda is None:
        parser.error(f"torch {torch.__version__} is a build without CUDA")
    pretend()
    if given.kernels:
        describe_kernels(given)
        return
    for graph in generate(given)[0]:
        print(graph.code if given.whole else calls_of(graph.code), end="\n\n")


if __name__ == "__main__":
    main()
