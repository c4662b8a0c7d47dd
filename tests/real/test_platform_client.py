"""The unmodified Ultralytics Platform SDK and its command line against a live endpoint, compared with ``YOLO.predict``.

Whoever uses them changes the address and nothing else.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import httpx
import pytest
import ultralytics
from ultralytics_platform import APIError, AsyncPlatform, Platform

from actors.images import decode_image, encode_jpeg
from actors.settings import ImageLimits
from tests.conftest import ASSETS
from tests.real.test_coco128 import assert_same, reference

pytestmark = [
    pytest.mark.real,
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(300),
]

MODELS = {"yolo26n": "detect", "yolo11n-seg": "segment", "yolov8n-pose": "pose", "yolo11n-cls": "classify"}
CLIP_FRAMES = 10


@pytest.fixture(scope="module")
def images(coco128: Path) -> list[Path]:
    return sorted(coco128.glob("*.jpg"))[:8]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first frames of the traffic video as a file of their own."""
    source = cv2.VideoCapture(str(ASSETS / "data" / "traffic.mp4"))
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 24, (720, 1280))
    for _ in range(CLIP_FRAMES):
        found, frame = source.read()
        assert found and frame.shape == (1280, 720, 3)
        writer.write(frame)
    writer.release()
    source.release()
    return path


@pytest.mark.client
@pytest.mark.parametrize("name", MODELS)
def test_the_sdk_gets_what_yolo_predict_gives(name: str, address: str, weights: Path, images: list[Path]) -> None:
    expected = reference(weights / f"{name}.pt", images, conf=0.4)
    with Platform(base_url=address, api_key="ul_any", timeout=120) as platform:

        def ask(image: Path) -> Any:
            with image.open("rb") as file:
                return platform.models.predict("me", "project", name, body={"file": file, "conf": 0.4})

        with ThreadPoolExecutor(4) as callers:
            answers = list(callers.map(ask, images))
    for image, answer, results in zip(images, answers, expected, strict=True):
        assert_same(answer["images"][0]["results"], results, image.name)
        metadata = answer["metadata"]
        assert (metadata["imageCount"], metadata["task"], metadata["model"]) == (1, MODELS[name], name)
        assert all(metadata["classNames"][found["class"]] == found["name"] for found in results)
    assert any(expected)


@pytest.mark.parametrize("name", MODELS)
async def test_the_asynchronous_sdk_and_a_deployment_by_its_name(
    name: str, address: str, weights: Path, images: list[Path]
) -> None:
    (expected,) = reference(weights / f"{name}.pt", images[:1], imgsz=320)
    async with AsyncPlatform(base_url=address, api_key="ul_any", timeout=120) as platform:
        body = {"file": BytesIO(images[0].read_bytes()), "imgsz": 320, "normalize": False, "bits": 8}
        answer = await platform.deployments.predict("me", name, body=body)
    assert_same(answer["images"][0]["results"], expected, name)  # type: ignore[arg-type]


