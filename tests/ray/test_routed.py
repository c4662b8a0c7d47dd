"""The topology ``routed`` on FakeModel, over HTTP: replicas share the load, errors stay private, deaths are survived.

One application for all: the tests that kill come last, and leave it as they found it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from actors.settings import ActorSettings
from deploy.settings import Replicas, ServedModel
from tests.conftest import picture, processes, served, until

pytestmark = [pytest.mark.ray, pytest.mark.client, pytest.mark.usefixtures("local_ray")]

SMALL = ActorSettings(num_cpus=0.1)
POISON = 250
CLIENT = httpx.Client(timeout=90)


def ask(address: str, blue: int = 0, **fields: str) -> httpx.Response:
    return CLIENT.post(f"{address}/predict", files={"file": picture(blue=blue)}, data=fields)


def wrong(response: httpx.Response, blue: int) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if response.status_code == 200 and response.json()["images"][0]["results"][0]["class"] == blue % 4:
        return ""
    return f"{response.status_code} {response.text}"


@contextmanager
def load(address: str, callers: int) -> Iterator[list[str]]:
    """``callers`` ask without a pause while the body runs; what was wrong with each answer is in the list afterwards."""
    stop, answers = threading.Event(), list[str]()

    def call(blue: int) -> None:
        while not stop.is_set():
            answers.append(wrong(ask(address, blue), blue))

    with ThreadPoolExecutor(callers) as pool:
        calls = [pool.submit(call, number % 4) for number in range(callers)]
        try:
            yield answers
        finally:
            stop.set()
        for each in calls:
            each.result()


@pytest.fixture(scope="module")
def routed() -> Iterator[str]:
    weights = f"fake:?slow_ms=5&crash={POISON}"
    three = ServedModel(name="fake", weights=weights, replicas=Replicas(min=3, max=3), actor=SMALL)
    with served(three, ServedModel(name="other", weights="fake:", actor=SMALL), topology="routed") as address:
        yield address


def replicas() -> set[int]:
    return set(processes("ServeReplica:yolofleet:model-fake"))


def test_all_replicas_answer_and_every_answer_is_its_callers_own(routed: str) -> None:
    with ThreadPoolExecutor(16) as callers:
        responses = list(callers.map(lambda n: ask(routed, n % 4, conf=str((n % 9) / 10)), range(200)))
    found = [response.json()["images"][0]["results"] for response in responses]
    assert [bool(results) for results in found] == [(n % 9) / 10 < 200 / 255 for n in range(200)]
    assert all(results[0]["class"] == n % 4 for n, results in enumerate(found) if results)
    assert len({response.headers["x-replica"] for response in responses}) == 3


def test_models_are_named_and_the_first_is_the_primary_one(routed: str) -> None:
    assert [model["name"] for model in CLIENT.get(f"{routed}/models").json()["models"]] == ["fake", "other"]
    assert ask(routed).json()["metadata"]["model"] == "fake"
    assert ask(routed, model="other").json()["metadata"]["model"] == "other"
    assert ask(routed, model="none").status_code == 404


def test_an_expected_error_crosses_ray_without_its_traceback(routed: str) -> None:
    response = CLIENT.post(f"{routed}/predict", files={"file": b"hello"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_image")
    assert "Traceback" not in response.text and "ray" not in response.text
    assert response.headers.get_list("x-request-id") == [response.json()["error"]["request_id"]]


def test_replicas_killed_again_and_again_cost_no_answer(routed: str) -> None:
    with load(routed, callers=16) as answers:
        for _ in range(3):
            until(lambda: len(replicas()) == 3)
            os.kill(min(replicas()), signal.SIGKILL)
            until(lambda: len(replicas()) < 3)
        until(lambda: len(replicas()) == 3)
    assert len(answers) > 100
    assert not list(filter(None, answers))


def test_a_poisoned_image_is_found_and_never_takes_a_replica_again(routed: str) -> None:
    until(lambda: len(replicas()) == 3)
    before = replicas()
    with load(routed, callers=8) as answers:
        poisoned = ask(routed, POISON)
    assert (poisoned.status_code, poisoned.json()["error"]["code"]) == (422, "poisoned_image")
    assert not list(filter(None, answers))
    until(lambda: len(replicas()) == 3)
    died = before - replicas()
    assert 1 <= len(died) <= 2
    now = replicas()
    assert [ask(routed, POISON).status_code for _ in range(5)] == [422] * 5
    assert replicas() == now


def test_a_death_that_no_request_met_is_counted_all_the_same(routed: str) -> None:
    def deaths() -> int:
        other = CLIENT.get(f"{routed}/fleet").json()["models"][1]
        return int(other["deaths"]["count"])

    assert deaths() == 0
    (victim,) = processes("ServeReplica:yolofleet:model-other")
    os.kill(victim, signal.SIGKILL)
    until(lambda: victim not in processes("ServeReplica:yolofleet:model-other") != [])  # Serve has noticed it before we look
    assert deaths() == 1


def test_an_ingress_that_dies_comes_back_and_costs_no_model(routed: str) -> None:
    until(lambda: len(replicas()) == 3)
    models, ingress = replicas(), processes("ServeReplica:yolofleet:ingress")
    os.kill(ingress[0], signal.SIGKILL)
    until(lambda: _answers(routed))
    assert processes("ServeReplica:yolofleet:ingress") != ingress
    assert replicas() == models


def _answers(address: str) -> bool:
    try:
        return ask(address).status_code == 200
    except httpx.HTTPError:
        return False
