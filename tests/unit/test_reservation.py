"""What an actor has reserved: caps, refusals with their numbers, threads. On a recorded torch.cuda where a GPU is needed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import openvino
import psutil
import pynvml
import pytest
import torch

from actors import hardware, reservation
from actors.detector import Detector
from actors.errors import EngineOutOfMemory, ModelError
from actors.fake_model import FakeModel
from actors.model import YoloModel
from actors.reservation import load_reserved
from actors.schemas import PredictParams
from actors.settings import ActorSettings, ImageLimits, ModelSettings
from deploy.app import build_app
from deploy.settings import AppSettings, ServedModel
from deploy.weights import EMBEDDED
from tests.conftest import picture

GB = 10**9
FAKE = ModelSettings(name="fake", weights="fake:", max_batch=16)


@dataclass
class Gpu:
    """A GPU of 16 GB that others do not use: torch's allocator with its cap, and what the driver counts beside it."""

    total: int = 16 * GB
    beside: int = GB // 2
    tells: bool = True
    cap: float = 1.0
    caps: list[float] = field(default_factory=list)
    reserved: int = 0

    def allocate(self, size: int) -> None:
        if size > self.cap * self.total:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}")
        self.reserved = max(self.reserved, size)

    def set_cap(self, fraction: float, device: int) -> None:
        assert 0 <= fraction <= 1 and device == 0
        self.cap = fraction
        self.caps.append(fraction)

    def processes(self, device: object) -> list[SimpleNamespace]:
        mine = SimpleNamespace(pid=psutil.Process().pid, usedGpuMemory=self.reserved + self.beside)
        return [SimpleNamespace(pid=1, usedGpuMemory=9 * GB), *([mine] if self.tells else [])]


