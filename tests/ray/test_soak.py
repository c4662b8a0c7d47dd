"""Memory after many requests: what a real model's processes hold must not grow with what they have answered."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from actors.images import encode_jpeg
from actors.settings import ActorSettings
from deploy.demo.scene import draw_scene
from deploy.settings import ServedModel
from deploy.weights import EMBEDDED
from tests.conftest import processes, served, until

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(400)]

SETTLED, ALL, CALLERS = 200, 2000, 4


def rss_mb() -> float:
    """Resident memory of the ingress, which holds the model too, in MB."""
    (ingress,) = processes("ServeReplica:yolofleet:ingress")
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{ingress}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1e3


def test_memory_after_2000_requests_is_that_after_200() -> None:
    scenes = [encode_jpeg(draw_scene(seed, 320, 240).image) for seed in range(16)]
    model = ServedModel(name="parts", weights=EMBEDDED.weights, actor=ActorSettings(num_cpus=2))
    with (
        served(model, topology="direct") as address,
        httpx.Client(base_url=address, timeout=60) as client,
        ThreadPoolExecutor(CALLERS) as callers,
    ):

        def ask(number: int) -> int:
            files = {"file": scenes[number % len(scenes)]}
            fields = {"conf": str((number % 9 + 1) / 10), "imgsz": "192"}  # small, for it is the number that counts
            return client.post("/predict", files=files, data=fields).status_code

        def engine() -> str:
            (replica,) = client.get("/fleet").json()["models"][0]["replicas"]
            return str((replica["vitals"] or {}).get("engine"))

        until(lambda: engine() == "openvino fp32")
        assert set(callers.map(ask, range(SETTLED))) == {200}
        settled = rss_mb()
        assert set(callers.map(ask, range(SETTLED, ALL))) == {200}
        assert rss_mb() == pytest.approx(settled, rel=0.05)
        print(f"{settled:.0f} MB after {SETTLED} requests, {rss_mb():.0f} MB after {ALL}")
