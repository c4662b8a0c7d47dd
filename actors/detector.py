"""Detector: ONE private model, a decode pool, and batches that never change an answer. No Ray in it.

    submit(bytes, params) ─→ decode pool ─→ waiting ─→ model thread ─→ Future[ImageResult]
    submit_frame(pixels)         decode + letterbox   │    load, warm up, then for ever:
    submit_tensor(array)               │              └──→   take the oldest image and what shares its bucket,
         any thread               BadImage fails             drop the cancelled and the late, predict, answer
                                  alone, here

``replace`` loads another engine for the same weights on a thread of its own, which then takes over: no model ever changes its
thread, and nobody waits for the loading.

Serve replicas, dataset actors and streams are shells around this class. The model thread never decodes; the decode pool
never touches the model. A batch forms from whatever waits while the engine is busy: an idle engine never waits for company.

What waits is bounded in bytes, ``MAX_WAITING_BYTES``: beyond it the decode pool waits, and what it has not decoded is small.

An engine that computes image by image is kept at work with one batch after the other, and each image is answered when it is
done: a "batch" is then no more than what was taken at once from those that waited.

What may fail where: decoding fails one image. ``EngineOutOfMemory`` halves the batch or tensor, and the limit is remembered.
An unexpected error in a batch of several is retried image by image, so that it reaches its own caller only.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import BadRequest, DeadlineExceeded, EngineOutOfMemory, ModelError, ReplicaUnavailable
from actors.images import Pixels, decode_image, decode_reduced
from actors.model import Model
from actors.schemas import ImageResult, ModelInfo, PredictParams, Timing
from actors.settings import ImageLimits

MAX_WAITING_BYTES = 256_000_000  # of decoded pixels
WARM_UP_SHAPES = ((480, 640), (640, 480), (640, 640))  # the commonest photographs, (height, width)

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Waiting:
    """One decoded image on its way to the model thread; the engine got it when it was ``begun``, as one of ``batch_size``."""

    prepared: Any
    answer: Future[ImageResult]
    deadline: float
    decode_ms: float
    since: float
    begun: float = 0.0
    batch_size: int = 0


@dataclass(slots=True)
class _Tensor:
    """A caller's own tensor, which is a batch by itself."""

    inputs: NDArray[np.float32]
    answer: Future[tuple[tuple[NDArray[np.float32], ...], Timing]]
    deadline: float
    since: float


