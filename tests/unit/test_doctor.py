"""yolofleet doctor, on machines that are made up: each problem has its mend, and no check spoils another."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from actors.hardware import CudaDevice
from deploy import doctor
from deploy.doctor import Finding, examine, import_failure, render


def only(findings: Iterator[Finding], topic: str) -> Finding:
    (found,) = (finding for finding in findings if finding.topic == topic)
    return found


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda_devices", list)
    monkeypatch.setattr(doctor, "import_failure", lambda module: None)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(**installed: str) -> None:
        known = {name.replace("_", "-"): it for name, it in installed.items()}

        def version(name: str) -> str:
            if name not in known:
                raise PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(doctor, "version", version)
        monkeypatch.setattr(doctor, "distributions", lambda: [SimpleNamespace(name=name) for name in known])

    return install


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setattr(doctor, "DEFAULT_PORT", port)
        yield port


@pytest.mark.usefixtures("loads")
def test_every_topic_is_examined_and_every_problem_has_a_mend() -> None:
    findings = examine()
    assert {"Python", "packages", "torch", "OpenCV", "engines", "cores", "memory", "disk", "weights", "port"} <= {
        finding.topic for finding in findings
    }
    assert not [finding for finding in findings if "could not be examined" in finding.fact]
    assert all(finding.mend for finding in findings if finding.status == "problem")


def test_a_check_that_fails_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("memory", "ok", "seen before it broke")
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(doctor, "CHECKS", {"memory": broken, "Python": doctor.check_python})
    findings = examine()
    assert [finding.topic for finding in findings] == ["memory", "memory", "Python"]
    assert findings[1] == Finding("memory", "note", "could not be examined: RuntimeError: no /proc here")


def test_a_taken_port_names_who_has_it(taken_port: int) -> None:
    port = only(doctor.check_port(), "port")
    assert port.status == "problem"
    assert f"{taken_port} is taken" in port.fact
    assert "--port" in (port.mend or "")
    if Path("/proc/net/tcp").exists():
        assert "kill " in (port.mend or "")


@pytest.mark.usefixtures("taken_port")
def test_a_port_kept_by_a_leftover_proxy_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_listener", lambda port: (4711, "haproxy"))
    monkeypatch.setattr(doctor, "_running", lambda name: [4711] if name == "haproxy" else [])
    port, process = only(doctor.check_port(), "port"), only(doctor.check_leftovers(), "processes")
    assert "killed left it behind" in port.fact
    assert "kill 4711" in (port.mend or "")
    assert (process.status, process.mend) == ("note", "End it with `kill 4711` unless it is yours")


def test_a_proxy_with_its_ray_is_no_leftover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_running", lambda name: {"haproxy": [11], "raylet": [12]}.get(name, []))
    process = only(doctor.check_leftovers(), "processes")
    assert "process 12" in process.fact


def test_torch_and_torchvision_that_do_not_match_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, versions: Callable[..., None]
) -> None:
    versions(torch="2.9.0+cpu", torchvision="0.24.0")
    reason = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "import_failure", lambda module: reason)
    (torch,) = doctor.check_torch()
    assert (torch.topic, torch.status) == ("torch", "problem")
    assert "2.9.0+cpu" in torch.fact
    assert reason in torch.fact
    assert "uv pip install" in (torch.mend or "")


@pytest.mark.usefixtures("loads")
def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda_devices", lambda: [CudaDevice("NVIDIA L4", 24 * 2**30, 6 * 2**30)])
    assert only(doctor.check_torch(), "GPU").fact == "cuda:0 NVIDIA L4, 24.0 GiB, 6.0 free"
    monkeypatch.setattr(doctor, "cuda_devices", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hides every GPU" in only(doctor.check_torch(), "GPU").fact


def test_a_dependency_out_of_its_range_is_a_problem(monkeypatch: pytest.MonkeyPatch, versions: Callable[..., None]) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["ray[serve]==2.60.*", "lap>=0.5", 'openvino>=2025; extra == "cpu"'])
    versions(ray="2.59.1")
    (packages,) = doctor.check_packages()
    assert packages.status == "problem"
    assert packages.fact == "ray[serve]==2.60.* is needed, 2.59.1 is installed; lap>=0.5 is not installed"
    assert "uv sync" in (packages.mend or "")
    versions(ray="2.60.0", lap="0.5.12")
    (packages,) = doctor.check_packages()
    assert packages.status == "ok"


def test_two_opencvs_are_noted_and_a_broken_one_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, versions: Callable[..., None]
) -> None:
    versions(opencv_python="4.12.0", opencv_python_headless="4.12.0")
    monkeypatch.setattr(doctor, "import_failure", lambda module: None)
    assert only(doctor.check_opencv(), "OpenCV").status == "note"
    monkeypatch.setattr(doctor, "import_failure", lambda module: "ImportError: libGL.so.1: cannot open shared object file")
    opencv = only(doctor.check_opencv(), "OpenCV")
    assert opencv.status == "problem"
    assert "libGL" in opencv.fact
    assert "opencv-python-headless alone" in (opencv.mend or "")


def test_two_ultralytics_and_their_installer_are_noted(monkeypatch: pytest.MonkeyPatch, versions: Callable[..., None]) -> None:
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    versions(ultralytics_opencv_headless="8.4.190")
    assert not list(doctor.check_ultralytics())
    versions(ultralytics="8.4.180", ultralytics_opencv_headless="8.4.190")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "true")
    assert [finding.status for finding in doctor.check_ultralytics()] == ["note", "note"]


def test_engines_that_are_missing_are_noted_with_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: name in ("torch", "openvino") or None)
    engines = only(doctor.check_engines(), "engines")
    assert engines.status == "note"
    assert ".onnx (onnxruntime), .engine (tensorrt)" in engines.fact
    assert ".pt weights are computed by openvino fp32, the fastest on this CPU" in engines.fact
    assert (engines.mend or "").endswith("`uv sync --extra gpu --extra onnx`")
    monkeypatch.setattr(doctor, "find_spec", lambda name: True)
    assert only(doctor.check_engines(), "engines").status == "ok"


def test_thread_variables_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS is 3" in [finding.fact for finding in doctor.check_cores()][1]


def test_full_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    full = "MemTotal:       16777216 kB\nMemFree:  1024 kB\nMemAvailable:     400000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: full)
    memory = only(doctor.check_memory(), "memory")
    assert (memory.status, memory.fact) == ("problem", "0.4 of 16.0 GiB free")


@pytest.mark.parametrize(("free_gib", "status"), [(0.5, "problem"), (3.0, "note"), (50.0, "ok")])
def test_disk_of_ray(monkeypatch: pytest.MonkeyPatch, free_gib: float, status: str) -> None:
    usage = SimpleNamespace(free=int(free_gib * 2**30), total=100 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("RAY_TMPDIR", "/")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert only(doctor.check_disk(), "disk").status == status


def test_a_temp_folder_that_ray_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    disk = only(doctor.check_disk(), "disk")
    assert (disk.status, disk.mend) == ("problem", "Set RAY_TMPDIR=/tmp")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "not writable" in only(doctor.check_disk(), "disk").fact


def test_weights_are_looked_for_here_and_with_ultralytics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here, kept, config = tmp_path / "here", tmp_path / "weights", tmp_path / "config" / "Ultralytics"
    for folder in (here, kept, config):
        folder.mkdir(parents=True)
    (config / "settings.json").write_text(json.dumps({"weights_dir": str(kept)}))
    monkeypatch.chdir(here)
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(config.parent))
    missing = only(doctor.check_weights(), "weights")
    assert missing.status == "note"
    assert "--model" in (missing.mend or "")
    for folder in (kept, here):
        (folder / "yolo26n.pt").touch()
        assert only(doctor.check_weights(), "weights") == Finding("weights", "ok", str(folder / "yolo26n.pt"))


def test_a_cluster_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert only(doctor.check_cluster(), "cluster").status == "ok"
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken_port}")
    assert only(doctor.check_cluster(), "cluster").status == "note"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    cluster = only(doctor.check_cluster(), "cluster")
    assert cluster.status == "problem"
    assert "Unset RAY_ADDRESS" in (cluster.mend or "")


def test_why_a_module_does_not_load() -> None:
    assert import_failure("json") is None
    assert import_failure("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"


def test_the_table_shows_each_mend() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(
            render([Finding("port", "problem", "8000 is [taken]", "Give another --port"), Finding("Python", "ok", "3.11")])
        )
    text = captured.get()
    assert "8000 is [taken]" in text
    assert "→ Give another --port" in text
    assert "1 would stop serve or predict" in text
