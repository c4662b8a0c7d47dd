"""Exported weights: whatever ultralytics.YOLO loads is served, with the task its metadata tells and the actor's threads."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ultralytics

from actors.errors import BadRequest
from actors.model import YoloModel
from actors.schemas import PredictParams
from actors.settings import ModelSettings
from deploy.api.ultralytics import summary
from deploy.demo.guide import same_answer
from deploy.demo.scene import draw_scene
from deploy.weights import EMBEDDED

FORMATS = {"torchscript": "torchscript", "openvino": "openvino", "onnx": "onnx"}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export the embedded weights; the file's name tells nothing of its task."""

    def make(kind: str, **options: object) -> Path:
        copy = tmp_path_factory.mktemp(kind) / "model.pt"
        shutil.copy(EMBEDDED.weights, copy)
        return Path(ultralytics.YOLO(str(copy)).export(format=kind, verbose=False, **options))

    return make


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_answers_as_yolo_predict_does_with_it(kind: str, export: Callable[..., Path]) -> None:
    weights = export(kind, imgsz=320, dynamic=kind != "torchscript")
    reference = ultralytics.YOLO(str(weights), task="detect")
    model = YoloModel(ModelSettings(name="export", weights=str(weights)))
    assert model.info.engine == FORMATS[kind]
    for seed, size in ((1, (480, 320)), (2, (320, 480)), (3, (640, 480))):
        image = draw_scene(seed, *size).image
        (found,) = model.predict([model.prepare(image, PredictParams(conf=0.4))])
        assert found.detections
        assert same_answer(reference.predict(image, conf=0.4, verbose=False)[0].summary(), summary(found))


def test_a_fixed_export_says_which_size_it_takes(export: Callable[..., Path]) -> None:
    model = YoloModel(ModelSettings(name="fixed", weights=str(export("torchscript", imgsz=320))))
    with pytest.raises(BadRequest, match=r"\[320, 320\] only"):
        model.prepare(draw_scene(1).image, PredictParams(imgsz=(640, 640)))


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_takes_the_actors_threads(threads: int, export: Callable[..., Path]) -> None:
    model = YoloModel(ModelSettings(name="export", weights=str(export("openvino", imgsz=320))), threads)
    compiled = model._predictor.model.ov_compiled_model
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert not compiled.get_property("ENABLE_CPU_PINNING")
