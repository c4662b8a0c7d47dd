"""Pictures: every task is drawn, as ``Results.plot()`` draws it, and only where something was found."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from ultralytics.engine.results import Results

from actors.annotate import annotate, draw
from actors.images import decode_image
from actors.schemas import Detection, ImageResult, Points, Task
from actors.settings import ImageLimits

WIDTH, HEIGHT = 320, 240
BOX = (100.4, 90.7, 180.2, 150.9)
OUTLINE = Points((110.0, 170.0, 170.0, 110.0), (100.0, 100.0, 140.0, 140.0))
CORNERS = Points((140.0, 180.0, 140.0, 100.0), (90.0, 120.0, 150.0, 120.0))
NAMES = {0: "cup", 1: "fork", 2: "spoon", 3: "bowl", 4: "plate"}
REACH = 40  # pixels around a box that its line and its label may take


def skeleton() -> Points:
    rng = np.random.default_rng(1)
    return Points(tuple(rng.uniform(105, 175, 17)), tuple(rng.uniform(95, 145, 17)), tuple([0.9] * 17))


FOUND: dict[Task, tuple[Detection, ...]] = {
    "detect": (Detection(0, "cup", 0.91, BOX), Detection(3, "bowl", 0.5, (120.0, 95.0, 160.0, 140.0))),
    "segment": (Detection(1, "fork", 0.8, BOX, segments=OUTLINE),),
    "pose": (Detection(0, "cup", 0.8, BOX, keypoints=skeleton()),),
    "obb": (Detection(2, "spoon", 0.7, corners=CORNERS),),
    "classify": tuple(Detection(index, NAMES[index], 0.5 - index / 10) for index in range(5)),
}


@pytest.fixture
def image() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def result(task: Task) -> ImageResult:
    return ImageResult(WIDTH, HEIGHT, task, FOUND[task])


def plotted(image: NDArray[np.uint8], task: Task) -> NDArray[np.uint8]:
    """The same result drawn by Ultralytics; masks apart, which it has as pixels."""
    rows = np.array([[*(found.box or BOX), found.confidence, found.class_id] for found in FOUND[task]], np.float32)
    values = {}
    if task == "classify":
        values["probs"] = np.array([found.confidence for found in FOUND[task]], np.float32)
    else:
        values["boxes"] = rows
    if task == "pose":
        (found,) = FOUND[task]
        assert found.keypoints and found.keypoints.visible
        values["keypoints"] = np.array([[found.keypoints.x, found.keypoints.y, found.keypoints.visible]], np.float32).mT
    drawn: NDArray[np.uint8] = Results(image.copy(), "", NAMES, **values).plot()
    return drawn


@pytest.mark.parametrize("task", ["detect", "pose", "classify"])
def test_a_picture_is_the_one_that_ultralytics_plots(image: NDArray[np.uint8], task: Task) -> None:
    ours = annotate(image, result(task))
    assert np.array_equal(ours, plotted(image, task))


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_pixels_change_at_what_was_found_and_nowhere_else(image: NDArray[np.uint8], task: Task) -> None:
    before = image.copy()
    changed = (annotate(image, result(task)) != image).any(axis=2)
    assert np.array_equal(image, before), "the caller's array is left alone"
    near = np.zeros_like(changed)
    near[int(BOX[1]) - REACH : int(BOX[3]) + REACH, int(BOX[0]) - REACH : int(BOX[2]) + 2 * REACH] = True
    assert changed[near].any() and not changed[~near].any()


def test_a_mask_is_tinted_inside_its_outline(image: NDArray[np.uint8]) -> None:
    with_mask = annotate(image, result("segment")).astype(int)
    box_only = annotate(image, ImageResult(WIDTH, HEIGHT, "detect", (Detection(1, "fork", 0.8, BOX),))).astype(int)
    inside = (with_mask != box_only).any(axis=2)
    ys, xs = np.nonzero(inside)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (110, 170, 100, 140)
    untouched = (slice(110, 130), slice(120, 160))
    tint = with_mask[untouched] - image[untouched] * 0.5
    assert np.ptp(tint.reshape(-1, 3), axis=0).max() <= 1, "half the image, half one colour"


@pytest.mark.parametrize(
    "outline",
    [Points((), ()), Points((-50.0, -20.0, -20.0), (-9.0, -9.0, -3.0)), Points((300.0, 400.0, 400.0), (0.0, 0.0, 500.0))],
)
def test_empty_masks_and_masks_beyond_the_edge_are_drawn_as_far_as_they_go(image: NDArray[np.uint8], outline: Points) -> None:
    found = (Detection(1, "fork", 0.8, BOX, segments=outline),)
    assert annotate(image, ImageResult(WIDTH, HEIGHT, "segment", found)).shape == image.shape


@pytest.mark.parametrize("task", list(FOUND))
def test_the_jpeg_has_the_size_of_the_image(image: NDArray[np.uint8], task: Task) -> None:
    png = cv2.imencode(".png", image)[1].tobytes()
    jpeg = draw(png, result(task), ImageLimits())
    assert jpeg.startswith(b"\xff\xd8\xff")
    assert decode_image(jpeg, ImageLimits()).shape == image.shape


def test_names_beyond_ascii_are_drawn_without_a_download(image: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a font was asked for from the network")

    monkeypatch.setattr("ultralytics.utils.downloads.is_url", refuse)
    monkeypatch.setattr("ultralytics.utils.downloads.safe_download", refuse)
    named = [ImageResult(WIDTH, HEIGHT, "detect", (Detection(0, name, 0.9, BOX),)) for name in ("чашка", "кружка")]
    first, second = (annotate(image, each) for each in named)
    assert (first != second).any(), "each name is legible, not a box of question marks"


def test_a_tracked_object_shows_its_identity(image: NDArray[np.uint8]) -> None:
    plain, tracked = (Detection(0, "cup", 0.9, BOX, track_id=track_id) for track_id in (None, 7))
    pictures = [annotate(image, ImageResult(WIDTH, HEIGHT, "detect", (each,))) for each in (plain, tracked)]
    assert (pictures[0] != pictures[1]).any()
