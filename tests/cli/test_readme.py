"""The README's commands, executed as they stand there, in a folder like a newcomer's."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from actors.clips import list_frames, read_frames, write_clip
from actors.storage import Storage
from deploy.launch import cluster_address
from tests.conftest import ASSETS, REPOSITORY, picture
from tests.real.test_roboflow_client import SDK
from tests.unit.test_storage import tar_of

CLUSTER = {"get-auth-token", "up", "exec", "dashboard", "submit", "attach", "down", "docker", "kubectl"}  # tests/unit has them
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
ISOLATED = f"uv run -q --no-project --isolated --python {sys.executable} --with {SDK} python"
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]

pytestmark = [pytest.mark.ray, pytest.mark.real]


def command(start: str) -> str:
    (found,) = [line for line in COMMANDS if line.startswith(start)]
    return str(found).replace("uv run yolofleet", f"{sys.executable} -m deploy.cli")


def run(line: str, folder: Path, timeout: float = 170) -> str:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_snippet(client: str, folder: Path, python: str = sys.executable) -> str:
    """Run the README's one Python block that imports ``client``."""
    (snippet,) = [block for kind, block in BLOCKS if kind == "python" and client in block]
    (folder / "snippet.py").write_text(snippet)
    return run(f"{python} snippet.py", folder)


@pytest.fixture
def folder(tmp_path: Path, weights: Path, coco128: Path) -> Path:
    """A folder with ``yolo26n.pt`` and ``photos/``."""
    shutil.copy(weights / "yolo26n.pt", tmp_path)
    (tmp_path / "photos").mkdir()
    images = sorted(coco128.glob("*.jpg"))[:6]
    for image in images:
        shutil.copy(image, tmp_path / "photos")
    shutil.copy(images[0], tmp_path / "photos" / "bus.jpg")
    return tmp_path


def test_the_two_commands_come_first() -> None:
    assert COMMANDS[:2] == ["pip install uv && uv run yolofleet demo", "pip install uv && uv run pytest"]


def test_every_command_has_a_test_here_or_beside() -> None:
    kinds = {line.split("uv run ")[-1].split()[0:2][-1] if "uv run" in line else line.split()[0] for line in COMMANDS}
    assert kinds == {"demo", "pytest", "serve", "curl", "deploy", "predict", "track", "watch", "race", "doctor"} | CLUSTER


DATASETS = README.partition("\n## Datasets\n")[2].partition("\n## ")[0]
SHOWN = [
    line for block in re.findall(r"^```text\n(.*?)^```", DATASETS, re.DOTALL | re.MULTILINE) for line in block.splitlines()
]


def masked(text: str) -> str:
    """Without figures: rates, which the README leaves out, differ with the machine."""
    return re.sub(r"\d+(\.\d+)?|…(?=/s)", "N", text)


PREDICT = [
    line.replace("uv run yolofleet", f"{sys.executable} -m deploy.cli")
    for line in COMMANDS
    if line.startswith("uv run yolofleet predict")
]