class Detector:
    """Owns one private model and answers from any thread.

    Args:
        load: makes the model; called once, on the thread that will own it.
        limits: what an encoded image may weigh.
        max_batch: most images in one forward pass.
        decode_threads: size of the decode pool.
        reduced: decode JPEGs at reduced scale where that leaves enough pixels; see ``decode_reduced``.

    Attributes:
        info: what was loaded.
        on_batch: called on the model thread with the size of every batch that was computed.
        starved_s: how long the model thread has waited for images after one batch and before the next, in all, seconds.

    Raises:
        ModelError: the model cannot be loaded, or its warm-up failed.
    """

    on_batch: Callable[[int], None] = staticmethod(lambda size: None)

    def __init__(
        self,
        load: Callable[[], Model],
        limits: ImageLimits,
        *,
        max_batch: int = 8,
        decode_threads: int = 2,
        reduced: bool = False,
    ) -> None:
        self._limits, self._reduced = limits, reduced
        self._max_batch = max_batch
        self._max_tensor: int | None = None  # images of a caller's own tensor in one pass; known when one was too many
        self._waiting: deque[_Waiting | _Tensor] = deque()
        self._waiting_bytes = 0
        self._probes: deque[Future[None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self.starved_s = 0.0
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._model: Model
        self.info: ModelInfo
        self._thread: threading.Thread | None = None
        self.replace(load)

    def replace(self, load: Callable[[], Model]) -> None:
        """Load and warm another engine, and answer with it from then on; the one before finishes the batch in its hands.

        Args:
            load: makes the model, of the same weights and with the same letterbox; called on the thread that will own it.

        Raises:
            ModelError: it cannot be loaded, its warm-up failed, or it prepares images otherwise; all stays as it was.
        """
        loaded: Future[None] = Future()
        threading.Thread(target=self._own_model, args=(load, loaded), name="model", daemon=True).start()
        loaded.result()

    def explain(self, engine_reason: str) -> None:
        """Say why it is this engine that answers, and that it stays."""
        with self._wake:
            self.info = replace(self.info, engine_reason=engine_reason, settled=True)

    def submit(self, data: bytes, params: PredictParams, deadline: float = math.inf) -> Future[ImageResult]:
        """Detect in one encoded image.

        Cancelling the future before its batch starts drops the work.

        Args:
            data: the encoded image.
            params: its thresholds.
            deadline: ``time.monotonic()`` after which its inference is not begun any more.

        Returns:
            A future of the result; it raises BadImage, BadRequest, DeadlineExceeded or EngineOutOfMemory.
        """
        return self._submit(partial(self._pixels, data, params), params, deadline)

    def submit_frame(self, image: NDArray[np.uint8], params: PredictParams, deadline: float = math.inf) -> Future[ImageResult]:
        """Detect in one image that is decoded already, (H, W, 3) uint8 BGR; else like ``submit``."""
        return self._submit(lambda: (image, image.shape), params, deadline)

    def submit_tensor(
        self, inputs: NDArray[np.float32], deadline: float = math.inf
    ) -> Future[tuple[tuple[NDArray[np.float32], ...], Timing]]:
        """Run the engine over (N, 3, H, W) float32 RGB from 0 to 1, as a batch of its own.

        Returns:
            A future of the engine's outputs; it raises BadRequest, DeadlineExceeded or EngineOutOfMemory.
        """
        answer: Future[tuple[tuple[NDArray[np.float32], ...], Timing]] = Future()
        self._wait(_Tensor(inputs, answer, deadline, time.perf_counter()), inputs.nbytes)
        return answer

    def check_health(self, timeout_s: float = 20.0) -> None:
        """Run a tiny real inference on the model thread, ahead of whatever waits.

        Raises:
            ReplicaUnavailable: the model thread is dead or did not come round in ``timeout_s``.
        """
        probe: Future[None] = Future()
        with self._wake:
            if self._closed:
                raise ReplicaUnavailable("The model thread has ended")
            self._probes.append(probe)
            self._wake.notify_all()
        try:
            probe.result(timeout_s)
        except TimeoutError as error:
            raise ReplicaUnavailable(f"The model thread did not answer in {timeout_s:g} s") from error

    def close(self) -> None:
        """Answer what was accepted, then end the threads."""
        self._decoders.shutdown()
        with self._wake:
            self._closed = True
            self._wake.notify_all()
            thread = self._thread
        if thread:
            thread.join()

    def _pixels(self, data: bytes, params: PredictParams) -> Pixels:
        if not self._reduced:
            image = decode_image(data, self._limits)
            return image, image.shape
        info = self.info
        return decode_reduced(data, self._limits, params.imgsz or info.imgsz, whole=info.task != "classify")

    def _submit(self, decode: Callable[[], Pixels], params: PredictParams, deadline: float) -> Future[ImageResult]:
        answer: Future[ImageResult] = Future()
        self._decoders.submit(self._decode, decode, params, deadline, answer)
        return answer

    def _decode(
        self, decode: Callable[[], Pixels], params: PredictParams, deadline: float, answer: Future[ImageResult]
    ) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._waiting_bytes < MAX_WAITING_BYTES or self._closed)
        if answer.cancelled():
            answer.set_running_or_notify_cancel()  # wakes whoever waits for it
            return
        started = time.perf_counter()
        if time.monotonic() > deadline:
            _fail(answer, _too_late())
            return
        try:
            image, shape = decode()
            prepared = self._model.prepare(image, params, shape)
        except Exception as error:
            _fail(answer, error)
            return
        now = time.perf_counter()
        self._wait(_Waiting(prepared, answer, deadline, 1e3 * (now - started), now), prepared.inputs.nbytes)

    def _wait(self, item: _Waiting | _Tensor, size: int) -> None:
        with self._wake:
            if self._closed:
                _fail(item.answer, ReplicaUnavailable("This worker has ended: send the request again"))
                return
            self._waiting.append(item)
            self._waiting_bytes += size
            self._wake.notify_all()

    # -- below: the model thread -------------------------------------------------------------------------------------

    def _own_model(self, load: Callable[[], Model], loaded: Future[None]) -> None:
        try:
            model = load()
            self._warm_up(model)
            self._take_over(model)
        except BaseException as error:  # whatever it was, who asked for the model raises it
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        work: Future[None] | _Tensor | list[_Waiting] | None = None
        ended: float | None = None
        try:
            while (work := self._next()) is not None:
                if isinstance(work, Future):
                    self._probe(model, work)
                elif isinstance(work, _Tensor):
                    self._infer(model, work)
                else:
                    self.starved_s += time.perf_counter() - ended if ended else 0.0
                    self._answer(model, work)
                    ended = time.perf_counter()
        except BaseException:
            log.exception("the model thread died; whatever waits is failed, and the health check will say so")
        finally:
            self._abandon(work if isinstance(work, list) else [work] if isinstance(work, _Tensor) else [])

    def _take_over(self, model: Model) -> None:
        """From now on this thread answers; what is prepared already is prepared alike."""
        if self._thread is not None and _preparation(model.info) != _preparation(self.info):
            raise ModelError(f"{model.info.engine} takes other inputs than {self.info.engine}, which goes on")
        with self._wake:
            if self._closed:
                raise ReplicaUnavailable("The model thread has ended")
            self._model, self.info, self._thread = model, model.info, threading.current_thread()
            self._wake.notify_all()

    def _abandon(self, batch: Sequence[_Waiting | _Tensor]) -> None:
        """The model thread ends: nobody may wait for it any longer, those of its last ``batch`` included.

        What waits is not its own any more where another model has taken over.
        """
        gone = ReplicaUnavailable("This worker has ended: send the request again")
        with self._wake:
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(gone)
            if self._thread is not threading.current_thread():
                return
            self._closed = True
            for item in self._waiting:
                _fail(item.answer, gone)
            for probe in self._probes:
                probe.set_exception(gone)
            self._waiting.clear()
            self._probes.clear()
            self._wake.notify_all()

    def _warm_up(self, model: Model) -> None:
        for height, width in WARM_UP_SHAPES:
            image = np.full((height, width, 3), 114, np.uint8)
            (result,) = model.predict([model.prepare(image, PredictParams())])
            if (result.width, result.height) != (width, height):
                raise ModelError(f"The warm-up of {model.info.name} answered for another image size")

    def _next(self) -> Future[None] | _Tensor | list[_Waiting] | None:
        """A probe, a tensor, or the oldest image with up to ``max_batch - 1`` others of its bucket; None at the end.

        The end is also that another model has taken over.
        """
        me = threading.current_thread()
        with self._wake:
            self._wake.wait_for(lambda: self._thread is not me or self._probes or self._waiting or self._closed)
            if self._thread is not me:
                return None
            if self._probes:
                return self._probes.popleft()
            if not self._waiting:
                return None
            oldest = self._waiting[0]
            if isinstance(oldest, _Waiting):
                return self._companions(oldest)
            self._waiting.popleft()
            self._waiting_bytes -= oldest.inputs.nbytes
            self._wake.notify_all()
            return oldest

    def _more(self) -> list[_Waiting]:
        """The batch that would be next; none if nothing waits, or something else is first."""
        with self._wake:
            oldest = self._waiting[0] if self._waiting else None
            if self._thread is not threading.current_thread() or self._probes or not isinstance(oldest, _Waiting):
                return []
            return self._companions(oldest)

    def _companions(self, oldest: _Waiting) -> list[_Waiting]:
        images = (item for item in self._waiting if isinstance(item, _Waiting))
        batch = list(islice((item for item in images if item.prepared.bucket == oldest.prepared.bucket), self._max_batch))
        chosen = {id(item) for item in batch}
        self._waiting = deque(item for item in self._waiting if id(item) not in chosen)
        self._waiting_bytes -= sum(item.prepared.inputs.nbytes for item in batch)
        self._wake.notify_all()
        return batch

    def _probe(self, model: Model, probe: Future[None]) -> None:
        image = np.zeros((64, 64, 3), np.uint8)
        try:
            try:
                prepared = model.prepare(image, PredictParams(imgsz=(64, 64)))
            except BadRequest:  # an export that takes one size only
                prepared = model.prepare(image, PredictParams())
            model.predict([prepared])
        except Exception as error:
            probe.set_exception(error)
        else:
            probe.set_result(None)

    def _infer(self, model: Model, item: _Tensor) -> None:
        if not item.answer.set_running_or_notify_cancel():
            return
        if time.monotonic() > item.deadline:
            item.answer.set_exception(_too_late())
            return
        started = time.perf_counter()
        try:
            outputs = self._outputs(model, item.inputs)
        except Exception as error:
            item.answer.set_exception(error)
            return
        waited, taken = 1e3 * (started - item.since), 1e3 * (time.perf_counter() - started)
        timing = Timing(batch_wait=waited, inference=taken, batch_size=len(item.inputs), engine=taken)
        item.answer.set_result((outputs, timing))

    def _outputs(self, model: Model, inputs: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """The engine's outputs over a tensor, in as few passes as the device has memory for."""
        parts: list[tuple[NDArray[np.float32], ...]] = []
        while len(inputs):
            part = inputs[: self._max_tensor]
            try:
                parts.append(model.infer(part))
                inputs = inputs[len(part) :]
            except EngineOutOfMemory as error:
                if len(part) == 1:
                    raise
                self._max_tensor = (len(part) + 1) // 2
                log.warning("%s; from now on tensors are computed by %d at most", error.message, self._max_tensor)
        return parts[0] if len(parts) == 1 else tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def _answer(self, model: Model, batch: list[_Waiting]) -> None:
        if wanted := _still_wanted(batch):
            if model.one_by_one:
                self._predict_each(model, wanted)
            else:
                self._predict(model, wanted)

    def _predict_each(self, model: Model, batch: list[_Waiting]) -> None:
        """Keep the engine at work: with this batch, and with whatever waits whenever it has room."""
        outside, inside = deque(batch), list[_Waiting]()  # of the engine
        leaders = {batch[0]}

        def take() -> tuple[_Waiting, Any] | None:
            while not outside and (more := self._more()):
                if wanted := _still_wanted(more):
                    outside.extend(wanted)
                    leaders.add(wanted[0])
            if not outside:
                return None
            item = outside.popleft()
            item.begun = time.perf_counter()
            inside.append(item)
            return item, item.prepared

        try:
            for item, result in model.each(take):
                inside.remove(item)
                if item in leaders:
                    leaders.remove(item)
                    self.on_batch(item.batch_size)
                _settle(item, result, 1e3 * (time.perf_counter() - item.begun) - result.timing.postprocess)
        except Exception as error:
            log.warning(
                "an image failed, and is retried with the %d others in hand: %s", len(inside) + len(outside) - 1, error
            )
            for item in [*inside, *outside]:
                self._predict(model, [item])
        except BaseException:
            self._abandon([*inside, *outside])
            raise

    def _predict(self, model: Model, batch: Sequence[_Waiting]) -> None:
        halve = False
        for item in batch:
            item.begun = time.perf_counter()
        try:
            results = model.predict([item.prepared for item in batch])
        except EngineOutOfMemory as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            halve = True  # and retried below: within this clause the failed batch's tensors are still alive
            self._max_batch = min(self._max_batch, (len(batch) + 1) // 2)
            log.warning("%s; from now on at most %d images share a batch", error.message, self._max_batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            log.warning("a batch of %d failed and is retried image by image: %s", len(batch), error)
            for item in batch:
                self._predict(model, [item])
        else:
            self.on_batch(len(batch))
            for item, result in zip(batch, results, strict=True):
                _settle(item, result, len(batch) * (result.timing.preprocess + result.timing.inference))
        while halve and batch:  # what does not fit for its first part either is not tried again for the rest
            part, batch = batch[: self._max_batch], batch[self._max_batch :]
            self._predict(model, part)


def _still_wanted(batch: Sequence[_Waiting]) -> list[_Waiting]:
    """Those that somebody waits for, and that are in time; from now on they cannot be cancelled."""
    now = time.monotonic()
    wanted = []
    for item in batch:
        if not item.answer.set_running_or_notify_cancel():
            continue
        if now > item.deadline:
            item.answer.set_exception(_too_late())
        else:
            wanted.append(item)
    for item in wanted:
        item.batch_size = len(wanted)
    return wanted


def _settle(item: _Waiting, result: ImageResult, engine_ms: float) -> None:
    waited = 1e3 * (item.begun - item.since)
    timing = replace(result.timing, decode=item.decode_ms, batch_wait=waited, engine=engine_ms)
    item.answer.set_result(replace(result, timing=timing))


def _preparation(info: ModelInfo) -> tuple[object, ...]:
    """What decides how an image is made ready for a model."""
    return info.sha256, info.task, info.imgsz, info.stride, info.dynamic, info.end2end


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The request's time ran out while it waited: allow more, or send fewer at once")


def _fail(answer: Future[Any], error: Exception) -> None:
    """Hand ``error`` to whoever waits, unless they have gone."""
    if answer.set_running_or_notify_cancel():
        answer.set_exception(error)
