"""Live streams behind the ingress: which actor holds a stream's state, and how that state outlives everybody.

    Streams (in each ingress) ── stream's name → one of a few actors ──→ TrackerActor: Stream, Stream, …
                                                                              └ each second: pickle → Ray's key-value store

A stream's state is in one actor, found by its name from any ingress. The actors are detached, so that the ingress that made
one may die, and few, because each costs a process with torch in it. One that dies is started again, by Ray or, if its node is
gone, by the next ingress that needs it, and begins with its streams' last snapshots. These lie where Serve keeps its own: in
the head's key-value store, which no worker node's loss touches and which Redis, if there is one, keeps beyond the head's. An
actor ends by itself when it has had no streams for a while, and soon after the application has been deleted.
"""

import asyncio
import logging
import pickle
import random
import threading
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorUnschedulableError
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.errors import ReplicaUnavailable, StreamConflict, TooManyStreams, UnknownStream
from actors.schemas import Answer, Sighting, StreamStatus, Terms, Tracked
from actors.settings import ImageLimits, Regions, StreamSettings
from actors.stream import Stream
from deploy.backends import PAUSE_S, REPLICA_DIED, unwrapped
from deploy.settings import APP_NAME, StreamLimits

log = logging.getLogger(__name__)

NAMESPACE = "yolofleet-streams"
THREADS = 8  # streams that one actor follows at once
SNAPSHOT_S = 1.0
WATCH_S = 1.0
QUIET_S = 5.0  # without a call an actor looks whether the application is still there
ANSWER_S = 30.0  # an actor that starts imports torch
ACTOR_DIED = (*REPLICA_DIED, ActorUnschedulableError)  # the latter: with its node


@dataclass
class _Held:
    """A stream, and what only its actor has to know of it."""

    stream: Stream
    lock: threading.Lock = field(default_factory=threading.Lock)
    used: float = field(default_factory=time.monotonic)
    saved: float = -SNAPSHOT_S


class TrackerActor:
    """Holds the state of some live streams.

    Args:
        name: its own.
        images: what a frame may weigh.
        limits: of streams.
    """

    def __init__(self, name: str, images: ImageLimits, limits: StreamLimits) -> None:
        self._name, self._images, self._limits = name, images, limits
        self._lock, self._called = threading.Lock(), time.monotonic()
        snapshots = (internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in self._keys())
        streams = [pickle.loads(snapshot) for snapshot in snapshots if snapshot]  # noqa: S301 # our own
        for stream in streams:
            stream.take_over("")  # the snapshot may be older than who has it now
        self._held = {stream.settings.stream: _Held(stream) for stream in streams}
        threading.Thread(target=self._watch, daemon=True).start()

    def open(self, settings: StreamSettings, connection: str, images: ImageLimits, limits: StreamLimits) -> bool:
        """Let ``connection`` have the stream, which begins if it does not run; whether sightings must bring pixels.

        The limits hold from now on: this actor outlives the application that began it, whose next version may have others.
        """
        self._images, self._limits = images, limits
        held = self._hold(settings)
        with held.lock:
            if connection:
                held.stream.take_over(connection)
            if settings.regions is not None and held.stream.count_at(settings.regions):
                self._save(held)
        return held.stream.needs_frames

    def count_at(self, stream: str, regions: Regions) -> bool:
        """Count at these lines and zones from now on; False if there is no stream of that name."""
        with self._lock:
            held = self._held.get(stream)
        if held is None:
            return False
        with held.lock:
            if held.stream.count_at(regions):
                self._save(held)
        return True

    def follow(self, settings: StreamSettings, sighting: Sighting) -> Tracked:
        """Associate one frame; see ``Stream.follow``."""
        held = self._hold(settings)
        with held.lock:
            tracked = held.stream.follow(sighting, self._images)
            if time.monotonic() - held.saved >= SNAPSHOT_S:
                self._save(held)
        return tracked

    def statuses(self) -> list[StreamStatus]:
        """How its streams are doing."""
        now = time.monotonic()
        with self._lock:
            return [held.stream.status(round(now - held.used, 1)) for held in self._held.values()]

    def end(self, stream: str) -> bool:
        """Forget a stream; False if there is none of that name."""
        with self._lock:
            return self._forget(stream)

    def _hold(self, settings: StreamSettings) -> _Held:
        with self._lock:
            self._called = time.monotonic()
            held = self._held.get(settings.stream)
            if held is None:
                if len(self._held) >= self._limits.max_per_tracker:
                    raise TooManyStreams("There is no room for another stream: end one, or raise 'streams.max_per_tracker'")
                held = self._held[settings.stream] = _Held(Stream(settings))
            held.used = self._called
        if not held.stream.settings.fits(settings):
            now = held.stream.settings
            raise StreamConflict(
                f"The stream '{now.stream}' runs with '{now.model}' and {now.tracker.kind}: ask for these, or DELETE it"
            )
        return held

    def _save(self, held: _Held) -> None:
        held.saved = time.monotonic()
        snapshot = pickle.dumps(held.stream, pickle.HIGHEST_PROTOCOL)
        internal_kv._internal_kv_put(self._key(held.stream.settings.stream), snapshot, namespace=NAMESPACE)

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_S)
            try:
                self._tidy()
            except Exception:  # the head may be away: the next time it is there again
                log.warning("%s could not look what it is still needed for", self._name, exc_info=True)

    def _tidy(self) -> None:
        """End what nobody uses, and at last this actor."""
        now = time.monotonic()
        with self._lock:
            for name in [name for name, held in self._held.items() if now - held.used > self._limits.idle_s]:
                self._forget(name)
        quiet_s = now - self._called
        unused = not self._held and quiet_s > self._limits.idle_s
        if unused or (quiet_s > QUIET_S and APP_NAME not in serve.status().applications):
            for key in self._keys():
                internal_kv._internal_kv_del(key, namespace=NAMESPACE)
            ray.kill(ray.get_actor(self._name, NAMESPACE))  # exit_actor() is for calls, not for threads

    def _forget(self, stream: str) -> bool:
        internal_kv._internal_kv_del(self._key(stream), namespace=NAMESPACE)
        return self._held.pop(stream, None) is not None

    def _key(self, stream: str) -> str:
        return f"{self._name}/{stream}"

    def _keys(self) -> list[bytes]:
        keys: list[bytes] = internal_kv._internal_kv_list(self._key(""), namespace=NAMESPACE)
        return keys


