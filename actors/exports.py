"""Committed rows → the formats of others. Made at the end of a job, in one streaming pass each, from the Parquet files alone.

    jsonl   detections.jsonl   one row of writers.SCHEMA a line
    coco    coco.json          COCO's object detection: images, annotations (with their score), categories
    yolo    yolo/labels/…      Ultralytics' labels, a .txt an image in the tree of the inputs; yolo/data.yaml has the names
    mot     mot/…              MOTChallenge's results, a .txt a tracked video; made in ``actors.tracks``

Each is made aside and published in one step (in a bucket, ``yolo/`` file by file). The classes of whole images have no place
in COCO's and YOLO's formats and are left out. Sources: https://cocodataset.org/#format-data and
https://docs.ultralytics.com/datasets/ (detect, segment, pose, obb).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from actors.ledger import DETECTIONS, Ledger
from actors.results import read_names, read_rows

Row = dict[str, Any]
Rows = Callable[[], Iterator[Row]]


@dataclass(frozen=True, slots=True)
class Export:
    """One format: the file or folder it becomes in the output, and what writes it to a path."""

    name: str
    write: Callable[[Rows, dict[int, str], Path], None]


def export(kind: str, ledger: Ledger, folder: str = DETECTIONS) -> None:
    """Make one of ``EXPORTS`` from the rows that are committed in ``folder``.

    Raises:
        OSError: it cannot be written.
    """
    chosen, root = EXPORTS[kind], ledger.storage.root
    names = read_names(root)
    ledger.place(chosen.name, lambda made: chosen.write(lambda: read_rows(root, folder), names, made))


def write_jsonl(rows: Rows, names: dict[int, str], path: Path) -> None:
    """One JSON object a line, with the fields of ``writers.SCHEMA``."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows())


def write_coco(rows: Rows, names: dict[int, str], path: Path) -> None:
    """A COCO file. Category ids are the model's class ids; ``file_name`` is the input's path below all inputs' folder."""
    folder = _common_folder(rows())
    seen = dict(names)

    def images() -> Iterator[Row]:
        for number, row in enumerate(rows(), 1):
            name = "/".join(_parts(row["uri"])[folder:])
            yield {"id": number, "file_name": name, "width": row["width"], "height": row["height"], "uri": row["uri"]}

    def annotations() -> Iterator[Row]:
        number = 0
        for image, row in enumerate(rows(), 1):
            for found in row["detections"]:
                seen.setdefault(found["class_id"], found["name"])
                if annotation := _coco_annotation(found):
                    number += 1
                    yield {"id": number, "image_id": image, **annotation}

    with path.open("w", encoding="utf-8") as file:
        for opening, items in (('{"images": [', images()), ('], "annotations": [', annotations())):
            file.write(opening)
            file.writelines(_separated(items))
        categories = [{"id": class_id, "name": name} for class_id, name in sorted(seen.items())]
        file.write(f'], "categories": {json.dumps(categories)}}}\n')


def write_yolo(rows: Rows, names: dict[int, str], path: Path) -> None:
    """A folder of labels. Where two inputs differ in their suffix only, the second keeps it: ``a.txt``, ``a.png.txt``."""
    folder = _common_folder(rows())
    seen = dict(names)
    for row in rows():
        seen.update({found["class_id"]: found["name"] for found in row["detections"]})
        image = path.joinpath("labels", *_parts(row["uri"])[folder:])
        image.parent.mkdir(parents=True, exist_ok=True)
        label = image.with_suffix(".txt")
        if label.exists():
            label = image.with_name(f"{image.name}.txt")
        label.write_text("".join(_yolo_line(found, row["width"], row["height"]) for found in row["detections"]))
    (path / "data.yaml").write_text(json.dumps({"names": dict(sorted(seen.items()))}, indent=2) + "\n")  # JSON is YAML


EXPORTS = {
    "jsonl": Export("detections.jsonl", write_jsonl),
    "coco": Export("coco.json", write_coco),
    "yolo": Export("yolo", write_yolo),
}
MOT = "mot"
FORMATS = ("parquet", *EXPORTS, MOT)


def _coco_annotation(found: Row) -> Row | None:
    points = _outline(found)
    if not points:
        return None
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    top, bottom = min(y for _, y in points), max(y for _, y in points)
    annotation = {
        "category_id": found["class_id"],
        "bbox": [left, top, right - left, bottom - top],
        "area": _area(points),
        "iscrowd": 0,
        "score": found["confidence"],
    }
    if len(points) > 2:
        annotation["segmentation"] = [list(chain.from_iterable(points))]
    if (skeleton := found["keypoints"]) is not None:
        seen = [2 if visible > 0.5 else 0 for visible in skeleton["visible"] or [1.0] * len(skeleton["x"])]
        annotation["keypoints"] = list(chain.from_iterable(zip(skeleton["x"], skeleton["y"], seen, strict=True)))
        annotation["num_keypoints"] = sum(value > 0 for value in seen)
    return annotation


def _yolo_line(found: Row, width: int, height: int) -> str:
    points = _outline(found)
    if not points:
        return ""
    if len(points) > 2:
        values = [value for x, y in points for value in (x / width, y / height)]
    else:
        (left, top), (right, bottom) = points
        middle = ((left + right) / 2 / width, (top + bottom) / 2 / height)
        values = [*middle, (right - left) / width, (bottom - top) / height]
    if (skeleton := found["keypoints"]) is not None:
        for x, y, visible in zip(skeleton["x"], skeleton["y"], skeleton["visible"] or [1.0] * len(skeleton["x"]), strict=True):
            values += [x / width, y / height, 2.0 if visible > 0.5 else 0.0]
    return f"{found['class_id']} {' '.join(f'{value:.6g}' for value in values)}\n"


def _outline(found: Row) -> list[tuple[float, float]]:
    """The polygon of a mask or of an oriented box, the two corners of a plain box, nothing for a whole image's class."""
    for key in ("segments", "corners"):
        if found[key] is not None and len(found[key]["x"]) > 2:
            return list(zip(found[key]["x"], found[key]["y"], strict=True))
    return [] if found["x1"] is None else [(found["x1"], found["y1"]), (found["x2"], found["y2"])]


def _area(points: list[tuple[float, float]]) -> float:
    """Square pixels: of a plain box given by two corners, else of the polygon."""
    if len(points) == 2:
        (left, top), (right, bottom) = points
        return (right - left) * (bottom - top)
    following = [*points[1:], points[0]]
    return abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(points, following, strict=True))) / 2


def _parts(uri: str) -> list[str]:
    """A URI as the names of folders and a file, a container being a folder; none of them leads upwards."""
    return [part for part in uri.replace("#", "/").split("/") if part not in {"", ".", ".."}]


def _common_folder(rows: Iterable[Row]) -> int:
    """How many leading parts all inputs share."""
    shared: list[str] | None = None
    for row in rows:
        folder = _parts(row["uri"])[:-1]
        if shared is None:
            shared = folder
        shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(shared, folder, strict=False))]
    return len(shared or [])


def _separated(items: Iterable[Row]) -> Iterator[str]:
    for number, item in enumerate(items):
        yield f"{',' if number else ''}\n{json.dumps(item)}"
