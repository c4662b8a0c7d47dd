"""The page before real fleets: what a camera sees is tracked, and replicas that die, come and go are seen as it happens.

The artefact ``page.jpg`` is the README's picture.
"""

import os
import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from actors.settings import ActorSettings
from deploy.demo.scene import draw_clip
from deploy.settings import Replicas, ServedModel
from deploy.weights import EMBEDDED
from tests.browser.conftest import motion_jpeg, needs_chromium
from tests.conftest import processes, served, until
from tests.ray.test_routed import load

needs_chromium()
pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

MODEL = ServedModel(**EMBEDDED.model_dump(), replicas=Replicas(min=2, max=2), actor=ActorSettings(num_cpus=1))
REPLICA = f"ServeReplica:yolofleet:model-{EMBEDDED.name}"


@pytest.fixture(scope="module")
def belt() -> bytes:
    """Large, and long enough to look at."""
    return motion_jpeg(draw_clip(11, 90, 640, 480, fps=30))


@pytest.mark.timeout(400)
def test_a_stream_goes_on_while_a_replica_dies_and_its_successor_comes(page: Page, artefacts: Path) -> None:
    with served(MODEL, topology="routed") as address:
        page.set_viewport_size({"width": 1280, "height": 940})
        page.goto(f"{address}#stream")
        page.get_by_role("button", name="Use the camera").click()
        page.get_by_role("button", name="Add a line").click(timeout=60_000)
        passed = page.get_by_role("table", name="Lines and zones").locator("tbody tr")
        expect(passed).to_have_text([re.compile(r"line 1.*[1-9] (nut|bolt|washer|gear)")], timeout=60_000)
        expect(page.get_by_role("img", name=re.compile(r"The latest frame, with [1-9]"))).to_be_visible()
        at_work = page.get_by_role("table", name="The fleet at work").locator("tbody tr")
        expect(at_work.filter(has_text="RUNNING").filter(has_text=re.compile(" MB"))).to_have_count(2, timeout=30_000)
        expect(page.locator("#answered")).to_have_text(re.compile(r"[3-9]\d|\d{3,}"), timeout=60_000)
        page.screenshot(path=artefacts / "page.jpg", type="jpeg", quality=80)

        def working() -> set[str]:
            return set(at_work.locator("th").all_inner_texts())

        before = working()
        os.kill(min(processes(REPLICA)), signal.SIGKILL)
        until(lambda: working() != before)  # it is DEAD until a successor takes its line, at once or later
        page.screenshot(path=artefacts / "killed-stream.png")
        answered = int(page.locator("#answered").inner_text())
        expect(page.locator("#answered")).not_to_have_text(re.compile(f"^({answered}|{answered + 1})$"))
        expect(page.get_by_text("The connection was lost")).to_be_hidden()

        page.get_by_role("tab", name="Fleet").click()
        expect(page.get_by_role("article", name=EMBEDDED.name)).to_contain_text("Deaths1, the last at")
        rows = page.get_by_role("table", name=f"Replicas of {EMBEDDED.name}").locator("tbody tr")
        expect(rows.filter(has_text="RUNNING").filter(has_text=" MB")).to_have_count(2, timeout=90_000)
        expect(page.get_by_role("table", name="Live streams").locator("tbody tr")).to_have_text(
            [re.compile("page-.*line 1: in")]
        )
        page.screenshot(path=artefacts / "recovered.png")
        page.goto("about:blank")  # nobody watches while the fleet goes


def test_replicas_are_seen_to_come_with_the_load_and_to_go_without_it(page: Page, artefacts: Path) -> None:
    replicas = Replicas(min=1, max=2, idle_s=1)
    model = ServedModel(
        name="fake", weights="fake:?slow_ms=50", replicas=replicas, actor=ActorSettings(num_cpus=0.1), max_batch=1
    )
    with served(model, topology="routed") as address:
        page.goto(f"{address}#fleet")
        rows = page.get_by_role("table", name="Replicas of fake").locator("tbody tr")
        changes = page.get_by_role("log", name="What changed")
        expect(rows).to_have_text([re.compile("RUNNING")], timeout=30_000)
        with load(address, callers=12) as told:
            expect(rows).to_have_text([re.compile("RUNNING")] * 2, timeout=60_000)
            expect(changes).to_contain_text(re.compile("fake: replica .+ is new: (STARTING|RUNNING)"))
            page.screenshot(path=artefacts / "scaled.png")
        expect(rows).to_have_text([re.compile("RUNNING")], timeout=60_000)
        expect(changes).to_contain_text(re.compile("fake: replica .+ is gone"))
        expect(page.get_by_role("article", name="fake")).to_contain_text("Deathsnone seen")  # it was sent away
        assert not list(filter(None, told))
        page.goto("about:blank")
