"""Where bytes lie: files, buckets, web servers. Reading from anywhere, and files that appear whole or not at all.

    path, file://                       local files
    s3://BUCKET/KEY                     Amazon S3 and what speaks like it; AWS_ENDPOINT_URL names another server
    gs://BUCKET/KEY                     Google Cloud Storage; STORAGE_EMULATOR_HOST names another server
    az://CONTAINER/PATH                 Azure Blob Storage of AZURE_STORAGE_ACCOUNT_NAME; AZURE_STORAGE_ENDPOINT likewise
    http(s)://…                         read only

pyarrow.fs does the buckets and fsspec the web; credentials are found where each of them looks: the environment, the user's
files, the machine's role. A key is taken as it stands, nothing in it is percent-decoded.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from fsspec import filesystem as fsspec_filesystem
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, PyFileSystem

from actors.errors import BadSource

CONNECTIONS = 16
"""How many small files are read or written at once where each costs a round trip."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)(.*)", re.DOTALL)
_WEB = ("http://", "https://")
_ENVIRONMENT = ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_HOST")
_RETRY_S = 60  # what Google's client makes of it by itself is a quarter of an hour


def absolute(name: str) -> str:
    """A URI as it is; a path made absolute, for every process to mean the same."""
    if name.startswith("file://"):
        return str(FileSystem.from_uri(name)[1])
    return name if has_scheme(name) else str(Path(name).absolute())


def has_scheme(name: str) -> bool:
    """Whether this is a URI and no path."""
    return _SCHEME.match(name) is not None


def is_utf8(name: str) -> bool:
    """Whether Arrow and OpenCV can take this name; not if bytes of the file system, or escapes of a table, are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def locate(uri: str) -> tuple[FileSystem, str]:
    """The file system that holds ``uri``, and what it is called there.

    Raises:
        BadSource: nothing here reads such URIs, or its account is not configured.
    """
    if (match := _SCHEME.fullmatch(uri)) is None:
        return _filesystem("file", ""), uri
    scheme, authority, path = match.groups()
    return _filesystem(scheme, authority), uri if uri.startswith(_WEB) else authority + path


def read_bytes(uri: str) -> bytes:
    """Everything that ``uri`` holds.

    Raises:
        OSError: it cannot be read.
    """
    if uri.startswith(_WEB):
        try:
            return bytes(fsspec_filesystem("http").cat_file(uri))  # one request; opening it would ask for the size before
        except OSError:
            raise
        except Exception as error:  # aiohttp's own tree, which not all is an OSError
            raise OSError(str(error)) from error
    with open_stream(uri) as stream:
        return bytes(stream.read())


def open_file(uri: str) -> Any:
    """``uri`` for reading from anywhere in it: a ``pyarrow.NativeFile``, whose stubs do not tell that it is a binary file.

    Raises:
        OSError: it cannot be opened.
    """
    filesystem, path = locate(uri)
    return filesystem.open_input_file(path)


def open_stream(uri: str) -> Any:
    """``uri`` for reading it once from the start; else like ``open_file``."""
    filesystem, path = locate(uri)
    return filesystem.open_input_stream(path)


def version_of(info: FileInfo) -> str | None:
    """Size in bytes and modification time in nanoseconds, as one string; None where the storage does not tell both."""
    return None if info.mtime_ns is None or info.size is None else f"{info.size}-{info.mtime_ns}"


def credentials() -> dict[str, str]:
    """What of this process's environment decides which storage is reached, for the actors on other nodes."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}


