"""yolofleet race: the danger and the cure, measured on the user's own installation.

    the same images, asked by several callers at once, each with thresholds of its own
        │
        ├─ reference    one YOLO, one thread, one call after another: what every answer must equal
        ├─ (a) shared   one YOLO, called by every thread
        ├─ (b) handed   a YOLO per thread, made outside the threads
        ├─ (c) private  a YOLO per thread, made inside it
        ├─ (d) pool     a process pool, a YOLO in each process
        └─ (e) fleet    yolofleet: Ray actors, a Detector in each
        │     each in a fresh process of its own: no mode inherits another's memory, and a crash ends one mode only
        ▼
    answers → compared with the reference → RaceReport → table or JSON

A call is one image with one caller's thresholds; every caller has one thread and waits for each answer. Compressed bytes
go in, so that decoding is part of every mode. Engine threads: each model gets an equal share of the cores, at least one;
the reference has as many as Ultralytics takes by itself.
Models are loaded and have answered once before the clock starts.

The imports of torch and ultralytics here are the one exception to the rule that only the core has them: modes (a)
to (d) do on purpose what that module prevents.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from actors.dataset import list_inputs, read_input
from actors.detector import Detector
from actors.errors import BadRequest, ModelError
from actors.hardware import available_cpus
from actors.images import decode_image, encode_jpeg
from actors.model import load_model
from actors.schemas import Detection, ImageResult, PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from deploy.demo.scene import draw_scene
from deploy.environment import prepare_environment

CONFIDENCE_TOLERANCE = 1e-3
PIXEL_TOLERANCE = 0.5
LOAD_TIMEOUT_S = 300.0  # a mode gets this for loading, and ten times what the reference took for its calls

Mode = Literal["reference", "a", "b", "c", "d", "e"]
Row = tuple[int, float, tuple[float, ...]]  # class id, confidence, coordinates in pixels
Answer = tuple[Row, ...]
T = TypeVar("T")

TITLES: dict[Mode, str] = {
    "reference": "reference: one call at a time",
    "a": "(a) one YOLO shared by threads",
    "b": "(b) YOLO per thread, made outside",
    "c": "(c) YOLO per thread, made inside",
    "d": "(d) process pool, YOLO in each",
    "e": "(e) yolofleet's Ray actors",
}
MEMORY_NOTE = "sum of the peak resident sets of the mode's processes, Ray's own among them; shared pages count in each"
LIMITS = ImageLimits()


@dataclass(frozen=True, slots=True)
class Failed:
    """A call, or a whole mode, that gave no answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class Course:
    """What every mode runs: each caller asks every image, ``rounds`` times, with its own thresholds."""

    weights: Path
    images: tuple[bytes, ...]
    callers: tuple[PredictParams, ...]
    rounds: int

    @property
    def calls(self) -> int:
        """How many answers a mode owes."""
        return len(self.images) * len(self.callers) * self.rounds


@dataclass(frozen=True, slots=True)
class Run:
    """What came out of one mode: ``answers[caller]`` in the order asked, and what it cost."""

    answers: tuple[tuple[Answer | Failed, ...], ...]
    models: int
    threads: int
    seconds: float
    peak_memory_mb: float | None


