"""The topology ``direct``: the model lives in the process that holds the connection, so that its death can be seen."""

import os
import signal

import httpx
import pytest

from actors.settings import ActorSettings
from deploy.settings import Replicas, ServedModel
from tests.conftest import picture, processes, served, until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.client, pytest.mark.usefixtures("local_ray")]

POISON = 250
DIED = {503, 0} if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else {503}  # see deploy/haproxy.py
MODEL = ServedModel(
    name="fake", weights=f"fake:?crash={POISON}", replicas=Replicas(min=2, max=2), actor=ActorSettings(num_cpus=0.1)
)


def test_a_poisoned_image_is_remembered_by_those_who_come_after_and_a_death_is_healed() -> None:
    with served(MODEL, topology="direct") as address, httpx.Client(base_url=address, timeout=60) as client:

        def status(blue: int) -> int:
            try:
                response = client.post("/predict", files={"file": picture(blue=blue)})
            except httpx.HTTPError:
                return 0
            if response.status_code == 503:
                assert int(response.headers["retry-after"]) >= 1 and response.json()["error"]["code"] == "replica_unavailable"
            return response.status_code

        assert [status(blue) for blue in range(8)] == [200] * 8
        until(lambda: memories(client) == 2)  # each ingress knows of the other's model, too
        seen = list[int]()
        until(lambda: seen.append(status(POISON)) or seen[-1] == 422)  # type: ignore[func-returns-value]
        assert set(seen[:-1]) <= DIED
        until(lambda: [status(blue) for blue in range(8)] == [200] * 8)
        survivors = ingresses()
        assert [status(POISON) for _ in range(6)] == [422] * 6
        assert survivors <= ingresses()

        os.kill(min(ingresses()), signal.SIGKILL)
        until(lambda: len(ingresses() - survivors) == 1)
        until(lambda: [status(blue) for blue in range(8)] == [200] * 8)
        assert status(POISON) == 422


def ingresses() -> set[int]:
    return set(processes("ServeReplica:yolofleet:ingress"))


def memories(client: httpx.Client) -> int:
    """How many replicas have told what memory they take."""
    (model,) = client.get("/fleet").json()["models"]
    return sum(replica["vitals"] is not None for replica in model["replicas"])
