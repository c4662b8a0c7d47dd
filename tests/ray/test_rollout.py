"""``yolofleet deploy`` on a fleet of one replica each, in both topologies, while clients never stop asking."""

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from ray import serve

from actors.settings import ActorSettings
from deploy.config import HttpOptions
from deploy.launch import LaunchError
from deploy.rollout import CANDIDATE, Report, render, rollout, rollouts_locked
from deploy.settings import AppSettings, HttpLimits, ServedModel
from tests.conftest import picture, served, until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def large_picture(blue: int) -> bytes:
    """A PNG of more than the 100 kB that Ray sends inline, for which FakeModel answers as for a small one."""
    image = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    image[..., 0], image[..., 2] = blue, 200
    return cv2.imencode(".png", image)[1].tobytes()


CLIENTS = 8
PAUSE_S = 0.05  # of each client between two requests: the new replicas need some of the processors
SMALL = ActorSettings(num_cpus=0.1)
COMMON = 16
PICTURES = [picture(blue=blue) for blue in range(COMMON)] + [large_picture(COMMON + number) for number in range(COMMON)]


@dataclass
class Answered:
    """One request of one client."""

    blue: int
    asked: float
    status: int
    found: int | None  # the class, or None for nothing


@dataclass
class Fleet:
    """A served application of one model of one replica."""

    address: str
    settings: AppSettings
    serial: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def settings_with(self, weights: str) -> AppSettings:
        models = (self.settings.models[0].model_copy(update={"weights": weights}),)
        return self.settings.model_copy(update={"models": models})

    def deploy(self, settings: AppSettings, *, force: bool = False, say: Callable[[str], None] = lambda line: None) -> Report:
        report = rollout(settings, HttpOptions(), say, force=force)
        if report.moved:
            self.settings = settings
        return report

    def weights(self, options: str = "") -> str:
        """Weights of another content than any before."""
        return f"fake:?serial={next(self.serial)}&{options}"

    def sha256(self) -> str:
        model = httpx.get(f"{self.address}/models", timeout=60).json()["models"][0]
        return str(model["sha256"])

    @contextmanager
    def asked(self, rare: int | None = None) -> Iterator[list[Answered]]:
        """Clients that keep their connections and ask all the time while the body runs; every 50th image is ``rare``."""
        stop, answers, numbers = threading.Event(), list[Answered](), itertools.count()

        def client() -> None:
            with httpx.Client(base_url=self.address, timeout=60) as http:
                while not stop.is_set():
                    number = next(numbers)
                    time.sleep(PAUSE_S)
                    answers.append(ask(http, rare if rare is not None and number % 50 == 49 else number % COMMON))

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield answers
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def ask(http: httpx.Client, blue: int) -> Answered:
    asked = time.monotonic()
    try:
        response = http.post("/predict", files={"file": PICTURES[blue]})
    except httpx.HTTPError:
        return Answered(blue, asked, 0, None)
    if response.status_code != 200:
        return Answered(blue, asked, response.status_code, None)
    results = response.json()["images"][0]["results"]
    return Answered(blue, asked, 200, results[0]["class"] if results else None)


def wrong(answers: list[Answered], shifts: tuple[int, ...] = (0,), may_miss: int | None = None) -> list[Answered]:
    """What is neither the old weights' answer nor the new ones'."""

    def right(one: Answered) -> bool:
        expected = {(one.blue + shift) % 4 for shift in shifts}
        return one.status == 200 and (one.found in expected or (one.found is None and one.blue == may_miss))

    return [one for one in answers if not right(one)]


def ask_whom(fleet: Fleet) -> str:
    return httpx.post(f"{fleet.address}/predict", files={"file": PICTURES[0]}, timeout=60).headers["x-replica"]


def wait_for(answers: list[Answered], count: int) -> None:
    until(lambda: len(answers) >= count)


