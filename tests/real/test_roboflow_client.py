"""The unmodified ``inference-sdk`` against a live endpoint: its answers are those of ``YOLO.predict`` on the same files.

By default the client sends a file's own bytes, so that both see the same pixels. Only where it is told to scale images down
(``client_downsizing_disabled=False``) it encodes them anew, and then nothing is equal, but everything is close.
"""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ultralytics

from tests.conftest import REPOSITORY
from tests.real.conftest import WEIGHTS

pytestmark = [
    pytest.mark.real,
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(300),
]

SDK = "inference-sdk==1.8.3"  # in an environment of its own: its opencv-python and our headless one exclude each other
MODELS = {
    "yolo26n": "object-detection",
    "yolo11n-seg": "instance-segmentation",
    "yolov8n-pose": "keypoint-detection",
    "yolo11n-cls": "classification",
}
Step = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def images(coco128: Path) -> list[str]:
    return [str(image) for image in sorted(coco128.glob("*.jpg"))[:6]]


def talk(address: str, *conversations: list[Step], api_key: str = "x") -> list[list[Any]]:
    """What the client's calls return, step by step; see ``tests/real/clients/roboflow_client.py``."""
    script = REPOSITORY / "tests" / "real" / "clients" / "roboflow_client.py"
    command = [
        "uv",
        "run",
        "-q",
        "--no-project",
        "--isolated",
        "--python",
        sys.executable,
        "--with",
        SDK,
        "python",
        str(script),
    ]
    work = json.dumps({"address": address, "api_key": api_key, "conversations": conversations})
    done = subprocess.run(command, input=work, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[list[Any]] = json.loads(done.stdout)
    return answers


def reference(weights: Path, name: str, images: list[str], **params: Any) -> list[list[dict[str, Any]]]:
    """``Results.summary()`` of each image, one at a time, with Roboflow's default thresholds."""
    model = ultralytics.YOLO(str(weights / f"{name}.pt"))
    return [model.predict(image, verbose=False, **({"conf": 0.4, "iou": 0.3} | params))[0].summary() for image in images]


def assert_same(answer: dict[str, Any], expected: list[dict[str, Any]], image: str) -> None:
    """Same count and classes, confidence within 1e-3, every coordinate within half a pixel."""
    height, width = pixels(image).shape[:2]
    assert answer["image"] == {"width": width, "height": height}
    found = answer["predictions"]
    assert [(item["class_id"], item["class"]) for item in found] == [(item["class"], item["name"]) for item in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-3)
        if "box" in other:
            box = {"x1": one["x"] - one["width"] / 2, "x2": one["x"] + one["width"] / 2}
            box |= {"y1": one["y"] - one["height"] / 2, "y2": one["y"] + one["height"] / 2}
            assert box == pytest.approx(other["box"], abs=0.5)
        for ours, theirs in (("points", "segments"), ("keypoints", "keypoints")):
            assert (ours in one) == (theirs in other)
            for axis in ("x", "y") if theirs in other else ():
                assert [point[axis] for point in one[ours]] == pytest.approx(other[theirs][axis], abs=0.5)
        if "keypoints" in other:
            assert [point["confidence"] for point in one["keypoints"]] == pytest.approx(
                other["keypoints"]["visible"], abs=1e-3
            )


@pytest.mark.client
@pytest.mark.parametrize("name", MODELS)
def test_both_versions_of_the_api_answer_as_yolo_predict(name: str, address: str, weights: Path, images: list[str]) -> None:
    model_id = f"{name}/1"
    lowest = {"confidence_threshold": 0.0} if "cls" in name else {}  # all five classes
    v1: list[Step] = [
        ("configure", lowest),
        ("infer", {"inference_input": images[0], "model_id": model_id}),
        ("configure", lowest | {"max_batch_size": 4}),  # two requests, one with a list of 4, one with a list of 2
        ("infer", {"inference_input": images, "model_id": model_id}),
        ("infer_async", {"inference_input": images, "model_id": name}),
    ]
    v0: list[Step] = [
        ("select_api_v0", {}),
        ("configure", lowest | {"max_concurrent_requests": 3}),
        ("select_model", {"model_id": model_id}),
        ("infer", {"inference_input": images[0]}),
        ("infer", {"inference_input": images}),
        ("infer_async", {"inference_input": images}),
    ]
    (_, one, _, several, by_name), (*_, v0_one, v0_several, v0_async) = talk(address, v1, v0)
    expected = reference(weights, name, images)
    assert any(expected)
    for answers in ([one], several, by_name, [v0_one], v0_several, v0_async):
        assert len(answers) in (1, len(images))
        for answer, results, image in zip(answers, expected, images, strict=False):
            assert "raised" not in answer, answer
            assert_same(answer, results, image)
            if "cls" in name:
                assert answer["top"] == results[0]["name"]
                assert answer["confidence"] == pytest.approx(results[0]["confidence"], abs=1e-3)
            elif results:
                assert answer["supervision"] == {"count": len(results), "masks": "seg" in name}


def test_the_clients_thresholds_are_those_of_yolo_predict(address: str, weights: Path, images: list[str]) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"confidence_threshold": 0.1, "iou_threshold": 0.7}, {"conf": 0.1, "iou": 0.7}),
        ({"confidence_threshold": 0.1, "max_detections": 2}, {"conf": 0.1, "max_det": 2}),
        ({"confidence_threshold": 0.1, "class_filter": ["bowl", "person"]}, {"conf": 0.1, "classes": [0, 45]}),
        ({"confidence_threshold": 0.05, "class_agnostic_nms": True}, {"conf": 0.05, "agnostic_nms": True}),
    ]
    infer = ("infer", {"inference_input": images, "model_id": "yolo26n/1"})
    conversations: list[list[Step]] = [[("configure", configuration), infer] for configuration, _ in cases]
    conversations += [[("select_api_v0", {}), *conversation] for conversation in conversations[:2]]
    answers = [results[-1] for results in talk(address, *conversations)]
    counts = set()
    for (_, params), answered in zip([*cases, *cases[:2]], answers, strict=True):
        expected = reference(weights, "yolo26n", images, **params)
        counts.add(sum(map(len, expected)))
        for answer, results, image in zip(answered, expected, images, strict=True):
            assert_same(answer, results, image)
    assert len(counts) == len(cases)  # each case has an effect of its own


