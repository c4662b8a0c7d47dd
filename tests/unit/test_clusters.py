"""Files of Ray's cluster launcher: valid by Ray's own schema, alike where they should be, and the README's commands exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli
from typer.main import get_command

from actors.settings import ActorSettings
from deploy.cli import app
from deploy.config import read_config
from deploy.launch import LaunchError, check_fits
from tests.conftest import REPOSITORY

AWS = REPOSITORY / "cluster.yaml"
FILES = [AWS, *sorted((REPOSITORY / "deploy" / "clusters").glob("*.yaml"))]
README = (REPOSITORY / "README.md").read_text()
RAY_COMMANDS = re.findall(r"^uv run ray (.+?)(?: &)?(?:  #.*)?$", README, re.MULTILINE)


def config(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def start_of_head(path: Path) -> str:
    return str(config(path)["head_start_ray_commands"][-1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_it(path: Path) -> None:
    validate_config(prepare_config(config(path)))


@pytest.mark.parametrize("key", ["prodiver", "max_worker"])
def test_ray_would_refuse_an_unknown_key(key: str) -> None:
    with pytest.raises(Exception, match=key):
        validate_config(prepare_config(config(AWS) | {key: 1}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_head_has_neither_replicas_nor_gpus_and_shows_its_dashboard_to_nobody(path: Path) -> None:
    command = start_of_head(path)
    assert {"--num-cpus=0", "--num-gpus=0", "--head"} <= set(command.split())
    assert "--dashboard-host" not in command and "0.0.0.0" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_everybody_is_asked_for_the_token_which_stands_in_no_file_of_ours(path: Path) -> None:
    assert config(path)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in path.read_text() and "RAY_AUTH_TOKEN" not in path.read_text()


@pytest.mark.parametrize("path", FILES[:2], ids=lambda path: path.stem)
def test_a_cloud_has_gpu_workers_that_scale_on_demand_and_spot(path: Path) -> None:
    types = config(path)["available_node_types"]
    assert types.pop("head")["resources"] == {"CPU": 0}
    assert all(0 <= each["min_workers"] < each["max_workers"] for each in types.values())
    assert re.search("MarketType.: .spot|preemptible.: True", str(types["gpu-spot"]))
    assert not re.search("MarketType|preemptible", str(types["gpu"]))


def test_the_variants_differ_in_their_machines_only() -> None:
    alike = (
        "cluster_name",
        "file_mounts",
        "rsync_exclude",
        "setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    )
    first, *others = [{key: config(path)[key] for key in alike} for path in FILES]
    assert all(other == first for other in others)


def test_weights_lie_where_the_example_looks_for_them() -> None:
    settings, _ = read_config(REPOSITORY / "deploy" / "serve.yaml")
    assert all(Path(model.weights).parent == Path("/models") for model in settings.models)
    assert any("~/yolofleet/weights /models" in command for command in config(AWS)["setup_commands"])


def test_what_goes_to_the_nodes_is_here() -> None:
    mounts = config(AWS)["file_mounts"]
    ours = {local for remote, local in mounts.items() if remote.startswith("~/yolofleet/")} - {"weights"}  # the reader's own
    assert all((REPOSITORY / local).exists() for local in ours)
    assert ours >= {"pyproject.toml", "README.md", "LICENSE", "actors", "deploy"}  # what uv needs to install us
    assert all(remote.rpartition("/")[2] == local.rpartition("/")[2] for remote, local in mounts.items())


def test_the_readme_goes_up_and_down_with_commands_that_ray_has() -> None:
    names = [line.split()[0] for line in RAY_COMMANDS]
    assert names[0] == "get-auth-token" and names.index("up") < names.index("exec") < names.index("down") == len(names) - 1
    for line in RAY_COMMANDS:
        name, *arguments = shlex.split(line)
        command: click.Command = cli.commands[name]
        command.make_context(name, arguments)  # a wrong flag or a missing argument raises


def test_the_readme_submits_a_job_that_predict_would_take() -> None:
    (job,) = re.findall(r"^RAY_AUTH_MODE=token uv run yolofleet submit --address \S+ -- (.+)$", README, re.MULTILINE)
    name, *arguments = shlex.split(job)
    command: Any = get_command(app)
    assert command.commands[name].make_context(name, arguments).params["model"].startswith("/models/")


def test_a_head_without_cpus_takes_what_only_workers_to_come_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = [(2, ActorSettings(num_cpus=1, num_gpus=0.5))]
    monkeypatch.setattr(ray, "nodes", lambda: [{}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    check_fits(reserved, "--replicas", "replica")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8})
    with pytest.raises(LaunchError, match="reserve 1 GPUs and Ray has 0 here"):
        check_fits(reserved, "--replicas", "replica")
