"""Where a model's answers come from: two backends with one face, so that the ingress does not know the topology.

    RemoteModel   (routed)   handle of the model's deployment → any replica; one that dies is survived, the work goes elsewhere
    PrivateModel  (direct)   the replica in this very process; if it dies, so does whoever would have retried

Ray's router does not retry a request whose replica dies, so RemoteModel does, until the deadline; inference is idempotent.
What was in hand when a replica died is suspect: its next try is alone in a replica (``deploy/quarantine.py``). Errors that
crossed Ray are unwrapped here (``error.cause``), because their text contains the remote traceback.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from actors.errors import DeadlineExceeded, FleetError, PoisonedImage, ReplicaUnavailable
from actors.schemas import Answer, ModelInfo, PredictParams, TensorAnswer, Terms, Vitals
from deploy.quarantine import Quarantine, Verdict, digest_of, poisoned
from deploy.release import INGRESS
from deploy.replica import ModelReplica
from deploy.settings import APP_NAME

REPLICA_DIED = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)  # the last: its node did, with the answer
PAUSE_S = 0.05  # before the next try, while the router learns of the death
VITALS_TIMEOUT_S = 1.0
GRACE_S = 2.0  # beyond the deadline for the replica's own, better worded refusal to arrive


class Backend(Protocol):
    """A model's answers. Every method raises what its replica raises, and ReplicaUnavailable if there is none."""

    async def describe(self) -> ModelInfo:
        """What the model is."""

    async def detect(self, image: bytes, params: PredictParams, terms: Terms, annotate: bool) -> Answer:
        """Detect in one encoded image; PoisonedImage if it kills replicas."""

    def frames(self, video: bytes, params: PredictParams, terms: Terms, stride: int) -> AsyncGenerator[Answer, None]:
        """Detect in every ``stride``-th frame of a video; PoisonedImage if it kills replicas."""

    async def infer(self, inputs: NDArray[np.float32], terms: Terms) -> TensorAnswer:
        """Run the engine over a tensor; PoisonedImage if it kills replicas."""

    async def vitals(self) -> list[Vitals]:
        """What the replicas tell of themselves; nothing where one of them is not quick about it."""


class RemoteModel:
    """The deployment of a model, seen from an ingress.

    Args:
        handle: of the deployment.
        on_retry: called for every try after the first with the actor id of the replica that died, where Ray tells it.
    """

    def __init__(self, handle: DeploymentHandle, on_retry: Callable[[str | None], None]) -> None:
        self._handle, self._on_retry = handle, on_retry
        self._quarantine = Quarantine()

    async def describe(self) -> ModelInfo:
        """What the model is, as any of its replicas tells; asks until one lives to answer or the caller has had enough."""
        while True:
            try:
                info: ModelInfo = await unwrapped(self._handle.describe.remote())
            except REPLICA_DIED as error:
                await self._again(error)
            else:
                return info

    async def detect(self, image: bytes, params: PredictParams, terms: Terms, annotate: bool) -> Answer:
        """Detect in one encoded image; see Backend."""
        answer: Answer = await self._survive("detect", image, terms, lambda seconds: (image, params, seconds, annotate))
        return answer

    async def infer(self, inputs: NDArray[np.float32], terms: Terms) -> TensorAnswer:
        """Run the engine over a tensor; see Backend."""
        answer: TensorAnswer = await self._survive("infer", inputs, terms, lambda seconds: (inputs, seconds))
        return answer

    async def frames(self, video: bytes, params: PredictParams, terms: Terms, stride: int) -> AsyncGenerator[Answer, None]:
        """Detect in a video; after a replica's death another one goes on, alone, with the frame that was not answered yet."""
        digest = digest_of(video) if self._quarantine else None
        done, alone = 0, False
        while (seconds := terms.deadline - time.monotonic()) > 0:
            if digest and self._quarantine.verdict(digest) is Verdict.CONDEMNED:
                raise poisoned("video")
            begun = False  # alone in the replica, which has not answered a frame yet
            try:
                stream = self._handle.options(stream=True).frames.remote(video, params, seconds, stride, done, alone)
                async with aclosing(_unwrapped_stream(stream, terms.deadline)) as answers:
                    async for answer in answers:
                        begun = answer is None
                        if answer is not None:
                            done += 1
                            yield answer
                return
            except REPLICA_DIED as error:
                digest, alone = digest or digest_of(video), True
                if begun and _was_killed(error):
                    self._quarantine.condemn(digest)
                await self._again(error)
            except TimeoutError:
                break
        raise _too_late()

    async def vitals(self) -> list[Vitals]:
        """What the replicas tell of themselves; see Backend."""
        return await _vitals(self._handle)

    async def _survive(
        self, method: str, data: bytes | NDArray[np.float32], terms: Terms, arguments: Callable[[float], tuple[Any, ...]]
    ) -> Any:
        """Call ``method`` until a replica lives to answer."""
        digest = digest_of(data) if self._quarantine else None
        while (seconds := terms.deadline - time.monotonic()) > 0:
            verdict = self._quarantine.verdict(digest) if digest else Verdict.CLEAR
            if verdict is Verdict.CONDEMNED:
                raise poisoned("image" if isinstance(data, bytes) else "tensor")
            try:
                async with asyncio.timeout(seconds + GRACE_S):
                    if digest and verdict is Verdict.SUSPECT:
                        return await self._alone(method, digest, arguments(seconds), terms.deadline)
                    return await _answered(getattr(self._handle, method).remote(*arguments(seconds)))
            except REPLICA_DIED as error:
                digest = digest or digest_of(data)
                if verdict is Verdict.CLEAR:
                    self._quarantine.suspect(digest)
                await self._again(error)
            except PoisonedImage:  # a replica has learnt it from its neighbours
                self._quarantine.condemn(digest_of(data))
                raise
            except TimeoutError:
                break
        raise _too_late()

    async def _again(self, error: Exception) -> None:
        """A replica has died: before the next try."""
        self._on_retry(_who_died(error))
        await asyncio.sleep(PAUSE_S)

    async def _alone(self, method: str, digest: bytes, arguments: tuple[Any, ...], deadline: float) -> Any:
        """One try with nothing else in hand. Whoever dies of it was killed by it."""
        begun = False
        stream = getattr(self._handle.options(stream=True), f"{method}_alone").remote(*arguments)
        try:
            async with aclosing(_unwrapped_stream(stream, deadline)) as answers:
                async for answer in answers:
                    if answer is not None:
                        self._quarantine.clear(digest)
                        return answer
                    begun = True
        except REPLICA_DIED as error:
            if begun and _was_killed(error):
                self._quarantine.condemn(digest)
            raise
        except FleetError:
            self._quarantine.clear(digest)
            raise
        raise ReplicaUnavailable("A replica ended without an answer: send the request again")


