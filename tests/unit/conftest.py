"""What several rooms' tests need: the embedded model's engine."""

import pytest

from actors.engines import Made, make, plan
from deploy.settings import ServedModel
from deploy.weights import EMBEDDED

AUTO = ServedModel.model_validate(EMBEDDED.model_dump() | {"engine": "auto"})  # as replicas have it


@pytest.fixture(scope="session")
def openvino() -> Made:
    """The embedded model, made for OpenVINO; in the tests' own cache, once for all workers."""
    wanted = plan(AUTO)
    assert wanted is not None
    return make(AUTO, wanted)
