"""Chromium, and the page in front of the fake fleet of tests/http: no Ray but where a test asks for it."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from actors.detector import Detector
from actors.fake_model import FakeModel
from actors.images import encode_jpeg
from actors.settings import ImageLimits, ModelSettings
from deploy.api import create_api
from deploy.demo.scene import Scene, draw_clip
from deploy.settings import HttpLimits
from tests.http.conftest import OneDetectorFleet, listening

ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
CHROMIUM = shutil.which("chromium")


def needs_chromium() -> None:
    """Skip the module that calls it, in one line, where there is no browser."""
    if not CHROMIUM:
        pytest.skip("no Chromium here: install Debian's package chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def belt() -> bytes:
    """A moment of the drawn world as a motion JPEG, which Chromium's fake camera plays again and again."""
    return motion_jpeg(draw_clip(11, 30, fps=30))


def motion_jpeg(scenes: Iterable[Scene]) -> bytes:
    return b"".join(encode_jpeg(scene.image) for scene in scenes)


@pytest.fixture(scope="module")
def browser(belt: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    camera = tmp_path_factory.mktemp("camera") / "belt.mjpeg"
    camera.write_bytes(belt)
    with sync_playwright() as playwright:
        arguments = [*ARGUMENTS, f"--use-file-for-fake-video-capture={camera}"]
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


expect.set_options(timeout=30_000)  # other tests take the cores


@pytest.fixture
def complaints() -> list[str]:
    """Errors in the page's console; a test that provokes something takes it out again."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"])
    made = context.new_page()
    made.set_default_timeout(15_000)
    made.on("console", lambda said: complaints.append(f"{said.text} {said.location['url']}") if said.type == "error" else None)
    made.on("pageerror", lambda error: complaints.append(str(error)))
    yield made
    context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: the folder that YOLOFLEET_TEST_ARTEFACTS names, else pytest's own."""
    folder = Path(os.environ.get("YOLOFLEET_TEST_ARTEFACTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def fleet() -> Iterator[OneDetectorFleet]:
    detector = Detector(lambda: FakeModel(ModelSettings(name="fake", weights="fake:")), ImageLimits())
    yield OneDetectorFleet(detector, ImageLimits())
    detector.close()


@pytest.fixture(scope="module")
def address(fleet: OneDetectorFleet) -> Iterator[str]:
    with listening(create_api(fleet, HttpLimits())) as made:
        yield made
