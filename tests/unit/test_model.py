"""The private model: who may call it, what it refuses, and what its words are. On the embedded weights."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import ultralytics

from actors.errors import BadRequest, ModelError, ModelOwnershipError
from actors.model import YoloModel
from actors.schemas import PredictParams
from actors.settings import ModelSettings
from actors.verify import EXACT, verify
from actors.weights import hash_weights
from deploy.api.ultralytics import summary
from deploy.demo.scene import draw_scene
from deploy.weights import EMBEDDED


@pytest.fixture(scope="module")
def model() -> YoloModel:
    return YoloModel(EMBEDDED)


def _predict(model: YoloModel) -> object:
    return model.predict([model.prepare(draw_scene(5).image, PredictParams())])


def test_the_owner_gets_answers(model: YoloModel) -> None:
    assert _predict(model) == _predict(model)


def test_another_thread_is_refused(model: YoloModel) -> None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            _predict(model)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert isinstance(caught[0], ModelOwnershipError)
    assert "belongs to the thread that loaded it" in str(caught[0])


FORK = """
import os, sys
from actors.errors import ModelOwnershipError
from actors.model import YoloModel
from deploy.weights import EMBEDDED
model = YoloModel(EMBEDDED)
child = os.fork()
if child == 0:
    try:
        model.predict([])
    except ModelOwnershipError:
        os._exit(7)
    os._exit(1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_is_refused() -> None:
    """A fork keeps the thread's identity, so that only the process id tells."""
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60, check=False).returncode == 7


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_pickling_and_copying_are_refused(model: YoloModel, duplicate: object) -> None:
    with pytest.raises(ModelOwnershipError, match="load a private one"):
        duplicate(model)  # type: ignore[operator]


def test_missing_weights_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No weights at"):
        YoloModel(ModelSettings(name="x", weights=str(tmp_path / "none.pt")))


def test_a_file_that_is_no_model_is_an_expected_error(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot load"):
        YoloModel(ModelSettings(name="x", weights=str(tmp_path / "bad.pt")))


def test_pinned_weights_of_another_hash_are_refused() -> None:
    with pytest.raises(ModelError, match="pin"):
        YoloModel(ModelSettings(name="x", weights=EMBEDDED.weights, sha256="0" * 64))


def test_a_folder_of_weights_is_hashed_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    before = hash_weights(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert hash_weights(tmp_path) != before


def test_unknown_classes_name_the_known_ones(model: YoloModel) -> None:
    with pytest.raises(BadRequest, match="0 to 3"):
        model.prepare(np.zeros((8, 8, 3), np.uint8), PredictParams(classes=(4,)))


@pytest.mark.parametrize(
    "params",
    [
        {"conf": -0.1},
        {"conf": 1.1},
        {"conf": float("nan")},
        {"iou": 2.0},
        {"max_det": 0},
        {"imgsz": (8, 8)},
        {"classes": (-1,)},
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match=next(iter(params))):
        PredictParams(**params)  # type: ignore[arg-type]


def test_oriented_boxes_equal_the_reference(tmp_path: Path) -> None:
    """No trained weights for obb are at hand; random ones have the same outputs, only no sense."""
    weights = tmp_path / "random-obb.pt"
    untrained = ultralytics.YOLO("yolo11n-obb.yaml")
    untrained.save(weights)
    model = YoloModel(ModelSettings(name="obb", weights=str(weights)))
    image = draw_scene(3).image
    params = {"conf": 0.0, "max_det": 5, "imgsz": 320}
    (reference,) = ultralytics.YOLO(str(weights)).predict(image, verbose=False, **params)
    (found,) = model.predict([model.prepare(image, PredictParams(conf=0.0, max_det=5, imgsz=(320, 320)))])
    assert found.task == "obb" and len(found.detections) == 5
    assert summary(found) == reference.summary()


def test_an_end_to_end_head_gives_tensors_the_same_rows_whatever_an_image_asked_for_before(tmp_path: Path) -> None:
    """Fusing an end-to-end model leaves the one head; it is random here, its shapes are not."""
    weights = tmp_path / "random-end2end.pt"
    untrained = ultralytics.YOLO("yolo26n.yaml")
    untrained.model.model[-1].end2end = True
    untrained.model.model[-1].fuse()
    untrained.save(weights)
    model = YoloModel(ModelSettings(name="end2end", weights=str(weights)))
    assert model.info.end2end and model.info.output_shapes == ((-1, -1, 6),)
    model.predict([model.prepare(draw_scene(3).image, PredictParams(max_det=900, agnostic_nms=True))])
    (rows,) = model.infer(np.zeros((2, 3, 256, 256), np.float32))
    assert rows.shape == (2, 300, 6)


SUPPRESSION = """
import sys
import torch
from actors.model import YoloModel
from deploy.weights import EMBEDDED
YoloModel(EMBEDDED)
assert "torchvision" not in sys.modules, "its import takes longer than everything else"
from ultralytics.utils.nms import TorchNMS
torch.manual_seed(0)
corners = 100 * torch.rand(500, 2)
boxes, scores = torch.cat([corners, corners + 50 * torch.rand(500, 2)], 1), torch.rand(500)
kept = TorchNMS.nms(boxes, scores, 0.5)
import torchvision
assert TorchNMS.nms is torch.ops.torchvision.nms and 50 < len(kept) < 500
assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.5))
"""


def test_suppression_is_that_of_torchvision_which_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-c", SUPPRESSION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_weights_of_another_stride_are_loaded_and_verified(tmp_path: Path) -> None:
    weights = tmp_path / "random-p6.pt"
    ultralytics.YOLO("yolov8n-p6.yaml").save(weights)
    model = YoloModel(ModelSettings(name="p6", weights=str(weights)))
    assert model.info.stride == 64 and model.info.output_shapes == ((-1, 84, -1),)
    (rows,) = model.infer(np.zeros((1, 3, 192, 128), np.float32))
    assert rows.shape == (1, 84, 24 * 16 + 12 * 8 + 6 * 4 + 3 * 2)
    assert verify(model, model, [draw_scene(3).image[:300, :420]], EXACT).agrees


def test_a_tensor_comes_out_as_the_described_shapes(model: YoloModel) -> None:
    assert model.info.output_shapes == ((-1, 8, -1),)
    inputs = np.zeros((2, 3, 64, 96), np.float32)
    inputs.flags.writeable = False  # as it is behind HTTP and behind Ray
    (rows,) = model.infer(inputs)
    assert rows.shape == (2, 8, 8 * 12 + 4 * 6 + 2 * 3)
    for shape, sentence in (((1, 3, 64, 65), "multiples of 32"), ((1, 1, 64, 64), "batch, 3"), ((3, 64, 64), "batch, 3")):
        with pytest.raises(BadRequest, match=sentence):
            model.infer(np.zeros(shape, np.float32))
