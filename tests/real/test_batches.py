"""Batches never change an answer: sizes, models, tasks and thresholds at random, all at once, each compared with itself alone.

The reference is ``YOLO.predict`` on that image alone in one thread, computed after the fact for what was asked.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx
import pytest
import ultralytics

from tests.conftest import until
from tests.ray.test_metrics import samples
from tests.real.test_coco128 import assert_same

pytestmark = [pytest.mark.real, pytest.mark.ray, pytest.mark.timeout(300)]

MODELS = ("yolo26n", "yolov8n", "yolo11n-seg", "yolov8n-pose", "yolo11n-cls")
REQUESTS, CALLERS = 120, 24


def case(random_: random.Random, images: list[Path]) -> dict[str, Any]:
    """One request: a model, an image in one of a few sizes, and thresholds."""
    model = random_.choice(MODELS)
    params: dict[str, Any] = {"conf": random_.choice([0.05, 0.25, 0.6]), "iou": random_.choice([0.3, 0.7])}
    params["imgsz"] = random_.choice([224, 320, 416])
    if random_.random() < 0.3:
        params["max_det"] = random_.choice([1, 5])
    if random_.random() < 0.3 and model in ("yolo26n", "yolov8n", "yolo11n-seg"):
        params["classes"] = random_.sample(range(80), 20)
    size = random_.choice([(320, 240), (240, 320), (333, 251), (64, 64)])
    image = cv2.resize(cv2.imread(str(random_.choice(images))), size)
    return {"model": model, "params": params, "image": image}


def fields(params: dict[str, Any]) -> dict[str, str]:
    return {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in params.items()}


def taken_together() -> float:
    """Batches of more than one image so far, as Prometheus reads them; on OpenVINO they are computed side by side."""
    sizes = [samples("yolofleet_batch_size_bucket", model=model) for model in MODELS]
    return sum(passes.get("+Inf", 0) - passes.get("1.0", 0) for passes in sizes)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_every_answer_is_that_of_its_image_alone(seed: int, address: str, weights: Path, coco128: Path) -> None:
    random_ = random.Random(seed)
    images = sorted(coco128.glob("*.jpg"))[:32]
    cases = [case(random_, images) for _ in range(REQUESTS)]
    before = taken_together()
    client = httpx.Client(base_url=address, timeout=120, limits=httpx.Limits(max_connections=CALLERS))

    def ask(asked: dict[str, Any]) -> httpx.Response:
        png = cv2.imencode(".png", asked["image"])[1].tobytes()
        return client.post("/predict", files={"file": png}, data={"model": asked["model"]} | fields(asked["params"]))

    with client, ThreadPoolExecutor(CALLERS) as callers:
        responses = list(callers.map(ask, cases))
    assert all('batch;desc="' in response.headers["server-timing"] for response in responses)
    until(lambda: taken_together() - before > 0.05 * REQUESTS)  # else this proves little
    alone = {name: ultralytics.YOLO(str(weights / f"{name}.pt")) for name in MODELS}
    for number, (asked, response) in enumerate(zip(cases, responses, strict=True)):
        assert response.status_code == 200, response.text
        (expected,) = alone[asked["model"]].predict(asked["image"], verbose=False, **asked["params"])
        assert_same(
            response.json()["images"][0]["results"], expected.summary(), f"request {number}: {fields(asked['params'])}"
        )
