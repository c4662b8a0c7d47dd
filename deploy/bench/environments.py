"""Environments of other servers: made by uv from the inline metadata of their scripts (PEP 723), once.

    deploy/bench/peers/NAME.py ─ # /// script ─→ uv venv, uv pip install ─→ cache folder ─→ its python

Whatever decides how fast a model is computed has the same version there as here.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deploy.bench import BenchError

SAME_VERSIONS = ("openvino", "ray", "torch", "torchvision", "ultralytics-opencv-headless")


def python_of(script: Path) -> Path:
    """The interpreter of the script's environment, which is made if it is not there yet.

    Raises:
        BenchError: uv is missing, or cannot install what the script needs.
    """
    constraints = "\n".join(f"{name}=={_installed(name)}" for name in SAME_VERSIONS if _installed(name))
    digest = hashlib.sha256((script.read_text() + constraints).encode()).hexdigest()[:12]
    folder = cache_folder() / "peers" / f"{script.stem}-{digest}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        uv = shutil.which("uv")
        if uv is None:
            raise BenchError("Other servers' environments are made by uv, which is not on the path: pip install uv")
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(constraints)
            file.flush()
            _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)])
            _run([uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(script), "-c", file.name])
        complete.touch()
    return python


def cache_folder() -> Path:
    """Where this machine keeps what may be made again (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolofleet"


def installed_in(python: Path, package: str) -> str:
    """The version of a package in another environment.

    Raises:
        BenchError: it is not there.
    """
    return _run([str(python), "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]).strip()


def _installed(package: str) -> str | None:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def _run(command: list[str]) -> str:
    quickly = os.environ | {"UV_COMPILE_BYTECODE": "0"}  # of gigabytes, most of which nobody imports
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quickly)
    if done.returncode:
        name = " ".join([Path(command[0]).name, *command[1:3]])
        raise BenchError(f"'{name} …' failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    return done.stdout
