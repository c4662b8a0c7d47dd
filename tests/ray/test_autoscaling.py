"""Replicas that come with the load and go without it, over HTTP: down to zero, and back for the first who asks."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from actors.settings import ActorSettings
from deploy.settings import AppSettings, Replicas, ServedModel
from tests.conftest import picture, processes, served, until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.client, pytest.mark.usefixtures("local_ray")]

SMALL = ActorSettings(num_cpus=0.1)


def fake(name: str, low: int, high: int, options: str = "", idle_s: float = 1.0) -> ServedModel:
    replicas = Replicas(min=low, max=high, idle_s=idle_s)
    return ServedModel(name=name, weights=f"fake:?{options}", replicas=replicas, actor=SMALL, max_batch=1)


def wrong(client: httpx.Client, blue: int, timeout_ms: int = 60_000) -> str:
    """What is wrong with the answer; empty if nothing is."""
    headers = {"x-request-timeout-ms": str(timeout_ms)}
    response = client.post("/predict", files={"file": picture(blue=blue)}, headers=headers)
    if response.status_code == 200 and response.json()["images"][0]["results"][0]["class"] == blue % 4:
        return ""
    return f"{response.status_code} {response.text}"


def running(client: httpx.Client) -> int:
    """Replicas of the first model, as ``/models`` tells."""
    answer = client.get("/models")
    assert answer.status_code == 200, answer.text
    return int(answer.json()["models"][0]["load"]["replicas"])


def replicas() -> list[int]:
    return processes("ServeReplica:yolofleet:model-fake")


@pytest.mark.long
def test_an_ingress_that_holds_the_model_comes_with_the_load_and_goes_without_it() -> None:
    model = fake("fake", 1, 2, "slow_ms=50")
    with served(model, topology="direct") as address, httpx.Client(base_url=address, timeout=90) as client:
        scales(client, low=1, high=2)


@pytest.mark.long
def test_a_model_that_cannot_wake_is_not_ready_and_wakes_when_its_fault_is_mended(tmp_path: Path) -> None:
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.mkdir()
    with (
        served(fake("fake", 0, 1, f"log={there / 'log'}")) as address,  # without the folder its warm-up fails
        httpx.Client(base_url=address, timeout=90) as client,
    ):
        until(lambda: not replicas())
        there.rename(gone)
        in_vain = client.post("/predict", files={"file": picture()}, headers={"x-request-timeout-ms": "500"})
        assert (in_vain.status_code, in_vain.json()["error"]["code"]) == (504, "deadline_exceeded")

        def keeps_asking() -> bool:
            return bool(wrong(client, 1, timeout_ms=2000)) and client.get("/readyz").status_code == 503

        until(keeps_asking, 90)
        assert "cannot be started" in client.get("/readyz").json()["error"]["message"]
        gone.rename(there)
        until(lambda: not wrong(client, 1, timeout_ms=5000), 90)
        assert client.get("/readyz").status_code == 200


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists every batch waits, and so does a warm-up."""
    return tmp_path_factory.mktemp("sleeper") / "gate"


@pytest.fixture(scope="module")
def sleeper(gate: Path) -> Iterator[httpx.Client]:
    """A client of a model that sleeps when it is idle."""
    model = fake("fake", 0, 2, f"slow_ms=50&gate={gate}")
    with served(model) as address, httpx.Client(base_url=address, timeout=90) as client:
        yield client


def test_readiness_neither_keeps_awake_nor_wakes_and_the_first_who_asks_is_answered(sleeper: httpx.Client, gate: Path) -> None:
    def well() -> bool:
        return all(sleeper.get(path).status_code == 200 for path in ("/readyz", "/v2/health/ready", "/models"))

    assert not wrong(sleeper, 1)
    until(lambda: well() and not replicas())
    asleep = time.monotonic()
    while time.monotonic() - asleep < 4:  # longer than Serve's window: it would have seen a call
        assert well() and not replicas()
    (model,) = sleeper.get("/models").json()["models"]
    assert (model["engine"], model["load"]["replicas"], model["load"]["starting"]) == ("fake", 0, 0)

    gate.touch()
    with ThreadPoolExecutor(8) as callers:
        answers = [callers.submit(wrong, sleeper, blue) for blue in range(8)]
        until(lambda: sleeper.get("/models").json()["models"][0]["load"]["starting"] == 1)
        assert well()
        gate.unlink()
        assert [answer.result() for answer in answers] == [""] * 8


@pytest.mark.long
def test_replicas_come_with_the_load_and_go_without_it(sleeper: httpx.Client) -> None:
    scales(sleeper, low=0, high=2)


def scales(client: httpx.Client, low: int, high: int) -> None:
    until(lambda: running(client) == low)
    load, answers = True, list[str]()

    def call(blue: int) -> None:
        while load:
            answers.append(wrong(client, blue))

    with ThreadPoolExecutor(12) as callers:
        calls = [callers.submit(call, number % 4) for number in range(12)]
        try:
            until(lambda: running(client) == high)
        finally:
            load = False
        for each in calls:
            each.result()
    until(lambda: running(client) == low)
    assert not list(filter(None, answers))
    assert len(answers) > 12


def test_the_first_model_cannot_sleep_in_the_ingress_itself() -> None:
    with pytest.raises(ValidationError, match="cannot scale its first model to zero: give --topology routed"):
        AppSettings(models=(fake("fake", 0, 1),), topology="direct")
    assert not AppSettings(models=(fake("fake", 0, 1),)).direct
    assert AppSettings(models=(fake("fake", 1, 1),)).direct
