"""``yolofleet bench serve``: the endpoint as a user starts it, under load from outside, with what all its processes take.

    in a loop   ``YOLO.predict`` on the same engine in one process, an image after another (deploy/bench/peers/loop.py)
    limit       one stream a core, everything in memory (deploy/bench/limit.py)
    endpoint    yolofleet serve ─→ warm-up ─→ idle ─→ Closed: 1, 4, 16, 64 callers, in rounds
                                 ─→ Open: rates up to saturation ─→ a replica is killed: how long until the next answer?
    limit, in a loop once more

The endpoint is held against the mean of before and after, as a shared machine's speed drifts; not against limits between its
rounds, since a fleet that idles takes a tenth of a core. What a request costs beside decoding, letterbox, engine and
suppression is its CPU time over all processes less what those took in the limit.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Self, get_args

import httpx
import psutil

from actors.engines import make, plan
from actors.schemas import PredictParams
from actors.settings import ModelSettings
from deploy.bench import BenchError
from deploy.bench.limit import MEASURED_S, WARM_UP, Limit, mean_limit, measure_limit
from deploy.bench.load import Closed, Load, Open, Target, percentile, run_load
from deploy.bench.machine import circumstances, fp32_environment
from deploy.bench.processes import Server, running_server
from deploy.settings import Topology
from deploy.weights import flags_of

LOOP = Path(__file__).parent / "peers" / "loop.py"
IDLE_S = 10.0
SWEEP = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1)  # of what it answered at most in the closed loop
SWEEP_S = 10.0
SATURATED = 0.95  # of the offered rate, or less, is answered
SETTLE_TIMEOUT_S = 900.0  # int8 is fitted to its images meanwhile
SETTLE_POLL_S = 1.0
RESTART_TIMEOUT_S = 60.0
RESTART_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Fleet:
    """How ``yolofleet serve`` is started: its flags of these names; None leaves one out."""

    model: ModelSettings
    topology: str | None = None
    haproxy: bool = False
    replicas: int = 1
    cpus_per_replica: float | None = None

    @classmethod
    def from_flag(cls, flag: str, model: ModelSettings) -> Self:
        """Read ``TOPOLOGY`` or ``TOPOLOGY+haproxy``."""
        topology, separator, plane = flag.partition("+")
        if topology not in get_args(Topology) or plane not in ("", "haproxy") or bool(plane) != bool(separator):
            raise BenchError(f"'{flag}' is no way to start a fleet: give auto, direct or routed, or one of them with +haproxy")
        return cls(model, topology, haproxy=bool(plane))

    def on_export(self, weights: str) -> "Fleet":
        """The same on an export, which is an engine already."""
        return replace(self, model=ModelSettings(name=self.model.name, weights=weights, max_batch=self.model.max_batch))

    def command(self, port: int) -> list[str]:
        """The command line."""
        given = {"--topology": self.topology, "--cpus-per-replica": self.cpus_per_replica, "--replicas": self.replicas}
        command = [sys.executable, "-m", "deploy.cli", "serve", "--port", str(port), *flags_of(self.model)]
        for flag, value in given.items():
            command += [] if value is None else [flag, str(value)]
        return command + (["--haproxy"] if self.haproxy else [])


@dataclass(frozen=True, slots=True)
class Level:
    """One load, and what it met.

    Attributes:
        loop: ``closed`` or ``open``.
        offered: callers, or requests a second.
        sent: requests.
        errors: what went wrong → how often.
        per_s: requests answered, a second.
        p50_ms: of the latencies, from when a request was due; ``p95_ms`` and ``p99_ms`` likewise.
        cpu_ms: role of a process → CPU milliseconds per answered request; None where its processes are not ours to see.
        generator_cpu_ms: the same of the load generator, which is in none of the roles.
    """

    loop: str
    offered: float
    sent: int
    errors: dict[str, int]
    per_s: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    cpu_ms: dict[str, float] | None
    generator_cpu_ms: float

    @classmethod
    def of(cls, plan: Closed | Open, load: Load, cpu_s: dict[str, float] | None) -> Self:
        """What ``load`` tells, with the CPU seconds of the server's processes meanwhile."""
        answered = max(1, len(load.latencies_ms))
        return cls(
            loop="closed" if isinstance(plan, Closed) else "open",
            offered=plan.callers if isinstance(plan, Closed) else plan.rate,
            sent=load.sent,
            errors=load.errors,
            per_s=load.per_s,
            p50_ms=load.percentile(50),
            p95_ms=load.percentile(95),
            p99_ms=load.percentile(99),
            cpu_ms=None if cpu_s is None else {role: 1e3 * seconds / answered for role, seconds in cpu_s.items()},
            generator_cpu_ms=1e3 * load.cpu_s / answered,
        )

    @property
    def total_cpu_ms(self) -> float | None:
        """CPU milliseconds per answered request, over all of the server's processes."""
        return None if self.cpu_ms is None else sum(self.cpu_ms.values())


