"""What is made of committed rows: other formats, scores, tables. Held against the tools that read them."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from actors.dataset import Shard
from actors.errors import BadSource
from actors.evaluate import evaluate, labels_at
from actors.exports import EXPORTS, export
from actors.ledger import Ledger, Manifest
from actors.results import as_frame, read_names, read_rows
from actors.schemas import Detection, ImageResult, Points
from actors.storage import Storage
from actors.writers import DETECTION, SCHEMA, row
from tests.conftest import REPOSITORY
from tests.unit.test_dataset import JOB

BOX = Detection(3, "three", 0.5, (16.0, 12.0, 48.0, 36.0))
MASK = Detection(1, "one", 0.75, (0.0, 0.0, 32.0, 24.0), segments=Points((0.0, 32.0, 0.0), (0.0, 0.0, 24.0)))
SKELETON = Detection(0, "zero", 0.9, (0.0, 0.0, 64.0, 48.0), keypoints=Points((8.0, 16.0), (6.0, 12.0), (0.9, 0.1)))
ORIENTED = Detection(2, "two", 0.25, corners=Points((32.0, 64.0, 32.0, 0.0), (0.0, 24.0, 48.0, 24.0)))
WHOLE = Detection(0, "zero", 0.6)
IMAGES = {
    "/data/images/train/a.jpg": (BOX, MASK),
    "/data/images/train/a.png": (SKELETON,),
    "/data/images/val/b.jpg": (ORIENTED, WHOLE),
    "/data/images/shard.tar#../../cat/c.jpg": (),
}
NAMES = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four"}


@pytest.fixture(params=["folder", "bucket"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """Four images in two shards, in a folder and in a bucket."""
    root = tmp_path if request.param == "folder" else request.getfixturevalue("bucket")
    ledger = Ledger.open(root, JOB)
    uris = list(IMAGES)
    for some in (uris[:2], uris[2:]):
        rows = [row(uri, "f" * 64, "m", ImageResult(64, 48, "detect", IMAGES[uri])) for uri in some]
        ledger.commit(Shard(tuple(some)), rows, Manifest(len(rows)), {"names": NAMES})
    return ledger


def fetched(ledger: Ledger, name: str, folder: Path) -> Path:
    data = ledger.storage.read(name)
    assert data is not None
    (folder / "fetched").write_bytes(data)
    return folder / "fetched"


def test_jsonl_has_every_row(ledger: Ledger, tmp_path: Path) -> None:
    export("jsonl", ledger)
    lines = [json.loads(line) for line in fetched(ledger, "detections.jsonl", tmp_path).read_text().splitlines()]
    assert lines == list(read_rows(ledger.storage.root))
    assert {line["uri"] for line in lines} == set(IMAGES)


def test_coco_loads_in_pycocotools_as_truth_and_as_results(ledger: Ledger, tmp_path: Path) -> None:
    export("coco", ledger)
    file = fetched(ledger, "coco.json", tmp_path)
    coco = COCO(str(file))
    assert {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())} == NAMES
    by_name = {image["file_name"]: coco.loadAnns(coco.getAnnIds(image["id"])) for image in coco.loadImgs(coco.getImgIds())}
    assert set(by_name) == {"train/a.jpg", "train/a.png", "val/b.jpg", "shard.tar/cat/c.jpg"}
    box, mask = by_name["train/a.jpg"]
    assert (box["bbox"], box["area"], box["category_id"], box["score"]) == ([16, 12, 32, 24], 768, 3, 0.5)
    assert (mask["segmentation"], mask["area"]) == ([[0, 0, 32, 0, 0, 24]], 384)
    assert by_name["train/a.png"][0]["keypoints"] == [8, 6, 2, 16, 12, 0]
    assert by_name["val/b.jpg"][0]["bbox"] == [0, 0, 64, 48]
    assert len(coco.loadRes(json.loads(file.read_text())["annotations"]).getAnnIds()) == 4


def test_yolo_labels_lie_in_the_tree_of_the_images_and_never_above_it(ledger: Ledger, tmp_path: Path) -> None:
    export("yolo", ledger)
    read = ledger.storage.read
    assert read("yolo/labels/train/a.txt") == b"3 0.5 0.5 0.5 0.5\n1 0 0 0.5 0 0 0.5\n"
    assert read("yolo/labels/train/a.png.txt") == b"0 0.5 0.5 1 1 0.125 0.125 2 0.25 0.25 0\n"
    assert read("yolo/labels/val/b.txt") == b"2 0.5 0 1 0.5 0.5 1 0 0.5\n"
    assert read("yolo/labels/shard.tar/cat/c.txt") == b""
    assert json.loads(read("yolo/data.yaml") or b"")["names"]["4"] == "four"


def test_an_export_is_made_again_and_leaves_nothing_temporary(ledger: Ledger) -> None:
    for kind in (*EXPORTS, *EXPORTS):
        export(kind, ledger)
    ledger.finish({})
    made = {each.name for each in EXPORTS.values()}
    assert set(ledger.storage.names()) == {"job.json", "detections", "errors.jsonl", "summary.json"} | made


def test_a_frame_has_one_row_a_detection(ledger: Ledger) -> None:
    frame = as_frame(ledger.storage.root)
    assert len(frame) == 5
    assert sorted(frame["name"]) == ["one", "three", "two", "zero", "zero"]
    assert read_names(ledger.storage.root) == NAMES


def test_a_frame_without_pandas_says_what_to_install(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"yolofleet\[data\]"):
        as_frame(ledger.storage.root)


def rows_of(*images: tuple[str, tuple[Detection, ...]]) -> list[dict[str, Any]]:
    return [row(uri, "", "m", ImageResult(64, 48, "detect", found)) for uri, found in images]


COCO_LABELS = {
    "images": [{"id": 7, "file_name": "train/a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
    "categories": [{"id": 90, "name": "three"}, {"id": 91, "name": "unicorn"}],
    "annotations": [
        {"image_id": 7, "category_id": 90, "bbox": [16, 12, 32, 24]},
        {"image_id": 8, "category_id": 90, "bbox": [0, 0, 10, 10]},
        {"image_id": 8, "category_id": 91, "bbox": [0, 0, 10, 10]},
        {"image_id": 8, "category_id": 90, "bbox": [0, 0, 64, 48], "iscrowd": 1},
    ],
}


def test_labels_in_coco_and_in_yolo_score_the_same(tmp_path: Path) -> None:
    rows = rows_of(("/x/train/a.jpg", (BOX,)), ("/x/b.jpg", ()), ("/x/unlabelled.jpg", ()))
    (tmp_path / "coco.json").write_text(json.dumps(COCO_LABELS))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("3 0.5 0.5 0.5 0.5\n")
    (tmp_path / "b.txt").write_text(f"3 {5 / 64} {5 / 48} {10 / 64} {10 / 48}\n5 {5 / 64} {5 / 48} {10 / 64} {10 / 48}\n")
    scores = [evaluate(rows, labels_at(path, NAMES), NAMES) for path in (tmp_path / "coco.json", tmp_path)]
    assert scores[0] == scores[1]
    assert (scores[0].images, scores[0].labels, scores[0].by_class["three"].recall) == (3, 3, 0.5)
    assert math.isclose(scores[0].map50, (scores[0].by_class["three"].map50 + 0) / 2)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none", None, "no labels at"),
        ("odd.json", "[]", "no COCO file"),
        ("cut.json", "{", "no COCO file"),
        ("other.json", json.dumps(COCO_LABELS | {"categories": [{"id": 1, "name": "unicorn"}]}), "names have to be the same"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_with_a_sentence(
    name: str, content: str | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadSource, match=says):
        labels_at(tmp_path / name, NAMES)


def test_labels_of_no_image_and_malformed_labels_are_refused(tmp_path: Path) -> None:
    rows = rows_of(("/x/a.jpg", (BOX,)))
    with pytest.raises(BadSource, match="No image has a label"):
        evaluate(rows, labels_at(tmp_path, NAMES))
    (tmp_path / "a.txt").write_text("three in the middle\n")
    with pytest.raises(BadSource, match=r"a\.txt: 'three in the middle' is not"):
        evaluate(rows, labels_at(tmp_path, NAMES))


def test_the_documented_schema_is_the_one_that_is_written() -> None:
    page = (REPOSITORY / "docs" / "datasets.md").read_text()
    lines = page.partition("| column |")[2].splitlines()
    documented = [tuple(cell.strip(" `") for cell in line.split("|")[1:3]) for line in lines if line.startswith("| `")]
    fields = [(field.name, str(field.type)) for field in SCHEMA if field.name != "detections"]
    nested = [(f"detections.{field.name}", str(field.type)) for field in DETECTION]
    points = str(DETECTION.field("corners").type)
    assert documented == [(name, kind.replace(points, "points")) for name, kind in [*fields, *nested]]
    assert points.replace("item: ", "") in page


def test_a_bucket_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    assert Storage.at(tmp_path).root == str(tmp_path)
    assert Storage.at("relative").root == str(Path("relative").absolute())
