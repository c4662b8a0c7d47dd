"""deploy/Dockerfile without a Docker engine: its instructions, its shell, and the wheel that it installs."""

import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "deploy" / "Dockerfile").read_text()
JOINED = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE))
INSTRUCTIONS = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in JOINED.splitlines() if line]
STAGES = [position for position, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM"]
SHELL = [argument for name, argument in INSTRUCTIONS if name == "RUN"]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def last_stage(name: str) -> list[str]:
    return [argument for each, argument in INSTRUCTIONS[STAGES[-1] :] if each == name]


def installed(variant: str) -> subprocess.CompletedProcess[str]:
    """What the installation step would give uv, by the shell that runs it."""
    (step,) = [each for each in SHELL if "$VARIANT" in each]
    stub = f'VARIANT={variant}; uv() {{ echo "$@"; }}; {step}'
    return subprocess.run(["sh", "-c", stub], capture_output=True, text=True, check=False)


def test_every_instruction_is_one_that_docker_has() -> None:
    known = {"FROM", "ARG", "ENV", "WORKDIR", "RUN", "COPY", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in INSTRUCTIONS} <= known and INSTRUCTIONS[0][0] == "FROM"


def test_the_linter_has_nothing_to_say() -> None:
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", str(REPOSITORY / "deploy" / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs_as_nobody_special_and_only_our_command() -> None:
    assert last_stage("USER") == ["1000"] and "--uid 1000" in last_stage("RUN")[0]
    assert last_stage("ENTRYPOINT") == ['["yolofleet"]'] and "yolofleet" in PROJECT["project"]["scripts"]
    assert [name for name, _ in INSTRUCTIONS].index("USER") > max(
        position for position, (name, _) in enumerate(INSTRUCTIONS) if name in ("RUN", "COPY")
    )


def test_what_it_copies_exists_and_reaches_the_builder() -> None:
    sources = [word for name, argument in INSTRUCTIONS if name == "COPY" for word in argument.split()[:-1]]
    ours = [source for source in sources if not source.startswith(("--", "/"))]
    ignored = (REPOSITORY / ".dockerignore").read_text().split("\n")
    assert set(ours) == {line[1:] for line in ignored if line.startswith("!")}
    assert all((REPOSITORY / source).exists() for source in ours)
    assert set(ours) >= {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"}
    assert set(ours) >= set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])


def test_the_image_is_of_the_python_that_we_need_and_of_no_registry_by_name() -> None:
    bases = {argument.split()[0] for name, argument in INSTRUCTIONS if name == "FROM"}
    assert bases == {"python:3.11-slim-bookworm"} and PROJECT["project"]["requires-python"] == ">=3.11"
    assert not re.search(r"https?://|--(extra-)?index", TEXT)


@pytest.mark.parametrize("step", SHELL)
def test_every_step_is_shell(step: str) -> None:
    subprocess.run(["sh", "-n", "-c", step], check=True)


@pytest.mark.parametrize(("variant", "extras"), [("cpu", {"otel"}), ("cuda", {"gpu", "otel"})])
def test_each_variant_installs_its_extras(variant: str, extras: set[str]) -> None:
    words = installed(variant).stdout.split()
    assert {after for before, after in pairwise(words) if before == "--extra"} == extras
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    assert ("--torch-backend" in words) == (variant == "cpu")


def test_no_third_variant_is_built_silently() -> None:
    failed = installed("cdua")
    assert failed.returncode == 1 and "VARIANT is 'cdua': give cpu or cuda" in failed.stderr


def test_the_wheel_has_everything_that_lies_in_our_packages(tmp_path: Path) -> None:
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", tmp_path], cwd=REPOSITORY, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(("actors/", "deploy/"))}
    files = (path for package in ("actors", "deploy") for path in (REPOSITORY / package).rglob("*") if path.is_file())
    ours = {str(path.relative_to(REPOSITORY)) for path in files if "__pycache__" not in path.parts}
    assert packed == ours
    assert packed >= {"deploy/demo/parts.pt", "deploy/demo/parts.json", "deploy/serve.yaml", "deploy/Dockerfile"}


def test_the_readme_builds_what_the_manifests_run() -> None:
    (command,) = re.findall(r"^docker (.+)$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert command in TEXT
    tag = command.split()[command.split().index("-t") + 1]
    manifests = "".join(path.read_text() for path in (REPOSITORY / "deploy" / "kuberay").glob("ray*.yaml"))
    assert set(re.findall(r"yolofleet:[\w.-]+", manifests)) == {tag}
