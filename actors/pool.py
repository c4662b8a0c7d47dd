"""The dataset pool: plain Ray actors that pull shards and commit them; a driver that holds references and counts only.

    driver                                  ShardActor (one private model each)
    run_pool: shards ──── process ────────→ read → Detector.submit → rows → ledger.commit
              counts ←─── Manifest ────────┘
              an actor died: a new one takes its place; its shards are tried alone, then bisected,
              until the input that kills actors stands alone. After its second kill it is a dead letter.
              a node is drained: its actors finish what they have and get nothing more; others start elsewhere.

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
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import ray
import ray._private.state
from numpy.typing import NDArray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from actors.annotate import annotate, draw
from actors.clips import hash_clip, parse_frame, read_frames
from actors.dataset import Shard, read_input
from actors.detector import Detector
from actors.errors import BadImage, FleetError, ModelError, ReplicaUnavailable
from actors.hardware import step_back
from actors.images import encode_jpeg
from actors.ledger import DeadLetter, Ledger, Manifest
from actors.right_of_way import give_way, node_folder
from actors.schemas import ImageResult, ModelInfo, PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings, TrackerSettings
from actors.startup import settled_detector
from actors.storage import credentials
from actors.tracker import StreamTracker
from actors.writers import Place, picture_name, row

IN_FLIGHT = 2
KILLS_TO_CONDEMN = 2
WAIT_S = 2.0
MAX_FAILED_STARTS = 3
STAGES = ("decode", "batch_wait", "preprocess", "inference", "postprocess")
STARVED = "starved"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolSettings:
    """What every actor of one job is given.

    Attributes:
        health_timeout_s: how long an engine may take for a small picture before its actor is replaced.
        annotate: whether to draw a picture of every result.
        tracker: what the detections are for; refused at once if the model or the settings do not fit.
        background: take only CPU time that nothing else on the node wants, and none while a replica there computes.
        environment: how the driver reaches buckets.
    """

    model: ModelSettings
    actor: ActorSettings
    limits: ImageLimits
    params: PredictParams
    ledger: Ledger
    health_timeout_s: float = 120.0
    annotate: bool = False
    tracker: TrackerSettings | None = None
    background: bool = False
    environment: dict[str, str] = field(default_factory=credentials, repr=False)


@dataclass(frozen=True, slots=True)
class _Read:
    """An input that was read; its bytes or pixels are kept if a picture is made of them. A frame's hash is its video's."""

    sha256: str | None
    place: Place | None
    milliseconds: float
    image: bytes | NDArray[np.uint8] | None
    detecting: Future[ImageResult]


class ShardActor:
    """One private model that takes shards and commits them. The Ray shell of a Detector."""

    def __init__(self, settings: PoolSettings) -> None:
        os.environ.update(settings.environment)
        self._settings = settings
        self._window = 2 * settings.model.max_batch + settings.actor.threads  # images in flight: bounds the memory
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="read")
        self._detector: Detector
        self._starved_s, self._committing = 0.0, threading.Lock()

    def load(self) -> tuple[str, ModelInfo]:
        """Load and warm the model, and try the job's parameters on it; returns the id of this node, and the model.

        Not in the constructor: an error of a method keeps its type on the way to the driver, a constructor's does not.

        Raises:
            ModelError, BadRequest: the weights, or the parameters with these weights, cannot be used; or what the actor has
                reserved does not do for them.
        """
        if self._settings.background:
            give_way(node_folder())  # first: what is started afterwards is of the idle class as well
            step_back()
        self._detector = settled_detector(self._settings.model, self._settings.actor, self._settings.limits)
        grey = np.full((64, 64, 3), 114, np.uint8)
        result = self._detector.submit(encode_jpeg(grey), self._settings.params).result()
        if self._settings.tracker:
            StreamTracker(self._settings.tracker).update(result, grey)
        threading.Thread(target=self._watch, name="health", daemon=True).start()
        return str(ray.get_runtime_context().get_node_id()), self._detector.info

    def process(self, shard: Shard) -> Manifest:
        """Detect in a shard's inputs and commit it. Every input becomes a row or a dead letter."""
        if self._settings.background:
            step_back()
        rows: list[dict[str, Any]] = []
        letters: list[DeadLetter] = []
        classes: Counter[str] = Counter()
        stages = dict.fromkeys(("read", *STAGES), 0.0)
        versions = dict(zip(shard.uris, shard.versions, strict=False))
        for uri, outcome in self._outcomes(shard):
            if isinstance(outcome, DeadLetter):
                letters.append(replace(outcome, version=versions.get(uri)))
                continue
            read, result = outcome
            name, version = self._settings.model.name, versions.get(uri)
            rows.append(row(uri, read.sha256, name, result, version=version, place=read.place))
            if read.image is not None:
                self._draw(picture_name(uri), read.image, result)
            classes.update(detection.name for detection in result.detections)
            stages["read"] += read.milliseconds
            for stage in STAGES:
                stages[stage] += getattr(result.timing, stage)
        stages[STARVED] = self._starved_ms()
        manifest = Manifest(len(rows), tuple(letters), dict(classes), stages)
        self._settings.ledger.commit(shard, rows, manifest, asdict(self._detector.info))
        return manifest

    def _starved_ms(self) -> float:
        """How long the model thread has had nothing to do since the last shard."""
        with self._committing:
            before, self._starved_s = self._starved_s, self._detector.starved_s
            return 1e3 * (self._starved_s - before)

    def _draw(self, name: str, image: bytes | NDArray[np.uint8], result: ImageResult) -> None:
        limits, ledger = self._settings.limits, self._settings.ledger
        picture = draw(image, result, limits) if isinstance(image, bytes) else encode_jpeg(annotate(image, result))
        ledger.storage.put(name, picture, ledger.lease)

    def _outcomes(self, shard: Shard) -> Iterator[tuple[str, tuple[_Read, ImageResult] | DeadLetter]]:
        """Each input's outcome in order, with a bounded window of images in flight."""
        begun = self._begin(shard.uris)
        window: deque[tuple[str, Future[_Read]]] = deque()
        while True:
            while len(window) < self._window and (entry := next(begun, None)) is not None:
                window.append(entry)
            if not window:
                return
            uri, reading = window.popleft()
            yield uri, self._outcome(uri, reading)

    def _begin(self, uris: Iterable[str]) -> Iterator[tuple[str, Future[_Read]]]:
        """Begin to read each input: an image by itself, the frames of one video as a span."""
        for clip, group in groupby(uris, key=lambda uri: (parse_frame(uri) or (None,))[0]):
            if clip is None:
                yield from ((uri, self._readers.submit(self._read, uri)) for uri in group)
            else:
                yield from self._begin_span(clip, list(group))

    def _read(self, uri: str) -> _Read:
        started = time.perf_counter()
        data = read_input(uri)
        milliseconds = 1e3 * (time.perf_counter() - started)
        detecting = self._detector.submit(data, self._settings.params)
        kept = data if self._settings.annotate else None
        return _Read(hashlib.sha256(data).hexdigest(), None, milliseconds, kept, detecting)

    def _begin_span(self, clip: str, uris: list[str]) -> Iterator[tuple[str, Future[_Read]]]:
        """Decode a span frame by frame, here, as the window makes room: the model thread is busy with those before."""
        frames, sha256 = read_frames(clip, [number for _, number in filter(None, map(parse_frame, uris))]), hash_clip(clip)
        failure = BadImage("This frame cannot be decoded: the video is truncated or damaged there or before")
        for uri in uris:
            reading: Future[_Read] = Future()
            started = time.perf_counter()
            try:
                frame = next(frames, None)
            except BadImage as error:
                frame, failure = None, error
            milliseconds = 1e3 * (time.perf_counter() - started)
            if frame is None:
                detecting: Future[ImageResult] = Future()
                detecting.set_exception(failure)
                reading.set_result(_Read(sha256, None, milliseconds, None, detecting))
            else:
                place = Place(clip, frame.number, frame.time_s)
                detecting = self._detector.submit_frame(frame.image, self._settings.params)
                kept = frame.image if self._settings.annotate else None
                reading.set_result(_Read(sha256, place, milliseconds, kept, detecting))
            yield uri, reading

    def _outcome(self, uri: str, reading: Future[_Read]) -> tuple[_Read, ImageResult] | DeadLetter:
        try:
            read = reading.result()
        except OSError as error:
            return DeadLetter(uri, "read", f"The file cannot be read: {error.strerror or error}")
        except Exception as error:  # one input's failure is its own; the reason is in the dead letter
            return DeadLetter(uri, "read", _reason(error))
        try:
            return read, read.detecting.result()
        except BadImage as error:
            return DeadLetter(uri, "decode", error.message, read.sha256)
        except Exception as error:
            self._leave_if_broken(error)
            return DeadLetter(uri, "predict", _reason(error), read.sha256)

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


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, FleetError) else f"{type(error).__name__}: {error}"


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
                scheduling_strategy="SPREAD",  # so that a lost node takes few of them
            )
            .remote(settings)
        )
        self.starting: Any = self.actor.load.remote()
        self.node: str | None = None  # where it has loaded
        self.leaves = False  # that node is being drained
        self.in_flight: dict[Any, _Work] = {}

    def accepts(self, work: _Work) -> bool:
        """A suspect is tried alone, so that a death has one culprit."""
        if self.leaves or self.starting is not None or any(other.suspect for other in self.in_flight.values()):
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
    on_ready: Callable[[ModelInfo], None] = lambda info: None,
) -> None:
    """Process every shard on up to ``actors`` actors; returns when all are committed.

    All actors are asked for at once. Ray starts those that it has room for, and each other when a node joins or somebody
    leaves; on an autoscaling cluster their waiting is what brings the nodes. An actor that finds no work left ends.

    Args:
        settings: what every actor is given.
        shards: the work; taken one by one.
        actors: how many actors at most.
        on_commit: called with the manifest of each shard as it is committed. What it raises ends the pool.
        on_wait: called every few seconds while nothing is.
        on_ready: called for each actor with what it has loaded. What it raises ends the pool.

    Raises:
        ModelError: the model cannot be loaded, or actors cannot be started.
        FleetError: whatever else an actor raised as expected.
    """
    _Pool(settings, shards, on_commit, on_wait, on_ready).run(actors)


