"""The dataset pool: plain Ray actors that pull shards and commit them; a driver that holds references and counts only.

    driver                                  ShardActor (one private model each)
    run_pool: shards ──── process ────────→ read → Detector.submit → rows → ledger.commit
              counts ←─── Manifest ────────┘
              an actor died: a new one takes its place; its shards are tried alone, then bisected,
              until the input that kills actors stands alone. After its second kill it is a dead letter.

Two shards are in flight per actor, so that the model has work while the shard before is written. Why not Ray Data: see the
design's decision 7; in short, one poisonous input there either loops for ever or costs its whole block.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from actors.dataset import Shard, read_input
from actors.detector import Detector
from actors.errors import BadImage, FleetError, ModelError, ReplicaUnavailable
from actors.images import encode_jpeg
from actors.ledger import DeadLetter, Ledger, Manifest
from actors.model import load_model
from actors.schemas import ImageResult, ModelInfo, PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from actors.writers import row

IN_FLIGHT = 2
KILLS_TO_CONDEMN = 2
WAIT_S = 2.0
MAX_FAILED_STARTS = 3
STAGES = ("decode", "queue", "preprocess", "inference", "postprocess")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolSettings:
    """What every actor of one job is given."""

    model: ModelSettings
    actor: ActorSettings
    limits: ImageLimits
    params: PredictParams
    ledger: Ledger
    health_timeout_s: float = 120.0


class ShardActor:
    """One private model that takes shards and commits them. The Ray shell of a Detector."""

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings
        self._window = 2 * settings.model.max_batch + settings.actor.threads  # images in flight: bounds the memory
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="read")
        self._detector: Detector

    def load(self) -> ModelInfo:
        """Load and warm the model, and try the job's parameters on it.

        Not in the constructor: an error of a method keeps its type on the way to the driver, a constructor's does not.

        Raises:
            ModelError, BadRequest: the weights, or the parameters with these weights, cannot be used.
        """
        model, threads = self._settings.model, self._settings.actor.threads
        self._detector = Detector(
            lambda: load_model(model, threads),
            self._settings.limits,
            max_batch=model.max_batch,
            decode_threads=max(2, threads),
        )
        grey = encode_jpeg(np.full((64, 64, 3), 114, np.uint8))
        self._detector.submit(grey, self._settings.params).result()
        threading.Thread(target=self._watch, name="health", daemon=True).start()
        return self._detector.info

    def process(self, shard: Shard) -> Manifest:
        """Detect in a shard's inputs and commit it. Every input becomes a row or a dead letter."""
        rows: list[dict[str, Any]] = []
        letters: list[DeadLetter] = []
        classes: Counter[str] = Counter()
        stages = dict.fromkeys(STAGES, 0.0)
        for uri, outcome in self._outcomes(shard):
            if isinstance(outcome, DeadLetter):
                letters.append(outcome)
                continue
            sha256, result = outcome
            rows.append(row(uri, sha256, self._settings.model.name, result))
            classes.update(detection.name for detection in result.detections)
            for stage in STAGES:
                stages[stage] += getattr(result.timing, stage)
        manifest = Manifest(len(rows), tuple(letters), dict(classes), stages)
        self._settings.ledger.commit(shard, rows, manifest)
        return manifest

    def _outcomes(self, shard: Shard) -> Iterator[tuple[str, tuple[str, ImageResult] | DeadLetter]]:
        """Each input's outcome in order, with a bounded window of images in flight."""
        uris = iter(shard.uris)
        window: deque[tuple[str, Future[tuple[str, Future[ImageResult]]]]] = deque()
        while True:
            while len(window) < self._window and (uri := next(uris, None)) is not None:
                window.append((uri, self._readers.submit(self._read, uri)))
            if not window:
                return
            uri, reading = window.popleft()
            yield uri, self._outcome(uri, reading)

    def _read(self, uri: str) -> tuple[str, Future[ImageResult]]:
        data = read_input(uri)
        return hashlib.sha256(data).hexdigest(), self._detector.submit(data, self._settings.params)

    def _outcome(self, uri: str, reading: Future[tuple[str, Future[ImageResult]]]) -> tuple[str, ImageResult] | DeadLetter:
        try:
            sha256, detecting = reading.result()
        except OSError as error:
            return DeadLetter(uri, "read", f"The file cannot be read: {error.strerror or error}")
        try:
            return sha256, detecting.result()
        except BadImage as error:
            return DeadLetter(uri, "decode", error.message)
        except Exception as error:  # one input's failure is its own; the reason is in the dead letter
            self._leave_if_broken(error)
            reason = error.message if isinstance(error, FleetError) else f"{type(error).__name__}: {error}"
            return DeadLetter(uri, "predict", reason)

    def _leave_if_broken(self, error: Exception) -> None:
        """After an unexpected error: if the engine no longer works at all, die, so that the driver tries elsewhere.

        A sticky fault (a CUDA assertion, say) would otherwise turn every input that is left into a dead letter.
        """
        if isinstance(error, FleetError) and not isinstance(error, ReplicaUnavailable):
            return
        self._leave_unless_healthy()

    def _watch(self) -> None:
        """What Serve does for its replicas: a tiny real inference now and then, so that a wedged engine is replaced."""
        while True:
            time.sleep(self._settings.health_timeout_s / 4)
            self._leave_unless_healthy()

    def _leave_unless_healthy(self) -> None:
        try:
            self._detector.check_health(self._settings.health_timeout_s)
        except Exception:
            log.exception("the engine of this actor is broken; the actor ends")
            os._exit(1)


