"""Ingress: the front of the fleet. HTTP in; admission, deadlines and the choice of a backend; no model of its own if routed.

    dialect → Ingress.detect(model, bytes, params, terms) → Admission.slot → Backend → Answer, with what it waited for

In the topology ``direct`` it also holds the primary model's replica in its own process, so that a request crosses one hop;
other models are reached through handles all the same.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import ray
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from actors.errors import DeadlineExceeded, FleetError, ReplicaUnavailable, UnknownJob, UnknownModel
from actors.metrics import IngressMetrics
from actors.schemas import (
    Answer,
    FleetReport,
    Gallery,
    JobReport,
    ModelInfo,
    ModelReport,
    ModelStatus,
    PredictParams,
    StreamStatus,
    TensorAnswer,
    Terms,
    Vitals,
)
from actors.settings import Regions, StreamSettings
from deploy.admission import Admission
from deploy.api import create_api
from deploy.backends import Backend, PrivateModel, RemoteModel
from deploy.jobs import gallery, list_jobs
from deploy.logs import log_with_serve
from deploy.release import INGRESS, Release
from deploy.replica import ModelReplica
from deploy.roster import RUNNING, STARTING, TTL_S, Deployment, Remembered, Roster, is_wanted
from deploy.settings import ServedModel
from deploy.streams import RemoteStream, Streams
from deploy.tracing import configured_provider

READY_TIMEOUT_S = 5.0
REPORT_S = 1.0  # the queues' gauges follow every change within it
RECENT_BYTES = 32_000_000  # of each model's latest images, which a new version of its weights is compared on

T = TypeVar("T", Answer, TensorAnswer)
log = logging.getLogger(__name__)


@dataclass
class _Served:
    """A model as this ingress knows it."""

    settings: ServedModel
    backend: Backend
    admission: Admission
    info: ModelInfo | None = None
    asked_at: float = 0.0  # for ``info``, in time.monotonic()
    vitals: Remembered[list[Vitals]] = field(init=False)
    streams: int = 0  # that are connected here
    recent: deque[tuple[bytes, PredictParams]] = field(default_factory=lambda: deque(maxlen=64))

    def __post_init__(self) -> None:
        self.vitals = Remembered(self.backend.vitals)


@serve.ingress()
class Ingress:
    """Serves ``create_api`` over the configured models.

    Args:
        handles: model name → its deployment. In the topology ``direct`` the primary model has none.
        release: the application.
    """

    def __init__(self, handles: dict[str, DeploymentHandle], release: Release) -> None:
        log_with_serve()
        settings = release.settings
        self._release, self._settings = release, settings
        self._metrics = IngressMetrics()
        self._traces = configured_provider()
        self._private: PrivateModel | None = None
        self._roster = Roster()
        self._models = {model.name: self._serve(model, handles.get(model.name)) for model in settings.models}
        self._streams = Streams(settings.images, settings.http.streams)
        self._stays: set[asyncio.Timeout] = set()  # one for each stream that is connected
        self._leaving: asyncio.Task[None] | None = None
        self._report: asyncio.TimerHandle | None = None
        self._jobs = Remembered(list_jobs)
        self._browsing = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> FastAPI:
        tracer = None if self._traces is None else self._traces.get_tracer("yolofleet")
        return create_api(self, self._settings.http, self._settings.auth, tracer, behind_serve=True)

    def model_names(self) -> list[str]:
        """The served names, the primary one first."""
        return list(self._models)

    def release(self) -> Release:
        """What this application was started with."""
        return self._release

    def recent(self, model: str) -> tuple[str, list[tuple[bytes, PredictParams]]]:
        """The latest images of a model with their parameters, oldest first, and whose memory this is: this process's only."""
        return _own_actor(), list(self._of(model).recent)

    async def replay(self, model: str, image: bytes, params: PredictParams, seconds: float) -> Answer:
        """Detect once more in a recent image: no client waits for it, so it takes no slot and is not counted."""
        return await self._of(model).backend.detect(image, params, Terms(time.monotonic() + seconds), False)

    async def detect(
        self, model: str | None, image: bytes, params: PredictParams, terms: Terms, *, annotate: bool = False
    ) -> Answer:
        """Detect in one encoded image; see ``Fleet.detect``."""
        served = self._of(model)
        answer = await self._answered(served, terms, lambda: served.backend.detect(image, params, terms, annotate))
        self._remember(served, image, params)
        return answer

    async def frames(
        self, model: str | None, video: bytes, params: PredictParams, terms: Terms, stride: int = 1
    ) -> AsyncGenerator[Answer, None]:
        """Detect in a video; see ``Fleet.frames``. It takes one slot."""
        served, started = self._of(model), time.monotonic()
        with self._counting(served):
            await self._described(served, terms)
            async with served.admission.slot(terms):
                waited = time.monotonic() - started
                async with aclosing(served.backend.frames(video, params, terms, stride)) as answers:
                    async for answer in answers:
                        yield answer
        self._metrics.queued(served.settings.name, served.info, waited)

    async def infer(self, model: str | None, inputs: NDArray[np.float32], terms: Terms) -> TensorAnswer:
        """Run the engine over a tensor; see ``Fleet.infer``."""
        served = self._of(model)
        return await self._answered(served, terms, lambda: served.backend.infer(inputs, terms))

    @asynccontextmanager
    async def stream(self, settings: StreamSettings, *, exclusive: bool) -> AsyncIterator[RemoteStream]:
        """Hold a live stream; see ``Fleet.stream``."""
        served = self._of(settings.model)
        stream = await self._streams.open(
            settings, exclusive, lambda dropped: self._metrics.stream_frame(settings.model, served.info, dropped)
        )
        self._connected(served, 1)
        try:
            async with asyncio.timeout(None) as stay:
                self._stays.add(stay)
                if self._leaving is None or self._leaving.done():
                    self._leaving = asyncio.create_task(self._leave_in_time())
                yield stream
        except TimeoutError:
            if stay.expired():
                raise ReplicaUnavailable("This server makes room for another one: connect again, the stream goes on") from None
            raise
        finally:
            self._stays.discard(stay)
            self._connected(served, -1)

    async def streams(self) -> list[StreamStatus]:
        """The live streams that run."""
        return await self._streams.statuses()

    async def count_at(self, stream: str, regions: Regions) -> None:
        """Count at these lines and zones of a live stream; see ``Fleet.count_at``."""
        await self._streams.count_at(stream, regions)

    async def end_stream(self, stream: str) -> None:
        """Forget a live stream; see ``Fleet.end_stream``."""
        await self._streams.end(stream)

    async def describe(self, model: str | None) -> ModelInfo:
        """What a model is."""
        return await self._described(self._of(model), Terms(time.monotonic() + self._settings.http.request_timeout_s))

    async def status(self, model: str) -> ModelStatus:
        """How a model is doing now; the numbers of replicas are those of a second ago at most."""
        served = self._of(model)
        return _status(served, await self._deployment(served))

    async def report(self) -> FleetReport:
        """The whole fleet; what comes from Serve and from replicas is a second old at most."""
        ingresses = (await self._roster.look()).get(INGRESS, Deployment()).target
        models = await asyncio.gather(*map(self._model_report, self._models.values()))
        return FleetReport(_own_actor(), ingresses, tuple(models))

    async def jobs(self) -> list[JobReport] | None:
        """The dataset jobs, the latest first; see ``list_jobs``."""
        return await self._jobs()

    async def gallery(self, job: str) -> Gallery:
        """A few of a dataset job's results; see ``Fleet.gallery``. One at a time: pictures are dear."""
        known = next((each for each in await self._jobs() or () if each.id == job), None)
        if known is None:
            raise UnknownJob(f"There is no job '{job}': GET /jobs tells which there are")
        async with self._browsing:
            return await gallery(known, self._settings.images)

    def vitals(self) -> Vitals | None:
        """How this process is, for the ingresses that ask each other; None if it holds no model."""
        return None if self._private is None else self._private.replica.vitals()

    async def check(self, model: str) -> None:
        """Ask a replica of ``model`` whether it is there, never the cache.

        A model that scales to zero is well if Serve says so: asking it would start it, or keep it from going to sleep.

        Raises:
            ReplicaUnavailable: none answered within ``READY_TIMEOUT_S``, or it cannot be started.
        """
        served = self._of(model)
        if served.settings.replicas.min == 0:
            deployment = await self._deployment(served)
            if deployment.failed and not deployment.count(RUNNING):
                raise ReplicaUnavailable(f"'{model}' cannot be started: see the server's log")
            if served.info is not None or not deployment.count(RUNNING):
                return
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                served.info = await served.backend.describe()
        except TimeoutError:
            raise ReplicaUnavailable(f"No replica of '{model}' answers") from None

    async def check_health(self) -> None:
        """Called by Serve; raising replaces this ingress. It also reports the queues, those without change too."""
        self._report_soon()
        if self._private is not None:
            await self._private.replica.check_health()

    def __del__(self) -> None:
        if (private := getattr(self, "_private", None)) is not None:
            private.replica.close()
        if (traces := getattr(self, "_traces", None)) is not None:
            traces.shutdown()

    def _serve(self, model: ServedModel, handle: DeploymentHandle | None) -> _Served:
        http = self._settings.http
        replicas = 1 if handle is None else model.replicas.max
        admission = Admission(model.name, replicas * model.in_flight, http.max_waiting_requests)
        if handle is not None:
            return _Served(model, RemoteModel(handle, lambda actor: self._retried(model.name, actor)), admission)
        replica = ModelReplica(model, self._settings.images)
        self._private = PrivateModel(replica)
        return _Served(model, self._private, admission, replica.describe())

    def _of(self, model: str | None) -> _Served:
        name = next(iter(self._models)) if model is None else model
        if name not in self._models:
            self._metrics.unknown()
            raise UnknownModel(f"There is no model '{name}': served are {', '.join(self._models)}")
        return self._models[name]

    def _deployment_name(self, served: _Served) -> str:
        return INGRESS if served.backend is self._private else f"model-{served.settings.name}"

    async def _deployment(self, served: _Served) -> Deployment:
        """Its deployment as Serve saw it a second ago at most."""
        return (await self._roster.look()).get(self._deployment_name(served), Deployment())

    async def _model_report(self, served: _Served) -> ModelReport:
        """All about one model. One that scales to zero is not asked for vitals: that would keep it from going to sleep."""
        settings, deployment = served.settings, await self._deployment(served)
        told = await served.vitals() if settings.replicas.min else []
        deaths = self._roster.deaths(self._deployment_name(served))
        return ModelReport(
            name=settings.name,
            info=served.info,
            status=_status(served, deployment),
            target=deployment.target,
            num_cpus=settings.actor.num_cpus,
            num_gpus=settings.actor.num_gpus,
            replicas=deployment.with_vitals(told),
            deaths=deaths.count,
            latest_deaths=deaths.latest,
        )

    async def _described(self, served: _Served, terms: Terms) -> ModelInfo:
        """What the model is; asked again only while its engine is not settled, since a deployment's replicas are alike."""
        if served.info is None or (not served.info.settled and time.monotonic() - served.asked_at > REPORT_S):
            served.asked_at = time.monotonic()
            try:
                async with asyncio.timeout(terms.deadline - time.monotonic()):
                    served.info = await served.backend.describe()
            except TimeoutError:
                raise DeadlineExceeded(f"No replica of '{served.settings.name}' was there in time: try again") from None
        return served.info

    async def _answered(self, served: _Served, terms: Terms, work: Callable[[], Awaitable[T]]) -> T:
        """Run ``work`` in a slot, and put into its timing what the replica did not see."""
        started = time.monotonic()
        with self._counting(served):
            await self._described(served, terms)
            async with served.admission.slot(terms):
                answer = await work()
        answer = _with_queue(answer, 1e3 * (time.monotonic() - started))
        timing = answer.timing if isinstance(answer, TensorAnswer) else answer.result.timing
        self._metrics.queued(served.settings.name, served.info, timing.queue / 1e3)
        return answer

    @contextmanager
    def _counting(self, served: _Served) -> Iterator[None]:
        """Count what the body answers, or how it failed, and let the gauges follow."""
        outcome, started = "ok", time.monotonic()
        self._report_soon()
        try:
            yield
        except BaseException as error:
            outcome = _outcome(error)
            raise
        finally:
            self._metrics.answered(served.settings.name, served.info, outcome, time.monotonic() - started)
            self._report_soon()

    def _report_soon(self) -> None:
        """Something came or went: report the queues in a moment, once for all that changes until then."""
        if self._report is None:
            self._report = asyncio.get_running_loop().call_later(REPORT_S, self._report_load)

    def _report_load(self) -> None:
        self._report = None
        for served in self._models.values():
            if served.info is not None:
                load = ModelStatus(0, 0, served.admission.waiting, served.admission.in_flight)
                self._metrics.load(served.info, load)

    async def _leave_in_time(self) -> None:
        """A replica that shall go is given time to answer what it has. Streams would not end: they are asked to leave."""
        while self._stays:
            await asyncio.sleep(TTL_S)
            try:
                wanted = await asyncio.to_thread(is_wanted, _own_actor())
            except Exception:  # Serve's controller may be about to start again
                log.warning("Serve does not tell whether this ingress shall go on", exc_info=True)
                continue
            if not wanted:
                for stay in self._stays:
                    if not stay.expired():
                        stay.reschedule(0)

    def _connected(self, served: _Served, change: int) -> None:
        served.streams += change
        self._metrics.streams(served.settings.name, served.info, served.streams)

    def _remember(self, served: _Served, image: bytes, params: PredictParams) -> None:
        served.recent.append((image, params))
        while sum(len(data) for data, _ in served.recent) > RECENT_BYTES:
            served.recent.popleft()

    def _retried(self, model: str, died: str | None) -> None:
        served = self._models[model]
        self._metrics.retried(model, served.info)
        if died is not None:
            self._roster.lost(self._deployment_name(served), died)


def _status(served: _Served, deployment: Deployment) -> ModelStatus:
    running, starting = deployment.count(RUNNING), deployment.count(STARTING)
    return ModelStatus(running, starting, served.admission.waiting, served.admission.in_flight)


def _own_actor() -> str:
    return ray.get_runtime_context().get_actor_id() or ""


def _outcome(error: BaseException) -> str:
    if isinstance(error, FleetError):
        return error.code
    return "cancelled" if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else FleetError.code


def _with_queue(answer: T, total_ms: float) -> T:
    """The answer whose ``queue`` is what of ``total_ms`` its replica does not account for: waiting here and on the way."""
    timing = answer.timing if isinstance(answer, TensorAnswer) else answer.result.timing
    known = timing.decode + timing.batch_wait + timing.engine + timing.postprocess
    timing = replace(timing, queue=max(total_ms - known, 0.0))
    if isinstance(answer, TensorAnswer):
        return replace(answer, timing=timing)
    return replace(answer, result=replace(answer.result, timing=timing))
