"""Engines: which is chosen, how one is made once and checked, and that it answers as the original does.

The embedded model is exported for real, by the process that does so for replicas; the cache is the tests' own, and shared.
"""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ultralytics

from actors import engines, exporter
from actors.detector import Detector
from actors.engines import (
    CACHE_VARIABLE,
    MANIFEST,
    NEEDS,
    OWN_CODE,
    Made,
    Plan,
    cache_folder,
    digest_of_folder,
    made,
    make,
    plan,
)
from actors.errors import ModelError
from actors.fake_model import FakeModel
from actors.images import encode_jpeg
from actors.model import load_model
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from actors.startup import settled_model, start_detector
from actors.verify import CLOSE, EXACT, verify
from deploy.api.ultralytics import summary
from deploy.demo.guide import same_answer
from deploy.demo.scene import draw_scene
from deploy.weights import EMBEDDED
from tests.unit.conftest import AUTO
from tests.unit.test_imports import ALLOWED

LIMITS = ImageLimits()


def settings(**fields: object) -> ModelSettings:
    return ModelSettings.model_validate({"name": "x", "weights": "x.pt"} | fields)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend another machine: with a GPU or without, and with these packages."""

    def pretend(*packages: str, cuda: bool = False) -> None:
        monkeypatch.setattr(engines, "find_spec", lambda name: name in packages or None)
        monkeypatch.setattr(engines, "_on_cuda", lambda: cuda)

    return pretend


OPENVINO = Plan("openvino", "fp32", "as a test asks", cuda=False)
ASKERS = 4


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the process that exports has been asked for; in its place and into an empty cache, two small files are written."""
    asked = list[dict[str, Any]]()

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(json.loads(command[-1]))
        folder = Path(asked[-1]["folder"])
        (folder / "export").mkdir()
        (folder / "export" / "x.xml").write_text("a graph")
        manifest = {"file": "export", "agrees": True, "verdict": "they agree", "numbers": {}}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    return asked


@pytest.mark.parametrize(
    ("packages", "cuda", "chosen"),
    [
        (("openvino", "onnx", "onnxruntime"), False, ("openvino", "fp32")),
        (("onnx", "onnxruntime"), False, ("onnx", "fp32")),
        (("onnxruntime",), False, ("torch", "fp32")),  # without onnx nothing can be exported to it
        ((), False, ("torch", "fp32")),
        (("openvino", "onnx", "tensorrt"), True, ("tensorrt", "fp16")),
        (("openvino", "onnx"), True, ("torch", "fp16")),
    ],
)
def test_auto_takes_the_fastest_that_is_installed(
    machine: Callable[..., None], packages: tuple[str, ...], cuda: bool, chosen: tuple[str, str]
) -> None:
    machine(*packages, cuda=cuda)
    wanted = plan(settings())
    assert wanted is not None and (wanted.engine, wanted.precision) == chosen


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"engine": "onnx"}, "needs onnx and onnxruntime: install them with yolofleet"),
        ({"engine": "tensorrt"}, "needs tensorrt and onnx"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"engine": "torch", "precision": "int8", "calibrate": "photos"}, "not for torch"),
        ({"precision": "int8", "calibrate": "photos"}, "needs nncf"),
        ({"weights": "x.onnx", "engine": "openvino"}, "an engine of their own"),
        ({"weights": "fake:", "precision": "fp16"}, "an engine of their own"),
    ],
)
def test_what_cannot_be_had_here_is_refused(machine: Callable[..., None], fields: dict[str, object], sentence: str) -> None:
    machine("openvino")
    with pytest.raises(ModelError, match=sentence):
        plan(settings(**fields))


@pytest.mark.parametrize("fields", [{"precision": "int8"}, {"calibrate": "photos"}])
def test_int8_and_its_images_come_together(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="int8 needs calibrate"):
        settings(**fields)


def test_weights_that_are_an_engine_already_need_no_other() -> None:
    assert plan(settings(weights="x.onnx")) is plan(settings(weights="fake:")) is None


def test_an_engine_is_made_once_whoever_asks(openvino: Made) -> None:
    assert openvino.agrees, openvino.verdict
    assert openvino.path is not None and openvino.path.parent.parent == cache_folder()
    before = (openvino.path.parent / MANIFEST).stat().st_mtime_ns
    with ThreadPoolExecutor(4) as askers:
        found = list(askers.map(lambda _: make(AUTO, openvino.plan), range(4)))
    assert found == [openvino] * 4 and made(AUTO, openvino.plan) == openvino
    assert (openvino.path.parent / MANIFEST).stat().st_mtime_ns == before


