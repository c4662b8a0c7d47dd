"""What Serve knows of the application's deployments, and which of their replicas have died.

    Serve's controller ─ once a second at most ─→ Roster.look() → name → Deployment(target, replicas with node and state, …)
    Ray                ─ is its actor there?  ─→ Roster.deaths(name)
    a request that was lost with its replica  ─→ Roster.lost(name, actor)

Serve itself calls a replica that it stops STOPPING first. One that it lists as RUNNING while there is no such actor any more
has died; Serve finds that out at its next health check, some seconds later. Where Serve was quicker than we, the replica
is not RUNNING any more when we look: Ray remembers why its actor ended.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import ray
from ray._private.state import actors
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.serve.context import _get_global_client
from ray.serve.schema import DeploymentDetails, ServeInstanceDetails

from actors.schemas import Death, ReplicaReport, Vitals
from deploy.settings import APP_NAME

TTL_S = 1.0
RUNNING, STARTING, STOPPING, DEAD = "RUNNING", "STARTING", "STOPPING", "DEAD"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment as Serve sees it.

    Attributes:
        target: replicas that there shall be; None where Serve does not know it.
        replicas: those there are, without vitals.
        failed: whether Serve has given it up.
    """

    target: int | None = None
    replicas: tuple[ReplicaReport, ...] = ()
    failed: bool = False

    def count(self, state: str) -> int:
        """Replicas in that state."""
        return sum(found.state == state for found in self.replicas)

    def with_vitals(self, told: list[Vitals]) -> tuple[ReplicaReport, ...]:
        """The replicas, each with what it has told."""
        of = {vitals.actor: vitals for vitals in told}
        return tuple(replace(found, vitals=of.get(found.actor or "")) for found in self.replicas)


@dataclass
class Deaths:
    """The replicas of one deployment that have died."""

    latest: tuple[Death, ...] = ()
    count: int = 0
    actors: set[str] = field(default_factory=set)

    def add(self, actor: str, node: str | None) -> None:
        """Note a death, once."""
        if actor not in self.actors:
            self.actors.add(actor)
            self.count += 1
            self.latest = (*self.latest, Death(actor, node, time.time()))[-10:]


class Remembered(Generic[T]):
    """What an async function has returned, for ``TTL_S``; it is called once for all who ask meanwhile."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask, self._asking = ask, asyncio.Lock()
        self._answer: tuple[float, T] | None = None

    async def __call__(self) -> T:
        """The answer."""
        async with self._asking:
            if self._answer is None or time.monotonic() - self._answer[0] > TTL_S:
                answer = await self._ask()
                self._answer = (time.monotonic(), answer)
            return self._answer[1]


class Roster:
    """The application's deployments by name, as they were a second ago at most."""

    def __init__(self) -> None:
        self.look = Remembered(self._look)
        self._deaths: dict[str, Deaths] = defaultdict(Deaths)
        self._running: dict[str, tuple[str, str | None]] = {}  # by actor when last seen: its deployment and node

    def deaths(self, deployment: str) -> Deaths:
        """Those noticed so far."""
        return self._deaths[deployment]

    def lost(self, deployment: str, actor: str) -> None:
        """A request met the death of this replica."""
        _, node = self._running.get(actor, (deployment, None))
        self._deaths[deployment].add(actor, node)

    async def _look(self) -> dict[str, Deployment]:
        found = await asyncio.to_thread(deployments)
        before, self._running = self._running, _in(found, RUNNING)
        dead = _in(found, DEAD)
        for actor in before.keys() - self._running.keys() - dead.keys():
            if await asyncio.to_thread(has_crashed, actor):
                dead[actor] = before[actor]
        for actor, (name, node) in dead.items():
            self._deaths[name].add(actor, node)
        return found


def _in(found: dict[str, Deployment], state: str) -> dict[str, tuple[str, str | None]]:
    replicas = ((name, each) for name, deployment in found.items() for each in deployment.replicas)
    return {each.actor: (name, each.node) for name, each in replicas if each.actor and each.state == state}


def is_wanted(actor: str) -> bool:
    """Whether Serve wants this replica to go on: it has not begun to stop it, nor forgotten it with its application."""
    replicas = (found for deployment in deployments().values() for found in deployment.replicas)
    return any(found.actor == actor and found.state != STOPPING for found in replicas)


def has_crashed(actor: str) -> bool:
    """Whether that actor ended with its process or its node, rather than because somebody ended it."""
    cause = actors(actor).get("DeathCause")
    lost = (ActorDiedErrorContext.WORKER_DIED, ActorDiedErrorContext.NODE_DIED)
    return cause is not None and cause.actor_died_error_context.reason in lost


def deployments() -> dict[str, Deployment]:
    """Serve's own list, as it is now. Its public ``serve.status()`` makes its summary of this; Ray is pinned."""
    application = ServeInstanceDetails(**_get_global_client().get_serve_details()).applications.get(APP_NAME)
    return {name: _deployment(found) for name, found in application.deployments.items()} if application else {}


def _deployment(details: DeploymentDetails) -> Deployment:
    replicas = []
    for found in details.replicas:
        state = DEAD if found.state == RUNNING and not _lives(found.actor_name) else found.state.value
        place = (found.node_ip, found.node_id)
        replicas.append(ReplicaReport(found.replica_id, found.actor_id, *place, state, found.start_time_s, None))
    return Deployment(details.target_num_replicas, tuple(replicas), details.status in ("UNHEALTHY", "DEPLOY_FAILED"))


def _lives(actor_name: str) -> bool:
    try:
        ray.get_actor(actor_name, namespace="serve")
    except ValueError:  # Ray's way to say that there is none
        return False
    return True
