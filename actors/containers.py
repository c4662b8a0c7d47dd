"""Files that hold or name many inputs: tar shards, Parquet, CSV, JSON Lines, lists.

    shard.tar#cat/1.jpg               a member of a tar: WebDataset's layout, of which only the images are inputs
    table.parquet#image[000000017]    row 17, from 0, of a column of bytes; of Hugging Face's Image structs as well
    table.jsonl#image[000000017]      the same of text, CSV too: bytes in base64, as data: URIs or bare
    a column of URIs, a list          no member: what they name are inputs by themselves

A member's URI says where it is, so that whatever knows inputs by their URI needs to know nothing of containers. Reading a
member costs its own bytes only: a process keeps the index of the tars and tables and the row groups that it read last, and
the members of a shard are neighbours, since URIs are sorted and rows are padded with zeros.
"""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from actors.errors import BadSource
from actors.images import IMAGE_SUFFIXES, starts_like_image
from actors.storage import open_file, open_stream

LISTS = (".txt",)
LINES = (".jsonl", ".ndjson")
CSV = (".csv",)
PARQUET = (".parquet",)
TAR = (".tar",)
CONTAINERS = LISTS + LINES + CSV + PARQUET + TAR
COLUMNS = ("uri", "url", "path", "file", "filename", "file_name", "file_path", "filepath", "image_path", "image_url")
COLUMNS_OF_BYTES = ("image", "img", "bytes", "content", "data", "jpg", "jpeg", "png", "webp")

_MARKS = [re.compile(re.escape(f"{suffix}#"), re.IGNORECASE | re.ASCII) for suffix in TAR + PARQUET + CSV + LINES]
_LONGEST_ROW = 1 << 26  # of a CSV file, bytes
_SEEK_AHEAD = 1 << 20  # a tar's headers are read with what lies between them, where that is less than another request
_lock = threading.Lock()  # one thread opens a container, the others then find it open


def is_container(uri: str) -> bool:
    """Whether this file is read for the inputs it holds or names, which its suffix decides."""
    return uri.lower().endswith(CONTAINERS)


def members(uri: str, column: str | None = None) -> Iterator[tuple[str, bool]]:
    """List a container.

    Args:
        uri: the container.
        column: of a table: which column holds the URIs or bytes; the first of ``COLUMNS`` and ``COLUMNS_OF_BYTES`` if None.

    Yields:
        A URI and whether it is a member of the container; else it is a name that the container holds, as it stands there.

    Raises:
        BadSource: it cannot be read, or has no such column.
    """
    try:
        if uri.lower().endswith(TAR):
            yield from ((f"{uri}#{name}", True) for name in _open_tar(uri).index)
        elif uri.lower().endswith(PARQUET):
            yield from _rows(uri, column)
        elif uri.lower().endswith(CSV):
            yield from _named_or_held(uri, _csv(uri, column))
        elif uri.lower().endswith(LINES):
            yield from _named_or_held(uri, _json_lines(uri, column))
        else:
            yield from ((line.strip(), False) for line in _text(uri) if line.strip() and not line.lstrip().startswith("#"))
    except UnicodeDecodeError as error:
        raise BadSource(f"'{uri}' is not UTF-8 text: write one path or URI a line") from error
    except (OSError, tarfile.TarError, pa.ArrowException) as error:
        raise BadSource(f"'{uri}' cannot be read: {error}") from error


def split_member(uri: str) -> tuple[str, str] | None:
    """The container and the member that a URI names; None for a file of its own."""
    for mark in _MARKS:
        if match := mark.search(uri):
            return uri[: match.end() - 1], uri[match.end() :]
    return None


