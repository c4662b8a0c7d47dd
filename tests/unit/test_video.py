"""Videos: the frames are those that ultralytics' own loader gives, and what is no whole video says so."""

import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from ultralytics.data.loaders import LoadImagesAndVideos

from actors.errors import BadImage, FleetError, ImageTooLarge
from actors.settings import ImageLimits
from actors.video import is_video, read_video
from tests.conftest import picture, video

LIMITS = ImageLimits()
KINDS = [
    ("mp4", "mp4v"),
    ("mov", "mp4v"),
    ("m4v", "mp4v"),
    ("avi", "MJPG"),
    ("avi", "XVID"),
    ("mkv", "MJPG"),
    ("webm", "VP80"),
]


def loader_frames(path: Path, stride: int) -> list[NDArray[np.uint8]]:
    return [image for _, images, _ in LoadImagesAndVideos(str(path), vid_stride=stride) for image in images]


@pytest.mark.parametrize(("suffix", "codec"), KINDS)
@pytest.mark.parametrize("stride", [1, 2, 3, 11, 12])
def test_frames_are_those_of_ultralytics_loader(tmp_path: Path, suffix: str, codec: str, stride: int) -> None:
    path = tmp_path / f"clip.{suffix}"
    data = video(path, frames=11, codec=codec)
    assert is_video(data)
    found = list(read_video(data, LIMITS, stride))
    expected = loader_frames(path, stride)
    assert [number for number, _ in found] == [stride * (1 + index) for index in range(len(expected))]
    assert len(found) == 11 // stride
    for (_, image), other in zip(found, expected, strict=True):
        assert np.array_equal(image, other)


@pytest.mark.parametrize(("suffix", "codec"), KINDS)
def test_a_truncated_video_is_refused_before_a_frame(tmp_path: Path, suffix: str, codec: str) -> None:
    data = video(tmp_path / f"clip.{suffix}", codec=codec)
    for length in (40, len(data) // 2, len(data) - 1):
        with pytest.raises(BadImage, match=r"truncated|corrupt"):
            next(read_video(data[:length], LIMITS))


def test_a_recording_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    data = video(tmp_path / "clip.mkv", codec="MJPG")
    at = data.index(b"\x18\x53\x80\x67") + 4
    live = data[:at] + b"\x01" + b"\xff" * 7 + data[at + 8 :]
    assert len(list(read_video(live, LIMITS))) == 5


@pytest.mark.parametrize("data", [b"", b"hello", picture(), b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\n"])
def test_what_is_no_video_is_not_opened(data: bytes) -> None:
    assert not is_video(data)
    with pytest.raises(BadImage, match="not a video"):
        next(read_video(data, LIMITS))


@pytest.mark.parametrize("brand", [b"avif", b"heic", b"mif1"])
def test_still_images_in_the_same_container_are_no_videos(brand: bytes) -> None:
    assert not is_video(b"\x00\x00\x00\x1cftyp" + brand + bytes(20))


def test_limits_are_checked_before_decoding_and_say_what_to_do(tmp_path: Path) -> None:
    data = video(tmp_path / "clip.mp4", frames=11)
    for limits, sentence in (
        (ImageLimits(max_video_mb=0.001), "MB"),
        (ImageLimits(max_megapixels=0.002), "64x48 pixels"),
        (ImageLimits(max_side_px=60), "60 pixels a side"),
        (ImageLimits(max_video_frames=10), "more than 10 frames.*vid_stride"),
    ):
        with pytest.raises(ImageTooLarge, match=sentence):
            next(read_video(data, limits))
    assert len(list(read_video(data, ImageLimits(max_video_frames=5), stride=2))) == 5


def test_a_video_that_does_not_tell_its_length_is_stopped_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = video(tmp_path / "clip.mp4", frames=11)
    opened = cv2.VideoCapture

    class Silent:
        def __init__(self, *args: object) -> None:
            self._capture = opened(*args)

        def get(self, key: int) -> float:
            return 0.0 if key == cv2.CAP_PROP_FRAME_COUNT else self._capture.get(key)

        def __getattr__(self, name: str) -> object:
            return getattr(self._capture, name)

    monkeypatch.setattr(cv2, "VideoCapture", Silent)
    frames = read_video(data, ImageLimits(max_video_frames=4))
    assert [number for number, _ in (next(frames) for _ in range(4))] == [1, 2, 3, 4]
    with pytest.raises(ImageTooLarge, match="more than 4 frames"):
        next(frames)


def test_the_temporary_file_goes_with_the_generator(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    frames = read_video(video(tmp_path / "clip.mp4"), LIMITS)
    next(frames)
    assert list(folder.iterdir())
    frames.close()  # type: ignore[attr-defined]
    assert not list(folder.iterdir())


SIGNATURES = [b"\x1a\x45\xdf\xa3", b"RIFF\x10\x00\x00\x00AVI ", b"\x00\x00\x00\x18ftypisom", b"\x00\x00\x00\x08moov"]


@given(st.sampled_from(SIGNATURES), st.binary(max_size=300))
def test_garbage_behind_a_signature_is_a_bad_image(signature: bytes, garbage: bytes) -> None:
    with pytest.raises(FleetError) as raised:
        next(read_video(signature + garbage, LIMITS))
    assert isinstance(raised.value, BadImage)
