# /// script
# dependencies = ["openvino", "python-multipart", "ray[serve]", "torch", "torchvision", "ultralytics-opencv-headless"]
# ///
"""The shape of Ray Serve's object detection tutorial: a FastAPI ingress before a deployment that holds the model.

The tutorial's replicas scale from one to two; it fetches the image by its URL and answers with a picture, where this one
takes the image and answers with JSON, as all the others here do.
"""

import argparse
import signal

import cv2
import numpy as np
from fastapi import FastAPI, UploadFile
from ray import serve
from ray.serve.handle import DeploymentHandle
from ultralytics import YOLO

app = FastAPI()


@serve.deployment(num_replicas=1)
@serve.ingress(app)
class APIIngress:
    """HTTP."""

    def __init__(self, object_detection: DeploymentHandle) -> None:
        self.object_detection = object_detection

    @app.post("/predict")
    async def detect(self, file: UploadFile) -> list[dict]:
        """Detections in one image."""
        return await self.object_detection.detect.remote(await file.read())


@serve.deployment(autoscaling_config={"min_replicas": 1, "max_replicas": 2})
class ObjectDetection:
    """The model."""

    def __init__(self, weights: str) -> None:
        self.model = YOLO(weights, task="detect")

    async def detect(self, data: bytes) -> list[dict]:
        """Detections in one encoded image."""
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        return self.model.predict(image, verbose=False)[0].summary()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    import ray

    ray.init(address="local", include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(APIIngress.bind(ObjectDetection.bind(options.weights)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.pause()