class _Pool:
    def __init__(
        self,
        settings: PoolSettings,
        shards: Iterable[Shard],
        on_commit: Callable[[Manifest], None],
        on_wait: Callable[[], None],
        on_ready: Callable[[ModelInfo], None],
    ) -> None:
        self._settings = settings
        self._shards = iter(shards)
        self._returned: deque[_Work] = deque()
        self._on_commit = on_commit
        self._on_wait = on_wait
        self._on_ready = on_ready
        self._failed_starts = 0
        self._next_look = 0.0

    def run(self, actors: int) -> None:
        workers = [_Worker(self._settings) for _ in range(actors)]
        try:
            while True:
                self._leave_draining_nodes(workers)
                for worker in workers:
                    self._feed(worker)
                if not self._more():
                    _let_go(workers, workers)
                    if not workers:
                        return
                elif all(worker.leaves for worker in workers):  # those beside them were let go, and one that left has died
                    workers.append(_Worker(self._settings))
                references = {ref: worker for worker in workers for ref in worker.references()}
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
                (worker.node, info), worker.starting, self._failed_starts = outcome, None, 0
                self._on_ready(info)
            else:
                del worker.in_flight[done]
                self._on_commit(outcome)

    def _leave_draining_nodes(self, workers: list[_Worker]) -> None:
        """Put another actor beside each one whose node is being drained, and end that one when it has nothing in flight."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + WAIT_S
            draining = ray._private.state.state.get_draining_nodes()  # as Ray's own libraries ask for it; Ray is pinned
            for worker in [worker for worker in workers if worker.node in draining and not worker.leaves]:
                worker.leaves = True
                workers.append(_Worker(self._settings))
        _let_go([worker for worker in workers if worker.leaves], workers)

    def _replace(self, worker: _Worker, workers: list[_Worker], error: Exception) -> None:
        ray.kill(worker.actor)  # it may be unreachable, not dead, and must not commit what others will
        if worker.starting is not None:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS and all(other.starting is not None for other in workers):
                raise ModelError(f"{self._failed_starts} actors died while loading the model: {error}") from None
        suspects = list(worker.in_flight.values())
        log.warning("an actor died with %d shards in flight; they are tried again", len(suspects))
        for work in suspects:
            self._retry(work, alone=len(suspects) == 1)
        if worker.leaves:  # another one has its place already
            workers.remove(worker)
        else:
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
        version = shard.versions[0] if shard.versions else None
        reason = f"This input killed its actor {KILLS_TO_CONDEMN} times"
        letter = DeadLetter(shard.uris[0], "crash", reason, version=version)
        manifest = Manifest(0, (letter,))
        self._settings.ledger.commit(shard, [], manifest)
        self._on_commit(manifest)


def _let_go(some: list[_Worker], workers: list[_Worker]) -> None:
    """End those of them that have nothing to do, or wait for a place: their reservations are of use to others."""
    for worker in [worker for worker in some if not worker.in_flight]:
        ray.kill(worker.actor)
        workers.remove(worker)
