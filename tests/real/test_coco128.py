"""Real weights on real images: both ways in give what YOLO.predict gives, image by image.

One application serves all weights, one replica each. The reference is ``YOLO.predict`` on one image at a time in one thread.
"""

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pyarrow.dataset
import pytest
import ultralytics
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.ops import scale_boxes

from actors.evaluate import Score, evaluate, labels_at, yolo_labels
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ModelSettings
from deploy.batch import Job, JobSettings

pytestmark = [pytest.mark.real, pytest.mark.ray, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(300)]

DETECTORS = ("yolo26n", "yolo11n", "yolov8n")
OTHER_TASKS = ("yolo11n-seg", "yolov8n-pose", "yolo11n-cls")
ONE_CPU = ActorSettings(num_cpus=1)


@pytest.fixture(scope="module")
def images(coco128: Path) -> list[Path]:
    found = sorted(coco128.glob("*.jpg"))
    assert len(found) == 128
    return found


KNOWN: dict[tuple[Path, Path, str], list[dict[str, Any]]] = {}


def reference(weights: Path, images: list[Path], **params: Any) -> list[list[dict[str, Any]]]:
    """``Results.summary()`` of each image, one at a time; what other tests have asked already is remembered."""
    keys = {image: (weights, image, repr(sorted(params.items()))) for image in images}
    if new := [image for image in images if keys[image] not in KNOWN]:
        model = ultralytics.YOLO(str(weights))
        for image in new:
            KNOWN[keys[image]] = model.predict(str(image), verbose=False, **params)[0].summary()
    return [KNOWN[keys[image]] for image in images]


def ask(address: str, image: Path, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{address}/predict", files={"file": image.read_bytes()}, data=fields, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], image: str) -> None:
    """Same count and classes, confidence within 1e-3, every coordinate within half a pixel."""
    assert [item["class"] for item in found] == [item["class"] for item in expected], image
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other), image
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-3), image
        for part in {"box", "segments", "keypoints"} & set(one):
            assert set(one[part]) == set(other[part])
            for axis, values in one[part].items():
                assert values == pytest.approx(other[part][axis], abs=0.5), (image, part)


@pytest.mark.parametrize("name", ["yolo26n", *(pytest.param(name, marks=pytest.mark.long) for name in DETECTORS[1:])])
def test_every_image_through_http_and_through_the_dataset_job_equals_the_reference(
    name: str, address: str, weights: Path, images: list[Path], tmp_path: Path
) -> None:
    expected = reference(weights / f"{name}.pt", images)
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda image: ask(address, image, model=name), images))
    for image, answer, results in zip(images, answers, expected, strict=True):
        assert_same(answer["images"][0]["results"], results, image.name)
    rows = run_job(weights / f"{name}.pt", images[0].parent, tmp_path / "out", PredictParams())
    assert [row["uri"] for row in rows] == [str(image) for image in images]
    for image, row, results in zip(images, rows, expected, strict=True):
        assert_same([as_summary(item) for item in row["detections"]], results, image.name)


@pytest.mark.long
@pytest.mark.parametrize("name", OTHER_TASKS)
def test_the_other_tasks_equal_the_reference(
    name: str, address: str, weights: Path, images: list[Path], tmp_path: Path
) -> None:
    some = images[:32]
    expected = reference(weights / f"{name}.pt", some)
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda image: ask(address, image, model=name), some))
    for image, answer, results in zip(some, answers, expected, strict=True):
        assert_same(answer["images"][0]["results"], results, image.name)
        assert answer["metadata"]["task"] == name.split("-")[1].replace("seg", "segment").replace("cls", "classify")
    assert any(expected)
    copies = tmp_path / "images"
    copies.mkdir()
    for image in some:
        shutil.copy(image, copies)
    rows = run_job(weights / f"{name}.pt", copies, tmp_path / "out", PredictParams(), actors=1)
    for image, row, results in zip(some, rows, expected, strict=True):
        assert_same([as_summary(item) for item in row["detections"]], results, image.name)


def as_summary(item: dict[str, Any]) -> dict[str, Any]:
    """A struct of the Parquet file in the shape of ``Results.summary()``."""
    answer = {"name": item["name"], "class": item["class_id"], "confidence": item["confidence"]}
    if item["x1"] is not None:
        answer["box"] = {axis: item[axis] for axis in ("x1", "y1", "x2", "y2")}
    for part in ("segments", "keypoints"):
        if item[part] is not None:
            answer[part] = {axis: values for axis, values in item[part].items() if values is not None}
    return answer


def run_job(weights: Path, source: Path, out: Path, params: PredictParams, actors: int = 2) -> list[dict[str, Any]]:
    """The rows of a dataset job, sorted by URI."""
    model = ModelSettings.from_flag(str(weights))
    job = Job.open(JobSettings(sources=(str(source),), model=model, out=out, actors=actors, params=params))
    job.run(ONE_CPU, lambda progress: None)
    summary = job.finish(1.0)
    assert summary["accounted_for"] and summary["dead_letters"] == 0
    assert json.loads((out / "summary.json").read_text()) == summary
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(out / "detections").to_table().to_pylist()
    return sorted(rows, key=lambda row: str(row["uri"]))