@dataclass(frozen=True, slots=True)
class ServeReport:
    """All of it. What cannot be known of an endpoint that runs elsewhere is None.

    Attributes:
        fleet: how the endpoint was started, or its address.
        engine: what answered, and in which precision.
        levels: every load of every round.
        start_s: from the start of the command to the first answer.
        idle_cores: cores that each role's processes took without any load.
        memory_mb: resident sets of the replicas' processes after the load, and of all processes together (``all``).
        restart_s: from the death of a replica to the next answer.
        limit: of this machine, on the same engine: the mean of before the endpoint and after it.
        limit_per_s: images/s of the limit before and after.
        in_a_loop_ms: the median of ``YOLO.predict`` on that engine, image by image; the mean of before and after.
        cpu_ms_beside_engine: CPU milliseconds per request that were neither decoding nor letterbox nor engine, at 16 callers.
        circumstances: machine, versions, commit, command.
    """

    fleet: dict[str, Any]
    engine: str | None
    levels: list[Level]
    start_s: float | None
    idle_cores: dict[str, float] | None
    memory_mb: dict[str, list[float]] | None
    restart_s: float | None
    limit: Limit | None
    limit_per_s: list[float] | None
    in_a_loop_ms: float | None
    cpu_ms_beside_engine: float | None
    circumstances: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {"kind": "serve"} | asdict(self)


@dataclass(frozen=True, slots=True)
class Course:
    """What an endpoint is put through.

    Attributes:
        images: files that are asked about, in turn.
        callers: of each closed loop.
        requests: of each closed loop; four for each caller at least.
        rounds: how often each closed loop is run.
        sweep: whether rates up to saturation follow.
    """

    images: Sequence[Path]
    callers: Sequence[int] = (1, 4, 16, 64)
    requests: int = 200
    rounds: int = 3
    sweep: bool = True


def bench_serve(fleet: Fleet, course: Course, cores: int, report: Callable[[str], None]) -> ServeReport:
    """Start the fleet, put it through the course, and compare it with the limit and with ``YOLO.predict`` in a loop.

    Args:
        fleet: how it is started.
        course: the loads.
        cores: the limit has a stream on each.
        report: called with a line after every measurement.

    Raises:
        BenchError: the fleet did not start, or one of the measurements could not be made.
    """
    loops, limits = [_loop(fleet.model, course, report)], [_limit(fleet.model, course, cores, report)]
    with running_fleet(fleet, course.images[0]) as server:
        engine = settled_engine(server.address)
        report(f"started in {server.start_s:.1f} s; {engine} answers")
        target = Target(f"{server.address}/predict")
        _warm_up(target, course, fleet.replicas)
        idle = _idle(server)
        report(f"idle: {100 * sum(idle.values()):.1f} % of a core")
        levels = _run(target, course, server, report)
        memory = _memory(server, fleet)
        restart_s = _time_to_restart(server, fleet, course.images[0])
        report(f"a killed replica's next answer came after {restart_s:.1f} s")
    limits.append(_limit(fleet.model, course, cores, report))
    loops.append(_loop(fleet.model, course, report))
    limit = mean_limit(limits)
    beside = [level.total_cpu_ms for level in levels if level.loop == "closed" and level.offered == 16 and level.total_cpu_ms]
    return ServeReport(
        fleet=asdict(fleet) | {"model": fleet.model.model_dump()},
        engine=engine,
        levels=levels,
        start_s=server.start_s,
        idle_cores=idle,
        memory_mb=memory,
        restart_s=restart_s,
        limit=limit,
        limit_per_s=[each.images_per_s for each in limits],
        in_a_loop_ms=mean(loop.p50_ms for loop in loops),
        cpu_ms_beside_engine=median(beside) - limit.cpu_ms if beside else None,
        circumstances=circumstances(),
    )