class OnGpu(FakeModel):
    """A model on that GPU: 1 GB for itself, 0.25 GB for every image of a batch."""

    def __init__(self, settings: ModelSettings, gpu: Gpu) -> None:
        super().__init__(settings)
        self._gpu = gpu
        self._info = replace(self._info, device="cuda:0")
        try:
            gpu.allocate(GB)
        except torch.cuda.OutOfMemoryError as error:
            raise ModelError("ultralytics.YOLO cannot load it: CUDA out of memory") from error

    def predict(self, batch: Sequence[Any]) -> Any:
        try:
            self._gpu.allocate(GB + len(batch) * GB // 4)
        except torch.cuda.OutOfMemoryError as error:
            raise EngineOutOfMemory("no memory left") from error
        return super().predict(batch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda index: "Recorded",
        "get_device_properties": lambda index: SimpleNamespace(uuid="0"),
        "mem_get_info": lambda index: (made.total, made.total),
        "set_per_process_memory_fraction": made.set_cap,
        "memory_reserved": lambda index: made.reserved,
        "max_memory_reserved": lambda index: made.reserved,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", made.processes)
    monkeypatch.setattr(reservation, "load_model", lambda settings, threads: OnGpu(settings, made))
    return made


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reserves no GPU hides them from its process, which here is everybody's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.mark.parametrize("num_gpus", [0.5, 1.0, 2.0])
def test_an_actor_caps_itself_to_its_share_before_it_loads_and_leaves_room_for_what_is_not_torch(
    gpu: Gpu, num_gpus: float
) -> None:
    load_reserved(FAKE, ActorSettings(num_gpus=num_gpus))
    share = min(num_gpus, 1.0)
    assert gpu.caps == pytest.approx([share, share - 0.5 / 16])
    assert hardware.gpu_peak_bytes() == 5 * GB  # of the largest batch, 16


def test_a_model_whose_largest_batch_does_not_fit_is_refused_with_the_numbers(gpu: Gpu) -> None:
    with pytest.raises(ModelError) as refused:
        load_reserved(FAKE, ActorSettings(num_gpus=0.25))
    assert refused.value.message == (
        "fake with a batch of 16 does not fit into its share of the GPU, 4.00 GB (num_gpus 0.25):"
        " a batch of 8 does: lower max_batch, or give it a larger share"
    )


def test_what_the_driver_counts_beside_torch_belongs_to_the_need(gpu: Gpu) -> None:
    gpu.beside = 4 * GB
    with pytest.raises(ModelError, match=r"needs 9\.00 GB, of which 4\.00 GB are CUDA's own .* more than .* 8\.00 GB"):
        load_reserved(FAKE, ActorSettings(num_gpus=0.5))


def test_where_the_driver_does_not_tell_torchs_own_count_decides(gpu: Gpu) -> None:
    gpu.beside, gpu.tells = 4 * GB, False
    load_reserved(FAKE, ActorSettings(num_gpus=0.5))
    assert gpu.caps == [0.5, 0.5]


def test_a_model_that_cannot_even_be_loaded_says_into_what(gpu: Gpu) -> None:
    with pytest.raises(ModelError, match=r"fake cannot even be loaded into its share of the GPU, 0\.80 GB \(num_gpus 0\.05\)"):
        load_reserved(FAKE, ActorSettings(num_gpus=0.05))


def test_one_image_that_does_not_fit_is_no_advice_to_lower_the_batch(gpu: Gpu) -> None:
    with pytest.raises(ModelError, match=r"does not fit into its share .*: give it a larger one$"):
        load_reserved(FAKE, ActorSettings(num_gpus=0.07))


def test_who_reserves_no_gpu_sees_none(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation, "load_model", lambda settings, threads: FakeModel(settings))
    load_reserved(FAKE, ActorSettings(num_gpus=0))
    assert not gpu.caps and os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_pretended_gpu_caps_nothing() -> None:
    assert load_reserved(FAKE, ActorSettings(num_gpus=0.25)).info.device == "cpu"


def test_onnx_runtime_is_told_the_share(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, **rest: made.append(rest["providers"]))

    def load(settings: ModelSettings, threads: int) -> FakeModel:  # as Ultralytics' backend makes its session
        providers = [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"]
        onnxruntime.InferenceSession("weights.onnx", None, providers=providers)
        return OnGpu(settings, gpu)

    monkeypatch.setattr(reservation, "load_model", load)
    load_reserved(FAKE, ActorSettings(num_gpus=0.5))
    assert made == [[("CUDAExecutionProvider", {"device_id": 0, "gpu_mem_limit": 8 * GB}), "CPUExecutionProvider"]]


@pytest.mark.parametrize(("taken", "spare", "num_cpus", "fits"), [
    (1 * GB, 8 * GB, 1, True),
    (3 * GB, 8 * GB, 0.1, True),  # more than its share, and enough for everybody
    (3 * GB, 1 * GB, 0.5, False),
    (1 * GB, 1 * GB, 0.5, True),  # the node is full of others; this one keeps to its share
    (3 * GB, 1 * GB, 0, True),  # who reserves nothing takes what is left
])  # fmt: skip
def test_memory_follows_num_cpus_where_it_is_scarce(
    monkeypatch: pytest.MonkeyPatch, taken: int, spare: int, num_cpus: float, fits: bool
) -> None:
    monkeypatch.setattr(hardware, "node_memory", lambda: (16 * GB, spare))
    monkeypatch.setattr(hardware, "available_cpus", lambda: 4)
    monkeypatch.setattr(hardware, "memory_bytes", lambda: taken)
    actor = ActorSettings(num_cpus=num_cpus)
    if fits:
        load_reserved(FAKE, actor)
    else:
        with pytest.raises(ModelError) as refused:
            load_reserved(FAKE, actor)
        assert refused.value.message == (
            "fake takes 3.00 GB of memory, more than its share of the node, 2.00 GB (num_cpus 0.5), and the node has 1.00 GB"
            " of 16.00 GB left: fewer replicas or actors there, or more num_cpus for each"
        )


def test_a_containers_limit_is_the_nodes_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    machine = psutil.virtual_memory().total
    assert hardware.node_memory()[0] == machine
    values = {"memory.max": "max", "memory.current": f"{2 * GB}", "memory.stat": f"anon 1\ninactive_file {GB}"}
    for name, value in values.items():
        (tmp_path / name).write_text(f"{value}\n")
    assert hardware.node_memory()[0] == machine
    (tmp_path / "memory.max").write_text(f"{2 * GB + 10**6}\n")
    assert hardware.node_memory() == (2 * GB + 10**6, GB + 10**6)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model for ONNX Runtime and for OpenVINO."""
    folder = tmp_path_factory.mktemp("exports")
    weights = folder / "parts.pt"
    weights.write_bytes(Path(EMBEDDED.weights).read_bytes())
    from ultralytics import YOLO

    for kind in ("onnx", "openvino"):
        YOLO(weights).export(format=kind, imgsz=64, verbose=False)
    return folder


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weights", ["parts.pt", "parts.onnx", "parts_openvino_model"])
def test_threads_follow_num_cpus_after_the_warm_up_too(
    exports: Path, monkeypatch: pytest.MonkeyPatch, weights: str, threads: int
) -> None:
    sessions: list[Any] = []
    compiled: list[Any] = []
    make_session, compile_model = onnxruntime.InferenceSession, openvino.Core.compile_model

    def session(*args: Any, **rest: Any) -> Any:
        sessions.append(make_session(*args, **rest))
        return sessions[-1]

    def compiling(*args: Any, **rest: Any) -> Any:
        compiled.append(compile_model(*args, **rest))
        return compiled[-1]

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(openvino.Core, "compile_model", compiling)
    seen = []

    class Watched(YoloModel):
        def predict(self, batch: Any) -> Any:
            seen.append(torch.get_num_threads())
            return super().predict(batch)

        def each(self, take: Any) -> Any:
            seen.append(torch.get_num_threads())
            return super().each(take)

    settings = ModelSettings(name="parts", weights=str(exports / weights))
    detector = Detector(lambda: Watched(settings, threads), ImageLimits())
    detector.submit(picture(), PredictParams()).result()
    detector.close()
    assert set(seen) == {threads} and len(seen) > 3
    if weights.endswith(".onnx"):
        assert sessions[-1].get_session_options().intra_op_num_threads == threads
    elif weights.endswith("_model"):
        assert compiled[-1].get_property("INFERENCE_NUM_THREADS") == threads


@pytest.mark.parametrize("num_gpus", [0, 0.1, 0.25, 1, 3])
def test_serve_reserves_any_fraction_and_whole_numbers_for_each_model(num_gpus: float) -> None:
    models = [("first", num_gpus), ("second", 1)]
    served = tuple(
        ServedModel(name=name, weights="fake:", actor=ActorSettings(num_cpus=0.5, num_gpus=gpus)) for name, gpus in models
    )
    app = build_app(AppSettings(models=served, topology="routed"))
    deployments = {
        bound._bound_deployment.name: bound._bound_deployment for bound in app._bound_deployment.init_args[0].values()
    }
    for name, gpus in models:
        options = deployments[f"model-{name}"].ray_actor_options
        assert (options["num_cpus"], options["num_gpus"]) == (0.5, gpus)


def test_a_fraction_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match="give a fraction up to 1, or a whole number"):
        ActorSettings(num_gpus=1.5)


def test_a_batch_is_not_rehearsed_at_another_size_than_the_models_own(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set[tuple[int, ...]]()

    class Watched(OnGpu):
        def prepare(self, image: Any, params: PredictParams, shape: Any = None) -> Any:
            shapes.add(np.shape(image))
            return super().prepare(image, params)

    monkeypatch.setattr(reservation, "load_model", lambda settings, threads: Watched(settings, gpu))
    model = load_reserved(FAKE, ActorSettings(num_gpus=1))
    assert shapes == {(*model.info.imgsz, 3)}
