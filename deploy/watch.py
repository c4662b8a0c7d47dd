"""``yolofleet watch``: a source → a live stream of an endpoint → what it tells of every frame.

    video, camera, RTSP ─ JPEG ─→ WS /streams/{id} ─→ Seen ─→ the terminal, an MP4 with boxes, ids and what has passed

Several frames are on their way at once. A connection that is lost is made again under the stream's name, so that its ids go
on; the frames that were on their way are lost with it.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlencode

from rich.console import Console
from rich.live import Live
from rich.table import Table
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from actors.clips import Frame, read_source
from actors.errors import BadRequest, ReplicaUnavailable
from actors.images import encode_jpeg
from actors.schemas import Counts, Detection, ImageResult, Points

AHEAD = 8  # frames on their way in the mode ``all``
PATIENCE_S = 30.0  # without a connection
PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One answered frame: its pixels, what the stream tells of it, and what was dropped, failed and counted until now."""

    frame: Frame
    result: ImageResult
    dropped: int
    failed: int
    counts: Counts


class Watcher:
    """Sends a source to an endpoint.

    Args:
        source: a file, a camera's number, or an address that OpenCV reads.
        endpoint: http://host:port of a fleet.
        stream: the stream's name there.
        query: parameters of ``/streams/{id}``.
    """

    def __init__(self, source: str, endpoint: str, stream: str, query: dict[str, str]) -> None:
        self._source, self._paced = source, query.get("mode") == "latest"
        self._url = f"{endpoint.replace('http', 'ws', 1).rstrip('/')}/streams/{quote(stream, safe='')}?{urlencode(query)}"
        self._on_the_way: dict[int, Frame] = {}
        self._failed = 0

    def watch(self) -> Iterator[Seen]:
        """Every frame that is answered, in order.

        Raises:
            BadImage: the source cannot be read.
            BadRequest: the endpoint refuses.
            ReplicaUnavailable: it cannot be reached.
        """
        frames, started = read_source(self._source), time.monotonic()
        frame = next(frames, None)
        while frame is not None or self._on_the_way:
            self._on_the_way.clear()
            with ExitStack() as stack:
                socket = self._connected(stack)
                try:
                    while frame is not None:
                        due = started + frame.time_s if self._paced else None
                        yield from self._answers(socket, 0 if self._paced else AHEAD - 1, due)
                        self._send(socket, frame)
                        frame = next(frames, None)
                    yield from self._answers(socket, 0, None)
                except (ConnectionClosed, ReplicaUnavailable):
                    continue

    def _connected(self, stack: ExitStack) -> ClientConnection:
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                return stack.enter_context(connect(self._url, max_size=None))
            except (InvalidURI, InvalidStatus) as error:
                if isinstance(error, InvalidURI) or error.response.status_code < 500:
                    raise BadRequest(f"The endpoint does not take this: {error}") from None
                problem: Exception = error
            except (OSError, InvalidHandshake) as error:
                problem = error
            if time.monotonic() > give_up:
                raise ReplicaUnavailable(f"The endpoint cannot be reached: {problem}")
            time.sleep(PAUSE_S)

    def _send(self, socket: ClientConnection, frame: Frame) -> None:
        self._on_the_way[frame.number] = frame
        socket.send(json.dumps({"frame": frame.number, "time_s": frame.time_s}))
        socket.send(encode_jpeg(frame.image))

    def _answers(self, socket: ClientConnection, most: int, until: float | None) -> Iterator[Seen]:
        """What comes until ``until``, or until not more than ``most`` frames are on their way."""
        while until is not None or len(self._on_the_way) > most:
            try:
                answer = json.loads(socket.recv(None if until is None else max(until - time.monotonic(), 0)))
            except TimeoutError:
                return
            yield from self._seen(answer)

    def _seen(self, answer: dict[str, Any]) -> Iterator[Seen]:
        if "frame" not in answer:
            error = answer["error"]
            raise (ReplicaUnavailable if error["code"] == ReplicaUnavailable.code else BadRequest)(error["message"])
        frame = self._on_the_way.pop(answer["frame"])
        for dropped in [number for number in self._on_the_way if number < frame.number]:
            del self._on_the_way[dropped]
        if "error" in answer:
            self._failed += 1
        else:
            yield Seen(frame, _result(answer["image"]), answer["dropped"], self._failed, answer["counts"])


def shown(answers: Iterator[Seen], console: Console) -> Iterator[Seen]:
    """Pass answers on, and show them: live in a terminal, the last one only elsewhere."""
    started = time.monotonic()
    with Live(console=console, auto_refresh=False) as live:
        for number, seen in enumerate(answers, 1):
            live.update(_table(seen, number / (time.monotonic() - started)), refresh=console.is_terminal)
            yield seen


def _table(seen: Seen, rate: float) -> Table:
    table = Table("frame", "answers/s", "dropped", "failed", "in view", *seen.counts)
    in_view = _told(Counter(found.name for found in seen.result.detections))
    passed = ("\n".join(f"{way}: {_told(names)}" for way, names in ways.items()) for ways in seen.counts.values())
    table.add_row(str(seen.frame.number), f"{rate:.1f}", str(seen.dropped), str(seen.failed), in_view, *passed)
    return table


def _told(names: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(names.items())) or "nothing"


def _result(image: dict[str, Any]) -> ImageResult:
    """What ``image_answer`` was made of, as far as it is drawn."""
    height, width = image["shape"]
    found = tuple(_detection(each) for each in image["results"])
    oriented = any(each.corners for each in found)
    return ImageResult(width, height, "obb" if oriented else "detect", found)


def _detection(found: dict[str, Any]) -> Detection:
    box = found["box"]
    known = Detection(found["class"], found["name"], found["confidence"], track_id=found.get("track_id"))
    if "x3" in box:
        xs, ys = (tuple(box[f"{axis}{number}"] for number in range(1, 5)) for axis in "xy")
        return replace(known, corners=Points(xs, ys))
    return replace(known, box=(box["x1"], box["y1"], box["x2"], box["y2"]))
