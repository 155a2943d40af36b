"""What this machine can do, and what is chosen because of it: device, precision, threads, compiler, measured peak.

Each choice comes with its reason, so that it can be printed; each is overridable from the config.
"""

from __future__ import annotations

import functools
import os
import platform
import resource
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from recipes.common.errors import UserError

GIB = 1024**3
MOST_THREADS = 1024


@dataclass(frozen=True)
class Choice:
    """A setting that the machine decided, with the reason shown to the user."""

    value: bool | int | str
    reason: str


def physical_cores() -> int:
    """Physical cores that this process may use (an affinity mask or a container may leave fewer than there are)."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_threads(asked: int | None) -> Choice:
    """Torch threads for this process: each worker gets its share of the cores, since oversubscribed threads are far slower.

    Raises UserError for a number that no machine has use for (torch takes what fits 32 bits, and starts them all).
    """
    if asked and asked > MOST_THREADS:
        raise UserError(f"run.threads: {asked}, and this machine has {physical_cores()} cores; leave it out")
    if asked:
        return Choice(asked, "run.threads")
    if "OMP_NUM_THREADS" in os.environ and local_world_size() == 1:
        told = os.environ["OMP_NUM_THREADS"]
        if not told.isdigit() or not 1 <= int(told) <= MOST_THREADS:
            raise UserError(f"OMP_NUM_THREADS={told}: give one number, at least 1, or unset it")
        return Choice(int(told), "OMP_NUM_THREADS")
    share = max(1, physical_cores() // local_world_size())
    return Choice(share, f"{physical_cores()} cores / {local_world_size()} process(es)")


@functools.cache
def has_gpu() -> bool:
    """Whether torch sees a CUDA (or ROCm) device."""
    import torch

    return torch.cuda.is_available()


@functools.cache
def choose_bf16() -> Choice:
    """bf16 autocast where the processor multiplies bf16 in hardware; elsewhere it is emulated, and slower than fp32."""
    import torch

    if has_gpu():
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return Choice(supported, f"{torch.cuda.get_device_name()} {'has' if supported else 'lacks'} bf16")
    capabilities = torch.cpu.get_capabilities()
    for instruction in ("amx_bf16", "avx512_bf16"):
        if capabilities.get(instruction):
            return Choice(True, f"this processor has {instruction}")
    return Choice(False, "this processor has neither amx_bf16 nor avx512_bf16")


@functools.cache
def can_compile() -> Choice:
    """torch.compile needs a compiler (C++ on a CPU; on a GPU Triton, and C for its launchers) and Python's headers."""
    missing = []
    if has_gpu():
        import importlib.util

        if importlib.util.find_spec("triton") is None:
            missing.append("Triton is not installed")
        language, variable, names = "C", "CC", ("gcc", "clang", "cc")
    else:
        language, variable, names = "C++", "CXX", ("g++", "clang++", "c++")
    compiler = os.environ.get(variable) or next((name for name in names if shutil.which(name)), None)
    if compiler is None or shutil.which(compiler) is None:
        missing.append(f"no {language} compiler was found (install {names[0]})")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():  # a system's Python comes without; what torch.compile makes is a module of Python's
        missing.append(f"{header} is not there (install python{sysconfig.get_python_version()}-dev)")
    if missing:
        return Choice(False, "; ".join(missing))
    return Choice(True, f"{language} compiler {compiler}")


@functools.cache
def peak_flops(dtype_name: str) -> float:
    """Floating-point operations a second that a large matrix product reaches on this device: what MFU is measured against.

    Takes about half a second. The best of several products, 2 n^3 operations each.
    """
    import torch

    device = torch.device("cuda" if has_gpu() else "cpu")
    n = 8192 if has_gpu() else 2048
    dtype = getattr(torch, dtype_name)
    draw = torch.Generator(device).manual_seed(0)  # its own: once a process, it must not shift the run's random numbers
    a, b = (torch.randn(n, n, device=device, generator=draw).to(dtype) for _ in range(2))
    a @ b  # the first call picks kernels and allocates
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < 0.4:
        if has_gpu():
            torch.cuda.synchronize()
        t = time.perf_counter()
        a @ b
        if has_gpu():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best


def peak_memory_gib() -> float:
    """Most memory this process has held, GiB: of the GPU where there is one, else of the process (resident set)."""
    if "torch" in sys.modules and has_gpu():
        import torch

        return torch.cuda.max_memory_allocated() / GIB
    try:
        with open("/proc/self/status") as lines:  # getrusage's peak is inherited from the process that started this one
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / GIB
    except (OSError, StopIteration):  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def forget_peak_memory() -> None:
    """Count the process's peak from here on, where Linux lets it: one process may run several recipes."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def processor_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an ARM kernel that lists no model name
        return platform.processor() or platform.machine()


def describe() -> dict[str, object]:
    """Hardware and versions for environment.json."""
    import importlib.metadata

    import psutil
    import torch

    packages = (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "tokenizers",
        "deepspeed",
        "diffusers",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # not every recipe needs every library
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": physical_cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpu": torch.cuda.get_device_name() if has_gpu() else None,
        "gpus": torch.cuda.device_count(),
        "versions": versions,
    }
