"""Crossings: what passes the lines and zones of one live stream, counted by class and direction.

    tracked ImageResult ─ where each followed object is ─→ supervision's LineZone, PolygonZone ─→ Counts

A line has an *in* and an *out*: in is to the left of somebody who walks from its first point to its second, as
``supervision.LineZone`` has it. A zone has an *in*, an *out* and who is *inside* now. Every crossing counts, so that somebody
who turns back is counted once in each direction. Where an object is first seen says nothing about how it came there: it counts
from its first change of side on. An object that the tracker has lost stays where it was until the tracker gives it up, so
that one that passes a line while it is hidden is counted when it is found again.

It pickles, small: supervision's own objects, which do not, are made again from the places that were seen last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np

from actors.schemas import Counts, Detection, ImageResult
from actors.settings import Regions

_WAYS = ("in", "out")


class Crossings:
    """Counts what crosses some regions.

    Args:
        regions: the lines and zones.
        places: track id → the object as it was seen last, of those that were there before.
        counts: to go on from.

    Attributes:
        regions: as given.
        counts: what has passed so far; never changed, but replaced.
    """

    def __init__(self, regions: Regions, places: dict[int, Detection] | None = None, counts: Counts | None = None) -> None:
        self.regions = regions
        nothing: dict[str, dict[str, int]] = {way: {} for way in _WAYS}
        inside = {name: nothing | {"inside": {}} for name in regions.zones}
        self.counts: Counts = dict.fromkeys(regions.lines, nothing) | inside | (counts or {})
        self._places = places or {}
        self._inside: dict[str, set[int]] = {name: set() for name in regions.zones}
        self._geometry = _Geometry(regions) if self.counts else None
        list(self._passed())  # on which side of everything they are now

    def __reduce__(self) -> tuple[Any, ...]:
        return Crossings, (self.regions, self._places, self.counts)

    def configured(self, regions: Regions) -> Crossings:
        """The same objects at other regions; one that stays as it was keeps its counts."""
        before, now = _shapes(self.regions), _shapes(regions)
        return Crossings(regions, self._places, {name: self.counts[name] for name in now if now[name] == before.get(name)})

    def update(self, result: ImageResult, followed: Collection[int]) -> None:
        """Count what the next frame tells.

        Args:
            result: its tracked objects.
            followed: the ids that the tracker has not given up.
        """
        seen = {found.track_id: found for found in result.detections if found.track_id is not None}
        before = self._places
        self._places = {identity: found for identity, found in before.items() if identity in followed} | seen
        counts = {name: {way: dict(passed) for way, passed in ways.items()} for name, ways in self.counts.items()}
        for region, way, identity in self._passed():
            if identity in before:
                _add(counts[region][way], self._places[identity])
        for zone, inside in self._inside.items():
            counts[zone]["inside"] = {}
            for identity in inside & seen.keys():
                _add(counts[zone]["inside"], seen[identity])
        self.counts = counts

    def _passed(self) -> Iterator[tuple[str, str, int]]:
        """Region, direction and track id of whoever is on another side than when this was last asked."""
        if self._geometry is None:
            return
        identities = np.array(list(self._places), int)
        places = self._geometry.detections(self._places.values(), identities)
        for name, line in self._geometry.lines.items():
            for way, crossed in zip(_WAYS, line.trigger(places), strict=True):
                yield from ((name, way, identity) for identity in identities[crossed].tolist())
        for name, zone in self._geometry.zones.items():
            before, now = self._inside[name] & self._places.keys(), set(identities[zone.trigger(places)].tolist())
            self._inside[name] = now
            for way, passed in zip(_WAYS, (now - before, before - now), strict=True):
                yield from ((name, way, identity) for identity in passed)


class _Geometry:
    """Regions as supervision's objects, which remember on which side of a line each track was."""

    def __init__(self, regions: Regions) -> None:
        import supervision as sv

        anchor = [sv.Position(regions.anchor.upper())]
        self._detections = sv.Detections
        self.lines = {name: sv.LineZone(*(sv.Point(*end) for end in ends), anchor) for name, ends in regions.lines.items()}
        self.zones = {name: sv.PolygonZone(np.rint(ring).astype(int), anchor) for name, ring in regions.zones.items()}

    def detections(self, found: Iterable[Detection], identities: Any) -> Any:
        """The objects as ``supervision.Detections``."""
        boxes = np.array([_box(each) for each in found], np.float32).reshape(-1, 4)
        return self._detections(xyxy=boxes, tracker_id=identities)


def _shapes(regions: Regions) -> dict[str, Any]:
    """Region → all that decides what passes it."""
    return {name: (shape, regions.anchor) for name, shape in (regions.lines | regions.zones).items()}


def _box(found: Detection) -> tuple[float, ...]:
    """x1, y1, x2, y2 around the object, which has a box or corners, else it could not be tracked."""
    if found.corners is None:
        return found.box or ()
    xs, ys = found.corners.x, found.corners.y
    return min(xs), min(ys), max(xs), max(ys)


def _add(passed: dict[str, int], found: Detection) -> None:
    passed[found.name] = passed.get(found.name, 0) + 1