@dataclass(frozen=True, slots=True)
class Survey:
    """What the reference's process tells besides its answers."""

    run: Run
    callers: tuple[PredictParams, ...]
    device: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One line of the table.

    Attributes:
        mode: key of ``TITLES``.
        title: what the mode does.
        models: how many models it loads.
        threads: engine threads of each model.
        calls: answers it owed.
        wrong: answers that differ from the reference.
        errors: calls without an answer.
        first_error: the reason of the first of them.
        images_per_s: calls answered per second; None where the mode ended early.
        peak_memory_mb: sum of the peak resident sets of its processes; None where this cannot be read.
    """

    mode: Mode
    title: str
    models: int
    threads: int
    calls: int
    wrong: int
    errors: int
    first_error: str | None
    images_per_s: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True, slots=True)
class RaceReport:
    """The whole race: one line per mode, and what is needed to judge and repeat it."""

    modes: tuple[ModeReport, ...]
    weights: str
    images: int
    imgsz: int
    rounds: int
    callers: tuple[PredictParams, ...]
    cores: int
    device: str
    versions: dict[str, str]

    @property
    def danger_shown(self) -> bool:
        """The shared model answered wrongly."""
        return self._mode("a").wrong > 0

    @property
    def cure_holds(self) -> bool:
        """Every answer of yolofleet's actors came, and equals the reference."""
        cure = self._mode("e")
        return cure.wrong == 0 and cure.errors == 0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        tolerance = {"confidence": CONFIDENCE_TOLERANCE, "pixels": PIXEL_TOLERANCE}
        return asdict(self) | {
            "danger_shown": self.danger_shown,
            "cure_holds": self.cure_holds,
            "tolerance": tolerance,
            "peak_memory": MEMORY_NOTE,
        }

    def _mode(self, mode: Mode) -> ModeReport:
        return next(line for line in self.modes if line.mode == mode)


def pictures(sources: Sequence[str], count: int) -> list[bytes]:
    """The first ``count`` images of ``sources``, or as many drawn scenes where there is no source.

    Raises:
        BadSource: a source does not exist or holds no image.
    """
    if sources:
        return [read_input(uri) for uri in islice(list_inputs(sources), count)]
    return [encode_jpeg(draw_scene(seed).image) for seed in range(count)]


