"""deploy/kuberay: every field is one that Kubernetes and KubeRay know, and the endpoint's config is deploy/serve.yaml."""

import re
import shlex
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError
from typer.main import get_command

from deploy.cli import app
from deploy.config import ServeConfig
from tests.conftest import REPOSITORY
from tests.unit.kuberay import PARSER, ClusterSpec, Container, HeadGroup, HttpGet

FOLDER = REPOSITORY / "deploy" / "kuberay"
RAW = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}


def objects(stem: str) -> list[Any]:
    return [PARSER.validate_python(each) for each in RAW[stem]]


def clusters() -> dict[str, ClusterSpec]:
    return {
        "raycluster": objects("raycluster")[0].spec,
        "rayjob": objects("rayjob")[0].spec.ray_cluster_spec,
        "rayservice": objects("rayservice")[0].spec.ray_cluster_config,
    }


def groups(cluster: ClusterSpec) -> list[HeadGroup]:
    return [cluster.head_group_spec, *cluster.worker_group_specs]


def container(group: HeadGroup) -> Container:
    return group.template.spec.containers[0]


@pytest.mark.parametrize("stem", RAW)
def test_every_field_is_known(stem: str) -> None:
    assert objects(stem)


def test_a_field_that_nobody_knows_is_seen() -> None:
    (cluster, _) = RAW["raycluster"]
    with pytest.raises(ValidationError, match="authOption"):
        PARSER.validate_python(cluster | {"spec": cluster["spec"] | {"authOption": {"mode": "token"}}})


def test_the_endpoints_config_is_the_example_but_for_its_address() -> None:
    config = yaml.safe_load(objects("rayservice")[0].spec.serve_config)
    example = yaml.safe_load((REPOSITORY / "deploy" / "serve.yaml").read_text())
    assert config == example | {"http_options": example["http_options"] | {"host": "0.0.0.0"}}
    assert ServeConfig.model_validate(config)


@pytest.mark.parametrize("cluster", list(clusters().values()), ids=clusters())
def test_clusters_are_of_our_ray_with_an_idle_head_and_gpu_workers_alike(cluster: ClusterSpec) -> None:
    assert cluster.ray_version == ray.__version__ and cluster.enable_in_tree_autoscaling
    assert cluster.head_group_spec.ray_start_params.items() >= {"num-cpus": "0", "num-gpus": "0"}.items()
    assert "nvidia.com/gpu" not in container(cluster.head_group_spec).resources.requests
    for group in cluster.worker_group_specs:
        gpus = group.ray_start_params["num-gpus"]
        assert (
            container(group).resources.requests["nvidia.com/gpu"]
            == gpus
            == container(group).resources.limits["nvidia.com/gpu"]
        )
    assert len({container(group).image for each in clusters().values() for group in groups(each)}) == 1


@pytest.mark.parametrize("cluster", list(clusters().values()), ids=clusters())
def test_head_and_workers_have_the_same_environment_and_volumes_and_watch_their_raylet(cluster: ClusterSpec) -> None:
    first, *others = groups(cluster)
    for group in others:
        assert (container(group).env, container(group).volume_mounts) == (container(first).env, container(first).volume_mounts)
    for group in groups(cluster):
        probe = container(group).liveness_probe
        assert probe and probe.http_get == HttpGet(path="/api/local_raylet_healthz", port=52365)
        assert {mount.name for mount in container(group).volume_mounts} == {each.name for each in group.template.spec.volumes}


def test_the_data_plane_can_be_switched_on_all_pods_of_what_serves() -> None:
    for name in ("rayservice", "raycluster"):
        cluster = clusters()[name]
        assert all("RAY_SERVE_ENABLE_HA_PROXY" in {each.name for each in container(group).env} for group in groups(cluster))


def test_a_pod_gets_requests_while_its_proxy_takes_them() -> None:
    for group in clusters()["rayservice"].worker_group_specs:
        assert container(group).readiness_probe.http_get == HttpGet(path="/-/healthz", port=8000)


@pytest.mark.parametrize("stem", ["rayservice", "raycluster"])
def test_the_budget_is_about_the_workers_and_lets_one_go_at_a_time(stem: str) -> None:
    _, budget = objects(stem)
    assert budget.spec.max_unavailable == 1
    assert all(
        group.template.metadata.labels == budget.spec.selector.match_labels for group in clusters()[stem].worker_group_specs
    )


@pytest.mark.parametrize("stem", ["rayservice", "raycluster"])
def test_workers_drain_themselves_within_their_grace(stem: str) -> None:
    for group in clusters()[stem].worker_group_specs:
        lifecycle = container(group).lifecycle
        assert lifecycle
        name, *arguments = shlex.split(lifecycle.pre_stop.exec.command[-1])[1:]
        command: Any = get_command(app)
        given = command.commands[name].make_context(name, arguments).params
        assert given["node"] is None and given["timeout"] < group.template.spec.termination_grace_period_seconds


@pytest.mark.parametrize("stem", ["rayservice", "raycluster"])
def test_the_head_remembers_in_the_redis_that_is_there(stem: str) -> None:
    service, redis = objects("redis")
    options = clusters()[stem].gcs_fault_tolerance_options
    assert options is not None and options.redis_address == f"{service.metadata.name}:{service.spec.ports[0].port}"
    (password,) = redis.spec.template.spec.containers[0].env
    assert password.value_from == options.redis_password.value_from
    assert service.spec.selector == redis.spec.template.metadata.labels == redis.spec.selector.match_labels


def test_the_job_runs_a_command_of_ours_and_resumes_in_the_same_folder() -> None:
    job = objects("rayjob")[0].spec
    words = job.entrypoint.split()
    assert words[:2] == ["yolofleet", "predict"] and job.backoff_limit > 0
    mounts = [mount.mount_path for mount in container(job.ray_cluster_spec.head_group_spec).volume_mounts]
    for path in (words[2], words[words.index("--model") + 1], words[words.index("--out") + 1]):
        assert any(path.startswith(f"{mount}/") for mount in mounts)


@pytest.mark.parametrize("cluster", list(clusters().values()), ids=clusters())
def test_every_pod_of_ray_is_scraped(cluster: ClusterSpec) -> None:
    (monitor,) = objects("podmonitor")
    (label,), (endpoint,) = monitor.spec.selector.match_expressions, monitor.spec.pod_metrics_endpoints
    for group in groups(cluster):
        assert label.key in group.template.metadata.labels
        assert endpoint.port in {port.name for port in container(group).ports if port.container_port == 8080}


def test_the_readme_makes_the_password_and_applies_what_is_here() -> None:
    commands = re.findall(r"^kubectl (.+)$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    secret, apply = map(shlex.split, commands)
    reference = clusters()["rayservice"].gcs_fault_tolerance_options
    assert reference is not None
    wanted = reference.redis_password.value_from.secret_key_ref
    assert secret[:4] == ["create", "secret", "generic", wanted.name] and secret[4].startswith(f"--from-literal={wanted.key}=")
    assert all((REPOSITORY / file).is_file() for file in apply[2::2])
