"""The README's commands, executed as they stand there, in a folder like a newcomer's."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]

pytestmark = [pytest.mark.ray, pytest.mark.real]


def command(start: str) -> str:
    (found,) = [line for line in COMMANDS if line.startswith(start)]
    return str(found).replace("uv run yolofleet", f"{sys.executable} -m deploy.cli")


def run(line: str, folder: Path, timeout: float = 170) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    assert kinds == {"demo", "pytest", "serve", "curl", "predict", "race", "doctor"}


def test_predict_and_the_snippet_that_reads_its_output(folder: Path) -> None:
    assert "7 inputs: 7 results, 0 dead letters" in run(command("uv run yolofleet predict"), folder)
    (snippet,) = [block for kind, block in BLOCKS if kind == "python"]
    (folder / "snippet.py").write_text(snippet)
    assert "bus.jpg" in run(f"{sys.executable} snippet.py", folder)


def test_serve_and_curl(folder: Path) -> None:
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
    finally:
        watchdog.cancel()
        server.terminate()
        assert server.wait(timeout=90) == 0


def test_doctor(folder: Path) -> None:
    assert "Python" in run(command("uv run yolofleet doctor"), folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_race(folder: Path) -> None:
    assert "(e) yolofleet's Ray actors" in run(command("uv run yolofleet race"), folder, timeout=390)
    assert (folder / "race.json").is_file()


def test_every_file_of_the_map_exists_and_every_module_is_on_it() -> None:
    mapped = set(re.findall(r"`((?:actors|deploy)/[\w./]+)`", README.partition("## Map of the house")[2]))
    assert all((REPOSITORY / name).exists() for name in mapped)
    modules = {
        str(path.relative_to(REPOSITORY)) for part in ("actors", "deploy") for path in (REPOSITORY / part).rglob("*.py")
    }
    unmapped = {name for name in modules if not name.endswith("__init__.py") and not name.startswith("deploy/demo/")} - mapped
    assert not unmapped