@dataclass(frozen=True, slots=True)
class Storage:
    """An output folder, local or in a bucket, whose files appear whole or not at all. Picklable.

    A file is put under a *lease*, a run's right to write. Who takes the folder over ends the leases before. A local put
    under an ended lease always fails, since its temporary name lies in the lease's folder. In a bucket the lease is looked
    up before the put, so that a put that is under way then still lands.

    Attributes:
        root: an absolute path, or the URI of a prefix.
    """

    root: str

    @classmethod
    def at(cls, root: str | Path) -> Storage:
        """The storage at a path or URI.

        Raises:
            BadSource: nothing here can write to such a URI.
        """
        storage = cls(absolute(str(root)).rstrip("/"))
        if isinstance(storage.filesystem, PyFileSystem):
            raise BadSource(f"Nothing can be written to {root}: give a folder, or a bucket (s3://, gs://, az://)")
        return storage

    @property
    def filesystem(self) -> FileSystem:
        """The file system of ``path``."""
        return locate(self.root)[0]

    def path(self, name: str) -> str:
        """What a file of this folder is called in ``filesystem``."""
        root = locate(self.root)[1]
        return f"{root}/{name}" if name else root

    def lease(self, lease: str) -> None:
        """Begin a lease; ``delete`` ends it."""
        if self._local:
            Path(self.path(lease)).mkdir(parents=True)
        else:
            self._upload(self.path(f"{lease}/lease"), pa.py_buffer(b""))

    def put(self, name: str, data: bytes | pa.Buffer, lease: str) -> None:
        """Write a file in one step: locally by a rename, in a bucket by one upload.

        Raises:
            FileNotFoundError: the lease has ended.
            OSError: it cannot be written.
        """
        if self._local:
            aside = Path(self.path(f"{lease}/{uuid.uuid4().hex}"))
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._rename(aside, name)
        else:
            self._check(lease)
            self._upload(self.path(name), pa.py_buffer(data))

    def publish(self, name: str, made: Path, lease: str) -> None:
        """Move a file or a folder, made in ``scratch``, to its final name; in a bucket a folder's files go one by one."""
        if self._local:
            if made.is_dir():
                self.delete(name)
            self._rename(made, name)
            return
        self._check(lease)
        if made.is_dir():
            self.delete(name)
            files = [(path, f"{name}/{path.relative_to(made)}") for path in sorted(made.rglob("*")) if path.is_file()]
        else:
            files = [(made, name)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(lambda item: self._upload(self.path(item[1]), pa.py_buffer(item[0].read_bytes())), files))

    @contextmanager
    def scratch(self, lease: str) -> Iterator[Path]:
        """A local folder for what is too large for memory, gone on leaving."""
        with tempfile.TemporaryDirectory(dir=self.path(lease) if self._local else None) as folder:
            yield Path(folder)

    def read(self, name: str) -> bytes | None:
        """A file's content, None if there is no such file."""
        try:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """A file for reading from anywhere in it: a ``pyarrow.NativeFile``."""
        return self.filesystem.open_input_file(self.path(name))

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self.filesystem.get_file_info(self.path(name)).type is FileType.File)

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in ``folder``, sorted, with the folder's name before each."""
        selector = FileSelector(self.path(folder), allow_not_found=True)
        found = [info.base_name for info in self.filesystem.get_file_info(selector)]
        return sorted(f"{folder}/{name}" if folder else name for name in found)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing happens if there is none."""
        kind = self.filesystem.get_file_info(self.path(name)).type
        if self._local and kind is FileType.Directory:
            shutil.rmtree(self.path(name))
        elif kind is FileType.Directory:
            with suppress(FileNotFoundError):  # gs:// empties it, and then misses the object that stands for a folder
                self.filesystem.delete_dir(self.path(name))
        elif kind is not FileType.NotFound:
            self.filesystem.delete_file(self.path(name))

    @property
    def _local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def _check(self, lease: str) -> None:
        if self.filesystem.get_file_info(self.path(f"{lease}/lease")).type is not FileType.File:
            raise FileNotFoundError(f"{self.root} was taken over by a later run")

    def _upload(self, path: str, data: pa.Buffer) -> None:
        with self.filesystem.open_output_stream(path) as stream:  # nothing is visible before it is closed
            stream.write(data)

    def _rename(self, aside: Path, name: str) -> None:
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        aside.replace(final)


@cache
def _filesystem(scheme: str, authority: str) -> FileSystem:
    if scheme == "file":
        return LocalFileSystem()
    if scheme not in {"s3", "gs", "az", "http", "https"}:
        raise BadSource(f"Nothing here reads {scheme}:// - use a path, s3://, gs://, az:// or http(s)://")
    try:
        if scheme == "gs":
            return _google()
        if scheme == "az":
            return _azure()
        return FileSystem.from_uri(f"{'fsspec+' if scheme.startswith('http') else ''}{scheme}://{authority}")[0]
    except (OSError, pa.ArrowInvalid) as error:
        raise BadSource(f"{scheme}://{authority} cannot be reached: {error}") from error
    except ImportError as error:
        raise BadSource(f"This build of pyarrow has no {scheme}://: install PyPI's own, pip install pyarrow") from error


def _google() -> FileSystem:
    from pyarrow.fs import GcsFileSystem

    server = urlsplit(os.environ.get("STORAGE_EMULATOR_HOST", ""))
    other: dict[str, Any] = {"anonymous": True, "scheme": server.scheme, "endpoint_override": server.netloc}
    return GcsFileSystem(retry_time_limit=timedelta(seconds=_RETRY_S), **other if server.netloc else {})


def _azure() -> FileSystem:
    from pyarrow.fs import AzureFileSystem

    account, server = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"), urlsplit(os.environ.get("AZURE_STORAGE_ENDPOINT", ""))
    if not account:
        raise BadSource("az:// needs the storage account's name: set AZURE_STORAGE_ACCOUNT_NAME")
    kinds = ("blob_storage", "dfs_storage")
    other: dict[str, Any] = {
        f"{kind}_{part}": value for kind in kinds for part, value in zip(("scheme", "authority"), server[:2], strict=True)
    }
    return AzureFileSystem(account, account_key=os.environ.get("AZURE_STORAGE_ACCOUNT_KEY"), **other if server.netloc else {})
