"""Detector on FakeModel: answers reach their callers, batches form, faults stay with the input that caused them."""

import logging
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from actors.detector import Detector
from actors.errors import BadImage, DeadlineExceeded, EngineOutOfMemory, ModelError, ReplicaUnavailable
from actors.fake_model import FakeModel, fake_result
from actors.images import decode_image, encode_jpeg
from actors.model import YoloModel
from actors.schemas import ImageResult, PredictParams
from actors.settings import ImageLimits, ModelSettings
from deploy.demo.scene import draw_scene
from deploy.weights import EMBEDDED
from tests.conftest import picture, until

LIMITS = ImageLimits()


@contextmanager
def detector(options: str = "", max_batch: int = 8) -> Iterator[Detector]:
    """A Detector on ``fake:?options``, closed on leaving."""
    settings = ModelSettings(name="fake", weights=f"fake:?{options}")
    made = Detector(lambda: FakeModel(settings), LIMITS, max_batch=max_batch)
    try:
        yield made
    finally:
        made.close()


def expected(data: bytes, params: PredictParams) -> ImageResult:
    return fake_result(decode_image(data, LIMITS), params)


def test_every_caller_gets_the_answer_for_its_own_image_and_thresholds() -> None:
    work = [(picture(64 + 16 * (n % 3), blue=n), PredictParams(conf=(n % 10) / 10)) for n in range(200)]
    with detector("slow_ms=1") as fleet:
        answers = [fleet.submit(*item).result for item in work]
        results = [answer() for answer in answers]
    assert [result.detections for result in results] == [expected(*item).detections for item in work]
    assert max(result.timing.batch_size for result in results) > 1


def test_images_of_different_shapes_do_not_share_a_batch() -> None:
    with detector("slow_ms=20") as fleet:
        futures = [fleet.submit(picture(64 if n % 2 else 80), PredictParams()) for n in range(16)]
        results = [future.result() for future in futures]
    assert {result.width for result in results} == {64, 80}


def test_a_bad_image_fails_alone() -> None:
    with detector() as fleet:
        futures = [fleet.submit(b"bad" if n == 3 else picture(), PredictParams()) for n in range(8)]
        wait(futures)
    assert [type(future.exception()) for future in futures] == [BadImage if n == 3 else type(None) for n in range(8)]


def test_a_large_jpeg_decoded_at_reduced_scale_has_its_boxes_where_they_are() -> None:
    scene = draw_scene(5, 320, 240)
    data = encode_jpeg(cv2.resize(scene.image, (1280, 960), interpolation=cv2.INTER_CUBIC))
    found = []
    for reduced in (False, True):
        made = Detector(lambda: YoloModel(EMBEDDED), LIMITS, reduced=reduced)
        found.append(made.submit(data, PredictParams(imgsz=(320, 320), conf=0.5)).result())
        made.close()
    exact, fast = found
    assert (fast.width, fast.height) == (exact.width, exact.height) == (1280, 960)
    assert len(exact.detections) == len(scene.parts) > 3
    place = [sorted((one.class_id, *(one.box or ())) for one in result.detections) for result in found]
    assert np.array(place[1]) == pytest.approx(np.array(place[0]), abs=8)  # pixels of the original: 2 of what is looked at


def test_an_unexpected_error_reaches_its_own_caller_only() -> None:
    with detector("fail=240&slow_ms=5") as fleet:
        futures = [fleet.submit(picture(blue=240 if n == 5 else 0), PredictParams()) for n in range(12)]
        wait(futures)
    assert [n for n, future in enumerate(futures) if future.exception()] == [5]


def test_out_of_memory_halves_the_batch_once_and_nobody_gets_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """What did not fit is not tried again, as the log tells."""
    with detector("oom=2&slow_ms=5", max_batch=16) as fleet, caplog.at_level(logging.WARNING):
        for _ in range(2):
            futures = [fleet.submit(picture(), PredictParams()) for _ in range(40)]
            sizes = [future.result().timing.batch_size for future in futures]
            assert 1 < max(sizes) <= 2
    limits = [int(limit) for limit in re.findall(r"from now on at most (\d+) images share a batch", caplog.text)]
    assert limits[-1] == 2 and limits == sorted(set(limits), reverse=True)


def test_out_of_memory_is_halved_again_and_again() -> None:
    """Sixteen images that wait while the first is computed, and a device that holds one at a time."""
    with detector("oom=1&slow_ms=30", max_batch=16) as fleet:
        futures = [fleet.submit(picture(blue=n), PredictParams()) for n in range(17)]
        classes = [future.result().detections[0].class_id for future in futures]
    assert classes == [n % 4 for n in range(17)]


def test_a_tensor_that_is_too_large_is_computed_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    tensor = np.random.default_rng(0).random((7, 3, 4, 4), np.float32)
    with detector("oom=2") as fleet, caplog.at_level(logging.WARNING):
        for _ in range(2):
            (found,), timing = fleet.submit_tensor(tensor).result()
            np.testing.assert_allclose(found, tensor.mean(axis=(2, 3)), rtol=1e-6)
            assert timing.batch_size == 7
    assert re.findall(r"tensors are computed by (\d+) at most", caplog.text) == ["4", "2"]


def test_what_the_model_thread_waits_for_images_is_counted_from_its_first_batch_on() -> None:
    with detector() as fleet:
        started = time.perf_counter()
        fleet.submit(picture(), PredictParams()).result()
        assert fleet.starved_s == 0
        fleet.submit(picture(), PredictParams()).result()
        assert 0 < fleet.starved_s < time.perf_counter() - started


