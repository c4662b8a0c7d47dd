"""``yolofleet bench background``: what an endpoint's callers notice of a dataset job beside it that has ``--background``.

    endpoint, a replica over all cores ←── open loop, the same arrivals in every round ──┐
                                                                                         │ p95 alone │ p95 beside the job
    ``yolofleet predict --background`` on the same Ray: there in one half of each round ─┘

Rounds alternate in which half comes first, and what counts is the ratio within a round. The load is a share of what the
endpoint answers at most, which is measured before. The job draws a picture of each result (``--annotate``), since its files
appear by the hundreds: it has drawn one before the clock starts, and must have drawn more when it stops.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import ray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from actors.settings import ActorSettings, ModelSettings
from deploy.bench import BenchError
from deploy.bench.load import Closed, Load, Open, Target, run_load
from deploy.bench.machine import circumstances
from deploy.launch import cluster_address, local_ray, running_app
from deploy.settings import AppSettings, ServedModel

CALIBRATION = Closed(callers=4, requests=80)
JOB_START_S = 180.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Half:
    """One half of a round: latencies in milliseconds, requests a second, the job's images a second if there was one."""

    p50: float
    p95: float
    per_s: float
    errors: dict[str, int]
    job_per_s: float | None


@dataclass(frozen=True, slots=True)
class BackgroundReport:
    """All rounds of a measurement.

    Attributes:
        rate: requests a second that were sent.
        requests: how many in each half of a round.
        alone: the endpoint by itself, every round.
        beside: with the job beside it, every round.
        p95_rise: median over the rounds of p95 beside the job / p95 alone, less 1.
        circumstances: machine, versions, commit, command.
    """

    rate: float
    requests: int
    alone: list[Half]
    beside: list[Half]
    p95_rise: float
    circumstances: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


def bench_background(
    model: ModelSettings,
    images: Sequence[Path],
    share: float,
    requests: int,
    rounds: int,
    cores: int,
    report: Callable[[str], None],
) -> BackgroundReport:
    """Measure the endpoint with and without the job, ``rounds`` times.

    Args:
        model: the weights of both.
        images: JPEG files, of the requests and of the job.
        share: of what the endpoint answers at most, how much is asked of it.
        requests: how many in each half of a round.
        rounds: how often.
        cores: the job has an actor on each.
        report: called with a line after every measurement.

    Raises:
        BenchError: the job failed or came to nothing.
    """
    halves: dict[bool, list[Half]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as scratch, local_ray():
        cpus = float(ray.cluster_resources()["CPU"])
        served = ServedModel(**model.model_dump(), actor=ActorSettings(num_cpus=cpus))
        with running_app(AppSettings(models=(served,)), "127.0.0.1", 0) as address:
            target = Target(f"{address}/predict")
            run_load(target, images, CALIBRATION)  # each new shape costs an engine a preparation
            most = run_load(target, images, CALIBRATION).per_s
            report(f"the endpoint answers {most:.1f} requests/s at most; {share:.0%} of that is sent")
            plan = Open(share * most, requests)
            for turn in range(rounds):
                for with_job in (turn % 2 == 1, turn % 2 == 0):
                    if with_job:
                        with _job(model, images, Path(scratch) / str(turn), cores) as drawn:
                            half = _measure(target, images, plan, drawn)
                    else:
                        half = _measure(target, images, plan, None)
                    halves[with_job].append(half)
                    beside = f" beside a job at {half.job_per_s:.1f} images/s" if half.job_per_s else ""
                    report(f"round {turn + 1} of {rounds}: p50 {half.p50:.0f} ms, p95 {half.p95:.0f} ms{beside}")
    ratios = [beside.p95 / alone.p95 for alone, beside in zip(halves[False], halves[True], strict=True)]
    return BackgroundReport(plan.rate, requests, halves[False], halves[True], median(ratios) - 1, circumstances())


def render(report: BackgroundReport) -> Table:
    """The report as a table."""
    table = Table(
        title=f"{report.rate:.1f} requests/s, medians of {len(report.alone)} rounds", box=SIMPLE_HEAD, show_edge=False
    )
    for heading in ("", "p50 ms", "p95 ms", "job's images/s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, halves in (("endpoint alone", report.alone), ("beside a job with --background", report.beside)):
        done = [half.job_per_s for half in halves if half.job_per_s is not None]
        latencies = (f"{median(half.p50 for half in halves):.0f}", f"{median(half.p95 for half in halves):.0f}")
        table.add_row(name, *latencies, f"{median(done):.1f}" if done else "")
    errors = sum(sum(half.errors.values()) for half in (*report.alone, *report.beside))
    table.caption = f"p95 rises by {report.p95_rise:+.0%}, the median of the rounds' ratios; {errors} requests failed"
    return table


def _measure(target: Target, images: Sequence[Path], plan: Open, drawn: Callable[[], int] | None) -> Half:
    before = drawn() if drawn else 0
    load: Load = run_load(target, images, plan)
    if not load.latencies_ms:
        raise BenchError(f"The endpoint has answered none of {load.sent} requests: {load.errors}")
    p50, p95 = load.percentile(50), load.percentile(95)
    done = (drawn() - before) / load.seconds if drawn else None
    if done is not None and done <= 0:
        raise BenchError("The job has done nothing beside the endpoint: send less (--share) or more (--requests)")
    return Half(p50 or 0.0, p95 or 0.0, load.per_s, load.errors, done)


@contextmanager
def _job(model: ModelSettings, images: Sequence[Path], scratch: Path, cores: int) -> Iterator[Callable[[], int]]:
    """A job over far more images than it can do, once it is at work; yields how to count what it has done."""
    folder, out = scratch / "in", scratch / "out"
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        shutil.copy(image, folder / f"{number:06d}.jpg")
    names = sorted(path.name for path in folder.iterdir())
    for turn in range(1, max(2, 4096 // len(names))):
        for name in names:
            (folder / f"{turn:04d}-{name}").hardlink_to(folder / name)
    command = [sys.executable, "-m", "deploy.cli", "predict", str(folder), "--model", model.weights, "--out", str(out)]
    environment = os.environ | {"RAY_ADDRESS": cluster_address()}
    command += ["--background", "--annotate", "--actors", str(cores)]
    with (scratch / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        give_up = time.monotonic() + JOB_START_S
        while not _drawn(out):
            if job.poll() is not None or time.monotonic() > give_up:
                raise BenchError(f"The job has not come to work: {(scratch / 'log').read_text()[-500:]}")
            time.sleep(POLL_S)
        yield lambda: _drawn(out)
    finally:
        job.terminate()
        job.wait()


def _drawn(out: Path) -> int:
    return len(list((out / "annotated").glob("*.jpg")))
