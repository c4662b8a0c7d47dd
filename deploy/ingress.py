"""Ingress: the stateless front of the fleet. HTTP in, handle calls out, no model.

    dialect → Ingress.detect(model, bytes, params) → handle of that model's deployment → ModelReplica → ImageResult
                                      └── the replica died with the request in flight: sent to another one

Ray's router does not retry a request whose replica dies, so this does; inference is idempotent. Errors that crossed Ray are
unwrapped here (``error.cause``), because their text contains the remote traceback.
"""

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from actors.errors import FleetError, ReplicaUnavailable, UnknownModel
from actors.schemas import ImageResult, ModelInfo, PredictParams
from deploy.api import create_api
from deploy.settings import HttpLimits

ATTEMPTS = 3
READY_TIMEOUT_S = 5.0


@serve.ingress()
class Ingress:
    """Serves ``create_api`` over the deployments of the configured models.

    Args:
        handles: model name → its deployment, the primary one first.
        limits: what one request may ask for.
    """

    def __init__(self, handles: dict[str, DeploymentHandle], limits: HttpLimits) -> None:
        self._handles = handles
        self._limits = limits
        self._infos: dict[str, ModelInfo] = {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self, self._limits)

    def model_names(self) -> list[str]:
        """The served names, the primary one first."""
        return list(self._handles)

    async def detect(self, model: str | None, data: bytes, params: PredictParams) -> tuple[ImageResult, str]:
        """Detect in one encoded image; also tell which replica answered.

        Raises:
            UnknownModel: no such model.
            ReplicaUnavailable: no replica answered in time, or several died over this request.
            FleetError: whatever the replica raised.
        """
        answer: tuple[ImageResult, str] = await self._call(model, "detect", data, params)
        return answer

    async def describe(self, model: str | None) -> ModelInfo:
        """What a model is; asked once per ingress, since a deployment's replicas are alike."""
        name = self._name(model)
        if name not in self._infos:
            self._infos[name] = await self._call(name, "describe")
        return self._infos[name]

    async def check(self, model: str) -> None:
        """Ask a replica of ``model`` whether it is there, never the cache.

        Raises:
            ReplicaUnavailable: none answered within ``READY_TIMEOUT_S``.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._call(model, "describe")
        except TimeoutError:
            raise ReplicaUnavailable(f"No replica of '{model}' answers") from None

    def _name(self, model: str | None) -> str:
        name = next(iter(self._handles)) if model is None else model
        if name not in self._handles:
            raise UnknownModel(f"There is no model '{name}': served are {', '.join(self._handles)}")
        return name

    async def _call(self, model: str | None, method: str, *args: Any) -> Any:
        handle = self._handles[self._name(model)]
        for _ in range(ATTEMPTS):
            try:
                async with asyncio.timeout(self._limits.request_timeout_s):
                    return await getattr(handle, method).remote(*args)
            except RayTaskError as error:
                if isinstance(error.cause, FleetError):
                    raise error.cause from None
                raise
            except (RayActorError, OutOfMemoryError, NodeDiedError):
                continue
            except TimeoutError:
                break
        raise ReplicaUnavailable("No replica could answer this request: send it again in a few seconds")
