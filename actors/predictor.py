"""Ultralytics' predictor, set up for one actor: on the runtime that its weights are for, and on the actor's own threads.

weights ─ load_predictor ─→ a predictor that was used once, so that its arguments, device and transforms are final
"""

from __future__ import annotations

import json
import logging
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import numpy as np

from actors.errors import FleetError, ModelError
from actors.schemas import TASKS, Precision

if TYPE_CHECKING:
    from actors.openvino_engine import OpenVINOStreams

_patching = threading.Lock()


def load_predictor(weights: Path, threads: int, **arguments: Any) -> Any:
    """A predictor, set up and used once.

    Args:
        weights: whatever ``ultralytics.YOLO`` loads.
        threads: CPU threads of the engine.
        arguments: of ``YOLO.predict``, to start with.

    Raises:
        ModelError: the weights are of a task that is not served, or Ultralytics cannot load them.
    """
    import torch
    import ultralytics
    from ultralytics.utils.events import events

    events.enabled = False  # no usage reports from a server
    ultralytics.utils.LOGGER.setLevel(logging.WARNING)
    try:
        with _on_threads(threads):
            model = ultralytics.YOLO(str(weights))
            if model.task not in TASKS:
                raise ModelError(f"{weights} is a model for '{model.task}'; served are {', '.join(TASKS)}")
            image = np.zeros((64, 64, 3), np.uint8)
            model.predict(image, verbose=False, save=False, **arguments)  # which makes its predictor
    except FleetError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"ultralytics.YOLO cannot load {weights}: {reason}") from error
    torch.set_num_threads(threads)  # last: select_device sets it to the machine's cores
    predictor: Any = model.predictor
    if model.task != "classify":
        predictor.pre_transform = lambda images: images  # letterboxed already, by prepare()
    return predictor


def exported(weights: Path, *, engine: str, precision: str, imgsz: tuple[int, int], batch: int, data: Path | None) -> Path:
    """Export ``weights`` beside themselves; both sides of the input stay free.

    The head is the one that ``YOLO.predict`` takes, without suppression, which stays Ultralytics' own for every engine.

    Args:
        weights: a ``.pt`` file.
        engine: openvino, onnx or tensorrt.
        precision: fp32, fp16 or int8.
        imgsz: the default letterbox target, (height, width).
        batch: most images at once, where the engine has to know.
        data: Ultralytics' description of the images that int8 is fitted to.

    Raises:
        ModelError: Ultralytics cannot export them.
    """
    import ultralytics

    try:
        path = ultralytics.YOLO(str(weights)).export(
            format={"tensorrt": "engine"}.get(engine, engine),
            quantize={"fp32": None, "fp16": 16, "int8": 8}[precision],
            imgsz=list(imgsz),
            dynamic=True,
            batch=batch,
            device=0 if engine == "tensorrt" else "cpu",
            verbose=False,
            **({"simplify": bool(find_spec("onnxslim"))} if engine in ("onnx", "tensorrt") else {}),
            **({"data": str(data)} if data else {}),
        )
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"Ultralytics cannot export {weights} to {engine} {precision}: {reason}") from error
    return Path(path)


def exported_imgsz(export: Path) -> list[int]:
    """The letterbox target that an export was made for; with free sides Ultralytics would take its own default."""
    from ultralytics.nn.backends.base import BaseBackend

    imgsz = BaseBackend.read_metadata(export)["imgsz"]  # text in some formats
    return [int(side) for side in (json.loads(imgsz) if isinstance(imgsz, str) else imgsz)]


@contextmanager
def _on_threads(threads: int) -> Iterator[None]:
    """Have AutoBackend start its runtimes on ``threads`` CPU threads, for which it has no argument."""
    from ultralytics.nn.autobackend import AutoBackend

    backends: dict[str, Any] = {}
    if find_spec("openvino"):
        from actors.openvino_engine import OpenVINOStreams

        backends["openvino"] = partial(OpenVINOStreams, threads=threads)
    if find_spec("onnxruntime"):
        backends["onnx"] = partial(AutoBackend._BACKEND_MAP["onnx"], session_options=_session_options(threads))
    runtimes = patch.dict(AutoBackend._BACKEND_MAP, backends)
    with _patching, runtimes, patch.object(AutoBackend, "warmup", _warm_up_of(AutoBackend)):
        yield


def _warm_up_of(auto_backend: Any) -> Callable[..., None]:
    """``AutoBackend.warmup`` without what it does on a CPU, if that can be spared: it imports torchvision.

    That takes 1.2 s, for PyTorch's compiler. Ultralytics suppresses by ``torchvision.ops.nms`` where torchvision has been
    imported, else by ``TorchNMS.nms``, which is slower. Behind the first is an operator that a library of 1 ms brings along.
    """
    import torch
    from ultralytics.utils.nms import TorchNMS

    original = auto_backend.warmup
    torchvision = find_spec("torchvision")  # which does not import it
    libraries = list(Path(torchvision.origin).parent.glob("_C*")) if torchvision and torchvision.origin else []
    if len(libraries) != 1:
        return cast("Callable[..., None]", original)
    torch.ops.load_library(str(libraries[0]))
    TorchNMS.nms = staticmethod(torch.ops.torchvision.nms)

    def warm_up(backend: Any, *args: Any, **kwargs: Any) -> None:
        if backend.device.type != "cpu":
            original(backend, *args, **kwargs)

    return warm_up


def _session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait for each other in a loop halve the throughput when anything else takes one of the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def streams_of(backend: Any) -> OpenVINOStreams | None:
    """What computes image by image, if the weights are for an engine that does."""
    inner = backend.backend
    return inner if getattr(inner, "one_by_one", False) else None


def precision_of(backend: Any) -> Precision:
    """What the engine computes in: torch tells it itself, an export by the arguments of ``YOLO.export`` in its metadata."""
    if backend.fp16:
        return "fp16"
    if backend.format == "pt":
        return "fp32"
    arguments = getattr(backend, "metadata", {}).get("args", {})
    if not {"quantize", "half", "int8"} & set(arguments):
        return "unknown"
    quantize = arguments.get("quantize") or (8 if arguments.get("int8") else 16 if arguments.get("half") else 32)
    known: dict[Any, Precision] = {8: "int8", "w8a16": "int8", "w8a32": "int8", 16: "fp16", 32: "fp32"}
    return known.get(quantize, "unknown")


def versions() -> dict[str, str]:
    """Versions that decide the answers, under the keys that Ultralytics' own API has for them."""
    import torch
    import ultralytics

    return {
        "yolofleet": version("yolofleet"),
        "ultralytics": ultralytics.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
