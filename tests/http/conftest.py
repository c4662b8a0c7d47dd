"""The fleet protocol over one Detector on FakeModel, in this process and without Ray, and the API on top of it."""

import asyncio
import itertools
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray

from actors.annotate import draw
from actors.detector import Detector
from actors.errors import ReplicaUnavailable, StreamConflict, UnknownJob, UnknownModel, UnknownStream
from actors.fake_model import FakeModel
from actors.schemas import (
    Answer,
    Death,
    FleetReport,
    Gallery,
    JobReport,
    ModelInfo,
    ModelReport,
    ModelStatus,
    PredictParams,
    ReplicaReport,
    Sighting,
    StreamStatus,
    TensorAnswer,
    Terms,
    Tracked,
    Vitals,
)
from actors.settings import ImageLimits, ModelSettings, Regions, StreamSettings
from actors.stream import Stream
from actors.video import read_video
from deploy.api import create_api
from deploy.environment import free_port
from deploy.settings import HttpLimits
from tests.conftest import until

LIMITS = HttpLimits(max_body_mb=0.5, max_images_per_request=4)
IMAGE_LIMITS = ImageLimits(max_megapixels=0.1, max_image_mb=0.2, max_video_mb=0.3, max_video_frames=20)


class OneDetectorFleet:
    """The fleet protocol over one Detector."""

    def __init__(self, detector: Detector, images: ImageLimits = IMAGE_LIMITS) -> None:
        self._detector, self._images = detector, images
        self.gone = False
        self.replicas: tuple[ReplicaReport, ...] = (
            ReplicaReport("one", "a1", "10.0.0.1", "n1", "RUNNING", 1.0, Vitals("a1", 300_000_000, None, (1, 2))),
            ReplicaReport("two", "a2", None, None, "STARTING", 2.0, None),
        )
        self.deaths: tuple[Death, ...] = ()
        self.submitted: list[JobReport] | None = None
        self.galleries: dict[str, Gallery] = {}
        self._streams: dict[str, Stream] = {}

    def model_names(self) -> list[str]:
        return ["fake"]

    async def describe(self, model: str | None) -> ModelInfo:
        if model not in (None, "fake"):
            raise UnknownModel(f"There is no model '{model}': served are fake")
        return self._detector.info

    async def status(self, model: str) -> ModelStatus:
        await self.describe(model)
        return ModelStatus(replicas=1, starting=0, waiting=0, in_flight=0)

    async def report(self) -> FleetReport:
        model = ModelReport(
            name="fake",
            info=self._detector.info,
            status=await self.status("fake"),
            target=2,
            num_cpus=0.5,
            num_gpus=0.25,
            replicas=self.replicas,
            deaths=len(self.deaths),
            latest_deaths=self.deaths,
        )
        return FleetReport("here", 1, (model,))

    async def jobs(self) -> list[JobReport] | None:
        return self.submitted

    async def gallery(self, job: str) -> Gallery:
        if job not in {each.id for each in self.submitted or ()}:
            raise UnknownJob(f"There is no job '{job}'")
        return self.galleries[job]

    async def check(self, model: str) -> None:
        await self.describe(model)
        if self.gone:
            raise ReplicaUnavailable(f"No replica of '{model}' answers")

    async def detect(
        self, model: str | None, image: bytes, params: PredictParams, terms: Terms, *, annotate: bool = False
    ) -> Answer:
        await self.describe(model)
        result = await asyncio.wrap_future(self._detector.submit(image, params, terms.deadline))
        return Answer(result, "here", draw(image, result, self._images) if annotate else None)

    async def frames(
        self, model: str | None, video: bytes, params: PredictParams, terms: Terms, stride: int = 1
    ) -> AsyncGenerator[Answer, None]:
        await self.describe(model)
        for _, frame in read_video(video, self._images, stride):
            result = await asyncio.wrap_future(self._detector.submit_frame(frame, params, terms.deadline))
            yield Answer(result, "here")

    async def infer(self, model: str | None, inputs: NDArray[np.float32], terms: Terms) -> TensorAnswer:
        await self.describe(model)
        outputs, timing = await asyncio.wrap_future(self._detector.submit_tensor(inputs, terms.deadline))
        return TensorAnswer(outputs, "here", timing)

    @asynccontextmanager
    async def stream(self, settings: StreamSettings, *, exclusive: bool) -> AsyncIterator["LocalFollower"]:
        stream = self._streams.setdefault(settings.stream, Stream(settings))
        if not stream.settings.fits(settings):
            raise StreamConflict("It runs otherwise")
        if settings.regions is not None:
            stream.count_at(settings.regions)
        connection = uuid.uuid4().hex if exclusive else ""
        if exclusive:
            stream.take_over(connection)
        yield LocalFollower(stream, connection, self._images)

    async def streams(self) -> list[StreamStatus]:
        return [stream.status(0.0) for _, stream in sorted(self._streams.items())]

    async def count_at(self, stream: str, regions: Regions) -> None:
        if stream not in self._streams:
            raise UnknownStream(f"There is no stream '{stream}'")
        self._streams[stream].count_at(regions)

    async def end_stream(self, stream: str) -> None:
        if self._streams.pop(stream, None) is None:
            raise UnknownStream(f"There is no stream '{stream}'")


class LocalFollower:
    """A hold on a stream of this process."""

    def __init__(self, stream: Stream, connection: str, images: ImageLimits) -> None:
        self._stream, self._connection, self._images = stream, connection, images
        self._numbers = itertools.count(1)

    async def follow(self, answer: Answer, image: bytes, dropped: int, terms: Terms) -> Tracked:
        sighting = Sighting(answer.result, image, dropped, self._connection, next(self._numbers))
        return self._stream.follow(sighting, self._images)


@pytest.fixture(scope="module")
def fleet() -> Iterator[OneDetectorFleet]:
    settings = ModelSettings(name="fake", weights="fake:?fail=77")
    detector = Detector(lambda: FakeModel(settings), IMAGE_LIMITS)
    yield OneDetectorFleet(detector)
    detector.close()


@pytest.fixture(scope="module")
def api(fleet: OneDetectorFleet) -> FastAPI:
    return create_api(fleet, LIMITS)


@pytest.fixture
async def client(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as made:
        yield made


@contextmanager
def listening(api: FastAPI) -> Iterator[str]:
    """The address of ``api`` on this machine, answered by a thread."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(api, port=port, log_config=None, ws="websockets-sansio"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
