"""``yolofleet plan``: measure a model on this hardware, and write the fleet with the highest rate that keeps the objective.

    every number of actors, every batch size: images/s, memory (deploy/bench/share.py, no HTTP)
        │   of each number of actors the best batch, the fastest first; what does not fit is left out
        ▼
    the fastest are served for real and asked over HTTP by 1, 2, 4, … callers: requests/s, p95, CPU time of an image
        │   the most requests/s at a p95 that keeps the objective; the queue is bounded so that it stays there
        ▼
    that configuration, served once more as it will be written ─→ Plan: config, images/s, p95, cost, nodes for a load

The figures are those of the last run: of the configuration as it is written, over the path that clients take, by the load
generator that ``yolofleet bench serve`` has. Nothing is extrapolated but to more GPUs or cores of the same kind.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from actors.errors import BadRequest
from actors.images import encode_jpeg
from actors.schemas import PredictParams
from actors.settings import ModelSettings
from deploy.bench import BenchError
from deploy.bench.load import Closed, Load, Target, run_load
from deploy.bench.machine import circumstances
from deploy.bench.share import Shared, measure_shared
from deploy.demo.scene import draw_scene
from deploy.environment import free_port
from deploy.launch import local_ray, running_app
from deploy.nodes import Node, node_type, this_machine
from deploy.settings import AppSettings, HttpLimits, Replicas, ServedModel

BATCHES = {False: (1, 4, 8), True: (1, 4, 8, 16, 32)}  # on a CPU, on a GPU
MOST_ON_A_GPU = 16
MEMORY_FILLED = 0.8  # of a node's memory, by its replicas; the rest is the system's, Ray's and the ingress's
SERVED = 2  # numbers of actors that are tried over HTTP
ALIKE = 0.03  # rates that differ by less are the same; then fewer callers wait less
ROUNDS = 3
ANSWERS = 16  # to each caller in a round at least: a batch that is one caller short costs a whole batch's time
SCENES = 16
HOST = "127.0.0.1"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of the plan.

    Attributes:
        model: the weights; its ``max_batch`` is the planner's to choose.
        imgsz: what the requests ask for, pixels.
        slo_p95_ms: the objective; None for the highest rate whatever the latency.
        gpus: of this machine; None for all.
        node: a node type to plan for; None for this machine.
        price_per_hour: of one node.
        load: images/s that the fleet has to take.
        seconds: how long each measurement takes.
    """

    model: ModelSettings
    imgsz: int
    slo_p95_ms: float | None = None
    gpus: int | None = None
    node: str | None = None
    price_per_hour: float | None = None
    load: float | None = None
    seconds: float = 4.0


