"""The demo's world: same seed, same picture; exact boxes; ids that last; weights that are the recorded ones."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from deploy.demo import scene
from deploy.demo.scene import CLASS_NAMES, Part, Scene, draw_clip, draw_scene

WEIGHTS = Path(scene.__file__).with_name("parts.pt")
SIZES = [(480, 320), (640, 480), (200, 300), (161, 97)]

Mask = npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def clip() -> list[Scene]:
    return list(draw_clip(seed=7, frames=75))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(WEIGHTS.with_suffix(".json").read_text())
    return loaded


def test_the_same_seed_draws_the_same_scene() -> None:
    first, second = draw_scene(3), draw_scene(3)
    assert np.array_equal(first.image, second.image)
    assert first.parts == second.parts
    assert not np.array_equal(first.image, draw_scene(4).image)


def test_the_same_seed_draws_the_same_clip() -> None:
    for one, other in zip(draw_clip(5, frames=3), draw_clip(5, frames=3), strict=True):
        assert np.array_equal(one.image, other.image)
        assert one.parts == other.parts


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_any_size_is_drawn_with_its_boxes_inside(width: int, height: int) -> None:
    for drawn in (*(draw_scene(seed, width, height) for seed in range(4)), *draw_clip(1, 4, width, height)):
        assert drawn.image.shape == (height, width, 3)
        assert drawn.image.dtype == np.uint8
        for part in drawn.parts:
            assert 0 <= part.x1 < part.x2 <= width
            assert 0 <= part.y1 < part.y2 <= height


def test_every_class_appears() -> None:
    seen = {part.class_id for seed in range(12) for part in draw_scene(seed, 240, 160).parts}
    assert seen == set(range(len(CLASS_NAMES)))


@pytest.mark.parametrize("class_id", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
@pytest.mark.parametrize("angle", [0.0, 0.4, 1.1, 2.9])
def test_a_box_is_tight_around_the_silhouette(class_id: int, angle: float) -> None:
    world = _world()
    body = scene.Body(class_id, 201.3, 150.6, 40.0, 0.0, angle, 0.37, (200.0, 200.0, 200.0))
    patch = scene._patch(body, 0, world)
    assert patch is not None
    part = scene._label(patch, class_id, None, world)

    fine = np.arange(-48, 48, 0.125, dtype=np.float32)
    outline, _ = scene._fields(body, fine[None, :], fine[:, None])
    rows, columns = np.nonzero(outline < 0)
    expected = (
        body.x + fine[columns.min()],
        body.y + fine[rows.min()],
        body.x + fine[columns.max()],
        body.y + fine[rows.max()],
    )
    assert (part.x1, part.y1, part.x2, part.y2) == pytest.approx(expected, abs=0.75)


def test_a_box_shows_where_the_picture_changes() -> None:
    """Without looking at outlines: the metal of a lone bright part on a black belt, where its shadow cannot be seen."""
    world = _world()
    body = scene.Body(1, 200.0, 160.0, 50.0, 0.0, 0.6, 0.5, (250.0, 250.0, 250.0))
    patch = scene._patch(body, 0, world)
    assert patch is not None
    canvas = np.zeros((320, 480, 3), np.float32)
    scene._paint(canvas, patch, body, world.light)
    rows, columns = np.nonzero(canvas.max(axis=2) > 25)
    part = scene._label(patch, 1, None, world)
    assert (part.x1, part.y1) == pytest.approx((columns.min(), rows.min()), abs=1.5)
    assert (part.x2, part.y2) == pytest.approx((columns.max() + 1, rows.max() + 1), abs=1.5)


def test_no_part_of_a_scene_is_hidden_by_others() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        world = _world(seed)
        assert _most_hidden(world, scene._scatter(rng, world, count=14, speed=0.0, frames=1), frame=0) < 0.6


def test_no_part_of_a_clip_is_hidden_by_others() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        world = _world(seed)
        bodies = scene._scatter(rng, world, count=18, speed=8.0, frames=60)
        for frame in range(0, 60, 10):
            assert _most_hidden(world, bodies, frame) < 0.6


def test_parts_of_a_still_scene_carry_no_track_id() -> None:
    assert {part.track_id for part in draw_scene(0).parts} == {None}


def test_ids_are_unique_in_a_frame_and_keep_their_class(clip: list[Scene]) -> None:
    classes: dict[int | None, set[int]] = defaultdict(set)
    for drawn in clip:
        ids = [part.track_id for part in drawn.parts]
        assert len(ids) == len(set(ids))
        for part in drawn.parts:
            classes[part.track_id].add(part.class_id)
    assert None not in classes
    assert all(len(of_id) == 1 for of_id in classes.values())


def test_a_track_has_no_gap_and_runs_with_the_belt(clip: list[Scene]) -> None:
    for frames, parts in _tracks(clip).values():
        assert frames == list(range(frames[0], frames[0] + len(frames)))
        for before, after in pairwise(parts):
            assert after.x1 >= before.x1
            assert after.x2 >= before.x2
            assert after.x1 + after.x2 > before.x1 + before.x2
            if before.x1 > 0 and after.x2 < 480:
                assert (after.y1, after.y2) == pytest.approx((before.y1, before.y2), abs=0.75)


def test_parts_enter_and_leave_at_their_own_speeds(clip: list[Scene]) -> None:
    tracks = _tracks(clip)
    assert any(frames[0] > 0 for frames, _ in tracks.values())
    assert any(frames[-1] < len(clip) - 1 for frames, _ in tracks.values())
    whole = [parts for _, parts in tracks.values() if len(parts) > 20 and parts[5].x1 > 0 and parts[15].x2 < 480]
    speeds = [(parts[15].x1 - parts[5].x1) / 10 for parts in whole]
    assert np.std(speeds) > 0.05


def test_ids_count_up_in_order_of_arrival(clip: list[Scene]) -> None:
    arrivals = [id_ for id_, (frames, _) in sorted(_tracks(clip).items()) if frames[0] > 0]
    first_frames = [_tracks(clip)[id_][0][0] for id_ in arrivals]
    assert first_frames == sorted(first_frames)


def test_the_weights_are_those_of_the_record(record: dict[str, Any]) -> None:
    content = WEIGHTS.read_bytes()
    assert hashlib.sha256(content).hexdigest() == record["weights"]["sha256"]
    assert len(content) == record["weights"]["bytes"] <= 3_000_000
    assert tuple(record["classes"]) == CLASS_NAMES


def test_the_recorded_accuracy_is_good_at_both_sizes(record: dict[str, Any]) -> None:
    assert {size: figures["map50"] >= 0.95 for size, figures in record["measured"].items()} == {
        "imgsz_320": True,
        "imgsz_640": True,
    }


def test_the_measured_scenes_were_never_trained_on(record: dict[str, Any]) -> None:
    seeds = record["seeds"]
    assert not set(range(*seeds["train"])) & set(range(*seeds["test"]))


@pytest.mark.parametrize("root", [b"/tmp", b"/home", b"/root", b"/work", b"/usr", b"/opt"])
def test_the_weights_name_no_path_of_the_machine_they_were_made_on(root: bytes) -> None:
    assert root not in WEIGHTS.read_bytes()


def _world(seed: int = 0) -> scene.World:
    return scene._make_world(np.random.default_rng(seed), 480, 320, smear=0)


def _tracks(clip: list[Scene]) -> dict[int, tuple[list[int], list[Part]]]:
    """For each id the frames it is in and its parts there."""
    tracks: dict[int, tuple[list[int], list[Part]]] = defaultdict(lambda: ([], []))
    for frame, drawn in enumerate(clip):
        for part in drawn.parts:
            assert part.track_id is not None
            tracks[part.track_id][0].append(frame)
            tracks[part.track_id][1].append(part)
    return tracks


def _most_hidden(world: scene.World, bodies: list[scene.Body], frame: int) -> float:
    """The largest share of any silhouette that bodies painted after it cover."""
    masks = [mask for body in bodies if (mask := _mask(world, body, frame)).any()]
    shares = [0.0]
    above = np.zeros((world.height, world.width), bool)
    for mask in reversed(masks):
        shares.append(float((mask & above).sum() / mask.sum()))
        above |= mask
    return max(shares)


def _mask(world: scene.World, body: scene.Body, frame: int) -> Mask:
    mask = np.zeros((world.height, world.width), bool)
    patch = scene._patch(body, frame, world)
    if patch is not None and 0 <= body.x_at(frame) <= world.width:
        mask[patch.window] = patch.outline < 0
    return mask
