"""What deploy/grafana and deploy/prometheus/alerts.yml ask Prometheus for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

DASHBOARDS = sorted((REPOSITORY / "deploy" / "grafana").glob("*.json"))
ALERTS = REPOSITORY / "deploy" / "prometheus" / "alerts.yml"


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard."""
    return list(json.loads(dashboard.read_text())["panels"])


def rules() -> list[dict[str, Any]]:
    """Every rule of the alerts, recorded ones too."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def metrics(dashboard: Path) -> set[str]:
    """The series that a dashboard names, in its panels and its variables, as Prometheus has them."""
    return _named(dashboard.read_text())


def metrics_of_alerts() -> set[str]:
    """The series that the alerts name."""
    return set().union(*(_named(rule["expr"]) for rule in rules()))


def _named(text: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", text))


def expressions(dashboard: Path) -> Iterator[str]:
    """Every PromQL expression of a dashboard, with Grafana's interval put in."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*").replace("$job", ".*")