@dataclass(frozen=True, slots=True)
class Served:
    """A configuration under load, over HTTP.

    Attributes:
        callers: who asked at the same time, each again when it was answered.
        images_per_s: one image a request.
        p95_ms: as the callers saw it.
        cpu_s: CPU seconds an image, of all of Ray's processes.
    """

    callers: int
    images_per_s: float
    p95_ms: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, and what to expect of it.

    Attributes:
        settings: the fleet on one node.
        expected: of that node; carried over from ``measured`` if that is another one.
        node: for which it is.
        measured: this machine, with what was served on it.
        served: the last run on this machine.
        shared: everything that was tried without HTTP.
        nodes: for the load that was asked for; None where none was.
        per_million: cost of a million images; None without a price.
        wish: what was asked for.
        circumstances: machine, versions, commit, command.
    """

    settings: AppSettings
    expected: Served
    node: Node
    measured: Node
    served: Served
    shared: tuple[Shared, ...]
    nodes: int | None
    per_million: float | None
    wish: Wish
    circumstances: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        shared = [asdict(each) | {"reserved": each.reserved.model_dump()} for each in self.shared]
        wish = asdict(self.wish) | {"model": self.wish.model.model_dump()}
        return asdict(self) | {"settings": self.settings.model_dump(mode="json"), "shared": shared, "wish": wish}


def make_plan(wish: Wish, source: Path | None, report: Report) -> Plan:
    """Measure, choose, and measure what was chosen. Takes minutes, and wants the machine to itself.

    Args:
        wish: what is asked for.
        source: a folder of JPEG images like those that will come; drawn scenes if None.
        report: called with a line after every measurement.

    Raises:
        BadRequest: the node type is not known, or what is asked for cannot be measured here.
        BenchError: nothing keeps the objective, or a measurement failed.
    """
    if "RAY_ADDRESS" in os.environ:
        raise BadRequest("RAY_ADDRESS is set, and plan measures this machine by itself: unset it, and run it on such a node")
    machine = this_machine(wish.gpus)
    node = node_type(wish.node, machine) if wish.node else replace(machine, gpus=wish.gpus or machine.gpus)
    with tempfile.TemporaryDirectory() as scratch, local_ray():
        images = _images(source, wish.imgsz, Path(scratch))
        shared = tuple(_share(wish, machine, images, report))
        settings, served = _chosen(wish, machine, shared, images, report)
    return plan_for(wish, settings, served, node, machine, shared)


def plan_for(wish: Wish, settings: AppSettings, served: Served, node: Node, machine: Node, shared: tuple[Shared, ...]) -> Plan:
    """What ``settings``, as they were ``served`` on this ``machine``, mean on ``node``."""
    if node != machine:
        settings, expected = _carried_over(settings, served, machine, node, shared)
    else:
        expected = served
    rate = expected.images_per_s
    return Plan(
        settings,
        expected,
        node,
        machine,
        served,
        shared,
        nodes=None if wish.load is None else ceil(wish.load / rate),
        per_million=None if wish.price_per_hour is None else wish.price_per_hour / 3600 / rate * 1e6,
        wish=wish,
        circumstances=circumstances(),
    )


def write_config(plan: Plan) -> str:
    """The configuration as ``yolofleet deploy`` takes it, with what to expect of it above."""
    kept = plan.settings.model_dump(mode="json", exclude_defaults=True)
    lines = [*expectations(plan), f"Measured by: {plan.circumstances['command']}"]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(kept, sort_keys=False)


def expectations(plan: Plan) -> Iterator[str]:
    """What to expect, a sentence a line."""
    model, expected = plan.settings.models[0], plan.expected
    where = f"{plan.node.name} ({plan.node.device}, {plan.node.cores} cores, {plan.node.gpus} GPUs)"
    yield (
        f"{where}: {expected.images_per_s:.1f} images/s, p95 {expected.p95_ms:.0f} ms, with {expected.callers} requests in"
        f" flight, {plan.wish.imgsz} pixels"
    )
    yield (
        f"{model.replicas.max} replicas, each with {model.actor.num_gpus:g} GPU, {model.actor.num_cpus:g} CPUs"
        f" ({model.actor.threads} threads), batches up to {model.max_batch}"
    )
    if plan.node != plan.measured:
        yield f"carried over from {plan.served.images_per_s:.1f} images/s on this machine, whose device is the same"
    if plan.per_million is not None:
        yield f"a million images cost {plan.per_million:.2f} at {plan.wish.price_per_hour:g} an hour and node, fully used"
    if plan.nodes is not None:
        yield f"{plan.wish.load:g} images/s need {plan.nodes} such nodes"


def render(plan: Plan) -> Group:
    """What was tried, and what came of it."""
    table = Table(
        title=f"{plan.wish.model.name} at {plan.wish.imgsz} on {plan.measured.device}", box=SIMPLE_HEAD, show_edge=False
    )
    for heading in ("actors", "CPUs, GPU of each", "batch", "images/s", "p95 ms", "memory MB", "GPU MB"):
        table.add_column(heading, justify="right")
    for each in plan.shared:
        reserved = f"{each.reserved.num_cpus:g}, {each.reserved.num_gpus:g}"
        start = (str(each.actors), reserved, str(each.batch))
        if each.refused:
            table.add_row(*start, "refused", "", "", "")
        else:
            gpu = "" if each.gpu_bytes is None else f"{each.gpu_bytes / 1e6:.0f}"
            table.add_row(*start, f"{each.images_per_s:.1f}", f"{each.p95_ms:.0f}", f"{each.memory_bytes / 1e6:.0f}", gpu)
    table.caption = "without HTTP, twice a batch in the hands of each actor"
    return Group(table, *map(Text, expectations(plan)))


def _images(source: Path | None, imgsz: int, scratch: Path) -> list[Path]:
    """JPEG files: those of a folder, or drawn ones as wide as the model sees them."""
    if source is not None:
        found = sorted(source.glob("*.jpg"))
        if not found:
            raise BadRequest(f"There is no .jpg in {source}: give a folder of JPEG images")
        return found
    for seed in range(SCENES):
        (scratch / f"{seed}.jpg").write_bytes(encode_jpeg(draw_scene(seed, imgsz, imgsz * 3 // 4).image))
    return sorted(scratch.iterdir())


def _share(wish: Wish, machine: Node, images: Sequence[Path], report: Report) -> Iterator[Shared]:
    """Every number of actors on one GPU, or on this machine's cores, with every batch size."""
    gpu = machine.gpus > 0
    encoded = [image.read_bytes() for image in images]
    params = PredictParams(imgsz=(wish.imgsz, wish.imgsz))
    for actors in numbers_of_actors(machine):
        for batch in BATCHES[gpu]:
            model = wish.model.model_copy(update={"max_batch": batch})
            shared = measure_shared(model, encoded, params, actors, gpu=gpu, seconds=wish.seconds)
            what = shared.refused or f"{shared.images_per_s:.1f} images/s"
            report(f"{actors} actors, batches of {batch}: {what}")
            yield shared


