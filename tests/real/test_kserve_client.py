"""The unmodified ``tritonclient[http]``, and through it ``ultralytics.YOLO`` itself, against a live endpoint."""

import ast
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ultralytics
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tests.real.conftest import WEIGHTS
from tests.real.test_coco128 import assert_same, reference

pytestmark = [
    pytest.mark.real,
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(300),
]

TASKS = {"yolo26n": "detect", "yolo11n-seg": "segment", "yolov8n-pose": "pose", "yolo11n-cls": "classify"}


@pytest.fixture(scope="module")
def images(coco128: Path) -> list[Path]:
    return sorted(coco128.glob("*.jpg"))[:6]


@pytest.fixture
def client(address: str) -> Iterator[InferenceServerClient]:
    made = InferenceServerClient(address.removeprefix("http://"), network_timeout=120, connection_timeout=120)
    yield made
    made.close()


def files_input(images: list[Path], binary: bool = True) -> InferInput:
    files = [image.read_bytes() if binary else base64.b64encode(image.read_bytes()) for image in images]
    made = InferInput("encoded_images", [len(files)], "BYTES")
    return made.set_data_from_numpy(np.array(files, dtype=object), binary_data=binary)


@pytest.mark.client
@pytest.mark.parametrize("name", TASKS)
def test_a_remote_yolo_answers_as_the_local_weights(name: str, address: str, weights: Path, images: list[Path]) -> None:
    expected = reference(weights / f"{name}.pt", images)
    remote = ultralytics.YOLO(f"{address}/{name}", task=TASKS[name])
    for image, local in zip(images, expected, strict=True):
        assert_same(remote.predict(str(image), verbose=False)[0].summary(), local, image.name)
    assert any(expected)


def test_a_remote_yolo_keeps_its_callers_arguments(address: str, weights: Path, images: list[Path]) -> None:
    """A smaller size, other thresholds and several images at once, which the client letterboxes to squares."""
    params: dict[str, Any] = {"imgsz": 320, "conf": 0.1, "classes": [0, 45, 49]}
    expected = reference(weights / "yolo26n.pt", images, **params)
    remote = ultralytics.YOLO(f"{address}/yolo26n", task="detect")
    for image, local in zip(images, expected, strict=True):
        assert_same(remote.predict(str(image), verbose=False, **params)[0].summary(), local, image.name)
    sources = [str(image) for image in images]
    together = ultralytics.YOLO(str(weights / "yolo26n.pt")).predict(sources, verbose=False)
    for found, local in zip(remote.predict(sources, verbose=False), together, strict=True):
        assert_same(found.summary(), local.summary(), local.path)


def test_health_metadata_configuration_and_index(client: InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata()["name"] == "yolofleet"
    index = client.get_model_repository_index()
    assert [(entry["name"], entry["version"], entry["state"]) for entry in index] == [(name, "1", "READY") for name in WEIGHTS]
    for name, task in TASKS.items():
        assert client.is_model_ready(name) and client.is_model_ready(name, "1")
        assert client.get_model_metadata(name, "1")["inputs"][1]["name"] == "encoded_images"
        metadata = ast.literal_eval(client.get_model_config(name)["parameters"]["metadata"]["string_value"])
        strides = (1, 32) if task == "classify" else (32,)  # a classifier's export has 1, and is swapped in when it is made
        assert metadata["task"] == task and metadata["stride"] in strides
        assert metadata.get("kpt_shape") == ([17, 3] if task == "pose" else None)
    assert client.get_model_config("yolo11n-seg")["output"] == [
        {"name": "output0", "data_type": "TYPE_FP32", "dims": [-1, 116, -1]},
        {"name": "output1", "data_type": "TYPE_FP32", "dims": [-1, 32, -1, -1]},
    ]
    assert not client.is_model_ready("nope") and not client.is_model_ready("yolo26n", "2")


@pytest.mark.client
@pytest.mark.parametrize("name", TASKS)
def test_encoded_images_are_answered_with_what_predict_finds(
    name: str, client: InferenceServerClient, weights: Path, images: list[Path]
) -> None:
    expected = reference(weights / f"{name}.pt", images, conf=0.4)
    for binary in (True, False):
        inputs = [files_input(images, binary)]
        answer = client.infer(name, inputs, parameters={"conf": 0.4}, request_id="7", request_compression_algorithm="gzip")
        assert answer.get_response()["id"] == "7"
        assert answer.as_numpy("num_detections").tolist() == [len(found) for found in expected]
        for number, (text, local) in enumerate(zip(answer.as_numpy("detections"), expected, strict=True)):
            assert_same(json.loads(text), local, images[number].name)
            classes = answer.as_numpy("classes")[number]
            assert classes[classes >= 0].tolist() == [found["class"] for found in local]
            if name != "yolo11n-cls":
                boxes = [list(found["box"].values()) for found in local]
                assert answer.as_numpy("boxes")[number][: len(local)] == pytest.approx(np.array(boxes).reshape(-1, 4), abs=0.5)


@pytest.mark.parametrize("binary", [True, False])
def test_raw_tensors_in_binary_and_in_json(client: InferenceServerClient, binary: bool) -> None:
    values = np.random.default_rng(0).random((2, 3, 64, 96), np.float32)
    tensor = InferInput("images", [2, 3, 64, 96], "FP32").set_data_from_numpy(values, binary_data=binary)
    wanted = [InferRequestedOutput("output1", binary_data=binary)]
    answer = client.infer("yolo11n-seg", [tensor], outputs=wanted)
    assert answer.as_numpy("output1").shape == (2, 32, 16, 24)
    assert answer.as_numpy("output0") is None


def test_a_mistake_is_raised_with_the_servers_sentence(client: InferenceServerClient) -> None:
    values = np.zeros((1, 3, 65, 64), np.float32)
    tensor = InferInput("images", [1, 3, 65, 64], "FP32").set_data_from_numpy(values)
    with pytest.raises(InferenceServerException, match=r"\[422\] The tensor is 65x64: both sides have to be multiples of 32"):
        client.infer("yolo26n", [tensor])
    with pytest.raises(InferenceServerException, match="There is no model 'nope'"):
        client.get_model_metadata("nope")
    with pytest.raises(InferenceServerException, match="configuration"):
        client.load_model("yolo26n")


def test_statistics_grow_by_what_was_answered(client: InferenceServerClient, images: list[Path]) -> None:
    (before,) = client.get_inference_statistics("yolo26n")["model_stats"]
    client.infer("yolo26n", [files_input(images)])
    (after,) = client.get_inference_statistics("yolo26n", "1")["model_stats"]
    assert after["inference_count"] - before["inference_count"] == len(images)
    assert 1 <= after["execution_count"] - before["execution_count"] <= len(images)
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert [each["name"] for each in client.get_inference_statistics()["model_stats"]] == list(WEIGHTS)
