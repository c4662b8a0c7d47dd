"""Engines: what computes a model's forward pass; the fastest one that agrees with the original, made once for a node.

    ModelSettings ─ plan ─→ Plan(engine, precision) ─ key ─→ the cache's folder ─┬─ there: Made, to be loaded at once
                                                                                └─ not there: make it, in another process
    ┌──────────── make: one process at a time, by a lock ─────────────┐
    │ actors.exporter:        YOLO.export → checked against the .pt   │ ─→ KEY/manifest.json beside the export,
    └───── in a folder of another name, which is renamed at last ─────┘    with the verdict, whatever it is

The cache is ``YOLOFLEET_CACHE_DIR``, else ``yolofleet/engines`` in the user's cache folder. Deleting it costs nothing but
the making. A verdict holds for the content of the weights, the precision, this hardware and the versions of what computes
and checks: all of them are in the key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from actors.errors import ModelError
from actors.settings import ModelSettings
from actors.weights import hash_weights

EngineName = Literal["torch", "openvino", "onnx", "tensorrt"]
EnginePrecision = Literal["fp32", "fp16", "int8"]

NEEDS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "openvino": ("openvino",),
    "onnx": ("onnx", "onnxruntime"),
    "tensorrt": ("tensorrt", "onnx"),
}
"""The modules that exporting to and running an engine takes."""

EXTRAS = {"onnx": " with yolofleet[onnx]", "tensorrt": " with yolofleet[gpu]"}
PACKAGES = (
    "yolofleet",
    "ultralytics-opencv-headless",
    "torch",
    "openvino",
    "nncf",
    "onnx",
    "onnxslim",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
)
OWN_CODE = ("exporter", "verify", "evaluate", "images", "model", "predictor", "openvino_engine")
MANIFEST = "manifest.json"
CACHE_VARIABLE = "YOLOFLEET_CACHE_DIR"
EXPORT_TIMEOUT_S = 3600.0  # building for TensorRT takes minutes, fitting to int8 a pass over its images
BACKGROUND_NICENESS = 10  # a tenth of a core that others want all of; at 19 it would take minutes beside a busy replica
LEFTOVER_S = 2 * EXPORT_TIMEOUT_S

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What shall compute, why, and whether on a GPU."""

    engine: EngineName
    precision: EnginePrecision
    why: str
    cuda: bool

    @property
    def original(self) -> bool:
        """Whether this is what the weights are by themselves: nothing to make, nothing to check."""
        return self.engine == "torch" and self.precision == "fp32"


@dataclass(frozen=True, slots=True)
class Made:
    """An engine that is in the cache.

    Attributes:
        plan: what was to be made.
        path: the exported file or folder; None for torch at another precision, which exports nothing.
        agrees: whether it may be used.
        verdict: the sentence of the check.
        numbers: what the check has measured.
    """

    plan: Plan
    path: Path | None
    agrees: bool
    verdict: str
    numbers: dict[str, Any]

    @property
    def reason(self) -> str:
        """Why this engine, for ``/models`` and the log."""
        return f"{self.plan.why}; {self.verdict}"


def plan(settings: ModelSettings, *, gpu: bool = True) -> Plan | None:
    """What shall compute ``settings.weights`` on this machine; None where the weights are an engine already.

    Args:
        settings: the weights, and what is asked for.
        gpu: whether a GPU may be used, if there is one.

    Raises:
        ModelError: the settings ask for what these weights, this machine or its packages cannot do.
    """
    if settings.weights.startswith("fake:") or Path(settings.weights).suffix != ".pt":
        harmless = ("auto", "torch") if settings.weights.startswith("fake:") else ("auto",)  # torch: as it runs anywhere
        if settings.engine not in harmless or settings.precision != "auto":
            raise ModelError(
                f"{settings.weights} are an engine of their own, to which 'engine' and 'precision' do not apply:"
                " leave them out, or give .pt weights"
            )
        return None
    cuda = gpu and _on_cuda()
    engine, why = _engine(settings, cuda)
    precision: EnginePrecision = settings.precision if settings.precision != "auto" else ("fp16" if cuda else "fp32")
    if engine == "torch" and precision == "int8":
        raise ModelError("precision int8 is not for torch: leave 'engine' out, or give openvino, onnx or tensorrt")
    if precision == "fp16" and not cuda:  # 16 bits that are fast on a CPU are bf16, whose detections are others
        raise ModelError("precision fp16 needs a GPU: leave 'precision' out, or give int8 and 'calibrate'")
    if engine == "openvino" and precision == "int8" and not find_spec("nncf"):
        raise ModelError("int8 with OpenVINO needs nncf: install yolofleet[int8]")
    return Plan(engine, precision, why, cuda)


def _engine(settings: ModelSettings, cuda: bool) -> tuple[EngineName, str]:
    if settings.engine != "auto":
        lacking = [module for module in NEEDS[settings.engine] if not find_spec(module)]
        if lacking:
            raise ModelError(
                f"engine {settings.engine} needs {' and '.join(lacking)}: install {'it' if len(lacking) == 1 else 'them'}"
                f"{EXTRAS.get(settings.engine, '')}, or leave 'engine' out"
            )
        if settings.engine == "tensorrt" and not cuda:
            raise ModelError("engine tensorrt needs an NVIDIA GPU: leave 'engine' out")
        return settings.engine, "as the settings ask"
    candidates: tuple[EngineName, ...] = ("tensorrt",) if cuda else ("openvino", "onnx")
    for candidate in candidates:
        if all(find_spec(module) for module in NEEDS[candidate]):
            return candidate, f"the fastest on this {'GPU' if cuda else 'CPU'}"
    return "torch", f"the only one installed for this {'GPU' if cuda else 'CPU'}"


