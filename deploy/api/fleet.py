"""What this fleet is and whether it is well: ``/healthz``, ``/readyz``, ``/models``, ``/fleet``.

Fleet, the protocol that every dialect calls, is declared here too.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from starlette.requests import HTTPConnection

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
    Tracked,
)
from actors.settings import Regions, StreamSettings


class Fleet(Protocol):
    """What the dialects need of a fleet, whatever its topology. ``model`` None means the primary one.

    Every method that names a model raises UnknownModel where it is not served. Those that compute also raise Overloaded,
    DeadlineExceeded and ReplicaUnavailable.
    """

    def model_names(self) -> list[str]:
        """The served names, the primary one first."""

    async def describe(self, model: str | None) -> ModelInfo:
        """What a model is."""

    async def status(self, model: str) -> ModelStatus:
        """How a model is doing now."""

    async def report(self) -> FleetReport:
        """Every model with its replicas, as this process sees them."""

    async def jobs(self) -> list[JobReport] | None:
        """The dataset jobs, the latest first; None where they cannot be known."""

    async def gallery(self, job: str) -> Gallery:
        """A few of a dataset job's results.

        Raises:
            UnknownJob: there is no such job.
        """

    async def check(self, model: str) -> None:
        """Return if the model can answer now.

        Raises:
            ReplicaUnavailable: it cannot.
        """

    async def detect(
        self, model: str | None, image: bytes, params: PredictParams, terms: Terms, *, annotate: bool = False
    ) -> Answer:
        """Detect in one encoded image; with ``annotate`` also draw what was found.

        Raises:
            BadImage, BadRequest: the image or its parameters are at fault.
        """

    def frames(
        self, model: str | None, video: bytes, params: PredictParams, terms: Terms, stride: int = 1
    ) -> AsyncGenerator[Answer, None]:
        """Detect in every ``stride``-th frame of an encoded video, in order; the nth answer is frame n * ``stride``, from 1.

        Raises:
            BadImage, BadRequest: the video or its parameters are at fault.
        """

    async def infer(self, model: str | None, inputs: NDArray[np.float32], terms: Terms) -> TensorAnswer:
        """Run the engine over (N, 3, H, W) float32 RGB values from 0 to 1: no letterbox, no suppression.

        Raises:
            BadRequest: a shape that the engine does not take.
        """

    def stream(self, settings: StreamSettings, *, exclusive: bool) -> AbstractAsyncContextManager["Follower"]:
        """Hold a live stream, which begins if it does not run.

        Args:
            settings: which, and what it is.
            exclusive: take it over from whoever else holds it so.

        Raises:
            StreamConflict: it runs with another model or tracker.
            TooManyStreams: it would begin, and there is no room.
        """

    async def streams(self) -> list[StreamStatus]:
        """The live streams that run, in the order of their names."""

    async def count_at(self, stream: str, regions: Regions) -> None:
        """Count at these lines and zones of a live stream from now on; UnknownStream where it does not run."""

    async def end_stream(self, stream: str) -> None:
        """Forget a live stream; UnknownStream where it does not run."""


class Follower(Protocol):
    """One client's hold on a live stream."""

    async def follow(self, answer: Answer, image: bytes, dropped: int, terms: Terms) -> Tracked:
        """Associate the next frame's detections with the stream's tracks; one at a time, in the order of the frames.

        Args:
            answer: what was found in it.
            image: the frame, encoded.
            dropped: frames before it that were skipped since the last call.
            terms: until when it is of use.

        Raises:
            StreamConflict: another connection has taken the stream over.
        """


def fleet_of(request: HTTPConnection) -> Fleet:
    """The fleet behind this request's application."""
    fleet: Fleet = request.app.state.fleet
    return fleet


TheFleet = Annotated[Fleet, Depends(fleet_of)]
router = APIRouter(tags=["fleet"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether this process answers at all."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(fleet: TheFleet) -> dict[str, Any]:
    """Whether every model has a replica that answers; 503 where one has none."""
    for name in fleet.model_names():
        await fleet.check(name)
    return {"status": "ready", "models": fleet.model_names()}


@router.get("/models")
async def models(fleet: TheFleet) -> dict[str, Any]:
    """The served models, the primary one first: task, engine, precision, weights' hash, replicas and load."""
    names = fleet.model_names()
    return {"models": [asdict(await fleet.describe(name)) | {"load": asdict(await fleet.status(name))} for name in names]}


@router.get("/fleet")
async def fleet_report(request: Request, fleet: TheFleet) -> dict[str, Any]:
    """Each model's replicas with their nodes, states, reservations and memory; load, deaths; the last minute's requests.

    Latencies, outcomes, load and deaths are those that this ingress has seen; where there are several, each has its own.
    What is not known is null.
    """
    report, statistics = await fleet.report(), request.app.state.statistics
    return {
        "ingress": report.ingress,
        "ingresses": report.ingresses,
        "uptime_s": round(time.monotonic() - request.app.state.started, 1),
        "models": [_model(model, statistics.of(model.name).recent.summary()) for model in report.models],
    }


def _model(report: ModelReport, last_minute: dict[str, Any]) -> dict[str, Any]:
    info = report.info
    return {
        "name": report.name,
        "task": info and info.task,
        "engine": info and info.engine,
        "precision": info and info.precision,
        "engine_reason": info and info.engine_reason,
        "settled": info and info.settled,
        "device": info and info.device,
        "version": info and info.sha256,
        "target": report.target,
        "reserved": {"num_cpus": report.num_cpus, "num_gpus": report.num_gpus},
        "load": asdict(report.status),
        "replicas": [asdict(replica) for replica in report.replicas],
        "deaths": {"count": report.deaths, "latest": [asdict(death) for death in report.latest_deaths]},
        "last_minute": last_minute,
    }
