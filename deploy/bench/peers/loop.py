# /// script
# dependencies = ["ultralytics-opencv-headless", "openvino", "torch", "torchvision"]
# ///
"""Ultralytics in a loop: what a script of five lines does. No server; prints milliseconds and boxes of every image as JSON.

``--seconds`` has it go through all images again until they have taken so long together; the boxes are of the first time.
"""

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np
from ultralytics import YOLO

parser = argparse.ArgumentParser()
parser.add_argument("--weights", required=True)
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("images", nargs="+", type=Path)
options = parser.parse_args()

model = YOLO(options.weights, task="detect")
encoded = [np.frombuffer(image.read_bytes(), np.uint8) for image in options.images]


def predict(data: np.ndarray) -> int:
    """Number of boxes in an encoded image."""
    return len(model.predict(cv2.imdecode(data, cv2.IMREAD_COLOR), verbose=False)[0].boxes)


for data in encoded:
    predict(data)  # engines prepare each shape once
milliseconds, boxes = [], []
while not milliseconds or sum(milliseconds) < 1e3 * options.seconds:
    for data in encoded:
        started = time.perf_counter()
        boxes.append(predict(data))
        milliseconds.append(1e3 * (time.perf_counter() - started))
print(json.dumps({"ms": milliseconds, "boxes": boxes[: len(encoded)]}))
