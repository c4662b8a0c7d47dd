"""The command as a user runs it: a process, its output, its exit status. Each starts a Ray of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from deploy.weights import EMBEDDED
from tests.conftest import picture

pytestmark = pytest.mark.ray

COMMAND = (sys.executable, "-m", "deploy.cli")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=150, check=False, cwd=cwd, env=environment
    )


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``yolofleet serve`` once it says ready, and its address; killed on leaving if it still runs."""
    process = subprocess.Popen([*COMMAND, "serve", "--port", "0", *arguments], stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(150, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if ready := re.search(r"ready: (http://\S+)", line):
                yield process, ready[1]
                return
        pytest.fail("yolofleet serve ended before it was ready")
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serve_answers_when_it_says_ready_and_drains_on_a_signal(number: signal.Signals) -> None:
    """Requests of five shapes, which share no batch: when the first is answered, the others are in flight."""
    with (
        serving("--model", "slow=fake:?slow_ms=500", "--replicas", "2", "--cpus-per-replica", "0.5") as (process, address),
        ThreadPoolExecutor(5) as callers,
    ):
        asked = [callers.submit(_ask, address, 64 + 16 * number) for number in range(5)]
        wait(asked, return_when=FIRST_COMPLETED)
        process.send_signal(number)
        assert [future.result().status_code for future in asked] == [200] * 5
        assert process.wait(timeout=90) == 0


def _ask(address: str, width: int) -> httpx.Response:
    return httpx.post(f"{address}/predict", files={"file": picture(width)}, timeout=60)


def test_predict_writes_what_the_readme_says_and_resumes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        (images / f"{number}.png").write_bytes(picture(blue=number))
    (images / "bad.jpg").write_bytes(b"hello")
    arguments = ("predict", str(images), "--model", "fake:", "--out", str(tmp_path / "out"), "--actors", "2")
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert "6 inputs: 5 results, 1 dead letters" in first.stdout
    table = pq.read_table(tmp_path / "out" / "detections")
    assert table.column_names == ["uri", "sha256", "width", "height", "model", "task", "detections"]
    assert table.num_rows == 5
    (letter,) = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert "not an image" in json.loads(letter)["reason"]
    again = run(*arguments)
    assert again.returncode == 0 and "nothing was left to do" in again.stdout
    other = run(*arguments, "--conf", "0.5")
    assert other.returncode == 2 and "conf was 0.25, is 0.5" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("predict", "nowhere", "--model", "fake:", "--out", "out"), "There is nothing at 'nowhere'"),
        (("predict", "picture.png", "--model", "none.pt", "--out", "out"), "No weights at none.pt"),
        (("predict", "picture.png", "--model", "fake:", "--out", "out", "--conf", "2"), "'conf' is 2.0"),
        (("predict", "picture.png", "--model", "fake:", "--out", "out", "--imgsz", "big"), "--imgsz is 'big'"),
        (("predict", "picture.png", "--model", str(EMBEDDED.weights), "--out", "out", "--classes", "9"), "ids 0 to 3"),
        (("predict", "picture.png", "--model", "fake:", "--out", "out", "--cpus-per-actor", "100"), "lower --actors"),
        (("serve", "--model", "a=fake:", "--model", "a=fake:"), "each needs a name of its own"),
        (("serve", "--model", "bad name=fake:", "--port", "0"), "No weights at bad name=fake:"),
        (("serve", "--replicas", "4:2", "--model", "fake:"), "the first number is the smaller"),
        (("serve", "--replicas", "many", "--model", "fake:"), "give N or MIN:MAX"),
        (("serve", "--model", "x=none.pt", "--port", "0"), "No weights at none.pt"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(arguments: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture())
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_there_without_loading_torch() -> None:
    loaded = "import sys, deploy.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0
    for command in ("serve", "predict", "race", "doctor", "demo"):
        assert command in run("--help").stdout
        assert run(command, "--help").returncode == 0


def test_demo_passes_its_own_checks() -> None:
    done = run("demo", "--exit", "--port", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  holds  ") == 4 and "FAILS" not in done.stdout
