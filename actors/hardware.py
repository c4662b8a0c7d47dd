"""What this node has, and what this process takes of it: cores, memory, GPUs. Imports torch only when asked about GPUs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One CUDA GPU; memory in bytes."""

    name: str
    total_memory: int
    free_memory: int


def available_cpus() -> int:
    """Cores that this process may run on: fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_devices() -> list[CudaDevice]:
    """The CUDA GPUs that torch can use; empty without any."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        devices.append(CudaDevice(torch.cuda.get_device_name(index), total, free))
    return devices


def cap_gpu_memory(limit: int) -> None:
    """From now on torch allocates at most ``limit`` bytes of the first GPU for this process; beyond it is out of memory."""
    import torch

    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction(min(max(limit / total, 0.0), 1.0), 0)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether torch has raised this for want of GPU memory."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)


def gpu_process_bytes() -> int | None:
    """What the driver counts for this process on the first GPU, CUDA's context and engines beside torch included.

    None where it does not tell: without a GPU, on a part of one (MIG), in a container that has process ids of its own.
    """
    import pynvml
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
    except pynvml.NVMLError:
        return None
    return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)


def gpu_memory_bytes() -> int | None:
    """GPU memory that torch has reserved for this process; None where torch is not loaded or has no GPU."""
    return _reserved("memory_reserved")


def step_back() -> None:
    """Let this thread, and those that it starts from now on, run only where nobody else wants the core.

    Linux has a scheduling class for that, sched(7) SCHED_IDLE; elsewhere the whole process gets the lowest priority.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def gpu_peak_bytes() -> int | None:
    """The most GPU memory that torch has reserved for this process so far; None where torch is not loaded or has no GPU."""
    return _reserved("max_memory_reserved")


def memory_bytes() -> int:
    """What this process has in memory now: its resident set."""
    return int(psutil.Process().memory_info().rss)


def node_memory() -> tuple[int, int]:
    """Bytes that this node has, and those to spare: of the machine, or of the container if that has a limit (cgroup v2)."""
    machine = psutil.virtual_memory()
    total, spare = int(machine.total), int(machine.available)
    try:
        limit, taken = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        return total, spare
    reclaimable = int(statistics.get("inactive_file", 0))
    return min(total, limit), min(spare, max(limit - taken + reclaimable, 0))


def _reserved(measure: str) -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(sum(getattr(torch.cuda, measure)(index) for index in range(torch.cuda.device_count())))
