"""yolofleet race, without a model: what counts as wrong, and what the report says about it."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from actors.errors import BadRequest, BadSource, ModelError
from actors.images import decode_image, encode_jpeg
from actors.settings import ImageLimits
from deploy.demo.scene import draw_scene
from deploy.race import (
    TITLES,
    Answer,
    Failed,
    ModeReport,
    RaceReport,
    _in_fresh_process,
    pictures,
    render,
    run_race,
    same_answer,
    thresholds,
)

CAT, DOG = 15, 16
REFERENCE: Answer = ((CAT, 0.9, (10.0, 20.0, 30.0, 40.0)), (DOG, 0.5, (50.0, 60.0, 70.0, 80.0)))


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (REFERENCE, True),
        (REFERENCE[::-1], True),
        (((CAT, 0.9009, (10.4, 20.0, 30.0, 39.6)), REFERENCE[1]), True),
        (REFERENCE[:1], False),
        ((*REFERENCE, REFERENCE[0]), False),
        (((DOG, 0.9, (10.0, 20.0, 30.0, 40.0)), REFERENCE[1]), False),
        (((CAT, 0.902, (10.0, 20.0, 30.0, 40.0)), REFERENCE[1]), False),
        (((CAT, 0.9, (10.0, 20.0, 30.0, 40.6)), REFERENCE[1]), False),
        (((CAT, 0.9, ()), REFERENCE[1]), False),
        ((), False),
    ],
)
def test_an_answer_equals_another_within_the_tolerances(given: Answer, same: bool) -> None:
    assert same_answer(REFERENCE, given) is same


def test_two_equal_objects_are_two() -> None:
    twice = (REFERENCE[0], REFERENCE[0])
    assert same_answer(twice, twice)
    assert not same_answer(twice, REFERENCE)


@pytest.mark.parametrize("callers", [2, 4, 9])
@pytest.mark.parametrize("class_ids", [range(80), range(4), range(1)])
def test_no_two_callers_ask_for_the_same(callers: int, class_ids: range) -> None:
    made = thresholds(callers, 320, class_ids)
    assert len(set(made)) == callers
    assert all(one.imgsz == (320, 320) and set(one.classes or ()) <= set(class_ids) for one in made)


def test_pictures_are_drawn_or_taken_from_the_sources(tmp_path: Path) -> None:
    drawn = pictures([], 2)
    assert drawn[0] != drawn[1]
    assert decode_image(drawn[0], ImageLimits()).shape == (320, 480, 3)
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(encode_jpeg(draw_scene(index, 64, 64).image))
    assert pictures([str(tmp_path)], 2) == [(tmp_path / f"{index}.jpg").read_bytes() for index in range(2)]
    with pytest.raises(BadSource):
        pictures([str(tmp_path / "nothing")], 1)


def test_a_race_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(BadRequest, match="at least one image"):
        run_race(Path("any.pt"), [], imgsz=320, callers=4, report=print)
    with pytest.raises(BadRequest, match="two callers"):
        run_race(Path("any.pt"), [b""], imgsz=320, callers=1, report=print)
    with pytest.raises(ModelError, match="No weights"):
        run_race(Path("missing.pt"), [b""], imgsz=320, callers=2, report=print)


def test_the_cure_holds_only_without_wrong_answers_and_errors() -> None:
    report = _report(wrong_a=3)
    assert report.danger_shown
    assert report.cure_holds
    *others, cure = report.modes
    for spoilt in (replace(cure, wrong=1), replace(cure, errors=1)):
        assert not replace(report, modes=(*others, spoilt)).cure_holds
    assert not _report(wrong_a=0).danger_shown


def test_the_report_is_json_and_a_table() -> None:
    report = _report(wrong_a=3)
    written = json.loads(json.dumps(report.as_dict()))
    assert [line["wrong"] for line in written["modes"]] == [0, 3, 0, 0, 0, 0]
    assert written["cure_holds"] is True
    assert written["versions"] == {"ultralytics": "8.4.190"}
    assert written["cores"] == 2
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    assert all(title in text for title in TITLES.values())
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_a_crash_ends_one_process_only() -> None:
    crashed = _in_fresh_process(60, os._exit, 7)
    assert crashed == Failed("its process died with exit status 7")
    refused = _in_fresh_process(60, pictures, ["nothing/here"], 1)
    assert isinstance(refused, Failed)
    assert refused.reason.startswith("BadSource: There is nothing")


def _report(wrong_a: int) -> RaceReport:
    lines = tuple(
        ModeReport(mode, title, 1, 2, 96, wrong_a if mode == "a" else 0, 0, None, 30.0, 900.0)
        for mode, title in TITLES.items()
    )
    return RaceReport(lines, "model.pt", 24, 320, 1, thresholds(4, 320, range(4)), 2, "cpu", {"ultralytics": "8.4.190"})
