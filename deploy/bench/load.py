"""A load generator: encoded images to an HTTP endpoint, from a process of its own.

    start_load ─ process ─ requests, made once, in memory ─┬─ Closed: so many callers, each asks again when it is answered
         │                                                 └─ Open: requests leave at times drawn beforehand
         ▼                                                      │
      Running ─── result() ──→ Load  ←─ latencies, errors, seconds, its own CPU time

Latency counts from the time at which a request was due, not from when a connection was free for it: an endpoint that falls
behind is not excused from the requests that it holds up ("coordinated omission", G. Tene, "How NOT to Measure Latency", 2013).
Arrivals of the open loop are a Poisson process. HTTP/1.1 over connections that are kept, parsed by httptools, which is
uvicorn's own parser: the generator must not take the cores from what it measures, and says what it took.
"""

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import httpx

from deploy.bench import BenchError

TIMEOUT_S = 120.0
MAX_CONNECTIONS = 1024
ERRORS = (OSError, TimeoutError, httptools.HttpParserError)


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked.

    Attributes:
        url: takes a multipart form by POST.
        file_field: the form's field for the image.
        form: its other fields.
        headers: sent along, such as ``X-Priority``.
    """

    url: str
    file_field: str = "file"
    form: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Closed:
    """``callers`` ask at the same time, each again as soon as it is answered, until ``requests`` have been sent."""

    callers: int
    requests: int


@dataclass(frozen=True, slots=True)
class Open:
    """``requests`` leave at random times, ``rate`` a second, whatever has been answered. ``seed`` repeats the times."""

    rate: float
    requests: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What came of it.

    Attributes:
        sent: requests.
        errors: what went wrong → how often; ``http 429``, or an exception's name.
        seconds: from the first request that was due to the last answer.
        latencies_ms: of every request that was answered with 200, in the order of the answers.
        cpu_s: what the generator itself took meanwhile.
        bodies: the answers' texts in the order of the requests, empty for errors; none unless asked for.
    """

    sent: int
    errors: dict[str, int]
    seconds: float
    latencies_ms: list[float]
    cpu_s: float
    bodies: list[str]

    @property
    def per_s(self) -> float:
        """Requests answered with 200, a second."""
        return len(self.latencies_ms) / self.seconds

    def percentile(self, percent: float) -> float | None:
        """See ``percentile``; None where nothing was answered."""
        return percentile(self.latencies_ms, percent) if self.latencies_ms else None


@dataclass(frozen=True, slots=True)
class Running:
    """A load that is being generated."""

    process: "subprocess.Popen[str]"

    def result(self) -> Load:
        """Wait for its end.

        Raises:
            BenchError: the generator failed.
        """
        written, complaints = self.process.communicate()
        if self.process.returncode:
            raise BenchError(f"The load generator failed: {' '.join(complaints.strip().splitlines()[-1:])}")
        return Load(**json.loads(written))

    def stop(self) -> None:
        """End it before its time."""
        self.process.kill()
        self.process.communicate()


def start_load(target: Target, images: Sequence[Path], plan: Closed | Open, *, keep_bodies: bool = False) -> Running:
    """Begin to ask for ``images``, in turn, over and over.

    Args:
        target: whom to ask.
        images: files, sent as they are.
        plan: when to ask, and how often.
        keep_bodies: whether the answers themselves are of interest.
    """
    order = {"target": asdict(target), "images": [str(image.absolute()) for image in images], "keep_bodies": keep_bodies}
    order |= {"plan": {"kind": type(plan).__name__} | asdict(plan)}
    command = [sys.executable, "-m", "deploy.bench.load"]
    with tempfile.TemporaryFile("w+") as file:
        json.dump(order, file)
        file.seek(0)
        return Running(subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))


