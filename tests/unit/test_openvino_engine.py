"""OpenVINO's own way of running: each answer as the original's, whatever comes beside it, fails, or is compiled meanwhile."""

import threading
import weakref
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import ultralytics

from actors.engines import Made
from actors.model import load_model
from actors.openvino_engine import EARLY, KEPT_SHAPES, OFTEN, OpenVINOStreams, _Lanes
from actors.schemas import ImageResult, PredictParams
from deploy.api.ultralytics import summary
from deploy.demo.guide import same_answer
from deploy.demo.scene import draw_scene
from deploy.weights import EMBEDDED
from tests.conftest import until
from tests.unit.conftest import AUTO


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_answers_as_the_original_for_every_batch_and_shape(openvino: Made, threads: int) -> None:
    """Also once a shape has come often enough for a form of its own."""
    model = load_model(AUTO, threads, openvino)
    assert (model.info.engine, model.info.precision, model.info.dynamic) == ("openvino", "fp32", True)
    reference = ultralytics.YOLO(EMBEDDED.weights)
    scenes = [draw_scene(seed).image for seed in range(4)]
    for image in (scenes[0], np.ascontiguousarray(scenes[1][:400]), np.ascontiguousarray(scenes[2][:, :300])):
        for size in (1, 2, 3, 5, 8):
            images = [np.ascontiguousarray(np.roll(image, 16 * number, axis=1)) for number in range(size)]
            results = model.predict([model.prepare(one, PredictParams(conf=0.3)) for one in images])
            for one, result in zip(images, results, strict=True):
                (expected,) = reference.predict(one, conf=0.3, verbose=False)
                assert same_answer(expected.summary(), summary(result))


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_goes_on_with_images_of_any_shape_as_they_come(openvino: Made, threads: int) -> None:
    """Nothing is asked for that it has no stream for, but for one; and an image that cannot be prepared takes none along."""
    model = load_model(AUTO, threads, openvino)
    reference = ultralytics.YOLO(EMBEDDED.weights)
    scene = draw_scene(7).image
    images = [np.ascontiguousarray(scene[: 320 + 40 * (number % 4), : 400 - 40 * (number % 3)]) for number in range(24)]
    waiting, inside, most = list(enumerate(images)), set[int](), 0

    def take() -> tuple[int, Any] | None:
        nonlocal most
        if not waiting:
            return None
        number, image = waiting.pop(0)
        inside.add(number)
        most = max(most, len(inside))
        return number, model.prepare(image, PredictParams(conf=0.3))

    found = dict[int, ImageResult]()
    for number, result in model.each(take):
        inside.remove(number)
        found[number] = result
    assert most == threads + 1 and found.keys() == set(range(24))
    for number, result in found.items():
        (expected,) = reference.predict(images[number], conf=0.3, verbose=False)
        assert same_answer(expected.summary(), summary(result))
        assert result.timing.inference > 0

    waiting = list(enumerate(images[:6]))
    with pytest.raises(ValueError, match="not one more"):
        for number, _ in model.each(lambda: take() if len(waiting) > 2 else _refuse()):
            inside.remove(number)
    assert len(model.predict([model.prepare(image, PredictParams()) for image in images[:5]])) == 5


def test_a_common_shape_gets_a_form_of_its_own_and_where_none_is_left_only_a_very_common_one(openvino: Made) -> None:
    assert openvino.path is not None
    engine, original = OpenVINOStreams(openvino.path, None, threads=2), load_model(EMBEDDED, 1)
    random = np.random.default_rng(0)

    def compute(width: int) -> list[int]:
        image = random.random((1, 3, 192, width), np.float32)
        (found,), (expected,) = engine.forward(torch.from_numpy(image)), original.infer(image)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)
        return [shape[2] for shape, streams in engine.own_forms if streams == 1]

    assert [compute(64) for _ in range(OFTEN)] == [[]] * OFTEN, "too few pixels to gain anything"
    assert [compute(96) for _ in range(EARLY)] == [[]] * EARLY
    until(lambda: compute(96) == [96])
    for width in (128, 160):
        until(lambda width=width: width in compute(width))  # type: ignore[misc]
    for _ in range(OFTEN):
        assert len({*compute(96), *compute(160)}) == KEPT_SHAPES
    assert all(192 not in compute(192) for _ in range(OFTEN - 1))
    until(lambda: 192 in compute(192))
    assert compute(96) == [96, 160, 192], "the rarest goes, whenever it was used"


