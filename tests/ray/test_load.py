"""Load on one slow FakeModel, over HTTP: what is refused at once, what is dropped, and who is served first."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from actors.settings import ActorSettings
from deploy.settings import HttpLimits, ServedModel
from tests.conftest import picture, served, until

pytestmark = [pytest.mark.ray, pytest.mark.client, pytest.mark.usefixtures("local_ray")]

POISON = 250


@dataclass
class Slow:
    """A replica that computes one image at a time, and only while its gate is open."""

    address: str
    folder: Path
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def ask(self, blue: int, **headers: str) -> httpx.Response:
        return self.client.post(f"{self.address}/predict", files={"file": picture(blue=blue)}, headers=headers)

    @contextmanager
    def impatient(self, blue: int) -> Iterator[None]:
        """While the body runs, a client has asked for the image; then it hangs up."""
        asked = httpx.Request("POST", f"{self.address}/predict", files={"file": picture(blue=blue)})
        connection = HTTPConnection(asked.url.host, asked.url.port)
        connection.request("POST", "/predict", asked.read(), dict(asked.headers))
        try:
            yield
        finally:
            connection.close()

    def status(self, blue: int) -> int:
        """0 if the connection was cut."""
        try:
            return self.ask(blue).status_code
        except httpx.HTTPError:
            return 0

    def computed(self) -> list[int]:
        """The images in the order of their computation; 0 is the health check's."""
        return [value for value in map(int, (self.folder / "log").read_text().split()) if value]

    def load(self) -> dict[str, int]:
        (model,) = self.client.get(f"{self.address}/models").json()["models"]
        found: dict[str, int] = model["load"]
        return found

    @contextmanager
    def busy(self) -> Iterator[ThreadPoolExecutor]:
        """While the body runs the image 200 is being computed and 201 is in hand behind it; then both are answered."""
        (self.folder / "log").write_text("")
        (self.folder / "gate").touch()
        with ThreadPoolExecutor(20) as callers:
            first = callers.submit(self.ask, 200)
            until(self.computed)
            second = callers.submit(self.ask, 201)
            until(lambda: self.load()["in_flight"] == 2)
            try:
                yield callers
            finally:
                (self.folder / "gate").unlink()
            assert [first.result().status_code, second.result().status_code] == [200, 200]


@pytest.fixture(scope="module", params=["routed", "direct"])
def slow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    folder = tmp_path_factory.mktemp("slow")
    (folder / "log").touch()
    weights = f"fake:?log={folder / 'log'}&gate={folder / 'gate'}&crash={POISON}"
    model = ServedModel(name="fake", weights=weights, max_batch=1, actor=ActorSettings(num_cpus=0.1))
    with served(model, topology=request.param, http=HttpLimits(max_waiting_requests=3)) as address:
        yield Slow(address, folder)


def test_a_full_queue_is_refused_at_once_and_says_when_to_come_back(slow: Slow) -> None:
    with slow.busy() as callers:
        waiting = [callers.submit(slow.ask, number) for number in range(1, 4)]
        until(lambda: slow.load()["waiting"] == 3)
        refused = slow.ask(9)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    assert [future.result().status_code for future in waiting] == [200] * 3
    assert 9 not in slow.computed()


def test_what_is_too_late_is_not_computed(slow: Slow) -> None:
    """One whose time runs out in the queue, and one whose time runs out in the replica."""
    with slow.busy():
        late = slow.ask(7, **{"x-request-timeout-ms": "50"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert slow.ask(8).status_code == 200
    assert slow.computed() == [200, 201, 8]


def test_what_nobody_waits_for_any_more_is_not_computed(slow: Slow) -> None:
    with slow.busy():
        with slow.impatient(7):
            until(lambda: slow.load()["waiting"] == 1)
        until(lambda: slow.load()["waiting"] == 0)
    assert slow.ask(8).status_code == 200
    assert slow.computed() == [200, 201, 8]


def test_a_disconnect_reaches_the_replica(slow: Slow) -> None:
    """The one that leaves is not in the queue: it is the replica's, behind the image that is being computed."""
    (slow.folder / "log").write_text("")
    (slow.folder / "gate").touch()
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(slow.ask, 200)
        until(slow.computed)
        with slow.impatient(7):
            until(lambda: slow.load()["in_flight"] == 2)
        until(lambda: slow.load()["in_flight"] == 1)
        (slow.folder / "gate").unlink()
        assert first.result().status_code == slow.ask(8).status_code == 200
    assert slow.computed() == [200, 8]


def test_a_line_comes_while_the_next_image_is_computed(slow: Slow) -> None:
    (slow.folder / "gate").touch()
    files = [("file", picture(blue=1)), ("file", b"no image")]
    request = {"url": f"{slow.address}/predict", "files": files, "headers": {"accept": "application/x-ndjson"}}
    with slow.client.stream("POST", **request) as response:  # type: ignore[arg-type]
        lines = map(json.loads, response.iter_lines())
        try:
            assert next(lines)["error"]["code"] == "bad_image"
        finally:
            (slow.folder / "gate").unlink()
        assert next(lines)["results"][0]["class"] == 1


def test_high_priority_is_served_first(slow: Slow) -> None:
    with slow.busy() as callers:
        waiting = []
        for number, priority in ((1, "low"), (2, "low"), (3, "high")):
            waiting.append(callers.submit(slow.ask, number, **{"x-priority": priority}))
            until(lambda: slow.load()["waiting"] == len(waiting))
    assert [future.result().status_code for future in waiting] == [200] * 3
    order = slow.computed()
    assert order.index(3) < order.index(2)  # two slots become free: the first is for 3, the second for 1


@pytest.mark.parametrize("slow", ["routed"], indirect=True)  # in ``direct`` whoever waits dies too: see test_direct.py
def test_an_image_whose_client_has_gone_is_found_all_the_same(slow: Slow) -> None:
    """It kills the process after its client has left, when nobody waits for it; the next time it is tried alone."""
    (slow.folder / "log").write_text("")
    (slow.folder / "gate").touch()
    with slow.impatient(POISON):
        until(slow.computed)
    assert slow.computed() == [POISON]
    until(lambda: slow.load()["in_flight"] == 0)
    (slow.folder / "gate").unlink()
    until(lambda: slow.status(5) == 200)
    until(lambda: slow.status(POISON) == 422)
    assert slow.computed().count(POISON) == 2
    until(lambda: slow.status(6) == 200)
