"""Who may import whom: the table of the design, held against every module's imports, lazy ones included."""

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ALLOWED = {
    "actors.errors": set(),
    "actors.schemas": {"actors.errors"},
    "actors.settings": set(),
    "actors.images": {"actors.errors", "actors.settings"},
    "actors.hardware": set(),
    "actors.fake_model": {"actors.errors", "actors.schemas", "actors.settings"},
    "actors.model": {"actors.errors", "actors.schemas", "actors.settings", "actors.fake_model"},
    "actors.detector": {"actors.errors", "actors.schemas", "actors.settings", "actors.images", "actors.model"},
    "actors.dataset": {"actors.errors", "actors.images"},
    "actors.writers": {"actors.schemas"},
    "actors.ledger": {"actors.errors", "actors.dataset", "actors.writers"},
    "actors.evaluate": {"actors.errors"},
    "actors.pool": {
        "actors.dataset",
        "actors.detector",
        "actors.errors",
        "actors.images",
        "actors.ledger",
        "actors.model",
        "actors.schemas",
        "actors.settings",
        "actors.writers",
    },
    "deploy.api": {
        "deploy.api.fleet",
        "deploy.api.middleware",
        "deploy.api.problems",
        "deploy.api.ultralytics",
        "deploy.settings",
    },
    "deploy.api.fleet": {"actors.schemas"},
    "deploy.api.middleware": {"deploy.api.problems"},
    "deploy.api.problems": {"actors.errors"},
    "deploy.api.ultralytics": {"actors.errors", "actors.schemas", "deploy.api.fleet"},
    "deploy.batch": {
        "actors.dataset",
        "actors.ledger",
        "actors.model",
        "actors.pool",
        "actors.schemas",
        "actors.settings",
        "deploy.launch",
    },
    "deploy.settings": {"actors.errors", "actors.settings"},
    "deploy.environment": set(),
    "deploy.app": {"deploy.ingress", "deploy.replica", "deploy.settings"},
    "deploy.ingress": {"actors.errors", "actors.schemas", "deploy.api", "deploy.settings"},
    "deploy.replica": {"actors.detector", "actors.model", "actors.schemas", "actors.settings", "deploy.settings"},
}
ONLY_IMPORTERS = {
    "cv2": {"actors.images", "deploy.demo.train"},
    "PIL": {"actors.images"},
    "torch": {"actors.model", "actors.hardware", "actors.evaluate", "deploy.race", "deploy.doctor", "deploy.demo.train"},
    "ultralytics": {"actors.model", "actors.evaluate", "deploy.race", "deploy.doctor", "deploy.demo.train"},
}


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports; ``from a import b`` counts as ``a.b`` where that is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in MODULES else node.module)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for folder in ("actors", "deploy") for path in (REPOSITORY / folder).rglob("*.py")}
MODULES = set(FILES)


def test_every_module_of_the_core_and_of_the_http_interface_is_in_the_table() -> None:
    assert {name for name in MODULES if name.startswith(("actors.", "deploy.api"))} <= set(ALLOWED)


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_module_imports_only_what_the_table_allows(module: str) -> None:
    ours = {name for name in imports_of(FILES[module]) if name.split(".")[0] in ("actors", "deploy")}
    assert ours - {"actors", "deploy"} <= ALLOWED[module]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("actors")))
def test_the_core_knows_no_http_and_no_shell(module: str) -> None:
    forbidden = ("deploy", "fastapi", "starlette", "ray.serve")
    assert not [name for name in imports_of(FILES[module]) if name.startswith(forbidden)]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("deploy.api")))
def test_the_http_interface_is_free_of_ray(module: str) -> None:
    assert not [name for name in imports_of(FILES[module]) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("library", sorted(ONLY_IMPORTERS))
def test_heavy_libraries_have_few_importers(library: str) -> None:
    importers = {module for module, path in FILES.items() if library in {name.split(".")[0] for name in imports_of(path)}}
    assert importers <= ONLY_IMPORTERS[library]


def test_there_is_no_room_without_a_name() -> None:
    assert not [path for path in FILES.values() if path.stem in ("utils", "helpers", "common", "misc")]