class PrivateModel:
    """The replica that lives in this process.

    Args:
        replica: the model's only user.
    """

    def __init__(self, replica: ModelReplica) -> None:
        self.replica = replica

    async def describe(self) -> ModelInfo:
        """What the model is."""
        return self.replica.describe()

    async def detect(self, image: bytes, params: PredictParams, terms: Terms, annotate: bool) -> Answer:
        """Detect in one encoded image; see Backend."""
        return await self.replica.detect(image, params, _left(terms), annotate)

    async def infer(self, inputs: NDArray[np.float32], terms: Terms) -> TensorAnswer:
        """Run the engine over a tensor; see Backend."""
        return await self.replica.infer(inputs, _left(terms))

    def frames(self, video: bytes, params: PredictParams, terms: Terms, stride: int) -> AsyncGenerator[Answer, None]:
        """Detect in a video; see Backend."""
        frames = self.replica.frames(video, params, _left(terms), stride)
        return cast("AsyncGenerator[Answer, None]", frames)  # None is for who asks for ``alone``

    async def vitals(self) -> list[Vitals]:
        """What it tells of itself, and the replicas in the other ingresses as well."""
        return await _vitals(serve.get_deployment_handle(INGRESS, APP_NAME))


async def _vitals(handle: DeploymentHandle) -> list[Vitals]:
    """What every replica of a deployment that answers tells of itself."""
    try:
        told = await handle.broadcast("vitals").results_async(timeout_s=VITALS_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, DeploymentUnavailableError):
        return []
    return [each for each in told if isinstance(each, Vitals)]  # one may have died meanwhile


def _who_died(error: Exception) -> str | None:
    return error.actor_id if isinstance(error, ActorDiedError) else None


def _was_killed(error: Exception) -> bool:
    """Whether the replica died of what it had in hand; where only its answer is lost, it had answered."""
    return not isinstance(error, ObjectLostError)


def _left(terms: Terms) -> float:
    return terms.deadline - time.monotonic()


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("No replica could answer in the request's time: send it again in a few seconds")


async def unwrapped(response: Any) -> Any:
    """The answer of a replica or an actor, or the expected error that it raised there."""
    try:
        return await response
    except RayTaskError as error:
        if isinstance(error.cause, FleetError):
            raise error.cause from None
        raise
    except DeploymentUnavailableError as error:
        raise ReplicaUnavailable("The model's replicas could not be started: see the server's log") from error


async def _answered(response: DeploymentResponse) -> Any:
    """The answer of a replica; whoever leaves before it, or is late, takes the replica's work along."""
    try:
        return await unwrapped(response)
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _unwrapped_stream(stream: DeploymentResponseGenerator, deadline: float) -> AsyncGenerator[Any, None]:
    """The answers of a replica; TimeoutError where the next one is not there soon after the deadline."""
    items = aiter(stream)
    try:
        while True:
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0.0) + GRACE_S):
                    item = await unwrapped(anext(items))
            except StopAsyncIteration:
                return
            yield item
    except (asyncio.CancelledError, GeneratorExit, TimeoutError, ObjectLostError):
        stream.cancel()  # whoever leaves before the end takes the replica's work along
        raise
