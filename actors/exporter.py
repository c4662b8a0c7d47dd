"""Makes one engine for the cache, in a process of its own: ``python -m actors.exporter ORDER``.

    ORDER (settings, plan, folder) ─ YOLO.export ─→ the export ─ verify, or mAP for int8 ─→ manifest.json, written last

The process takes little of the CPU if a replica is answering beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.engines import MANIFEST, Made, Plan
from actors.errors import BadImage, BadSource, FleetError, ModelError
from actors.evaluate import Label, evaluate, yolo_labels
from actors.hardware import available_cpus
from actors.images import decode_image
from actors.model import Model, YoloModel
from actors.predictor import exported
from actors.schemas import PredictParams
from actors.settings import ImageLimits, ModelSettings
from actors.verify import CLOSE, EXACT, verify
from actors.writers import row

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
CALIBRATION_IMAGES = 300  # as many as Ultralytics recommends
SCORED_IMAGES = 128
SCORE_CONF = 0.001  # as YOLO.val has it
MAX_LOSS = 0.05  # of mAP50-95: beyond it the quantization has failed, rather than cost something
SEED = 0  # of the order of the calibration images, on which the fit depends: by itself torch takes another in each process
OWN_CONF = 0.25  # from which on the original's detections stand for labels, where there are none

Image = NDArray[np.uint8]


def make(settings: ModelSettings, plan: Plan, folder: Path) -> None:
    """Export, check, and write the manifest.

    Raises:
        ModelError: these weights cannot be exported to this engine.
    """
    threads = available_cpus()
    original = YoloModel(settings, threads)
    if original.adjustable_head:
        raise ModelError(
            "these weights have an end-to-end head, which takes max_det and agnostic_nms from each request;"
            " an export would have them fixed"
        )
    calibration = _images_in(Path(settings.calibrate)) if settings.calibrate else []
    file = None if plan.engine == "torch" else _export(original, settings, plan, folder, calibration)
    made = YoloModel(
        settings, threads, Made(plan, None if file is None else folder / file, agrees=True, verdict="", numbers={})
    )
    if plan.precision == "int8":
        agrees, verdict, numbers = _scored(original, made, calibration[:SCORED_IMAGES])
    else:
        tolerance = EXACT if plan.precision == "fp32" else CLOSE
        compared = verify(original, made, _photographs(), tolerance)
        agrees, verdict, numbers = compared.agrees, compared.sentence, compared.as_dict()
    manifest = {"file": file, "agrees": agrees, "verdict": verdict, "numbers": numbers, "plan": asdict(plan)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _export(model: YoloModel, settings: ModelSettings, plan: Plan, folder: Path, calibration: Sequence[Path]) -> str:
    """Export into ``folder``; returns the name there."""
    from ultralytics.utils.torch_utils import init_seeds

    weights = folder / "model.pt"
    weights.symlink_to(Path(settings.weights).resolve())
    data = _dataset(model, folder, calibration) if plan.precision == "int8" else None
    init_seeds(SEED)
    path = exported(
        weights,
        engine=plan.engine,
        precision=plan.precision,
        imgsz=model.info.imgsz,
        batch=max(settings.max_batch, 2) if plan.engine == "tensorrt" else 1,  # two are verified together
        data=data,
    )
    weights.unlink()
    shutil.rmtree(folder / "calibration", ignore_errors=True)
    return path.relative_to(folder).as_posix()


def _dataset(model: YoloModel, folder: Path, calibration: Sequence[Path]) -> Path:
    """The calibration images as one of Ultralytics' datasets, linked, since Ultralytics writes beside what it reads."""
    if model.info.task not in ("detect", "segment", "pose"):
        raise ModelError(f"int8 cannot be judged for the task '{model.info.task}': use fp32 or fp16")
    if not calibration:
        raise ModelError("there is no image in the folder that 'calibrate' names")
    images = folder / "calibration" / "images"
    images.mkdir(parents=True)
    for number, path in enumerate(calibration):
        (images / f"{number:05}{path.suffix.lower()}").symlink_to(path.resolve())
    described = {"path": str(images.parent), "train": "images", "val": "images", "names": model.info.names}
    if model.info.kpt_shape:
        described["kpt_shape"] = list(model.info.kpt_shape)
    data = folder / "calibration" / "data.yaml"
    data.write_text(json.dumps(described))  # JSON is YAML
    return data


def _images_in(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES)
    return list(islice(found, CALIBRATION_IMAGES))


def _photographs() -> list[Image]:
    """Those that come with Ultralytics: one upright, one lying."""
    from ultralytics.utils import ASSETS

    return [decode_image(path.read_bytes(), ImageLimits()) for path in sorted(Path(ASSETS).glob("*.jpg"))]


def _scored(original: Model, made: Model, images: Sequence[Path]) -> tuple[bool, str, dict[str, Any]]:
    """What int8 loses of mAP50-95: on labels beside the images, else taking the original's detections for labels."""
    before, after = _rows(original, images), _rows(made, images)
    try:
        reference, by = evaluate(before, yolo_labels).map50_95, "labels"
        scored = evaluate(after, yolo_labels).map50_95
    except BadSource:  # there are none
        own = {one["uri"]: [_label(found) for found in one["detections"] if found["confidence"] >= OWN_CONF] for one in before}
        try:
            reference, by = evaluate(before, lambda one: own[one["uri"]]).map50_95, "detections of the original"
            scored = evaluate(after, lambda one: own[one["uri"]]).map50_95
        except BadSource:
            raise ModelError("the calibration images have no labels, and the original finds nothing in them") from None
    loss = reference - scored
    verdict = f"int8 loses {loss:.4f} of mAP50-95 ({reference:.4f}) on {len(before)} calibration images, by {by}"
    numbers = {"map50_95_original": reference, "map50_95": scored, "loss": loss, "images": len(before), "by": by}
    return loss <= MAX_LOSS, verdict, numbers


def _label(found: dict[str, Any]) -> Label:
    return Label(found["class_id"], (found["x1"], found["y1"], found["x2"], found["y2"]))


def _rows(model: Model, images: Sequence[Path]) -> list[dict[str, Any]]:
    params = PredictParams(conf=SCORE_CONF, multi_label=model.info.task == "detect", rect=False)
    rows = []
    for path in images:
        try:
            image = decode_image(path.read_bytes(), ImageLimits())
        except BadImage:
            continue
        (result,) = model.predict([model.prepare(image, params)])
        rows.append(row(str(path), "", model.info.name, result))
    return rows


def main(order: str) -> None:
    """Make what the JSON ``order`` asks for; an expected error is one line on stderr and exit status 1."""
    given = json.loads(order)
    os.nice(given["niceness"])
    try:
        make(ModelSettings.model_validate(given["settings"]), Plan(**given["plan"]), Path(given["folder"]))
    except FleetError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main(sys.argv[1])
