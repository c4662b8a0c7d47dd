# /// script
# dependencies = ["litserve==0.2.19", "openvino", "python-multipart", "torch", "torchvision", "ultralytics-opencv-headless"]
# ///
"""LitServe, by its documentation: load, decode, predict, encode. The model lives in a worker process of its own."""

import argparse

import cv2
import litserve
import numpy as np
from ultralytics import YOLO

parser = argparse.ArgumentParser()
parser.add_argument("--weights", required=True)
parser.add_argument("--port", type=int, required=True)


class Detect(litserve.LitAPI):
    """The four verbs of LitServe."""

    def setup(self, device: str) -> None:
        """Load."""
        self.model = YOLO(parser.parse_args().weights, task="detect")

    def decode_request(self, request) -> np.ndarray:
        """Decode."""
        return cv2.imdecode(np.frombuffer(request["file"].file.read(), np.uint8), cv2.IMREAD_COLOR)

    def predict(self, image: np.ndarray):
        """Predict."""
        return self.model.predict(image, verbose=False)[0]

    def encode_response(self, result) -> list[dict]:
        """Encode."""
        return result.summary()


if __name__ == "__main__":
    server = litserve.LitServer(Detect(), accelerator="cpu")
    server.run(host="127.0.0.1", port=parser.parse_args().port, generate_client_file=False, log_level="warning")
