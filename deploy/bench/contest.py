"""``yolofleet bench peers``: what a user would pick instead, on the same weights, images and load, in the same run.

    documented    each as its own documentation would have it: the weights as they are, of which yolofleet makes an engine by
                  itself, as its flags say (Roboflow's server has an ONNX export)
    same engine   all of them on one OpenVINO export of these weights
                      │
    every round, in rotated order, one after another:
                      └ start ─→ every image once: warm-up, boxes counted ─→ Closed(callers, requests) ─→ end

The limit of this machine is measured right before the first fleet of its setup or right after it, in turn: the speed of a
shared machine drifts by more than the tenth that is looked for.

The report says how far a side's boxes are from those of ``YOLO.predict`` on the same file: nobody wins by being wrong. A side
that cannot run here is kept, with its reason.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from actors.schemas import PredictParams
from actors.settings import ModelSettings
from deploy.bench import BenchError
from deploy.bench.environments import installed_in, python_of
from deploy.bench.exports import export
from deploy.bench.limit import MEASURED_S, WARM_UP, measure_limit
from deploy.bench.load import Closed, Target, run_load
from deploy.bench.machine import circumstances, fp32_environment
from deploy.bench.processes import running_server
from deploy.bench.serve import Fleet, Level, in_a_loop, measure, post, settled_engine

SCRIPTS = Path(__file__).parent / "peers"

Setup = Literal["documented", "same engine"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another server.

    Attributes:
        title: as it is called.
        script: its file in ``deploy/bench/peers/``.
        package: whose version is reported.
        count: answer, as JSON → number of boxes.
        path: of the address that takes an image.
        file_field: of the form.
        setups: in which it can run; with ``onnx`` as its documented engine where it does not take the weights as they are.
    """

    title: str
    script: str
    package: str
    count: Callable[[Any], int] = len
    path: str = "/predict"
    file_field: str = "file"
    setups: tuple[Setup, ...] = ("documented", "same engine")
    onnx: bool = False


