"""Train the demo's own detector from nothing: `python -m deploy.demo.train`. A developer's tool, minutes on two cores.

What flows through::

    seeds → draw_scene → a YOLO data set in a temporary folder → YOLO26, half as wide as yolo26n, from random weights
    → parts.pt (fp16, no path of this machine in it) → mAP on scenes of other seeds → parts.json

Everything on the way stays in the temporary folder; only `parts.pt` and `parts.json` are left behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import yaml

from deploy.demo.scene import CLASS_NAMES, Part, draw_scene

HERE = Path(__file__).parent
ARCHITECTURE = "yolo26.yaml"
SCALE = {"p": [0.50, 0.125, 1024]}  # depth, width, most channels: yolo26n has [0.50, 0.25, 1024]

TRAIN_SEEDS = range(1200)
TRAIN_SIZES = ((480, 320), (320, 320))  # width, height; in the square one parts fill more of the picture
TEST_SEEDS = range(1_000_000, 1_000_200)
TEST_SIZES = ((480, 320), (640, 480))
TEST_IMGSZ = (320, 640)
DEFAULT_IMGSZ = 320  # what `YOLO("parts.pt").predict` uses unless told otherwise

TRAINING: dict[str, Any] = {
    "epochs": 16,
    "imgsz": 320,
    "batch": 8,
    "nbs": 8,  # step after every batch: gradients are not gathered up to the usual 64 images
    "optimizer": "AdamW",
    "lr0": 0.002,
    "lrf": 0.02,
    "cos_lr": True,
    "warmup_epochs": 1.0,
    "scale": 0.5,  # zooms by 0.5 to 1.5: with TRAIN_SIZES, parts are seen as large as at an imgsz of 160 to 720
    "flipud": 0.5,
    "close_mosaic": 4,
    "seed": 0,
    "workers": 1,
    "cache": "ram",
    "device": "cpu",
    "val": False,
    "plots": False,
}


def main() -> None:
    """Draw, train, export, measure, record."""
    options = _options()
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())  # ultralytics would make it 1
    with tempfile.TemporaryDirectory(prefix="parts-") as folder:
        os.environ["YOLO_CONFIG_DIR"] = folder  # read when ultralytics is first imported, which is below
        record = build(Path(folder), options.output, {**TRAINING, "epochs": options.epochs}, TRAIN_SEEDS[: options.scenes])
    record_file = options.output.with_suffix(".json")
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    print(record_file.read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's detector on scenes it draws itself.")
    parser.add_argument("--output", type=Path, default=HERE / "parts.pt", help="weights; the record goes beside them")
    parser.add_argument("--scenes", type=int, default=len(TRAIN_SEEDS), help="training scenes to draw")
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    return parser.parse_args()


def build(folder: Path, weights: Path, training: dict[str, Any], seeds: range) -> dict[str, Any]:
    """Train in `folder`, write `weights`, and return the record that belongs beside them."""
    started = time.perf_counter()
    draw_split(folder / "train", seeds, TRAIN_SIZES)
    draw_split(folder / "test", TEST_SEEDS, TEST_SIZES)
    data = _write_yaml(
        folder / "parts.yaml",
        {"path": str(folder), "train": "train/images", "val": "test/images", "names": dict(enumerate(CLASS_NAMES))},
    )
    drawn = time.perf_counter()
    parameters = train(folder, data, weights, training)
    trained = time.perf_counter()
    return {
        "classes": list(CLASS_NAMES),
        "architecture": {"base": ARCHITECTURE, "scale": SCALE["p"], "parameters": parameters},
        "training": training,
        "seeds": {"train": [seeds.start, seeds.stop], "test": [TEST_SEEDS.start, TEST_SEEDS.stop]},
        "seconds": {"drawing": round(drawn - started), "training": round(trained - drawn)},
        "versions": _versions(),
        "weights": {
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "bytes": weights.stat().st_size,
            "default_imgsz": DEFAULT_IMGSZ,
        },
        "measured": {f"imgsz_{size}": measure(weights, data, folder, imgsz=size) for size in TEST_IMGSZ},
        "measured_nms_free": {f"imgsz_{size}": measure(weights, data, folder, imgsz=size, nms=False) for size in TEST_IMGSZ},
    }


def draw_split(folder: Path, seeds: Iterable[int], sizes: Sequence[tuple[int, int]]) -> None:
    """Write each seed's scene as `images/SEED.jpg`, its boxes as `labels/SEED.txt`; sizes (width, height) alternate."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for seed in seeds:
        width, height = sizes[seed % len(sizes)]
        scene = draw_scene(seed, width, height)
        cv2.imwrite(str(folder / "images" / f"{seed}.jpg"), scene.image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        lines = [_label_line(part, width, height) for part in scene.parts]
        (folder / "labels" / f"{seed}.txt").write_text("\n".join(lines))


def _label_line(part: Part, width: int, height: int) -> str:
    """`class x y w h`: centre and size as shares of the image."""
    x, y = (part.x1 + part.x2) / 2 / width, (part.y1 + part.y2) / 2 / height
    return f"{part.class_id} {x:.6f} {y:.6f} {(part.x2 - part.x1) / width:.6f} {(part.y2 - part.y1) / height:.6f}"


def train(folder: Path, data: Path, weights: Path, training: dict[str, Any]) -> int:
    """Train from random weights and export to `weights`; returns the number of parameters."""
    import ultralytics
    from ultralytics.models import YOLO

    base = Path(ultralytics.__file__).parent / "cfg" / "models" / "26" / ARCHITECTURE
    architecture = yaml.safe_load(base.read_text()) | {"scales": SCALE, "scale": "p"}
    model = YOLO(_write_yaml(folder / "parts-yolo26p.yaml", architecture), task="detect")
    model.train(data=str(data), project=str(folder), name="run", **training)
    return export(folder / "run" / "weights" / "last.pt", weights)


def export(checkpoint: Path, weights: Path) -> int:
    """Keep of a training checkpoint what inference needs, in fp16 and free of paths; returns the parameter count."""
    import torch
    import ultralytics

    trained = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = (trained["ema"] or trained["model"]).half()
    model.names = dict(enumerate(CLASS_NAMES))
    model.yaml["yaml_file"] = "parts-yolo26p.yaml"
    model.args = {"imgsz": DEFAULT_IMGSZ, "task": "detect", "data": "parts.yaml", "single_cls": False}
    model.criterion = None
    for parameter in model.parameters():
        parameter.requires_grad = False
    torch.save(
        {
            "model": model,
            "train_args": model.args,
            "epoch": -1,
            "version": ultralytics.__version__,
            "license": "AGPL-3.0-only",
        },
        weights,
    )
    return sum(parameter.numel() for parameter in model.parameters())


def measure(weights: Path, data: Path, folder: Path, **options: Any) -> dict[str, float]:
    """Accuracy on the test scenes. `nms=False` asks the end-to-end head; by default ultralytics asks the other, with NMS."""
    from ultralytics.models import YOLO

    metrics = YOLO(weights).val(
        data=str(data), project=str(folder), name="val", batch=8, workers=0, device="cpu", plots=False, **options
    )
    return {"map50": round(float(metrics.box.map50), 4), "map50_95": round(float(metrics.box.map), 4)}


def _write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def _versions() -> dict[str, str]:
    import numpy as np
    import torch
    import ultralytics

    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "ultralytics": ultralytics.__version__,
    }


if __name__ == "__main__":
    main()
