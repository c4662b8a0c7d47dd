"""Videos on disk as inputs of a dataset: each frame is an input, and any span of frames can be decoded alone.

    clip.mp4 ─ list_frames ─→ clip.mp4#frame=00000001 … ─ (shards) ─ read_frames ─→ (number, seconds, BGR), …
    (number, BGR) … ─ write_clip ─→ MP4

A span's frames are exactly those of reading the video from its start. Seeking is only exact where the timestamps of all
packets are evenly spaced, since OpenCV finds a frame by its time. A process reads the packets once to know, without decoding.
Any other video is decoded from its start for each span: right, but quadratic in its length; encode it at a constant rate.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from actors.errors import BadImage

Array = NDArray[np.uint8]

CLIP_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"})
MARK = "#frame="
EVEN = 0.25  # how far a timestamp may be from its place, in frames: containers round to milliseconds


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: its number from 1, its time from the first frame in seconds, its (H, W, 3) uint8 BGR pixels."""

    number: int
    time_s: float
    image: Array


def is_clip(path: Path) -> bool:
    """Whether a file's name says that it is a video."""
    return path.suffix.lower() in CLIP_SUFFIXES


def frame_uri(clip: str, number: int) -> str:
    """The URI of frame ``number`` (from 1) of a video; URIs sort as frames follow each other."""
    return f"{clip}{MARK}{number:08d}"


def parse_frame(uri: str) -> tuple[str, int] | None:
    """The video and the frame number that ``frame_uri`` made a URI of; None if it is no such URI."""
    clip, mark, number = uri.rpartition(MARK)
    return (clip, int(number)) if mark and number.isdigit() else None


def list_frames(clip: str) -> list[str]:
    """The URIs of all frames that a video announces; of a video that cannot be opened the first, to fail as one input."""
    try:
        with _opened(clip) as capture:
            return [frame_uri(clip, number) for number in range(1, _length(capture) + 1)]
    except BadImage:
        return [frame_uri(clip, 1)]


def read_frames(clip: str, numbers: Sequence[int]) -> Iterator[Frame]:
    """Decode some frames of a video, in order.

    Args:
        clip: path of the video.
        numbers: which, ascending, from 1.

    Yields:
        The frames, until the first that cannot be decoded.

    Raises:
        BadImage: the video cannot be opened.
    """
    with _opened(clip) as capture:
        position = 1
        if numbers and numbers[0] > 1 and _evenly_timed(clip, Path(clip).stat().st_mtime_ns):
            capture.set(cv2.CAP_PROP_POS_FRAMES, numbers[0] - 1)
            position = numbers[0]
        for number in numbers:
            while position < number and capture.grab():
                position += 1
            decoded, image = capture.read() if position == number else (False, None)
            if not decoded or image is None:
                return
            position += 1
            yield Frame(number, capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3, np.asarray(image, np.uint8))


def read_source(source: str) -> Iterator[Frame]:
    """Decode whatever OpenCV can read, from its beginning until it ends or fails.

    Args:
        source: a video's path, an address such as ``rtsp://…``, or a camera's number, such as ``0``.

    Raises:
        BadImage: it cannot be opened.
    """
    capture = cv2.VideoCapture(int(source)) if source.isdigit() else cv2.VideoCapture(source, cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise BadImage(f"'{source}' cannot be opened: give a video, an address such as rtsp://…, or a camera's number")
        for number in itertools.count(1):
            decoded, image = capture.read()
            if not decoded:
                return
            yield Frame(number, capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3, np.asarray(image, np.uint8))
    finally:
        capture.release()


def hash_clip(clip: str) -> str | None:
    """SHA-256 of a video's file, hexadecimal, which a process computes once; None if it cannot be read."""
    try:
        return _hash(clip, Path(clip).stat().st_mtime_ns)
    except OSError:
        return None


def frame_rate(clip: str) -> float:
    """Frames per second as the video tells them.

    Raises:
        BadImage: the video cannot be opened.
    """
    with _opened(clip) as capture:
        return float(capture.get(cv2.CAP_PROP_FPS))


def write_clip(path: Path, images: Iterator[Array], fps: float) -> None:
    """Encode (H, W, 3) uint8 BGR images of one size, at least one, as an MP4 (MPEG-4 part 2, which OpenCV brings along)."""
    first = next(images)
    height, width = first.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), fps or 25.0, (width, height))
    try:
        writer.write(first)
        for image in images:
            writer.write(image)
    finally:
        writer.release()


@contextmanager
def _opened(clip: str) -> Iterator[cv2.VideoCapture]:
    capture = cv2.VideoCapture(clip, cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise BadImage("This video cannot be opened: it is missing, truncated, corrupt or of an unknown codec")
        yield capture
    finally:
        capture.release()


def _length(capture: cv2.VideoCapture) -> int:
    """Frames as announced, which is where ``YOLO.predict`` ends too; a live recording does not know and is counted."""
    announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if announced > 0:
        return announced
    counted = 0
    while capture.grab():
        counted += 1
    if not counted:
        raise BadImage("Not one frame of this video can be decoded")
    return counted


@lru_cache(maxsize=64)
def _hash(clip: str, modified_ns: int) -> str:
    del modified_ns
    with Path(clip).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=64)
def _evenly_timed(clip: str, modified_ns: int) -> bool:
    """Whether frame n is shown at n / rate, by the timestamps of all packets; ``modified_ns`` tells versions apart."""
    del modified_ns
    with _opened(clip) as capture:
        capture.set(cv2.CAP_PROP_FORMAT, -1)  # packets as they are, not decoded
        times = []
        while capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
        places = np.sort(times) * (capture.get(cv2.CAP_PROP_FPS) / 1e3)
    return bool(len(places)) and bool(np.all(np.abs(places - places[0] - np.arange(len(places))) < EVEN))