def test_the_registry_and_the_sentences_of_refusals_reach_the_user(address: str, images: list[str]) -> None:
    infer = {"inference_input": images[0]}
    (listed, loaded, description, unknown, removed, cleared, info, confused, text, missing) = talk(
        address,
        [
            ("list_loaded_models", {}),
            ("load_model", {"model_id": "yolo26n/7", "set_as_default": True}),
            ("get_model_description", {"model_id": "yolov8n-pose/1"}),
            ("load_model", {"model_id": "soccer-players/3"}),
            ("unload_model", {"model_id": "yolo26n/1"}),
            ("unload_all_models", {}),
            ("get_server_info", {}),
            ("infer", infer | {"model_id": "soccer-players/3"}),
            ("infer", {"inference_input": __file__}),
            ("infer", infer),
        ],
    )[0]
    tasks = {model["model_id"].removesuffix("/1"): model["task_type"] for model in listed["models"]}
    assert (set(tasks), tasks | MODELS) == (set(WEIGHTS), tasks)
    assert len(loaded["models"]) == len(WEIGHTS) + 1
    assert (description["task_type"], description["input_height"], description["input_width"]) == (
        "keypoint-detection",
        640,
        640,
    )
    for refused in (unknown, confused):
        assert refused["raised"] == "HTTPCallErrorError" and "There is no model 'soccer-players'" in refused["message"]
    for refused in (removed, cleared):
        assert refused["raised"] == "HTTPCallErrorError" and "change the server's configuration" in refused["message"]
    assert info["name"] == "yolofleet"
    assert text["raised"] == "HTTPCallErrorError" and "not an image" in text["message"]
    assert missing["predictions"]  # the default model is still selected: yolo26n/7


@pytest.fixture
def large(images: list[str], tmp_path: Path) -> str:
    """A picture of three times the size, which the model does not see as it is."""
    path = str(tmp_path / "large.png")
    cv2.imwrite(path, cv2.resize(pixels(images[0]), None, fx=3, fy=3))
    return path


def test_boxes_are_in_the_pixels_of_an_image_that_the_client_scales_down(address: str, weights: Path, large: str) -> None:
    configure: Step = ("configure", {"client_downsizing_disabled": False})
    ((_, answer),) = talk(address, [configure, ("infer", {"inference_input": large, "model_id": "yolo26n/1"})])
    height, width = pixels(large).shape[:2]
    assert answer["image"] == {"width": width, "height": height}
    (expected,) = reference(weights, "yolo26n", [large], conf=0.6)
    assert expected
    for result in expected:
        x, y = (sum(result["box"][f"{axis}{end}"] for end in (1, 2)) / 2 for axis in "xy")
        same = [found for found in answer["predictions"] if found["class"] == result["name"]]
        assert min(np.hypot(found["x"] - x, found["y"] - y) for found in same) < 15


def test_annotated_pictures(address: str, large: str) -> None:
    infer: Step = ("infer", {"inference_input": large, "model_id": "yolo26n/1"})
    v1, v0 = talk(
        address,
        [("configure", {"visualize_predictions": True}), infer],
        [("select_api_v0", {}), ("configure", {"format": "image", "visualize_labels": True, "stroke_width": 2}), infer],
    )
    assert v1[-1]["predictions"] and "predictions" not in v0[-1]
    original = pixels(large)
    for answer in (v1[-1], v0[-1]):
        drawn = cv2.imdecode(np.frombuffer(base64.b64decode(answer["visualization"]), np.uint8), cv2.IMREAD_COLOR)
        assert drawn is not None and drawn.shape == original.shape
        assert np.abs(drawn.astype(int) - original).max() > 100  # something is drawn


def pixels(path: str) -> Any:
    return cv2.imread(path)
