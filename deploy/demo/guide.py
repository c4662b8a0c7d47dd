"""``yolofleet demo``: everything at once on the embedded model, checked as it runs.

Ray → 2 replicas behind HTTP ← 8 callers, each with thresholds of its own ─→ every answer against a sequential reference
    → dataset job, 2 actors   ← 200 scenes nobody has trained on         ─→ every input accounted for, mAP50 measured
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pyarrow.dataset
import ray
from rich.console import Console

from actors.evaluate import Label, evaluate
from actors.images import decode_image, encode_jpeg
from actors.model import YoloModel
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ImageLimits
from deploy.api.ultralytics import summary
from deploy.batch import Job, JobSettings
from deploy.demo.scene import draw_scene
from deploy.launch import local_ray, running_app, stop_signals
from deploy.settings import AppSettings, Replicas, ServedModel
from deploy.weights import EMBEDDED

UNSEEN_SEEDS = range(1_000_000, 1_000_200)  # parts.json: training used other seeds
REQUIRED_MAP50 = 0.95
CALLERS = (
    PredictParams(),
    PredictParams(conf=0.5),
    PredictParams(conf=0.05),
    PredictParams(conf=0.8),
    PredictParams(classes=(0,)),
    PredictParams(classes=(1, 3)),
    PredictParams(max_det=1),
    PredictParams(conf=0.1, iou=0.3, max_det=5),
)
REQUESTS = 96


@dataclass(frozen=True)
class Check:
    """One thing that the demo proves, or not."""

    claim: str
    holds: bool


def run_demo(console: Console, port: int, *, stay: bool) -> bool:
    """Run the demo; returns whether every check holds.

    Args:
        console: where to show it.
        port: of the endpoint; 0 takes a free one.
        stay: keep serving after the checks, until SIGINT or SIGTERM.
    """
    console.print("yolofleet demo, on the [bold]embedded demonstration model[/]: nuts, bolts, washers and gears that it draws")
    with tempfile.TemporaryDirectory(prefix="yolofleet-demo-") as folder, _Steps(console) as steps:
        scenes, results = Path(folder) / "images", Path(folder) / "results"
        steps.begin(f"drawing {len(UNSEEN_SEEDS)} scenes that the model was not trained on")
        truth = _draw(scenes)
        steps.begin("starting Ray")
        with local_ray():
            actor = ActorSettings(num_cpus=ray.cluster_resources()["CPU"] / 4, num_gpus=0)
            model = ServedModel(**EMBEDDED.model_dump(), replicas=Replicas(min=2, max=2), actor=actor)
            steps.begin("starting the endpoint: 2 replicas, each with a private model")
            with running_app(AppSettings(models=(model,)), "127.0.0.1", port) as address:
                steps.begin(f"{REQUESTS} requests from {len(CALLERS)} callers at once, each with thresholds of its own")
                checks = _drive(address, scenes)
                steps.begin("a dataset job over all scenes: 2 actors, each with a private model")
                checks += _run_job(scenes, results, truth, actor)
                steps.end()
                for check in checks:
                    console.print(f"  {'[green]holds[/]' if check.holds else '[red]FAILS[/]'}  {check.claim}", highlight=False)
                if stay:
                    _invite(console, address, scenes, results)
                    with stop_signals() as stop:
                        stop.wait()
    return all(check.holds for check in checks)


def _draw(folder: Path) -> dict[str, list[Label]]:
    """Draw the scenes as JPEG files; returns the true objects of each by file name."""
    folder.mkdir()
    truth = {}
    for seed in UNSEEN_SEEDS:
        scene = draw_scene(seed)
        name = f"{seed}.jpg"
        (folder / name).write_bytes(encode_jpeg(scene.image))
        truth[name] = [Label(part.class_id, (part.x1, part.y1, part.x2, part.y2)) for part in scene.parts]
    return truth


def _drive(address: str, scenes: Path) -> list[Check]:
    """Send every image with another caller's thresholds, all callers at once; compare with one model, one at a time."""
    images = [path.read_bytes() for path in sorted(scenes.glob("*.jpg"))[: REQUESTS // 4]]
    work = [(images[number % len(images)], CALLERS[number % len(CALLERS)]) for number in range(REQUESTS)]
    with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(len(CALLERS)) as callers:
        answers = list(callers.map(lambda item: _ask(client, *item), work))
    with_model = YoloModel(EMBEDDED)
    limits = ImageLimits()
    wrong = 0
    for (data, params), (answer, _) in zip(work, answers, strict=True):
        (expected,) = with_model.predict([with_model.prepare(decode_image(data, limits), params)])
        wrong += not same_answer(summary(expected), answer)
    replicas = {replica for _, replica in answers}
    return [
        Check(f"{len(answers)} of {REQUESTS} answers equal the sequential reference, {wrong} were mixed up", wrong == 0),
        Check(f"{len(replicas)} of 2 replicas answered", len(replicas) == 2),
    ]


def _ask(client: httpx.Client, data: bytes, params: PredictParams) -> tuple[list[dict[str, Any]], str]:
    fields: dict[str, Any] = {"conf": params.conf, "iou": params.iou, "max_det": params.max_det}
    if params.classes is not None:
        fields["classes"] = ",".join(map(str, params.classes))
    response = client.post("/predict", files={"file": ("scene.jpg", data)}, data=fields)
    response.raise_for_status()
    return response.json()["images"][0]["results"], response.headers["x-replica"]


def same_answer(expected: list[dict[str, Any]], answer: list[dict[str, Any]]) -> bool:
    """Whether two answers tell the same: classes, confidence within 1e-3, box within half a pixel."""
    return len(expected) == len(answer) and all(
        one["class"] == other["class"]
        and abs(one["confidence"] - other["confidence"]) < 1e-3
        and all(abs(one["box"][key] - other["box"][key]) < 0.5 for key in one["box"])
        for one, other in zip(expected, answer, strict=True)
    )


def _run_job(scenes: Path, results: Path, truth: dict[str, list[Label]], actor: ActorSettings) -> list[Check]:
    params = PredictParams(conf=0.001, rect=False, multi_label=True)  # as YOLO.val measures
    job = Job.open(JobSettings(sources=(str(scenes),), model=EMBEDDED, out=results, actors=2, params=params))
    started = time.perf_counter()
    job.run(actor, lambda progress: None)
    report = job.finish(time.perf_counter() - started)
    rows = pyarrow.dataset.dataset(results / "detections").to_table().to_pylist()
    map50 = evaluate(rows, lambda row: truth[Path(row["uri"]).name]).map50
    return [
        Check(
            f"{report['results']} results + {report['dead_letters']} dead letters = {report['inputs']} inputs, each once",
            sorted(row["uri"] for row in rows) == job.uris,
        ),
        Check(f"mAP50 on scenes it has not seen is {map50:.3f}, at least {REQUIRED_MAP50}", map50 >= REQUIRED_MAP50),
    ]


def _invite(console: Console, address: str, scenes: Path, results: Path) -> None:
    console.print(
        f"\n[bold]{address}/docs[/] is the endpoint. Ask it yourself:\n"
        f"  curl -F file=@{scenes}/{UNSEEN_SEEDS[0]}.jpg {address}/predict\n"
        f"The job's results: {results}\n"
        "With a model of yours: yolofleet serve --model NAME=WEIGHTS (yolo26n.pt, say). Ctrl-C ends the demo.",
        highlight=False,
    )


class _Steps:
    """What is being done, with a spinner on a terminal, and how long each step took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""
        self._started = 0.0
        self._status = console.status("")

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def begin(self, text: str) -> None:
        """End the step before and begin another."""
        self.end()
        self._text, self._started = text, time.perf_counter()
        self._status.update(f"{text} …")
        self._status.start()

    def end(self) -> None:
        """End the present step and print its duration."""
        if self._text:
            self._console.print(f"{self._text}: {time.perf_counter() - self._started:.1f} s", highlight=False)
        self._text = ""
        self._status.stop()
