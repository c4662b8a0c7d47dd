"""NDJSON: one line per answer, each as soon as it is there, whatever becomes of the others.

    sources ─ one task each ─→ bounded queue ─→ line, line, …
                  │                              └── the client has gone: every task is cancelled
                  └── an error becomes the last line of its source; the other sources go on

A reader that is slow stops the tasks when the queue is full, so that a video's frames do not pile up.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

MEDIA_TYPE = "application/x-ndjson"
MAX_QUEUED = 16

Line = dict[str, Any]


class LinesResponse(StreamingResponse):
    """Streams lines, and closes their generator when the client goes.

    Args:
        sources: each an iterator of lines.
        line_of_error: the line for whatever ended the source of that index.
    """

    media_type = MEDIA_TYPE

    def __init__(self, sources: Sequence[AsyncIterator[Line]], line_of_error: Callable[[int, Exception], Line]) -> None:
        self._lines = lines(sources, line_of_error)
        super().__init__(self._lines)

    async def stream_response(self, send: Send) -> None:
        """Send every line; on cancellation too, end the work behind those not sent."""
        async with aclosing(self._lines):
            await super().stream_response(send)


async def lines(
    sources: Sequence[AsyncIterator[Line]], line_of_error: Callable[[int, Exception], Line]
) -> AsyncGenerator[bytes, None]:
    """Run all sources at once and yield their lines, encoded, in the order in which they come."""
    queue: asyncio.Queue[Line | None] = asyncio.Queue(MAX_QUEUED)

    async def pump(index: int, source: AsyncIterator[Line]) -> None:
        try:
            async for line in source:
                await queue.put(line)
        except Exception as error:
            await queue.put(line_of_error(index, error))
        await queue.put(None)

    pumps = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    try:
        running = len(pumps)
        while running:
            line = await queue.get()
            if line is None:
                running -= 1
            else:
                yield json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