def bench_url(url: str, course: Course, report: Callable[[str], None]) -> ServeReport:
    """Put an endpoint that runs already through the course. Its processes are not ours to see.

    Args:
        url: what takes the images: ``http://HOST:PORT/predict``.
        course: the loads.
        report: called with a line after every measurement.

    Raises:
        BenchError: the load generator failed.
    """
    target = Target(url)
    _warm_up(target, course, 1)
    levels = _run(target, course, None, report)
    return ServeReport({"url": url}, None, levels, None, None, None, None, None, None, None, None, circumstances())


@contextmanager
def running_fleet(fleet: Fleet, image: Path) -> Iterator[Server]:
    """``yolofleet serve`` in a process of its own, until it answers ``image``; ends with the context.

    Raises:
        BenchError: it did not start.
    """
    with running_server(fleet.command, lambda address: post(f"{address}/predict", image)) as server:
        yield server


def settled_engine(address: str) -> str:
    """Wait until the fleet's engine is the one that stays; its name and precision.

    Raises:
        BenchError: it took too long.
    """
    give_up = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < give_up:
        (model,) = httpx.get(f"{address}/models", timeout=60).json()["models"]
        if model["settled"]:
            return f"{model['engine']} {model['precision']}"
        time.sleep(SETTLE_POLL_S)
    raise BenchError(f"The engine had not been made after {SETTLE_TIMEOUT_S:g} s")


def post(url: str, image: Path, file_field: str = "file") -> httpx.Response:
    """Ask for one image."""
    return httpx.post(url, files={file_field: image.read_bytes()}, timeout=60)


@dataclass(frozen=True, slots=True)
class InALoop:
    """``YOLO.predict``, an image after another in one process: its rate, its median, and the number of boxes of each image."""

    images_per_s: float
    p50_ms: float
    boxes: list[int]


