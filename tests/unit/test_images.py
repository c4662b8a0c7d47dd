"""decode_image: the same pixels that YOLO.predict(path) sees, limits before decoding, and BadImage for everything else."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ultralytics.engine.predictor import BasePredictor
from ultralytics.utils.patches import imread

from actors.errors import BadImage, ImageTooLarge
from actors.images import as_tensor, decode_image, decode_reduced
from actors.settings import ImageLimits

LIMITS = ImageLimits()


def _gradient(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:60, 0:80]
    pixels = np.stack([x * 3, y * 4, (x + y) * 2], axis=-1).astype(np.uint8)
    pixels[5:20, 5:40] = (250, 10, 60)  # an asymmetric mark, so that a wrong rotation shows
    return Image.fromarray(pixels).convert(mode)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _rotated(orientation: int) -> bytes:
    return _saved(_gradient(), "JPEG", exif=_exif(orientation))


def _grey16() -> Image.Image:
    return Image.fromarray((np.mgrid[0:60, 0:80][1] * 800).astype(np.uint16))


FILES: dict[str, Callable[[], bytes]] = {
    "rgb.jpg": lambda: _saved(_gradient(), "JPEG", quality=90),
    "progressive.jpg": lambda: _saved(_gradient(), "JPEG", progressive=True),
    "grey.jpg": lambda: _saved(_gradient("L"), "JPEG"),
    "cmyk.jpg": lambda: _saved(_gradient("CMYK"), "JPEG"),
    **{f"exif{turn}.jpg": partial(_rotated, turn) for turn in range(1, 9)},
    "rgb.png": lambda: _saved(_gradient(), "PNG"),
    "rgba.png": lambda: _saved(_gradient("RGBA"), "PNG"),
    "grey.png": lambda: _saved(_gradient("L"), "PNG"),
    "palette.png": lambda: _saved(_gradient("P"), "PNG"),
    "bit.png": lambda: _saved(_gradient("1"), "PNG"),
    "grey16.png": lambda: _saved(_grey16(), "PNG"),
    "exif6.png": lambda: _saved(_gradient(), "PNG", exif=_exif(6)),
    "lossy.webp": lambda: _saved(_gradient(), "WEBP"),
    "alpha.webp": lambda: _saved(_gradient("RGBA"), "WEBP", lossless=True),
    "rgb.bmp": lambda: _saved(_gradient(), "BMP"),
    "grey.bmp": lambda: _saved(_gradient("L"), "BMP"),
    "rgb.tiff": lambda: _saved(_gradient(), "TIFF"),
    "rgba.tiff": lambda: _saved(_gradient("RGBA"), "TIFF"),
    "grey.tiff": lambda: _saved(_gradient("L"), "TIFF"),
    "grey16.tiff": lambda: _saved(_grey16(), "TIFF"),
    "lzw.tiff": lambda: _saved(_gradient(), "TIFF", compression="tiff_lzw"),
    "rgb.jp2": lambda: _saved(_gradient(), "JPEG2000"),
    "rgb.avif": lambda: _saved(_gradient(), "AVIF"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_what_ultralytics_reads_from_the_file(name: str, tmp_path: Path) -> None:
    data = FILES[name]()
    (tmp_path / name).write_bytes(data)
    expected = imread(str(tmp_path / name))
    assert expected is not None
    np.testing.assert_array_equal(decode_image(data, LIMITS), expected)


@pytest.mark.parametrize("name", ["rgb.jpg", "progressive.jpg", "rgb.png", "lossy.webp", "rgb.bmp", "rgb.tiff", "rgb.avif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_an_error_and_not_a_grey_picture(name: str, share: float) -> None:
    data = FILES[name]()
    with pytest.raises(BadImage):
        decode_image(data[: int(len(data) * share)], LIMITS)


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + bytes(60), b"%PDF-1.7", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"])
def test_what_is_no_image_says_so(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(data, LIMITS)
    assert len(caught.value.message) > 20


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    trailer = b"\xff\xda" + b"a phone's motion picture"
    whole = FILES["rgb.jpg"]()
    np.testing.assert_array_equal(decode_image(whole + trailer, LIMITS), decode_image(whole, LIMITS))


def test_pixels_are_limited_by_the_header_before_anything_is_decoded() -> None:
    """A PNG whose header promises 30000x30000 pixels and whose body holds none."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ImageTooLarge, match="30000x30000"):
        decode_image(bomb + struct.pack(">I", 1000) + b"IDAT", LIMITS)


def test_bytes_are_limited() -> None:
    with pytest.raises(ImageTooLarge, match="MB"):
        decode_image(FILES["rgb.bmp"](), ImageLimits(max_image_mb=0.001))


def test_a_side_is_limited() -> None:
    with pytest.raises(ImageTooLarge, match="80x60"):
        decode_image(FILES["rgb.png"](), ImageLimits(max_side_px=79))


@pytest.mark.parametrize(
    ("size", "imgsz", "whole", "expected"),
    [
        ((1280, 960), (640, 640), True, (480, 640)),
        ((1279, 959), (640, 640), True, (959, 1279)),
        ((1281, 959), (320, 320), True, (240, 321)),
        ((4000, 3000), (640, 640), True, (750, 1000)),
        ((4000, 3000), (224, 224), False, (375, 500)),
        ((1280, 480), (320, 320), True, (120, 320)),
        ((1280, 480), (320, 320), False, (480, 1280)),
        ((640, 480), (640, 640), True, (480, 640)),
    ],
)
def test_a_jpeg_is_reduced_as_far_as_enough_pixels_stay(
    size: tuple[int, int], imgsz: tuple[int, int], whole: bool, expected: tuple[int, int]
) -> None:
    width, height = size
    data = _saved(Image.new("RGB", size, (200, 100, 50)), "JPEG")
    image, shape = decode_reduced(data, LIMITS, imgsz, whole=whole)
    assert (image.shape, shape) == ((*expected, 3), (height, width, 3))
    assert np.abs(image.astype(int) - (50, 100, 200)).max() <= 2
    turned = _saved(Image.new("RGB", size), "JPEG", exif=_exif(6))
    assert decode_reduced(turned, LIMITS, imgsz, whole=whole)[1] == (width, height, 3)
    other = _saved(Image.new("RGB", size), "PNG")
    assert decode_reduced(other, LIMITS, imgsz, whole=whole)[0].shape == (height, width, 3)


def test_a_tensor_has_the_values_of_ultralytics() -> None:
    images = [np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8) for seed in range(2)]
    predictor = BasePredictor()
    predictor.device, predictor.model = torch.device("cpu"), SimpleNamespace(fp16=False)
    predictor.pre_transform = lambda given: given
    assert np.array_equal(as_tensor(images), predictor.preprocess(images).numpy())


SEEDS = [FILES[name]() for name in ("rgb.jpg", "rgb.png", "lossy.webp", "rgb.bmp", "rgb.tiff", "rgb.avif")]


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda seed, start, noise: seed[:start] + noise + seed[start + len(noise) :],
            st.sampled_from(SEEDS),
            st.integers(0, 400),
            st.binary(min_size=1, max_size=40),
        ),
    )
)
def test_any_bytes_give_an_array_or_a_bad_image(data: bytes) -> None:
    try:
        image = decode_image(data, ImageLimits(max_megapixels=4))
    except BadImage:
        return
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