def numbers_of_actors(machine: Node) -> list[int]:
    """1, 2, 4, … up to one a core, or up to 16 on a GPU."""
    most = MOST_ON_A_GPU if machine.gpus else machine.cores
    powers = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return powers if machine.gpus or powers[-1] == most else [*powers, most]


def candidates(shared: Sequence[Shared], machine: Node, slo_p95_ms: float | None) -> list[Shared]:
    """Of each number of actors the best batch, the fastest first.

    Two batches are in an actor's hands under load (``ServedModel.in_flight``). So that they are answered within the objective,
    there may be no more of them than the actors compute in that time: Little's law.
    """
    gpus = max(machine.gpus, 1)
    best: dict[int, Shared] = {}
    for each in shared:
        if each.refused or each.actors * gpus * each.memory_bytes > MEMORY_FILLED * machine.memory_gb * 1e9:
            continue
        in_hand = 2 * each.batch * each.actors
        if slo_p95_ms is not None and each.batch > 1 and in_hand > each.images_per_s * slo_p95_ms / 1e3:
            continue
        if each.actors not in best or each.images_per_s > best[each.actors].images_per_s * (1 + ALIKE):
            best[each.actors] = each
    return sorted(best.values(), key=lambda each: -each.images_per_s)


def _chosen(
    wish: Wish, machine: Node, shared: Sequence[Shared], images: Sequence[Path], report: Report
) -> tuple[AppSettings, Served]:
    """The configuration with the highest rate over HTTP that keeps the objective, and that rate."""
    port = free_port()
    tried = _tried(wish, machine, shared, images, port, report)
    for settings, served in by_preference(tried, wish.slo_p95_ms):
        final = _bounded(settings, served.callers) if wish.slo_p95_ms is not None else settings
        with _endpoint(final, wish.imgsz, port) as target:
            again = _steadily(target, images, served, wish.seconds)
        report(f"as it will be written, {served.callers} callers: {_words(again)}")
        if wish.slo_p95_ms is None or again.p95_ms <= wish.slo_p95_ms:
            return final, again
    quickest = min(served.p95_ms for _, served in tried)
    raise BenchError(
        f"Nothing keeps a p95 of {wish.slo_p95_ms:g} ms here: the quickest was {quickest:.0f} ms. Allow more, choose a smaller"
        " model or --imgsz, or another machine"
    )


def _tried(
    wish: Wish, machine: Node, shared: Sequence[Shared], images: Sequence[Path], port: int, report: Report
) -> list[tuple[AppSettings, Served]]:
    """The fastest candidates, served, with every number of callers."""
    fitting = candidates(shared, machine, wish.slo_p95_ms)
    if not fitting:
        reasons = {each.refused for each in shared if each.refused}
        raise BenchError(f"The model does not fit on this machine: {'; '.join(sorted(reasons)) or 'its memory is too small'}")
    tried: list[tuple[AppSettings, Served]] = []
    for candidate in fitting[:SERVED]:
        rate = candidate.images_per_s * max(machine.gpus, 1)
        if (best := by_preference(tried, wish.slo_p95_ms)) and rate < best[0][1].images_per_s:
            break  # HTTP makes nobody faster
        settings = _settings(wish, machine, candidate)
        with _endpoint(settings, wish.imgsz, port) as target:
            for served in _sweep(target, images, settings.models[0], rate, wish.seconds):
                report(f"{settings.models[0].replicas.max} replicas over HTTP, {served.callers} callers: {_words(served)}")
                tried.append((settings, served))
                if wish.slo_p95_ms is not None and served.p95_ms > wish.slo_p95_ms:
                    break
    return tried


def by_preference(tried: Sequence[tuple[AppSettings, Served]], slo_p95_ms: float | None) -> list[tuple[AppSettings, Served]]:
    """Those that keep the objective, the highest rate first; of rates that are alike the one with fewer callers."""
    keeping = [each for each in tried if slo_p95_ms is None or each[1].p95_ms <= slo_p95_ms]
    if not keeping:
        return []
    most = max(served.images_per_s for _, served in keeping)

    def rank(each: tuple[AppSettings, Served]) -> tuple[bool, float]:
        served = each[1]
        slower = served.images_per_s < most * (1 - ALIKE)
        return slower, -served.images_per_s if slower else served.callers

    return sorted(keeping, key=rank)


def _settings(wish: Wish, machine: Node, candidate: Shared) -> AppSettings:
    model = wish.model.model_dump() | {"max_batch": candidate.batch}
    one = ServedModel(**model, actor=candidate.reserved)
    return AppSettings(models=(_scaled(one, candidate.actors * max(machine.gpus, 1), machine),))


