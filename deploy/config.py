"""CONFIG of ``yolofleet deploy``: a YAML file → settings, strictly.

    models: […]                                                  plain AppSettings, or
    applications: [{import_path: deploy.app:build_app, args}]     a Serve config file, as ``serve deploy`` and KubeRay take it

An unknown key is an error that names it. (Serve itself ignores those it does not know.)
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from actors.errors import BadRequest
from actors.settings import Settings
from deploy.settings import AppSettings


class HttpOptions(Settings):
    """Where Serve listens. Only its first application decides: a Serve that runs keeps its address."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000


class ServeApplication(Settings):
    """The one application of a Serve config file that is ours."""

    name: Literal["yolofleet"] = "yolofleet"
    route_prefix: Literal["/"] = "/"
    import_path: Literal["deploy.app:build_app"]
    args: AppSettings


class ServeConfig(Settings):
    """The part of Serve's config file that we know; see ``ray.serve.schema.ServeDeploySchema``."""

    proxy_location: Literal["EveryNode"] = "EveryNode"
    http_options: HttpOptions = HttpOptions()
    applications: Annotated[tuple[ServeApplication, ...], Field(min_length=1, max_length=1)]


def read_config(path: Path) -> tuple[AppSettings, HttpOptions]:
    """Read a config file of either kind.

    Files that are here get their whole path: replicas run in another folder than this command.

    Raises:
        BadRequest: there is no such file, it is not YAML, or a key or value in it is wrong.
    """
    document = _document(path)
    try:
        if "applications" in document:
            config = ServeConfig.model_validate(document)
            settings, http = config.applications[0].args, config.http_options
        else:
            settings, http = AppSettings.model_validate(document), HttpOptions()
    except ValidationError as error:
        raise BadRequest(f"{path}: {_mistakes(error)}") from None
    models = tuple(
        model.model_copy(update={"weights": _whole(model.weights), "calibrate": model.calibrate and _whole(model.calibrate)})
        for model in settings.models
    )
    keys_file = settings.auth.keys_file
    auth = settings.auth.model_copy(update={"keys_file": keys_file and _whole(keys_file)})
    return settings.model_copy(update={"models": models, "auth": auth}), http


def _whole(path: str) -> str:
    """The whole path of what is here; else as it is, since it may be on other nodes, or no path at all."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def _document(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not document:
        raise BadRequest(f"{path} holds no settings: it must say at least 'models:', as deploy/serve.yaml does")
    return document


def _mistakes(error: ValidationError) -> str:
    """All unknown keys by name, or else the first mistake."""
    unknown = [_place(one["loc"]) for one in error.errors() if one["type"] == "extra_forbidden"]
    if unknown:
        return f"unknown {'keys' if len(unknown) > 1 else 'key'} {', '.join(unknown)}"
    first = error.errors()[0]
    return f"{_place(first['loc'])}: {first['msg']}" if first["loc"] else str(first["msg"])


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))
