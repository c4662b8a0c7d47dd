"""The unmodified ``ultralytics.YOLO("http://…/NAME")`` on engines of every kind, over real HTTP, without Ray.

tests/real/test_kserve_client.py has trained weights of four tasks; here is what else a model may be.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ultralytics
import uvicorn

from actors.detector import Detector
from actors.model import YoloModel
from actors.settings import ImageLimits, ModelSettings
from deploy.api import create_api
from deploy.demo.scene import draw_scene
from deploy.settings import HttpLimits
from deploy.weights import EMBEDDED
from tests.conftest import until
from tests.http.conftest import OneDetectorFleet


@contextmanager
def served(weights: Path) -> Iterator[str]:
    """The address of an endpoint over ``weights``, in threads of this process; the model's name there is ``fake``."""
    detector = Detector(lambda: YoloModel(ModelSettings(name="fake", weights=str(weights))), ImageLimits())
    server = uvicorn.Server(uvicorn.Config(create_api(OneDetectorFleet(detector), HttpLimits()), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        detector.close()


def embedded(folder: Path) -> Path:
    return Path(shutil.copy(EMBEDDED.weights, folder / "parts.pt"))


def fixed(folder: Path) -> Path:
    return Path(ultralytics.YOLO(str(embedded(folder))).export(format="torchscript", imgsz=320, verbose=False))


def suppressing(folder: Path) -> Path:
    return Path(ultralytics.YOLO(str(embedded(folder))).export(format="onnx", imgsz=320, nms=True, verbose=False))


def end_to_end(folder: Path) -> Path:
    untrained = ultralytics.YOLO("yolo26n.yaml")
    untrained.model.model[-1].end2end = True
    untrained.model.model[-1].fuse()
    untrained.save(folder / "end2end.pt")
    return folder / "end2end.pt"


def oriented(folder: Path) -> Path:
    ultralytics.YOLO("yolo11n-obb.yaml").save(folder / "oriented.pt")
    return folder / "oriented.pt"


KINDS: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    "of another size than 640, which the caller has to say": (embedded, "detect", {"imgsz": 320, "conf": 0.4}),
    "a fixed export, which says its size itself": (fixed, "detect", {"conf": 0.4}),
    "an export with suppression inside": (suppressing, "detect", {"conf": 0.4}),
    "end to end": (end_to_end, "detect", {"imgsz": 320, "conf": 0.0, "max_det": 5}),
    "oriented boxes": (oriented, "obb", {"imgsz": 320, "conf": 0.0, "max_det": 5}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_yolo_answers_as_the_local_weights(kind: str, tmp_path: Path) -> None:
    make, task, params = KINDS[kind]
    weights = make(tmp_path)
    local = ultralytics.YOLO(str(weights), task=task)
    with served(weights) as address:
        remote = ultralytics.YOLO(f"{address}/fake", task=task)
        for seed, size in ((1, (480, 320)), (2, (320, 480)), (3, (640, 480))):
            image = draw_scene(seed, *size).image
            (expected,), (found,) = (model.predict(image, verbose=False, **params) for model in (local, remote))
            assert found.summary() and found.names == expected.names
            assert found.summary() == expected.summary()
