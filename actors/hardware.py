"""What this node has: cores it may use, GPUs with their memory. Imports torch, but only when asked about GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass


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