def made(settings: ModelSettings, wanted: Plan) -> Made | None:
    """The engine, if it is in the cache.

    Raises:
        ModelError: there are no such weights.
    """
    return _read(wanted, cache_folder() / _key(settings, wanted, hash_weights(Path(settings.weights))))


def make(settings: ModelSettings, wanted: Plan, *, background: bool = False) -> Made:
    """The engine, made if it is not in the cache; whoever else makes it is waited for.

    Args:
        settings: the weights.
        wanted: the engine.
        background: take only a small share of the CPU, as somebody is answering meanwhile.

    Raises:
        ModelError: it cannot be exported, or the cache cannot be written to.
    """
    sha256 = hash_weights(Path(settings.weights))
    root, key = cache_folder(), _key(settings, wanted, sha256)
    pinned = settings if settings.sha256 else settings.model_copy(update={"sha256": sha256})
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            return _read(wanted, root / key) or _export(pinned, wanted, root / key, background)
    except OSError as error:
        raise ModelError(
            f"Engines cannot be kept in {root} ({error}): set {CACHE_VARIABLE} to a folder that can be written"
        ) from error


def cache_folder() -> Path:
    """Where this node keeps its engines."""
    chosen = os.environ.get(CACHE_VARIABLE)
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(chosen) if chosen else user / "yolofleet" / "engines"


def _export(settings: ModelSettings, wanted: Plan, folder: Path, background: bool) -> Made:
    """Make the engine in a folder of another name, by another process, and let it appear whole.

    The settings pin the weights whose key names ``folder``: others that replace them meanwhile are refused.
    """
    _sweep(folder.parent)
    if folder.exists():  # what an interrupted removal or a power loss has left, or another machine has made just now
        if found := _read(wanted, folder):
            return found
        shutil.rmtree(folder)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    scratch.mkdir()
    order = {
        "settings": settings.model_dump(mode="json", include=set(ModelSettings.model_fields)),  # a served one has more
        "plan": asdict(wanted),
        "folder": str(scratch),
        "niceness": BACKGROUND_NICENESS if background else 0,
    }
    environment = (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_WAIT_POLICY": "passive",  # somebody else may need the cores: threads that wait must not spin
            "YOLO_AUTOINSTALL": "false",
        }
        | ({} if wanted.cuda else {"CUDA_VISIBLE_DEVICES": ""})
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "actors.exporter", json.dumps(order)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=EXPORT_TIMEOUT_S,
            check=False,
        )
        if done.returncode or not (scratch / MANIFEST).is_file():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            log.info("the process that made it said: %s", "\n".join(said))
            raise ModelError(f"{wanted.engine} {wanted.precision} could not be made: {said[-1] if said else done.returncode}")
        _to_disk(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not _read(wanted, folder):  # else another machine, which shares the folder, was first
                raise
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{wanted.engine} {wanted.precision} was not made in {EXPORT_TIMEOUT_S:g} s") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = _read(wanted, folder)
    if found is None:
        raise ModelError(f"The engine in {folder} vanished while it was made: is somebody clearing the cache?")
    return found


def _read(wanted: Plan, folder: Path) -> Made | None:
    """What the folder's manifest tells; None if it is missing or cut off, or its export is gone."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        path = folder / manifest["file"] if manifest["file"] else None
        found = Made(wanted, path, manifest["agrees"], manifest["verdict"], manifest["numbers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if path is None or path.exists() else None


def _to_disk(folder: Path) -> None:
    """Have all of it written, so that a power loss after its renaming leaves nothing empty."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sweep(root: Path) -> None:
    """Remove what makers left half-written that have died."""
    for folder in root.glob(".*.*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > LEFTOVER_S:
            shutil.rmtree(folder, ignore_errors=True)


def _key(settings: ModelSettings, wanted: Plan, sha256: str) -> str:
    """The name of an engine's folder: all that decides what it computes and whether that was found to agree."""
    made_of = {
        "weights": sha256,
        "sides": "free",
        "batch": settings.max_batch if wanted.engine == "tensorrt" else None,
        "calibration": digest_of_folder(Path(settings.calibrate)) if settings.calibrate else None,
        "hardware": _hardware(wanted.cuda),
        "versions": {name: _version(name) for name in PACKAGES},
        "made_by": _own_code(),
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return f"{wanted.engine}-{wanted.precision}-{digest[:24]}"


def digest_of_folder(folder: Path) -> str:
    """What stands for the images that int8 is fitted to and their labels: names, sizes and times of change.

    The labels are where ``evaluate.yolo_labels`` looks for them: in the folder itself, or in ``labels`` beside ``images``.

    Raises:
        ModelError: there is no such folder.
    """
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}: give 'calibrate' a folder of images")
    head, images, tail = f"{folder}/".rpartition("/images/")
    labels = sorted(Path(f"{head}/labels/{tail}").rglob("*.txt")) if images else []
    files = (path for path in (*sorted(folder.rglob("*")), *labels) if path.is_file())
    states = [(os.path.relpath(path, folder), path.stat()) for path in files]
    return hashlib.sha256(json.dumps([(name, at.st_size, at.st_mtime_ns) for name, at in states]).encode()).hexdigest()


@cache
def _on_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _hardware(cuda: bool) -> str:
    """The GPU with its driver, or the processor with its instructions."""
    if cuda:
        import torch

        driver = Path("/proc/driver/nvidia/version")
        return f"{torch.cuda.get_device_name()} {driver.read_text() if driver.exists() else ''}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    named = {line.partition(":")[0].strip(): line for line in lines}
    return " ".join([platform.machine(), *(named[name] for name in ("model name", "flags", "Features") if name in named)])


@cache
def _own_code() -> str:
    """What exports and checks."""
    digest = hashlib.sha256()
    for module in OWN_CODE:
        digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
