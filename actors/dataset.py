"""Sources → URIs → shards. Everything is listed, or refused, before any model is loaded.

folder, glob, list, table, tar, image, video … ─ list_inputs ─→ sorted URIs, each once, with versions ─ into_shards ─→ Shard, …

An input is one string, its URI, for everybody after this: ledger, dead letters, pool. About 250 bytes of the driver's
memory an input of 81 characters, its version included, and 290 while it lists (measured with tracemalloc on 500,000).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fsspec.utils import glob_translate
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from actors.clips import CLIP_SUFFIXES, is_clip, list_frames
from actors.containers import CONTAINERS, is_container, members, read_member, split_member
from actors.errors import BadSource
from actors.images import IMAGE_SUFFIXES
from actors.storage import absolute, has_scheme, is_utf8, locate, read_bytes, version_of

MAX_SHARD = 256


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work and of commitment: some inputs that one actor takes together.

    Attributes:
        uris: the inputs.
        versions: what the storage said of each when it was listed; empty if of none.
    """

    uris: tuple[str, ...]
    versions: tuple[str | None, ...] = ()

    @property
    def key(self) -> str:
        """A name that follows from the inputs alone, so that the same shard is never committed under two names."""
        return hashlib.sha256("\n".join(self.uris).encode(errors="surrogatepass")).hexdigest()[:16]

    def halves(self) -> tuple[Shard, Shard]:
        """This shard as two, to find the one input that kills an actor."""
        middle = len(self.uris) // 2
        return Shard(self.uris[:middle], self.versions[:middle]), Shard(self.uris[middle:], self.versions[middle:])


def list_inputs(sources: Sequence[str], column: str | None = None) -> dict[str, str | None]:
    """Find every input that ``sources`` name.

    A version is what the storage tells while it lists: size and modification time, a container's for all its members. A
    name that only stands in a list has one if it is a local file; for any other it would take a request each. An input whose
    version changes is computed again by the same job. One without a version stays as it was committed: the content hash in
    its row says of which content the result is.

    Args:
        sources: folders and buckets' prefixes (searched recursively for images and videos), globs (``**`` crosses folders),
            lists (``.txt``, one path or URI a line), tables (``.csv``, ``.jsonl``, ``.parquet``), tar shards (``.tar``),
            images and videos, each a path or a URI; a video is a local file. A name in a list or table is relative to its
            folder, else to the working directory.
        column: the tables' column that holds URIs or bytes; see ``containers.members``.

    Returns:
        URI → version, sorted by URI; of a video its frames (see ``actors.clips``). A file that is named itself is listed
        whatever its suffix.

    Raises:
        BadSource: a source does not exist, cannot be read, or holds no image.
    """
    if not sources:
        raise BadSource("No source was given: name a folder, a glob, a list, a table, a tar, images or videos")
    found: dict[str, str | None] = {}
    for source in sources:
        found.update(_list_one(source, column))
    return {uri: found[name] for name in sorted(found) for uri in _frames(name)}


def read_input(uri: str) -> bytes:
    """The encoded bytes of one input.

    Raises:
        OSError: it cannot be read, or its name cannot stand in a result.
    """
    if not is_utf8(uri):
        raise OSError("its name is not UTF-8: rename it")
    member = split_member(uri)
    return read_member(*member) if member else read_bytes(uri)


