"""Call: one HTTP request's way to the fleet. Every dialect detects through it, so that none can forget the rest.

headers → Terms (deadline, priority) → Call.detect / frames / infer → fleet
└── what each answer cost → ``Server-Timing``, ``X-Replica``, Statistics, spans

X-Request-Timeout-Ms: 500      after that nothing is computed any more for this request (504)
X-Priority: high|normal|low    who is served first when there is a queue
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Depends, Request
from numpy.typing import NDArray
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from actors.errors import BadRequest, FleetError
from actors.schemas import PRIORITIES, Answer, ModelInfo, PredictParams, TensorAnswer, Terms, Timing
from deploy.api.fleet import Fleet
from deploy.api.statistics import Statistics
from deploy.api.tracing import RequestTrace, span_of

T = TypeVar("T")

STAGES = {"queue": "queue", "decode": "decode", "batch-wait": "batch_wait", "infer": "inference", "post": "postprocess"}


class Call:
    """The fleet as one request sees it: on its terms, and with a record of what its answers cost.

    Args:
        fleet: answers.
        terms: of this request.
        statistics: where its answers and errors are counted.
        trace: where they are recorded.
    """

    def __init__(self, fleet: Fleet, terms: Terms, statistics: Statistics, trace: RequestTrace) -> None:
        self.fleet, self.terms, self._statistics, self._trace = fleet, terms, statistics, trace
        self._timings: list[Timing] = []
        self._replicas: set[str] = set()

    async def describe(self, model: str | None) -> ModelInfo:
        """What the named model, or the primary one, is; UnknownModel where it is not served."""
        return await self.fleet.describe(model)

    async def detect(self, model: str | None, image: bytes, params: PredictParams, *, annotate: bool = False) -> Answer:
        """Detect in one encoded image; see ``Fleet.detect``."""
        with self._counting("detect", model) as done:
            answer = await self.fleet.detect(model, image, params, self.terms, annotate=annotate)
            done(answer.result.timing, answer.replica, 1)
        return answer

    async def detect_all(
        self, model: str | None, images: Sequence[tuple[str, bytes]], params: PredictParams, *, annotate: bool = False
    ) -> list[Answer]:
        """Detect in several (label, encoded image) at once; an error names the image's label where there are several.

        All or nothing: with the first error the others are cancelled.
        """

        async def one(label: str, image: bytes) -> Answer:
            try:
                return await self.detect(model, image, params, annotate=annotate)
            except FleetError as error:
                raise labelled(error, label) if len(images) > 1 else error from error

        return await all_or_nothing([one(*image) for image in images])

    async def frames(
        self, model: str | None, video: bytes, params: PredictParams, stride: int = 1
    ) -> AsyncGenerator[Answer, None]:
        """Detect in every ``stride``-th frame of a video, in order; see ``Fleet.frames``."""
        with self._counting("frames", model) as done:
            async with aclosing(self.fleet.frames(model, video, params, self.terms, stride)) as answers:
                async for answer in answers:
                    done(answer.result.timing, answer.replica, 1)
                    yield answer

    async def infer(self, model: str | None, inputs: NDArray[np.float32]) -> TensorAnswer:
        """Run the engine over a tensor; see ``Fleet.infer``."""
        with self._counting("infer", model) as done:
            answer = await self.fleet.infer(model, inputs, self.terms)
            done(answer.timing, answer.replica, len(inputs))
        return answer

    def headers(self) -> dict[str, str]:
        """``Server-Timing`` and ``X-Replica`` for what has been answered so far; nothing before the first answer.

        A request of several images gets the slowest of each stage, since they ran side by side.
        """
        if not self._timings:
            return {}
        slowest = {name: max(getattr(timing, field) for timing in self._timings) for name, field in STAGES.items()}
        stages = [f"{name};dur={milliseconds:.2f}" for name, milliseconds in slowest.items()]
        largest = max(timing.batch_size for timing in self._timings)
        return {
            "server-timing": ", ".join([*stages, f'batch;desc="{largest}"', f'replica;desc="{self._replica_list()}"']),
            "x-replica": self._replica_list(),
        }

    def _replica_list(self) -> str:
        return ",".join(sorted(self._replicas))

    @contextmanager
    def _counting(self, work: str, model: str | None) -> Iterator[Callable[[Timing, str, int], None]]:
        """Record each answer that is handed over, with its replica and number of images; count an error."""
        started = time.perf_counter()
        statistics = self._statistics.of(model)

        def done(timing: Timing, replica: str, images: int) -> None:
            nonlocal started
            now = time.perf_counter()
            statistics.succeeded(1e3 * (now - started), timing, images)
            started = now
            answered(timing, replica)
            self._timings.append(timing)
            self._replicas.add(replica)

        try:
            with self._trace.work(work, model or self.fleet.model_names()[0]) as answered:
                yield done
        except Exception as error:
            code = error.code if isinstance(error, FleetError) else FleetError.code
            statistics.failed(1e3 * (time.perf_counter() - started), code)
            raise


async def call_of(request: Request) -> Call:  # async: FastAPI would run it in a thread, a hop per request
    """This request's Call; made once, and found by the middleware in ``request.state.call``."""
    if not hasattr(request.state, "call"):
        request.state.call = new_call(request)
    call: Call = request.state.call
    return call


def new_call(connection: HTTPConnection) -> Call:
    """A Call whose time begins now: one for a request, one for each frame of a websocket."""
    state = connection.app.state
    terms = _terms(connection.headers, state.limits.request_timeout_s, getattr(connection.state, "request_id", ""))
    return Call(state.fleet, terms, state.statistics, RequestTrace(state.tracer, span_of(connection.scope)))


TheCall = Annotated[Call, Depends(call_of)]


def labelled(error: FleetError, label: str) -> FleetError:
    """The same error with the image's label before its sentence."""
    return type(error)(f"{label}: {error.message}")


async def all_or_nothing(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once; with the first error cancel the others and raise it."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


def _terms(headers: Headers, default_s: float, request_id: str) -> Terms:
    timeout_s = default_s
    if given := headers.get("x-request-timeout-ms"):
        if not re.fullmatch("[1-9][0-9]{0,11}", given):
            raise BadRequest(f"X-Request-Timeout-Ms is '{given}': give a whole number of milliseconds")
        timeout_s = min(int(given) / 1e3, default_s)
    priority = headers.get("x-priority", "normal").lower()
    for known in PRIORITIES:
        if priority == known:
            return Terms(time.monotonic() + timeout_s, known, request_id)
    raise BadRequest(f"X-Priority is '{priority}': give one of {', '.join(PRIORITIES)}")
