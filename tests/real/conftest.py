"""One endpoint for all tests on real weights: every task, the primary model in the ingress or not.

Both topologies are seen: with the default data plane the primary model lives in the ingress (``direct``) and the others
behind handles; with HAProxy all of them live behind handles (``routed``).
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.settings import ActorSettings
from deploy.settings import ServedModel
from tests.conftest import served

WEIGHTS = ("yolo26n", "yolo11n", "yolov8n", "yolo11n-seg", "yolov8n-pose", "yolo11n-cls")


@pytest.fixture(scope="package")
def address(weights: Path, local_ray: None) -> Iterator[str]:
    """The address of all six models; ``yolo26n`` is the primary one."""
    one_cpu = ActorSettings(num_cpus=1)
    models = [ServedModel(name=name, weights=str(weights / f"{name}.pt"), actor=one_cpu) for name in WEIGHTS]
    topology = "routed" if os.environ.get("YOLOFLEET_TEST_DATA_PLANE") == "haproxy" else "direct"
    with served(*models, topology=topology) as made:
        yield made