def test_a_model_thread_that_dies_leaves_nobody_waiting() -> None:
    with detector("slow_ms=30", max_batch=1) as fleet:
        fleet._answer = _die  # type: ignore[method-assign]
        futures = [fleet.submit(picture(), PredictParams()) for _ in range(3)]
        wait(futures)
        assert all(isinstance(future.exception(), ReplicaUnavailable) for future in futures)
        with pytest.raises(ReplicaUnavailable):
            fleet.check_health()


def _die(model: object, batch: list[Any]) -> None:
    raise SystemExit("the test kills this thread")


def test_out_of_memory_on_one_image_is_an_error() -> None:
    with pytest.raises(EngineOutOfMemory), detector("oom=0"):
        pass


def test_cancelled_work_is_dropped_before_inference() -> None:
    with detector("slow_ms=50", max_batch=1) as fleet:
        futures: list[Future[ImageResult]] = [fleet.submit(picture(), PredictParams()) for _ in range(6)]
        cancelled = futures[-1].cancel()
        wait(futures)
    assert cancelled and all(future.done() for future in futures)


def test_a_model_that_cannot_be_loaded_fails_the_constructor() -> None:
    def load() -> FakeModel:
        raise ModelError("no weights")

    with pytest.raises(ModelError, match="no weights"):
        Detector(load, LIMITS)


def test_health_is_a_real_inference_on_the_model_thread() -> None:
    with detector() as fleet:
        fleet.check_health()
    with detector("fail=0") as unhealthy, pytest.raises(RuntimeError, match="fails for this image"):
        unhealthy.check_health()


def test_an_engine_that_never_comes_back_fails_the_health_check() -> None:
    settings = ModelSettings(name="fake", weights="fake:?hang=240")
    stuck = Detector(lambda: FakeModel(settings), LIMITS)  # never closed: its thread is a daemon
    waiting = stuck.submit(picture(blue=240), PredictParams())
    while not waiting.running():
        time.sleep(0.001)
    with pytest.raises(ReplicaUnavailable, match="did not answer"):
        stuck.check_health(timeout_s=0.05)


def test_closing_answers_what_was_accepted() -> None:
    with detector("slow_ms=10") as fleet:
        futures = [fleet.submit(picture(), PredictParams()) for _ in range(20)]
    assert all(future.result().detections for future in futures)


def test_an_engine_that_computes_image_by_image_takes_any_shapes_at_once_and_whatever_comes() -> None:
    pictures = [picture(width=64 + 16 * (n % 5), blue=n, red=60 + n) for n in range(40)]
    started = time.perf_counter()
    with detector("one_by_one=1&slow_ms=2", max_batch=4) as fleet:
        sizes = list[int]()
        fleet.on_batch = sizes.append
        params = [PredictParams(conf=n / 100) for n in range(40)]
        futures = [fleet.submit(data, each) for data, each in zip(pictures, params, strict=True)]
        results = [future.result() for future in futures]
    assert [result.detections for result in results] == [
        expected(data, each).detections for data, each in zip(pictures, params, strict=True)
    ]
    assert sum(sizes) == 40 and max(sizes) == 4
    assert {result.timing.batch_size for result in results} == {1}, "no other shared its pass"
    assert all(result.timing.batch_wait >= 0 and result.timing.decode > 0 for result in results)
    assert all(2 <= result.timing.engine < 1e3 * (time.perf_counter() - started) for result in results)


def test_one_that_fails_in_such_an_engine_fails_alone_wherever_it_is() -> None:
    for place in (0, 5, 11):
        with detector("one_by_one=1&fail=240&slow_ms=2", max_batch=4) as fleet:
            futures = [fleet.submit(picture(blue=240 if n == place else 0), PredictParams()) for n in range(12)]
            wait(futures)
        assert [n for n, future in enumerate(futures) if future.exception()] == [place]


def test_such_an_engine_under_endless_load_still_comes_round_for_health_tensors_and_its_successor() -> None:
    stop = threading.Event()

    def ask(fleet: Detector) -> int:
        answered = 0
        while not stop.is_set():
            answered += bool(fleet.submit(picture(), PredictParams()).result().detections)
        return answered

    def models() -> int:
        return sum(thread.name == "model" for thread in threading.enumerate())

    before = models()
    with detector("one_by_one=1&slow_ms=1") as fleet, ThreadPoolExecutor(6) as callers:
        asking = [callers.submit(ask, fleet) for _ in range(6)]
        try:
            for _ in range(5):
                fleet.check_health(timeout_s=20)
                fleet.submit_tensor(np.zeros((1, 3, 4, 4), np.float32)).result(timeout=20)
                fleet.replace(lambda: FakeModel(ModelSettings(name="fake", weights="fake:?one_by_one=1&slow_ms=1")))
                until(lambda: models() == before + 1)  # the one before has ended
        finally:
            stop.set()
        assert all(done.result(timeout=20) > 0 for done in asking)


def test_such_an_engine_computes_nothing_that_nobody_waits_for(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with detector(f"one_by_one=1&gate={gate}&log={tmp_path / 'log'}") as fleet:
        gate.touch()
        first = fleet.submit(picture(blue=1), PredictParams())
        until(lambda: (tmp_path / "log").read_text().endswith("\n1\n"))
        gone, late = fleet.submit(picture(blue=2), PredictParams()), fleet.submit(picture(blue=3), PredictParams(), 0.0)
        last = fleet.submit(picture(blue=4), PredictParams())
        assert gone.cancel()
        assert isinstance(late.exception(), DeadlineExceeded)
        gate.unlink()
        assert first.result() and last.result()
    assert (tmp_path / "log").read_text().split()[-2:] == ["1", "4"]
