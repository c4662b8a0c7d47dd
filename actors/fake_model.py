"""FakeModel: a model double that a test can predict. Shipped, so that remote workers can import it.

``fake:`` weights take options after a question mark: ``fake:?task=detect&crash=255&slow_ms=20``.

    detect    one box per image: class = mean blue % 4, confidence = mean red / 255, box = the inner half of the image
    shift=N   classes are N higher, modulo 4: other weights, which find the same objects and call them otherwise
    miss=B    nothing is found in an image whose top-left blue value is B
    broken=FILE the model cannot be loaded while FILE exists
    crash=B   the process dies (``os._exit``) when an image's top-left blue value is B: a crash, not an exception
    fail=B    an unexpected exception for such an image
    hang=B    the model never comes back from such an image
    oom=N     EngineOutOfMemory for batches larger than N
    one_by_one=1 each image is a batch of its own, whatever its shape, and the next is asked for meanwhile
    slow_ms=T each batch takes T milliseconds
    gate=FILE a batch waits while FILE exists, so that a test decides when it goes on; the health check's, whose image comes
              with an imgsz, does not
    log=FILE  every batch appends a line with the top-left blue values of its images, which tells what was computed, and when
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray

from actors.errors import EngineOutOfMemory, ModelError
from actors.schemas import Detection, ImageResult, ModelInfo, PredictParams, Timing
from actors.settings import ModelSettings

NAMES = {0: "zero", 1: "one", 2: "two", 3: "three"}
CRASH_STATUS = 86

Array = NDArray[np.uint8]
Key = TypeVar("Key")


class FakeModel:
    """Deterministic answers computed from the pixels, and faults on demand; see the module's docstring."""

    def __init__(self, settings: ModelSettings) -> None:
        options = dict(parse_qsl(urlsplit(settings.weights).query))
        if (broken := options.get("broken")) and Path(broken).exists():
            raise ModelError(f"These fake weights cannot be loaded while {broken} exists")
        self._crash, self._fail = int(options.get("crash", -1)), int(options.get("fail", -1))
        self._hang = int(options.get("hang", -1))
        self._largest_batch = int(options.get("oom", 1_000_000))
        self._slow_s = float(options.get("slow_ms", 0)) / 1e3
        self._shift, self._miss = int(options.get("shift", 0)), int(options.get("miss", -1))
        self.one_by_one = bool(options.get("one_by_one"))
        self._log, self._gate = options.get("log"), options.get("gate")
        self._info = ModelInfo(
            name=settings.name,
            weights=settings.weights,
            sha256=fake_sha256(settings.weights),
            task="detect",
            names=NAMES,
            imgsz=(64, 64),
            engine="fake",
            device="cpu",
            versions={},
            dynamic=True,
            output_shapes=((-1, 3),),
            precision="fp32",
        )

    @property
    def info(self) -> ModelInfo:
        """A fixed description with the engine ``fake``."""
        return self._info

    def prepare(self, image: Array, params: PredictParams, shape: tuple[int, ...] | None = None) -> FakePrepared:
        """Keep the image as it is; images of one shape share a bucket."""
        return FakePrepared(image, params, shape or image.shape, () if self.one_by_one else image.shape)

    def predict(self, batch: Sequence[FakePrepared]) -> list[ImageResult]:
        """Answer from the pixels' means, or fault as the options say."""
        time.sleep(self._slow_s)
        markers = [int(item.inputs[0, 0, 0]) for item in batch]
        if self._log:
            with Path(self._log).open("a") as file:
                file.write(f"{' '.join(map(str, markers))}\n")
        while self._gate and any(item.params.imgsz is None for item in batch) and Path(self._gate).exists():
            time.sleep(0.01)
        if self._crash in markers:
            os._exit(CRASH_STATUS)
        if self._hang in markers:
            threading.Event().wait()
        if self._fail in markers:
            raise RuntimeError("the fake model fails for this image, as its options ask")
        self._fit(len(batch))
        found = [fake_result(item.inputs, item.params, len(batch), self._shift, item.shape) for item in batch]
        return [
            replace(result, detections=()) if marker == self._miss else result
            for marker, result in zip(markers, found, strict=True)
        ]

    def each(self, take: Callable[[], tuple[Key, FakePrepared] | None]) -> Iterator[tuple[Key, ImageResult]]:
        """Answer image by image; the next one is taken first, as a real engine would have it computed meanwhile."""
        following = take()
        while following is not None:
            (key, item), following = following, take()
            (result,) = self.predict([item])
            yield key, result
            following = following or take()

    def infer(self, inputs: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """Each image's mean per channel, (N, 3)."""
        time.sleep(self._slow_s)
        self._fit(len(inputs))
        return (inputs.mean(axis=(2, 3), dtype=np.float32),)

    def _fit(self, size: int) -> None:
        if size > self._largest_batch:
            raise EngineOutOfMemory(f"The fake model holds batches of {self._largest_batch}, not {size}")


class FakePrepared:
    """An image and its thresholds."""

    def __init__(self, image: Array, params: PredictParams, shape: tuple[int, ...], bucket: tuple[int, ...]) -> None:
        self.inputs, self.params, self.shape, self.bucket = image, params, shape, bucket


def fake_sha256(weights: str) -> str:
    """What stands for the content of ``fake:`` weights: the hash over their name and options."""
    return hashlib.sha256(weights.encode()).hexdigest()


def fake_result(
    image: Array, params: PredictParams, batch_size: int = 1, shift: int = 0, shape: tuple[int, ...] | None = None
) -> ImageResult:
    """What FakeModel answers for an (H, W, 3) uint8 image, or for its smaller copy."""
    height, width = (shape or image.shape)[:2]
    class_id = (int(image[..., 0].mean()) + shift) % len(NAMES)
    confidence = float(image[..., 2].mean()) / 255
    box = (width / 4, height / 4, width * 3 / 4, height * 3 / 4)
    wanted = confidence > params.conf and (params.classes is None or class_id in params.classes)
    detections = (Detection(class_id, NAMES[class_id], confidence, box),) if wanted else ()
    return ImageResult(width, height, "detect", detections, Timing(batch_size=batch_size))
