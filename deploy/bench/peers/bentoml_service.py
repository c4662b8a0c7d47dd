# /// script
# dependencies = ["bentoml==1.4.40", "openvino", "pillow", "torch", "torchvision", "ultralytics-opencv-headless"]
# ///
"""BentoML, by its documentation's example for YOLO: a service whose API takes batches, which BentoML forms adaptively."""

import argparse
import os
import sys
from pathlib import Path

import bentoml
from PIL.Image import Image
from ultralytics import YOLO


@bentoml.service(traffic={"timeout": 120})
class Detect:
    """The service."""

    def __init__(self) -> None:
        self.model = YOLO(os.environ["WEIGHTS"], task="detect")

    @bentoml.api(batchable=True)
    def predict(self, images: list[Image]) -> list[list[dict]]:
        """Detections in each image."""
        return [result.summary() for result in self.model.predict(images, verbose=False)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", required=True)
    parser.add_argument("--port", required=True)
    options = parser.parse_args()
    os.environ |= {"WEIGHTS": options.weights, "BENTOML_DO_NOT_TRACK": "True"}
    here = str(Path(__file__).resolve().parent)
    serve = ["serve", "bentoml_service:Detect", "--working-dir", here, "--host", "127.0.0.1", "--port", options.port]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *serve])  # noqa: S606 - no shell is wanted
