"""Live streams: frames in, tracks out, in order.

    WS /streams/{id}?model=&tracker=&mode=&conf=…
        client   {"frame": 12, "time_s": 0.48}   if it likes, about the next frame
                 JPEG, WebP, …                   the frame
        server   {"stream", "frame", "time_s", "dropped", "counts", "image": {"shape", "speed", "results"}}
              or {"stream", "frame", "time_s", "error": {"code", "message", "request_id"}}: this frame only
    POST /streams/{id}/frames   one frame, and the same answer to it
    PUT /streams/{id}/regions   the lines and zones that it counts at, in "counts" by class and direction
    GET /streams, DELETE /streams/{id}

    receive ─→ Waiting (``all``: the reader stops; ``latest``: the newest one stays) ─→ up to ``window`` in detection
                                                                                     ─→ in order: association, answer

Whoever connects with the name of a stream that runs takes it over, and its ids go on. A mistake that concerns the whole
connection is told as an error without a frame, and the connection is closed with its code as the reason.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, WebSocket
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from starlette.datastructures import UploadFile
from starlette.websockets import WebSocketDisconnect

from actors.errors import BadRequest, ImageTooLarge, StreamConflict, TooManyStreams, UnknownStream
from actors.schemas import Answer, Tracked
from actors.settings import STREAM_NAME, Regions, StreamSettings, TrackerSettings
from deploy.api.call import Call, TheCall, new_call
from deploy.api.fleet import TheFleet, fleet_of
from deploy.api.forms import ModelField, Thresholds
from deploy.api.problems import problem, validation_sentence
from deploy.api.ultralytics import image_answer
from deploy.settings import StreamLimits

CLOSE_FAILED, CLOSE_NORMAL = 1008, 1000  # RFC 6455, 7.4.1
ERRORS = (UnknownStream, StreamConflict, TooManyStreams)
BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "required": ["file"], "properties": {"file": BINARY}}
FRAME_BODY = {
    "requestBody": {"required": True, "content": {"image/*": {"schema": BINARY}, "multipart/form-data": {"schema": FORM}}}
}

Message = dict[str, Any]


class StreamQuery(Thresholds):
    """What a stream is made of; ``conf`` is the lowest confidence that the tracker sees, by default that of ``YOLO.track``.

    With ``lines``, ``zones`` or ``anchor`` it counts at these from now on; without any, wherever it did before.
    """

    conf: Annotated[float, Field(ge=0, le=1)] = 0.1
    model: ModelField = None
    tracker: Annotated[Literal["bytetrack", "botsort"], Field(description="of Ultralytics', with its settings")] = "botsort"
    lines: Annotated[str | None, Field(description='JSON: {"gate": [[0, 240], [640, 240]]}, pixels of the frame')] = None
    zones: Annotated[str | None, Field(description='JSON: {"dock": [[0, 0], [90, 0], [90, 90]]}, three points or more')] = None
    anchor: Annotated[str | None, Field(description="which point of an object passes: center, or bottom_center")] = None


class ConnectionQuery(StreamQuery):
    """The query of a websocket: ``latest`` skips frames that would come too late, ``all`` answers every one."""

    mode: Literal["all", "latest"] = "all"


class FrameQuery(StreamQuery):
    """The query of a single frame: its number and its time, which come back with the answer."""

    frame: int | None = None
    time_s: FiniteFloat | None = None


class FrameNote(BaseModel):
    """What a client says of the next frame."""

    model_config = ConfigDict(extra="forbid")

    frame: int | None = None
    time_s: FiniteFloat | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it came: its number, its time in seconds if the client told one, its encoded image."""

    number: int
    time_s: FiniteFloat | None
    image: bytes


class Waiting:
    """Frames between their arrival and their turn.

    Args:
        latest: a newcomer replaces whoever waits; else it waits until there is nobody.
    """

    def __init__(self, latest: bool) -> None:
        self._latest, self._dropped = latest, 0
        self._queue: asyncio.Queue[Frame | None] = asyncio.Queue(1)

    async def put(self, frame: Frame | None) -> None:
        """Let a frame wait; None says that no more will come, and replaces nobody."""
        if self._latest and frame is not None and self._queue.full():
            self._queue.get_nowait()
            self._dropped += 1
        await self._queue.put(frame)

    async def get(self) -> tuple[Frame, int] | None:
        """The next frame, and how many were dropped since the one before."""
        frame = await self._queue.get()
        dropped, self._dropped = self._dropped, 0
        return None if frame is None else (frame, dropped)


