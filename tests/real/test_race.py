"""yolofleet race on real weights: the shared model is wrong, yolofleet's actors are not."""

from pathlib import Path

import pytest

from deploy.race import pictures, run_race

pytestmark = [pytest.mark.real, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def test_sharing_a_model_is_wrong_and_the_fleet_is_not(weights: Path, coco128: Path) -> None:
    images = pictures([str(coco128)], 24)
    report = run_race(weights / "yolo26n.pt", images, imgsz=320, callers=4, report=print)
    lines = {line.mode: line for line in report.modes}
    assert lines["a"].wrong > 0
    assert report.danger_shown
    assert (lines["e"].wrong, lines["e"].errors) == (0, 0), lines["e"].first_error
    assert report.cure_holds
    assert [lines[mode].wrong for mode in ("reference", "b", "c", "d")] == [0, 0, 0, 0]
    assert all(line.images_per_s and line.peak_memory_mb for line in report.modes)
    assert set(report.versions) == {"ultralytics", "torch", "ray", "python"}
