"""Encoded bytes → pixels → an engine's input: the one importer of Pillow.

    bytes ─ signature? ─ header within limits? ─ complete? ─ decode → (H, W, 3) uint8 BGR
                 └──────────────┴───────────────────┴──────────┴──→ BadImage with a reason

    letterboxed images of one shape ─ as_tensor → (N, 3, H, W) float32 RGB from 0 to 1

The pixels equal those that ``YOLO.predict(path)`` sees for the same file (``ultralytics.utils.patches.imread``): EXIF
rotation applied, grey and CMYK turned to BGR, alpha dropped, 16 bits cut to 8. Two things are stricter on purpose: the
size is limited before decoding, and a file that ends too early is an error instead of a half-grey picture.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from actors.errors import BadImage, ImageTooLarge
from actors.settings import ImageLimits

Array = NDArray[np.uint8]
Pixels = tuple[Array, tuple[int, ...]]  # of an image, and the shape in whose pixels its result is to be

cv2.setNumThreads(0)  # decoding runs in our own pool; OpenCV's would fight the engine for the cores
Image.init()  # all plugins, which Image.OPEN then names
Image.MAX_IMAGE_PIXELS = None  # ImageLimits decide, by an error and not by a warning
warnings.filterwarnings("ignore", module="PIL")  # odd metadata in a client's file is not our operator's concern

SUPPORTED = "JPEG, PNG, WebP, BMP, TIFF, JPEG 2000 or AVIF"
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".jp2", ".jpeg", ".jpg", ".jpe", ".mpo", ".png", ".tif", ".tiff", ".webp"})

_REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
_FROM_0_TO_1 = np.arange(256, dtype=np.float32) / 255

# By content, not by name: what a client calls its file decides nothing.
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG2000"),
)


def decode_image(data: bytes, limits: ImageLimits) -> Array:
    """Decode one image.

    Args:
        data: the encoded file, as it was sent.
        limits: what it may weigh, in bytes and in pixels.

    Returns:
        (H, W, 3) uint8 array in BGR order, upright.

    Raises:
        ImageTooLarge: more bytes or pixels than ``limits`` allow; nothing was decoded.
        BadImage: empty, of an unsupported format, truncated or corrupt.
    """
    return _decoded(data, _checked(data, limits)[0])


def decode_reduced(data: bytes, limits: ImageLimits, imgsz: tuple[int, int], *, whole: bool = True) -> Pixels:
    """Decode a JPEG at a half, a quarter or an eighth of its sides, as long as ``imgsz`` needs no more pixels.

    libjpeg-turbo leaves out the high frequencies of each block of 8x8 before it transforms it
    (https://libjpeg-turbo.org, ``scale_num``), so that the pixels differ from those of an image that was decoded and then
    scaled down. Any other format is decoded as by ``decode_image``.

    Args:
        data: the encoded file.
        limits: what it may weigh, in bytes and in pixels.
        imgsz: height and width to which it will be scaled.
        whole: it will be scaled to lie within ``imgsz``, else so that it covers it.

    Returns:
        (h, w, 3) uint8 array in BGR order, upright, and the (H, W, 3) of the original.

    Raises:
        ImageTooLarge, BadImage: see ``decode_image``.
    """
    kind, (width, height) = _checked(data, limits)
    ratios = (imgsz[0] / height, imgsz[1] / width)
    scale = min(ratios) if whole else max(ratios)
    by = next((by for by in _REDUCED if kind == "JPEG" and scale * by <= 1), 1)
    image = _decoded(data, kind, _REDUCED.get(by, cv2.IMREAD_COLOR))
    if by == 1:
        return image, image.shape
    turned = image.shape[:2] != (-(-height // by), -(-width // by))  # by its EXIF orientation
    return image, (width, height, 3) if turned else (height, width, 3)


def starts_like_image(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is of a format that ``decode_image`` takes."""
    try:
        return bool(_sniff(head))
    except BadImage:
        return False


def as_tensor(images: Sequence[Array]) -> NDArray[np.float32]:
    """What a network takes, on the CPU: a tenth of the time that torch needs to transpose and to divide.

    Args:
        images: (H, W, 3) uint8 BGR each, all of one shape.

    Returns:
        (N, 3, H, W) float32 RGB from 0 to 1, equal to those of Ultralytics' ``BasePredictor.preprocess``.
    """
    tensor = np.empty((len(images), 3, *images[0].shape[:2]), np.float32)
    for image, planes in zip(images, tensor, strict=True):
        for plane, channel in zip(reversed(planes), cv2.split(image), strict=True):
            cv2.LUT(channel, _FROM_0_TO_1, dst=plane)
    return tensor


def encode_jpeg(image: Array, quality: int = 92) -> bytes:
    """Encode an (H, W, 3) uint8 BGR array as JPEG."""
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def shrink(image: Array, longest_side: int) -> Array:
    """Scale an (H, W, 3) uint8 array down until no side has more than so many pixels; a smaller one stays as it is."""
    height, width = image.shape[:2]
    scale = longest_side / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _checked(data: bytes, limits: ImageLimits) -> tuple[str, tuple[int, int]]:
    """What kind of file it is, and (width, height) as its header has them; complete, and not more than ``limits`` allow."""
    kind = _sniff(data)
    if len(data) > limits.max_image_mb * 1e6:
        raise ImageTooLarge(f"The image has {len(data) / 1e6:.1f} MB; at most {limits.max_image_mb:g} MB are accepted")
    size = _check_size(data, kind, limits)
    if not _is_complete(data, kind):
        raise BadImage("The image is truncated: send the whole file")
    return kind, size


def _decoded(data: bytes, kind: str, mode: int = cv2.IMREAD_COLOR) -> Array:
    try:
        image = _decode(data, kind, mode)
    except Exception as error:  # decoders raise many types; whatever they say, the file is at fault
        raise BadImage(f"The {kind} file is corrupt and cannot be decoded: encode it again") from error
    if image is None:
        raise BadImage(f"The {kind} file is corrupt and cannot be decoded: encode it again")
    return np.ascontiguousarray(image)


def _sniff(data: bytes) -> str:
    if not data:
        raise BadImage("The file is empty: send the bytes of an image")
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and b"avif" in data[8:32]:
        return "AVIF"
    raise BadImage(f"This is not an image that can be read: send {SUPPORTED}")


def _check_size(data: bytes, kind: str, limits: ImageLimits) -> tuple[int, int]:
    width, height = _header_size(data, kind)
    if width * height > limits.max_megapixels * 1e6 or max(width, height) > limits.max_side_px:
        raise ImageTooLarge(
            f"The image is {width}x{height} pixels; at most {limits.max_megapixels:g} megapixels"
            f" and {limits.max_side_px} pixels a side are accepted: scale it down"
        )
    return width, height


def _open(data: bytes, kind: str) -> Image.Image:
    """Open with the plugin of the signature's kind; ``Image.open`` would try others, and ultralytics patches it."""
    factory, _ = Image.OPEN[kind]
    return factory(io.BytesIO(data), "")


def _header_size(data: bytes, kind: str) -> tuple[int, int]:
    try:
        with _open(data, kind) as header:
            return header.size
    except Exception as error:  # Pillow's plugins raise many types for a header that they cannot read
        raise BadImage("The image's header cannot be read: the file is truncated or corrupt") from error


def _is_complete(data: bytes, kind: str) -> bool:
    """Whether the file reaches its end marker; where that leaves doubt, whether Pillow can read all of it."""
    if kind == "JPEG" and data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda"):
        return True
    if kind == "PNG" and data.rfind(b"IEND") > 0:
        return True
    if kind == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    try:
        with _open(data, kind) as image:
            image.load()
    except OSError as error:
        # Pillow reads fewer kinds of TIFF and BMP than OpenCV: only a file that ends too early is our concern here.
        return "truncated" not in str(error) and kind != "JPEG"
    except Exception:
        return True
    return True


def _decode(data: bytes, kind: str, mode: int) -> Array | None:
    buffer = np.frombuffer(data, np.uint8)
    if kind == "AVIF":
        return _decode_with_pillow(data)
    if kind == "TIFF":
        image = _decode_colour_tiff(buffer)
        if image is not None:
            return image
    decoded = cv2.imdecode(buffer, mode)
    return None if decoded is None else _to_bytes(decoded)


def _decode_colour_tiff(buffer: Array) -> Array | None:
    """The first page of a colour TIFF without its alpha, as Ultralytics reads it; None for grey ones."""
    found, pages = cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(0, 1))  # only its size was checked
    return _to_bytes(pages[0][..., :3]) if found and pages[0].ndim == 3 else None


def _decode_with_pillow(data: bytes) -> Array:
    with ImageOps.exif_transpose(_open(data, "AVIF")) as image:
        return _to_bytes(cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR))


def _to_bytes(image: Any) -> Array:
    return np.asarray(image >> 8 if image.dtype == np.uint16 else image, np.uint8)
