"""Odd files of 28 kinds among good ones: each is the right result, or fails with its reason; no neighbour pays."""

import io
import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from PIL import Image

from actors.detector import Detector
from actors.errors import BadImage
from actors.fake_model import FakeModel, fake_result
from actors.images import decode_image
from actors.schemas import PredictParams
from actors.settings import ImageLimits, ModelSettings
from tests.conftest import picture

LIMITS = ImageLimits(max_megapixels=1)
PIXELS = np.full((48, 64, 3), (7, 0, 200), np.uint8)


def encoded(mode: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[..., ::-1]).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


END = chunk(b"IEND", b"")
PNG, JPEG = picture(), encoded("RGB", "JPEG")
BAD = {
    "zero bytes": (b"", "empty"),
    "one byte": (b"\xff", "not an image"),
    "text": (b"hello", "not an image"),
    "html, an error page": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "json": (b'{"error": "expired"}', "not an image"),
    "zeros, a sparse file": (b"\0" * 4096, "not an image"),
    "gif": (encoded("P", "GIF"), "not an image"),
    "pdf": (encoded("RGB", "PDF"), "not an image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "signature only": (b"\xff\xd8\xff", "header"),
    "png cut at its end": (PNG[:-20], "truncated|corrupt"),
    "jpeg cut in half": (JPEG[: len(JPEG) // 2], "truncated"),
    "webp cut": (encoded("RGB", "WEBP", lossless=True)[:-8], "truncated"),
    "tiff cut": (encoded("RGB", "TIFF")[:-2000], "truncated|corrupt"),
    "bmp cut": (encoded("RGB", "BMP")[:-2000], "truncated|corrupt"),
    "png bomb": (
        png_header(60_000, 60_000) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""),
        "60000x60000",
    ),
    "png of no pixels": (png_header(0, 5) + chunk(b"IDAT", zlib.compress(b"")) + END, "header|corrupt"),
    "png with noise for pixels": (png_header(64, 48) + chunk(b"IDAT", b"noise" * 20) + END, "corrupt"),
    "jpeg with noise after its header": (JPEG[:160] + b"\x55" * 400 + b"\xff\xd9", "corrupt|header|truncated"),
    "tiff whose directory is nowhere": (b"II*\0\xff\xff\xff\x7f", "header|corrupt"),
}
GOOD = {
    "grey": encoded("L", "PNG"),
    "16 bits": cv2.imencode(".png", PIXELS.astype(np.uint16) * 256)[1].tobytes(),
    "cmyk": encoded("CMYK", "JPEG"),
    "palette": encoded("P", "PNG"),
    "alpha": encoded("RGBA", "PNG"),
    "progressive": encoded("RGB", "JPEG", progressive=True),
    "one pixel": picture(1, 1),
    "rubbish behind its end": PNG + b"rubbish",
}


@pytest.fixture(scope="module")
def detector() -> Iterator[Detector]:
    detector = Detector(lambda: FakeModel(ModelSettings(name="fake", weights="fake:")), LIMITS)
    yield detector
    detector.close()


def test_every_kind_is_a_result_or_a_reason_and_its_neighbours_are_right(detector: Detector) -> None:
    neighbours = [picture(blue=number) for number in range(4)]
    mixed = [data for kind in (*(data for data, _ in BAD.values()), *GOOD.values()) for data in (kind, *neighbours)]
    futures = [detector.submit(data, PredictParams()) for data in mixed]
    for data, future in zip(mixed, futures, strict=True):
        if data in neighbours or data in GOOD.values():
            assert future.result() == fake_result(decode_image(data, LIMITS), PredictParams())
        else:
            assert isinstance(future.exception(), BadImage)


@pytest.mark.parametrize("kind", BAD)
def test_the_reason_says_what_is_wrong(kind: str) -> None:
    data, says = BAD[kind]
    with pytest.raises(BadImage, match=says):
        decode_image(data, LIMITS)


@pytest.mark.parametrize("kind", ["16 bits", "alpha", "rubbish behind its end"])
def test_an_odd_but_whole_image_has_its_pixels(kind: str) -> None:
    expected = PIXELS if kind != "rubbish behind its end" else decode_image(PNG, LIMITS)
    assert np.array_equal(decode_image(GOOD[kind], LIMITS), expected)
