"""Trained weights of every task on the engine that ``auto`` takes here, and int8 with what it costs."""

from functools import partial
from pathlib import Path

import httpx
import pytest

from actors.engines import make, plan
from actors.model import load_model
from actors.settings import ModelSettings
from actors.startup import settled_model
from tests.conftest import until
from tests.real.conftest import WEIGHTS

pytestmark = pytest.mark.real


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_every_model_of_the_endpoint_comes_to_its_engine_and_says_so(address: str) -> None:
    """The other tests of this folder compare answers with the originals', before the swap and after."""

    def models() -> list[dict[str, object]]:
        found: list[dict[str, object]] = httpx.get(f"{address}/models", timeout=60).json()["models"]
        return found

    until(lambda: all(model["settled"] for model in models()), 380)
    assert [(model["name"], model["engine"], model["precision"]) for model in models()] == [
        (name, "openvino", "fp32") for name in WEIGHTS
    ]
    assert all("agree with the original" in str(model["engine_reason"]) for model in models())
    fleet = httpx.get(f"{address}/fleet", timeout=60).json()["models"]
    assert {replica["vitals"]["engine"] for model in fleet for replica in model["replicas"]} == {"openvino fp32"}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_onnx_agrees_as_well(weights: Path) -> None:
    settings = ModelSettings(name="pose", weights=str(weights / "yolov8n-pose.pt"), engine="onnx")
    model = settled_model(settings, partial(load_model, settings, 1))
    assert (model.info.engine, model.info.precision, model.info.dynamic) == ("onnx", "fp32", True)
    assert model.info.kpt_shape == (17, 3)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_int8_tells_what_it_costs_on_the_labels_beside_its_images(weights: Path, coco128: Path, tmp_path: Path) -> None:
    for kind, suffix in (("images", "jpg"), ("labels", "txt")):
        (tmp_path / kind).mkdir()
        for path in sorted(coco128.glob("*.jpg"))[:24]:
            source = coco128.parent.parent / kind / coco128.name / f"{path.stem}.{suffix}"
            if source.exists():
                (tmp_path / kind / source.name).symlink_to(source)
    settings = ModelSettings(
        name="n", weights=str(weights / "yolo26n.pt"), precision="int8", calibrate=str(tmp_path / "images")
    )
    wanted = plan(settings)
    assert wanted is not None
    found = make(settings, wanted)
    assert (found.numbers["by"], found.numbers["images"]) == ("labels", 24)
    assert found.numbers["loss"] == pytest.approx(found.numbers["map50_95_original"] - found.numbers["map50_95"])
    assert 0.3 < found.numbers["map50_95_original"] < 0.9
    model = settled_model(settings, partial(load_model, settings, 1))
    assert (model.info.engine, model.info.precision) == ("openvino", "int8"), found.verdict
    assert f"loses {found.numbers['loss']:.4f} of mAP50-95" in model.info.engine_reason
