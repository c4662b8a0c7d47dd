"""The ledger of a job: which inputs are done. Done means committed, and committing is one step of the storage.

    DIR/job.json              what the job is: sources, weights, arguments. Another job may not write here
    DIR/detections/KEY.parquet  one committed shard: its rows, and its manifest in the file's metadata
    DIR/tracks/               what was made of the detections of each video (see actors.tracks)
    DIR/.pending/RUN/         this run's lease, and what it is writing; whatever lies here after a crash is worth nothing
    DIR/errors.jsonl          the dead letters of all committed shards ┐ derived when the job ends,
    DIR/summary.json          what it came to                          ┘ by whoever ends it

DIR is a folder or a bucket's prefix. A shard's rows and its manifest (dead letters, counts, times) are one file, so that a
crash at any point leaves all of it or nothing. A resumed job reads which URIs are committed and goes on with the others.

No input is in two files. Whoever wants one computed again (its content changed, or it failed and is retried) takes it out
of its file first, which is one step too, and from then on it is like any that was never reached.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.dataset import Shard
from actors.errors import BadSource, OutputMismatch
from actors.storage import CONNECTIONS, Storage, is_utf8
from actors.writers import SCHEMA, table

METADATA_KEY = b"yolofleet"
PACKAGES = ("yolofleet", "ray", "torch", "ultralytics-opencv-headless")
DETECTIONS, TRACKS = "detections", "tracks"
PENDING = ".pending"
DERIVED = ("errors.jsonl", "summary.json", "detections.jsonl", "coco.json", "yolo", TRACKS, "mot", "annotated")
"""What else may lie in the folder of a job, and is made anew from what is committed."""
OURS = (DETECTIONS, *DERIVED, "job.json")
"""All that a job leaves in its folder."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An input without a result: where it failed (read, decode, predict, crash) and why.

    Attributes:
        uri: the input.
        stage: where it failed.
        reason: a sentence.
        sha256: of its content, where that could be read.
        version: what the storage said of it when it was listed.
    """

    uri: str
    stage: str
    reason: str
    sha256: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one committed shard came to.

    Attributes:
        results: rows in the file.
        dead_letters: the shard's other inputs.
        classes: class name → detections.
        stage_ms: stage → milliseconds, summed over the shard's images; ``starved`` is not a stage but what the model
            thread waited for images meanwhile.
    """

    results: int
    dead_letters: tuple[DeadLetter, ...] = ()
    classes: dict[str, int] = field(default_factory=dict)
    stage_ms: dict[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """Inputs that this shard accounts for."""
        return self.results + len(self.dead_letters)


@dataclass(frozen=True, slots=True)
class _Committed:
    """One committed file: the inputs it accounts for, with their versions, and its manifest."""

    name: str
    versions: dict[str, str | None]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Ledger:
    """The output folder of one job, and the only writer of it. Picklable: every actor of a run gets a copy.

    Attributes:
        storage: the folder.
        job: what the job is; written into every committed file.
        run: this run of the job. An actor that outlives its driver loses its lease to the next run, and with it the means
            to commit.
    """

    storage: Storage
    job: dict[str, Any]
    run: str

    @classmethod
    def open(
        cls, root: str | Path, job: dict[str, Any], *, fresh: bool = False, request: dict[str, Any] | None = None
    ) -> Ledger:
        """Open the folder for a job, and clear away what a crash left half-written.

        Args:
            root: the output folder, or the URI of a bucket's prefix; made if it is missing.
            job: what decides the results (weights' hash, arguments), as JSON values.
            fresh: throw away what is committed.
            request: how the job was asked for, as JSON values; kept for ``requested``.

        Raises:
            OutputMismatch: the folder holds the results of another job, or files that are none of a job's. It is as it was.
            BadSource: the folder cannot be reached or written to.
        """
        ledger = cls(Storage.at(root), job, uuid.uuid4().hex)
        try:
            ledger._check_job(fresh=fresh)
            if fresh:
                ledger._clear()
            ledger.storage.delete(PENDING)
            ledger.storage.lease(ledger.lease)
            kept = _stored(ledger.storage) or {}
            ledger._put_json("job.json", kept | {"identity": job, "request": request})
        except OSError as error:
            raise BadSource(f"Nothing can be written to {root}: {error}") from error
        return ledger

    @staticmethod
    def requested(root: str | Path) -> dict[str, Any]:
        """How the job was asked for whose results are at ``root``.

        Raises:
            BadSource: there are no results of a job.
        """
        job = _stored(Storage.at(root))
        if job is None:
            raise BadSource(f"{root} holds no results of a job: name the folder that was given as --out")
        request: dict[str, Any] = job["request"]
        return request

    def settle_engine(self, engine: str) -> None:
        """Hold the job to one engine from its first input to its last, in all its runs: two differ in the last digits.

        Args:
            engine: what an actor computes with, and in which precision.

        Raises:
            OutputMismatch: what is committed was computed with another.
        """
        job = json.loads(self.storage.read("job.json") or b"{}")
        before = job.setdefault("engine", engine)
        if before != engine:
            raise OutputMismatch(
                f"{self.storage.root} was begun with the engine {before}, and here it would go on with {engine}: give"
                " --engine and --precision as it was, install what that takes, or give --fresh to start over"
            )
        self._put_json("job.json", job)

    @property
    def lease(self) -> str:
        """This run's right to write, see ``Storage``."""
        return f"{PENDING}/{self.run}"

    def commit(
        self, shard: Shard, rows: Sequence[dict[str, Any]], manifest: Manifest, model: dict[str, Any] | None = None
    ) -> None:
        """Commit one shard in one step. Idempotent.

        Args:
            shard: the inputs, each of which is a row or a dead letter.
            rows: of ``writers.SCHEMA``.
            manifest: what they came to.
            model: what computed them: names, engine, versions.

        Raises:
            FileNotFoundError: a later run has taken the folder over.
        """
        about = self.metadata(model=model, manifest=asdict(manifest))
        self._put_table(self._file(shard), table(rows).replace_schema_metadata(about))

    def place(self, name: str, write: Callable[[Path], None]) -> None:
        """Commit what is made of the committed shards, a file or a folder: written aside, then published as ``name``.

        Raises:
            FileNotFoundError: a later run has taken the folder over.
        """
        with self.storage.scratch(self.lease) as folder:
            made = folder / Path(name).name
            write(made)
            self.storage.publish(name, made, self.lease)

    def metadata(self, **more: Any) -> dict[bytes, bytes]:
        """What stands in the metadata of every Arrow file of the job: what the job is, whose work it is, and ``more``."""
        return _metadata({"job": self.job, "versions": package_versions(), **more})

    def rows_of(self, video: str) -> pa.Table:
        """The committed rows of one video, in the order of its frames."""
        import pyarrow.dataset  # which imports pandas: every actor would pay for it as it starts

        folder = self.storage.path(DETECTIONS)
        rows = pyarrow.dataset.dataset(folder, schema=SCHEMA, format="parquet", filesystem=self.storage.filesystem)
        return rows.to_table(filter=pyarrow.dataset.field("video") == video).sort_by("frame")

    def manifest(self, shard: Shard) -> Manifest | None:
        """The manifest of one shard, if it is committed."""
        try:
            return self._read(self._file(shard)).manifest
        except FileNotFoundError:
            return None

    def manifests(self) -> Iterator[Manifest]:
        """The manifests of all committed shards."""
        return (committed.manifest for committed in self._scan())

    def files(self) -> list[str]:
        """The names of all committed files in ``storage``, sorted."""
        return self.storage.names(DETECTIONS)

    def committed(self) -> set[str]:
        """URIs that are accounted for, as a result or as a dead letter."""
        return {uri for committed in self._scan() for uri in committed.versions}

    def settle(self) -> dict[str, str | None]:
        """The URIs that are accounted for, with their versions; each of them is in one file afterwards.

        Before that an input may be in two, if in a bucket an actor of an earlier run was committing while this one began.
        """
        versions: dict[str, str | None] = {}
        for committed in self._scan():
            if twins := versions.keys() & committed.versions.keys():
                self._take_out(committed, twins)
            for uri, version in committed.versions.items():
                versions.setdefault(uri, version)
        return versions

    def forget(self, uris: Collection[str]) -> None:
        """Take inputs out of the committed files, whether results or dead letters, so that they are computed again."""
        wanted = set(uris)
        if wanted:
            for committed in self._scan():
                if gone := wanted & committed.versions.keys():
                    self._take_out(committed, gone)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``errors.jsonl`` from the committed manifests, and ``summary.json``."""
        letters = sorted((letter for manifest in self.manifests() for letter in manifest.dead_letters), key=lambda x: x.uri)
        lines = "".join(json.dumps(asdict(letter)) + "\n" for letter in letters)
        self.storage.put("errors.jsonl", lines.encode(), self.lease)
        self._put_json("summary.json", summary)
        self.storage.delete(PENDING)

    def _file(self, shard: Shard) -> str:
        return f"{DETECTIONS}/{shard.key}.parquet"

    def _scan(self) -> Iterator[_Committed]:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            yield from pool.map(self._read, self.files())

    def _read(self, name: str) -> _Committed:
        rows = self._read_table(name, ["uri", "version"])
        manifest = _manifest(_about(rows))
        versions = {letter.uri: letter.version for letter in manifest.dead_letters}
        versions.update((row["uri"], row["version"]) for row in rows.to_pylist())
        return _Committed(name, versions, manifest)

    def _read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self.storage.open(name) as file:
            return pq.ParquetFile(file).read(columns)

    def _take_out(self, committed: _Committed, gone: Collection[str]) -> None:
        """Write a committed file again without some of its inputs; their share of the stages' time goes with them."""
        letters = tuple(letter for letter in committed.manifest.dead_letters if letter.uri not in gone)
        rows = self._read_table(committed.name)
        values = pa.array(filter(is_utf8, gone), pa.string())  # no other is in a row
        kept = rows.filter(pc.invert(pc.is_in(rows.column("uri"), values)))
        if not kept.num_rows and not letters:
            self.storage.delete(committed.name)
            return
        names = (found["name"] for row in kept.to_pylist() for found in row["detections"])
        share = kept.num_rows / max(rows.num_rows, 1)
        manifest = replace(
            committed.manifest,
            results=kept.num_rows,
            dead_letters=letters,
            classes=dict(Counter(names)),
            stage_ms={stage: milliseconds * share for stage, milliseconds in committed.manifest.stage_ms.items()},
        )
        about = _about(rows) | {"manifest": asdict(manifest)}
        self._put_table(committed.name, kept.replace_schema_metadata(_metadata(about)))

    def _check_job(self, *, fresh: bool) -> None:
        job = _stored(self.storage)
        if job is not None and not fresh:
            if differences := _differences(job["identity"], self.job):
                raise OutputMismatch(
                    f"{self.storage.root} holds the results of another job ({'; '.join(differences)}):"
                    " give another --out, or --fresh to throw these results away"
                )
        elif set(self.storage.names()) - ({PENDING} if job is None else {PENDING, *OURS}):
            raise OutputMismatch(
                f"{self.storage.root} holds files that are none of ours: give an empty or a new folder as --out"
            )

    def _clear(self) -> None:
        for name in (PENDING, *OURS):
            self.storage.delete(name)

    def _put_table(self, name: str, rows: pa.Table) -> None:
        buffer = pa.BufferOutputStream()
        pq.write_table(rows, buffer, compression="zstd")
        self.storage.put(name, buffer.getvalue(), self.lease)

    def _put_json(self, name: str, value: dict[str, Any]) -> None:
        self.storage.put(name, (json.dumps(value, indent=2) + "\n").encode(), self.lease)


@cache
def package_versions() -> dict[str, str]:
    """Of the packages that a result depends on, in this process."""
    return {name: metadata.version(name) for name in PACKAGES}


def totals(manifests: Iterator[Manifest]) -> Manifest:
    """All manifests added up; their dead letters one after another."""
    results = 0
    letters: list[DeadLetter] = []
    classes: Counter[str] = Counter()
    stages: dict[str, float] = {}
    for manifest in manifests:
        results += manifest.results
        letters.extend(manifest.dead_letters)
        classes.update(manifest.classes)
        for stage, milliseconds in manifest.stage_ms.items():
            stages[stage] = stages.get(stage, 0.0) + milliseconds
    return Manifest(results, tuple(letters), dict(sorted(classes.items())), stages)


def _stored(storage: Storage) -> dict[str, Any] | None:
    """What ``job.json`` holds, None if there is none.

    Raises:
        OutputMismatch: it is none that a job has written.
    """
    content = storage.read("job.json")
    if content is None:
        return None
    try:
        job: Any = json.loads(content)
    except ValueError:
        job = None
    if not isinstance(job, dict) or "identity" not in job:
        raise OutputMismatch(f"{storage.root}/job.json is none of ours: give an empty or a new folder as --out")
    return job


def _metadata(about: dict[str, Any]) -> dict[bytes, bytes]:
    return {METADATA_KEY: json.dumps(about).encode()}


def _about(rows: pa.Table) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(rows.schema.metadata[METADATA_KEY])
    return about


def _manifest(about: dict[str, Any]) -> Manifest:
    manifest = dict(about["manifest"])
    letters = tuple(DeadLetter(**letter) for letter in manifest.pop("dead_letters"))
    return Manifest(dead_letters=letters, **manifest)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    before, now = _flat(before), _flat(now)
    return [
        f"{key} was {before.get(key)}, is {now.get(key)}" for key in sorted(before | now) if before.get(key) != now.get(key)
    ]


def _flat(job: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(job)).items():
        flat |= _flat(value) if isinstance(value, dict) else {key: value}
    return flat
