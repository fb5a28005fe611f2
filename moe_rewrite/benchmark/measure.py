"""How long a call takes, by the device's clock where it has one; how much memory; CUDA graphs captured by hand."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moe_rewrite.benchmark import compiler

Action = Callable[[], Any]
Row = dict[str, Any]
WARM_UP = 4  # calls after the first one and before the timed ones; inductor records its CUDA graphs in them
MAX_SECONDS = 3.0  # after which a slow variant is not called again
FLUSHED_BYTES = 256 << 20  # several times the second-level cache


class Inputs(Protocol):
    """The inputs of a call, whose values can be replaced in place."""

    def leaves(self) -> Any: ...

    def copy_(self, other: Any) -> None: ...


Given = TypeVar("Given", bound=Inputs)


class Budget:
    """The seconds a run may take, counted from the start of the process's benchmark."""

    def __init__(self, seconds: float = float("inf")) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed

    @property
    def spent(self) -> bool:
        return self.left <= 0


def on_gpu(device: torch.device) -> bool:
    return bool(device.type == "cuda")


def synchronize(device: torch.device) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Drop compiled code, CUDA graphs and cached memory, so that variants do not add up."""
    compiler.forget()
    if on_gpu(device):
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def device_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory; None for a CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if on_gpu(device) else None


def seconds_of(action: Action, device: torch.device) -> float:
    """How long ``action`` takes, by the host's clock."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def milliseconds(action: Action, device: torch.device, just_before: Action | None = None) -> float:
    """How long ``action`` takes, by the device's clock.

    The device is idle when it begins, unless ``just_before`` gave it work: that hides how long a launch takes.
    """
    if not on_gpu(device):
        return seconds_of(action, device) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if just_before is not None:
        just_before()
    begin.record()
    action()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def first_call(action: Action, device: torch.device) -> Row:
    """Call once, and tell what is known of the compilation. To be called after :func:`release`."""
    with compiler.rewritten_loops() as loops:
        row: Row = {"compile_s": seconds_of(action, device)}
    return row | {"loops": dict(loops), "dynamo_s": compiler.dynamo_seconds(), "cache_hit": compiler.cache_hit()}


def plain_calls(action: Action, repeats: int, device: torch.device, rewind: Action = lambda: None) -> Row:
    """Medians of single calls and of calls back to back, and the most memory allocated meanwhile.

    Args:
        action: the call, compiled already.
        repeats: timed calls; fewer where a call is slow, but three at least.
        device: where it runs.
        rewind: untimed, before each measurement.
    """
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    budget = Budget(MAX_SECONDS)
    rewind()
    for _ in range(WARM_UP):
        action()
    times: list[float] = []
    while len(times) < min(3, repeats) or (len(times) < repeats and not budget.spent):
        rewind()
        times.append(milliseconds(action, device))
    half = max(1, len(times) // 2)

    def several() -> None:
        for _ in range(half):
            action()

    rewind()
    together = milliseconds(several, device) / half
    row: Row = {"ms": statistics.median(times), "b2b_ms": together, "times_ms": times}
    if on_gpu(device):
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def allocated_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / 2**30 if on_gpu(device) else 0.0


class Replay:
    """A CUDA graph of a call, captured by hand, replayed with ever other inputs and with the caches flushed before.

    Args:
        call: the call, compiled already.
        inputs: what it takes, of one size; replays take turns with them.
        flushed: ``FLUSHED_BYTES`` of memory on the device, which is read before each replay. (Written, it would have to
            leave the cache for memory while the replay is timed.)
    """

    def __init__(self, call: Callable[[Given], Any], inputs: Sequence[Given], flushed: Tensor) -> None:
        self.flushed, self.device = flushed, flushed.device
        self.static, self.rotation = inputs[0].leaves(), itertools.cycle(inputs)
        device = self.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call(self.static)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = call(self.static)

    def _next_inputs(self) -> None:
        self.static.copy_(next(self.rotation))
        self.flushed.amax()

    def time(self) -> float:
        """Milliseconds of one replay."""
        return milliseconds(self.graph.replay, self.device, self._next_inputs)


class Timed(Protocol):
    def time(self) -> float: ...


def interleaved(replays: Mapping[str, Timed], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` replays of each. They take turns, so that a change of clocks falls on all."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(repeats + 1):
        for name, replay in replays.items():
            once = replay.time()
            if turn:  # the first turn warms up
                times[name].append(once)
    return times
