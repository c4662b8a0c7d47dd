"""ModelReplica: the shell of a Detector, behind a Serve handle or, in the topology ``direct``, inside the ingress's process.

    detect(bytes, params, seconds) → Detector.submit → Answer
    detect_alone                     the same with nothing else in hand, to find a poisoned image
    frames, infer                    a video, a caller's own tensor

What is in hand stands in the crash journal until the engine is done with it, whether or not anybody still waits for it:
the processes of this node learn from it what killed their neighbours (``deploy/quarantine.py``).

A replica counts as ready when its constructor returns, and the constructor returns after real inferences. Its health
check runs another tiny one on the model thread, so that a wedged engine is replaced and not only a dead process; a batch
that was computed since the last check is as good. A replica that should move to another node fails it too
(``deploy/spread.py``).

Time crosses processes as seconds that are left, since clocks and ``time.monotonic`` differ between them.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from actors.annotate import draw
from actors.hardware import gpu_memory_bytes, gpu_peak_bytes, memory_bytes
from actors.metrics import ReplicaMetrics
from actors.right_of_way import RightOfWay, node_folder
from actors.schemas import Answer, ImageResult, ModelInfo, PredictParams, TensorAnswer, Vitals
from actors.settings import ImageLimits
from actors.startup import start_detector
from actors.video import read_video
from deploy.logs import log_with_serve
from deploy.quarantine import CrashJournal, Quarantine, Verdict, digest_of, poisoned
from deploy.settings import ServedModel
from deploy.spread import Place

FRAMES_AT_ONCE = 8  # of a video, in the detector
RECENT_BATCHES = 32
HANDOVER_S = 0.5  # at most, until an answer has arrived and its caller leaves: the next one alone may kill this process

T = TypeVar("T")


class ModelReplica:
    """One private model and its answers.

    Args:
        model: the weights and the reservation of this replica.
        images: what an encoded image may weigh.
    """

    def __init__(self, model: ServedModel, images: ImageLimits) -> None:
        log_with_serve()
        self._limits = images
        self._detector = start_detector(model, model.actor, images, self._replaced)
        self._replica = ray.get_runtime_context().get_actor_id() or ""
        self._metrics = ReplicaMetrics(self._detector.info)
        self._batches: deque[int] = deque(maxlen=RECENT_BATCHES)
        self._at_work = False  # whether a batch was computed since the last health check
        self._detector.on_batch = self._computed
        self._place = Place(model.actor, model.replicas.respread_s)
        self._company = _Company()
        self._quarantine = Quarantine()
        self._journal = CrashJournal(node_folder() / f"{self._detector.info.name}-{self._detector.info.sha256[:16]}")
        self._right_of_way = RightOfWay(node_folder())

    async def detect(self, image: bytes, params: PredictParams, seconds: float, annotate: bool = False) -> Answer:
        """Detect in one encoded image.

        Args:
            image: the encoded image.
            params: its thresholds.
            seconds: that are left; after them its inference is not begun any more.
            annotate: also draw what was found.

        Raises:
            BadImage, BadRequest, DeadlineExceeded, EngineOutOfMemory: see ``Detector.submit``.
            PoisonedImage: it has killed a process of this node that had nothing else in hand.
        """
        deadline, digest = time.monotonic() + seconds, digest_of(image)
        async with self._in_hand(digest, alone=self._suspects(digest, "image")):
            return await self._detect(image, params, deadline, annotate)

    async def detect_alone(
        self, image: bytes, params: PredictParams, seconds: float, annotate: bool = False
    ) -> AsyncGenerator[Answer | None, None]:
        """As ``detect``, with nothing else in hand: yields None when everything else is answered, then the answer."""
        deadline, digest = time.monotonic() + seconds, digest_of(image)
        self._suspects(digest, "image")
        async with self._in_hand(digest, alone=True):
            yield None
            yield await self._detect(image, params, deadline, annotate)
            await asyncio.sleep(HANDOVER_S)

    async def frames(
        self, video: bytes, params: PredictParams, seconds: float, stride: int = 1, skip: int = 0, alone: bool = False
    ) -> AsyncGenerator[Answer | None, None]:
        """Detect in every ``stride``-th frame of an encoded video, in order, without the first ``skip`` of them.

        With ``alone`` nothing else is in hand with its first frames; yields None when everything else is answered, then the
        answers.

        Raises:
            BadImage: not a video, or one beyond the limits.
            PoisonedImage: see ``detect``.
        """
        deadline, digest = time.monotonic() + seconds, digest_of(video)
        suspect = self._suspects(digest, "video")
        frames = None
        while True:
            async with self._in_hand(digest, alone=suspect or alone):
                if frames is None:
                    if alone:
                        yield None
                    frames = await asyncio.to_thread(read_video, video, self._limits, stride)
                    for _ in range(skip):
                        await asyncio.to_thread(next, frames, None)
                chunk = await asyncio.to_thread(list, islice(frames, FRAMES_AT_ONCE))
                futures = [self._detector.submit_frame(frame, params, deadline) for _, frame in chunk]
                results = await asyncio.gather(*map(_settled, futures))
            alone = False
            if not chunk:
                return
            for result in results:
                yield self._answered(result)

    async def infer(self, inputs: NDArray[np.float32], seconds: float) -> TensorAnswer:
        """Run the engine over (N, 3, H, W) float32 RGB from 0 to 1.

        Raises:
            BadRequest: a shape that the engine does not take.
            PoisonedImage: see ``detect``.
        """
        deadline, digest = time.monotonic() + seconds, digest_of(inputs)
        async with self._in_hand(digest, alone=self._suspects(digest, "tensor")):
            return await self._infer(inputs, deadline)

    async def infer_alone(self, inputs: NDArray[np.float32], seconds: float) -> AsyncGenerator[TensorAnswer | None, None]:
        """As ``infer``, with nothing else in hand; see ``detect_alone``."""
        deadline, digest = time.monotonic() + seconds, digest_of(inputs)
        self._suspects(digest, "tensor")
        async with self._in_hand(digest, alone=True):
            yield None
            yield await self._infer(inputs, deadline)
            await asyncio.sleep(HANDOVER_S)

    def describe(self) -> ModelInfo:
        """What this replica has loaded, and the GPU memory that it has needed so far."""
        return replace(self._detector.info, gpu_peak_bytes=gpu_peak_bytes())

    def vitals(self) -> Vitals:
        """How this process is."""
        info = self._detector.info
        engine = f"{info.engine} {info.precision}"
        return Vitals(self._replica, memory_bytes(), gpu_peak_bytes(), tuple(self._batches), engine)

    async def check_health(self) -> None:
        """Called by Serve; raising replaces this replica."""
        if not self._at_work:
            await asyncio.to_thread(self._detector.check_health)
        self._at_work = False
        self._metrics.memory(gpu_memory_bytes(), gpu_peak_bytes())
        await asyncio.to_thread(self._place.check)

    def close(self) -> None:
        """A regular end: what was accepted is answered, and nobody is blamed."""
        self._detector.close()
        self._journal.close()

    def _replaced(self, info: ModelInfo) -> None:
        """Another engine answers: what it does is counted under its own name."""
        self._metrics = ReplicaMetrics(info)

    def _computed(self, batch_size: int) -> None:
        self._at_work = True
        self._batches.append(batch_size)
        self._metrics.batch(batch_size)

    def _suspects(self, digest: bytes, kind: str) -> bool:
        """Whether a process of this node died with it in hand; PoisonedImage if one died of it."""
        self._journal.learn(self._quarantine)
        verdict = self._quarantine.verdict(digest)
        if verdict is Verdict.CONDEMNED:
            raise poisoned(kind)
        return verdict is Verdict.SUSPECT

    @asynccontextmanager
    async def _in_hand(self, digest: bytes, *, alone: bool) -> AsyncIterator[None]:
        """Beside others, or alone; what was alone and leaves this process alive is cleared."""
        async with self._company.alone() if alone else self._company.shared():
            try:
                with self._journal.in_hand(digest, alone=alone), self._right_of_way.held():
                    yield
            finally:
                if alone:
                    self._quarantine.clear(digest)

    async def _detect(self, image: bytes, params: PredictParams, deadline: float, annotate: bool) -> Answer:
        result = await _settled(self._detector.submit(image, params, deadline))
        picture = await asyncio.to_thread(draw, image, result, self._limits) if annotate else None
        return self._answered(result, picture)

    async def _infer(self, inputs: NDArray[np.float32], deadline: float) -> TensorAnswer:
        outputs, timing = await _settled(self._detector.submit_tensor(inputs, deadline))
        self._metrics.tensor(timing)
        return TensorAnswer(outputs, self._replica, timing)

    def _answered(self, result: ImageResult, picture: bytes | None = None) -> Answer:
        self._metrics.image(result.timing)
        return Answer(result, self._replica, picture)

    def __del__(self) -> None:
        if hasattr(self, "_journal"):
            self.close()


async def _settled(future: Future[T]) -> T:
    """Its result. Who is cancelled meanwhile leaves when the engine has: at once, or after the batch that has begun."""
    waiting = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if not future.cancel():
            await asyncio.wait([waiting])
        raise


class _Company:
    """Many at once, or one alone: a readers-writer lock of one event loop, in which the writer goes first."""

    def __init__(self) -> None:
        self._shared = 0
        self._alone = asyncio.Lock()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Beside others."""
        if self._alone.locked():
            async with self._alone:
                self._shared += 1
        else:
            self._shared += 1
        try:
            yield
        finally:
            self._shared -= 1
            if self._alone.locked():
                async with self._changed:
                    self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """With nobody else."""
        async with self._alone, self._changed:
            await self._changed.wait_for(lambda: not self._shared)
            yield