def in_a_loop(python: str, weights: str, images: Sequence[Path], seconds: float = 0.0) -> InALoop:
    """Run it over all images, and all of them again until they have taken so long; decoding counts, reading does not.

    Args:
        python: the interpreter, in whose environment Ultralytics is.
        weights: whatever ``YOLO`` loads.
        images: files.
        seconds: at least.

    Raises:
        BenchError: it failed.
    """
    command = [python, str(LOOP), "--weights", weights, "--seconds", str(seconds)]
    command += [str(image.absolute()) for image in images]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=fp32_environment())
    if done.returncode:
        raise BenchError(f"YOLO.predict in a loop failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    told = json.loads(done.stdout.splitlines()[-1])
    return InALoop(1e3 * len(told["ms"]) / sum(told["ms"]), percentile(told["ms"], 50), told["boxes"])


def measure(target: Target, images: Sequence[Path], plan: Closed | Open, server: Server | None) -> Level:
    """One load, with what the server's processes took meanwhile, if they are ours to see.

    Raises:
        BenchError: the load generator failed.
    """
    before = server and server.usage()
    load = run_load(target, images, plan)
    return Level.of(plan, load, server.usage().since(before) if server and before else None)


def _limit(model: ModelSettings, course: Course, cores: int, report: Callable[[str], None]) -> Limit:
    limit = measure_limit(model, [image.read_bytes() for image in course.images], PredictParams(), cores)
    report(f"limit: {limit.images_per_s:.2f} images/s on {limit.streams} streams, {limit.cpu_ms:.1f} ms of CPU an image")
    return limit


def _loop(model: ModelSettings, course: Course, report: Callable[[str], None]) -> InALoop:
    loop = in_a_loop(sys.executable, _what_computes(model), course.images, MEASURED_S)
    report(f"YOLO.predict in a loop on the same engine: {loop.p50_ms:.1f} ms an image, {loop.images_per_s:.2f} images/s")
    return loop


def _what_computes(model: ModelSettings) -> str:
    """The weights, or the export that a replica makes of them."""
    wanted = plan(model)
    if wanted is None or wanted.original:
        return model.weights
    made = make(model, wanted)
    return str(made.path) if made.agrees and made.path else model.weights


def _warm_up(target: Target, course: Course, replicas: int) -> None:
    """As many images for each replica as the limit has before: an engine prepares for each shape, more so for common ones."""
    run_load(target, course.images, Closed(4 * replicas, max(WARM_UP, len(course.images)) * replicas))


def _idle(server: Server) -> dict[str, float]:
    before = server.usage()
    time.sleep(IDLE_S)
    after = server.usage()
    return {role: seconds / (after.at - before.at) for role, seconds in after.since(before).items()}


def _run(target: Target, course: Course, server: Server | None, report: Callable[[str], None]) -> list[Level]:
    levels: list[Level] = []

    def run(plan: Closed | Open) -> Level:
        levels.append(measure(target, course.images, plan, server))
        report(_line(levels[-1]))
        return levels[-1]

    for _ in range(course.rounds):
        for callers in course.callers:
            run(Closed(callers, max(course.requests, 4 * callers)))
    if course.sweep:
        most = max(level.per_s for level in levels)
        for share in SWEEP:
            rate = share * most
            reached = run(Open(rate, max(30, round(rate * SWEEP_S))))
            if reached.errors or reached.per_s < SATURATED * rate:
                break
    return levels


def _memory(server: Server, fleet: Fleet) -> dict[str, list[float]]:
    usage = server.usage()
    return {"replicas": usage.memory_of(_replica_role(server, fleet)), "all": [sum(usage.memory_mb.values())]}


def _replica_role(server: Server, fleet: Fleet) -> str:
    """The deployment whose processes hold the model: its own, or the ingress."""
    own = f"model-{fleet.model.name}"
    return own if own in server.usage().roles.values() else "ingress"


def _time_to_restart(server: Server, fleet: Fleet, image: Path) -> float:
    """Seconds from the death of every process that holds the model to the next answer."""
    usage, role = server.usage(), _replica_role(server, fleet)
    for pid, its_role in usage.roles.items():
        if its_role == role:
            psutil.Process(pid).kill()
    died = time.monotonic()
    while time.monotonic() < died + RESTART_TIMEOUT_S:
        with contextlib.suppress(httpx.HTTPError):
            if post(f"{server.address}/predict", image).status_code == 200:
                return time.monotonic() - died
        time.sleep(RESTART_POLL_S)
    raise BenchError(f"A killed replica had not come back after {RESTART_TIMEOUT_S:g} s")


def _line(level: Level) -> str:
    offered = f"{level.offered:g} callers" if level.loop == "closed" else f"{level.offered:.1f}/s offered"
    errors = f", errors {level.errors}" if level.errors else ""
    cpu = f", {level.total_cpu_ms:.1f} ms of CPU" if level.total_cpu_ms is not None else ""
    p50, p99 = (float("nan") if value is None else value for value in (level.p50_ms, level.p99_ms))
    return f"{offered}: {level.per_s:.2f}/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms{cpu}{errors}"
