"""Weights → what others compute them with: Ultralytics' own exports, made for a measurement, loaded by ``YOLO`` as well."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from deploy.bench import BenchError

_EXPORT = """
import sys
from ultralytics import YOLO
print(YOLO(sys.argv[1]).export(format=sys.argv[2], dynamic=sys.argv[3] == "dynamic"))
"""


def export(weights: Path, form: Literal["openvino", "onnx"], folder: Path, *, dynamic: bool) -> Path:
    """Export ``.pt`` weights into ``folder``, in a process of its own.

    Args:
        weights: the file, which is copied first: exports lie beside it.
        form: as ``YOLO.export`` calls it.
        folder: where the export goes.
        dynamic: whether it takes images of any shape.

    Raises:
        BenchError: Ultralytics cannot export them.
    """
    copy = folder / weights.name
    if not copy.exists():
        shutil.copy(weights, copy)
    command = [sys.executable, "-c", _EXPORT, str(copy), form, "dynamic" if dynamic else "fixed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"Cannot export {weights.name} to {form}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return Path(done.stdout.strip().splitlines()[-1])
