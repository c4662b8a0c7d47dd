"""The second half of tracking a recorded video: committed detections → tracks, in frame order, one StreamTracker a video.

    detections of one video ─ by frame ─→ StreamTracker ─→ DIR/tracks/NAME.parquet   rows of writers.SCHEMA, with track ids
                the video's pixels, for botsort ─┘                   ├─→ DIR/mot/NAME.txt         MOTChallenge
                                                 the video's pixels ─┴─→ DIR/annotated/NAME.mp4   boxes and ids drawn in

Detection has run in parallel and left nothing but rows; association is a Ray task a video and holds that video's rows only.
A video's tracks are done where they have a row for each detected frame; the other files are made of them. ``botsort`` costs a
second decoding of the video, since it looks at the pixels to compensate the camera's motion; ``bytetrack`` reads rows only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from actors.annotate import annotate
from actors.clips import frame_rate, read_frames, write_clip
from actors.errors import FleetError, PoisonedImage
from actors.hardware import step_back
from actors.ledger import TRACKS, Ledger
from actors.right_of_way import give_way, node_folder
from actors.settings import TrackerSettings
from actors.storage import Storage, credentials
from actors.tracker import StreamTracker
from actors.writers import SCHEMA, Place, readable_stem, result_of, row, table

ROWS_AT_ONCE = 1024

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TrackSettings:
    """How the videos of one job are tracked, and what is written besides the rows."""

    ledger: Ledger
    tracker: TrackerSettings
    mot: bool = False
    annotate: bool = False
    background: bool = False
    environment: dict[str, str] = field(default_factory=credentials, repr=False)


def track_clips(settings: TrackSettings, clips: Iterable[str], at_once: int, num_cpus: float) -> int:
    """Track every video whose detections are committed and whose tracks are not; one Ray task each.

    Args:
        settings: how.
        clips: paths of the videos.
        at_once: how many tasks there are at a time, at most.
        num_cpus: what each reserves; it uses one.

    Returns:
        How many tracks there are in all videos.

    Raises:
        FleetError: a video can no longer be read, or its process dies each time; the others' tracks are there by then.
    """
    task = ray.remote(num_cpus=num_cpus)(track_clip)
    waiting, tracks = iter(clips), 0
    running: dict[Any, str] = {}
    failed: list[FleetError] = []
    while True:
        running |= {task.remote(settings, clip): clip for clip in islice(waiting, at_once - len(running))}
        if not running:
            break
        (done,), _ = ray.wait(list(running))
        clip = running.pop(done)
        try:
            tracks += ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, FleetError):
                raise error from None
            failed.append(type(error.cause)(f"{clip}: {error.cause.message}"))
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            failed.append(PoisonedImage(f"{clip}: its process died each time ({type(error).__name__}), take it out"))
    if failed:
        raise type(failed[0])(failed[0].message + (f" ({len(failed) - 1} more failed)" if failed[1:] else ""))
    return tracks


def track_clip(settings: TrackSettings, clip: str) -> int:
    """Track one video and commit its files, as far as that is still to be done; returns how many tracks it has.

    Raises:
        BadImage: the video can no longer be read.
    """
    if settings.background:
        give_way(node_folder())
        step_back()
    os.environ.update(settings.environment)
    ledger, name = settings.ledger, clip_name(clip)
    tracks, mot, annotated = (f"{TRACKS}/{name}.parquet", f"mot/{name}.txt", f"annotated/{name}.mp4")
    detected = ledger.rows_of(clip)
    if not detected.num_rows:
        return 0
    if not _is_made_of(detected, ledger.storage, tracks):
        for derived in (mot, annotated):
            ledger.storage.delete(derived)
        ledger.place(tracks, lambda path: _associate(path, settings, clip, detected))
    if settings.mot and not ledger.storage.has(mot):
        ledger.place(mot, lambda path: _write_mot(path, _rows(ledger.storage, tracks)))
    if settings.annotate and not ledger.storage.has(annotated):
        images = _drawn(clip, detected.column("frame").to_numpy().tolist(), _rows(ledger.storage, tracks))
        ledger.place(annotated, lambda path: write_clip(path, images, frame_rate(clip)))
    with ledger.storage.open(tracks) as file:
        detections = pq.read_table(file, columns=["detections"]).column("detections")
    return len(pc.unique(pc.struct_field(pc.list_flatten(detections), "track_id").drop_null()))


def clip_name(clip: str) -> str:
    """What a video's files are called: its own name, and a hash of its place, so that two of one name do not meet."""
    return f"{readable_stem(clip)}-{hashlib.sha256(clip.encode()).hexdigest()[:8]}"


def _is_made_of(detected: pa.Table, storage: Storage, tracks: str) -> bool:
    """Whether the tracks are there, and of just these frames of this version of the video."""
    if not storage.has(tracks):
        return False
    key = ["frame", "version"]
    with storage.open(tracks) as file:
        return bool(pq.read_table(file, columns=key).equals(detected.select(key)))


def _associate(path: Path, settings: TrackSettings, clip: str, detected: pa.Table) -> None:
    tracker = StreamTracker(settings.tracker)
    frames = read_frames(clip, detected.column("frame").to_numpy().tolist()) if tracker.needs_frames else None
    metadata = settings.ledger.metadata(tracker=settings.tracker.model_dump())
    with pq.ParquetWriter(path, SCHEMA.with_metadata(metadata), compression="zstd") as writer:
        for batch in detected.to_batches(ROWS_AT_ONCE):
            rows = []
            for known in batch.to_pylist():
                result = tracker.update(result_of(known), next(frames).image if frames else None)
                place = Place(known["video"], known["frame"], known["time_s"])
                about = (known["uri"], known["sha256"], known["model"])
                rows.append(row(*about, result, version=known["version"], place=place))
            writer.write_table(table(rows))


def _rows(storage: Storage, name: str) -> Rows:
    with storage.open(name) as file:
        for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _write_mot(path: Path, rows: Rows) -> None:
    """MOTChallenge's results: ``frame, id, left, top, width, height, confidence, -1, -1, -1``; pixels, frames from 1."""
    with path.open("w") as file:
        for known in rows:
            for found in result_of(known).detections:
                if found.track_id is not None and found.box:
                    x1, y1, x2, y2 = found.box
                    box = f"{x1:.2f},{y1:.2f},{x2 - x1:.2f},{y2 - y1:.2f}"
                    file.write(f"{known['frame']},{found.track_id},{box},{found.confidence:.4f},-1,-1,-1\n")


def _drawn(clip: str, numbers: Sequence[int], rows: Rows) -> Iterator[NDArray[np.uint8]]:
    for frame, known in zip(read_frames(clip, numbers), rows, strict=True):
        yield annotate(frame.image, result_of(known))