@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_that_fails_while_it_is_computed_raises_and_the_next_ones_are_computed(openvino: Made, threads: int) -> None:
    """With sides that are no multiples of its stride a YOLO model cannot put its layers together."""
    assert openvino.path is not None
    engine = OpenVINOStreams(openvino.path, None, threads=threads)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Caught exception"):
            engine.forward(torch.zeros(3, 3, 40, 40))
        assert engine.forward(torch.zeros(3, 3, 64, 64))[0].shape[0] == 3


def test_an_image_that_fails_is_noticed_while_others_go_on(openvino: Made) -> None:
    assert openvino.path is not None
    engine = OpenVINOStreams(openvino.path, None, threads=2)
    images = ((size, np.zeros((1, 3, size, size), np.float32)) for size in chain([40], repeat(64, 20_000)))
    with pytest.raises(RuntimeError, match="Caught exception"):
        for _ in engine.each(lambda: next(images, None)):
            pass
    assert next(images, None), "not only when nothing was left"


def test_a_form_that_is_replaced_is_gone(openvino: Made) -> None:
    assert openvino.path is not None
    engine = OpenVINOStreams(openvino.path, None, threads=2)

    def has_form(width: int) -> bool:
        engine.forward(torch.zeros(4, 3, 192, width))
        return ((3, 192, width), 2) in engine.own_forms

    for width in (96, 128, 160):
        until(lambda width=width: has_form(width))  # type: ignore[misc]
    forms = [weakref.ref(engine._forms[use]) for use in engine.own_forms]
    until(lambda: has_form(192))
    assert [form() for form in forms].count(None) == 1


def test_the_first_images_side_by_side_do_not_wait_for_a_compiler_nor_for_what_it_refuses(
    openvino: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert openvino.path is not None
    engine, go, asked = OpenVINOStreams(openvino.path, None, threads=2), threading.Event(), list[Any]()

    def compile_slowly(use: Any) -> NoReturn:
        asked.append(use)
        assert go.wait(60)
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine, "_compiled", compile_slowly)
    for _ in range(EARLY):
        assert engine.forward(torch.zeros(4, 3, 192, 96))[0].shape[0] == 4
    assert asked == [((), 2)]
    go.set()
    until(lambda: engine.forward(torch.zeros(4, 3, 192, 96)) and "no memory" in caplog.text)
    until(lambda: engine.forward(torch.zeros(4, 3, 192, 96)) and ((3, 192, 96), 2) in asked)
    assert len(asked) == len({*asked}), "none is tried again"


def test_no_more_images_are_under_way_than_there_are_threads_whatever_their_forms() -> None:
    under_way: dict[int, Callable[[int], None]] = {}

    class Flight:
        def __init__(self, number: int) -> None:
            self.number = number

        def start(self, on_done: Callable[[int], None]) -> None:
            under_way[self.number] = on_done

    lanes = _Lanes(2)
    for number in range(4):
        lanes.send(Flight(number))  # type: ignore[arg-type]
    assert [*under_way] == [0, 1]
    under_way.pop(1)(1)
    assert [*under_way] == [0, 2] and lanes.next_done()[0] == 1
    lanes.close()
    under_way.pop(0)(0)
    assert [*under_way] == [2], "none is started after the end"


def _refuse() -> NoReturn:
    raise ValueError("not one more")


def test_openvino_gives_tensors_the_outputs_of_torch(openvino: Made) -> None:
    model, original = load_model(AUTO, 1, openvino), load_model(EMBEDDED, 1)
    assert model.info.output_shapes == original.info.output_shapes and model.info.imgsz == original.info.imgsz
    inputs = np.random.default_rng(0).random((3, 3, 96, 160), np.float32)
    for mine, theirs in zip(model.infer(inputs), original.infer(inputs), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-2)
