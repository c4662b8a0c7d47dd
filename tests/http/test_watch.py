"""``yolofleet watch`` against the API on a real socket: a file and an RTSP sender through OpenCV, and what cannot be."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from actors.clips import list_frames
from deploy.api import create_api
from deploy.cli import app
from deploy.environment import free_port
from deploy.settings import HttpLimits
from tests.conftest import video
from tests.http.conftest import OneDetectorFleet, listening

FRAMES = 6
GATE = '{"gate": [[32, 0], [32, 48]]}'


@pytest.fixture(scope="module")
def address(fleet: OneDetectorFleet) -> Iterator[str]:
    with listening(create_api(fleet, HttpLimits())) as made:
        yield made


def watch(source: str, address: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["watch", source, "--to", address, "--tracker", "bytetrack", *options])


def test_a_file_is_watched_counted_and_written(address: str, tmp_path: Path) -> None:
    video(tmp_path / "clip.mp4", FRAMES)
    options = ["--stream", "file", "--lines", GATE, "--out", str(tmp_path / "watched.mp4")]
    result = watch(str(tmp_path / "clip.mp4"), address, *options)
    assert result.exit_code == 0, result.output
    assert f"│ {FRAMES} " in result.output and "┃ gate" in result.output and "in: nothing" in result.output
    assert len(list_frames(str(tmp_path / "watched.mp4"))) == FRAMES


def calling(url: str) -> Any:
    """An RTSP sender that has reached its listener: it connects with its header, not when it is opened."""
    while True:
        out = av.open(url, "w", format="rtsp", options={"rtsp_transport": "tcp"})
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        try:
            out.start_encoding()
            return out
        except av.FFmpegError:  # nobody listens yet
            time.sleep(0.05)


def send(url: str) -> None:
    """What an RTSP camera does, but that it calls and OpenCV listens."""
    out = calling(url)
    stream = out.streams.video[0]
    image = np.full((48, 64, 3), (0, 0, 200), np.uint8)
    for _ in range(FRAMES):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
    out.mux(stream.encode())
    out.close()


def test_an_rtsp_source_is_watched_until_it_ends(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"rtsp://127.0.0.1:{free_port()}/live"
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_flags;listen|listen_timeout;60")
    sender = threading.Thread(target=send, args=[url], daemon=True)
    sender.start()
    result = watch(url, address, "--stream", "rtsp")
    sender.join()
    assert result.exit_code == 0, result.output
    assert f"│ {FRAMES} " in result.output


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("63", [], "'63' cannot be opened"),  # no camera has that number
        ("clip.mp4", ["--lines", "gate"], "this is no JSON"),
        ("clip.mp4", ["--stream", "a b"], "'stream'"),
    ],
)
def test_what_cannot_be_watched_is_a_sentence(
    source: str, options: list[str], sentence: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    video(tmp_path / "clip.mp4")
    result = watch(source, address, *options)
    assert result.exit_code != 0
    assert sentence in " ".join(result.output.split()) and "Traceback" not in result.output