@pytest.fixture
def joined(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands join the Ray of this session: one of their own would cost each some seconds."""
    monkeypatch.setenv("RAY_ADDRESS", cluster_address())


@pytest.mark.usefixtures("joined")
def test_predict_from_a_folder_to_every_format_and_retried(folder: Path) -> None:
    first, again, retried = PREDICT[:3]
    (folder / "photos" / "cut.jpg").write_bytes((folder / "photos" / "bus.jpg").read_bytes()[:3000])
    said = run(first, folder) + run(again, folder)
    assert len(list((folder / "results" / "yolo" / "labels").iterdir())) == 7
    shutil.copy(folder / "photos" / "bus.jpg", folder / "photos" / "cut.jpg")
    said += run(retried, folder)
    assert {masked(line) for line in SHOWN[:5]} <= set(masked(said).splitlines())
    assert "8 inputs: 8 results, 0 dead letters" in said
    assert "bowl" in run_snippet("as_frame", folder)


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
@pytest.mark.timeout(600)
def test_predict_from_and_to_a_bucket_scored_and_shown_by_supervision(folder: Path, coco128: Path, bucket: str) -> None:
    to_bucket, from_bucket, scored = (line.replace("s3://bucket", bucket) for line in PREDICT[3:])
    said = run(to_bucket, folder)
    storage = Storage.at(bucket)
    assert len(storage.names("results/annotated")) == 7
    storage.lease(".pending/test")
    storage.put("photos/bus.jpg", (folder / "photos" / "bus.jpg").read_bytes(), ".pending/test")
    storage.put("shards/a.tar", tar_of({"0.png": picture()}), ".pending/test")
    said += run(from_bucket, folder)
    shutil.copytree(coco128.parents[1] / "labels" / "train2017", folder / "labels")
    said += run(scored, folder)
    assert {masked(line) for line in SHOWN[5:]} <= set(masked(said.replace(bucket, "s3://bucket")).splitlines())
    (folder / "scored").rename(folder / "results")
    assert "class_name" in run_snippet("as_supervision", folder)


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_track(folder: Path) -> None:
    frames = read_frames(str(ASSETS / "data" / "traffic.mp4"), range(1, 9))
    write_clip(folder / "traffic.mp4", (frame.image for frame in frames), 24)
    assert "8 inputs: 8 results, 0 dead letters" in run(command("uv run yolofleet track"), folder)
    assert [len(list((folder / "tracked" / made).iterdir())) for made in ("tracks", "mot", "annotated")] == [1, 1, 1]


def test_serve_curl_and_every_client(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    server = subprocess.Popen(
        command("uv run yolofleet serve").split(), cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(150, server.kill)
    watchdog.start()
    try:
        assert server.stdout is not None
        assert any("ready: http://127.0.0.1:8000" in line for line in server.stdout)
        assert '"name":"bowl"' in run(command("curl"), folder)
        assert "'bowl'" in run_snippet("ultralytics_platform", folder)
        run_snippet("websockets", folder)
        clip = (frame.image for frame in read_frames(str(ASSETS / "data" / "traffic.mp4"), range(1, 4)))
        write_clip(folder / "traffic.mp4", clip, 24)
        watched = run(command("uv run yolofleet watch"), folder)
        assert re.search(r"│ 3 +│", watched) and re.search(r"┃ gate +┃", watched)
        assert len(list_frames(str(folder / "watched.mp4"))) == 3
        assert run_snippet("tritonclient", folder).count("'name': 'bowl'") == 6  # three, by each way
        assert "bowl" in run_snippet("inference_sdk", folder, ISOLATED)
    finally:
        watchdog.cancel()
        server.terminate()
        assert server.wait(timeout=90) == 0


def test_doctor(folder: Path) -> None:
    assert "Python" in run(command("uv run yolofleet doctor"), folder)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_race_shows_that_sharing_a_model_is_wrong_and_the_fleet_is_not(folder: Path, coco128: Path) -> None:
    for image in sorted(coco128.glob("*.jpg"))[:24]:
        shutil.copy(image, folder / "photos")
    assert "(e) yolofleet's Ray actors" in run(command("uv run yolofleet race"), folder, timeout=390)
    report = json.loads((folder / "race.json").read_text())
    lines = {line["mode"]: line for line in report["modes"]}
    assert lines["a"]["wrong"] > 0 and report["danger_shown"]
    assert [lines[mode]["wrong"] for mode in ("reference", "b", "c", "d", "e")] == [0] * 5
    assert lines["e"]["errors"] == 0 and report["cure_holds"]
    assert all(line["images_per_s"] and line["peak_memory_mb"] for line in lines.values())
    assert set(report["versions"]) == {"ultralytics", "torch", "ray", "python"}


def test_every_file_of_the_map_exists_and_every_module_is_on_it() -> None:
    mapped = set(re.findall(r"`((?:actors|deploy)/[\w./]+)`", README.partition("## Map of the house")[2]))
    assert all((REPOSITORY / name).exists() for name in mapped)
    modules = {
        str(path.relative_to(REPOSITORY)) for part in ("actors", "deploy") for path in (REPOSITORY / part).rglob("*.py")
    }
    whole = ("deploy/demo/", "deploy/bench/peers/")  # on it as folders
    unmapped = {name for name in modules if not name.endswith("__init__.py") and not name.startswith(whole)} - mapped
    assert not unmapped
