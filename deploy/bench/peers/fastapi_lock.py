# /// script
# dependencies = [
#   "fastapi", "openvino", "python-multipart", "torch", "torchvision", "ultralytics-opencv-headless", "uvicorn[standard]",
# ]
# ///
"""Plain FastAPI with a lock: what one writes by hand. Requests are received and decoded on threads; the model takes turns."""

import argparse
import threading

import cv2
import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile
from ultralytics import YOLO

parser = argparse.ArgumentParser()
parser.add_argument("--weights", required=True)
parser.add_argument("--port", type=int, required=True)
options = parser.parse_args()

app, lock = FastAPI(), threading.Lock()
model = YOLO(options.weights, task="detect")


@app.post("/predict")
def predict(file: UploadFile) -> list[dict]:
    """Detections in one image."""
    image = cv2.imdecode(np.frombuffer(file.file.read(), np.uint8), cv2.IMREAD_COLOR)
    with lock:
        result = model.predict(image, verbose=False)[0]
    return result.summary()


uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
