"""Jobs on a Ray cluster: submit one, show what it prints, and end as it ends.

    yolofleet submit … -- predict …  ─→ JobSubmissionClient ─→ python -m deploy.batch predict … on the cluster
               exit status, output   ←─ polled ──────────────┘

The log and the state are polled: Ray's own log stream ends with the connection, and says nothing about how the job ended.
"""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from actors.errors import BadRequest
from deploy.launch import LaunchError

COMMANDS = ("predict", "track")
POLL_S = 1.0
STOPPED_STATUS = 130  # as of a process that was interrupted


def submit_job(
    address: str, command: Sequence[str], working_dir: Path | None, job_id: str | None, say: Callable[[str], None]
) -> int:
    """Run a command of ``yolofleet`` as a Ray job and wait for its end. Who stops waiting does not stop the job.

    Args:
        address: the dashboard, ``http://HEAD:8265``; ``RAY_AUTH_TOKEN`` (with ``RAY_AUTH_MODE=token``) lets us in.
        command: ``predict`` or ``track`` with its arguments; paths are the cluster's.
        working_dir: sent along and current there; without it yolofleet has to be installed on the cluster.
        job_id: the submission id; Ray makes one if None.
        say: takes what the job prints, as it comes.

    Returns:
        The exit status of the job's own process, 130 if it was stopped.

    Raises:
        BadRequest: ``command`` is another one.
        LaunchError: the cluster cannot be reached or refuses the job, or the job did not come to run.
    """
    if command[0] not in COMMANDS:
        raise BadRequest(f"'{command[0]}' cannot be a job: submit {' or '.join(COMMANDS)}")
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "deploy.batch", *command]),
            submission_id=job_id,
            runtime_env={"working_dir": str(working_dir)} if working_dir else {},
        )
        say(f"job {job}: 'ray job stop --address {address} {job}' stops it, submitting again resumes\n")
        return _wait(client, job, say)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise LaunchError(
            f"No job on '{address}': {reason}. Give the address of the cluster's dashboard, and RAY_AUTH_TOKEN"
            " (with RAY_AUTH_MODE=token) if it asks for one"
        ) from error


def _wait(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> int:
    shown = 0
    while True:
        details: Any = client.get_job_info(job)
        log = client.get_job_logs(job)
        say(log[shown:])
        shown = len(log)
        if details.status.is_terminal():
            break
        time.sleep(POLL_S)
    if details.status is JobStatus.STOPPED:
        return STOPPED_STATUS
    if details.driver_exit_code is None:
        raise LaunchError(f"The job did not come to run: {details.message}")
    return int(details.driver_exit_code)
