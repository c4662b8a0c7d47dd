"""Dataset jobs on a real Ray head with its dashboard: submitted both ways, stopped, resumed; exit status and progress."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from deploy.environment import free_port
from deploy.submit import STOPPED_STATUS
from tests.conftest import REPOSITORY, picture, until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

INPUTS = 120
BIN = Path(sys.executable).parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(REPOSITORY),
}


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """A Ray head with a dashboard, as a cluster's head node runs it; its address."""
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # short: a socket's path has 107 characters
        yield from _head(Path(folder))


def _head(folder: Path) -> Iterator[str]:
    port = free_port()
    ports = (
        "--port=0",
        f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={free_port()}",
        "--include-dashboard=true",
    )
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}", *ports]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=ENVIRONMENT | {"PYTHONPATH": ""}, stdout=log, stderr=log, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: head.poll() is not None or _answers(address), 90)
        assert head.poll() is None, (folder / "head.log").read_text()
        yield address
    finally:
        head.terminate()
        head.wait(60)


def _answers(address: str) -> bool:
    try:
        JobSubmissionClient(address).list_jobs()
    except (ConnectionError, RuntimeError):
        return False
    return True


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(INPUTS):
        (folder / f"{number:03d}.png").write_bytes(picture(blue=number % 200))
    return folder


def predict(inputs: Path, options: str = "") -> list[str]:
    out = inputs.parent / "out"
    return ["predict", str(inputs), "--model", f"fake:?{options}", "--out", str(out), "--cpus-per-actor", "0.5"]


def submit(dashboard: str, *command: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "deploy.cli", "submit", "--address", dashboard, "--working-dir", str(REPOSITORY)]
    return subprocess.Popen(
        [*line, "--", *command], env=ENVIRONMENT, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_stopped_job_ends_cleanly_and_goes_on_when_submitted_again_either_way(dashboard: str, inputs: Path) -> None:
    gate, out = inputs.parent / "gate", inputs.parent / "out"
    job = predict(inputs, f"slow_ms=150&gate={gate}")
    client = JobSubmissionClient(dashboard)
    first = submit(dashboard, *job)
    until(lambda: first.poll() is not None or list((out / "detections").glob("*.parquet")), 120)
    gate.touch()  # the rest waits
    (running,) = [each for each in client.list_jobs() if each.status == JobStatus.RUNNING and each.submission_id]
    client.stop_job(running.submission_id)
    said, complained = first.communicate(timeout=60)
    assert (first.returncode, "Traceback" in said) == (STOPPED_STATUS, False), said + complained
    assert client.get_job_status(running.submission_id) == JobStatus.STOPPED
    assert not (out / "summary.json").exists()

    gate.unlink()
    entry = ["--working-dir", str(REPOSITORY), "--", "python", "-m", "deploy.batch", *job]
    plain = [str(BIN / "ray"), "job", "submit", "--address", dashboard, *entry]
    done = subprocess.run(plain, env=ENVIRONMENT, cwd=out, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{INPUTS}/{INPUTS} images, 0 failed" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accounted_for"] and summary["results"] == INPUTS
    assert 0 < summary["this_run"]["inputs"] < INPUTS


def test_a_job_ends_with_its_own_status(dashboard: str, inputs: Path) -> None:
    """Two at once: one that succeeds, and one that is refused."""
    relative = predict(inputs)
    relative[relative.index("--out") + 1] = "results"
    expected = {
        submit(dashboard, *predict(inputs)): (0, f"{INPUTS} inputs: {INPUTS} results, 0 dead letters"),
        submit(dashboard, *relative): (2, "give an absolute path"),
    }
    for process, (status, sentence) in expected.items():
        said, complained = process.communicate(timeout=150)
        assert (process.returncode, sentence in said) == (status, True), said + complained


def test_what_cannot_be_a_job_or_reach_a_cluster_is_one_sentence(dashboard: str, inputs: Path) -> None:
    expected = {
        submit(dashboard, "serve"): "submit predict or track",
        submit("http://127.0.0.1:9", *predict(inputs)): "No job on 'http://127.0.0.1:9'",
    }
    for process, sentence in expected.items():
        _, complained = process.communicate(timeout=60)
        assert process.returncode == 2
        assert sentence in complained and "Traceback" not in complained
