"""OpenVINO as an actor wants it: on the cores that are its own, image by image on streams of one thread each.

    take ─→ (1, 3, h, w) ─┬─ beside others: on one of as many one-thread streams as there are threads ─┬─→ outputs, each as
     whenever a stream    └─ nothing else is there: all threads on it together ────────────────────────┘   it is computed
     is about to be free     two forms of the model, compiled separately, for free sides or for one shape

Why: threads that share an image wait for each other at every layer, and for whoever else has a core just then; streams do
not. A request per image also costs less than one over a batch, whose activations leave the caches, and does not wait for
the slowest of a batch, nor for others of its own shape.

A form of the model that is compiled for one shape computes up to a fifth cheaper than one with free sides; compiling it costs
as much as several images, and memory. So free sides answer first, and a shape that comes often gets a form of its own, on a
thread beside them: no image waits for it, but where the sides cannot be left free.

Plugs into Ultralytics' ``AutoBackend``; letterbox, suppression and scaling stay Ultralytics' own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from ultralytics.nn.backends import OpenVINOBackend

EARLY = 8  # images of a shape, after which it gets a form of its own where there is room for one
OFTEN = 64  # the same where another form has to go, and twice as many as that one's: 0.2 s of CPU, for 5 ms less an image
KEPT_SHAPES = 3  # for images alone, 55 MB each (yolo26n), and as many for images beside others, 100 MB on two streams
KEPT_SHAPES_ALONE = 12  # where free sides cannot be computed, so that every shape needs a form of its own
MEMORY = 1024  # images, after which those before count half
TINY = 128 * 128  # pixels: an image of so few gains nothing, and health checks would get a form of their own
LOOK_S = 0.5  # how often for an image that has failed, whose end nobody tells

Array = NDArray[np.float32]
Shape = tuple[int, ...]
Use = tuple[Shape, int]
"""A shape (3, h, w) or FREE, and the streams that the threads are shared by: 1, all of them on one image, or one each."""
FREE: Shape = ()
Key = TypeVar("Key")

log = logging.getLogger(__name__)


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
        self._images = Counter[Use]()
        self._forms: dict[Use, _Compiled] = {}
        self._failed: set[Use] = set()
        self._compiler = ThreadPoolExecutor(1, "compile")
        self._compiling: tuple[Use, Future[_Compiled]] | None = None
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
        self._any_shape = not _crashes_with_free_sides(model)
        if self._any_shape:
            self._forms[FREE, 1] = self._compiled((FREE, 1))

    @property
    def one_by_one(self) -> bool:
        """Whether images are computed each by itself; an export that has its batch built in takes no fewer."""
        return bool(self._one_by_one)

    @property
    def own_forms(self) -> list[Use]:
        """The shapes (3, h, w) that have been compiled for, each with its number of streams."""
        return [use for use in self._forms if use[0] != FREE]

    def forward(self, im: torch.Tensor) -> list[Array]:
        """The outputs of a batch.

        Args:
            im: (n, 3, h, w) float32 RGB from 0 to 1.

        Returns:
            The model's outputs in their order, (n, …) each.
        """
        inputs = np.ascontiguousarray(im.numpy(), np.float32)
        pieces = [inputs[index : index + 1] for index in range(len(inputs))] if self._one_by_one else [inputs]
        waiting = deque(enumerate(pieces))
        found: dict[int, list[Array]] = {}
        for index, outputs, _ in self.each(lambda: waiting.popleft() if waiting else None):
            found[index] = [output.copy() for output in outputs]
        return [np.concatenate(parts) for parts in zip(*(found[index] for index in range(len(pieces))), strict=True)]

    def each(self, take: Callable[[], tuple[Key, Array] | None]) -> Iterator[tuple[Key, list[Array], float]]:
        """Compute image by image as long as there are any, and tell each as soon as it is done.

        Args:
            take: gives what an image is known by and the image, (1, 3, h, w) float32 RGB from 0 to 1; None while there is
                none. Called when a stream is about to be free, on the caller's thread.

        Yields:
            What the image is known by; its outputs, which last until the next one is asked for; milliseconds since the
            one before was done, or since this one was begun if that was later: over all images, the engine's time.
        """
        lanes = _Lanes(self._threads)
        flying: dict[int, tuple[Key, _Flight]] = {}
        numbers, before = count(), 0.0
        try:
            while True:
                room = self._threads + 1 - len(flying)  # one more than there are streams, so that none has to wait for it
                taken = list(islice(iter(take, None), room))
                if len(taken) == 1 and not flying and self._threads > 1:
                    ((key, image),) = taken
                    begun = time.perf_counter()
                    outputs = self._form(image, 1).compute(image)
                    before = time.perf_counter()
                    yield key, outputs, 1e3 * (before - begun)
                    continue
                for number, (key, image) in zip(numbers, taken, strict=False):
                    flying[number] = key, _Flight(self._form(image, self._threads), number, image)
                    lanes.send(flying[number][1])
                if not flying:
                    return
                number, now = lanes.next_done()
                key, flight = flying[number]
                yield key, flight.outputs(), 1e3 * (now - max(before, flight.begun))
                flying.pop(number)[1].land()
                before = now
        finally:
            lanes.close()
            for _, flight in flying.values():
                flight.land()

    def _form(self, image: Array, streams: int) -> _Compiled:
        """What is compiled for such an image, or free sides until that is ready, or as long as its shape is rare."""
        use = image.shape[1:], streams
        self._count(use)
        self._take_over()
        if use in self._forms:
            return self._forms[use]
        if not self._any_shape:
            return self._keep(use, self._compiled(use))
        free = FREE, streams
        if free not in self._forms and free not in self._failed:
            self._compile(free)
        elif self._deserves_a_form(use):
            self._compile(use)
        return self._forms.get(free) or self._forms[FREE, 1]

    def _count(self, use: Use) -> None:
        self._images[use] += 1
        if self._images.total() >= MEMORY:
            self._images = Counter({known: images // 2 for known, images in self._images.items() if images > 1})

    def _compile(self, use: Use) -> None:
        """Begin beside the answers, one at a time."""
        if not self._compiling and use not in self._failed:
            self._compiling = use, self._compiler.submit(self._compiled, use)

    def _take_over(self) -> None:
        """Use what has been compiled meanwhile."""
        if not self._compiling or not self._compiling[1].done():
            return
        (use, compiled), self._compiling = self._compiling, None
        try:
            self._keep(use, compiled.result())
        except RuntimeError:
            self._failed.add(use)
            log.exception("OpenVINO cannot compile the model for %s: another form computes such images", use)

    def _deserves_a_form(self, use: Use) -> bool:
        (_, height, width), streams = use
        if not (self._free_sides and self._one_by_one) or height * width <= TINY:
            return False
        kept = self._kept(streams)
        if len(kept) < KEPT_SHAPES:
            return self._images[use] >= EARLY
        return self._images[use] >= max(OFTEN, 2 * min(self._images[other] for other in kept))

    def _kept(self, streams: int) -> list[Use]:
        return [use for use in self.own_forms if use[1] == streams]

    def _compiled(self, use: Use) -> _Compiled:
        shape, streams = use
        model = self._core.read_model(self._xml)
        if shape != FREE:
            model.reshape([1, *shape])
        return _Compiled(self._core, model, streams, self._threads)

    def _keep(self, use: Use, form: _Compiled) -> _Compiled:
        kept = self._kept(use[1])
        if use[0] != FREE and len(kept) >= (KEPT_SHAPES if self._any_shape else KEPT_SHAPES_ALONE):
            del self._forms[min(kept, key=lambda other: self._images[other])]
        self._forms[use] = form
        return form


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
    """A model compiled for ``streams`` that share ``threads``."""

    def __init__(self, core: openvino.Core, model: openvino.Model, streams: int, threads: int) -> None:
        properties = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # every one-thread process would pin itself to the first core
            "INFERENCE_PRECISION_HINT": "f32",  # else bf16, wherever the CPU has it: half the time, and other detections
        }
        self._model = core.compile_model(model, "CPU", properties)
        self._requests: list[openvino.InferRequest] = []

    def compute(self, image: Array) -> list[Array]:
        """The outputs of one image, which the next one overwrites."""
        request = self.request()
        request.infer({0: image}, share_inputs=True)
        self.give_back(request)
        return [tensor.data for tensor in request.output_tensors]

    def request(self) -> openvino.InferRequest:
        """One that is not in use, until it is given back."""
        return self._requests.pop() if self._requests else self._model.create_infer_request()

    def give_back(self, request: openvino.InferRequest) -> None:
        """From now on somebody else may have it."""
        self._requests.append(request)


class _Flight:
    """One image on its way through a stream of its form: to be landed before the form or the image goes.

    Raises:
        RuntimeError: the form takes no such image.
    """

    def __init__(self, form: _Compiled, number: int, image: Array) -> None:
        self.number = number
        self.begun = 0.0
        self._error: RuntimeError | None = None
        self._form, self._image, self._request = form, np.ascontiguousarray(image), form.request()
        self._request.set_input_tensor(openvino.Tensor(self._image, shared_memory=True))  # here, where it may be refused

    def start(self, on_done: Callable[[int], None]) -> None:
        """Begin; ``on_done`` is called with its number on a thread of OpenVINO, unless it fails: see ``has_failed``."""
        number = self.number  # a callback that knew its flight would keep the form for ever
        self._request.set_callback(lambda _: on_done(number), None)
        self.begun = time.perf_counter()
        try:
            self._request.start_async()
        except RuntimeError as error:
            self._error = error

    def has_failed(self) -> bool:
        """Whether it has ended without a call: OpenVINO's Python raises what went wrong before that."""
        try:
            self._request.wait_for(0)
        except RuntimeError as error:
            self._error = error
        return self._error is not None

    def outputs(self) -> list[Array]:
        """When it is done.

        Raises:
            RuntimeError: of OpenVINO.
        """
        if self._error:
            raise self._error
        self._request.wait()
        return [tensor.data for tensor in self._request.output_tensors]

    def land(self) -> None:
        """Wait for its end, and give the request back."""
        with suppress(RuntimeError):  # whoever wants to know has asked for the outputs
            self._request.wait()
        self._form.give_back(self._request)


