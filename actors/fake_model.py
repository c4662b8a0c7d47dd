"""FakeModel: a model double that a test can predict. Shipped, so that remote workers can import it.

``fake:`` weights take options after a question mark: ``fake:?task=detect&crash=255&slow_ms=20``.

    detect    one box per image: class = mean blue % 4, confidence = mean red / 255, box = the inner half of the image
    crash=B   the process dies (``os._exit``) when an image's top-left blue value is B: a crash, not an exception
    fail=B    an unexpected exception for such an image
    hang=B    the model never comes back from such an image
    oom=N     EngineOutOfMemory for batches larger than N
    slow_ms=T each batch takes T milliseconds
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray

from actors.errors import EngineOutOfMemory
from actors.schemas import Detection, ImageResult, ModelInfo, PredictParams, Timing
from actors.settings import ModelSettings

NAMES = {0: "zero", 1: "one", 2: "two", 3: "three"}
CRASH_STATUS = 86

Array = NDArray[np.uint8]


class FakeModel:
    """Deterministic answers computed from the pixels, and faults on demand; see the module's docstring."""

    def __init__(self, settings: ModelSettings) -> None:
        options = dict(parse_qsl(urlsplit(settings.weights).query))
        self._crash, self._fail = int(options.get("crash", -1)), int(options.get("fail", -1))
        self._hang = int(options.get("hang", -1))
        self._largest_batch = int(options.get("oom", 1_000_000))
        self._slow_s = float(options.get("slow_ms", 0)) / 1e3
        self._info = ModelInfo(
            name=settings.name,
            weights=settings.weights,
            sha256="0" * 64,
            task="detect",
            names=NAMES,
            imgsz=(64, 64),
            engine="fake",
            device="cpu",
            versions={},
        )

    @property
    def info(self) -> ModelInfo:
        """A fixed description with the engine ``fake``."""
        return self._info

    def prepare(self, image: Array, params: PredictParams) -> FakePrepared:
        """Keep the image as it is; images of one shape share a bucket."""
        return FakePrepared(image, params)

    def predict(self, batch: Sequence[FakePrepared]) -> list[ImageResult]:
        """Answer from the pixels' means, or fault as the options say."""
        time.sleep(self._slow_s)
        markers = [int(item.image[0, 0, 0]) for item in batch]
        if self._crash in markers:
            os._exit(CRASH_STATUS)
        if self._hang in markers:
            threading.Event().wait()
        if self._fail in markers:
            raise RuntimeError("the fake model fails for this image, as its options ask")
        if len(batch) > self._largest_batch:
            raise EngineOutOfMemory(f"The fake model holds batches of {self._largest_batch}, not {len(batch)}")
        return [fake_result(item.image, item.params, len(batch)) for item in batch]


class FakePrepared:
    """An image and its thresholds, bucketed by shape."""

    def __init__(self, image: Array, params: PredictParams) -> None:
        self.image, self.params = image, params
        self.bucket = image.shape


def fake_result(image: Array, params: PredictParams, batch_size: int = 1) -> ImageResult:
    """What FakeModel answers for an (H, W, 3) uint8 image."""
    height, width = image.shape[:2]
    class_id = int(image[..., 0].mean()) % len(NAMES)
    confidence = float(image[..., 2].mean()) / 255
    box = (width / 4, height / 4, width * 3 / 4, height * 3 / 4)
    wanted = confidence > params.conf and (params.classes is None or class_id in params.classes)
    detections = (Detection(class_id, NAMES[class_id], confidence, box),) if wanted else ()
    return ImageResult(width, height, "detect", detections, Timing(batch_size=batch_size))
