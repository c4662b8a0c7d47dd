"""What all layers share: the real weights and images, pictures made on the spot, and one Ray for the session."""

import contextlib
import functools
import inspect
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from deploy.environment import HAPROXY_PORTS, free_port, prepare_environment, use_haproxy

if TYPE_CHECKING:
    from deploy.settings import ServedModel

if os.environ.get("YOLOFLEET_TEST_DATA_PLANE") == "haproxy":  # what a client can see must hold on both (see .ci/run)
    for variable in HAPROXY_PORTS:
        os.environ.pop(variable, None)  # each worker's own, not what it has from its parent
    use_haproxy()
    # Replicas' ports are this worker's own: its HAProxy goes on for a while to ask where a dead one was.
    first_port = 30_000 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(first_port)
    os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(first_port + 99)
prepare_environment()
os.environ.setdefault("YOLOFLEET_ENGINE", "torch")  # commands whose engine is not what is tested do not export anything
# What is exported nevertheless is exported once for all workers and runs; what makes it is part of the cache's keys.
os.environ.setdefault("YOLOFLEET_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"yolofleet-test-engines-{os.getuid()}"))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # several workers share few cores: no spinning at barriers
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # 10,000 by default: too long to wait for in a test

settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # no timing is asserted
settings.register_profile("fleet", settings.get_profile("explore"), derandomize=True)  # the same examples in every run
settings.load_profile("fleet")

REPOSITORY = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("YOLOFLEET_TEST_ASSETS", REPOSITORY.parent / "shared"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a wanted change of the interface be written down; see tests/http/test_openapi.py."""
    parser.addoption("--update-openapi", action="store_true", help="write tests/http/openapi.json anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes longest, and skip what needs the real weights where they are not at hand (CI fails then)."""
    for item in items:
        if item.get_closest_marker("real") and not (ASSETS / "models").is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no real weights and images at {ASSETS}: set YOLOFLEET_TEST_ASSETS"))
    items.sort(key=lambda item: (item.get_closest_marker("ray") is None, item.path.parent.name != "real"))


@functools.cache
def has_cuda() -> bool:
    """Whether torch sees a CUDA GPU. Where there is no driver, torch is not asked: its import is slow."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    import torch

    return bool(torch.cuda.is_available())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what is not in the counts."""
    if not has_cuda():
        terminalreporter.write_line("tests/gpu is left out: there is no CUDA GPU here")


class ByFile(LoadScopeScheduling):
    """A file of tests is one worker's; so is the folder ``real``, whose endpoint is dear to start."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/real" if file.startswith("tests/real/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """How two workers share the tests."""
    return ByFile(config, log)


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
    from ray import serve

    from deploy import launch

    with launch.local_ray(num_cpus=8):
        yield
        if _serve_port.cache_info().currsize:  # somebody has served
            serve.shutdown()


@functools.cache
def _serve_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """A real S3 server on loopback, which the environment of this session names; Ray's actors get it from the jobs."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "test")
        environment.setenv("AWS_REGION", "us-east-1")
        yield
    server.stop()


@pytest.fixture
def bucket(s3: None) -> str:
    """The URI of an empty bucket."""
    from pyarrow.fs import FileSystem

    name = f"test-{uuid.uuid4().hex}"
    FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")[0].create_dir(name)
    return f"s3://{name}"


def picture(width: int = 64, height: int = 48, *, blue: int = 0, red: int = 200) -> bytes:
    """A PNG of one colour, whose answer by FakeModel follows from it."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 2] = blue, red
    return cv2.imencode(".png", image)[1].tobytes()


def video(path: Path, frames: int = 5, width: int = 64, height: int = 48, codec: str = "mp4v") -> bytes:
    """A video written to ``path``, whose suffix decides the container; each frame is red and bluer than the one before."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (width, height))
    assert writer.isOpened()
    for number in range(frames):
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0], image[..., 2] = 10 * number, 200
        writer.write(image)
    writer.release()
    return path.read_bytes()


@contextlib.contextmanager
def served(*models: "ServedModel", **settings: Any) -> Iterator[str]:
    """The address of an application of ``models`` on the session's Ray; it is gone afterwards, Serve and its proxy stay.

    Args:
        models: what is served.
        settings: further fields of AppSettings.
    """
    from deploy.launch import running_app
    from deploy.settings import AppSettings

    with running_app(AppSettings(models=models, **settings), "127.0.0.1", _serve_port()) as address:
        yield address


def until(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Wait until ``condition()`` is true: long, since other tests take the cores."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"it did not come true in {timeout_s} s: {inspect.getsource(condition).strip()}")
        time.sleep(0.05)


def processes(title: str) -> list[int]:
    """Process ids of this session's actors whose title, which Ray writes into their command line, has ``title`` in it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if f"ray::{title}" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found
