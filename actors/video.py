"""Encoded video → frames, one after the other: those that ``YOLO.predict(video)`` sees.

    bytes ─ signature? ─ size? ─ complete? ─ temporary file ─ cv2.VideoCapture ─ length and pixels? ─→ (number, BGR) …
                └──────────┴─────────┴──────────────┴──→ BadImage with a reason ←──┘

Which frames a stride leaves, and where a video ends, follows ``ultralytics.data.loaders.LoadImagesAndVideos``. Stricter on
purpose, as for images: limits are checked before decoding, and a container that ends too early, or a frame that cannot be
converted, is an error.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.errors import BadImage, ImageTooLarge
from actors.settings import ImageLimits

if TYPE_CHECKING:
    import cv2

Array = NDArray[np.uint8]

SUPPORTED = "MP4, MOV, AVI, MKV or WebM"

_MATROSKA = b"\x1a\x45\xdf\xa3"  # the EBML header of MKV and WebM
_SEGMENT = b"\x18\x53\x80\x67"
_QUICKTIME_ATOMS = frozenset({b"moov", b"mdat", b"wide"})  # what a MOV without ``ftyp`` begins with
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"mif1", b"msf1")  # still images in the same container
_MOST_BOXES = 100_000


def is_video(data: bytes) -> bool:
    """Whether ``data`` begins like a video file that ``read_video`` takes; its name decides nothing."""
    return _container(data) is not None


def read_video(data: bytes, limits: ImageLimits, stride: int = 1) -> Iterator[tuple[int, Array]]:
    """Decode every ``stride``-th frame. A generator: nothing happens, and nothing is raised, before the first ``next``.

    Args:
        data: the encoded file, as it was sent.
        limits: what it may weigh, and how many frames it may have after ``stride``.
        stride: of each group of so many frames the last one is taken; a group that is cut short gives none.

    Yields:
        The frame's number in the video, from 1, and its (H, W, 3) uint8 BGR array, upright.

    Raises:
        ImageTooLarge: more bytes, pixels or frames than ``limits`` allow.
        BadImage: not a video of a supported format, truncated, or without one frame that can be decoded.
    """
    import cv2

    kind = _container(data)
    if kind is None:
        raise BadImage(f"This is not a video that can be read: send {SUPPORTED}")
    if len(data) > limits.max_video_mb * 1e6:
        raise ImageTooLarge(f"The video has {len(data) / 1e6:.1f} MB; at most {limits.max_video_mb:g} MB are accepted")
    if not _is_complete(data, kind):
        raise BadImage("The video is truncated: send the whole file")
    with tempfile.NamedTemporaryFile(prefix="yolofleet-video-") as file:
        file.write(data)
        file.flush()
        capture = cv2.VideoCapture(file.name, cv2.CAP_FFMPEG)
        try:
            if not capture.isOpened():
                raise BadImage(f"The {kind} file is corrupt or of an unknown codec: encode it again, as H.264 for example")
            frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT) / stride)
            size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
            _check_size(size, limits)
            _check_length(frames, limits)
            yield from _frames(capture, stride, frames, limits)
        finally:
            capture.release()


def _frames(capture: cv2.VideoCapture, stride: int, announced: int, limits: ImageLimits) -> Iterator[tuple[int, Array]]:
    for taken in itertools.count(1):
        number = taken * stride
        grabbed = 0
        while grabbed < stride and capture.grab():
            grabbed += 1
        if not grabbed and taken == 1:
            raise BadImage("Not one frame of the video can be decoded: encode it again, as H.264 for example")
        if grabbed < stride:
            return
        found, image = capture.retrieve()
        if not found:
            raise BadImage(f"Frame {number} of the video cannot be decoded: encode it again, as H.264 for example")
        _check_length(taken, limits)  # again, since not every container announces its length
        yield number, image
        if taken == announced:
            return


def _check_length(frames: int, limits: ImageLimits) -> None:
    if frames > limits.max_video_frames:
        raise ImageTooLarge(
            f"The video has more than {limits.max_video_frames} frames: send a shorter one, or skip frames by 'vid_stride'"
        )


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_megapixels * 1e6 or max(size) > limits.max_side_px:
        raise ImageTooLarge(
            f"The video is {width}x{height} pixels; at most {limits.max_megapixels:g} megapixels"
            f" and {limits.max_side_px} pixels a side are accepted: scale it down"
        )


def _container(data: bytes) -> str | None:
    if data.startswith(_MATROSKA):
        return "MKV"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "AVI"
    if data[4:8] == b"ftyp":
        return None if data[8:12] in _STILL_BRANDS or b"avif" in data[8:32] else "MP4"
    return "MP4" if data[4:8] in _QUICKTIME_ATOMS else None


def _is_complete(data: bytes, kind: str) -> bool:
    """Whether all that the container announces is there; what it does not tell is left to the decoder."""
    if kind == "AVI":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return _segment_fits(data) if kind == "MKV" else _boxes_fit(data)


def _boxes_fit(data: bytes) -> bool:
    """Walk the boxes of an MP4 or MOV, ISO/IEC 14496-12, 4.2: size, type; 1 says that 64 bits follow, 0 the rest."""
    position = 0
    for _ in range(_MOST_BOXES):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:
            return True
        position += size
        if position >= len(data):
            return position == len(data)
    return True


def _segment_fits(data: bytes) -> bool:
    """Whether a Matroska file holds its whole segment; a live recording does not know its size. RFC 8794, 4 and 6."""
    header, position = _vint(data, len(_MATROSKA))
    position += header or 0
    if data[position : position + 4] != _SEGMENT:
        return True
    size, position = _vint(data, position + 4)
    return size is None or position + size <= len(data)


def _vint(data: bytes, position: int) -> tuple[int | None, int]:
    """A variable-size integer, None where it is 'unknown', and the position after it."""
    first = int.from_bytes(data[position : position + 1], "big")
    length = 9 - first.bit_length()
    bits = 7 * length
    value = int.from_bytes(data[position : position + length], "big") & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), position + length
