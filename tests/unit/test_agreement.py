"""The measure that a rollout is decided on: symmetric, 1.0 for equals, lower with every object that is missing or extra."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.schemas import Detection, ImageResult, Points, Timing
from deploy.agreement import Agreement, agreement, milliseconds, percentiles, refused, total
from deploy.rollout import _objection
from deploy.settings import RolloutRules

Box = tuple[float, float, float, float]


def detection(name: str, box: Box | None, confidence: float = 0.9) -> Detection:
    return Detection(ord(name[0]), name, confidence, box)


def result(*detections: Detection, task: str = "detect") -> ImageResult:
    return ImageResult(640, 480, task, detections)  # type: ignore[arg-type]


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x, y = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    return float(x), float(y), float(x + draw(st.integers(1, 40))), float(y + draw(st.integers(1, 40)))


found = st.builds(detection, st.sampled_from(["cat", "dog"]), boxes(), st.floats(0.1, 1))
many = st.lists(found, max_size=12)


@given(many, many, st.randoms())
def test_neither_the_order_nor_who_is_the_old_one_matters(
    olds: list[Detection], news: list[Detection], random: object
) -> None:
    one = agreement(result(*olds), result(*news))
    other = agreement(result(*news), result(*olds))
    assert (one.matched, one.old, one.new, one.share) == (other.matched, other.new, other.old, other.share)
    random.shuffle(olds)  # type: ignore[attr-defined]
    random.shuffle(news)  # type: ignore[attr-defined]
    assert agreement(result(*olds), result(*news)) == one
    assert one.matched <= min(one.old, one.new) and 0.0 <= one.share <= 1.0


@given(many)
def test_equals_agree_entirely_whatever_their_confidences(detections: list[Detection]) -> None:
    surer = [replace(one, confidence=1.0) for one in detections]
    assert agreement(result(*detections), result(*surer)).share == 1.0


@given(st.lists(found, min_size=1, max_size=12))
def test_every_missing_object_counts_and_every_extra_one(detections: list[Detection]) -> None:
    whole = result(*detections)
    shares = [agreement(whole, result(*detections[:left])).share for left in range(len(detections), -1, -1)]
    assert shares[0] == 1.0 and shares[-1] == 0.0
    assert all(more > fewer for more, fewer in pairwise(shares))
    extra = detections * 2
    assert [agreement(whole, result(*extra[: len(detections) + more])).share for more in (0, 1)][1] < 1.0


def test_a_pair_needs_the_same_name_and_half_of_its_union() -> None:
    old = result(detection("cat", (0, 0, 10, 10)))
    assert agreement(old, result(Detection(7, "cat", 0.9, (0, 0, 10, 10)))).share == 1.0  # ids may be numbered otherwise
    assert agreement(old, result(detection("dog", (0, 0, 10, 10)))).share == 0.0
    assert agreement(old, result(detection("cat", (0, 0, 10, 5)))).share == 1.0  # IoU exactly 0.5
    assert agreement(old, result(detection("cat", (0, 0, 10, 4.9)))).share == 0.0
    assert agreement(old, result(detection("cat", (20, 20, 30, 30)))) == Agreement(0, 1, 1)


def test_an_object_is_matched_once() -> None:
    twice = result(detection("cat", (0, 0, 10, 10)), detection("cat", (0, 0, 10, 9)))
    assert agreement(result(detection("cat", (0, 0, 10, 10))), twice) == Agreement(1, 1, 2)


def test_oriented_boxes_are_compared_by_the_upright_ones_around_them() -> None:
    diamond = Detection(0, "ship", 0.9, corners=Points((5, 10, 5, 0), (0, 5, 10, 5)))
    moved = Detection(0, "ship", 0.9, corners=Points((105, 110, 105, 100), (0, 5, 10, 5)))
    assert agreement(result(diamond, task="obb"), result(diamond, task="obb")).share == 1.0
    assert agreement(result(diamond, task="obb"), result(moved, task="obb")).share == 0.0


def test_of_a_classification_the_likeliest_class_counts() -> None:
    cat_first = result(detection("dog", None, 0.3), detection("cat", None, 0.6), task="classify")
    cat_alone = result(detection("cat", None, 0.4), task="classify")
    dog_first = result(detection("dog", None, 0.5), detection("cat", None, 0.4), task="classify")
    assert agreement(cat_first, cat_alone) == Agreement(1, 1, 1)
    assert agreement(cat_first, dog_first) == Agreement(0, 1, 1)
    assert agreement(cat_first, result(detection("cat", (0, 0, 9, 9)))).share == 0.0  # another task


def test_nothing_agrees_with_nothing_and_an_error_agrees_with_nothing_at_all() -> None:
    assert agreement(result(), result()).share == 1.0
    assert refused(result()).share == 0.0
    assert refused(result(detection("cat", (0, 0, 1, 1)), detection("cat", (5, 5, 6, 6)))) == Agreement(0, 2, 0)


def test_objects_of_all_images_weigh_the_same() -> None:
    assert total([Agreement(1, 1, 1), Agreement(2, 4, 2)]).share == pytest.approx(2 * 3 / 8)
    assert total([]).share == 1.0


def test_latency_is_the_time_in_the_replica_without_waiting() -> None:
    timing = Timing(queue=100, decode=1, batch_wait=50, preprocess=2, inference=3, postprocess=4, batch_size=2, engine=90)
    assert milliseconds(timing) == 1 + 2 * (2 + 3) + 4
    assert percentiles([5.0]) == (5.0, 5.0)
    assert percentiles([float(number) for number in range(101)]) == (50.0, 95.0)


@pytest.mark.parametrize(
    ("found", "errors", "slowdown", "sentence"),
    [
        (Agreement(95, 100, 100), 0, 1.5, None),
        (Agreement(94, 100, 100), 0, 1.0, "agrees with the running one on 0.940 of the objects, 0.95 is asked for"),
        (Agreement(60, 100, 60), 3, 1.0, "on 0.750 of the objects and fails on 3 images, 0.95 is asked for"),
        (Agreement(100, 100, 100), 0, 1.6, "takes 1.60 times as long as the running one, 1.5 is allowed"),
    ],
)
def test_what_speaks_against_other_weights_is_said(
    found: Agreement, errors: int, slowdown: float, sentence: str | None
) -> None:
    objection = _objection("m", found, 100, errors, slowdown, RolloutRules(max_slowdown=1.5))
    assert objection is None if sentence is None else sentence in str(objection)
    assert _objection("m", Agreement(1, 1, 1), 1, 0, 99.0, RolloutRules()) is None


def test_what_was_never_compared_does_not_pass() -> None:
    assert "could not be compared" in str(_objection("m", total([]), 0, 0, 1.0, RolloutRules(min_agreement=0.0)))