Outcome = tuple[Call, Answer] | Exception


async def run_stream(
    frames: AsyncIterator[Frame],
    detect: Callable[[Frame], Coroutine[Any, Any, Outcome]],
    answer: Callable[[Frame, int, Outcome], Awaitable[None]],
    *,
    window: int,
    latest: bool,
) -> None:
    """Answer frames in their order while up to ``window`` of them are being computed.

    Args:
        frames: as they come.
        detect: finds what is in a frame; frames overlap, and it tells an error as its outcome.
        answer: called for one frame after the other, with the number of those dropped before it.
        window: frames in hand at once.
        latest: drop what would have to wait, but for the newest.
    """
    waiting = Waiting(latest)
    room = asyncio.Semaphore(window)
    in_hand: asyncio.Queue[tuple[Frame, int, asyncio.Task[Outcome]] | None] = asyncio.Queue()

    async def receive() -> None:
        async for frame in frames:
            await waiting.put(frame)
        await waiting.put(None)

    async def compute(group: asyncio.TaskGroup) -> None:
        while True:
            await room.acquire()
            if (taken := await waiting.get()) is None:
                await in_hand.put(None)
                return
            frame, dropped = taken
            await in_hand.put((frame, dropped, group.create_task(detect(frame))))

    async with asyncio.TaskGroup() as group:
        group.create_task(receive())
        group.create_task(compute(group))
        while (first := await in_hand.get()) is not None:
            frame, dropped, outcome = first
            await answer(frame, dropped, await outcome)
            room.release()


router = APIRouter(tags=["streams"])
StreamId = Annotated[str, Path(pattern=STREAM_NAME, description="a name of the client's choice")]


@router.websocket("/streams/{stream}")
async def connect(websocket: WebSocket, stream: str) -> None:
    """Follow the objects of a stream, frame by frame."""
    await websocket.accept()
    try:
        query = _query(websocket)
        connection = _Connection(websocket, await _settings(new_call(websocket), stream, query), query)
        await connection.serve()
        await websocket.close(CLOSE_NORMAL, "idle")
    except WebSocketDisconnect:
        return
    except Exception as error:
        told = problem(websocket, error)
        await _send(websocket, {"stream": stream, "error": told})
        await websocket.close(CLOSE_FAILED, told["code"])


@router.post("/streams/{stream}/frames", openapi_extra=FRAME_BODY)
async def frame(request: Request, call: TheCall, stream: StreamId, query: Annotated[FrameQuery, Query()]) -> Message:
    """Follow the objects of a stream through one more frame. Send the next one when this is answered."""
    settings = await _settings(call, stream, query)
    sent = Frame(query.frame or 0, query.time_s, await _body(request))
    _check_size(sent, request.app.state.limits.streams)
    found = await call.detect(settings.model, sent.image, query.params())
    async with call.fleet.stream(settings, exclusive=False) as follower:
        tracked = await follower.follow(found, sent.image, 0, call.terms)
    return _answer(settings, sent, tracked, query)


@router.get("/streams")
async def streams(fleet: TheFleet) -> Message:
    """The streams that run, whoever sends to them: model, tracker, frames, dropped ones, seconds since the last, counts."""
    return {"streams": [asdict(status) for status in await fleet.streams()]}


@router.put("/streams/{stream}/regions", status_code=204)
async def count_at(fleet: TheFleet, stream: StreamId, regions: Regions) -> None:
    """Count at these lines and zones from now on. Those that stay as they were keep their counts, others begin with none."""
    await fleet.count_at(stream, regions)


@router.delete("/streams/{stream}", status_code=204)
async def end(fleet: TheFleet, stream: StreamId) -> None:
    """Forget a stream: its next frame begins it anew."""
    await fleet.end_stream(stream)