def test_32_callers_with_8_sets_of_parameters_get_their_own_answers(address: str, weights: Path, images: list[Path]) -> None:
    sets: list[dict[str, Any]] = [
        {},
        {"conf": 0.5},
        {"conf": 0.05},
        {"conf": 0.1, "iou": 0.2},
        {"classes": [0]},
        {"max_det": 2},
        {"imgsz": 320},
        {"imgsz": 480, "conf": 0.4, "classes": [0, 2, 45]},
    ]
    some = images[:8]
    expected = [reference(weights / "yolo26n.pt", some, **params) for params in sets]
    work = list(itertools.product(range(len(sets)), range(len(some)))) * 2
    with ThreadPoolExecutor(32) as callers:
        answers = list(callers.map(lambda item: ask(address, some[item[1]], model="yolo26n", **_fields(sets[item[0]])), work))
    for (number, image), answer in zip(work, answers, strict=True):
        assert_same(answer["images"][0]["results"], expected[number][image], f"{some[image].name} with {sets[number]}")


def _fields(params: dict[str, Any]) -> dict[str, str]:
    return {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in params.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo26n", *(pytest.param(name, marks=pytest.mark.long) for name in DETECTORS[1:])])
def test_what_the_job_says_of_its_own_output_is_what_yolo_val_says(
    name: str, weights: Path, coco128: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both with square letterbox and several labels a box: ``YOLO.val``'s own rectangles are padded by half a stride.

    Both mAP are within 0.005 of it as it is; precision and recall are told at the threshold where the mean F1 is best, which
    moves among near ties, and trades one for the other by 0.007. Two things differ between ``YOLO.val`` and ``YOLO.predict``,
    which a job equals: scaling an image up (five times here), the one rounds its sides up, the other to the nearest; and the
    one leaves boxes beyond the image's border. Without them every class is within 0.005 in everything.
    """
    dataset = tmp_path / "coco128"
    for part in ("images", "labels"):  # a copy: YOLO.val writes a cache beside the labels
        shutil.copytree(coco128.parents[1] / part / "train2017", dataset / part / "train2017")
    yaml = (coco128.parents[1] / "coco128.yaml").read_text()
    (dataset / "data.yaml").write_text(f"path: {dataset}\n{yaml}")
    how = {"data": str(dataset / "data.yaml"), "imgsz": 640, "rect": False, "workers": 0, "project": str(tmp_path)}
    as_it_is = ultralytics.YOLO(str(weights / f"{name}.pt")).val(**how, plots=False, verbose=False)
    monkeypatch.setattr("ultralytics.data.base.math", SimpleNamespace(ceil=round))
    monkeypatch.setattr(DetectionValidator, "_process_batch", _within_borders(DetectionValidator._process_batch))
    alike = ultralytics.YOLO(str(weights / f"{name}.pt")).val(**how, plots=False, verbose=False)
    params = PredictParams(conf=0.001, rect=False, multi_label=True)
    rows = run_job(weights / f"{name}.pt", dataset / "images", tmp_path / "out", params)
    names = as_it_is.names
    for labels_of in (yolo_labels, labels_at(dataset / "labels", names), labels_at(as_coco(dataset, rows, names), names)):
        ours = evaluate(rows, labels_of, names)
        assert (ours.map50, ours.map50_95) == pytest.approx((as_it_is.box.map50, as_it_is.box.map), abs=0.005)
        assert (ours.precision, ours.recall) == pytest.approx((as_it_is.box.mp, as_it_is.box.mr), abs=0.01)
        assert _numbers(ours) == pytest.approx(alike.box.mean_results(), abs=0.005)
    for place, class_id in enumerate(alike.box.ap_class_index):
        score = ours.by_class.pop(names[class_id])
        assert _numbers(score) == pytest.approx(alike.box.class_result(place), abs=0.005), names[class_id]
    assert not ours.by_class


def _numbers(score: Score) -> tuple[float, float, float, float]:
    return score.precision, score.recall, score.map50, score.map50_95


def _within_borders(compare: Any) -> Any:
    """The validator's comparison of boxes with labels, in pixels of the image and cut off at its border, as in ``Results``."""

    def cut(boxes: Any, of: dict[str, Any]) -> Any:
        return scale_boxes(of["imgsz"], boxes.clone(), of["ori_shape"], of["ratio_pad"]) if len(boxes) else boxes

    def compared(self: Any, found: dict[str, Any], labels: dict[str, Any]) -> Any:
        return compare(
            self, found | {"bboxes": cut(found["bboxes"], labels)}, labels | {"bboxes": cut(labels["bboxes"], labels)}
        )

    return compared


def as_coco(dataset: Path, rows: list[dict[str, Any]], names: dict[int, str]) -> Path:
    """The dataset's labels as a COCO file, with category ids of its own."""
    boxes = [(number, label) for number, row in enumerate(rows) for label in yolo_labels(row)]
    annotations = [
        {"image_id": number, "category_id": label.class_id + 100, "bbox": [x, y, right - x, bottom - y]}
        for number, label in boxes
        for x, y, right, bottom in [label.box]
    ]
    images = [{"id": number, "file_name": Path(row["uri"]).name} for number, row in enumerate(rows)]
    categories = [{"id": class_id + 100, "name": name} for class_id, name in names.items()]
    file = dataset / "coco.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file
