# /// script
# dependencies = ["inference-cpu[http]==1.8.3"]
# ///
"""Roboflow's inference server, offline: a local model package around the ONNX export, and its legacy route.

Such a package is what the server would fetch from Roboflow; it names the graph, its input and its classes, and ONNX Runtime
computes it. The route ``/{project}/{version}`` takes a package's folder for a model's id where direct access is allowed.
"""

import argparse
import ast
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ |= {
    "ALLOW_INFERENCE_MODELS_DIRECTLY_ACCESS_LOCAL_PACKAGES": "True",
    "CORE_MODELS_ENABLED": "False",
    "DISABLE_VERSION_CHECK": "True",
    "METRICS_ENABLED": "False",
    "OFFLINE_MODE": "True",
    "TELEMETRY_OPT_OUT": "True",
    "USE_INFERENCE_MODELS": "True",
}

SIDE = 640
CONFIG = {"model_architecture": "yolov8", "task_type": "object-detection", "backend_type": "onnx"}
INFERENCE = {
    "network_input": {
        "training_input_size": {"height": SIDE, "width": SIDE},
        "dynamic_spatial_size_supported": False,
        "color_mode": "rgb",
        "resize_mode": "letterbox",
        "padding_value": 114,
        "input_channels": 3,
        "scaling_factor": 255,
    },
    "forward_pass": {"static_batch_size": 1},
    "post_processing": {"type": "nms", "fused": False},
}


def write_package(weights: Path, folder: Path) -> None:
    """The ONNX export as a model package."""
    import onnxruntime

    metadata = onnxruntime.InferenceSession(weights).get_modelmeta().custom_metadata_map
    folder.mkdir(parents=True)
    shutil.copy(weights, folder / "weights.onnx")
    (folder / "class_names.txt").write_text("\n".join(ast.literal_eval(metadata["names"]).values()))
    (folder / "model_config.json").write_text(json.dumps(CONFIG))
    (folder / "inference_config.json").write_text(json.dumps(INFERENCE))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    here = Path(tempfile.mkdtemp())
    os.environ["MODEL_CACHE_DIR"] = str(here / "cache")
    write_package(options.weights.absolute(), here / "local" / "detect")
    for page in ("static", "_next/static"):  # which the container has, and the wheel has not
        (here / "inference" / "landing" / "out" / page).mkdir(parents=True)
    os.chdir(here)  # a model's id is looked up as a folder from here

    import uvicorn
    from inference.core.interfaces.http.http_api import HttpInterface
    from inference.core.managers.base import ModelManager
    from inference.core.registries.roboflow import RoboflowModelRegistry
    from inference.models.utils import ROBOFLOW_MODEL_TYPES

    manager = ModelManager(model_registry=RoboflowModelRegistry(ROBOFLOW_MODEL_TYPES))
    uvicorn.run(HttpInterface(manager).app, host="127.0.0.1", port=options.port, log_level="warning")