@dataclass
class _Work:
    """A shard on its way. A suspect was in flight when an actor died; ``kills`` counts those that it killed alone."""

    shard: Shard
    suspect: bool = False
    kills: int = 0


class _Worker:
    """One actor and what it has in flight."""

    def __init__(self, settings: PoolSettings) -> None:
        self.actor = (
            ray.remote(ShardActor)
            .options(
                num_cpus=settings.actor.num_cpus,
                num_gpus=settings.actor.num_gpus,
                max_concurrency=IN_FLIGHT + 1,
            )
            .remote(settings)
        )
        self.starting: Any = self.actor.load.remote()
        self.in_flight: dict[Any, _Work] = {}

    def accepts(self, work: _Work) -> bool:
        """A suspect is tried alone, so that a death has one culprit."""
        if self.starting is not None or any(other.suspect for other in self.in_flight.values()):
            return False
        return len(self.in_flight) < (1 if work.suspect else IN_FLIGHT)

    def start(self, work: _Work) -> None:
        self.in_flight[self.actor.process.remote(work.shard)] = work

    def references(self) -> list[Any]:
        return [*self.in_flight, *([self.starting] if self.starting is not None else [])]


def run_pool(
    settings: PoolSettings,
    shards: Iterable[Shard],
    actors: int,
    on_commit: Callable[[Manifest], None],
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Process every shard on ``actors`` actors; returns when all are committed.

    Args:
        settings: what every actor is given.
        shards: the work; taken one by one.
        actors: how many actors.
        on_commit: called with the manifest of each shard as it is committed.
        on_wait: called every few seconds while nothing is.

    Raises:
        ModelError: the model cannot be loaded, or actors cannot be started.
        FleetError: whatever else an actor raised as expected.
    """
    _Pool(settings, shards, on_commit, on_wait).run(actors)


class _Pool:
    def __init__(
        self,
        settings: PoolSettings,
        shards: Iterable[Shard],
        on_commit: Callable[[Manifest], None],
        on_wait: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._shards = iter(shards)
        self._returned: deque[_Work] = deque()
        self._on_commit = on_commit
        self._on_wait = on_wait
        self._failed_starts = 0

    def run(self, actors: int) -> None:
        workers = [_Worker(self._settings) for _ in range(actors)]
        try:
            while True:
                for worker in workers:
                    self._feed(worker)
                references = {ref: worker for worker in workers for ref in worker.references()}
                if not any(worker.in_flight for worker in workers) and not self._more():
                    return
                done, _ = ray.wait(list(references), num_returns=1, timeout=WAIT_S)
                if done:
                    self._collect(references[done[0]], done[0], workers)
                else:
                    self._on_wait()
        finally:
            for worker in workers:
                ray.kill(worker.actor)

    def _more(self) -> bool:
        if not self._returned and (shard := next(self._shards, None)) is not None:
            self._returned.append(_Work(shard))
        return bool(self._returned)

    def _feed(self, worker: _Worker) -> None:
        while self._more() and worker.accepts(self._returned[0]):
            worker.start(self._returned.popleft())

    def _collect(self, worker: _Worker, done: Any, workers: list[_Worker]) -> None:
        try:
            outcome = ray.get(done)
        except (RayActorError, OutOfMemoryError, NodeDiedError) as error:
            self._replace(worker, workers, error)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, FleetError) else error from None
        else:
            if done is worker.starting:
                worker.starting, self._failed_starts = None, 0
            else:
                del worker.in_flight[done]
                self._on_commit(outcome)

    def _replace(self, worker: _Worker, workers: list[_Worker], error: Exception) -> None:
        ray.kill(worker.actor)  # it may be unreachable, not dead, and must not commit what others will
        if worker.starting is not None:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ModelError(f"{self._failed_starts} actors died while loading the model: {error}") from None
        suspects = list(worker.in_flight.values())
        log.warning("an actor died with %d shards in flight; they are tried again", len(suspects))
        for work in suspects:
            self._retry(work, alone=len(suspects) == 1)
        workers[workers.index(worker)] = _Worker(self._settings)

    def _retry(self, work: _Work, *, alone: bool) -> None:
        """What to do with a shard whose actor died: try it alone, halve it, or condemn its only input."""
        committed = self._settings.ledger.manifest(work.shard)
        if committed is not None:  # the actor died between committing and saying so
            self._on_commit(committed)
        elif not alone:
            self._returned.append(_Work(work.shard, suspect=True, kills=work.kills))
        elif len(work.shard.uris) > 1:
            self._returned.extend(_Work(half, suspect=True) for half in work.shard.halves())
        elif work.kills + 1 < KILLS_TO_CONDEMN:
            self._returned.append(_Work(work.shard, suspect=True, kills=work.kills + 1))
        else:
            self._condemn(work.shard)

    def _condemn(self, shard: Shard) -> None:
        letter = DeadLetter(shard.uris[0], "crash", f"This input killed its actor {KILLS_TO_CONDEMN} times")
        manifest = Manifest(0, (letter,))
        self._settings.ledger.commit(shard, [], manifest)
        self._on_commit(manifest)
