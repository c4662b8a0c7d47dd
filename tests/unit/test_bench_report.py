"""Measurements → Markdown and pictures, on reports as the commands write them."""

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
from typer.testing import CliRunner

from deploy.bench.batch import BatchReport
from deploy.bench.contest import PeersReport, Side
from deploy.bench.limit import Limit, LimitReport
from deploy.bench.load import Closed, Load, Open
from deploy.bench.machine import circumstances
from deploy.bench.report import markdown, plot
from deploy.bench.serve import Level, ServeReport
from deploy.cli import app

LIMITS = [Limit(streams, 8, 9.0 * streams, {"decode": 3.0, "engine": 100.0}, 104.0) for streams in (1, 2)]
LEVELS = [
    Level.of(Closed(16, 4), Load(4, {}, 0.5, [100, 110, 120, 130], 0.004, []), {"ingress": 0.32, "proxy": 0.04}),
    Level.of(Closed(16, 4), Load(4, {"http 429": 1}, 0.5, [100, 110, 130], 0.004, []), {"ingress": 0.33, "proxy": 0.03}),
    Level.of(Open(5.0, 3), Load(3, {}, 1.0, [90, 95, 99], 0.003, []), None),
]
REPORTS: dict[str, Any] = {
    "limit": LimitReport("m.pt", 20, LIMITS, circumstances()),
    "serve": ServeReport(
        {"topology": "direct"}, "openvino fp32", LEVELS, 11.0, {"proxy": 0.02}, {"replicas": [500.0], "all": [2000.0]},
        5.0, LIMITS[1], [17.0, 19.0], 99.5, 12.5, circumstances(),
    ),
    "batch": BatchReport(
        40, {"limit": [18, 20], "job": [17, 18], "predict": [9, 10]}, {"limit": 0.92, "predict": 1.84}, 4.5,
        {"engine": 50.0}, {"inference": 52.0, "starved": 0.1}, circumstances(),
    ),
    "peers": PeersReport(
        16, 4, 3, 2, {"documented": 10, "same engine": 10},
        [
            Side("limit of this machine", "same engine", per_s=[25.0, 15.0]),
            Side("yolofleet first", "same engine", "0.1.0", "openvino", [20.0, 15.0], LEVELS[:2], [9.0, 9.0], [2e3, 2e3], 0.0),
            Side("yolofleet auto", "same engine", "0.1.0", "openvino", [20.0, 30.0], LEVELS[:2], [9.0, 9.0], [2e3, 2e3], 0.0),
            Side("LitServe", "same engine", "0.2.19", None, [10.0, 10.0], LEVELS[:2], [5.0, 5.0], [900.0, 900.0], 0.02),
            Side("Hasty", "same engine", "1.0", None, [90.0, 90.0], LEVELS[:2], [5.0, 5.0], [900.0, 900.0], 0.5),
            Side("Roboflow inference", "documented", reason="there is no ONNX export"),
        ],
        circumstances(),
    ),
}  # fmt: skip


def rows(text: str) -> dict[str, list[str]]:
    """First cell → the others, of a Markdown table."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report_survives_json_and_can_be_drawn(kind: str, tmp_path: Path) -> None:
    told = json.loads(json.dumps(REPORTS[kind].as_dict()))
    assert f"commit {told['circumstances']['commit']}" in markdown(told)
    plot(told, tmp_path / "drawn.png")
    picture = cv2.imread(str(tmp_path / "drawn.png"))
    assert picture is not None and picture.std() > 10  # there is something on it


def test_rounds_of_a_load_share_a_line() -> None:
    text = markdown(REPORTS["serve"].as_dict())
    assert rows(text)["16 callers"] == ["7.00", "110", "130", "130", "105.0", "1"]  # per second, p50, p95, p99, CPU, errors
    assert rows(text)["5.0/s offered"] == ["3.00", "95", "99", "99", "", "0"]
    assert "18.00 images/s (17.00 before and 19.00 after the endpoint); the endpoint has 0.39 of it" in text


def test_a_report_of_one_limit_only_can_still_be_read() -> None:
    report = {name: value for name, value in REPORTS["serve"].as_dict().items() if name != "limit_per_s"}
    assert "18.00 images/s; the endpoint has 0.39 of it" in markdown(report)


def test_yolofleet_is_compared_within_each_round() -> None:
    text = markdown(REPORTS["peers"].as_dict())
    assert rows(text)["LitServe, 1 errors"][-2:] == ["2.0 %", "2.50 times it"]  # the median of 20/10 and 30/10
    assert [*rows(text)].index("Hasty, 1 errors, **wrong boxes**") > [*rows(text)].index("LitServe, 1 errors")
    assert rows(text)["Hasty, 1 errors, **wrong boxes**"][-1] == ""  # nobody wins by being wrong
    assert "Roboflow inference was not measured: there is no ONNX export" in text


def test_the_limit_is_compared_with_the_fleet_beside_it() -> None:
    assert (
        rows(markdown(REPORTS["peers"].as_dict()))["limit of this machine"][-1] == "0.90 times it"
    )  # the first, not the best


def test_the_command_shows_a_report_and_refuses_what_is_none(tmp_path: Path) -> None:
    file = tmp_path / "limit.json"
    file.write_text(json.dumps(REPORTS["limit"].as_dict()))
    shown = CliRunner().invoke(app, ["bench", "report", str(file), "--plot", str(tmp_path / "limit.png")])
    assert shown.exit_code == 0 and rows(shown.stdout)["2"][0] == "18.00" and (tmp_path / "limit.png").exists()
    file.write_text("{}")
    assert CliRunner().invoke(app, ["bench", "report", str(file)]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "report", str(tmp_path / "none.json")]).exit_code == 2
