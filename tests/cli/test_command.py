"""The command as a user runs it: a process, its output, its exit status. Each starts a Ray of its own."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq
import pytest

from actors.writers import SCHEMA
from deploy.weights import EMBEDDED
from tests.conftest import picture, until
from tests.unit.test_tracing import collecting

pytestmark = pytest.mark.ray

COMMAND = (sys.executable, "-m", "deploy.cli")


def run(*arguments: str, cwd: Path | None = None, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd, env=environment
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


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_serve_answers_when_it_says_ready_and_drains_on_a_signal(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of five shapes, which share no batch: when the first is answered, the others are in flight.

    The spans of all five reach the collector that the environment names.
    """
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        answers_and_drains(number)
    spans = [span for _, sent in collector.received for each in sent.resource_spans[0].scope_spans for span in each.spans]
    assert sum(span.name == "POST /predict" for span in spans) == 5


def answers_and_drains(number: signal.Signals) -> None:
    with (
        serving("--model", "slow=fake:?slow_ms=500", "--replicas", "2", "--cpus-per-replica", "0.5") as (process, address),
        ThreadPoolExecutor(5) as callers,
    ):
        asked = [callers.submit(_ask, address, 64 + 16 * number) for number in range(5)]
        wait(asked, return_when=FIRST_COMPLETED)
        process.send_signal(number)
        assert [future.result().status_code for future in asked] == [200] * 5
        assert process.wait(timeout=90) == 0


@pytest.mark.long
def test_a_proxy_that_serve_ends_for_its_slowness_is_waited_for_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "0.5")  # three times: HAProxy takes longer
    with serving("--model", "fake=fake:", "--haproxy") as (process, address):
        assert httpx.post(f"{address}/predict", files={"file": picture()}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=90) == 0


def test_key_makes_a_line_with_which_serve_lets_its_key_in(tmp_path: Path) -> None:
    """On the other data plane, which ends with the command that has asked for it."""
    made = run("key", "alice")
    (key,) = re.findall(r"ul_[0-9a-f]{40}", made.stderr)
    assert made.stdout.startswith("alice ") and key not in made.stdout
    keys = tmp_path / "keys"
    keys.write_text(made.stdout)
    with serving("--model", "fake=fake:", "--api-keys", str(keys), "--haproxy") as (process, address):
        planes = [each for each in psutil.Process(process.pid).children(recursive=True) if each.name() == "haproxy"]
        assert planes
        assert httpx.get(f"{address}/readyz").status_code == 200
        refused = httpx.post(f"{address}/predict", files={"file": picture()})
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        for sent in ({"headers": {"authorization": f"Bearer {key}"}}, {"params": {"api_key": key}}):
            assert httpx.post(f"{address}/predict", files={"file": picture()}, **sent).status_code == 200
        keys.with_suffix(".new").write_text("# alice has left\n")
        keys.with_suffix(".new").rename(keys)
        until(lambda: httpx.get(f"{address}/models", headers={"x-api-key": key}).status_code == 401)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=90) == 0
        assert not [plane for plane in planes if plane.is_running()]


def test_serve_says_at_once_what_is_wrong_with_the_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice ul_0123")
    done = run("serve", "--api-keys", str(tmp_path / "keys"))
    assert done.returncode == 2 and "line 1" in done.stderr and "ul_0123" not in done.stderr


@pytest.mark.long
def test_deploy_changes_what_another_terminal_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, then forced; and the process that serves still drains and ends well."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    config, report = tmp_path / "config.yaml", tmp_path / "report.json"
    config.write_text("models: [{name: fake, weights: 'fake:?shift=1', actor: {num_cpus: 0.1}}]")
    with serving("--model", "fake=fake:", "--cpus-per-replica", "0.1") as (process, address):
        assert process.stdout is not None
        told = re.search(r"RAY_ADDRESS=(\S+)", process.stdout.readline())
        assert told
        monkeypatch.setenv("RAY_ADDRESS", told[1])
        assert _ask(address, 64).json()["images"][0]["results"][0]["class"] == 0
        refused = run("deploy", str(config), "--json", str(report))
        assert refused.returncode == 1, refused.stdout + refused.stderr
        assert "0.95 is asked for" in refused.stderr and "0.000" in refused.stdout
        assert json.loads(report.read_text())["comparisons"][0]["images"] == 1
        passed = run("deploy", str(config), "--force")
        assert (passed.returncode, "deployed, as forced" in passed.stdout) == (0, True), passed.stdout + passed.stderr
        assert _ask(address, 64).json()["images"][0]["results"][0]["class"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=90) == 0


def test_deploy_says_what_to_set_where_it_cannot_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("models: [{name: fake, weights: 'fake:'}]")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = run("deploy", str(config))
    assert (done.returncode, "set RAY_ADDRESS" in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


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
    assert table.column_names == SCHEMA.names
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
        pytest.param(
            ("predict", "picture.png", "--model", str(EMBEDDED.weights), "--out", "out", "--classes", "9"),
            "ids 0 to 3",
            marks=pytest.mark.long,
        ),
        (("predict", "picture.png", "--model", "fake:", "--out", "out", "--cpus-per-actor", "100"), "lower --actors"),
        (("serve", "--model", "a=fake:", "--model", "a=fake:"), "each needs a name of its own"),
        (("serve", "--model", "bad name=fake:", "--port", "0"), "No weights at bad name=fake:"),
        (("serve", "--replicas", "4:2", "--model", "fake:"), "the first number is the smaller"),
        (("serve", "--replicas", "many", "--model", "fake:"), "give N or MIN:MAX"),
        (("serve", "--model", "x=none.pt", "--port", "0"), "No weights at none.pt"),
        (("deploy", "none.yaml"), "none.yaml cannot be read"),
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
    for command in ("serve", "predict", "race", "doctor", "demo", "key"):
        assert command in run("--help").stdout
        assert run(command, "--help").returncode == 0


@pytest.mark.long
def test_bench_background_measures_an_endpoint_alone_and_beside_a_job(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(picture(blue=number))
    options = ("--model", "fake:?slow_ms=10", "--requests", "40", "--rounds", "1")
    done = run("bench", "background", str(tmp_path), *options, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    (alone,), (beside,) = report["alone"], report["beside"]
    assert alone["job_per_s"] is None and beside["job_per_s"] > 0
    assert report["p95_rise"] == pytest.approx(beside["p95"] / alone["p95"] - 1)
    assert not alone["errors"] and not beside["errors"]


@pytest.mark.slow
def test_demo_passes_its_own_checks() -> None:
    done = run("demo", "--exit", "--port", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  holds  ") == 4 and "FAILS" not in done.stdout
