"""One log with ids: Serve's own handlers and formats, fed by our loggers too. No Ray runs here."""

import inspect
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from ray.serve import context
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig

from deploy.app import model_app
from deploy.cli import serve
from deploy.logs import OURS, SERVE, for_job, for_serve, log_with_serve
from deploy.release import Release
from deploy.settings import AppSettings, LogSettings, ServedModel

FAKE = ServedModel(name="fake", weights="fake:")
JSON = LogSettings(level="INFO", format="json")


@pytest.fixture
def loggers() -> Iterator[None]:
    """The loggers that a replica's process changes, as they were."""
    touched = [logging.getLogger(name) for name in (SERVE, *OURS)]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in touched]
    for logger in touched:
        logger.handlers = []
    yield
    for logger, (handlers, propagate, level) in zip(touched, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def request_id(monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of the request that Serve says is going on."""
    going_on = context._RequestContext(route="/predict", request_id="abc-1", app_name="yolofleet")
    monkeypatch.setattr(context, "_get_serve_request_context", lambda: going_on)
    return "abc-1"


def serve_logs(folder: Path, log: LogSettings) -> Path:
    """Configure Serve's logging in this process, as Serve does; returns its file."""
    settings = LoggingConfig(**for_serve(log), logs_dir=str(folder))
    configure_component_logger(
        component_name="ingress", component_id="r1", logging_config=settings, max_bytes=100_000, backup_count=1
    )
    (file,) = folder.iterdir()
    return file


@pytest.mark.usefixtures("loggers")
def test_a_line_of_ours_is_json_with_the_request_it_belongs_to(tmp_path: Path, request_id: str) -> None:
    file = serve_logs(tmp_path, JSON)
    log_with_serve()
    logging.getLogger("deploy.api.problems").error("request %s failed", request_id)
    logging.getLogger("actors.model").debug("not at this level")
    (line,) = map(json.loads, file.read_text().splitlines())
    assert (
        line.items()
        >= {
            "levelname": "ERROR",
            "name": "deploy.api.problems",
            "message": "request abc-1 failed",
            "request_id": request_id,
            "component_name": "ingress",
        }.items()
    )


@pytest.mark.usefixtures("loggers")
def test_text_has_the_id_too_and_one_line_each(tmp_path: Path, request_id: str) -> None:
    file = serve_logs(tmp_path, LogSettings())
    log_with_serve()
    logging.getLogger("actors.detector").warning("a batch is halved")
    (line,) = file.read_text().splitlines()
    assert "WARNING" in line and request_id in line and line.endswith("a batch is halved")


@pytest.mark.usefixtures("loggers")
def test_our_loggers_follow_when_serve_changes_its_handlers(tmp_path: Path) -> None:
    serve_logs(tmp_path / "text", LogSettings())
    log_with_serve()
    file = serve_logs(tmp_path / "json", JSON)
    logging.getLogger("actors.model").error("after")
    assert json.loads(file.read_text())["message"] == "after"


def test_a_job_logs_in_the_same_formats() -> None:
    assert asdict(for_job(JSON)) == {"encoding": "JSON", "log_level": "INFO", "additional_log_standard_attrs": ["name"]}
    assert for_job(LogSettings()).encoding == "TEXT"


def test_every_deployment_is_told_how_to_log_and_none_is_replaced_for_it() -> None:
    plain, changed = (Release.of(AppSettings(models=(FAKE,), log=log)) for log in (LogSettings(), JSON))
    deployment = model_app(changed, FAKE)._bound_deployment
    assert deployment._deployment_config.logging_config == LoggingConfig(**for_serve(JSON)).model_dump()
    assert plain.ingress_version == changed.ingress_version
    assert plain.model_version(FAKE) == changed.model_version(FAKE)


def test_the_flags_have_the_settings_values() -> None:
    flags = inspect.signature(serve).parameters
    assert (flags["log_level"].default, flags["log_format"].default) == (LogSettings().level, LogSettings().format)