def read_member(container: str, member: str) -> bytes:
    """The bytes of one member.

    Raises:
        OSError: the container cannot be read any more, or the member is not in it.
    """
    try:
        if container.lower().endswith(TAR):
            with _lock:
                tar = _open_tar(container)
            return tar.read(member)
        column, _, row = member.rpartition("[")
        with _lock:
            table = _open_parquet(container) if container.lower().endswith(PARQUET) else _open_text(container)
            return table.read(column, int(row.rstrip("]")))
    except OSError:
        raise
    except (tarfile.TarError, pa.ArrowException, LookupError, ValueError) as error:
        raise OSError(f"{container} does not hold {member}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Tar:
    """An open tar: where each image lies in it, as (offset, size)."""

    file: Any  # see storage.open_file
    index: dict[str, tuple[int, int]]

    def read(self, name: str) -> bytes:
        offset, size = self.index[name]
        return bytes(self.file.read_at(size, offset))


@lru_cache(maxsize=8)
def _open_tar(uri: str) -> _Tar:
    with tarfile.open(fileobj=io.BufferedReader(open_file(uri), _SEEK_AHEAD), mode="r:") as archive:
        images = (item for item in archive if item.isfile() and item.name.lower().endswith(tuple(IMAGE_SUFFIXES)))
        index = {item.name: (item.offset_data, item.size) for item in images}
    return _Tar(open_file(uri), index)


class _Parquet:
    """An open Parquet file of which the row groups that were read last are kept."""

    def __init__(self, uri: str) -> None:
        self._file = pq.ParquetFile(open_file(uri))
        groups = self._file.metadata
        self._starts = list(accumulate((groups.row_group(n).num_rows for n in range(groups.num_row_groups)), initial=0))
        self._group = lru_cache(maxsize=2)(self._read_group)

    def read(self, column: str, row: int) -> bytes:
        group = bisect_right(self._starts, row) - 1
        value = self._group(group, column)[row - self._starts[group]].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise ValueError("the row is null")
        return bytes(data)

    def _read_group(self, group: int, column: str) -> Any:
        return self._file.read_row_group(group, columns=[column]).column(column)


_open_parquet = lru_cache(maxsize=8)(_Parquet)


class _Text:
    """An open CSV or JSON Lines file: where each row lies in it."""

    def __init__(self, uri: str) -> None:
        self._file = open_file(uri)
        self._csv = uri.lower().endswith(CSV)
        self._starts, self._ends = array("Q"), array("Q")
        position, quoted = 0, False
        with io.BufferedReader(open_stream(uri)) as lines:
            for line in lines:
                if not quoted and line.strip():
                    self._starts.append(position)
                    self._ends.append(position)
                position += len(line)
                if line.strip() or quoted:
                    self._ends[-1] = position
                quoted ^= self._csv and line.count(b'"') % 2 == 1  # a line's end within quotes ends no row of CSV

    def read(self, column: str, row: int) -> bytes:
        if not self._csv:
            value = json.loads(self._row(row))[column]
        else:
            both = self._row(0) + self._row(row + 1)
            value = _read_csv(pa.BufferReader(both), column).read_next_batch().column(0)[0].as_py()
        if not value:
            raise ValueError("the row is empty")
        return base64.b64decode(value.partition(";base64,")[2] if value.startswith("data:") else value, validate=True)

    def _row(self, number: int) -> bytes:
        start = self._starts[number]
        return bytes(self._file.read_at(self._ends[number] - start, start))


_open_text = lru_cache(maxsize=8)(_Text)


def _named_or_held(uri: str, rows: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, bool]]:
    """Rows of text, each a column's name and its value: names of inputs, or inputs themselves, as the first value tells."""
    held = None
    for number, (column, value) in enumerate(rows):
        if held is None and value:
            held = _holds_an_image(value)
        if held:
            yield f"{uri}#{column}[{number:09d}]", True
        elif value:
            yield value, False


def _holds_an_image(value: str) -> bool:
    """Whether a text is an image in base64: no path begins with a JPEG's signature and has no dot for so long."""
    if value.startswith("data:"):
        return True
    try:
        return len(value) > 64 and starts_like_image(base64.b64decode(value[:64], validate=True))
    except ValueError:
        return False


def _rows(uri: str, column: str | None) -> Iterator[tuple[str, bool]]:
    with pq.ParquetFile(open_file(uri)) as file:
        types = {field.name: field.type for field in file.schema_arrow}
        chosen = _choose(uri, column, [name for name, kind in types.items() if _holds_bytes(kind) or _holds_text(kind)])
        if _holds_bytes(types[chosen]):
            yield from ((f"{uri}#{chosen}[{row:09d}]", True) for row in range(file.metadata.num_rows))
        else:
            for batch in file.iter_batches(columns=[chosen]):
                yield from ((name, False) for name in batch.column(0).to_pylist() if name)


def _csv(uri: str, column: str | None) -> Iterator[tuple[str, str | None]]:
    with open_stream(uri) as stream, _read_csv(stream) as head:
        chosen = _choose(uri, column, head.schema.names)
    with open_stream(uri) as stream, _read_csv(stream, chosen) as table:
        for batch in table:
            yield from ((chosen, value) for value in batch.column(0).to_pylist())


def _read_csv(stream: Any, column: str | None = None) -> Any:
    """Read ``column`` as text, or whatever there is."""
    as_text = pa.csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()}) if column else None
    return pa.csv.open_csv(stream, pa.csv.ReadOptions(block_size=_LONGEST_ROW), convert_options=as_text)


def _json_lines(uri: str, column: str | None) -> Iterator[tuple[str, str | None]]:
    for number, line in enumerate(_text(uri), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise BadSource(f"Line {number} of '{uri}' is not JSON: write one object a line") from error
        if not isinstance(values, dict):
            raise BadSource(f"Line {number} of '{uri}' is no JSON object: write one object a line")
        chosen = _choose(uri, column, [key for key, value in values.items() if isinstance(value, str)])
        yield chosen, values[chosen]


def _text(uri: str) -> Iterator[str]:
    with io.TextIOWrapper(io.BufferedReader(open_stream(uri)), encoding="utf-8-sig") as lines:
        yield from lines


def _choose(uri: str, wanted: str | None, usable: list[str]) -> str:
    if wanted is not None:
        if wanted in usable:
            return wanted
        raise BadSource(f"'{uri}' has no column '{wanted}' of URIs or bytes; it has {', '.join(usable) or 'none'}")
    by_name = {name.lower(): name for name in usable}
    for name in COLUMNS + COLUMNS_OF_BYTES:
        if name in by_name:
            return by_name[name]
    raise BadSource(f"'{uri}' has no column that says which the images are: give --column, one of {', '.join(usable)}")


def _holds_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
