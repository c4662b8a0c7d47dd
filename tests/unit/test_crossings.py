"""Lines and zones of a live stream, against the drawn world: which part was where is known there, frame by frame."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from pydantic import ValidationError

from actors.crossings import Crossings
from actors.schemas import Counts, Detection, ImageResult, Points, Sighting
from actors.settings import ImageLimits, Regions, StreamSettings, TrackerSettings
from actors.stream import Stream
from deploy.demo.scene import CLASS_NAMES, Scene, draw_clip

WIDTH, HEIGHT = 480, 320
GATE = ((240.0, 0.0), (240.0, 320.0))  # downwards: in is to the right, where the belt runs to
DOCK = ((150.0, 100.0), (330.0, 100.0), (330.0, 250.0), (150.0, 250.0))
REGIONS = Regions(lines={"gate": GATE, "back": GATE[::-1]}, zones={"dock": DOCK})


@pytest.fixture(scope="module")
def clip() -> list[ImageResult]:
    return [found(scene) for scene in draw_clip(3, 60, WIDTH, HEIGHT)]


def found(scene: Scene) -> ImageResult:
    parts = [
        Detection(part.class_id, CLASS_NAMES[part.class_id], 0.9, (part.x1, part.y1, part.x2, part.y2), track_id=part.track_id)
        for part in scene.parts
    ]
    return ImageResult(WIDTH, HEIGHT, "detect", tuple(parts))


def centre(part: Detection) -> tuple[float, float]:
    assert part.box
    return (part.box[0] + part.box[2]) / 2, (part.box[1] + part.box[3]) / 2


def right_of_the_gate(part: Detection) -> bool:
    return centre(part)[0] > GATE[0][0]


def in_the_dock(part: Detection) -> bool:
    (x1, y1), (x2, y2) = DOCK[0], DOCK[2]
    x, y = centre(part)
    return x1 <= round(x) <= x2 and y1 <= round(y) <= y2


def truth(frames: list[ImageResult], inside: Callable[[Detection], bool]) -> dict[str, dict[str, int]]:
    """Who has changed sides from one frame to the next, by direction and class."""
    passed: dict[str, Counter[str]] = {"in": Counter(), "out": Counter()}
    for before, now in pairwise(frames):
        was = {part.track_id: inside(part) for part in before.detections}
        for part in now.detections:
            if part.track_id in was and was[part.track_id] != inside(part):
                passed["in" if inside(part) else "out"][part.name] += 1
    return {way: dict(names) for way, names in passed.items()}


def counted(crossings: Crossings, frames: Iterable[ImageResult]) -> Counts:
    for frame in frames:
        crossings.update(frame, [part.track_id for part in frame.detections if part.track_id])
    return crossings.counts


def test_counts_are_those_of_the_drawn_world_by_class_and_direction(clip: list[ImageResult]) -> None:
    for frames in (clip, clip[::-1], clip + clip[::-1]):
        counts = counted(Crossings(REGIONS), frames)
        gate, dock = truth(frames, right_of_the_gate), truth(frames, in_the_dock)
        assert sum(map(len, gate.values())) > 2
        assert counts["gate"] == gate
        assert counts["back"] == {"in": gate["out"], "out": gate["in"]}
        inside = Counter(part.name for part in frames[-1].detections if in_the_dock(part))
        assert counts["dock"] == {**dock, "inside": dict(inside)}


@pytest.mark.parametrize("kind", ["bytetrack", "botsort"])
def test_the_tracker_s_own_ids_count_the_same_and_a_snapshot_after_each_frame_changes_nothing(
    kind: str, clip: list[ImageResult]
) -> None:
    tracker = TrackerSettings.model_validate({"kind": kind, "overrides": {"gmc_method": "none"} if kind == "botsort" else {}})
    stream = Stream(StreamSettings(stream="belt", model="parts", tracker=tracker, regions=REGIONS))
    for number, frame in enumerate(clip, 1):
        tracked = stream.follow(Sighting(frame, None, 0, "", number), ImageLimits())
        stream = pickle.loads(pickle.dumps(stream))
    assert tracked.counts["gate"] == truth(clip, right_of_the_gate)
    assert stream.status(0).counts == tracked.counts


def walk(*xs: float | None) -> list[ImageResult]:
    """One person who is seen at these places, or hidden."""
    people = [() if x is None else (Detection(0, "person", 0.9, (x - 5, 40, x + 5, 60), track_id=7),) for x in xs]
    return [ImageResult(WIDTH, HEIGHT, "detect", person) for person in people]


def test_who_passes_while_hidden_is_counted_unless_the_tracker_has_given_up() -> None:
    hidden, lost = Crossings(REGIONS), Crossings(REGIONS)
    for frame in walk(200, 220, None, None, None, None, 260):
        hidden.update(frame, {7})
        lost.update(frame, {7} if frame.detections else ())
    assert (hidden.counts["gate"]["in"], lost.counts["gate"]["in"]) == ({"person": 1}, {})


def test_regions_change_while_the_stream_runs_and_what_stays_keeps_its_counts() -> None:
    crossings = Crossings(Regions(lines={"gate": GATE}))
    counted(crossings, walk(230, 250))
    crossings = crossings.configured(Regions(lines={"gate": GATE, "exit": ((260, 0), (260, 320))}))
    assert counted(crossings, walk(270)) == {
        "gate": {"in": {"person": 1}, "out": {}},
        "exit": {"in": {"person": 1}, "out": {}},
    }
    moved = crossings.configured(Regions(lines={"gate": ((10, 0), (10, 320))}))
    assert moved.counts == {"gate": {"in": {}, "out": {}}}


def test_the_anchor_decides_which_point_passes() -> None:
    steps = [Detection(0, "person", 0.9, (10, y, 30, y + 40), track_id=1) for y in (30, 70)]
    frames = [ImageResult(WIDTH, HEIGHT, "detect", (step,)) for step in steps]
    for y, anchor, out in [(60, "center", 1), (80, "center", 1), (60, "bottom_center", 0), (80, "bottom_center", 1)]:
        regions = Regions.model_validate({"lines": {"step": [[0, y], [100, y]]}, "anchor": anchor})
        assert counted(Crossings(regions), frames)["step"]["out"] == ({"person": 1} if out else {}), (y, anchor)


def test_oriented_objects_are_counted_by_their_middle() -> None:
    ships = [Detection(0, "ship", 0.9, corners=Points((x, x + 9, x, x - 9), (30, 40, 50, 40)), track_id=1) for x in (230, 250)]
    frames = [ImageResult(WIDTH, HEIGHT, "obb", (ship,)) for ship in ships]
    assert counted(Crossings(REGIONS), frames)["gate"] == {"in": {"ship": 1}, "out": {}}


@pytest.mark.parametrize(
    ("regions", "sentence"),
    [
        ({"lines": {"gate": [[1, 1], [1, 1]]}}, "has no length"),
        ({"lines": {"gate": GATE}, "zones": {"gate": DOCK}}, "a name of its own"),
        ({"zones": {"dock": DOCK[:2]}}, "at least 3"),
        ({"zones": {"all": [[0, 0], [16000, 0], [16000, 16000]]}}, "too far"),
        ({"lines": {str(number): GATE for number in range(33)}}, "give fewer"),
        ({"lines": {"gate": [[0, 0], [float("nan"), 1]]}}, "less than or equal"),
    ],
)
def test_regions_that_cannot_be_counted_at_are_refused(regions: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Regions.model_validate(regions)