@pytest.fixture(scope="module", params=["routed", "direct"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    model = ServedModel(name="fake", weights="fake:", actor=SMALL)
    settings = AppSettings(models=(model,), topology=request.param)
    with served(model, topology=request.param) as address:
        yield Fleet(address, settings)


routed = pytest.mark.parametrize("fleet", ["routed"], indirect=True)
direct = pytest.mark.parametrize("fleet", ["direct"], indirect=True)


@pytest.mark.parametrize("fleet", ["routed", pytest.param("direct", marks=pytest.mark.long)], indirect=True)
@pytest.mark.client
def test_good_weights_take_over_and_no_request_fails(fleet: Fleet) -> None:
    """The new weights find nothing in one image in fifty, which tells whose answer it is."""
    before, marked = fleet.sha256(), COMMON + next(fleet.serial)
    with fleet.asked(rare=marked) as answers:
        wait_for(answers, 64 + CLIENTS)
        report = fleet.deploy(fleet.settings_with(fleet.weights(f"miss={marked}")))
        returned, count = time.monotonic(), len(answers)
        wait_for(answers, count + 100)
    (comparison,) = report.comparisons
    assert (report.moved, report.reason, comparison.objection) == (True, None, None)
    assert (comparison.images, comparison.drawn, comparison.errors) == (64, False, 0)
    assert 0.95 <= comparison.found.share == 2 * comparison.found.matched / (comparison.found.old + comparison.found.new)
    assert min(*comparison.old_ms, *comparison.new_ms) > 0
    assert (comparison.old_sha256, comparison.new_sha256) == (before, fleet.sha256())
    assert before != fleet.sha256()
    print(f"{fleet.settings.topology}: {len(answers)} answers, {len(wrong(answers, may_miss=marked))} wrong")
    assert not wrong(answers, may_miss=marked)
    asked_after = [one.found for one in answers if one.blue == marked and one.asked > returned]
    assert asked_after and set(asked_after) == {None}
    assert {one.found for one in answers if one.blue == marked} == {marked % 4, None}


@direct
@pytest.mark.client
def test_forced_other_answers_replace_the_old_ones_and_no_request_fails(fleet: Fleet) -> None:
    with fleet.asked() as answers:
        wait_for(answers, CLIENTS)
        report = fleet.deploy(fleet.settings_with(fleet.weights("shift=1")), force=True)
        returned, count = time.monotonic(), len(answers)
        wait_for(answers, count + 50)
    assert report.moved and report.forced and report.comparisons[0].objection
    assert not wrong(answers, shifts=(0, 1))
    assert not wrong([one for one in answers if one.asked > returned], shifts=(1,))


@routed
@pytest.mark.client
def test_other_answers_are_refused_and_nobody_has_noticed(fleet: Fleet) -> None:
    before, replica = fleet.sha256(), ask_whom(fleet)
    with fleet.asked() as answers:
        wait_for(answers, 64)
        report = fleet.deploy(fleet.settings_with(fleet.weights("shift=1")))
    assert not report.moved and report.comparisons[0].found.share == 0.0
    assert "agrees with the running one on 0.000 of the objects, 0.95 is asked for" in str(report.reason)
    assert not wrong(answers)
    assert fleet.sha256() == before and ask_whom(fleet) == replica
    assert CANDIDATE not in serve.status().applications
    assert json.loads(json.dumps(report.as_dict()))["comparisons"][0]["agreement"] == 0.0
    assert render(report).row_count == 1


@pytest.mark.long
@routed
def test_weights_that_cannot_be_loaded_are_refused_forced_or_not(fleet: Fleet, tmp_path: Path) -> None:
    before, broken = fleet.sha256(), tmp_path / "broken"
    broken.touch()
    report = fleet.deploy(fleet.settings_with(fleet.weights(f"broken={broken}")), force=True)
    assert "The new 'fake' cannot be served. These fake weights cannot be loaded while" in str(report.reason)
    assert not report.moved and fleet.sha256() == before


@routed
@pytest.mark.client
def test_what_fails_after_the_comparison_is_taken_back(fleet: Fleet, tmp_path: Path) -> None:
    before, broken = fleet.sha256(), tmp_path / "broken"

    def break_it(line: str) -> None:
        if line.startswith("traffic moves"):
            broken.touch()

    with fleet.asked() as answers:
        wait_for(answers, 64)
        report = fleet.deploy(fleet.settings_with(fleet.weights(f"broken={broken}")), say=break_it)
    assert not report.moved and "the old ones are again. These fake weights cannot be loaded" in str(report.reason)
    assert not wrong(answers) and fleet.sha256() == before


@pytest.mark.long
@routed
def test_without_room_for_a_candidate_nothing_is_tried(fleet: Fleet) -> None:
    (model,) = fleet.settings_with(fleet.weights()).models
    greedy = model.model_copy(update={"actor": ActorSettings(num_cpus=8)})
    report = fleet.deploy(fleet.settings.model_copy(update={"models": (greedy,)}))
    assert not report.moved and not report.comparisons
    assert re.search(r"no room for new replicas beside the old ones: (8|7.9)\S* CPUs more are needed", str(report.reason))


@pytest.mark.long
@routed
@pytest.mark.client
def test_limits_and_added_models_need_no_comparison_and_leave_the_others_replicas_alone(fleet: Fleet) -> None:
    replica = ask_whom(fleet)
    other = ServedModel(name="other", weights="fake:?shift=2", actor=SMALL)
    with fleet.asked() as answers:
        wait_for(answers, CLIENTS)
        settings = fleet.settings.model_copy(update={"models": (*fleet.settings.models, other)})
        report = fleet.deploy(settings.model_copy(update={"http": HttpLimits(max_images_per_request=1)}))
    assert report.moved and not report.comparisons and not wrong(answers)
    assert ask_whom(fleet) == replica
    found = httpx.post(f"{fleet.address}/predict", files={"file": PICTURES[0]}, data={"model": "other"}, timeout=60)
    assert found.json()["images"][0]["results"][0]["class"] == 2
    two = [("file", PICTURES[0]), ("file", PICTURES[1])]
    assert httpx.post(f"{fleet.address}/predict", files=two, timeout=60).status_code in (413, 422)


@routed
def test_two_rollouts_at_a_time_are_refused(fleet: Fleet) -> None:
    with rollouts_locked(), pytest.raises(LaunchError, match="Another 'yolofleet deploy' is under way"):
        fleet.deploy(fleet.settings)
