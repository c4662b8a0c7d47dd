"""The limit of this machine: what an image costs with everything in memory, one stream of images a core, stage by stage.

    encoded bytes ─ decode ─ letterbox ─ engine ─ post (suppression) ─ encode (rows, Parquet in memory)
                    one process a core, one thread each, all at once; nobody reads, sends or waits

It is measured at the shapes, thresholds and batch size of the job that is compared with it, over the images again and again:
a shared machine's speed differs from one second to the next by more than what is looked for. No job on the same engine can be
faster, but by overlapping what one core does with what another is idle for: there is nothing such here.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice, takewhile
from multiprocessing.synchronize import Barrier
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.images import decode_image
from actors.model import Model, load_model
from actors.schemas import PredictParams
from actors.settings import ImageLimits, ModelSettings
from actors.startup import settled_model
from actors.writers import row, table
from deploy.bench import BenchError
from deploy.bench.machine import circumstances

STAGES = ("decode", "letterbox", "engine", "post", "encode")
WARM_UP = 128  # images at least: an engine prepares for the shapes that come often
MEASURED_S = 8.0  # at least
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What this machine can do at most.

    Attributes:
        streams: processes that computed at the same time, with one thread each.
        batch: images in one forward pass, at most.
        images_per_s: of all streams together.
        stage_ms: stage → milliseconds an image, in one stream, beside the others.
        cpu_ms: CPU milliseconds an image, of all stages together.
    """

    streams: int
    batch: int
    images_per_s: float
    stage_ms: dict[str, float]
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class LimitReport:
    """The limit with one stream, two, and so on.

    Attributes:
        weights: what was computed.
        images: how many there were, each of which every stream computed once at least.
        limits: one for each number of streams.
        circumstances: machine, versions, commit, command.
    """

    weights: str
    images: int
    limits: list[Limit]
    circumstances: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {"kind": "limit"} | asdict(self)


def bench_limit(
    model: ModelSettings, images: Sequence[bytes], streams: Sequence[int], report: Callable[[str], None]
) -> LimitReport:
    """``measure_limit`` for each number of streams; ``report`` gets a line after each.

    Raises:
        BenchError: a stream failed or did not start.
    """
    limits = []
    for count in streams:
        limits.append(measure_limit(model, images, PredictParams(), count))
        report(f"{count} streams: {limits[-1].images_per_s:.2f} images/s")
    return LimitReport(model.weights, len(images), limits, circumstances())


def measure_limit(
    model: ModelSettings, images: Sequence[bytes], params: PredictParams, streams: int, seconds: float = MEASURED_S
) -> Limit:
    """Compute ``images`` in each of ``streams`` processes at the same time: once, and again in turn for so many seconds.

    Raises:
        BenchError: a stream failed or did not start.
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(streams), context.SimpleQueue()
    processes = [
        context.Process(target=_stream, args=(model, images, params, seconds, barrier, answers), daemon=True)
        for _ in range(streams)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise BenchError("A stream of the limit failed: its traceback is above")
    spent = [answers.get() for _ in processes]
    computed = sum(each["images"] for each in spent)
    stage_ms = {stage: 1e3 * sum(each[stage] for each in spent) / computed for stage in STAGES}
    cpu_ms = 1e3 * sum(each["cpu"] for each in spent) / computed
    slowest = max(each["all"] for each in spent)
    return Limit(streams, model.max_batch, computed / slowest, stage_ms, cpu_ms)


def mean_limit(limits: Sequence[Limit]) -> Limit:
    """What lies between measurements of the same."""
    return replace(
        limits[0],
        images_per_s=mean(limit.images_per_s for limit in limits),
        stage_ms={stage: mean(limit.stage_ms[stage] for limit in limits) for stage in limits[0].stage_ms},
        cpu_ms=mean(limit.cpu_ms for limit in limits),
    )


def _stream(
    model: ModelSettings, images: Sequence[bytes], params: PredictParams, seconds: float, barrier: Barrier, answers: Any
) -> None:
    loaded, limits = settled_model(model, partial(load_model, model, 1)), ImageLimits()
    _compute(loaded, islice(cycle(images), WARM_UP), params, limits, model.max_batch)
    barrier.wait(START_TIMEOUT_S)
    started, used = time.perf_counter(), time.process_time()
    spent, computed = _compute(loaded, _again(images, seconds), params, limits, model.max_batch)
    answers.put(spent | {"images": computed, "all": time.perf_counter() - started, "cpu": time.process_time() - used})


def _again(images: Sequence[bytes], seconds: float) -> Iterator[bytes]:
    """Each of them, and then again in turn until so many seconds have passed since the first."""
    end = time.perf_counter() + seconds
    yield from images
    yield from takewhile(lambda _: time.perf_counter() < end, cycle(images))


def _compute(
    model: Model, images: Iterable[bytes], params: PredictParams, limits: ImageLimits, max_batch: int
) -> tuple[dict[str, float], int]:
    """Seconds by stage, in batches of equal shape as a Detector forms them when enough images wait; the number of images."""
    spent = dict.fromkeys(STAGES, 0.0)
    buckets: dict[Any, list[Any]] = {}
    rows: list[dict[str, Any]] = []
    for data in images:
        started = time.perf_counter()
        image = decode_image(data, limits)
        decoded = time.perf_counter()
        prepared = model.prepare(image, params)
        spent["decode"] += decoded - started
        spent["letterbox"] += time.perf_counter() - decoded
        buckets.setdefault(prepared.bucket, []).append(prepared)
        if len(buckets[prepared.bucket]) == max_batch:
            rows += _predict(model, buckets.pop(prepared.bucket), spent)
    for waiting in buckets.values():
        rows += _predict(model, waiting, spent)
    started = time.perf_counter()
    pq.write_table(table(rows), pa.BufferOutputStream(), compression="zstd")
    spent["encode"] += time.perf_counter() - started
    return spent, len(rows)


def _predict(model: Model, batch: Sequence[Any], spent: dict[str, float]) -> list[dict[str, Any]]:
    started = time.perf_counter()
    results = model.predict(batch)
    predicted = time.perf_counter()
    rows = [row("memory", None, model.info.name, result) for result in results]
    post = 1e-3 * sum(result.timing.postprocess for result in results)
    spent["post"] += post
    spent["engine"] += predicted - started - post
    spent["encode"] += time.perf_counter() - predicted
    return rows