def _bounded(settings: AppSettings, callers: int) -> AppSettings:
    """With a queue in which no more may wait than the objective allows; others get 429 instead of a late answer.

    Where there are several ingresses, Serve does not spread callers evenly: each has room for another batch.
    """
    model = settings.models[0]
    ingresses = model.replicas.max if settings.direct else settings.ingresses
    beyond = ceil(max(callers - model.in_flight * model.replicas.max, 0) / ingresses)
    waiting = beyond + (model.max_batch if ingresses > 1 else 1)
    return settings.model_copy(update={"http": HttpLimits(max_waiting_requests=waiting)})


@contextmanager
def _endpoint(settings: AppSettings, imgsz: int, port: int) -> Iterator[Target]:
    """Serve it: one port for all, since a Serve that runs keeps its own."""
    with running_app(settings, HOST, port) as address:
        yield Target(f"{address}/predict", form={"imgsz": str(imgsz)})


def _sweep(target: Target, images: Sequence[Path], model: ServedModel, rate: float, seconds: float) -> Iterator[Served]:
    """As many callers as there are replicas, then twice as many, until all have their hands full and more give no more."""
    callers, hands = model.replicas.max, model.replicas.max * model.in_flight
    _ask(target, images, 2 * hands, rate * seconds)  # every shape and batch size prepared
    before = 0.0
    while True:
        served = _ask(target, images, callers, rate * seconds)
        yield served
        if callers >= hands and served.images_per_s < before * (1 + ALIKE):
            return
        rate = before = served.images_per_s
        callers *= 2
        if callers > HttpLimits().max_waiting_requests:  # some of them would get 429
            return


def _steadily(target: Target, images: Sequence[Path], served: Served, seconds: float) -> Served:
    """The medians of some rounds, on replicas that are warm."""
    requests = max(served.images_per_s * seconds, ANSWERS * served.callers)
    _ask(target, images, served.callers, requests)
    rounds = [_ask(target, images, served.callers, requests) for _ in range(ROUNDS)]
    return Served(
        served.callers,
        median(each.images_per_s for each in rounds),
        median(each.p95_ms for each in rounds),
        median(each.cpu_s for each in rounds),
    )


def _ask(target: Target, images: Sequence[Path], callers: int, requests: float) -> Served:
    before = _cpu_times()
    load = run_load(target, images, Closed(callers, max(int(requests), 4 * callers)))
    spent = sum(seconds - before.get(process, 0.0) for process, seconds in _cpu_times().items())
    return Served(callers, load.per_s, _p95(load), spent / load.sent)


def _p95(load: Load) -> float:
    p95 = load.percentile(95)
    if load.errors or p95 is None:
        raise BenchError(f"The endpoint did not answer everything: {json.dumps(load.errors)}")
    return p95


def _cpu_times() -> dict[int, float]:
    """CPU seconds of Ray's processes on this machine, which are all below this one."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = times.user + times.system
    return found


def _carried_over(
    settings: AppSettings, served: Served, measured: Node, node: Node, shared: Sequence[Shared]
) -> tuple[AppSettings, Served]:
    """The same on a node with more or fewer GPUs or cores of the same kind; what its CPUs cannot feed is left out."""
    model = settings.models[0]
    factor = node.gpus / measured.gpus if node.gpus else node.cores / measured.cores
    memory = max(each.memory_bytes for each in shared if each.batch == model.max_batch and not each.refused)
    replicas = min(max(int(model.replicas.max * factor), 1), int(MEMORY_FILLED * node.memory_gb * 1e9 / memory))
    if not replicas:
        raise BadRequest(
            f"A replica takes {memory / 1e9:.1f} GB of memory, and {node.name} has {node.memory_gb:.1f}: it is too small"
        )
    growth = replicas / model.replicas.max
    rate = served.images_per_s * growth
    if node.gpus:
        rate = min(rate, node.cores / served.cpu_s)
    settings = settings.model_copy(update={"models": (_scaled(model, replicas, node),)})
    return settings, replace(served, callers=max(int(served.callers * growth), 1), images_per_s=rate)


def _scaled(model: ServedModel, replicas: int, node: Node) -> ServedModel:
    """So many replicas; beside GPUs each has one core at most, and all of them no more than there are."""
    actor = model.actor
    if node.gpus:
        actor = actor.model_copy(update={"num_cpus": min(actor.num_cpus, int(100 * node.cores / replicas) / 100)})
    return model.model_copy(update={"replicas": Replicas(min=replicas, max=replicas), "actor": actor})


def _words(served: Served) -> str:
    return f"{served.images_per_s:.1f} images/s, p95 {served.p95_ms:.0f} ms"
