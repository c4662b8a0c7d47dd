"""The Serve application on FakeModel: replicas share the load, a dead one is retried elsewhere, faults stay private."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from actors.settings import ActorSettings
from deploy.settings import Replicas, ServedModel
from tests.conftest import picture, processes, served

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

SMALL = ActorSettings(num_cpus=0.1)


def fake(name: str, options: str = "", replicas: int = 1) -> ServedModel:
    count = Replicas(min=replicas, max=replicas)
    return ServedModel(name=name, weights=f"fake:?{options}", replicas=count, actor=SMALL)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(fake("two", "slow_ms=5", replicas=2), fake("other")) as made:
        yield made


def ask(address: str, blue: int = 0, **fields: str) -> httpx.Response:
    return httpx.post(f"{address}/predict", files={"file": picture(blue=blue)}, data=fields, timeout=60)


def test_both_replicas_answer_and_every_answer_is_its_callers_own(address: str) -> None:
    with ThreadPoolExecutor(16) as callers:
        responses = list(callers.map(lambda n: ask(address, blue=n % 4, conf=str((n % 9) / 10)), range(200)))
    found = [response.json()["images"][0]["results"] for response in responses]
    assert [bool(results) for results in found] == [(n % 9) / 10 < 200 / 255 for n in range(200)]
    assert all(results[0]["class"] == n % 4 for n, results in enumerate(found) if results)
    assert len({response.headers["x-replica"] for response in responses}) == 2


def test_models_are_named_and_the_first_is_the_primary_one(address: str) -> None:
    assert [model["name"] for model in httpx.get(f"{address}/models").json()["models"]] == ["two", "other"]
    assert ask(address).json()["metadata"]["model"] == "two"
    assert ask(address, model="other").json()["metadata"]["model"] == "other"
    assert ask(address, model="none").status_code == 404


def test_an_expected_error_crosses_ray_without_its_traceback(address: str) -> None:
    response = httpx.post(f"{address}/predict", files={"file": b"hello"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_image")
    assert "Traceback" not in response.text and "ray" not in response.text


def test_a_killed_replica_costs_no_answer(address: str) -> None:
    victim = processes("ServeReplica:yolofleet:model-two")[0]
    with ThreadPoolExecutor(8) as callers:
        waiting = [callers.submit(ask, address, blue=n % 4) for n in range(100)]
        os.kill(victim, signal.SIGKILL)
        responses = [future.result() for future in waiting]
    assert [response.status_code for response in responses] == [200] * 100
    assert [response.json()["images"][0]["results"][0]["class"] for response in responses] == [n % 4 for n in range(100)]
