"""The dataset jobs beside this fleet: ``/jobs``, and what one has found so far: ``/jobs/{job}/gallery``.

A request names a job that the cluster knows, and never a path: where its results are, the job itself has told.
"""

import base64
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from actors.errors import BadSource, UnknownJob
from actors.schemas import Sampled
from deploy.api.fleet import TheFleet
from deploy.api.ultralytics import image_answer

router = APIRouter(tags=["jobs"])
ERRORS = (UnknownJob, BadSource)


@router.get("/jobs")
async def jobs(fleet: TheFleet) -> dict[str, Any]:
    """The dataset jobs of this cluster, the latest first; null where none has told and Ray's job API cannot be reached."""
    found = await fleet.jobs()
    return {"jobs": None if found is None else [asdict(job) for job in found]}


@router.get("/jobs/{job}/gallery")
async def gallery(fleet: TheFleet, job: str) -> dict[str, Any]:
    """A few of a job's results, spread over what it has committed so far, with small pictures in base64; dead letters too."""
    found = await fleet.gallery(job)
    letters = [{name: letter[name] for name in ("uri", "stage", "reason")} for letter in found.dead_letters]
    return {"samples": [_sample(sampled) for sampled in found.samples], "dead_letters": letters}


def _sample(sampled: Sampled) -> dict[str, Any]:
    picture = None if sampled.picture is None else base64.b64encode(sampled.picture).decode()
    return {"name": sampled.name, "picture": picture, "image": image_answer(sampled.result)}
