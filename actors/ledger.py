"""The ledger of a job: which inputs are done. Done means committed, and committing is one rename.

    DIR/job.json              what the job is: sources, weights, arguments. Another job may not write here
    DIR/detections/KEY.parquet  one committed shard: its rows, and its manifest in the file's metadata
    DIR/.pending/RUN/         shards that are being written; whatever lies here after a crash is worth nothing
    DIR/errors.jsonl          the dead letters of all committed shards ┐ derived when the job ends,
    DIR/summary.json          what it came to                          ┘ by whoever ends it

A shard's rows and its manifest (dead letters, counts, times) are one file, so that a crash at any point leaves all of it
or nothing. A resumed job reads which URIs are committed and goes on with the others.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.dataset import Shard
from actors.errors import OutputMismatch
from actors.writers import table

METADATA_KEY = b"yolofleet"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An input without a result: where it failed (read, decode, predict, crash) and why."""

    uri: str
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one committed shard came to.

    Attributes:
        results: rows in the file.
        dead_letters: the shard's other inputs.
        classes: class name → detections.
        stage_ms: stage → milliseconds, summed over the shard's images.
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
class Ledger:
    """The output folder of one job, and the only writer of it. Picklable: every actor of a run gets a copy.

    Attributes:
        root: the folder.
        job: what the job is; written into every committed file.
        run: this run of the job. An actor that outlives its driver loses its pending folder to the next run, and with it
            the means to commit.
    """

    root: Path
    job: dict[str, Any]
    run: str

    @classmethod
    def open(cls, root: Path, job: dict[str, Any], *, fresh: bool = False) -> Ledger:
        """Open the folder for a job, and clear away what a crash left half-written.

        Args:
            root: the output folder; made if it is missing.
            job: what decides the results (weights' hash, arguments), as JSON values.
            fresh: throw away what is committed.

        Raises:
            OutputMismatch: the folder holds the results of another job, or files that are none of a job's.
        """
        ledger = cls(root, job, uuid.uuid4().hex)
        if fresh and (root / "job.json").exists():
            ledger._clear()
        ledger._claim()
        ledger._drop_pending()
        ledger._pending.mkdir(parents=True)
        ledger._detections.mkdir(exist_ok=True)
        return ledger

    def commit(self, shard: Shard, rows: Sequence[dict[str, Any]], manifest: Manifest) -> None:
        """Commit one shard: write it aside, then rename it into place. Idempotent.

        Raises:
            FileNotFoundError: a later run has taken the folder over.
        """
        metadata = {METADATA_KEY: json.dumps({"job": self.job, "manifest": asdict(manifest)}).encode()}
        pending = self._pending / f"{shard.key}-{uuid.uuid4().hex}"
        pq.write_table(table(rows).replace_schema_metadata(metadata), pending, compression="zstd")
        with pending.open("rb") as written:
            os.fsync(written.fileno())
        pending.replace(self._file(shard))

    def manifest(self, shard: Shard) -> Manifest | None:
        """The manifest of one shard, if it is committed."""
        file = self._file(shard)
        return _read_manifest(pq.read_schema(file)) if file.exists() else None

    def manifests(self) -> Iterator[Manifest]:
        """The manifests of all committed shards."""
        for path in sorted(self._detections.glob("*.parquet")):
            yield _read_manifest(pq.read_schema(path))

    def committed(self) -> set[str]:
        """URIs that are accounted for, as a result or as a dead letter."""
        done: set[str] = set()
        for path in self._detections.glob("*.parquet"):
            shard = pq.read_table(path, columns=["uri"])
            done.update(str(uri) for uri in shard.column("uri").to_pylist())
            done.update(letter.uri for letter in _read_manifest(shard.schema).dead_letters)
        return done

    def finish(self, summary: dict[str, Any]) -> None:
        """Write ``errors.jsonl`` from the committed manifests, and ``summary.json``."""
        letters = sorted((letter for manifest in self.manifests() for letter in manifest.dead_letters), key=lambda x: x.uri)
        self._replace("errors.jsonl", "".join(json.dumps(asdict(letter)) + "\n" for letter in letters))
        self._replace("summary.json", json.dumps(summary, indent=2) + "\n")
        self._drop_pending()

    def _file(self, shard: Shard) -> Path:
        return self._detections / f"{shard.key}.parquet"

    def _drop_pending(self) -> None:
        shutil.rmtree(self._pending.parent, ignore_errors=True)

    @property
    def _detections(self) -> Path:
        return self.root / "detections"

    @property
    def _pending(self) -> Path:
        return self.root / ".pending" / self.run

    def _claim(self) -> None:
        file = self.root / "job.json"
        if file.exists():
            differences = _differences(json.loads(file.read_text()), self.job)
            if differences:
                raise OutputMismatch(
                    f"{self.root} holds the results of another job ({'; '.join(differences)}):"
                    " give another --out, or --fresh to throw these results away"
                )
            return
        if self.root.exists() and any(self.root.iterdir()):
            raise OutputMismatch(f"{self.root} holds files that are none of ours: give an empty or a new folder as --out")
        self.root.mkdir(parents=True, exist_ok=True)
        self._replace("job.json", json.dumps(self.job, indent=2) + "\n")

    def _clear(self) -> None:
        shutil.rmtree(self._detections, ignore_errors=True)
        self._drop_pending()
        for name in ("errors.jsonl", "summary.json", "job.json"):
            (self.root / name).unlink(missing_ok=True)

    def _replace(self, name: str, text: str) -> None:
        aside = self.root / f".{name}.{uuid.uuid4().hex}"
        aside.write_text(text)
        aside.replace(self.root / name)


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


def _read_manifest(schema: pa.Schema) -> Manifest:
    manifest = json.loads(schema.metadata[METADATA_KEY])["manifest"]
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
