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
    "actors.video": {"actors.errors", "actors.settings"},
    "actors.annotate": {"actors.images", "actors.schemas", "actors.settings"},
    "actors.hardware": set(),
    "actors.right_of_way": set(),
    "actors.metrics": {"actors.errors", "actors.schemas"},
    "actors.fake_model": {"actors.errors", "actors.schemas", "actors.settings"},
    "actors.weights": {"actors.errors"},
    "actors.engines": {"actors.errors", "actors.settings", "actors.weights"},
    "actors.predictor": {"actors.errors", "actors.openvino_engine", "actors.schemas"},
    "actors.openvino_engine": set(),
    "actors.verify": {"actors.model", "actors.schemas"},
    "actors.exporter": {
        "actors.engines",
        "actors.errors",
        "actors.evaluate",
        "actors.hardware",
        "actors.images",
        "actors.model",
        "actors.predictor",
        "actors.schemas",
        "actors.settings",
        "actors.verify",
        "actors.writers",
    },
    "actors.startup": {
        "actors.detector",
        "actors.engines",
        "actors.errors",
        "actors.model",
        "actors.reservation",
        "actors.schemas",
        "actors.settings",
    },
    "actors.model": {
        "actors.engines",
        "actors.errors",
        "actors.fake_model",
        "actors.images",
        "actors.predictor",
        "actors.schemas",
        "actors.settings",
        "actors.weights",
    },
    "actors.reservation": {"actors.errors", "actors.hardware", "actors.model", "actors.schemas", "actors.settings"},
    "actors.detector": {"actors.errors", "actors.schemas", "actors.settings", "actors.images", "actors.model"},
    "actors.storage": {"actors.errors"},
    "actors.containers": {"actors.errors", "actors.images", "actors.storage"},
    "actors.dataset": {"actors.clips", "actors.containers", "actors.errors", "actors.images", "actors.storage"},
    "actors.writers": {"actors.schemas"},
    "actors.ledger": {"actors.errors", "actors.dataset", "actors.storage", "actors.writers"},
    "actors.results": {"actors.ledger", "actors.storage"},
    "actors.exports": {"actors.ledger", "actors.results"},
    "actors.gallery": {
        "actors.clips",
        "actors.dataset",
        "actors.errors",
        "actors.images",
        "actors.ledger",
        "actors.schemas",
        "actors.settings",
        "actors.storage",
        "actors.writers",
    },
    "actors.worker": {
        "actors.dataset",
        "actors.detector",
        "actors.errors",
        "actors.model",
        "actors.schemas",
        "actors.settings",
        "actors.writers",
        "actors.startup",
    },
    "actors.evaluate": {"actors.errors"},
    "actors.tracker": {"actors.errors", "actors.schemas", "actors.settings"},
    "actors.crossings": {"actors.schemas", "actors.settings"},
    "actors.stream": {
        "actors.crossings",
        "actors.errors",
        "actors.images",
        "actors.schemas",
        "actors.settings",
        "actors.tracker",
    },
    "actors.clips": {"actors.errors"},
    "actors.tracks": {
        "actors.annotate",
        "actors.clips",
        "actors.errors",
        "actors.hardware",
        "actors.ledger",
        "actors.right_of_way",
        "actors.settings",
        "actors.storage",
        "actors.tracker",
        "actors.writers",
    },
    "actors.pool": {
        "actors.clips",
        "actors.annotate",
        "actors.dataset",
        "actors.detector",
        "actors.errors",
        "actors.hardware",
        "actors.images",
        "actors.ledger",
        "actors.reservation",
        "actors.right_of_way",
        "actors.schemas",
        "actors.settings",
        "actors.tracker",
        "actors.storage",
        "actors.writers",
        "actors.startup",
    },
    "deploy.api": {
        "deploy.api.auth",
        "deploy.api.fetch",
        "deploy.api.fleet",
        "deploy.api.jobs",
        "deploy.api.kserve",
        "deploy.api.middleware",
        "deploy.api.page",
        "deploy.api.platform",
        "deploy.api.problems",
        "deploy.api.statistics",
        "deploy.api.tracing",
        "deploy.api.roboflow",
        "deploy.api.streams",
        "deploy.api.ultralytics",
        "deploy.keys",
        "deploy.settings",
    },
    "deploy.api.auth": {"actors.errors", "deploy.api.problems", "deploy.keys"},
    "deploy.api.fetch": {"actors.errors", "deploy.api.problems", "deploy.settings"},
    "deploy.api.call": {"actors.errors", "actors.schemas", "deploy.api.fleet", "deploy.api.statistics", "deploy.api.tracing"},
    "deploy.api.fleet": {"actors.schemas", "actors.settings"},
    "deploy.api.kserve": {
        "actors.errors",
        "actors.schemas",
        "deploy.api.call",
        "deploy.api.fleet",
        "deploy.api.forms",
        "deploy.api.problems",
        "deploy.api.statistics",
        "deploy.api.tensors",
        "deploy.api.ultralytics",
    },
    "deploy.api.middleware": {"deploy.api.problems"},
    "deploy.api.page": set(),
    "deploy.api.recent": set(),
    "deploy.api.problems": {"actors.errors", "deploy.api.tracing"},
    "deploy.api.tracing": {"actors.errors", "actors.schemas"},
    "deploy.api.forms": {"actors.errors", "actors.schemas", "actors.video", "deploy.api.fetch"},
    "deploy.api.jobs": {"actors.errors", "actors.schemas", "deploy.api.fleet", "deploy.api.ultralytics"},
    "deploy.api.lines": set(),
    "deploy.api.platform": {"deploy.api.call", "deploy.api.fleet", "deploy.api.forms", "deploy.api.ultralytics"},
    "deploy.api.roboflow": {"actors.errors", "actors.schemas", "deploy.api.call", "deploy.api.fetch"},
    "deploy.api.statistics": {"actors.schemas", "deploy.api.fleet", "deploy.api.recent"},
    "deploy.api.streams": {
        "actors.errors",
        "actors.schemas",
        "actors.settings",
        "deploy.api.call",
        "deploy.api.fleet",
        "deploy.api.forms",
        "deploy.api.problems",
        "deploy.api.ultralytics",
        "deploy.settings",
    },
    "deploy.api.tensors": {"actors.errors"},
    "deploy.api.ultralytics": {
        "actors.errors",
        "actors.schemas",
        "deploy.api.call",
        "deploy.api.forms",
        "deploy.api.lines",
        "deploy.api.problems",
    },
    "deploy.batch": {
        "actors.metrics",
        "actors.clips",
        "actors.dataset",
        "actors.errors",
        "actors.evaluate",
        "actors.exports",
        "actors.hardware",
        "actors.ledger",
        "actors.weights",
        "actors.pool",
        "actors.results",
        "actors.schemas",
        "actors.settings",
        "actors.tracks",
        "deploy.cli",
        "actors.storage",
        "deploy.jobs",
        "deploy.launch",
        "deploy.settings",
        "actors.engines",
    },
    "deploy.submit": {"actors.errors", "deploy.launch"},
    "deploy.bench": {"actors.errors"},
    "deploy.options": {"actors.errors", "actors.settings", "deploy.settings"},
    "deploy.bench.cli": {
        "actors.hardware",
        "actors.settings",
        "deploy.bench",
        "deploy.bench.background",
        "deploy.bench.batch",
        "deploy.bench.contest",
        "deploy.bench.limit",
        "deploy.bench.report",
        "deploy.bench.serve",
        "deploy.bench.share",
        "deploy.launch",
        "deploy.options",
        "deploy.weights",
    },
    "deploy.bench.load": {"deploy.bench"},
    "deploy.bench.limit": {
        "deploy.bench",
        "deploy.bench.machine",
        "actors.images",
        "actors.model",
        "actors.schemas",
        "actors.settings",
        "actors.writers",
        "actors.startup",
    },
    "deploy.bench.batch": {
        "deploy.weights",
        "actors.schemas",
        "actors.settings",
        "deploy.bench",
        "deploy.bench.exports",
        "deploy.bench.limit",
        "deploy.bench.machine",
    },
    "deploy.bench.background": {
        "actors.settings",
        "deploy.bench",
        "deploy.bench.load",
        "deploy.bench.machine",
        "deploy.launch",
        "deploy.settings",
    },
    "deploy.bench.machine": set(),
    "deploy.bench.processes": {"deploy.bench", "deploy.environment"},
    "deploy.bench.report": {"deploy.bench"},
    "deploy.bench.environments": {"deploy.bench"},
    "deploy.bench.exports": {"deploy.bench"},
    "deploy.bench.contest": {
        "actors.schemas",
        "actors.settings",
        "deploy.bench",
        "deploy.bench.environments",
        "deploy.bench.exports",
        "deploy.bench.limit",
        "deploy.bench.load",
        "deploy.bench.machine",
        "deploy.bench.processes",
        "deploy.bench.serve",
    },
    "deploy.bench.serve": {
        "actors.schemas",
        "actors.settings",
        "deploy.bench",
        "deploy.bench.limit",
        "deploy.bench.load",
        "deploy.bench.machine",
        "deploy.bench.processes",
        "deploy.settings",
        "deploy.weights",
    },
    "deploy.bench.share": {
        "actors.detector",
        "actors.errors",
        "actors.hardware",
        "actors.reservation",
        "actors.schemas",
        "actors.settings",
        "deploy.bench",
        "deploy.bench.load",
        "deploy.bench.machine",
        "actors.startup",
    },
    "deploy.nodes": {"actors.errors", "actors.hardware", "deploy.bench.machine"},
    "deploy.plan": {
        "actors.errors",
        "actors.images",
        "actors.schemas",
        "actors.settings",
        "deploy.bench",
        "deploy.bench.load",
        "deploy.bench.machine",
        "deploy.bench.share",
        "deploy.demo.scene",
        "deploy.environment",
        "deploy.launch",
        "deploy.nodes",
        "deploy.settings",
    },
    "deploy.settings": {"actors.errors", "actors.settings"},
    "deploy.proxy": {"actors.errors", "deploy.api.middleware", "deploy.api.problems"},
    "deploy.environment": {"actors.errors"},
    "deploy.logs": {"deploy.settings"},
    "deploy.keys": {"actors.errors"},
    "deploy.agreement": {"actors.schemas"},
    "deploy.app": {"deploy.ingress", "deploy.logs", "deploy.release", "deploy.replica", "deploy.settings"},
    "deploy.drain": {"actors.errors", "deploy.settings"},
    "deploy.config": {"actors.errors", "actors.settings", "deploy.settings"},
    "deploy.release": {"actors.fake_model", "actors.weights", "actors.settings", "deploy.settings"},
    "deploy.rollout": {
        "actors.errors",
        "actors.images",
        "actors.schemas",
        "deploy.agreement",
        "deploy.app",
        "deploy.config",
        "deploy.demo.scene",
        "deploy.launch",
        "deploy.release",
        "deploy.settings",
    },
    "deploy.streams": {
        "actors.errors",
        "actors.schemas",
        "actors.settings",
        "actors.stream",
        "deploy.backends",
        "deploy.settings",
    },
    "deploy.tracing": set(),
    "deploy.admission": {"actors.errors", "actors.schemas"},
    "deploy.quarantine": {"actors.errors"},
    "deploy.backends": {
        "actors.errors",
        "actors.schemas",
        "deploy.quarantine",
        "deploy.release",
        "deploy.replica",
        "deploy.settings",
    },
    "deploy.jobs": {"actors.errors", "actors.gallery", "actors.schemas", "actors.settings"},
    "deploy.roster": {"actors.schemas", "deploy.settings"},
    "deploy.spread": {"actors.schemas", "actors.settings", "deploy.roster"},
    "deploy.ingress": {
        "actors.errors",
        "actors.metrics",
        "actors.schemas",
        "actors.settings",
        "deploy.admission",
        "deploy.api",
        "deploy.backends",
        "deploy.jobs",
        "deploy.logs",
        "deploy.release",
        "deploy.replica",
        "deploy.roster",
        "deploy.settings",
        "deploy.streams",
        "deploy.tracing",
    },
    "deploy.replica": {
        "deploy.quarantine",
        "deploy.spread",
        "actors.annotate",
        "actors.detector",
        "actors.hardware",
        "actors.metrics",
        "actors.reservation",
        "actors.right_of_way",
        "actors.schemas",
        "actors.settings",
        "actors.video",
        "deploy.logs",
        "deploy.settings",
        "actors.startup",
    },
}
PEERS = {f"deploy.bench.peers.{path.stem}" for path in (REPOSITORY / "deploy" / "bench" / "peers").glob("*.py")}
ONLY_IMPORTERS = {
    "supervision": {"actors.annotate", "actors.crossings", "actors.results"},
    "cv2": {"actors.clips", "actors.images", "actors.video", *PEERS, "deploy.demo.train"},
    "PIL": {"actors.images", *PEERS},
    "torch": {
        "actors.engines",
        "actors.model",
        "actors.openvino_engine",
        "actors.predictor",
        "actors.hardware",
        "actors.evaluate",
        "deploy.race",
        "deploy.doctor",
        "deploy.demo.train",
    },
    "ultralytics": {
        "actors.annotate",
        "actors.exporter",
        "actors.model",
        "actors.openvino_engine",
        "actors.predictor",
        "actors.evaluate",
        "actors.tracker",
        "actors.weights",
        *PEERS,
        "deploy.race",
        "deploy.doctor",
        "deploy.demo.train",
    },
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
