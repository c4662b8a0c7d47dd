"""A dataset job, from sources to a finished folder: what ``yolofleet predict`` runs, on a laptop or as a Ray job.

    sources ─ list ─→ URIs ─ minus the committed ─→ shards ─→ run_pool ─→ errors.jsonl, summary.json

The same job again goes on from what is committed. The driver holds URIs and counts, never images or results.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from actors.dataset import into_shards, list_inputs
from actors.ledger import Ledger, Manifest, totals
from actors.model import hash_weights
from actors.pool import PoolSettings, run_pool
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings, Settings
from deploy.launch import check_fits, local_ray

PACKAGES = ("yolofleet", "ray", "torch", "ultralytics-opencv-headless")
DATASET_LIMITS = ImageLimits(max_image_mb=512, max_megapixels=512, max_side_px=65_500)


class JobSettings(Settings):
    """One dataset job."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    model: ModelSettings
    out: Path
    actors: Annotated[int, Field(ge=1)] = 1
    params: PredictParams = PredictParams()
    limits: ImageLimits = DATASET_LIMITS
    fresh: bool = False
    health_timeout_s: Annotated[float, Field(gt=0)] = 120.0

    def identity(self) -> dict[str, Any]:
        """What decides the results: two jobs with the same identity may share an output folder."""
        weights = self.model.weights
        return {
            "sources": list(self.sources),
            "model": self.model.name,
            "weights_sha256": weights if weights.startswith("fake:") else hash_weights(Path(weights)),
            "params": self.params.as_dict(),
            "limits": self.limits.model_dump(),
        }


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

    @classmethod
    def open(cls, settings: JobSettings) -> "Job":
        """List the sources and open the output folder; a job that was cut off goes on from what is committed.

        Raises:
            BadSource: a source does not exist, or holds no image.
            OutputMismatch: the folder holds the results of another job.
            ModelError: there are no such weights.
        """
        uris = list_inputs(settings.sources)
        ledger = Ledger.open(settings.out.absolute(), settings.identity(), fresh=settings.fresh)
        committed = ledger.committed()
        return cls(settings, ledger, uris, [uri for uri in uris if uri not in committed])

    def run(self, actor: ActorSettings, report: Callable[[JobProgress], None]) -> None:
        """Process what remains on a pool of actors, with Ray running.

        Args:
            actor: what each actor reserves.
            report: called at the start and whenever a shard is committed.

        Raises:
            ModelError: the model cannot be loaded.
        """
        progress = JobProgress(total=len(self.uris), resumed=len(self.uris) - len(self.remaining))
        report(progress)

        def on_commit(manifest: Manifest) -> None:
            nonlocal progress
            done, failed = progress.done + manifest.inputs, progress.failed + len(manifest.dead_letters)
            progress = progress.model_copy(update={"done": done, "failed": failed})
            report(progress)

        settings = self.settings
        pool = PoolSettings(settings.model, actor, settings.limits, settings.params, self.ledger, settings.health_timeout_s)
        run_pool(pool, into_shards(self.remaining, settings.actors), settings.actors, on_commit, lambda: report(progress))

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write ``errors.jsonl`` and ``summary.json``; returns the summary.

        Args:
            seconds: what this run took.
        """
        total = totals(self.ledger.manifests())
        images = max(total.results, 1)
        processed = len(self.remaining)
        summary = {
            "inputs": len(self.uris),
            "results": total.results,
            "dead_letters": len(total.dead_letters),
            "accounted_for": set(self.uris) <= self.ledger.committed(),
            "this_run": {
                "inputs": processed,
                "seconds": round(seconds, 3),
                "images_per_s": round(processed / seconds, 2) if processed else None,
            },
            "detections": total.classes,
            "stage_ms_per_image": {stage: round(ms / images, 3) for stage, ms in total.stage_ms.items()},
            "job": self.ledger.job,
            "actors": self.settings.actors,
            "batch_size": self.settings.model.max_batch,
            "versions": {name: version(name) for name in PACKAGES},
        }
        self.ledger.finish(summary)
        return summary


def run_job(
    settings: JobSettings, reserve: Callable[[], ActorSettings], report: Callable[[JobProgress], None]
) -> dict[str, Any]:
    """Run or resume a job to its end on a local Ray, which is started only if something remains to be done.

    Args:
        settings: what to do.
        reserve: what each actor takes; called when Ray runs.
        report: called whenever a shard is committed.

    Returns:
        The summary, as written to ``summary.json``.
    """
    job = Job.open(settings)
    started = time.perf_counter()
    if job.remaining:
        with local_ray():
            started = time.perf_counter()
            actor = reserve()
            check_fits([(settings.actors, actor)], "--actors", "actor")
            job.run(actor, report)
            return job.finish(time.perf_counter() - started)
    return job.finish(time.perf_counter() - started)
