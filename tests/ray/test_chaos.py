"""A minute of everything at once: killed replicas, clients that leave, garbage, slow bodies. Then all must be well.

On HAProxy it is a third of a minute, which is enough to see how that takes it.
"""

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from actors.settings import ActorSettings
from deploy.settings import HttpLimits, Replicas, ServedModel
from tests.conftest import picture, processes, served, until
from tests.ray.test_routed import wrong

pytestmark = [
    pytest.mark.ray,
    pytest.mark.client,
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(300),
]

SECONDS = 20 if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else 45
POISON = 250
MODEL = ServedModel(
    name="chaos",  # what other tests' replicas have died of is remembered by model
    weights=f"fake:?slow_ms=5&crash={POISON}",
    replicas=Replicas(min=3, max=3),
    actor=ActorSettings(num_cpus=0.1),
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(MODEL, topology="routed", http=HttpLimits(max_waiting_requests=32)) as made:
        yield made


def replicas() -> set[int]:
    return set(processes("ServeReplica:yolofleet:model-chaos"))


class Chaos:
    """What the tormentors do, each in a thread of its own until ``stop`` is set."""

    def __init__(self, address: str) -> None:
        self.address, self.stop = address, threading.Event()
        self.outcomes: Counter[str] = Counter()

    def honest(self, random_: random.Random, client: httpx.Client) -> None:
        blue = random_.randrange(4)
        width = random_.choice([32, 64, 80])
        response = client.post("/predict", files={"file": picture(width, blue=blue)})
        if response.status_code == 429:
            self.outcomes["refused"] += 1
        elif sentence := wrong(response, blue):
            self.outcomes[f"WRONG {sentence}"] += 1
        else:
            self.outcomes["right"] += 1

    def leaving(self, random_: random.Random, client: httpx.Client) -> None:
        try:
            client.post("/predict", files={"file": picture()}, timeout=httpx.Timeout(10, read=random_.uniform(0.001, 0.05)))
        except httpx.HTTPError:
            self.outcomes["left"] += 1

    def garbage(self, random_: random.Random, client: httpx.Client) -> None:
        paths = ["/predict", "/v2/models/chaos/infer", "/infer/object_detection", "/chaos/1", "/api/models/chaos/predict"]
        types = ["application/json", "multipart/form-data; boundary=x", "text/plain"]
        headers = {"content-type": random_.choice(types)}
        response = client.post(random_.choice(paths), content=random_.randbytes(random_.randrange(2000)), headers=headers)
        self.outcomes["garbage" if 400 <= response.status_code < 500 else f"WRONG garbage {response.status_code}"] += 1

    def slow(self, random_: random.Random, client: httpx.Client) -> None:
        target = urlsplit(self.address)
        with socket.create_connection((target.hostname, target.port)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(10):
                connection.sendall(b"x" * 100)
                self.stop.wait(0.1)
        self.outcomes["slow"] += 1

    def killer(self, random_: random.Random, client: httpx.Client) -> None:
        if len(replicas()) == 3:
            os.kill(random_.choice(sorted(replicas())), signal.SIGKILL)
            self.outcomes["killed"] += 1
        self.stop.wait(2)

    def poisoner(self, random_: random.Random, client: httpx.Client) -> None:
        status = client.post("/predict", files={"file": picture(blue=POISON)}, headers={"x-priority": "high"}).status_code
        self.outcomes["poison" if status in (422, 429) else f"WRONG poison {status}"] += 1
        self.stop.wait(5)

    def torment(self, act: Callable[[random.Random, httpx.Client], None], seed: int) -> None:
        with httpx.Client(base_url=self.address, timeout=90) as client:
            random_ = random.Random(seed)
            while not self.stop.is_set():
                act(random_, client)


def test_after_the_chaos_every_answer_is_right_and_every_queue_is_empty(address: str) -> None:
    chaos = Chaos(address)
    cast = [chaos.honest] * 12 + [chaos.leaving] * 3 + [chaos.garbage, chaos.slow, chaos.killer, chaos.poisoner]
    with ThreadPoolExecutor(len(cast)) as pool:
        acts = [pool.submit(chaos.torment, act, seed) for seed, act in enumerate(cast)]
        end = time.monotonic() + SECONDS
        until(lambda: time.monotonic() > end or any(act.done() for act in acts), SECONDS + 5)
        chaos.stop.set()
        for act in acts:
            act.result()
    print(dict(chaos.outcomes))
    assert not [outcome for outcome in chaos.outcomes if outcome.startswith("WRONG")]
    assert chaos.outcomes["right"] > SECONDS and chaos.outcomes["left"] > 10
    assert chaos.outcomes["killed"] >= SECONDS // 20

    with httpx.Client(base_url=address, timeout=90) as client:
        until(lambda: len(replicas()) == 3)
        for blue in range(64):
            assert not wrong(client.post("/predict", files={"file": picture(blue=blue)}), blue)
        until(lambda: client.get("/models").json()["models"][0]["load"]["in_flight"] == 0)
        assert client.get("/models").json()["models"][0]["load"]["waiting"] == 0
