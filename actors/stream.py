"""Stream: one live stream's whole state: a tracker, what has passed its lines, how far it has come. No model, no Ray in it.

    Sighting (detections, pixels where they are needed) ─ StreamTracker ─→ ids ─ Crossings ─→ counts ─→ Tracked

It pickles: a copy goes on as the original does. One thread at a time.
"""

from __future__ import annotations

from actors.crossings import Crossings
from actors.errors import StreamConflict
from actors.images import decode_image
from actors.schemas import Sighting, StreamStatus, Tracked
from actors.settings import ImageLimits, Regions, StreamSettings
from actors.tracker import StreamTracker


class Stream:
    """Follows the objects of one live stream.

    Args:
        settings: its name, model, tracker and regions.

    Raises:
        BadRequest: see StreamTracker.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self.settings = settings
        self.frames = self.dropped = 0
        self._tracker = StreamTracker(settings.tracker)
        self._crossings = Crossings(settings.regions or Regions())
        self._connection = ""
        self._number = ("", 0)  # of the last sighting that a connection sent, with whose it was
        self._last: Tracked | None = None  # what it was answered

    @property
    def needs_frames(self) -> bool:
        """Whether sightings must bring the frame's pixels."""
        return self._tracker.needs_frames

    def take_over(self, connection: str) -> None:
        """From now on only ``connection`` may send, and whoever has none; "" lets the next that comes have it."""
        self._connection = connection

    def count_at(self, regions: Regions) -> bool:
        """Count at these lines and zones from now on; those that stay as they were keep their counts. Whether any changed."""
        changed = regions != self._crossings.regions
        if changed:
            self._crossings = self._crossings.configured(regions)
        return changed

    def status(self, idle_s: float) -> StreamStatus:
        """How it is doing, ``idle_s`` after its last frame."""
        settings, crossings = self.settings, self._crossings
        regions = crossings.regions.model_dump(mode="json")
        known = (settings.stream, settings.model, settings.tracker.kind, self.frames, self.dropped, idle_s)
        return StreamStatus(*known, regions, crossings.counts)

    def follow(self, sighting: Sighting, limits: ImageLimits) -> Tracked:
        """Associate one frame; a sighting that was followed already gets the same answer again.

        Args:
            sighting: of the next frame.
            limits: what its image may weigh.

        Raises:
            StreamConflict: another connection has taken the stream over.
            BadImage, BadRequest: see ``decode_image`` and ``StreamTracker.update``.
        """
        number = (sighting.connection, sighting.number)
        if sighting.connection:
            if self._connection not in ("", sighting.connection):
                raise StreamConflict(
                    f"The stream '{self.settings.stream}' was taken over by a newer connection: send on that one"
                )
            self._connection = sighting.connection
            if self._last is not None and number == self._number:
                return self._last
        pixels = None if sighting.image is None else decode_image(sighting.image, limits)
        result = self._tracker.update(sighting.result, pixels)
        self._crossings.update(result, self._tracker.followed)
        self.frames += 1
        self.dropped += sighting.dropped
        tracked = Tracked(result, self.dropped, self._crossings.counts)
        if sighting.connection:
            self._number, self._last = number, tracked
        return tracked
