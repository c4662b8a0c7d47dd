"""Waiting for a job of a cluster that does not always answer; jobs on a real one are in tests/cluster/test_jobs.py."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import requests
from ray.job_submission import JobStatus

from deploy import submit
from deploy.launch import LaunchError

LOG = "loading\n1/2 images\n2/2 images\n"


class FakeClient:
    """A dashboard with one job, whose polls end as ``polls`` says: a state, or what is raised."""

    polls: ClassVar[list[Any]] = []

    def __init__(self, address: str) -> None:
        self.left = iter(self.polls)
        self.logged = 0

    def submit_job(self, **job: Any) -> str:
        if not self.polls:
            raise requests.ConnectionError("reset.")
        return "j"

    def get_job_info(self, job: str) -> Any:
        state = next(self.left)
        if isinstance(state, Exception):
            raise state
        self.logged += 1
        return SimpleNamespace(status=state, driver_exit_code=3 if state.is_terminal() else None, message="")

    def get_job_logs(self, job: str) -> str:
        return "".join(LOG.splitlines(keepends=True)[: self.logged])


@pytest.fixture(autouse=True)
def dashboard(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(submit, "JobSubmissionClient", FakeClient)
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    return FakeClient


def test_polls_that_fail_do_not_end_the_waiting_and_lose_no_line(dashboard: type[FakeClient]) -> None:
    restarting = [requests.ConnectionError("refused"), RuntimeError("Request failed with status code 500"), TimeoutError()]
    dashboard.polls = [JobStatus.PENDING, *restarting, JobStatus.RUNNING, *restarting, JobStatus.FAILED]
    said: list[str] = []
    assert submit.submit_job("http://head:8265", ["predict"], None, None, said.append) == 3
    assert "".join(said[1:]) == LOG


def test_a_cluster_that_goes_away_before_it_has_taken_the_job_is_one_sentence(dashboard: type[FakeClient]) -> None:
    dashboard.polls = []
    with pytest.raises(LaunchError, match=r"No job on 'http://head:8265': reset\. Give"):
        submit.submit_job("http://head:8265", ["predict"], None, None, lambda text: None)


def test_a_cluster_that_stays_away_ends_it_with_what_to_do(
    dashboard: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "AWAY_S", -1.0)
    dashboard.polls = [JobStatus.RUNNING, requests.ConnectionError()]
    with pytest.raises(LaunchError, match=r"ConnectionError.*'ray job status j'.*resumes"):
        submit.submit_job("http://head:8265", ["predict"], None, None, lambda text: None)