def test_what_is_half_written_is_not_there(openvino: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert openvino.path is not None
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert made(AUTO, openvino.plan) is None
    copy = shutil.copytree(openvino.path.parent, tmp_path / openvino.path.parent.name)
    assert made(AUTO, openvino.plan) is not None
    (copy / MANIFEST).unlink()
    assert made(AUTO, openvino.plan) is None


def test_who_asks_while_it_is_made_waits_for_it(orders: list[dict[str, Any]]) -> None:
    together = threading.Barrier(ASKERS)

    def ask(_: int) -> Made:
        together.wait()
        return make(AUTO, OPENVINO)

    with ThreadPoolExecutor(ASKERS) as askers:
        found = list(askers.map(ask, range(ASKERS)))
    assert found == [found[0]] * ASKERS and found[0].agrees
    assert len(orders) == 1
    assert [path for path in cache_folder().iterdir() if path.is_dir()] == [found[0].path and found[0].path.parent]


@pytest.mark.parametrize("manifest", [None, "", '{"file": "expo', "\0\0\0", "[]", "{}", '{"file": 5}'])
def test_an_engine_that_an_interruption_has_left_is_made_again(orders: list[dict[str, Any]], manifest: str | None) -> None:
    found = make(AUTO, OPENVINO)
    assert found.path is not None
    (found.path.parent / "of the old one").touch()
    if manifest is None:
        (found.path.parent / MANIFEST).unlink()
    else:
        (found.path.parent / MANIFEST).write_text(manifest)
    assert made(AUTO, OPENVINO) is None
    assert make(AUTO, OPENVINO) == found == made(AUTO, OPENVINO)
    assert len(orders) == 2 and not (found.path.parent / "of the old one").exists()


def test_a_manifest_whose_export_was_removed_is_none(orders: list[dict[str, Any]]) -> None:
    found = make(AUTO, OPENVINO)
    assert found.path is not None
    shutil.rmtree(found.path)
    assert made(AUTO, OPENVINO) is None and make(AUTO, OPENVINO) == found


def test_an_engine_is_on_the_disk_before_it_appears(orders: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    synced, missing = set[int](), set[str]()
    rename = Path.rename

    def check(folder: Path, target: Path) -> Path:
        missing.update(str(path) for path in (folder, *folder.rglob("*")) if path.stat().st_ino not in synced)
        return rename(folder, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", check)
    assert make(AUTO, OPENVINO).agrees
    assert len(synced) == 4 and not missing


def test_weights_that_are_replaced_meanwhile_do_not_become_the_engine_of_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path(shutil.copy(EMBEDDED.weights, tmp_path / "x.pt"))

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        weights.write_bytes(weights.read_bytes() + b"other")
        with pytest.raises(SystemExit) as refused:
            exporter.main(command[-1])
        return subprocess.CompletedProcess(command, 1, "", str(refused.value.code))

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match=r"could not be made: .* has SHA-256 .*, but the settings pin"):
        make(settings(weights=str(weights)), OPENVINO)


def test_a_cache_that_cannot_be_written_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, openvino: Made
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "engines"))
    with pytest.raises(ModelError, match=f"set {CACHE_VARIABLE}"):
        make(AUTO, openvino.plan)
    model = settled_model(AUTO, partial(load_model, AUTO, 1))
    assert model.info.engine == "torch" and CACHE_VARIABLE in model.info.engine_reason


def test_other_calibration_images_are_another_engine(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"1")
    before = digest_of_folder(tmp_path)
    (tmp_path / "b.jpg").write_bytes(b"2")
    assert digest_of_folder(tmp_path) != before
    with pytest.raises(ModelError, match="give 'calibrate' a folder"):
        digest_of_folder(tmp_path / "none")


@pytest.mark.parametrize("subset", ["", "train"])
def test_other_labels_of_calibration_images_are_another_engine(tmp_path: Path, subset: str) -> None:
    images, labels = (tmp_path / kind / subset for kind in ("images", "labels"))
    images.mkdir(parents=True)
    (images / "a.jpg").write_bytes(b"1")
    digests = [digest_of_folder(images)]
    labels.mkdir(parents=True)
    for text in ("0 0.5 0.5 1 1", "0 0.5 0.5 1 1\n1 0.5 0.5 1 1"):
        (labels / "a.txt").write_text(text)
        digests.append(digest_of_folder(images))
    assert len({*digests}) == 3
    moved = tmp_path / "moved"
    moved.mkdir()
    for kind in ("images", "labels"):
        (tmp_path / kind).rename(moved / kind)
    assert digest_of_folder(moved / "images" / subset) == digests[-1]


