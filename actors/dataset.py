"""Sources → URIs → shards. Everything is listed, or refused, before any model is loaded.

folder, glob, list file, image … ─ list_inputs ─→ sorted URIs, each once ─ into_shards ─→ Shard, Shard, …
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.errors import BadSource
from actors.images import IMAGE_SUFFIXES

LIST_SUFFIX = ".txt"
MAX_SHARD = 256


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work and of commitment: some inputs that one actor takes together."""

    uris: tuple[str, ...]

    @property
    def key(self) -> str:
        """A name that follows from the inputs alone, so that the same shard is never committed under two names."""
        return hashlib.sha256("\n".join(self.uris).encode()).hexdigest()[:16]

    def halves(self) -> tuple[Shard, Shard]:
        """This shard as two, to find the one input that kills an actor."""
        middle = len(self.uris) // 2
        return Shard(self.uris[:middle]), Shard(self.uris[middle:])


def list_inputs(sources: Sequence[str]) -> list[str]:
    """Find every input that ``sources`` name.

    Args:
        sources: folders (searched recursively for images), globs (``**`` crosses folders), list files (``.txt``, one path
            a line, relative to the list's folder or to the working directory) and image files.

    Returns:
        Absolute paths, sorted, each once. A file that is named itself is listed whatever its suffix.

    Raises:
        BadSource: a source does not exist, cannot be read, or holds no image.
    """
    if not sources:
        raise BadSource("No source was given: name a folder, a glob, a list file or images")
    return sorted({uri for source in sources for uri in _list_one(source)})


def read_input(uri: str) -> bytes:
    """The encoded bytes of one input.

    Raises:
        OSError: it cannot be read.
    """
    return Path(uri).read_bytes()


def into_shards(uris: Sequence[str], workers: int, largest: int = MAX_SHARD) -> Iterator[Shard]:
    """Cut inputs into shards of at most ``largest``, and small enough that each of ``workers`` gets several."""
    size = max(1, min(largest, -(-len(uris) // (4 * workers))))
    for start in range(0, len(uris), size):
        yield Shard(tuple(uris[start : start + size]))


def _list_one(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        found = [str(file.absolute()) for file in path.rglob("*") if _is_image(file)]
        kind = "folder"
    elif path.suffix.lower() == LIST_SUFFIX and path.is_file():
        found = _read_list(path)
        kind = "list"
    elif path.is_file():
        return [str(path.absolute())]
    elif glob.has_magic(source):
        matches = glob.glob(source, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [str(Path(name).absolute()) for name in matches if _is_image(Path(name))]
        kind = "glob"
    else:
        raise BadSource(f"There is nothing at '{source}': give a folder, a glob, a list file or an image")
    if not found:
        raise BadSource(f"The {kind} '{source}' holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadSource(f"The list '{path}' is not UTF-8 text: write one path a line") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    beside = [path.parent / name for name in names]
    return [str((near if near.exists() else Path(name)).absolute()) for name, near in zip(names, beside, strict=True)]
