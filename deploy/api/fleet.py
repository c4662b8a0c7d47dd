"""What this fleet is and whether it is well: ``/healthz``, ``/readyz``, ``/models``.

Fleet, the protocol that every dialect calls, is declared here too.
"""

from dataclasses import asdict
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse

from actors.schemas import ImageResult, ModelInfo, PredictParams


class Fleet(Protocol):
    """What the dialects need of a fleet, whatever its topology."""

    async def detect(self, model: str | None, data: bytes, params: PredictParams) -> tuple[ImageResult, str]:
        """Detect in one encoded image with the named model, or the primary one; also tell which replica answered."""

    async def describe(self, model: str | None) -> ModelInfo:
        """What the named model, or the primary one, is.

        Raises:
            UnknownModel: no such model is served.
        """

    async def check(self, model: str) -> None:
        """Return if a replica of the named model answers now.

        Raises:
            ReplicaUnavailable: none does.
        """

    def model_names(self) -> list[str]:
        """The served names, the primary one first."""


def fleet_of(request: Request) -> Fleet:
    """The fleet behind this request's application."""
    fleet: Fleet = request.app.state.fleet
    return fleet


TheFleet = Annotated[Fleet, Depends(fleet_of)]
router = APIRouter(tags=["fleet"])


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """A person who opens the address finds the documentation."""
    return RedirectResponse("/docs")


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
    """The served models, the primary one first: task, class names, engine, device, weights' hash, versions."""
    return {"models": [asdict(await fleet.describe(name)) for name in fleet.model_names()]}