PEERS = (
    Peer("FastAPI with a lock", "fastapi_lock.py", "fastapi"),
    Peer("LitServe", "litserve_api.py", "litserve"),
    Peer("BentoML", "bentoml_service.py", "bentoml", lambda answer: len(answer[0]), file_field="images"),
    Peer("Ray Serve's tutorial", "ray_tutorial.py", "ray"),
    Peer(
        "Roboflow inference",
        "roboflow_inference.py",
        "inference-cpu",
        lambda answer: len(answer["predictions"]),
        path="/local/detect?confidence=0.25&overlap=0.7",
        setups=("documented",),
        onnx=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Contest:
    """What all of them go through.

    Attributes:
        model: ``.pt`` weights, and the engine that yolofleet makes of them.
        images: files that are asked about, in turn.
        fleets: title → yolofleet as it is started, with this model; the first one is held against the limit.
        cores: the limit has a stream on each.
        callers: how many ask at the same time.
        requests: of each measurement.
        rounds: how often everybody is measured.
    """

    model: ModelSettings
    images: Sequence[Path]
    fleets: dict[str, Fleet]
    cores: int
    callers: int = 16
    requests: int = 200
    rounds: int = 3


@dataclass(slots=True)
class Side:
    """One contestant in one setup, and what was measured.

    Attributes:
        title: who.
        setup: on which engine.
        version: of its package.
        engine: what it says that it computes with, where it can be asked.
        per_s: images a second, of each round.
        levels: the loads of each round; empty for what is no server.
        start_s: from start to first answer, of each round.
        memory_mb: of all of its processes after the load, of each round.
        boxes_off: sum of the differences in the number of boxes of each image, over the sum of boxes; of the first round.
        reason: why it could not be measured; None if it was.
    """

    title: str
    setup: Setup
    version: str | None = None
    engine: str | None = None
    per_s: list[float] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    boxes_off: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PeersReport:
    """Everybody, measured side by side.

    Attributes:
        callers: that asked at the same time; ``requests``, ``images`` and ``rounds`` likewise as in ``Contest``.
        boxes: that ``YOLO.predict`` finds in all images: setup, or "onnx" → number.
        sides: who took part.
        circumstances: machine, versions, commit, command.
    """

    callers: int
    requests: int
    images: int
    rounds: int
    boxes: dict[str, int]
    sides: list[Side]
    circumstances: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {"kind": "peers"} | asdict(self)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A side, and how it is measured once."""

    side: Side
    run: Callable[[Side], None]


def bench_peers(contest: Contest, report: Callable[[str], None]) -> PeersReport:
    """Measure everybody, ``contest.rounds`` times.

    Args:
        contest: what all go through.
        report: called with a line after every measurement.

    Raises:
        BenchError: the weights cannot be exported, or ``YOLO.predict`` itself fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        weights = _exports(Path(contest.model.weights), Path(scratch), report)
        reference = {key: in_a_loop(sys.executable, str(file), contest.images).boxes for key, file in weights.items()}
        limits, (first, *fleets) = _limits(contest, weights), _fleets(contest, weights, reference)
        others = chain(*fleets, _loops(contest, weights), _peers(contest, weights, reference, report))
        groups: list[tuple[_Entry, ...]] = [*zip(limits, first, strict=True), *((entry,) for entry in others)]
        for turn in range(contest.rounds):
            for entry in _in_turn(groups, turn):
                report(f"round {turn + 1} of {contest.rounds}: {_measured(entry)}")
    return PeersReport(
        callers=contest.callers,
        requests=contest.requests,
        images=len(contest.images),
        rounds=contest.rounds,
        boxes={key: sum(boxes) for key, boxes in reference.items()},
        sides=[entry.side for entry in chain(*groups)],
        circumstances=circumstances(),
    )


_SETUPS: tuple[Setup, ...] = ("documented", "same engine")
Weights = dict[str, Path]  # setup, or "onnx" → what is loaded
Boxes = dict[str, list[int]]  # of each image, by the same keys


def _in_turn(groups: Sequence[tuple[_Entry, ...]], turn: int) -> Iterator[_Entry]:
    """In this round's order: each round begins with another group, and every other one takes each group from its end."""
    first = turn % len(groups)
    for group in (*groups[first:], *groups[:first]):
        yield from group[:: -1 if turn % 2 else 1]


def _measured(entry: _Entry) -> str:
    """One measurement of a side; its result, or why there is none, in a line."""
    side = entry.side
    if side.reason is None:
        try:
            entry.run(side)
        except BenchError as error:
            side.reason = error.message
    return f"{side.title} ({side.setup}): {side.reason or f'{side.per_s[-1]:.2f} images/s'}"


def _limits(contest: Contest, weights: Weights) -> list[_Entry]:
    """The limit of this machine, in each setup."""
    encoded = [image.read_bytes() for image in contest.images]

    def limit(side: Side) -> None:
        export = ModelSettings(name="limit", weights=str(weights["same engine"]))
        model = contest.model if side.setup == "documented" else export
        side.per_s.append(measure_limit(model, encoded, PredictParams(), contest.cores).images_per_s)

    return [_Entry(Side("limit of this machine", setup), limit) for setup in _SETUPS]


def _loops(contest: Contest, weights: Weights) -> list[_Entry]:
    """``YOLO.predict`` without a server, in each setup."""

    def loop(side: Side) -> None:
        side.per_s.append(in_a_loop(sys.executable, str(weights[side.setup]), contest.images, MEASURED_S).images_per_s)

    return [_Entry(Side("YOLO.predict in a loop", setup), loop) for setup in _SETUPS]


def _fleets(contest: Contest, weights: Weights, reference: Boxes) -> list[list[_Entry]]:
    """Each fleet, in each setup."""

    def entry(title: str, fleet: Fleet, setup: Setup) -> _Entry:
        placed = fleet if setup == "documented" else fleet.on_export(str(weights[setup]))

        def run(side: Side) -> None:
            _serve_once(side, contest, placed.command, Target("/predict"), _boxes_of_fleet, reference[setup], settled_engine)

        return _Entry(Side(title, setup, circumstances()["versions"]["yolofleet"]), run)

    return [[entry(title, fleet, setup) for setup in _SETUPS] for title, fleet in contest.fleets.items()]


def _peers(contest: Contest, weights: Weights, reference: Boxes, report: Callable[[str], None]) -> list[_Entry]:
    entries = []
    for peer in PEERS:
        python, reason, its_version = None, None, None
        try:
            python = python_of(SCRIPTS / peer.script)
            its_version = installed_in(python, peer.package)
            report(f"the environment of {peer.title} {its_version} is there")
        except BenchError as error:
            reason = error.message
            report(f"{peer.title}: {reason}")
        for setup in peer.setups:
            key = "onnx" if peer.onnx else setup
            side = Side(peer.title, setup, its_version, reason=reason if key in weights else "there is no ONNX export")
            entries.append(_Entry(side, _peer_run(peer, python, weights.get(key), contest, reference.get(key, []))))
    return entries


def _peer_run(
    peer: Peer, python: Path | None, weights: Path | None, contest: Contest, boxes: list[int]
) -> Callable[[Side], None]:
    def command(port: int) -> list[str]:
        return [str(python), str(SCRIPTS / peer.script), "--weights", str(weights), "--port", str(port)]

    without_ray = {name: value for name, value in fp32_environment().items() if not name.startswith("RAY_")}  # which are ours
    target = Target(peer.path, peer.file_field)
    return lambda side: _serve_once(side, contest, command, target, peer.count, boxes, environment=without_ray)


def _serve_once(
    side: Side,
    contest: Contest,
    command: Callable[[int], Sequence[str]],
    target: Target,
    count: Callable[[Any], int],
    boxes: list[int],
    engine_of: Callable[[str], str | None] = lambda address: None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start a server, warm it up, count its boxes, load it, end it; ``target.url`` is without the address."""
    first = contest.images[0]
    with running_server(command, lambda address: post(address + target.url, first, target.file_field), environment) as server:
        side.engine = engine_of(server.address)
        there = Target(server.address + target.url, target.file_field)
        warm_up = Closed(contest.callers, max(WARM_UP, len(contest.images)))
        everything = run_load(there, contest.images, warm_up, keep_bodies=True)
        if everything.errors:
            raise BenchError(f"It answered the warm-up with {everything.errors}")
        if side.boxes_off is None:
            side.boxes_off = _off([_counted(count, body) for body in everything.bodies[: len(contest.images)]], boxes)
        level = measure(there, contest.images, Closed(contest.callers, contest.requests), server)
        side.start_s.append(server.start_s)
        side.per_s.append(level.per_s)
        side.levels.append(level)
        side.memory_mb.append(sum(server.usage().memory_mb.values()))


def _counted(count: Callable[[Any], int], body: str) -> int:
    try:
        return count(json.loads(body))
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(f"Its answer has no boxes where they should be: {body[:100]!r}") from error


def _off(counted: Sequence[int], boxes: Sequence[int]) -> float:
    """Differences in the number of boxes of each image, over all boxes."""
    return sum(abs(one - other) for one, other in zip(counted, boxes, strict=True)) / max(1, sum(boxes))


def _boxes_of_fleet(answer: Any) -> int:
    return len(answer["images"][0]["results"])


def _exports(weights: Path, scratch: Path, report: Callable[[str], None]) -> Weights:
    """The weights, an OpenVINO export of any shape, and an ONNX export of one shape, as Roboflow makes them.

    Raises:
        BenchError: Ultralytics cannot export to OpenVINO. Without ONNX one peer is left out.
    """
    exports: Weights = {"documented": weights, "same engine": export(weights, "openvino", scratch, dynamic=True)}
    try:
        exports["onnx"] = export(weights, "onnx", scratch, dynamic=False)
    except BenchError as error:
        report(error.message)
    return exports