def into_shards(
    uris: Sequence[str], workers: int, largest: int = MAX_SHARD, versions: Mapping[str, str | None] | None = None
) -> Iterator[Shard]:
    """Cut inputs into shards of at most ``largest``, and small enough that each of ``workers`` gets several."""
    size = max(1, min(largest, -(-len(uris) // (4 * workers))))
    for start in range(0, len(uris), size):
        some = tuple(uris[start : start + size])
        yield Shard(some, tuple(versions.get(uri) for uri in some) if versions else ())


def _list_one(source: str, column: str | None) -> dict[str, str | None]:
    uri = absolute(source)
    if not is_utf8(uri) and Path(uri).is_file():
        return {uri: _local_version(Path(uri))}
    filesystem, path = locate(uri)
    try:
        info = filesystem.get_file_info(path)
        if info.type is FileType.Directory:
            found, kind = _images(_walk(filesystem, uri)), "folder"
        elif info.type is FileType.File:
            found, kind = _expand(uri, version_of(info), column), "file"
        elif glob.has_magic(source) and info.type is FileType.NotFound:
            found, kind = _matches(filesystem, uri, column), "glob"
        else:
            raise BadSource(f"There is nothing at '{source}': give a folder, a glob, a list, a table, a tar or an image")
    except OSError as error:
        raise BadSource(f"'{source}' cannot be listed: {error}") from error
    except UnicodeEncodeError as error:
        raise BadSource(f"{source!a} cannot be listed: the name is not UTF-8; give another") from error
    if not found:
        kinds, containers = ", ".join(sorted(IMAGE_SUFFIXES | CLIP_SUFFIXES)), ", ".join(CONTAINERS)
        raise BadSource(
            f"The {kind} '{source}' holds no image or video ({kinds}); name {containers} files one by one or by glob"
        )
    return found


def _expand(uri: str, version: str | None, column: str | None) -> dict[str, str | None]:
    """A file as what it holds, if it is a container, else as itself; one that cannot be opened for its name, to fail alone."""
    if not is_container(uri) or not is_utf8(uri):
        return {uri: version}
    found: dict[str, str | None] = {}
    for name, is_member in members(uri, column):
        if is_member:
            found[name] = version
        else:
            named, known = _resolve(name, uri)
            found.update(_expand(named, known, column) if is_container(named) and named != uri else {named: known})
    return found


def _frames(uri: str) -> list[str]:
    """A video as its frames, anything else as itself; a video that cannot be opened for its name, to fail as one input."""
    if not is_clip(Path(uri)) or not is_utf8(uri):
        return [uri]
    if has_scheme(uri):
        raise BadSource(f"'{uri}' is a video, which has to be a local file to be sought in: copy it to where all nodes see it")
    return list_frames(uri)


def _resolve(name: str, container: str) -> tuple[str, str | None]:
    """What a list or a table means by ``name``, and its version if that costs no request."""
    if has_scheme(name):
        return absolute(name), None
    if has_scheme(container):
        return f"{container.rpartition('/')[0]}/{name}", None
    beside = Path(container).parent / name
    path = beside if beside.exists() else Path(name).absolute()
    return str(path), _local_version(path)


def _matches(filesystem: FileSystem, pattern: str, column: str | None) -> dict[str, str | None]:
    """The images that a glob matches; or containers, if it asks for them by their suffix."""
    if isinstance(filesystem, LocalFileSystem):
        names = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = ((name, _local_version(Path(name))) for name in names if Path(name).is_file())
    else:
        matches = re.compile(glob_translate(pattern)).match
        files = (item for item in _walk(filesystem, _fixed_part(pattern)) if matches(item[0]))
    if not is_container(pattern):
        return _images(files)
    found: dict[str, str | None] = {}
    for uri, version in files:
        found.update(_expand(uri, version, column))
    return found


def _fixed_part(pattern: str) -> str:
    """The folder below which everything lies that a glob can match."""
    magic = next(place for place, letter in enumerate(pattern) if letter in "*?[")
    return pattern[:magic].rpartition("/")[0]


def _walk(filesystem: FileSystem, folder: str) -> Iterator[tuple[str, str | None]]:
    """Every file below ``folder`` with its version. Links to folders are not followed: they may lead in circles."""
    if isinstance(filesystem, LocalFileSystem):
        for parent, _, names in os.walk(folder, onerror=_raise):
            yield from ((str(path), _local_version(path)) for path in map(Path(parent).joinpath, names) if path.is_file())
        return
    scheme = folder.partition("://")[0]
    for info in filesystem.get_file_info(FileSelector(locate(folder)[1], recursive=True)):
        if info.type is FileType.File:
            yield f"{scheme}://{info.path}", version_of(info)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # it has gone since its parent was listed
        raise error


def _images(files: Iterable[tuple[str, str | None]]) -> dict[str, str | None]:
    suffixes = IMAGE_SUFFIXES | CLIP_SUFFIXES
    return {uri: version for uri, version in files if Path(uri).suffix.lower() in suffixes}


def _local_version(path: Path) -> str | None:
    """Like ``storage.version_of``; None if there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name that cannot be one
        return None
    return f"{status.st_size}-{status.st_mtime_ns}"
