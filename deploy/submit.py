"""Jobs on a Ray cluster: submit one, show what it prints, and end as it ends.

    yolofleet submit … -- predict …  ─→ JobSubmissionClient ─→ python -m deploy.batch predict … on the cluster
               exit status, output   ←─ polled ──────────────┘

The log and the state are polled: Ray's own log stream ends with the connection, and says nothing about how the job ended. A
poll that fails is made again for a minute, as a head that is busy or restarted does not end the job.
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
AWAY_S = 60.0  # that the dashboard may not answer
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
        LaunchError: the cluster cannot be reached or refuses the job, the job did not come to run, or the cluster is gone.
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
    except (OSError, RuntimeError, ValueError) as error:  # OSError: ConnectionError, and requests' own
        raise LaunchError(
            f"No job on '{address}': {_reason(error)}. Give the address of the cluster's dashboard, and RAY_AUTH_TOKEN"
            " (with RAY_AUTH_MODE=token) if it asks for one"
        ) from error
    say(f"job {job}: 'ray job stop --address {address} {job}' stops it, submitting again resumes\n")
    return _wait(client, job, say)


def _wait(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> int:
    shown = 0
    answered = time.monotonic()
    while True:
        try:
            details: Any = client.get_job_info(job)
            log = client.get_job_logs(job)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered > AWAY_S:
                raise LaunchError(
                    f"The cluster no longer tells how the job {job} is doing: {_reason(error)}. It may go on, as"
                    f" 'ray job status {job}' says when the cluster is there again; submitting again resumes what is not done"
                ) from error
            time.sleep(POLL_S)
            continue
        answered = time.monotonic()
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


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
