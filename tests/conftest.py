"""What all layers share: the real weights and images, pictures made on the spot, and one Ray for the session."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from deploy.environment import prepare_environment

if TYPE_CHECKING:
    from deploy.settings import ServedModel

prepare_environment()

REPOSITORY = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("YOLOFLEET_TEST_ASSETS", REPOSITORY.parent / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the real weights where they are not at hand; CI fails then (see .ci/run)."""
    if (ASSETS / "models").is_dir():
        return
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason=f"no real weights and images at {ASSETS}: set YOLOFLEET_TEST_ASSETS"))


@pytest.fixture(scope="session")
def weights() -> Path:
    """Folder of the real weights."""
    return ASSETS / "models"


@pytest.fixture(scope="session")
def coco128() -> Path:
    """Folder of the 128 real images, ``…/images/train2017``."""
    return ASSETS / "data" / "coco128" / "images" / "train2017"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """The one Ray of the session, with more CPUs than the machine has, so that small actors fit beside each other."""
    from deploy import launch

    with launch.local_ray(num_cpus=8):
        yield


def picture(width: int = 64, height: int = 48, *, blue: int = 0, red: int = 200) -> bytes:
    """A PNG of one colour, whose answer by FakeModel follows from it."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 2] = blue, red
    return cv2.imencode(".png", image)[1].tobytes()


@contextmanager
def served(*models: "ServedModel") -> Iterator[str]:
    """The address of an application of ``models`` on the session's Ray; Serve is gone afterwards."""
    from ray import serve

    from deploy.launch import running_app
    from deploy.settings import AppSettings

    try:
        with running_app(AppSettings(models=models), "127.0.0.1", 0) as address:
            yield address
    finally:
        serve.shutdown()


def processes(title: str) -> list[int]:
    """Process ids of the actors whose title, which Ray writes into their command line, has ``title`` in it."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"ray::{title}" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found