@pytest.mark.parametrize("package", sorted({*NEEDS["onnx"], *NEEDS["openvino"], *NEEDS["tensorrt"], "nncf", "onnxslim"}))
def test_another_version_of_what_exports_is_another_engine(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = engines._key(AUTO, OPENVINO, "0"), engines._version
    monkeypatch.setattr(engines, "_version", lambda name: "another" if name == package else version(name))
    assert engines._key(AUTO, OPENVINO, "0") != before


def test_all_code_that_makes_or_judges_an_engine_is_in_its_key() -> None:
    words = {"engines", "errors", "hardware", "schemas", "settings", "writers"}  # which compute nothing of either
    assert {name.removeprefix("actors.") for name in ALLOWED["actors.exporter"]} - words <= {*OWN_CODE}


@pytest.mark.long
def test_int8_is_fitted_alike_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    for seed in range(12):
        (tmp_path / "images" / f"{seed}.jpg").write_bytes(encode_jpeg(draw_scene(seed).image))
    wanted = settings(weights=EMBEDDED.weights, precision="int8", calibrate=str(tmp_path / "images"))
    fits = []
    for cache in ("one", "other"):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / cache))
        found = make(wanted, Plan("openvino", "int8", "as a test asks", cuda=False))
        assert found.path is not None
        fits.append([path.read_bytes() for path in found.path.glob("*.bin")])
    assert len(fits[0]) == 1 and fits[0] == fits[1]


def test_a_warm_cache_starts_on_the_engine(openvino: Made) -> None:
    detector = start_detector(AUTO, ActorSettings(), LIMITS)
    try:
        assert (detector.info.engine, detector.info.settled) == ("openvino", True)
        assert "the fastest on this CPU; " in detector.info.engine_reason and "agree with" in detector.info.engine_reason
    finally:
        detector.close()


@pytest.fixture
def cold(openvino: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An empty cache, in which the engine is made when the event is set: as slow as a test wants it, and by nobody else."""
    assert openvino.path is not None
    kept = openvino.path.parent
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    go = threading.Event()

    def arrive(*_: object) -> Made:
        assert go.wait(60)
        shutil.copytree(kept, tmp_path / kept.name)
        found = made(AUTO, openvino.plan)
        assert found is not None
        return found

    monkeypatch.setattr(engines, "_export", arrive)
    yield go
    go.set()


def test_a_cold_cache_answers_on_torch_and_swaps_under_load_without_losing_an_answer(cold: threading.Event) -> None:
    detector = start_detector(AUTO, ActorSettings(), LIMITS)
    try:
        assert (detector.info.engine, detector.info.settled) == ("torch", False)
        data = encode_jpeg(draw_scene(7).image)
        first = detector.submit(data, PredictParams()).result()
        cold.set()
        answers = [detector.submit(data, PredictParams())]
        while detector.info.engine != "openvino":
            answers[-1].result()
            answers.append(detector.submit(data, PredictParams()))
        answers += [detector.submit(data, PredictParams()) for _ in range(4)]
        assert all(same_answer(summary(first), summary(answer.result())) for answer in answers)
        assert detector.info.settled and detector.info.sha256
        detector.check_health()
    finally:
        detector.close()


def test_an_engine_that_disagrees_is_not_used_and_the_reason_is_told(openvino: Made, cold: threading.Event) -> None:
    assert openvino.path is not None
    copy = shutil.copytree(openvino.path.parent, cache_folder() / openvino.path.parent.name)
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"agrees": False, "verdict": "3 of 9 detections agree"}))
    model = settled_model(AUTO, partial(load_model, AUTO, 1))
    assert (model.info.engine, model.info.engine_reason) == ("torch", "not openvino fp32: 3 of 9 detections agree")


def test_weights_that_cannot_be_exported_stay_on_torch(tmp_path: Path) -> None:
    """An end-to-end head takes thresholds from each request, which an export would have fixed. The export itself says so."""
    untrained = ultralytics.YOLO("yolo26n.yaml")
    untrained.model.model[-1].end2end = True
    untrained.model.model[-1].fuse()
    untrained.save(tmp_path / "end2end.pt")
    weights = settings(weights=str(tmp_path / "end2end.pt"))
    model = settled_model(weights, partial(load_model, weights, 1))
    assert model.info.engine == "torch" and "end-to-end head" in model.info.engine_reason
    assert not [path for path in cache_folder().glob(".*") if path.is_dir()], "a half-made engine was left behind"


def test_verification_tells_other_classes_and_other_outputs() -> None:
    images = [draw_scene(seed).image for seed in range(2)]
    same, other = (FakeModel(ModelSettings(name="fake", weights=f"fake:?shift={shift}")) for shift in (0, 1))
    assert verify(same, same, images, EXACT).agrees
    told = verify(same, other, images, CLOSE)
    assert not told.agrees and (told.agreeing, told.detections) == (0, 2 * len(images) * 2 * 2)
    assert "0 of 16 detections in 8 images agree" in told.sentence


def test_a_model_that_prepares_images_otherwise_does_not_take_over() -> None:
    first, second = (ModelSettings(name="fake", weights=f"fake:?shift={shift}") for shift in (0, 1))
    detector = Detector(lambda: FakeModel(first), LIMITS)
    try:
        with pytest.raises(ModelError, match="takes other inputs"):
            detector.replace(lambda: FakeModel(second))
        detector.replace(lambda: FakeModel(first))
        detector.check_health()
    finally:
        detector.close()
