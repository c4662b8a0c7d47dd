"""A few of a job's results, for somebody who wants to see them: pictures, what was found in them, and dead letters.

    DIR/detections/*.parquet ─ some files, some rows of each ─→ Sampled(name, JPEG made small, ImageResult) …
                             └ their manifests ───────────────→ dead letters

The sample is spread over what is committed so far, and is the same as long as nothing more is. Nothing is drawn: whoever shows
it does that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import pyarrow.parquet as pq

from actors.clips import read_frames
from actors.dataset import read_input
from actors.errors import BadImage
from actors.images import decode_image, encode_jpeg, shrink
from actors.ledger import DETECTIONS, METADATA_KEY
from actors.schemas import Gallery, Sampled
from actors.settings import ImageLimits
from actors.storage import Storage
from actors.writers import result_of

LONGEST_SIDE = 480  # of a picture, pixels
MOST_LETTERS = 50

T = TypeVar("T")


def sample(root: str, count: int, limits: ImageLimits) -> Gallery:
    """Choose ``count`` results of the job at ``root``, or all if there are fewer.

    Args:
        root: its output folder or prefix.
        count: how many results.
        limits: what an input may weigh that is read again for its picture.

    Returns:
        The results, and up to ``MOST_LETTERS`` dead letters of the same files. An input that cannot be read any more has no
        picture.
    """
    storage = Storage.at(root)
    names = _spread(storage.names(DETECTIONS), count)
    rows, letters = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, name in enumerate(names):
        with storage.open(name) as file:
            found = pq.ParquetFile(file).read()
        rows += _spread(found.to_pylist(), -(-(count - len(rows)) // (len(names) - number)))
        letters += json.loads(found.schema.metadata[METADATA_KEY])["manifest"]["dead_letters"]
    return Gallery(tuple(_sampled(row, limits) for row in rows), tuple(_spread(letters, MOST_LETTERS)))


def _spread(found: Sequence[T], count: int) -> list[T]:
    """At most ``count``, evenly."""
    some = min(count, len(found))
    return [found[number * len(found) // some] for number in range(some)]


def _sampled(row: dict[str, Any], limits: ImageLimits) -> Sampled:
    return Sampled(PurePosixPath(row["uri"]).name, _picture(row, limits), result_of(row))


def _picture(row: dict[str, Any], limits: ImageLimits) -> bytes | None:
    try:
        if row["video"] is None:
            image = decode_image(read_input(row["uri"]), limits)
        else:
            image = next(read_frames(row["video"], [row["frame"]])).image
    except (OSError, BadImage, StopIteration):
        return None
    return encode_jpeg(shrink(image, LONGEST_SIDE), quality=80)
