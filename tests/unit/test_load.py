"""The load generator against a server of the test's own: what it sends, when, and what it makes of the answers."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response, UploadFile

from deploy.bench import BenchError
from deploy.bench.load import Closed, Load, Open, Target, arrivals, percentile, run_load, start_load
from deploy.environment import free_port
from tests.conftest import picture, until

SERIAL_S = 0.02


class Server:
    """Answers with the number of an image; remembers what it was asked."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.post("/predict")(self.predict)
        self.app.post("/serial")(self.serial)
        self.app.post("/moody")(self.moody)
        self.asked: list[tuple[bytes, dict[str, str], str | None]] = []
        self.at_once, self.most_at_once = 0, 0
        self._lock, self._four = asyncio.Lock(), asyncio.Barrier(4)

    async def predict(self, request: Request, file: UploadFile) -> Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        data = await file.read()
        form = {name: value for name, value in (await request.form()).items() if isinstance(value, str)}
        self.asked.append((data, form, request.headers.get("x-priority")))
        answer = Response(f"number {len(self.asked)}")
        await self._four.wait()  # nobody is answered before four have asked
        self.at_once -= 1
        return answer

    async def serial(self) -> Response:
        async with self._lock:
            await asyncio.sleep(SERIAL_S)
        return Response()

    async def moody(self, request: Request) -> Response:
        self.asked.append((await request.body(), {}, None))
        return Response(status_code=200 if len(self.asked) % 2 else 429)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{blue}.png" for blue in range(3)]
    for blue, path in enumerate(made):
        path.write_bytes(picture(blue=blue))
    return made


def test_callers_ask_in_turn_and_all_at_once(images: list[Path]) -> None:
    server = Server()
    with listening(server.app) as address:
        target = Target(f"{address}/predict", form={"conf": "0.5"}, headers={"X-Priority": "low"})
        load = run_load(target, images, Closed(callers=4, requests=24), keep_bodies=True)
    assert (load.sent, load.errors, len(load.latencies_ms)) == (24, {}, 24)
    assert sorted(load.bodies) == sorted(f"number {number + 1}" for number in range(24))
    assert server.most_at_once == 4
    assert {form["conf"] for _, form, _ in server.asked} == {"0.5"} and {priority for *_, priority in server.asked} == {"low"}
    assert {data for data, *_ in server.asked} == {image.read_bytes() for image in images}
    assert min(load.latencies_ms) > 0 and load.cpu_s > 0


def test_latency_counts_from_when_a_request_was_due(images: list[Path]) -> None:
    """Twenty requests are due within moments, and the server takes one after another: the last waits for all of them."""
    plan = Open(rate=1000, requests=20, seed=3)
    server = Server()
    with listening(server.app) as address:
        load = run_load(Target(f"{address}/serial"), images, plan)
    last_due = max(arrivals(plan))
    assert load.errors == {}
    assert max(load.latencies_ms) >= 1e3 * (20 * SERIAL_S - last_due)


def test_arrivals_are_a_poisson_process_of_that_rate_and_repeat() -> None:
    plan = Open(rate=50, requests=4000, seed=1)
    due = list(arrivals(plan))
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert due == list(arrivals(plan)) != list(arrivals(Open(50, 4000, seed=2)))
    assert mean((gap - 1 / 50) ** 2 for gap in gaps) ** 0.5 == pytest.approx(1 / 50, rel=0.1)  # exponential: as wide as long


@pytest.mark.parametrize("seed", range(5))
def test_few_arrivals_offer_the_rate_as_well(seed: int) -> None:
    due = list(arrivals(Open(rate=10, requests=100, seed=seed)))
    assert due == sorted(due) and due[0] >= 0
    assert max(due) == pytest.approx(10, rel=0.1) and max(due) < 10


def test_what_is_not_200_is_counted_by_its_status(images: list[Path]) -> None:
    with listening(Server().app) as address:
        load = run_load(Target(f"{address}/moody"), images, Closed(callers=1, requests=10))
    assert load.errors == {"http 429": 5} and len(load.latencies_ms) == 5


def test_an_endpoint_that_is_not_there_is_an_error_each_time(images: list[Path]) -> None:
    load = run_load(Target(f"http://127.0.0.1:{free_port()}/predict"), images, Closed(callers=2, requests=6))
    assert load.errors == {"ConnectionRefusedError": 6} and load.percentile(50) is None


def test_a_connection_that_ends_before_the_answer_is_an_error(images: list[Path]) -> None:
    async def rude(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        raise RuntimeError("gone before the body")

    with listening(rude) as address:
        load = run_load(Target(f"{address}/"), images, Closed(callers=1, requests=2))
    assert load.errors == {"ConnectionResetError": 2}


def test_a_generator_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"gone\.jpg"):
        start_load(Target("http://127.0.0.1:9/"), [tmp_path / "gone.jpg"], Closed(1, 1)).result()


def test_percentiles_are_values_that_were_measured() -> None:
    assert [percentile(range(1, 101), percent) for percent in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0 and percentile([3, 1, 2], 50) == 2
    assert Load(3, {}, 1.0, [3, 1, 2], 0, []).percentile(95) == 3
