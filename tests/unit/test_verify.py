"""When two models find the same: what an oriented box, a mask and a skeleton have to do with each other at 16 bits."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.schemas import Detection, ImageResult, Points
from actors.verify import CLOSE, EXACT, Tolerance, verify

PIXEL_EXACT = Tolerance(EXACT.confidence, EXACT.pixels)
IMAGE = np.zeros((64, 64, 3), np.uint8)


def agree(one: Detection, other: Detection, tolerance: Tolerance = CLOSE) -> bool:
    """Whether models agree of which one finds ``one`` in each image, the other ``other``."""

    def model(found: Detection) -> Any:
        def predict(batch: Sequence[object]) -> list[ImageResult]:
            return [ImageResult(64, 64, "detect", (found,)) for _ in batch]

        return SimpleNamespace(prepare=lambda image, params: image, predict=predict)

    there, back = (verify(model(a), model(b), [IMAGE], tolerance).agrees for a, b in ((one, other), (other, one)))
    assert there == back
    return there


def oriented(*, shift: float = 0.0, degrees: float = 30.0, width: float = 80.0, height: float = 40.0) -> Detection:
    """A box around (100 + ``shift``, 100)."""
    along, across = np.exp(1j * np.radians(degrees)) * np.array([width, 1j * height]) / 2
    corners = 100 + shift + 100j + np.array([-along - across, along - across, along + across, across - along])
    return Detection(0, "ship", 0.9, corners=Points(tuple(corners.real), tuple(corners.imag)))


def upright(*, segments: Points | None = None, keypoints: Points | None = None) -> Detection:
    return Detection(0, "person", 0.9, (10.0, 10.0, 60.0, 110.0), segments=segments, keypoints=keypoints)


def square(left: float, side: float = 100.0) -> Points:
    return Points((left, left + side, left + side, left), (0.0, 0.0, side, side))


@pytest.mark.parametrize(
    ("other", "like"),
    [
        (oriented(), True),
        (oriented(shift=0.9), True),
        (oriented(shift=2.0), False),
        (oriented(shift=60.0), False),
        (oriented(degrees=30.5), True),
        (oriented(degrees=35.0), False),
        (oriented(degrees=210.0), True),
        (oriented(width=83.0), False),
        (oriented(degrees=120.0), False),
        (oriented(degrees=120.0, width=40.0, height=80.0), True),
    ],
)
def test_oriented_boxes_agree_where_they_lie_alike_whichever_corner_comes_first(other: Detection, like: bool) -> None:
    assert agree(oriented(), other) == like


def test_a_square_that_is_turned_is_another() -> None:
    assert not agree(oriented(width=40.0), oriented(width=40.0, degrees=75.0))
    assert agree(oriented(width=40.0), oriented(width=40.0, degrees=120.0), PIXEL_EXACT)


@pytest.mark.parametrize(("shift", "like", "exactly"), [(0.4, True, True), (2.0, True, False), (3.0, False, False)])
def test_skeletons_agree_within_a_share_of_their_boxes(shift: float, like: bool, exactly: bool) -> None:
    one, other = (upright(keypoints=Points((30.0, 40.0 + by), (50.0, 60.0), (0.9, 0.9))) for by in (0.0, shift))
    assert (agree(one, other), agree(one, other, PIXEL_EXACT)) == (like, exactly)


@pytest.mark.parametrize(
    ("other", "like"),
    [
        (square(0), True),
        (square(5), True),
        (square(20), False),
        (square(300), False),
        (square(25, 50), False),
        (Points((), ()), False),
    ],
)
def test_masks_agree_by_what_they_cover(other: Points, like: bool) -> None:
    assert agree(upright(segments=square(0)), upright(segments=other)) == like


def test_masks_without_an_outline_agree() -> None:
    assert agree(upright(segments=Points((), ())), upright(segments=Points((), ())))