class Streams:
    """The live streams of the cluster, as an ingress reaches them.

    Args:
        images: what a frame may weigh.
        limits: of streams.
    """

    def __init__(self, images: ImageLimits, limits: StreamLimits) -> None:
        self._images, self._limits = images, limits
        self._actors: dict[str, Any] = {}

    async def open(self, settings: StreamSettings, exclusive: bool, on_frame: Callable[[int], None]) -> "RemoteStream":
        """Hold a stream, which begins if it does not run; see ``Fleet.stream``.

        Args:
            settings: which, and what it is.
            exclusive: take it over from whoever else holds it so.
            on_frame: called for every frame that was followed, with the number of those dropped before it.
        """
        connection = uuid.uuid4().hex if exclusive else ""
        deadline = time.monotonic() + ANSWER_S
        told = settings, connection, self._images, self._limits
        needs_frames = await self._ask(self._actor_of(settings.stream), deadline, "open", *told)
        return RemoteStream(self.follow, settings, connection, needs_frames, on_frame)

    async def follow(self, settings: StreamSettings, sighting: Sighting, terms: Terms) -> Tracked:
        """Have one frame associated, by its actor's next life if it dies meanwhile."""
        tracked: Tracked = await self._ask(self._actor_of(settings.stream), terms.deadline, "follow", settings, sighting)
        return tracked

    async def statuses(self) -> list[StreamStatus]:
        """The streams that run, in the order of their names."""
        deadline = time.monotonic() + ANSWER_S
        found = await asyncio.gather(*[self._ask(name, deadline, "statuses") for name in await self._running()])
        return sorted((status for statuses in found for status in statuses), key=lambda status: str(status.stream))

    async def count_at(self, stream: str, regions: Regions) -> None:
        """Count at these lines and zones from now on; UnknownStream where it does not run."""
        await self._tell(stream, "count_at", regions)

    async def end(self, stream: str) -> None:
        """Forget a stream; UnknownStream where it does not run."""
        await self._tell(stream, "end")

    async def _tell(self, stream: str, method: str, *arguments: Any) -> None:
        """Call a method for a stream that runs."""
        name = self._actor_of(stream)
        running = name in await self._running()
        if not (running and await self._ask(name, time.monotonic() + ANSWER_S, method, stream, *arguments)):
            raise UnknownStream(f"There is no stream '{stream}': GET /streams tells which run")

    async def _ask(self, name: str, deadline: float, method: str, *arguments: Any) -> Any:
        """Call an actor until it lives to answer."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while True:
                    actor = self._actors.get(name) or await asyncio.to_thread(self._start, name)
                    self._actors[name] = actor
                    try:
                        return await unwrapped(getattr(actor, method).remote(*arguments))
                    except ACTOR_DIED:
                        self._actors.pop(name, None)
                        await asyncio.sleep(PAUSE_S)
        except TimeoutError:
            raise ReplicaUnavailable("The stream's tracker does not answer in time: send the frame again") from None

    def _actor_of(self, stream: str) -> str:
        return f"tracker-{zlib.crc32(stream.encode()) % self._limits.trackers}"

    def _start(self, name: str) -> Any:
        """The actor of that name, which begins if there is none."""
        named = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        life = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": THREADS, "scheduling_strategy": _place()}
        return ray.remote(TrackerActor).options(**named, **life).remote(name, self._images, self._limits)

    async def _running(self) -> list[str]:
        actors = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]


def _place() -> NodeAffinitySchedulingStrategy:
    """A worker node: what reserves nothing could else begin on a head that is to hold no work, ``soft`` affinity or not."""
    workers = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    own = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(random.choice(workers or [own]), soft=False)  # noqa: S311 # no secret


class RemoteStream:
    """A connection's hold on a stream; see ``Follower``.

    Args:
        follow: reaches its actor.
        settings: of the stream.
        connection: whose hold it is.
        needs_frames: whether its tracker looks at pixels.
        on_frame: see ``Streams.open``.
    """

    def __init__(
        self,
        follow: Callable[[StreamSettings, Sighting, Terms], Awaitable[Tracked]],
        settings: StreamSettings,
        connection: str,
        needs_frames: bool,
        on_frame: Callable[[int], None],
    ) -> None:
        self._follow, self._settings, self._connection = follow, settings, connection
        self._needs_frames, self._on_frame, self._number = needs_frames, on_frame, 0

    async def follow(self, answer: Answer, image: bytes, dropped: int, terms: Terms) -> Tracked:
        """Associate the next frame; see ``Follower.follow``."""
        self._number += 1
        pixels = image if self._needs_frames else None
        sighting = Sighting(answer.result, pixels, dropped, self._connection, self._number)
        tracked = await self._follow(self._settings, sighting, terms)
        self._on_frame(dropped)
        return tracked
