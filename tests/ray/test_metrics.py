"""Metrics as Prometheus reads them from Ray's endpoint, after requests whose number is known."""

import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect

from actors.fake_model import fake_sha256
from actors.settings import ActorSettings, ModelSettings
from deploy.batch import Job, JobSettings
from deploy.settings import HttpLimits, ServedModel
from tests.conftest import picture, served, until, video

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@dataclass(frozen=True)
class Watched:
    """A model with a name of its own, so that no other test's numbers are among its own; and a gate before its batches."""

    client: httpx.Client
    model: ServedModel
    gate: Path

    def ask(self, image: bytes) -> int:
        return self.client.post("/predict", files={"file": image}).status_code

    def values(self, name: str, **labels: str) -> dict[str, float]:
        """Sum of the samples ``name`` of this model by outcome, stage or upper bound of the bucket; "" without one."""
        version = fake_sha256(self.model.weights)[:12]
        return samples(name, model=self.model.name, version=version, task="detect", **labels)


def samples(name: str, **labels: str) -> dict[str, float]:
    (node,) = ray.nodes()
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics").raise_for_status().text
    found = defaultdict[str, float](float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"ray_{name}" and labels.items() <= sample.labels.items():
                (kind,) = {"outcome", "stage", "le"} & sample.labels.keys() or {""}
                found[sample.labels.get(kind, "")] += sample.value
    return dict(found)


@pytest.fixture(scope="module", params=["routed", "direct"])
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    gate = tmp_path_factory.mktemp("watched") / "gate"
    name = f"watched-{request.param}"
    model = ServedModel(name=name, weights=f"fake:?gate={gate}", max_batch=4, actor=ActorSettings(num_cpus=0.1))
    limits = HttpLimits(max_waiting_requests=2)
    with (
        served(model, topology=request.param, http=limits) as address,
        httpx.Client(base_url=address, timeout=60, limits=httpx.Limits(max_connections=40)) as client,
    ):
        yield Watched(client, model, gate)


def test_what_was_asked_is_what_prometheus_reads(watched: Watched, tmp_path: Path) -> None:
    watched.gate.touch()
    with ThreadPoolExecutor(12) as callers:
        answers = [callers.submit(watched.ask, picture()) for _ in range(10)]  # 2 x max_batch go on, two wait
        until(lambda: watched.values("yolofleet_queue_depth") == {"": 2})
        assert watched.values("yolofleet_in_flight") == {"": 8}
        refused = [watched.ask(picture()) for _ in range(3)]
        watched.gate.unlink()
        assert [answer.result() for answer in answers] == [200] * 10
    assert refused == [429] * 3
    assert [watched.ask(b"hello"), watched.ask(b"")] == [400] * 2
    film = video(tmp_path / "film.mp4", frames=5)
    assert watched.client.post("/predict", files={"file": ("film.mp4", film)}).status_code == 200
    tensor = {"name": "images", "shape": [3, 3, 32, 32], "datatype": "FP32", "data": np.zeros(3 * 3 * 32 * 32).tolist()}
    assert watched.client.post(f"/v2/models/{watched.model.name}/infer", json={"inputs": [tensor]}).status_code == 200
    nobody = watched.client.post("/predict", files={"file": picture()}, data={"model": "nobody"})
    assert nobody.status_code == 404

    outcomes = {"ok": 12, "overloaded": 3, "bad_image": 2}
    until(lambda: watched.values("yolofleet_requests_total") == outcomes)
    until(lambda: watched.values("yolofleet_queue_depth") == watched.values("yolofleet_in_flight") == {"": 0})
    images, frames, tensors = 10, 5, 1
    one_by_one = dict.fromkeys(("decode", "preprocess", "postprocess"), images + frames)
    passes = dict.fromkeys(("batch_wait", "inference"), images + frames + tensors)
    stages = {**one_by_one, **passes, "queue": outcomes["ok"]}
    until(lambda: watched.values("yolofleet_stage_seconds_count") == stages)
    assert watched.values("yolofleet_request_seconds_count") == {"": sum(outcomes.values())}

    sizes = watched.values("yolofleet_batch_size_bucket")
    assert sizes["1.0"] < sizes["4.0"] == sizes["+Inf"]
    assert images + frames + 3 > sizes["+Inf"] >= 5
    assert samples("yolofleet_requests_total", outcome="unknown_model", model="", version="", task="")["unknown_model"] >= 1
    assert not samples("yolofleet_requests_total", model="nobody")


def test_connected_streams_are_counted(watched: Watched) -> None:
    path = f"/streams/{watched.model.name}"
    url = watched.client.base_url.copy_with(scheme="ws", path=path, query=b"tracker=bytetrack")
    with connect(str(url), open_timeout=60) as socket:
        socket.send(picture())
        assert json.loads(socket.recv(timeout=60))["image"]["results"]
        until(lambda: watched.values("yolofleet_streams") == {"": 1})
    until(lambda: watched.values("yolofleet_streams") == {"": 0})
    assert watched.values("yolofleet_stream_frames_total") == {"answered": 1}


def test_a_job_s_results_and_dead_letters_are_counted_as_they_are_committed(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(picture(blue=number))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    model = ModelSettings(name="counted", weights="fake:")
    job = Job.open(JobSettings(sources=(str(tmp_path),), model=model, out=tmp_path / "out", actors=1))
    job.run(ActorSettings(num_cpus=0.1), lambda progress: None)
    until(lambda: samples("yolofleet_job_inputs_total", model="counted") == {"result": 20, "dead_letter": 1})
