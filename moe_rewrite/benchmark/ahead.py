"""Compile beforehand, in processes of their own side by side, into the caches of inductor and Triton.

What ``max-autotune`` modes measure would be wrong while others use the GPU. Their workers have an inductor cache that
is thrown away: only the compiled Triton kernels stay, and the tuning itself is done later, alone.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from moe_rewrite.benchmark import compiler, measure, output
from moe_rewrite.benchmark.compiler import OURS
from moe_rewrite.benchmark.settings import Settings
from moe_rewrite.benchmark.variants import THEIRS, Variant

PROCESS_BYTES = 2 << 30  # what a process takes of a device besides tensors: its context, workspaces


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker compiles: the variants of one case that share a mode.

    Attributes:
        case: the case's label.
        mode: the mode.
        variants: the variants.
        arguments: the command line that makes the part build this case alone.
        memory: an estimate of the device's bytes that it takes.
    """

    case: str
    mode: str
    variants: Sequence[Variant]
    arguments: Sequence[str]
    memory: int


class MemoryGate:
    """Lets jobs in as long as their estimates fit together; one that is too large for that runs alone."""

    def __init__(self, size: float) -> None:
        self.size, self.used, self.condition = size, 0.0, threading.Condition()

    @contextmanager
    def enter(self, wanted: float) -> Iterator[None]:
        with self.condition:
            self.condition.wait_for(lambda: self.used == 0 or self.used + wanted <= self.size)
            self.used += wanted
        try:
            yield
        finally:
            with self.condition:
                self.used -= wanted
                self.condition.notify_all()


def compile_ahead(settings: Settings, part: str, jobs: Sequence[Job]) -> dict[tuple[str, Variant], float]:
    """The seconds of the first call of each case and variant that was compiled, without a cache.

    What fails or does not end in time is compiled later, alone.
    """
    if not settings.workers or not jobs:
        return {}
    compiler.share_triton_cache()
    gate = MemoryGate(0.8 * (measure.device_memory(settings.device) or float("inf")))
    deadline = time.perf_counter() + min(settings.ahead_seconds, settings.budget.left)
    threads = max(1, (os.cpu_count() or 1) // settings.workers)
    seconds: dict[tuple[str, Variant], float] = {}

    def work(job: Job) -> None:
        with gate.enter(job.memory + PROCESS_BYTES), tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
            if job.mode.startswith("max-autotune"):
                environment["TORCHINDUCTOR_CACHE_DIR"] = folder
            left = deadline - time.perf_counter()
            found = _run(_command(settings, part, job), environment, left) if left > 0 else {}
        seconds.update({(job.case, v): found[v.name] for v in job.variants if v.name in found})
        output.progress(f"compiled ahead: {job.case} {job.mode}, {len(found)} of {len(job.variants)} variants")

    with ThreadPoolExecutor(settings.workers) as pool:
        list(pool.map(work, jobs))
    return seconds


def first_call_alone(variant: Variant, action: measure.Action, device: torch.device) -> None:
    """In a worker: call once, and print the variant's name and the seconds. What fails is said, and left for later."""
    measure.release(device)
    try:
        output.say(f"{variant.name} {measure.seconds_of(action, device)}")
    except Exception as error:
        print(f"{variant.name}: {output.reason(error)}", file=sys.stderr, flush=True)


def _command(settings: Settings, part: str, job: Job) -> list[str]:
    command = [sys.executable, "-m", "moe_rewrite.benchmark", part, "--compile-only", *job.arguments]
    command += ["--variants", *(v.name for v in job.variants), "--modes", job.mode]
    command += ["--device", str(settings.device), "--inner", settings.inner]
    return command + ["--tiny"] * settings.tiny


def _run(command: Sequence[str], environment: dict[str, str], seconds: float) -> dict[str, float]:
    """The seconds that a worker printed for each variant, also where it did not get to its end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            printed, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, errors = process.communicate()
        else:
            if process.returncode != 0 or errors.strip().startswith((OURS, THEIRS)):
                output.progress(f"not compiled ahead: {errors.strip()[-300:]}")
    words = [text.split() for text in printed.splitlines()]
    return {one[0]: float(one[1]) for one in words if len(one) == 2 and one[0].count("/") == 2}