def test_the_sdk_normalises_rounds_and_takes_base64(address: str, weights: Path, images: list[Path]) -> None:
    import base64

    model = ultralytics.YOLO(str(weights / "yolo26n.pt"))
    expected = model.predict(str(images[0]), verbose=False)[0].summary(normalize=True, decimals=3)
    source = base64.b64encode(images[0].read_bytes()).decode()
    with Platform(base_url=address, api_key="ul_any", timeout=120) as platform:
        body = {"source": source, "normalize": True, "decimals": 3}
        answer = platform.models.predict("me", "project", "yolo26n", body=body)
    found = answer["images"][0]["results"]
    assert [item["class"] for item in found] == [item["class"] for item in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["box"] == pytest.approx(other["box"], abs=2e-3)  # half a pixel of some 300, and the last place


def test_the_sdk_shows_the_servers_sentence(address: str, images: list[Path]) -> None:
    with Platform(base_url=address, api_key="ul_any", timeout=120) as platform:
        with pytest.raises(APIError) as raised:
            platform.models.predict("me", "project", "nope", body={"file": BytesIO(images[0].read_bytes())})
        assert raised.value.status_code == 404 and "served are" in raised.value.json["error"]
        with pytest.raises(APIError) as raised:
            platform.models.predict("me", "project", "yolo26n", body={"file": BytesIO(b"hello")})
        assert raised.value.status_code == 400 and raised.value.request_id


def run(address: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``ul …`` as a user runs it, with the endpoint's address in its environment and no saved key."""
    environment = os.environ | {
        "ULTRALYTICS_PLATFORM_URL": address,
        "ULTRALYTICS_API_KEY": "ul_any",
        "YOLO_CONFIG_DIR": str(folder / "config"),
        "YOLO_AUTOINSTALL": "false",
        "YOLO_OFFLINE": "true",
    }
    command = [sys.executable, "-m", "ultralytics_platform.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=170, check=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_line_predicts_and_saves(
    name: str, address: str, weights: Path, images: list[Path], tmp_path: Path
) -> None:
    references = zip(images, reference(weights / f"{name}.pt", images), strict=True)
    image, expected = next(pair for pair in references if pair[1])
    (tmp_path / "config").mkdir()
    done = run(
        address,
        tmp_path,
        *("cloud", "predict", f"model=ul://me/project/{name}", f"source={image}", f"save_dir={tmp_path / 'out'}"),
        *("save=False", "save_txt=True"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((tmp_path / "out" / "results.json").read_text())
    assert_same(answer["images"][0]["results"], expected, name)
    labels = (tmp_path / "out" / "labels" / f"{image.stem}.txt").read_text().splitlines()
    assert len(labels) == len(expected)
    assert expected[0]["name"] in done.stdout


def test_the_command_line_finds_official_weights_by_their_file_name(
    address: str, weights: Path, images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "config").mkdir()
    out = f"save_dir={tmp_path / 'out'}"
    done = run(address, tmp_path, "cloud", "predict", "model=yolo26n.pt", f"source={images[0]}", out)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = decode_image((tmp_path / "out" / images[0].name).read_bytes(), ImageLimits())
    assert drawn.shape == decode_image(images[0].read_bytes(), ImageLimits()).shape
    done = run(address, tmp_path, "cloud", "predict", "model=ul://me/project/nope", f"source={images[0]}", out)
    assert done.returncode == 1 and "served are yolo26n" in done.stderr


def test_the_command_line_calls_operations_without_an_owner(
    address: str, weights: Path, images: list[Path], tmp_path: Path
) -> None:
    (expected,) = reference(weights / "yolo26n.pt", images[:1], conf=0.5)
    (tmp_path / "config").mkdir()
    body = json.dumps({"file": f"@{images[0]}", "conf": 0.5})
    done = run(address, tmp_path, "cloud", "models", "predict", "project=any", "model=yolo26n", f"body={body}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(json.loads(done.stdout)["images"][0]["results"], expected, "yolo26n")


@pytest.mark.parametrize("stride", [1, 3])
def test_a_video_equals_yolo_predict_on_the_same_file_frame_by_frame(
    address: str, weights: Path, clip: Path, stride: int
) -> None:
    model = ultralytics.YOLO(str(weights / "yolo26n.pt"))
    expected = [result.summary() for result in model.predict(str(clip), stream=True, verbose=False, vid_stride=stride)]
    assert len(expected) == CLIP_FRAMES // stride and any(expected)
    with Platform(base_url=address, api_key="ul_any", timeout=120) as platform, clip.open("rb") as file:
        answer = platform.models.predict("me", "project", "yolo26n", body={"file": file, "vid_stride": stride})
    assert answer["metadata"]["imageCount"] == len(expected)
    for number, (image, results) in enumerate(zip(answer["images"], expected, strict=True), 1):
        assert image["shape"] == [1280, 720] and image["frame"] == number * stride  # type: ignore[typeddict-item]
        assert_same(image["results"], results, f"frame {number * stride}")  # type: ignore[arg-type]
    fields = {"model": "yolo26n", "vid_stride": str(stride)}
    headers = {"accept": "application/x-ndjson"}
    request = {"url": f"{address}/predict", "data": fields, "headers": headers, "files": {"file": clip.read_bytes()}}
    with httpx.stream("POST", timeout=120, **request) as response:  # type: ignore[arg-type]
        lines = [json.loads(line) for line in response.iter_lines()]
    assert [line["frame"] for line in lines] == [stride * (1 + at) for at in range(len(expected))]
    for line, results in zip(lines, expected, strict=True):
        assert_same(line["results"], results, f"frame {line['frame']}")


def test_the_command_line_predicts_a_video(address: str, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    arguments = [
        "model=ul://me/project/yolo26n",
        f"source={clip}",
        f"save_dir={tmp_path / 'out'}",
        "save=False",
        "save_txt=True",
    ]
    done = run(address, tmp_path, "cloud", "predict", *arguments, "vid_stride=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "out" / "labels").iterdir())) == CLIP_FRAMES // 5


@pytest.mark.parametrize("name", MODELS)
def test_the_picture_is_what_ultralytics_plots(name: str, address: str, weights: Path, images: list[Path]) -> None:
    """But for the holes in masks, which an outline does not have, and for lines whose coordinates are rounded otherwise."""
    model = ultralytics.YOLO(str(weights / f"{name}.pt"))
    alone = ((image, model.predict(str(image), verbose=False)[0]) for image in images)  # a list would be letterboxed otherwise
    image, result = next((image, result) for image, result in alone if result.summary())
    response = httpx.post(
        f"{address}/predict",
        files={"file": image.read_bytes()},
        data={"model": name},
        headers={"accept": "image/jpeg"},
        timeout=120,
    )
    drawn = decode_image(response.content, ImageLimits()).astype(int)
    assert abs(drawn - result.orig_img).max() > 60, "something is drawn"
    if name != "yolo11n-cls":  # whose font the reference would download
        plotted = decode_image(encode_jpeg(result.plot()), ImageLimits())
        different = (abs(drawn - plotted) > 30).any(axis=2)
        assert different.mean() < (0.04 if MODELS[name] == "segment" else 0.01)


@pytest.mark.parametrize("path", ["/", "/v1/predict/yolo11n-seg"])
def test_the_clients_of_ultralytics_hub(path: str, address: str, weights: Path, images: list[Path]) -> None:
    (expected,) = reference(weights / "yolo11n-seg.pt", images[:1], iou=0.45)
    data = {"imgsz": 640, "conf": 0.25, "iou": 0.45}
    if path == "/":
        data |= {"model": "https://hub.ultralytics.com/models/yolo11n-seg"}  # type: ignore[dict-item]
    with images[0].open("rb") as file:
        response = httpx.post(address + path, headers={"x-api-key": "any"}, data=data, files={"file": file}, timeout=120)
    assert response.status_code == 200, response.text
    assert_same(response.json()["images"][0]["results"], expected, path)
