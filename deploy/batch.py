"""A dataset job, from sources to a finished folder: what ``yolofleet predict`` runs, on a laptop or as a Ray job.

    sources ─ list ─→ URIs ─ minus the committed ─→ shards ─→ run_pool ─→ other formats, errors.jsonl, summary.json

The same job again goes on from what is committed. The driver holds URIs and counts, never images or results.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from actors.clips import parse_frame
from actors.dataset import into_shards, list_inputs
from actors.engines import digest_of_folder
from actors.errors import BadRequest, BadSource, TooManyErrors
from actors.evaluate import evaluate, labels_at
from actors.exports import EXPORTS, FORMATS, MOT, export
from actors.hardware import step_back
from actors.ledger import DETECTIONS, TRACKS, Ledger, Manifest, package_versions, totals
from actors.metrics import JobMetrics
from actors.pool import PoolSettings, run_pool
from actors.results import read_names, read_rows
from actors.schemas import JobCounts, ModelInfo, PredictParams, Task
from actors.settings import ActorSettings, ImageLimits, ModelSettings, Settings, TrackerSettings
from actors.storage import absolute, has_scheme
from actors.tracks import TrackSettings, track_clips
from actors.weights import hash_weights
from deploy.jobs import recorded
from deploy.launch import check_fits, local_ray
from deploy.settings import LogSettings

DATASET_LIMITS = ImageLimits(max_image_mb=512, max_megapixels=512, max_side_px=65_500)
ENOUGH_TO_JUDGE = 100


class ErrorBudget(Settings):
    """How many inputs may fail before a run is stopped: a number, or a share of those that it has done."""

    count: Annotated[int, Field(ge=0)] | None = None
    percent: Annotated[float, Field(ge=0, le=100)] | None = None

    @classmethod
    def from_flag(cls, flag: str) -> "ErrorBudget":
        """Read ``N`` or ``P%``.

        Raises:
            BadRequest: it is neither.
        """
        try:
            return cls(percent=float(flag[:-1])) if flag.endswith("%") else cls(count=int(flag))
        except ValueError as error:
            raise BadRequest(f"'{flag}' is no number of errors: give N or P%, such as 1000 or 5%") from error

    def check(self, done: int, failed: int) -> None:
        """Judge a run after each shard; a share is judged from the hundredth input on.

        Raises:
            TooManyErrors: more failed than may.
        """
        over = self.count is not None and failed > self.count
        if self.percent is not None and done >= ENOUGH_TO_JUDGE:
            over = over or 100 * failed > self.percent * done
        if over:
            raise TooManyErrors(
                f"Stopped: {failed} of {done} inputs failed, more than --max-errors allows. errors.jsonl in the output folder"
                " says why; the same command with a higher limit goes on from here"
            )


class JobSettings(Settings):
    """One dataset job.

    Attributes:
        sources: see ``dataset.list_inputs``, ``column`` as well.
        out: a folder, or the URI of a bucket's prefix.
        actors: how many actors this machine must have room for.
        max_actors: how many there may be where Ray has, or gets, more room.
        formats: any of ``exports.FORMATS``; Parquet there always is.
        annotate: whether to draw a picture of every result; of tracked videos, a video each.
        labels: a folder of YOLO labels or a COCO file to score the results against.
        price_per_hour: of all that the job runs on, in any currency.
        max_errors: beyond it the job stops.
        background: take only CPU time that nothing else wants.
        tracker: follow the objects of videos.
    """

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    model: ModelSettings
    out: Path | str
    column: str | None = None
    actors: Annotated[int, Field(ge=1)] = 1
    params: PredictParams = PredictParams()
    limits: ImageLimits = DATASET_LIMITS
    formats: tuple[str, ...] = ("parquet",)
    annotate: bool = False
    labels: Path | None = None
    price_per_hour: Annotated[float, Field(gt=0)] | None = None
    fresh: bool = False
    health_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    max_actors: Annotated[int, Field(ge=1)] = 1
    max_errors: ErrorBudget = ErrorBudget()
    background: bool = False
    tracker: TrackerSettings | None = None

    @property
    def most_actors(self) -> int:
        """The upper end of the range."""
        return max(self.actors, self.max_actors)

    def identity(self) -> dict[str, Any]:
        """What decides the results: two jobs with the same identity may share an output folder."""
        weights = self.model.weights
        return {
            "sources": [absolute(source) for source in self.sources],
            "column": self.column,
            "model": self.model.name,
            "weights_sha256": weights if weights.startswith("fake:") else hash_weights(Path(weights)),
            "params": self.params.as_dict(),
            "limits": self.limits.model_dump(),
            "annotate": self.annotate and self.tracker is None,  # pictures are drawn with the results, videos afterwards
        } | self._sometimes()

    def _sometimes(self) -> dict[str, Any]:
        """What decides the results of some jobs only. The engine does too: the ledger has it from the first actor."""
        tracker = {"tracker": self.tracker.model_dump()} if self.tracker else {}
        folder = self.model.calibrate
        decode = {} if self.model.decode == "exact" else {"decode": self.model.decode}
        return tracker | decode | ({"calibration": digest_of_folder(Path(folder))} if folder else {})

    def request(self) -> dict[str, Any]:
        """All of it as JSON values that mean the same from any working directory; for ``retried``."""
        weights = self.model.weights
        places = {"weights": weights if weights.startswith("fake:") else absolute(weights)}
        if self.model.calibrate:
            places["calibrate"] = absolute(self.model.calibrate)
        model = self.model.model_copy(update=places)
        sources = tuple(absolute(source) for source in self.sources)
        update = {"sources": sources, "model": model, "labels": self.labels and self.labels.absolute(), "fresh": False}
        return self.model_copy(update=update).model_dump(mode="json")

    @classmethod
    def retried(cls, out: str) -> "JobSettings":
        """The job whose results are at ``out``, to run again.

        Raises:
            BadSource: there are no results of a job.
        """
        return cls.model_validate(Ledger.requested(out) | {"out": out})

    @model_validator(mode="after")
    def _formats_exist(self) -> Self:
        if unknown := set(self.formats) - set(FORMATS):
            raise BadRequest(f"--format has no '{unknown.pop()}': give any of {', '.join(FORMATS)}")
        if MOT in self.formats and self.tracker is None:
            raise BadRequest(f"--format {MOT} holds tracks: use 'yolofleet track'")
        return self


class JobProgress(Settings):
    """How far a job is: inputs done by this run, by earlier runs, and in all."""

    total: int
    resumed: int
    done: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Job:
    """A job whose sources are listed and whose folder is claimed: ready to run, and nothing was started yet."""

    settings: JobSettings
    ledger: Ledger
    uris: list[str]
    remaining: list[str]
    versions: dict[str, str | None]

    @classmethod
    def open(cls, settings: JobSettings, *, retry_failed: bool = False) -> "Job":
        """List the sources and open the output folder; a job that was cut off goes on from what is committed.

        Inputs whose version changed since they were committed are computed again.

        Args:
            settings: what to do.
            retry_failed: compute the dead letters again as well.

        Raises:
            BadSource: a source does not exist, or holds no image.
            OutputMismatch: the folder holds the results of another job.
            ModelError: there are no such weights.
        """
        versions = list_inputs(settings.sources, settings.column)
        _leave_out(str(settings.out), versions)
        if settings.labels and not settings.labels.exists():
            raise BadSource(f"There are no labels at {settings.labels}: give a folder of YOLO labels or a COCO file")
        ledger = Ledger.open(settings.out, settings.identity(), fresh=settings.fresh, request=settings.request())
        if retry_failed:
            ledger.forget([letter.uri for manifest in ledger.manifests() for letter in manifest.dead_letters])
        committed = ledger.settle()
        changed = {uri for uri, now in versions.items() if now and (before := committed.get(uri)) and before != now}
        ledger.forget(changed)
        remaining = [uri for uri in versions if uri not in committed or uri in changed]
        return cls(settings, ledger, list(versions), remaining, versions)

    def run(self, actor: ActorSettings, report: Callable[[JobProgress], None]) -> float:
        """Process what remains on a pool of actors, with Ray running; returns the seconds until the first model was loaded.

        Args:
            actor: what each actor reserves.
            report: called at the start and whenever a shard is committed.

        Raises:
            ModelError: the model cannot be loaded.
        """
        progress = JobProgress(total=len(self.uris), resumed=len(self.uris) - len(self.remaining))
        report(progress)
        started, loading = time.perf_counter(), list[float]()

        metrics = JobMetrics(self.settings.model.name, self.ledger.job["weights_sha256"])

        def on_commit(manifest: Manifest) -> None:
            nonlocal progress
            metrics.committed(manifest.results, len(manifest.dead_letters))
            done, failed = progress.done + manifest.inputs, progress.failed + len(manifest.dead_letters)
            progress = progress.model_copy(update={"done": done, "failed": failed})
            report(progress)
            self.settings.max_errors.check(done, failed)

        def on_ready(info: ModelInfo) -> None:
            loading.append(time.perf_counter() - started)
            if self.settings.labels:
                _check_boxes(info.task)
            self.ledger.settle_engine(f"{info.engine} {info.precision}")

        settings, actors = self.settings, self.settings.most_actors
        pool = PoolSettings(
            settings.model,
            actor,
            settings.limits,
            settings.params,
            self.ledger,
            settings.health_timeout_s,
            annotate=settings.annotate and settings.tracker is None,
            tracker=settings.tracker,
            background=settings.background,
        )
        shards = into_shards(self.remaining, actors, versions=self.versions)
        run_pool(
            pool,
            shards,
            actors,
            on_commit,
            on_wait=lambda: report(progress),
            on_ready=on_ready,
        )
        if settings.tracker:
            self.ledger.settle()  # no frame may be associated twice
            clips = dict.fromkeys(found[0] for found in map(parse_frame, self.uris) if found)
            how = TrackSettings(self.ledger, settings.tracker, MOT in settings.formats, settings.annotate, settings.background)
            track_clips(how, clips, actors, actor.num_cpus)
        return loading[0] if loading else 0.0

    def finish(self, seconds: float, loading_s: float = 0.0, *, stopped: bool = False) -> dict[str, Any]:
        """Write the other formats, ``errors.jsonl`` and ``summary.json``, these two in any case; returns the summary.

        Args:
            seconds: what this run took.
            loading_s: how much of it went by before the first model was loaded.
            stopped: whether it ended before its time; then nothing is scored, and no other format is written.

        Raises:
            BadRequest: the model's results cannot be scored.
            BadSource: the labels are not these inputs'.
        """
        settings = self.settings
        committed = self.ledger.settle()
        total = totals(self.ledger.manifests())
        images = max(total.results, 1)
        processed = sum(uri in committed for uri in self.remaining)
        summary = {
            "inputs": len(committed.keys() | self.versions.keys()),
            "results": total.results,
            "dead_letters": len(total.dead_letters),
            "accounted_for": self.versions.keys() <= committed.keys(),
            "this_run": {
                "inputs": processed,
                "seconds": round(seconds, 3),
                "loading_seconds": round(loading_s, 3),
                "images_per_s": round(processed / seconds, 2) if processed else None,
                "images_per_s_loaded": round(processed / (seconds - loading_s), 2) if processed else None,
                "cost_per_million_images": self._cost_per_million(seconds, processed),
            },
            "detections": total.classes,
            "stage_ms_per_image": {stage: round(ms / images, 3) for stage, ms in total.stage_ms.items()},
            "job": self.ledger.job,
            "actors": settings.actors,
            "batch_size": settings.model.max_batch,
            "eval": None,
            "versions": package_versions(),
        }
        try:
            if not stopped:
                summary["eval"] = self._evaluation()
                for kind in filter(EXPORTS.__contains__, settings.formats):
                    export(kind, self.ledger, TRACKS if settings.tracker else DETECTIONS)
        finally:
            self.ledger.finish(summary)
        return summary

    def _cost_per_million(self, seconds: float, processed: int) -> float | None:
        """What a million images cost at this run's pace, in the currency of ``price_per_hour``."""
        price = self.settings.price_per_hour
        return None if price is None or not processed else round(price / 3600 * seconds / processed * 1e6, 2)

    def _evaluation(self) -> dict[str, Any] | None:
        if self.settings.labels is None:
            return None
        root = self.ledger.storage.root
        names = read_names(root)
        return asdict(evaluate(_with_boxes(read_rows(root)), labels_at(self.settings.labels, names), names))


