"""Videos on disk: any span of frames is exactly what reading from the start gives."""

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from actors.clips import frame_uri, is_clip, list_frames, parse_frame, read_frames, write_clip
from actors.errors import BadImage
from deploy.demo.scene import draw_clip
from tests.conftest import ASSETS, video

KINDS = [("mp4", "mp4v"), ("mov", "mp4v"), ("avi", "MJPG"), ("avi", "XVID"), ("mkv", "MJPG"), ("webm", "VP80")]
FRAMES = 40


def sequential(path: Path) -> list[NDArray[np.uint8]]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    images = []
    while (read := capture.read())[0]:
        images.append(np.asarray(read[1], np.uint8))
    return images


def drawn(path: Path, codec: str) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 29.97, (240, 160))
    for scene in draw_clip(1, FRAMES, 240, 160):
        writer.write(scene.image)
    writer.release()
    return path


@pytest.mark.parametrize(("suffix", "codec"), KINDS)
def test_every_span_holds_the_frames_of_sequential_decoding(tmp_path: Path, suffix: str, codec: str) -> None:
    path = drawn(tmp_path / f"clip.{suffix}", codec)
    expected = sequential(path)
    assert len(list_frames(str(path))) == len(expected) == FRAMES
    for first, last in ((1, 3), (2, 9), (13, 14), (17, 40), (40, 40)):
        found = list(read_frames(str(path), range(first, last + 1)))
        assert [frame.number for frame in found] == list(range(first, last + 1))
        for frame in found:
            assert np.array_equal(frame.image, expected[frame.number - 1])
            assert frame.time_s == pytest.approx((frame.number - 1) / 29.97, abs=1e-3)


@pytest.mark.real
def test_spans_of_a_real_video_with_frames_that_depend_on_later_ones() -> None:
    path = ASSETS / "data" / "traffic.mp4"
    expected = sequential(path)
    assert len(list_frames(str(path))) == len(expected)
    for first, last in pairwise((2, 61, 64, 130, 200, 285)):
        for frame in read_frames(str(path), [first, last]):  # a span may have holes
            assert np.array_equal(frame.image, expected[frame.number - 1])


def test_uneven_timestamps_are_not_sought_but_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = drawn(tmp_path / "clip.mkv", "MJPG")
    monkeypatch.setattr("actors.clips._evenly_timed", lambda *_: False)
    (frame,) = read_frames(str(path), [30])
    assert np.array_equal(frame.image, sequential(path)[29])


@pytest.mark.parametrize("keep", [0.4, 0.8])
def test_a_truncated_video_gives_the_frames_that_its_decoder_gives(tmp_path: Path, keep: float) -> None:
    path = drawn(tmp_path / "clip.avi", "MJPG")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    left = sequential(path)
    assert len(list_frames(str(path))) == FRAMES  # as its header tells
    frames = list(read_frames(str(path), range(1, FRAMES + 1)))
    assert all(np.array_equal(frame.image, left[frame.number - 1]) for frame in frames)
    assert 0 < len(frames) == len(left) < FRAMES


def test_a_video_that_cannot_be_opened_is_one_input(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    data = video(path)
    path.write_bytes(data[: len(data) // 2])
    assert list_frames(str(path)) == [frame_uri(str(path), 1)]
    with pytest.raises(BadImage, match="cannot be opened"):
        next(read_frames(str(path), [1]))


def test_uris_of_frames_sort_as_the_frames_follow(tmp_path: Path) -> None:
    uris = [frame_uri("/a#b.mp4", number) for number in (1, 2, 10, 100)]
    assert uris == sorted(uris)
    assert [parse_frame(uri) for uri in uris] == [("/a#b.mp4", number) for number in (1, 2, 10, 100)]
    assert parse_frame("/photos/a.jpg") is None
    assert is_clip(Path("A.MOV")) and not is_clip(Path("a.jpg"))


def test_a_written_clip_has_all_frames(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    write_clip(path, (scene.image for scene in draw_clip(1, 7, 64, 48)), 15)
    assert len(sequential(path)) == len(list_frames(str(path))) == 7