def run_race(
    weights: Path, images: Sequence[bytes], *, imgsz: int, callers: int, rounds: int = 1, report: Callable[[str], None]
) -> RaceReport:
    """Run every mode over the same calls and compare each answer with the sequential reference.

    Args:
        weights: whatever ``ultralytics.YOLO`` loads, of any task that has boxes.
        images: encoded images; every caller asks all of them.
        imgsz: letterbox target, pixels.
        callers: how many ask at the same time.
        rounds: how many times each caller goes through the images.
        report: takes one line per mode, before it runs.

    Raises:
        BadRequest: there is no image, too few callers or no round, or the model has no thresholds to mix up.
        ModelError: the reference did not come about, so that there is nothing to compare with.
    """
    if not images or callers < 2 or rounds < 1:
        raise BadRequest("A race needs at least one image, two callers and one round")
    if not weights.exists():
        raise ModelError(f"No weights at {weights}: give the path of a file or folder that ultralytics.YOLO can load")
    weights, images, cores = weights.resolve(), tuple(images), available_cpus()
    report(f"{TITLES['reference']}: {len(images)} images x {callers} callers on {cores} cores")
    survey = _in_fresh_process(None, _survey, weights, images, imgsz, callers)
    if isinstance(survey, Failed):
        raise ModelError(f"The sequential reference failed: {survey.reason}")
    expected = [[_answered(answer) for answer in answers] for answers in survey.run.answers]
    course = Course(weights, images, survey.callers, rounds)
    lines = [_judge("reference", course, expected, survey.run, calls=course.calls // rounds)]
    for mode in MODES:
        models, threads = _plan(mode, course)
        report(f"{TITLES[mode]}: {course.calls} calls, models x engine threads: {models} x {threads}")
        run = _in_fresh_process(LOAD_TIMEOUT_S + 10 * rounds * survey.run.seconds, _run_mode, mode, course)
        lines.append(_judge(mode, course, expected, run, calls=course.calls))
    return RaceReport(
        modes=tuple(lines),
        weights=weights.name,
        images=len(images),
        imgsz=imgsz,
        rounds=rounds,
        callers=survey.callers,
        cores=cores,
        device=survey.device,
        versions=survey.versions | {"ray": version("ray"), "python": platform.python_version()},
    )


def render(report: RaceReport) -> Table:
    """The race as a table, for the terminal and the README."""
    callers = len(report.callers)
    facts = f"{report.weights}, {report.images} images x {callers} callers x {report.rounds} rounds at {report.imgsz}"
    place = f"{report.cores} cores, {report.device}, " + ", ".join(f"{name} {it}" for name, it in report.versions.items())
    reasons = [f"{line.title}: {line.first_error}" for line in report.modes if line.first_error]
    caption = Text("\n".join([place, f"peak MB: {MEMORY_NOTE}", *reasons]))
    table = Table(title=facts, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("mode", no_wrap=True)
    for heading in ("models x\nthreads", "wrong\nanswers", "errors", "images/s", "peak\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in report.modes:
        table.add_row(
            line.title,
            f"{line.models} x {line.threads}",
            _flagged(line.wrong),
            _flagged(line.errors),
            "-" if line.images_per_s is None else f"{line.images_per_s:.1f}",
            "-" if line.peak_memory_mb is None else f"{line.peak_memory_mb:,.0f}",
        )
    return table


def same_answer(expected: Answer, given: Answer) -> bool:
    """Whether two answers agree: as many objects, of the same classes, equal within the tolerances, in any order."""
    left = list(given)
    for row in expected:
        match = next((other for other in left if _same_row(row, other)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def thresholds(callers: int, imgsz: int, class_ids: Sequence[int]) -> tuple[PredictParams, ...]:
    """Thresholds that differ from caller to caller in ``conf``, ``classes``, ``max_det`` and ``iou``.

    Args:
        callers: how many to make.
        imgsz: the one thing they have in common, pixels.
        class_ids: what the model knows; some callers ask for half of them only.
    """
    even, odd = tuple(class_ids[::2]), tuple(class_ids[1::2]) or tuple(class_ids)
    kinds = ((0.05, None, 300, 0.7), (0.25, even, 100, 0.6), (0.6, None, 2, 0.5), (0.3, odd, 20, 0.45))
    return tuple(
        PredictParams(
            conf=kinds[index % 4][0] + 0.3 * (index // 4) / callers,
            classes=kinds[index % 4][1],
            max_det=kinds[index % 4][2],
            iou=kinds[index % 4][3],
            imgsz=(imgsz, imgsz),
        )
        for index in range(callers)
    )


def _judge(mode: Mode, course: Course, expected: list[list[Answer]], run: Run | Failed, *, calls: int) -> ModeReport:
    if isinstance(run, Failed):
        return ModeReport(mode, TITLES[mode], *_plan(mode, course), calls, 0, calls, run.reason, None, None)
    wrong, failures = 0, []
    for reference, answers in zip(expected, run.answers, strict=True):
        for index, answer in enumerate(answers):
            if isinstance(answer, Failed):
                failures.append(answer.reason)
            elif not same_answer(reference[index % len(reference)], answer):
                wrong += 1
    rate = (calls - len(failures)) / run.seconds
    first = failures[0] if failures else None
    return ModeReport(
        mode, TITLES[mode], run.models, run.threads, calls, wrong, len(failures), first, rate, run.peak_memory_mb
    )


def _same_row(one: Row, other: Row) -> bool:
    return (
        one[0] == other[0]
        and abs(one[1] - other[1]) <= CONFIDENCE_TOLERANCE
        and len(one[2]) == len(other[2])
        and all(abs(mine - yours) <= PIXEL_TOLERANCE for mine, yours in zip(one[2], other[2], strict=True))
    )


def _answered(answer: Answer | Failed) -> Answer:
    if isinstance(answer, Failed):
        raise ModelError(f"The sequential reference failed: {answer.reason}")
    return answer


def _flagged(count: int) -> str:
    return f"[bold red]{count}[/]" if count else "0"


# -- processes -----------------------------------------------------------------------------------------------------------


def _in_fresh_process(timeout_s: float | None, function: Callable[..., T], *args: Any) -> T | Failed:
    """Call ``function`` in a new interpreter. A crash, an exception or too long a wait becomes ``Failed``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout_s):
            return Failed(f"it did not end in {timeout_s:.0f} s")
        outcome: T | Failed = ours.recv()
        process.join(10)
    except EOFError:
        process.join()
        return Failed(f"its process died with exit status {process.exitcode}")
    else:
        return outcome
    finally:
        if process.is_alive():
            for pid in _tree(process.pid or 0):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.join()


def _child(results: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    try:
        results.send(function(*args))
    except Exception as error:
        results.send(Failed(_reason(error)))


def _reason(error: Exception) -> str:
    """An error's class and its sentence: the first line, or the last where Ray puts the remote traceback before it."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[-1 if 'ray::' in lines[0] else 0]}"


def _tree(root: int) -> list[int]:
    """``root`` and its living descendants; ``root`` alone where there is no /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    tree = [root]
    for pid in tree:  # grows as it goes
        tree.extend(child for child, parent in parents.items() if parent == pid)
    return tree


def _peak_memory_mb() -> float | None:
    """Peak resident sets of this process and its living descendants, added up; None where there is no /proc."""
    peaks = []
    for pid in _tree(os.getpid()):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            peaks += [int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM:")]
    return sum(peaks) if peaks else None


# -- below: inside the fresh process of a mode ---------------------------------------------------------------------------

Ask = Callable[[bytes], Answer]
Meet = Callable[[int], Ask]  # called once by each caller, on its own thread: its way to a warm model


def _survey(weights: Path, images: tuple[bytes, ...], imgsz: int, callers: int) -> Survey:
    """The reference: one model, one thread, one call after another."""
    import torch
    import ultralytics

    model = _load(weights)
    if model.task == "classify":
        raise BadRequest("A race mixes up thresholds, and 'classify' has none: give the weights of a detector")
    params = thresholds(callers, imgsz, tuple(model.names))
    _predict(model, images[0], params[0])
    started = time.perf_counter()
    answers = tuple(tuple(_outcome(partial(_predict, model, params=one), image) for image in images) for one in params)
    run = Run(answers, 1, torch.get_num_threads(), time.perf_counter() - started, _peak_memory_mb())
    versions = {"ultralytics": ultralytics.__version__, "torch": torch.__version__}
    return Survey(run, params, str(model.predictor.device), versions)


def _run_mode(mode: Mode, course: Course) -> Run:
    """Every caller on a thread of its own, all at once; the clock runs from the first call to the last answer."""
    models, threads = _plan(mode, course)
    callers = [ThreadPoolExecutor(1) for _ in course.callers]
    with MODES[mode](course, models, threads) as meet:
        asks = [caller.submit(meet, index).result() for index, caller in enumerate(callers)]
        started = time.perf_counter()
        pending = [caller.submit(_ask_all, ask, course) for caller, ask in zip(callers, asks, strict=True)]
        answers = tuple(answered.result() for answered in pending)
        return Run(answers, models, threads, time.perf_counter() - started, _peak_memory_mb())


def _ask_all(ask: Ask, course: Course) -> tuple[Answer | Failed, ...]:
    return tuple(_outcome(ask, image) for _ in range(course.rounds) for image in course.images)


def _outcome(ask: Ask, image: bytes) -> Answer | Failed:
    try:
        return ask(image)
    except Exception as error:
        return Failed(_reason(error))


def _plan(mode: Mode, course: Course) -> tuple[int, int]:
    """Models, and engine threads of each: the cores are shared out among the models that run at the same time."""
    cores = available_cpus()
    callers = len(course.callers)
    pool = min(callers, cores)  # as large as the machine allows, whatever the number of callers
    count = {"a": 1, "b": callers, "c": callers}.get(mode, pool)
    return count, max(cores // count, 1)


@contextmanager
def _shared(course: Course, models: int, threads: int) -> Iterator[Meet]:
    model = _load(course.weights)
    yield lambda index: _warm(model, course.callers[index], course.images[0], threads)


@contextmanager
def _handed(course: Course, models: int, threads: int) -> Iterator[Meet]:
    instances = [_load(course.weights) for _ in range(models)]
    yield lambda index: _warm(instances[index], course.callers[index], course.images[0], threads)


@contextmanager
def _private(course: Course, models: int, threads: int) -> Iterator[Meet]:
    yield lambda index: _warm(_load(course.weights), course.callers[index], course.images[0], threads)


@contextmanager
def _pool(course: Course, models: int, threads: int) -> Iterator[Meet]:
    context = multiprocessing.get_context("spawn")
    arguments = (course, threads, context.Barrier(models))
    with ProcessPoolExecutor(models, context, initializer=_load_in_process, initargs=arguments) as pool:
        loaded: list[Future[int]] = [pool.submit(os.getpid) for _ in range(models)]
        for process in loaded:
            process.result()
        yield lambda index: lambda image: pool.submit(_predict_in_process, image, course.callers[index]).result()


_model_of_process: list[Any] = []


def _load_in_process(course: Course, threads: int, all_loaded: Any) -> None:
    model = _load(course.weights)
    _warm(model, course.callers[0], course.images[0], threads)
    _model_of_process.append(model)
    all_loaded.wait(LOAD_TIMEOUT_S)


def _predict_in_process(image: bytes, params: PredictParams) -> Answer:
    return _predict(_model_of_process[0], image, params)


class RaceActor:
    """A Ray shell of a Detector, as the fleet's own actors are.

    Args:
        model: the weights.
        actor: the reservation; engine threads follow from it.
    """

    def __init__(self, model: ModelSettings, actor: ActorSettings) -> None:
        threads = actor.threads
        self._detector = Detector(lambda: load_model(model, threads), LIMITS, decode_threads=max(2, threads))

    def detect(self, data: bytes, params: PredictParams) -> ImageResult:
        """Detect in one encoded image; several callers may wait here at once."""
        return self._detector.submit(data, params).result()


@contextmanager
def _fleet(course: Course, models: int, threads: int) -> Iterator[Meet]:
    os.environ.pop("RAY_ADDRESS", None)  # the race is about this machine
    prepare_environment()
    import ray

    from deploy.launch import local_ray, reservation

    with local_ray(num_cpus=available_cpus()):
        actor = reservation(models, float(threads), None)
        options = {"num_cpus": actor.num_cpus, "num_gpus": actor.num_gpus, "max_concurrency": len(course.callers)}
        remote = ray.remote(RaceActor).options(**options)
        settings = ModelSettings(name="race", weights=str(course.weights))
        actors = [remote.remote(settings, actor) for _ in range(models)]
        ray.get([one.detect.remote(course.images[0], params) for one in actors for params in course.callers])

        def meet(index: int) -> Ask:
            mine, params = actors[index % models], course.callers[index]
            return lambda image: _answer_of(ray.get(mine.detect.remote(image, params)))

        yield meet


MODES: dict[Mode, Callable[[Course, int, int], AbstractContextManager[Meet]]] = {
    "a": _shared,
    "b": _handed,
    "c": _private,
    "d": _pool,
    "e": _fleet,
}


def _load(weights: Path) -> Any:
    import ultralytics
    from ultralytics.utils.events import events

    events.enabled = False
    ultralytics.utils.LOGGER.setLevel(logging.WARNING)
    return ultralytics.YOLO(str(weights))


def _warm(model: Any, params: PredictParams, image: bytes, threads: int) -> Ask:
    """Let ``model`` answer once on this thread, then give this thread its share of the cores."""
    import torch

    _predict(model, image, params)
    torch.set_num_threads(threads)  # after the first prediction, which sets it to what Ultralytics thinks best
    return partial(_predict, model, params=params)


def _predict(model: Any, image: bytes, params: PredictParams) -> Answer:
    (results,) = model.predict(
        decode_image(image, LIMITS),
        conf=params.conf,
        iou=params.iou,
        imgsz=params.imgsz,
        classes=None if params.classes is None else list(params.classes),
        max_det=params.max_det,
        agnostic_nms=params.agnostic_nms,
        verbose=False,
        save=False,
    )
    rows = (results.boxes if results.obb is None else results.obb).cpu()
    places = rows.xyxy if results.obb is None else rows.xyxyxyxy.transpose(1, 2).flatten(1)  # four x, then four y
    values = zip(rows.cls.tolist(), rows.conf.tolist(), places.tolist(), strict=True)
    return tuple((int(class_id), confidence, tuple(place)) for class_id, confidence, place in values)


def _answer_of(result: ImageResult) -> Answer:
    return tuple((one.class_id, one.confidence, _place(one)) for one in result.detections)


def _place(detection: Detection) -> tuple[float, ...]:
    return detection.box or ((*detection.corners.x, *detection.corners.y) if detection.corners else ())