def _leave_out(out: str, versions: dict[str, str | None]) -> None:
    """Drop what lies in the output folder: the pictures of an earlier run are no inputs.

    Raises:
        BadSource: all of them do.
    """
    folder = f"{_normal(absolute(out))}/"
    for uri in [uri for uri in versions if _normal(uri).startswith(folder)]:
        del versions[uri]
    if not versions:
        raise BadSource(f"Every input lies in the output folder: give another one than '{out}' as --out")


def _normal(uri: str) -> str:
    return uri.rstrip("/") if has_scheme(uri) else os.path.normpath(uri)


def _with_boxes(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        _check_boxes(row["task"])
        yield row


def _check_boxes(task: Task) -> None:
    if task in {"classify", "obb"}:
        raise BadRequest(f"--eval scores upright boxes, which a model for '{task}' does not give: leave --eval out")


def run_job(
    settings: JobSettings,
    reserve: Callable[[], ActorSettings],
    report: Callable[[JobProgress], None],
    log: LogSettings | None = None,
    *,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Run or resume a job to its end on a local Ray, which is started only if something remains to be done.

    Args:
        settings: what to do.
        reserve: what each actor takes; called when Ray runs.
        report: called whenever a shard is committed.
        log: how this process and the actors log; see ``local_ray``.
        retry_failed: compute the dead letters of earlier runs again.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        BadSource: within a Ray job, a folder that would be thrown away with the job's own.
        TooManyErrors: more inputs failed than may.
        FleetError: see ``Job``.
    """
    lasting = has_scheme(str(settings.out)) or Path(settings.out).is_absolute()
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not lasting:
        raise BadSource(
            f"--out '{settings.out}' would go with the job's working folder: give an absolute path that all nodes see"
        )
    job = Job.open(settings, retry_failed=retry_failed)
    started = time.perf_counter()
    if job.remaining or settings.tracker:
        with local_ray(log=log), recorded(job.ledger.storage.root) as tell:
            if settings.background:
                step_back()  # not before: a Ray that is started here must not
            started = time.perf_counter()

            def told(progress: JobProgress) -> None:
                report(progress)
                tell(JobCounts(**progress.model_dump()))

            actor = reserve()
            check_fits([(settings.actors, actor)], "--actors", "actor")
            try:
                loading_s = job.run(actor, told)
            except TooManyErrors:
                job.finish(time.perf_counter() - started, stopped=True)  # errors.jsonl says what they were
                raise
            return job.finish(time.perf_counter() - started, loading_s)
    return job.finish(time.perf_counter() - started)


if __name__ == "__main__":  # as a Ray job: python -m deploy.batch predict …
    from deploy.cli import main

    main()
