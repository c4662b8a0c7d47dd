"""Private models that share a device: what 1, 2, 4, … actors do together, by the size of their batches.

    for each number of actors, for each batch size
        Ray starts them, each with an equal share ─→ settled_detector ─→ twice a batch of encoded images in its hands
                          refused: the share does not do                       over and over, all at the same time
                                                                          ─→ images/s together, p95, memory of the largest

No HTTP in it. ``yolofleet bench share`` sets the counts beside one actor with all of the device and beside plain
``YOLO.predict`` in one process; ``yolofleet plan`` chooses among them (``deploy/plan.py``).
"""

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from rich.box import SIMPLE_HEAD
from rich.table import Table

from actors.errors import FleetError
from actors.hardware import available_cpus, gpu_peak_bytes, gpu_process_bytes, memory_bytes
from actors.schemas import ModelInfo, PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from actors.startup import settled_detector
from deploy.bench import BenchError
from deploy.bench.load import percentile
from deploy.bench.machine import circumstances, fp32_environment

WARM_UP = 2  # batches
START_TIMEOUT_S = 1800.0  # an engine may have to be made first
TOGETHER_S = 0.5  # from the last actor's readiness to the common start

_IN_A_LOOP = """
import json, sys, time
import numpy as np
from ultralytics import YOLO
from ultralytics.utils.patches import imread
weights, imgsz, seconds, *files = sys.argv[1:]
model = YOLO(weights)
for file in files[:2]:
    model.predict(file, imgsz=int(imgsz), verbose=False)
done, started = 0, time.perf_counter()
while (taken := time.perf_counter() - started) < float(seconds):
    model.predict(files[done % len(files)], imgsz=int(imgsz), verbose=False)
    done += 1
print(json.dumps(done / taken))
"""


@dataclass(frozen=True, slots=True)
class Shared:
    """What actors did together.

    Attributes:
        actors: that shared the device.
        reserved: what each of them had.
        batch: images in one forward pass, at most.
        images_per_s: of all actors together; 0 if they were refused.
        p95_ms: of one image, with twice a batch in its actor's hands.
        memory_bytes: resident set of the largest actor.
        gpu_bytes: GPU memory of the largest actor, as the driver counts it or else as torch does; None on a CPU.
        refused: why they did not start.
    """

    actors: int
    reserved: ActorSettings
    batch: int
    images_per_s: float = 0.0
    p95_ms: float = 0.0
    memory_bytes: int = 0
    gpu_bytes: int | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class _Turn:
    """What one of the actors did."""

    images_per_s: float
    latencies_ms: list[float]
    memory_bytes: int
    gpu_bytes: int | None


@dataclass(frozen=True, slots=True)
class ShareReport:
    """All of a measurement; ``predict`` is the images/s of plain ``YOLO.predict`` in one process in every round."""

    model: str
    imgsz: int
    shared: list[list[Shared]]
    predict: list[float]
    circumstances: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        rows = [[asdict(each) | {"reserved": each.reserved.model_dump()} for each in turn] for turn in self.shared]
        return asdict(self) | {"shared": rows}


class Sharer:
    """One private model among others on the device. The Ray shell of a Detector."""

    def load(self, model: ModelSettings, actor: ActorSettings) -> ModelInfo:
        """Load it into its share; see ``settled_detector``."""
        self._batch = model.max_batch
        self._detector = settled_detector(model, actor, ImageLimits())
        return self._detector.info

    def run(self, images: Sequence[bytes], params: PredictParams, at: float, seconds: float) -> _Turn:
        """Compute images for so long, beginning when ``time.time()`` is ``at``."""
        supply = cycle(images)
        for _ in range(WARM_UP):
            for answer in [self._detector.submit(next(supply), params) for _ in range(self._batch)]:
                answer.result()
        time.sleep(max(0.0, at - time.time()))
        latencies: list[float] = []
        begun, hands = time.perf_counter(), deque[tuple[float, Any]]()
        while (now := time.perf_counter()) < begun + seconds:
            while len(hands) < 2 * self._batch:
                hands.append((now, self._detector.submit(next(supply), params)))
            since, answer = hands.popleft()
            answer.result()
            latencies.append(1e3 * (time.perf_counter() - since))
        rate = len(latencies) / (time.perf_counter() - begun)
        for _, answer in hands:
            answer.result()
        peak = gpu_peak_bytes()
        return _Turn(rate, latencies, memory_bytes(), peak and max(peak, gpu_process_bytes() or 0))


def equal_share(actors: int, *, gpu: bool) -> ActorSettings:
    """What each of ``actors`` reserves of one GPU, or of this machine's cores.

    Beside a GPU an actor has one core at most: it only feeds it.
    """
    cores = available_cpus() / actors
    if gpu:
        return ActorSettings(num_cpus=min(1.0, int(100 * cores) / 100), num_gpus=int(100 / actors) / 100)
    return ActorSettings(num_cpus=float(int(cores)) if cores >= 1 else int(100 * cores) / 100)


