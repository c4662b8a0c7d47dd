"""Dashboards and alerts ask for metrics that exist, in PromQL that Prometheus takes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.util.metrics import Counter, Histogram

from actors.metrics import DECLARED
from tests.conftest import REPOSITORY
from tests.dashboards import ALERTS, DASHBOARDS, expressions, metrics, metrics_of_alerts, panels, rules

RAYS_OWN = {  # by Ray 2.60; its gauges of nodes and GPUs come from its agents, those of Serve from Serve's controller
    "ray_actors",
    "ray_cluster_active_nodes",
    "ray_cluster_failed_nodes",
    "ray_cluster_pending_nodes",
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_gram_available",
    "ray_node_gram_used",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_serve_autoscaling_target_replicas",
    "ray_serve_deployment_replica_healthy",
    "ray_tasks",
}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")


def exported() -> set[str]:
    """Our series by their names in Prometheus."""
    names = set()
    for name, (kind, _, _) in DECLARED.items():
        suffixes = {Counter: ("_total",), Histogram: ("_bucket", "_count", "_sum")}.get(kind, ("",))
        names |= {f"ray_{name}{suffix}" for suffix in suffixes}
    return names


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_for_what_is_exported(dashboard: Path) -> None:
    assert metrics(dashboard) <= exported() | RAYS_OWN


def test_alerts_ask_for_what_is_exported() -> None:
    assert metrics_of_alerts() <= exported() | RAYS_OWN


def test_rays_own_metrics_are_listed_for_a_reason() -> None:
    assert set().union(metrics_of_alerts(), *map(metrics, DASHBOARDS)) >= RAYS_OWN


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_one_that_grafana_can_import(dashboard: Path) -> None:
    document = json.loads(dashboard.read_text())
    assert document["uid"] == f"yolofleet-{dashboard.stem}" and document["title"].startswith("yolofleet: ")
    variables = {variable["name"] for variable in document["templating"]["list"]}
    assert set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(panels(dashboard)))) <= variables
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels(dashboard)]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in panels(dashboard)})
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels(dashboard))


def test_every_alert_says_how_bad_it_is_and_what_to_do_stands_in_the_operators_page() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"]
            assert f"`{rule['alert']}`" in page


def test_the_objective_counts_the_errors_that_are_the_servers() -> None:
    """The same outcomes as in docs/metrics.md and on the dashboard."""
    texts = [ALERTS.read_text(), (REPOSITORY / "docs" / "metrics.md").read_text()]
    texts += expressions(REPOSITORY / "deploy" / "grafana" / "fleet.json")
    assert len({found for text in texts for found in re.findall(r'outcome=~"(.+?)"', text)}) == 1


@needs_promtool
def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", REPOSITORY / "deploy" / "prometheus" / "prometheus.yml")


@needs_promtool
@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_prometheus_takes_every_expression_of_a_dashboard(dashboard: Path, tmp_path: Path) -> None:
    recorded = [{"record": f"expression:{number}", "expr": each} for number, each in enumerate(expressions(dashboard))]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    promtool("check", "rules", file)


@needs_promtool
def test_alerts_fire_when_they_should_and_not_before() -> None:
    promtool("test", "rules", Path(__file__).with_name("alerts.yml"))
