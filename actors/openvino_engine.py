"""OpenVINO as an actor wants it: on the cores that are its own, image by image on streams of one thread each.

    (n, 3, h, w) ─┬─ n images: n requests, on as many one-thread streams as there are threads ─┐
                  └─ the last one, if it would be alone: all threads on it together ───────────┴─→ outputs, (n, …) each

Why: threads that share an image wait for each other at every layer, and for whoever else has a core just then; streams do
not. A request per image also costs less than one over a batch, whose activations leave the caches.

A form of the model that is compiled for one shape computes up to a fifth cheaper than one with free sides; compiling it costs
as much as several images, and memory. So free sides answer first, and a shape that comes often gets a form of its own.

Plugs into Ultralytics' ``AutoBackend``; letterbox, suppression and scaling stay Ultralytics' own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from ultralytics.nn.backends import OpenVINOBackend

OFTEN = 64  # images of a shape, after which compiling for it pays: 0.3 s of CPU, for about 5 ms less an image
KEPT_SHAPES = 3  # compiled forms, the least recently used goes first: each holds about 70 MB
KEPT_SHAPES_ALONE = 12  # where free sides cannot be computed, so that every shape needs a form of its own

Array = NDArray[np.float32]


class OpenVINOStreams(OpenVINOBackend):  # type: ignore[misc]
    """Ultralytics' OpenVINO backend with the module's way of running.

    Args:
        weight: an exported folder.
        device: as AutoBackend gives it; this backend is for the CPU.
        fp16: of the inputs; never, here.
        threads: CPU threads, which are the streams too.
    """

    def __init__(self, weight: str | Path, device: Any, fp16: bool = False, *, threads: int) -> None:
        self._threads = threads
        self._images = Counter[tuple[int, ...]]()
        self._shaped: OrderedDict[tuple[int, ...], _Compiled] = OrderedDict()
        super().__init__(weight, torch.device("cpu"), False)

    def load_model(self, weight: str | Path) -> None:
        """Read the folder's model and compile it with the sides that it has."""
        folder = Path(weight)
        self._xml = folder if folder.is_file() else next(folder.glob("*.xml"))
        self.apply_metadata(self.read_metadata(self._xml))
        self._core = openvino.Core()
        model = self._core.read_model(self._xml)
        shape = model.input().partial_shape
        self._one_by_one = shape[0].is_dynamic or shape[0].get_length() == 1
        self._free_sides = shape[2].is_dynamic and shape[3].is_dynamic
        self._free = None if _crashes_with_free_sides(model) else _Compiled(self._core, model, self._threads)

    def forward(self, im: torch.Tensor) -> list[Array]:
        """The outputs of a batch.

        Args:
            im: (n, 3, h, w) float32 RGB from 0 to 1.

        Returns:
            The model's outputs in their order, (n, …) each.
        """
        inputs = np.ascontiguousarray(im.numpy(), np.float32)
        pieces = [inputs[index : index + 1] for index in range(len(inputs))] if self._one_by_one else [inputs]
        found = self._form(inputs.shape[1:], len(inputs)).run(pieces)
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]  # a copy, as requests are used again

    def _form(self, shape: tuple[int, ...], images: int) -> _Compiled:
        """What is compiled for (3, h, w), or free sides as long as that shape is rare."""
        if shape in self._shaped:
            self._shaped.move_to_end(shape)
            return self._shaped[shape]
        self._images[shape] += images
        rare = not (self._free_sides and self._one_by_one) or self._images[shape] < OFTEN
        if self._free is not None and rare:
            return self._free
        model = self._core.read_model(self._xml)
        model.reshape([1, *shape])
        self._shaped[shape] = _Compiled(self._core, model, self._threads)
        if len(self._shaped) > (KEPT_SHAPES if self._free else KEPT_SHAPES_ALONE):
            gone, _ = self._shaped.popitem(last=False)
            del self._images[gone]
        return self._shaped[shape]


def _crashes_with_free_sides(model: openvino.Model) -> bool:
    """Whether it is an int8 model on a CPU with AMX: https://github.com/openvinotoolkit/openvino/issues/37577."""
    cpuinfo = Path("/proc/cpuinfo")
    return (
        bool(model.input().partial_shape.is_dynamic)
        and any(operation.get_type_name() == "FakeQuantize" for operation in model.get_ops())
        and cpuinfo.exists()
        and "amx_int8" in cpuinfo.read_text()
    )


class _Compiled:
    """A model compiled for streams of one thread each, and for all threads together: both when they are first needed."""

    def __init__(self, core: openvino.Core, model: openvino.Model, threads: int) -> None:
        self._core, self._model, self._threads = core, model, threads
        self._requests: list[openvino.InferRequest] = []

    @cached_property
    def _streams(self) -> openvino.CompiledModel:
        return self._compiled(self._threads)

    @cached_property
    def _together(self) -> openvino.InferRequest:
        return self._compiled(1).create_infer_request()

    def _compiled(self, streams: int) -> openvino.CompiledModel:
        properties = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": self._threads,
            "ENABLE_CPU_PINNING": False,  # every one-thread process would pin itself to the first core
            "INFERENCE_PRECISION_HINT": "f32",  # else bf16, wherever the CPU has it: half the time, and other detections
        }
        return self._core.compile_model(self._model, "CPU", properties)

    def run(self, pieces: Sequence[Array]) -> list[list[Array]]:
        """The outputs of each piece, in order, which the next run overwrites."""
        alone = self._threads > 1 and len(pieces) % self._threads == 1
        several = pieces[:-1] if alone else pieces
        while len(self._requests) < len(several):
            self._requests.append(self._streams.create_infer_request())
        busy = self._requests[: len(several)]
        for request, piece in zip(busy, several, strict=True):
            request.start_async({0: piece}, share_inputs=True)
        for request in busy:
            request.wait()
        if alone:
            self._together.infer({0: pieces[-1]}, share_inputs=True)
        used = [*busy, self._together] if alone else busy
        return [[tensor.data for tensor in request.output_tensors] for request in used]