def run_load(target: Target, images: Sequence[Path], plan: Closed | Open, *, keep_bodies: bool = False) -> Load:
    """``start_load``, and wait for its end.

    Raises:
        BenchError: the generator failed.
    """
    return start_load(target, images, plan, keep_bodies=keep_bodies).result()


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that at least ``percent`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def arrivals(plan: Open) -> Iterator[float]:
    """Seconds after the start at which each request is due, in order.

    A Poisson process, given that ``requests`` of it fall into the time that they take at ``rate``: each is then anywhere in it
    (S. Ross, "Stochastic Processes", 1996, theorem 2.3.1). Gaps drawn one by one would at times offer a tenth more or less
    than the rate that an endpoint's answers are held against.
    """
    random_ = random.Random(plan.seed)  # noqa: S311 - nobody has to be unable to guess it
    yield from sorted(random_.uniform(0, plan.requests / plan.rate) for _ in range(plan.requests))


def encode_request(target: Target, image: bytes) -> bytes:
    """The whole request as it goes over the wire."""
    files = {target.file_field: ("image.jpg", image, "image/jpeg")}
    request = httpx.Request("POST", target.url, data=target.form, files=files, headers=target.headers)
    body = request.read()
    lines = [b"POST %b HTTP/1.1" % request.url.raw_path, *(b"%b: %b" % pair for pair in request.headers.raw)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; one request at a time. Answers have a length or come in chunks: none is ended by a close."""

    def __init__(self) -> None:
        self.usable = False
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            ConnectionError: the connection ended before the answer did.
            httptools.HttpParserError: it is not HTTP.
        """
        self._parser, self._body = httptools.HttpResponseParser(self), bytearray()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Give it up."""
        self.usable = False
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio, as are the two below."""
        self._transport, self.usable = cast("asyncio.Transport", transport), True

    def data_received(self, data: bytes) -> None:
        """Another part of the answer."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waits for an answer will not get it."""
        self.usable = False
        self._finish(exc if isinstance(exc, OSError) else ConnectionResetError("the server closed the connection"))

    def on_body(self, body: bytes) -> None:
        """Called by the parser, as is ``on_message_complete``."""
        self._body += body

    def on_message_complete(self) -> None:
        """The answer is whole."""
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue: the answer is yet to come
            return
        if not self._parser.should_keep_alive():
            self.close()
        self._finish((status, bytes(self._body)))

    def _finish(self, outcome: tuple[int, bytes] | Exception) -> None:
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            return
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


class Generator:
    """Asks, and keeps account."""

    def __init__(self, target: Target, images: Sequence[bytes], keep_bodies: bool) -> None:
        address = urlsplit(target.url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._requests = [encode_request(target, image) for image in images]
        self._idle: list[Connection] = []
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._keep_bodies = keep_bodies
        self._bodies: dict[int, str] = {}
        self._errors: Counter[str] = Counter()
        self._latencies: list[float] = []

    async def run(self, plan: Closed | Open) -> Load:
        """Generate the load; returns when the last answer is there."""
        used, started = time.process_time(), time.perf_counter()
        await (self._closed(plan) if isinstance(plan, Closed) else self._open(plan, started))
        return Load(
            sent=plan.requests,
            errors=dict(self._errors),
            seconds=time.perf_counter() - started,
            latencies_ms=self._latencies,
            cpu_s=time.process_time() - used,
            bodies=[self._bodies.get(number, "") for number in range(plan.requests)] if self._keep_bodies else [],
        )

    async def _closed(self, plan: Closed) -> None:
        numbers = iter(range(plan.requests))

        async def caller() -> None:
            for number in numbers:  # shared: each takes the next one
                await self._ask(number, time.perf_counter())

        await asyncio.gather(*(caller() for _ in range(plan.callers)))

    async def _open(self, plan: Open, started: float) -> None:
        async with asyncio.TaskGroup() as group:
            for number, due in enumerate(arrivals(plan)):
                await asyncio.sleep(started + due - time.perf_counter())
                group.create_task(self._ask(number, started + due))

    async def _ask(self, number: int, due: float) -> None:
        request = self._requests[number % len(self._requests)]
        try:
            async with self._room, asyncio.timeout(TIMEOUT_S):
                status, body = await self._answer(request)
        except ERRORS as error:
            self._errors[type(error).__name__] += 1
            return
        if status != 200:
            self._errors[f"http {status}"] += 1
            return
        self._latencies.append(1e3 * (time.perf_counter() - due))
        if self._keep_bodies:
            self._bodies[number] = body.decode()

    async def _answer(self, request: bytes) -> tuple[int, bytes]:
        while self._idle and not self._idle[-1].usable:
            self._idle.pop()  # closed by the server meanwhile
        if self._idle:
            connection = self._idle.pop()
        else:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        try:
            answer = await connection.ask(request)
        except BaseException:
            connection.close()
            raise
        if connection.usable:
            self._idle.append(connection)
        return answer


def _main(order: dict[str, Any]) -> None:
    plan = dict(order["plan"])
    kind = {"Closed": Closed, "Open": Open}[plan.pop("kind")]
    images = [Path(image).read_bytes() for image in order["images"]]

    async def generate() -> Load:
        return await Generator(Target(**order["target"]), images, order["keep_bodies"]).run(kind(**plan))

    print(json.dumps(asdict(asyncio.run(generate()))))


if __name__ == "__main__":
    _main(json.load(sys.stdin))
