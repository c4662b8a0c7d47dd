"""Under which circumstances a figure is measured: without them it says nothing."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("yolofleet", "ray", "torch", "ultralytics-opencv-headless", "openvino", "numpy", "opencv-python-headless")


def circumstances() -> dict[str, Any]:
    """Machine, versions, commit and command, as JSON values; what is not known is null."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "command": " ".join(["yolofleet", *sys.argv[1:]]),
    }


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def fp32_environment() -> dict[str, str]:
    """This process's environment, but that OpenVINO computes in fp32, as yolofleet does: for whoever is compared with it.

    By itself it takes bf16 wherever the CPU has it, in half the time and with other detections: then one would be ahead by a
    shortcut. Ultralytics' loader has no argument for it; this limits its kernels to those that know no bf16. They know no AMX
    either, so that it is not for yolofleet's own processes: they say fp32 to OpenVINO itself, and int8 may take AMX.
    """
    return os.environ | {"OV_CPU_MAX_ISA": "AVX512_CORE_VNNI"}