class _Connection:
    """One websocket's hold on a stream."""

    def __init__(self, websocket: WebSocket, settings: StreamSettings, query: ConnectionQuery) -> None:
        self._websocket, self._settings, self._query = websocket, settings, query
        self._limits: StreamLimits = websocket.app.state.limits.streams
        self._dropped = 0  # since the last frame that was followed

    async def serve(self) -> None:
        """Answer every frame until the client is idle.

        Raises:
            WebSocketDisconnect: the client has gone.
            StreamConflict: another one has taken the stream over.
        """
        async with fleet_of(self._websocket).stream(self._settings, exclusive=True) as follower:
            self._follower = follower
            try:
                await run_stream(
                    self._frames(),
                    self._detect,
                    self._answer,
                    window=self._limits.window,
                    latest=self._query.mode == "latest",
                )
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    async def _frames(self) -> AsyncIterator[Frame]:
        note, number = FrameNote(), 0
        while True:
            try:
                async with asyncio.timeout(self._limits.idle_s):
                    message = await self._websocket.receive()
            except TimeoutError:
                return
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect
            if (text := message.get("text")) is not None:
                note = _note(text)
            else:
                number = number + 1 if note.frame is None else note.frame
                yield Frame(number, note.time_s, message["bytes"])
                note = FrameNote()

    async def _detect(self, frame: Frame) -> Outcome:
        try:
            _check_size(frame, self._limits)
            call = new_call(self._websocket)
            call.terms = replace(call.terms, patient=True)  # its sender is slowed by this: the window stays full
            return call, await call.detect(self._settings.model, frame.image, self._query.params())
        except Exception as error:
            return error

    async def _answer(self, frame: Frame, dropped: int, outcome: Outcome) -> None:
        self._dropped += dropped
        if isinstance(outcome, Exception):
            said = {"frame": frame.number, "time_s": frame.time_s, "error": problem(self._websocket, outcome)}
            await _send(self._websocket, {"stream": self._settings.stream, **said})
            return
        call, found = outcome
        tracked = await self._follower.follow(found, frame.image, self._dropped, call.terms)
        self._dropped = 0
        await _send(self._websocket, _answer(self._settings, frame, tracked, self._query))


def _query(websocket: WebSocket) -> ConnectionQuery:
    parameters = websocket.query_params
    given = {name: parameters.getlist(name) if len(parameters.getlist(name)) > 1 else parameters[name] for name in parameters}
    try:
        return ConnectionQuery.model_validate(given)
    except ValidationError as error:
        raise BadRequest(validation_sentence(error)) from None


def _note(text: str) -> FrameNote:
    try:
        return FrameNote.model_validate_json(text)
    except ValidationError:
        raise BadRequest('A text message says something of the next frame: {"frame": 12, "time_s": 0.48}') from None


async def _settings(call: Call, stream: str, query: StreamQuery) -> StreamSettings:
    info = await call.describe(query.model)
    if info.task == "classify":
        raise BadRequest(f"'{info.name}' classifies, and finds nothing that could be tracked: name another model")
    try:
        tracker = TrackerSettings(kind=query.tracker)
        regions = Regions.from_texts(query.lines, query.zones, query.anchor)
        return StreamSettings(stream=stream, model=info.name, tracker=tracker, regions=regions)
    except ValidationError as error:
        raise BadRequest(validation_sentence(error)) from None


async def _body(request: Request) -> bytes:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await request.body()
    async with request.form() as form:
        file = form.get("file")
        if not isinstance(file, UploadFile) or len(form) > 1:
            raise BadRequest("Send the frame as the body, or as the one multipart field 'file'; all else stands in the query")
        return await file.read()


def _check_size(frame: Frame, limits: StreamLimits) -> None:
    if len(frame.image) > limits.max_frame_mb * 1e6:
        raise ImageTooLarge(f"The frame has more than {limits.max_frame_mb:g} MB: scale it down or compress it more")


def _answer(settings: StreamSettings, frame: Frame, tracked: Tracked, query: StreamQuery) -> Message:
    said = {"stream": settings.stream, "frame": frame.number, "time_s": frame.time_s, "dropped": tracked.dropped}
    return {**said, "counts": tracked.counts, "image": image_answer(tracked.result, query.normalize, query.decimals)}


async def _send(websocket: WebSocket, message: Message) -> None:
    await websocket.send_text(json.dumps(message, ensure_ascii=False, separators=(",", ":")))
