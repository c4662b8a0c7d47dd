"""Detector: ONE private model, a decode pool, and batches that never change an answer. No Ray in it.

    submit(bytes, params) ─→ decode pool ─→ waiting ─→ model thread ─→ Future[ImageResult]
         any thread          decode + letterbox   │    load, warm up, then for ever:
                                   │              └──→   take the oldest image and what shares its bucket,
                              BadImage fails             drop the cancelled, predict, answer
                              alone, here

Serve replicas, dataset actors and streams are shells around this class. The model thread never decodes; the decode pool
never touches the model. A batch forms from whatever waits while the engine is busy: an idle engine never waits for company.

What may fail where: decoding fails one image. ``EngineOutOfMemory`` halves the batch, remembers the limit, and retries.
An unexpected error in a batch of several is retried image by image, so that it reaches its own caller only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actors.errors import BadRequest, EngineOutOfMemory, ModelError, ReplicaUnavailable
from actors.images import decode_image
from actors.model import Model
from actors.schemas import ImageResult, ModelInfo, PredictParams
from actors.settings import ImageLimits

WARM_UP_SHAPES = ((480, 640), (640, 480), (640, 640))  # the commonest photographs, (height, width)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiting:
    """One decoded image on its way to the model thread."""

    prepared: Any
    answer: Future[ImageResult]
    decode_ms: float
    since: float


class Detector:
    """Owns one private model and answers from any thread.

    Args:
        load: makes the model; called once, on the thread that will own it.
        limits: what an encoded image may weigh.
        max_batch: most images in one forward pass.
        decode_threads: size of the decode pool.

    Raises:
        ModelError: the model cannot be loaded, or its warm-up failed.
    """

    def __init__(self, load: Callable[[], Model], limits: ImageLimits, *, max_batch: int = 8, decode_threads: int = 2) -> None:
        self._limits = limits
        self._max_batch = max_batch
        self._waiting: deque[_Waiting] = deque()
        self._probes: deque[Future[None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        loaded: Future[Model] = Future()
        self._thread = threading.Thread(target=self._own_model, args=(load, loaded), name="model", daemon=True)
        self._thread.start()
        self._model = loaded.result()
        self.info: ModelInfo = self._model.info

    def submit(self, data: bytes, params: PredictParams) -> Future[ImageResult]:
        """Detect in one encoded image.

        Cancelling the future before its batch starts drops the work.

        Args:
            data: the encoded image.
            params: its thresholds.

        Returns:
            A future of the result; it raises BadImage, BadRequest or EngineOutOfMemory.
        """
        answer: Future[ImageResult] = Future()
        self._decoders.submit(self._decode, data, params, answer)
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
            self._wake.notify()
        try:
            probe.result(timeout_s)
        except TimeoutError as error:
            raise ReplicaUnavailable(f"The model thread did not answer in {timeout_s:g} s") from error

    def close(self) -> None:
        """Answer what was accepted, then end the threads."""
        self._decoders.shutdown()
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _decode(self, data: bytes, params: PredictParams, answer: Future[ImageResult]) -> None:
        if answer.cancelled():
            answer.set_running_or_notify_cancel()  # wakes whoever waits for it
            return
        started = time.perf_counter()
        try:
            prepared = self._model.prepare(decode_image(data, self._limits), params)
        except Exception as error:
            _fail(answer, error)
            return
        now = time.perf_counter()
        with self._wake:
            if self._closed:
                _fail(answer, ReplicaUnavailable("This worker has ended: send the request again"))
                return
            self._waiting.append(_Waiting(prepared, answer, 1e3 * (now - started), now))
            self._wake.notify()

    # -- below: the model thread -------------------------------------------------------------------------------------

    def _own_model(self, load: Callable[[], Model], loaded: Future[Model]) -> None:
        try:
            model = load()
            self._warm_up(model)
        except BaseException as error:  # whatever it was, the constructor raises it
            loaded.set_exception(error)
            return
        loaded.set_result(model)
        work: Future[None] | list[_Waiting] | None = None
        try:
            while (work := self._next()) is not None:
                if isinstance(work, Future):
                    self._probe(model, work)
                else:
                    self._answer(model, work)
        except BaseException:
            log.exception("the model thread died; whatever waits is failed, and the health check will say so")
        finally:
            self._abandon(work if isinstance(work, list) else [])

    def _abandon(self, batch: list[_Waiting]) -> None:
        """The model thread ends: nobody may wait for it any longer, those of its last ``batch`` included."""
        gone = ReplicaUnavailable("This worker has ended: send the request again")
        with self._wake:
            self._closed = True
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(gone)
            for item in self._waiting:
                _fail(item.answer, gone)
            for probe in self._probes:
                probe.set_exception(gone)
            self._waiting.clear()
            self._probes.clear()

    def _warm_up(self, model: Model) -> None:
        for height, width in WARM_UP_SHAPES:
            image = np.full((height, width, 3), 114, np.uint8)
            (result,) = model.predict([model.prepare(image, PredictParams())])
            if (result.width, result.height) != (width, height):
                raise ModelError(f"The warm-up of {model.info.name} answered for another image size")

    def _next(self) -> Future[None] | list[_Waiting] | None:
        """A probe, or the oldest image with up to ``max_batch - 1`` others of its bucket, or None at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._probes or self._waiting or self._closed)
            if self._probes:
                return self._probes.popleft()
            if not self._waiting:
                return None
            bucket = self._waiting[0].prepared.bucket
            batch = [item for item in self._waiting if item.prepared.bucket == bucket][: self._max_batch]
            chosen = {id(item) for item in batch}
            self._waiting = deque(item for item in self._waiting if id(item) not in chosen)
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

    def _answer(self, model: Model, batch: list[_Waiting]) -> None:
        batch = [item for item in batch if item.answer.set_running_or_notify_cancel()]
        if batch:
            self._predict(model, batch)

    def _predict(self, model: Model, batch: Sequence[_Waiting]) -> None:
        started = time.perf_counter()
        try:
            results = model.predict([item.prepared for item in batch])
        except EngineOutOfMemory as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            half = len(batch) // 2
            self._max_batch = min(self._max_batch, half)
            log.warning("%s; from now on at most %d images share a batch", error.message, self._max_batch)
            self._predict(model, batch[:half])
            self._predict(model, batch[half:])
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            log.warning("a batch of %d failed and is retried image by image: %s", len(batch), error)
            for item in batch:
                self._predict(model, [item])
        else:
            for item, result in zip(batch, results, strict=True):
                queue_ms = 1e3 * (started - item.since)
                timing = replace(result.timing, decode=item.decode_ms, queue=queue_ms)
                item.answer.set_result(replace(result, timing=timing))


def _fail(answer: Future[ImageResult], error: Exception) -> None:
    """Hand ``error`` to whoever waits, unless they have gone."""
    if answer.set_running_or_notify_cancel():
        answer.set_exception(error)