def measure_shared(
    model: ModelSettings, images: Sequence[bytes], params: PredictParams, actors: int, *, gpu: bool, seconds: float
) -> Shared:
    """Let ``actors`` with equal shares compute at the same time. Ray must run.

    Raises:
        BenchError: they do not start, or died.
    """
    reserved = equal_share(actors, gpu=gpu)
    options = {"num_cpus": reserved.num_cpus, "num_gpus": reserved.num_gpus}
    sharers = [ray.remote(Sharer).options(**options).remote() for _ in range(actors)]
    try:
        ray.get([sharer.load.remote(model, reserved) for sharer in sharers], timeout=START_TIMEOUT_S)
        at = time.time() + TOGETHER_S
        turns = ray.get([sharer.run.remote(images, params, at, seconds) for sharer in sharers])
    except RayTaskError as error:
        if isinstance(error.cause, FleetError):
            return Shared(actors, reserved, model.max_batch, refused=error.cause.message)
        raise
    except (RayActorError, TimeoutError) as error:
        raise BenchError(f"{actors} actors could not share this device: {str(error).partition(chr(10))[0]}") from error
    finally:
        for sharer in sharers:
            ray.kill(sharer)
    gpu_bytes = [turn.gpu_bytes for turn in turns if turn.gpu_bytes is not None]
    return Shared(
        actors,
        reserved,
        model.max_batch,
        images_per_s=sum(turn.images_per_s for turn in turns),
        p95_ms=percentile([latency for turn in turns for latency in turn.latencies_ms], 95),
        memory_bytes=max(turn.memory_bytes for turn in turns),
        gpu_bytes=max(gpu_bytes) if gpu_bytes else None,
    )


def predict_in_a_loop(model: ModelSettings, images: Sequence[Path], imgsz: int, seconds: float) -> float:
    """Images/s of plain ``YOLO.predict`` in one process, with the device to itself.

    Raises:
        BenchError: it failed.
    """
    command = [sys.executable, "-c", _IN_A_LOOP, model.weights, str(imgsz), str(seconds), *map(str, images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=fp32_environment())
    if done.returncode:
        raise BenchError(f"YOLO.predict in a loop failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return float(json.loads(done.stdout))


def bench_share(
    model: ModelSettings,
    images: Sequence[Path],
    imgsz: int,
    counts: Sequence[int],
    *,
    gpu: bool,
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
) -> ShareReport:
    """Every number of actors and plain ``YOLO.predict``, ``rounds`` times. Ray must run.

    Args:
        model: the weights and the batch size of every actor.
        images: encoded images, taken in turn.
        imgsz: letterbox target, pixels.
        counts: numbers of actors; those that do not start are reported with the reason.
        gpu: whether they share one GPU, or this machine's cores.
        rounds: how often everything is measured.
        seconds: how long each measurement takes.
        report: called with a line after every measurement.

    Raises:
        BenchError: a measurement failed.
    """
    encoded, params = [image.read_bytes() for image in images], PredictParams(imgsz=(imgsz, imgsz))
    shared: list[list[Shared]] = []
    predict: list[float] = []
    for turn in range(1, rounds + 1):
        predict.append(predict_in_a_loop(model, images, imgsz, seconds))
        report(f"round {turn} of {rounds}: YOLO.predict in one process {predict[-1]:.1f} images/s")
        shared.append([])
        for actors in counts:
            each = measure_shared(model, encoded, params, actors, gpu=gpu, seconds=seconds)
            shared[-1].append(each)
            report(f"round {turn} of {rounds}: {actors} actors {each.refused or f'{each.images_per_s:.1f} images/s'}")
    return ShareReport(model.name, imgsz, shared, predict, circumstances())


def render(report: ShareReport) -> Table:
    """The report as a table; ratios are medians of those within a round."""
    title = f"{report.model} at {report.imgsz}, medians of {len(report.shared)} rounds"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False)
    for heading in (
        "actors",
        "GPU, CPUs of each",
        "images/s",
        "of one actor",
        "of YOLO.predict",
        "p95 ms",
        "memory MB",
        "GPU MB",
    ):
        table.add_column(heading, justify="right")
    table.add_row("YOLO.predict", "", f"{median(report.predict):.1f}", "", "1.00", "", "", "")
    for number, first in enumerate(report.shared[0]):
        rounds = [turn[number] for turn in report.shared]
        reserved = f"{first.reserved.num_gpus:g}, {first.reserved.num_cpus:g}"
        if any(each.refused for each in rounds):
            table.add_row(str(first.actors), reserved, "refused", "", "", "", "", "")
            continue
        ones = [turn[0].images_per_s for turn in report.shared]
        gpu = "" if first.gpu_bytes is None else f"{max(each.gpu_bytes or 0 for each in rounds) / 1e6:.0f}"
        table.add_row(
            str(first.actors),
            reserved,
            f"{median(each.images_per_s for each in rounds):.1f}",
            _ratio([each.images_per_s for each in rounds], ones),
            _ratio([each.images_per_s for each in rounds], report.predict),
            f"{median(each.p95_ms for each in rounds):.0f}",
            f"{max(each.memory_bytes for each in rounds) / 1e6:.0f}",
            gpu,
        )
    refused = {each.refused for turn in report.shared for each in turn if each.refused}
    table.caption = "\n".join([*sorted(refused), "memory is of the largest actor"])
    return table


def _ratio(rates: Sequence[float], others: Sequence[float]) -> str:
    return f"{median(rate / other for rate, other in zip(rates, others, strict=True)):.2f}" if all(others) else ""
