"""``yolofleet bench batch``: the dataset job against the limit of this machine and against ``YOLO.predict`` in a loop.

    images, repeated ─┬─ limit      one stream a core, everything in memory (deploy/bench/limit.py)
                      ├─ job        ``yolofleet predict`` as a user runs it, an actor a core
                      ├─ predict    ``YOLO.predict(folder, stream=True)`` in one process, on the weights as they are
                      └─ openvino   the same on an OpenVINO export of them, where they are ``.pt`` and OpenVINO is there
                         each in every round, in rotated order; what counts is the ratio within a round

The job's rate counts from the first actor that has loaded its model to the last commit: start-up is told apart.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

from actors.schemas import PredictParams
from actors.settings import ModelSettings
from deploy.bench import BenchError
from deploy.bench.exports import export
from deploy.bench.limit import measure_limit
from deploy.bench.machine import circumstances, fp32_environment
from deploy.weights import flags_of

_IN_A_LOOP = """
import json, sys, time
from ultralytics import YOLO
weights, folder, conf = sys.argv[1:]
model = YOLO(weights)
model.predict(folder + "/000-0.jpg", verbose=False)
started = time.perf_counter()
count = sum(1 for _ in model.predict(folder, stream=True, conf=float(conf), verbose=False))
print(json.dumps(count / (time.perf_counter() - started)))
"""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """All rounds of a measurement.

    Attributes:
        images: how many the job and the loops computed a round; the limit takes as many as it can in its time.
        per_s: side → images/s of every round.
        job_is: side → median over the rounds of the job's rate over that side's.
        loading_s: median seconds from the job's start to its first loaded actor.
        stage_ms: the limit's stages, milliseconds an image in one stream, of the last round.
        job_stage_ms: the job's, which overlap, and ``starved``: what its model threads waited for images; likewise.
        circumstances: machine, versions, commit, command.
    """

    images: int
    per_s: dict[str, list[float]]
    job_is: dict[str, float]
    loading_s: float
    stage_ms: dict[str, float]
    job_stage_ms: dict[str, float]
    circumstances: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {"kind": "batch"} | asdict(self)


def bench_batch(
    model: ModelSettings, images: Sequence[Path], repeat: int, rounds: int, cores: int, report: Callable[[str], None]
) -> BatchReport:
    """Measure all three, ``rounds`` times.

    Args:
        model: the weights, and the job's batch size.
        images: JPEG files.
        repeat: how often each is taken.
        rounds: how often all three are measured.
        cores: each has a stream of the limit, and an actor of the job.
        report: called with a line after every measurement.

    Raises:
        BenchError: one of them failed.
    """
    params = PredictParams()
    encoded = [image.read_bytes() for image in images]
    loading: list[float] = []
    stages: dict[str, float] = {}
    job_stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        for turn in range(repeat):
            for number, image in enumerate(images):
                shutil.copy(image, folder / f"{number:03d}-{turn}.jpg")

        def limit() -> float:
            measured = measure_limit(model, encoded, params, cores)
            stages.update(measured.stage_ms)
            return measured.images_per_s

        def job() -> float:
            out = Path(scratch) / f"out-{time.time_ns()}"
            command = [sys.executable, "-m", "deploy.cli", "predict", str(folder), *flags_of(model)]
            _run([*command, "--actors", str(cores), "--batch-size", str(model.max_batch), "--out", str(out)])
            summary = json.loads((out / "summary.json").read_text())
            job_stages.update(summary["stage_ms_per_image"])
            this_run = summary["this_run"]
            loading.append(this_run["loading_seconds"])
            return float(this_run["images_per_s_loaded"])

        def predict(weights: str) -> float:
            told = _run([sys.executable, "-c", _IN_A_LOOP, weights, str(folder), str(params.conf)], fp32_environment())
            return float(told.splitlines()[-1])  # Ultralytics tells of its loading before

        sides: dict[str, Callable[[], float]] = {"limit": limit, "job": job, "predict": partial(predict, model.weights)}
        if model.weights.endswith(".pt") and find_spec("openvino"):
            exported = export(Path(model.weights), "openvino", Path(scratch), dynamic=True)
            sides["openvino"] = partial(predict, str(exported))
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            names = [*sides][turn % len(sides) :] + [*sides][: turn % len(sides)]
            for name in names:
                rates[name].append(sides[name]())
                report(f"round {turn + 1} of {rounds}: {name} {rates[name][-1]:.2f} images/s")
    return BatchReport(
        images=len(images) * repeat,
        per_s=rates,
        job_is={name: median(map(truediv, rates["job"], each)) for name, each in rates.items() if name != "job"},
        loading_s=median(loading),
        stage_ms=stages,
        job_stage_ms=job_stages,
        circumstances=circumstances(),
    )


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise BenchError(f"'{' '.join(command[:5])} …' failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout
