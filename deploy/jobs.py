"""The dataset jobs of this cluster: what each tells of itself, and what Ray's job API knows of those submitted to it.

    yolofleet predict, track ─ recorded() ─→ Ray's key-value store ┐
    Ray's job API, where there is a dashboard ─────────────────────┴─→ list_jobs() ─→ JobReport, …
    a JobReport ─ its own output folder ─→ gallery() ─→ a few of its results

A job's record is kept as long as the head's store is. One that runs tells again every few seconds; a driver that was killed
does not, and its job is LOST.
"""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

from actors.errors import BadSource
from actors.gallery import sample
from actors.schemas import Gallery, JobCounts, JobReport
from actors.settings import ImageLimits

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

log = logging.getLogger(__name__)

NAMESPACE = "yolofleet-jobs"
TIMEOUT_S = 5.0
LOST_S = 60.0
SAMPLES = 12
RUNNING, STOPPED, SUCCEEDED, FAILED, LOST = "RUNNING", "STOPPED", "SUCCEEDED", "FAILED", "LOST"


@contextmanager
def recorded(out: str) -> Iterator[Callable[[JobCounts], None]]:
    """Let the cluster know of this process's job while the body runs, and of its end.

    Args:
        out: the absolute path or URI of its results.

    Returns:
        What is to be called with the counts as they grow.
    """
    told: dict[str, Any] = {"entrypoint": " ".join(sys.argv), "out": out, "started_at": time.time(), "counts": None}

    def put(status: str) -> None:
        now = {"seen_at": time.time(), "ended_at": None if status == RUNNING else time.time(), "status": status}
        internal_kv._internal_kv_put(_own_id(), json.dumps(told | now).encode(), namespace=NAMESPACE)

    def tell(counts: JobCounts) -> None:
        told["counts"] = [counts.total, counts.resumed, counts.done, counts.failed]
        put(RUNNING)

    put(RUNNING)
    try:
        yield tell
    except Exception:
        put(FAILED)
        raise
    except BaseException:
        put(STOPPED)
        raise
    put(SUCCEEDED)


async def list_jobs() -> list[JobReport] | None:
    """All jobs, the latest first; None where none has told and Ray's dashboard, which has the job API, cannot be reached."""
    told = await asyncio.to_thread(_recorded)
    submitted = await _submitted()
    if submitted is None and not told:
        return None
    jobs = told | {job.id: _merged(job, told.get(job.id)) for job in submitted or []}
    return sorted(jobs.values(), key=lambda job: job.started_at or 0.0, reverse=True)


async def gallery(job: JobReport, limits: ImageLimits) -> Gallery:
    """A few of a job's results, read in a process of their own: an image that breaks a decoder does not break this one.

    Raises:
        BadSource: they cannot be read.
    """
    if job.out is None:
        return Gallery((), ())
    try:
        sampled: Gallery = await ray.remote(sample).options(num_cpus=0, max_retries=0).remote(job.out, SAMPLES, limits)
    except RayError as error:
        log.warning("the results of %s cannot be shown", job.id, exc_info=error)
        raise BadSource(f"The results of '{job.id}' cannot be read: the log of this fleet says why") from None
    return sampled


def _own_id() -> str:
    """Ray's submission id of the job that this process is, or else of this driver."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return str(config.get("metadata", {}).get("job_submission_id") or ray.get_runtime_context().get_job_id())


def _recorded() -> dict[str, JobReport]:
    keys = internal_kv._internal_kv_list("", namespace=NAMESPACE)
    records = {key.decode(): internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys}
    return {name: _told(name, json.loads(record)) for name, record in records.items() if record}


def _told(name: str, record: dict[str, Any]) -> JobReport:
    lost = record["status"] == RUNNING and time.time() - record["seen_at"] > LOST_S
    return JobReport(
        id=name,
        status=LOST if lost else record["status"],
        entrypoint=record["entrypoint"],
        started_at=record["started_at"],
        ended_at=record["seen_at"] if lost else record["ended_at"],
        message="It does not tell any more: its driver was killed, or hangs" if lost else "",
        out=record["out"],
        counts=record["counts"] and JobCounts(*record["counts"]),
    )


async def _submitted() -> list[JobReport] | None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.to_thread(_ask_ray)
    except (TimeoutError, ConnectionError, RuntimeError, ValueError):  # Ray has one for each way in which it is not there
        return None


def _ask_ray() -> list[JobReport]:
    from ray.job_submission import JobSubmissionClient  # an eighth of an ingress's imports, for who looks at jobs only

    jobs = JobSubmissionClient(ray.get_runtime_context().gcs_address).list_jobs()
    return [_report(job) for job in jobs if job.submission_id is not None]  # others are drivers, such as the fleet's own


def _report(job: "JobDetails") -> JobReport:
    return JobReport(
        id=str(job.submission_id),
        status=str(job.status.value),
        entrypoint=job.entrypoint,
        started_at=_seconds(job.start_time),
        ended_at=_seconds(job.end_time),
        message=job.message or "",
    )


def _merged(submitted: JobReport, told: JobReport | None) -> JobReport:
    """Ray's word on how it is, the job's own on how far it has come."""
    return submitted if told is None else replace(submitted, out=told.out, counts=told.counts)


def _seconds(milliseconds: int | None) -> float | None:
    return None if not milliseconds else milliseconds / 1e3