class _Lanes:
    """No more images under way than there are threads: each form has streams of its own, which start beside the others'.

    The one that waits is started by the end of another, on OpenVINO's thread, so that no core waits for Python's.
    """

    def __init__(self, lanes: int) -> None:
        self._free = lanes
        self._look = time.perf_counter() + LOOK_S
        self._started: dict[int, _Flight] = {}
        self._waiting: deque[_Flight] = deque()
        self._done = SimpleQueue[tuple[int, float]]()
        self._lock = threading.Lock()

    def send(self, flight: _Flight) -> None:
        """Start it now, or when a lane is free."""
        with self._lock:
            if self._free:
                self._free -= 1
                self._start(flight)
            else:
                self._waiting.append(flight)

    def next_done(self) -> tuple[int, float]:
        """Wait for the end of any; its number, and when that was."""
        while True:
            if time.perf_counter() > self._look:
                self._land_the_failed()
                self._look = time.perf_counter() + LOOK_S
            with suppress(Empty):
                return self._done.get(timeout=LOOK_S)

    def close(self) -> None:
        """Start no other one from now on."""
        with self._lock:
            self._waiting.clear()
            self._started.clear()

    def _land_the_failed(self) -> None:
        with self._lock:
            started = list(self._started.values())
        for flight in started:
            if flight.has_failed():
                self._landed(flight.number)

    def _start(self, flight: _Flight) -> None:
        self._started[flight.number] = flight
        flight.start(self._landed)

    def _landed(self, number: int) -> None:
        now = time.perf_counter()
        with self._lock:
            self._started.pop(number, None)
            if self._waiting:
                self._start(self._waiting.popleft())
            else:
                self._free += 1
        self._done.put((number, now))
